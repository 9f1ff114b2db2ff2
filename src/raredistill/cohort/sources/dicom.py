"""DICOM series as hospitals have them: a patient's series become modalities; identifiers stay in the files."""

from __future__ import annotations

import csv
import fnmatch
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raredistill.cohort import labels
from raredistill.cohort.identity import apply_pattern, compile_pattern, refuse_ambiguous_ids
from raredistill.cohort.labels import LabelRule
from raredistill.cohort.orientation import axes_of
from raredistill.cohort.sources import Problem, Skipped, Slices, Unit, brats
from raredistill.cohort.sources.dicom_files import Series, Volume, find_series, read_series
from raredistill.cohort.sources.grades import GRADES, read_grades
from raredistill.cohort.sources.walk import Patterns, Skips, files_below
from raredistill.cohort.volumes import Renderer, air
from raredistill.errors import ConfigError, DataError

FAR = 0.5
"""Millimetres between the corners of two series from which on they are not on one grid."""
CONSTANT = 0.3
"""Share of one value from which on a volume has a background that was set, not measured."""
_CHANNELS = (
    ("flair", re.compile(r"flair", re.IGNORECASE)),
    ("t1ce", re.compile(r"t1.*(?:gd|gad|ce\b|post|contrast|\+c|km)|(?:gd|gad|ce\b|post|contrast|\+c|km).*t1", re.IGNORECASE)),
    ("t1", re.compile(r"t1", re.IGNORECASE)),
    ("t2", re.compile(r"t2", re.IGNORECASE)),
)


@dataclass(frozen=True)
class _Study:
    """One study of one patient: its pseudonym, its name in the cohort, and the series of each channel."""

    patient: str
    name: str
    series: dict[str, tuple[Series, ...]]


class Dicom:
    """DICOM files of any names, at any depth below ``path``, one picture a file.

    A patient is called by a hash of PatientID and the first StudyInstanceUID, which nobody can compute who lacks the files; or by
    ``patient``. No other tag reaches the cohort, its provenance or a message, but for files' own names and series' descriptions. Slices
    are sorted by their place and turned by their orientation; rescale and MONOCHROME1 are honoured. Without segmentations a slice is
    called by ``slice_labels``, or takes its patient's grade.

    Args:
        path: the folder.
        channels: modalities to read; each must be one series a study, all on one grid.
        series: ``channel:pattern`` with a glob pattern on SeriesDescription, in place of the built-in guess by flair, t1 (with a word
            for contrast: t1ce) and t2.
        grades: a CSV ``patient,grade``; patients as PatientID, or as they are called here.
        slice_labels: a CSV ``slice,label`` with SOPInstanceUIDs of the first channel's files; slices that it does not name are left out.
        patient: a regular expression on a file's path relative to ``path`` that names its patient, such as a folder; or ``PatientID``,
            the tag itself, for files that carry pseudonyms.
        window: ``robust`` (quantiles of the head) or ``dicom`` (the files' own window).
        min_brain_share: share of the widest slice of the head under which a slice is left out.
        include: glob patterns of files to use; ``exclude``: of files to leave out.
        exclude: see ``include``.
        grade_3: HGG or LGG: what WHO grade 3 counts as.
        unlabelled: also read patients without a grade, as unlabelled samples.

    Raises:
        ConfigError: an option does not fit.
        DataError: pydicom is missing, or a table cannot be used.
    """

    kind = "dicom"
    counted = "patients"

    def __init__(
        self,
        path: Path,
        *,
        channels: Sequence[str] = ("flair",),
        series: Sequence[str] = (),
        grades: Path | None = None,
        slice_labels: Path | None = None,
        patient: str | None = None,
        window: Literal["robust", "dicom"] = "robust",
        min_brain_share: float = 0.1,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        grade_3: Literal["HGG", "LGG"] | None = None,
        unlabelled: bool = False,
    ) -> None:
        self._path, self._pattern, self._window, self._unlabelled = Path(path), patient, window, unlabelled
        self._named = [_channel_pattern(entry) for entry in series]
        self.channels = tuple(channels) if self._named else brats.choose_channels(channels)
        if not 0 < len(set(self.channels)) == len(self.channels) <= 4:
            raise ConfigError(f"channels {list(self.channels)}: name one to four modalities, each once")
        self._rule, self._patterns = LabelRule(min_brain_share=min_brain_share), Patterns(tuple(include), tuple(exclude))
        self._skips = Skips()
        found = find_series(files_below(self._path, self._skips, include=include, exclude=exclude), self._path, self._skips)
        self._grades = read_grades(self._path, grades, grade_3)
        self._slice_labels = None if slice_labels is None else _read_slice_labels(Path(slice_labels))
        self._ids: dict[str, str] = {}
        self._studies = self._find_studies(found)

    def _find_studies(self, found: list[Series]) -> list[_Study]:
        groups: dict[str, dict[str, list[Series]]] = {}
        firsts = {series.patient: min(other.study for other in found if other.patient == series.patient) for series in found}
        for series in found:
            called = self._called(series, firsts[series.patient])
            self._ids.setdefault(called, series.patient)
            groups.setdefault(called, {}).setdefault(series.study, []).append(series)
        studies = []
        for patient, by_study in sorted(groups.items()):
            for number, study in enumerate(sorted(by_study), 1):
                name = patient if len(by_study) == 1 else f"{patient}-{number}"
                studies.append(_Study(patient, name, self._by_channel(by_study[study])))
        return studies

    def _called(self, series: Series, first: str) -> str:
        if self._pattern == "PatientID":
            return series.patient
        if self._pattern is not None:
            name = series.pictures[0].file.relative_to(self._path).as_posix()
            return apply_pattern(compile_pattern(self._pattern), name) or ""
        if not series.patient:
            return ""
        return "P" + hashlib.sha256(f"{series.patient}\0{first}".encode()).hexdigest()[:12]

    def _by_channel(self, found: list[Series]) -> dict[str, tuple[Series, ...]]:
        chosen: dict[str, tuple[Series, ...]] = {}
        for series in found:
            channel = self._channel(series.description)
            if channel in self.channels:
                chosen[channel] = (*chosen.get(channel, ()), series)
            else:
                for _ in series.pictures:
                    self._skips.add("series of no wanted channel", series.description)
        return chosen

    def _channel(self, description: str) -> str:
        if self._named:
            return next((channel for channel, pattern in self._named if fnmatch.fnmatch(description.lower(), pattern)), "")
        return next((channel for channel, words in _CHANNELS if words.search(description)), "")

    def _study_problems(self, study: _Study) -> list[Problem]:
        found = []
        for channel in self.channels:
            series = study.series.get(channel, ())
            if not series:
                cure = "name it with series=CHANNEL:DESCRIPTION, or choose other channels"
                found.append(Problem("error", study.name, "", f"no series is called like {channel}", cure))
            elif len(series) > 1:
                told = ", ".join(repr(one.description) for one in series[:3])
                cure = "say which with series=CHANNEL:DESCRIPTION, or leave one out with exclude=PATTERN"
                found.append(Problem("error", study.name, "", f"{len(series)} series may be {channel} ({told})", cure))
        if not study.patient:
            found.append(
                Problem(
                    "error", study.name, "", "no patient can be told (no PatientID, or patient=REGEX does not match)", "set patient=REGEX"
                )
            )
        return found

    def _grade_problem(self, study: _Study) -> Problem | None:
        if self._slice_labels is not None:
            return None
        found = self._grades.problem(study.name, self._names(study), study.patient) if self._grades.file else brats.NO_TABLE
        if found and "differs only" in found.what:  # the table's spelling is the tag's, which is not told
            found = replace(found, what="the table has no row for the patient; a row differs only by zeros or '.0'")
        return found and replace(found, patient=study.name)

    def _names(self, study: _Study) -> tuple[str, ...]:
        return (study.name, study.patient, self._ids[study.patient])

    def units(self) -> list[Unit]:
        """Patients whose studies have every wanted channel, and a grade."""
        usable: dict[str, list[_Study]] = {}
        for study in self._studies:
            if not self._study_problems(study) and (self._unlabelled or not self._grade_problem(study)):
                usable.setdefault(study.patient, []).append(study)
        return [self._unit(patient, studies) for patient, studies in usable.items()]

    def _unit(self, patient: str, studies: list[_Study]) -> Unit:
        labelled = self._grade_problem(studies[0]) is None
        graded = labelled and self._slice_labels is None
        label = self._grades.grade(self._names(studies[0]), patient) if graded else ""
        files = [picture.file for study in studies for channel in self.channels for picture in study.series[channel][0].pictures]
        return Unit(patient, label, tuple(files), labelled)

    def classes(self) -> tuple[str, ...]:
        """The grades, or the labels of slices, healthy first."""
        if self._slice_labels is None:
            return GRADES
        found = sorted(set(self._slice_labels.values()))
        return tuple(sorted(found, key=lambda name: name != labels.HEALTHY))

    def problems(self) -> list[Problem]:
        """Missing and doubtful series, missing grades."""
        if not self._studies:
            return [Problem("error", "", str(self._path), "no DICOM picture is below it", "name the folder of the patients")]
        found = [problem for study in self._studies for problem in self._study_problems(study)]
        if not self._unlabelled:
            found += [problem for study in self._studies if (problem := self._grade_problem(study))]
        if self._slice_labels is None and self._grades.file is not None:
            what = "no segmentation says which slices show a tumour: every slice takes its patient's grade"
            found.append(Problem("note", "", "", what, "give slice_labels=FILE if slices have labels of their own"))
        return [*found, *self._ambiguous()]

    def _ambiguous(self) -> list[Problem]:
        try:
            refuse_ambiguous_ids([study.patient for study in self._studies if self._pattern], "patients")
        except DataError as error:
            return [Problem("error", "", "", str(error), "make the names differ, or change patient=REGEX")]
        return []

    def skipped(self) -> list[Skipped]:
        """Files that are no pictures, and series that are not wanted."""
        return self._skips.listed()

    def settings(self) -> dict[str, Any]:
        """Channels, how they and patients are identified, and how slices are labelled."""
        chosen = {"kind": self.kind, "channels": list(self.channels), "grades": self._grades.table(), "window": self._window}
        given: dict[str, Any] = {"series": [f"{channel}:{pattern}" for channel, pattern in self._named], "patient": self._pattern}
        given |= {"unlabelled": self._unlabelled, "slice_labels": self._slice_labels is not None, **self._patterns.settings()}
        stated = {key: value for key, value in given.items() if value}
        return {**chosen, **stated, "min_brain_share": self._rule.min_brain_share}

    def read(self, unit: Unit, size: tuple[int, int]) -> Slices:
        """Decode all studies of one patient and make its samples.

        Raises:
            DataError: files cannot be decoded or disagree.
        """
        studies = [study for study in self._studies if study.patient == unit.patient and not self._study_problems(study)]
        return brats.joined([self._read_study(unit, study, size) for study in studies])

    def _read_study(self, unit: Unit, study: _Study, size: tuple[int, int]) -> Slices:
        rendered = Renderer()
        hashes: dict[str, str] = {}
        problems: list[Problem] = []
        first: Volume | None = None
        for channel in self.channels:
            volume = read_series(study.series[channel][0], f"{study.name}/{channel}")
            first = first or volume
            _check_grid(study.name, channel, volume, first)
            turned = axes_of(volume.affine).turn(volume.data)
            rendered.add(channel, turned, _background(turned), volume.window if self._window == "dicom" else None)
            hashes |= volume.hashes
            if volume.gaps:
                what = f"{study.name}: {volume.gaps} slices are missing between the {len(volume.data)} of {channel}"
                problems.append(Problem("warning", unit.patient, "", what, "export the series again; the others are read"))
        made = brats.to_slices(unit, study.name, rendered, None, rule=self._rule, size=size, hashes=hashes, problems=problems)
        return self._labelled(unit, made, first) if unit.labelled and first is not None else made

    def _labelled(self, unit: Unit, made: Slices, first: Volume) -> Slices:
        if self._slice_labels is None:
            named = {unit.label: made.tally.get("unlabelled", 0)}
            tally = {key: count for key, count in made.tally.items() if key != "unlabelled"} | named
            return replace(made, rows=[{**row, "label": unit.label} for row in made.rows], tally=tally)
        axes = axes_of(first.affine)
        if axes.order[0] != 0:
            raise DataError(f"{unit.patient}: slice_labels name slices of the files, which are not axial; give grades=FILE")
        uids = first.uids[::-1] if axes.flips[0] else first.uids
        rows = [{**row, "label": self._slice_labels.get(uids[row["slice"]], "")} for row in made.rows]
        keep = [index for index, row in enumerate(rows) if row["label"]]
        tally = {key: count for key, count in made.tally.items() if key != "unlabelled"} | {"left out: no label": len(rows) - len(keep)}
        tally |= Counter(rows[index]["label"] for index in keep)
        pixels = {channel: images[keep] for channel, images in made.pixels.items()}
        return replace(made, rows=[rows[index] for index in keep], pixels=pixels, tally=tally)


def _channel_pattern(entry: str) -> tuple[str, str]:
    channel, _, pattern = entry.partition(":")
    if not channel.strip() or not pattern.strip():
        raise ConfigError(f"series={entry!r}: write CHANNEL:DESCRIPTION, such as flair:*FLAIR*")
    return channel.strip(), pattern.strip().lower()


def _read_slice_labels(file: Path) -> dict[str, str]:
    try:
        rows = list(csv.reader(file.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read as CSV ({error}); give the columns slice,label") from None
    if not rows or [cell.strip().lower() for cell in rows[0][:2]] != ["slice", "label"]:
        raise DataError(f"{file}: its columns must be slice,label: a SOPInstanceUID and the class of its picture")
    return {row[0].strip(): row[1].strip() for row in rows[1:] if len(row) >= 2 and row[1].strip()}


def _background(volume: np.ndarray) -> float | None:
    """The end of the air's noise, or None where the background is one value, as after skull-stripping."""
    sample = volume[::2, ::3, ::3]
    _, counts = np.unique(sample, return_counts=True)
    return None if counts.max() >= CONSTANT * sample.size else air(volume)


def _check_grid(study: str, channel: str, volume: Volume, first: Volume) -> None:
    if volume.data.shape != first.data.shape:
        found = f"{volume.data.shape} and {first.data.shape}"
        raise DataError(f"{study}: {channel} has another grid than the first channel ({found}); register the series, or choose one channel")
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*(extent - 1 for extent in volume.data.shape[::-1]), 1]
    apart = float(np.abs(corners @ (volume.affine - first.affine).T).max())
    if apart > FAR:
        raise DataError(f"{study}: {channel} lies {apart:.1f} mm away from the first channel; register the series, or choose one channel")
