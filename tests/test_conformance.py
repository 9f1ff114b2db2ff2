"""What every distiller of the registry promises, whatever it compares."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raredistill.batches import Batches
from raredistill.checkpoint import Promise
from raredistill.distill.contract import Facts, Shape
from raredistill.distill.registry import METHODS, make_method, methods_table
from raredistill.errors import ConfigError
from raredistill.losses import make_loss
from raredistill.models import create
from raredistill.outputs import Outputs
from raredistill.training.devices import make_fabric
from raredistill.training.loop import Trainer
from raredistill.training.objectives import Distilled
from raredistill.training.settings import Settings
from raredistill.training.teacher import Teacher

SIZES = (2, 3, 100)
SOUND = [(name, classes) for name, method in METHODS.items() for classes in SIZES if classes >= method.min_classes]
WIDTHS = (4, 6)


def facts(classes, order=None):
    """Facts of a long-tailed problem, with its classes in another order if one is given."""
    counts = torch.arange(1.0, classes + 1) ** 2
    recalls = torch.linspace(0.9, 0.3, classes)
    if order is not None:
        counts, recalls = counts[order], recalls[order]
    shape = Shape(8, WIDTHS)
    return Facts(counts, prior=counts / counts.sum(), reliability=recalls, student_shape=shape, teacher_shape=shape)


def make(name, classes, order=None):
    torch.manual_seed(0)
    return make_method(name, facts(classes, order))


def outputs(logits, seed, dtype=None):
    """Outputs with features and maps; a teacher's logits carry the training prior."""
    generator = torch.Generator().manual_seed(seed)
    samples, classes = logits.shape
    dtype = dtype or logits.dtype
    features = torch.randn(samples, 8, generator=generator).to(dtype)
    maps = tuple(torch.randn(samples, width, 4, 4, generator=generator).to(dtype) for width in WIDTHS)
    return Outputs(logits, features, maps, facts(classes).prior.log())


def leaves(side):
    return [side.logits, side.features, *side.maps]


def total(name, labels, student, teacher, method=None):
    found = (method or make(name, student.logits.shape[1])).terms(SimpleNamespace(labels=labels), student, teacher)
    return torch.stack(list(found.values())).sum()


def number(*problem):
    return float(total(*problem).detach())


def problem(classes, samples=6):
    generator = np.random.default_rng(classes)
    student, teacher = (torch.tensor(generator.normal(size=(samples, classes)) * 3, dtype=torch.float32) for _ in range(2))
    return outputs(student, 1), outputs(teacher, 2), torch.tensor(generator.integers(0, classes, samples))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "classes"), SOUND)
def test_confident_mistakes_in_a_batch_that_lacks_classes_stay_finite_and_spare_the_teacher(name, classes, dtype):
    logits = torch.zeros(2, classes)
    logits[0, 0] = logits[1, 1] = 50
    logits[0, 1] = logits[1, 0] = -50
    student, teacher = outputs(logits.to(dtype), 1), outputs((-logits).to(dtype), 2)
    for leaf in (*leaves(student), *leaves(teacher)):
        leaf.requires_grad_()
    value = total(name, torch.tensor([1, 1]), student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    gradients = [leaf.grad for leaf in leaves(student) if leaf.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert all(leaf.grad is None for leaf in leaves(teacher))


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", METHODS)
def test_one_sample_and_outputs_without_variance_stay_finite(name, samples):
    flat = Outputs(torch.zeros(samples, 3), torch.zeros(samples, 8), tuple(torch.zeros(samples, width, 4, 4) for width in WIDTHS),
                   facts(3).prior.log())  # fmt: skip
    student = Outputs(*(flat.logits.clone(), flat.features.clone(), tuple(each.clone() for each in flat.maps)))
    for leaf in leaves(student):
        leaf.requires_grad_()
    total(name, torch.arange(samples) % 3, student, flat).backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves(student) if leaf.grad is not None)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_against_the_gradient_lowers_the_terms(name):
    student, teacher, labels = problem(3)
    for leaf in leaves(student):
        leaf.requires_grad_()
    method = make(name, 3)
    value = total(name, labels, student, teacher, method)
    value.backward()
    length = 1e-3 / max(float(leaf.grad.norm()) for leaf in leaves(student) if leaf.grad is not None)
    moved = [leaf.detach() - (0 if leaf.grad is None else length * leaf.grad) for leaf in leaves(student)]
    assert total(name, labels, Outputs(moved[0], moved[1], tuple(moved[2:])), teacher, method) < value


@pytest.mark.parametrize(("name", "classes"), [(name, classes) for name, classes in SOUND if METHODS[name].zero_at_equal])
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(name, classes):
    _, teacher, labels = problem(classes)
    # Attention and cosines are weighted by up to 1000 against nats.
    assert number(name, labels, teacher, teacher) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("name", "classes"), SOUND)
def test_only_a_method_that_relates_samples_to_each_other_cannot_be_shared_by_devices(name, classes):
    student, teacher, labels = problem(classes)

    def part(side, rows):
        return Outputs(side.logits[rows], side.features[rows], tuple(each[rows] for each in side.maps), side.log_prior)

    method = make(name, classes)
    whole = float(total(name, labels, student, teacher, method).detach())
    cuts = [slice(0, 4), slice(4, 6)]
    parts = [float(total(name, labels[cut], part(student, cut), part(teacher, cut), method).detach()) for cut in cuts]
    same = (4 * parts[0] + 2 * parts[1]) / 6 == pytest.approx(whole, rel=1e-4)
    assert same is not METHODS[name].within_batch


@pytest.mark.parametrize(
    ("name", "classes"), [(name, k) for name, k in SOUND if not METHODS[name].within_batch or name in ("dist", "ltkd")]
)
def test_a_batch_that_is_repeated_changes_nothing(name, classes):
    student, teacher, labels = problem(classes)

    def thrice(side):
        return Outputs(side.logits.repeat(3, 1), side.features.repeat(3, 1), tuple(each.repeat(3, 1, 1, 1) for each in side.maps),
                       side.log_prior)  # fmt: skip

    once = number(name, labels, student, teacher)
    assert number(name, labels.repeat(3), thrice(student), thrice(teacher)) == pytest.approx(once, rel=1e-4)


@pytest.mark.parametrize(("name", "classes"), SOUND)
def test_permuted_classes_change_nothing(name, classes):
    student, teacher, labels = problem(classes)
    order = torch.tensor(np.random.default_rng(5).permutation(classes))

    def permuted(side):
        return Outputs(side.logits[:, order], side.features, side.maps, side.log_prior[order])

    once = number(name, labels, student, teacher)
    again = number(name, torch.argsort(order)[labels], permuted(student), permuted(teacher), make(name, classes, order))
    assert again == pytest.approx(once, rel=1e-4)


@pytest.mark.parametrize(("name", "classes"), [(name, k) for name in METHODS for k in SIZES if (name, k) not in SOUND])
def test_too_few_classes_for_a_sound_signal_are_refused(name, classes):
    with pytest.raises(ConfigError, match=f"method {name} carries no sound signal for {classes} classes"):
        make(name, classes)


def fingerprint(network):
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in network.state_dict().values())).hexdigest()


@pytest.mark.parametrize("name", METHODS)
def test_an_epoch_leaves_every_bit_of_the_teacher_and_trains_what_the_method_brings(name, tiny_cohort):
    fabric = make_fabric("cpu", "32-true")
    network, student = (create("cifar_resnet8", channels=1, classes=3, image_size=16) for _ in range(2))
    counts = torch.tensor([50.0, 30.0, 10.0])
    promise = Promise(model="cifar_resnet8", head="linear", dropout=0.0, classes=tiny_cohort.classes, channels=("flair",), image_size=16,
                      mean=(0.5,), std=(0.25,), prior=tuple((counts / counts.sum()).tolist()), training_patients=None, external=True,
                      split_hash="")  # fmt: skip
    teacher = Teacher(network, promise, fabric, maps="maps" in METHODS[name].needs)
    known = Facts(counts, prior=teacher.log_prior.exp(), reliability=torch.ones(3) / 2, student_shape=Shape(*student.widths()),
                  teacher_shape=Shape(*teacher.widths()))  # fmt: skip
    method = make_method(name, known)
    objective = Distilled(make_loss("cross_entropy", counts=counts), method, teacher, ce_weight=1, kd_weight=1)
    trainer = Trainer(student, objective, Settings(epochs=1), ("flair",), tiny_cohort.classes, fabric)
    before = fingerprint(network)
    beside = [] if method.trainable is None else [each.detach().clone() for each in method.trainable.parameters()]
    network.train()
    batches = Batches(tiny_cohort, np.arange(48), channels=("flair",), batch_size=16, device=fabric.device)
    trainer.epoch(batches, None)
    assert fingerprint(network) == before
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks for module in (*network.modules(), *student.modules()))
    for old, new in zip(beside, [] if method.trainable is None else method.trainable.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_the_table_lists_every_method_with_what_it_needs():
    table = {row["name"]: row for row in methods_table()}
    assert set(table) == set(METHODS)
    assert table["pckd"]["needs"] == "logits, labels, prior, reliability"
    assert table["dkd"]["classes"] == ">= 3"
    assert "temperature=4" in table["kd"]["defaults"]
