"""Forecast of a study's cost on this machine: time, memory and disk per run, and the effect of more devices."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from raredistill.batches import RESIDENT_SHARE, free_memory
from raredistill.cohort.store import Cohort
from raredistill.files import lock_if_free
from raredistill.runs.assemble import pixels_of, too_large
from raredistill.runs.layout import StudyFolder
from raredistill.runs.run import Run
from raredistill.studies.measure import Cost, kind_of, measure
from raredistill.studies.schedule import Task, critical_path, makespan
from raredistill.training.devices import make_fabric

DEVICES = (1, 2, 4, 8)
EPOCH_LOG = 5000
"""Bytes of one epoch in the logs, with three classes."""


@dataclass(frozen=True)
class Forecast:
    """Status and expected cost of one run.

    Attributes:
        run: the run.
        status: ``done``, ``running elsewhere``, ``started, 2 of 5 epochs`` or ``to do``.
        seconds: time left.
        memory: peak bytes while it runs: on the GPU or, on the CPU, of the process.
        disk: bytes of its results; ``working`` is the additional space it needs while it runs.
        working: see ``disk``.
        residence: location of its pixels, ``resident`` or ``streamed``.
        problem: why it cannot run on this machine; empty if it can.
    """

    run: Run
    status: str
    seconds: float = 0.0
    memory: int = 0
    disk: int = 0
    working: int = 0
    residence: str = ""
    problem: str = ""

    @property
    def task(self) -> Task:
        """For the simulation of several devices."""
        return Task(self.run.id, self.seconds, tuple(teacher.id for teacher in self.run.teachers))


def forecast(plan: Sequence[Run], cohort: Cohort, folder: StudyFolder, progress: Callable[[int, int, str], None]) -> list[Forecast]:
    """Forecast every run of a plan, in order, from a short measurement of each kind of unfinished run.

    Args:
        plan: runs, each after its teachers.
        cohort: their data.
        folder: of the study; it is only read, and need not exist.
        progress: called with the number of kinds measured, the total, and the next kind.

    Raises:
        RareDistillError: a run would be refused at its start.
    """
    settled = {run.id: _settled(run, cohort) for run in plan}
    kinds = {kind_of(settled[run.id]): settled[run.id] for run in plan if not _is_done(run, folder)}
    costs = {}
    with tempfile.TemporaryDirectory(prefix="raredistill-") as scratch:
        for number, (kind, run) in enumerate(kinds.items()):
            progress(number, len(kinds), run.entry.name)
            costs[kind] = measure(run, cohort, Path(scratch) / str(number))
        progress(len(kinds), len(kinds), "")
    found = [
        Forecast(run, "done") if _is_done(run, folder) else _expect(settled[run.id], cohort, folder, costs[kind_of(settled[run.id])])
        for run in plan
    ]
    return _with_caches(found, costs)


def _is_done(run: Run, folder: StudyFolder) -> bool:
    return folder.run(run.id).record.is_file()


def _settled(run: Run, cohort: Cohort) -> Run:
    """The run with the residence that ``auto`` will choose."""
    settings = run.entry.settings
    if settings.residence != "auto":
        return run
    device = make_fabric(settings.accelerator, settings.precision).device
    fits = pixels_of(run, cohort) <= RESIDENT_SHARE * free_memory(device)
    return replace(run, entry=replace(run.entry, settings=replace(settings, residence="resident" if fits else "streamed")))


def _expect(run: Run, cohort: Cohort, folder: StudyFolder, cost: Cost) -> Forecast:
    status, begun = _status(run, folder)
    settings = run.entry.settings
    held_out = len(run.split.validation) + len(run.split.test)
    pixels = pixels_of(run, cohort) if settings.residence == "resident" else 0
    disk = cost.results + 2 * held_out * cost.row + settings.epochs * EPOCH_LOG
    return Forecast(
        run, status, seconds=_seconds(run, cost, max(settings.epochs - begun, 0)), memory=cost.memory + pixels, disk=int(disk),
        working=2 * cost.state, residence=settings.residence, problem=_problem(run, cohort, pixels, cost),
    )  # fmt: skip


def _seconds(run: Run, cost: Cost, epochs: int) -> float:
    train, validation, test = (len(rows) for rows in (run.split.train, run.split.validation, run.split.test))
    steps = max(train // run.entry.settings.batch_size, 1)
    evaluated = epochs * validation + 2 * (validation + test)
    if run.entry.settings.stage != "none":
        evaluated += 2 * (train + validation)
    opened = (train + 2 * validation + test) * cost.load
    return epochs * steps * cost.step + evaluated * cost.image + opened + cost.once


def _status(run: Run, folder: StudyFolder) -> tuple[str, int]:
    log, lock = folder.run(run.id).draft.epochs, folder.run(run.id).lock
    done = log.read_text(encoding="utf-8").count("\n") if log.is_file() else 0
    if lock.exists():
        with lock_if_free(lock) as free:
            if not free:
                return "running elsewhere", done
    return (f"started, {done} of {run.entry.settings.epochs} epochs", done) if log.is_file() else ("to do", 0)


def _problem(run: Run, cohort: Cohort, pixels: int, cost: Cost) -> str:
    if pixels and (problem := too_large(run, cohort, cost.device)):
        return problem
    if cost.device.type == "cpu" or cost.memory + pixels <= torch.cuda.mem_get_info(cost.device)[1]:
        return ""
    return f"it takes {size(cost.memory + pixels)}, more than {cost.device} has; set a smaller batch_size, or residence=streamed"


def _with_caches(found: Sequence[Forecast], costs: dict[str, Cost]) -> list[Forecast]:
    """Add the cost of each teacher cache to its first student; the others reuse it."""
    asked: set[tuple[str, ...]] = set()
    made = []
    for each in found:
        views, teachers = each.run.entry.settings.views, tuple(teacher.id for teacher in each.run.teachers)
        if each.status != "done" and views is not None and teachers and teachers not in asked:
            asked.add(teachers)
            cost, times = costs[kind_of(each.run)], views * len(each.run.split.train)
            each = replace(each, seconds=each.seconds + times * cost.view, disk=each.disk + int(times * cost.view_row))
        made.append(each)
    return made


def size(amount: float) -> str:
    """Format bytes for people: ``12 MB``, ``3.4 GB``."""
    return f"{amount / 1e6:.0f} MB" if amount < 1e9 else f"{amount / 1e9:.1f} GB"


def run_rows(expected: Sequence[Forecast]) -> list[dict[str, Any]]:
    """One row per run, in the order of the plan."""
    return [
        {
            "run": each.run.id, "status": each.status, "minutes": each.seconds / 60, "memory GB": each.memory / 1e9,
            "pixels": each.residence, "disk GB": each.disk / 1e9, "after": ", ".join(teacher.id for teacher in each.run.teachers),
        }
        for each in expected
    ]  # fmt: skip


def device_rows(expected: Sequence[Forecast]) -> list[dict[str, Any]]:
    """One row per number of devices: when the last run ends, and the speed-up over one device."""
    tasks = [each.task for each in expected]
    alone = makespan(tasks, 1)
    spans = {number: makespan(tasks, number) for number in DEVICES}
    return [{"devices": number, "minutes": span / 60, "times faster": alone / span if span else 1.0} for number, span in spans.items()]


def longest_chain(expected: Sequence[Forecast]) -> tuple[float, list[str]]:
    """The longest chain of teachers and students, in seconds and as run names; more devices do not shorten it."""
    return critical_path([each.task for each in expected])


def disk_needed(expected: Sequence[Forecast]) -> int:
    """Additional bytes that the study will need, including the saved states of the largest run."""
    return sum(each.disk for each in expected) + max((each.working for each in expected), default=0)


def disk_free(out: Path) -> int:
    """Free bytes on the disk of the study's folder, which need not exist yet."""
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free
