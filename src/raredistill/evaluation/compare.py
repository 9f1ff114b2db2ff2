"""Tests of a difference between two methods, each with its estimand, and the correction for multiple tests."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq

from raredistill.errors import DataError
from raredistill.evaluation.ranking import placements


def corrected_resampled_t(differences: ArrayLike, *, train_size: float, test_size: float) -> tuple[float, float]:
    """Nadeau and Bengio's corrected resampled t-test (2003), a reference in addition to :func:`raredistill.evaluation.gains.gain_test`.

    Estimand: this recipe on a new cohort of this size. Splits share training patients, so their differences are not independent.
    ``train_size`` counts only patients trained on; leaving out validation and rarefied patients widens the interval by 1.07 to 1.16.

    Args:
        differences: ``(n,)``, one per split: a metric of one method minus that of the other.
        train_size: patients in a training side.
        test_size: patients in a test side.

    Returns:
        t with n - 1 degrees of freedom, and the two-sided p. Without any spread, p is that of n equal signs, 2^(1-n): a variance of 0
        does not count as certainty.

    Raises:
        DataError: fewer than two differences, one is not finite, a size is not positive.

    Examples:
        >>> t, p = corrected_resampled_t([0.02, 0.05, 0.01, 0.04], train_size=80, test_size=20)
        >>> round(t, 3), round(p, 3)
        (2.324, 0.103)
    """
    mean, spread, freedom = _corrected(differences, train_size, test_size)
    t = mean / spread
    return t, float(2 * stats.t.sf(abs(t), freedom))


def corrected_interval(differences: ArrayLike, *, train_size: float, test_size: float, level: float = 0.95) -> tuple[float, float]:
    """The interval of the mean difference for :func:`corrected_resampled_t`.

    Args:
        differences: ``(n,)``, one per split.
        train_size: patients in a training side.
        test_size: patients in a test side.
        level: confidence level.

    Raises:
        DataError: as :func:`corrected_resampled_t`.

    Examples:
        >>> low, high = corrected_interval([0.02, 0.05, 0.01, 0.04], train_size=80, test_size=20)
        >>> round(low, 3), round(high, 3)
        (-0.011, 0.071)
    """
    mean, spread, freedom = _corrected(differences, train_size, test_size)
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * spread
    return mean - half, mean + half


def bayesian_correlated_t(differences: ArrayLike, *, train_size: float, test_size: float, rope: float = 0.01) -> tuple[float, float, float]:
    """Bayesian correlated t-test (Corani and Benavoli 2015): the probability that the methods are practically equal.

    Estimand: this recipe on a new cohort of this size, as :func:`corrected_resampled_t`; a reference, not the verdict.

    The posterior of the mean difference is Student's t about the observed mean with n - 1 degrees of freedom and the scale of the
    corrected t-test (correlation rho = test / (train + test)).

    Args:
        differences: ``(n,)``, one per split.
        train_size: patients in a training side.
        test_size: patients in a test side.
        rope: half the width of the region of practical equivalence, in units of the metric.

    Returns:
        Probabilities of worse than ``-rope``, equivalent, better than ``rope``; they add up to 1. NaN where all differences are 0.

    Raises:
        DataError: as :func:`corrected_resampled_t`.

    Examples:
        >>> worse, equal, better = bayesian_correlated_t([0.02, 0.05, 0.01, 0.04], train_size=80, test_size=20)
        >>> round(worse, 3), round(equal, 3), round(better, 3)
        (0.027, 0.083, 0.89)
    """
    mean, spread, freedom = _corrected(differences, train_size, test_size)
    if math.isinf(spread):
        return math.nan, math.nan, math.nan
    worse = float(stats.t.cdf((-rope - mean) / spread, freedom))
    better = float(stats.t.sf((rope - mean) / spread, freedom))
    return worse, 1 - worse - better, better


def corrected_error(differences: ArrayLike, *, train_size: float, test_size: float) -> float:
    """Standard error of the mean difference in :func:`corrected_resampled_t`.

    Raises:
        DataError: as :func:`corrected_resampled_t`.
    """
    return _corrected(differences, train_size, test_size)[1]


def detectable(error: float, freedom: float = math.inf, *, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest true difference that a two-sided test detects with the given power.

    Args:
        error: standard error of the difference.
        freedom: degrees of freedom of the t-test; infinite for a normal one.
        power: desired power.
        level: level of the test.

    Returns:
        In units of the metric; from the noncentral t distribution. Infinite if the error is unknown.

    Examples:
        >>> round(detectable(0.02), 3), round(detectable(0.02, 4), 3)
        (0.056, 0.075)
    """
    if math.isinf(error):
        return math.inf
    if math.isinf(freedom):
        return error * float(stats.norm.ppf(1 - level / 2) + stats.norm.ppf(power))
    critical = float(stats.t.ppf(1 - level / 2, freedom))

    def lacking(shift: float) -> float:
        return float(stats.nct.sf(critical, freedom, shift)) - power

    return error * float(brentq(lacking, 0.0, 10 * critical + 10))


def wilcoxon_over_datasets(differences: ArrayLike) -> tuple[float, float]:
    """Wilcoxon's signed-rank test over independent data sets; folds of one data set are not independent, so do not use it for folds.

    Args:
        differences: ``(n,)``, one per data set.

    Returns:
        Two-sided exact p, ties included, and the smallest p that the data sets can reach, 2 / 2^n over those that differ (five: 0.0625);
        data sets without a difference are left out, as Wilcoxon did.

    Raises:
        DataError: fewer than two differences, or one is not finite.

    Examples:
        >>> wilcoxon_over_datasets([0.02, 0.05, 0.01, 0.04, 0.03])
        (0.0625, 0.0625)
    """
    values = np.asarray(differences, dtype=np.float64).ravel()
    if len(values) < 2 or not np.isfinite(values).all():
        raise DataError(f"Wilcoxon's test needs at least two finite differences, one per data set; it got {values.tolist()}")
    values = values[values != 0]
    if not len(values):
        return 1.0, 1.0
    doubled = np.round(2 * stats.rankdata(np.round(np.abs(values), 12))).astype(np.int64)
    ways = np.zeros(int(doubled.sum()) + 1)
    ways[0] = 1.0
    for rank in doubled:
        ways[rank:] = ways[rank:] + ways[:-rank]
    seen = int(doubled[values > 0].sum())
    tail = min(ways[: seen + 1].sum(), ways[seen:].sum()) / ways.sum()
    return float(min(1.0, 2 * tail)), float(min(1.0, 2.0 / 2.0 ** len(values)))


def swap_within_cells(right: ArrayLike, called: ArrayLike, actual: float, run: ArrayLike, *, draws: int = 9999, seed: int = 0) -> float:
    """Randomisation test of no difference at all between the arms in this cohort: arms are exchanged within cells.

    Estimand: this recipe on this cohort. It is not used in the verdict: of true nulls about new cohorts, it rejects 21 to 31 %.

    Args:
        right: ``(2, C)`` correct calls of the class, by arm and cell (repeat, fold, seed).
        called: ``(2, C)`` calls of the class.
        actual: samples of the class in a run.
        run: ``(C,)`` the run of each cell.
        draws: number of exchanges, including the observed one.
        seed: of the exchanges.

    Returns:
        Two-sided p of the mean over runs of the pooled F1 difference.
    """
    hits, calls = np.asarray(right, dtype=np.float64), np.asarray(called, dtype=np.float64)
    _, of_run = np.unique(np.asarray(run), return_inverse=True)
    to_run = (of_run[:, None] == np.arange(of_run.max() + 1)).astype(np.float64)
    flip = np.random.default_rng(seed).random((draws + 1, hits.shape[1])) < 0.5
    flip[0] = False
    scores = [2 * (np.where(flip, hits[1 - arm], hits[arm]) @ to_run) / (np.where(flip, calls[1 - arm], calls[arm]) @ to_run + actual)
              for arm in (0, 1)]  # fmt: skip
    gains = np.abs((scores[1] - scores[0]).mean(axis=1))
    return float((gains >= gains[0] - 1e-12).mean())


def mcnemar(first_right: ArrayLike, second_right: ArrayLike) -> tuple[int, int, float]:
    """McNemar's exact test on samples that one side classifies correctly and the other does not.

    Estimand: these two trained networks on new samples. It takes the networks as fixed and samples as independent: against the claim that
    one recipe is better than another it rejects far too often.

    Args:
        first_right: ``(N,)`` whether the first side is correct.
        second_right: ``(N,)`` whether the second is.

    Returns:
        Samples correct by the first side only, by the second only, and the two-sided p.

    Raises:
        DataError: different lengths.

    Examples:
        >>> mcnemar([True, True, False, True], [False, True, False, False])
        (2, 0, 0.5)
    """
    first, second = np.asarray(first_right, dtype=bool).ravel(), np.asarray(second_right, dtype=bool).ravel()
    if len(first) != len(second):
        raise DataError(f"McNemar's test needs the same samples on both sides, not {len(first)} and {len(second)}")
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    apart = only_first + only_second
    return only_first, only_second, float(stats.binomtest(only_first, apart).pvalue) if apart else 1.0


def delong(positive: ArrayLike, first: ArrayLike, second: ArrayLike) -> tuple[float, float, float, float]:
    """DeLong's test (1988) of two correlated areas under the ROC curve, by midranks (Sun and Xu 2014); rows must be independent: patients.

    Estimand: these two trained networks on new patients. Against the claim that one recipe is better than another it rejects 13 to 26 % of
    true nulls at 5 %, since it takes the networks as fixed.

    Args:
        positive: ``(N,)`` whether a patient is of the class.
        first: ``(N,)`` score of the first side.
        second: ``(N,)`` score of the second side.

    Returns:
        Area of the first, area of the second, standard error of their difference, two-sided p.

    Raises:
        DataError: fewer than two positives or negatives.

    Examples:
        >>> first, second, error, p = delong([True, True, False, False], [0.9, 0.6, 0.7, 0.1], [0.8, 0.7, 0.2, 0.1])
        >>> first, second, round(error, 3), round(p, 3)
        (0.75, 1.0, 0.354, 0.48)
    """
    truth = np.asarray(positive, dtype=bool).ravel()
    if truth.sum() < 2 or (~truth).sum() < 2:
        raise DataError(f"DeLong's test needs two patients of each kind, not {int(truth.sum())} and {int((~truth).sum())}")
    parts = [placements(truth, np.asarray(score, dtype=np.float64).ravel()) for score in (first, second)]
    areas = [float(above.mean()) for above, _ in parts]
    spread = [np.cov(np.stack([part[kind] for part in parts])) / len(parts[0][kind]) for kind in (0, 1)]
    variance = float(sum(each[0, 0] + each[1, 1] - 2 * each[0, 1] for each in spread))
    error = math.sqrt(max(variance, 0.0))
    if error < 1e-12:
        return areas[0], areas[1], 0.0, float(areas[0] == areas[1])
    return areas[0], areas[1], error, float(2 * stats.norm.sf(abs(areas[0] - areas[1]) / error))


def _corrected(differences: ArrayLike, train_size: float, test_size: float) -> tuple[float, float, int]:
    """Mean, corrected standard error, degrees of freedom."""
    values = np.asarray(differences, dtype=np.float64).ravel()
    if len(values) < 2 or not np.isfinite(values).all():
        raise DataError(f"the corrected t-test needs at least two finite differences, one per split; it got {values.tolist()}")
    if train_size <= 0 or test_size <= 0:
        raise DataError(f"train_size and test_size are numbers of patients above 0, not {train_size} and {test_size}")
    mean, freedom = float(values.mean()), len(values) - 1
    error = math.sqrt(float(values.var(ddof=1)) * (1 / len(values) + test_size / train_size))
    if error <= 1e-12 * max(abs(mean), 1.0):
        # n equal signs allow at best p = 2^(1-n); equal values of 0 are no evidence at all.
        error = abs(mean) / float(stats.t.isf(2.0 ** -len(values), freedom)) if mean else math.inf
    return mean, error, freedom


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down adjustment (1979), which controls the family-wise error under any dependence.

    Args:
        p_values: ``(m,)``.

    Returns:
        Adjusted p values ``(m,)`` in the given order.

    Raises:
        DataError: a value outside 0 to 1.

    Examples:
        >>> holm([0.01, 0.04, 0.03]).tolist()
        [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, dtype=np.float64).ravel()
    if not ((values >= 0) & (values <= 1)).all():
        raise DataError(f"p values lie between 0 and 1; got {values.tolist()}")
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)), 1.0)
    return adjusted
