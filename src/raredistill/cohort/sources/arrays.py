"""Arrays in an ``.npz`` file, in the layouts of MedMNIST and of Keras."""

from __future__ import annotations

import functools
import lzma
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from raredistill.cohort.duplicates import Treatment, digest_of
from raredistill.cohort.identity import refuse_ambiguous_ids
from raredistill.cohort.sources import Problem, Skipped, Slices, Unit
from raredistill.cohort.sources.image_folder import no_patients
from raredistill.cohort.sources.images import OWN_UNIT, SPLITS, UNLABELLED, Decoder, Mode, checked_mode, checked_window, smallest_range
from raredistill.errors import DataError
from raredistill.files import sha256

_PARTS = (("train", "train"), ("val", "validation"), ("test", "test"))
_LAYOUTS = ("{}_images", "{}_labels"), ("x_{}", "y_{}"), ("{}_data", "{}_targets")
_WHOLE = ("images", "labels"), ("x", "y"), ("data", "targets")
"""Members of a file without parts, whatever their case."""
_NAME = re.compile(r"[\w][\w .+-]{0,60}")
# What zipfile and numpy are known to raise on damaged files; a password and an unknown compression are RuntimeErrors.
_UNREADABLE = (
    OSError, ValueError, EOFError, KeyError, TypeError, OverflowError, SyntaxError, SystemError, RuntimeError, MemoryError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError,
)  # fmt: skip
_LARGEST_SAMPLE = 2**26
_LARGEST_LABELS = 2**28
_LARGEST_ARRAY = 2**32
_MOST_CLASSES = 2**16
_BYTE = 255
_ALL = "all"
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
    patients: tuple[str, ...] = ()
    slices: tuple[int, ...] = ()
    splits: tuple[str, ...] = ()

    def bytes_each(self) -> int:
        """Size of one sample."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def chunk(self) -> int:
        """Number of samples that a worker reads at a time, to limit memory."""
        return max(1, min(_CHUNK_SAMPLES, _CHUNK_BYTES // max(self.bytes_each(), 1)))


class Arrays:
    """Samples in an ``.npz``: ``train_images, train_labels, val_*, test_*``, ``x_train, y_train, x_test, y_test``, or ``images, labels``.

    Images are ``(N, H, W)`` or ``(N, H, W, C)``: grey, red-green-blue, or any number of channels that ``channels`` names. Beside
    ``images`` and ``labels`` there may be ``patients``, ``slices`` and ``splits`` (one value per sample). Labels are class indices from any
    number on, names, or one-hot rows; a sample called ``unlabelled`` has none. Without patients each sample is its own. A unit is a chunk
    of many samples, whose rows carry their own ``patient`` and ``patient_label``. The parts of the file become the given split.

    Args:
        path: the ``.npz``; nothing in it may be pickled.
        classes: names by class index (for labels that are names: their order); by default the file's ``classes``, else the indices.
        channels: names of the images' channels; by default the file's ``channels``.
        mode: ``grey``, ``rgb``, or ``auto`` (rgb when the images have three channels without names).
        window: values that become 0 and 255 where images are not of 8 bits; by default the smallest usual range that holds them.

    Raises:
        DataError: the file is missing, damaged, or in another layout, or an option does not fit.
    """

    kind = "arrays"
    counted = "blocks of images"
    duplicates: Treatment = "refuse"
    channels: tuple[str, ...]

    def __init__(
        self,
        path: Path,
        *,
        classes: Sequence[str] | None = None,
        channels: Sequence[str] | None = None,
        mode: Mode = "auto",
        window: Sequence[float] | None = None,
    ) -> None:
        checked_mode(mode)
        self._path = Path(path)
        with _opened(self._path) as archive:
            members = set(archive.files)
            raw = [(split, images, _labels(archive, labels, self._path)) for split, images, labels in _layout(members, self._path)]
            names = classes if classes is not None else _names(archive, "classes", members, self._path)
            self._named = _channel_names(channels or _names(archive, "channels", members, self._path), self._path)
            extras = {key: _extra(archive, key, members, self._path) for key in ("patients", "slices", "splits")}
        self.patients_known = extras["patients"] is not None
        self._classes, labelled = _named_labels([labels for _, _, labels in raw], names, self._path)
        self._parts = {split: self._part(split, images, labels, extras) for (split, images, _), labels in zip(raw, labelled, strict=True)}
        self._images = {split: _Images(self._path, part) for split, part in self._parts.items()}
        self._patient_labels = self._labels_of_patients()
        colour = not self._named and any(len(part.shape) == 4 and part.shape[3] == 3 for part in self._parts.values())
        chosen: Literal["grey", "rgb"] = ("rgb" if colour else "grey") if mode == "auto" else mode
        self._guessed = window is None and any(part.dtype != np.uint8 for part in self._parts.values())
        self._decoder = Decoder(chosen, self._range() if self._guessed else checked_window(window))
        self.channels = self._named or self._decoder.channels

    def _part(self, split: str, images: str, labels: tuple[str, ...], extras: dict[str, np.ndarray | None]) -> _Part:
        with _member(self._path, images) as (_, shape, dtype, fortran):
            self._check_shape(images, shape)
            if min(shape) < 1 or np.prod(shape[1:], dtype=np.float64) > _LARGEST_SAMPLE or dtype.kind not in "uifb":
                raise DataError(
                    f"{self._path}: {images} is {dtype} of shape {shape}; needed are numbers, at most {_LARGEST_SAMPLE} an image"
                )
            if shape[0] != len(labels):
                raise DataError(f"{self._path}: {images} has {shape[0]} samples but {len(labels)} labels; export it again")
        for key, values in extras.items():
            if values is not None and len(values) != len(labels):
                raise DataError(f"{self._path}: {key} has {len(values)} entries for {len(labels)} samples of {images}; export it again")
        patients = () if extras["patients"] is None else tuple(str(value).strip() for value in extras["patients"].tolist())
        if patients:
            refuse_ambiguous_ids(patients, str(self._path))
        slices = () if extras["slices"] is None else tuple(_whole(extras["slices"], "slices", self._path))
        return _Part(split, images, shape, dtype, fortran, labels, patients, slices, _splits(extras["splits"], self._path))

    def _check_shape(self, images: str, shape: tuple[int, ...]) -> None:
        wanted = (len(self._named),) if self._named else (1, 3)
        if (len(shape) == 3 and len(self._named) <= 1) or (len(shape) == 4 and shape[3] in wanted):
            return
        first = len(shape) == 4 and shape[1] in wanted
        cure = (
            "save it with the channels last: numpy.moveaxis(images, 1, -1)" if first else "name the channels (channels=a,b,c), if they are"
        )
        raise DataError(f"{self._path}: {images} has the shape {shape}; it must be (N, H, W), (N, H, W, 1) or (N, H, W, 3); {cure}")

    def _range(self) -> tuple[float, float]:
        """The range that becomes black to white: the smallest usual one that holds every value of the file."""
        low, high, whole = np.inf, -np.inf, True
        for split, part in self._parts.items():
            whole = whole and part.dtype.kind != "f"
            for start in range(0, len(part.labels), part.chunk()):
                values = self._images[split].rows(start, min(start + part.chunk(), len(part.labels)))
                if values.dtype.kind == "f" and not np.isfinite(values).all():
                    raise DataError(f"{self._path}: {part.images} holds values that are not finite; replace them")
                low, high = min(low, float(values.min())), max(high, float(values.max()))
        if all(part.dtype == bool for part in self._parts.values()) or (not whole and low >= 0 and high <= 1):
            return 0.0, 1.0
        if low >= 0 and (whole or high <= _BYTE):
            return smallest_range(high) if whole else (0.0, float(_BYTE))
        return low, max(high, low + 1)

    def _labels_of_patients(self) -> dict[str, str]:
        found: dict[str, set[str]] = {}
        for part in self._parts.values():
            for patient, label in zip(part.patients, part.labels, strict=bool(part.patients)):
                found.setdefault(patient, set()).update({label} - {""})
        return {patient: next(iter(labels)) if len(labels) == 1 else "" for patient, labels in found.items()}

    def units(self) -> list[Unit]:
        """Chunks of samples, part by part; a unit's patient names the chunk, each row its own patient."""
        starts = [(part, start) for part in self._parts.values() for start in range(0, len(part.labels), part.chunk())]
        return [Unit(f"{part.split or _ALL}/{start:07d}", "", (self._path,)) for part, start in starts]

    def classes(self) -> tuple[str, ...]:
        """Class names by index."""
        return self._classes

    def skipped(self) -> list[Skipped]:
        """Nothing: every sample of the file is taken."""
        return []

    def problems(self) -> list[Problem]:
        """Classes without any sample; what else can be wrong is refused at once."""
        held = {label for part in self._parts.values() for label in part.labels}
        missing = [name for name in self._classes if name not in held]
        cure = "name only classes that have samples"
        found = [Problem("warning", "", str(self._path), f"no sample has the class {name}", cure) for name in missing]
        if not self.patients_known:
            found.append(no_patients("an array patients beside images and labels"))
        if self._guessed and self._decoder.window:
            low, high = self._decoder.window
            what = f"values are read from {low:g} to {high:g}, the smallest usual range that holds them all"
            found.append(Problem("note", "", str(self._path), what, "set window=[low, high] for another range"))
        return found + self._mixed()

    def _mixed(self) -> list[Problem]:
        mixed = sorted(patient for patient, label in self._patient_labels.items() if not label)
        several = [
            Problem("warning", patient, "", "has images of several classes, or no label", "nothing if that is so") for patient in mixed
        ]
        parts: dict[str, set[str]] = {}
        for part in self._parts.values():
            for patient, split in zip(part.patients, part.splits, strict=False):
                parts.setdefault(patient, set()).add(split)
        leaks = sorted(patient for patient, found in parts.items() if len(found) > 1)
        cure = "the given split leaks; correct it or let raredistill split by patient"
        return several + [Problem("warning", patient, "", "has images in several split parts", cure) for patient in leaks]

    def read(self, unit: Unit, size: tuple[int, int]) -> Slices:
        """Decode one chunk at ``(height, width)`` by antialiased bilinear interpolation.

        Raises:
            DataError: the file is damaged, or its values need a window.
        """
        split, start = unit.patient.rsplit("/", 1)
        key, first = "" if split == _ALL else split, int(start)
        part = self._parts[key]
        last = min(first + part.chunk(), len(part.labels))
        images = self._images[key].rows(first, last)
        digests = tuple(map(digest_of, images))
        images = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
        pixels = np.empty((len(self.channels), len(images), *size), dtype=np.uint8)
        for index, image in enumerate(images):
            pixels[:, index] = self._converted(image, size, part)
        rows = [self._row(part, index) for index in range(first, last)]
        planes = dict(zip(self.channels, pixels, strict=True))
        return Slices(rows, planes, {"images": len(rows)}, hashes={self._path.name: self._hash}, digests=digests)

    def _converted(self, image: np.ndarray, size: tuple[int, int], part: _Part) -> np.ndarray:
        name = f"{self._path}: {part.images}"
        if not self._named or image.ndim == 2:
            return self._decoder.convert(image, size, name)
        return np.concatenate([self._decoder.convert(np.ascontiguousarray(plane), size, name) for plane in np.moveaxis(image, -1, 0)])

    @functools.cached_property
    def _hash(self) -> str:
        return sha256(self._path)  # once per worker, not once per block of a possibly large file

    def _row(self, part: _Part, index: int) -> dict[str, Any]:
        # A unit holds many samples here, so each row brings its own patient; prepare takes row.get("patient", unit.patient).
        own, label = f"{part.split or _ALL}/{index:07d}", part.labels[index]
        patient = part.patients[index] if part.patients else own
        split = part.splits[index] if part.splits else part.split
        return {
            "sample": own,
            "label": label,
            "slice": part.slices[index] if part.slices else -1,
            "source": f"{part.images}[{index}]",
            "split": split if label else "",
            "patient": patient,
            "patient_label": self._patient_labels[patient] if part.patients else label,
        }

    def settings(self) -> dict[str, Any]:
        """Classes, whether patients are known, and how pixels are made."""
        window = list(self._decoder.window) if self._decoder.window else None
        patient = "array 'patients'" if self.patients_known else OWN_UNIT
        return {"kind": self.kind, "classes": list(self._classes), "patient": patient, "channels": list(self.channels), "window": window}


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
    lowered = {member.lower(): member for member in sorted(members)}
    for images, labels in _WHOLE:
        if images in lowered and labels in lowered:
            return [("", lowered[images], lowered[labels])]
    raise DataError(
        f"{path}: holds {', '.join(sorted(members))}; it needs train_images and train_labels, x_train and y_train, or images and labels"
    )


def _labels(archive: np.lib.npyio.NpzFile, name: str, path: Path) -> np.ndarray:
    """Class indices (int64) or names, one per sample, from any of the common forms."""
    labels = _small(archive, name, path)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8", "replace")
    if labels.ndim == 2 and labels.dtype.kind in "iufb" and np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all():
        labels = labels.argmax(axis=1)
    if (
        labels.dtype.kind == "f"
        and np.isfinite(labels).all()
        and (labels == np.rint(labels)).all()
        and np.abs(labels).max(initial=0) < 2**31
    ):
        labels = labels.astype(np.int64)
    if labels.ndim != 1 or labels.dtype.kind not in "iuUb":
        raise DataError(f"{path}: {name} is {labels.dtype} of shape {labels.shape}; it must be one class index or name a sample")
    return np.char.strip(labels) if labels.dtype.kind == "U" else labels.astype(np.int64)


def _extra(archive: np.lib.npyio.NpzFile, name: str, members: set[str], path: Path) -> np.ndarray | None:
    """One value per sample, if the file has them."""
    member = next((member for member in sorted(members) if member.lower() in (name, name.rstrip("s"))), None)
    if member is None:
        return None
    values = _small(archive, member, path)
    values = np.char.decode(values, "utf-8", "replace") if values.dtype.kind == "S" else values
    if values.ndim != 1 or values.dtype.kind not in "iuU":
        raise DataError(f"{path}: {member} is {values.dtype} of shape {values.shape}; it must be one whole number or name a sample")
    return values


def _whole(values: np.ndarray, name: str, path: Path) -> list[int]:
    if values.dtype.kind == "U":
        raise DataError(f"{path}: {name} are names; they must be whole numbers")
    return [int(value) for value in values.tolist()]


def _splits(values: np.ndarray | None, path: Path) -> tuple[str, ...]:
    if values is None:
        return ()
    names = [str(value).strip().lower() for value in values.tolist()]
    if unknown := sorted({name for name in names if name and name not in {*SPLITS, *UNLABELLED}}):
        raise DataError(f"{path}: splits hold {unknown[0]!r}, which is none of train, validation (val), test and unlabelled")
    return tuple(SPLITS.get(name, "") for name in names)


def _channel_names(names: Sequence[str] | None, path: Path) -> tuple[str, ...]:
    chosen = tuple(names or ())
    if len(set(chosen)) < len(chosen) or not all(map(_NAME.fullmatch, chosen)):
        raise DataError(f"{path}: channels {list(chosen)} must be different plain names")
    return chosen


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


def _names(archive: np.lib.npyio.NpzFile, member: str, members: set[str], path: Path) -> Sequence[str] | None:
    if member not in members:
        return None
    names = _small(archive, member, path)
    return [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names.ravel().tolist()]


def _named_labels(labels: list[np.ndarray], names: Sequence[str] | None, path: Path) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Class names in order, and each part's labels by name; "" for samples without one."""
    found = np.unique(np.concatenate(labels))
    if found.dtype.kind == "U":
        held = [name for name in found.tolist() if name.lower() not in UNLABELLED]
        unknown = sorted(set(held) - set(names)) if names is not None else []
        if unknown:
            raise DataError(f"{path}: labels {', '.join(unknown)} are not among the classes; name every class")
        classes = tuple(names if names is not None else held)
        return _distinct(classes, path), [tuple("" if name.lower() in UNLABELLED else name for name in part.tolist()) for part in labels]
    if not len(found) or found[-1] >= _MOST_CLASSES:
        raise DataError(f"{path}: {'no sample has a label' if not len(found) else f'a label is {found[-1]}'}; labels count classes from 0")
    if found[0] < 0:
        raise DataError(f"{path}: a label is {found[0]}; save labels as names, with 'unlabelled' where there is none, if that is meant")
    if names is None:
        return tuple(str(index) for index in found.tolist()), [tuple(map(str, part.tolist())) for part in labels]
    if found[-1] >= len(names):
        raise DataError(f"{path}: labels run from {found[0]} to {found[-1]}, but there are {len(names)} class names; name every class")
    classes = _distinct(tuple(names), path)
    return classes, [tuple(classes[index] for index in part.tolist()) for part in labels]


def _distinct(names: tuple[str, ...], path: Path) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise DataError(f"{path}: two classes have the same name in {list(names)}; name each class once")
    return names


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
    """The images of one part, decompressed once if blocks are read in order, with at most one block in memory."""

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
            # Dropped if reading fails, since the position in the stream is then unknown.
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
