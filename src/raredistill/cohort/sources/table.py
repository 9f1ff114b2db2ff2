"""A CSV that names image files, their labels and their patients."""

from __future__ import annotations

import csv
import re
from collections.abc import Hashable, Sequence
from os.path import normpath
from pathlib import Path
from typing import Any

import pandas as pd

from raredistill.cohort.identity import apply_pattern, compile_pattern, refuse_ambiguous_ids
from raredistill.cohort.sources import Problem
from raredistill.cohort.sources.image_folder import no_patients
from raredistill.cohort.sources.images import (
    NONE,
    OWN_UNIT,
    SPLITS,
    SUFFIXES,
    UNLABELLED,
    ImageFiles,
    ImageSample,
    Mode,
    ordered_classes,
)
from raredistill.cohort.sources.walk import HIDDEN, Patterns, Skips
from raredistill.errors import DataError
from raredistill.files import sha256

_MISSING = frozenset({"na", "n/a", "nan", "none", "null", "<na>", "#n/a"})
_PERSON = re.compile(
    r"^(?:id)?(?:patient|pat|pt|subject|subj|lesion|case|person|participant|proband|individual|mrn|pid|donor|animal)e?s?"
    r"(?:id|ids|no|nr|num|number|name|code|key|uid|identifier|idx|index)?$"
)


class Table(ImageFiles):
    """Images listed in a CSV.

    Args:
        path: the CSV.
        folder: what the paths of the images are relative to, and where they must lie; by default the CSV's own folder.
        image_column: column of the image's path.
        label_column: column of the class name; without a column ``label``, one column of 0 and 1 for each class will do. A row called
            ``unlabelled``, here or as its split, has no label.
        patient: column of the patient; ``none`` where each image is its own unit; or a regular expression on the image's path whose first
            group is the patient. By default the column ``patient``; other columns that look like patients are asked about.
        split_column: column of the given split (train, validation or val, test; empty: none); by default ``split`` if there is one.
        classes: order of the classes; alphabetical by default.
        mode: ``grey``, ``rgb``, or ``auto`` (rgb as soon as a file is stored in colour).
        window: values of 16-bit images that become 0 and 255; by default 0 and the largest value of the smallest depth that holds them.
        include: glob patterns of the images' paths; with any, only what matches one is taken.
        exclude: glob patterns of what is not taken.

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
        patient: str | None = None,
        split_column: str | None = None,
        classes: Sequence[str] | None = None,
        mode: Mode = "auto",
        window: Sequence[float] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        self._path = Path(path)
        self._folder = self._path.parent if folder is None else Path(folder)
        self._patterns, skips = Patterns(tuple(include), tuple(exclude)), Skips()
        self._problems: list[Problem] = []
        table, label_column = _with_labels(_read(self._path), label_column, self._path)
        self._columns = {
            "image": _column(table, image_column, self._path),
            "label": _column(table, label_column, self._path),
            "patient": _patient_column(table, patient, self._path),
            "split": _optional(table, split_column, "split", self._path),
        }
        self._pattern = _path_pattern(patient, self._columns["patient"], self._path)
        samples = self._samples(table, skips)
        labels = {sample.label for sample in samples}
        self._classes = ordered_classes(sorted(labels - {""}), classes, self._path, open_ended="" in labels)
        known = self._pattern is not None or self._columns["patient"] is not None
        if known:
            refuse_ambiguous_ids([sample.patient for sample in samples], str(self._path))
        super().__init__(samples, self._folder, mode=mode, window=window, patients_known=known, skips=skips)

    def _samples(self, table: pd.DataFrame, skips: Skips) -> list[ImageSample]:
        chosen = pd.DataFrame(
            {key: table[column].str.strip() if column else "" for key, column in self._columns.items()}, index=table.index
        )
        samples: list[ImageSample] = []
        taken: dict[Path, str] = {}
        for line, row in enumerate(chosen.to_dict("records"), start=2):
            reason = self._patterns.reason(str(row["image"]).replace("\\", "/"))
            if reason not in ("", HIDDEN):  # what a table names is meant, also where its name begins with a dot
                skips.add(f"row {reason}", f"line {line}")
            elif sample := self._sample(row, line, taken):
                samples.append(sample)
        if not samples:
            first = f"; the first problem: a row {self._problems[0].what}" if self._problems else ""
            raise DataError(f"{self._path}: no row has an image and a label{first}")
        return samples

    def _sample(self, row: dict[Hashable, Any], line: int, taken: dict[Path, str]) -> ImageSample | None:
        """The sample of a row, or None with a recorded problem."""
        wrong = _fault(row, patients=self._columns["patient"] is not None)
        name, file = ("", self._folder) if wrong else _located(row["image"], self._folder)
        if not wrong:
            wrong = _repeated(file.resolve(), row["image"], taken)
        patient = row["patient"]
        if not wrong and self._pattern is not None:
            patient = apply_pattern(self._pattern, name) or ""
            wrong = wrong or ("" if patient else "names an image whose path does not tell its patient")
        if wrong:
            self._problems.append(Problem("error", row["patient"], f"{self._path}:{line}", wrong, "correct the row or take it out"))
            return None
        label = "" if UNLABELLED & {row["label"].lower(), row["split"].lower()} else row["label"]
        split = SPLITS[row["split"].lower()] if row["split"] and label else ""
        return ImageSample(row["image"], file, label, patient or row["image"], split)

    def classes(self) -> tuple[str, ...]:
        """Names in the label column."""
        return self._classes

    def problems(self) -> list[Problem]:
        """Rows that lack something, images listed twice, images missing on disk, patients of several classes or split parts."""
        alone = [] if self.patients_known else [no_patients("patient=COLUMN")]
        odd = sorted(name for name in self._classes if name.lower() in _MISSING)
        cure = "leave the rows empty and call their split unlabelled if the label is missing; nothing if it is a class"
        unsure = [Problem("warning", "", "", f"the class {name!r} reads like a missing value", cure) for name in odd]
        return self._problems + alone + unsure + self.file_problems()

    def settings(self) -> dict[str, Any]:
        """The table's hash, the columns, how patients are derived, and how pixels are computed."""
        patient = f"column {self._columns['patient']!r}" if self._columns["patient"] else OWN_UNIT
        patient = f"pattern {self._pattern.pattern!r}" if self._pattern is not None else patient
        chosen = {"kind": self.kind, "classes": list(self._classes), "patient": patient, "columns": self._columns}
        return {**chosen, **self._patterns.settings(), "table_sha256": sha256(self._path), **self.decoding()}


def _repeated(file: Path, name: str, taken: dict[Path, str]) -> str:
    """Message on a file that another row also names, or ""."""
    if file not in taken:
        taken[file] = name
        return ""
    return f"names {name} a second time" if taken[file] == name else f"names {name}, the same file as {taken[file]}"


def _located(name: str, folder: Path) -> tuple[str, Path]:
    """The path with forward slashes, and the file that is meant: as written, without quotes, or with the ending that exists."""
    plain = name.strip("\"'")
    file = folder / plain
    if not file.exists() and "\\" in plain:
        plain = plain.replace("\\", "/")
        file = folder / plain
    if not file.is_file():
        found = [file.with_name(file.name + ending) for ending in sorted(SUFFIXES | {ending.upper() for ending in SUFFIXES})]
        there = [candidate for candidate in found if candidate.is_file()]
        file = there[0] if len(there) == 1 else file
    return normpath(plain), file


def _fault(row: dict[Hashable, Any], *, patients: bool) -> str:
    """Message on what is wrong with a row, or ""."""
    if "\0" in row["image"]:
        return "names an image with a zero byte"
    if not row["image"]:
        return "names no image"
    if not row["label"] and row["split"].lower() not in UNLABELLED:
        return "has no label"
    if row["label"] and row["label"].lower() not in UNLABELLED and row["split"].lower() in UNLABELLED:
        return f"has the label {row['label']!r}, but its split is {row['split']!r}"
    if patients and (not row["patient"] or row["patient"].lower() in _MISSING):
        return "has no patient" + (f": it reads {row['patient']!r}" if row["patient"] else "")
    if row["split"] and row["split"].lower() not in {*SPLITS, *UNLABELLED}:
        return f"has the split {row['split']!r}, which is none of train, validation (val), test and unlabelled"
    return ""


def _read(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(
            path, dtype=str, keep_default_na=False, encoding="utf-8-sig", index_col=False, header=None, on_bad_lines="error"
        )
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; name a CSV with the columns image, label and patient") from None
    except (OSError, ValueError, OverflowError, csv.Error) as error:
        cure = "save it as comma-separated UTF-8 text, with as many commas in each row as in the header"
        raise DataError(f"{path}: cannot be read as CSV ({error}); {cure}") from None
    names = [str(name).strip() for name in table.iloc[0]]
    return _titled(table.iloc[1:].reset_index(drop=True), names, path)


def _titled(table: pd.DataFrame, names: list[str], path: Path) -> pd.DataFrame:
    table.columns = pd.Index(names)
    spare = [number for number, name in enumerate(names) if not name]
    filled = [number for number in spare if (table.iloc[:, number] != "").any()]
    # pandas writes a nameless column of row numbers in front
    if filled and (filled != [0] or len(set(table.iloc[:, 0])) < len(table)):
        raise DataError(f"{path}: column {filled[0] + 1} has values but no name in the header; name it or take it out")
    table = table.iloc[:, [number for number in range(len(names)) if number not in spare]]
    lowered = [str(name).lower() for name in table.columns]
    if twice := sorted({name for name in lowered if lowered.count(name) > 1}):
        raise DataError(f"{path}: the column {twice[0]!r} occurs twice; give each column a name of its own")
    return table


def _column(table: pd.DataFrame, name: str, path: Path) -> str:
    """The column of this name, whatever the case and the blanks around it."""
    found = [str(column) for column in table.columns if str(column).lower() == name.strip().lower()]
    if not found:
        raise DataError(f"{path}: no column {name!r} among {', '.join(table.columns)}; set image_column, label_column and the like")
    return found[0]


def _optional(table: pd.DataFrame, name: str | None, default: str, path: Path) -> str | None:
    if name is not None:
        return _column(table, name, path)
    return next((str(column) for column in table.columns if str(column).lower() == default), None)


def _patient_column(table: pd.DataFrame, patient: str | None, path: Path) -> str | None:
    if patient is None:
        chosen = _optional(table, None, "patient", path)
        alike = [str(column) for column in table.columns if _PERSON.match(re.sub(r"[^a-z]", "", str(column).lower()))]
        if chosen is None and alike:
            raise DataError(
                f"{path}: is {alike[0]!r} the patient? set patient={alike[0]}"
                f"{' (or ' + ', '.join(alike[1:]) + ')' if alike[1:] else ''}, or patient=none if each image is its own"
            )
        return chosen
    return None if patient == NONE or "(" in patient else _column(table, patient, path)


def _path_pattern(patient: str | None, column: str | None, path: Path) -> re.Pattern[str] | None:
    return None if patient in (None, NONE) or column is not None else compile_pattern(str(patient))


def _with_labels(table: pd.DataFrame, column: str, path: Path) -> tuple[pd.DataFrame, str]:
    """The table with a column of labels: its own, or made of columns of 0 and 1, one a class; whole numbers lose pandas' ``.0``."""
    if column.strip().lower() not in {str(name).lower() for name in table.columns}:
        flags = [name for name in table.columns if set(table[name].str.strip()) <= {"0", "1", "0.0", "1.0"}]
        marked = table[flags].apply(lambda values: values.str.strip().str.startswith("1"))
        if column != "label" or len(flags) < 2:
            return table, column
        if (wrong := marked.sum(axis=1) != 1).any():
            line = int(wrong.to_numpy().argmax()) + 2
            raise DataError(f"{path}:{line}: not exactly one of {', '.join(flags)} is 1; give one column of labels (label_column)")
        return table.assign(label=marked.idxmax(axis=1)), "label"
    own = _column(table, column, path)
    filled = table[own].str.strip()
    whole = filled[filled != ""].str.fullmatch(r"-?\d+\.0+")
    return (table.assign(**{own: filled.str.replace(r"\.0+$", "", regex=True)}) if len(whole) and whole.all() else table), own
