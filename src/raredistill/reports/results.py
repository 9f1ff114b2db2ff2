"""The content of a study's folder, read once: description, and predictions and epochs of every finished run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from raredistill import predictions
from raredistill.checkpoint import read_promise
from raredistill.evaluation.levels import by_patient, has_patients
from raredistill.predictions import Predictions
from raredistill.reports.folder import check_places, patients_of_sides, read_results_of
from raredistill.runs.layout import StudyFolder
from raredistill.runs.record import Cell, RunRecord, StudyRecord, read_study


@dataclass(frozen=True)
class Results:
    """The input of a report: ``study`` is study.json; ``tables`` and ``epochs`` are by run id, finished runs only.

    ``sizes`` are patients in a training and in a test side, means over splits; None if the splits are not available. ``priors`` are the
    class priors that runs' logits carry, by run id, if they are known.
    """

    study: StudyRecord
    tables: dict[str, Predictions]
    epochs: dict[str, list[dict[str, Any]]]
    sizes: tuple[float, float] | None
    priors: dict[str, tuple[float, ...]]

    @property
    def runs(self) -> list[RunRecord]:
        """Records of the finished runs."""
        return [run for run in self.study.runs if run.status == "done" and run.id in self.tables]

    @property
    def entries(self) -> list[str]:
        """Names of the entries, in the order of the study, finished or not."""
        return list(dict.fromkeys(run.name for run in self.study.runs))

    def of(self, entry: str) -> list[RunRecord]:
        """Finished runs of one entry."""
        return [run for run in self.runs if run.name == entry]

    def first(self, entry: str) -> RunRecord:
        """The record of an entry's first run, finished or not, for properties shared by all its runs."""
        return next(run for run in self.study.runs if run.name == entry)

    def settings(self, entry: str) -> dict[str, Any] | None:
        """An entry's training settings that differ from the defaults; None if the configuration does not contain the entry."""
        config = self.study.config
        own = [run.get("training", {}) for run in config.get("runs", []) if run.get("name") == entry]
        return {**config.get("training", {}), **own[0]} if own else None

    def pooled(self, entry: str, cells: set[Cell] | None = None, split: str = "test") -> Predictions | None:
        """Predictions (best checkpoint) of an entry over the given (repeat, fold, seed) cells, all by default; None without any."""
        tables = [self.tables[run.id] for run in self.of(entry) if cells is None or run.cell in cells]
        parts = [table.part(split) for table in tables if (table.table["split"] == split).any()]
        if not parts:
            return None
        return predictions.concatenate(parts)

    def whole(self, entry: str) -> Predictions | None:
        """All parts and checkpoints of an entry's finished runs; None without any."""
        tables = [self.tables[run.id] for run in self.of(entry)]
        return predictions.concatenate(tables) if tables else None

    def expected(self, entry: str, control: str) -> set[Cell]:
        """The (repeat, fold, seed) that two entries should have finished: all folds of each repeat and seed that either has started."""
        begun = {(run.repeat, run.seed) for name in (entry, control) for run in self.of(name)}
        return {run.cell for run in self.study.runs if run.name == entry and (run.repeat, run.seed) in begun}

    @cached_property
    def levels(self) -> list[tuple[str, str, Predictions]]:
        """Entry, level (``slice``, and ``patient`` if it exists) and the pooled predictions of its test parts at that level."""
        found = []
        for entry in self.entries:
            if (table := self.pooled(entry)) is not None:
                found.append((entry, "slice", table))
                found += [(entry, "patient", by_patient(table))] if has_patients(table) else []
        return found

    def cells(self, entry: str) -> set[Cell]:
        """The (repeat, fold, seed) of an entry's finished runs."""
        return {run.cell for run in self.of(entry)}


def read_results(study: Path) -> Results:
    """Read a study's folder, finished or not.

    Raises:
        DataError: study.json is missing or invalid, or a finished run is damaged or belongs elsewhere.
        CheckpointError: the weights of a finished run are not a checkpoint.
    """
    folder = StudyFolder(study)
    description = read_study(folder.description)
    check_places(folder, description)
    # The test sides of cross-fitted teachers are training patients of the study's folds, so they are not results.
    described = replace(description, runs=[run for run in description.runs if run.kind != "cross-fitted teacher"])
    tables, epochs, priors = {}, {}, {}
    for run in described.runs:
        own = folder.run(run.id)
        if run.status == "done" and own.path.is_dir():
            tables[run.id], epochs[run.id] = read_results_of(own, run, description.cohort.classes)
            if prior := read_promise(own.weights("best")).prior:
                priors[run.id] = prior
    return Results(described, tables, epochs, _sizes(folder.splits), priors)


def _sizes(folder: Path) -> tuple[float, float] | None:
    sides = [patients_of_sides(path) for path in sorted(folder.glob("*.json"))]
    if not sides:
        return None
    return mean(len(side["train"]) for side in sides), mean(len(side["test"]) for side in sides)
