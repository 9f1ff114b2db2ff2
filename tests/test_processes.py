"""Two processes that train one network end where one does: the same batches, gradients, metrics, errors and states."""

import multiprocessing
import os
import re
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from conftest import write_tiny
from raredistill import predictions
from raredistill.augment import MIXINGS, PRESETS
from raredistill.batches import Batches
from raredistill.checkpoint import Promise
from raredistill.config import StudyConfig, make_study
from raredistill.distill.contract import Facts, Shape
from raredistill.distill.registry import make_method
from raredistill.errors import ConfigError
from raredistill.losses import make_loss
from raredistill.models import Network, create
from raredistill.runs.layout import StudyFolder
from raredistill.runs.train import _unshared
from raredistill.studies.execute import execute
from raredistill.training import resume
from raredistill.training.devices import Team, make_fabric
from raredistill.training.launch import Place, launch
from raredistill.training.loop import DivergedError, fit, predict_logits
from raredistill.training.objectives import Deferred, Distilled, Supervised
from raredistill.training.online import Peer, Together
from raredistill.training.resume import Keeper
from raredistill.training.settings import Settings
from raredistill.training.teacher import Teacher

CLASSES, COUNTS = ("healthy", "HGG", "LGG"), torch.tensor([54.0, 36.0, 18.0])
TRAINED = np.arange(105)  # in batches of 16 the last has 9: 5 and 4
PLAIN = Settings(epochs=2, batch_size=16, optimizer="sgd", learning_rate=0.05, schedule="constant")
HARD = replace(PLAIN, sam_rho=0.05, clip_norm=0.5, ema_decay=0.9, warmup_epochs=0.5)


def network(width=8, dropout=0.0):
    """Neither batch statistics nor, as a rule, dropout: all that two processes cannot do as one does."""
    torch.manual_seed(width)
    body = nn.Sequential(nn.Conv2d(1, width, 5, stride=3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout))
    return Network(body, nn.Linear(4 * width, 3), name="plain", channels=1, classes=3, image_size=16, mean=[0.4], std=[0.3])


def ce(name="cross_entropy"):
    return make_loss(name, counts=COUNTS)


def taught(method, fabric):
    promise = Promise(model="plain", head="linear", dropout=0.0, classes=CLASSES, channels=("t1ce",), image_size=16, mean=(0.4,),
                      std=(0.3,), prior=(0.5, 0.3, 0.2), training_patients=None, external=True, split_hash="")  # fmt: skip
    facts = Facts(COUNTS, prior=torch.tensor([0.5, 0.3, 0.2]), student_shape=Shape(32), teacher_shape=Shape(48))
    teacher = Teacher(network(width=12), promise, fabric)
    return Distilled(ce(), make_method(method, facts), teacher, ce_weight=0.5, kd_weight=2.0)


def mutual(fabric):
    peers = [Peer(network(width=6), ("t1ce",), ce())]
    return Together(ce(), make_method("kd", Facts(COUNTS)), peers, fabric, mutual=True, ce_weight=1.0, kd_weight=1.0)


SCENARIOS = {
    "class weights": (lambda fabric: Supervised(ce("weighted_cross_entropy"), None), PLAIN, {}),
    "deferred weights, balanced, streamed": (
        lambda fabric: Supervised(ce(), Deferred(torch.tensor([0.5, 1.0, 1.5]), 1)), PLAIN,
        {"sampler": "balanced", "residence": "streamed"},
    ),
    "kd": (lambda fabric: taught("kd", fabric), PLAIN, {}),
    "a method's own layer": (lambda fabric: taught("cbd", fabric), PLAIN, {}),
    "mixup, SAM, clipping, EMA": (lambda fabric: Supervised(ce()), HARD, {"mixing": MIXINGS["mixup"]}),
    "mutual": (mutual, PLAIN, {}),
    "adamw": (lambda fabric: Supervised(ce()), replace(PLAIN, optimizer="adamw", learning_rate=1e-3), {}),
}  # fmt: skip


def batches(cohort, fabric, rows=TRAINED, **options):
    share = fabric.global_rank, fabric.world_size
    return Batches(cohort, rows, channels=("flair", "t1ce"), batch_size=16, device=fabric.device, seed=3, share=share, **options)


def train(cohort, place, objective, settings, *, keeper=None, dropout=0.0, interrupted=lambda: False, net=None, **options):
    fabric = place.fabric
    made = network(dropout=dropout) if net is None else net
    torch.manual_seed(11)
    served = batches(cohort, fabric, augmentation=PRESETS["default"], **options)
    looked = batches(cohort, fabric, np.arange(107, -1, -1), shuffle=False)  # backwards: nothing may sort them
    shared = {"settings": settings, "channels": ("flair",), "classes": CLASSES, "fabric": fabric, "keeper": keeper}
    fitted = fit(made, objective(fabric), served, looked, **shared, interrupted=interrupted, micro_batches=place.micro_batches)
    made.load_state_dict(fitted.last)
    logits, labels = predict_logits(made, looked, channels=("flair",), fabric=fabric)
    return fitted, logits, labels


def summary(fitted, logits, labels):
    records = [{key: value for key, value in record.items() if key != "seconds"} for record in fitted.epochs]
    tensors = {"last": fitted.last, "best": fitted.best, "logits": logits, "labels": labels}
    return {"records": records, "best_epoch": fitted.best_epoch, "micro_batch": fitted.micro_batch, **arrays(tensors)}


def arrays(values):
    return {key: arrays(value) for key, value in values.items()} if isinstance(values, dict) else values.numpy()


def scenarios(cohort, place):
    return {name: summary(*train(cohort, place, *each[:2], **each[2])) for name, each in SCENARIOS.items()}


class Breaking(Supervised):
    """Infinite in one step, in the last process only."""

    def __init__(self, fabric):
        super().__init__(ce())
        self.last, self.calls = fabric.global_rank == fabric.world_size - 1, 0

    def __call__(self, batch, student):
        self.calls += 1
        return {"ce": super().__call__(batch, student)["ce"] * (float("inf") if self.last and self.calls == 9 else 1.0)}


def diverged(cohort, place, folder):
    with pytest.raises(DivergedError, match="epoch 1, step 1") as caught:
        train(cohort, place, Breaking, PLAIN, keeper=Keeper(folder))
    return caught.value.rows.tolist()


def cut(cohort, place, folder, steps):
    """Interrupted after some steps, by what only the first process hears."""
    left = iter([False] * (steps - 1) + [True])
    heard = (lambda: next(left)) if place.fabric.global_rank == 0 else (lambda: False)
    with pytest.raises(KeyboardInterrupt):
        train(cohort, place, *DROPPED, keeper=Keeper(folder), interrupted=heard, dropout=0.5)


DROPPED = (lambda fabric: taught("cbd", fabric), replace(HARD, epochs=3, optimizer="adamw", learning_rate=1e-3))


def drawn(place):
    """One number of each process' generator, as it stands after training."""
    return Team(place.fabric).gather(torch.rand(1, 4)).numpy()


def predicted(cohort, place):
    """Rows in batches of 16 of which the last has one: then the second process has none."""
    torch.manual_seed(0)
    looked = batches(cohort, place.fabric, np.arange(97, 0, -1), shuffle=False)
    net = create("cifar_resnet8", channels=1, classes=3, image_size=16)
    return [each.numpy() for each in predict_logits(net, looked, channels=("flair",), fabric=place.fabric)]


def everything(place, cohort, folder):
    """What one crew does for all assertions below: starting processes takes longer than their work."""
    resume.SAVE_EVERY = 0.0
    if place.micro_batches == 1 and place.fabric.world_size > 1:
        return memory_ends(place, cohort)
    whole = replace(place, micro_batches=1)
    found = {"scenarios": scenarios(cohort, whole), "predicted": predicted(cohort, place), "parts": place.micro_batches}
    found["micro"] = summary(*train(cohort, place, *SCENARIOS["kd"][:2]))
    if place.fabric.world_size > 1:
        found["bits"] = summary(*train(cohort, whole, *DROPPED, dropout=0.5))
        found["drawn"] = drawn(place)
        for steps in (9, 10):
            cut(cohort, whole, folder / "cut", steps)
        found["again"] = summary(*train(cohort, whole, *DROPPED, keeper=Keeper(folder / "cut"), dropout=0.5))
        found["drawn again"] = drawn(place)
        found["diverged"] = diverged(cohort, whole, folder / "diverged")
        found["kept"] = running(cohort, whole)
    place.tell("over", found["parts"])
    return found


def running(cohort, place):
    """The best weights of a network with batch norms, as each process has them."""
    torch.manual_seed(0)
    net = create("cifar_resnet8", channels=1, classes=3, image_size=16)
    fitted, _, _ = train(cohort, place, lambda fabric: Supervised(ce()), replace(PLAIN, ema_decay=0.5), net=net)
    return Team(place.fabric).gather(torch.cat([value.flatten().double() for value in fitted.best.values()])[None]).numpy()


def memory_ends(place, cohort):
    """The second process' device holds less than its half of a batch."""

    def check(_, inputs):
        if len(inputs[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory (in a test)")

    net = network()
    if place.fabric.global_rank == 1:
        net.body.register_forward_pre_hook(check)
    train(cohort, place, *SCENARIOS["kd"][:2], net=net)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("cohorts") / "tiny")


@pytest.fixture(scope="module")
def heard():
    return []


@pytest.fixture(scope="module")
def two(cohort, tmp_path_factory, heard):
    folder = tmp_path_factory.mktemp("two")
    for name in ("cut", "diverged"):
        (folder / name).mkdir()
    options = {"devices": 2, "accelerator": "cpu", "precision": "32-true"}
    return folder, launch(everything, (cohort, folder), **options, hear=lambda *event: heard.append(event))


@pytest.fixture(scope="module")
def one(cohort, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "SAVE_EVERY", 0.0)
        return everything(Place(make_fabric("cpu", "32-true"), lambda *event: None), cohort, tmp_path_factory.mktemp("one"))


def flat(values):
    """Numbers of nested dictionaries in one row."""
    if isinstance(values, dict):
        return np.concatenate([flat(value) for value in values.values()])
    return np.atleast_1d(np.asarray(values, dtype=np.float64)).ravel()


def near(first, second):
    np.testing.assert_allclose(flat(first), flat(second), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_what_one_trains(one, two, name):
    alone, together = one["scenarios"][name], two[1]["scenarios"][name]
    for part in ("last", "best", "logits"):
        near(together[part], alone[part])
    assert together["labels"].tolist() == alone["labels"].tolist()
    assert together["best_epoch"] == alone["best_epoch"]
    for ours, theirs in zip(together["records"], alone["records"], strict=True):
        near(ours, theirs)


def test_rows_are_predicted_once_and_in_order_by_any_network(one, two):
    for ours, theirs in zip(two[1]["predicted"], one["predicted"], strict=True):
        assert len(ours) == 97
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_where_one_process_lacks_memory_all_start_again_with_smaller_parts(one, two, heard):
    together, alone = two[1]["micro"], one["micro"]
    assert heard == [("over", 2)]
    assert (together["micro_batch"], alone["micro_batch"]) == (4, 0)
    near(together["last"], alone["last"])


def test_dropout_differs_between_processes_and_an_interrupted_training_goes_on_to_the_same_bits(two):
    found = two[1]
    assert not np.array_equal(*found["drawn"])
    assert np.array_equal(found["drawn"], found["drawn again"])
    undisturbed, again = found["bits"], found["again"]
    assert undisturbed["records"] == again["records"]
    assert all(np.array_equal(value, again["last"][name]) for name, value in undisturbed["last"].items())
    assert all(np.array_equal(value, again["best"][name]) for name, value in undisturbed["best"].items())


def test_an_infinite_loss_in_one_process_ends_all_and_names_the_whole_batch(cohort, two):
    folder, found = two
    fabric = make_fabric("cpu", "32-true")
    assert found["diverged"] == list(batches(cohort, fabric).epoch(1))[1].rows.tolist()
    state = Keeper(folder / "diverged").load()
    assert (len(state.facts["fitted"]["epochs"]), state.facts["steps"]) == (1, 1)


def test_all_processes_keep_the_running_statistics_of_the_first(two):
    first, second = two[1]["kept"]
    assert np.array_equal(first, second)


RUN = {"name": "shared", "model": "test_vit", "training": {"stage": "tau_norm", "devices": 2}}
TRAINING = {"epochs": 4, "batch_size": 15, "optimizer": "sgd", "learning_rate": 0.02, "accelerator": "cpu", "schedule": "constant"}


class Watcher:
    """Does something at the end of the first epoch that it sees."""

    def __init__(self, act=lambda: None):
        self.act, self.epochs = act, []

    def run_started(self, run, epochs):
        pass

    def view_kept(self, run, done, total):
        pass

    def epoch_done(self, run, record):
        self.epochs.append(record["epoch"])
        self.act()

    def run_done(self, run, record, *, reused):
        pass


def kill_one():
    os.kill(max(child.pid for child in multiprocessing.active_children()), signal.SIGKILL)


def press():
    """What Ctrl-C in a terminal does: every process gets the signal, not the first alone."""
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGINT)
    raise KeyboardInterrupt


def first_run(cohort, entry):
    raw = {"name": "s", "cohort": str(cohort.root), "channels": ["flair"], "splits": {"folds": 2, "repeats": 1, "validation_share": 0.34},
           "training": TRAINING, "runs": [entry]}  # fmt: skip
    return make_study(StudyConfig.model_validate(raw), cohort, "test").plan()[:1]


def test_a_run_on_two_devices_outlives_kill_9_of_one_and_an_interruption_and_ends_where_one_device_does(cohort, tmp_path):
    plan, seen = first_run(cohort, RUN), []
    began = time.monotonic()
    [failed] = execute(plan, cohort, StudyFolder(tmp_path), Watcher(kill_one), seen.append)
    assert failed.status == "failed"
    assert re.match(r"process \d of the 2 of this run was killed \(SIGKILL\); its saved state is intact", failed.error)
    assert not multiprocessing.active_children()
    with pytest.raises(KeyboardInterrupt):
        execute(plan, cohort, StudyFolder(tmp_path), Watcher(press), seen.append)
    assert not multiprocessing.active_children()
    kept = Keeper(tmp_path / "runs" / f"{plan[0].id}.unfinished").load()
    assert len(kept.facts["fitted"]["epochs"]) in (1, 2)
    watcher = Watcher()
    [done] = execute(plan, cohort, StudyFolder(tmp_path), watcher, seen.append)
    assert done.status == "done"
    assert watcher.epochs == [0, 1, 2, 3]  # those that were kept are told again
    assert time.monotonic() - began < 120
    single = first_run(cohort, {**RUN, "training": {**RUN["training"], "devices": 1}})
    [alone] = execute(single, cohort, StudyFolder(tmp_path), Watcher(), seen.append)
    tables = [predictions.read(tmp_path / "runs" / record.id / "predictions.parquet").table for record in (done, alone)]
    assert tables[0]["sample"].tolist() == tables[1]["sample"].tolist()
    np.testing.assert_allclose(*(np.stack(table["logits"]) for table in tables), atol=1e-5)
    assert done.stage_tau == alone.stage_tau
    assert not done.remarks


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"devices": 3, "batch_size": 2}}, "devices: 3 cannot share a batch of 2"),
        ({"training": {"devices": 2, "accelerator": "mps"}}, "mps is one device"),
        ({"teacher": "large", "method": "crd", "training": {"devices": 2}}, "method crd relates the samples of a batch to each other"),
        ({"teacher": "large", "method": "dist", "training": {"devices": 2}}, "devices: 2 divides it"),
    ],
)
def test_what_several_devices_cannot_do_is_refused_before_the_first_step(cohort, changes, said):
    entry = {"name": "shared", "model": "small_cnn", **changes}
    raw = {"name": "s", "cohort": str(cohort.root), "splits": {"folds": 2, "repeats": 1, "validation_share": 0.34}, "training": TRAINING,
           "runs": [entry, {"name": "large", "model": "cifar_resnet8"}]}  # fmt: skip
    with pytest.raises(ConfigError, match=said):
        make_study(StudyConfig.model_validate(raw), cohort, "test")


def test_more_gpus_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("raredistill.training.devices.Fabric", lambda **options: SimpleNamespace(device=torch.device("cuda", 0)))
    with pytest.raises(ConfigError, match="devices: 2, but this machine has 1 of kind cuda; set devices=1"):
        make_fabric("cuda", "32-true", 2)


def test_a_batch_that_has_too_few_samples_for_all_processes_is_refused(cohort):
    options = {"channels": ("flair",), "batch_size": 16, "device": torch.device("cpu"), "share": (0, 2)}
    with pytest.raises(ConfigError, match="devices: 2 cannot share a batch of 1"):
        Batches(cohort, np.arange(33), **options)
    assert len(Batches(cohort, np.arange(33), **options, drop_last=True)) == 2


def test_batch_norms_are_synchronised_on_gpus_and_keep_their_activations():
    team = Team(SimpleNamespace(global_rank=0, world_size=2, device=torch.device("cuda", 0)))
    made = create("efficientnet_lite0", channels=1, classes=3, image_size=32).eval()  # whose batch norms hold activations
    images = torch.rand(2, 1, 32, 32)
    before, weights = made(images), list(made.parameters())
    team.synchronise(made)
    norms = [layer for layer in made.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(layer, nn.SyncBatchNorm) for layer in norms)
    assert all(ours is theirs for ours, theirs in zip(made.parameters(), weights, strict=True))
    torch.testing.assert_close(made(images), before)
    on_cpu = Team(SimpleNamespace(global_rank=0, world_size=2, device=torch.device("cpu")))
    on_cpu.synchronise(plain := nn.Sequential(nn.BatchNorm2d(1)))
    assert type(plain[0]) is nn.BatchNorm2d


@pytest.mark.parametrize(("processes", "kind", "model", "said"), [
    (2, "cpu", "small_cnn", 1), (2, "cuda", "small_cnn", 0), (1, "cpu", "small_cnn", 0), (2, "cpu", "test_vit", 0),
])  # fmt: skip
def test_batch_statistics_of_each_process_are_remarked_upon(processes, kind, model, said):
    made = create(model, channels=1, classes=3, image_size=16)
    remarks = _unshared(made, SimpleNamespace(world_size=processes, device=torch.device(kind)))
    assert len(remarks) == said
    assert all("each of the 2 processes computed batch statistics on its own part" in remark for remark in remarks)


def failing(place):
    raise torch.AcceleratorError("CUDA error: unspecified launch failure")


def test_a_device_that_fails_under_one_process_is_told_as_such():
    options = {"devices": 2, "accelerator": "cpu", "precision": "32-true"}
    with pytest.raises(torch.AcceleratorError, match="unspecified launch failure"):
        launch(failing, (), **options, hear=lambda *event: None)
