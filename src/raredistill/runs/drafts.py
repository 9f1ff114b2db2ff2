"""Draft folders of unfinished runs, the origin they were started with, and integrity checks of finished runs."""

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
"""Libraries that a run's numbers depend on."""
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
"""Parts of the package that no run's numbers depend on; the cohort has its own hash."""


def origin(device: str, teachers: Mapping[str, Path], plugins: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Everything a run's numbers depend on apart from its name: versions, device, threads, code, plug-ins, and its teachers' weights."""
    files = {f"teacher {name}": content_hash(file) for name, file in teachers.items() if file.is_file()}
    # The number of threads changes the rounding of sums, but only on the CPU.
    threads = {"threads": str(torch.get_num_threads())} if device == "cpu" else {}
    return {"versions": {**versions(), "device": device, **threads}, "code": {**code(), **plugins}, "files": files}


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the numerical libraries."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}


@cache
def code() -> dict[str, str]:
    """Hash of each source file that a run's numbers may depend on."""
    root = Path(raredistill.__file__).parent
    files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    return {str(path): sha256(root / path)[:16] for path in files if path.parts[0] not in ASIDE}


def check_origin(folder: RunFolder, now: dict[str, dict[str, str]]) -> None:
    """Refuse to resume an unfinished run with different code, versions or files.

    Raises:
        CheckpointError: something differs; the message names it and the remedy.
    """
    then = _started_with(folder.draft)
    differing = [] if then is None else [f"{name} was {old} and is {new}" for name, old, new in _differences(then, now)]
    if differing:
        raise CheckpointError(
            f"{folder.draft.path} was started with something else: {'; '.join(differing)}. "
            "Resume it with the same code and versions, or delete that folder to train the run from scratch"
        )


def _started_with(draft: RunFolder) -> dict[str, Any] | None:
    # Also None if the run was killed before its start, or is damaged: then it cannot be resumed.
    try:
        record = read_json(draft.origin)
    except DataError:
        return None
    return record if isinstance(record, dict) and is_sealed(record) else None


def _differences(then: dict[str, Any], now: dict[str, dict[str, str]]) -> list[tuple[str, str, str]]:
    pairs = [(name, then[part].get(name, "absent"), now[part].get(name, "absent")) for part in now for name in {**then[part], **now[part]}]
    return [pair for pair in pairs if pair[1] != pair[2]]


def open_draft(folder: RunFolder, now: dict[str, dict[str, str]]) -> RunFolder:
    """Return the draft folder of a run: a new one, or that of an interrupted start, cleaned up.

    Raises:
        CheckpointError: it was started with something else.
    """
    check_origin(folder, now)
    draft = folder.draft
    if _started_with(draft) is None:
        shutil.rmtree(draft.path, ignore_errors=True)
        draft.path.mkdir(parents=True)
        write_json(draft.origin, seal(now))
    tidy(draft.path)
    return draft


def finish(folder: RunFolder, record: RunRecord) -> None:
    """Promote the draft to the final run folder. Its record, written last, holds the hash of every result.

    The saved state is deleted only after the folder has been moved, so a crash in between loses nothing.
    """
    draft = folder.draft
    files = {name: sha256(draft.path / name) for name in RESULTS}
    write_json(draft.record, seal({**record.as_json(), "files": files}))
    os.replace(draft.path, folder.path)
    clear_state(folder.path)


def abandon(folder: RunFolder) -> None:
    """Remove the draft of a run that failed before its state was saved, for example because its teacher was refused."""
    draft = folder.draft
    if not has_state(draft.path) and not draft.weights("best").exists():
        shutil.rmtree(draft.path, ignore_errors=True)


def discard(folder: RunFolder) -> None:
    """Delete a run's draft and all its saved state, so that the run cannot be resumed."""
    shutil.rmtree(folder.draft.path, ignore_errors=True)


def read_finished(folder: RunFolder) -> RunRecord:
    """Read the record of a finished run, after checking every byte of its results.

    Raises:
        DataError: a file is missing, or its content has changed.
    """
    record = checked_record(folder)
    clear_state(folder.path)
    return record


def checked_record(folder: RunFolder, names: Sequence[str] = RESULTS) -> RunRecord:
    """Read the record of a finished run, after checking its own hash and those of some of its results.

    Args:
        folder: of the run.
        names: the results to check; all by default.

    Raises:
        DataError: a file is missing, or its content has changed.
    """
    record = read_json(folder.record)
    if not isinstance(record, dict) or not is_sealed(record) or set(record.get("files", ())) != set(RESULTS):
        raise DataError(f"{folder.record}: its content does not match its hash")
    for name in names:
        if not (folder.path / name).is_file() or sha256(folder.path / name) != record["files"][name]:
            raise DataError(f"{folder.path / name}: missing, or its content does not match its hash")
    return read_run(record, folder.record)


def set_aside(folder: RunFolder) -> Path:
    """Move a damaged run aside, so that it is trained again and can still be inspected; returns its new path."""
    shutil.rmtree(folder.damaged, ignore_errors=True)
    os.replace(folder.path, folder.damaged)
    return folder.damaged
