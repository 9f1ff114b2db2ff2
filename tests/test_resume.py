"""A training that is cut anywhere and gone on with ends in the same bits as one that nothing disturbed."""

import json
import os
import signal
import threading
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies
from torch.nn import functional as F

from raredistill.augment import PRESETS
from raredistill.batches import Batches
from raredistill.losses import make_loss
from raredistill.models import Network, create
from raredistill.training import resume
from raredistill.training.devices import make_fabric
from raredistill.training.loop import DivergedError, Trainer, fit, predict_logits
from raredistill.training.objectives import Supervised
from raredistill.training.optimizers import make_optimizer
from raredistill.training.resume import Keeper, load_optimizer_state, optimizer_state, whole
from raredistill.training.settings import Settings

CLASSES = ("healthy", "HGG", "LGG")
HARD = Settings(epochs=4, learning_rate=0.01, warmup_epochs=0.5, clip_norm=1.0, ema_decay=0.9, patience=1, batch_size=16)


class PowerCutError(Exception):
    """Raised in place of the step at which the power goes."""


class Cut:
    """Batches that end in a power cut after some steps."""

    def __init__(self, batches, steps):
        self.batches, self.left = batches, steps

    def __len__(self):
        return len(self.batches)

    def epoch(self, epoch, start=0):
        for batch in self.batches.epoch(epoch, start):
            if self.left == 0:
                raise PowerCutError
            self.left -= 1
            yield batch


class Memory(torch.nn.Module):
    """A layer that is trained beside the student, and a running mean."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(3))


class Remembering(Supervised):
    """An objective whose term depends on all the logits that it has seen, and on weights of its own."""

    def __init__(self):
        super().__init__(make_loss("cross_entropy", counts=torch.ones(3)))
        self.trainable = Memory()

    def __call__(self, batch, student):
        memory = self.trainable
        memory.mean.mul_(0.9).add_(0.1 * student.logits.detach().mean(dim=0))
        drift = memory.scale * student.logits - memory.mean
        return {**super().__call__(batch, student), "drift": 0.1 * drift.square().mean()}


def serve(cohort, **changes):
    rows = np.arange(len(cohort.samples))
    options = {"channels": ("flair",), "batch_size": 16, "device": torch.device("cpu"), "seed": 1}
    return Batches(cohort, rows, **{**options, **changes})


def start(cohort, folder, *, steps=10**9, objective=None, options=HARD):
    """Train from the seed, or go on with what the folder keeps, until the power goes after some steps."""
    torch.manual_seed(0)
    network = create("cifar_resnet8", channels=1, classes=3, image_size=16, dropout=0.5)
    train = Cut(serve(cohort, augmentation=PRESETS["default"], sampler="balanced"), steps)
    shared = {"settings": options, "channels": ("flair",), "classes": CLASSES, "fabric": make_fabric("cpu", "32-true")}
    return fit(network, objective or Remembering(), train, serve(cohort, shuffle=False), **shared, keeper=Keeper(folder))


def bits(fitted):
    records = [{key: value for key, value in record.items() if key != "seconds"} for record in fitted.epochs]
    weights = [{name: tensor.numpy().tobytes() for name, tensor in each.items()} for each in (fitted.best, fitted.last)]
    return json.dumps(records), fitted.best_epoch, fitted.best_score, weights


@pytest.fixture(scope="module")
def undisturbed(tiny_cohort, tmp_path_factory):
    return start(tiny_cohort, tmp_path_factory.mktemp("undisturbed"))


@given(cuts=strategies.lists(strategies.integers(0, 12), min_size=1, max_size=4))
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_power_cuts_at_any_step_change_no_bit(tiny_cohort, tmp_path_factory, undisturbed, cuts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "SAVE_EVERY", 0.0)
        folder = tmp_path_factory.mktemp("cut")
        for steps in cuts:
            with suppress(PowerCutError):
                start(tiny_cohort, folder, steps=steps)
        assert bits(start(tiny_cohort, folder)) == bits(undisturbed)


def test_a_rate_that_depends_on_validation_goes_on_from_where_it_stood(tiny_cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SAVE_EVERY", 0.0)
    options = replace(HARD, epochs=6, patience=None, schedule="plateau", step_epochs=1, factor=0.5)
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "cut").mkdir()
    expected = start(tiny_cohort, tmp_path / "undisturbed", options=options)
    for steps in (10, 13, 9):  # also right before and after the epoch in which the rate falls
        with suppress(PowerCutError):
            start(tiny_cohort, tmp_path / "cut", steps=steps, options=options)
    assert bits(start(tiny_cohort, tmp_path / "cut", options=options)) == bits(expected)
    assert expected.epochs[-1]["learning_rate"] < expected.epochs[1]["learning_rate"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_an_optimizer_comes_back_from_its_state_to_the_same_steps(optimizer):
    options = Settings(optimizer=optimizer, learning_rate=0.1)
    networks = [torch.nn.Linear(4, 3) for _ in range(2)]
    first, second = (make_optimizer(network, options) for network in networks)
    inputs, target = torch.randn(8, 4), torch.randint(3, (8,))

    def step(network, taken):
        taken.zero_grad()
        F.cross_entropy(network(inputs), target).backward()
        taken.step()

    step(networks[0], first)
    networks[1].load_state_dict(networks[0].state_dict())
    tensors, facts = optimizer_state(first)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}  # as reading from a file gives
    load_optimizer_state(second, copies, json.loads(json.dumps(facts)))
    for network, taken in zip(networks, (first, second), strict=True):
        step(network, taken)
    assert torch.equal(networks[0].weight, networks[1].weight)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_state_is_noticed_and_the_one_before_it_used(tiny_cohort, tmp_path, undisturbed, damage, monkeypatch):
    monkeypatch.setattr(resume, "SAVE_EVERY", 0.0)
    with pytest.raises(PowerCutError):
        start(tiny_cohort, tmp_path, steps=9)
    newest = max(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    whole_file = newest.read_bytes()
    middle = len(whole_file) // 2
    flipped = whole_file[:middle] + bytes([whole_file[middle] ^ 4]) + whole_file[middle + 1 :]
    newest.write_bytes(whole_file[:middle] if damage == "truncated" else flipped)
    keeper = Keeper(tmp_path)
    state = keeper.load()
    assert (len(state.facts["fitted"]["epochs"]), state.facts["steps"]) == (1, 1)
    assert newest.name in keeper.remarks[0]
    assert bits(start(tiny_cohort, tmp_path)) == bits(undisturbed)


def test_when_both_states_are_damaged_the_run_is_made_again_from_its_seed(tiny_cohort, tmp_path, undisturbed):
    for slot in resume.SLOTS:
        (tmp_path / slot).write_bytes(b"not a state")
    assert bits(start(tiny_cohort, tmp_path)) == bits(undisturbed)


def test_a_signal_waits_for_the_end_of_a_step():
    done = []

    def step():
        with whole():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("first half")
            done.append("second half")
        done.append("the next step")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert done == ["first half", "second half"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    other = threading.Thread(target=lambda: whole().__enter__())
    other.start()
    other.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupted_training_is_kept_where_it_stands(tiny_cohort, tmp_path, undisturbed):
    class Pressed(Remembering):
        calls = 0

        def __call__(self, batch, student):
            type(self).calls += 1
            if self.calls == 10:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(batch, student)

    with pytest.raises(KeyboardInterrupt):
        start(tiny_cohort, tmp_path, objective=Pressed())
    state = Keeper(tmp_path).load()
    assert (len(state.facts["fitted"]["epochs"]), state.facts["steps"]) == (1, 10 - 7)
    assert bits(start(tiny_cohort, tmp_path)) == bits(undisturbed)


def test_an_infinite_loss_names_its_step_and_rows_and_leaves_the_last_good_state(tiny_cohort, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SAVE_EVERY", 0.0)

    class Breaking(Supervised):
        calls = 0

        def __call__(self, batch, student):
            type(self).calls += 1
            terms = super().__call__(batch, student)
            return {"ce": terms["ce"] * (float("inf") if self.calls == 9 else 1.0)}

    network = create("small_cnn", channels=1, classes=3, image_size=16)
    train = serve(tiny_cohort)
    shared = {"settings": HARD, "channels": ("flair",), "classes": CLASSES, "fabric": make_fabric("cpu", "32-true")}
    with pytest.raises(DivergedError, match="epoch 1, step 1") as caught:
        fit(network, Breaking(make_loss("cross_entropy", counts=torch.ones(3))), train, None, **shared, keeper=Keeper(tmp_path))
    second = list(serve(tiny_cohort).epoch(1))[1]
    assert caught.value.rows.tolist() == second.rows.tolist()
    assert caught.value.fitted.best_epoch == 0
    state = Keeper(tmp_path).load()
    assert (len(state.facts["fitted"]["epochs"]), state.facts["steps"]) == (1, 1)
    assert all(tensor.isfinite().all() for tensor in state.part("network").values())


def small_memory(network, limit):
    """Make a network fail as a device does whose memory holds ``limit`` images."""

    def check(_, inputs):
        if len(inputs[0]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory (in a test)")

    network.body.register_forward_pre_hook(check)
    return network


def plain_network():
    """Without batch statistics and dropout, micro-batches and whole batches have the same gradients."""
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 8), torch.nn.Tanh())
    return Network(body, torch.nn.Linear(8, 3), name="plain", channels=1, classes=3, image_size=16, mean=[0.0], std=[1.0])


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_gradient(tiny_cohort):
    batch = next(iter(serve(tiny_cohort, batch_size=14).epoch(0)))
    trainers = [
        Trainer(network, Remembering(), Settings(optimizer="sgd"), ("flair",), CLASSES, make_fabric("cpu", "32-true"))
        for network in (plain_network(), small_memory(plain_network(), 4))
    ]
    for trainer in trainers:
        trainer.objective = Supervised(make_loss("cross_entropy", counts=torch.ones(3)))
    (terms, logits), (halved, again) = (trainer.step(batch) for trainer in trainers)
    torch.testing.assert_close(halved, terms)
    torch.testing.assert_close(again, logits)
    torch.testing.assert_close(trainers[1].weights(), trainers[0].weights())
    assert (trainers[0].fitted.micro_batch, trainers[1].fitted.micro_batch) == (0, 4)
    # What is kept holds it too: the resumed training takes the same micro-batches.
    assert trainers[1].state().facts["micro_batches"] == 4


def test_the_pass_that_ran_out_of_memory_does_not_move_running_statistics(tiny_cohort):
    batch = next(iter(serve(tiny_cohort, batch_size=16).epoch(0)))
    network = plain_network()
    network.body.append(torch.nn.BatchNorm1d(8))
    features = torch.nn.Sequential(*network.body[:-1])((batch.select(("flair",)) - network._mean) / network._std).detach().double()

    def check(_, inputs):
        if len(inputs[0]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory (in a test)")

    network.head.register_forward_pre_hook(check)
    objective = Remembering()
    Trainer(network, objective, Settings(), ("flair",), CLASSES, make_fabric("cpu", "32-true")).step(batch)
    expected = torch.zeros(8, dtype=torch.float64)
    for half in features.split(8):
        expected = 0.9 * expected + 0.1 * half.mean(dim=0)
    torch.testing.assert_close(network.body[-1].running_mean.double(), expected, rtol=1e-5, atol=1e-6)
    assert int(network.body[-1].num_batches_tracked) == 2


def test_one_sample_that_does_not_fit_is_an_error(tiny_cohort):
    batch = next(iter(serve(tiny_cohort).epoch(0)))
    trainer = Trainer(small_memory(plain_network(), 0), Remembering(), Settings(), ("flair",), CLASSES, make_fabric("cpu", "32-true"))
    with pytest.raises(torch.OutOfMemoryError):
        trainer.step(batch)


def test_prediction_halves_its_batches_when_memory_ends(tiny_cohort):
    fabric = make_fabric("cpu", "32-true")
    whole_batches, halves = (
        predict_logits(network, serve(tiny_cohort, shuffle=False, batch_size=64), channels=("flair",), fabric=fabric)[0]
        for network in (plain_network(), small_memory(plain_network(), 5))
    )
    torch.testing.assert_close(halves, whole_batches)
