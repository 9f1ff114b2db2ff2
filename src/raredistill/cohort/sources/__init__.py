"""Where raw data come from. A source lists its patients, tells its problems, and reads one patient at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a source, and the cure."""

    level: Literal["error", "warning", "note"]
    patient: str
    file: str
    what: str
    cure: str


@dataclass(frozen=True)
class Skipped:
    """Files or rows of one kind that a source does not use: taken and skipped add up to what is there.

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
    """What one worker reads at a time: one patient, with the files of all its scans and visits.

    Attributes:
        patient: the person; units are as many as persons.
        label: the patient's own label; "" when only samples have labels, or when nothing is labelled.
        files: of all scans.
        labelled: False where the patient has no label: its samples belong to the unlabelled part of a cohort.
    """

    patient: str
    label: str
    files: tuple[Path, ...]
    labelled: bool = True


@dataclass(frozen=True)
class Slices:
    """The samples of one patient, ready for the store.

    Attributes:
        rows: one dictionary a sample with keys ``sample`` (unique), ``label`` ("" where the unit is not labelled), ``slice`` (its
            index, -1 when it has none), ``source`` (file or case it came from), ``split`` ("" unless the source gives one).
        pixels: channel -> ``(n, height, width)`` uint8, resized and normalised.
        tally: counts worth reporting, such as slices discarded by each label rule.
        hashes: file name -> sha256 of the bytes that were read; left empty, ``prepare`` hashes the unit's files itself.
        problems: warnings and notes that only decoding could tell.
        digests: of each sample's pixels before they were resized, to find copies; left empty, those of the resized pixels are taken.
    """

    rows: list[dict[str, Any]]
    pixels: dict[str, np.ndarray]
    tally: dict[str, int]
    hashes: dict[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    digests: tuple[str, ...] = ()


class Source(Protocol):
    """What ``verify`` and ``prepare`` ask of raw data. Sources are picklable, so that workers can read."""

    kind: str
    channels: tuple[str, ...]
    counted: str
    """What its units are, for people: patients, images."""
    patients_known: bool
    """Whether patients are told: else each image is its own unit, and nothing counts patients."""
    duplicates: Literal["refuse", "join", "drop", "near"]
    """What becomes of equal pictures (set by ``open_source``): see ``raredistill.cohort.duplicates``."""

    def units(self) -> list[Unit]:
        """Patients in a stable order."""

    def classes(self) -> tuple[str, ...]:
        """Class names in a stable order: a background class (healthy) first when there is one."""

    def problems(self) -> list[Problem]:
        """What can be told without decoding pixels."""

    def skipped(self) -> list[Skipped]:
        """Everything that lies in the source and is not used, by reason; empty where a source takes all."""
        return []

    def read(self, unit: Unit, size: tuple[int, int]) -> Slices:
        """Decode one patient at ``(height, width)``; raises DataError when that cannot be done."""

    def settings(self) -> dict[str, Any]:
        """What determines the outcome, for provenance: JSON-like."""
