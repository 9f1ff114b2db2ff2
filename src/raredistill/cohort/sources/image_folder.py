"""A folder per class, also inside folders of the parts of a given split: the oldest layout of an image data set."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import regex

from raredistill.cohort.identity import apply_pattern, compile_pattern, refuse_ambiguous_ids
from raredistill.cohort.sources import Problem
from raredistill.cohort.sources.images import (
    NONE,
    OWN_UNIT,
    SPLITS,
    UNLABELLED,
    ImageFiles,
    ImageSample,
    Mode,
    is_image,
    ordered_classes,
)
from raredistill.cohort.sources.walk import Patterns, Skips, files_below, take
from raredistill.errors import DataError
from raredistill.files import folders_in

MASK_FOLDERS = frozenset(
    [
        "mask",
        "masks",
        "seg",
        "segs",
        "segmentation",
        "segmentations",
        "annotation",
        "annotations",
        "groundtruth",
        "ground_truth",
        "gt",
        "roi",
        "rois",
    ]
)
_MASK_WORDS = "mask|segmentation|seg|groundtruth|ground_truth|annotation|gt|roi"
_MASK = re.compile(rf"^(?P<image>.+?)[ _.-]*(?:{_MASK_WORDS})s?(?:[ _-]*\d+)?$", re.IGNORECASE)
_NO_IMAGE, _MASK_BESIDE, _MASK_FOLDER = "no image that is read", "mask of an image beside it", "in a folder of masks"
_NO_CLASS = "in no class folder"
_FOLDER = "folder"


def no_patients(cure: str) -> Problem:
    """The warning that a split may leak, since it is unknown which images belong to one patient."""
    return Problem("warning", "", "", OWN_UNIT, f"name the patients with {cure}, if any are known")


class ImageFolder(ImageFiles):
    """Images in ``<path>/<class>/**``, or in ``<path>/<part>/<class>/**`` where the folders are called train, val and test.

    Hidden and system folders are ignored, folders called ``unlabelled`` hold samples without a label, and masks beside images are
    left out; everything that is not taken is counted.

    Args:
        path: the folder that holds the class folders.
        patient: how a patient is derived from an image's path relative to ``path`` (with forward slashes): a regular expression whose group
            ``patient``, or first group, is the patient; or ``"folder"``, the folder inside the class folder. None: each image is its own.
        classes: order of the classes; alphabetical by default.
        mode: ``grey``, ``rgb``, or ``auto`` (rgb as soon as a file is stored in colour).
        window: values of 16-bit images that become 0 and 255; by default 0 and the largest value of the smallest depth that holds them.
        include: glob patterns of paths; with any, only what matches one is taken.
        exclude: glob patterns of paths that are not taken.
        masks: ``skip`` leaves out files such as ``a_mask.png`` beside ``a.png``, and folders such as ``masks``; ``keep`` takes them.
        parts: ``auto`` takes folders called train, val and test as a given split; ``none`` takes them as classes.

    Raises:
        DataError: the folder is missing, holds no class folder with images or a single one, mixes parts and classes, or an option does
            not fit.
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
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        masks: Literal["skip", "keep"] = "skip",
        parts: Literal["auto", "none"] = "auto",
    ) -> None:
        self._path, self._patient = Path(path), None if patient == NONE else patient
        self._patterns, self._masks, skips = Patterns(tuple(include), tuple(exclude)), masks, Skips()
        files = self._files(skips)
        self._in_parts = parts == "auto" and _in_parts(_top_folders(files, self._path), self._path)
        pattern = _pattern(self._patient, nested=self._in_parts)
        samples = [sample for file in files if (sample := self._sample(file, pattern, skips))]
        self._classes = self._chosen_classes(samples, classes)
        self._unmatched = [sample for sample in samples if not sample.patient]
        if pattern is not None:
            refuse_ambiguous_ids([sample.patient for sample in samples if sample.patient], str(self._path))
        matched = [sample for sample in samples if sample.patient]
        super().__init__(matched, self._path, mode=mode, window=window, patients_known=pattern is not None, skips=skips)

    def _files(self, skips: Skips) -> list[Path]:
        if not self._path.is_dir():
            raise DataError(f"{self._path}: no such folder; name the folder that holds one folder per class")
        found = files_below(self._path, skips, include=self._patterns.include, exclude=self._patterns.exclude)
        images = take(found, self._path, skips, is_image, _NO_IMAGE)
        return images if self._masks == "keep" else _without_masks(images, self._path, skips)

    def _sample(self, file: Path, pattern: regex.Pattern[str] | None, skips: Skips) -> ImageSample | None:
        name = file.relative_to(self._path).as_posix()
        *folders, _ = PurePosixPath(name).parts
        split = SPLITS.get(folders.pop(0).lower(), "") if self._in_parts and folders and folders[0].lower() not in UNLABELLED else ""
        if not folders:
            skips.add(_NO_CLASS, name)
            return None
        label = "" if folders[0].lower() in UNLABELLED else folders[0]
        patient = name if pattern is None else apply_pattern(pattern, name) or ""
        return ImageSample(name, file, label, patient, split if label else "")

    def _chosen_classes(self, samples: Sequence[ImageSample], wanted: Sequence[str] | None) -> tuple[str, ...]:
        if not samples:
            raise DataError(f"{self._path}: no folder in it holds an image that is read; name the folder that holds one folder per class")
        labels = {sample.label for sample in samples}
        return ordered_classes(sorted(labels - {""}), wanted, self._path, open_ended="" in labels)

    def classes(self) -> tuple[str, ...]:
        """Names of the class folders."""
        return self._classes

    def problems(self) -> list[Problem]:
        """Images without a patient, class folders without images, files that are no images, patients of several classes."""
        cure = f"change patient={self._patient!r} so that it matches every path, or move the file"
        unmatched = [Problem("error", "", str(sample.file), "no patient can be told from its path", cure) for sample in self._unmatched]
        alone = [] if self.patients_known else [no_patients("patient=folder or patient=REGULAR_EXPRESSION")]
        bare = [Problem("warning", "", str(folder), "holds no image that is taken", "fill or remove it") for folder in self._bare()]
        return unmatched + alone + bare + self.file_problems()

    def _bare(self) -> list[Path]:
        """Class folders without any used image, unless all were left out on purpose."""
        used = {sample.name.split("/", 1)[0] for samples in self._patients.values() for sample in samples}
        used |= {sample.name.split("/", 1)[0] for sample in self._unmatched}
        folders = [folder for folder in folders_in(self._path) if folder.name.lower() not in MASK_FOLDERS]
        return [folder for folder in folders if folder.name not in used and not self._patterns.reason(folder.name)]

    def settings(self) -> dict[str, Any]:
        """Classes, how patients are derived, and how pixels are computed."""
        chosen = {"kind": self.kind, "classes": list(self._classes), "patient": self._patient or OWN_UNIT, **self._patterns.settings()}
        chosen |= {"masks": self._masks} if self._masks != "skip" else {}
        return {**chosen, **self.decoding()}


def _top_folders(files: Sequence[Path], path: Path) -> set[str]:
    return {parts[0] for file in files if len(parts := file.relative_to(path).parts) > 1}


def _in_parts(folders: set[str], path: Path) -> bool:
    """Whether the folders are the parts of a given split, and not classes."""
    named = {folder for folder in folders if folder.lower() in SPLITS}
    others = {folder for folder in folders - named if folder.lower() not in UNLABELLED}
    if len({SPLITS[folder.lower()] for folder in named}) < 2:
        return False
    if others:
        raise DataError(
            f"{path}: holds the folders {', '.join(sorted(named))} of a split beside {', '.join(sorted(others))}; "
            f"leave one kind out, as with exclude={sorted(others)[0]}, or set parts=none if all are classes"
        )
    return True


def _without_masks(images: Sequence[Path], path: Path, skips: Skips) -> list[Path]:
    """Leave out folders of masks, and files called as another image of the folder with a word for a mask behind."""
    stems: dict[Path, set[str]] = {}
    for file in images:
        stems.setdefault(file.parent, set()).add(file.stem.lower())
    kept = take(
        images, path, skips, lambda file: not MASK_FOLDERS & {part.lower() for part in file.relative_to(path).parts[:-1]}, _MASK_FOLDER
    )
    return take(kept, path, skips, lambda file: not _is_mask(file, stems[file.parent]), _MASK_BESIDE)


def _is_mask(file: Path, stems: set[str]) -> bool:
    match = _MASK.fullmatch(file.stem)
    return match is not None and match["image"].lower() in stems


def _pattern(patient: str | None, *, nested: bool) -> regex.Pattern[str] | None:
    if patient is None:
        return None
    depth = 2 if nested else 1
    pattern = compile_pattern(rf"^(?:[^/]+/){{{depth}}}([^/]+)/" if patient == _FOLDER else patient)
    if not pattern.groups:
        raise DataError(f"patient={patient!r} has no group; put the part that names the patient in brackets")
    return pattern
