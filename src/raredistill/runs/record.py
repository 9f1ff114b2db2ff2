"""Typed records of a run and of a study, written by the study and read by the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval, MinLen
from pydantic import TypeAdapter, ValidationError

from raredistill.cohort.store import Cohort
from raredistill.declared import Name
from raredistill.errors import DataError
from raredistill.files import read_json
from raredistill.models import facts
from raredistill.runs.entry import Entry, External
from raredistill.runs.run import Run

Cell = tuple[int, int, int]
Status = Literal["waiting", "done", "failed"]
Count = Annotated[int, Interval(ge=0, le=2**62)]
Spent = Annotated[float, Interval(ge=0, lt=float("inf"))]


@dataclass(frozen=True)
class RunRecord:
    """The record of one run.

    Attributes:
        id: the run's name.
        name: name of its entry.
        kind: ``baseline``, ``distilled`` or ``cross-fitted teacher``.
        direction: ``large-to-small``, ``small-to-large`` or ``self``, by parameters; empty without a teacher from this study.
        model: name of the network.
        loss: recipe of the supervised loss; the fair control is a baseline with the same recipe.
        method: the distiller; empty without a teacher.
        teacher: id of the (first) teacher's run; empty without one.
        teacher_name: name of the teacher in reports.
        external_teacher: whether the statement that the teacher has not seen the patients is the user's.
        channels: channels of the input.
        repeat: repeat of the split; with ``fold`` and ``seed`` its cell.
        fold: see ``repeat``.
        seed: see ``repeat``.
        parameters: number of parameters of the network.
        flops: floating-point operations per image.
        bytes: size of the parameters in single precision.
        network: head, dropout and initial weights, in words; empty in records of older versions.
        status: ``waiting``, ``done`` or ``failed``.
        error: why it failed.
        seconds: duration, without the teacher cache.
        best_epoch: epoch of the checkpoint ``best``.
        epochs: number of epochs trained.
        micro_batch: samples per forward pass; 0 if each step took its whole batch at once.
        remarks: notes for the reader of the report.
        teacher_cache: ``views``, how many of them the run ``computed``, in how many ``seconds``; empty without a cache.
        latency_ms: milliseconds per image; None in records of older versions.
        latency_on: device on which the latency was measured.
        stage: second stage; empty without one.
        stage_tau: the tau chosen for each checkpoint.
        made_with: versions, source files and teachers' files.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "ignore"}

    id: Name
    name: Name
    kind: Literal["baseline", "distilled", "cross-fitted teacher"]
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
    parameters: Count
    flops: Count
    bytes: Count
    network: str = ""
    status: Status = "waiting"
    error: str = ""
    seconds: Spent | None = None
    best_epoch: int = -1
    epochs: Count = 0
    micro_batch: Count = 0
    remarks: tuple[str, ...] = ()
    teacher_cache: dict[str, float] = field(default_factory=dict)
    latency_ms: Spent | None = None
    latency_on: str = ""
    stage: str = ""
    stage_tau: dict[str, float | None] = field(default_factory=dict)
    made_with: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def cell(self) -> Cell:
        """The (repeat, fold, seed) that it shares with the runs it may be compared with."""
        return self.repeat, self.fold, self.seed

    def failed(self, error: str) -> RunRecord:
        """A copy of the record with status ``failed`` and an error."""
        return replace(self, status="failed", error=error)

    def as_json(self) -> dict[str, Any]:
        """Convert to plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class CohortRecord:
    """The cohort of a study; see :class:`raredistill.cohort.store.Cohort`.

    Attributes:
        name: name of the cohort.
        hash: hash of its content.
        classes: classes in the order of the logits.
        background: the class that is not a patient's label.
        channels: its channels.
        samples: number of samples.
        patients: number of units; see ``patients_known``.
        size: height and width in pixels.
        provenance: its source and how it was prepared.
        counts: samples and patients of each class.
    """

    name: str
    hash: str
    classes: Annotated[tuple[Name, ...], MinLen(2)]
    background: str | None
    channels: tuple[Name, ...]
    samples: Count
    patients: Count
    size: tuple[int, ...]
    provenance: dict[str, Any]
    counts: list[dict[str, Any]]

    @property
    def patients_known(self) -> bool:
        """Whether samples are grouped by patient; otherwise each image is a unit of its own."""
        return self.patients != self.samples

    @property
    def generated(self) -> bool:
        """Whether the cohort comes from ``raredistill phantom``."""
        return bool(self.provenance.get("settings", {}).get("generated"))


@dataclass(frozen=True)
class StudyRecord:
    """The content of ``study.json``.

    Attributes:
        name: name of the study.
        command: command that started it.
        config: configuration as plain values.
        cohort: cohort of all runs.
        protocol: protocol of the splits.
        rare: the rare class.
        split_table: slices and patients by split, side and class.
        splits: repeat, fold and hash of each.
        versions: of Python and the libraries.
        machine: description of the machine.
        runs: one record per run, in the order of the plan.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "ignore"}

    name: str
    command: str
    config: dict[str, Any]
    cohort: CohortRecord
    protocol: str
    rare: Name
    split_table: list[dict[str, Any]]
    splits: list[dict[str, Any]]
    versions: dict[str, str]
    machine: dict[str, Any]
    runs: Annotated[list[RunRecord], MinLen(1)]

    def as_json(self) -> dict[str, Any]:
        """Convert to plain values for JSON."""
        return asdict(self)


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def read_run(record: Mapping[str, Any], path: Path) -> RunRecord:
    """Read a run's record from plain values; ``path`` is for messages.

    Raises:
        DataError: a field is missing or has a wrong type.
    """
    found: RunRecord = _read(RunRecord, record, path)
    return found


def read_study(path: Path) -> StudyRecord:
    """Read ``study.json``.

    Raises:
        DataError: the file is missing, or is not a study's.
    """
    if not path.is_file():
        raise DataError(f"{path.parent}: no {path.name} there; name the folder given to raredistill study --out")
    found: StudyRecord = _read(StudyRecord, read_json(path), path)
    return found


def _read(kind: type, value: Any, path: Path) -> Any:
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise DataError(f"{path}: {where}: {first['msg'].lower()} (it is {first['input']!r:.60}); run raredistill study again") from None


def describe(run: Run, cohort: Cohort) -> RunRecord:
    """Create the record of a run before it starts."""
    entry, classes, image_size = run.entry, len(cohort.classes), cohort.size[0]
    size = facts(entry.model, channels=len(entry.channels), classes=classes, image_size=image_size, head=entry.head)
    return RunRecord(
        id=run.id, name=entry.name, kind=_kind(run), direction=_direction(run, classes, image_size), model=entry.model,
        loss=_recipe(entry), method="" if entry.teacher is None else entry.method, teacher=run.teacher.id if run.teacher else "",
        teacher_name=entry.teacher_name, external_teacher=isinstance(entry.teacher, External) and entry.teacher.external,
        network=_network(entry), channels=entry.channels, repeat=run.split.repeat, fold=run.split.fold, seed=run.seed,
        parameters=size.parameters, flops=size.flops, bytes=size.bytes,
    )  # fmt: skip


def _recipe(entry: Entry) -> str:
    # The recipe without the teacher: the fair control is the baseline with this loss.
    own = "" if entry.teacher is None else entry.method_class.own_loss
    return (replace(entry.settings, loss=own) if own else entry.settings).recipe


def _network(entry: Entry) -> str:
    # Properties of a network beyond its name: entries that differ only in their teacher share them.
    weights = "from scratch" if entry.pretrained is False else "pre-trained" if entry.pretrained is True else f"from {entry.pretrained}"
    scale = f", mean {entry.mean}, std {entry.std}" if entry.mean is not None else ""
    return f"{entry.head} head, dropout {entry.dropout}, {weights}{scale}"


def _kind(run: Run) -> Literal["baseline", "distilled", "cross-fitted teacher"]:
    if run.part is not None:
        return "cross-fitted teacher"
    return "baseline" if run.entry.teacher is None else "distilled"


def _direction(run: Run, classes: int, image_size: int) -> str:
    if run.teacher is None:
        return ""
    if run.teacher.entry.model == run.entry.model:
        return "self"
    taught, teaches = (
        facts(each.model, channels=len(each.channels), classes=classes, image_size=image_size).parameters
        for each in (run.entry, run.teacher.entry)
    )
    return "large-to-small" if teaches > taught else "small-to-large"
