"""Prepare a source as a cohort on disk: in parallel, one patient per worker, interruptible at any time."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from isal import isal_zlib

from raredistill import files
from raredistill.cohort import store
from raredistill.cohort.duplicates import Copies, Prints, dropped, find_copies, joined, prints_of
from raredistill.cohort.parallel import over_units
from raredistill.cohort.sources import Problem, Source, Unit
from raredistill.cohort.store import WORK, Cohort
from raredistill.cohort.verify import compared, decoding_error, gathered, listed_problems, rows_of, treatment_of
from raredistill.errors import ConfigError, DataError

JOB = "job.json"
PAIRS = "near-duplicates.png"
SMALLEST, LARGEST = 8, 1024
"""Limits of a sample's side in pixels."""
TOLD = 20
"""Number of problems that a message lists; further ones are only counted."""
LIBRARIES = ("raredistill", "numpy", "torch", "nibabel", "h5py", "isal", "pillow")

Progress = Callable[[int, int], None]


def prepare(
    source: Source,
    out: Path,
    *,
    size: tuple[int, int],
    workers: int | None = None,
    leave_out_bad: bool = False,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Cohort:
    """Read every patient of a source once and write a cohort.

    Each patient's samples are kept in ``out/.parts`` until all are finished, so that the same call after an interruption resumes. The
    disk needs space for the pixels twice while the cohort is assembled.

    Args:
        source: raw data.
        out: the folder of the cohort: new, empty, or of the same preparation, interrupted or done (then it is returned as it is).
        size: ``(height, width)`` of the samples in pixels.
        workers: processes; all cores by default, one patient each.
        leave_out_bad: leave out patients with errors, and list them in the provenance.
        progress: called with the number of finished patients and the total.
        executor: running processes (``parallel.pool``), used instead of new ones; ``workers`` is then ignored.

    Raises:
        ConfigError: the size is out of range.
        DataError: the source has errors (all are listed), nothing is left, or ``out`` contains something else.
    """
    if not all(SMALLEST <= side <= LARGEST for side in size):
        raise ConfigError(f"size {size[0]} x {size[1]}: a side has from {SMALLEST} to {LARGEST} pixels")
    out, job = Path(out), _job(source, size)
    finished = {**job, "duplicates": treatment_of(source)}  # not of an unfinished one: the cure of copies can be taken up
    if (out / store.DESCRIPTION).exists():
        return _finished(out, finished)
    problems = listed_problems(source)
    _refuse(source, problems, leave_out_bad)
    if (out / store.DESCRIPTION).exists():  # another process has made it in the meantime
        return _finished(out, finished)
    files.claim_folder(out, WORK)
    with files.locked(out / WORK / "lock"):
        if (out / store.DESCRIPTION).exists():  # or while this one waited
            return _finished(out, finished)
        _claim_job(out, job)
        files.tidy(out)
        with store.Writer(out, source.channels) as writer:
            parts, unreadable = _read_parts(source, writer, size, progress, workers=workers, executor=executor)
            _refuse(source, unreadable, leave_out_bad)
            samples, prints = _prints(parts)
            copies = find_copies(samples, prints)
            found = compared(copies, prints, source)
            _refuse(source, found, leave_out_bad)
            names = _treated(source, writer, parts, copies)
            provenance = _provenance(job, parts, [*problems, *unreadable, *found], source, names)
            cohort = writer.finish(
                store.checked(_renamed(_samples(parts), names), source.classes()), classes=source.classes(), size=size,
                provenance=provenance, patients_known=getattr(source, "patients_known", True),
            )  # fmt: skip
    if len(copies.near):
        # Drawing is slow to import and rarely needed.
        from raredistill.cohort.inspect import pair_sheet

        pair_sheet(copies, prints.looks, out / PAIRS)
    return cohort


def _job(source: Source, size: tuple[int, int]) -> dict[str, Any]:
    """All inputs of the preparation; files by name and size, so that a moved source is the same."""
    units = [[unit.patient, unit.label, [[file.name, _file_size(file)] for file in unit.files]] for unit in source.units()]
    return {"kind": source.kind, "settings": source.settings(), "size": list(size), "inputs": files.fingerprint(units)}


def _prints(parts: list[dict[str, Any]]) -> tuple[pd.DataFrame, Prints]:
    rows = [rows_of(Unit(part["patient"], part["label"], ()), part["rows"]) for part in parts]
    return gathered(rows, [Prints.of_record(part["prints"]) for part in parts])


def _treated(source: Source, writer: store.Writer, parts: list[dict[str, Any]], copies: Copies) -> dict[str, str]:
    """Leave out or join what is equal or nearly so, as the source's ``duplicates`` asks; returns patient -> name of its unit."""
    treatment = treatment_of(source)
    if treatment == "drop":
        _append_without(writer, parts, set(copies.samples["sample"].iloc[dropped(copies)]))
    return joined(copies, near=treatment == "near") if treatment in ("join", "near") else {}


def _append_without(writer: store.Writer, parts: list[dict[str, Any]], gone: set[str]) -> None:
    """Append all parts without some samples, which also leave the parts' rows."""
    for part in parts:
        kept = np.array([row["sample"] not in gone for row in part["rows"]], dtype=bool)
        folder = writer.root / WORK
        blocks = {channel: next(_blocks(folder, part, channel)).reshape(len(kept), -1)[kept] for channel in part["checks"]}
        writer.append({channel: [block] for channel, block in blocks.items()})
        part["rows"] = [row for row, keep in zip(part["rows"], kept, strict=True) if keep]


def _renamed(samples: pd.DataFrame, names: dict[str, str]) -> pd.DataFrame:
    """Samples of joined patients under one name; a patient's label is what all its parts agree on."""
    if not names:
        return samples
    patients = samples["patient"].map(lambda name: names.get(name, name))
    labels = samples["patient_label"].groupby(patients).agg(lambda found: found.iloc[0] if found.nunique() == 1 else "")
    return samples.assign(patient=patients, patient_label=patients.map(labels))


def _file_size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return -1  # reading will report it, with the patient's other problems


def _finished(out: Path, job: dict[str, Any]) -> Cohort:
    cohort = Cohort.load(out)
    _same_job(out, {"duplicates": "refuse", **cohort.provenance}, job, "a cohort")
    if (out / WORK).exists():  # killed after the cohort was written, or another process is just finishing
        with files.locked(out / WORK / "lock"):
            store.clear(out)
    return cohort


def _claim_job(out: Path, job: dict[str, Any]) -> None:
    file = out / WORK / JOB
    if file.exists():
        _same_job(out, files.read_json(file), job, "an unfinished cohort")
    else:
        files.write_json(file, job)


def _same_job(out: Path, found: dict[str, Any], job: dict[str, Any], what: str) -> None:
    differing = [key for key in job if found.get(key) != _plain(job[key])]
    if differing:
        raise DataError(
            f"{out} holds {what} that was prepared differently (in {', '.join(differing)}); "
            "name another folder, or delete this one to prepare it again"
        )


def _plain(value: Any) -> Any:
    """The value after a round trip through JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _refuse(source: Source, problems: list[Problem], leave_out_bad: bool) -> None:
    errors = [problem for problem in problems if problem.level == "error"]
    if not errors or (leave_out_bad and all(problem.patient for problem in errors)):
        return
    lines = [": ".join(filter(None, (p.patient, p.file, f"{p.what}; {p.cure}"))) for p in errors[:TOLD]]
    more = [f"... and {len(errors) - TOLD} more; `raredistill verify` lists all"] if len(errors) > TOLD else []
    raise DataError(
        "\n".join([f"{source.kind}: {len(errors)} error(s); repair them or leave the patients out (leave_out_bad)", *lines, *more])
    )


def _read_parts(
    source: Source, writer: store.Writer, size: tuple[int, int], progress: Progress | None, **processes: Any
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """Write every patient's part to disk and append it to the cohort, in the order of the units, while workers read the next."""
    units, folder = source.units(), writer.root / WORK
    later = treatment_of(source) == "drop"  # which samples go is known when all are there
    done = {unit.patient: part for unit in units if (part := _load_part(folder, unit, source.channels, size))}
    missing = [unit for unit in units if unit.patient not in done]
    unreadable: list[Problem] = []
    assembly = _Assembly(writer, [] if later else [unit.patient for unit in units])
    _tell(progress, len(done), len(units))
    for patient, part in done.items():
        assembly.add(patient, part)
    for count, (patient, part, problem) in enumerate(over_units(write_part, missing, (source, folder, size), **processes), 1):
        if part is not None:
            done[patient] = part
        if problem is not None:
            unreadable.append(problem)
        _tell(progress, len(units) - len(missing) + count, len(units))
        assembly.add(patient, part)
    return [done[unit.patient] for unit in units if unit.patient in done], unreadable


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress:
        progress(done, total)


def write_part(unit: Unit, source: Source, folder: Path, size: tuple[int, int]) -> tuple[str, dict[str, Any] | None, Problem | None]:
    """Read one patient and write its part: pixel files first, the description last, so that a part with a description is complete."""
    try:
        slices = source.read(unit, size)
    except DataError as error:
        return unit.patient, None, decoding_error(unit, error)
    checks = {channel: _write_pixels(_part_file(folder, unit, f"{channel}.u8"), slices.pixels[channel]) for channel in source.channels}
    part = {
        "patient": unit.patient,
        "label": unit.label,
        "stamps": _stamps(unit),
        "rows": slices.rows,
        "tally": slices.tally,
        "hashes": slices.hashes or {file.name: files.sha256(file) for file in unit.files},
        "problems": [asdict(problem) for problem in slices.problems],
        "checks": checks,
        "prints": prints_of(slices).record(),
        "key": _key(unit),
    }
    _write_description(_part_file(folder, unit, "json"), part)
    return unit.patient, part, None


def _write_description(path: Path, part: dict[str, Any]) -> None:
    """Write a file completely or not at all, without waiting for the disk: after a crash, a part is written again or fails its checks."""
    temporary = path.with_suffix(".tmp")
    with files.naming(path):
        temporary.write_text(json.dumps(files.seal(part)), encoding="utf-8")
        temporary.replace(path)


def _write_pixels(path: Path, pixels: np.ndarray) -> int:
    raw = np.ascontiguousarray(pixels).reshape(-1).data
    with files.naming(path):
        path.write_bytes(raw)
    return isal_zlib.crc32(raw)


def _key(unit: Unit) -> str:
    return hashlib.sha256(unit.patient.encode()).hexdigest()[:20]  # a patient's name may not be a file's name


def _part_file(folder: Path, unit: Unit, ending: str) -> Path:
    return folder / f"{_key(unit)}.{ending}"


def _stamps(unit: Unit) -> list[list[Any]]:
    return [[file.name, _file_size(file), file.stat().st_mtime_ns if file.exists() else -1] for file in unit.files]


def _load_part(folder: Path, unit: Unit, channels: tuple[str, ...], size: tuple[int, int]) -> dict[str, Any] | None:
    """A part of an interrupted preparation, if it is complete and neither it nor its raw files have changed."""
    try:
        part: dict[str, Any] = files.read_json(_part_file(folder, unit, "json"))
    except DataError:
        return None
    if not isinstance(part, dict) or not files.is_sealed(part):
        return None
    if "prints" not in part:
        return None
    expected = len(part["rows"]) * size[0] * size[1]
    whole = all(_file_size(_part_file(folder, unit, f"{channel}.u8")) == expected for channel in channels)
    return part if whole and part["stamps"] == _stamps(unit) and part["label"] == unit.label else None


class _Assembly:
    """Appends the parts to the cohort in the order of the patients, each as soon as all previous ones are available."""

    def __init__(self, writer: store.Writer, patients: list[str]) -> None:
        self._writer, self._waiting = writer, iter(patients)
        self._next = next(self._waiting, None)
        self._settled: dict[str, dict[str, Any] | None] = {}

    def add(self, patient: str, part: dict[str, Any] | None) -> None:
        """Add a patient's part, or None if the patient cannot be read."""
        self._settled[patient] = part
        while self._next in self._settled:
            if (known := self._settled.pop(self._next)) is not None:
                folder = self._writer.root / WORK
                self._writer.append({channel: _blocks(folder, known, channel) for channel in known["checks"]})
            self._next = next(self._waiting, None)


def _blocks(folder: Path, part: dict[str, Any], channel: str) -> Iterator[np.ndarray]:
    path = folder / f"{part['key']}.{channel}.u8"
    block = np.memmap(path, dtype=np.uint8, mode="r") if part["rows"] else np.zeros(0, np.uint8)
    if isal_zlib.crc32(block.data) != part["checks"][channel]:
        raise DataError(f"{path} was damaged, perhaps when the machine stopped; delete {folder.parent} and prepare it anew")
    yield block


def _samples(parts: list[dict[str, Any]]) -> pd.DataFrame:
    rows = [{"patient": part["patient"], "patient_label": part["label"], **row} for part in parts for row in part["rows"]]
    return pd.DataFrame(rows, columns=list(store.COLUMNS))


def _provenance(
    job: dict[str, Any], parts: list[dict[str, Any]], problems: list[Problem], source: Source, names: dict[str, str]
) -> dict[str, Any]:
    tally: Counter[str] = Counter()
    for part in parts:
        tally.update(part["tally"])
    told = [asdict(problem) for problem in problems] + [problem for part in parts for problem in part["problems"]]
    used = {part["patient"] for part in parts}
    return {
        **job,
        "patients": len(parts),
        "tally": dict(sorted(tally.items())),
        "skipped": [asdict(skip) for skip in source.skipped()],
        **({"duplicates": treatment_of(source)} if treatment_of(source) != "refuse" else {}),
        **({"joined": names} if names else {}),
        "left_out": [problem for problem in told if problem["patient"] and problem["patient"] not in used],
        "remarks": [problem for problem in told if problem["patient"] in used or not problem["patient"]],
        "hashes": {part["patient"]: part["hashes"] for part in parts},
        "versions": _versions(),
    }


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}
