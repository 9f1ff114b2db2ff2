"""Checks of a study's folder: the required content of its files, before anything is computed from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MinLen
from pydantic import TypeAdapter, ValidationError

from raredistill import predictions
from raredistill.errors import DataError
from raredistill.files import inside, read_json
from raredistill.names import fault_of_part, shown
from raredistill.predictions import Predictions
from raredistill.runs.drafts import checked_record
from raredistill.runs.layout import RunFolder, StudyFolder
from raredistill.runs.record import Count, RunRecord, StudyRecord

READ = ("predictions.parquet", "epochs.jsonl", "best.safetensors")
"""Results that a report reads (without the weights of the last epoch)."""
SAME = ("id", "kind", "model", "teacher", "repeat", "fold", "seed")
"""Fields of a run's record that ``study.json`` repeats."""


@dataclass(frozen=True)
class _Counted:
    slices: Count
    patients: Count


@dataclass(frozen=True)
class _Part:
    loss: float | None
    macro_f1: float | None
    f1: dict[str, float | None]


@dataclass(frozen=True)
class _Epoch:
    train: _Part
    validation: _Part | None = None


@dataclass(frozen=True)
class _Sides:
    train: Annotated[tuple[str, ...], MinLen(1)]
    test: Annotated[tuple[str, ...], MinLen(1)]
    validation: tuple[str, ...] = ()


@dataclass(frozen=True)
class _SplitFile:
    patients: _Sides


def check_places(folder: StudyFolder, study: StudyRecord) -> None:
    """Refuse a description whose runs lead out of the study's folder, or whose classes are inconsistent.

    Raises:
        DataError: a run leads out of the folder, or the classes are inconsistent.
    """
    path, classes = folder.description, study.cohort.classes
    _validated(TypeAdapter(list[_Counted]), [*study.cohort.counts, *study.split_table], path)
    if study.rare not in classes or study.cohort.background not in (None, *classes):
        raise DataError(f"{path}: its rare class or its background is not among the classes {list(classes)}; run raredistill study again")
    for run in study.runs:
        if (said := fault_of_part(run.id)) or not inside(folder.run(run.id).path, folder.path):
            raise DataError(f"{path}: the run {shown(run.id)!r:.80} {said or 'leads out of the study'}; run raredistill study again")


def _validated(adapter: TypeAdapter[Any], value: Any, path: Path) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise DataError(f"{path}: {where}: {first['msg'].lower()} (it is {first['input']!r:.60}); run raredistill study again") from None


def read_results_of(folder: RunFolder, run: RunRecord, classes: Sequence[str]) -> tuple[Predictions, list[dict[str, Any]]]:
    """Predictions and epochs of a finished run, after checking its record, the hashes of its files and its name.

    Args:
        folder: of the run.
        run: its record in ``study.json``.
        classes: of the study's cohort.

    Raises:
        DataError: a file is missing, changed, or belongs to another run.
    """
    record = checked_record(folder, READ)
    if differing := [key for key in SAME if getattr(record, key) != getattr(run, key)]:
        raise DataError(f"{folder.record}: its {', '.join(differing)} differs from study.json; run raredistill study again")
    table = predictions.read(folder.predictions)
    refuse_foreign(table, record, folder.predictions)
    if table.classes != tuple(classes):
        raise DataError(f"{folder.predictions}: its classes are {list(table.classes)}, those of the study {list(classes)}")
    return table, _epochs(folder.epochs, set(classes))


def refuse_foreign(table: Predictions, record: RunRecord, path: Path) -> None:
    """Refuse predictions whose run, fold, repeat or seed differs from the record next to them.

    Raises:
        DataError: one of them differs.
    """
    for column, own in (("run", record.id), ("repeat", record.repeat), ("fold", record.fold), ("seed", record.seed)):
        if others := sorted(set(table.table[column]) - {own}):
            raise DataError(f"{path}: contains predictions of the {column} {others[0]!r:.80}, but its record is that of {own!r:.80}")


def _epochs(path: Path, classes: set[str]) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: its lines are not JSON ({error}); delete the run's folder and run raredistill study again") from None
    _validated(TypeAdapter(list[_Epoch]), lines, path)
    if any(set(line[part]["f1"]) != classes for line in lines for part in ("train", "validation") if line.get(part)):
        raise DataError(f"{path}: its classes are not those of the study; delete the run's folder and run raredistill study again")
    return lines


def patients_of_sides(path: Path) -> dict[str, tuple[str, ...]]:
    """Side -> patients of a split file.

    Raises:
        DataError: it contains something else.
    """
    sides: _Sides = _validated(TypeAdapter(_SplitFile), read_json(path), path).patients
    return {"train": sides.train, "validation": sides.validation, "test": sides.test}
