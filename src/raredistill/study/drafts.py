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
from raredistill.training.resume import clear_state, has_state

UNFINISHED, DAMAGED = ".unfinished", ".damaged"
ORIGIN, RECORD = "origin.json", "run.json"
RESULTS = ("best.safetensors", "last.safetensors", "predictions.parquet", "epochs.jsonl")
LIBRARIES = ("torch", "timm", "lightning", "numpy")
"""Those that a run's numbers depend on."""
ASIDE = ("cli.py", "config.py", "console.py", "demo.yaml", "phantom.py", "cohort", "evaluation", "report")
"""Rooms that no run's numbers depend on: the cohort itself has its own hash."""


def origin(device: str, teachers: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """What a run's numbers depend on beside what names it: versions, device, threads, the program's files, and its teachers' weights."""
    files = {f"teacher {name}": content_hash(file) for name, file in teachers.items() if file.is_file()}
    # A sum over other parts has other bits; on other devices than the CPU its threads sum nothing.
    threads = {"threads": str(torch.get_num_threads())} if device == "cpu" else {}
    return {"versions": {**versions(), "device": device, **threads}, "code": code(), "files": files}


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


def unfinished(folder: Path) -> Path:
    """Where the run of ``folder`` is made."""
    return folder.with_name(folder.name + UNFINISHED)


def check_origin(folder: Path, now: dict[str, dict[str, str]]) -> None:
    """Refuse to go on with an unfinished run under other code, versions or files.

    Raises:
        CheckpointError: what differs, and what to do.
    """
    draft = unfinished(folder)
    then = _begun_with(draft)
    differing = [] if then is None else [f"{name} was {old} and is {new}" for name, old, new in _differences(then, now)]
    if differing:
        raise CheckpointError(
            f"{draft} was begun with something else: {'; '.join(differing)}. "
            "Go on with what it was begun with, or delete that folder to train the run anew"
        )


def _begun_with(draft: Path) -> dict[str, Any] | None:
    # None too when it was killed before it was begun, or is damaged: then nothing can be gone on with.
    try:
        record = read_json(draft / ORIGIN)
    except DataError:
        return None
    return record if isinstance(record, dict) and is_sealed(record) else None


def _differences(then: dict[str, Any], now: dict[str, dict[str, str]]) -> list[tuple[str, str, str]]:
    pairs = [(name, then[part].get(name, "absent"), now[part].get(name, "absent")) for part in now for name in {**then[part], **now[part]}]
    return [pair for pair in pairs if pair[1] != pair[2]]


def open_draft(folder: Path, now: dict[str, dict[str, str]]) -> Path:
    """The folder in which a run is made: a new one, or that of an interrupted start, tidied up.

    Raises:
        CheckpointError: it was begun with something else.
    """
    check_origin(folder, now)
    draft = unfinished(folder)
    if _begun_with(draft) is None:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        write_json(draft / ORIGIN, seal(now))
    tidy(draft)
    return draft


def finish(folder: Path, record: dict[str, Any]) -> None:
    """Make a draft the run's folder. Its record, written last, holds the hash of every result.

    The state goes only when the folder is in its place: a crash in between costs nothing.
    """
    draft = unfinished(folder)
    write_json(draft / RECORD, seal({**record, "files": {name: sha256(draft / name) for name in RESULTS}}))
    os.replace(draft, folder)
    clear_state(folder)


def abandon(folder: Path) -> None:
    """Remove the draft of a run that failed before anything was kept, such as one whose teacher was refused."""
    if not has_state(unfinished(folder)) and not (unfinished(folder) / RESULTS[0]).exists():
        shutil.rmtree(unfinished(folder), ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove the draft of a run with all that was kept of it: it must not be gone on with."""
    shutil.rmtree(unfinished(folder), ignore_errors=True)


def read_finished(folder: Path) -> dict[str, Any]:
    """The record of a finished run, after a look at every byte of its results.

    Raises:
        DataError: a file is missing, or is not what was written.
    """
    record = checked_record(folder)
    clear_state(folder)
    return record


def checked_record(folder: Path, names: Sequence[str] = RESULTS) -> dict[str, Any]:
    """The record of a finished run, after its own hash and those of some of its results were compared.

    Args:
        folder: of the run.
        names: the results whose bytes are read; all by default.

    Raises:
        DataError: a file is missing, or is not what was written.
    """
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or not is_sealed(record) or set(record.get("files", ())) != set(RESULTS):
        raise DataError(f"{folder / RECORD}: its content does not match its hash")
    for name in names:
        if not (folder / name).is_file() or sha256(folder / name) != record["files"][name]:
            raise DataError(f"{folder / name}: missing, or its content does not match its hash")
    return {key: value for key, value in record.items() if key not in ("files", "seal")}


def set_aside(folder: Path) -> Path:
    """Move a damaged run out of the way, so that it is made again and can still be looked at."""
    aside = folder.with_name(folder.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    return aside
