"""Cohorts from objects of a notebook: a table of images or paths, or a PyTorch data set with a patient for each item."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raredistill.cohort.prepare import prepare
from raredistill.cohort.sources import Problem
from raredistill.cohort.sources.images import ImageFiles, ImageSample, ordered_classes
from raredistill.cohort.sources.walk import Skips
from raredistill.cohort.store import DESCRIPTION, Cohort, save
from raredistill.errors import DataError
from raredistill.files import fingerprint

COLUMNS = ("image", "label", "patient")


def cohort_of(data: Any, out: Path, *, size: int) -> Cohort:
    """The cohort of data created in Python, prepared once in a folder below ``out`` that is named by the data's content.

    Args:
        data: a cohort, the folder of one, a data frame with ``image`` (paths, or uint8 arrays ``(H, W)`` or ``(H, W, C)`` of one size),
            ``label`` and ``patient``, or a data set whose items are ``(image, label, patient)`` or mappings with these keys.
        out: folder of the study.
        size: side of the square images that paths are resized to, in pixels; arrays keep theirs.

    Raises:
        DataError: a column is missing, an image cannot be used, or a folder is not a cohort.
    """
    if isinstance(data, Cohort):
        return data
    if isinstance(data, str | Path):
        return Cohort.load(Path(data))
    frame = data if isinstance(data, pd.DataFrame) else _table(data)
    if missing := [name for name in COLUMNS if name not in frame]:
        raise DataError(
            f"the data lack {', '.join(missing)}; they need image, label and patient "
            "(where patients are not known, give each image its own, and the report says so)"
        )
    paths = all(isinstance(image, str | Path) for image in frame["image"])
    return _from_paths(frame, out, size) if paths else _from_arrays(frame, out)


def _table(data: Any) -> pd.DataFrame:
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise DataError(f"{type(data).__name__}: give a cohort, its folder, a data frame, or a data set with __len__ and __getitem__")
    items = [data[number] for number in range(len(data))]
    rows = [item if isinstance(item, Mapping) else dict(zip(COLUMNS, item, strict=False)) for item in items]
    return pd.DataFrame(rows)


class ListedImages(ImageFiles):
    """Image files with labels and patients, listed in a data frame."""

    kind = "python"

    def __init__(self, samples: Sequence[ImageSample]) -> None:
        root = Path(os.path.commonpath([sample.file.parent for sample in samples]))
        self._classes = ordered_classes(sorted({sample.label for sample in samples}), None, root)
        super().__init__(samples, root, mode="auto", window=None, patients_known=True, skips=Skips())

    def classes(self) -> tuple[str, ...]:
        """The labels, in alphabetical order."""
        return self._classes

    def problems(self) -> list[Problem]:
        """Files that are missing or are not images, and patients with several classes."""
        return self.file_problems()

    def settings(self) -> dict[str, Any]:
        """Classes, and how pixels are made."""
        return {"kind": self.kind, "classes": list(self._classes), **self.decoding()}


def _from_paths(frame: pd.DataFrame, out: Path, size: int) -> Cohort:
    files = [Path(image).resolve() for image in frame["image"]]
    rows = zip(files, frame["label"].astype(str), frame["patient"].astype(str), strict=True)
    source = ListedImages([ImageSample(file.as_posix(), file, label, patient) for file, label, patient in rows])
    key = fingerprint([[file.as_posix() for file in files], [*frame["label"].astype(str)], [*frame["patient"].astype(str)]])
    return prepare(source, out / f"cohort-{key[:8]}", size=(size, size))


def _from_arrays(frame: pd.DataFrame, out: Path) -> Cohort:
    images = np.stack([_pixels(image, number) for number, image in enumerate(frame["image"])])
    labels, patients = (frame[name].astype(str).to_numpy() for name in ("label", "patient"))
    rows = pd.DataFrame(
        {
            "sample": [f"{number}" for number in range(len(frame))], "patient": patients,
            "patient_label": _patient_labels(patients, labels), "label": labels, "slice": -1, "source": "Python", "split": "",
        }
    )  # fmt: skip
    content = {"labels": labels.tolist(), "patients": patients.tolist(), "pixels": fingerprint(images.tobytes().hex())}
    folder = out / f"cohort-{fingerprint(content)[:8]}"
    if (folder / DESCRIPTION).exists():
        return Cohort.load(folder)
    order = np.argsort(patients, kind="stable")  # a cohort keeps a patient's samples together
    channels = _channel_names(images.shape[3])
    pixels = {name: [np.ascontiguousarray(images[order, ..., place])] for place, name in enumerate(channels)}
    provenance = {"kind": "python", "settings": {}, "left_out": []}
    height, width = images.shape[1:3]
    return save(
        folder, rows.iloc[order].reset_index(drop=True), pixels, classes=tuple(sorted(set(labels))), size=(height, width),
        provenance=provenance,
    )  # fmt: skip


def _pixels(image: Any, number: int) -> np.ndarray:
    """``(H, W, C)`` uint8; a tensor ``(C, H, W)`` of numbers in [0, 1] is scaled."""
    if hasattr(image, "detach"):
        found = image.detach().cpu().numpy()
        found = np.moveaxis(found, 0, -1) if found.ndim == 3 else found
    else:
        found = np.asarray(image)
    if np.issubdtype(found.dtype, np.floating):
        if found.min() < 0 or found.max() > 1:
            raise DataError(f"image {number}: numbers from {found.min():.3g} to {found.max():.3g}; give uint8, or fractions from 0 to 1")
        found = np.round(found * 255).astype(np.uint8)
    if found.dtype != np.uint8 or found.ndim not in (2, 3):
        raise DataError(f"image {number}: {found.dtype} of shape {found.shape}; give uint8 arrays (H, W) or (H, W, C), or paths")
    pixels: np.ndarray = found[..., None] if found.ndim == 2 else found
    return pixels


def _channel_names(count: int) -> Sequence[str]:
    named = {1: ("grey",), 3: ("red", "green", "blue")}
    return named.get(count, tuple(f"channel{number}" for number in range(count)))


def _patient_labels(patients: np.ndarray, labels: np.ndarray) -> list[str]:
    """A patient's own label if all of its samples share one, else ""."""
    of = pd.Series(labels).groupby(patients).agg(lambda own: own.iloc[0] if own.nunique() == 1 else "")
    return [str(of[patient]) for patient in patients]
