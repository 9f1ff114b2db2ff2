"""Every distiller against its formula in float64 numpy, and what all of them promise."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raredistill.distill import bkd, dist, dive, dkd, kd
from raredistill.distill.contract import Outputs
from raredistill.distill.registry import METHODS, make_method, methods_table
from raredistill.errors import ConfigError

COUNTS = torch.tensor([100.0, 30.0, 4.0])
T = 2.5


@pytest.fixture
def logits():
    generator = np.random.default_rng(0)
    return generator.normal(size=(10, 3)) * 3, generator.normal(size=(10, 3)) * 3, generator.integers(0, 3, 10)


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def kl(q, p):
    return (q * np.log(q / p)).sum(axis=1).mean()


def normal(q):
    return q / q.sum(axis=1, keepdims=True)


def dkd_oracle(s, t, y):
    p, q, rows = softmax(s / T), softmax(t / T), np.arange(len(y))
    pair = [np.stack([side[rows, y], 1 - side[rows, y]], axis=1) for side in (q, p)]
    rest = [normal(np.array([np.delete(row, label) for row, label in zip(side, y, strict=True)])) for side in (q, p)]
    return (1.5 * kl(*pair) + 4 * kl(*rest)) * T**2


def dist_oracle(s, t, _):
    p, q = softmax(s / T), softmax(t / T)
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    return (2 * rows + 3 * columns) * T**2


WEIGHTS = np.array([0.2, 0.8, 2.0])
ORACLES = {
    "kd": (lambda s, t, y: kd(s, t, temperature=T), lambda s, t, y: kl(softmax(t / T), softmax(s / T)) * T**2),
    "dkd": (lambda s, t, y: dkd(s, t, y, alpha=1.5, beta=4.0, temperature=T), dkd_oracle),
    "bkd": (
        lambda s, t, y: bkd(s, t, class_weights=torch.tensor(WEIGHTS), temperature=T),
        lambda s, t, y: kl(normal(softmax(t / T) * WEIGHTS), softmax(s / T)) * T**2,
    ),
    "dive": (
        lambda s, t, y: dive(s, t, power=0.5, temperature=T),
        lambda s, t, y: kl(normal(softmax(t / T) ** 0.5), softmax(s / T)) * T**2,
    ),
    "dist": (lambda s, t, y: dist(s, t, beta=2.0, gamma=3.0, temperature=T), dist_oracle),
}


@pytest.mark.parametrize("name", ORACLES)
def test_distillers_equal_their_formula(name, logits):
    ours, oracle = ORACLES[name]
    student, teacher, target = logits
    assert float(ours(torch.tensor(student), torch.tensor(teacher), torch.tensor(target))) == pytest.approx(oracle(*logits), abs=1e-5)


def terms(name, student, teacher, labels, counts=COUNTS):
    method = make_method(name, counts=counts, classes=len(counts))
    return method.terms(SimpleNamespace(labels=labels), Outputs(student), Outputs(teacher))


SOUND = [(name, classes) for name, method in METHODS.items() for classes in (2, 3, 100) if classes >= method.min_classes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "classes"), SOUND)
def test_confident_mistakes_in_a_batch_that_lacks_classes_stay_finite(name, classes, dtype):
    student = torch.zeros(2, classes, dtype=dtype)
    student[0, 0] = student[1, 1] = 50
    student[0, 1] = student[1, 0] = -50
    teacher = (-student).requires_grad_()
    student.requires_grad_()
    found = terms(name, student, teacher, torch.tensor([1, 1]), torch.arange(1, classes + 1))
    torch.stack(list(found.values())).sum().backward()
    assert all(torch.isfinite(term) and term.dtype == torch.float32 for term in found.values())
    assert torch.isfinite(student.grad).all()
    assert teacher.grad is None


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", METHODS)
def test_one_sample_and_outputs_without_variance_stay_finite(name, samples):
    student = torch.zeros(samples, 3, requires_grad=True)
    sum(terms(name, student, torch.zeros(samples, 3), torch.arange(samples) % 3).values()).backward()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_step_lowers_the_distance_and_reaches_the_student_only(name, logits):
    student, teacher, target = (torch.tensor(part) for part in logits)
    student.requires_grad_()
    teacher.requires_grad_()
    value = sum(terms(name, student, teacher, target).values())
    value.backward()
    assert teacher.grad is None
    assert sum(terms(name, student.detach() - 0.1 * student.grad, teacher, target).values()) < value


@pytest.mark.parametrize("name", ["kd", "dkd", "dist"])
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(name, logits):
    same = torch.tensor(logits[0], dtype=torch.float32)
    assert sum(terms(name, same, same.clone(), torch.tensor(logits[2])).values()) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_doubled_batch_and_permuted_classes_change_nothing(name, logits):
    student, teacher, target = (torch.tensor(part) for part in logits)
    value = sum(terms(name, student, teacher, target).values())
    double = sum(terms(name, student.repeat(2, 1), teacher.repeat(2, 1), target.repeat(2)).values())
    assert float(double) == pytest.approx(float(value), rel=1e-4)
    order = torch.tensor([2, 0, 1])
    permuted = sum(terms(name, student[:, order], teacher[:, order], torch.argsort(order)[target], COUNTS[order]).values())
    assert float(permuted) == pytest.approx(float(value), rel=1e-4)


def test_methods_without_signal_for_two_classes_are_refused():
    for name in ("dkd", "dist"):
        with pytest.raises(ConfigError, match="at least 3"):
            make_method(name, counts=torch.ones(2), classes=2)
    assert make_method("kd", counts=torch.ones(2), classes=2).name == "kd"


def test_unknown_names_and_values_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean dive"):
        make_method("dve", counts=COUNTS, classes=3)
    with pytest.raises(ConfigError, match="did you mean temperature"):
        make_method("kd", counts=COUNTS, classes=3, temprature=3)
    with pytest.raises(ConfigError, match="temperature must be a number above 0"):
        make_method("kd", counts=COUNTS, classes=3, temperature=0)
    with pytest.raises(ConfigError, match="power must be a number above 0 and at most 1"):
        make_method("dive", counts=COUNTS, classes=3, power=1.5)
    with pytest.raises(ConfigError, match="beta must be a number at least 0"):
        make_method("dkd", counts=COUNTS, classes=3, beta=float("nan"))
    with pytest.raises(ConfigError, match="training samples"):
        make_method("bkd", counts=torch.tensor([3, 0]), classes=2)
    assert [row["name"] for row in methods_table()] == list(METHODS)
