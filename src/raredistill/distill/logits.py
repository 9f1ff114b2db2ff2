"""Distillers that compare logits.

All include T squared, divide by the batch size, compute in float32 and do not propagate gradients to the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Gt, Le
from torch import Tensor
from torch.nn import functional as F

from raredistill.distill.contract import Facts, Labelled, Method
from raredistill.distill.softened import mean_divergence, softened
from raredistill.losses import effective_number_weights
from raredistill.options import AboveZero, NotNegative
from raredistill.outputs import Outputs


def kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Knowledge distillation: KL divergence of softened outputs, times T squared.

    Args:
        student_logits: ``(N, K)``.
        teacher_logits: ``(N, K)``.
        temperature: T, positive.

    Returns:
        Scalar in nats, a mean over the batch.

    References:
        Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015.

    Examples:
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[3.0, 0.0, -2.0]])
        >>> kd(student, teacher, temperature=4.0)
        tensor(0.2973)
    """
    return mean_divergence(softened(teacher_logits, temperature), softened(student_logits, temperature)) * temperature**2


def standardised_kd(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Distillation of z-scored logits: the student need not match the teacher's scale and shift.

    Args:
        student_logits: ``(N, K)``, K at least 3: with two classes a z-scored row is always the same up to its sign.
        teacher_logits: ``(N, K)``.
        temperature: T, positive.

    Returns:
        Scalar in nats, a mean over the batch, times T squared.

    References:
        Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024; the variance divides by K - 1, as in the authors' code.

    Examples:
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[3.0, 0.0, -2.0]])
        >>> standardised_kd(student, teacher, temperature=2.0)
        tensor(0.0016)
    """
    return kd(_standardised(student_logits), _standardised(teacher_logits), temperature=temperature)


def _standardised(logits: Tensor) -> Tensor:
    centred = logits.float() - logits.float().mean(dim=1, keepdim=True)
    # The small constant keeps the gradient finite for rows without variance.
    return centred * (centred.square().sum(dim=1, keepdim=True) / (logits.shape[1] - 1) + 1e-12).rsqrt()


def dkd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, *, alpha: float, beta: float, temperature: float) -> Tensor:
    """Decoupled distillation: the target class against the rest (alpha), and the others among themselves (beta).

    Args:
        student_logits: ``(N, K)``, K at least 3: with two classes, there is only one other class.
        teacher_logits: ``(N, K)``.
        target: ``(N,)`` class indices.
        alpha: weight of the target part.
        beta: weight of the part among the other classes.
        temperature: T, positive.

    Returns:
        Scalar in nats, a mean over the batch, times T squared.

    References:
        Zhao et al., Decoupled Knowledge Distillation, CVPR 2022.

    Examples:
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[3.0, 0.0, -2.0]])
        >>> dkd(student, teacher, torch.tensor([0]), alpha=1.0, beta=8.0, temperature=4.0)
        tensor(1.2027)
    """
    mask = F.one_hot(target, student_logits.shape[1]).bool()
    sides = [softened(logits, temperature) for logits in (teacher_logits, student_logits)]
    target_part = mean_divergence(*(_target_against_rest(side, mask) for side in sides))
    others = [F.log_softmax(side[~mask].view(len(target), -1), dim=1) for side in sides]
    return (alpha * target_part + beta * mean_divergence(*others)) * temperature**2


def _target_against_rest(log_probability: Tensor, mask: Tensor) -> Tensor:
    # Log-sum-exp of the rest instead of log(1 - p): finite even if the target has all the probability.
    rest = torch.logsumexp(log_probability[~mask].view(len(mask), -1), dim=1)
    return torch.stack([log_probability[mask], rest], dim=1)


def bkd(student_logits: Tensor, teacher_logits: Tensor, *, class_weights: Tensor, temperature: float) -> Tensor:
    """Balanced distillation: the teacher's softened outputs are weighted by class and renormalised, so that rare classes count more.

    Args:
        student_logits: ``(N, K)``.
        teacher_logits: ``(N, K)``.
        class_weights: ``(K,)`` positive, larger for rarer classes.
        temperature: T, positive.

    Returns:
        Scalar in nats, a mean over the batch, times T squared.

    References:
        Zhang et al., Balanced Knowledge Distillation for Long-tailed Learning, Neurocomputing 2023 (targets renormalised).

    Examples:
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[3.0, 0.0, -2.0]])
        >>> bkd(student, teacher, class_weights=torch.tensor([0.5, 1.0, 1.5]), temperature=2.0)
        tensor(0.0137)
    """
    shifted = softened(teacher_logits, temperature) + class_weights.float().log()
    return mean_divergence(F.log_softmax(shifted, dim=1), softened(student_logits, temperature)) * temperature**2


def dive(student_logits: Tensor, teacher_logits: Tensor, *, power: float, temperature: float) -> Tensor:
    """Distil virtual examples: the teacher's softened outputs are flattened by a power, which makes their sum less long-tailed.

    Args:
        student_logits: ``(N, K)``.
        teacher_logits: ``(N, K)``.
        power: exponent of the teacher's probabilities, in (0, 1]; 1 is plain distillation.
        temperature: T, positive.

    Returns:
        Scalar in nats, a mean over the batch, times T squared.

    References:
        He, Wu, Wei: Distilling Virtual Examples for Long-tailed Recognition, ICCV 2021.

    Examples:
        >>> student, teacher = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[3.0, 0.0, -2.0]])
        >>> dive(student, teacher, power=0.5, temperature=3.0)
        tensor(0.0312)
    """
    flattened = F.log_softmax(power * softened(teacher_logits, temperature), dim=1)
    return mean_divergence(flattened, softened(student_logits, temperature)) * temperature**2


def dist(student_logits: Tensor, teacher_logits: Tensor, *, beta: float, gamma: float, temperature: float) -> Tensor:
    """Distil relations: one minus Pearson's correlation, within samples (beta) and within classes over the batch (gamma).

    Args:
        student_logits: ``(N, K)``, K at least 3: with two classes the correlation within a sample is +-1 and carries no signal.
        teacher_logits: ``(N, K)``.
        beta: weight of the relation between the classes of a sample.
        gamma: weight of the relation between the samples of a class.
        temperature: T, positive.

    Returns:
        Scalar, times T squared.

    References:
        Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022.

    Examples:
        >>> student = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        >>> teacher = torch.tensor([[3.0, 0.0, -2.0], [0.5, 1.0, 0.0]])
        >>> dist(student, teacher, beta=1.0, gamma=1.0, temperature=1.0)
        tensor(0.0367)
    """
    student, teacher = (softened(logits, temperature).exp() for logits in (student_logits, teacher_logits))
    teacher = teacher.detach()
    return (beta * _unlike(student, teacher) + gamma * _unlike(student.T, teacher.T)) * temperature**2


def _unlike(one: Tensor, other: Tensor) -> Tensor:
    # The small constant keeps the gradient finite for rows without variance.
    first, second = (rows - rows.mean(dim=1, keepdim=True) for rows in (one, other))
    return 1 - F.cosine_similarity(first, second, dim=1, eps=1e-8).mean()


@dataclass(frozen=True)
class KD(Method):
    """See ``kd``."""

    temperature: AboveZero = 4.0
    name: ClassVar[str] = "kd"
    family: ClassVar[str] = "logits"
    source: ClassVar[str] = "Hinton et al. 2015"
    needs: ClassVar[tuple[str, ...]] = ("logits",)
    zero_at_equal: ClassVar[bool] = True

    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return a single term."""
        return {"kd": kd(student.logits, teacher.logits, temperature=self.temperature)}


@dataclass(frozen=True)
class StandardisedKD(Method):
    """See ``standardised_kd``."""

    temperature: AboveZero = 2.0
    name: ClassVar[str] = "standardised_kd"
    family: ClassVar[str] = "logits"
    source: ClassVar[str] = "Sun et al. 2024"
    needs: ClassVar[tuple[str, ...]] = ("logits",)
    min_classes: ClassVar[int] = 3
    zero_at_equal: ClassVar[bool] = True

    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return a single term."""
        return {"standardised_kd": standardised_kd(student.logits, teacher.logits, temperature=self.temperature)}


@dataclass(frozen=True)
class DKD(Method):
    """See ``dkd``."""

    alpha: NotNegative = 1.0
    beta: NotNegative = 8.0
    temperature: AboveZero = 4.0
    name: ClassVar[str] = "dkd"
    family: ClassVar[str] = "logits"
    source: ClassVar[str] = "Zhao et al. 2022"
    needs: ClassVar[tuple[str, ...]] = ("logits", "labels")
    min_classes: ClassVar[int] = 3
    zero_at_equal: ClassVar[bool] = True

    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return a single term."""
        options = {"alpha": self.alpha, "beta": self.beta, "temperature": self.temperature}
        return {"dkd": dkd(student.logits, teacher.logits, batch.labels, **options)}


@dataclass(frozen=True, eq=False)  # == is not defined for tensors as a whole
class BKD(Method):
    """See ``bkd``; ``class_weights`` come from the training counts."""

    class_weights: Tensor
    temperature: AboveZero = 2.0
    name: ClassVar[str] = "bkd"
    family: ClassVar[str] = "logits, imbalance-aware"
    source: ClassVar[str] = "Zhang et al. 2023"
    needs: ClassVar[tuple[str, ...]] = ("logits",)
    note: ClassVar[str] = "class weights by effective number"
    balances: ClassVar[bool] = True

    @classmethod
    def make(cls, facts: Facts, **options: Any) -> Self:
        """Weight classes by effective number."""
        return cls(effective_number_weights(facts.counts), **options)

    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return a single term."""
        return {"bkd": bkd(student.logits, teacher.logits, class_weights=self.class_weights, temperature=self.temperature)}


@dataclass(frozen=True)
class DiVE(Method):
    """See ``dive``."""

    power: Annotated[float, Gt(0), Le(1)] = 0.5
    temperature: AboveZero = 3.0
    name: ClassVar[str] = "dive"
    family: ClassVar[str] = "logits, imbalance-aware"
    source: ClassVar[str] = "He et al. 2021"
    needs: ClassVar[tuple[str, ...]] = ("logits",)

    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return a single term."""
        return {"dive": dive(student.logits, teacher.logits, power=self.power, temperature=self.temperature)}


@dataclass(frozen=True)
class DIST(Method):
    """See ``dist``."""

    beta: NotNegative = 1.0
    gamma: NotNegative = 1.0
    temperature: AboveZero = 1.0
    name: ClassVar[str] = "dist"
    family: ClassVar[str] = "relations of logits"
    source: ClassVar[str] = "Huang et al. 2022"
    needs: ClassVar[tuple[str, ...]] = ("logits",)
    min_classes: ClassVar[int] = 3
    zero_at_equal: ClassVar[bool] = True
    within_batch: ClassVar[bool] = True

    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return a single term."""
        return {"dist": dist(student.logits, teacher.logits, beta=self.beta, gamma=self.gamma, temperature=self.temperature)}
