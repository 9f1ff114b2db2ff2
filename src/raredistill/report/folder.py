"""A study's folder as a report may find it: what its files must hold before anything is computed from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval, MinLen
from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError

from raredistill import predictions
from raredistill.errors import DataError
from raredistill.files import inside, read_json
from raredistill.names import checked, fault_of_part, shown
from raredistill.predictions import Predictions
from raredistill.study.drafts import RECORD, checked_record

READ = ("predictions.parquet", "epochs.jsonl", "best.safetensors")
"""Results that a report reads; the last epoch's weights are not among them."""
SAME = ("id", "kind", "model", "teacher", "repeat", "fold", "seed")
"""Entries of a run's record that ``study.json`` repeats."""

Name = Annotated[str, AfterValidator(checked)]
Count = Annotated[int, Interval(ge=0, le=2**62)]
Spent = Annotated[float, Interval(ge=0, lt=float("inf"))]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="allow")  # a later version may say more


class _Counted(_Checked):
    slices: Count
    patients: Count


class _Cohort(_Checked):
    name: str
    hash: str
    classes: Annotated[tuple[Name, ...], MinLen(2)]
    background: str | None
    channels: tuple[Name, ...]
    samples: Count
    patients: Count
    provenance: dict[str, Any]
    counts: list[_Counted]


class _Run(_Checked):
    id: Name
    name: Name
    kind: str
    direction: str
    model: str
    loss: str
    method: str
    teacher: str
    teacher_name: str
    external_teacher: bool
    channels: tuple[Name, ...]
    repeat: Count
    fold: Count
    seed: int
    status: Literal["waiting", "done", "failed"]
    error: str
    parameters: Count
    flops: Count
    bytes: Count
    network: str = ""
    seconds: Spent = 0
    latency_ms: Spent = 0
    epochs: Count = 0
    best_epoch: int = 0
    micro_batch: Count = 0
    remarks: list[str] = []
    teacher_cache: dict[str, Any] | None = None
    made_with: dict[str, dict[str, Any]] = {}


class _Study(_Checked):
    name: str
    command: str
    config: dict[str, Any]
    cohort: _Cohort
    protocol: str
    rare: Name
    split_table: list[_Counted]
    splits: list[dict[str, Any]]
    versions: dict[str, Any]
    machine: dict[str, Any]
    runs: Annotated[list[_Run], MinLen(1)]


class _Part(_Checked):
    loss: float | None
    macro_f1: float | None
    f1: dict[str, float | None]


class _Epoch(_Checked):
    train: _Part
    validation: _Part | None = None


def read_description(study: Path) -> dict[str, Any]:
    """What ``study.json`` says, as it stands there.

    Raises:
        DataError: it is missing, or holds something else than a study.
    """
    path = study / "study.json"
    if not path.is_file():
        raise DataError(f"{study}: no study.json there; name the folder given to raredistill study --out")
    found: dict[str, Any] = read_json(path)
    _validated(TypeAdapter(_Study), found, path)
    classes = found["cohort"]["classes"]
    if found["rare"] not in classes or found["cohort"]["background"] not in (None, *classes):
        raise DataError(f"{path}: its rare class or its background is none of the classes {classes}; run raredistill study again")
    for run in found["runs"]:
        if (said := fault_of_part(run["id"])) or not inside(study / "runs" / run["id"], study):
            raise DataError(f"{path}: the run {shown(run['id'])!r:.80} {said or 'leads out of the study'}; run raredistill study again")
    return found


def _validated(adapter: TypeAdapter[Any], value: Any, path: Path) -> None:
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise DataError(f"{path}: {where}: {first['msg'].lower()} (it is {first['input']!r:.60}); run raredistill study again") from None


def read_run(folder: Path, run: dict[str, Any], classes: list[str]) -> tuple[Predictions, list[dict[str, Any]]]:
    """Predictions and epochs of a finished run, after its record, its files' hashes and its name were compared.

    Args:
        folder: of the run.
        run: its record in ``study.json``.
        classes: of the study's cohort.

    Raises:
        DataError: a file is missing, changed, or another run's.
    """
    record = checked_record(folder, READ)
    if differing := [key for key in SAME if record.get(key) != run[key]]:
        raise DataError(f"{folder / RECORD}: its {', '.join(differing)} is not what study.json says; run raredistill study again")
    table = predictions.read(folder / READ[0])
    refuse_foreign(table, record, folder / READ[0])
    if list(table.classes) != classes:
        raise DataError(f"{folder / READ[0]}: its classes are {list(table.classes)}, those of the study {classes}")
    return table, _epochs(folder / READ[1], set(classes))


def refuse_foreign(table: Predictions, record: dict[str, Any], path: Path) -> None:
    """Refuse predictions that name another run, fold, repeat or seed than the record beside them.

    Raises:
        DataError: they do.
    """
    for column, key in (("run", "id"), ("repeat", "repeat"), ("fold", "fold"), ("seed", "seed")):
        if others := sorted(set(table.table[column]) - {record[key]}):
            raise DataError(f"{path}: holds predictions of the {column} {others[0]!r:.80}, but its record is that of {record[key]!r:.80}")


def _epochs(path: Path, classes: set[str]) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: its lines are not JSON ({error}); delete the run's folder and run raredistill study again") from None
    _validated(TypeAdapter(list[_Epoch]), lines, path)
    if any(set(line[part]["f1"]) != classes for line in lines for part in ("train", "validation") if line.get(part)):
        raise DataError(f"{path}: its classes are not those of the study; delete the run's folder and run raredistill study again")
    return lines


def patients_of_sides(path: Path) -> dict[str, list[str]]:
    """Side -> patients of a split file.

    Raises:
        DataError: it holds something else.
    """
    found = read_json(path)
    _validated(TypeAdapter(dict[str, Any]), found, path)
    _validated(TypeAdapter(dict[Literal["train", "validation", "test"], list[str]]), found.get("patients"), path)
    if missing := [side for side in ("train", "test") if not found["patients"].get(side)]:
        raise DataError(f"{path}: lacks the patients of {', '.join(missing)}; run raredistill study again")
    return dict(found["patients"])
