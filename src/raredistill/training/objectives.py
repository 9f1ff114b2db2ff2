"""What a run minimises: named terms that the loop adds up without knowing what they mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from raredistill.batches import Batch
from raredistill.distill.contract import Method, Outputs
from raredistill.training.teacher import Teacher

Loss = Callable[[Tensor, Tensor], Tensor]


class Objective(Protocol):
    """From a batch and the student's outputs to weighted terms, each a scalar mean over the batch."""

    def __call__(self, batch: Batch, student: Outputs) -> dict[str, Tensor]:
        """Return the terms whose sum is minimised."""


class Supervised:
    """A loss on labels alone."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def __call__(self, batch: Batch, student: Outputs) -> dict[str, Tensor]:
        """Return one term."""
        return {"ce": self.loss(student.logits, batch.labels)}


class Distilled:
    """``ce_weight`` x the loss on labels + ``kd_weight`` x the method's terms, taught by a frozen teacher on the same view."""

    def __init__(self, loss: Loss, method: Method, teacher: Teacher, *, ce_weight: float, kd_weight: float) -> None:
        self.loss, self.method, self.teacher = loss, method, teacher
        self.ce_weight, self.kd_weight = ce_weight, kd_weight

    def __call__(self, batch: Batch, student: Outputs) -> dict[str, Tensor]:
        """Return the weighted loss on labels and the weighted terms of the method."""
        terms = self.method.terms(batch, student, self.teacher(batch))
        weighted = {name: self.kd_weight * term for name, term in terms.items()}
        return {"ce": self.ce_weight * self.loss(student.logits, batch.labels), **weighted}
