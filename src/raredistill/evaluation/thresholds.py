"""Thresholds of one class, their cost, and decision curves."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from raredistill.errors import ConfigError, DataError

Floats = NDArray[np.float64]


def operating_point(positive: ArrayLike, score: ArrayLike, sensitivity: float) -> float:
    """The highest threshold that reaches the desired sensitivity; choose it on validation, never on test.

    Args:
        positive: ``(N,)`` whether a sample is of the class.
        score: ``(N,)``, higher for positives.
        sensitivity: desired sensitivity, above 0 and at most 1.

    Returns:
        A score; samples at or above it are called positive.

    Raises:
        ConfigError: the sensitivity is out of range.
        DataError: no positives.

    Examples:
        >>> operating_point([True, True, False], [0.9, 0.4, 0.6], sensitivity=1.0)
        0.4
    """
    if not 0 < sensitivity <= 1:
        raise ConfigError(f"a wanted sensitivity lies above 0 and at most at 1, not at {sensitivity}")
    scores = np.sort(np.asarray(score, dtype=np.float64)[np.asarray(positive, dtype=bool)])[::-1]
    if not len(scores):
        raise DataError("an operating point needs samples of the class; its validation part has none")
    return float(scores[math.ceil(round(sensitivity * len(scores), 9)) - 1])


def matched_shift(positive: ArrayLike, logits: ArrayLike, place: int) -> float:
    """Amount to subtract from a class's logit so that argmax predicts the class as often as it occurs; choose it on validation.

    Args:
        positive: ``(N,)`` whether a sample is of the class.
        logits: ``(N, K)``.
        place: index of the class.

    Returns:
        Half-way between the last sample that is predicted as the class and the first that is not; 0 if all samples, or none, are.

    Examples:
        >>> matched_shift([True, False, False], [[0.0, 1.0], [0.0, 2.0], [0.0, -1.0]], place=1)
        1.5
    """
    scores = np.asarray(logits, dtype=np.float64)
    margins = np.sort(scores[:, place] - np.delete(scores, place, axis=1).max(axis=1))[::-1]
    wanted = int(np.asarray(positive, dtype=bool).sum())
    return float((margins[wanted - 1] + margins[wanted]) / 2) if 0 < wanted < len(margins) else 0.0


def at_threshold(positive: ArrayLike, score: ArrayLike, threshold: float) -> dict[str, float]:
    """Performance at a threshold.

    Args:
        positive: ``(N,)`` whether a sample is of the class.
        score: ``(N,)``.
        threshold: samples at or above it are called positive.

    Returns:
        ``sensitivity, specificity, precision`` and ``flagged`` (the share called positive); NaN where undefined.

    Examples:
        >>> at_threshold([True, True, False], [0.9, 0.4, 0.6], threshold=0.5)["sensitivity"]
        0.5
    """
    truth, called = np.asarray(positive, dtype=bool), np.asarray(score, dtype=np.float64) >= threshold
    return {
        "sensitivity": _mean(called[truth]), "specificity": _mean(~called[~truth]), "precision": _mean(truth[called]),
        "flagged": _mean(called),
    }  # fmt: skip


def decision_curve(positive: ArrayLike, score: ArrayLike, thresholds: ArrayLike) -> pd.DataFrame:
    """Net benefit per sample (Vickers and Elkin 2006): true positives minus false positives weighted by the odds of the threshold.

    Args:
        positive: ``(N,)`` whether a sample is of the class.
        score: ``(N,)`` probability of the class.
        thresholds: ``(T,)`` probabilities, each below 1, at which one would act.

    Returns:
        Columns ``threshold``, ``benefit`` and ``act_on_all``, the benefit of calling everyone positive; calling nobody has 0.
    """
    truth, scores, at = np.asarray(positive, dtype=bool), np.asarray(score, dtype=np.float64), np.asarray(thresholds, dtype=np.float64)
    odds, number = at / (1 - at), max(len(truth), 1)
    true = np.array([(truth & (scores >= each)).sum() for each in at]) / number
    false = np.array([(~truth & (scores >= each)).sum() for each in at]) / number
    everyone = truth.sum() / number - (~truth).sum() / number * odds
    return pd.DataFrame({"threshold": at, "benefit": true - false * odds, "act_on_all": everyone})


def decision_summary(curve: pd.DataFrame, at: float) -> dict[str, float]:
    """Summary of a decision curve (Vickers and Elkin 2006; Vickers et al. 2016).

    Args:
        curve: result of :func:`decision_curve`.
        at: the threshold probability at which one would act; the nearest one of the curve is used.

    Returns:
        ``threshold``, ``benefit`` there, ``over_default``, its gain over the better of acting on all and on nobody; ``spared``, actions
        avoided per 100 samples without missing more than acting on all does; ``useful_from`` and ``useful_to``, the lowest and the highest
        threshold at which the classifier beats both (NaN where it never does).

    Raises:
        DataError: the curve has no row.
    """
    if curve.empty:
        raise DataError("a decision curve without thresholds cannot be summed up; give thresholds between 0 and 1")
    threshold, benefit, everyone = (curve[column].to_numpy(dtype=np.float64) for column in ("threshold", "benefit", "act_on_all"))
    default = np.maximum(everyone, 0.0)
    place = int(np.abs(threshold - at).argmin())
    useful = threshold[benefit > default + 1e-12]
    odds = threshold[place] / (1 - threshold[place])
    return {
        "threshold": float(threshold[place]), "benefit": float(benefit[place]), "over_default": float((benefit - default)[place]),
        "spared": float(100 * (benefit - everyone)[place] / odds) if odds else float("nan"),
        "useful_from": float(useful.min()) if len(useful) else float("nan"),
        "useful_to": float(useful.max()) if len(useful) else float("nan"),
    }  # fmt: skip


def _mean(values: NDArray[np.bool_]) -> float:
    return float(values.mean()) if len(values) else float("nan")
