"""A study's results on one entry, as tables for its model card: held-out patients only."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import softmax

from raredistill.errors import RareDistillError
from raredistill.evaluation.bootstrap import patient_intervals
from raredistill.evaluation.levels import by_patient, has_patients
from raredistill.evaluation.thresholds import at_threshold
from raredistill.metrics import classification_metrics, ece
from raredistill.predictions import Predictions, concatenate
from raredistill.runs.record import StudyRecord
from raredistill.ship.find import Found
from raredistill.ship.predictor import part_of
from raredistill.ship.terms import Rule

RESAMPLES = 1000


def held_out(found: Found, study: StudyRecord, checkpoint: str) -> Predictions | None:
    """Test predictions of the runs behind a model; None without a test part."""
    tables = part_of(found, study, "test", checkpoint)
    return concatenate(tables) if tables else None


def levels(table: Predictions) -> list[tuple[str, Predictions]]:
    """The table by sample and, if there is a separate patient level, by patient."""
    return [("sample", table), *([("patient", by_patient(table))] if has_patients(table) else [])]


def scores(table: Predictions) -> list[dict[str, Any]]:
    """Metrics with 95 % intervals over patients."""
    rows = []
    for level, part in levels(table):
        names = ["macro_f1", "balanced_accuracy", *(f"{metric}:{name}" for name in part.classes for metric in ("recall", "f1"))]
        found = patient_intervals(part, names, resamples=RESAMPLES, intervals=("percentile",))
        for name, (estimate, interval) in zip(names, found, strict=True):
            low, high = interval["percentile"]
            rows.append({"level": level, "metric": name, "estimate": estimate, "low": low, "high": high})
    return rows


def calibration(table: Predictions, rule: Rule) -> dict[str, float]:
    """Expected calibration error of the samples before and after the temperature."""
    after = table.with_logits(table.logits() / rule.temperatures[0])
    return {"before": ece(table.labels(), table.probabilities()), "after": ece(table.labels(), after.probabilities())}


def operating_points(table: Predictions, rule: Rule) -> list[dict[str, Any]]:
    """Performance of each stored threshold on held-out patients."""
    calibrated, rows = table.with_logits(table.logits() / rule.temperatures[0]), []
    for level, part in levels(calibrated):
        for wanted, threshold in (rule.samples if level == "sample" else rule.patients).items():
            place = part.classes.index(rule.positive)
            given = at_threshold(part.labels() == place, part.probabilities()[:, place], threshold)
            rows.append({"level": level, "wanted": wanted, "threshold": threshold, **given})
    return rows


def by_class(labels: np.ndarray, logits: np.ndarray, classes: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Recall and F1 of each class by the most probable class."""
    metrics = classification_metrics(labels, softmax(logits, axis=1))
    return {name: {key: float(metrics[key][place]) for key in ("recall", "f1")} for place, name in enumerate(classes)}


def verdict(study: StudyRecord, found: Found) -> str:
    """The study's sentence on the entry, or a note that there is none."""
    from raredistill.reports.pairs import make_pairs
    from raredistill.reports.results import read_results
    from raredistill.reports.verdicts import verdicts

    try:
        results = read_results(found.path)
        sentences = [each["sentence"] for each in verdicts(make_pairs(results), study.rare) if each["entry"] == found.entry]
    except RareDistillError as error:
        return f"The study cannot judge it: {error}"
    return " ".join(sentences) or "It was trained without a teacher, so there is no verdict on distillation."
