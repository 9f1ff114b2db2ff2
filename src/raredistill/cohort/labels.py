"""Labels of slices: tumour (with the patient's grade), healthy, or left out, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from raredistill.errors import ConfigError, DataError

Rule = Literal["default", "thesis"]
RULES: tuple[str, ...] = get_args(Rule)
TUMOUR, HEALTHY = "tumour", "healthy"
EMPTY, LITTLE_BRAIN, GREY_ZONE, CAVITY = "left out: empty", "left out: little brain", "left out: grey zone", "left out: resection cavity"


@dataclass(frozen=True)
class Convention:
    """The meaning of a segmentation's values.

    Attributes:
        name: its name in the option ``labels``.
        necrosis: labels of the non-enhancing core.
        oedema: labels of oedema and infiltration.
        enhancing: labels of enhancing tumour.
        cavity: labels of resection cavities, which are not tumour.
    """

    name: str
    necrosis: tuple[int, ...]
    oedema: tuple[int, ...]
    enhancing: tuple[int, ...]
    cavity: tuple[int, ...] = ()

    @property
    def known(self) -> frozenset[int]:
        """All labels except the background."""
        return frozenset((*self.necrosis, *self.oedema, *self.enhancing, *self.cavity))

    def greys(self) -> np.ndarray:
        """``(256,)`` uint8: the segmentation as a channel, 0, 85 (necrosis), 170 (oedema) and 255 (enhancing tumour)."""
        table = np.zeros(256, np.uint8)
        for grey, found in ((85, self.necrosis), (170, self.oedema), (255, self.enhancing)):
            table[list(found)] = grey
        return table


BRATS2020 = Convention("brats2020", (1,), (2,), (4,))
CONVENTIONS = {
    "brats2020": BRATS2020,
    "brats2023": Convention("brats2023", (1,), (2,), (3,)),
    "brats2024": Convention("brats2024", (1,), (2,), (3,), (4,)),
    "brats2024_ped": Convention("brats2024_ped", (2, 3), (4,), (1,)),
    "msd": Convention("msd", (2,), (1,), (3,)),
}
"""BraTS to 2021 (0 1 2 4), BraTS 2023 (0 1 2 3), BraTS 2024 after treatment (4 is the resection cavity), BraTS-PED 2024 (1 enhancing,
2 not enhancing, 3 cystic, 4 oedema), and the Medical Segmentation Decathlon with nnU-Net's BraTS (1 oedema, 2 necrosis, 3 enhancing)."""


@dataclass(frozen=True)
class LabelRule:
    """A label rule and its thresholds.

    ``default``: an empty slice, or one with less brain than ``min_brain_share`` of the patient's widest slice, is left out; one with
    at least ``min_tumour_voxels`` voxels of any tumour label is tumour; one with fewer, but some, is left out (the grey zone); the rest
    is healthy.

    ``thesis``: a slice is left out if every modality is empty; it is tumour if it holds oedema or enhancing tumour (2, or 3 after
    4 -> 3), even one voxel, so that necrosis alone counts as healthy; the rest is healthy. The thesis' script also renumbered the labels
    of each volume by rank: where a patient had no necrosis, labels 0 2 3 became 0 1 2, so oedema turned into the necrosis that counts as
    healthy. This is an error of the script, not part of the rule, and is not repeated here.

    Under both rules, a slice that would be healthy but shows a resection cavity is left out.

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


@dataclass(frozen=True)
class Voxels:
    """Counts that the rules need, each ``(n,)`` int64 by slice: voxels of tumour, of oedema or enhancing tumour, of cavity."""

    tumour: np.ndarray
    active: np.ndarray
    cavity: np.ndarray


def count_voxels(mask: np.ndarray, convention: Convention = BRATS2020) -> Voxels:
    """Count the voxels that the rules need.

    Args:
        mask: ``(n, height, width)`` integers, at native resolution.
        convention: meaning of the values.

    Raises:
        DataError: a label is not part of the convention.
    """
    counts = Voxels(*(np.zeros(len(mask), np.int64) for _ in range(3)))
    active = (*convention.oedema, *convention.enhancing)
    for index, plane in enumerate(mask):
        if plane.any():
            values, found = np.unique(plane[plane != 0], return_counts=True)
            _check_labels(values.tolist(), mask, convention)
            cavity = np.isin(values, convention.cavity)
            counts.cavity[index], counts.tumour[index] = found[cavity].sum(), found[~cavity].sum()
            counts.active[index] = found[np.isin(values, active)].sum()
    return counts


def _check_labels(values: list[int], mask: np.ndarray, convention: Convention) -> None:
    if not convention.known.issuperset(values):
        found = np.unique(mask[mask != 0]).tolist()
        known = " ".join(map(str, sorted(convention.known)))
        others = [other.name for other in CONVENTIONS.values() if other.known.issuperset(found)]
        cure = f"; if that is right, set labels={' or labels='.join(others)}" if others else ""
        raise DataError(f"the segmentation holds the label(s) {found[:8]}, but {convention.name} knows only 0 {known}{cure}")


def label_slices(
    mask: np.ndarray, brain: np.ndarray, present: np.ndarray, *, rule: LabelRule, convention: Convention = BRATS2020
) -> np.ndarray:
    """Label each slice of a patient as tumour, healthy, or left out with the reason.

    Args:
        mask: ``(n, height, width)`` integers, at native resolution.
        brain: ``(n,)`` voxels of brain (unlike the background).
        present: ``(n,)`` whether any modality differs from the background anywhere.
        rule: the rule and its thresholds.
        convention: meaning of the mask's values.

    Returns:
        ``(n,)`` str: one of this module's six outcomes.

    Raises:
        DataError: the segmentation contains an unknown label.
    """
    return _outcomes(count_voxels(mask, convention), brain, present, rule)


def compare_rules(
    mask: np.ndarray, brain: np.ndarray, present: np.ndarray, *, rule: LabelRule, convention: Convention = BRATS2020
) -> tuple[np.ndarray, dict[str, int]]:
    """Label slices like ``label_slices``, and count the differences between the two rules.

    Returns:
        ``(n,)`` outcomes of ``rule``, and counts with keys such as ``thesis tumour / default left out: grey zone``.
    """
    voxels = count_voxels(mask, convention)
    by_rule = {name: _outcomes(voxels, brain, present, LabelRule(name, rule.min_tumour_voxels, rule.min_brain_share)) for name in RULES}
    pairs = [f"thesis {old} / default {new}" for old, new in zip(by_rule["thesis"], by_rule["default"], strict=True)]
    names, counts = np.unique(pairs, return_counts=True)
    return by_rule[rule.name], {str(name): int(count) for name, count in zip(names, counts, strict=True)}


def without_mask(brain: np.ndarray, present: np.ndarray, rule: LabelRule) -> np.ndarray:
    """``(n,)`` str: "" for slices of an unlabelled scan that show enough brain, and the reason for the others."""
    return np.select([~present, _little(brain, rule)], [EMPTY, LITTLE_BRAIN], "")


def _outcomes(voxels: Voxels, brain: np.ndarray, present: np.ndarray, rule: LabelRule) -> np.ndarray:
    if rule.name == "thesis":
        return np.select([~present, voxels.active > 0, voxels.cavity > 0], [EMPTY, TUMOUR, CAVITY], HEALTHY)
    conditions = [~present, _little(brain, rule), voxels.tumour >= rule.min_tumour_voxels, voxels.tumour > 0, voxels.cavity > 0]
    return np.select(conditions, [EMPTY, LITTLE_BRAIN, TUMOUR, GREY_ZONE, CAVITY], HEALTHY)


def _little(brain: np.ndarray, rule: LabelRule) -> np.ndarray:
    little: np.ndarray = brain < rule.min_brain_share * brain.max(initial=0)
    return little
