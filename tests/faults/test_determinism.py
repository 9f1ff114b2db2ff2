"""The same study twice gives the same numbers, however its data were prepared and served."""

import numpy as np
import pytest

from raredistill import checkpoint, predictions
from raredistill.cohort.prepare import prepare
from raredistill.cohort.sources.registry import open_source
from raredistill.config import StudyConfig, make_study
from raredistill.phantom import write_phantom
from raredistill.studies.study import run_study
from test_study import Silent

RUNS = [
    {"name": "large", "model": "cifar_resnet8", "dropout": 0.2},
    {"name": "taught", "model": "small_cnn", "teacher": "large", "method_options": {"temperature": 3}},
]


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory):
    """A generated cohort as the demo's, prepared by this process and by two workers."""
    root = tmp_path_factory.mktemp("demo")
    raw = write_phantom(root / "raw", patients=10, size=(48, 48, 24), rare_share=0.4, workers=1)
    source = open_source("brats_nifti", raw, min_tumour_voxels=15)
    return [prepare(source, root / f"by-{workers}", size=(32, 32), workers=workers) for workers in (1, 2)]


def test_workers_do_not_change_a_cohort(cohorts):
    assert cohorts[0].hash == cohorts[1].hash
    for channel in cohorts[0].channels:
        assert np.array_equal(cohorts[0].pixels(channel), cohorts[1].pixels(channel))


def outcome(cohort, out, residence):
    raw = {
        "name": "twice", "cohort": str(cohort.root), "channels": ["flair", "t1ce"],
        "splits": {"folds": 2, "repeats": 1, "validation_share": 0.34},
        "training": {
            "epochs": 2, "batch_size": 16, "accelerator": "cpu", "sampler": "balanced", "ema_decay": 0.9, "residence": residence,
        },
        "runs": RUNS,
    }  # fmt: skip
    records = run_study(make_study(StudyConfig.model_validate(raw), cohort, "test"), out, Silent())
    assert {record.status for record in records} == {"done"}
    folders = [out / "runs" / record.id for record in records]
    tables = [predictions.read(folder / "predictions.parquet") for folder in folders]
    return [table.logits() for table in tables], [checkpoint.load(folder / "last.safetensors")[0] for folder in folders]


def test_twice_and_resident_or_streamed_gives_the_same_bits(cohorts, tmp_path):
    first, *others = (
        outcome(cohort, tmp_path / str(number), residence)
        for number, (cohort, residence) in enumerate([(cohorts[0], "resident"), (cohorts[1], "resident"), (cohorts[1], "streamed")])
    )
    for logits, weights in others:
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(first[0], logits, strict=True))
        for mine, theirs in zip(first[1], weights, strict=True):
            assert all(np.array_equal(tensor.numpy(), theirs[name].numpy()) for name, tensor in mine.items())
