"""What a distiller is: a small class that returns named terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """What a network gives for a batch: ``logits (N, K)`` and, where a method asks for them, ``features (N, F)``."""

    logits: Tensor
    features: Tensor | None = None


class Labelled(Protocol):
    """A batch, as far as a distiller looks at it."""

    @property
    def labels(self) -> Tensor:
        """``(N,)`` class indices."""


class Method(Protocol):
    """A distiller.

    Attributes:
        name: in configurations.
        family: logits, features, relations, ...
        source: the publication.
        needs: what it asks of the teacher.
        min_classes: the fewest classes for which its signal is sound.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[str]
    min_classes: ClassVar[int]

    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return named scalars, each a mean over the batch; gradients reach the student only."""
