"""Assignment of scans to persons, with their grades and problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raredistill.cohort.identity import apply_pattern, compile_pattern, join_rows, person_of, refuse_ambiguous_ids
from raredistill.cohort.sources import Problem
from raredistill.cohort.sources.grades import Grades, grade_of_folders
from raredistill.errors import DataError


@dataclass(frozen=True)
class Place:
    """A scan's name and its folder."""

    name: str
    folder: Path


class Persons:
    """Persons and grades of a source's scans.

    Args:
        root: the source's folder.
        places: its scans.
        grades: the table of grades, whose rows also say which names are one person's.
        pattern: the option ``patient``: a regular expression on a scan's path relative to the root; by default known naming schemes.
    """

    def __init__(self, root: Path, places: Sequence[Place], grades: Grades, pattern: str | None) -> None:
        self._root, self._grades, self._places = root, grades, {place.name: place for place in places}
        compiled = None if pattern is None else compile_pattern(pattern)
        self._joined = join_rows([[person_of(name).casefold() for name in row] for row in grades.rows])
        self._persons: dict[str, str] = {}
        leaders: dict[str, str] = {}
        for name, place in sorted(self._places.items()):
            if compiled is not None:
                self._persons[name] = apply_pattern(compiled, self._path(place)) or ""
            else:
                person = person_of(name)
                self._persons[name] = leaders.setdefault(self._joined.get(person.casefold(), person), person)

    def _path(self, place: Place) -> str:
        folder = place.folder.relative_to(self._root).as_posix()
        return folder if place.folder.name == place.name else f"{folder}/{place.name}"

    def person(self, scan: str) -> str:
        """The person of a scan; "" if the pattern does not match."""
        return self._persons[scan]

    def several(self) -> dict[str, list[str]]:
        """Persons with more than one scan."""
        groups: dict[str, list[str]] = {}
        for scan, person in self._persons.items():
            groups.setdefault(person, []).append(scan)
        return {person: scans for person, scans in groups.items() if person and len(scans) > 1}

    def has_grades(self) -> bool:
        """Whether there is a table, or a folder named after a grade."""
        return self._grades.file is not None or any(map(self._folder_grade, self._places))

    def _folder_grade(self, scan: str) -> str:
        parts = self._places[scan].folder.relative_to(self._root).parts
        above = parts[:-1] if parts and self._places[scan].folder.name.startswith(scan) else parts
        return grade_of_folders((self._root.name, *above))

    def grade(self, scan: str) -> str:
        """The grade of a scan without problems."""
        return self._folder_grade(scan) or self._grades.grade((scan,), self.person(scan))

    def problem(self, scan: str) -> Problem | None:
        """Why a scan has no person or no usable grade, or None."""
        folder = self._folder_grade(scan)
        if folder:
            found = self._grades.find((scan,), self.person(scan)) - {folder}
            if self._grades.file is not None and found:
                what = f"lies in a folder {folder}, but the table gives {' and '.join(sorted(found))}"
                return Problem("error", scan, str(self._grades.file), what, "correct the one that is wrong")
            return None
        return self._grades.problem(scan, (scan,), self.person(scan)) if self._grades.file is not None else None

    def conflicts(self, usable: Sequence[str]) -> list[Problem]:
        """Persons whose scans have different grades, scans without a person, and ids of persons that look like one."""
        found = []
        for person, scans in self.several().items():
            known = {self.grade(scan) for scan in scans if scan in usable}
            if len(known) > 1:
                told = ", ".join(f"{scan} {self.grade(scan)}" for scan in scans if scan in usable)
                cure = "a patient has one class: correct the table, or leave the visits of one grade out with exclude=PATTERN"
                found.append(Problem("error", person, "", f"visits of one person have different grades ({told})", cure))
        unmatched = [scan for scan, person in self._persons.items() if not person]
        cure = "change the regular expression patient=... so that it matches every path"
        found += [
            Problem("error", scan, str(self._places[scan].folder), "no patient can be told from its path", cure) for scan in unmatched
        ]
        try:
            refuse_ambiguous_ids([person for person in self._persons.values() if person], str(self._root))
        except DataError as error:
            what, _, cure = str(error).rpartition("; ")
            found.append(Problem("error", "", str(self._root), what.removeprefix(f"{self._root}: "), cure))
        return found

    def remark(self) -> list[Problem]:
        """Note on persons with several scans, so that joining is never silent."""
        several = self.several()
        if not several:
            return []
        person, scans = next(iter(several.items()))
        what = f"{len(several)} persons have several scans ({person}: {', '.join(scans[:3])}); they count as one patient each"
        return [Problem("note", "", "", what, "nothing to do; patient=REGEX names persons otherwise")]
