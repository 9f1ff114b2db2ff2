"""A study's folder read once: its description, and the predictions and epochs of every finished run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from raredistill import predictions
from raredistill.errors import DataError
from raredistill.files import read_json
from raredistill.predictions import Predictions


@dataclass(frozen=True)
class Results:
    """What a report is made of: ``study`` is study.json, ``tables`` and ``epochs`` are by run id, finished runs only."""

    study: dict[str, Any]
    tables: dict[str, Predictions]
    epochs: dict[str, list[dict[str, Any]]]

    @property
    def runs(self) -> list[dict[str, Any]]:
        """Records of the finished runs."""
        return [run for run in self.study["runs"] if run["status"] == "done" and run["id"] in self.tables]

    @property
    def entries(self) -> list[str]:
        """Names of the grid's lines, in the order of the study, finished or not."""
        return list(dict.fromkeys(run["name"] for run in self.study["runs"]))

    def of(self, entry: str) -> list[dict[str, Any]]:
        """Finished runs of one entry."""
        return [run for run in self.runs if run["name"] == entry]

    def pooled(self, entry: str, cells: set[tuple[int, int, int]] | None = None) -> Predictions | None:
        """Test predictions (best checkpoint) of an entry over the given (repeat, fold, seed) cells, all by default; None without any."""
        chosen = [self.tables[run["id"]] for run in self.of(entry) if cells is None or cell(run) in cells]
        if not chosen:
            return None
        parts = [each.part("test", "best") for each in chosen]
        table = pd.concat([part.table for part in parts], ignore_index=True)
        return Predictions(table, parts[0].classes, parts[0].background)


def cell(run: dict[str, Any]) -> tuple[int, int, int]:
    """The (repeat, fold, seed) that a run shares with the runs it may be compared with."""
    return run["repeat"], run["fold"], run["seed"]


def read_results(study: Path) -> Results:
    """Read a study's folder, also an unfinished one.

    Raises:
        DataError: there is no study.json, or a finished run is damaged.
    """
    if not (study / "study.json").is_file():
        raise DataError(f"{study}: no study.json there; name the folder given to raredistill study --out")
    description = read_json(study / "study.json")
    # Their test sides are training patients of the study's folds: teachers are means, not results.
    description["runs"] = [run for run in description["runs"] if run["kind"] != "cross-fitted teacher"]
    tables, epochs = {}, {}
    for run in description["runs"]:
        folder = study / "runs" / run["id"]
        if run["status"] == "done" and folder.is_dir():
            tables[run["id"]] = predictions.read(folder / "predictions.parquet")
            epochs[run["id"]] = [json.loads(line) for line in (folder / "epochs.jsonl").read_text(encoding="utf-8").splitlines()]
    return Results(description, tables, epochs)
