"""The chosen recipe trained once more on all patients, its teacher first, for as many epochs as the folds chose."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

import numpy as np

from raredistill.errors import ConfigError, DataError
from raredistill.runs.entry import Entry
from raredistill.runs.layout import StudyFolder
from raredistill.runs.record import RunRecord, StudyRecord, read_study
from raredistill.runs.watcher import Watcher
from raredistill.ship import evidence
from raredistill.ship.find import Found, find
from raredistill.splits import SIDES, Split
from raredistill.studies.plan import in_order
from raredistill.studies.study import Study, run_study


@dataclass(frozen=True)
class Refitted:
    """A refitted entry.

    Attributes:
        entry: its name.
        folder: the small study that holds it and its teachers.
        epochs: of each entry that was trained.
        runs: their records.
        expected: scores of the study's out-of-fold predictions, with intervals: the performance that is expected of it.
    """

    entry: str
    folder: StudyFolder
    epochs: dict[str, int]
    runs: list[RunRecord]
    expected: list[dict[str, object]]


def plan_refit(study: Study, folder: StudyFolder, entry: str) -> Study:
    """An entry and its teachers as a study with one split, in which all patients are training patients.

    Args:
        study: the finished study.
        folder: of it.
        entry: name of the chosen one.

    Raises:
        ConfigError: no such entry, or a setting that needs a validation part.
        DataError: a run of the entry or of its teachers is not finished.
    """
    known = {each.name: each for each in study.entries}
    if entry not in known:
        raise ConfigError(f"{folder.path}: no entry {entry!r}; its entries are {', '.join(known)}")
    told = read_study(folder.description)
    if told.cohort.hash != study.cohort.hash:
        raise DataError(f"{folder.path}: made from another cohort than {study.cohort.root}")
    needed = _with_teachers(known, entry)
    chosen = [_for_all(each, _epochs(told, each.name, folder)) for each in in_order(study.entries) if each.name in needed]
    return replace(study, name=f"{entry}, refitted on all patients", splits=[everyone(study)], entries=chosen, seeds=study.seeds[:1])


def _with_teachers(known: dict[str, Entry], name: str) -> set[str]:
    return {name}.union(*(_with_teachers(known, teacher) for teacher in known[name].teachers))


def _epochs(told: StudyRecord, entry: str, folder: StudyFolder) -> int:
    """The median of the epochs that its folds chose on validation; all epochs of runs that chose none."""
    own = [run for run in told.runs if run.name == entry and run.kind != "cross-fitted teacher"]
    if unfinished := [run.id for run in own if run.status != "done"]:
        raise DataError(f"{folder.path}: {unfinished[0]} is not finished; run raredistill study again first")
    return max(1, round(statistics.median(run.best_epoch + 1 for run in own)))


def _for_all(entry: Entry, epochs: int) -> Entry:
    return replace(entry, settings=replace(entry.settings, epochs=epochs, select="last", patience=None))


def everyone(study: Study) -> Split:
    """A split with every patient in the training part; its rows are all rows used in any part of the study's splits."""
    rows = np.unique(np.concatenate([getattr(split, side) for split in study.splits for side in SIDES]))
    none, patients = np.array([], dtype=np.int64), study.cohort.samples["patient"].to_numpy()[rows]
    return Split(0, 0, rows, none, none, {"train": tuple(sorted(set(patients))), "validation": (), "test": ()})


def refit(planned: Study, folder: StudyFolder, entry: str, watcher: Watcher) -> Refitted:
    """Train the plan of :func:`plan_refit`; an interrupted training resumes.

    Raises:
        DataError: training failed.
    """
    place = folder.refit(entry)
    place.path.parent.mkdir(parents=True, exist_ok=True)
    runs = run_study(planned, place.path, watcher)
    if failed := [run for run in runs if run.status == "failed"]:
        raise DataError(f"{failed[0].id}: {failed[0].error}; the same command tries it again")
    found = find(f"{folder.path}:{entry}")
    epochs = {each.name: each.settings.epochs for each in planned.entries}
    return Refitted(entry, place, epochs, runs, expected(found, read_study(folder.description)))


def expected(found: Found, study: StudyRecord) -> list[dict[str, object]]:
    """Scores of the out-of-fold predictions of an entry, with 95 % intervals over patients."""
    table = evidence.held_out(found, study, "best")
    return [] if table is None else evidence.scores(table)
