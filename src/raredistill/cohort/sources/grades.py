"""Tables of grades as challenges, archives and spreadsheets write them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from raredistill.cohort.identity import person_of, spelling_key
from raredistill.cohort.sources import Problem
from raredistill.errors import DataError
from raredistill.files import sha256

GRADES = ("HGG", "LGG")
MAPPING = "name_mapping.csv"
EMPTY = frozenset({"", "na", "n/a", "nan", "none", "null", "-", "?", "unknown"})
"""Entries that mean a missing value in tables, in lower case."""
_WORDS = {
    **dict.fromkeys(("hgg", "high", "highgrade", "high grade", "high-grade", "4", "iv"), "HGG"),
    **dict.fromkeys(("lgg", "low", "lowgrade", "low grade", "low-grade", "1", "2", "i", "ii"), "LGG"),
    **dict.fromkeys(("3", "iii"), "3"),
}
_GRADE_COLUMN = re.compile(r"(?:who|tumou?r)?[ _]*(?:cns)?[ _]*grade")
_PATIENT_COLUMN = re.compile(r"(?:patient|subject|case|scan|study)?[ _-]*(?:id|name|identifier)?|brats.*|(?:tcga|tcia).*(?:id|subject).*")


@dataclass(frozen=True)
class Grades:
    """Grades of scans or patients from a table.

    Attributes:
        file: the table; None if there is none.
        values: name -> the grades that rows give it, in a set of more than one where they disagree.
        rows: the names of each row: of one person.
        grade_3: HGG or LGG, where WHO grade 3 was assigned to one.
    """

    file: Path | None
    values: dict[str, frozenset[str]] = field(default_factory=dict)
    rows: tuple[tuple[str, ...], ...] = ()
    grade_3: str | None = None

    def table(self) -> dict[str, str] | None:
        """The table's name and hash, for provenance."""
        return {"file": self.file.name, "sha256": sha256(self.file)} if self.file else None

    def find(self, names: Iterable[str], person: str) -> frozenset[str]:
        """The grades of a scan by any of its names, letters in either case; else those of the rows of its person."""
        folded = {name.casefold() for name in names}
        own = [grades for name, grades in self.values.items() if name.casefold() in folded]
        found = own or [grades for name, grades in self.values.items() if person_of(name) == person]
        return frozenset().union(*found)

    def problem(self, scan: str, names: tuple[str, ...], person: str) -> Problem | None:
        """Why a scan has no usable grade, or None."""
        found = self.find(names, person)
        if len(found) > 1:
            what = f"the table gives two grades ({' and '.join(sorted(found))})"
            return Problem("error", scan, str(self.file), what, "keep one row for the patient")
        if not found:
            return self._absent(scan, names)
        [grade] = found
        if grade == "3" and self.grade_3 is None:
            what = "has the WHO grade 3, which is high grade in the clinic and LGG in BraTS' own data"
            return Problem("error", scan, str(self.file), what, "say which is meant: grade_3=HGG or grade_3=LGG")
        if grade not in (*GRADES, "3"):
            return Problem("error", scan, str(self.file), f"unknown grade '{grade}'", f"write {' or '.join(GRADES)} (or WHO 1 to 4)")
        return None

    def _absent(self, scan: str, names: tuple[str, ...]) -> Problem:
        if {name.casefold() for name in names} & {name.casefold() for name in self.values}:
            return Problem("error", scan, str(self.file), "the table leaves the patient's grade empty", "fill it in")
        keys = {spelling_key(name) for name in names}
        close = [name for name in self.values if spelling_key(name) in keys]
        if close:
            what = f"the table has no row for the patient; {close[0]!r} differs only by zeros or '.0'"
            return Problem("error", scan, str(self.file), what, "write the patient as the files do, with all zeros (as text)")
        return Problem("error", scan, str(self.file), "the table has no row for the patient", "add its row")

    def grade(self, names: Iterable[str], person: str) -> str:
        """The grade of a scan without problems."""
        [grade] = self.find(names, person)
        return self.grade_3 or "" if grade == "3" else grade


def read_grades(root: Path, grades: Path | None, grade_3: str | None = None) -> Grades:
    """Read ``grades`` or, without it, ``name_mapping.csv`` of the root.

    Columns are found by their headers, blanks and case aside: ``Grade`` or ``WHO CNS Grade``, and any number of columns of names
    (``patient``, ``ID``, ``case``, ``BraTS_2020_subject_ID``), which are one person's. Commas, semicolons or tabs, UTF-8 or UTF-16.

    Raises:
        DataError: the named table is missing, unreadable, or has other columns.
    """
    file = root / MAPPING if grades is None else Path(grades)
    if grades is None and not file.is_file():
        return Grades(None, grade_3=grade_3)
    lines = _lines(file)
    if not lines:
        raise DataError(f"{file}: the table of grades is empty; give a CSV with the columns patient,grade")
    header = [column.strip().casefold() for column in lines[0]]
    graded = [place for place, column in enumerate(header) if _GRADE_COLUMN.fullmatch(column)]
    named = [place for place, column in enumerate(header) if column and _PATIENT_COLUMN.fullmatch(column)]
    if not graded or not named:
        found = ", ".join(column.strip() for column in lines[0])[:200]
        raise DataError(f"{file} has the columns {found}; needed are patient,grade or BraTS_2020_subject_ID and Grade")
    return _grades(file, lines[1:], named, graded, grade_3)


def _grades(file: Path, lines: list[list[str]], named: list[int], graded: list[int], grade_3: str | None) -> Grades:
    values: dict[str, set[str]] = {}
    rows: list[tuple[str, ...]] = []
    for line in lines:
        cells = [cell.strip() for cell in line]
        names = tuple(dict.fromkeys(cells[place] for place in named if place < len(cells) and cells[place].casefold() not in EMPTY))
        found = {_grade(cells[place]) for place in graded if place < len(cells) and cells[place].casefold() not in EMPTY}
        rows.append(names)
        for name in names:
            values.setdefault(name, set()).update(found)
    return Grades(file, {name: frozenset(found) for name, found in values.items()}, tuple(filter(None, rows)), grade_3)


def _grade(cell: str) -> str:
    plain = re.sub(r"^(?:who|cns|grade|\s)+", "", cell.casefold()).strip()
    return _WORDS.get(re.sub(r"\.0+$", "", plain), cell.upper())


def _lines(file: Path) -> list[list[str]]:
    """The cells of a table, rows without any left out; pandas is not asked, since it takes a trailing comma for an index."""
    try:
        raw = file.read_bytes()
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds zero bytes")
        first = next((line for line in text.splitlines() if line.strip()), "")
        delimiter = max(",;\t", key=first.count)
        return [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(cell.strip() for cell in row)]
    except OSError as error:
        raise DataError(
            f"{file}: the table of grades cannot be read ({error.strerror}); give a CSV with the columns patient,grade"
        ) from None
    except (ValueError, csv.Error) as error:
        raise DataError(
            f"{file}: the table of grades cannot be read as text ({error}); save it as CSV (UTF-8) with the columns patient,grade"
        ) from None


def grade_of_folders(parts: Iterable[str]) -> str:
    """HGG or LGG where a folder above the case is called so (BraTS 2015 to 2019), also as one word of several; else "".

    >>> grade_of_folders(("MICCAI_BraTS_2018_Data_Training", "LGG")), grade_of_folders(("raw",))
    ('LGG', '')
    """
    words = [word for part in parts for word in re.split(r"[^A-Za-z]+", part)]
    found = {word for word in words if word in GRADES}
    return found.pop() if len(found) == 1 else ""
