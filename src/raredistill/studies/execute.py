"""Carry out a plan in this process: every run after its teachers, except runs that other processes work on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from raredistill.cohort.store import Cohort
from raredistill.errors import ConfigError
from raredistill.runs.assemble import too_large
from raredistill.runs.drafts import check_origin, origin
from raredistill.runs.layout import StudyFolder
from raredistill.runs.record import RunRecord
from raredistill.runs.run import Run
from raredistill.runs.train import attempt
from raredistill.runs.watcher import Watcher
from raredistill.training.devices import make_fabric

RETRY_AFTER = 2.0
"""Seconds until runs that another process works on are tried again."""


def execute(
    plan: Sequence[Run], cohort: Cohort, folder: StudyFolder, watcher: Watcher, on_record: Callable[[RunRecord], None]
) -> list[RunRecord]:
    """Carry out every run; a run that fails is recorded, runs that wait for it are skipped, and the others continue.

    Runs that another process works on are left to it; this function waits for them at the end.

    Args:
        plan: runs, each after its teachers.
        cohort: their data.
        folder: of the study.
        watcher: receives the progress.
        on_record: called with each run's record as soon as it is known.

    Raises:
        OSError: the disk is full, or a folder has vanished or cannot be written; earlier files are intact.
    """
    records: dict[str, RunRecord] = {}
    waiting = list(plan)
    while waiting:
        for run in [run for run in waiting if all(teacher.id in records for teacher in run.teachers)]:
            if (found := attempt(run, cohort, folder, watcher, records)) is None:
                continue
            record, reused = found
            waiting.remove(run)
            records[run.id] = record
            on_record(record)
            watcher.run_done(run, record, reused=reused)
        if waiting:
            time.sleep(RETRY_AFTER)
    return [records[run.id] for run in plan]


def refuse_changed(plan: Sequence[Run], folder: StudyFolder) -> None:
    """Refuse unfinished runs that were started with different code or versions, before anything is trained.

    Raises:
        CheckpointError: one was started with different code or versions.
    """
    for run in plan:
        settings = run.entry.settings
        now = origin(make_fabric(settings.accelerator, settings.precision, settings.devices).device.type, {}, run.plugins)
        # Teachers' weights are compared when the run starts: until then they may be trained again.
        check_origin(folder.run(run.id), {part: now[part] for part in ("versions", "code")})


def refuse_too_large(plan: Sequence[Run], cohort: Cohort, folder: StudyFolder) -> None:
    """Refuse unfinished runs whose resident pixels do not fit on the device.

    Raises:
        ConfigError: a run does not fit in this machine's memory.
    """
    for run in plan:
        settings = run.entry.settings
        if settings.residence == "resident" and not folder.run(run.id).path.is_dir():
            device = make_fabric(settings.accelerator, settings.precision).device
            if problem := too_large(run, cohort, device):
                raise ConfigError(f"runs {run.entry.name}: {problem}")
