"""BraTS as the challenge hands it out: a folder a case, a NIfTI file a modality."""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from isal import igzip_lib

from raredistill.cohort.labels import LabelRule
from raredistill.cohort.sources import Problem, Slices, Unit, brats
from raredistill.cohort.store import MASK
from raredistill.cohort.volumes import Renderer
from raredistill.errors import DataError
from raredistill.files import files_below, inside

NAME = re.compile(r"[_-](flair|t2f|t1ce|t1c|t1n|t1|t2w|t2|segm?)\.nii(\.gz)?$", re.IGNORECASE)
"""``segm``: in BraTS2020 the segmentation of case 355 is called W39_1998.09.19_Segm.nii."""
ROLES = {"t2f": "flair", "t1n": "t1", "t1c": "t1ce", "t2w": "t2", "segm": "seg"}
LARGEST = 2**29
"""Voxels of the largest volume that is read: a header that promises more is damaged or hostile."""
HEADER = 352
MOST_BEHIND = 2**24
"""Bytes that may follow the voxels."""
FARTHEST = 1e9
"""Millimetres; an affine with more than that is no place."""
FAR = 0.5
"""Millimetres between the corners of two modalities from which on they are not on one grid."""


@dataclass(frozen=True)
class _Case:
    patient: str
    folder: Path
    files: dict[str, tuple[Path, ...]]

    def missing(self, channels: tuple[str, ...]) -> list[str]:
        return [role for role in channels if role not in self.files]

    def rivals(self) -> list[tuple[Path, ...]]:
        """Files that claim to be the same modality of the case and are not one file, zipped and unzipped."""
        return [found for found in self.files.values() if len({file.name.removesuffix(".gz") for file in found}) > 1]


class BratsNifti:
    """Cases ``<case>/<case>_{flair,t1,t1ce,t2,seg}.nii[.gz]``, or the newer ``<case>-{t2f,t1n,t1c,t2w,seg}``, at any depth below ``path``.

    A case without a segmentation is told as a note and left out. Slices are axial, rows run along the second axis of the file and columns
    along the first, which shows BraTS in the radiological convention.

    Args:
        path: the folder that holds the cases.
        grades: a CSV ``patient,grade`` (or BraTS' own table); by default ``name_mapping.csv`` in ``path`` or beside the cases.
        rule: ``default`` or ``thesis``; see ``cohort.labels.LabelRule``.
        min_tumour_voxels: tumour voxels (at native resolution) that make a slice a tumour slice under the default rule.
        min_brain_share: share of the patient's widest brain slice under which the default rule leaves a slice out.
        channels: modalities to read. Emptiness and brain are judged on these.
        mask: give the segmentation as one more channel, ``mask``: 0, 85, 170 and 255 for the labels 0, 1, 2 and 3 (or 4), resized to the
            nearest voxel. It is for teachers that may know more than their students: runs take it only where their ``channels`` name it.

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
    ) -> None:
        self._modalities, self._mask = brats.choose_channels(channels), mask
        self.channels = (*self._modalities, *([MASK] if mask else []))
        self._path = Path(path)
        self._rule = LabelRule(rule, min_tumour_voxels, min_brain_share)
        self._cases = _find_cases(self._path)
        self._grades = brats.read_grades(_table_folder(self._path, self._cases), grades)
        self._often = Counter(case.patient for case in self._cases)

    def units(self) -> list[Unit]:
        """Cases that have every wanted modality, a segmentation and a grade, in the order of their names."""
        graded = self._cases if self._grades.file else []
        usable = [case for case in graded if not self._case_problems(case) and "seg" in case.files]
        roles = (*self._modalities, "seg")
        return [Unit(case.patient, self._grades.values[case.patient], tuple(case.files[role][0] for role in roles)) for case in usable]

    def classes(self) -> tuple[str, ...]:
        """Healthy and the two grades."""
        return brats.CLASSES

    def problems(self) -> list[Problem]:
        """Missing modalities, segmentations and grades; misnamed and doubled files; patients that occur twice."""
        if not self._cases:
            cure = "name the folder that holds the case folders"
            return [Problem("error", "", str(self._path), "no file is called like a BraTS modality (*_flair.nii.gz, *-t2f.nii.gz)", cure)]
        ungraded = [brats.NO_TABLE] if self._grades.file is None else []
        return ungraded + [problem for case in self._cases for problem in (*self._case_problems(case), *_remarks(case))]

    def settings(self) -> dict[str, Any]:
        """Channels, rule and grades."""
        chosen = {"kind": self.kind, "channels": list(self.channels), "grades": self._grades.table()}
        return {**chosen, **brats.rule_settings(self._rule), **brats.generated(self._path)}

    def read(self, unit: Unit, size: tuple[int, int]) -> Slices:
        """Decode one case and make its samples.

        Raises:
            DataError: files cannot be decoded or disagree; every reason is told.
        """
        reading = _Reading({}, {}, {}, [], Renderer(), np.empty(0, np.uint8))
        for role, file in zip((*self._modalities, "seg"), unit.files, strict=True):
            try:
                reading.take(role, file)
            except DataError as error:
                reading.failures.append(str(error))
        if reading.failures:
            raise DataError("; ".join(reading.failures))
        _check_shapes(unit, reading.shapes)
        _check_places(unit, reading.places, next(iter(reading.shapes.values())))
        return brats.to_slices(
            unit, reading.rendered, reading.mask, rule=self._rule, size=size, hashes=reading.hashes, with_mask=self._mask
        )

    def _case_problems(self, case: _Case) -> list[Problem]:
        gone = case.missing(self._modalities)
        problems = [
            Problem("error", case.patient, str(case.folder), f"no {role} file", "add the file or choose other channels") for role in gone
        ]
        if self._often[case.patient] > 1:
            what = f"one of {self._often[case.patient]} folders of this name: which is the patient's cannot be told"
            problems.append(Problem("error", case.patient, str(case.folder), what, "keep one of them"))
        problems += [_rivalry(case, files) for files in case.rivals()]
        problems += [_outside(case, file) for files in case.files.values() for file in files if not inside(file, self._path)]
        grade = self._grades.problem(case.patient) if "seg" in case.files and self._grades.file else None
        return [*problems, grade] if grade else problems


def _find_cases(path: Path) -> list[_Case]:
    folders: dict[Path, dict[str, list[Path]]] = {}
    for file in files_below(path):
        match = NAME.search(file.name)
        if match and file.is_file() and not file.name.startswith("."):  # macOS leaves a ._ file beside every file of an archive
            role = match[1].lower()
            folders.setdefault(file.parent, {}).setdefault(ROLES.get(role, role), []).append(file)
    cases = [_Case(folder.name, folder, {role: _own(found, folder) for role, found in files.items()}) for folder, files in folders.items()]
    return sorted(cases, key=lambda case: (case.patient, case.folder))


def _table_folder(path: Path, cases: list[_Case]) -> Path:
    """Where the table of grades lies: archives keep it beside the cases, a folder or two below their root."""
    places = dict.fromkeys((path, *(case.folder.parent for case in cases)))
    return next((folder for folder in places if (folder / brats.MAPPING).is_file()), path)


def _own(files: list[Path], folder: Path) -> tuple[Path, ...]:
    """The files that carry the case's name, where any does: a copy of case 355's segmentation under its right name wins."""
    return tuple(file for file in files if file.name.startswith(folder.name)) or tuple(files)


def _rivalry(case: _Case, files: tuple[Path, ...]) -> Problem:
    names = ", ".join(file.name for file in files[:3])
    cure = "keep the right one; each case needs a folder of its own"
    return Problem("error", case.patient, str(case.folder), f"{len(files)} files claim to be the same modality ({names})", cure)


def _outside(case: _Case, file: Path) -> Problem:
    return Problem("error", case.patient, str(file), "is a link to a file outside the source", "copy the file into the source")


def _remarks(case: _Case) -> list[Problem]:
    if "seg" not in case.files:
        cure = "nothing to do: the case is left out of a labelled cohort"
        return [Problem("note", case.patient, str(case.folder), "no segmentation", cure)]
    doubled = [files for files in case.files.values() if len(files) > 1 and files not in case.rivals()]
    remarks = [Problem("warning", case.patient, str(files[1]), f"{files[0].name} is read instead", "keep one of them") for files in doubled]
    segmentation = case.files["seg"][0]
    if not segmentation.name.startswith(case.patient):
        remarks.append(Problem("note", case.patient, str(segmentation), "misnamed segmentation, taken as the case's own", "nothing to do"))
    return remarks


@dataclass
class _Reading:
    """What is known of a case while its files are read one after the other."""

    hashes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    places: dict[str, np.ndarray]
    failures: list[str]
    rendered: Renderer
    mask: np.ndarray

    def take(self, role: str, file: Path) -> None:
        """Read one file of the patient: a modality is rendered, a segmentation kept; shapes and places are compared by the caller."""
        raw = brats.read_bytes(file)
        self.hashes[file.name] = hashlib.sha256(raw).hexdigest()
        volume, self.places[file.name] = decode(raw, file)
        self.shapes[file.name] = volume.shape[::-1]
        if len(set(self.shapes.values())) > 1:
            return  # told with all shapes once they are known
        if role == "seg":
            self.mask = _labels(volume, file)
            return
        try:
            self.rendered.add(role, volume)
        except DataError as error:
            raise DataError(f"{file}: {error}; replace it by the original or leave the patient out") from None


def decode(raw: bytes, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Decode a NIfTI-1 or NIfTI-2 file, gzipped or not, without a detour over float64.

    Args:
        raw: the file's bytes; a gzip's check sum is verified.
        file: named in messages.

    Returns:
        ``(slices, height, width)``: the file's third, second and first axis, in the file's own type unless it carries a scale; and the
        ``(4, 4)`` affine from indices of the file's axes to millimetres.

    Raises:
        DataError: the bytes are damaged, cut short, or no three-dimensional NIfTI.
    """
    stream = _Stream(raw, file)
    head = stream.take(HEADER)
    header = _parse_header(head, stream, file)
    shape = _shape(header)
    voxels = int(np.prod(shape, dtype=np.float64))
    if len(shape) != 3 or not 0 < voxels <= LARGEST:
        raise DataError(f"{file}: its shape is {shape}; a volume has three axes and at most {LARGEST} voxels")
    kind, offset = _voxel_type(header, file), int(np.nan_to_num(header["vox_offset"], nan=-1)) or HEADER
    if kind.kind not in "iuf" or not stream.position <= offset <= stream.position + 2**24:
        raise DataError(f"{file}: voxels of type {kind} at byte {offset}; convert the file to a plain NIfTI of numbers")
    stream.take(offset - stream.position)
    data = np.frombuffer(stream.take(voxels * kind.itemsize), kind).reshape(shape[::-1])
    stream.finish()
    return _scaled(data, header, file), _affine(header, file)


def _shape(header: Any) -> tuple[int, ...]:
    """Without the axes of one sample behind the third; empty where the header claims more axes than the format has."""
    # NIfTI-2 has room for a number of axes with which nibabel cannot count.
    shape = tuple(int(extent) for extent in header.get_data_shape()) if 0 < header["dim"][0] < len(header["dim"]) else ()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _parse_header(head: bytes, stream: _Stream, file: Path) -> Any:
    size = {b"\x5c\x01\x00\x00": 348, b"\x00\x00\x01\x5c": 348, b"\x1c\x02\x00\x00": 540, b"\x00\x00\x02\x1c": 540}.get(head[:4])
    if size is None:
        raise DataError(f"{file}: is no NIfTI file; replace it by the original")
    kind: Any = nibabel.Nifti1Header if size == 348 else nibabel.Nifti2Header
    block = head[:348] if size == 348 else head + stream.take(540 - HEADER)
    try:
        return kind.from_fileobj(io.BytesIO(block), check=False)
    except (nibabel.spatialimages.HeaderDataError, ValueError, KeyError) as error:
        raise DataError(f"{file}: its NIfTI header cannot be understood ({error}); replace it by the original") from None


class _Stream:
    """The bytes of a file from front to back, decompressed when they are gzipped, and never more of them than asked for."""

    def __init__(self, raw: bytes, file: Path) -> None:
        self._file, self._rest, self.position = file, raw, 0
        gzipped = raw[:2] == b"\x1f\x8b"
        self._decompressor = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP) if gzipped else None

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        block = self._next(count)
        if len(block) < count:
            raise DataError(
                f"{self._file}: ends after {self.position + len(block)} bytes, {count - len(block)} too early; replace it by the original"
            )
        self.position += count
        return block

    def _next(self, count: int) -> bytes:
        if self._decompressor is None or not count:
            block, self._rest = self._rest[:count], self._rest[count:]
            return block
        try:
            block, self._rest = self._decompressor.decompress(self._rest, count), b""
        except (igzip_lib.IsalError, EOFError) as error:  # type: ignore[misc]  # isal's own annotations call the class an instance
            raise DataError(f"{self._file}: damaged gzip data ({error}); replace it by the original") from None
        return block

    def finish(self) -> None:
        """Read what follows the voxels, so that the check sum is compared; a few bytes of gzip may stand for any number of them."""
        behind = 0
        while self._decompressor is not None and not self._decompressor.eof:
            if not (block := self._next(2**16)):
                raise DataError(f"{self._file}: its gzip data are cut short; replace it by the original")
            behind += len(block)
            if behind > MOST_BEHIND:
                raise DataError(f"{self._file}: more than {MOST_BEHIND} bytes follow its voxels; replace it by the original")


def _voxel_type(header: Any, file: Path) -> np.dtype[Any]:
    code = int(header["datatype"])
    try:
        kind: np.dtype[Any] = header.get_data_dtype()
    except KeyError:
        raise DataError(f"{file}: voxels of the unknown type {code}; replace it by the original") from None
    return kind


def _scaled(data: np.ndarray, header: Any, file: Path) -> np.ndarray:
    values: np.ndarray = data.astype(data.dtype.newbyteorder("="), copy=False)
    try:
        slope, intercept = header.get_slope_inter()
    except nibabel.spatialimages.HeaderDataError as error:
        raise DataError(f"{file}: its scale cannot be understood ({error}); replace it by the original") from None
    if slope is not None and (slope != 1 or intercept):
        with np.errstate(over="ignore", invalid="ignore"):  # what does not fit becomes infinite, and that is refused
            values = values * float(slope) + float(intercept or 0)
    return values


def _affine(header: Any, file: Path) -> np.ndarray:
    with np.errstate(all="ignore"):
        try:
            affine = np.asarray(header.get_best_affine(), dtype=np.float64)
        except (nibabel.spatialimages.HeaderDataError, ValueError) as error:
            raise DataError(f"{file}: its place in space cannot be understood ({error}); replace it by the original") from None
    if not (np.abs(affine) < FARTHEST).all():
        raise DataError(f"{file}: its affine leads out of any scanner (values that are not finite, or huge); replace it by the original")
    return affine


def _labels(mask: np.ndarray, file: Path) -> np.ndarray:
    if mask.dtype.kind != "f":
        return mask
    if not np.isfinite(mask).all() or not np.array_equal(np.rint(mask), mask):
        raise DataError(f"{file}: the segmentation holds fractions or no numbers; resample it with nearest neighbours")
    low, high = float(mask.min()), float(mask.max())
    if not -(2**15) <= low <= high < 2**15:
        raise DataError(f"{file}: the segmentation holds values from {low:g} to {high:g}; only 0 1 2 4 and 0 1 2 3 are known")
    whole: np.ndarray = mask.astype(np.int16)
    return whole


def _check_shapes(unit: Unit, shapes: dict[str, tuple[int, ...]]) -> None:
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise DataError(f"{unit.patient}: modalities disagree in shape ({found}); register them to one grid")


def _check_places(unit: Unit, affines: dict[str, np.ndarray], shape: tuple[int, ...]) -> None:
    """Compare where the files put the corners of their volumes."""
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*(extent - 1 for extent in shape), 1]
    [(first, reference), *others] = affines.items()
    for name, affine in others:
        apart = float(np.abs(corners @ (affine - reference).T).max())
        if apart > FAR:
            raise DataError(f"{unit.patient}: {name} lies {apart:.1f} mm away from {first} by its affine; register them to one grid")
