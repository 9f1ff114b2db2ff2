"""The cohort on disk: samples.parquet, one raw pixel file per channel, and cohort.json, written last. Read-only once written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raredistill import files
from raredistill.errors import DataError
from raredistill.names import fault, fault_of_part, first_fault, shown

FORMAT = 2
"""2: the whole description is sealed; those of format 1 are refused."""
COLUMNS = ("sample", "patient", "patient_label", "label", "slice", "source", "split")
DESCRIPTION = "cohort.json"
SAMPLES = "samples.parquet"
MASK = "mask"
"""Channel with the segmentation: available in training only, so a run uses it only if named explicitly."""
CONTENT = ("classes", "channels", "size", "pixels", "samples")
"""Entries of the description that the cohort's hash covers."""
AT_ONCE = 256
"""Images read by one system call; at most 1,024 are possible."""
WORK = ".parts"
"""Folder inside an unfinished cohort: its presence shows that the preparation can be resumed."""


@dataclass(frozen=True)
class Cohort:
    """The only thing that training reads: labelled, normalised, resized samples of patients.

    Attributes:
        root: the folder.
        samples: one row per sample, index 0..N-1, columns ``sample, patient, patient_label, label, slice, source, split``.
        channels: such as ``("flair", "t1ce")``.
        classes: class names; their order is the order of class indices.
        size: ``(height, width)`` in pixels.
        provenance: source of the samples and their preparation.
        hash: hash of samples, classes, channels and pixels; independent of the folder's path and of the machine.
        background: the class that is not a patient's label (healthy), or None.
        patients_known: whether patients are known; otherwise each sample is its own unit, and patients are not counted.
    """

    root: Path
    samples: pd.DataFrame
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    size: tuple[int, int]
    provenance: dict[str, Any]
    hash: str
    background: str | None
    patients_known: bool = True

    @classmethod
    def load(cls, root: Path) -> Cohort:
        """Open a cohort folder; its pixels stay on disk.

        Raises:
            DataError: the folder is not a cohort, is unfinished, or was damaged.
        """
        root = Path(root)
        description = _description(root)
        samples = _read_samples(root, description)
        channels = tuple(description["channels"])
        height, width = description["size"]
        for channel in channels:
            _check_pixels(pixel_file(root, channel), len(samples) * height * width)
        return cls(
            root=root,
            samples=samples,
            channels=channels,
            classes=tuple(description["classes"]),
            size=(height, width),
            provenance=description["provenance"],
            hash=description["hash"],
            background=description["background"],
            patients_known=description.get("patients_known", _distinct(samples)),
        )

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.root.resolve().name

    @property
    def patient_classes(self) -> tuple[str, ...]:
        """The classes that patients can have: all except the background."""
        return tuple(name for name in self.classes if name != self.background)

    @property
    def labelled(self) -> np.ndarray:
        """Rows with a label, int64: only these can be in a split."""
        return np.flatnonzero((self.samples["label"] != "").to_numpy()).astype(np.int64)

    @property
    def unlabelled(self) -> np.ndarray:
        """Rows without a label, int64: a separate part, never used for testing or validation."""
        return np.flatnonzero((self.samples["label"] == "").to_numpy()).astype(np.int64)

    @property
    def labels(self) -> np.ndarray:
        """``(N,)`` int64 class indices; -1 where a sample has no label."""
        return np.asarray(pd.Index(list(self.classes), dtype=object).get_indexer(pd.Index(self.samples["label"])), dtype=np.int64)

    def pixels(self, channel: str) -> np.ndarray:
        """Map one channel, ``(N, height, width)`` uint8, read-only.

        Raises:
            DataError: the cohort lacks the channel.
        """
        if channel not in self.channels:
            raise DataError(f"cohort {self.root} has no channel '{channel}'; it has {', '.join(self.channels)}")
        shape = (len(self.samples), *self.size)
        return np.memmap(pixel_file(self.root, channel), dtype=np.uint8, mode="r", shape=shape)

    def check_pixels(self, channels: Iterable[str] | None = None) -> None:
        """Read some channels once (all by default) and compare them with their hashes, to detect changes on disk.

        A file that this process has already checked, and that has not been modified since, is not read again.

        Raises:
            DataError: a channel's file was changed after the cohort was made.
        """
        told = _description(self.root)["pixels"]
        paths = {channel: pixel_file(self.root, channel) for channel in (self.channels if channels is None else channels)}
        with ThreadPoolExecutor() as threads:
            for channel, digest in zip(paths, threads.map(_hash_unless_known, paths.values()), strict=True):
                if digest != told[channel]:
                    raise DataError(f"{paths[channel]} was changed after the cohort was made; prepare the cohort again")

    def counts(self) -> pd.DataFrame:
        """Slices and patients by class: columns ``class, slices, patients``, one row per class in the order of ``classes``."""
        grouped = self.samples.groupby("label", observed=True)["patient"]
        table = pd.DataFrame({"slices": grouped.size(), "patients": grouped.nunique()})
        table = table.reindex(list(self.classes), fill_value=0).astype(int)
        return table.rename_axis("class").reset_index()


class PixelReader:
    """Reads rows of some channels from the cohort's files into the caller's memory.

    It reads instead of mapping files, which releases Python's lock, and does not count the files as the process's memory.

    Args:
        cohort: an open cohort.
        channels: channels in the order of the images.

    Raises:
        OSError: a channel's file cannot be opened.
    """

    def __init__(self, cohort: Cohort, channels: Iterable[str]) -> None:
        self._image = cohort.size[0] * cohort.size[1]
        with ExitStack() as opened:
            self._files = [opened.enter_context(pixel_file(cohort.root, channel).open("rb", buffering=0)) for channel in channels]
            self._opened = opened.pop_all()

    def __enter__(self) -> PixelReader:
        """The reader itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._opened.close()

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Fill ``out (M, C, height, width)`` uint8 with the images of ``rows (M,)``; consecutive rows are read together.

        Raises:
            DataError: a file is shorter than before.
        """
        cuts = np.flatnonzero((np.diff(rows) != 1) | (np.arange(1, len(rows)) % AT_ONCE == 0)) + 1
        for start, stop in pairwise([0, *cuts.tolist(), len(rows)] if len(rows) else []):
            for channel, file in enumerate(self._files):
                images = list(out[start:stop, channel])
                if os.preadv(file.fileno(), images, int(rows[start]) * self._image) != len(images) * self._image:
                    raise DataError(f"{file.name} was cut short after the cohort was made; prepare the cohort again")


def save(
    root: Path,
    samples: pd.DataFrame,
    pixels: Mapping[str, Iterable[np.ndarray]],
    *,
    classes: Iterable[str],
    size: tuple[int, int],
    provenance: Mapping[str, Any] | None = None,
) -> Cohort:
    """Write a cohort; ``cohort.json`` comes last, so that a folder with it is complete.

    Args:
        root: a new or empty folder, or one whose preparation was interrupted.
        samples: one row per sample with the columns of ``COLUMNS``; the row order is the pixels' order.
        pixels: channel -> uint8 arrays that together hold N images of ``size``: one ``(N, height, width)`` array, or blocks of it in order.
        classes: class names in the order of class indices, a background class first.
        size: ``(height, width)``.
        provenance: JSON-like facts to carry.

    Raises:
        DataError: the table and pixels do not match, or the folder contains something else.
    """
    names = tuple(classes)
    table = checked(samples, names)
    with Writer(root, tuple(pixels)) as writer:
        writer.append(pixels)
        return writer.finish(table, classes=names, size=size, provenance=provenance or {})


class Writer:
    """Writes a cohort block by block, while its other blocks are still being made.

    Pixels are collected in the folder ``.parts`` and moved at the end; until then there is no cohort, and the next writer starts again.

    Args:
        root: a new or empty folder, or one whose preparation was interrupted.
        channels: their names.

    Raises:
        DataError: the folder holds a cohort or something else.
    """

    def __init__(self, root: Path, channels: tuple[str, ...]) -> None:
        self.root = Path(root)
        if (self.root / DESCRIPTION).exists():
            raise DataError(f"{root} already holds a cohort; name another folder or delete it")
        files.claim_folder(self.root, WORK)
        (self.root / WORK).mkdir(exist_ok=True)
        self._growing = {channel: self.root / WORK / f"{channel}.u8" for channel in channels}
        self._handles = {channel: path.open("wb") for channel, path in self._growing.items()}
        self._digests = {channel: hashlib.sha256() for channel in channels}
        self._threads = ThreadPoolExecutor()

    def __enter__(self) -> Writer:
        """The writer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files in any case."""
        self._threads.shutdown()
        for handle in self._handles.values():
            handle.close()

    def append(self, pixels: Mapping[str, Iterable[np.ndarray]]) -> None:
        """Append images, channels side by side: hashing and writing leave Python's lock.

        Args:
            pixels: channel -> uint8 arrays, blocks of its images in order.

        Raises:
            DataError: pixels are not uint8.
        """
        list(self._threads.map(self._extend, pixels, pixels.values()))

    def _extend(self, channel: str, blocks: Iterable[np.ndarray]) -> None:
        handle, path = self._handles[channel], pixel_file(self.root, channel)
        start = handle.tell()
        for block in blocks:
            raw = _bytes(block, path)
            self._digests[channel].update(raw)
            with files.naming(path):
                handle.write(raw)
        files.start_writing(handle, start)

    def finish(
        self,
        table: pd.DataFrame,
        *,
        classes: tuple[str, ...],
        size: tuple[int, int],
        provenance: Mapping[str, Any],
        patients_known: bool | None = None,
    ) -> Cohort:
        """Bring all to the disk; ``cohort.json`` comes last, so that a folder with it is complete.

        Args:
            table: as :func:`checked` gives it.
            classes: as :func:`save` takes them.
            size: ``(height, width)``.
            provenance: JSON-like facts to carry.
            patients_known: whether patients are known; by default, whether any sample is not its own patient.

        Raises:
            DataError: a channel holds more or less than the table and size ask for.
        """
        expected = len(table) * size[0] * size[1]
        waiting = [self._threads.submit(self._settle, channel, expected) for channel in self._handles]
        waiting.append(self._threads.submit(_write_samples, self.root, table))  # the disk is waited for once, not file by file
        for future in waiting:
            future.result()
        hashes = {channel: digest.hexdigest() for channel, digest in self._digests.items()}
        content = {"classes": classes, "channels": tuple(hashes), "size": tuple(size), "pixels": hashes, "samples": _table_hash(table)}
        known = _distinct(table) if patients_known is None else patients_known
        files.write_json(self.root / DESCRIPTION, _describe(self.root, table, content, classes, provenance, known))
        clear(self.root)
        return Cohort.load(self.root)

    def _settle(self, channel: str, expected: int) -> None:
        path, handle = pixel_file(self.root, channel), self._handles[channel]
        if (written := handle.tell()) != expected:
            raise DataError(f"{path}: {written} bytes of pixels where the sample table and size ask for {expected}")
        handle.flush()
        os.fsync(handle.fileno())
        path.parent.mkdir(exist_ok=True)
        self._growing[channel].replace(path)


def clear(root: Path) -> None:
    """Remove the workplace of a finished cohort; two processes may do so at once."""
    with ThreadPoolExecutor() as threads:  # the disk takes its time for each large file
        list(threads.map(partial(Path.unlink, missing_ok=True), (root / WORK).glob("*")))
    with suppress(OSError):  # gone already, or another process waits for its lock in there and removes it then
        (root / WORK).rmdir()


def _write_samples(root: Path, table: pd.DataFrame) -> None:
    with files.atomic(root / SAMPLES) as temporary:
        table.to_parquet(temporary, index=False)


def _distinct(samples: pd.DataFrame) -> bool:
    return bool((samples["patient"] != samples["sample"]).any())


def background_of(samples: pd.DataFrame, classes: tuple[str, ...]) -> str | None:
    """Name the class that stands first and that no patient carries; None where patients carry every class or none."""
    carried = set(samples["patient_label"]) - {""}
    return classes[0] if carried and classes[0] not in carried else None


def pixel_file(root: Path, channel: str) -> Path:
    """File of a channel's pixels: N x height x width bytes without a header."""
    return root / "pixels" / f"{channel}.u8"


def _describe(
    root: Path, table: pd.DataFrame, content: dict[str, Any], classes: tuple[str, ...], provenance: Mapping[str, Any], patients_known: bool
) -> dict[str, Any]:
    described = {
        "format": FORMAT,
        **content,
        "background": background_of(table, classes),
        "patients_known": patients_known,
        "hash": files.fingerprint(content),
        "samples_file": files.sha256(root / SAMPLES),
        "provenance": dict(provenance),
    }
    return files.seal(described)


def checked(samples: pd.DataFrame, classes: tuple[str, ...]) -> pd.DataFrame:
    """The sample table with the columns and types of a cohort.

    Raises:
        DataError: a column is missing, no sample is left, one occurs twice, or one is of an unknown class.
    """
    missing = [column for column in COLUMNS if column not in samples]
    if missing:
        raise DataError(f"the sample table lacks the column(s) {', '.join(missing)}")
    table = samples[list(COLUMNS)].reset_index(drop=True)
    table = table.astype({column: "int64" if column == "slice" else str for column in COLUMNS})
    _check_samples(table, classes)
    return table


def _check_samples(samples: pd.DataFrame, classes: tuple[str, ...]) -> None:
    if samples.empty:
        raise DataError("no sample is left, so there is no cohort to write; see `raredistill verify` for what was left out")
    unknown = sorted(set(samples["label"]) - {*classes, ""})
    if unknown:
        raise DataError(f"samples carry the unknown label(s) {', '.join(unknown)}; the classes are {', '.join(classes)}")
    for column in ("sample", "patient", "label", "split"):
        name, said = first_fault(samples[column])
        if said:
            raise DataError(f"the {column} {name!r:.80} {said}; rename it in the source")
    twice = samples["sample"][samples["sample"].duplicated()]
    if len(twice):
        raise DataError(f"sample '{twice.iloc[0]}' occurs twice; give every sample a name of its own")


def _hash_unless_known(path: Path) -> str:
    try:
        known = path.stat()
    except OSError:
        return ""
    return _hash_of(path.resolve(), (known.st_dev, known.st_ino, known.st_size, known.st_mtime_ns, known.st_ctime_ns))


@cache
def _hash_of(path: Path, stamp: tuple[int, ...]) -> str:
    return files.sha256(path)


def _bytes(block: np.ndarray, path: Path) -> memoryview:
    if block.dtype != np.uint8:
        raise DataError(f"{path}: pixels are {block.dtype} and must be uint8")
    return np.ascontiguousarray(block).reshape(-1).data


def _table_hash(samples: pd.DataFrame) -> str:
    return hashlib.sha256(samples.to_csv(index=False).encode()).hexdigest()


def _description(root: Path) -> dict[str, Any]:
    if not (root / DESCRIPTION).is_file():
        state = (
            "an unfinished cohort: run the same `raredistill prepare` again"
            if (root / WORK).exists()
            else "no cohort (it lacks cohort.json)"
        )
        raise DataError(f"{root} is {state}" if root.exists() else f"{root}: no such folder; make a cohort with `raredistill prepare`")
    description = files.read_json(root / DESCRIPTION)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise DataError(f"{root / DESCRIPTION} was written by another version of raredistill; prepare the cohort again with this one")
    if not files.is_sealed(description) or description.get("hash") != files.fingerprint({key: description.get(key) for key in CONTENT}):
        raise DataError(
            f"{root / DESCRIPTION}: its content does not match its hash, so it was changed after the cohort was made; "
            "prepare the cohort again"
        )
    _check_names(root, description)
    return description


def _check_names(root: Path, description: dict[str, Any]) -> None:
    """A seal says who wrote a file, not what it asks for: names stay in their folder, and the background is a class."""
    faulty = [(name, said) for name in description["channels"] if (said := fault_of_part(name))]
    faulty += [(name, said) for name in description["classes"] if (said := fault(name))]
    if faulty:
        raise DataError(f"{root / DESCRIPTION}: the name {shown(faulty[0][0])!r:.80} {faulty[0][1]}; prepare the cohort again")
    if description["background"] not in (None, *description["classes"]):
        raise DataError(f"{root / DESCRIPTION}: the background is not among the classes; prepare the cohort again")
    if linked := [name for name in description["channels"] if not files.inside(pixel_file(root, name), root)]:
        raise DataError(f"{pixel_file(root, linked[0])} is a link out of the cohort; put the file itself in its place")


def _read_samples(root: Path, description: dict[str, Any]) -> pd.DataFrame:
    path = root / SAMPLES
    if not path.is_file() or files.sha256(path) != description["samples_file"]:
        raise DataError(f"{path} is missing or was changed after the cohort was made; prepare the cohort again")
    return pd.read_parquet(path)


def _check_pixels(path: Path, expected: int) -> None:
    actual = path.stat().st_size if path.is_file() else -1
    if actual != expected:
        state = "is missing" if actual < 0 else f"holds {actual} bytes instead of {expected}"
        raise DataError(f"{path} {state}; prepare the cohort again")
