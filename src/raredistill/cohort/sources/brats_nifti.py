"""Glioma MRI as NIfTI files: BraTS of every year, UCSF-PDGM, UPENN-GBM, flat folders, nnU-Net's and the Decathlon's layout."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raredistill.cohort.labels import LabelRule
from raredistill.cohort.orientation import AS_STORED, Axes, axes_of
from raredistill.cohort.sources import Problem, Skipped, Slices, Unit, brats
from raredistill.cohort.sources.conventions import Meanings
from raredistill.cohort.sources.grades import MAPPING, read_grades
from raredistill.cohort.sources.layouts import ENDING, Scan, find_scans, numbered_without_names
from raredistill.cohort.sources.nifti import decode, extent, whole_labels
from raredistill.cohort.sources.persons import Persons, Place
from raredistill.cohort.sources.walk import Patterns, Skips, files_below, take
from raredistill.cohort.store import MASK
from raredistill.cohort.volumes import Renderer
from raredistill.errors import ConfigError, DataError
from raredistill.files import inside

FAR = 0.5
"""Distance in millimetres between the corners of two modalities above which their grids differ."""
FEW = 0.75
"""Share of the source's median number of slices below which a volume may be truncated."""
OBLIQUE = 3.0
"""Tilt in degrees above which a note is given."""


class BratsNifti:
    """Cases such as ``<case>/<case>_{flair,t1,t1ce,t2,seg}.nii[.gz]`` or ``<case>-{t2f,t1n,t1c,t2w,seg}``, at any depth below ``path``.

    Also read: UCSF-PDGM, UPENN-GBM, files called ``flair.nii.gz`` in a folder per case or visit, files of many cases in one folder, a
    folder per modality, nnU-Net's ``imagesTr`` and ``labelsTr`` and the Decathlon's 4D volumes with their ``dataset.json``. Volumes are
    turned by their affines as BraTS is stored (to the left, the back, the head) before they are cut into axial slices. Scans of one
    person (visits, follow-ups, several releases that a table joins) are one patient. A case without a segmentation is left out with a
    note, or read as unlabelled.

    Args:
        path: the folder that holds the cases.
        grades: a CSV ``patient,grade`` (or BraTS' own table); by default ``name_mapping.csv`` in ``path`` or beside the cases, and
            folders called HGG and LGG.
        rule: ``default`` or ``thesis``; see ``cohort.labels.LabelRule``.
        min_tumour_voxels: tumour voxels (at native resolution) that make a slice a tumour slice under the default rule.
        min_brain_share: share of the patient's widest brain slice under which the default rule leaves a slice out.
        channels: modalities to read. Emptiness and brain are judged on these.
        mask: give the segmentation as one more channel, ``mask``: 0, 85, 170 and 255 for background, necrosis, oedema and enhancing
            tumour, resized to the nearest voxel. It is for teachers that may know more than their students: runs take it only where
            their ``channels`` name it.
        labels: what the segmentations' numbers mean, a name of ``cohort.labels.CONVENTIONS``; by default by the naming of the files and,
            where that says nothing, by the labels of the whole source.
        patient: a regular expression on a case's path that names its person (its first group, or all that it matches).
        include: glob patterns of files to use; ``exclude``: of files to leave out.
        exclude: see ``include``.
        channel_order: modalities of files ``_0000``, ``_0001`` ... or of a fourth axis, where no ``dataset.json`` names them.
        grade_3: HGG or LGG: what WHO grade 3 counts as.
        unlabelled: also read cases without a segmentation or grade, as unlabelled samples.

    Raises:
        ConfigError: an option does not fit.
        DataError: the named table of grades cannot be used.
    """

    kind = "brats_nifti"
    counted = "patients"

    def __init__(
        self,
        path: Path,
        *,
        grades: Path | None = None,
        rule: str = "default",
        min_tumour_voxels: int = 50,
        min_brain_share: float = 0.1,
        channels: Sequence[str] = brats.CHANNELS,
        mask: bool = False,
        labels: Literal["brats2020", "brats2023", "brats2024", "brats2024_ped", "msd"] | None = None,
        patient: str | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        channel_order: Sequence[str] = (),
        grade_3: Literal["HGG", "LGG"] | None = None,
        unlabelled: bool = False,
    ) -> None:
        if mask and unlabelled:
            raise ConfigError("mask=true needs segmentations, which unlabelled=true does without; choose one of them")
        self._modalities, self._mask = brats.choose_channels(channels), mask
        self.channels = (*self._modalities, *([MASK] if mask else []))
        self._path, self._unlabelled, self._pattern = Path(path), unlabelled, patient
        self._rule = LabelRule(rule, min_tumour_voxels, min_brain_share)
        self._patterns, self._order = Patterns(tuple(include), tuple(exclude)), tuple(channel_order)
        self._skips = Skips()
        every = files_below(self._path, self._skips, include=include, exclude=exclude)
        volumes = take(every, self._path, self._skips, lambda file: bool(ENDING.search(file.name)), "not a NIfTI file")
        self._unnamed = numbered_without_names(volumes, self._order)
        self._scans = find_scans(volumes, self._path, self._order, self._skips)
        self._often = Counter(scan.name for scan in self._scans)
        self._grades = read_grades(_table_folder(self._path, self._scans), grades, grade_3)
        self._persons = Persons(self._path, [Place(scan.name, scan.folder) for scan in self._scans], self._grades, patient)
        self._meanings = Meanings(self._scans, labels)

    @cached_property
    def _usable(self) -> dict[str, list[Scan]]:
        """Person -> the scans that are read; labelled ones alone where a person has any."""
        sound = [scan for scan in self._scans if not self._scan_problems(scan) and self._persons.person(scan.name)]
        labelled = [scan for scan in sound if self._labelled(scan)]
        chosen: dict[str, list[Scan]] = {}
        for scan in labelled:
            chosen.setdefault(self._persons.person(scan.name), []).append(scan)
        known = set(chosen)
        for scan in sound if self._unlabelled else ():
            person = self._persons.person(scan.name)
            if not self._labelled(scan) and person not in known:
                chosen.setdefault(person, []).append(scan)
        return dict(sorted(chosen.items()))

    def _labelled(self, scan: Scan) -> bool:
        return "seg" in scan.files and self._persons.has_grades() and self._persons.problem(scan.name) is None and self._grade(scan) != ""

    def _grade(self, scan: Scan) -> str:
        try:
            return self._persons.grade(scan.name)
        except ValueError:  # no grade
            return ""

    def units(self) -> list[Unit]:
        """Persons with a scan that has every wanted modality, a segmentation and a grade, in the order of their names."""
        return [self._unit(person, scans) for person, scans in self._usable.items() if not self._conflict(scans)]

    def _conflict(self, scans: list[Scan]) -> bool:
        return len({self._grade(scan) for scan in scans if self._labelled(scan)}) > 1

    def _unit(self, person: str, scans: list[Scan]) -> Unit:
        labelled = self._labelled(scans[0])
        files = [scan.files[role][0] for scan in scans for role in self._roles(scan, labelled)]
        return Unit(person, self._grade(scans[0]) if labelled else "", tuple(dict.fromkeys(files)), labelled)

    def _roles(self, scan: Scan, labelled: bool) -> tuple[str, ...]:
        return (*self._modalities, *(["seg"] if labelled else []))

    def classes(self) -> tuple[str, ...]:
        """Healthy and the two grades."""
        return brats.CLASSES

    def problems(self) -> list[Problem]:
        """Missing modalities, segmentations and grades; misnamed and doubled files; persons, grades and labels that are in doubt."""
        nameless = [_nameless(self._unnamed)] if self._unnamed is not None else []
        if not self._scans:
            cure = "name the folder that holds the case folders"
            return nameless or [
                Problem("error", "", str(self._path), "no file is called like a BraTS modality (*_flair.nii.gz, *-t2f.nii.gz)", cure)
            ]
        ungraded = [] if self._unlabelled or self._persons.has_grades() else [brats.NO_TABLE]
        labelled = [scan.name for scans in self._usable.values() for scan in scans if self._labelled(scan)]
        each = [problem for scan in self._scans for problem in (*self._scan_problems(scan), *self._remarks(scan))]
        whole = [*self._meanings.problems(), *self._persons.conflicts(labelled), *self._persons.remark(), *self._short()]
        return [*nameless, *ungraded, *each, *whole]

    def skipped(self) -> list[Skipped]:
        """Hidden and foreign files, and what patterns leave out."""
        return self._skips.listed()

    def settings(self) -> dict[str, Any]:
        """Channels, rule, grades, and what labels and names mean."""
        chosen = {"kind": self.kind, "channels": list(self.channels), "grades": self._grades.table(), "labels": self._meanings.names()}
        given: dict[str, Any] = {"patient": self._pattern, "channel_order": list(self._order), "grade_3": self._grades.grade_3}
        given |= {"unlabelled": self._unlabelled, **self._patterns.settings()}
        stated = {key: value for key, value in given.items() if value}
        return {**chosen, **stated, **brats.rule_settings(self._rule), **brats.generated(self._path)}

    def read(self, unit: Unit, size: tuple[int, int]) -> Slices:
        """Decode all scans of one person and make its samples.

        Raises:
            DataError: files cannot be decoded or disagree; every reason is told.
        """
        slices, failures = [], []
        for scan in self._usable[unit.patient]:
            try:
                slices.append(self._read_scan(unit, scan, size))
            except DataError as error:
                failures.append(str(error))
        if failures:
            raise DataError("; ".join(failures))
        return brats.joined(slices)

    def _read_scan(self, unit: Unit, scan: Scan, size: tuple[int, int]) -> Slices:
        reading = _Reading(scan)
        for role in self._roles(scan, unit.labelled):
            try:
                reading.take(role, scan.files[role][0])
            except DataError as error:
                reading.failures.append(str(error))
        if reading.failures:
            raise DataError("; ".join(reading.failures))
        reading.check()
        problems = [Problem("note", unit.patient, "", f"{scan.name}: {remark}", "nothing to do") for remark in reading.remarks]
        convention = self._meanings.of(scan)
        return brats.to_slices(
            unit, scan.name, reading.rendered, reading.mask if unit.labelled else None, rule=self._rule, size=size, problems=problems,
            hashes=self._named(scan, reading.hashes), convention=convention, with_mask=self._mask,
        )  # fmt: skip

    def _named(self, scan: Scan, hashes: dict[Path, str]) -> dict[str, str]:
        alone = len(self._usable[self._persons.person(scan.name)]) == 1
        return {file.name if alone else f"{scan.name}/{file.name}": found for file, found in hashes.items()}

    def _scan_problems(self, scan: Scan) -> list[Problem]:
        """Errors for which a scan is left out."""
        cure = "add the file or choose other channels"
        problems = [Problem("error", scan.name, str(scan.folder), f"no {role} file", cure) for role in scan.missing(self._modalities)]
        if self._often[scan.name] > 1:
            what = f"one of {self._often[scan.name]} folders of this name: which is the patient's cannot be told"
            problems.append(Problem("error", scan.name, str(scan.folder), what, "keep one of them"))
        problems += [_rivalry(scan, files) for files in scan.rivals()]
        linked = [file for files in scan.files.values() for file in files if not inside(file, self._path)]
        cure = "copy the file into the source"
        problems += [Problem("error", scan.name, str(file), "is a link to a file outside the source", cure) for file in linked]
        asked = "seg" in scan.files and not self._unlabelled and self._persons.has_grades()
        grade = self._persons.problem(scan.name) if asked else None
        return [*problems, grade] if grade else problems

    def _remarks(self, scan: Scan) -> list[Problem]:
        if "seg" not in scan.files:
            cure = "nothing to do: the case is left out of a labelled cohort (unlabelled=true reads it)"
            if not self._unlabelled:
                return [Problem("note", scan.name, str(scan.folder), "no segmentation", cure)]
            used = scan in self._usable.get(self._persons.person(scan.name), [])
            what = "not read: unlabelled, and other scans of the person are labelled"
            return [] if used else [Problem("note", scan.name, str(scan.folder), what, "nothing to do")]
        person = self._persons.person(scan.name)
        doubled = [files for files in scan.files.values() if len(files) > 1 and files not in scan.rivals()]
        remarks = [Problem("warning", person, str(files[1]), f"{files[0].name} is read instead", "keep one of them") for files in doubled]
        mask, flair = scan.files["seg"][0], next(iter(scan.files.values()))[0]
        if flair.name.startswith(scan.name) and not mask.name.startswith(scan.name):
            remarks.append(Problem("note", person, str(mask), "misnamed segmentation, taken as the case's own", "nothing to do"))
        return remarks

    def _short(self) -> list[Problem]:
        """Volumes with far fewer axial slices than the others, which may be truncated."""
        depths: dict[str, int] = {}
        for scan in [scan for scans in self._usable.values() for scan in scans]:
            found = extent(scan.files[self._modalities[0]][0])
            if found is not None and len(found[0]) >= 3:
                depths[scan.name] = _depth(*found)
        usual = float(np.median(list(depths.values()))) if len(depths) > 2 else 0.0
        cure = "compare it with the original: it may have been cut, or be of another protocol"
        return [
            Problem("warning", self._persons.person(name), "", f"{name} has {depth} axial slices; the source's median is {usual:g}", cure)
            for name, depth in depths.items() if depth < FEW * usual
        ]  # fmt: skip


def _depth(shape: tuple[int, ...], affine: np.ndarray | None) -> int:
    try:
        order = AS_STORED.order if affine is None else axes_of(affine).order
    except DataError:
        order = AS_STORED.order
    return shape[2 - order[0]]


def _table_folder(path: Path, scans: list[Scan]) -> Path:
    """Path of the table of grades: in archives, it is beside the cases, a folder or two below their root."""
    places = dict.fromkeys((path, *(place for scan in scans for place in (scan.folder.parent, scan.folder.parent.parent))))
    return next((folder for folder in places if folder.is_relative_to(path) and (folder / MAPPING).is_file()), path)


def _nameless(file: Path) -> Problem:
    what = "holds one channel of several, or all of them, and no dataset.json names them"
    return Problem("error", "", str(file), what, "name them in their order: channel_order=flair,t1,t1ce,t2")


def _rivalry(scan: Scan, files: tuple[Path, ...]) -> Problem:
    names = ", ".join(file.name for file in files[:3])
    cure = "keep the right one; each case needs a folder of its own, or files that begin with its name"
    return Problem("error", scan.name, str(scan.folder), f"{len(files)} files claim to be the same modality ({names})", cure)


@dataclass
class _Reading:
    """State of a scan while its files are read one after the other."""

    scan: Scan
    hashes: dict[Path, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    places: dict[str, np.ndarray | None] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    rendered: Renderer = field(default_factory=Renderer)
    mask: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    _last: tuple[Path, np.ndarray] | None = None

    def take(self, role: str, file: Path) -> None:
        """Read one file: a modality is rendered, a segmentation kept; shapes and places are compared by ``check``."""
        volume = self._volume(role, file)
        self.shapes[file.name] = volume.shape[::-1]
        if len(set(self.shapes.values())) > 1:
            return  # reported with all shapes once they are known
        volume = _axes(self.places[file.name], file).turn(volume)
        if role == "seg":
            self.mask, rounded = whole_labels(volume, file)
            if rounded:
                self.remarks.append(f"{file.name} was saved as scaled numbers; they are rounded to the labels that they were")
            return
        try:
            self.rendered.add(role, volume)
        except DataError as error:
            raise DataError(f"{file}: {error}; replace it by the original or leave the patient out") from None

    def _volume(self, role: str, file: Path) -> np.ndarray:
        lanes = 0 if role == "seg" else len(self.scan.lanes)
        if self._last is None or self._last[0] != file:
            raw = brats.read_bytes(file)
            self.hashes[file] = hashlib.sha256(raw).hexdigest()
            volume, self.places[file.name] = decode(raw, file, lanes=lanes)
            self._last = (file, volume) if lanes else None
            if not lanes:
                return volume
        whole: np.ndarray = self._last[1] if self._last else volume
        lane: np.ndarray = whole[self.scan.lanes[role]]
        return lane

    def check(self) -> None:
        """Compare shapes, and where the files put the corners of their volumes.

        Raises:
            DataError: they disagree.
        """
        if len(set(self.shapes.values())) > 1:
            found = ", ".join(f"{name} {shape}" for name, shape in self.shapes.items())
            raise DataError(f"{self.scan.name}: modalities disagree in shape ({found}); register them to one grid")
        placed = {name: affine for name, affine in self.places.items() if affine is not None}
        if not placed:
            self.remarks.append("no file states its orientation (qform and sform codes are 0): taken as BraTS stores it")
        elif len(placed) < len(self.places):
            bare = ", ".join(name for name in self.places if name not in placed)
            raise DataError(f"{self.scan.name}: {bare} has no place in space (qform and sform codes are 0), the other files have; set it")
        else:
            _check_places(self.scan.name, placed, next(iter(self.shapes.values())))
            tilt = axes_of(next(iter(placed.values()))).tilt
            if tilt > OBLIQUE:
                self.remarks.append(f"is oblique by {tilt:.0f} degrees; it is cut along its own axes that are closest to the patient's")


def _axes(affine: np.ndarray | None, file: Path) -> Axes:
    try:
        return AS_STORED if affine is None else axes_of(affine)
    except DataError as error:
        raise DataError(f"{file}: {error}; replace it by the original") from None


def _check_places(scan: str, affines: dict[str, np.ndarray], shape: tuple[int, ...]) -> None:
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*(extent - 1 for extent in shape), 1]
    [(first, reference), *others] = affines.items()
    for name, affine in others:
        apart = float(np.abs(corners @ (affine - reference).T).max())
        if apart > FAR:
            raise DataError(f"{scan}: {name} lies {apart:.1f} mm away from {first} by its affine; register them to one grid")
