"""What a distiller is: a small class that returns named terms, and checks its own hyper-parameters."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from raredistill.losses import Option


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


def not_negative(default: float, *, high: float = math.inf) -> Any:
    """A hyper-parameter of a method, at least 0."""
    return dataclasses.field(default=default, metadata={"option": Option(default, high=high)})


def above_zero(default: float, *, high: float = math.inf) -> Any:
    """A hyper-parameter of a method, above 0."""
    return dataclasses.field(default=default, metadata={"option": Option(default, high=high, closed=False)})


class Checked:
    """Base of methods: a hyper-parameter out of its range is refused when the method is made."""

    def __post_init__(self) -> None:
        for name, option in hyperparameters(type(self)).items():
            option.check(name, getattr(self, name))


def hyperparameters(method: Any) -> dict[str, Option]:
    """What a method lets a configuration set, by name."""
    return {field.name: field.metadata["option"] for field in dataclasses.fields(method) if "option" in field.metadata}
