"""A whole study: plan it, write down what it is, carry it out."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch

from raredistill.cohort.store import Cohort
from raredistill.errors import DataError
from raredistill.files import claim_folder, lock_if_free, locked, read_json, tidy, write_json
from raredistill.splits import Split, cross_fit, save_split, split_table
from raredistill.study.execute import Record, Watcher, describe, execute, lock_of, refuse_changed, refuse_too_large
from raredistill.study.plan import Entry, Run, make_plan

DESCRIPTION = "study.json"
MARKER = ".study"
"""Says that a folder is a study's, from its first moment on."""
LIBRARIES = ("raredistill", "torch", "timm", "lightning", "numpy", "pandas", "scikit-learn", "nibabel")


@dataclass(frozen=True)
class Study:
    """What a study is made of. ``config`` and ``command`` are kept for the reader; nothing is computed from them."""

    name: str
    cohort: Cohort
    splits: Sequence[Split]
    entries: Sequence[Entry]
    seeds: Sequence[int]
    protocol: str
    config: dict[str, Any]
    command: str

    def plan(self) -> list[Run]:
        """The runs in the order in which they are carried out."""
        return make_plan(self.entries, self.splits, self.seeds, cohort_hash=self.cohort.hash, divide=partial(cross_fit, self.cohort))

    def counts(self) -> pd.DataFrame:
        """Slices and patients by split, side and class: what to look at before training."""
        return split_table(self.cohort, list(self.splits))

    def overview(self) -> pd.DataFrame:
        """The same counts with a row a side and a column a class, ``slices (patients)``."""
        return _overview(self.counts())


def _overview(counts: pd.DataFrame) -> pd.DataFrame:
    cells = counts.assign(cell=[f"{slices} ({patients})" for slices, patients in zip(counts["slices"], counts["patients"], strict=True)])
    wide = cells.pivot_table(index=["repeat", "fold", "side"], columns="class", values="cell", aggfunc="first", sort=False)
    return wide.reset_index()


class Engine(Protocol):
    """Where the runs of a study are carried out."""

    def check(self, plan: Sequence[Run], cohort: Cohort, out: Path) -> None:
        """Refuse what cannot work, before anything is trained or written."""

    def execute(
        self, plan: Sequence[Run], cohort: Cohort, out: Path, watcher: Watcher, on_record: Callable[[Record], None]
    ) -> list[Record]:
        """As :func:`raredistill.study.execute.execute`."""


class Here:
    """Runs are carried out in this process."""

    def check(self, plan: Sequence[Run], cohort: Cohort, out: Path) -> None:
        """Look at every unfinished run, and at the memory of this machine."""
        refuse_changed(plan, out)
        refuse_too_large(plan, cohort, out)

    def execute(
        self, plan: Sequence[Run], cohort: Cohort, out: Path, watcher: Watcher, on_record: Callable[[Record], None]
    ) -> list[Record]:
        """One after the other."""
        return execute(plan, cohort, out, watcher, on_record)


HERE = Here()


def run_study(study: Study, out: Path, watcher: Watcher, *, chosen: Sequence[Run] | None = None, engine: Engine = HERE) -> list[Record]:
    """Carry out a study in ``out``; done runs are reused, and ``study.json`` always says how far it is.

    Args:
        study: what to carry out.
        out: its folder.
        watcher: is told of progress.
        chosen: runs of its plan, with all their teachers; the whole plan when not given.
        engine: where they are carried out.

    Returns:
        The records of the chosen runs.

    Raises:
        DataError: ``out`` holds something else.
    """
    claim(out)
    plan = study.plan()
    chosen = plan if chosen is None else chosen
    engine.check(chosen, study.cohort, out)
    _refuse_company(plan, out)
    study.cohort.check_pixels()
    records = {run.id: describe(run, study.cohort) for run in plan}
    write = _writer(study, out)
    write(records)
    with locked(out / ".lock"):
        tidy(out / "splits")
        for split in study.splits:
            save_split(out / "splits" / f"r{split.repeat}f{split.fold}.json", split, study.cohort)

    def on_record(record: Record) -> None:
        records[record["id"]] = record
        write(records)

    return engine.execute(chosen, study.cohort, out, watcher, on_record)


def left(out: Path) -> list[str]:
    """Runs of a study that no process has ended yet, by its description."""
    return [record["id"] for record in read_json(out / DESCRIPTION)["runs"] if record["status"] == "waiting"]


def elsewhere(study: Study, out: Path) -> list[str]:
    """Runs of a study at which another process works now: they are left to it, and waited for at the end."""
    return [run.id for run in study.plan() if lock_of(out, run.id).exists() and _is_held(lock_of(out, run.id))]


def _refuse_company(plan: Sequence[Run], out: Path) -> None:
    """Two processes may share one study, but not a folder for two studies: each would overwrite the other's description."""
    ours = {lock_of(out, run.id) for run in plan}
    for lock in sorted(set((out / "runs").glob(".*.lock")) - ours):
        if _is_held(lock):
            raise DataError(f"another process works at another study in {out} ({lock.name}); name another folder, or wait for it")


def _is_held(lock: Path) -> bool:
    with lock_if_free(lock) as free:
        return not free


def claim(out: Path) -> None:
    """Make ``out`` this study's folder; refuse one that holds something else."""
    claim_folder(out, MARKER)
    (out / MARKER).touch()


def _writer(study: Study, out: Path) -> Callable[[dict[str, Record]], None]:
    fixed = {
        "name": study.name, "command": study.command, "config": study.config, "cohort": _cohort(study.cohort), "protocol": study.protocol,
        "rare": rare_class(study.cohort, study.splits), "split_table": study.counts().to_dict("records"),
        "splits": [{"repeat": split.repeat, "fold": split.fold, "hash": split.hash} for split in study.splits],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}, "machine": machine(),
    }  # fmt: skip

    def write(records: dict[str, Record]) -> None:
        with locked(out / ".lock"):
            tidy(out)  # only the holder of this lock writes here
            known = _known(out)
            runs = [known.get(name, record) if record["status"] == "waiting" else record for name, record in records.items()]
            write_json(out / DESCRIPTION, {**fixed, "runs": runs})

    return write


def _known(out: Path) -> dict[str, Record]:
    """What an earlier start, or a process beside this one, found out about runs that this process has not come to yet."""
    try:
        return {record["id"]: record for record in read_json(out / DESCRIPTION)["runs"]}
    except (DataError, KeyError, TypeError):
        return {}  # the first start, or a damaged file: it is about to be written anew


def rare_class(cohort: Cohort, splits: Sequence[Split]) -> str:
    """The minority class that a study is about: fewest training samples over the folds, among the classes that patients carry."""
    labels = pd.Series([label for split in splits for label in cohort.samples["label"].to_numpy()[split.train]])
    counts = labels.value_counts()
    return min(cohort.patient_classes, key=lambda name: int(counts.get(name, 0)))


def _cohort(cohort: Cohort) -> dict[str, Any]:
    return {
        "name": cohort.name, "hash": cohort.hash, "classes": list(cohort.classes), "background": cohort.background,
        "channels": list(cohort.channels),
        "samples": len(cohort.samples), "patients": int(cohort.samples["patient"].nunique()), "provenance": cohort.provenance,
        "counts": cohort.counts().to_dict("records"), "size": list(cohort.size),
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """What kind of machine a study ran on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"system": platform.platform(), "processor": platform.machine(), "threads": torch.get_num_threads(), "gpu": gpu}
