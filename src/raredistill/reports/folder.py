"""A study's folder as a report may find it: what its files must hold before anything is computed from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from raredistill import predictions
from raredistill.errors import DataError
from raredistill.files import read_json
from raredistill.predictions import Predictions
from raredistill.runs.drafts import checked_record
from raredistill.runs.layout import RunFolder
from raredistill.runs.record import RunRecord

READ = ("predictions.parquet", "epochs.jsonl", "best.safetensors")
"""Results that a report reads; the last epoch's weights are not among them."""
SAME = ("id", "kind", "model", "teacher", "repeat", "fold", "seed")
"""Fields of a run's record that ``study.json`` repeats."""


class _Checked(BaseModel):
    model_config = ConfigDict(extra="allow")  # a later version may say more


class _Part(_Checked):
    loss: float | None
    macro_f1: float | None
    f1: dict[str, float | None]


class _Epoch(_Checked):
    train: _Part
    validation: _Part | None = None


def _validated(adapter: TypeAdapter[Any], value: Any, path: Path) -> None:
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise DataError(f"{path}: {where}: {first['msg'].lower()} (it is {first['input']!r:.60}); run raredistill study again") from None


def read_results_of(folder: RunFolder, run: RunRecord, classes: tuple[str, ...]) -> tuple[Predictions, list[dict[str, Any]]]:
    """Predictions and epochs of a finished run, after its record, its files' hashes and its name were compared.

    Args:
        folder: of the run.
        run: its record in ``study.json``.
        classes: of the study's cohort.

    Raises:
        DataError: a file is missing, changed, or another run's.
    """
    record = checked_record(folder, READ)
    if differing := [key for key in SAME if getattr(record, key) != getattr(run, key)]:
        raise DataError(f"{folder.record}: its {', '.join(differing)} is not what study.json says; run raredistill study again")
    table = predictions.read(folder.predictions)
    refuse_foreign(table, record, folder.predictions)
    if tuple(table.classes) != tuple(classes):
        raise DataError(f"{folder.predictions}: its classes are {list(table.classes)}, those of the study {list(classes)}")
    return table, _epochs(folder.epochs)


def refuse_foreign(table: Predictions, record: RunRecord, path: Path) -> None:
    """Refuse predictions that name another run, fold, repeat or seed than the record beside them.

    Raises:
        DataError: they do.
    """
    for column, key in (("run", "id"), ("repeat", "repeat"), ("fold", "fold"), ("seed", "seed")):
        if others := sorted(set(table.table[column]) - {getattr(record, key)}):
            raise DataError(
                f"{path}: holds predictions of the {column} {others[0]!r:.80}, but its record is that of {getattr(record, key)!r:.80}"
            )


def _epochs(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: its lines are not JSON ({error}); delete the run's folder and run raredistill study again") from None
    _validated(TypeAdapter(list[_Epoch]), lines, path)
    return lines


def patients_of_sides(path: Path) -> dict[str, list[str]]:
    """Side -> patients of a split file.

    Raises:
        DataError: it holds something else.
    """
    found = read_json(path)
    _validated(TypeAdapter(dict[str, Any]), found, path)
    _validated(TypeAdapter(dict[Literal["train", "validation", "test"], list[str]]), found.get("patients"), path)
    if missing := {"train", "test"} - set(found["patients"]):
        raise DataError(f"{path}: lacks the patients of {', '.join(sorted(missing))}; run raredistill study again")
    return dict(found["patients"])
