"""Distillers that compare features and feature maps, in float32; no gradient reaches the teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raredistill.distill.contract import Facts, Labelled, Method, Shape
from raredistill.options import AboveZero, NotNegative
from raredistill.outputs import Outputs

MAPS: tuple[str, ...] = ("maps",)
FEATURES: tuple[str, ...] = ("features",)


def hint(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean squared error between two maps ``(N, C, H, W)``; the larger is averaged to the size of the smaller.

    References:
        Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015.

    Examples:
        >>> hint(torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 2, 2))
        tensor(1.)
    """
    student, teacher = _same_size(student_map.float(), teacher_map.float().detach())
    return F.mse_loss(student, teacher)


def _same_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    height, width = (min(one.shape[side], other.shape[side]) for side in (2, 3))
    shrunk = [side if side.shape[2:] == (height, width) else F.adaptive_avg_pool2d(side, (height, width)) for side in (one, other)]
    return shrunk[0], shrunk[1]


def attention_transfer(student_maps: tuple[Tensor, ...], teacher_maps: tuple[Tensor, ...]) -> Tensor:
    """Squared difference of attention maps (mean square over channels, normalised over positions), summed over stages.

    Args:
        student_maps: stages ``(N, C, H, W)``, shallow to deep; the deepest are compared when the numbers differ.
        teacher_maps: the same of the teacher; channels and sizes may differ (averaged to the smaller).

    Returns:
        Scalar, a mean over the batch and the positions.

    References:
        Zagoruyko & Komodakis, Paying More Attention to Attention, ICLR 2017, with p = 2 and squared differences.
    """
    number = min(len(student_maps), len(teacher_maps))
    pairs = zip(student_maps[-number:], teacher_maps[-number:], strict=True)
    return torch.stack([_looks_elsewhere(student, teacher) for student, teacher in pairs]).sum()


def _looks_elsewhere(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    # Over the last axis, which is contiguous in channels-last maps: saves an eighth of a step, mostly in the backward pass.
    energies = [each.float().movedim(1, 3).square().mean(dim=3)[:, None] for each in (student_map, teacher_map.detach())]
    student, teacher = (F.normalize(energy.flatten(1), dim=1) for energy in _same_size(energies[0], energies[1]))
    return (student - teacher).square().mean()


def relational(student: Tensor, teacher: Tensor, *, distance: float, angle: float) -> Tensor:
    """Match relations between the samples of a batch: distances (divided by their mean) and angles of all triples.

    Args:
        student: features ``(N, F)``.
        teacher: features ``(N, G)``.
        distance: weight of the distances.
        angle: weight of the angles.

    Returns:
        Scalar.

    References:
        Park et al., Relational Knowledge Distillation, CVPR 2019.

    Examples:
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> relational(student, student * torch.tensor([2.0, 1.0]), distance=25.0, angle=50.0)
        tensor(0.6522)
    """
    student, teacher = student.float(), teacher.float().detach()
    apart = F.smooth_l1_loss(_distances(student), _distances(teacher))
    angled = F.smooth_l1_loss(_angles(student), _angles(teacher))
    return distance * apart + angle * angled


def _distances(features: Tensor) -> Tensor:
    squares = (features[:, None] - features[None]).square().sum(dim=2)
    distances = squares.clamp(min=1e-12).sqrt() * (squares > 0)
    others = (squares > 0).sum().clamp(min=1)
    return distances / (distances.sum() / others).clamp(min=1e-12)


def _angles(features: Tensor) -> Tensor:
    directions = F.normalize(features[None] - features[:, None], dim=2)
    return torch.bmm(directions, directions.transpose(1, 2))


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine between two networks' features ``(N, F)`` of each sample, averaged over the batch.

    References:
        Iscen et al., Class-Balanced Distillation for Long-Tailed Visual Recognition, BMVC 2021.

    Examples:
        >>> cosine_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        tensor(0.2929)
    """
    return (1 - F.cosine_similarity(student.float(), teacher.float().detach(), dim=1, eps=1e-6)).mean()


def contrastive(student: Tensor, teacher: Tensor, target: Tensor, *, temperature: float) -> Tensor:
    """Contrastive loss: identify each sample's teacher embedding among those of the batch (and the reverse), by softmax over cosines.

    The negatives are the batch's samples of other classes; the publication draws them from a memory of the whole data set.

    Args:
        student: embeddings ``(N, D)``.
        teacher: embeddings ``(N, D)`` of the same samples.
        target: ``(N,)`` class indices.
        temperature: divisor of the cosines.

    Returns:
        Scalar in nats.

    References:
        Tian et al., Contrastive Representation Distillation, ICLR 2020, with in-batch negatives.

    Examples:
        >>> contrastive(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), temperature=0.5)
        tensor(0.1269)
    """
    cosines = F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).T / temperature
    itself = torch.arange(len(student), device=student.device)
    akin = (target[:, None] == target[None]) & (itself[:, None] != itself[None])
    cosines = cosines.masked_fill(akin, -math.inf)
    return (F.cross_entropy(cosines, itself) + F.cross_entropy(cosines.T, itself)) / 2


@dataclass(frozen=True, eq=False)
class FitNet(Method):
    """See ``hint``; the student's map passes through a 1 x 1 convolution, trained together with the student."""

    regressor: nn.Module
    stage: AboveZero = 2.0
    name: ClassVar[str] = "fitnet"
    family: ClassVar[str] = "feature maps"
    source: ClassVar[str] = "Romero et al. 2015"
    needs: ClassVar[tuple[str, ...]] = MAPS

    @classmethod
    def make(cls, facts: Facts, **options: Any) -> Self:
        """Build the regressor between the widths of the stage, counted from the deepest (1)."""
        stage = options.get("stage", 2.0)
        sides = ((facts.student_shape, "student"), (facts.teacher_shape, facts.teacher))
        narrow, wide = (_width(shape, stage, who) for shape, who in sides)
        return cls(nn.Conv2d(narrow, wide, 1).to(facts.counts.device), stage)

    @property
    def trainable(self) -> nn.Module:
        """The regressor."""
        return self.regressor

    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return a single term."""
        place = -int(self.stage)
        return {"fitnet": hint(self.regressor(student.maps[place].float()), teacher.maps[place])}


def _width(shape: Shape | None, stage: Any, who: str) -> int:
    maps = shape.maps if shape is not None else ()
    if stage not in range(1, len(maps) + 1):
        raise ValueError(f"stage must be a whole number from 1 (deepest) to the {len(maps)} stages of the {who}, not {stage!r}")
    return maps[-int(stage)]


@dataclass(frozen=True)
class AttentionTransfer(Method):
    """See ``attention_transfer``; ``beta`` weights it against losses in nats."""

    beta: AboveZero = 1000.0
    name: ClassVar[str] = "at"
    family: ClassVar[str] = "feature maps"
    source: ClassVar[str] = "Zagoruyko & Komodakis 2017"
    needs: ClassVar[tuple[str, ...]] = MAPS
    zero_at_equal: ClassVar[bool] = True

    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return a single term."""
        return {"at": self.beta * attention_transfer(student.maps, teacher.maps)}


@dataclass(frozen=True)
class RKD(Method):
    """See ``relational``."""

    distance: NotNegative = 25.0
    angle: NotNegative = 50.0
    name: ClassVar[str] = "rkd"
    family: ClassVar[str] = "relations of features"
    source: ClassVar[str] = "Park et al. 2019"
    needs: ClassVar[tuple[str, ...]] = FEATURES
    zero_at_equal: ClassVar[bool] = True
    within_batch: ClassVar[bool] = True

    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return a single term."""
        return {"rkd": relational(student.pooled, teacher.pooled, distance=self.distance, angle=self.angle)}


@dataclass(frozen=True, eq=False)
class CBD(Method):
    """See ``cosine_distance``; a linear layer maps the student's features to the teacher's width if they differ."""

    projection: nn.Module
    beta: AboveZero = 100.0
    name: ClassVar[str] = "cbd"
    family: ClassVar[str] = "features, imbalance-aware (train the student with sampler: balanced)"
    source: ClassVar[str] = "Iscen et al. 2021"
    needs: ClassVar[tuple[str, ...]] = FEATURES
    zero_at_equal: ClassVar[bool] = True

    @classmethod
    def make(cls, facts: Facts, **options: Any) -> Self:
        """Build the projection for the two widths."""
        student, teacher = _widths(facts)
        layer = nn.Identity() if student == teacher else nn.Linear(student, teacher).to(facts.counts.device)
        return cls(layer, **options)

    @property
    def trainable(self) -> nn.Module:
        """The projection."""
        return self.projection

    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return a single term."""
        return {"cbd": self.beta * cosine_distance(self.projection(student.pooled.float()), teacher.pooled)}


@dataclass(frozen=True, eq=False)
class CRD(Method):
    """See ``contrastive``; both sides are embedded by linear layers, trained together with the student."""

    embeddings: nn.ModuleList
    temperature: AboveZero = 0.07
    width: AboveZero = 128.0
    name: ClassVar[str] = "crd"
    family: ClassVar[str] = "contrast of features (negatives from the batch)"
    source: ClassVar[str] = "Tian et al. 2020"
    needs: ClassVar[tuple[str, ...]] = (*FEATURES, "labels")
    within_batch: ClassVar[bool] = True

    @classmethod
    def make(cls, facts: Facts, **options: Any) -> Self:
        """Build an embedding for each side."""
        width = options.get("width", 128.0)
        if width not in range(1, 4097):
            raise ValueError(f"width must be a whole number from 1 to 4096, not {width!r}")
        layers = nn.ModuleList(nn.Linear(features, int(width)) for features in _widths(facts))
        return cls(layers.to(facts.counts.device), **options)

    @property
    def trainable(self) -> nn.Module:
        """The embeddings."""
        return self.embeddings

    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return a single term."""
        sides = (student.pooled.float(), teacher.pooled.float().detach())
        embedded = [layer(side) for layer, side in zip(self.embeddings, sides, strict=True)]
        return {"crd": contrastive(embedded[0], embedded[1], batch.labels, temperature=self.temperature)}


def _widths(facts: Facts) -> tuple[int, int]:
    if facts.student_shape is None or facts.teacher_shape is None:
        raise ValueError(f"it compares features, but those of the student and of {facts.teacher} are not known")
    return facts.student_shape.features, facts.teacher_shape.features
