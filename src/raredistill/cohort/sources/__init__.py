"""Sources of raw data. A source lists its patients, reports its problems, and reads one patient at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np


@dataclass(frozen=True)
class Problem:
    """One problem of a source, with its remedy."""

    level: Literal["error", "warning", "note"]
    patient: str
    file: str
    what: str
    cure: str


@dataclass(frozen=True)
class Skipped:
    """Files or rows of one kind that a source does not use; used and skipped ones add up to all.

    Attributes:
        reason: such as ``hidden folder``, ``excluded by a pattern``, ``no known modality``.
        count: of files, or rows.
        examples: the first few, relative to the source.
    """

    reason: str
    count: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unit:
    """The work of one worker at a time: one patient, with the files of all scans and visits.

    Attributes:
        patient: the person; there is one unit per person.
        label: the patient's own label; "" when only samples have labels, or when nothing is labelled.
        files: of all scans.
        labelled: False if the patient has no label: its samples belong to the unlabelled part of a cohort.
    """

    patient: str
    label: str
    files: tuple[Path, ...]
    labelled: bool = True


@dataclass(frozen=True)
class Slices:
    """The samples of one patient, ready for the store.

    Attributes:
        rows: one dictionary per sample with keys ``sample`` (unique), ``label`` ("" where the unit is not labelled), ``slice`` (its
            index, -1 when it has none), ``source`` (file or case it came from), ``split`` ("" unless the source gives one).
        pixels: channel -> ``(n, height, width)`` uint8, resized and normalised.
        tally: counts worth reporting, such as slices discarded by each label rule.
        hashes: file name -> sha256 of the bytes that were read; left empty, ``prepare`` hashes the unit's files itself.
        problems: warnings and notes found only by decoding.
        digests: of each sample's pixels before they were resized, to find copies; if empty, those of the resized pixels are used.
    """

    rows: list[dict[str, Any]]
    pixels: dict[str, np.ndarray]
    tally: dict[str, int]
    hashes: dict[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    digests: tuple[str, ...] = ()


class Source(Protocol):
    """The interface of raw data for ``verify`` and ``prepare``. Sources are picklable, so that workers can read."""

    kind: str
    channels: tuple[str, ...]
    counted: str
    """The noun for its units: patients, images."""
    patients_known: bool
    """Whether patients are known; otherwise each image is its own unit, and patients are not counted."""
    duplicates: Literal["refuse", "join", "drop", "near"]
    """Treatment of equal images (set by ``open_source``); see ``raredistill.cohort.duplicates``."""

    def units(self) -> list[Unit]:
        """Patients in a stable order."""

    def classes(self) -> tuple[str, ...]:
        """Class names in a stable order: a background class (healthy) first when there is one."""

    def problems(self) -> list[Problem]:
        """Problems found without decoding pixels."""

    def skipped(self) -> list[Skipped]:
        """Everything in the source that is not used, by reason; empty if the source uses all."""
        return []

    def read(self, unit: Unit, size: tuple[int, int]) -> Slices:
        """Decode one patient at ``(height, width)``; raises DataError when that cannot be done."""

    def settings(self) -> dict[str, Any]:
        """All settings that affect the result, for provenance: JSON-like."""
