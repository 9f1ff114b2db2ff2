"""Prior-consistent cross-fitted distillation: each prior is corrected once, and a teacher is weighted by its reliability."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Interval
from torch import Tensor
from torch.nn import functional as F

from raredistill.distill.contract import Facts, Labelled, Method
from raredistill.distill.imbalance import known_reliability
from raredistill.distill.softened import divergence, softened
from raredistill.losses import effective_number_weights
from raredistill.options import AboveZero, NotNegative, defaults_of
from raredistill.outputs import Outputs


def pckd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    student_prior: Tensor,
    target_prior: Tensor,
    trust: Tensor,
    omega: Tensor,
    temperature: float,
) -> dict[str, Tensor]:
    """Two loss terms that are both minimised by the posterior under the target prior; see ``docs/methods.md`` for the proof.

    Args:
        student_logits: ``(N, K)``.
        teacher_logits: ``(N, K)``, already corrected to the target prior.
        target: ``(N,)`` class indices.
        student_prior: ``(K,)`` of the samples in the student's epochs.
        target_prior: ``(K,)`` prior for which the student should decide.
        trust: ``(K,)`` in [0, 1): weight of the teacher relative to the labels, by class.
        omega: ``(K,)`` weights of the teacher's term.
        temperature: T, positive.

    Returns:
        ``ce`` and ``pckd``, scalars in nats, means over the batch; ``pckd`` includes T squared.
    """
    shift = student_prior.log() - target_prior.log() + torch.log1p(-trust)
    own = trust[target]
    on_labels = (1 - own) * F.cross_entropy(student_logits.float() + shift, target, reduction="none")
    rows = divergence(softened(teacher_logits, temperature), softened(student_logits, temperature))
    return {"ce": on_labels.mean(), "pckd": (own * omega[target] * rows).mean() * temperature**2}


@dataclass(frozen=True, eq=False)
class PCKD(Method):
    """See ``pckd``.

    Attributes:
        student_prior: ``(K,)`` of the samples in the student's epochs.
        target_prior: ``(K,)`` prior for which the student should decide.
        trust: ``(K,)`` alpha times the teacher's reliability.
        omega: ``(K,)`` weights of the teacher's term.
        alpha: largest weight of the teacher relative to the labels.
        tau: share of the carried prior that is removed from the teacher's logits; only 1 is consistent.
        eta: power of the effective-number weights; 0 weights all classes alike.
        target: the target prior is proportional to ``count ** target``: 0 uniform, 1 the training prior.
        temperature: T.
        correct: whether to correct the teacher.
        reliable: whether to use the reliability; without it, the trust of every class is ``alpha``.
    """

    student_prior: Tensor
    target_prior: Tensor
    trust: Tensor
    omega: Tensor
    alpha: Annotated[float, Interval(ge=0, le=0.999)] = 0.5
    tau: NotNegative = 1.0
    eta: NotNegative = 0.5
    target: NotNegative = 0.0
    temperature: AboveZero = 2.0
    correct: bool = True
    reliable: bool = True
    name: ClassVar[str] = "pckd"
    family: ClassVar[str] = "logits, imbalance-aware"
    source: ClassVar[str] = "here"
    needs: ClassVar[tuple[str, ...]] = ("logits", "labels", "prior", "reliability")
    own_loss: ClassVar[str] = "balanced_softmax"

    @classmethod
    def wants(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Needs of the parts that are switched on."""
        off = {"prior": options.get("correct", True) is False, "reliability": options.get("reliable", True) is False}
        return tuple(need for need in cls.needs if not off.get(need, False))

    @classmethod
    def carries(cls, counts: Tensor, options: Mapping[str, Any]) -> tuple[float, ...] | None:
        """The target prior, if the teacher's own prior is completely removed."""
        if cls.corrects(options) != 1.0:
            return None
        return tuple(_normal(counts.double() ** options.get("target", 0.0)).tolist())

    @classmethod
    def corrects(cls, options: Mapping[str, Any]) -> float:
        """``tau``, unless the correction is switched off."""
        tau: float = options.get("tau", 1.0)
        return tau if options.get("correct", True) else 0.0

    @classmethod
    def make(cls, facts: Facts, **options: Any) -> Self:
        """Compute the priors, the trust and the weights."""
        given = {**defaults_of(cls), **options}
        counts = facts.counts.float()
        if bool((counts <= 0).any()):
            raise ValueError(f"every class needs training samples; the counts are {counts.tolist()}")
        share = counts if facts.share is None else facts.share.float()
        reliability = known_reliability(facts) if given["reliable"] else torch.ones_like(counts)
        omega = effective_number_weights(counts) ** given["eta"]
        return cls(
            _normal(share), _normal(counts ** given["target"]), given["alpha"] * reliability, omega * (len(counts) / omega.sum()), **options
        )

    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """The loss on labels and the teacher's term."""
        logits = self.corrected(teacher) if self.correct else teacher.logits
        return pckd(
            student.logits, logits, batch.labels, student_prior=self.student_prior, target_prior=self.target_prior,
            trust=self.trust, omega=self.omega, temperature=self.temperature,
        )  # fmt: skip

    def corrected(self, teacher: Outputs) -> Tensor:
        """The teacher's logits ``(N, K)``, corrected from the prior that they carry to the target prior.

        Raises:
            ValueError: the carried prior is unknown.
        """
        return teacher.logits.float() - self.tau * teacher.known_log_prior + self.target_prior.log()


def _normal(values: Tensor) -> Tensor:
    return values / values.sum()
