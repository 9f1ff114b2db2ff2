"""The folder of a run while it is made, what it was begun with, and whether a finished one is still what was written."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import raredistill
from raredistill.checkpoint import content_hash
from raredistill.errors import CheckpointError, DataError
from raredistill.files import is_sealed, read_json, seal, sha256, tidy, write_json
from raredistill.runs.layout import RESULTS, RunFolder
from raredistill.runs.record import RunRecord, read_run
from raredistill.training.resume import clear_state, has_state

LIBRARIES = ("torch", "timm", "lightning-fabric", "numpy")
"""Those that a run's numbers depend on."""
ASIDE = (
    "api.py",
    "cli.py",
    "config.py",
    "console.py",
    "demo.yaml",
    "phantom.py",
    "terminal.py",
    "testing.py",
    "cohort",
    "evaluation",
    "reports",
    "studies",
)
"""Parts of the package that no run's numbers depend on: the cohort itself has its own hash."""


def origin(device: str, teachers: Mapping[str, Path], plugins: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Everything a run's numbers depend on apart from its name: versions, device, threads, code, plug-ins, and its teachers' weights."""
    files = {f"teacher {name}": content_hash(file) for name, file in teachers.items() if file.is_file()}
    # A sum over other parts has other bits; on other devices than the CPU its threads sum nothing.
    threads = {"threads": str(torch.get_num_threads())} if device == "cpu" else {}
    return {"versions": {**versions(), "device": device, **threads}, "code": {**code(), **plugins}, "files": files}


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that compute."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


@cache
def code() -> dict[str, str]:
    """Hash of each file of the program that a run's numbers may depend on."""
    root = Path(raredistill.__file__).parent
    files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    return {str(path): sha256(root / path)[:16] for path in files if path.parts[0] not in ASIDE}


def check_origin(folder: RunFolder, now: dict[str, dict[str, str]]) -> None:
    """Refuse to resume an unfinished run under other code, versions or files.

    Raises:
        CheckpointError: what differs, and what to do.
    """
    then = _begun_with(folder.draft)
    differing = [] if then is None else [f"{name} was {old} and is {new}" for name, old, new in _differences(then, now)]
    if differing:
        raise CheckpointError(
            f"{folder.draft.path} was begun with something else: {'; '.join(differing)}. "
            "Resume it with the same code and versions, or delete that folder to train the run anew"
        )


def _begun_with(draft: RunFolder) -> dict[str, Any] | None:
    # None too when it was killed before its start, or is damaged: then nothing can be resumed.
    try:
        record = read_json(draft.origin)
    except DataError:
        return None
    return record if isinstance(record, dict) and is_sealed(record) else None


def _differences(then: dict[str, Any], now: dict[str, dict[str, str]]) -> list[tuple[str, str, str]]:
    pairs = [(name, then[part].get(name, "absent"), now[part].get(name, "absent")) for part in now for name in {**then[part], **now[part]}]
    return [pair for pair in pairs if pair[1] != pair[2]]


def open_draft(folder: RunFolder, now: dict[str, dict[str, str]]) -> RunFolder:
    """The folder in which a run is made: a new one, or that of an interrupted start, tidied up.

    Raises:
        CheckpointError: it was begun with something else.
    """
    check_origin(folder, now)
    draft = folder.draft
    if _begun_with(draft) is None:
        shutil.rmtree(draft.path, ignore_errors=True)
        draft.path.mkdir(parents=True)
        write_json(draft.origin, seal(now))
    tidy(draft.path)
    return draft


def finish(folder: RunFolder, record: RunRecord) -> None:
    """Promote the draft to the final run folder. Its record, written last, holds the hash of every result.

    The state is deleted once the folder is in its place: a crash in between costs nothing.
    """
    draft = folder.draft
    files = {name: sha256(draft.path / name) for name in RESULTS}
    write_json(draft.record, seal({**record.as_json(), "files": files}))
    os.replace(draft.path, folder.path)
    clear_state(folder.path)


def abandon(folder: RunFolder) -> None:
    """Remove the draft of a run that failed before anything was kept, such as one whose teacher was refused."""
    draft = folder.draft
    if not has_state(draft.path) and not draft.weights("best").exists():
        shutil.rmtree(draft.path, ignore_errors=True)


def discard(folder: RunFolder) -> None:
    """Remove the draft of a run with everything kept of it: it must not be resumed."""
    shutil.rmtree(folder.draft.path, ignore_errors=True)


def read_finished(folder: RunFolder) -> RunRecord:
    """The record of a finished run, after every byte of its results was checked.

    Raises:
        DataError: a file is missing, or is not what was written.
    """
    record = checked_record(folder)
    clear_state(folder.path)
    return record


def checked_record(folder: RunFolder, names: Sequence[str] = RESULTS) -> RunRecord:
    """The record of a finished run, after its own hash and those of some of its results were compared.

    Args:
        folder: of the run.
        names: the results whose bytes are read; all by default.

    Raises:
        DataError: a file is missing, or is not what was written.
    """
    record = read_json(folder.record)
    if not isinstance(record, dict) or not is_sealed(record) or set(record.get("files", ())) != set(RESULTS):
        raise DataError(f"{folder.record}: its content does not match its hash")
    for name in names:
        if not (folder.path / name).is_file() or sha256(folder.path / name) != record["files"][name]:
            raise DataError(f"{folder.path / name}: missing, or its content does not match its hash")
    return read_run(record, folder.record)


def set_aside(folder: RunFolder) -> Path:
    """Move a damaged run out of the way, so that it is made again and can still be inspected; returns its new place."""
    shutil.rmtree(folder.damaged, ignore_errors=True)
    os.replace(folder.path, folder.damaged)
    return folder.damaged
