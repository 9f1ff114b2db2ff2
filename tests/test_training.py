"""The loop: rates, decay, terms and frozen teachers, against formulas written out."""

import copy
import json
import math
import resource
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

from raredistill.batches import Batch, Batches, Mixed
from raredistill.checkpoint import Promise
from raredistill.distill.contract import Facts
from raredistill.distill.registry import make_method
from raredistill.errors import CheckpointError, ConfigError
from raredistill.losses import make_loss
from raredistill.models import create
from raredistill.outputs import Outputs
from raredistill.training.devices import make_fabric
from raredistill.training.loop import Tally, Trainer, fit, predict_logits
from raredistill.training.objectives import Deferred, Distilled, Supervised
from raredistill.training.online import Peer, Together
from raredistill.training.optimizers import Plateau, learning_rate, make_optimizer
from raredistill.training.settings import Settings
from raredistill.training.teacher import CrossFitted, Ensemble, Teacher, check_teacher

CLASSES = ("healthy", "HGG", "LGG")


@pytest.fixture
def fabric():
    return make_fabric("cpu", "32-true")


def small(channels=1, seed=0):
    torch.manual_seed(seed)
    return create("small_cnn", channels=channels, classes=3, image_size=16)


def promise(**changes):
    known = {
        "model": "small_cnn", "head": "linear", "dropout": 0.0, "classes": CLASSES, "channels": ("flair",), "image_size": 16,
        "mean": (0.5,), "std": (0.25,), "prior": None, "training_patients": ("HGG000",), "external": False, "split_hash": "",
    }  # fmt: skip
    return Promise(**{**known, **changes})


def batches(cohort, **settings):
    rows = np.arange(len(cohort.samples))
    return Batches(cohort, rows, channels=("flair", "t1ce"), batch_size=16, device=torch.device("cpu"), **settings)


def supervised():
    return Supervised(make_loss("cross_entropy", counts=torch.ones(3)))


def test_learning_rates_follow_their_formulas():
    assert learning_rate(Settings(schedule="step", step_epochs=3, factor=0.5, learning_rate=1.0), 6.5) == 0.25
    assert learning_rate(Settings(schedule="multistep", milestones=(160, 180), factor=0.01, learning_rate=0.1), 170) == pytest.approx(1e-3)
    cosine = Settings(schedule="cosine", epochs=12, warmup_epochs=2, learning_rate=1.0)
    assert learning_rate(cosine, 1.0) == 0.5
    assert learning_rate(cosine, 7.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))


def test_a_rate_that_is_halved_each_epoch_holds_to_the_epochs_last_step(tiny_cohort, fabric):
    settings = Settings(epochs=3, schedule="step", step_epochs=1, factor=0.5, learning_rate=1e-3)
    fitted = fit(small(), supervised(), batches(tiny_cohort), None, settings=settings, channels=("flair",), classes=CLASSES, fabric=fabric)
    assert [record["learning_rate"] for record in fitted.epochs] == [1e-3, 5e-4, 2.5e-4]


@pytest.mark.parametrize("select", ["macro_f1", "loss"])
def test_the_plateaus_rate_is_what_torch_makes_of_the_recorded_metric(tiny_cohort, fabric, select):
    settings = Settings(epochs=9, schedule="plateau", step_epochs=1, factor=0.5, learning_rate=0.01, select=select)
    train, look = batches(tiny_cohort), batches(tiny_cohort, shuffle=False)
    fitted = fit(small(), supervised(), train, look, settings=settings, channels=("flair",), classes=CLASSES, fabric=fabric)
    oracle = torch.optim.SGD([torch.zeros(1)], lr=0.01)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(oracle, "min" if select == "loss" else "max", factor=0.5, patience=1)
    rates = []
    for record in fitted.epochs:
        rates.append(oracle.param_groups[0]["lr"])
        schedule.step(record["validation"][select])
    assert [record["learning_rate"] for record in fitted.epochs] == rates


def test_a_plateau_lowers_the_rate_as_the_rule_says_also_after_its_state_went_through_json():
    values = [0.5, 0.6, 0.6, 0.60001, 0.6, 0.7, 0.7, 0.7, 0.7, 0.2]
    settings = Settings(schedule="plateau", step_epochs=1, factor=0.1, learning_rate=1.0, warmup_epochs=2)
    plateau, rates, best, bad, rate, expected = Plateau(settings), [], -math.inf, 0, 1.0, []
    for value in values:
        again = Plateau(settings)
        again.load_state(json.loads(json.dumps(plateau.state())))
        plateau = again
        plateau.look(value)
        rates.append(plateau.rate)
        # Better by more than a ten-thousandth; lowered in the second epoch that is not.
        best, bad = (value, 0) if value > best * (1 + 1e-4 * math.copysign(1, best)) else (best, bad + 1)
        if bad > 1:
            rate, bad = rate * 0.1, 0
        expected.append(rate)
    assert rates == pytest.approx(expected)
    assert expected[-1] == pytest.approx(1e-3)
    assert learning_rate(replace(settings, learning_rate=plateau.rate), 1.0) == pytest.approx(0.5e-3)


@pytest.mark.parametrize(("select", "has_validation", "said"), [("last", True, "select is last"), ("loss", False, "no validation part")])
def test_a_plateau_without_a_metric_to_watch_is_refused(tiny_cohort, fabric, select, has_validation, said):
    settings, look = Settings(schedule="plateau", select=select), batches(tiny_cohort, shuffle=False) if has_validation else None
    with pytest.raises(ConfigError, match=said):
        fit(small(), supervised(), batches(tiny_cohort), look, settings=settings, channels=("flair",), classes=CLASSES, fabric=fabric)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_named(device, monkeypatch):
    monkeypatch.setattr(f"torch.{'cuda' if device == 'cuda' else 'backends.mps'}.is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"accelerator: {device}"):
        make_fabric(device, "32-true")


def test_weights_and_biases_decay_as_the_thesis_sum_of_two_penalties():
    # Adam's weight decay 1e-4 on everything plus the gradient 2e-4 w of an explicit 1e-4 ||w||^2 on weights.
    network = torch.nn.Linear(4, 3)
    other = copy.deepcopy(network)
    ours = make_optimizer(network, Settings(optimizer="adam", learning_rate=1e-2, weight_decay=3e-4, bias_weight_decay=1e-4))
    thesis = torch.optim.Adam(other.parameters(), lr=1e-2, weight_decay=1e-4)
    inputs, target = torch.randn(8, 4), torch.randint(3, (8,))
    for _ in range(5):
        ours.zero_grad()
        thesis.zero_grad()
        F.cross_entropy(network(inputs), target).backward()
        (F.cross_entropy(other(inputs), target) + 1e-4 * other.weight.square().sum()).backward()
        ours.step()
        thesis.step()
    torch.testing.assert_close(network.weight, other.weight)
    torch.testing.assert_close(network.bias, other.bias)


def test_training_learns_keeps_best_and_last_and_repeats_itself(tiny_cohort, fabric):
    settings = Settings(epochs=4, learning_rate=0.01, schedule="constant", clip_norm=1.0)
    runs = []
    for _ in range(2):
        network = small()
        train, look = batches(tiny_cohort, seed=1), batches(tiny_cohort, shuffle=False)
        runs.append(fit(network, supervised(), train, look, settings=settings, channels=("flair",), classes=CLASSES, fabric=fabric))
    first, second = runs
    assert first.best_score > 0.9
    assert first.best_score == max(record["validation"]["macro_f1"] for record in first.epochs)
    assert first.epochs[first.best_epoch]["validation"]["macro_f1"] == first.best_score
    assert set(first.epochs[0]["train"]["recall"]) == set(CLASSES)
    assert all(torch.equal(first.last[name], second.last[name]) for name in first.last)


def test_without_validation_the_last_epoch_is_the_best(tiny_cohort, fabric):
    fitted = fit(
        small(), supervised(), batches(tiny_cohort), None, settings=Settings(epochs=2), channels=("flair",), classes=CLASSES, fabric=fabric
    )
    assert fitted.best_epoch == 1
    assert all(torch.equal(fitted.best[name], fitted.last[name]) for name in fitted.last)


def test_early_stopping_waits_for_its_patience(tiny_cohort, fabric):
    settings = Settings(epochs=30, learning_rate=1e-12, patience=2, schedule="constant", weight_decay=0.0)
    look = batches(tiny_cohort, shuffle=False)
    fitted = fit(small(), supervised(), batches(tiny_cohort), look, settings=settings, channels=("flair",), classes=CLASSES, fabric=fabric)
    assert len(fitted.epochs) == fitted.best_epoch + 3 < 30


def test_an_infinite_loss_stops_with_the_epoch_named(tiny_cohort, fabric):
    def infinite(logits, target, *, reduction):
        return logits.sum(dim=1) * math.inf

    with pytest.raises(FloatingPointError, match="epoch 0"):
        fit(small(), Supervised(infinite), batches(tiny_cohort), None,
            settings=Settings(epochs=1), channels=("flair",), classes=CLASSES, fabric=fabric)  # fmt: skip


def test_the_moving_average_is_what_counts(tiny_cohort, fabric):
    network = small()
    start = {name: value.clone() for name, value in network.named_parameters()}
    trainer = Trainer(network, supervised(), Settings(ema_decay=0.5, learning_rate=0.01), ("flair",), CLASSES, fabric)
    trainer.step(next(iter(batches(tiny_cohort).epoch(0))))
    # The first update copies the weights (torch's AveragedModel); the second averages.
    once = {name: value.detach().clone() for name, value in network.named_parameters()}
    trainer.step(next(iter(batches(tiny_cohort).epoch(1))))
    for name, value in network.named_parameters():
        torch.testing.assert_close(trainer.weights()[name], 0.5 * once[name] + 0.5 * value.detach())
    assert any(not torch.equal(start[name], once[name]) for name in start)


def test_the_mean_of_the_last_epochs_is_what_counts(tiny_cohort, fabric):
    network, ends = small(), []
    settings = Settings(epochs=3, average_epochs=2, learning_rate=0.01)
    trainer = Trainer(network, supervised(), settings, ("flair",), CLASSES, fabric)
    for _ in range(3):
        trainer.epoch(batches(tiny_cohort), None)
        ends.append({name: value.detach().clone() for name, value in network.named_parameters()})
        if len(ends) == 1:  # until the last epochs begin, the weights are what they are
            torch.testing.assert_close(dict(trainer.weights()), {**trainer.weights(), **ends[0]})
    for name in ends[0]:
        torch.testing.assert_close(trainer.weights()[name], (ends[1][name] + ends[2][name]) / 2)
    with pytest.raises(ConfigError, match="two averages of the weights"):
        Settings(ema_decay=0.9, average_epochs=2)


def test_a_distilled_step_minimises_the_weighted_sum_and_leaves_the_teacher_alone(tiny_cohort, fabric):
    teacher_network, student = small(channels=2, seed=1), small()
    before = {name: value.clone() for name, value in teacher_network.state_dict().items()}
    teacher = Teacher(teacher_network, promise(channels=("t1ce", "flair"), mean=(0.5, 0.5), std=(0.25, 0.25)), fabric)
    method = make_method("kd", Facts(torch.ones(3)), temperature=2.0)
    objective = Distilled(make_loss("cross_entropy", counts=torch.ones(3)), method, teacher, ce_weight=0.7, kd_weight=0.3)
    trainer = Trainer(student, objective, Settings(), ("flair",), CLASSES, fabric)
    batch = next(iter(batches(tiny_cohort).epoch(0)))
    teacher_network.train()
    terms, logits = trainer.step(batch)
    teacher_network.eval()
    taught = teacher_network(batch.select(("t1ce", "flair")))
    kl = F.kl_div(F.log_softmax(logits / 2, 1), F.log_softmax(taught / 2, 1), log_target=True, reduction="batchmean") * 4
    expected = 0.7 * F.cross_entropy(logits, batch.labels) + 0.3 * kl
    torch.testing.assert_close(torch.stack(list(terms.values())).sum(), expected)
    assert all(torch.equal(before[name], value) for name, value in teacher_network.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher_network.parameters())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": ("HGG", "healthy", "LGG")}, "order and names"),
        ({"channels": ("t2",)}, "channels"),
        ({"training_patients": ("LGG003",)}, "leak"),
        ({"training_patients": None}, "external"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(changes, said):
    with pytest.raises(CheckpointError, match=said):
        check_teacher(promise(**changes), name="t", classes=CLASSES, channels=("flair", "t1ce"), held_out={"LGG003"})


def test_an_epochs_tally_equals_the_whole_epoch_at_once():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 3, generator=generator), torch.randint(3, (50,), generator=generator)
    tally = Tally(CLASSES, torch.device("cpu"))
    for part in (slice(0, 32), slice(32, 50)):
        tally.add(logits[part], labels[part], {"ce": F.cross_entropy(logits[part], labels[part])})
    summary = tally.summary()
    assert summary["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)))
    assert summary["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))


def test_prediction_runs_in_order_and_restores_the_mode(tiny_cohort, fabric):
    network = small().train()
    logits, labels = predict_logits(network, batches(tiny_cohort, shuffle=False), channels=("flair",), fabric=fabric)
    assert labels.tolist() == tiny_cohort.labels.tolist()
    assert logits.shape == (len(labels), 3)
    assert network.training


def mixed_batch(epoch=0):
    labels, partners = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2])
    mixed = Mixed(partners, torch.tensor([0.9, 0.2, 0.6, 0.5]))
    return Batch(torch.arange(4), torch.zeros(4, 1, 2, 2), labels, ("flair",), epoch, mixed)


def test_mixed_targets_are_weighed_sample_by_sample():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    batch = mixed_batch()
    found = Supervised(make_loss("cross_entropy", counts=torch.ones(3)))(batch, Outputs(logits))["ce"]
    rows = [F.cross_entropy(logits, labels, reduction="none") for labels in (batch.labels, batch.mixed.labels)]
    torch.testing.assert_close(found, (batch.mixed.share * rows[0] + (1 - batch.mixed.share) * rows[1]).mean())
    # The trap: means over the batch first, the mean share after.
    share = batch.mixed.share.mean()
    assert abs(float(found - share * rows[0].mean() - (1 - share) * rows[1].mean())) > 0.01


def test_deferred_weights_wrap_any_loss_from_their_epoch_on():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([0.5, 1.0, 3.0])
    for name in ("cross_entropy", "focal", "balanced_softmax"):
        loss = make_loss(name, counts=torch.tensor([10, 5, 1]))
        early, late = (Supervised(loss, Deferred(weights, 2))(replace(mixed_batch(epoch), mixed=None), Outputs(logits)) for epoch in (1, 2))
        labels = mixed_batch().labels
        torch.testing.assert_close(early["ce"], loss(logits, labels))
        torch.testing.assert_close(late["ce"], (weights[labels] * loss(logits, labels, reduction="none")).mean())


def test_a_sharpness_aware_step_uses_the_slope_at_the_worst_place_near_by(tiny_cohort, fabric):
    settings = Settings(optimizer="sgd", momentum=0.0, learning_rate=0.1, weight_decay=0.0, sam_rho=0.05)
    network = small().eval()
    twin = copy.deepcopy(network)
    trainer = Trainer(network, supervised(), settings, ("flair",), CLASSES, fabric)
    batch = next(iter(batches(tiny_cohort).epoch(0)))
    trainer.step(batch)

    def slope(at):
        loss = F.cross_entropy(at(batch.select(("flair",))), batch.labels)
        return torch.autograd.grad(loss, list(at.parameters()))

    first = slope(twin)
    norm = torch.cat([each.flatten() for each in first]).norm()
    worst = copy.deepcopy(twin)
    with torch.no_grad():
        for weight, gradient in zip(worst.parameters(), first, strict=True):
            weight += 0.05 * gradient / norm
        expected = [weight - 0.1 * gradient for weight, gradient in zip(twin.parameters(), slope_of(slope, worst), strict=True)]
    for found, wanted in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def slope_of(slope, network):
    with torch.enable_grad():
        return slope(network)


def test_an_ensemble_averages_probabilities_and_keeps_a_prior_that_all_carry(tiny_cohort, fabric):
    batch = next(iter(batches(tiny_cohort).epoch(0)))
    networks = [small(seed=seed) for seed in (1, 2)]
    known = promise(prior=(0.5, 0.3, 0.2))
    both = Ensemble([Teacher(network, known, fabric) for network in networks])
    expected = torch.stack([network.eval()(batch.select(("flair",))).softmax(1) for network in networks]).mean(0)
    torch.testing.assert_close(both(batch).logits.softmax(1), expected)
    torch.testing.assert_close(both(batch).log_prior.exp(), torch.tensor([0.5, 0.3, 0.2]))
    assert Ensemble([Teacher(small(), each, fabric) for each in (known, promise(prior=(0.2, 0.3, 0.5)))]).log_prior is None


def test_cross_fitted_teachers_run_on_their_own_samples_only(tiny_cohort, fabric):
    batch = next(iter(batches(tiny_cohort).epoch(0)))
    networks = [small(seed=seed) for seed in (1, 2)]
    seen = [[], []]
    for network, calls in zip(networks, seen, strict=True):
        network.body.register_forward_pre_hook(lambda _, inputs, calls=calls: calls.append(len(inputs[0])))
    priors = [(0.5, 0.3, 0.2), (0.2, 0.3, 0.5)]
    owner = torch.arange(len(tiny_cohort.samples)) % 2
    teachers = [Teacher(network, promise(prior=prior), fabric, maps=True) for network, prior in zip(networks, priors, strict=True)]
    found = CrossFitted(teachers, owner)(batch)
    mine = owner[batch.rows]
    assert seen == [[int((mine == 0).sum())], [int((mine == 1).sum())]]
    for number, network in enumerate(networks):
        own = mine == number
        whole = network.eval().see(batch.select(("flair",))[own], maps=True)
        torch.testing.assert_close(found.logits[own], whole.logits)
        torch.testing.assert_close(found.features[own], whole.features)
        torch.testing.assert_close(found.maps[-1][own], whole.maps[-1])
        torch.testing.assert_close(found.log_prior[own].exp(), torch.tensor(priors[number]).expand(int(own.sum()), 3))


def kl(teacher, student):
    return F.kl_div(F.log_softmax(student, 1), F.log_softmax(teacher, 1), log_target=True, reduction="batchmean")


@pytest.mark.parametrize("mutual", [False, True])
def test_peers_learn_in_one_pass_each_from_detached_targets(mutual, tiny_cohort, fabric):
    networks = [small(seed=seed) for seed in (1, 2, 3)]
    twins = copy.deepcopy(networks)
    passes = [[], [], []]
    for network, calls in zip(networks, passes, strict=True):
        network.body.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
    loss, method = make_loss("cross_entropy", counts=torch.ones(3)), make_method("kd", Facts(torch.ones(3)), temperature=1)
    peers = [Peer(network, ("flair",), loss) for network in networks[1:]]
    objective = Together(loss, method, peers, fabric, mutual=mutual, ce_weight=0.6, kd_weight=0.4)
    settings = Settings(optimizer="sgd", momentum=0.0, learning_rate=0.1, weight_decay=0.0)
    trainer = Trainer(networks[0], objective, settings, ("flair",), CLASSES, fabric)
    trainer.model.train()
    batch = next(iter(batches(tiny_cohort).epoch(0)))
    terms, _ = trainer.step(batch)
    assert [len(calls) for calls in passes] == [1, 1, 1]
    assert set(terms) >= {"ce", "kd", "peer1_ce", "peer2_ce"}
    assert ("peer1_kd" in terms) == mutual

    # Each network by itself, against fixed targets.
    outputs = [twin.train()(batch.select(("flair",))) for twin in twins]
    for number, twin in enumerate(twins):
        others = [kl(output.detach(), outputs[number]) for other, output in enumerate(outputs) if other != number]
        own = F.cross_entropy(outputs[number], batch.labels)
        objective_alone = 0.6 * own + 0.4 * sum(others) / 2 if mutual or number == 0 else own
        slopes = torch.autograd.grad(objective_alone, list(twin.parameters()))
        for weight, slope, found in zip(twin.parameters(), slopes, networks[number].parameters(), strict=True):
            torch.testing.assert_close(found, weight - 0.1 * slope, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_body_takes_the_same_steps_and_keeps_its_names(tiny_cohort, fabric):
    counters.clear()
    trainers = []
    for mode in ("none", "default"):
        settings = Settings(epochs=1, batch_size=16, ema_decay=0.5, compile=mode)
        trainers.append(Trainer(small(), supervised(), settings, ("flair",), CLASSES, fabric))
        trainers[-1].epoch(batches(tiny_cohort, drop_last=True), batches(tiny_cohort, shuffle=False))
    assert counters["frames"]["ok"] > 0  # it was compiled
    assert list(trainers[0].weights()) == list(trainers[1].weights())
    for name, values in trainers[0].weights().items():
        torch.testing.assert_close(values, trainers[1].weights()[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", [{"clip_norm": 0.05}, {"clip_norm": 0.05, "sam_rho": 0.3}, {"sam_rho": 0.3}])
def test_each_peer_has_a_gradient_norm_of_its_own(changes, tiny_cohort, fabric):
    # One peer's loss is a thousand times the other's: a norm over both would leave the student hardly any step, and hardly any climb.
    networks = [small(seed=seed) for seed in (1, 2)]
    loss, method = make_loss("cross_entropy", counts=torch.ones(3)), make_method("kd", Facts(torch.ones(3)), temperature=1)

    def loud(*args, **options):
        return 1000 * loss(*args, **options)

    settings = Settings(optimizer="sgd", momentum=0.0, learning_rate=0.1, weight_decay=0.0, **changes)
    batch = next(iter(batches(tiny_cohort).epoch(0)))
    alone = [copy.deepcopy(network) for network in networks]
    for network, its_loss in zip(alone, (loss, loud), strict=True):
        trainer = Trainer(network, Supervised(its_loss), settings, ("flair",), CLASSES, fabric)
        trainer.model.train()
        trainer.step(batch)
    objective = Together(loss, method, [Peer(networks[1], ("flair",), loud)], fabric, mutual=False, ce_weight=1, kd_weight=0)
    trainer = Trainer(networks[0], objective, settings, ("flair",), CLASSES, fabric)
    trainer.model.train()
    trainer.step(batch)
    for found, wanted in zip(networks, alone, strict=True):
        for weight, expected in zip(found.parameters(), wanted.parameters(), strict=True):
            torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of other systems has no such switch")
def test_a_step_on_the_cpu_reuses_memory_instead_of_asking_the_system_for_new_pages(fabric):
    Trainer(small(), supervised(), Settings(), ("flair",), CLASSES, fabric)

    def new_pages():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MiB: 16,384 pages of 4 KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    new_pages()
    assert min(new_pages() for _ in range(3)) < 1000
