"""Metrics as functions of sums over patients: counts by class, and losses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from raredistill.errors import ConfigError
from raredistill.metrics import metrics_from_margins
from raredistill.options import did_you_mean
from raredistill.predictions import Predictions

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

RANKED = ("auprc", "auroc")
NEEDS = "{metric} needs probabilities, and only hard labels are known; choose f1, recall, precision or macro_f1"
LOSSES = ("brier", "log_loss")
_OVERALL = ("macro_f1", "balanced_accuracy", "accuracy", "g_mean", "mcc", "kappa", *LOSSES)
_COUNTED = ("f1", "recall", "precision", "specificity")
_STEP = 1e-5


def parse_metric(metric: str, classes: tuple[str, ...]) -> tuple[str, int]:
    """Name of a metric and index of its class (-1 without one).

    Raises:
        ConfigError: unknown metric or class.
    """
    name, colon, which = metric.partition(":")
    known = [*_OVERALL, *(f"{each}:{label}" for each in (*_COUNTED, *RANKED) for label in classes)]
    if metric not in known:
        hint = did_you_mean(metric, known)
        raise ConfigError(f"unknown metric {metric!r}{hint} (overall: {', '.join(_OVERALL)}; by class: f1:{classes[-1]} and so on)")
    return name, classes.index(which) if colon else -1


def lacks_probabilities(predictions: Predictions, metric: str) -> bool:
    """Whether a metric needs probabilities and only hard labels are known."""
    return predictions.hard and parse_metric(metric, predictions.classes)[0] in (*RANKED, *LOSSES)


def patient_sums(predictions: Predictions, group: Integers, groups: int) -> Floats:
    """The sums that metrics are computed from, over the rows of each group.

    Args:
        predictions: N rows of K classes.
        group: ``(N,)`` such as the index of the row's patient.
        groups: number of groups.

    Returns:
        ``(groups, 3 K + 3)``: by class the correctly classified, actual and predicted rows; the Brier score, the log-loss, the rows.
    """
    truth, probability = predictions.labels(), predictions.probabilities()
    guess, classes = probability.argmax(axis=1), len(predictions.classes)
    right = truth == guess
    own = probability[np.arange(len(truth)), truth]
    brier = (probability**2).sum(axis=1) - 2 * own + 1
    losses = (brier, -np.log(np.maximum(own, np.finfo(np.float64).tiny)), None)
    return np.hstack([
        _by_class(group[right], truth[right], groups, classes), _by_class(group, truth, groups, classes),
        _by_class(group, guess, groups, classes), *(np.bincount(group, weights=loss, minlength=groups)[:, None] for loss in losses),
    ])  # fmt: skip


def _by_class(group: Integers, label: Integers, groups: int, classes: int) -> Floats:
    return np.bincount(group * classes + label, minlength=groups * classes).reshape(groups, classes).astype(np.float64)


def scores_of(sums: Floats, wanted: Sequence[tuple[str, int]]) -> Floats:
    """Metrics ``(M, ...)`` from sums ``(..., 3 K + 3)`` over patients; NaN if a class is absent.

    Args:
        sums: summed rows of :func:`patient_sums`.
        wanted: M parsed names.
    """
    found = metrics_from_margins(*np.split(sums[..., :-3], 3, axis=-1))
    rows = np.maximum(sums[..., -1], 1)
    found |= {"brier": sums[..., -3] / rows, "log_loss": sums[..., -2] / rows}
    return np.stack([found[name] if place < 0 else found[name][..., place] for name, place in wanted])


def gradients(sums: Floats, wanted: Sequence[tuple[str, int]]) -> Floats:
    """Gradients of metrics with respect to the sums ``(M, 3 K + 3)``, at ``sums (3 K + 3,)``, by central differences; NaN if undefined.

    The influence of a patient is the gradient times the patient's own sums: metrics do not change if all sums are doubled, so influences
    add up to 0.
    """
    steps = np.diag(_STEP * np.maximum(sums, 1.0))
    with np.errstate(invalid="ignore"):
        change = scores_of(sums + steps, wanted) - scores_of(sums - steps, wanted)
    return np.asarray(change / (2 * np.diag(steps)))
