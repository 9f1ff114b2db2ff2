"""Pixels of ordinary images, whatever their mode and depth, as grey or RGB bytes of one size; and sources made of such files."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from raredistill.cohort.sources import Problem, Slices, Unit
from raredistill.errors import DataError
from raredistill.files import inside

Mode = Literal["auto", "grey", "rgb"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
CHANNELS: dict[str, tuple[str, ...]] = {"grey": ("grey",), "rgb": ("red", "green", "blue")}
_FORMATS = ("PNG", "JPEG", "TIFF")
_GREY_MODES = ("1", "L", "LA", "I", "F")
_PROBED = 256
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, LookupError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class Decoder:
    """Decodes images to ``channels`` bytes of one size.

    8-bit values stay as they are. 16-bit grey is scaled from ``window``, or from its full range 0..65535, to 0..255; 32-bit and
    float values need a ``window``. (Pillow itself hands over the high bytes of 16-bit RGB.) Palettes and CMYK become RGB,
    transparency is dropped, colour becomes grey by the ITU-R 601 luma, grey becomes RGB by repetition.
    """

    mode: Literal["grey", "rgb"]
    window: tuple[float, float] | None = None

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels, in the order of ``read``'s first axis."""
        return CHANNELS[self.mode]

    def read(self, file: Path, size: tuple[int, int]) -> np.ndarray:
        """Decode ``file`` to ``(C, height, width)`` uint8.

        Raises:
            DataError: the file is missing, damaged, of several pages, too large, or needs a window.
        """
        try:
            with _opened(file) as image:
                _refuse_pages(image, file)
                return self._bytes(ImageOps.exif_transpose(image), size, str(file))
        except FileNotFoundError:
            raise DataError(f"{file}: no such file; restore it or take it out of the source") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"{file}: too many pixels to be opened safely ({error}); save it smaller") from None
        except _UNREADABLE as error:
            raise DataError(f"{file}: cannot be read as PNG, JPEG or TIFF ({error}); replace the file or take it out") from None

    def convert(self, pixels: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
        """Turn one ``(h, w)`` or ``(h, w, 3)`` array into ``(C, height, width)`` uint8; ``name`` is for messages.

        Raises:
            DataError: the values are neither 8 nor 16 bit unsigned and there is no window.
        """
        if pixels.dtype == np.uint8:
            return self._bytes(Image.fromarray(pixels), size, name)
        planes = pixels[..., None] if pixels.ndim == 2 else pixels
        scaled = np.stack([_resized(self._scaled(plane, name), size) for plane in np.moveaxis(planes, -1, 0)])
        return self._matched(scaled)

    def _bytes(self, image: Image.Image, size: tuple[int, int], name: str) -> np.ndarray:
        if image.mode.startswith(("I", "F")):
            values = np.asarray(image)
            return self._matched(_resized(self._scaled(values, name), size)[None])
        target = "L" if self.mode == "grey" else "RGB"
        # A palette may carry transparency, which only RGBA can take over without a warning.
        image = image.convert("RGBA") if image.mode == "P" else image
        resized = image.convert(target).resize(size[::-1], Image.Resampling.BILINEAR)
        pixels = np.asarray(resized, dtype=np.uint8)
        return pixels[None] if self.mode == "grey" else np.ascontiguousarray(np.moveaxis(pixels, -1, 0))

    def _scaled(self, values: np.ndarray, name: str) -> np.ndarray:
        window = self.window or ((0.0, 65535.0) if (values.dtype.kind, values.dtype.itemsize) == ("u", 2) else None)
        if window is None:
            raise DataError(f"{name}: {values.dtype} values have no known range; set window=[low, high]")
        scaled = (values.astype(np.float32) - window[0]) * (255.0 / (window[1] - window[0]))
        return np.asarray(np.nan_to_num(np.clip(scaled, 0.0, 255.0)))

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


def _resized(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(np.rint(np.asarray(image)), dtype=np.uint8)


def _refuse_pages(image: Image.Image, file: Path) -> None:
    pages = getattr(image, "n_frames", 1) if image.format != "MPO" else 1  # what a camera puts behind its JPEG is no other image
    if pages > 1:
        raise DataError(f"{file}: holds {pages} pages; save one image a file")


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


def probe_mode(files: Sequence[Path]) -> Literal["grey", "rgb"]:
    """Tell from the headers of up to 256 evenly spread ``files`` whether any holds colour."""
    for file in files[:: max(1, len(files) // _PROBED)]:
        mode = _header(file)[0]
        if mode and not mode.startswith(_GREY_MODES):
            return "rgb"
    return "grey"


def _header(file: Path) -> tuple[str, str]:
    """The image mode, or "" and what is wrong with the file."""
    try:
        with _opened(file) as image:
            return image.mode, ""
    except FileNotFoundError:
        return "", "no such file"
    except (*_UNREADABLE, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return "", f"cannot be opened as PNG, JPEG or TIFF ({error})"


def ordered_classes(found: Sequence[str], wanted: Sequence[str] | None, origin: Path) -> tuple[str, ...]:
    """Sort the classes that were ``found``, or take the order that was ``wanted``.

    Raises:
        DataError: the wanted order leaves a class out or names one that is not there.
    """
    if wanted is None:
        return tuple(sorted(found))
    if sorted(wanted) != sorted(found):
        raise DataError(f"{origin}: classes={list(wanted)}, but the source holds {sorted(found)}; name each class once")
    return tuple(wanted)


@dataclass(frozen=True)
class ImageSample:
    """One image file and what is known of it; ``patient`` is its own ``name`` when no patient is known."""

    name: str
    file: Path
    label: str
    patient: str
    split: str = ""


def shared_label(samples: Sequence[ImageSample]) -> str:
    """The label that all samples of a patient share, or ""."""
    labels = {sample.label for sample in samples}
    return labels.pop() if len(labels) == 1 else ""


class ImageFiles:
    """What a folder of images and a table of images have in common: samples in files, gathered by patient.

    Args:
        samples: all usable samples.
        root: the folder that must hold them, links followed.
        mode: grey, rgb, or auto: rgb as soon as a file holds colour.
        window: values of 16-bit, 32-bit and float images that become 0 and 255.
    """

    kind: str
    channels: tuple[str, ...]
    counted: str

    def __init__(self, samples: Sequence[ImageSample], root: Path, *, mode: Mode, window: Sequence[float] | None) -> None:
        checked_mode(mode)
        self._root = root
        self.counted = "patients" if any(sample.patient != sample.name for sample in samples) else "images"
        self._patients: dict[str, list[ImageSample]] = {}
        for sample in sorted(samples, key=lambda sample: (sample.patient, sample.name)):
            self._patients.setdefault(sample.patient, []).append(sample)
        found = probe_mode([sample.file for sample in samples if inside(sample.file, root)]) if mode == "auto" else mode
        self._decoder = Decoder(found, checked_window(window))
        self.channels = self._decoder.channels

    def units(self) -> list[Unit]:
        """Patients in alphabetical order; an image without a patient is its own."""
        return [Unit(name, shared_label(samples), tuple(sample.file for sample in samples)) for name, samples in self._patients.items()]

    def read(self, unit: Unit, size: tuple[int, int]) -> Slices:
        """Decode one patient's images at ``(height, width)`` by antialiased bilinear interpolation.

        Raises:
            DataError: an image cannot be decoded; the message names it.
        """
        samples = self._patients[unit.patient]
        if outside := [sample.name for sample in samples if not inside(sample.file, self._root)]:
            raise DataError(f"{outside[0]}: lies outside {self._root}; copy the file into the source")
        pixels = np.stack([self._decoder.read(sample.file, size) for sample in samples], axis=1)
        rows = [self._row(sample, unit) for sample in samples]
        return Slices(rows, dict(zip(self.channels, pixels, strict=True)), {"images": len(rows)})

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
        """Every missing file, file that is no image, and patient whose images differ in class or in split."""
        found = [problem for samples in self._patients.values() for problem in map(self._bad_file, samples) if problem]
        return found + [problem for name, samples in self._patients.items() for problem in _mixed(name, samples)]

    def _bad_file(self, sample: ImageSample) -> Problem | None:
        if not inside(sample.file, self._root):
            return Problem("error", sample.patient, str(sample.file), f"lies outside {self._root}", "copy the file into the source")
        what = _header(sample.file)[1]
        return Problem("error", sample.patient, str(sample.file), what, "restore or replace the file, or take it out") if what else None

    def decoding(self) -> dict[str, Any]:
        """How pixels are made, for provenance."""
        return {"channels": list(self.channels), "window": list(self._decoder.window) if self._decoder.window else None}


def _mixed(patient: str, samples: Sequence[ImageSample]) -> list[Problem]:
    problems = []
    labels, splits = sorted({sample.label for sample in samples}), sorted({sample.split for sample in samples})
    if len(labels) > 1:
        cure = "nothing if it is one person; else tell patients apart by a name that includes the class"
        problems.append(Problem("warning", patient, "", f"has images of several classes: {', '.join(labels)}", cure))
    if len(splits) > 1:
        what = f"has images in several split parts: {', '.join(part or '(none)' for part in splits)}"
        problems.append(Problem("warning", patient, "", what, "the given split leaks; correct it or let raredistill split by patient"))
    return problems
