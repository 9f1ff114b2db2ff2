"""Python objects in the places of names: networks, methods, losses, teachers and data of a notebook."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import raredistill
from raredistill.api import teacher_from
from raredistill.checkpoint import load
from raredistill.cohort.frame import cohort_of
from raredistill.errors import CheckpointError, ConfigError, DataError
from raredistill.models import create, restore
from raredistill.runs.entry import Entry
from raredistill.training.settings import Settings

QUICK = {"epochs": 1, "batch_size": 16, "accelerator": "cpu"}


class Tiny(nn.Module):
    """Six features of means over strips."""

    def __init__(self, channels):
        super().__init__()
        self.mix = nn.Conv2d(channels, 6, 3, padding=1)

    def forward(self, images):
        return self.mix(images).mean(dim=(2, 3))


def agree(student, teacher):
    """Mean squared difference of logits."""
    return F.mse_loss(student.logits, teacher.logits.detach())


def table(images=24, size=16):
    rng, rows = np.random.default_rng(0), []
    for number in range(images):
        label = "rare" if number % 3 == 0 else "common"
        image = rng.integers(0, 80, (size, size), dtype=np.uint8)
        image[:, : size // 2] += np.uint8(120 if label == "rare" else 0)
        rows += [
            {"image": image, "label": label, "patient": f"p{number:03d}"},
            {"image": image[::-1].copy(), "label": label, "patient": f"p{number:03d}"},
        ]
    return pd.DataFrame(rows)


def test_a_data_frame_of_arrays_is_a_cohort_with_its_patients(tmp_path):
    frame = table().sample(frac=1, random_state=0)
    cohort = cohort_of(frame, tmp_path, size=8)
    assert (len(cohort.samples), cohort.samples["patient"].nunique(), cohort.classes) == (48, 24, ("common", "rare"))
    by_patient = dict(zip(frame["patient"], frame["label"], strict=True))
    assert [by_patient[patient] for patient in cohort.samples["patient"]] == list(cohort.samples["label"])
    # Pixels stay with their row, whatever the order in which they came.
    sums = sorted((row.patient, int(row.image.sum())) for row in frame.itertuples())
    kept = zip(cohort.samples["patient"], cohort.pixels("grey").reshape(48, -1).astype(int).sum(axis=1).tolist(), strict=True)
    assert sorted(kept) == sums
    assert cohort_of(frame, tmp_path, size=8).root == cohort.root


def test_paths_and_data_sets_are_read_alike(tmp_path):
    frame = table(6)
    for number, image in enumerate(frame["image"]):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    paths = frame.assign(image=[str(tmp_path / f"{number}.png") for number in range(len(frame))])
    from_paths = cohort_of(paths, tmp_path / "a", size=16)
    items = [(torch.from_numpy(row.image)[None].float() / 255, row.label, row.patient) for row in frame.itertuples()]
    from_items = cohort_of(items, tmp_path / "b", size=16)
    assert list(from_paths.samples["patient"]) == list(from_items.samples["patient"])
    assert np.array_equal(from_paths.pixels(from_paths.channels[0]), from_items.pixels("grey"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda frame: frame.drop(columns="patient"), "lack patient"), (lambda frame: 3, "int: give a cohort"),
        (lambda frame: frame.assign(image=[image.astype(np.int32) for image in frame["image"]]), "int32"),
        (lambda frame: frame.assign(image=[image * 1.5 for image in frame["image"]]), "give uint8, or fractions"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used_are_refused_with_the_cure(tmp_path, change, said):
    with pytest.raises(DataError, match=said):
        cohort_of(change(table(6)), tmp_path, size=16)


def test_objects_become_names_that_lead_back_to_them():
    module = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    by_path, by_object = Entry("a", Tiny).model, Entry("b", module).model
    assert by_path == f"{Tiny.__module__}:Tiny"
    assert by_object.startswith("object:Sequential-")
    assert Entry("c", "small_cnn", teacher="a", method=agree).method == "agree"
    assert Settings(loss=lambda_free_loss).loss == "lambda_free_loss"
    images = torch.rand(2, 1, 16, 16)
    network = create(by_object, channels=1, classes=3, image_size=16, normalisation=((0.0,), (1.0,)))
    torch.testing.assert_close(network.features(images), module(images))
    assert Entry("d", lambda channels: Tiny(channels)).model.startswith("object:")
    with pytest.raises(ConfigError, match="is no network"):
        Entry("e", 3)


def lambda_free_loss(logits, target):
    return F.cross_entropy(logits, target, reduction="none")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    out = tmp_path_factory.mktemp("objects") / "study"
    found = raredistill.distil(table(), teacher=nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten()), student=Tiny, method=agree,
                               loss=lambda_free_loss, out=out, folds=2, **QUICK)  # fmt: skip
    return found


def test_distil_takes_objects_everywhere_and_ends_with_a_verdict(distilled):
    assert [run.status for run in distilled.runs] == ["done"] * 6
    assert distilled.page.is_file()
    assert len(distilled.verdicts()) == 1
    assert {run.model.split(":")[0] for run in distilled.runs} == {"object", Tiny.__module__}
    digests = {name for run in distilled.runs if run.name == "student" for name in run.made_with["code"]}
    assert {"distiller agree", "loss lambda_free_loss", f"network {Tiny.__module__}:Tiny"} <= digests


def test_a_run_with_an_object_is_restored_through_its_import_path_or_says_why_not(distilled):
    weights = {run.name: distilled.folder / "runs" / run.id / "best.safetensors" for run in distilled.runs}
    assert restore(weights["student"])[0].body.mix.weight.shape == (6, 1, 3, 3)
    code = "import sys; from pathlib import Path; from raredistill.models import restore; restore(Path(sys.argv[1]))"
    for name, said in (("teacher", "was an object of a Python session"), ("student", f"add --plugin {Tiny.__module__}")):
        done = subprocess.run([sys.executable, "-c", code, str(weights[name])], capture_output=True, text=True, check=False)
        assert said in done.stderr, done.stderr


def test_a_classifier_from_elsewhere_becomes_a_teacher_and_must_say_all_about_itself(tmp_path):
    frame = table()
    logits = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16, 2))
    stated = {"classes": ("common", "rare"), "channels": ("grey",), "mean": (0.2,), "std": (0.3,), "image_size": 16}
    with pytest.raises(ConfigError, match="training_patients"):
        teacher_from(logits, tmp_path / "t.safetensors", **stated)
    with pytest.raises(CheckpointError, match="gives 2 numbers per image, for 3 classes"):
        teacher_from(logits, tmp_path / "t.safetensors", **{**stated, "classes": ("a", "b", "c")}, external=True)
    teacher = teacher_from(logits, tmp_path / "t.safetensors", **stated, external=True)
    images = torch.rand(3, 1, 16, 16)
    network, _ = restore(tmp_path / "t.safetensors")
    torch.testing.assert_close(network.eval()(images), logits((images - 0.2) / 0.3))
    assert load(tmp_path / "t.safetensors")[1].external
    found = raredistill.distil(frame, teacher=teacher, student="small_cnn", out=tmp_path / "s", folds=2, **QUICK)
    assert {run.name for run in found.runs if run.status == "done"} == {"control", "student"}
    leaking = teacher_from(logits, tmp_path / "u.safetensors", **stated, training_patients=["p001"])
    with pytest.raises(CheckpointError, match="p001"):
        raredistill.distil(frame, teacher=leaking, student="small_cnn", out=tmp_path / "u", folds=2, **QUICK)
