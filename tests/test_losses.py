"""Every loss against its formula in float64 numpy, and the prior that it leaves in the logits."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from raredistill.errors import ConfigError
from raredistill.losses import (
    LOSSES,
    adjust_logits,
    balanced_softmax,
    carried_prior,
    class_weights,
    cross_entropy,
    effective_number_weights,
    estimate_prior,
    focal,
    inverse_frequency_weights,
    ldam,
    losses_table,
    make_loss,
    vector_scaling,
)  # fmt: skip

COUNTS = np.array([100.0, 30.0, 4.0])
PRIOR = COUNTS / COUNTS.sum()


@pytest.fixture
def batch():
    generator = np.random.default_rng(0)
    return generator.normal(size=(12, 3)) * 3, generator.integers(0, 3, 12)


def log_softmax(logits):
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def own(logits, target):
    return log_softmax(logits)[np.arange(len(target)), target]


def margin_logits(logits, target):
    margins = 0.5 * COUNTS**-0.25 / (COUNTS**-0.25).max()
    return 30 * (np.tanh(logits) - np.eye(3)[target] * margins[target][:, None])


def effective(beta):
    weights = (1 - beta) / (1 - beta**COUNTS)
    return weights * 3 / weights.sum()


def smooth():
    return 0.1 + 0.3 * np.sin(np.pi / 2 * (COUNTS - COUNTS.min()) / (COUNTS.max() - COUNTS.min()))


WEIGHTS = COUNTS.sum() / (3 * COUNTS)
ORACLES = {
    "cross_entropy": (cross_entropy, lambda z, y: -own(z, y)),
    "smoothed": (
        lambda z, y, **k: cross_entropy(z, y, label_smoothing=0.1, **k),
        lambda z, y: -0.9 * own(z, y) - 0.1 * log_softmax(z).mean(1),
    ),
    "weighted": (
        lambda z, y, **k: cross_entropy(z, y, class_weights=torch.tensor(WEIGHTS), **k),
        lambda z, y: -WEIGHTS[y] * own(z, y),
    ),
    "focal": (lambda z, y, **k: focal(z, y, gamma=1.5, **k), lambda z, y: -((1 - np.exp(own(z, y))) ** 1.5) * own(z, y)),
    "balanced_softmax": (
        lambda z, y, **k: balanced_softmax(z, y, counts=torch.tensor(COUNTS), tau=0.7, **k),
        lambda z, y: -own(z + 0.7 * np.log(PRIOR), y),
    ),
    "ldam": (lambda z, y, **k: ldam(torch.tanh(z), y, counts=torch.tensor(COUNTS), **k), lambda z, y: -own(margin_logits(z, y), y)),
    "class_balanced_focal": (
        lambda z, y, **k: make_loss("class_balanced_focal", counts=torch.tensor(COUNTS), gamma=1.5, beta=0.99)(z, y, **k),
        lambda z, y: -effective(0.99)[y] * (1 - np.exp(own(z, y))) ** 1.5 * own(z, y),
    ),
    "label_aware_smoothing": (
        lambda z, y, **k: make_loss("label_aware_smoothing", counts=torch.tensor(COUNTS))(z, y, **k),
        lambda z, y: -((1 - smooth()[y]) * own(z, y) + smooth()[y] / 2 * (log_softmax(z).sum(1) - own(z, y))),
    ),
    "ldam by name": (
        lambda z, y, **k: make_loss("ldam", counts=torch.tensor(COUNTS))(30 * torch.tanh(z), y, **k),
        lambda z, y: -own(margin_logits(z, y), y),
    ),
    "square roots": (
        lambda z, y, **k: make_loss("weighted_cross_entropy", counts=torch.tensor(COUNTS), weights="sqrt")(z, y, **k),
        lambda z, y: -(3 * COUNTS**-0.5 / (COUNTS**-0.5).sum())[y] * own(z, y),
    ),
    "effective numbers": (
        lambda z, y, **k: make_loss("weighted_cross_entropy", counts=torch.tensor(COUNTS), weights="effective")(z, y, **k),
        lambda z, y: -effective(0.9999)[y] * own(z, y),
    ),
    "cdt": (
        lambda z, y, **k: vector_scaling(z, y, counts=torch.tensor(COUNTS), tau=0, gamma=0.3, **k),
        lambda z, y: -own(z * (COUNTS / 100) ** 0.3, y),
    ),
    "vector_scaling": (
        lambda z, y, **k: vector_scaling(z, y, counts=torch.tensor(COUNTS), **k),
        lambda z, y: -own(z * (COUNTS / 100) ** 0.2 + np.log(PRIOR), y),
    ),
}


@pytest.mark.parametrize("name", ORACLES)
def test_losses_equal_their_formula_and_divide_by_n(name, batch):
    loss, oracle = ORACLES[name]
    logits, target = torch.tensor(batch[0]), torch.tensor(batch[1])
    expected = oracle(*batch)
    np.testing.assert_allclose(loss(logits, target, reduction="none").numpy(), expected, atol=1e-5)
    assert float(loss(logits, target)) == pytest.approx(expected.mean(), abs=1e-5)


@pytest.mark.parametrize("classes", [2, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_confident_mistakes_in_a_batch_that_lacks_classes_stay_finite(name, dtype, classes):
    logits = torch.zeros(2, classes, dtype=dtype)
    logits[0, 0] = logits[1, 1] = 50
    logits[0, 1] = logits[1, 0] = -50
    logits.requires_grad_()
    value = make_loss(name, counts=torch.arange(1, classes + 1))(logits, torch.tensor([1, 1]))
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0].abs().sum() > 0.1  # the mistake is corrected, by vector scaling with a scaled slope


def test_half_precision_costs_no_more_than_the_rounding_of_the_logits(batch):
    logits, target = torch.tensor(batch[0]).bfloat16(), torch.tensor(batch[1])
    for name in LOSSES:
        loss = make_loss(name, counts=torch.tensor(COUNTS))
        assert float(loss(logits, target)) == pytest.approx(float(loss(logits.double(), target)), rel=1e-5)


def test_focal_equals_kornias(batch):
    from kornia.losses import focal_loss

    logits, target = torch.tensor(batch[0]), torch.tensor(batch[1])
    # Its mean divides by N * K; a loss is published as a mean over samples.
    expected = focal_loss(logits, target, alpha=None, gamma=1.5, reduction="sum") / len(target)
    assert float(focal(logits, target, gamma=1.5)) == pytest.approx(float(expected), abs=1e-5)


def test_weights_follow_the_classes_not_their_order_of_appearance():
    target = torch.tensor([2, 2, 0])
    weighted = make_loss("weighted_cross_entropy", counts=torch.tensor(COUNTS))(torch.zeros(3, 3), target, reduction="none")
    np.testing.assert_allclose(weighted.numpy(), np.log(3) * WEIGHTS[[2, 2, 0]], rtol=1e-6)


def test_inverse_frequency_is_scikit_learns_balanced():
    labels = np.repeat([0, 1, 2], COUNTS.astype(int))
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(inverse_frequency_weights(torch.tensor(COUNTS)).numpy(), expected, rtol=1e-6)


def test_effective_numbers_sum_to_the_number_of_classes():
    weights = (1 - 0.9999) / (1 - 0.9999**COUNTS)
    np.testing.assert_allclose(effective_number_weights(torch.tensor(COUNTS)).numpy(), weights * 3 / weights.sum(), rtol=1e-5)


def test_adjusting_raises_the_rare_class():
    adjusted = adjust_logits(torch.zeros(1, 3), counts=torch.tensor(COUNTS))
    np.testing.assert_allclose(adjusted.numpy()[0], -np.log(PRIOR), rtol=1e-5)
    assert adjusted.argmax() == 2


def test_the_balanced_softmax_is_minimised_by_the_balanced_posterior():
    # On data drawn with the prior, the expected loss has no slope at the logits of p(y | x) under equal classes, and is larger around them.
    likelihood = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=torch.float64)  # p(x | y) for two values of x, up to a factor
    joint = likelihood * torch.tensor(PRIOR)

    def expected(logits):
        losses = [balanced_softmax(logits, torch.full((2,), y), counts=torch.tensor(COUNTS), reduction="none") for y in range(3)]
        return (joint * torch.stack(losses, 1)).sum()

    best = (likelihood / likelihood.sum(1, keepdim=True)).log().requires_grad_()
    expected(best).backward()
    np.testing.assert_allclose(best.grad.numpy(), 0, atol=1e-7)
    for place in range(3):
        assert expected(best + 0.1 * torch.eye(3)[place]) > expected(best)
    # With the wrong sign of the shift the same logits have a slope.
    wrong = best.detach().clone().requires_grad_()
    losses = [balanced_softmax(wrong, torch.full((2,), y), counts=torch.tensor(COUNTS), tau=-1, reduction="none") for y in range(3)]
    (joint * torch.stack(losses, 1)).sum().backward()
    assert wrong.grad.abs().max() > 0.01


def test_carried_priors_follow_share_times_weight_over_shift():
    counts = torch.tensor(COUNTS)

    def carried(name, sampler="natural", **options):
        return carried_prior(name, counts=counts, sampler=sampler, **options)

    assert carried("cross_entropy") == pytest.approx(tuple(PRIOR))
    for uniform in (carried("weighted_cross_entropy"), carried("balanced_softmax"), carried("cross_entropy", "balanced")):
        assert uniform == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    half = COUNTS**0.5 / (COUNTS**0.5).sum()
    assert carried("balanced_softmax", tau=0.5) == pytest.approx(tuple(half))
    assert carried("cross_entropy", "sqrt") == pytest.approx(tuple(half))
    assert carried("weighted_cross_entropy", weights="sqrt") == pytest.approx(tuple(half))
    assert carried("cross_entropy", deferred="inverse") == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert carried("cross_entropy", "progressive") == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    # Two corrections overshoot: equal sampling and a shift leave the inverse of the counts.
    assert carried("balanced_softmax", "balanced") == pytest.approx(tuple(1 / COUNTS / (1 / COUNTS).sum()))
    for unknown in (
        carried("focal"),
        carried("ldam"),
        carried("class_balanced_focal"),
        carried("label_aware_smoothing"),
        carried("ldam", deferred="effective"),
        carried("vector_scaling"),
        carried("cross_entropy", label_smoothing=0.1),
    ):
        assert unknown is None
    with pytest.raises(ConfigError, match="did you mean balanced"):
        carried("cross_entropy", "balancd")
    with pytest.raises(ConfigError, match="training samples"):
        carried_prior("cross_entropy", counts=torch.tensor([3, 0]), sampler="natural")


def test_a_prior_that_nobody_wrote_down_is_estimated_on_held_out_samples():
    # Bayes-optimal logits under one prior, samples under another: the estimate is the first.
    generator = np.random.default_rng(0)
    carried, shown = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    labels = generator.choice(3, 40_000, p=shown)
    x = generator.normal(size=(40_000, 2)) + np.array([[0, 0], [1.5, 0], [0, 1.5]])[labels]
    centres = np.array([[0, 0], [1.5, 0], [0, 1.5]])
    logits = np.log(carried) - ((x[:, None] - centres) ** 2).sum(2) / 2
    np.testing.assert_allclose(estimate_prior(torch.tensor(logits), torch.tensor(labels)).numpy(), carried, atol=0.015)
    with pytest.raises(ValueError, match="training samples"):
        estimate_prior(torch.tensor(logits), torch.zeros(40_000, dtype=torch.int64))


def test_unknown_names_options_and_empty_classes_are_refused():
    with pytest.raises(ConfigError, match="did you mean focal"):
        make_loss("fokal", counts=torch.ones(2))
    with pytest.raises(ConfigError, match="did you mean gamma"):
        make_loss("focal", counts=torch.ones(2), gama=1.0)
    with pytest.raises(ConfigError, match="training samples"):
        make_loss("balanced_softmax", counts=torch.tensor([3.0, 0.0]))
    with pytest.raises(ConfigError, match="weights must be one of inverse, sqrt, effective, not 'invers'"):
        make_loss("weighted_cross_entropy", counts=torch.ones(2), weights="invers")
    with pytest.raises(ConfigError, match="did you mean sqrt"):
        class_weights("sqr", torch.ones(2))
    assert {row["name"] for row in losses_table()} == set(LOSSES)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("focal", "gamma", -1), ("focal", "gamma", "2"), ("cross_entropy", "label_smoothing", 1.5), ("balanced_softmax", "tau", float("nan"))],
)
def test_values_out_of_range_are_refused_before_training(name, option, value):
    with pytest.raises(ConfigError, match=f"loss {name}: {option} must be a number at least 0"):
        make_loss(name, counts=torch.ones(2), **{option: value})
