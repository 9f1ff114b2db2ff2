"""A study: teachers before students, shared, reused, and failures that do not spread."""

import json

import numpy as np
import pandas as pd
import pytest

from raredistill import predictions
from raredistill.checkpoint import load
from raredistill.cohort.store import Cohort
from raredistill.config import StudyConfig, make_study
from raredistill.errors import CheckpointError, ConfigError, DataError
from raredistill.study.predict import predict
from raredistill.study.run import rare_class, run_study

RUNS = [
    {"name": "taught", "model": "small_cnn", "teacher": "large"},
    {"name": "large", "model": "cifar_resnet8", "channels": ["flair", "t1ce"]},
    {"name": "again", "model": "small_cnn", "teacher": "taught"},
]


class Silent:
    def __init__(self):
        self.trained, self.reused = [], []

    def run_started(self, run, epochs):
        self.trained.append(run.id)

    def epoch_done(self, run, record):
        pass

    def run_done(self, run, record, *, reused):
        if reused:
            self.reused.append(run.id)


def study(cohort: Cohort, runs=RUNS, **changes):
    raw = {
        "name": "s", "cohort": str(cohort.root), "channels": ["flair"], "splits": {"folds": 2, "validation_share": 0.34},
        "training": {"epochs": 1, "batch_size": 16, "accelerator": "cpu"}, "runs": runs,
    }  # fmt: skip
    return make_study(StudyConfig.model_validate({**raw, **changes}), cohort, "test")


@pytest.fixture(scope="module")
def finished(tiny_cohort, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return out, run_study(study(tiny_cohort), out, Silent())


def test_teachers_come_first_and_each_fold_and_seed_has_its_own(tiny_cohort):
    plan = study(tiny_cohort, seeds=[0, 1]).plan()
    assert len({run.id for run in plan}) == len(plan) == 3 * 2 * 2
    for position, run in enumerate(plan):
        if run.teacher is not None:
            assert run.teacher in plan[:position]
            assert (run.teacher.split.hash, run.teacher.seed) == (run.split.hash, run.seed)


def test_what_determines_a_run_names_it(tiny_cohort):
    def names(**changes):
        return {run.entry.name: run.id for run in study(tiny_cohort, **changes).plan()}

    plain = names()
    assert plain == names()
    changed = names(runs=[RUNS[0], {**RUNS[1], "dropout": 0.1}, RUNS[2]])
    # A changed teacher changes its students, too.
    assert all(plain[name] != changed[name] for name in plain)


@pytest.mark.parametrize(
    "runs",
    [
        [{"name": "a", "model": "small_cnn", "teacher": "b"}, {"name": "b", "model": "small_cnn", "teacher": "a"}],
        [{"name": "a", "model": "small_cnn", "teacher": "nobody"}],
        [{"name": "a", "model": "small_cnn"}, {"name": "a", "model": "small_cnn"}],
    ],
)
def test_impossible_grids_are_refused(tiny_cohort, runs):
    with pytest.raises(ConfigError):
        study(tiny_cohort, runs).plan()


def test_every_patient_is_predicted_once_by_each_entry(finished, tiny_cohort):
    out, records = finished
    assert {record["status"] for record in records} == {"done"}
    tables = [
        predictions.read(out / "runs" / record["id"] / "predictions.parquet").table for record in records if record["name"] == "taught"
    ]
    test = pd.concat(tables).query("split == 'test' and checkpoint == 'best'")
    assert sorted(test["sample"]) == sorted(tiny_cohort.samples["sample"])


def test_a_students_checkpoint_holds_no_teacher_and_carries_its_promise(finished):
    out, records = finished
    taught = next(record for record in records if record["name"] == "taught")
    state, promise = load(out / "runs" / taught["id"] / "best.safetensors")
    assert (
        sum(value.numel() for name, value in state.items() if "running" not in name and "num_batches" not in name)
        < 2 * taught["parameters"]
    )
    assert promise.channels == ("flair",)
    assert promise.prior is None
    assert promise.training_patients


def test_tensorboard_reads_the_curves_that_the_log_holds(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = finished[0] / "runs" / finished[1][0]["id"]
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for line in (folder / "epochs.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert events.Scalars("loss/train/all")[record["epoch"]].value == pytest.approx(record["train"]["loss"])
        assert events.Scalars("f1/validation/HGG")[record["epoch"]].value == pytest.approx(record["validation"]["f1"]["HGG"])


def test_directions_are_by_size(finished):
    by_name = {record["name"]: record for record in finished[1]}
    assert by_name["again"]["direction"] == "self"
    bigger = by_name["large"]["parameters"] > by_name["taught"]["parameters"]
    assert by_name["taught"]["direction"] == ("large-to-small" if bigger else "small-to-large")


def test_done_runs_are_reused_and_a_lost_one_repeats_its_numbers(tiny_cohort, tmp_path):
    import shutil

    once = study(tiny_cohort, RUNS[1:2])
    records = run_study(once, tmp_path / "s", Silent())
    path = tmp_path / "s" / "runs" / records[0]["id"]
    before = np.stack(predictions.read(path / "predictions.parquet").table["logits"].to_list())
    shutil.rmtree(path)
    watcher = Silent()
    run_study(once, tmp_path / "s", watcher)
    assert watcher.trained == [records[0]["id"]]
    assert watcher.reused == [records[1]["id"]]
    assert np.array_equal(before, np.stack(predictions.read(path / "predictions.parquet").table["logits"].to_list()))


def test_a_failed_run_is_told_and_the_others_go_on(tiny_cohort, tmp_path):
    runs = [
        {"name": "bad", "model": "small_cnn", "training": {"optimizer": "sgd", "learning_rate": 1e30, "epochs": 3}},
        {"name": "student", "model": "small_cnn", "teacher": "bad"},
        {"name": "good", "model": "small_cnn"},
    ]
    records = run_study(study(tiny_cohort, runs), tmp_path, Silent())
    assert {record["name"]: record["status"] for record in records} == {"bad": "failed", "student": "failed", "good": "done"}
    assert "its teacher" in next(record for record in records if record["name"] == "student")["error"]
    assert json.loads((tmp_path / "study.json").read_text())["runs"] == records


def test_an_external_teacher_is_checked_for_leaks_and_used_when_it_is_clean(finished, tiny_cohort, tmp_path):
    out, records = finished
    weights = str(out / "runs" / next(r["id"] for r in records if r["name"] == "large") / "best.safetensors")
    leaking = run_study(study(tiny_cohort, [{"name": "s", "model": "small_cnn", "teacher": {"weights": weights}}]), tmp_path, Silent())
    # The teacher of fold 0 fits the students of fold 0 only: in fold 1 its training patients are tested.
    assert {record["fold"]: record["status"] for record in leaking} == {0: "done", 1: "failed"}
    assert "leak" in next(record for record in leaking if record["fold"] == 1)["error"]


def test_predict_writes_the_same_logits_for_the_same_samples(finished, tiny_cohort, tmp_path):
    out, records = finished
    folder = out / "runs" / records[0]["id"]
    again = predict(folder, tiny_cohort, tmp_path / "p.parquet", accelerator="cpu").set_index("sample")["logits"]
    known = (
        predictions.read(folder / "predictions.parquet")
        .table.query("checkpoint == 'best' and split == 'test'")
        .set_index("sample")["logits"]
    )
    for sample, logits in known.items():
        np.testing.assert_allclose(again[sample], logits, atol=1e-5)


def test_predict_refuses_a_cohort_of_another_size(finished, tmp_path):
    from conftest import write_tiny

    other = write_tiny(tmp_path / "other", patients={"HGG": 2, "LGG": 2}, size=24)
    with pytest.raises(CheckpointError, match="--size 16"):
        predict(finished[0] / "runs" / finished[1][0]["id"], other, tmp_path / "p.parquet", accelerator="cpu")


def test_a_folder_with_other_things_is_refused(tiny_cohort, tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(DataError, match="already holds something else"):
        run_study(study(tiny_cohort), tmp_path, Silent())


def test_the_rare_class_is_counted_in_training(tiny_cohort):
    assert rare_class(tiny_cohort, study(tiny_cohort).splits) == "LGG"
