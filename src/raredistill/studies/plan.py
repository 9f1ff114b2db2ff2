"""Expand a grid of entries into runs, each after its teachers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from raredistill.errors import ConfigError
from raredistill.runs.entry import Entry
from raredistill.runs.run import Run, run_name
from raredistill.splits import Split

Divide = Callable[[Split, int], list[Split]]
LONGEST_NAME = 80
FOLDER_NAME = re.compile(rf"[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]{{0,{LONGEST_NAME - 1}}}")


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
        seeds: repetitions within a repeat of the splits; later repeats count on from them.
        cohort_hash: hash of their cohort.
        divide: divides the training part of a split for cross-fitted teachers; see :func:`raredistill.splits.cross_fit`.

    Raises:
        ConfigError: two entries share a name, a teacher is unknown, or entries depend on each other in a circle.
    """
    order = in_order(entries)
    # Each repeat has seeds of its own: a repeat is new in all that luck decides.
    apart = max(seeds) - min(seeds) + 1
    runs: list[Run] = []
    for split in splits:
        for seed in seeds:
            runs.extend(_Cell(split, seed + split.repeat * apart, cohort_hash, divide).runs(order))
    return runs


def needed(plan: Sequence[Run], names: set[str], repeats: int) -> list[Run]:
    """The runs of some entries in the first repeats, with their teachers, in the order of the plan."""
    own = [run for run in plan if run.entry.name in names and run.split.repeat < repeats]
    ids = {run.id for run in own} | {teacher.id for run in own for teacher in _before(run)}
    return [run for run in plan if run.id in ids]


def share_of(plan: Sequence[Run], number: int, shares: int) -> list[Run]:
    """One of several shares of a plan: the runs whose index is ``number`` modulo ``shares``, then the teachers that they need.

    The shares' own runs are disjoint and together make up the plan; several shares may need the same teacher.
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
        name = run_name(entry, split, self.seed, teachers=teachers, peers=peers, cohort_hash=self.cohort_hash)
        return Run(name, entry, split, self.seed, teachers, peers, part)


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """Sort the entries so that each comes after its teachers.

    Raises:
        ConfigError: a name cannot be a folder's or occurs twice, a teacher is unknown, or entries depend on each other in a circle.
    """
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
        ready = [entry for entry in waiting if set(entry.teachers) <= {done.name for done in order}]
        if not ready:
            raise ConfigError(
                "these runs depend on each other or on a teacher that does not exist: "
                + ", ".join(f"{e.name} (teacher {e.teacher})" for e in waiting)
            )
        order += ready
        waiting = [entry for entry in waiting if entry not in ready]
    return order
