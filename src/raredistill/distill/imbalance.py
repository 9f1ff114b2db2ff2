"""Logit distillers that account for imbalance. All include T squared, are means over the batch and compute in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raredistill.distill.contract import Facts, Labelled, Method
from raredistill.distill.softened import divergence, mean_divergence, softened
from raredistill.options import AboveZero, NotNegative
from raredistill.outputs import Outputs


def ltkd(
    student_logits: Tensor, teacher_logits: Tensor, *, groups: Sequence[Tensor], alpha: float, beta: float, temperature: float
) -> Tensor:
    """Divergence between groups of classes, with the teacher's groups balanced over the batch, plus divergence within each group.

    Args:
        student_logits: ``(N, K)``.
        teacher_logits: ``(N, K)``.
        groups: class indices of each group; every class is in one group.
        alpha: weight of the divergence between groups.
        beta: weight of the sum of the divergences within groups.
        temperature: T, positive.

    Returns:
        Scalar in nats, a mean over the batch, times T squared.

    References:
        After Kim, Distilling Balanced Knowledge from a Biased Teacher, CVPR 2026 (arXiv 2506.18496); the two weights are our choice.

    Examples:
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[3.0, 0.0, -2.0]])
        >>> ltkd(student, teacher, groups=[[0], [1, 2]], alpha=1.0, beta=1.0, temperature=4.0)
        tensor(0.1312)
    """
    student, teacher = softened(student_logits, temperature), softened(teacher_logits, temperature)
    mass = [torch.stack([side[:, group].logsumexp(dim=1) for group in groups], dim=1) for side in (teacher, student)]
    over_batch = mass[0].logsumexp(dim=0) - math.log(len(student))
    between = mean_divergence(F.log_softmax(mass[0] - over_batch, dim=1), mass[1])
    # A group of one class has no divergence within.
    within = [mean_divergence(*(F.log_softmax(side[:, group], dim=1) for side in (teacher, student))) for group in groups if len(group) > 1]
    return (alpha * between + beta * torch.stack(within).sum()) * temperature**2


def groups_by_count(counts: Tensor, background: int | None = None) -> list[list[int]]:
    """Head, medium and tail thirds of the classes by training samples; for three classes, the background (or largest class) and the rest.

    Args:
        counts: ``(K,)``, K at least 3.
        background: index of the class that is not a patient's label.

    Examples:
        >>> groups_by_count(torch.tensor([50, 10, 200, 30, 5, 100]))
        [[2, 5], [0, 3], [1, 4]]
    """
    order = torch.argsort(counts, descending=True, stable=True).tolist()
    if len(order) == 3:
        lone = order[0] if background is None else background
        return [[lone], [index for index in order if index != lone]]
    return [part.tolist() for part in torch.tensor(order).tensor_split(3)]


def xerm(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, log_prior: Tensor, gamma: float) -> dict[str, Tensor]:
    """Two risks, weighted by sample: on labels (imbalanced domain), and on a balanced teacher's predictions (balanced domain).

    The balanced teacher is the teacher with its prior removed. With the cross-entropies b of the balanced and i of the uncorrected
    teacher, the weight of the teacher's risk is ``b ** gamma / (b ** gamma + i ** gamma)`` for each sample.

    Args:
        student_logits: ``(N, K)``.
        teacher_logits: ``(N, K)``.
        target: ``(N,)`` class indices.
        log_prior: ``(K,)`` or ``(N, K)`` that the teacher's logits carry.
        gamma: sharpness of the weights.

    Returns:
        ``ce`` and ``xerm``, scalars in nats.

    References:
        Zhu et al., Cross-Domain Empirical Risk Minimization for Unbiased Long-tailed Classification, AAAI 2022.

    Examples:
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[3.0, 0.0, -2.0]])
        >>> log_prior = torch.tensor([0.8, 0.1, 0.1]).log()
        >>> xerm(student, teacher, torch.tensor([0]), log_prior=log_prior, gamma=2.0)
        {'ce': tensor(0.0036), 'xerm': tensor(0.8121)}
    """
    teacher = teacher_logits.detach().float()
    student, balanced = softened(student_logits, 1), softened(teacher - log_prior, 1)
    risks = [F.nll_loss(side, target, reduction="none") ** gamma for side in (balanced, softened(teacher, 1))]
    weight = risks[0] / (risks[0] + risks[1]).clamp(min=1e-12)
    on_labels = F.nll_loss(student, target, reduction="none")
    on_teacher = -(balanced.exp() * student).sum(dim=1)
    return {"ce": ((1 - weight) * on_labels).mean(), "xerm": (weight * on_teacher).mean()}


@dataclass(frozen=True)
class _Groups:
    default: str = "head/medium/tail"

    def check(self, name: str, value: object) -> None:
        if value is None:
            return
        if not isinstance(value, (list, tuple)) or not all(isinstance(group, (list, tuple)) for group in value):
            raise ValueError(f"{name} must be lists of classes, such as [[healthy], [HGG, LGG]], not {value!r}")

    def __str__(self) -> str:
        return self.default


@dataclass(frozen=True, eq=False)
class LTKD(Method):
    """See ``ltkd``; groups by count, unless given as lists of class names or indices."""

    groups: Annotated[tuple[tuple[int, ...], ...], _Groups()]
    alpha: NotNegative = 1.0
    beta: NotNegative = 1.0
    temperature: AboveZero = 4.0
    name: ClassVar[str] = "ltkd"
    family: ClassVar[str] = "logits, imbalance-aware"
    source: ClassVar[str] = "Kim 2026"
    needs: ClassVar[tuple[str, ...]] = ("logits",)
    balances: ClassVar[bool] = True
    within_batch: ClassVar[bool] = True
    min_classes: ClassVar[int] = 3

    @classmethod
    def make(cls, facts: Facts, *, groups: Any = None, **options: Any) -> Self:
        """Determine the groups."""
        if groups is None:
            groups = groups_by_count(facts.counts, facts.background)
        return cls(_settled(groups, facts), **options)

    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return a single term."""
        groups = [torch.tensor(group, device=student.logits.device) for group in self.groups]
        options = {"alpha": self.alpha, "beta": self.beta, "temperature": self.temperature}
        return {"ltkd": ltkd(student.logits, teacher.logits, groups=groups, **options)}


def _settled(groups: Any, facts: Facts) -> tuple[tuple[int, ...], ...]:
    known = {name: index for index, name in enumerate(facts.classes)}
    settled = tuple(tuple(known.get(each, each) for each in group) for group in groups)
    if sorted((each for group in settled for each in group), key=str) != sorted(range(len(facts.counts)), key=str):
        raise ValueError(f"groups must name each of the {len(facts.counts)} classes once, not {groups!r}")
    if len(settled) < 2 or max(map(len, settled)) < 2:
        raise ValueError("groups must be two or more, one of them of two classes or more: others carry no signal; use kd")
    return settled


@dataclass(frozen=True)
class XERM(Method):
    """See ``xerm``."""

    gamma: AboveZero = 2.0
    name: ClassVar[str] = "xerm"
    family: ClassVar[str] = "logits, imbalance-aware"
    source: ClassVar[str] = "Zhu et al. 2022"
    needs: ClassVar[tuple[str, ...]] = ("logits", "prior", "labels")
    own_loss: ClassVar[str] = "cross_entropy"

    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """The risk on labels and the risk on the balanced teacher."""
        return xerm(student.logits, teacher.logits, batch.labels, log_prior=teacher.known_log_prior, gamma=self.gamma)


def two_heads(hard_logits: Tensor, soft_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, temperature: float) -> dict[str, Tensor]:
    """Train one classifier on labels and another on the teacher, on shared features, so that their boundaries do not interfere.

    Args:
        hard_logits: ``(N, K)`` of the classifier that learns the labels.
        soft_logits: ``(N, K)`` of the classifier that learns from the teacher; both read the same features.
        teacher_logits: ``(N, K)``.
        target: ``(N,)`` class indices.
        temperature: T, positive.

    Returns:
        ``ce`` and ``ssd``, scalars in nats, means over the batch; ``ssd`` includes T squared.

    References:
        Li, Wang, Wu: Self Supervision to Distillation for Long-Tailed Visual Recognition, ICCV 2021 (its joint training with two heads).

    Examples:
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[3.0, 0.0, -2.0]])
        >>> two_heads(student, student, teacher, torch.tensor([0]), temperature=2.0)
        {'ce': tensor(0.1698), 'ssd': tensor(0.1985)}
    """
    soft = mean_divergence(softened(teacher_logits, temperature), softened(soft_logits, temperature)) * temperature**2
    return {"ce": F.cross_entropy(hard_logits.float(), target), "ssd": soft}


@dataclass(frozen=True, eq=False)
class SSD(Method):
    """See ``two_heads``; one head is the student's own and is kept, the other is trained beside it.

    Attributes:
        head: the other head.
        keep: the student's own head: the one that learns from the teacher (``soft``), or from the labels (``hard``).
        temperature: T.
    """

    head: nn.Linear
    keep: Literal["soft", "hard"] = "soft"
    temperature: AboveZero = 2.0
    name: ClassVar[str] = "ssd"
    family: ClassVar[str] = "logits, imbalance-aware (two heads)"
    source: ClassVar[str] = "Li et al. 2021"
    needs: ClassVar[tuple[str, ...]] = ("logits", "labels")
    own_loss: ClassVar[str] = "cross_entropy"

    @classmethod
    def make(cls, facts: Facts, **options: Any) -> Self:
        """Build the other head with zero weights, so that initially it prefers no class."""
        if facts.student_shape is None:
            raise ValueError("it adds a second head to the student's features, but their width is not known")
        head = nn.Linear(facts.student_shape.features, len(facts.counts))
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        return cls(head.to(facts.counts.device), **options)

    @property
    def trainable(self) -> nn.Module:
        """The other head."""
        return self.head

    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """The loss on labels for one head, and the teacher's term for the other."""
        beside = self.head(student.pooled.float())
        hard, soft = (beside, student.logits) if self.keep == "soft" else (student.logits, beside)
        return two_heads(hard, soft, teacher.logits, batch.labels, temperature=self.temperature)


@dataclass(frozen=True, eq=False)
class ReliableKD(Method):
    """``kd`` times the teacher's recall of the sample's class on patients it was not trained on."""

    reliability: Tensor
    temperature: AboveZero = 4.0
    name: ClassVar[str] = "reliable_kd"
    family: ClassVar[str] = "logits, imbalance-aware"
    source: ClassVar[str] = "here"
    needs: ClassVar[tuple[str, ...]] = ("logits", "labels", "reliability")
    zero_at_equal: ClassVar[bool] = True

    @classmethod
    def make(cls, facts: Facts, **options: Any) -> Self:
        """Use the reliability estimated by the study."""
        return cls(known_reliability(facts), **options)

    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return a single term."""
        rows = divergence(softened(teacher.logits, self.temperature), softened(student.logits, self.temperature))
        return {"reliable_kd": (self.reliability[batch.labels] * rows).mean() * self.temperature**2}


def shrunk_recall(predicted: Tensor, target: Tensor, *, classes: int, strength: float = 10.0) -> Tensor:
    """Recall of each class, shrunk towards the mean of all recalls as if by ``strength`` additional samples: ``(K,)``.

    Args:
        predicted: ``(N,)`` class indices.
        target: ``(N,)`` class indices; a class without samples gets the mean.
        classes: number of classes, K.
        strength: number of samples of a class at which its own recall and the mean have equal weight.

    Examples:
        >>> shrunk_recall(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), classes=2)
        tensor([0.7727, 0.7083], dtype=torch.float64)
    """
    samples = torch.bincount(target, minlength=classes).double()
    hits = torch.bincount(target[predicted == target], minlength=classes).double()
    mean = (hits / samples)[samples > 0].mean()
    return (hits + strength * mean) / (samples + strength)


def known_reliability(facts: Facts) -> Tensor:
    """The teacher's recalls ``(K,)``.

    Raises:
        ValueError: they are unknown.
    """
    if facts.reliability is None:
        raise ValueError(
            f"it weights classes by the recall of {facts.teacher} on unseen patients, but there are no such predictions; "
            "use a teacher of this study with a validation part, or cross_fit"
        )
    return facts.reliability.to(facts.counts.device).float()
