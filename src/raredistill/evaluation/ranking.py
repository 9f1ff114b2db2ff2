"""Areas under the ROC and precision-recall curves for many weightings of the patients at once, without sorting again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Ranking:
    """Counts by patient at every score that a positive has, highest first: T thresholds, P patients.

    Attributes:
        hits: ``(P, T)`` positives at or above the threshold.
        calls: ``(P, T)`` rows at or above it.
        ties: ``(P, T)`` negatives exactly at it.
        negatives: ``(P,)`` negatives in all.
    """

    hits: NDArray[np.float32]
    calls: NDArray[np.float32]
    ties: NDArray[np.float32]
    negatives: Floats

    def auprc(self, weights: Integers) -> Floats:
        """Average precision ``(R,)`` when patients count ``weights (R, P)`` times; NaN without positives."""
        # Counts stay below 2^24, so single precision is exact.
        drawn = weights.astype(np.float32)
        hits, calls = (drawn @ self.hits).astype(np.float64), drawn @ self.calls
        steps = np.diff(hits, axis=1, prepend=0.0)
        area = (steps * _share(hits, calls.astype(np.float64))).sum(axis=1)
        return _share(area, hits[:, -1] if hits.shape[1] else np.zeros(len(hits)), np.nan)

    def auroc(self, weights: Integers) -> Floats:
        """Area under the ROC curve ``(R,)``, ties counting half; NaN without both kinds."""
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
    """Sort once.

    Args:
        positive: ``(N,)``.
        score: ``(N,)``, higher for positives.
        of_row: ``(N,)`` index of the row's patient.
        patients: P.
    """
    thresholds = np.unique(score[positive])
    # The first threshold, from the highest, that a row reaches; rows below all of them fall off the end.
    place = len(thresholds) - np.searchsorted(thresholds, score, side="right")
    calls = _counts(of_row, place, patients, len(thresholds))
    hits = _counts(of_row[positive], place[positive], patients, len(thresholds))
    equal = ~positive & np.isin(score, thresholds)
    ties = _counts(of_row[equal], place[equal], patients, len(thresholds))
    negatives = np.bincount(of_row[~positive], minlength=patients).astype(np.float64)
    return Ranking(hits.cumsum(axis=1), calls.cumsum(axis=1), ties, negatives)


def _counts(of_row: Integers, place: Integers, patients: int, thresholds: int) -> NDArray[np.float32]:
    cells = np.bincount(of_row * (thresholds + 1) + place, minlength=patients * (thresholds + 1))
    return cells.reshape(patients, thresholds + 1)[:, :thresholds].astype(np.float32)


def _share(part: Floats, whole: Floats, empty: float = 0.0) -> Floats:
    result: Floats = np.divide(part, whole, out=np.full(np.shape(whole), empty), where=whole != 0)
    return result
