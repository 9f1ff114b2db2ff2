"""Evaluation of the same predictions per sample and per patient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from raredistill.errors import DataError
from raredistill.metrics import classification_metrics, confusion_matrix
from raredistill.predictions import COLUMNS, Predictions

_ROW_METRICS = ("precision", "recall", "specificity", "f1", "auroc", "auprc")
_OVERALL = ("macro_f1", "balanced_accuracy", "g_mean", "mcc", "kappa")


Rule = Literal["mean", "max", "top5"]
RULES: tuple[Rule, ...] = ("mean", "max", "top5")
_TOP = 5
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PatientPredictions:
    """One prediction per patient.

    Attributes:
        patient: P identifiers, sorted.
        label: ``(P,)`` indices into ``classes``.
        probability: ``(P, Kp)``, each row adding up to 1.
        classes: the Kp classes that a patient can have.
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


def patient_predictions(predictions: Predictions, rule: Rule = "mean") -> PatientPredictions:
    """Combine a patient's slices into one prediction over the classes that a patient can have.

    A slice's probabilities are averaged over the seeds and repeats of the table, so that a table of several runs gives their ensemble
    (:func:`by_patient` keeps runs apart). Then the rule gives one number per class from the patient's slices, without the
    background class; these are renormalised to a sum of 1. Patients without a class are left out.

    Args:
        predictions: one part of one checkpoint.
        rule: ``mean`` (slices that look like background have little weight), ``max``, or ``top5``, the mean of a class's five highest.

    Raises:
        DataError: no patient has a class.
    """
    classes = tuple(name for name in predictions.classes if name != predictions.background)
    kept = [predictions.classes.index(name) for name in classes]
    of_row, names = predictions.patients
    of_slice, means = _slice_means(of_row, predictions.table["sample"], predictions.probabilities()[:, kept])
    first = np.unique(of_row, return_index=True)[1]
    label = pd.Index(classes).get_indexer(pd.Index(predictions.table["patient_label"].iloc[first]))
    if not (carries := label >= 0).any():
        raise DataError("no patient carries a class; fill the column patient_label to evaluate by patient")
    probability = shares(_put_together(of_slice, means, rule)[carries])
    patients = [name for name, there in zip(names, carries, strict=True) if there]
    return PatientPredictions(patients, label[carries].astype(np.int64), probability, classes)


def patient_probabilities(of_row: NDArray[np.int64], sample: pd.Series[Any], probability: Floats, rule: Rule = "mean") -> Floats:
    """Probabilities ``(P, Kp)`` of patients whose labels need not be known.

    Args:
        of_row: ``(N,)`` index of each row's patient.
        sample: names of the rows' slices.
        probability: ``(N, Kp)`` of the classes that a patient can carry.
        rule: as :func:`patient_predictions`.
    """
    return shares(_put_together(*_slice_means(of_row, sample, probability), rule))


def shares(probability: Floats) -> Floats:
    """Rows brought back to a sum of 1; those that all underflowed to 0 become equal shares instead of 0/0."""
    positive = np.clip(probability, np.finfo(np.float64).tiny, None)
    return np.asarray(positive / positive.sum(axis=1, keepdims=True))


def _slice_means(of_row: NDArray[np.int64], sample: pd.Series[Any], probability: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Patient ``(S,)`` and mean probability ``(S, Kp)`` of each slice over the runs that predict it, patient by patient."""
    names = pd.factorize(sample)[0].astype(np.int64)
    number = int(names.max()) + 1
    slices, of_slice = np.unique(of_row * number + names, return_inverse=True)
    count = np.bincount(of_slice)
    means = np.stack([np.bincount(of_slice, weights=column) / count for column in probability.T], axis=1)
    return slices // number, means


def _put_together(of_slice: NDArray[np.int64], means: Floats, rule: Rule) -> Floats:
    """``(P, Kp)`` from slices ``(S, Kp)``, which are sorted by patient."""
    starts = np.flatnonzero(np.diff(of_slice, prepend=-1))
    number = np.diff(np.append(starts, len(of_slice)))
    if rule == "max":
        return np.asarray(np.maximum.reduceat(means, starts, axis=0))
    if rule == "mean":
        return np.asarray(np.add.reduceat(means, starts, axis=0) / number[:, None])
    highest = np.arange(len(of_slice)) - np.repeat(starts, number) < _TOP
    columns = [np.where(highest, column[np.lexsort((-column, of_slice))], 0.0) for column in means.T]
    sums = np.stack([np.add.reduceat(column, starts) for column in columns], axis=1)
    return np.asarray(sums / np.minimum(number, _TOP)[:, None])


def has_patients(predictions: Predictions) -> bool:
    """Whether the patient level differs from the slice level."""
    return _no_patient_level(predictions) is None


def by_patient(predictions: Predictions, rule: Rule = "mean") -> Predictions:
    """The patient level as a predictions table, one row per patient and run, so that all functions on predictions can be used on it.

    Args:
        predictions: one part of one checkpoint.
        rule: as :func:`patient_predictions`.

    Raises:
        DataError: no patient has a class.
    """
    rows = []
    for places in predictions.table.groupby(["repeat", "fold", "seed"], sort=True).indices.values():
        found = patient_predictions(predictions.rows(np.asarray(places)), rule)
        head = predictions.table.iloc[places[0]]
        fixed = {column: head[column] for column in ("run", "split", "repeat", "fold", "seed", "checkpoint")}
        for patient, label, probability in zip(found.patient, found.label, found.probability, strict=True):
            name = found.classes[label]
            rows.append(
                {**fixed, "sample": patient, "patient": patient, "patient_label": name, "label": name, "logits": np.log(probability)}
            )
    classes = tuple(name for name in predictions.classes if name != predictions.background)
    return Predictions(pd.DataFrame(rows, columns=list(COLUMNS)), classes, None, predictions.hard)


def evaluate(predictions: Predictions, checkpoint: str = "best", split: str = "test", rule: Rule = "mean") -> dict[str, Any]:
    """Metrics and confusion matrices by slice and by patient.

    Args:
        predictions: a complete table; rows of several runs are pooled at both levels, with one row per patient and run.
        checkpoint: ``best`` or ``last``.
        split: ``test`` or ``validation``.
        rule: how a patient's slices are combined; see :func:`patient_predictions`.

    Returns:
        ``classes``; ``slice``: ``metrics`` (see :func:`raredistill.metrics.classification_metrics`), ``confusion`` ``(K, K)``, ``samples``,
        ``reasons`` (why a metric has no value, one sentence each); ``patient``: the same with its own ``classes``, or None and then
        ``patient_reason``.

    Raises:
        DataError: no rows of that part and checkpoint.
    """
    return _both_levels(select(predictions, split, checkpoint), rule)


def metrics_rows(
    predictions: Predictions, checkpoint: str = "best", split: str = "test", rule: Rule = "mean"
) -> dict[str, list[dict[str, Any]]]:
    """The metrics as rows for printing.

    Args:
        predictions: a complete table.
        checkpoint: ``best`` or ``last``.
        split: ``test`` or ``validation``.
        rule: how a patient's slices are combined.

    Returns:
        ``by slice`` and, if it differs, ``by patient``: one row per class (class, precision, recall, f1, auroc, auprc) and their mean,
        ``macro``; ``overall``: one row per level (level, macro_f1, balanced_accuracy, g_mean, mcc); ``without a value``: one row per
        reason, if a metric has no value.

    Raises:
        DataError: no rows of that part and checkpoint.
    """
    result = evaluate(predictions, checkpoint, split, rule)
    levels = {"slice": (result["slice"]["metrics"], result["classes"])}
    if result["patient"]:
        levels["patient"] = (result["patient"]["metrics"], result["patient"]["classes"])
    rows = {f"by {level}": _class_rows(metrics, classes) for level, (metrics, classes) in levels.items()}
    overall = [{"level": level, **{name: metrics[name] for name in _OVERALL}} for level, (metrics, _) in levels.items()]
    reasons = [{"level": level, "reason": reason} for level in levels for reason in result[level]["reasons"]]
    if not result["patient"]:
        reasons.append({"level": "patient", "reason": result["patient_reason"]})
    return {**rows, "overall": overall, **({"without a value": reasons} if reasons else {})}


def _class_rows(metrics: dict[str, Any], classes: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = [{"class": name, **{metric: float(metrics[metric][k]) for metric in _ROW_METRICS}} for k, name in enumerate(classes)]
    return [*rows, {"class": "macro", **{metric: _mean_of_present(metrics[metric]) for metric in _ROW_METRICS}}]


def _mean_of_present(values: NDArray[np.float64]) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")


def _both_levels(predictions: Predictions, rule: Rule) -> dict[str, Any]:
    by_slice = _level(predictions.labels(), predictions.probabilities(), predictions.classes, predictions.hard)
    result: dict[str, Any] = {"classes": predictions.classes, "slice": by_slice, "patient": None}
    if reason := _no_patient_level(predictions):
        return {**result, "patient_reason": reason}
    patients = by_patient(predictions, rule)
    level = _level(patients.labels(), patients.probabilities(), patients.classes, predictions.hard)
    return {**result, "patient": {**level, "classes": patients.classes}}


def _level(label: NDArray[np.int64], probability: NDArray[np.float64], classes: tuple[str, ...], hard: bool) -> dict[str, Any]:
    confusion = confusion_matrix(label, probability.argmax(axis=1), len(classes))
    metrics = classification_metrics(label, probability)
    if hard:
        metrics |= {name: np.full_like(metrics[name], np.nan) for name in ("auroc", "auprc")} | dict.fromkeys(
            ("ece", "brier"), float("nan")
        )
    return {"metrics": metrics, "confusion": confusion, "samples": len(label), "reasons": _reasons(label, classes, hard)}


def _reasons(label: NDArray[np.int64], classes: tuple[str, ...], hard: bool) -> list[str]:
    counts = np.bincount(label, minlength=len(classes))
    absent = [f"all metrics of {name}: it has no sample here" for name, count in zip(classes, counts, strict=True) if count == 0]
    alone = [
        f"auroc and specificity of {name}: nothing else is here" for name, count in zip(classes, counts, strict=True) if count == len(label)
    ]
    known = ["auroc, auprc, ece, brier: only hard labels are known"] if hard else []
    return [*absent, *(alone if len(label) else []), *known]


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
