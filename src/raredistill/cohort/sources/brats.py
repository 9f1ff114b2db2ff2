"""Code shared by the two BraTS layouts: grades, channels, the label rule, and the conversion of volumes to samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raredistill.cohort import labels
from raredistill.cohort.labels import BRATS2020, Convention, LabelRule
from raredistill.cohort.sources import Problem, Slices, Unit
from raredistill.cohort.sources.grades import GRADES, MAPPING
from raredistill.cohort.store import MASK
from raredistill.cohort.volumes import Renderer, nearest
from raredistill.errors import ConfigError, DataError

CHANNELS = ("flair", "t1", "t1ce", "t2")
CLASSES = ("healthy", *GRADES)
PHANTOM = "PHANTOM.md"
"""Marker file of ``raredistill phantom``; repeated here, since importing the phantom would take every worker half a second."""


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
    "error",
    "",
    "",
    "no table of grades, and no folder HGG or LGG above the cases",
    f"put {MAPPING} beside the cases, or name a CSV with the columns patient,grade as grades=FILE; new patients need none: unlabelled=true",
)


def generated(root: Path) -> dict[str, Any]:
    """``{"generated": True}`` for data of ``raredistill phantom``, so that they are marked wherever they appear."""
    places = (root, *root.resolve().parents[:3])
    return {"generated": True} if any((place / PHANTOM).is_file() for place in places) else {}


def rule_settings(rule: LabelRule) -> dict[str, Any]:
    """The label rule for provenance; thresholds only if the rule uses them."""
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
    scan: str,
    rendered: Renderer,
    mask: np.ndarray | None,
    *,
    rule: LabelRule,
    size: tuple[int, int],
    hashes: dict[str, str],
    convention: Convention = BRATS2020,
    with_mask: bool = False,
    problems: Any = (),
) -> Slices:
    """Label, select and resize the axial slices of one scan.

    Args:
        unit: the patient.
        scan: the scan's own name.
        rendered: all its modalities.
        mask: ``(n, height, width)`` labels; None where the patient is not labelled.
        rule: the label rule.
        size: ``(height, width)`` of the samples.
        hashes: of the files that were read.
        convention: meaning of the mask's values.
        with_mask: whether to include the mask as a channel.
        problems: problems found by decoding.

    Raises:
        DataError: the segmentation holds an unknown label, or one modality is a copy of another.
    """
    twins = [f"{one} and {other}" for one, other in rendered.twins()]
    if twins:
        raise DataError(f"{scan}: {', '.join(twins)} are the same volume: one file is a copy of the other; replace it by the original")
    outcomes, differences = _called(scan, rendered, mask, rule, convention)
    keep = np.flatnonzero(np.isin(outcomes, [labels.TUMOUR, labels.HEALTHY, ""]))
    names, counts = np.unique(outcomes, return_counts=True)
    tally = {str(name) or "unlabelled": int(count) for name, count in zip(names, counts, strict=True)} | differences
    rows = [_row(unit, scan, int(index), str(outcomes[index])) for index in keep]
    pixels = rendered.resized(keep, size)
    if with_mask and mask is not None:
        pixels[MASK] = nearest(convention.greys()[mask[keep]], size)
    return Slices(rows, pixels, tally, hashes, (*problems, *_grey_remarks(unit, rendered)))


def _called(
    scan: str, rendered: Renderer, mask: np.ndarray | None, rule: LabelRule, convention: Convention
) -> tuple[np.ndarray, dict[str, int]]:
    if mask is None:
        return labels.without_mask(rendered.brain, rendered.present, rule), {}
    try:
        return labels.compare_rules(mask, rendered.brain, rendered.present, rule=rule, convention=convention)
    except DataError as error:
        raise DataError(f"{scan}: {error}") from None


def _grey_remarks(unit: Unit, rendered: Renderer) -> list[Problem]:
    cure = "save the volume again with its full range (as floats, or as integers with a scale)"
    return [Problem("warning", unit.patient, "", remark, cure) for remark in rendered.remarks]


def _row(unit: Unit, scan: str, index: int, outcome: str) -> dict[str, Any]:
    label = unit.label if outcome == labels.TUMOUR else outcome
    return {"sample": f"{scan}:{index}", "label": label, "slice": index, "source": scan, "split": ""}


def joined(scans: list[Slices]) -> Slices:
    """The samples of all scans of a patient, one scan after the other."""
    tally: Counter[str] = Counter()
    for scan in scans:
        tally.update(scan.tally)
    return Slices(
        [row for scan in scans for row in scan.rows],
        {channel: np.concatenate([scan.pixels[channel] for scan in scans]) for channel in scans[0].pixels},
        dict(tally),
        {name: found for scan in scans for name, found in scan.hashes.items()},
        tuple(problem for scan in scans for problem in scan.problems),
    )
