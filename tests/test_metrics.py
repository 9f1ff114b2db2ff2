import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as reference

from raredistill.errors import DataError
from raredistill.metrics import classification_metrics, confusion_matrix, ece, metrics_from_confusion

THESIS = Path(__file__).parents[2] / "shared" / "data" / "thesis-results" / "confusion_matrices.csv"


def _random(samples=300, classes=4, seed=0):
    generator = np.random.default_rng(seed)
    # Rounded, so that scores are tied; divided again, so that they add up to 1.
    scores = np.round(generator.dirichlet(np.ones(classes), samples), 2) + 0.01
    return np.append(np.arange(classes), generator.choice(classes, samples - classes)), scores / scores.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_agrees_with_scikit_learn(classes):
    label, probability = _random(classes=classes, seed=classes)
    guess, one_hot = probability.argmax(axis=1), np.eye(classes)[label]
    found = classification_metrics(label, probability)
    precision, recall, f1, _ = reference.precision_recall_fscore_support(label, guess)
    expected = {
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "specificity": [reference.recall_score(label != k, guess != k) for k in range(classes)],
        "auroc": [reference.roc_auc_score(one_hot[:, k], probability[:, k]) for k in range(classes)],
        "auprc": [reference.average_precision_score(one_hot[:, k], probability[:, k]) for k in range(classes)],
        "accuracy": reference.accuracy_score(label, guess),
        "macro_f1": f1.mean(),
        "balanced_accuracy": reference.balanced_accuracy_score(label, guess),
        "g_mean": np.prod(recall) ** (1 / classes),
        "mcc": reference.matthews_corrcoef(label, guess),
        "kappa": reference.cohen_kappa_score(label, guess),
        "brier": np.mean(np.sum((probability - one_hot) ** 2, axis=1)),
        "ece": _ece_by_loop(label, probability, 15),
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-12, err_msg=name)
    np.testing.assert_array_equal(confusion_matrix(label, guess, classes), reference.confusion_matrix(label, guess))


def _ece_by_loop(label, probability, bins):
    top, right, total = probability.max(axis=1), probability.argmax(axis=1) == label, 0.0
    edges = np.linspace(0, 1, bins + 1)
    for low, high in itertools.pairwise(edges):
        inside = (top > low) & (top <= high)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - top[inside].mean())
    return total


def test_an_absent_class_has_no_value_and_leaves_the_means_alone():
    label = np.array([0, 0, 2, 2])
    probability = np.array([[0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8], [0.1, 0.1, 0.8]])
    found = classification_metrics(label, probability)
    for name in ("precision", "recall", "specificity", "f1", "auroc", "auprc"):
        assert np.isnan(found[name][1]), name
        assert np.isfinite(found[name][[0, 2]]).all(), name
    assert found["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["balanced_accuracy"] == pytest.approx(0.75)
    assert found["g_mean"] == pytest.approx(0.5**0.5)


def test_a_class_never_predicted_has_precision_0():
    found = metrics_from_confusion([[3, 0], [2, 0]])
    assert found["precision"][1] == found["f1"][1] == found["mcc"] == found["kappa"] == found["g_mean"] == 0


def test_nothing_has_no_value():
    found = classification_metrics(np.empty(0, dtype=int), np.empty((0, 3)))
    assert all(np.isnan(value).all() for value in found.values())
    assert isinstance(found["macro_f1"], float)


def test_leading_axes_are_kept():
    stack = np.random.default_rng(0).integers(0, 9, (5, 3, 3))
    stack[0, 1] = 0
    together = metrics_from_confusion(stack)
    for place, matrix in enumerate(stack):
        for name, value in metrics_from_confusion(matrix).items():
            np.testing.assert_allclose(together[name][place], value, rtol=1e-12)


def test_perfect_certainty_is_calibrated():
    assert ece([0, 1], np.eye(2)) == 0
    assert ece([1, 0], np.eye(2)) == 1


@pytest.mark.parametrize(
    ("label", "probability", "message"),
    [
        ([0, 1, 0], np.full((2, 2), 0.5), "3 labels"),
        ([0, 2], np.full((2, 2), 0.5), "from 0 to 1"),
        ([0, 1], np.array([[0.5, 0.5], [np.nan, 1]]), "not finite"),
        ([0, 1], np.array([0.5, 0.5]), r"shape \(2,\)"),
    ],
)
def test_refuses_what_does_not_fit(label, probability, message):
    with pytest.raises(DataError, match=message):
        classification_metrics(label, probability)


def test_refuses_other_shapes():
    with pytest.raises(DataError, match="2 labels"):
        confusion_matrix([0, 1], [0], 2)
    with pytest.raises(DataError, match=r"\(2, 3\)"):
        metrics_from_confusion(np.ones((2, 3)))
    with pytest.raises(DataError, match="one bin"):
        ece([0], np.ones((1, 2)) / 2, bins=0)


@pytest.mark.skipif(not THESIS.exists(), reason="the published confusion matrices are not here")
def test_reproduces_published_figures():
    table = pd.read_csv(THESIS).query("modality == 'flair' and experiment == 'baseline' and student == 'mobilenet_v2' and fold == 0")
    classes = ("healthy", "HGG", "LGG")
    row = table.iloc[0]
    found = metrics_from_confusion([[row[f"{true}_as_{guess}"] for guess in classes] for true in classes])
    assert found["f1"][2] == pytest.approx(0.442, abs=5e-4)
    assert found["macro_f1"] == pytest.approx(0.613, abs=5e-4)
