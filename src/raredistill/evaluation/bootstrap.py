"""Intervals and paired tests that resample patients, because slices of one patient are not independent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from raredistill.errors import ConfigError, DataError
from raredistill.evaluation.ranking import rank
from raredistill.evaluation.sums import LOSSES, NEEDS, RANKED, lacks_probabilities, parse_metric, patient_sums, scores_of
from raredistill.predictions import Predictions

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Function = Callable[[Integers, Floats], float]
Metric = str | Function
Statistic = Callable[[Integers], Floats]
Interval = Literal["percentile", "bca"]

_TAILS = (0.025, 0.975)
_BLOCK = 256


def patient_bootstrap(
    predictions: Predictions, metric: Metric, *, resamples: int = 2000, seed: int = 0, interval: Interval = "percentile"
) -> tuple[float, float, float]:
    """A metric and its 95 % interval, over patients drawn with replacement within each patient class.

    Args:
        predictions: one part of one checkpoint. The metric is that of a run, averaged over runs (see :func:`runs_of`); a drawn patient
            contributes all rows.
        metric: ``macro_f1``, ``balanced_accuracy``, ``accuracy``, ``g_mean``, ``mcc``, ``kappa``, ``brier``, ``log_loss``; by class
            ``f1:CLASS``, ``recall``, ``precision``, ``specificity``, ``auprc``, ``auroc``; or a function of labels ``(N,)`` and
            probabilities ``(N, K)``.
        resamples: draws.
        seed: of the draws.
        interval: ``percentile``, or ``bca``, which corrects for bias and skew (Efron 1987; jackknife over patients within classes).

    Returns:
        Estimate, low, high.

    Raises:
        ConfigError: unknown metric or class.
        DataError: no rows, several parts or checkpoints, or the metric has no value on them.
    """
    (estimate, found), *_ = patient_intervals(predictions, [metric], resamples=resamples, seed=seed, intervals=(interval,))
    if np.isnan(estimate) or np.isnan(found[interval]).any():
        raise DataError(f"{metric} has no value on these predictions: its class has no samples here; choose another class or part")
    return estimate, *found[interval]


def patient_intervals(
    predictions: Predictions, metrics: Sequence[Metric], *, resamples: int = 2000, seed: int = 0,
    intervals: Sequence[Interval] = ("percentile", "bca"),
) -> list[tuple[float, dict[Interval, tuple[float, float]]]]:  # fmt: skip
    """Several metrics on the same draws: like :func:`patient_bootstrap` for each, but faster.

    Args:
        predictions: as :func:`patient_bootstrap`.
        metrics: their names.
        resamples: draws.
        seed: of the draws.
        intervals: requested kinds.

    Returns:
        Estimate, and low and high by kind of interval, of each metric; NaN if it has no value. Proportions of patients (recall,
        specificity, precision and accuracy if each patient is one row) get Wilson's interval instead of both kinds, as do other scores
        whose draws do not differ, with the number of patients that they are based on.

    Raises:
        ConfigError: unknown metric or class.
        DataError: no rows, several parts or checkpoints, or a metric needs probabilities and only hard labels are known.
    """
    patients = _patients(predictions)
    statistic = _over_runs(predictions, metrics, patients)
    draws = np.concatenate([statistic(weights) for weights in _draws(patients, resamples, seed)], axis=1)
    estimates = statistic(_once(patients))[:, 0]
    skews = _accelerations(statistic, patients) if "bca" in intervals else np.zeros(len(estimates))
    shares = [patient_share(predictions, metric) for metric in metrics]
    return [
        (float(estimate), {kind: _with_edge(metric, estimate, _interval(own, estimate, _tails(kind, own, estimate, skew)), share)
                           for kind in intervals})
        for metric, estimate, own, skew, share in zip(metrics, estimates, draws, skews, shares, strict=True)
    ]  # fmt: skip


def _with_edge(metric: Metric, estimate: float, limits: tuple[float, float], share: tuple[float, bool]) -> tuple[float, float]:
    """Wilson's interval for a proportion of patients, and for any score whose draws do not differ, as no spread is not certainty."""
    number, proportion = share
    if not isinstance(metric, str) or np.isnan(estimate) or not number or not (proportion or limits[0] == limits[1]):
        return limits
    if metric.partition(":")[0] in LOSSES:
        return limits if limits[0] < limits[1] else (np.nan, np.nan)
    if metric in ("mcc", "kappa"):
        low, high = wilson((estimate + 1) / 2, number)
        return 2 * low - 1, 2 * high - 1
    return wilson(estimate, number)


def wilson(share: float, number: float, level: float = 0.05) -> tuple[float, float]:
    """Wilson's score interval (1927) of a proportion.

    Args:
        share: observed proportion, 0 to 1.
        number: number of independent units, patients.
        level: two-sided.

    Examples:
        >>> low, high = wilson(1.0, 10)
        >>> round(low, 3), round(high, 3)
        (0.722, 1.0)
    """
    squared = float(stats.norm.isf(level / 2)) ** 2
    centre = (share + squared / (2 * number)) / (1 + squared / number)
    half = math.sqrt(squared * (share * (1 - share) / number + squared / (4 * number**2))) / (1 + squared / number)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def patient_share(predictions: Predictions, metric: Metric) -> tuple[float, bool]:
    """Number of patients that a score is based on, and whether it is a proportion of patients (one row each)."""
    if not isinstance(metric, str):
        return 0.0, False
    name, place = parse_metric(metric, predictions.classes)
    of_row, patients = predictions.patients
    labels, runs = predictions.labels(), len(runs_of(predictions))
    single = len(of_row) == len(patients) * runs
    if name == "precision" and single:
        return float((predictions.probabilities().argmax(axis=1) == place).sum() / runs), True
    if place < 0:
        fewest = min(len(np.unique(of_row[labels == k])) for k in np.unique(labels))
        return float(len(patients) if name == "accuracy" else fewest), single and name == "accuracy"
    chosen = labels != place if name == "specificity" else labels == place
    return float(len(np.unique(of_row[chosen]))), single and name in ("recall", "specificity")


def paired_patient_bootstrap(
    a: Predictions, b: Predictions, metric: Metric, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float, float]:
    """The difference of a metric on the same patients, with its 95 % interval and two-sided p.

    Args:
        a: one part of one checkpoint; averaged over runs as in :func:`patient_bootstrap`.
        b: predictions of the same samples in the same repeats.
        metric: as :func:`patient_bootstrap`.
        resamples: draws; both sides get the same patients.
        seed: of the draws.

    Returns:
        Difference a - b, low, high, p = 2 min(P(d* <= 0), P(d* >= 0)), each with one added to its count and to the draws, at most 1.

    Raises:
        ConfigError: unknown metric or class.
        DataError: as :func:`patient_bootstrap`, or classes, samples or labels differ.
    """
    check_same(a, b)
    (difference,), (draws,) = paired_draws(a, b, [metric], resamples=resamples, seed=seed)
    low, high = _interval(draws, difference, _TAILS)
    if np.isnan(low):
        raise DataError(f"{metric} has no value on these predictions: its class has no samples here; choose another class or part")
    return float(difference), low, high, p_of_draws(draws)


def paired_draws(
    a: Predictions, b: Predictions, metrics: Sequence[Metric], *, resamples: int = 2000, seed: int = 0
) -> tuple[Floats, Floats]:
    """Differences a - b ``(M,)`` and their bootstrap draws ``(M, R)``; the same seed draws the same patients for any two sides of a study.

    The two sides must have passed :func:`check_same`.

    Raises:
        ConfigError: unknown metric or class.
        DataError: a metric needs probabilities and only hard labels are known.
    """
    patients = _patients(a)
    left, right = _over_runs(a, metrics, patients), _over_runs(b, metrics, _patients(b))
    draws = np.concatenate([left(weights) - right(weights) for weights in _draws(patients, resamples, seed)], axis=1)
    return (left(_once(patients)) - right(_once(patients)))[:, 0], draws


def p_of_draws(draws: Floats) -> float:
    """Two-sided p of a difference from its draws, NaN left out: twice the smaller tail beyond 0, one added to count and number."""
    known = draws[~np.isnan(draws)]
    tail = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (len(known) + 1))


def tested_once(predictions: Predictions) -> bool:
    """Whether folds have separate test parts (outer cross-validation), so that no two folds of a repeat test the same patient."""
    table = predictions.table
    return bool((table.groupby(["repeat", "patient"])["fold"].nunique() == 1).all())


def runs_of(predictions: Predictions) -> list[Integers]:
    """Rows of each run: a repeat and seed with all its folds if folds have separate test parts, otherwise each fold separately."""
    keys = ["repeat", "seed"] if tested_once(predictions) else ["repeat", "fold", "seed"]
    return [np.asarray(rows, dtype=np.int64) for rows in predictions.table.groupby(keys, sort=True).indices.values()]


@dataclass(frozen=True)
class _Patients:
    of_row: Integers  # (N,) index of the row's patient
    strata: Integers  # (P,) index of the patient's class


def _patients(predictions: Predictions) -> _Patients:
    table = predictions.table
    if len(parts := table[["split", "checkpoint"]].drop_duplicates()) != 1:
        there = sorted(map(tuple, parts.to_numpy())) or "no rows"
        raise DataError(f"the bootstrap needs one part of one checkpoint, the table has {there}; use predictions.part")
    of_row, names = predictions.patients
    own = np.array(predictions.classes, dtype=object)[_rarest(predictions, of_row, len(names))]
    first = np.unique(of_row, return_index=True)[1]
    carried = table["patient_label"].iloc[first].to_numpy(dtype=object)
    return _Patients(of_row, pd.factorize(np.where(carried != "", carried, own), sort=True)[0].astype(np.int64))


def _rarest(predictions: Predictions, of_row: Integers, patients: int) -> Integers:
    """Each patient's own label that is rarest in the table."""
    labels = predictions.labels()
    counts = np.bincount(labels, minlength=len(predictions.classes))
    by_count = np.argsort(counts, kind="stable")
    rank_of = np.empty_like(by_count)
    rank_of[by_count] = np.arange(len(by_count))
    lowest = np.full(patients, len(by_count) - 1)
    np.minimum.at(lowest, of_row, rank_of[labels])
    return np.asarray(by_count[lowest])


def _draws(patients: _Patients, resamples: int, seed: int) -> Iterator[Integers]:
    """Number of times each patient was drawn, ``(block, P)``; blocks limit the memory."""
    if resamples < 1:
        raise ConfigError(f"resamples must be at least 1, not {resamples}")
    weights = _weights(patients.strata.tobytes(), resamples, seed)
    for start in range(0, resamples, _BLOCK):
        yield weights[start : start + _BLOCK].astype(np.int64)


@lru_cache(maxsize=4)
def _weights(strata: bytes, resamples: int, seed: int) -> NDArray[np.int32]:
    # Cached, because every metric and every pair of a study draws the same patients.
    generator, classes = np.random.default_rng(seed), np.frombuffer(strata, dtype=np.int64)
    weights = np.empty((resamples, len(classes)), dtype=np.int32)
    for stratum in np.unique(classes):
        columns = np.flatnonzero(classes == stratum)
        weights[:, columns] = generator.multinomial(len(columns), np.full(len(columns), 1 / len(columns)), size=resamples)
    weights.flags.writeable = False
    return weights


def _once(patients: _Patients) -> Integers:
    return np.ones((1, len(patients.strata)), dtype=np.int64)


def _over_runs(predictions: Predictions, metrics: Sequence[Metric], patients: _Patients) -> Statistic:
    """The metrics, averaged over runs, as a function of the patients' weights: ``(R, P)`` to ``(M, R)``."""
    runs = runs_of(predictions)
    number = len(patients.strata)
    if len(runs) == 1:
        return _statistic(predictions, metrics, patients.of_row, number)
    parts = [_statistic(predictions.rows(rows), metrics, patients.of_row[rows], number) for rows in runs]
    return lambda weights: np.mean([part(weights) for part in parts], axis=0)


def _statistic(predictions: Predictions, metrics: Sequence[Metric], of_row: Integers, patients: int) -> Statistic:
    parsed = [parse_metric(metric, predictions.classes) if isinstance(metric, str) else ("", -1) for metric in metrics]
    if lacking := [metric for metric in metrics if isinstance(metric, str) and lacks_probabilities(predictions, metric)]:
        raise DataError(NEEDS.format(metric=lacking[0]))
    counted = [place for place, (name, _) in enumerate(parsed) if name and name not in RANKED]
    others = [(place, _alone(predictions, metrics[place], of_row, patients)) for place in range(len(metrics)) if place not in counted]
    count = _counted(predictions, [parsed[place] for place in counted], of_row, patients)

    def statistic(weights: Integers) -> Floats:
        found = np.empty((len(metrics), len(weights)))
        if counted:
            found[counted] = count(weights)
        for place, single in others:
            found[place] = single(weights)
        return found

    return statistic


def _alone(predictions: Predictions, metric: Metric, of_row: Integers, patients: int) -> Statistic:
    """A metric that shares no computation with others, ``(R, P)`` to ``(R,)``."""
    if not isinstance(metric, str):
        return _looped(predictions, metric, of_row)
    name, place = parse_metric(metric, predictions.classes)
    ranking = rank(predictions.labels() == place, predictions.probabilities()[:, place], of_row, patients)
    return ranking.auprc if name == "auprc" else ranking.auroc


def _counted(predictions: Predictions, wanted: Sequence[tuple[str, int]], of_row: Integers, patients: int) -> Statistic:
    """Metrics of sums only, ``(R, P)`` to ``(M, R)``: the sums of a draw are computed once for all of them."""
    sums = patient_sums(predictions, of_row, patients)
    return lambda weights: scores_of(weights @ sums, wanted)


def _looped(predictions: Predictions, function: Function, of_row: Integers) -> Statistic:
    label, probability = predictions.labels(), predictions.probabilities()
    rows = np.arange(len(label))

    def statistic(weights: Integers) -> Floats:
        drawn = (np.repeat(rows, weight[of_row]) for weight in weights)
        return np.array([function(label[taken], probability[taken]) for taken in drawn], dtype=np.float64)

    return statistic


def _tails(interval: Interval, draws: Floats, estimate: float, acceleration: float) -> tuple[float, float]:
    if interval == "percentile" or np.isnan(estimate):
        return _TAILS
    known = draws[~np.isnan(draws)]
    below = ((known < estimate).mean() + (known <= estimate).mean()) / 2
    bias = stats.norm.ppf(np.clip(below, 1e-6, 1 - 1e-6))
    shifted = bias + stats.norm.ppf(_TAILS)
    low, high = stats.norm.cdf(bias + shifted / (1 - acceleration * shifted))
    return float(low), float(high)


def _accelerations(statistic: Statistic, patients: _Patients) -> Floats:
    """Skew of the jackknife over patients, each class about its own mean, for each metric; 0 if leaving out a patient changes nothing."""
    number = len(patients.strata)
    blocks = [np.arange(start, min(start + _BLOCK, number)) for start in range(0, number, _BLOCK)]
    values = np.concatenate([statistic((block[:, None] != np.arange(number)).astype(np.int64)) for block in blocks], axis=1)
    means = pd.DataFrame(values.T).groupby(patients.strata).transform("mean").to_numpy(dtype=np.float64).T
    influence = np.nan_to_num(means - values)
    spread = (influence**2).sum(axis=1) ** 1.5
    return np.asarray(np.divide((influence**3).sum(axis=1), 6 * spread, out=np.zeros(len(spread)), where=spread != 0))


def _interval(draws: Floats, estimate: float, tails: tuple[float, float]) -> tuple[float, float]:
    if np.isnan(estimate) or np.isnan(draws).all():
        return np.nan, np.nan
    low, high = np.nanquantile(draws, tails)
    return float(low), float(high)


def check_same(a: Predictions, b: Predictions) -> None:
    """Refuse two sides that do not predict the same samples.

    Raises:
        DataError: classes, samples or labels differ, or some samples were predicted more often than others.
    """
    if a.classes != b.classes:
        raise DataError(f"the two tables have different classes: {list(a.classes)} and {list(b.classes)}; compare runs of one cohort")
    left, right = _samples(a), _samples(b)
    if len(apart := left.index.symmetric_difference(right.index)):
        raise DataError(
            f"the two tables predict different samples, such as {apart[0][2]} of patient {apart[0][1]} in repeat {apart[0][0]}; "
            "compare runs of the same splits"
        )
    if (other := left["label"] != right["label"].reindex(left.index)).any():
        repeat, patient, sample = left.index[other.to_numpy()][0]
        raise DataError(f"sample {sample} of patient {patient} (repeat {repeat}) has another label in the second table; prepare both alike")


def _samples(predictions: Predictions) -> pd.DataFrame:
    found = predictions.table.groupby(["repeat", "patient", "sample"])["label"].agg(["first", "size"])
    if found["size"].nunique() > 1:
        raise DataError(
            "some samples were predicted by more runs than others, so they would have more weight; compare the seeds that are complete"
        )
    return found.rename(columns={"first": "label"})
