"""Metadata for using a network besides its weights: preparation of pixels, decision rule, and training patients."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raredistill.errors import CheckpointError, ConfigError
from raredistill.evaluation.calibration import fit_temperature, scaled
from raredistill.evaluation.levels import by_patient, has_patients
from raredistill.evaluation.thresholds import operating_point
from raredistill.predictions import Predictions, concatenate

SENSITIVITIES = (0.8, 0.9, 0.95)
"""Wanted sensitivities for which thresholds are always kept."""
DEFAULT_SENSITIVITY = 0.9
PICTURES = ("image_folder", "table", "arrays")
"""Kinds of sources that decode ordinary images alike."""
NOT_PIXELS = frozenset({
    "kind", "classes", "patient", "columns", "table_sha256", "grades", "grade_3", "generated", "labels", "rule", "min_tumour_voxels",
    "unlabelled", "include", "exclude", "series", "slice_labels", "channels", "channel_order", "masks",
})  # fmt: skip
"""Settings of sources that concern labels, patients and the choice of files, not how pixels are made."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Preparation:
    """Preparation of the training cohort's pixels.

    Attributes:
        kind: of the source.
        size: height and width in pixels.
        settings: of the source, as its cohort's provenance has them.
    """

    kind: str
    size: tuple[int, int]
    settings: dict[str, Any]

    @property
    def pictures(self) -> bool:
        """Whether the source held ordinary images."""
        return self.kind in PICTURES

    def refuse_other(self, other: Preparation, where: str) -> None:
        """Refuse pixels that were made in another way.

        Raises:
            CheckpointError: names every difference.
        """
        pairs: dict[str, tuple[Any, Any]] = {"size": (self.size, other.size), "kind": (self._family, other._family)}
        ours, theirs = self._pixels, other._pixels
        pairs |= {key: (ours.get(key), theirs.get(key)) for key in sorted({*ours, *theirs})}
        if differing := [f"{key} {there!r:.60} there, {own!r:.60} in training" for key, (own, there) in pairs.items() if own != there]:
            told = "; ".join(differing)
            raise CheckpointError(f"{where}: its pixels were not prepared as the model's ({told}); prepare it in the same way")

    @property
    def _family(self) -> str:
        return "pictures" if self.pictures else self.kind

    @property
    def _pixels(self) -> dict[str, Any]:
        return {key: value for key, value in self.settings.items() if key not in NOT_PIXELS and value is not None}


@dataclass(frozen=True)
class Rule:
    """Rule for decisions on one class from probabilities.

    Attributes:
        positive: the class.
        temperatures: of each member's logits; 1 where none was fitted.
        sensitivity: the wanted one; 0 without thresholds, then the most probable class is the decision.
        samples: wanted sensitivity, as text, to the threshold on the class's probability of a sample.
        patients: likewise of a patient; empty where patients have no level of their own.
        basis: what temperature and thresholds were fitted on, as a sentence.
    """

    positive: str
    temperatures: tuple[float, ...]
    sensitivity: float = 0.0
    samples: dict[str, float] = field(default_factory=dict)
    patients: dict[str, float] = field(default_factory=dict)
    basis: str = ""

    def at(self, sensitivity: float) -> Rule:
        """The same rule for another wanted sensitivity.

        Raises:
            ConfigError: no threshold was kept for it.
        """
        if f"{sensitivity:g}" not in self.samples:
            raise ConfigError(f"no threshold was kept for the sensitivity {sensitivity:g}; there are {', '.join(self.samples) or 'none'}")
        return replace(self, sensitivity=sensitivity)

    def threshold(self, *, patients: bool) -> float | None:
        """Of the wanted sensitivity; None without one."""
        return (self.patients if patients else self.samples).get(f"{self.sensitivity:g}")

    def probabilities(self, logits: Sequence[Floats]) -> Floats:
        """Mean over the members of their calibrated probabilities, ``(N, K)``."""
        members = [scaled(each, temperature) for each, temperature in zip(logits, self.temperatures, strict=True)]
        return np.asarray(np.mean(members, axis=0))

    def decide(self, probability: Floats, classes: Sequence[str], *, patients: bool) -> list[str]:
        """The decision of each row ``(N, K)``: the positive class from its threshold on, else the most probable of the others."""
        threshold, names = self.threshold(patients=patients), np.array(classes)
        if threshold is None or self.positive not in classes:
            return [str(name) for name in names[probability.argmax(axis=1)]]
        place = list(classes).index(self.positive)
        others = probability.copy()
        others[:, place] = -1
        chosen = np.where(probability[:, place] >= threshold, place, others.argmax(axis=1))
        return [str(name) for name in names[chosen]]


def fit_rule(members: Sequence[Predictions], positive: str, *, sensitivity: float, basis: str, shared: bool = False) -> Rule:
    """Fit temperatures and thresholds on validation predictions.

    Args:
        members: of each network of an ensemble, the validation predictions that it made itself.
        positive: the class with a threshold.
        sensitivity: wanted; thresholds are also kept for ``SENSITIVITIES``.
        basis: what the predictions are, as a sentence.
        shared: one temperature for all, for a network that none of them is.

    Raises:
        ConfigError: an unknown class, or a sensitivity out of range.
        DataError: no validation sample is of the class.
    """
    if positive not in members[0].classes:
        raise ConfigError(f"the class {positive!r} is none of the classes {', '.join(members[0].classes)}")
    members = [concatenate(members)] if shared else members
    temperatures = tuple(fit_temperature(each.labels(), each.logits()) for each in members)
    pairs = zip(members, temperatures, strict=True)
    table = concatenate([each.with_logits(each.logits() / temperature) for each, temperature in pairs])
    wanted = sorted({*SENSITIVITIES, sensitivity})
    patients = {}
    if has_patients(table) and positive != table.background:
        patients = _thresholds(by_patient(table), positive, wanted)
    return Rule(positive, temperatures, sensitivity, _thresholds(table, positive, wanted), patients, basis)


def _thresholds(table: Predictions, positive: str, wanted: Iterable[float]) -> dict[str, float]:
    place = table.classes.index(positive)
    truth, score = table.labels() == place, table.probabilities()[:, place]
    return {f"{each:g}": operating_point(truth, score, each) for each in wanted}


def digest(patient: str) -> str:
    """Pseudonym of a patient in files that leave the study."""
    return hashlib.sha256(patient.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Terms:
    """The terms on which a network may be used.

    Attributes:
        name: of the model, for people.
        classes: in the order of the logits.
        background: the class that no patient carries.
        channels: in the order of the input.
        preparation: of the pixels.
        rule: of the decision.
        train: digests of the patients that trained it; ``validation`` likewise.
        validation: see ``train``.
        files: digest of an image file's bytes to its patient, where the study knows it: an image is recognised under any name.
    """

    name: str
    classes: tuple[str, ...]
    background: str | None
    channels: tuple[str, ...]
    preparation: Preparation
    rule: Rule
    train: frozenset[str]
    validation: frozenset[str]
    files: Mapping[str, str] = field(default_factory=dict)

    def side(self, patient: str) -> str:
        """``train`` or ``validation`` for patients used in training, else ``test``."""
        name = digest(patient)
        return "train" if name in self.train else "validation" if name in self.validation else "test"


def digests(patients: Collection[str]) -> frozenset[str]:
    """The digest of each patient."""
    return frozenset(map(digest, patients))
