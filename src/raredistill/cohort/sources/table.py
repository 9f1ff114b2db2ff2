"""A CSV that names image files, their labels and their patients."""

from __future__ import annotations

import csv
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from raredistill.cohort.sources import Problem
from raredistill.cohort.sources.image_folder import OWN_UNIT, no_patients
from raredistill.cohort.sources.images import ImageFiles, ImageSample, Mode, ordered_classes
from raredistill.errors import DataError
from raredistill.files import sha256

SPLITS = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}


class Table(ImageFiles):
    """Images listed in a CSV.

    Args:
        path: the CSV.
        folder: what the paths of the images are relative to, and where they must lie; by default the CSV's own folder.
        image_column: column of the image's path.
        label_column: column of the class name.
        patient_column: column of the patient; by default ``patient`` if there is one, else each image is its own unit.
        split_column: column of the given split (train, validation or val, test; empty: none); by default ``split`` if there is one.
        classes: order of the classes; alphabetical by default.
        mode: ``grey``, ``rgb``, or ``auto`` (rgb as soon as a file is stored in colour).
        window: values of 16-bit images that become 0 and 255; by default 0 and 65535.

    Raises:
        DataError: the CSV is missing, unreadable or empty, lacks a column, or an option does not fit.
    """

    kind = "table"

    def __init__(
        self,
        path: Path,
        *,
        folder: Path | None = None,
        image_column: str = "image",
        label_column: str = "label",
        patient_column: str | None = None,
        split_column: str | None = None,
        classes: Sequence[str] | None = None,
        mode: Mode = "auto",
        window: Sequence[float] | None = None,
    ) -> None:
        self._path = Path(path)
        self._folder = self._path.parent if folder is None else Path(folder)
        table = _read(self._path)
        self._columns = {
            "image": _column(table, image_column, self._path),
            "label": _column(table, label_column, self._path),
            "patient": _optional(table, patient_column, "patient", self._path),
            "split": _optional(table, split_column, "split", self._path),
        }
        self._problems: list[Problem] = []
        samples = self._samples(table)
        self._classes = ordered_classes(sorted({sample.label for sample in samples}), classes, self._path)
        super().__init__(samples, self._folder, mode=mode, window=window)

    def _samples(self, table: pd.DataFrame) -> list[ImageSample]:
        chosen = pd.DataFrame(
            {key: table[column].str.strip() if column else "" for key, column in self._columns.items()}, index=table.index
        )
        chosen["repeated"] = chosen["image"].duplicated()
        samples = [sample for line, row in enumerate(chosen.to_dict("records"), start=2) if (sample := self._sample(row, line))]
        if not samples:
            first = f"; the first problem: a row {self._problems[0].what}" if self._problems else ""
            raise DataError(f"{self._path}: no row has an image and a label{first}")
        return samples

    def _sample(self, row: dict[Hashable, Any], line: int) -> ImageSample | None:
        """The sample of a row, or None and a problem noted."""
        wrong = _fault(row, patients=self._columns["patient"] is not None)
        if wrong:
            self._problems.append(Problem("error", row["patient"], f"{self._path}:{line}", wrong, "correct the row or take it out"))
            return None
        split = SPLITS[row["split"].lower()] if row["split"] else ""
        return ImageSample(row["image"], self._folder / row["image"], row["label"], row["patient"] or row["image"], split)

    def classes(self) -> tuple[str, ...]:
        """Names in the label column."""
        return self._classes

    def problems(self) -> list[Problem]:
        """Rows that lack something, images listed twice, images missing on disk, patients of several classes or split parts."""
        alone = [] if self._columns["patient"] else [no_patients("patient_column=NAME")]
        return self._problems + alone + self.file_problems()

    def settings(self) -> dict[str, Any]:
        """The table's own hash, the columns, how patients are told, and how pixels are made."""
        patient = f"column {self._columns['patient']!r}" if self._columns["patient"] else OWN_UNIT
        chosen = {"kind": self.kind, "classes": list(self._classes), "patient": patient, "columns": self._columns}
        return {**chosen, "table_sha256": sha256(self._path), **self.decoding()}


def _fault(row: dict[Hashable, Any], *, patients: bool) -> str:
    """What is wrong with a row, or ""."""
    if "\0" in row["image"]:
        return "names an image with a zero byte"
    if not row["image"] or not row["label"]:
        return "names no image" if not row["image"] else "has no label"
    if row["repeated"]:
        return f"names {row['image']} a second time"
    if patients and not row["patient"]:
        return "has no patient"
    if row["split"] and row["split"].lower() not in SPLITS:
        return f"has the split {row['split']!r}, which is none of train, validation (val) and test"
    return ""


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; name a CSV with the columns image, label and patient") from None
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error}); save it as comma-separated UTF-8 text") from None


def _column(table: pd.DataFrame, name: str, path: Path) -> str:
    if name not in table.columns:
        raise DataError(f"{path}: no column {name!r} among {', '.join(table.columns)}; set image_column, label_column and the like")
    return name


def _optional(table: pd.DataFrame, name: str | None, default: str, path: Path) -> str | None:
    if name is not None:
        return _column(table, name, path)
    return default if default in table.columns else None
