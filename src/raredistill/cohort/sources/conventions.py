"""The meaning of segmentations' values, determined for a whole source by the option, the naming, or the labels of all its files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from raredistill.cohort.labels import CONVENTIONS, Convention
from raredistill.cohort.sources import Problem
from raredistill.cohort.sources.brats import read_bytes
from raredistill.cohort.sources.layouts import Scan
from raredistill.cohort.sources.nifti import decode, whole_labels
from raredistill.errors import DataError

_OLDER = re.compile(r"brats1\d_|brats20_|brats2021_|ucsf-pdgm-|upenn-gbm-|tcga-", re.IGNORECASE)
_TREATED = re.compile(r"BraTS-(?:GLI|MET)-\d+-[1-9]\d\d", re.IGNORECASE)
"""Time points from 100 on are scans after treatment (BraTS 2024)."""


class Meanings:
    """The convention of each scan of a source.

    Args:
        scans: all of the source.
        chosen: the option ``labels``.
    """

    def __init__(self, scans: Sequence[Scan], chosen: str | None) -> None:
        self._scans, self._chosen = [scan for scan in scans if "seg" in scan.files], chosen
        self._treated = any(_TREATED.fullmatch(scan.name) for scan in scans)

    def of(self, scan: Scan) -> Convention:
        """The meaning of a scan's segmentation values."""
        if self._chosen is not None:
            return CONVENTIONS[self._chosen]
        if scan.convention is not None:
            return scan.convention
        if scan.newer:
            return CONVENTIONS["brats2024" if self._treated else "brats2023"]
        if _OLDER.match(scan.name):
            return CONVENTIONS["brats2020"]
        return CONVENTIONS["brats2023" if 3 in self._found else "brats2020"]

    def names(self) -> str:
        """All conventions that occur, for provenance."""
        return "+".join(sorted({self.of(scan).name for scan in self._scans})) or (self._chosen or "brats2020")

    def problems(self) -> list[Problem]:
        """The problem of files with unknown naming, whose meaning is ambiguous."""
        if not {3, 4} <= self._found:
            return []
        what = "segmentations hold both 3 and 4, and names do not say what they mean: 4 may be enhancing tumour or a resection cavity"
        cure = "say which: labels=brats2024 (4 is a resection cavity), labels=brats2024_ped (4 is oedema), or prepare the two kinds apart"
        return [Problem("error", "", "", what, cure)]

    @cached_property
    def _found(self) -> frozenset[int]:
        """Labels of all scans whose meaning neither the naming nor the option determines."""
        named = [scan for scan in self._scans if scan.convention is not None or scan.newer or _OLDER.match(scan.name)]
        if self._chosen is not None or len(named) == len(self._scans):
            return frozenset()
        return frozenset().union(*(_labels(scan) for scan in self._scans if scan not in named))


def _labels(scan: Scan) -> set[int]:
    file = scan.files["seg"][0]
    try:
        mask, _ = whole_labels(decode(read_bytes(file), file)[0], file)
    except DataError:
        return set()  # reported when the scan is read
    return set(np.unique(mask[mask != 0]).tolist())
