"""Tests over repeated splits, and the correction for many of them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from raredistill.errors import DataError


def corrected_resampled_t(differences: ArrayLike, *, train_size: float, test_size: float) -> tuple[float, float]:
    """Nadeau and Bengio's corrected resampled t-test (2003): splits share training patients, so their differences are not independent.

    Args:
        differences: ``(n,)``, one a split: a metric of one method minus that of the other.
        train_size: patients in a training side.
        test_size: patients in a test side.

    Returns:
        t with n - 1 degrees of freedom, and the two-sided p. Without any spread t is infinite, or 0 if there is no difference either.

    Raises:
        DataError: fewer than two differences, one is not finite, a size is not positive.
    """
    values = np.asarray(differences, dtype=np.float64).ravel()
    if len(values) < 2 or not np.isfinite(values).all():
        raise DataError(f"the corrected t-test needs at least two finite differences, one a split; it got {values.tolist()}")
    if train_size <= 0 or test_size <= 0:
        raise DataError(f"train_size and test_size are numbers of patients above 0, not {train_size} and {test_size}")
    mean = float(values.mean())
    spread = math.sqrt(float(values.var(ddof=1)) * (1 / len(values) + test_size / train_size))
    if spread == 0:
        return (math.copysign(math.inf, mean), 0.0) if mean else (0.0, 1.0)
    t = mean / spread
    return t, float(2 * stats.t.sf(abs(t), len(values) - 1))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down adjustment (1979), which controls the family-wise error under any dependence.

    Args:
        p_values: ``(m,)``.

    Returns:
        Adjusted p values ``(m,)`` in the order given.

    Raises:
        DataError: a value outside 0 to 1.
    """
    values = np.asarray(p_values, dtype=np.float64).ravel()
    if not ((values >= 0) & (values <= 1)).all():
        raise DataError(f"p values lie between 0 and 1; got {values.tolist()}")
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)), 1.0)
    return adjusted
