"""BraTS2020 as distributed in a public archive: one HDF5 file per slice, with four modalities and three label masks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from raredistill.cohort.labels import LabelRule
from raredistill.cohort.sources import Problem, Skipped, Slices, Unit, brats
from raredistill.cohort.sources.grades import MAPPING, read_grades
from raredistill.cohort.sources.persons import Persons, Place
from raredistill.cohort.sources.walk import Patterns, Skips, files_below, take
from raredistill.cohort.store import MASK
from raredistill.cohort.volumes import Renderer
from raredistill.errors import ConfigError, DataError
from raredistill.files import inside

NAME = re.compile(r"volume_(\d{1,6})_slice_(\d{1,4})\.(h5|hdf5)$", re.ASCII)
PATIENT = "BraTS20_Training_{:03d}"
LABELS = (1, 2, 4)
"""Labels of the mask's three channels."""
LARGEST = 2**24
"""Numbers of the largest slice that is read."""
FLAT_TOPS = 0.9
"""Share of a patient's slices with the same maximum above which slices count as scaled separately."""


class BratsHdf5:
    """Slices ``volume_<N>_slice_<i>.h5``, at any depth below ``path``; ``volume_N`` is ``BraTS20_Training_<N>``.

    The archive keeps a slice as ``image`` (first axis, second axis, modality) and ``mask`` (first axis, second axis, label). The first
    two are exchanged, so that samples look like those of the NIfTI files. Its intensity scale is not documented: the background is each
    volume's most common value, and an increasing affine scale of a volume changes nothing.

    Args:
        path: the folder that holds the slices.
        grades: a CSV ``patient,grade`` (or BraTS' own table); by default the ``name_mapping.csv`` in ``path`` or beside the slices.
        rule: ``default`` or ``thesis``; see ``cohort.labels.LabelRule``.
        min_tumour_voxels: tumour voxels (at native resolution) that make a slice a tumour slice under the default rule.
        min_brain_share: share of the patient's widest brain slice under which the default rule leaves a slice out.
        channels: modalities to read. Emptiness and brain are judged on these.
        mask: give the segmentation as one more channel, ``mask``: 0, 85, 170 and 255 for the labels 0, 1, 2 and 3 (or 4), resized to the
            nearest voxel. It is for teachers that may know more than their students: runs take it only where their ``channels`` name it.
        channel_order: what the last axis of ``image`` holds; users of the archive disagree.
        patient: a regular expression on ``BraTS20_Training_<N>`` that names its person (its first group, or all that it matches).
        include: glob patterns of files to use; ``exclude``: of files to leave out.
        exclude: see ``include``.
        grade_3: HGG or LGG: what WHO grade 3 counts as.

    Raises:
        ConfigError: an option does not fit.
        DataError: the named table of grades cannot be used.
    """

    kind = "brats_hdf5"
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
        channel_order: Sequence[str] = brats.CHANNELS,
        patient: str | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        grade_3: Literal["HGG", "LGG"] | None = None,
    ) -> None:
        self._modalities, self._mask = brats.choose_channels(channels), mask
        self.channels = (*self._modalities, *([MASK] if mask else []))
        self._order = _choose_order(channel_order)
        self._path = Path(path)
        self._rule = LabelRule(rule, min_tumour_voxels, min_brain_share)
        self._pattern, self._patterns, self._skips = patient, Patterns(tuple(include), tuple(exclude)), Skips()
        files = files_below(self._path, self._skips, include=include, exclude=exclude)
        wanted = take(files, self._path, self._skips, lambda file: bool(NAME.match(file.name)), "not called volume_<N>_slice_<i>.h5")
        self._volumes = _find_slices(wanted)
        self._grades = read_grades(self._table_folder(), grades, grade_3)
        self._persons = Persons(self._path, [Place(volume, self._path) for volume in self._volumes], self._grades, patient)

    def units(self) -> list[Unit]:
        """Patients with a grade, in the order of their numbers; a unit's files are its slices in order."""
        usable: dict[str, list[str]] = {}
        for volume in self._volumes if self._persons.has_grades() else ():
            errors = [problem for problem in self._volume_problems(volume) if problem.level == "error"]
            if not errors and self._persons.person(volume):
                usable.setdefault(self._persons.person(volume), []).append(volume)
        return [self._unit(person, volumes) for person, volumes in usable.items() if len({self._persons.grade(v) for v in volumes}) == 1]

    def _unit(self, person: str, volumes: list[str]) -> Unit:
        files = [self._volumes[volume][index][0] for volume in volumes for index in sorted(self._volumes[volume])]
        return Unit(person, self._persons.grade(volumes[0]), tuple(files))

    def classes(self) -> tuple[str, ...]:
        """Healthy and the two grades."""
        return brats.CLASSES

    def problems(self) -> list[Problem]:
        """Missing slices and grades, persons in doubt."""
        if not self._volumes:
            return [
                Problem("error", "", str(self._path), "no file is called volume_<N>_slice_<i>.h5", "name the folder that holds the slices")
            ]
        ungraded = [] if self._persons.has_grades() else [brats.NO_TABLE]
        each = [problem for volume in self._volumes for problem in self._volume_problems(volume)]
        sound = [volume for volume in self._volumes if self._persons.has_grades() and not self._persons.problem(volume)]
        return [*ungraded, *each, *self._persons.conflicts(sound), *self._persons.remark()]

    def skipped(self) -> list[Skipped]:
        """Hidden and foreign files, and what patterns leave out."""
        return self._skips.listed()

    def settings(self) -> dict[str, Any]:
        """Channels and their order, and the rule."""
        return {
            "kind": self.kind,
            "channels": list(self.channels),
            "channel_order": list(self._order),
            "grades": self._grades.table(),
            **({"patient": self._pattern} if self._pattern else {}),
            **({"grade_3": self._grades.grade_3} if self._grades.grade_3 else {}),
            **self._patterns.settings(),
            **brats.rule_settings(self._rule),
            **brats.generated(self._path),
        }

    def read(self, unit: Unit, size: tuple[int, int]) -> Slices:
        """Decode one patient's slices and make its samples.

        Raises:
            DataError: files cannot be decoded or disagree in shape; every reason is told.
        """
        volumes: dict[str, list[Path]] = {}
        for file in unit.files:
            volumes.setdefault(_volume(file), []).append(file)
        return brats.joined([self._read_volume(unit, volume, files, size) for volume, files in volumes.items()])

    def _read_volume(self, unit: Unit, volume: str, files: list[Path], size: tuple[int, int]) -> Slices:
        stack, mask, hashes = _read_slices(files, [self._order.index(channel) for channel in self._modalities])
        rendered, scaled = Renderer(), []
        for channel, pixels in zip(self._modalities, stack, strict=True):
            backgrounds = _backgrounds(pixels)
            _add(rendered, unit, channel, pixels, backgrounds)
            if backgrounds is not None or _flat_tops(pixels):
                scaled.append(channel)
        problems = _scaling(unit, scaled)
        made = brats.to_slices(
            unit, volume, rendered, mask, rule=self._rule, size=size, hashes=hashes, with_mask=self._mask, problems=problems
        )
        return replace(made, rows=[_numbered(row, files) for row in made.rows])

    def _table_folder(self) -> Path:
        beside = [next(iter(slices.values()))[0].parent for slices in self._volumes.values()][:1]
        return next((folder for folder in (self._path, *beside) if (folder / MAPPING).is_file()), self._path)

    def _volume_problems(self, patient: str) -> list[Problem]:
        slices = self._volumes[patient]
        usual = int(np.median([max(volume) + 1 for volume in self._volumes.values()]))
        gaps = sorted(set(range(max(*slices, usual - 1) + 1)) - set(slices))
        what = f"{len(gaps)} of {len(slices) + len(gaps)} slices are missing ({_few(gaps)})"
        cure = "add the files if there are any; the others are read"
        problems = [Problem("warning", patient, str(self._path), what, cure)] if gaps else []
        twice = [files for files in slices.values() if len(files) > 1]
        problems += [Problem("error", patient, str(files[1]), f"is the same slice as {files[0]}", "keep one of them") for files in twice]
        linked = [file for files in slices.values() for file in files if not inside(file, self._path)]
        cure = "copy the file into the source"
        problems += [Problem("error", patient, str(file), "is a link to a file outside the source", cure) for file in linked]
        grade = self._persons.problem(patient)
        return [*problems, grade] if grade else problems


def _choose_order(order: Sequence[str]) -> tuple[str, ...]:
    chosen = tuple(order)
    if sorted(chosen) != sorted(brats.CHANNELS):
        raise ConfigError(f"channel_order {list(chosen)} must name each of {', '.join(brats.CHANNELS)} once")
    return chosen


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def _find_slices(files: Sequence[Path]) -> dict[str, dict[int, list[Path]]]:
    found: dict[str, dict[int, list[Path]]] = {}
    for file in files:
        found.setdefault(_volume(file), {}).setdefault(_index(file), []).append(file)
    return dict(sorted(found.items()))


def _volume(file: Path) -> str:
    match = NAME.match(file.name)
    return PATIENT.format(int(match[1])) if match else ""


def _index(file: Path) -> int:
    match = NAME.match(file.name)
    return int(match[2]) if match else -1


def _numbered(row: dict[str, Any], files: list[Path]) -> dict[str, Any]:
    """The row with the number of its slice's file, from which its place differs behind a gap."""
    number = _index(files[row["slice"]])
    return {**row, "slice": number, "sample": f"{row['source']}:{number}"}


def _read_slices(files: list[Path], positions: list[int]) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Volumes ``(channels, n, height, width)`` float64, labels ``(n, height, width)`` uint8, and the files' hashes."""
    stack: np.ndarray | None = None
    labels, hashes, failures = np.empty(0, np.uint8), {}, []
    for index, file in enumerate(files):
        try:
            raw = brats.read_bytes(file)
            image, mask = decode(raw, file)
            if stack is None:
                stack = np.empty((len(positions), len(files), *image.shape[1::-1]))
                labels = np.empty(stack.shape[1:], np.uint8)
            if image.shape[1::-1] != labels.shape[1:]:
                raise DataError(f"{file}: its shape {image.shape[:2]} is not that of the slices before; replace it by the original")
        except DataError as error:
            failures.append(str(error))
            continue
        hashes[file.name] = hashlib.sha256(raw).hexdigest()
        labels[index] = _merged(mask).T
        stack[:, index] = image[..., positions].transpose(2, 1, 0)
    if failures or stack is None:
        raise DataError("; ".join(failures))
    return stack, labels, hashes


def decode(raw: bytes, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Decode one slice from a file's bytes, following no link out of the file.

    Args:
        raw: the file's bytes.
        file: named in messages.

    Returns:
        ``image`` ``(first, second, 4)`` numbers, and ``mask`` ``(first, second, 3)`` integers.

    Raises:
        DataError: the bytes are damaged, or hold something else.
    """
    try:
        with h5py.File(h5py.h5f.open_file_image(raw)) as handle:
            image, mask = _dataset(handle, "image", len(brats.CHANNELS), file), _dataset(handle, "mask", len(LABELS), file)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise DataError(f"{file}: cannot be decoded as HDF5 ({error}); replace it by the original") from None
    if image.shape[:2] != mask.shape[:2]:
        raise DataError(f"{file}: image {image.shape} and mask {mask.shape} disagree in shape; replace it by the original")
    return image, mask


def _dataset(handle: h5py.File, name: str, depth: int, file: Path) -> np.ndarray:
    if name not in handle or not isinstance(handle.get(name, getlink=True), h5py.HardLink):
        raise DataError(f"{file}: has no dataset '{name}' of its own; replace it by the original")
    dataset = handle[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise DataError(f"{file}: '{name}' is no plain dataset; replace it by the original")
    if dataset.ndim != 3 or dataset.shape[2] != depth or not 0 < dataset.size <= LARGEST or dataset.dtype.kind not in "iufb":
        raise DataError(
            f"{file}: '{name}' is {dataset.dtype} of shape {dataset.shape}; needed are numbers of shape (height, width, {depth})"
        )
    if dataset.chunks and np.prod(dataset.chunks, dtype=np.float64) > LARGEST:
        raise DataError(f"{file}: '{name}' is kept in chunks of {dataset.chunks}, larger than any slice; replace it by the original")
    values: np.ndarray = dataset[()]
    return values


def _merged(mask: np.ndarray) -> np.ndarray:
    """One label per voxel; channels do not overlap in BraTS; if they do, the later one counts."""
    merged = np.zeros(mask.shape[:2], np.uint8)
    for position, label in enumerate(LABELS):
        merged[mask[..., position] != 0] = label
    return merged


def _add(rendered: Renderer, unit: Unit, channel: str, volume: np.ndarray, backgrounds: np.ndarray | None) -> None:
    try:
        rendered.add(channel, volume, backgrounds)
    except DataError as error:
        raise DataError(f"{unit.patient}: {channel} {error}; replace the patient's files or leave the patient out") from None


def _backgrounds(volume: np.ndarray) -> np.ndarray | None:
    """``(n, 1, 1)`` values where slices differ in their background, else None: the volume's commonest value will do."""
    if not np.isfinite(volume).all():
        return None  # reported when the volume is normalised
    corners = volume[:, 0, 0]
    if np.ptp(corners) <= 1e-6 * np.ptp(volume):
        return None
    return corners.reshape(-1, 1, 1)


def _scaling(unit: Unit, scaled: list[str]) -> list[Problem]:
    """A warning if the archive scaled each slice separately: brightness can then not be compared across slices, and cannot be restored."""
    if not scaled:
        return []
    what = f"{', '.join(scaled)}: each slice seems to be scaled by itself (backgrounds differ, or all slices reach the same maximum)"
    return [Problem("warning", unit.patient, "", what, "prepare from the NIfTI files if brightness should compare across slices")]


def _flat_tops(volume: np.ndarray) -> bool:
    tops = volume.max(axis=(1, 2))
    filled = tops[tops > volume.min(axis=(1, 2))]
    return len(filled) > 2 and bool(np.mean(filled == np.max(filled)) >= FLAT_TOPS)
