"""The cohort on disk: samples.parquet, one raw pixel file a channel, and cohort.json, written last. Read-only once written."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raredistill import files
from raredistill.errors import DataError

FORMAT = 1
COLUMNS = ("sample", "patient", "patient_label", "label", "slice", "source", "split")
DESCRIPTION = "cohort.json"
SAMPLES = "samples.parquet"
MASK = "mask"
"""Channel that holds the segmentation: at hand in training only, so a run takes it only where it is named."""
CONTENT = ("classes", "channels", "size", "pixels", "samples")
"""Entries of the description that the cohort's hash covers."""
WORK = ".parts"
"""Folder inside an unfinished cohort: its presence says that the folder is ours to go on with."""


@dataclass(frozen=True)
class Cohort:
    """The only thing that training reads: labelled, normalised, resized samples of patients.

    Attributes:
        root: the folder.
        samples: one row a sample, index 0..N-1, columns ``sample, patient, patient_label, label, slice, source, split``.
        channels: such as ``("flair", "t1ce")``.
        classes: class names; their order is the order of class indices.
        size: ``(height, width)`` in pixels.
        provenance: where the samples come from and how they were made.
        hash: of samples, classes, channels and pixels; independent of the folder's place and of the machine.
        background: the class that no patient carries (healthy), or None.
    """

    root: Path
    samples: pd.DataFrame
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    size: tuple[int, int]
    provenance: dict[str, Any]
    hash: str
    background: str | None

    @classmethod
    def load(cls, root: Path) -> Cohort:
        """Open a cohort folder; its pixels stay on disk.

        Raises:
            DataError: the folder is no cohort, is unfinished, or was damaged.
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
        )

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.root.resolve().name

    @property
    def patient_classes(self) -> tuple[str, ...]:
        """The classes that patients carry: all but the background."""
        return tuple(name for name in self.classes if name != self.background)

    @property
    def labels(self) -> np.ndarray:
        """``(N,)`` int64 class indices."""
        return np.asarray(pd.Categorical(self.samples["label"], categories=list(self.classes)).codes, dtype=np.int64)

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
        """Read some channels once, all by default, and compare them with their hashes: a disk may change what it keeps.

        Raises:
            DataError: a channel's file was changed after the cohort was made.
        """
        told = _description(self.root)["pixels"]
        paths = {channel: pixel_file(self.root, channel) for channel in (self.channels if channels is None else channels)}
        with ThreadPoolExecutor() as threads:
            for channel, digest in zip(paths, threads.map(files.sha256, paths.values()), strict=True):
                if digest != told[channel]:
                    raise DataError(f"{paths[channel]} was changed after the cohort was made; prepare the cohort again")

    def counts(self) -> pd.DataFrame:
        """Slices and patients by class: columns ``class, slices, patients``, one row a class in the order of ``classes``."""
        grouped = self.samples.groupby("label", observed=True)["patient"]
        table = pd.DataFrame({"slices": grouped.size(), "patients": grouped.nunique()})
        table = table.reindex(list(self.classes), fill_value=0).astype(int)
        return table.rename_axis("class").reset_index()


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
        samples: one row a sample with the columns of ``COLUMNS``; the row order is the pixels' order.
        pixels: channel -> uint8 arrays that together hold N images of ``size``: one ``(N, height, width)`` array, or blocks of it in order.
        classes: class names in the order of class indices, a background class first.
        size: ``(height, width)``.
        provenance: JSON-like facts to carry.

    Raises:
        DataError: the table and pixels do not fit together, or the folder holds something else.
    """
    root, names = Path(root), tuple(classes)
    table = _tidy(samples)
    _check_samples(table, names)
    if (root / DESCRIPTION).exists():
        raise DataError(f"{root} already holds a cohort; name another folder or delete it")
    files.claim_folder(root, WORK)
    (root / WORK).mkdir(exist_ok=True)
    hashes = _write_channels(root, pixels, len(table) * size[0] * size[1])
    with files.atomic(root / SAMPLES) as temporary:
        table.to_parquet(temporary, index=False)
    content = {"classes": names, "channels": tuple(pixels), "size": tuple(size), "pixels": hashes, "samples": _table_hash(table)}
    files.write_json(root / DESCRIPTION, _describe(root, table, content, names, provenance or {}))
    shutil.rmtree(root / WORK)
    return Cohort.load(root)


def background_of(samples: pd.DataFrame, classes: tuple[str, ...]) -> str | None:
    """Name the class that stands first and that no patient carries; None where patients carry every class or none."""
    carried = set(samples["patient_label"]) - {""}
    return classes[0] if carried and classes[0] not in carried else None


def pixel_file(root: Path, channel: str) -> Path:
    """Where a channel's pixels lie: N x height x width bytes without a header."""
    return root / "pixels" / f"{channel}.u8"


def _describe(
    root: Path, table: pd.DataFrame, content: dict[str, Any], classes: tuple[str, ...], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        **content,
        "background": background_of(table, classes),
        "hash": files.fingerprint(content),
        "samples_file": files.sha256(root / SAMPLES),
        "provenance": dict(provenance),
    }


def _tidy(samples: pd.DataFrame) -> pd.DataFrame:
    missing = [column for column in COLUMNS if column not in samples]
    if missing:
        raise DataError(f"the sample table lacks the column(s) {', '.join(missing)}")
    table = samples[list(COLUMNS)].reset_index(drop=True)
    return table.astype({column: "int64" if column == "slice" else str for column in COLUMNS})


def _check_samples(samples: pd.DataFrame, classes: tuple[str, ...]) -> None:
    if samples.empty:
        raise DataError("no sample is left, so there is no cohort to write; see `raredistill verify` for what was left out")
    unknown = sorted(set(samples["label"]) - set(classes))
    if unknown:
        raise DataError(f"samples carry the unknown label(s) {', '.join(unknown)}; the classes are {', '.join(classes)}")
    twice = samples["sample"][samples["sample"].duplicated()]
    if len(twice):
        raise DataError(f"sample '{twice.iloc[0]}' occurs twice; give every sample a name of its own")


def _write_channels(root: Path, pixels: Mapping[str, Iterable[np.ndarray]], expected: int) -> dict[str, str]:
    """Write all channels side by side (hashing and writing leave Python's lock); channel -> hash."""

    def write(channel: str) -> str:
        return _write_pixels(pixel_file(root, channel), pixels[channel], expected)

    with ThreadPoolExecutor() as threads:
        return dict(zip(pixels, threads.map(write, pixels), strict=True))


def _write_pixels(path: Path, blocks: Iterable[np.ndarray], expected: int) -> str:
    digest, written = hashlib.sha256(), 0
    with files.atomic(path) as temporary, temporary.open("wb") as handle:
        for block in blocks:
            raw = _bytes(block, path)
            digest.update(raw)
            written += handle.write(raw)
        if written != expected:
            raise DataError(f"{path}: {written} bytes of pixels where the sample table and size ask for {expected}")
    return digest.hexdigest()


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
        raise DataError(f"{root / DESCRIPTION} is of an unknown format; prepare the cohort again with this version")
    if description.get("hash") != files.fingerprint({key: description.get(key) for key in CONTENT}):
        raise DataError(
            f"{root / DESCRIPTION}: its content does not match its hash, so it was changed after the cohort was made; "
            "prepare the cohort again"
        )
    return description


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
