"""The table that ``raredistill predict`` writes: class, probabilities and decision of each sample and each patient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raredistill.errors import ConfigError, DataError
from raredistill.evaluation.levels import patient_probabilities
from raredistill.files import atomic, write_json
from raredistill.ship.inputs import Block, open_input
from raredistill.ship.predictor import Predictor
from raredistill.ship.terms import Terms

SUFFIXES = (".csv", ".parquet", ".json")


@dataclass(frozen=True)
class Predicted:
    """The result of a prediction.

    Attributes:
        samples: one row per sample: ``sample, patient, patient_label, split, label, slice``, then ``predicted``, ``decision`` and
            ``p_<class>`` of each class; ``split`` is ``train`` or ``validation`` where the model has seen the patient, else ``test``.
        patients: the same by patient, without the background class; empty where each sample is its own patient.
        terms: of the model.
        said: which model was used.
    """

    samples: pd.DataFrame
    patients: pd.DataFrame
    terms: Terms
    said: str

    def sentences(self) -> list[str]:
        """Notes for interpreting the numbers."""
        rule, seen = self.terms.rule, self.samples[self.samples["split"] != "test"]
        threshold = rule.threshold(patients=False)
        point = "decision: the most probable class" if threshold is None else (
            f"decision: {rule.positive} from a probability of {threshold:.4g} on, for a sensitivity of {rule.sensitivity:g}"
        )  # fmt: skip
        told = [f"model: {self.said}", f"{point} ({rule.basis})"]
        for side, rows in seen.groupby("split"):
            verb = "trained" if side == "train" else "validated"
            told.append(
                f"{len(rows)} samples of {rows['patient'].nunique()} patients {verb} this model (split={side}): they do not show how "
                "good it is, and raredistill evaluate leaves them out"
            )
        return told


def predict(predictor: Predictor, source: Path, out: Path) -> Predicted:
    """Predict everything in ``source`` and write ``out``; by patient, too, in ``NAME.patients.SUFFIX`` beside it (JSON holds both).

    Raises:
        ConfigError: ``out`` is a folder, or has another suffix than ``.csv``, ``.parquet`` or ``.json``.
        RareDistillError: as :func:`raredistill.ship.inputs.open_input`.
    """
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name a file")
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{out}: the suffix decides what is written; use {', '.join(SUFFIXES)}")
    found = tabulate(predictor, open_input(source, predictor.terms))
    _write(found, out)
    return found


def tabulate(predictor: Predictor, blocks: Iterable[Block]) -> Predicted:
    """Predict blocks of samples."""
    rows: list[dict[str, Any]] = []
    parts = []
    for block in blocks:
        rows += block.rows
        parts.append(predictor(block.pixels))
    if not rows:
        raise DataError("there is no sample to predict")
    terms, probability = predictor.terms, np.concatenate(parts)
    head = pd.DataFrame(rows)[["sample", "patient", "patient_label", "label", "slice"]].astype({"sample": str, "patient": str})
    head["split"] = [terms.side(patient) for patient in head["patient"]]
    samples = _with_answers(head, probability, terms.classes, terms, patients=False)
    return Predicted(samples, _by_patient(head, probability, terms), terms, predictor.found.said)


def _with_answers(head: pd.DataFrame, probability: np.ndarray, classes: tuple[str, ...], terms: Terms, *, patients: bool) -> pd.DataFrame:
    answers: dict[str, Any] = {
        "predicted": [classes[place] for place in probability.argmax(axis=1)],
        "decision": terms.rule.decide(probability, classes, patients=patients),
        **{f"p_{name}": probability[:, place] for place, name in enumerate(classes)},
    }
    return head.assign(**answers)


def _by_patient(head: pd.DataFrame, probability: np.ndarray, terms: Terms) -> pd.DataFrame:
    classes = tuple(name for name in terms.classes if name != terms.background)
    if len(classes) < 2 or head["patient"].is_unique:
        return pd.DataFrame()
    kept = [terms.classes.index(name) for name in classes]
    codes, names = pd.factorize(head["patient"], sort=True)
    whole = patient_probabilities(codes.astype(np.int64), head["sample"], probability[:, kept])
    first = head.drop_duplicates("patient").set_index("patient").loc[list(names)]
    counts = head["patient"].value_counts().loc[list(names)].to_numpy()
    table = first.reset_index()[["patient", "patient_label", "split"]].assign(samples=counts)
    return _with_answers(table, whole, classes, terms, patients=True)


def _write(found: Predicted, out: Path) -> None:
    samples = found.samples if (found.samples["label"] != "").any() else found.samples.drop(columns=["label", "patient_label"])
    if out.suffix.lower() == ".json":
        record = {"model": found.said, "classes": list(found.terms.classes), "rule": found.terms.rule.basis}
        write_json(out, {**record, "samples": samples.to_dict("records"), "patients": found.patients.to_dict("records")})
        return
    _write_table(samples, out)
    if len(found.patients):
        _write_table(found.patients, beside(out))


def beside(out: Path) -> Path:
    """Path of the patients' table."""
    return out.with_name(f"{out.stem}.patients{out.suffix}")


def _write_table(table: pd.DataFrame, out: Path) -> None:
    with atomic(out) as temporary:
        if out.suffix.lower() == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_parquet(temporary, index=False)
