"""Whether probabilities mean what they say, and the temperature that makes them."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from raredistill.errors import DataError
from raredistill.metrics import checked, ece, reliability

__all__ = ["ece", "fit_temperature", "reliability_table"]

_RANGE = (0.01, 100.0)


def reliability_table(label: ArrayLike, probability: ArrayLike, bins: int = 15) -> pd.DataFrame:
    """The reliability diagram as a table: one row a bin of the top class' probability.

    Args:
        label: ``(N,)`` class indices.
        probability: ``(N, K)``.
        bins: of equal width.

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
        T between 0.01 and 100; at an end where the likelihood grows beyond it (separable data, or logits that tell nothing).

    Raises:
        DataError: no samples, or as :func:`raredistill.metrics.checked`.
    """
    truth, scores = checked(label, logits)
    if not len(truth):
        raise DataError("a temperature cannot be fitted without samples; give validation predictions")

    def loss(log_temperature: float) -> float:
        scaled = scores / math.exp(log_temperature)
        return float((logsumexp(scaled, axis=1) - scaled[np.arange(len(truth)), truth]).mean())

    # The loss is convex in 1/T, hence has one minimum in log T.
    found = minimize_scalar(loss, bounds=(math.log(_RANGE[0]), math.log(_RANGE[1])), method="bounded", options={"xatol": 1e-7})
    return math.exp(float(found.x))
