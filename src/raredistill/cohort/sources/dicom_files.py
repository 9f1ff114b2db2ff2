"""DICOM files: grouping into series, and reading a series as a volume with its position in the patient."""

from __future__ import annotations

import hashlib
import io
import logging
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raredistill.cohort.sources.brats import read_bytes
from raredistill.cohort.sources.walk import Skips
from raredistill.errors import DataError

LARGEST = 2**24
"""Pixels of the largest picture that is read."""
TAGS = [
    "SOPInstanceUID", "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "SeriesDescription", "Rows", "Columns", "NumberOfFrames",
    "SamplesPerPixel", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
]  # fmt: skip
"""All that is read of the files' headers at first. None of it but the slices' own order leaves this module."""
_FAULTS = (
    OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError, RuntimeError, OverflowError, MemoryError,
    EOFError, struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One file: a slice."""

    file: Path
    uid: str
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]


@dataclass(frozen=True)
class Series:
    """One series of one study of one patient, by the files' own identifiers; these stay in memory."""

    patient: str
    study: str
    uid: str
    description: str
    pictures: tuple[Picture, ...]


@contextmanager
def _quiet(file: Path) -> Iterator[Any]:
    """pydicom, without its warnings on values that the standard does not allow, and its exceptions as one.

    Messages contain only the file's own name: hospitals' folders may carry patients' names.
    """
    try:
        import pydicom
    except ImportError:
        raise DataError("DICOM needs the package pydicom; install it with `pip install raredistill[dicom]`") from None
    log = logging.getLogger("pydicom")
    level = log.level
    log.setLevel(logging.CRITICAL)  # its remarks on odd values hold the values
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield pydicom
    except (pydicom.errors.InvalidDicomError, pydicom.errors.BytesLengthException, *_FAULTS) as error:
        raise DataError(f"{file.name}: cannot be read as DICOM ({type(error).__name__}); replace it by the original") from None
    finally:
        log.setLevel(level)


def find_series(files: Sequence[Path], root: Path, skips: Skips) -> list[Series]:
    """Group the files of a folder into series by their headers; files that are not image planes of a patient are counted as skipped."""
    groups: dict[tuple[str, str, str], list[Picture]] = {}
    descriptions: dict[tuple[str, str, str], str] = {}
    for file in files:
        try:
            with _quiet(file) as pydicom:
                head = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=TAGS)
                key = (str(head.get("PatientID") or ""), str(head.get("StudyInstanceUID")), str(head.get("SeriesInstanceUID")))
                picture = _picture(file, head)
        except DataError as error:
            if "pydicom" in str(error):
                raise
            skips.add("not a DICOM file", file.relative_to(root).as_posix())
            continue
        if picture is None:
            skips.add("DICOM without one grey picture plane (report, segmentation, colour, several frames)", file.name)
            continue
        groups.setdefault(key, []).append(picture)
        descriptions[key] = str(head.get("SeriesDescription") or "")
    return [Series(*key, descriptions[key], tuple(pictures)) for key, pictures in sorted(groups.items())]


def _picture(file: Path, head: Any) -> Picture | None:
    if not all(head.get(tag) for tag in ("Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")):
        return None
    if int(head.get("NumberOfFrames") or 1) != 1 or int(head.get("SamplesPerPixel") or 1) != 1:
        return None
    lists = [tuple(float(value) for value in head[tag].value) for tag in TAGS[-3:]]
    whole = [len(values) for values in lists] == [3, 6, 2] and np.isfinite(np.concatenate(lists)).all()
    return Picture(file, str(head.get("SOPInstanceUID")), *lists) if whole else None


@dataclass(frozen=True)
class Volume:
    """A decoded series.

    Attributes:
        data: ``(slices, rows, columns)`` in the unit that the files' rescale gives, bright is much signal.
        affine: ``(4, 4)`` from column, row and slice to millimetres right, front and up, as NIfTI has it.
        uids: of the slices' files, in order.
        window: values that the files' own window shows as black and white; None where they have none.
        gaps: slices that are missing between others.
        hashes: slice number -> sha256 of its file.
    """

    data: np.ndarray
    affine: np.ndarray
    uids: tuple[str, ...]
    window: tuple[float, float] | None
    gaps: int
    hashes: dict[str, str]


def read_series(series: Series, name: str) -> Volume:
    """Decode a series, slices sorted by their place in the patient.

    Raises:
        DataError: a file cannot be decoded, or the slices do not form a stack.
    """
    pictures, step, gaps = _stacked(series.pictures, name)
    planes, hashes, windows = [], {}, []
    for index, picture in enumerate(pictures):
        raw = read_bytes(picture.file)
        hashes[f"{name}/{index:04d}"] = hashlib.sha256(raw).hexdigest()
        plane, window = _pixels(raw, picture.file)
        planes.append(plane)
        windows.append(window)
    if len({plane.shape for plane in planes}) > 1:
        raise DataError(f"{name}: slices differ in their size; name the series with series=CHANNEL:DESCRIPTION")
    known = [window for window in windows if window is not None]
    shown = (min(low for low, _ in known), max(high for _, high in known)) if known else None
    uids = tuple(picture.uid for picture in pictures)
    return Volume(np.stack(planes), _affine(pictures[0], step), uids, shown, gaps, hashes)


def _stacked(pictures: Sequence[Picture], name: str) -> tuple[list[Picture], np.ndarray, int]:
    """Slices in order, the step between slices in DICOM's millimetres, and the number of missing slices."""
    directions = np.array([picture.orientation for picture in pictures])
    if np.ptp(directions, axis=0).max() > 0.01:
        raise DataError(f"{name}: its slices lie in different planes (a localiser?); choose another series with series=CHANNEL:DESCRIPTION")
    normal = np.cross(directions[0, :3], directions[0, 3:])
    places = np.array([picture.position for picture in pictures]) @ normal
    order = np.argsort(places, kind="stable")
    steps = np.diff(places[order])
    if len(steps) and steps.min() < 0.01:
        raise DataError(f"{name}: several pictures lie at one place (echoes, a time series?); keep one of them in a series of its own")
    usual = float(np.median(steps)) if len(steps) else 1.0
    gaps = int(np.rint(steps / usual - 1).clip(0).sum()) if len(steps) else 0
    return [pictures[index] for index in order], normal * usual, gaps


def _affine(first: Picture, step: np.ndarray) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.orientation[:3]) * first.spacing[1]
    affine[:3, 1] = np.array(first.orientation[3:]) * first.spacing[0]
    affine[:3, 2], affine[:3, 3] = step, first.position
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # DICOM counts to the left and the back


def _pixels(raw: bytes, file: Path) -> tuple[np.ndarray, tuple[float, float] | None]:
    """One picture in the unit of its rescale, and the limits of its window."""
    with _quiet(file) as pydicom:
        found = pydicom.dcmread(io.BytesIO(raw))
        if not 0 < int(found.Rows) * int(found.Columns) <= LARGEST:
            raise ValueError("size")
        stored = found.pixel_array
        values = stored * float(found.get("RescaleSlope") or 1) + float(found.get("RescaleIntercept") or 0)
        window = None
        if found.get("WindowWidth") is not None and found.get("WindowCenter") is not None:
            centre, width = (float(np.atleast_1d(found[tag].value)[0]) for tag in ("WindowCenter", "WindowWidth"))
            window = (centre - width / 2, centre + width / 2)
        if found.PhotometricInterpretation == "MONOCHROME1":
            values, window = -values, window and (-window[1], -window[0])
    return values.astype(np.float32), window
