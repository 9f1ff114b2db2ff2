"""Training objectives: named loss terms that the loop sums without knowing what they mean."""

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
    """Maps a batch and the student's outputs to weighted terms, each a scalar mean over the batch."""

    @property
    def maps(self) -> bool:
        """Whether it needs the student's feature maps."""

    @property
    def trainable(self) -> nn.Module | None:
        """Its own layers, trained beside the student; a resumed training needs their state too."""

    @property
    def apart(self) -> bool:
        """Whether these layers are independent networks, each clipped to its own gradient norm, rather than part of the student."""

    def __call__(self, batch: Batch, student: Outputs) -> dict[str, Tensor]:
        """Return the terms whose sum is minimised."""


@dataclass(frozen=True, eq=False)
class Deferred:
    """Class weights ``(K,)`` that multiply any loss from a given epoch on.

    References:
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS 2019.
    """

    weights: Tensor
    epoch: int


class OnLabels:
    """A loss on labels, with deferred weights and, for mixed samples, two targets per sample."""

    def __init__(self, loss: Loss, deferred: Deferred | None = None) -> None:
        self.loss, self.deferred = loss, deferred

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """Return the mean over the batch."""
        if batch.mixed is None:
            return self._rows(logits, batch.labels, batch.epoch).mean()
        # Shares differ between samples, so they must be applied before the mean.
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
        """Return a single term, the loss."""
        return {"ce": self.loss(student.logits, batch)}


class Distilled:
    """``ce_weight`` x the loss on labels + ``kd_weight`` x the method's terms, with frozen teachers on the same view."""

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
        """Return the weighted loss on labels (the method's own, if it defines one) and the method's weighted terms."""
        terms = self.method.terms(batch, student, self.teacher(batch))
        if not self.method.own_loss:
            terms = {"ce": self.loss(student.logits, batch), **terms}
        return {name: (self.ce_weight if name == "ce" else self.kd_weight) * term for name, term in terms.items()}
