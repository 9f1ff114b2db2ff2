"""Pixels of ordinary images, whatever their mode and depth, as grey or RGB bytes of one size; and sources made of such files."""

from __future__ import annotations

import struct
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from raredistill.cohort.duplicates import Treatment, digest_of
from raredistill.cohort.identity import person_of, spelling_key
from raredistill.cohort.sources import Problem, Skipped, Slices, Unit
from raredistill.cohort.sources.walk import Skips
from raredistill.errors import DataError
from raredistill.files import inside

Mode = Literal["auto", "grey", "rgb"]

SUFFIXES = frozenset(
    [
        *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".bmp", ".dib", ".webp", ".gif", ".pgm", ".ppm", ".pbm", ".pnm"),
        *(".tif", ".tiff", ".jp2", ".j2k", ".jpf", ".jpx", ".j2c", ".avif"),
    ]
)
CHANNELS: dict[str, tuple[str, ...]] = {"grey": ("grey",), "rgb": ("red", "green", "blue")}
UNLABELLED = frozenset({"unlabelled", "unlabeled"})
"""Folders, labels and parts of this name hold samples without a label: a part of the cohort of its own."""
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
OWN_UNIT = "each image is its own unit: no patient is known, so images of one patient may stand on both sides of a split"
NONE = "none"
"""Value of ``patient=`` if each image is its own unit."""
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "DIB", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF")
"""Formats whose readers run no other program and no code of the file. Of an MPO, a JPEG with more pictures behind, the first is read."""
_READ_AS = "PNG, JPEG, TIFF, BMP, WEBP, GIF, PNM, JPEG 2000 or AVIF"
_ONE_PICTURE = ("TIFF", "GIF", "WEBP", "PNG", "AVIF")
_GREY_MODES = ("1", "L", "LA", "I", "F")
_PROBED = 256
_DEPTHS = (8, 10, 12, 14, 16)
_WHITE_IS_ZERO, _PHOTOMETRIC = 0, 262
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, LookupError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class Decoder:
    """Decodes images to ``channels`` bytes of one size.

    8-bit values stay as they are. 16-bit grey is scaled from ``window``, or from its full range 0..65535, to 0..255; 32-bit and
    float values need a ``window``. (Pillow itself hands over the high bytes of 16-bit RGB.) Palettes and CMYK become RGB,
    transparency is dropped, colour becomes grey by the ITU-R 601 luma, grey becomes RGB by repetition, and where a TIFF's zero is
    white it is inverted.

    Attributes:
        mode: of the result.
        window: values that become 0 and 255; others are cut off.
        strict: refuse values above the window instead of cutting them off: it was found in some of the files only.
    """

    mode: Literal["grey", "rgb"]
    window: tuple[float, float] | None = None
    strict: bool = False

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels, in the order of ``read``'s first axis."""
        return CHANNELS[self.mode]

    def read(self, file: Path, size: tuple[int, int]) -> np.ndarray:
        """Decode ``file`` to ``(C, height, width)`` uint8.

        Raises:
            DataError: the file is missing, damaged, of several pages, too large, or needs a window.
        """
        return self.read_and_digest(file, size)[0]

    def read_and_digest(self, file: Path, size: tuple[int, int]) -> tuple[np.ndarray, str]:
        """As :meth:`read`, with a digest of the pixels before they are resized: equal for equal pictures, however they are stored."""
        try:
            with _opened(file) as image:
                _refuse_pages(image, file)
                inverted = _is_inverted(image)
                return self._bytes(ImageOps.exif_transpose(image), size, str(file), inverted=inverted)
        except FileNotFoundError:
            raise DataError(f"{file}: no such file; restore it or take it out of the source") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"{file}: too many pixels to be opened safely ({error}); save it smaller") from None
        except _UNREADABLE as error:
            raise DataError(f"{file}: cannot be read as {_READ_AS} ({error}); replace the file or take it out") from None

    def convert(self, pixels: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
        """Turn one ``(h, w)`` or ``(h, w, 3)`` array into ``(C, height, width)`` uint8; ``name`` is for messages.

        Raises:
            DataError: the values are neither 8 nor 16 bit unsigned and there is no window.
        """
        if pixels.dtype == np.uint8 and self.window is None:
            return self._bytes(Image.fromarray(pixels), size, name)[0]
        planes = pixels[..., None] if pixels.ndim == 2 else pixels
        scaled = np.stack([_resized(self._scaled(plane, name), size) for plane in np.moveaxis(planes, -1, 0)])
        return self._matched(scaled)

    def _bytes(self, image: Image.Image, size: tuple[int, int], name: str, *, inverted: bool = False) -> tuple[np.ndarray, str]:
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image)
            values = np.iinfo(values.dtype).max - values if inverted and values.dtype.kind == "u" else values
            return self._matched(_resized(self._scaled(values, name), size)[None]), digest_of(values)
        target = "L" if self.mode == "grey" else "RGB"
        # A palette may carry transparency, which only RGBA can take over without a warning.
        image = image.convert("RGBA") if image.mode == "P" else image
        plain = image.convert(target)
        pixels = np.asarray(plain.resize(size[::-1], Image.Resampling.BILINEAR), dtype=np.uint8)
        return pixels[None] if self.mode == "grey" else np.ascontiguousarray(np.moveaxis(pixels, -1, 0)), digest_of(np.asarray(plain))

    def _scaled(self, values: np.ndarray, name: str) -> np.ndarray:
        window = self.window or ((0.0, 65535.0) if (values.dtype.kind, values.dtype.itemsize) == ("u", 2) else None)
        if window is None:
            raise DataError(f"{name}: {values.dtype} values have no known range; set window=[low, high]")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise DataError(f"{name}: holds values that are not finite; replace them")
        if self.strict and values.max(initial=0) > window[1]:
            what = f"values up to {values.max()}, where the source's other files stay at or under {window[1]:g}"
            raise DataError(f"{name}: {what}; set window=[low, high] for all, such as window=[0, {values.max()}]")
        scaled = (values.astype(np.float32) - window[0]) * (255.0 / (window[1] - window[0]))
        return np.asarray(np.clip(scaled, 0.0, 255.0))

    def _matched(self, planes: np.ndarray) -> np.ndarray:
        """Bring ``(1 or 3, h, w)`` to the number of channels."""
        if len(planes) == len(self.channels):
            return planes
        if self.mode == "rgb":
            return np.repeat(planes, 3, axis=0)
        luma = np.tensordot(np.array([0.299, 0.587, 0.114]), planes, axes=1)
        return np.asarray(np.rint(luma)[None], dtype=np.uint8)


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """Open an image; what Pillow warns of is an error where it concerns the pixels: their number, and the directory of a TIFF."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=_FORMATS) as image:
            yield image
            if told and image.format == "TIFF":
                raise ValueError(str(told[0].message))


def _is_inverted(image: Image.Image) -> bool:
    """Whether a deep TIFF stores white as 0; Pillow turns 8 bits round by itself, and no others."""
    tags = getattr(image, "tag_v2", None)
    return tags is not None and image.mode.startswith("I") and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def _resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(np.rint(np.asarray(image)), dtype=np.uint8)


def _refuse_pages(image: Image.Image, file: Path) -> None:
    pages = getattr(image, "n_frames", 1) if image.format in _ONE_PICTURE else 1
    if pages > 1:
        what = "pages" if image.format == "TIFF" else "frames"
        raise DataError(f"{file}: holds {pages} {what}; which one is meant cannot be known: save one image a file")


def smallest_range(largest: float) -> tuple[float, float]:
    """The range of the smallest usual depth (8, 10, 12, 14, 16 bits) that holds whole numbers up to ``largest``.

    >>> smallest_range(4000)
    (0.0, 4095.0)
    """
    return 0.0, next((2.0**depth - 1 for depth in _DEPTHS if largest < 2**depth), float(largest))


def checked_window(window: Sequence[float] | None) -> tuple[float, float] | None:
    """Return ``window`` as a pair.

    Raises:
        DataError: it is not two rising numbers.
    """
    if window is None:
        return None
    if len(window) != 2 or not float(window[0]) < float(window[1]):
        raise DataError(f"window={list(window)} is not a range; give two rising numbers, such as window=[0, 4095]")
    return float(window[0]), float(window[1])


def checked_mode(mode: str) -> None:
    """Refuse a mode that does not exist.

    Raises:
        DataError: ``mode`` is none of auto, grey and rgb.
    """
    if mode not in ("auto", *CHANNELS):
        raise DataError(f"mode={mode!r} is unknown; choose auto, grey or rgb")


@dataclass(frozen=True)
class Header:
    """The header of an image file: Pillow's mode, possible transparency, or an error; and the time of reading."""

    mode: str = ""
    transparent: bool = False
    what: str = ""
    stamp: tuple[int, int] = (-1, -1)

    @property
    def deep(self) -> bool:
        """More than 8 bits a value, whole numbers."""
        return self.mode.startswith("I;16")


def read_header(file: Path) -> Header:
    """Read the head of a file."""
    try:
        with _opened(file) as image:
            transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
            return Header(image.mode, transparent, stamp=_stamp(file))
    except FileNotFoundError:
        return Header(what="no such file")
    except (*_UNREADABLE, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return Header(what=f"cannot be opened as {_READ_AS} ({error})", stamp=_stamp(file))


def is_image(file: Path) -> bool:
    """Whether a file is an image that is read: by its ending, or, where the ending says nothing, by its first bytes."""
    if file.suffix.lower() in SUFFIXES:
        return True
    # What is an image under any other name, or none, is found out from its content.
    return bool(read_header(file).mode)


def _stamp(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def ordered_classes(found: Sequence[str], wanted: Sequence[str] | None, origin: Path, *, open_ended: bool = False) -> tuple[str, ...]:
    """Sort the classes that were ``found``, or take the order that was ``wanted``.

    Args:
        found: names of classes.
        wanted: what the user says they are.
        origin: for messages.
        open_ended: unlabelled samples are there, whose classes may be any of those that are wanted.

    Raises:
        DataError: the wanted order leaves a class out or names one that is not there, two classes differ in spelling only, or there is
            a single one.
    """
    _refuse_spellings(found, origin)
    if wanted is None:
        if len(found) == 1 and not open_ended:
            cure = "name the folder that holds one folder per class" if origin.is_dir() else "name the label column, or add the other class"
            raise DataError(f"{origin}: holds a single class, {found[0]!r}; {cure}")
        return tuple(sorted(found))
    differs = not set(found) <= set(wanted) if open_ended else sorted(wanted) != sorted(found)
    if differs or len(set(wanted)) < len(wanted):
        raise DataError(f"{origin}: classes={list(wanted)}, but the source holds {sorted(found)}; name each class once")
    return tuple(wanted)


def _refuse_spellings(found: Sequence[str], origin: Path) -> None:
    spelled: dict[str, str] = {}
    for name in sorted(found):
        other = spelled.setdefault(spelling_key(name), name)
        if other != name:
            raise DataError(f"{origin}: the classes {other!r} and {name!r} differ only in how they are written; write one class one way")


@dataclass(frozen=True)
class ImageSample:
    """One image file with its metadata; ``patient`` is its own ``name`` when no patient is known, ``label`` "" when none is."""

    name: str
    file: Path
    label: str
    patient: str
    split: str = ""


def shared_label(samples: Sequence[ImageSample]) -> str:
    """The label that all labelled samples of a patient share, or ""."""
    labels = {sample.label for sample in samples} - {""}
    return labels.pop() if len(labels) == 1 else ""


class ImageFiles:
    """Common base of folders and tables of images: samples in files, grouped by patient.

    Args:
        samples: all usable samples.
        root: the folder that must hold them, links followed.
        mode: grey, rgb, or auto: rgb as soon as a file holds colour.
        window: values of 16-bit, 32-bit and float images that become 0 and 255.
        patients_known: whether patients are known, or each image is its own unit.
        skips: files left out, by reason.
    """

    kind: str
    channels: tuple[str, ...]
    counted: str
    patients_known: bool
    duplicates: Treatment = "refuse"

    def __init__(
        self,
        samples: Sequence[ImageSample],
        root: Path,
        *,
        mode: Mode,
        window: Sequence[float] | None,
        patients_known: bool,
        skips: Skips,
    ) -> None:
        checked_mode(mode)
        self._root, self._skips = root, skips
        self.patients_known, self.counted = patients_known, "patients" if patients_known else "images"
        self._patients: dict[str, list[ImageSample]] = {}
        for sample in sorted(samples, key=lambda sample: (sample.patient, sample.name)):
            self._patients.setdefault(sample.patient, []).append(sample)
        self._headers = {sample.file: read_header(sample.file) for sample in samples if inside(sample.file, root)}
        self._decoder = self._chosen_decoder(mode, checked_window(window))
        self.channels = self._decoder.channels

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_headers": {}}  # workers read files, not heads

    def _chosen_decoder(self, mode: Mode, window: tuple[float, float] | None) -> Decoder:
        modes = {header.mode for header in self._headers.values()} - {""}
        found = ("rgb" if any(not one.startswith(_GREY_MODES) for one in modes) else "grey") if mode == "auto" else mode
        decoder = Decoder(found, window)
        deep = [file for file, header in self._headers.items() if header.deep]
        if window is not None or not deep:
            return decoder
        largest = max(map(_largest, deep[:: -(-len(deep) // _PROBED)]))
        return replace(decoder, window=smallest_range(largest), strict=True) if 0 <= largest < 2 ** _DEPTHS[-2] else decoder

    def units(self) -> list[Unit]:
        """Patients in alphabetical order; an image without a patient is its own."""
        return [
            Unit(name, shared_label(samples), tuple(sample.file for sample in samples), any(sample.label for sample in samples))
            for name, samples in self._patients.items()
        ]

    def skipped(self) -> list[Skipped]:
        """Files that are not taken, by reason."""
        return self._skips.listed()

    def read(self, unit: Unit, size: tuple[int, int]) -> Slices:
        """Decode one patient's images at ``(height, width)`` by antialiased bilinear interpolation.

        Raises:
            DataError: an image cannot be decoded; the message names it.
        """
        samples = self._patients[unit.patient]
        if outside := [sample.name for sample in samples if not inside(sample.file, self._root)]:
            raise DataError(f"{outside[0]}: lies outside {self._root}; copy the file into the source")
        pixels, digests = zip(*(self._decoder.read_and_digest(sample.file, size) for sample in samples), strict=True)
        planes = dict(zip(self.channels, np.stack(pixels, axis=1), strict=True))
        rows = [self._row(sample, unit) for sample in samples]
        return Slices(rows, planes, {"images": len(rows)}, digests=digests)

    @staticmethod
    def _row(sample: ImageSample, unit: Unit) -> dict[str, Any]:
        # "patient" and "patient_label" are optional keys of a row, for units of many patients; these sources always give them.
        return {
            "sample": sample.name,
            "label": sample.label,
            "slice": -1,
            "source": sample.name,
            "split": sample.split,
            "patient": sample.patient,
            "patient_label": unit.label,
        }

    def file_problems(self) -> list[Problem]:
        """Missing files, files that are not images, patients whose images differ in class or split; and notes on how values are read."""
        found = [problem for samples in self._patients.values() for problem in map(self._bad_file, samples) if problem]
        found += [problem for name, samples in self._patients.items() for problem in _mixed(name, samples)]
        found += self._range_notes() + self._split_notes()
        return found + (_visits(list(self._patients)) if self.patients_known else [])

    def _bad_file(self, sample: ImageSample) -> Problem | None:
        if not inside(sample.file, self._root):
            return Problem("error", sample.patient, str(sample.file), f"lies outside {self._root}", "copy the file into the source")
        header = self._headers.get(sample.file)
        if header is None or header.stamp != _stamp(sample.file):  # read before it was changed
            header = self._headers[sample.file] = read_header(sample.file)
        cure = "restore or replace the file, or take it out"
        return Problem("error", sample.patient, str(sample.file), header.what, cure) if header.what else None

    def _range_notes(self) -> list[Problem]:
        notes = []
        deep = sum(header.deep for header in self._headers.values())
        if self._decoder.strict and self._decoder.window:
            what = f"{deep} images of 16 bits hold values up to {self._decoder.window[1]:g} only, so 0 to that becomes black to white"
            notes.append(Problem("note", "", "", what, "set window=[low, high] for another range"))
        if clear := sum(header.transparent for header in self._headers.values()):
            notes.append(
                Problem("note", "", "", f"{clear} images can be transparent; their colours are read as if they were not", "nothing")
            )
        return notes

    def _split_notes(self) -> list[Problem]:
        parts = Counter(sample.split for samples in self._patients.values() for sample in samples if sample.label)
        if not parts[""] or len(parts) < 2:
            return []
        what = f"{parts['']} labelled images have no split part, where {parts.total() - parts['']} have one"
        return [Problem("warning", "", "", what, "splits.protocol: given does not use them; give them a part, or leave them out")]

    def decoding(self) -> dict[str, Any]:
        """How pixels are computed, for provenance."""
        return {"channels": list(self.channels), "window": list(self._decoder.window) if self._decoder.window else None}


def _largest(file: Path) -> float:
    """The largest value of a deep image, or -1 where it cannot be read."""
    try:
        with _opened(file) as image:
            return float(np.asarray(image).max(initial=0))
    except (*_UNREADABLE, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return -1.0


def _visits(patients: Sequence[str]) -> list[Problem]:
    """The warning that names of patients look like visits of fewer persons."""
    persons: dict[str, list[str]] = {}
    for name in patients:
        persons.setdefault(person_of(name), []).append(name)
    several = [names for names in persons.values() if len(names) > 1]
    if not several:
        return []
    what = f"{sum(map(len, several))} patients look like visits or scans of {len(several)} persons, such as {' and '.join(several[0][:2])}"
    cure = "give one person one name, else a split can separate the visits of one person"
    return [Problem("warning", "", "", what, cure)]


def _mixed(patient: str, samples: Sequence[ImageSample]) -> list[Problem]:
    problems = []
    labels, splits = sorted({sample.label for sample in samples} - {""}), sorted({sample.split for sample in samples if sample.label})
    if len(labels) > 1:
        cure = "nothing if it is one person; else tell patients apart by a name that includes the class"
        problems.append(Problem("warning", patient, "", f"has images of several classes: {', '.join(labels)}", cure))
    if len(splits) > 1:
        what = f"has images in several split parts: {', '.join(part or '(none)' for part in splits)}"
        problems.append(Problem("warning", patient, "", what, "the given split leaks; correct it or let raredistill split by patient"))
    return problems
