"""A grid of entries becomes runs, each with what it waits for and a name that what determines it gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from raredistill.errors import ConfigError
from raredistill.files import fingerprint, sha256
from raredistill.splits import Split
from raredistill.training.settings import Settings

Divide = Callable[[Split, int], list[Split]]
LONGEST_NAME = 80
FOLDER_NAME = re.compile(rf"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{{0,{LONGEST_NAME - 1}}}")


@dataclass(frozen=True)
class External:
    """A teacher trained elsewhere.

    Attributes:
        weights: a checkpoint of raredistill, or a bare safetensors file; the latter needs the fields below.
        model: name of its network.
        classes: in the order of its logits.
        channels: that it takes, in order.
        mean: of its normalisation, one a channel.
        std: of its normalisation, one a channel.
        image_size: side in pixels that it was built for.
        training_patients: a text file with one patient a line.
        external: it has seen none of this cohort's patients; the report states that this is the user's word.
        prior: shares of the classes that its logits carry, where its file does not say them: those of its training samples, after plain
            cross-entropy.
    """

    weights: Path
    model: str = ""
    classes: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    image_size: int = 0
    training_patients: Path | None = None
    external: bool = False
    prior: tuple[float, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One line of the grid: a network, how it is trained, and who teaches it.

    Attributes:
        name: unique in the study.
        model: name of the network.
        channels: that it takes.
        settings: how it is trained.
        pretrained: no, timm's hub, or a local safetensors file.
        mean: normalisation of local weights where it differs from timm's record of that network; with ``std``.
        std: see ``mean``.
        head: ``linear``, ``thesis`` or ``cosine``.
        dropout: before the classifier.
        teacher: another entry's name, several names (their probabilities are averaged), a teacher from elsewhere, or nobody.
        cross_fit: train that many copies of the teacher, each without a part of the training patients, whom it then teaches; 0 for one
            teacher trained on them all.
        online: the teacher learns beside the student, ``one_way`` or ``mutual`` (from the student, too); ``no`` for a trained teacher.
        method: distiller, when there is a teacher.
        method_options: its hyper-parameters.
        ce_weight: of the supervised loss, when there is a teacher.
        kd_weight: of the distillation terms.
    """

    name: str
    model: str
    channels: tuple[str, ...]
    settings: Settings
    pretrained: bool | Path = False
    mean: float | None = None
    std: float | None = None
    head: str = "linear"
    dropout: float = 0.0
    teacher: str | tuple[str, ...] | External | None = None
    cross_fit: int = 0
    online: str = "no"
    method: str = "kd"
    method_options: dict[str, Any] = field(default_factory=dict)
    ce_weight: float = 1.0
    kd_weight: float = 1.0

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the entries that teach it."""
        if isinstance(self.teacher, str):
            return (self.teacher,)
        return self.teacher if isinstance(self.teacher, tuple) else ()


@dataclass(frozen=True)
class Run:
    """One entry on one fold with one seed.

    Attributes:
        id: its name.
        entry: what is trained.
        split: on whom.
        seed: of everything random.
        teachers: the runs it waits for, more than one for an ensemble or for cross-fitted teachers.
        peers: entries whose networks learn beside its own.
        part: for a cross-fitted teacher, which part of the training patients it leaves out; None for a line of the study.
    """

    id: str
    entry: Entry
    split: Split
    seed: int
    teachers: tuple[Run, ...] = ()
    peers: tuple[Entry, ...] = ()
    part: int | None = None

    @property
    def teacher(self) -> Run | None:
        """The first of its teachers."""
        return self.teachers[0] if self.teachers else None

    @property
    def fold_seed(self) -> int:
        """Of everything random: the same for every entry of a fold, repeat and seed, so that comparisons are paired."""
        return self.seed + 1000 * self.split.fold + 100_000 * self.split.repeat


def make_plan(
    entries: Sequence[Entry],
    splits: Sequence[Split],
    seeds: Sequence[int],
    *,
    cohort_hash: str,
    divide: Callable[[Split, int], list[Split]],
) -> list[Run]:
    """Order the runs so that each comes after its teachers; a teacher is trained once per fold and seed and shared by its students.

    Args:
        entries: lines of the study.
        splits: folds.
        seeds: repetitions.
        cohort_hash: of what all of them read.
        divide: cuts the training part of a split for cross-fitted teachers; see :func:`raredistill.splits.cross_fit`.

    Raises:
        ConfigError: two entries share a name, a teacher is unknown, or entries wait for each other in a circle.
    """
    order = _in_order(entries)
    runs: list[Run] = []
    for split in splits:
        for seed in seeds:
            runs.extend(_Cell(split, seed, cohort_hash, divide).runs(order))
    return runs


def share_of(plan: Sequence[Run], number: int, shares: int) -> list[Run]:
    """One of several shares of a plan: the runs whose place in it is ``number`` modulo ``shares``, then the teachers that they need.

    The shares' own runs are disjoint and together the plan; a teacher may be needed by several.
    """
    own = list(plan[number::shares])
    needed = {teacher.id for run in own for teacher in _before(run)} - {run.id for run in own}
    return [*own, *(run for run in plan if run.id in needed)]


def _before(run: Run) -> Iterator[Run]:
    for teacher in run.teachers:
        yield teacher
        yield from _before(teacher)


class _Cell:
    """The runs of one split and seed."""

    def __init__(self, split: Split, seed: int, cohort_hash: str, divide: Divide) -> None:
        self.split, self.seed, self.cohort_hash, self.divide = split, seed, cohort_hash, divide
        self.done: dict[str, Run] = {}
        self.crossed: dict[tuple[str, int], tuple[Run, ...]] = {}

    def runs(self, order: Sequence[Entry]) -> Iterator[Run]:
        """The runs of all entries, each after its teachers; cross-fitted teachers come once, before their first student."""
        for entry in order:
            if entry.cross_fit:
                yield from self._cross(entry)
                teachers = self.crossed[entry.teachers[0], entry.cross_fit]
            else:
                teachers = () if entry.online != "no" else tuple(self.done[name] for name in entry.teachers)
            self.done[entry.name] = self._run(entry, self.split, teachers)
            yield self.done[entry.name]

    def _cross(self, entry: Entry) -> Iterator[Run]:
        key = entry.teachers[0], entry.cross_fit
        if key not in self.crossed:
            teacher = self.done[key[0]].entry
            parts = enumerate(self.divide(self.split, entry.cross_fit))
            self.crossed[key] = tuple(
                self._run(replace(teacher, name=f"{teacher.name}-part{number}of{entry.cross_fit}"), part, (), number)
                for number, part in parts
            )
            yield from self.crossed[key]

    def _run(self, entry: Entry, split: Split, teachers: tuple[Run, ...], part: int | None = None) -> Run:
        peers = tuple(self.done[name].entry for name in entry.teachers) if entry.online != "no" else ()
        return Run(_name(entry, split, self.seed, teachers, peers, self.cohort_hash), entry, split, self.seed, teachers, peers, part)


def _name(entry: Entry, split: Split, seed: int, teachers: Sequence[Run], peers: Sequence[Entry], cohort_hash: str) -> str:
    determines: dict[str, Any] = {
        "entry": _settings_of(entry),
        "teacher": [teacher.id.rsplit("-", 1)[1] for teacher in teachers] or external_facts(entry.teacher if not peers else None),
        "peers": [{**_settings_of(peer), "pretrained": _file_of(peer.pretrained)} for peer in peers],
        "pretrained": _file_of(entry.pretrained),
        "cohort": cohort_hash,
        "split": split.hash,
        "seed": seed,
    }
    return f"{entry.name}-r{split.repeat}f{split.fold}s{seed}-{fingerprint(_plain(determines))[:10]}"


def _settings_of(entry: Entry) -> dict[str, Any]:
    return {key: value for key, value in asdict(entry).items() if key not in ("name", "teacher")}


def external_facts(teacher: Any) -> Any:
    """All that is said of a teacher from elsewhere: a corrected list of patients is another run, and is looked at."""
    return {key: _file_of(value) for key, value in asdict(teacher).items()} if isinstance(teacher, External) else str(teacher)


def _file_of(value: Any) -> str:
    if not isinstance(value, Path):
        return str(value)
    if not value.is_file():
        raise ConfigError(f"{value}: no such file; check the path in the configuration")
    return sha256(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return "file" if isinstance(value, Path) else value


def _in_order(entries: Sequence[Entry]) -> list[Entry]:
    names = [entry.name for entry in entries]
    if unfit := [name for name in names if not FOLDER_NAME.fullmatch(name)]:
        raise ConfigError(
            f"the run {unfit[0]!r:.80} names a folder: up to {LONGEST_NAME} characters, no slash or control character, no dot at the start"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two runs are called {twice[0]}; every run of a study needs its own name")
    order: list[Entry] = []
    waiting = list(entries)
    while waiting:
        ready = [entry for entry in waiting if _is_ready(entry, [done.name for done in order])]
        if not ready:
            raise ConfigError(
                "these runs wait for each other or for a teacher that does not exist: "
                + ", ".join(f"{e.name} (teacher {e.teacher})" for e in waiting)
            )
        order += ready
        waiting = [entry for entry in waiting if entry not in ready]
    return order


def _is_ready(entry: Entry, done: Sequence[str]) -> bool:
    return set(entry.teachers) <= set(done)
