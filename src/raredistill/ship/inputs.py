"""Images to predict, labelled or not, prepared exactly as the training cohort was."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from raredistill.cohort.prepare import LARGEST
from raredistill.cohort.sources import Source
from raredistill.cohort.sources.images import CHANNELS, SUFFIXES, Decoder, checked_window, is_image
from raredistill.cohort.sources.registry import KINDS, open_source
from raredistill.cohort.sources.walk import Skips, files_below
from raredistill.cohort.store import DESCRIPTION, Cohort, PixelReader
from raredistill.errors import CheckpointError, DataError
from raredistill.files import folders_in, inside, sha256
from raredistill.ship.terms import Preparation, Terms

AT_ONCE = 64
"""Images that are read before the network answers them."""
IMAGE_NAMES = ("images", "x", "test_images", "x_test", "train_images", "x_train")
"""Members of an ``.npz`` without labels, in the order in which they are looked for."""

REPEATED = ("channels", "channel_order", "series", "window", "rule", "min_tumour_voxels", "min_brain_share")
"""Settings of the training cohort's source with which raw data are opened again; new ones have other labels and patients."""


@dataclass(frozen=True)
class Block:
    """Some samples.

    Attributes:
        rows: of each sample ``sample``, ``patient``, ``patient_label`` and ``label`` ("" where unknown) and ``slice`` (-1 without one).
        pixels: ``(n, C, height, width)`` uint8, in the order of the model's channels.
    """

    rows: list[dict[str, Any]]
    pixels: np.ndarray


def open_input(path: Path, terms: Terms) -> Iterator[Block]:
    """Read the input of a prediction: an image, a folder, a CSV, an ``.npz``, raw data of the training cohort's kind, or a cohort.

    Args:
        path: path of the input.
        terms: terms of the model, with the preparation of pixels.

    Raises:
        DataError: it cannot be read; names the file.
        CheckpointError: it was prepared in another way, or lacks a channel.
    """
    if (path / DESCRIPTION).is_file():
        return _cohort(Cohort.load(path), terms)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; name an image, a folder, a CSV, an .npz or a prepared cohort")
    if terms.preparation.kind not in KINDS:
        raise CheckpointError(f"{path}: the model's cohort was made by {terms.preparation.kind or 'hand'}; give it a prepared cohort")
    if not terms.preparation.pictures:
        return _units(_like_training(path, terms.preparation), terms)
    return _pictures(path, terms)


def _cohort(cohort: Cohort, terms: Terms) -> Iterator[Block]:
    told = cohort.provenance
    other = Preparation(str(told.get("kind", "")), (cohort.size[0], cohort.size[1]), dict(told.get("settings", {})))
    terms.preparation.refuse_other(other, str(cohort.root))
    _refuse_absent(terms, cohort.channels, str(cohort.root))
    cohort.check_pixels(terms.channels)
    return _rows(cohort, terms)


def _rows(cohort: Cohort, terms: Terms) -> Iterator[Block]:
    with PixelReader(cohort, terms.channels) as reader:
        for start in range(0, len(cohort.samples), AT_ONCE):
            some = cohort.samples.iloc[start : start + AT_ONCE]
            pixels = np.empty((len(some), len(terms.channels), *cohort.size), np.uint8)
            reader.read(np.arange(start, start + len(some)), pixels)
            yield Block(some[["sample", "patient", "patient_label", "label", "slice"]].to_dict("records"), pixels)  # type: ignore[arg-type]


def _refuse_absent(terms: Terms, channels: Sequence[str], where: str) -> None:
    if absent := [channel for channel in terms.channels if channel not in channels]:
        raise CheckpointError(f"{where}: the model needs the channels {', '.join(absent)}; it has {', '.join(channels)}")


def _like_training(path: Path, preparation: Preparation) -> Source:
    """Raw data opened as the training cohort's were, unlabelled patients included where that source reads them."""
    source: Any = KINDS[preparation.kind]()
    known = inspect.signature(source.__init__).parameters
    settings = {key: value for key, value in preparation.settings.items() if key in known and key in REPEATED and value is not None}
    return open_source(preparation.kind, path, **settings, **({"unlabelled": True} if "unlabelled" in known else {}))


def _units(source: Source, terms: Terms) -> Iterator[Block]:
    _refuse_absent(terms, source.channels, source.kind)
    if not (units := source.units()):
        told = "; ".join(f"{problem.file}: {problem.what} ({problem.cure})" for problem in source.problems()[:3])
        raise DataError(f"{source.kind}: nothing there can be read{f': {told}' if told else ''}")
    for unit in units:
        made = source.read(unit, terms.preparation.size)
        fallback = {"patient": unit.patient, "patient_label": unit.label}
        pixels = np.stack([made.pixels[channel] for channel in terms.channels], axis=1)
        rows = [{**fallback, **{key: row[key] for key in row if key not in ("source", "split")}} for row in made.rows]
        for start in range(0, len(rows), AT_ONCE):
            yield Block(rows[start : start + AT_ONCE], pixels[start : start + AT_ONCE])


def _decoder(preparation: Preparation) -> Decoder:
    mode = next((mode for mode, names in CHANNELS.items() if list(names) == preparation.settings.get("channels")), None)
    if mode is None:
        raise CheckpointError(f"the model's cohort has channels {preparation.settings.get('channels')}, which images do not have")
    return Decoder(cast("Any", mode), checked_window(preparation.settings.get("window")))


def _pictures(path: Path, terms: Terms) -> Iterator[Block]:
    if path.is_dir():
        return _folder(path, terms)
    if path.suffix.lower() == ".csv":
        return _files(_listed(path, terms), path.parent, terms)
    if path.suffix.lower() == ".npz":
        return _arrays(path, terms)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: not an image ({', '.join(SUFFIXES)}), CSV or .npz")
    return _files([_row(path.name, path)], path.parent, terms)


def _row(name: str, file: Path, *, patient: str = "", label: str = "") -> dict[str, Any]:
    return {"sample": name, "patient": patient or name, "patient_label": label, "label": label, "slice": -1, "file": file}


def _folder(path: Path, terms: Terms) -> Iterator[Block]:
    """A folder per class is read as in training, with its labels and patients; any other folder as images without labels."""
    classes = {folder.name for folder in folders_in(path)}
    if terms.preparation.kind == "image_folder" and classes and classes <= set(terms.classes):
        asked = terms.preparation.settings
        pattern = asked.get("patient") if _is_pattern(asked.get("patient")) else None
        mode = _decoder(terms.preparation).mode
        return _units(open_source("image_folder", path, patient=pattern, mode=mode, window=asked.get("window")), terms)
    files = [file for file in files_below(path, Skips()) if is_image(file)]
    if not files:
        raise DataError(f"{path}: holds no image that is read")
    return _files([_row(file.relative_to(path).as_posix(), file) for file in files], path, terms)


def _is_pattern(patient: Any) -> bool:
    return isinstance(patient, str) and (patient == "folder" or "(" in patient)


def _listed(path: Path, terms: Terms) -> list[dict[str, Any]]:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error})") from None
    columns = {"image": "image", "label": "label", "patient": "patient", **_named(terms.preparation)}
    if columns["image"] not in table:
        raise DataError(f"{path}: no column {columns['image']!r} among {', '.join(table.columns)}; name the column of the images so")
    if (twice := table[columns["image"]].duplicated()).any():
        raise DataError(f"{path}: names {table.loc[twice, columns['image']].iloc[0]} a second time; name each image once")
    found = {key: table[column] if column in table else [""] * len(table) for key, column in columns.items()}
    rows = zip(found["image"], found["label"], found["patient"], strict=True)
    return [_row(image, path.parent / image, patient=patient, label=label) for image, label, patient in rows]


def _named(preparation: Preparation) -> dict[str, str]:
    columns = preparation.settings.get("columns") or {}
    return {key: columns[key] for key in ("image", "label", "patient") if columns.get(key)}


def _files(rows: list[dict[str, Any]], root: Path, terms: Terms) -> Iterator[Block]:
    decoder, size = _decoder(terms.preparation), terms.preparation.size
    _refuse_absent(terms, decoder.channels, str(root))
    places = [decoder.channels.index(channel) for channel in terms.channels]
    for row in rows:
        if row["label"] not in ("", *terms.classes):
            raise DataError(f"{row['file']}: its label {row['label']!r} is none of the model's classes {', '.join(terms.classes)}")
    for start in range(0, len(rows), AT_ONCE):
        some = [dict(row) for row in rows[start : start + AT_ONCE]]
        pixels = [_read(decoder, row["file"], root, size)[places] for row in some]
        yield Block([_recognised(row, terms) for row in some], np.stack(pixels))


def _read(decoder: Decoder, file: Path, root: Path, size: tuple[int, int]) -> np.ndarray:
    if not inside(file, root):
        raise DataError(f"{file}: lies outside {root}; copy the file there")
    return decoder.read(file, size)


def _recognised(row: dict[str, Any], terms: Terms) -> dict[str, Any]:
    """A file that the study has read keeps its patient, whatever it is called now: a copy of a training image is no new patient."""
    file = row.pop("file")
    if terms.files and row["patient"] == row["sample"]:
        row["patient"] = terms.files.get(sha256(file), row["patient"])
    return row


def _arrays(path: Path, terms: Terms) -> Iterator[Block]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            members = set(archive.files)
            if any(name.endswith("_labels") or name.startswith("y_") for name in members):
                asked = {"mode": _decoder(terms.preparation).mode, "window": terms.preparation.settings.get("window")}
                return _units(open_source("arrays", path, classes=list(terms.classes), **asked), terms)
            if not (name := next((name for name in IMAGE_NAMES if name in members), "")):
                raise DataError(f"{path}: holds {', '.join(sorted(members))}; name the images 'images'")
            images = archive[name]
    except (OSError, ValueError, EOFError, KeyError, MemoryError) as error:
        raise DataError(f"{path}: cannot be read as .npz ({error})") from None
    if images.ndim not in (3, 4) or max(images.shape[1:3]) > LARGEST * 8:
        raise DataError(f"{path}: {name} has the shape {images.shape}; it must be (N, H, W), (N, H, W, 1) or (N, H, W, 3)")
    return _converted(images, f"{path}: {name}", terms)


def _converted(images: np.ndarray, where: str, terms: Terms) -> Iterator[Block]:
    decoder = _decoder(terms.preparation)
    plain = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
    places = [decoder.channels.index(channel) for channel in terms.channels]
    for start in range(0, len(plain), AT_ONCE):
        some = plain[start : start + AT_ONCE]
        names = [f"{start + place:07d}" for place in range(len(some))]
        rows = [{"sample": name, "patient": name, "patient_label": "", "label": "", "slice": -1} for name in names]
        yield Block(rows, np.stack([decoder.convert(image, terms.preparation.size, where)[places] for image in some]))
