"""Scores and gains of groups of patients: by sex, age, site, scanner, or any other column of the cohort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from raredistill.errors import DataError
from raredistill.evaluation.bootstrap import patient_intervals
from raredistill.evaluation.contrasts import Tally, contrasts
from raredistill.evaluation.gains import FEWEST_PATIENTS, assess
from raredistill.evaluation.sums import RANKED
from raredistill.predictions import Predictions

BINS = 3
_DISTINCT = 6


def groups_of(values: Mapping[str, object], *, bins: int = BINS) -> dict[str, str]:
    """A group for each patient: the value itself or, for numbers with many values, one of three ranges.

    Args:
        values: values by patient; None, NaN and the empty string form a separate group, ``unknown``.
        bins: number of groups of about equal size for numbers.

    Raises:
        DataError: no patient has a value.
    """
    column = pd.Series(dict(values), dtype=object)
    known = column[column.notna() & (column.astype(str) != "")]
    if known.empty:
        raise DataError("no patient has a value in this column; choose another one")
    numbers = pd.to_numeric(known, errors="coerce")
    if numbers.notna().all() and numbers.nunique() > _DISTINCT:
        known = pd.qcut(numbers, bins, duplicates="drop", precision=1).astype(str)
    return {str(patient): str(known.get(patient, "unknown")) for patient in column.index}


def subgroup_intervals(
    predictions: Predictions, groups: Mapping[str, str], metrics: Sequence[str], *, resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Scores of each group, with the same kind of interval as for the whole cohort.

    Args:
        predictions: one part of one checkpoint.
        groups: by patient; a patient without one is an error, not left out.
        metrics: names as in :func:`raredistill.evaluation.bootstrap.patient_bootstrap`.
        resamples: draws of patients.
        seed: of the draws.

    Returns:
        Columns ``group, patients, metric, estimate, low, high``; NaN where a metric has no value in a group.

    Raises:
        ConfigError: unknown metric or class.
        DataError: a patient has no group.
    """
    own = _groups(predictions.table["patient"], groups)
    rows = []
    for group in sorted(set(own)):
        part = predictions.rows(np.flatnonzero(own == group))
        found = patient_intervals(part, metrics, resamples=resamples, seed=seed, intervals=("percentile",))
        for metric, (estimate, limits) in zip(metrics, found, strict=True):
            rows.append((group, len(part.patients[1]), metric, estimate, *limits["percentile"]))
    return pd.DataFrame(rows, columns=["group", "patients", "metric", "estimate", "low", "high"])


def subgroup_gains(
    control: Tally, other: Tally, groups: Mapping[str, str], metrics: Sequence[str], rare: str, *, kept: float = 1.0, level: float = 0.05
) -> pd.DataFrame:
    """The gain within each group, tested as in the whole cohort; subgroups are exploratory, so no p is adjusted.

    Args:
        control: first side.
        other: second side.
        groups: by patient.
        metrics: sums over patients (``f1``, ``recall``, ``macro_f1`` ...); areas rank all patients of a network and cannot be divided.
        rare: the rare class.
        kept: share of the rare class's patients that training keeps.
        level: two-sided.

    Returns:
        Columns ``group, patients, rare_patients, metric, gain, low, high, p, note``; a group with fewer than ten rare patients, or ten
        others, is only described: it has a gain and a note, but no interval.

    Raises:
        ConfigError: unknown metric or class.
        DataError: a patient has no group, or as :func:`raredistill.evaluation.contrasts.contrasts`.
    """
    wanted = [metric for metric in metrics if metric.partition(":")[0] not in RANKED]
    own = _groups(pd.Series(control.patients), groups)
    placed = _groups(pd.Series(other.patients), groups)
    rows = []
    for group in sorted(set(own)):
        made = contrasts(_only(control, own == group), _only(other, placed == group), wanted, rare)
        for metric, each in made.found.items():
            counts = len(each.layout.patients), int(each.layout.rare.sum())
            note = made.problems.get(metric, "")
            if min(counts[1], counts[0] - counts[1]) < FEWEST_PATIENTS and not note:
                note = f"fewer than {FEWEST_PATIENTS} patients with or without {rare}: described, not tested"
            tested = None if note or len(each.layout.runs) < 2 else assess([each], kept=kept, level=level)[0]
            numbers = (tested.low, tested.high, tested.p) if tested else (np.nan,) * 3
            rows.append((group, *counts, metric, each.gain, *numbers, note))
    return pd.DataFrame(rows, columns=["group", "patients", "rare_patients", "metric", "gain", "low", "high", "p", "note"])


def _groups(patients: pd.Series, groups: Mapping[str, str]) -> NDArray[np.object_]:
    found = patients.map(groups)
    if (lacking := found.isna()).any():
        raise DataError(f"patient {patients[lacking].iloc[0]} has no group; give every patient one, such as 'unknown'")
    return np.asarray(found.to_numpy(dtype=object))


def _only(side: Tally, kept: NDArray[np.bool_]) -> Tally:
    patients = tuple(name for name, there in zip(side.patients, kept, strict=True) if there)
    return replace(side, patients=patients, fold=side.fold[:, kept], sums=side.sums[:, kept], areas={}, carried=side.carried[kept])
