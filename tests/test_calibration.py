"""Calibration, thresholds and what a student inherits, each against the formula written out."""

import itertools

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import brier_score_loss, cohen_kappa_score, precision_score, recall_score

from raredistill.errors import ConfigError, DataError
from raredistill.evaluation.agreement import inheritance
from raredistill.evaluation.calibration import brier_decomposition, calibration_metrics, class_ece, equal_mass_ece, restore_prior
from raredistill.evaluation.thresholds import at_threshold, decision_curve, operating_point
from raredistill.predictions import COLUMNS, Predictions


def drawn(samples=500, seed=0):
    generator = np.random.default_rng(seed)
    probability = generator.dirichlet([1, 1, 0.5], samples)
    label = (probability.cumsum(axis=1) < generator.random((samples, 1))).sum(axis=1)
    return label, probability


def test_equal_mass_bins_hold_equally_many_samples():
    label, probability = drawn(samples=100)
    top, right = probability.max(axis=1), probability.argmax(axis=1) == label
    order = np.argsort(top)
    expected = np.mean([abs(right[part].mean() - top[part].mean()) for part in order.reshape(10, 10)])
    assert equal_mass_ece(label, probability, bins=10) == pytest.approx(expected)


def test_equal_masses_do_not_depend_on_the_order_of_tied_rows():
    # Half of the rows are right at the same confidence: sorted by luck they once gave 0.32, shuffled 0.04.
    probability = np.full((300, 2), [0.6, 0.4])
    label = np.repeat([0, 1], [180, 120])
    orders = [np.arange(300), np.random.default_rng(0).permutation(300)]
    found = [equal_mass_ece(label[order], probability[order]) for order in orders]
    assert found == pytest.approx([0, 0], abs=1e-12)


def test_class_wise_error_is_that_of_every_class_by_loop():
    label, probability = drawn()
    expected = []
    for k in range(3):
        total = 0.0
        for low, high in itertools.pairwise(np.linspace(0, 1, 16)):
            inside = (probability[:, k] > low) & (probability[:, k] <= high)
            if inside.any():
                total += inside.mean() * abs((label[inside] == k).mean() - probability[inside, k].mean())
        expected.append(total)
    np.testing.assert_allclose(class_ece(label, probability), expected)
    assert np.isnan(class_ece(np.zeros(4, dtype=int), np.full((4, 2), 0.5))[1])


def test_brier_parts_add_up_and_are_murphys_where_forecasts_are_discrete():
    label, probability = drawn()
    found = brier_decomposition(label, probability)
    assert found["brier"] == pytest.approx(sum(brier_score_loss(label == k, probability[:, k]) for k in range(3)))
    parts = found["brier_reliability"] - found["brier_resolution"] + found["brier_uncertainty"] + found["brier_within"]
    assert parts == pytest.approx(found["brier"])
    generator = np.random.default_rng(1)
    forecast = generator.choice([0.1, 0.4, 0.8], 300)
    positive = generator.random(300) < 0.4
    groups = [forecast == value for value in (0.1, 0.4, 0.8)]
    reliability = sum(g.mean() * (forecast[g].mean() - positive[g].mean()) ** 2 for g in groups)
    resolution = sum(g.mean() * (positive[g].mean() - positive.mean()) ** 2 for g in groups)
    two = brier_decomposition(positive.astype(int), np.stack([1 - forecast, forecast], axis=1))
    # Both classes of two tell the same, so sums over classes are twice the binary parts.
    assert (two["brier_reliability"], two["brier_resolution"]) == (pytest.approx(2 * reliability), pytest.approx(2 * resolution))
    assert two["brier_uncertainty"] == pytest.approx(2 * positive.mean() * (1 - positive.mean()))
    assert two["brier_within"] == pytest.approx(0, abs=1e-12)
    assert np.isnan(calibration_metrics(np.empty(0, dtype=int), np.empty((0, 2)))["brier_resolution"])


def test_restoring_the_prior_gives_bayes_posterior_under_it():
    generator = np.random.default_rng(0)
    density = generator.random((50, 3))
    carried, wanted = np.array([1, 1, 1]) / 3, np.array([0.7, 0.2, 0.1])
    posterior = [density * prior / (density * prior).sum(axis=1, keepdims=True) for prior in (carried, wanted)]
    np.testing.assert_allclose(restore_prior(posterior[0], carried, wanted), posterior[1])
    with pytest.raises(DataError, match="do not fit"):
        restore_prior(posterior[0], [1, 1, 0], wanted)


@pytest.mark.parametrize("wanted", [0.5, 0.8, 0.9, 1.0])
def test_the_operating_point_is_the_highest_threshold_that_reaches_the_sensitivity(wanted):
    generator = np.random.default_rng(2)
    positive, score = generator.random(80) < 0.25, np.round(generator.random(80), 2)
    found = operating_point(positive, score, wanted)
    reaching = [t for t in np.unique(score) if recall_score(positive, score >= t) >= wanted]
    assert found == max(reaching)
    given = at_threshold(positive, score, found)
    assert given["sensitivity"] == pytest.approx(recall_score(positive, score >= found))
    assert given["specificity"] == pytest.approx(recall_score(~positive, score < found))
    assert given["precision"] == pytest.approx(precision_score(positive, score >= found))


def test_thresholds_refuse_what_they_cannot_choose():
    with pytest.raises(ConfigError, match="sensitivity"):
        operating_point([True], [0.5], 1.2)
    with pytest.raises(DataError, match="validation part"):
        operating_point([False], [0.5], 0.9)


def test_net_benefit_is_true_positives_less_false_ones_at_the_odds():
    positive, score = np.array([1, 1, 0, 0, 0], dtype=bool), np.array([0.9, 0.3, 0.6, 0.2, 0.1])
    found = decision_curve(positive, score, [0.25, 0.5])
    assert found["benefit"].tolist() == pytest.approx([2 / 5 - 1 / 5 * (1 / 3), 1 / 5 - 1 / 5])
    assert found["act_on_all"].tolist() == pytest.approx([2 / 5 - 3 / 5 * (1 / 3), 2 / 5 - 3 / 5])


def guessing(predicted):
    rows = [
        ("r", str(n), f"p{n}", "a", "test", 0, 0, 0, "best", label, np.eye(3)[guess] * 5)
        for n, (label, guess) in enumerate(zip("aabbcc", predicted, strict=True))
    ]
    return Predictions(pd.DataFrame(rows, columns=list(COLUMNS)), ("a", "b", "c"))


def test_a_student_inherits_the_errors_that_it_repeats_with_the_same_class():
    teacher, student, control = guessing([0, 1, 2, 1, 0, 2]), guessing([0, 1, 2, 1, 1, 2]), guessing([0, 0, 2, 1, 2, 2])
    found = inheritance(student, teacher, control)
    assert found["teacher_errors"] == 3
    assert found["inherited"] == pytest.approx(2 / 3)
    assert found["control_same_errors"] == pytest.approx(1 / 3)
    assert found["agreement"] == pytest.approx(5 / 6)
    assert found["kappa"] == pytest.approx(cohen_kappa_score([0, 1, 2, 1, 0, 2], [0, 1, 2, 1, 1, 2]))
