"""Prediction sets that contain the true class of new patients with a stated frequency.

Not taken from MAPIE, because MAPIE calibrates on rows as if they were exchangeable, and slices of one patient are not. Here
patients are the units (Lee, Barber and Willett 2023), separately in each class (Mondrian; Vovk 2012), so that the rare class keeps its
coverage instead of losing it to the common ones.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from raredistill.errors import ConfigError, DataError
from raredistill.predictions import Predictions

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def class_thresholds(label: ArrayLike, probability: ArrayLike, patient: ArrayLike, *, miss: float = 0.1) -> Floats:
    """Thresholds of nonconformity for each class, from validation.

    Args:
        label: ``(N,)`` class indices.
        probability: ``(N, K)``.
        patient: ``(N,)`` names or indices; a patient's rows of one class share a total weight of 1.
        miss: share of each class's samples that sets may miss.

    Returns:
        ``(K,)`` largest 1 - p with which a class is included; infinite for a class with fewer than 1 / miss - 1 patients, so that it is
        in every set.

    Raises:
        ConfigError: ``miss`` is not between 0 and 1.
        DataError: a class has no sample.

    Examples:
        >>> probability = [[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]]
        >>> class_thresholds([0, 0, 1, 1], probability, ["a", "b", "c", "d"], miss=0.4).round(3).tolist()
        [0.4, 0.3]
    """
    if not 0 < miss < 1:
        raise ConfigError(f"miss is the share of samples that sets may miss, between 0 and 1, not {miss}")
    truth, scores = np.asarray(label, dtype=np.int64), 1 - np.asarray(probability, dtype=np.float64)
    return np.array([_threshold(scores[truth == k, k], np.asarray(patient)[truth == k], miss) for k in range(scores.shape[1])])


def _threshold(scores: Floats, patient: NDArray[np.generic], miss: float) -> float:
    if not len(scores):
        raise DataError("a prediction set needs validation samples of every class; one has none")
    _, of_row, rows = np.unique(patient, return_inverse=True, return_counts=True)
    order = np.argsort(scores, kind="stable")
    # The new patient counts, too, and may lie beyond all others.
    reached = np.cumsum(1 / rows[of_row[order]]) / (len(rows) + 1)
    place = int(np.searchsorted(reached, 1 - miss - 1e-12))
    return float(scores[order][place]) if place < len(scores) else float("inf")


def prediction_sets(probability: ArrayLike, thresholds: ArrayLike) -> Bools:
    """Whether each class is in each sample's set ``(N, K)``, from :func:`class_thresholds`; a set may be empty or contain all classes.

    Examples:
        >>> prediction_sets([[0.7, 0.3], [0.5, 0.5]], [0.4, 0.3]).tolist()
        [[True, False], [False, False]]
    """
    return np.asarray(1 - np.asarray(probability, dtype=np.float64) <= np.asarray(thresholds, dtype=np.float64))


def set_coverage(validation: Predictions, test: Predictions, *, miss: float = 0.1) -> pd.DataFrame:
    """Calibrate sets on a run's validation part and evaluate them on its test part, class by class.

    Args:
        validation: the validation part of a run.
        test: its test part.
        miss: share of each class's samples that sets may miss.

    Returns:
        Columns ``class, patients, coverage, size, only``: mean over patients of the share of their samples of the class whose set contains
        it, mean size of those sets, and share of those sets that contain nothing else.

    Raises:
        DataError: as :func:`class_thresholds`.
    """
    limits = class_thresholds(validation.labels(), validation.probabilities(), validation.patients[0], miss=miss)
    sets, labels, of_row = prediction_sets(test.probabilities(), limits), test.labels(), test.patients[0]
    rows = []
    for k, name in enumerate(test.classes):
        own = labels == k
        by_patient = pd.DataFrame(
            {"held": sets[own, k], "size": sets[own].sum(axis=1), "only": sets[own, k] & (sets[own].sum(axis=1) == 1)}
        )
        means = by_patient.astype(np.float64).groupby(of_row[own]).mean()
        rows.append((name, len(means), *(float(means[column].mean()) for column in ("held", "size", "only"))))
    return pd.DataFrame(rows, columns=["class", "patients", "coverage", "size", "only"])
