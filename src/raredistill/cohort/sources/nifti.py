"""Decoding of NIfTI files from their bytes, without conversion to float64."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from isal import igzip_lib

from raredistill.errors import DataError

LARGEST = 2**29
"""Voxels of the largest volume that is read: a header that promises more is damaged or hostile."""
MOST_LANES = 16
"""Volumes of the longest fourth axis that is read."""
HEADER = 352
MOST_BEHIND = 2**24
"""Bytes that may follow the voxels."""
FARTHEST = 1e9
"""Largest plausible offset of an affine, in millimetres."""
ROUNDED = 0.02
"""Farthest from a whole number that a label lies which was saved as a scaled byte (half a step of 4 / 255 and some)."""


def decode(raw: bytes, file: Path, *, lanes: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """Decode a NIfTI-1 or NIfTI-2 file, gzipped or not, without a detour over float64.

    Args:
        raw: the file's bytes; a gzip's check sum is verified.
        file: named in messages.
        lanes: volumes that the file must hold along a fourth axis; 0 for a single volume.

    Returns:
        ``(slices, height, width)``, with lanes in front where they are asked for: the file's third, second and first axis, in the file's
        own type unless it carries a scale; and the ``(4, 4)`` affine from indices of the file's axes to millimetres, or None where the
        file says nothing of its place (both codes are 0).

    Raises:
        DataError: the bytes are damaged, cut short, or a NIfTI of another shape.
    """
    stream = _Stream(raw, file)
    head = stream.take(HEADER)
    header = _parse_header(head, stream, file)
    shape = _shape(header)
    voxels = int(np.prod(shape, dtype=np.float64))
    _check_shape(shape, voxels, lanes, file)
    kind, offset = _voxel_type(header, file), int(np.nan_to_num(header["vox_offset"], nan=-1)) or HEADER
    if kind.kind not in "iuf" or not stream.position <= offset <= stream.position + 2**24:
        raise DataError(f"{file}: voxels of type {kind} at byte {offset}; convert the file to a plain NIfTI of numbers")
    stream.take(offset - stream.position)
    data = np.frombuffer(stream.take(voxels * kind.itemsize), kind).reshape(shape[::-1])
    stream.finish()
    return _scaled(data, header, file), _affine(header, file)


def extent(file: Path) -> tuple[tuple[int, ...], np.ndarray | None] | None:
    """Shape and affine as the header alone gives them; None where it cannot be read, which decoding tells in full."""
    try:
        with file.open("rb") as handle:
            stream = _Stream(handle.read(2**14), file)
        header = _parse_header(stream.take(HEADER), stream, file)
        return _shape(header), _affine(header, file)
    except (OSError, DataError):
        return None


def _check_shape(shape: tuple[int, ...], voxels: int, lanes: int, file: Path) -> None:
    if lanes and (len(shape) != 4 or shape[3] != lanes):
        raise DataError(
            f"{file}: its shape is {shape}; needed are {lanes} volumes along a fourth axis, as channel_order or dataset.json says"
        )
    if not lanes and len(shape) == 4 and 0 < shape[3] <= MOST_LANES:
        raise DataError(
            f"{file}: its shape is {shape}, which is {shape[3]} volumes; a volume has three axes: keep one volume in the file, "
            "or name what they are with channel_order"
        )
    if not 3 <= len(shape) <= 4 or not 0 < voxels <= LARGEST * max(lanes, 1) or (len(shape) == 4 and not lanes):
        raise DataError(f"{file}: its shape is {shape}; a volume has three axes and at most {LARGEST} voxels")


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


def _affine(header: Any, file: Path) -> np.ndarray | None:
    if int(header["qform_code"]) <= 0 and int(header["sform_code"]) <= 0:
        return None
    with np.errstate(all="ignore"):
        try:
            affine = np.asarray(header.get_best_affine(), dtype=np.float64)
        except (nibabel.spatialimages.HeaderDataError, ValueError) as error:
            raise DataError(f"{file}: its place in space cannot be understood ({error}); replace it by the original") from None
    if not (np.abs(affine) < FARTHEST).all():
        raise DataError(f"{file}: its affine leads out of any scanner (values that are not finite, or huge); replace it by the original")
    return affine


def whole_labels(mask: np.ndarray, file: Path) -> tuple[np.ndarray, bool]:
    """The segmentation as integers, and whether it was saved as scaled or rounded numbers (1.0039 in place of 1).

    Raises:
        DataError: it holds fractions, no numbers, or numbers that no label has.
    """
    if mask.dtype.kind != "f":
        return mask, False
    if not np.isfinite(mask).all():
        raise DataError(f"{file}: the segmentation holds fractions or no numbers; resample it with nearest neighbours")
    low, high = float(mask.min()), float(mask.max())
    if not -(2**15) <= low <= high < 2**15:
        raise DataError(f"{file}: the segmentation holds values from {low:g} to {high:g}; labels are small whole numbers")
    whole: np.ndarray = np.rint(mask).astype(np.int16)
    apart = float(np.abs(mask - whole).max())
    if apart > ROUNDED:
        odd = float(mask[np.abs(mask - whole) > ROUNDED][0])
        raise DataError(f"{file}: the segmentation holds fractions such as {odd:g}; resample it with nearest neighbours")
    return whole, apart > 0
