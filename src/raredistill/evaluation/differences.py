"""Evidence on the difference between two methods, by a test that depends on how patients were divided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from raredistill.errors import DataError
from raredistill.evaluation.bootstrap import check_same, p_of_draws, paired_draws, tested_once
from raredistill.evaluation.compare import bayesian_correlated_t, corrected_error, corrected_interval, corrected_resampled_t, detectable
from raredistill.evaluation.sums import NEEDS, RANKED, lacks_probabilities, parse_metric, patient_sums, scores_of
from raredistill.metrics import auprc, auroc
from raredistill.predictions import Predictions

Floats = NDArray[np.float64]

ROPE = 0.01
_ABSENT = "{metric} has no value on these predictions: its class has no samples here; choose another class or part"
FEW_SPLITS = 3
"""With two splits, the corrected t-test has one degree of freedom and almost no power."""
FEW_PATIENTS = 20


@dataclass(frozen=True)
class Differences:
    """The difference of one metric, second method minus first, with the values that a test needs.

    Attributes:
        estimate: the difference.
        values: ``(n,)`` differences by fold and repeat, averaged over seeds (``folds``); or bootstrap draws over patients.
        basis: ``folds``: folds test different patients, so the corrected t-test is valid and covers training; ``patients``: all runs
            share a test set, so only a bootstrap over its patients is possible, which does not cover the variance of training.
        train_size: patients in a training side, for ``folds``.
        test_size: patients in a test side, for ``folds``.
        splits: the (repeat, fold) of each value, for ``folds``.
    """

    estimate: float
    values: Floats
    basis: Literal["folds", "patients"]
    train_size: float
    test_size: float
    splits: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Evidence:
    """A difference with its 95 % interval, two-sided p, the smallest difference detected with 80 % power, and Bayesian probabilities.

    ``worse, equal, better`` are those of :func:`raredistill.evaluation.compare.bayesian_correlated_t`; NaN without folds.
    """

    estimate: float
    low: float
    high: float
    p: float
    detectable: float
    worse: float
    equal: float
    better: float
    basis: str


def differences(
    control: Predictions, other: Predictions, metric: str, *, sizes: tuple[float, float] | None = None, resamples: int = 2000, seed: int = 0
) -> Differences:
    """Compare two sides on the same samples.

    Args:
        control: one part of one checkpoint.
        other: predictions of the same samples in the same repeats.
        metric: a name as in :func:`raredistill.evaluation.bootstrap.patient_bootstrap`.
        sizes: patients in a training and in a test side; by default what :func:`side_sizes` finds in the control.
        resamples: number of draws, if the test is a bootstrap.
        seed: of the draws.

    Raises:
        ConfigError: unknown metric or class.
        DataError: the sides do not match, or the metric has no value.
    """
    check_same(control, other)
    found, problems = differences_of(control, other, [metric], sizes=sizes, resamples=resamples, seed=seed)
    if problems:
        raise DataError(problems[metric])
    return found[metric]


def differences_of(
    control: Predictions, other: Predictions, metrics: Sequence[str], *, sizes: tuple[float, float] | None = None, resamples: int = 2000,
    seed: int = 0,
) -> tuple[dict[str, Differences], dict[str, str]]:  # fmt: skip
    """:func:`differences` for several metrics at once, for sides that have passed :func:`raredistill.evaluation.bootstrap.check_same`.

    Returns:
        Differences by metric, and why the others have none.

    Raises:
        ConfigError: unknown metric or class.
    """
    problems = {metric: NEEDS.format(metric=metric) for metric in metrics if lacks_probabilities(control, metric)}
    known = [metric for metric in metrics if metric not in problems]
    make = _by_fold if in_folds(control) else _by_draw
    found = dict(zip(known, make(control, other, known, sizes, resamples, seed), strict=True))
    problems |= {metric: _ABSENT.format(metric=metric) for metric, each in found.items() if np.isnan(each.estimate)}
    return {metric: each for metric, each in found.items() if metric not in problems}, problems


def _by_draw(
    control: Predictions, other: Predictions, metrics: Sequence[str], sizes: tuple[float, float] | None, resamples: int, seed: int
) -> list[Differences]:
    estimates, draws = paired_draws(other, control, metrics, resamples=resamples, seed=seed)
    return [Differences(float(estimate), own, "patients", np.nan, np.nan) for estimate, own in zip(estimates, draws, strict=True)]


def _by_fold(
    control: Predictions, other: Predictions, metrics: Sequence[str], sizes: tuple[float, float] | None, resamples: int, seed: int
) -> list[Differences]:
    train, test = sizes or side_sizes(control)
    gained = split_values(other, metrics) - split_values(control, metrics)
    found = []
    for known in (gained[metric].dropna() for metric in metrics):
        values = known.to_numpy(dtype=np.float64)
        splits = tuple((int(repeat), int(fold)) for repeat, fold in known.index)
        found.append(Differences(float(values.mean()) if len(values) else np.nan, values, "folds", train, test, splits))
    return found


def combine(parts: Sequence[Differences], weights: Sequence[float]) -> Differences:
    """A weighted sum of differences over the same splits or the same draws, such as a slope over several pairs.

    Raises:
        DataError: the parts were not made on the same splits or draws.
    """
    if len({(len(part.values), part.basis, part.splits) for part in parts}) != 1:
        raise DataError("these comparisons were not made on the same splits; finish the runs of all folds")
    values = np.sum([weight * part.values for weight, part in zip(weights, parts, strict=True)], axis=0)
    estimate = float(sum(weight * part.estimate for weight, part in zip(weights, parts, strict=True)))
    return Differences(estimate, values, parts[0].basis, parts[0].train_size, parts[0].test_size, parts[0].splits)


def weigh(found: Differences, *, rope: float = ROPE) -> Evidence:
    """Test a difference as its basis allows.

    Raises:
        DataError: too few folds for a test.
    """
    if found.basis == "patients":
        low, high = np.nanpercentile(found.values, (2.5, 97.5))
        smallest = detectable(float(np.nanstd(found.values, ddof=1)))
        return Evidence(found.estimate, float(low), float(high), p_of_draws(found.values), smallest, np.nan, np.nan, np.nan, "patients")
    if len(found.values) < FEW_SPLITS:
        raise DataError(
            f"{len(found.values)} folds x repeats are too few for a test, which needs at least {FEW_SPLITS}; "
            "the difference can be described, not tested: raise splits.folds or splits.repeats"
        )
    sizes = {"train_size": found.train_size, "test_size": found.test_size}
    low, high = corrected_interval(found.values, **sizes)
    smallest = detectable(corrected_error(found.values, **sizes), len(found.values) - 1)
    _, p = corrected_resampled_t(found.values, **sizes)
    return Evidence(found.estimate, low, high, p, smallest, *bayesian_correlated_t(found.values, **sizes, rope=rope), "folds")


def in_folds(predictions: Predictions) -> bool:
    """Whether there are several folds that test different patients (outer cross-validation)."""
    return len(predictions.table[["repeat", "fold"]].drop_duplicates()) > 1 and tested_once(predictions)


def split_values(predictions: Predictions, metrics: Sequence[str]) -> pd.DataFrame:
    """Metrics by repeat and fold, averaged over seeds first: seeds of one fold share its patients, so they are not additional splits."""
    groups = predictions.table.groupby(["repeat", "fold", "seed"], sort=True).indices
    by_run = pd.DataFrame({key: _metrics_of(predictions, metrics, np.asarray(rows)) for key, rows in groups.items()}, index=list(metrics)).T
    return by_run.groupby(level=[0, 1]).mean()


def metric_of(predictions: Predictions, metric: str) -> float:
    """A named metric of all rows; NaN if its class is absent.

    Raises:
        ConfigError: unknown metric or class.
        DataError: it needs probabilities and only hard labels are known.
    """
    return _metrics_of(predictions, [metric], np.arange(len(predictions.table)))[0]


def _metrics_of(predictions: Predictions, metrics: Sequence[str], rows: NDArray[np.int64]) -> list[float]:
    chosen = predictions.rows(rows)
    if lacking := [metric for metric in metrics if lacks_probabilities(predictions, metric)]:
        raise DataError(NEEDS.format(metric=lacking[0]))
    parsed = [parse_metric(metric, predictions.classes) for metric in metrics]
    sums = patient_sums(chosen, np.zeros(len(rows), dtype=np.int64), 1)[0]
    return [_area(chosen, name, place) if name in RANKED else float(scores_of(sums, [(name, place)])[0]) for name, place in parsed]


def _area(predictions: Predictions, name: str, place: int) -> float:
    return (auprc if name == "auprc" else auroc)(predictions.labels() == place, predictions.probabilities()[:, place])


def side_sizes(predictions: Predictions) -> tuple[float, float]:
    """Patients in a training and in a test side, means over folds, from a table of outer folds.

    A fold trains on all patients tested by the other folds of its repeat, except its validation patients if the table names them. Leaving
    these out of the training side widens Nadeau and Bengio's interval by 1.07 to 1.16 compared with counting them.
    """
    table = predictions.table
    everyone = table["patient"].nunique()
    patients = table.groupby(["repeat", "fold", "split"])["patient"].nunique().unstack("split", fill_value=0)
    test = float(patients["test"].mean())
    validation = float(patients["validation"].mean()) if "validation" in patients else 0.0
    return everyone - test - validation, test
