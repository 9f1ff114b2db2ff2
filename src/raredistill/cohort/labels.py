"""What a slice is called: tumour (then it takes its patient's grade), healthy, or left out, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from raredistill.errors import ConfigError, DataError

Rule = Literal["default", "thesis"]
RULES: tuple[str, ...] = get_args(Rule)
TUMOUR, HEALTHY = "tumour", "healthy"
EMPTY, LITTLE_BRAIN, GREY_ZONE = "left out: empty", "left out: little brain", "left out: grey zone"


@dataclass(frozen=True)
class LabelRule:
    """A rule and its thresholds.

    ``default``: an empty slice, or one with less brain than ``min_brain_share`` of the patient's widest slice, is left out; one with
    at least ``min_tumour_voxels`` voxels of any tumour label is tumour; one with fewer, but some, is left out (the grey zone); the rest
    is healthy.

    ``thesis``: a slice is left out if every modality is empty; it is tumour if it holds oedema or enhancing tumour (2, or 3 after
    4 -> 3), even one voxel, so that necrosis alone counts as healthy; the rest is healthy. The thesis' script also renumbered the labels
    of each volume by rank: where a patient had no necrosis, labels 0 2 3 became 0 1 2, so oedema turned into the necrosis that counts as
    healthy. That is an error of the script and not part of the rule; it is not repeated here.

    Raises:
        ConfigError: an unknown rule or an impossible threshold.
    """

    name: str = "default"
    min_tumour_voxels: int = 50
    min_brain_share: float = 0.1

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ConfigError(f"unknown label rule '{self.name}'; the rules are {', '.join(RULES)}")
        if self.min_tumour_voxels < 1:
            raise ConfigError(f"min_tumour_voxels is {self.min_tumour_voxels}; it must be at least 1")
        if not 0 <= self.min_brain_share < 1:
            raise ConfigError(f"min_brain_share is {self.min_brain_share}; it must be in [0, 1)")


def merge_labels(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count what the rules ask of a segmentation, whose enhancing tumour is 4 (BraTS to 2020) or 3 (later).

    Args:
        mask: ``(n, height, width)`` integers 0, 1, 2, 3 or 4, at native resolution.

    Returns:
        Voxels of any tumour label and voxels of oedema or enhancing tumour, each ``(n,)`` int64.

    Raises:
        DataError: another label occurs, or 3 and 4 both do: then they mean something else (BraTS-GLI 2024 calls a resection cavity 4).
    """
    tumour = np.zeros(len(mask), np.int64)
    active = np.zeros(len(mask), np.int64)
    found: set[int] = set()
    for index, plane in enumerate(mask):
        if plane.any():
            values, counts = np.unique(plane[plane != 0], return_counts=True)
            found.update(values.tolist())
            _check_labels(found)
            tumour[index], active[index] = counts.sum(), counts[values >= 2].sum()
    return tumour, active


def _check_labels(found: set[int]) -> None:
    if not (found <= {1, 2, 4} or found <= {1, 2, 3}):
        raise DataError(f"the segmentation holds the label(s) {sorted(found)[:8]}; only 0 1 2 4 and 0 1 2 3 are known")


def label_slices(mask: np.ndarray, brain: np.ndarray, present: np.ndarray, *, rule: LabelRule) -> np.ndarray:
    """Call each slice of a patient tumour, healthy, or left out with the reason.

    Args:
        mask: ``(n, height, width)`` integers 0, 1, 2, 3 or 4, at native resolution.
        brain: ``(n,)`` voxels of brain (above the background).
        present: ``(n,)`` whether any modality differs from the background anywhere.
        rule: the rule and its thresholds.

    Returns:
        ``(n,)`` str: one of this module's five outcomes.

    Raises:
        DataError: the segmentation holds an unknown label.
    """
    return _outcomes(*merge_labels(mask), brain, present, rule)


def compare_rules(mask: np.ndarray, brain: np.ndarray, present: np.ndarray, *, rule: LabelRule) -> tuple[np.ndarray, dict[str, int]]:
    """Label slices as ``label_slices`` does, and count how the two rules differ on them.

    Returns:
        ``(n,)`` outcomes of ``rule``, and counts with keys such as ``thesis tumour / default left out: grey zone``.
    """
    tumour, active = merge_labels(mask)
    by_rule = {
        name: _outcomes(tumour, active, brain, present, LabelRule(name, rule.min_tumour_voxels, rule.min_brain_share)) for name in RULES
    }
    pairs = [f"thesis {old} / default {new}" for old, new in zip(by_rule["thesis"], by_rule["default"], strict=True)]
    names, counts = np.unique(pairs, return_counts=True)
    return by_rule[rule.name], {str(name): int(count) for name, count in zip(names, counts, strict=True)}


def _outcomes(tumour: np.ndarray, active: np.ndarray, brain: np.ndarray, present: np.ndarray, rule: LabelRule) -> np.ndarray:
    if rule.name == "thesis":
        return np.select([~present, active > 0], [EMPTY, TUMOUR], HEALTHY)
    little = brain < rule.min_brain_share * brain.max(initial=0)
    conditions = [~present, little, tumour >= rule.min_tumour_voxels, tumour > 0]
    return np.select(conditions, [EMPTY, LITTLE_BRAIN, TUMOUR, GREY_ZONE], HEALTHY)
