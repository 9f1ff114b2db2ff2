"""A study: teachers before students, shared, reused, and failures that do not spread."""

import json
from contextlib import closing

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import timm
import torch

from conftest import Silent, write_tiny
from raredistill import api, predictions
from raredistill.checkpoint import load
from raredistill.cohort.prepare import prepare
from raredistill.cohort.sources.registry import open_source
from raredistill.cohort.store import Cohort
from raredistill.config import StudyConfig, make_study
from raredistill.errors import CheckpointError, ConfigError, DataError, RareDistillError
from raredistill.models import create
from raredistill.phantom import write_phantom
from raredistill.reports.pairs import control_of
from raredistill.reports.results import read_results
from raredistill.runs.assemble import pixels_of
from raredistill.runs.curves import Curves
from raredistill.runs.layout import RunFolder, StudyFolder
from raredistill.runs.record import read_study
from raredistill.runs.teachers import teach
from raredistill.studies.study import rare_class, run_study
from raredistill.training.devices import make_fabric

RUNS = [
    {"name": "taught", "model": "small_cnn", "teacher": "large"},
    {"name": "large", "model": "cifar_resnet8", "channels": ["flair", "t1ce"]},
    {"name": "again", "model": "small_cnn", "teacher": "taught"},
]


class Interrupted(Silent):
    def run_done(self, run, record, *, reused):
        raise KeyboardInterrupt


def study(cohort: Cohort, runs=RUNS, **changes):
    raw = {
        "name": "s", "cohort": str(cohort.root), "channels": ["flair"], "splits": {"folds": 2, "repeats": 1, "validation_share": 0.34},
        "training": {"epochs": 1, "batch_size": 16, "accelerator": "cpu"}, "runs": runs,
    }  # fmt: skip
    return make_study(StudyConfig.model_validate({**raw, **changes}), cohort, "test")


def predict(folder, cohort, path):
    api.predict(folder, cohort.root, path)
    return pd.read_parquet(path)


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
    assert {record.status for record in records} == {"done"}
    tables = [predictions.read(out / "runs" / record.id / "predictions.parquet").table for record in records if record.name == "taught"]
    test = pd.concat(tables).query("split == 'test' and checkpoint == 'best'")
    assert sorted(test["sample"]) == sorted(tiny_cohort.samples["sample"])


def test_a_students_checkpoint_holds_no_teacher_and_carries_its_promise(finished):
    out, records = finished
    taught = next(record for record in records if record.name == "taught")
    state, promise = load(out / "runs" / taught.id / "best.safetensors")
    assert (
        sum(value.numel() for name, value in state.items() if "running" not in name and "num_batches" not in name) < 2 * taught.parameters
    )
    assert promise.channels == ("flair",)
    assert promise.prior is None
    assert promise.training_patients


def test_tensorboard_reads_the_curves_that_the_log_holds(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = finished[0] / "runs" / finished[1][0].id
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for line in (folder / "epochs.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert events.Scalars("loss/train/all")[record["epoch"]].value == pytest.approx(record["train"]["loss"])
        assert events.Scalars("f1/validation/HGG")[record["epoch"]].value == pytest.approx(record["validation"]["f1"]["HGG"])


def test_epochs_that_are_told_again_from_the_first_are_written_anew(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with closing(Curves(RunFolder(tmp_path))) as curves:
        for epoch, loss in ((0, 9.0), (1, 8.0), (2, 7.0), (0, 3.0), (1, 2.0)):
            curves.add({"epoch": epoch, "train": {"loss": loss}})
    lines = [json.loads(line) for line in (tmp_path / "epochs.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["train"]["loss"]) for line in lines] == [(0, 3.0), (1, 2.0)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("loss/train/all")] == [3.0, 2.0]


def test_a_done_run_says_how_long_one_image_takes_and_where(finished):
    _, records = finished
    for record in records:
        # No pass is faster than its multiplications on a core that does a tera-operation a second, nor slower than a second at 16 x 16.
        assert record.flops / 1e12 * 1000 < record.latency_ms < 1000
        assert record.latency_on == "cpu, 1 thread"


def test_directions_are_by_size(finished):
    by_name = {record.name: record for record in finished[1]}
    assert by_name["again"].direction == "self"
    bigger = by_name["large"].parameters > by_name["taught"].parameters
    assert by_name["taught"].direction == ("large-to-small" if bigger else "small-to-large")


def test_done_runs_are_reused_and_a_lost_one_repeats_its_numbers(tiny_cohort, tmp_path):
    import shutil

    once = study(tiny_cohort, RUNS[1:2])
    records = run_study(once, tmp_path / "s", Silent())
    path = tmp_path / "s" / "runs" / records[0].id
    before = np.stack(predictions.read(path / "predictions.parquet").table["logits"].to_list())
    shutil.rmtree(path)
    watcher = Silent()
    run_study(once, tmp_path / "s", watcher)
    assert watcher.trained == [records[0].id]
    assert watcher.reused == [records[1].id]
    assert np.array_equal(before, np.stack(predictions.read(path / "predictions.parquet").table["logits"].to_list()))


def test_a_failed_run_is_told_and_the_others_go_on(tiny_cohort, tmp_path):
    runs = [
        {"name": "bad", "model": "small_cnn", "training": {"optimizer": "sgd", "learning_rate": 1e30, "epochs": 3}},
        {"name": "student", "model": "small_cnn", "teacher": "bad"},
        {"name": "good", "model": "small_cnn"},
    ]
    records = run_study(study(tiny_cohort, runs), tmp_path, Silent())
    assert {record.name: record.status for record in records} == {"bad": "failed", "student": "failed", "good": "done"}
    assert "its teacher" in next(record for record in records if record.name == "student").error
    assert read_study(tmp_path / "study.json").runs == records
    # Nothing was kept that the failed run could go on with.
    assert not list((tmp_path / "runs").glob("*.unfinished"))


class Unplugging(Silent):
    def epoch_done(self, run, record):
        if run.entry.name == "large":
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA")


def test_pixels_that_fit_nowhere_are_refused_before_anything_is_trained(tiny_cohort, tmp_path, monkeypatch):
    needed = max(pixels_of(run, tiny_cohort) for run in study(tiny_cohort).plan())
    monkeypatch.setattr("raredistill.memory.available", lambda: needed - 1)
    asked = study(tiny_cohort, training={"epochs": 1, "accelerator": "cpu", "residence": "resident"})
    watcher = Silent()
    with pytest.raises(ConfigError, match=r"residence is resident, but its pixels take .* GB free; set residence=auto or streamed"):
        run_study(asked, tmp_path, watcher)
    assert watcher.trained == []
    assert not (tmp_path / "study.json").exists()


def test_a_device_that_fails_stops_the_study_with_its_cure_and_the_next_start_goes_on(tiny_cohort, tmp_path):
    # No test can unplug a GPU: this is the error that torch raises then, in the middle of a run.
    with pytest.raises(RareDistillError, match=r"the device failed in large-.*\(CUDA error: unspecified launch failure\).*nvidia-smi"):
        run_study(study(tiny_cohort), tmp_path, Unplugging())
    assert {record.status for record in run_study(study(tiny_cohort), tmp_path, Silent())} == {"done"}


def test_an_external_teacher_that_saw_tested_patients_is_refused_before_training(finished, tiny_cohort):
    out, records = finished
    # The teacher of fold 0 fits the students of fold 0 only: in fold 1 its training patients are tested.
    weights = str(out / "runs" / next(r.id for r in records if r.name == "large") / "best.safetensors")
    with pytest.raises(CheckpointError, match="leak"):
        study(tiny_cohort, [{"name": "s", "model": "small_cnn", "teacher": {"weights": weights}}])


@pytest.fixture
def elsewhere(tiny_cohort, tmp_path):
    """A teacher of somebody else's, and what is said of it."""
    weights = tmp_path / "elsewhere.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet", num_classes=3, in_chans=1).state_dict(), weights)
    return {
        "weights": str(weights), "model": "test_resnet", "classes": tiny_cohort.classes, "channels": ["t1ce"],
        "image_size": tiny_cohort.size[0], "external": True,
    }  # fmt: skip


def test_an_external_teacher_that_fits_teaches(tiny_cohort, tmp_path, elsewhere):
    made = study(tiny_cohort, [{"name": "s", "model": "small_cnn", "teacher": elsewhere}])
    records = run_study(made, tmp_path / "out", Silent())
    assert {(record.status, record.external_teacher, record.teacher_name) for record in records} == {("done", True, "elsewhere")}
    with pytest.raises(CheckpointError, match="prepare the cohort with --size 99"):
        study(tiny_cohort, [{"name": "s", "model": "small_cnn", "teacher": {**elsewhere, "image_size": 99}}])


def test_weights_that_do_not_fit_are_refused_before_training(tiny_cohort, tmp_path):
    weights = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"something.weight": torch.zeros(3)}, weights)
    with pytest.raises(CheckpointError, match=r"lacks .* of the network"):
        study(tiny_cohort, [{"name": "s", "model": "test_resnet", "pretrained": str(weights)}])


def test_predict_gives_the_runs_own_answers_at_one_temperature(finished, tiny_cohort, tmp_path):
    out, records = finished
    folder = out / "runs" / records[0].id
    again = predict(folder, tiny_cohort, tmp_path / "p.parquet").set_index("sample")
    tested = predictions.read(folder / "predictions.parquet").table.query("checkpoint == 'best' and split == 'test'")
    logits = np.stack(tested["logits"].to_list())
    named = again.loc[tested["sample"], [f"p_{name}" for name in tiny_cohort.classes]].to_numpy()
    ours, theirs = (values[:, 1:] - values[:, :1] for values in (np.log(named), logits))
    temperature = float((theirs * ours).sum() / (ours**2).sum())
    np.testing.assert_allclose(temperature * ours, theirs, atol=1e-3)


def test_predict_refuses_a_cohort_of_another_size(finished, tmp_path):
    other = write_tiny(tmp_path / "other", patients={"HGG": 2, "LGG": 2}, size=24)
    with pytest.raises(CheckpointError, match="not prepared as the model's"):
        predict(finished[0] / "runs" / finished[1][0].id, other, tmp_path / "p.parquet")


def test_a_folder_with_other_things_is_refused(tiny_cohort, tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(DataError, match="already contains something else"):
        run_study(study(tiny_cohort), tmp_path, Silent())


def test_the_rare_class_is_counted_in_training(tiny_cohort):
    assert rare_class(tiny_cohort, study(tiny_cohort).splits) == "LGG"


TAUGHT = [
    {"name": "big", "model": "cifar_resnet8"},
    {"name": "margin", "model": "small_cnn", "head": "cosine", "training": {"loss": "ldam", "deferred": "effective"}},
    {"name": "ours", "model": "small_cnn", "teacher": "big", "method": "pckd", "cross_fit": 2},
    {"name": "hints", "model": "small_cnn", "teacher": "big", "method": "fitnet", "cross_fit": 2, "training": {"sampler": "progressive"}},
    {"name": "pair", "model": "small_cnn", "teacher": ["big", "margin"], "training": {"mixing": "remix"}},
    {"name": "unknown", "model": "small_cnn", "teacher": "margin", "method": "pckd"},
    {"name": "beside", "model": "small_cnn", "teacher": "big", "online": "one_way"},
    {"name": "peers", "model": "small_cnn", "teacher": ["big", "margin"], "online": "mutual", "training": {"precision": "bf16-mixed"}},
]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    cohort = write_tiny(tmp_path_factory.mktemp("cohort") / "c", patients={"HGG": 16, "LGG": 12})
    made = study(cohort, TAUGHT)
    out = tmp_path_factory.mktemp("taught")
    return made, out, {(record.name, record.fold): record for record in run_study(made, out, Silent())}


def test_cross_fitted_teachers_are_trained_once_for_their_students_and_before_them(taught):
    made, _, records = taught
    plan = made.plan()
    assert [record.status for record in records.values()] == ["done"] * 2 * 10
    for split in made.splits:
        parts = [run for run in plan if run.part is not None and run.split.fold == split.fold]
        students = [run for run in plan if run.entry.name in ("ours", "hints") and run.split.fold == split.fold]
        assert len(parts) == 2
        for student in students:
            assert [teacher.id for teacher in student.teachers] == [part.id for part in parts]
            assert plan.index(parts[-1]) < plan.index(student)


def test_a_student_is_given_the_recalls_of_its_corrected_teachers_on_patients_that_they_never_saw(taught):
    made, out, _ = taught
    run = next(run for run in made.plan() if run.entry.name == "ours")
    cohort = made.cohort
    counts = torch.from_numpy(np.bincount(cohort.labels[run.split.train], minlength=3))
    network = create("small_cnn", channels=1, classes=3, image_size=16)
    _, facts = teach(run, cohort, network, make_fabric("cpu", "32-true"), StudyFolder(out), counts=counts)
    hits, samples = np.zeros(3), np.zeros(3)
    for part in run.teachers:
        table = predictions.read(out / "runs" / part.id / "predictions.parquet").table.query("split == 'test' and checkpoint == 'best'")
        own = np.bincount(cohort.labels[part.split.train], minlength=3)
        found = (np.stack(table["logits"].to_list()) - np.log(own / own.sum())).argmax(axis=1)
        truth = np.array([cohort.classes.index(name) for name in table["label"]])
        hits += np.bincount(truth[truth == found], minlength=3)
        samples += np.bincount(truth, minlength=3)
    assert samples.tolist() == counts.tolist()
    np.testing.assert_allclose(facts.reliability.numpy(), (hits + 10 * (hits / samples).mean()) / (samples + 10))


def test_checkpoints_say_which_prior_their_logits_carry(taught):
    _, out, records = taught

    def prior(name):
        return load(out / "runs" / records[name, 0].id / "best.safetensors")[1].prior

    assert prior("big") == pytest.approx((0.5, 0.2857, 0.2143), abs=0.05)
    assert prior("ours") == prior("unknown") == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    for name in ("margin", "hints", "pair"):
        assert prior(name) is None


@pytest.mark.parametrize("method", ["bkd", "ltkd"])
@pytest.mark.parametrize("corrected", [{"teacher": "big", "method": "pckd"}, {"training": {"loss": "balanced_softmax"}}])
def test_a_second_correction_is_refused_with_the_configuration_and_both_sides_are_named(tiny_cohort, method, corrected):
    grid = [
        {"name": "big", "model": "small_cnn"}, {"name": "even", "model": "small_cnn", **corrected},
        {"name": "twice", "model": "small_cnn", "teacher": "even", "method": method},
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=rf"runs twice: method {method}: .* but even carries \[0.333, 0.333, 0.333\]"):
        study(tiny_cohort, grid)


def test_a_teacher_from_elsewhere_may_state_the_prior_that_its_file_does_not(tiny_cohort, tmp_path, elsewhere):
    def taught(method, **options):
        entry = {"name": "s", "model": "small_cnn", "teacher": {**elsewhere, **options}, "method": method}
        return study(tiny_cohort, [entry])

    with pytest.raises(ConfigError, match=r"prior of elsewhere, which is unknown; .* state it"):
        taught("xerm")
    made = taught("xerm", prior=[0.7, 0.2, 0.1])
    run = made.plan()[0]
    _, facts = teach(run, tiny_cohort, create("small_cnn", channels=1, classes=3, image_size=16), make_fabric("cpu", "32-true"),
                           tmp_path, counts=torch.ones(3))  # fmt: skip
    np.testing.assert_allclose(facts.prior.numpy(), [0.7, 0.2, 0.1], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"bkd: .* but elsewhere carries \[0.01, 0.01, 0.98\]"):
        taught("bkd", prior=[0.01, 0.01, 0.98])
    with pytest.raises(ConfigError, match=r"prior: \[0.5, 0.2\] must be shares above 0, together 1"):
        taught("xerm", prior=[0.5, 0.2])


def test_peers_are_trained_in_the_run_itself_and_name_it(taught):
    made, _, records = taught
    run = next(run for run in made.plan() if run.entry.name == "peers")
    assert run.teachers == ()
    assert [peer.name for peer in run.peers] == ["big", "margin"]
    assert records["peers", 0].kind == "distilled"
    assert records["peers", 0].teacher_name == "big + margin"
    other = study(made.cohort, [{**entry, "dropout": 0.1} if entry["name"] == "margin" else entry for entry in TAUGHT])
    assert next(each for each in other.plan() if each.entry.name == "peers").id != run.id


def test_records_tell_recipes_apart(taught):
    _, _, records = taught
    assert records["big", 0].loss == "cross_entropy"
    assert records["margin", 0].loss == "ldam, deferred effective"
    assert records["pair", 0].loss == "cross_entropy, remix"
    # Without its teacher ours is the balanced softmax, so that is its control.
    assert records["ours", 0].loss == "balanced_softmax"
    assert records["hints", 0].loss == "cross_entropy, progressive sampling"


RECIPES = {
    "plain": {}, "longer": {"epochs": 2}, "balanced": {"sampler": "balanced"}, "remixed": {"mixing": "remix"},
    "focal": {"loss": "focal", "loss_options": {"gamma": 1.0}}, "late": {"deferred": "effective", "deferred_epoch": 1},
    "scaled": {"stage": "tau_norm"}, "softmax": {"loss": "balanced_softmax"},
}  # fmt: skip
STRANGERS = {
    "sharp": {"training": {"loss": "focal", "loss_options": {"gamma": 3.0}}}, "early": {"training": {"deferred": "effective"}},
    "sqrt": {"training": {"sampler": "sqrt"}}, "retrained": {"training": {"stage": "crt", "stage_epochs": 1}},
    "dropped": {"dropout": 0.5}, "deep": {"head": "thesis"}, "other": {"channels": ["t1ce"]},
}  # fmt: skip


def test_a_distilled_entry_is_held_against_the_baseline_of_its_own_recipe(tiny_cohort, tmp_path):
    def entry(name, settings):
        return {"name": name, "model": "small_cnn", "training": settings}

    runs = [{"name": "large", "model": "cifar_resnet8"}, *(entry(*recipe) for recipe in RECIPES.items())]
    runs += [{**entry(f"{name}-taught", settings), "teacher": "large"} for name, settings in RECIPES.items() if name != "softmax"]
    runs += [{**entry(name, {}), **own, "teacher": "large"} for name, own in STRANGERS.items()]
    runs.append({**entry("ours", {}), "teacher": "large", "method": "pckd"})
    with pytest.raises(KeyboardInterrupt):  # the study's file describes every run before the first is trained
        run_study(study(tiny_cohort, runs), tmp_path, Interrupted())
    results = read_results(tmp_path)
    found = {name: control_of(results, name) for name in results.entries if results.first(name).kind == "distilled"}
    taught = {f"{name}-taught": name for name in RECIPES if name != "softmax"}
    assert found == {**taught, **dict.fromkeys(STRANGERS, ""), "ours": "softmax"}


def test_cross_fitted_teachers_are_no_results(taught):
    _, out, _ = taught
    results = read_results(out)
    assert results.entries == ["big", "margin", "ours", "hints", "pair", "unknown", "beside", "peers"]


@pytest.fixture(scope="module")
def with_mask(tmp_path_factory):
    raw = tmp_path_factory.mktemp("phantom") / "raw"
    write_phantom(raw, patients=8, size=(32, 32, 24), rare_share=0.5, workers=1)
    cohorts = []
    for mask in (True, False):
        source = open_source("brats_nifti", raw, channels=["flair"], mask=mask, min_tumour_voxels=1)
        cohorts.append(prepare(source, tmp_path_factory.mktemp("masks") / "c", size=(16, 16), workers=1))
    return cohorts


def test_a_teacher_may_see_the_mask_and_its_student_is_applied_without_one(with_mask, tmp_path):
    cohort, without = with_mask
    assert (cohort.channels, without.channels) == (("flair", "mask"), ("flair",))
    runs = [
        {"name": "informed", "model": "small_cnn", "channels": ["flair", "mask"]},
        {"name": "student", "model": "small_cnn", "teacher": "informed"},
    ]
    made = study(cohort, runs, channels=None)
    assert made.entries[1].channels == ("flair",)
    records = {record.name: record for record in run_study(made, tmp_path, Silent()) if record.fold == 0}
    assert records["student"].status == "done"
    folders = {name: tmp_path / "runs" / record.id for name, record in records.items()}
    here, there = (predict(folders["student"], each, tmp_path / f"{each.root.parent.name}.parquet") for each in (cohort, without))
    assert np.array_equal(*(table[[f"p_{name}" for name in cohort.classes]].to_numpy() for table in (here, there)))
    with pytest.raises(CheckpointError, match=r"needs the channels mask"):
        predict(folders["informed"], without, tmp_path / "no.parquet")
