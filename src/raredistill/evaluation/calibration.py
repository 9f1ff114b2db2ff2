"""Calibration of probabilities: errors, temperature scaling and correction of the prior."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax

from raredistill.errors import DataError
from raredistill.metrics import checked, ece, reliability

__all__ = [
    "brier_decomposition", "calibration_metrics", "class_ece", "ece", "equal_mass_ece", "fit_temperature", "reliability_table",
    "restore_prior", "scaled",
]  # fmt: skip

Floats = NDArray[np.float64]
BINS = 15
_RANGE = (0.01, 100.0)


def calibration_metrics(label: ArrayLike, probability: ArrayLike) -> dict[str, Any]:
    """Compute all reported calibration metrics.

    Args:
        label: ``(N,)`` class indices.
        probability: ``(N, K)``.

    Returns:
        ``ece`` and ``ece_equal_mass`` of the top class, ``ece_by_class`` ``(K,)``, and the parts of :func:`brier_decomposition`.

    Raises:
        DataError: as :func:`raredistill.metrics.checked`.
    """
    return {
        "ece": ece(label, probability, BINS), "ece_equal_mass": equal_mass_ece(label, probability),
        "ece_by_class": class_ece(label, probability), **brier_decomposition(label, probability),
    }  # fmt: skip


def equal_mass_ece(label: ArrayLike, probability: ArrayLike, bins: int = BINS) -> float:
    """Calibration error of the top class over bins with equally many samples each (Nixon et al. 2019).

    Args:
        label: ``(N,)`` class indices.
        probability: ``(N, K)``.
        bins: number of bins, whose sizes differ by at most one. Rows of equal confidence share their accuracy.

    Returns:
        Between 0 and 1; NaN without samples.

    Raises:
        DataError: as :func:`raredistill.metrics.checked`.

    Examples:
        >>> round(equal_mass_ece([0, 1], [[0.9, 0.1], [0.8, 0.2]], bins=1), 3)
        0.35
    """
    truth, scores = checked(label, probability)
    top = scores.max(axis=1)
    # Rows of equal confidence share their accuracy, so that the order of rows does not affect the bins.
    tied = np.unique(top, return_inverse=True)[1]
    right = (np.bincount(tied, weights=scores.argmax(axis=1) == truth) / np.bincount(tied))[tied] if len(top) else top
    parts = [part for part in np.array_split(np.argsort(top, kind="stable"), bins) if len(part)]
    if not parts:
        return float("nan")
    return float(sum(abs(float(right[part].mean() - top[part].mean())) * len(part) for part in parts) / len(truth))


def class_ece(label: ArrayLike, probability: ArrayLike, bins: int = BINS) -> Floats:
    """Calibration error of each class's own probability over bins of equal width (Kull et al. 2019).

    Args:
        label: ``(N,)`` class indices.
        probability: ``(N, K)``.
        bins: number of bins of equal width.

    Returns:
        ``(K,)``; NaN for a class without samples.

    Raises:
        DataError: as :func:`raredistill.metrics.checked`.

    Examples:
        >>> class_ece([0, 1], [[0.9, 0.1], [0.8, 0.2]]).round(3).tolist()
        [0.45, 0.45]
    """
    truth, scores = checked(label, probability)
    found = np.full(scores.shape[1], np.nan)
    for k in range(scores.shape[1]):
        if (truth == k).any():
            count, forecast, seen = _binned(truth == k, scores[:, k], bins)
            found[k] = float((count * np.abs(forecast - seen)).sum() / len(truth))
    return found


def brier_decomposition(label: ArrayLike, probability: ArrayLike, bins: int = BINS) -> dict[str, float]:
    """Murphy's parts of the Brier score (1973), each class against the rest and summed over classes.

    Args:
        label: ``(N,)`` class indices.
        probability: ``(N, K)``.
        bins: number of bins of equal width for grouping forecasts.

    Returns:
        ``brier`` = ``brier_reliability`` - ``brier_resolution`` + ``brier_uncertainty`` + ``brier_within``; the last is the variation
        of forecasts within bins (Stephenson et al. 2008). NaN without samples.

    Raises:
        DataError: as :func:`raredistill.metrics.checked`.
    """
    truth, scores = checked(label, probability)
    if not len(truth):
        return dict.fromkeys(("brier", "brier_reliability", "brier_resolution", "brier_uncertainty", "brier_within"), float("nan"))
    parts = np.sum([_murphy(truth == k, scores[:, k], bins) for k in range(scores.shape[1])], axis=0)
    whole = float(((scores - (truth[:, None] == np.arange(scores.shape[1]))) ** 2).sum(axis=1).mean())
    reliability_part, resolution, uncertainty = (float(part) for part in parts)
    return {
        "brier": whole, "brier_reliability": reliability_part, "brier_resolution": resolution, "brier_uncertainty": uncertainty,
        "brier_within": whole - (reliability_part - resolution + uncertainty),
    }  # fmt: skip


def _murphy(positive: NDArray[np.bool_], score: Floats, bins: int) -> Floats:
    count, forecast, seen = _binned(positive, score, bins)
    share, base = count / count.sum(), float(positive.mean())
    return np.array([(share * (forecast - seen) ** 2).sum(), (share * (seen - base) ** 2).sum(), base * (1 - base)])


def _binned(positive: NDArray[np.bool_], score: Floats, bins: int) -> tuple[Floats, Floats, Floats]:
    """Count, mean forecast and share of positives of each non-empty bin."""
    place = np.clip(np.digitize(score, np.linspace(0, 1, bins + 1), right=True) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins).astype(np.float64)
    sums = [np.bincount(place, weights=each, minlength=bins) for each in (score, positive.astype(np.float64))]
    filled = count > 0
    return count[filled], sums[0][filled] / count[filled], sums[1][filled] / count[filled]


def reliability_table(label: ArrayLike, probability: ArrayLike, bins: int = BINS) -> pd.DataFrame:
    """The reliability diagram as a table: one row per bin of the top class's probability.

    Args:
        label: ``(N,)`` class indices.
        probability: ``(N, K)``.
        bins: number of bins of equal width.

    Returns:
        Columns low, high, count, confidence, accuracy; the last two are NaN in empty bins.

    Raises:
        DataError: as :func:`raredistill.metrics.reliability`.
    """
    count, confidence, accuracy = reliability(label, probability, bins)
    edges = np.linspace(0, 1, bins + 1)
    columns = {"low": edges[:-1], "high": edges[1:], "count": count.astype(np.int64), "confidence": confidence, "accuracy": accuracy}
    return pd.DataFrame(columns)


def fit_temperature(label: ArrayLike, logits: ArrayLike) -> float:
    """Temperature scaling (Guo et al. 2017): the T that makes ``softmax(logits / T)`` most likely; fit it on validation, never on test.

    Args:
        label: ``(N,)`` class indices.
        logits: ``(N, K)``.

    Returns:
        T between 0.01 and 100; at an end of this range if the likelihood still grows there (separable data, or uninformative logits).

    Raises:
        DataError: no samples, or as :func:`raredistill.metrics.checked`.

    Examples:
        >>> round(fit_temperature([0, 0, 1, 1], [[4.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 0.0]]), 2)
        3.64
    """
    truth, scores = checked(label, logits)
    if not len(truth):
        raise DataError("a temperature cannot be fitted without samples; give validation predictions")

    def loss(log_temperature: float) -> float:
        scaled_scores = scores / math.exp(log_temperature)
        return float((logsumexp(scaled_scores, axis=1) - scaled_scores[np.arange(len(truth)), truth]).mean())

    # The loss is convex in 1/T, so it has one minimum in log T.
    found = minimize_scalar(loss, bounds=(math.log(_RANGE[0]), math.log(_RANGE[1])), method="bounded", options={"xatol": 1e-7})
    return math.exp(float(found.x))


def scaled(logits: ArrayLike, temperature: float) -> Floats:
    """Probabilities ``(N, K)`` of ``logits (N, K)`` at a temperature.

    Examples:
        >>> scaled([[2.0, 0.0]], 2.0).round(3).tolist()
        [[0.731, 0.269]]
    """
    return np.asarray(softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1))


def restore_prior(probability: ArrayLike, carried: ArrayLike, wanted: ArrayLike) -> Floats:
    """Convert posteriors from the class prior that they carry to that of deployment (Saerens et al. 2002, eq. 2.4).

    Args:
        probability: ``(N, K)``.
        carried: ``(K,)`` prior from training, such as the uniform one of balanced sampling; all above 0.
        wanted: ``(K,)`` prior of deployment.

    Returns:
        ``(N, K)``, rows adding up to 1.

    Raises:
        DataError: the priors do not have K values, or a carried one is 0.

    Examples:
        >>> restore_prior([[0.5, 0.5]], carried=[0.5, 0.5], wanted=[0.9, 0.1]).round(3).tolist()
        [[0.9, 0.1]]
    """
    scores, old, new = (np.asarray(each, dtype=np.float64) for each in (probability, carried, wanted))
    if old.shape != scores.shape[1:] or new.shape != old.shape or not (old > 0).all():
        raise DataError(f"priors {old.tolist()} and {new.tolist()} do not fit {scores.shape[1]} classes; give one value above 0 per class")
    weighted = scores * (new / old)
    return np.asarray(weighted / weighted.sum(axis=1, keepdims=True))
