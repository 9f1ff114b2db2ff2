"""Areas under the ROC and precision-recall curves for many weightings of the patients, with a single sort."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Ranking:
    """Counts per patient at the scores of all positives, highest first: T thresholds, P patients.

    Attributes:
        hits: ``(P, T)`` positives at or above the threshold.
        calls: ``(P, T)`` rows at or above it.
        ties: ``(P, T)`` negatives exactly at it.
        negatives: ``(P,)`` total negatives.
    """

    hits: NDArray[np.float32]
    calls: NDArray[np.float32]
    ties: NDArray[np.float32]
    negatives: Floats

    def auprc(self, weights: Integers) -> Floats:
        """Average precision ``(R,)`` with patients weighted by ``weights (R, P)``; NaN without positives."""
        # Counts stay below 2^24, so single precision is exact.
        drawn = weights.astype(np.float32)
        hits, calls = (drawn @ self.hits).astype(np.float64), drawn @ self.calls
        steps = np.diff(hits, axis=1, prepend=0.0)
        area = (steps * _share(hits, calls.astype(np.float64))).sum(axis=1)
        return _share(area, hits[:, -1] if hits.shape[1] else np.zeros(len(hits)), np.nan)

    def auroc(self, weights: Integers) -> Floats:
        """Area under the ROC curve ``(R,)``, ties counting half; NaN unless both kinds are present."""
        drawn = weights.astype(np.float64)
        steps, above = self._steps
        # Negatives that outrank each positive are a quadratic form of a draw, over thresholds or over pairs of patients.
        outranked = (drawn @ self._lost_by_pair * drawn) if len(steps) < steps.shape[1] else (drawn @ steps) * (drawn @ above)
        pairs = (drawn @ steps.sum(axis=1)) * (drawn @ self.negatives)
        return 1 - _share(outranked.sum(axis=1), pairs, np.nan)

    @cached_property
    def _steps(self) -> tuple[Floats, Floats]:
        """Positives at each threshold, and negatives above it, those at it counting half, ``(P, T)``."""
        return np.diff(self.hits.astype(np.float64), axis=1, prepend=0.0), (self.calls - self.hits).astype(np.float64) - self.ties / 2

    @cached_property
    def _lost_by_pair(self) -> Floats:
        steps, above = self._steps
        return np.asarray(steps @ above.T)


def rank(positive: NDArray[np.bool_], score: Floats, of_row: Integers, patients: int) -> Ranking:
    """Sort the scores once, for any number of weightings.

    Args:
        positive: ``(N,)``.
        score: ``(N,)``, higher for positives.
        of_row: ``(N,)`` index of the row's patient.
        patients: number of patients, P.
    """
    thresholds = np.unique(score[positive])
    # The first threshold, from the highest, that a row reaches; rows below all thresholds are dropped.
    place = len(thresholds) - np.searchsorted(thresholds, score, side="right")
    calls = _counts(of_row, place, patients, len(thresholds))
    hits = _counts(of_row[positive], place[positive], patients, len(thresholds))
    equal = ~positive & np.isin(score, thresholds)
    ties = _counts(of_row[equal], place[equal], patients, len(thresholds))
    negatives = np.bincount(of_row[~positive], minlength=patients).astype(np.float64)
    return Ranking(hits.cumsum(axis=1), calls.cumsum(axis=1), ties, negatives)


def area_influences(positive: NDArray[np.bool_], score: Floats, of_row: Integers, patients: int) -> dict[str, tuple[float, Floats]]:
    """Both areas of one test part, and each patient's influence on them (DeLong's placements; infinitesimal jackknife).

    Args:
        positive: ``(N,)``.
        score: ``(N,)``, higher for positives.
        of_row: ``(N,)`` index of the row's patient.
        patients: P.

    Returns:
        ``auroc`` and ``auprc``: the area and the influences ``(P,)``, which add up to 0; NaN where one kind, or every positive, is absent.
    """
    hits = int(positive.sum())
    unknown = np.full(patients, np.nan)
    roc = _roc_rows(positive, score) if 0 < hits < len(positive) else None
    curve = _precision_rows(positive, score) if hits else None

    def by_patient(rows: tuple[float, Floats] | None) -> tuple[float, Floats]:
        return (np.nan, unknown) if rows is None else (rows[0], np.bincount(of_row, weights=rows[1], minlength=patients).astype(np.float64))

    return {"auroc": by_patient(roc), "auprc": by_patient(curve)}


def _roc_rows(positive: NDArray[np.bool_], score: Floats) -> tuple[float, Floats]:
    above, below = placements(positive, score)
    area = float(above.mean())
    rows = np.empty(len(score))
    rows[positive], rows[~positive] = (above - area) / len(above), (below - area) / len(below)
    return area, rows


def placements(positive: NDArray[np.bool_], score: Floats) -> tuple[Floats, Floats]:
    """Share of negatives below each positive, and of positives above each negative, ties counting half."""
    together = rankdata(score)
    above = (together[positive] - rankdata(score[positive])) / int((~positive).sum())
    below = 1 - (together[~positive] - rankdata(score[~positive])) / int(positive.sum())
    return above, below


def _precision_rows(positive: NDArray[np.bool_], score: Floats) -> tuple[float, Floats]:
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    hits = np.cumsum(positive[order])[ends].astype(np.float64)
    calls, steps = ends + 1.0, np.diff(hits, prepend=0.0)
    precision, number = hits / calls, hits[-1]
    area = float((steps * precision).sum() / number)
    # From a row's threshold downwards, one more positive increases hits and calls, one more negative only calls.
    gained, lost = (np.cumsum(each[::-1])[::-1] for each in (steps / calls, steps * hits / calls**2))
    place = np.empty(len(score), dtype=np.int64)
    place[order] = np.searchsorted(ends, np.arange(len(score)))
    own = np.where(positive, precision[place] + gained[place] - area, 0.0) - lost[place]
    return area, own / number


def _counts(of_row: Integers, place: Integers, patients: int, thresholds: int) -> NDArray[np.float32]:
    cells = np.bincount(of_row * (thresholds + 1) + place, minlength=patients * (thresholds + 1))
    return cells.reshape(patients, thresholds + 1)[:, :thresholds].astype(np.float32)


def _share(part: Floats, whole: Floats, empty: float = 0.0) -> Floats:
    result: Floats = np.divide(part, whole, out=np.full(np.shape(whole), empty), where=whole != 0)
    return result
