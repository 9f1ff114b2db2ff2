"""The teacher cache: what it holds is what the live teacher would say, once, for all who ask; and where it cannot be so, it is refused."""

import numpy as np
import pytest
import torch

from conftest import Silent, write_tiny
from raredistill.augment import PRESETS
from raredistill.batches import Batches
from raredistill.config import StudyConfig, make_study
from raredistill.distill.contract import Facts
from raredistill.distill.registry import make_method
from raredistill.losses import make_loss
from raredistill.runs.cache import Cache
from raredistill.runs.layout import StudyFolder
from raredistill.runs.teachers import network_of, teach
from raredistill.studies.study import run_study
from raredistill.training.cache import compute_view
from raredistill.training.devices import make_fabric
from raredistill.training.loop import Trainer
from raredistill.training.objectives import Distilled

VIEWS = 2
RUNS = [
    {"name": "large", "model": "cifar_resnet8", "channels": ["flair", "t1ce"]},
    {"name": "other", "model": "small_cnn", "training": {"loss": "balanced_softmax"}},
    {"name": "plain", "model": "small_cnn"},
    {"name": "taught", "model": "small_cnn", "teacher": "large"},
    {"name": "again", "model": "small_cnn", "teacher": "large", "method": "dkd"},
    {"name": "features", "model": "small_cnn", "teacher": "large", "method": "rkd"},
    {"name": "pair", "model": "small_cnn", "teacher": ["large", "other"]},
    {"name": "ours", "model": "small_cnn", "teacher": "other", "method": "pckd", "cross_fit": 2},
]


def study(cohort, runs=RUNS, **training):
    raw = {
        "name": "s", "cohort": str(cohort.root), "channels": ["flair"],
        "splits": {"folds": 2, "repeats": 1, "validation_share": 0.34}, "runs": runs,
        "training": {"epochs": 3, "batch_size": 16, "accelerator": "cpu", "teacher_cache": {"views": VIEWS}, **training},
    }  # fmt: skip
    return make_study(StudyConfig.model_validate(raw), cohort, "test")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    cohort = write_tiny(tmp_path_factory.mktemp("cohort") / "c", patients={"HGG": 16, "LGG": 12})
    made, out, watched = study(cohort), tmp_path_factory.mktemp("cached"), Silent()
    return made, out, run_study(made, out, watched), watched


def run_of(made, name, fold=0):
    return next(run for run in made.plan() if run.entry.name == name and run.split.fold == fold)


def live(made, out, name):
    run, fabric = run_of(made, name), make_fabric("cpu", "32-true")
    counts = torch.from_numpy(np.bincount(made.cohort.labels[run.split.train], minlength=3))
    taught, facts = teach(run, made.cohort, network_of(run.entry, made.cohort), fabric, StudyFolder(out), counts=counts)
    return run, fabric, taught, facts


def training_batches(made, run, channels):
    return Batches(
        made.cohort, run.split.train, channels=channels, batch_size=7, device=torch.device("cpu"), augmentation=PRESETS["default"],
        views=VIEWS, seed=run.fold_seed,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["taught", "features", "pair", "ours"])
def test_what_is_kept_is_what_the_live_teacher_says_of_the_same_views(done, name):
    made, out, _, _ = done
    run, fabric, taught, _ = live(made, out, name)
    kept = Cache(run, made.cohort, fabric, StudyFolder(out), lambda done, total: None)(taught)
    # The student's batches hold its own channel only, in another order and of another size than the kept ones.
    pairs = zip(training_batches(made, run, ("flair",)).epoch(3), training_batches(made, run, ("flair", "t1ce")).epoch(3), strict=True)
    for narrow, wide in pairs:
        assert narrow.channels == ("flair",)
        said, truth = kept(narrow), taught(wide)
        torch.testing.assert_close(said.logits.softmax(1), truth.logits.softmax(1), atol=1e-5, rtol=0)
        if name == "features":
            torch.testing.assert_close(said.features, truth.features, atol=1e-3, rtol=1e-3)
        if truth.log_prior is None:
            assert said.log_prior is None
        else:
            torch.testing.assert_close(said.log_prior, truth.log_prior)


def test_a_step_from_the_cache_is_the_step_of_the_live_teacher(done):
    made, out, _, _ = done
    run, fabric, taught, _ = live(made, out, "taught")
    kept = Cache(run, made.cohort, fabric, StudyFolder(out), lambda done, total: None)(taught)
    weights = []
    for teacher, channels in ((taught, ("flair", "t1ce")), (kept, ("flair",))):
        torch.manual_seed(0)
        network = network_of(run.entry, made.cohort)
        method = make_method("kd", Facts(torch.ones(3)))
        objective = Distilled(make_loss("cross_entropy", counts=torch.ones(3)), method, teacher, ce_weight=1.0, kd_weight=1.0)
        trainer = Trainer(network, objective, run.entry.settings, ("flair",), made.cohort.classes, fabric)
        trainer.epoch(training_batches(made, run, channels), None)
        weights.append(trainer.weights())
    for name, values in weights[0].items():
        torch.testing.assert_close(values, weights[1][name], atol=1e-5, rtol=1e-4)


def test_each_view_is_computed_once_a_fold_and_shared_by_its_students(done):
    _, out, records, watched = done
    assert {record.status for record in records} == {"done"}
    facts = {(record.name, record.fold): record.teacher_cache for record in records if record.kind != "cross-fitted teacher"}
    for fold in (0, 1):
        assert facts["large", fold] == facts["plain", fold] == {}
        assert [facts[name, fold]["computed"] for name in ("taught", "again", "features", "pair", "ours")] == [
            VIEWS,
            0,
            VIEWS,
            VIEWS,
            VIEWS,
        ]
        assert facts["taught", fold]["seconds"] > facts["again", fold]["seconds"] == 0
        assert [each[2:] for each in watched.views if each[:2] == ("taught", fold)] == [(0, VIEWS), (1, VIEWS)]
    assert len(list(StudyFolder(out).teacher_cache.glob("*/view*.safetensors"))) == 4 * VIEWS * 2
    assert all(record.remarks == () for record in records)


def test_what_the_content_depends_on_names_it(done):
    made, out, _, _ = done

    def folder(cohort=made.cohort, fold=0, **changes):
        run = run_of(study(cohort, RUNS, **changes), "taught", fold)
        run = type(run)(run.id, run.entry, run.split, run.seed, run_of(made, "taught", fold).teachers)
        return Cache(run, cohort, make_fabric("cpu", "32-true"), StudyFolder(out), lambda done, total: None)._folder

    same = folder()
    assert same == folder(learning_rate=0.5) == folder(teacher_cache={"views": 7})
    others = [
        folder(fold=1), folder(augmentation="thesis"), folder(precision="bf16-mixed"), folder(batch_size=8), folder(compile="default"),
    ]  # fmt: skip
    assert len({same, *others}) == 6


def test_a_device_that_holds_half_a_batch_is_asked_in_halves(done):
    made, _, _, _ = done
    run, _, taught, _ = live(*done[:2], "features")
    plain = Batches(made.cohort, run.split.train, channels=("flair", "t1ce"), batch_size=16, device=torch.device("cpu"), shuffle=False)

    def narrow(batch):
        if len(batch.labels) > 5:
            raise torch.OutOfMemoryError
        return taught(batch)

    for name, values in compute_view(taught, plain, 0, features=True).items():
        torch.testing.assert_close(compute_view(narrow, plain, 0, features=True)[name], values, atol=1e-3, rtol=1e-3)


def test_a_damaged_view_is_noticed_and_computed_again(done):
    made, out, _, _ = done
    run, fabric, taught, _ = live(made, out, "taught")
    cache = Cache(run, made.cohort, fabric, StudyFolder(out), lambda done, total: None)
    path = cache._folder / "view1.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:-4] + bytes(4))
    cache(taught)
    assert cache.facts["computed"] == 1
    assert "does not match its hash" in cache.remarks[0]
    again = Cache(run, made.cohort, fabric, StudyFolder(out), lambda done, total: None)
    again(taught)
    assert again.facts["computed"] == 0


def test_nothing_random_is_one_view(done):
    made, _, _, _ = done
    settings = run_of(study(made.cohort, augmentation="none"), "taught").entry.settings
    assert settings.views == 1
    assert run_of(study(made.cohort, epochs=1), "taught").entry.settings.views == 1
    assert run_of(study(made.cohort, teacher_cache="views=3"), "taught").entry.settings.views == 3
    assert run_of(study(made.cohort, teacher_cache=None), "taught").entry.settings.views is None


def test_a_control_that_saw_other_views_is_another_recipe(done):
    made, _, records, _ = done
    assert next(record for record in records if record.name == "plain").loss.endswith(f"{VIEWS} views")
    assert "views" not in run_of(study(made.cohort, teacher_cache=None), "plain").entry.settings.recipe
