"""Several methods over several data sets: mean ranks and their critical difference (Demšar 2006)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from raredistill.errors import DataError

FEWEST = 3


@dataclass(frozen=True)
class Ranks:
    """Mean ranks (1 is best) and the other contents of a critical-difference diagram.

    Attributes:
        mean_ranks: by method, best first.
        p: p value of Friedman's test that all methods are equal (Iman and Davenport's F).
        critical_difference: Nemenyi's: methods whose mean ranks are closer than this are not distinguished.
        cliques: maximal groups of methods that are not distinguished; the bars of the diagram.
        datasets: number of data sets.
    """

    mean_ranks: pd.Series
    p: float
    critical_difference: float
    cliques: tuple[tuple[str, ...], ...]
    datasets: int


def ranks_over_datasets(scores: pd.DataFrame, *, level: float = 0.05) -> Ranks:
    """Rank methods on every data set and compare all of them with all.

    Args:
        scores: one row per data set, one column per method; higher is better. Folds of one data set are not data sets.
        level: level of Nemenyi's test.

    Raises:
        DataError: fewer than three methods or data sets, or a gap.
    """
    number, methods = scores.shape
    if number < FEWEST or methods < FEWEST:
        raise DataError(f"ranks need at least {FEWEST} methods and {FEWEST} data sets, not {methods} and {number}; compare two by Wilcoxon")
    if scores.isna().to_numpy().any():
        raise DataError("a method has no score on a data set; leave out what is not on all of them")
    ranks = (-scores).rank(axis=1)
    mean = ranks.mean().sort_values(kind="stable")
    critical = float(stats.studentized_range.isf(level, methods, np.inf)) / 2**0.5 * (methods * (methods + 1) / (6 * number)) ** 0.5
    return Ranks(mean, _friedman(ranks), critical, _cliques(mean, critical), number)


def _friedman(ranks: pd.DataFrame) -> float:
    """Iman and Davenport's F on mean ranks, ties corrected."""
    number, methods = ranks.shape
    between = number * float(((ranks.mean() - (methods + 1) / 2) ** 2).sum())
    within = float(((ranks - (methods + 1) / 2) ** 2).to_numpy().sum()) - between
    if within <= 1e-12:
        return 1.0 if between <= 1e-12 else 0.0
    return float(stats.f.sf(between * (number - 1) / within, methods - 1, (methods - 1) * (number - 1)))


def _cliques(mean: pd.Series, critical: float) -> tuple[tuple[str, ...], ...]:
    names, values = [str(name) for name in mean.index], mean.to_numpy(dtype=np.float64)
    ends = [int(np.flatnonzero(values <= value + critical)[-1]) for value in values]
    return tuple(tuple(names[start : end + 1]) for start, end in enumerate(ends) if end > start and (start == 0 or ends[start - 1] < end))
