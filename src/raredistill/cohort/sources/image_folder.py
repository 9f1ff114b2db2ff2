"""A folder per class: the oldest layout of an image data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import regex

from raredistill.cohort.sources import Problem
from raredistill.cohort.sources.images import SUFFIXES, ImageFiles, ImageSample, Mode, ordered_classes
from raredistill.errors import DataError
from raredistill.files import files_below, folders_in
from raredistill.names import shown

PATIENCE = 1.0
"""Seconds in which the patient must be told from one path; a usual pattern takes a few microseconds."""
OWN_UNIT = "each image is its own unit: no patient is known, so images of one patient may stand on both sides of a split"


def no_patients(cure: str) -> Problem:
    """The warning that a split may leak, since nothing tells which images belong to one patient."""
    return Problem("warning", "", "", OWN_UNIT, f"name the patients with {cure}, if any are known")


class ImageFolder(ImageFiles):
    """Images in ``<path>/<class>/**``.

    Args:
        path: the folder that holds the class folders.
        patient: how a patient is told from an image's path relative to ``path`` (with forward slashes): a regular expression whose group
            ``patient``, or first group, is the patient; or ``"folder"``, the folder inside the class folder. None: each image is its own.
        classes: order of the classes; alphabetical by default.
        mode: ``grey``, ``rgb``, or ``auto`` (rgb as soon as a file is stored in colour).
        window: values of 16-bit images that become 0 and 255; by default 0 and 65535.

    Raises:
        DataError: the folder is missing or holds no class folder with images, or an option does not fit.
    """

    kind = "image_folder"

    def __init__(
        self,
        path: Path,
        *,
        patient: str | None = None,
        classes: Sequence[str] | None = None,
        mode: Mode = "auto",
        window: Sequence[float] | None = None,
    ) -> None:
        self._path, self._patient = Path(path), patient
        pattern = _pattern(patient)
        files = _images(self._path)
        self._classes = ordered_classes(sorted(files), classes, self._path)
        samples = [self._sample(file, label, pattern) for label in files for file in files[label]]
        self._unmatched = [sample for sample in samples if not sample.patient]
        super().__init__([sample for sample in samples if sample.patient], self._path, mode=mode, window=window)

    def _sample(self, file: Path, label: str, pattern: regex.Pattern[str] | None) -> ImageSample:
        name = file.relative_to(self._path).as_posix()
        return ImageSample(name, file, label, _patient(name, pattern))

    def classes(self) -> tuple[str, ...]:
        """Names of the class folders."""
        return self._classes

    def problems(self) -> list[Problem]:
        """Images without a patient, class folders without images, files that are no images, patients of several classes."""
        cure = f"change patient={self._patient!r} so that it matches every path, or move the file"
        unmatched = [Problem("error", "", str(sample.file), "no patient can be told from its path", cure) for sample in self._unmatched]
        empty = [folder for folder in folders_in(self._path) if folder.name not in self._classes]
        bare = [Problem("warning", "", str(folder), "holds no PNG, JPEG or TIFF image", "fill or remove the folder") for folder in empty]
        alone = [] if self._patient else [no_patients("patient=folder or patient=REGULAR_EXPRESSION")]
        return unmatched + alone + bare + self.file_problems()

    def settings(self) -> dict[str, Any]:
        """Classes, how patients are told, and how pixels are made."""
        return {"kind": self.kind, "classes": list(self._classes), "patient": self._patient or OWN_UNIT, **self.decoding()}


def _images(path: Path) -> dict[str, list[Path]]:
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; name the folder that holds one folder per class")
    files = {folder.name: [file for file in files_below(folder) if _is_image(file)] for folder in folders_in(path)}
    files = {label: found for label, found in files.items() if found}
    if not files:
        raise DataError(f"{path}: no folder in it holds a PNG, JPEG or TIFF image; name the folder that holds one folder per class")
    return files


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".")


def _pattern(patient: str | None) -> regex.Pattern[str] | None:
    if patient is None:
        return None
    try:
        pattern = regex.compile(r"^[^/]+/([^/]+)/" if patient == "folder" else patient)
    except (regex.error, RecursionError) as error:
        raise DataError(f"patient={patient!r} is not a regular expression ({error})") from None
    if not pattern.groups:
        raise DataError(f"patient={patient!r} has no group; put the part that names the patient in brackets")
    return pattern


def _patient(name: str, pattern: regex.Pattern[str] | None) -> str:
    if pattern is None:
        return name
    try:
        match = pattern.search(name, timeout=PATIENCE)
    except TimeoutError:
        raise DataError(
            f"patient={pattern.pattern!r} takes more than {PATIENCE:.0f} s to match {shown(name)!r:.80}: repetitions inside repetitions, "
            "such as (a+)+, can be matched in too many ways; write it without them"
        ) from None
    return (match["patient" if "patient" in pattern.groupindex else 1] or "") if match else ""
