"""What a run minimises: named terms that the loop adds up without knowing what they mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from raredistill.batches import Batch
from raredistill.distill.contract import Method
from raredistill.losses import Loss
from raredistill.outputs import Outputs


class Objective(Protocol):
    """From a batch and the student's outputs to weighted terms, each a scalar mean over the batch."""

    @property
    def maps(self) -> bool:
        """Whether it looks at the student's feature maps."""

    @property
    def trainable(self) -> nn.Module | None:
        """Layers of its own, trained beside the student; a resumed training needs their state too."""

    @property
    def apart(self) -> bool:
        """Whether those are networks by themselves, with a gradient norm each, rather than a part of what the student learns."""

    def __call__(self, batch: Batch, student: Outputs) -> dict[str, Tensor]:
        """Return the terms whose sum is minimised."""


@dataclass(frozen=True, eq=False)
class Deferred:
    """Class weights ``(K,)`` that any loss gets from an epoch on.

    References:
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS 2019.
    """

    weights: Tensor
    epoch: int


class OnLabels:
    """A loss on labels, with deferred weights, and with two targets a sample where samples are mixed."""

    def __init__(self, loss: Loss, deferred: Deferred | None = None) -> None:
        self.loss, self.deferred = loss, deferred

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean over the batch."""
        if batch.mixed is None:
            return self._rows(logits, batch.labels, batch.epoch).mean()
        # Each sample has its own share: a mean first and a share after would pair samples with each other's partners.
        own, other = (self._rows(logits, labels, batch.epoch) for labels in (batch.labels, batch.mixed.labels))
        return (batch.mixed.share * own + (1 - batch.mixed.share) * other).mean()

    def _rows(self, logits: Tensor, labels: Tensor, epoch: int) -> Tensor:
        rows = self.loss(logits, labels, reduction="none")
        if self.deferred is None or epoch < self.deferred.epoch:
            return rows
        return rows * self.deferred.weights[labels]


class Supervised:
    """A loss on labels alone."""

    maps = False
    trainable = None
    apart = False

    def __init__(self, loss: Loss, deferred: Deferred | None = None) -> None:
        self.loss = OnLabels(loss, deferred)

    def __call__(self, batch: Batch, student: Outputs) -> dict[str, Tensor]:
        """Return one term."""
        return {"ce": self.loss(student.logits, batch)}


class Distilled:
    """``ce_weight`` x the loss on labels + ``kd_weight`` x the method's terms, taught by frozen teachers on the same view."""

    apart = False

    def __init__(
        self,
        loss: Loss,
        method: Method,
        teacher: Callable[[Batch], Outputs],
        *,
        ce_weight: float,
        kd_weight: float,
        deferred: Deferred | None = None,
    ) -> None:
        self.loss, self.method, self.teacher = OnLabels(loss, deferred), method, teacher
        self.ce_weight, self.kd_weight = ce_weight, kd_weight
        self.maps = "maps" in method.needs
        self.trainable = method.trainable

    def __call__(self, batch: Batch, student: Outputs) -> dict[str, Tensor]:
        """Return the weighted loss on labels (the method's own, if it brings one) and the weighted terms of the method."""
        terms = self.method.terms(batch, student, self.teacher(batch))
        if not self.method.own_loss:
            terms = {"ce": self.loss(student.logits, batch), **terms}
        return {name: (self.ce_weight if name == "ce" else self.kd_weight) * term for name, term in terms.items()}
