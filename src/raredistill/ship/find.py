"""Find a model by a short name: a run, an entry of a study, or an export, without copying hashes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raredistill.errors import DataError
from raredistill.options import did_you_mean
from raredistill.runs.layout import RunFolder, StudyFolder
from raredistill.runs.record import RunRecord, StudyRecord, read_study
from raredistill.ship.bundle import CONFIG


@dataclass(frozen=True)
class Found:
    """A model that was found.

    Attributes:
        kind: one run, all runs of an entry together, one network refitted on all patients, or an export.
        entry: its name; of an export, that of its folder.
        path: the export; of others, the study whose folds it comes from.
        runs: the folders of its networks.
        said: what was chosen, as a sentence.
    """

    kind: Literal["run", "ensemble", "refit", "export"]
    entry: str
    path: Path
    runs: tuple[RunFolder, ...] = ()
    said: str = ""


def find(model: Path | str) -> Found:
    """Find a model by the name that a user gives.

    Args:
        model: the folder of a run or of an export, ``STUDY:ENTRY``, or ``STUDY/runs/NAME`` with the beginning of a name.

    Raises:
        DataError: nothing or nothing finished is there; lists what is.
    """
    path, text = Path(model), str(model)
    if (path / CONFIG).is_file():
        return Found("export", path.resolve().name, path, said=f"the export {path}")
    if RunFolder(path).record.is_file():
        return _one(path.parent.parent, path)
    head, sign, name = text.rpartition(":")
    if sign and StudyFolder(Path(head)).description.is_file():
        return _entry(Path(head), name)
    if path.parent.name == "runs" and StudyFolder(path.parent.parent).description.is_file():
        return _entry(path.parent.parent, path.name)
    if StudyFolder(path).description.is_file():
        raise DataError(f"{path} is a study; name one of its entries: {', '.join(f'{path}:{each}' for each in _entries(path))}")
    raise DataError(f"{model}: neither a run, nor an entry of a study (STUDY:ENTRY), nor an export; check the path")


def _one(study: Path, run: Path) -> Found:
    if not StudyFolder(study).description.is_file():
        raise DataError(
            f"{run}: lies outside its study, which knows how the pixels were prepared and who trained it; name it inside the study"
        )
    record = _record(study, run.name)
    return Found("run", record.name, study, (RunFolder(run),), f"the run {run.name}: one network of one fold")


def _record(study: Path, run: str) -> RunRecord:
    found = [record for record in read_study(StudyFolder(study).description).runs if record.id == run]
    if not found:
        raise DataError(f"{study}: study.json knows no run {run}; run raredistill study again")
    return found[0]


def _entries(study: Path) -> list[str]:
    return list(dict.fromkeys(run.name for run in read_study(StudyFolder(study).description).runs if run.kind != "cross-fitted teacher"))


def _entry(study: Path, name: str) -> Found:
    description = read_study(StudyFolder(study).description)
    if (refitted := StudyFolder(study).refit(name)).description.is_file():
        runs = _finished(read_study(refitted.description), refitted, name)
        if runs:
            return Found("refit", name, study, runs[:1], f"{name}, refitted on all patients")
    if name in _entries(study):
        return _ensemble(description, study, name)
    matching = [run.id for run in description.runs if run.id.startswith(name) and run.status == "done"]
    if len(matching) == 1:
        return _one(study, StudyFolder(study).run(matching[0]).path)
    if matching:
        raise DataError(f"{study}: {len(matching)} runs begin with {name}: {', '.join(matching)}; write more of the name")
    raise DataError(f"{study}: no entry {name!r}{did_you_mean(name, _entries(study))}; its entries are {', '.join(_entries(study))}")


def _finished(description: StudyRecord, folder: StudyFolder, name: str) -> tuple[RunFolder, ...]:
    done = [run.id for run in description.runs if run.name == name and run.status == "done" and run.kind != "cross-fitted teacher"]
    return tuple(folder.run(each) for each in done if folder.run(each).path.is_dir())


def _ensemble(description: StudyRecord, study: Path, name: str) -> Found:
    runs = _finished(description, StudyFolder(study), name)
    if not runs:
        raise DataError(f"{study}: no run of {name} is finished; run raredistill study again")
    if len(runs) == 1:
        return Found("run", name, study, runs, f"the only run of {name}: {runs[0].path.name}")
    many = f"{name}, the mean of its {len(runs)} networks (folds and seeds); for one network: raredistill refit {study} {name}"
    return Found("ensemble", name, study, runs, many)
