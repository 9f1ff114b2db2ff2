"""Arrays in an ``.npz`` file, in the layouts of MedMNIST and of Keras."""

from __future__ import annotations

import functools
import lzma
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from raredistill.cohort.duplicates import Treatment, digest_of
from raredistill.cohort.sources import Problem, Skipped, Slices, Unit
from raredistill.cohort.sources.images import OWN_UNIT, Decoder, Mode, checked_mode, checked_window
from raredistill.errors import DataError
from raredistill.files import sha256

_PARTS = (("train", "train"), ("val", "validation"), ("test", "test"))
_LAYOUTS = ("{}_images", "{}_labels"), ("x_{}", "y_{}")
# What zipfile and numpy are known to raise on damaged files; a password and an unknown compression are RuntimeErrors.
_UNREADABLE = (
    OSError, ValueError, EOFError, KeyError, TypeError, OverflowError, SyntaxError, SystemError, RuntimeError, MemoryError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError,
)  # fmt: skip
_LARGEST_SAMPLE = 2**26
_LARGEST_LABELS = 2**28
_LARGEST_ARRAY = 2**32
_MOST_CLASSES = 2**16
_CHUNK_SAMPLES = 4096
_CHUNK_BYTES = 128 * 2**20


@dataclass(frozen=True)
class _Part:
    """One part of the file: its split, the member with its images, their shape, type and order, and their class names."""

    split: str
    images: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    labels: tuple[str, ...]

    def bytes_each(self) -> int:
        """Size of one sample."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def chunk(self) -> int:
        """Samples that a worker reads at a time, so that memory stays small."""
        return max(1, min(_CHUNK_SAMPLES, _CHUNK_BYTES // max(self.bytes_each(), 1)))


class Arrays:
    """Samples in an ``.npz``: ``train_images, train_labels, val_*, test_*`` or ``x_train, y_train, x_test, y_test`` (and ``x_val``).

    Images are ``(N, H, W)``, ``(N, H, W, 1)`` or ``(N, H, W, 3)``. Each sample is its own patient; a unit is a chunk of many samples, whose
    rows carry their own ``patient`` and ``patient_label``. The parts of the file become the given split.

    Args:
        path: the ``.npz``; nothing in it may be pickled.
        classes: names by class index (for labels that are names: their order); by default the file's ``classes``, else the indices.
        mode: ``grey``, ``rgb``, or ``auto`` (rgb when the images have three channels).
        window: values of 16-bit and float images that become 0 and 255; by default 0 and 65535 for 16 bit.

    Raises:
        DataError: the file is missing, damaged, or in another layout, or an option does not fit.
    """

    kind = "arrays"
    counted = "blocks of images"
    duplicates: Treatment = "refuse"
    channels: tuple[str, ...]

    def __init__(
        self, path: Path, *, classes: Sequence[str] | None = None, mode: Mode = "auto", window: Sequence[float] | None = None
    ) -> None:
        checked_mode(mode)
        self._path = Path(path)
        with _opened(self._path) as archive:
            members = set(archive.files)
            raw = [(split, images, _labels(archive, labels, self._path)) for split, images, labels in _layout(members, self._path)]
            names = classes if classes is not None else _names(archive, members, self._path)
        self._classes = _class_names([labels for _, _, labels in raw], names, self._path)
        self._parts = {split: self._part(split, images, labels) for split, images, labels in raw}
        self._images = {split: _Images(self._path, part) for split, part in self._parts.items()}
        colour = any(len(part.shape) == 4 and part.shape[3] == 3 for part in self._parts.values())
        self._decoder = Decoder(("rgb" if colour else "grey") if mode == "auto" else mode, checked_window(window))
        self.channels = self._decoder.channels

    def _part(self, split: str, images: str, labels: np.ndarray) -> _Part:
        with _member(self._path, images) as (_, shape, dtype, fortran):
            if len(shape) != 3 and not (len(shape) == 4 and shape[3] in (1, 3)):
                raise DataError(f"{self._path}: {images} has the shape {shape}; it must be (N, H, W), (N, H, W, 1) or (N, H, W, 3)")
            if min(shape) < 1 or np.prod(shape[1:], dtype=np.float64) > _LARGEST_SAMPLE or dtype.kind not in "uifb":
                raise DataError(
                    f"{self._path}: {images} is {dtype} of shape {shape}; needed are numbers, at most {_LARGEST_SAMPLE} an image"
                )
            if shape[0] != len(labels):
                raise DataError(f"{self._path}: {images} has {shape[0]} samples but {len(labels)} labels; export it again")
        named = labels if labels.dtype.kind == "U" else np.array(self._classes)[labels]
        return _Part(split, images, shape, dtype, fortran, tuple(map(str, named)))

    def units(self) -> list[Unit]:
        """Chunks of samples, part by part; a unit's patient names the chunk, each row its own patient."""
        starts = [(part, start) for part in self._parts.values() for start in range(0, len(part.labels), part.chunk())]
        return [Unit(f"{part.split}/{start:07d}", "", (self._path,)) for part, start in starts]

    def classes(self) -> tuple[str, ...]:
        """Class names by index."""
        return self._classes

    def problems(self) -> list[Problem]:
        """Classes without any sample; what else can be wrong is refused at once."""
        held = {label for part in self._parts.values() for label in part.labels}
        missing = [name for name in self._classes if name not in held]
        cure = "name only classes that have samples"
        return [Problem("warning", "", str(self._path), f"no sample has the class {name}", cure) for name in missing]

    def read(self, unit: Unit, size: tuple[int, int]) -> Slices:
        """Decode one chunk at ``(height, width)`` by antialiased bilinear interpolation.

        Raises:
            DataError: the file is damaged, or its values need a window.
        """
        split, start = unit.patient.rsplit("/", 1)
        part, first = self._parts[split], int(start)
        last = min(first + part.chunk(), len(part.labels))
        images = self._images[split].rows(first, last)
        images = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
        pixels = np.empty((len(self.channels), len(images), *size), dtype=np.uint8)
        for index, image in enumerate(images):
            pixels[:, index] = self._decoder.convert(image, size, f"{self._path}: {part.images}")
        rows = [self._row(part, index) for index in range(first, last)]
        return Slices(rows, dict(zip(self.channels, pixels, strict=True)), {"images": len(rows)}, hashes={self._path.name: self._hash})

    @functools.cached_property
    def _hash(self) -> str:
        return sha256(self._path)  # once a worker, not once a block of a file that may be large

    @staticmethod
    def _row(part: _Part, index: int) -> dict[str, Any]:
        # A unit holds many samples here, so each row brings its own patient; prepare takes row.get("patient", unit.patient).
        name, label = f"{part.split}/{index:07d}", part.labels[index]
        source = f"{part.images}[{index}]"
        return {"sample": name, "label": label, "slice": -1, "source": source, "split": part.split, "patient": name, "patient_label": label}

    def settings(self) -> dict[str, Any]:
        """Classes, that no patients are known, and how pixels are made."""
        window = list(self._decoder.window) if self._decoder.window else None
        return {"kind": self.kind, "classes": list(self._classes), "patient": OWN_UNIT, "channels": list(self.channels), "window": window}


@contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    with ExitStack() as open_files:
        try:
            handle = open_files.enter_context(path.open("rb"))  # numpy would leave it open when the archive is damaged
            archive = np.load(handle, allow_pickle=False)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; name an .npz file") from None
        except _UNREADABLE as error:
            raise DataError(f"{path}: cannot be read as .npz ({error}); fetch or export it again") from None
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"{path}: is a single array; save images and labels together with numpy.savez")
        yield archive


def _layout(members: set[str], path: Path) -> list[tuple[str, str, str]]:
    """The parts that are there: split, name of the images, name of the labels."""
    for images, labels in _LAYOUTS:
        parts = [(split, images.format(key), labels.format(key)) for key, split in _PARTS if images.format(key) in members]
        if parts:
            missing = [label for _, _, label in parts if label not in members]
            if missing:
                raise DataError(f"{path}: holds images but not {', '.join(missing)}; add the labels")
            return parts
    raise DataError(f"{path}: holds {', '.join(sorted(members))}; it needs train_images and train_labels, or x_train and y_train")


def _labels(archive: np.lib.npyio.NpzFile, name: str, path: Path) -> np.ndarray:
    labels = _small(archive, name, path)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        raise DataError(f"{path}: {name} is {labels.dtype} of shape {labels.shape}; it must be one class index or name a sample")
    return labels if labels.dtype.kind == "U" else labels.astype(np.int64)


def _small(archive: np.lib.npyio.NpzFile, name: str, path: Path) -> np.ndarray:
    with _member(path, name) as (_, shape, dtype, _):
        if np.prod(shape, dtype=np.float64) * dtype.itemsize > _LARGEST_LABELS:
            raise DataError(f"{path}: {name} of shape {shape} claims more than {_LARGEST_LABELS} bytes; export it again")
    try:
        values = np.asarray(archive[name])
        values.tolist()  # text may hold code points that do not exist, which is told only here
        return values
    except _UNREADABLE as error:
        raise DataError(f"{path}: {name} cannot be read ({error}); save it as numbers or plain strings") from None


def _names(archive: np.lib.npyio.NpzFile, members: set[str], path: Path) -> Sequence[str] | None:
    if "classes" not in members:
        return None
    names = _small(archive, "classes", path)
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names.ravel().tolist()]


def _class_names(labels: list[np.ndarray], names: Sequence[str] | None, path: Path) -> tuple[str, ...]:
    found = np.unique(np.concatenate(labels))
    if found.dtype.kind == "U":
        unknown = sorted(set(found.tolist()) - set(names)) if names is not None else []
        if unknown:
            raise DataError(f"{path}: labels {', '.join(unknown)} are not among the classes; name every class")
        return tuple(names if names is not None else found.tolist())
    if not len(found) or found[-1] >= _MOST_CLASSES:
        raise DataError(f"{path}: {'no sample has a label' if not len(found) else f'a label is {found[-1]}'}; labels count classes from 0")
    chosen = tuple(names) if names is not None else tuple(str(index) for index in range(int(found[-1]) + 1))
    if found[0] < 0 or found[-1] >= len(chosen):
        raise DataError(f"{path}: labels run from {found[0]} to {found[-1]}, but there are {len(chosen)} class names; name every class")
    if len(set(chosen)) < len(chosen):
        raise DataError(f"{path}: two classes have the same name in {list(chosen)}; name each class once")
    return chosen


@contextmanager
def _told(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        raise DataError(f"{path}: {name} cannot be read ({error}); fetch or export the file again") from None


@contextmanager
def _member(path: Path, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any], bool]]:
    """Open one array of the file as a stream behind its header: stream, shape, type, Fortran order."""
    with _told(path, name), _stream(path, name) as stream:
        yield stream, *_header(stream, path, name)


def _stream(path: Path, name: str) -> IO[bytes]:
    with zipfile.ZipFile(path) as archive:
        return archive.open(f"{name}.npy")  # has the file open for as long as it is open itself


def _header(stream: IO[bytes], path: Path, name: str) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if dtype.hasobject:
        raise DataError(f"{path}: {name} is pickled, which is not safe to read; save it as numbers")
    return shape, dtype, fortran


class _Images:
    """The images of one part: decompressed once for all blocks that are asked for in order, with no more than one in memory."""

    def __init__(self, path: Path, part: _Part) -> None:
        self._path, self._part = path, part
        self._open: IO[bytes] | None = None
        self._next = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}  # an open file stays in its process

    def rows(self, first: int, last: int) -> np.ndarray:
        """Samples ``first`` to ``last``."""
        part = self._part
        with _told(self._path, part.images):
            if part.fortran:
                return self._whole()[first:last]
            # Not kept where reading fails: nothing would say how far it came.
            stream, self._open = self._at(first), None
            rows = np.frombuffer(stream.read((last - first) * part.bytes_each()), part.dtype).reshape(last - first, *part.shape[1:])
            if last < part.shape[0]:
                self._open, self._next = stream, last
            return rows

    def _at(self, first: int) -> IO[bytes]:
        stream, start = self._open, self._next
        if stream is None or first < start:
            stream, start = _stream(self._path, self._part.images), 0
            _header(stream, self._path, self._part.images)
        stream.seek((first - start) * self._part.bytes_each(), 1)
        return stream

    def _whole(self) -> np.ndarray:
        part = self._part
        if part.shape[0] * part.bytes_each() > _LARGEST_ARRAY:
            raise DataError(f"{self._path}: {part.images} is too large to be read in Fortran order; save it in C order")
        with _member(self._path, part.images) as (stream, *_):
            return np.frombuffer(stream.read(part.shape[0] * part.bytes_each()), part.dtype).reshape(part.shape, order="F")
