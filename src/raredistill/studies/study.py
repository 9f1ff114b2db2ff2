"""A whole study: rules, plan, description and execution."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch

from raredistill.cohort.store import MASK, Cohort
from raredistill.errors import ConfigError, DataError
from raredistill.evaluation.looks import Looks
from raredistill.files import claim_folder, lock_if_free, locked, tidy, write_json
from raredistill.runs.entry import Entry
from raredistill.runs.layout import StudyFolder
from raredistill.runs.record import CohortRecord, RunRecord, StudyRecord, describe, read_study
from raredistill.runs.run import Run
from raredistill.runs.watcher import Watcher
from raredistill.splits import Split, cross_fit, save_split, split_table
from raredistill.studies.execute import execute, refuse_changed, refuse_too_large
from raredistill.studies.plan import in_order, make_plan
from raredistill.studies.rules import check_entries

MARKER = ".study"
"""Marks a folder as a study's from the start."""
LIBRARIES = ("raredistill", "torch", "timm", "lightning-fabric", "numpy", "pandas", "scikit-learn", "nibabel")


@dataclass(frozen=True)
class Study:
    """A cohort, its splits and a grid of entries, checked when constructed.

    Attributes:
        name: for the report.
        cohort: the data of all runs.
        splits: patients of each side.
        entries: lines of the grid; without their own channels they use all of the cohort's, except a mask.
        seeds: one run of each entry and split per seed.
        protocol: protocol of the splits, for the report.
        config: stored for the reader only; nothing is computed from it.
        command: likewise.
        looks: when it may stop; None where all its splits are run.

    Raises:
        ConfigError: a name, network, method, loss or channel is unknown, or two of them cannot be combined.
        CheckpointError: weights cannot be read or do not fit, or a teacher was trained on held-out patients.
    """

    name: str
    cohort: Cohort
    splits: Sequence[Split]
    entries: Sequence[Entry]
    seeds: Sequence[int] = (0,)
    protocol: str = "outer"
    config: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    looks: Looks | None = None

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ConfigError("seeds: at least one is needed, such as seeds: [0]")
        everything = tuple(channel for channel in self.cohort.channels if channel != MASK)
        filled = [entry if entry.channels else replace(entry, channels=everything) for entry in self.entries]
        object.__setattr__(self, "entries", filled)
        in_order(filled)
        check_entries(filled, self.cohort, self.splits)

    def plan(self) -> list[Run]:
        """The runs in the order in which they are carried out."""
        return make_plan(self.entries, self.splits, self.seeds, cohort_hash=self.cohort.hash, divide=partial(cross_fit, self.cohort))

    def counts(self) -> pd.DataFrame:
        """Slices and patients by split, side and class."""
        return split_table(self.cohort, list(self.splits))

    def overview(self) -> pd.DataFrame:
        """The same counts as ``slices (patients)``, one row per side and one column per class."""
        return _overview(self.counts())


def _overview(counts: pd.DataFrame) -> pd.DataFrame:
    cells = counts.assign(cell=[f"{slices} ({patients})" for slices, patients in zip(counts["slices"], counts["patients"], strict=True)])
    wide = cells.pivot_table(index=["repeat", "fold", "side"], columns="class", values="cell", aggfunc="first", sort=False)
    return wide.reset_index()


class Engine(Protocol):
    """Carries out the runs of a study."""

    def check(self, plan: Sequence[Run], cohort: Cohort, folder: StudyFolder) -> None:
        """Refuse runs that cannot work, before anything is trained or written."""

    def execute(
        self, plan: Sequence[Run], cohort: Cohort, folder: StudyFolder, watcher: Watcher, on_record: Callable[[RunRecord], None]
    ) -> list[RunRecord]:
        """Carry out runs; see :func:`raredistill.studies.execute.execute`."""


class Here:
    """Carries out runs in this process."""

    def check(self, plan: Sequence[Run], cohort: Cohort, folder: StudyFolder) -> None:
        """Check every unfinished run, and this machine's memory."""
        refuse_changed(plan, folder)
        refuse_too_large(plan, cohort, folder)

    def execute(
        self, plan: Sequence[Run], cohort: Cohort, folder: StudyFolder, watcher: Watcher, on_record: Callable[[RunRecord], None]
    ) -> list[RunRecord]:
        """Carry out the runs one after the other."""
        return execute(plan, cohort, folder, watcher, on_record)


HERE = Here()


def run_study(study: Study, out: Path, watcher: Watcher, *, chosen: Sequence[Run] | None = None, engine: Engine = HERE) -> list[RunRecord]:
    """Carry out a study in ``out``; finished runs are reused, and ``study.json`` always shows its progress.

    Args:
        study: what to carry out.
        out: its folder.
        watcher: receives the progress.
        chosen: runs of its plan, with all their teachers; the whole plan by default.
        engine: carries out the runs.

    Returns:
        The records of the chosen runs.

    Raises:
        DataError: ``out`` contains something else.
    """
    claim(out)
    folder, plan = StudyFolder(out), study.plan()
    chosen = plan if chosen is None else chosen
    engine.check(chosen, study.cohort, folder)
    _refuse_company(plan, folder)
    study.cohort.check_pixels()
    records = {run.id: describe(run, study.cohort) for run in plan}
    write = _writer(study, folder)
    write(records)
    with locked(folder.lock):
        tidy(folder.splits)
        for split in study.splits:
            save_split(folder.split(split.repeat, split.fold), split, study.cohort)

    def on_record(record: RunRecord) -> None:
        records[record.id] = record
        write(records)

    return engine.execute(chosen, study.cohort, folder, watcher, on_record)


def left(out: Path) -> list[str]:
    """Runs that no process has finished yet, according to the study's description."""
    return [record.id for record in read_study(StudyFolder(out).description).runs if record.status == "waiting"]


def elsewhere(study: Study, out: Path) -> list[str]:
    """Runs that another process is working on now; they are left to it, and this process waits for them at the end."""
    locks = {run.id: StudyFolder(out).run(run.id).lock for run in study.plan()}
    return [name for name, lock in locks.items() if lock.exists() and _is_held(lock)]


def _refuse_company(plan: Sequence[Run], folder: StudyFolder) -> None:
    """Refuse a folder in which another process runs another study: each would overwrite the other's description."""
    ours = {folder.run(run.id).lock for run in plan}
    for lock in folder.locks():
        if lock not in ours and _is_held(lock):
            raise DataError(f"another process works on another study in {folder.path} ({lock.name}); name another folder, or wait for it")


def _is_held(lock: Path) -> bool:
    with lock_if_free(lock) as free:
        return not free


def claim(out: Path) -> None:
    """Make ``out`` this study's folder; refuse a folder that contains something else."""
    claim_folder(out, MARKER)
    (out / MARKER).touch()


def _writer(study: Study, folder: StudyFolder) -> Callable[[Mapping[str, RunRecord]], None]:
    described = describe_study(study)

    def write(records: Mapping[str, RunRecord]) -> None:
        with locked(folder.lock):
            tidy(folder.path)  # only the holder of this lock writes here
            known = _known(folder)
            runs = [known.get(name, record) if record.status == "waiting" else record for name, record in records.items()]
            write_json(folder.description, replace(described, runs=runs).as_json())

    return write


def describe_study(study: Study) -> StudyRecord:
    """The content of ``study.json``, without its runs."""
    return StudyRecord(
        name=study.name, command=study.command, config=study.config, cohort=describe_cohort(study.cohort), protocol=study.protocol,
        rare=rare_class(study.cohort, study.splits), split_table=study.counts().to_dict("records"),  # type: ignore[arg-type]
        splits=[{"repeat": split.repeat, "fold": split.fold, "hash": split.hash} for split in study.splits],
        versions={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}, machine=machine(), runs=[],
    )  # fmt: skip


def _known(folder: StudyFolder) -> dict[str, RunRecord]:
    """Records written by an earlier start or a parallel process, for runs that this process has not reached yet."""
    try:
        return {record.id: record for record in read_study(folder.description).runs}
    except DataError:
        return {}  # first start, or a damaged file: it will be rewritten


def rare_class(cohort: Cohort, splits: Sequence[Split]) -> str:
    """The rare class of a study: the patient class with the fewest training samples over the folds."""
    labels = pd.Series([label for split in splits for label in cohort.samples["label"].to_numpy()[split.train]])
    counts = labels.value_counts()
    return min(cohort.patient_classes, key=lambda name: int(counts.get(name, 0)))


def describe_cohort(cohort: Cohort) -> CohortRecord:
    """Description of the cohort in ``study.json``."""
    return CohortRecord(
        name=cohort.name, hash=cohort.hash, classes=tuple(cohort.classes), background=cohort.background,
        channels=tuple(cohort.channels), samples=len(cohort.samples), patients=int(cohort.samples["patient"].nunique()),
        size=tuple(cohort.size), provenance=cohort.provenance, counts=cohort.counts().to_dict("records"),  # type: ignore[arg-type]
    )  # fmt: skip


def machine() -> dict[str, Any]:
    """Description of the machine that a study runs on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"system": platform.platform(), "processor": platform.machine(), "threads": torch.get_num_threads(), "gpu": gpu}
