"""What the two BraTS layouts share: grades, channels, the label rule, and the way from volumes to samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raredistill.cohort import labels
from raredistill.cohort.labels import LabelRule
from raredistill.cohort.sources import Problem, Slices, Unit
from raredistill.cohort.store import MASK
from raredistill.cohort.volumes import Renderer, nearest
from raredistill.errors import ConfigError, DataError
from raredistill.files import sha256

CHANNELS = ("flair", "t1", "t1ce", "t2")
GRADES = ("HGG", "LGG")
CLASSES = ("healthy", *GRADES)
GREYS = np.array([0, 85, 170, 255, 255], np.uint8)
"""Of the mask's labels as a channel: background, necrosis, oedema, enhancing tumour (3 or 4)."""
MAPPING = "name_mapping.csv"
PHANTOM = "PHANTOM.md"
"""What ``raredistill phantom`` leaves beside its data; named here too, since to import the phantom costs every worker half a second."""


def choose_channels(channels: Sequence[str]) -> tuple[str, ...]:
    """Check a choice of modalities.

    Raises:
        ConfigError: none, an unknown one, or one twice.
    """
    chosen = (channels,) if isinstance(channels, str) else tuple(channels)
    unknown = [channel for channel in chosen if channel not in CHANNELS]
    if unknown:
        raise ConfigError(f"unknown channel(s) {', '.join(unknown)}; BraTS has {', '.join(CHANNELS)}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ConfigError(f"channels {list(chosen)}: name each wanted modality once, of {', '.join(CHANNELS)}")
    return chosen


NO_TABLE = Problem(
    "error", "", "", "no table of grades", f"put {MAPPING} beside the cases, or name a CSV with the columns patient,grade as grades=FILE"
)


@dataclass(frozen=True)
class Grades:
    """Patient -> grade as a table tells it.

    Attributes:
        file: the table; None where there is none.
        values: patient -> what the table says.
        conflicts: patients to whom the table gives two grades.
    """

    file: Path | None
    values: dict[str, str]
    conflicts: frozenset[str] = frozenset()

    def table(self) -> dict[str, str] | None:
        """The table's name and hash, for provenance."""
        return {"file": self.file.name, "sha256": sha256(self.file)} if self.file else None

    def problem(self, patient: str) -> Problem | None:
        """Why the patient has no usable grade, or None."""
        found = self.values.get(patient)
        if patient in self.conflicts:
            return Problem("error", patient, str(self.file), "the table gives two grades", "keep one row for the patient")
        if found is None:
            return Problem("error", patient, str(self.file), "the table has no row for the patient", "add its row")
        if found not in GRADES:
            return Problem("error", patient, str(self.file), f"unknown grade '{found}'", f"write {' or '.join(GRADES)}")
        return None


def read_grades(root: Path, grades: Path | None) -> Grades:
    """Read ``grades`` or, without it, ``name_mapping.csv`` of the root.

    Known headers: ``patient,grade``, and ``Grade`` with any columns ``BraTS_<year>_subject_ID``, of which every one is understood.

    Raises:
        DataError: the named table is missing or has other columns.
    """
    file = root / MAPPING if grades is None else Path(grades)
    if grades is None and not file.is_file():
        return Grades(None, {})
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: the table of grades cannot be read ({error}); give a CSV with the columns patient,grade") from None
    table.columns = table.columns.str.strip()
    return _grades(file, table)


def _grades(file: Path, table: pd.DataFrame) -> Grades:
    names = {column.lower(): column for column in table.columns}
    identifiers = [column for low, column in names.items() if low == "patient" or (low.startswith("brats") and low.endswith("subject_id"))]
    if "grade" not in names or not identifiers:
        raise DataError(f"{file} has the columns {', '.join(table.columns)}; needed are patient,grade or BraTS_2020_subject_ID and Grade")
    pairs = pd.concat([table[[column, names["grade"]]].set_axis(["patient", "grade"], axis=1) for column in identifiers])
    pairs = pairs.apply(lambda column: column.str.strip())
    pairs["grade"] = pairs["grade"].str.upper()
    pairs = pairs[~pairs["patient"].isin(["", "NA", "nan"])].drop_duplicates()
    conflicts = frozenset(pairs["patient"][pairs["patient"].duplicated()])
    return Grades(file, dict(zip(pairs["patient"], pairs["grade"], strict=True)), conflicts)


def generated(root: Path) -> dict[str, Any]:
    """``{"generated": True}`` for data that ``raredistill phantom`` wrote, so that it says so wherever it appears."""
    places = (root, *root.resolve().parents[:3])
    return {"generated": True} if any((place / PHANTOM).is_file() for place in places) else {}


def rule_settings(rule: LabelRule) -> dict[str, Any]:
    """The label rule for provenance; thresholds only where the rule uses them."""
    if rule.name == "thesis":
        return {"rule": "thesis"}
    return {"rule": rule.name, "min_tumour_voxels": rule.min_tumour_voxels, "min_brain_share": rule.min_brain_share}


def read_bytes(file: Path) -> bytes:
    """The bytes of a file.

    Raises:
        DataError: it cannot be read, or a download left something else in its place.
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check the file and its rights") from None
    if raw.startswith(b"version https://git-lfs"):
        raise DataError(f"{file}: is a Git-LFS pointer and not yet the file; fetch it with `git lfs pull`")
    if raw[:256].lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise DataError(f"{file}: is a web page, perhaps of a failed download; fetch the file again")
    return raw


def to_slices(
    unit: Unit,
    rendered: Renderer,
    mask: np.ndarray,
    *,
    rule: LabelRule,
    size: tuple[int, int],
    hashes: dict[str, str],
    with_mask: bool = False,
    problems: Any = (),
) -> Slices:
    """Label, select and resize the axial slices of one patient.

    Args:
        unit: the patient.
        rendered: all its modalities.
        mask: ``(n, height, width)`` labels.
        rule: the label rule.
        size: ``(height, width)`` of the samples.
        hashes: of the files that were read.
        with_mask: give the mask as a channel, too.
        problems: what decoding told.

    Raises:
        DataError: the segmentation holds an unknown label.
    """
    try:
        outcomes, differences = labels.compare_rules(mask, rendered.brain, rendered.present, rule=rule)
    except DataError as error:
        raise DataError(f"{unit.patient}: {error}") from None
    keep = np.flatnonzero(np.isin(outcomes, [labels.TUMOUR, labels.HEALTHY]))
    names, counts = np.unique(outcomes, return_counts=True)
    tally = {str(name): int(count) for name, count in zip(names, counts, strict=True)} | differences
    rows = [_row(unit, int(index), str(outcomes[index])) for index in keep]
    pixels = rendered.resized(keep, size)
    if with_mask:
        pixels[MASK] = nearest(GREYS[mask[keep]], size)
    return Slices(rows, pixels, tally, hashes, tuple(problems))


def _row(unit: Unit, index: int, outcome: str) -> dict[str, Any]:
    label = unit.label if outcome == labels.TUMOUR else labels.HEALTHY
    return {"sample": f"{unit.patient}:{index}", "label": label, "slice": index, "source": unit.patient, "split": ""}
