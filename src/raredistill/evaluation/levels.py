"""The same predictions by slice and by patient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from raredistill.errors import DataError
from raredistill.metrics import classification_metrics, confusion_matrix
from raredistill.predictions import Predictions

_ROW_METRICS = ("precision", "recall", "f1", "auroc", "auprc")
_OVERALL = ("macro_f1", "balanced_accuracy", "g_mean", "mcc")


@dataclass(frozen=True)
class PatientPredictions:
    """One prediction a patient.

    Attributes:
        patient: P identifiers, sorted.
        label: ``(P,)`` indices into ``classes``.
        probability: ``(P, Kp)``, each row adding up to 1.
        classes: the Kp classes that a patient can carry.
    """

    patient: list[str]
    label: NDArray[np.int64]
    probability: NDArray[np.float64]
    classes: tuple[str, ...]


def select(predictions: Predictions, split: str = "test", checkpoint: str = "best") -> Predictions:
    """Keep one part's rows of one checkpoint; by default the test part of the best.

    Raises:
        DataError: there are none.
    """
    return predictions.part(split, checkpoint)


def patient_predictions(predictions: Predictions) -> PatientPredictions:
    """Put a patient's slices together over the classes that a patient can carry.

    A slice's probabilities are averaged over seeds and repeats, then those of the patient's slices, without the background class; the mean
    is brought back to a sum of 1. A slice that looks like background so weighs little. Patients that carry no class are left out.

    Args:
        predictions: one part of one checkpoint.

    Raises:
        DataError: no patient has a class.
    """
    classes = tuple(name for name in predictions.classes if name != predictions.background)
    kept = [predictions.classes.index(name) for name in classes]
    table = predictions.table
    keys = [table[column].to_numpy() for column in ("patient", "patient_label", "sample")]
    slices = pd.DataFrame(predictions.probabilities()[:, kept]).groupby(keys).mean()
    means = slices.groupby(level=[0, 1]).mean()
    label = pd.Index(classes).get_indexer(means.index.get_level_values(1))
    if not (carries := label >= 0).any():
        raise DataError("no patient carries a class; fill the column patient_label to evaluate by patient")
    # Probabilities that all underflowed to 0 become equal ones instead of 0/0.
    probability = np.clip(means.to_numpy()[carries], np.finfo(np.float64).tiny, None)
    names = [str(name) for name in means.index.get_level_values(0)[carries]]
    return PatientPredictions(names, label[carries].astype(np.int64), probability / probability.sum(axis=1, keepdims=True), classes)


def evaluate(predictions: Predictions, checkpoint: str = "best", split: str = "test") -> dict[str, Any]:
    """Metrics and confusion matrices by slice and by patient.

    Args:
        predictions: a whole table; rows of several runs are pooled by slice and averaged by patient.
        checkpoint: ``best`` or ``last``.
        split: ``test`` or ``validation``.

    Returns:
        ``classes``; ``slice``: ``metrics`` (see :func:`raredistill.metrics.classification_metrics`), ``confusion`` ``(K, K)``, ``samples``;
        ``patient``: the same with its own ``classes``, or None and then ``patient_reason``.

    Raises:
        DataError: no rows of that part and checkpoint.
    """
    return _both_levels(select(predictions, split, checkpoint))


def metrics_rows(predictions: Predictions, checkpoint: str = "best", split: str = "test") -> dict[str, list[dict[str, Any]]]:
    """The metrics as rows to print.

    Args:
        predictions: a whole table.
        checkpoint: ``best`` or ``last``.
        split: ``test`` or ``validation``.

    Returns:
        ``by slice`` and, where there is one, ``by patient``: a row a class (class, precision, recall, f1, auroc, auprc) and their mean,
        ``macro``; ``overall``: a row a level (level, macro_f1, balanced_accuracy, g_mean, mcc).

    Raises:
        DataError: no rows of that part and checkpoint.
    """
    result = evaluate(predictions, checkpoint, split)
    levels = {"slice": (result["slice"]["metrics"], result["classes"])}
    if result["patient"]:
        levels["patient"] = (result["patient"]["metrics"], result["patient"]["classes"])
    rows = {f"by {level}": _class_rows(metrics, classes) for level, (metrics, classes) in levels.items()}
    overall = [{"level": level, **{name: metrics[name] for name in _OVERALL}} for level, (metrics, _) in levels.items()]
    return {**rows, "overall": overall}


def _class_rows(metrics: dict[str, Any], classes: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = [{"class": name, **{metric: float(metrics[metric][k]) for metric in _ROW_METRICS}} for k, name in enumerate(classes)]
    return [*rows, {"class": "macro", **{metric: _mean_of_present(metrics[metric]) for metric in _ROW_METRICS}}]


def _mean_of_present(values: NDArray[np.float64]) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")


def _both_levels(predictions: Predictions) -> dict[str, Any]:
    by_slice = _level(predictions.labels(), predictions.probabilities())
    result: dict[str, Any] = {"classes": predictions.classes, "slice": by_slice, "patient": None}
    if reason := _no_patient_level(predictions):
        return {**result, "patient_reason": reason}
    patients = patient_predictions(predictions)
    return {**result, "patient": {**_level(patients.label, patients.probability), "classes": patients.classes}}


def _level(label: NDArray[np.int64], probability: NDArray[np.float64]) -> dict[str, Any]:
    confusion = confusion_matrix(label, probability.argmax(axis=1), probability.shape[1])
    return {"metrics": classification_metrics(label, probability), "confusion": confusion, "samples": len(label)}


def _no_patient_level(predictions: Predictions) -> str | None:
    table = predictions.table
    carried = set(predictions.classes) - {predictions.background}
    if not table["patient_label"].isin(carried).any():
        return "no patient carries a class (the column patient_label is empty)"
    if len(carried) < 2:
        return "patients can carry one class only"
    if predictions.background is None and (table.groupby("patient")["sample"].nunique() == 1).all():
        return "every patient has one sample, so it would be the same"
    return None
