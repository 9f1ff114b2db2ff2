"""Intervals and paired tests that resample patients, because slices of one patient are not independent."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from raredistill.errors import ConfigError, DataError
from raredistill.metrics import auprc, auroc, metrics_from_confusion
from raredistill.predictions import Predictions

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Function = Callable[[Integers, Floats], float]
Metric = str | Function

_OVERALL = ("macro_f1", "balanced_accuracy", "accuracy", "g_mean", "mcc", "kappa")
_COUNTED = ("f1", "recall", "precision", "specificity")
_RANKED = {"auprc": auprc, "auroc": auroc}
_INTERVAL = (2.5, 97.5)
_BLOCK = 256


def patient_bootstrap(predictions: Predictions, metric: Metric, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """A metric with its 95 % percentile interval over patients drawn with replacement within each patient class.

    Args:
        predictions: one part of one checkpoint; rows of several folds, repeats and seeds are pooled; a patient comes with all of them.
        metric: ``macro_f1``, ``balanced_accuracy``, ``accuracy``, ``g_mean``, ``mcc``, ``kappa``; ``f1:CLASS``, ``recall:CLASS``,
            ``precision:CLASS``, ``specificity:CLASS``, ``auprc:CLASS``, ``auroc:CLASS``; or a function of labels ``(N,)`` and
            probabilities ``(N, K)``.
        resamples: draws.
        seed: of the draws.

    Returns:
        Estimate, low, high.

    Raises:
        ConfigError: unknown metric or class.
        DataError: no rows, several parts or checkpoints, or the metric has no value on them.
    """
    statistic, patients = _statistic(predictions, metric), _patients(predictions)
    draws = np.concatenate([statistic(weights) for weights in _draws(patients, resamples, seed)])
    estimate = float(statistic(np.ones((1, len(patients.strata)), dtype=np.int64))[0])
    low, high = _interval(draws, estimate, metric)
    return estimate, low, high


def paired_patient_bootstrap(
    a: Predictions, b: Predictions, metric: Metric, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float, float]:
    """The difference of a metric on the same patients, its 95 % interval and its two-sided p.

    Args:
        a: one part of one checkpoint; several seeds are pooled, so each weighs the same.
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
    patients = _patients(a)
    left, right = _statistic(a, metric), _statistic(b, metric)
    _check_same(a, b)
    draws = np.concatenate([left(weights) - right(weights) for weights in _draws(patients, resamples, seed)])
    once = np.ones((1, len(patients.strata)), dtype=np.int64)
    difference = float((left(once) - right(once))[0])
    low, high = _interval(draws, difference, metric)
    return difference, low, high, _p_value(draws[~np.isnan(draws)])


@dataclass(frozen=True)
class _Patients:
    of_row: Integers  # (N,) index of the row's patient
    strata: Integers  # (P,) index of the patient's class


def _patients(predictions: Predictions) -> _Patients:
    table = predictions.table
    if len(parts := set(zip(table["split"], table["checkpoint"], strict=True))) != 1:
        raise DataError(f"the bootstrap needs one part of one checkpoint, the table has {sorted(parts) or 'no rows'}; use predictions.part")
    names, of_row = np.unique(table["patient"].to_numpy(dtype=str), return_inverse=True)
    order = table["label"].value_counts().rank(method="first")
    rarest = table["label"].map(order).groupby(of_row).min().map({rank: name for name, rank in order.items()})
    carried = table["patient_label"].groupby(of_row).first()
    stratum = carried.where(carried != "", rarest)
    return _Patients(of_row.astype(np.int64), pd.factorize(stratum, sort=True)[0][: len(names)].astype(np.int64))


def _draws(patients: _Patients, resamples: int, seed: int) -> Iterator[Integers]:
    """How often each patient was drawn, ``(block, P)``; blocks bound the memory."""
    if resamples < 1:
        raise ConfigError(f"resamples must be at least 1, not {resamples}")
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(patients.strata == stratum) for stratum in np.unique(patients.strata)]
    for start in range(0, resamples, _BLOCK):
        weights = np.empty((min(_BLOCK, resamples - start), len(patients.strata)), dtype=np.int64)
        for columns in members:
            weights[:, columns] = generator.multinomial(len(columns), np.full(len(columns), 1 / len(columns)), size=len(weights))
        yield weights


def _statistic(predictions: Predictions, metric: Metric) -> Callable[[Integers], Floats]:
    """The metric as a function of how often each patient counts: ``(R, P)`` to ``(R,)``."""
    if not isinstance(metric, str):
        return _looped(predictions, metric)
    name, place = _parse(metric, predictions.classes)
    if name in _RANKED:
        rank = _RANKED[name]
        return _looped(predictions, lambda label, probability: rank(label == place, probability[:, place]))
    return _counted(predictions, name, place)


def _parse(metric: str, classes: tuple[str, ...]) -> tuple[str, int]:
    name, colon, which = metric.partition(":")
    known = [*_OVERALL, *(f"{each}:{label}" for each in (*_COUNTED, *_RANKED) for label in classes)]
    if metric not in known:
        near = difflib.get_close_matches(metric, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown metric {metric!r}{hint or ';'} known: {', '.join(known)}")
    return name, classes.index(which) if colon else -1


def _counted(predictions: Predictions, name: str, place: int) -> Callable[[Integers], Floats]:
    of_row = _patients(predictions).of_row
    classes = len(predictions.classes)
    cell = predictions.labels() * classes + predictions.probabilities().argmax(axis=1)
    patients = int(of_row.max()) + 1
    counts = np.bincount(of_row * classes**2 + cell, minlength=patients * classes**2).reshape(patients, -1).astype(np.float64)

    def statistic(weights: Integers) -> Floats:
        values: Floats = metrics_from_confusion((weights @ counts).reshape(-1, classes, classes))[name]
        return values if place < 0 else values[:, place]

    return statistic


def _looped(predictions: Predictions, function: Function) -> Callable[[Integers], Floats]:
    of_row = _patients(predictions).of_row
    label, probability = predictions.labels(), predictions.probabilities()
    rows = np.arange(len(label))

    def statistic(weights: Integers) -> Floats:
        drawn = (np.repeat(rows, weight[of_row]) for weight in weights)
        return np.array([function(label[taken], probability[taken]) for taken in drawn], dtype=np.float64)

    return statistic


def _interval(draws: Floats, estimate: float, metric: Metric) -> tuple[float, float]:
    if np.isnan(estimate) or np.isnan(draws).all():
        raise DataError(f"{metric} has no value on these predictions: its class has no samples here; choose another class or part")
    low, high = np.nanpercentile(draws, _INTERVAL)
    return float(low), float(high)


def _p_value(draws: Floats) -> float:
    tail = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * (tail + 1) / (len(draws) + 1))


def _check_same(a: Predictions, b: Predictions) -> None:
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
            "some samples were predicted by more runs than others, so they would weigh more; compare the seeds that are complete"
        )
    return found.rename(columns={"first": "label"})
