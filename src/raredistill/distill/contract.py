"""The contract of a distiller: a small class that returns named terms, declares its needs, and checks its own hyper-parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from raredistill.options import Option, options_of
from raredistill.outputs import Outputs


@dataclass(frozen=True)
class Shape:
    """Width of a network's features, and of the feature maps of its stages (none for a network without maps)."""

    features: int
    maps: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)  # tensors have no one answer to ==
class Facts:
    """What a method may know before training.

    Attributes:
        counts: ``(K,)`` training samples per class, on the device of the training.
        share: ``(K,)`` how much of the student's epochs each class is; the training prior when not given.
        classes: their names.
        background: index of the class that no patient carries.
        teacher: its name, for messages.
        prior: ``(K,)`` that the teacher's logits carry; None when it is unknown.
        reliability: ``(K,)`` recall of the teacher on patients that it has not seen.
        student_shape: of the student's features.
        teacher_shape: of the teacher's; None when several teach together, which have logits only.
    """

    counts: Tensor
    share: Tensor | None = None
    classes: tuple[str, ...] = ()
    background: int | None = None
    teacher: str = "teacher"
    prior: Tensor | None = None
    reliability: Tensor | None = None
    student_shape: Shape | None = None
    teacher_shape: Shape | None = None


class Labelled(Protocol):
    """The part of a batch that a distiller reads."""

    @property
    def labels(self) -> Tensor:
        """``(N,)`` class indices."""


class Method(ABC):
    """A distiller: a frozen dataclass whose fields with defaults are its hyper-parameters, see :mod:`raredistill.options`.

    Attributes:
        name: in configurations.
        family: logits, features, relations, ...
        source: the publication.
        needs: of ``logits``, ``features`` or ``maps`` of the teacher, its ``prior`` or ``reliability``, and hard ``labels``.
        note: what its table row says beside the defaults.
        min_classes: the fewest classes for which its signal is sound.
        zero_at_equal: it has nothing to teach a student that equals its teacher.
        within_batch: it relates the samples of a batch to each other, so its value depends on which come together; of others, the value
            is the mean of those of a batch's parts, weighted by their sizes.
        balances: it takes the training prior off its teacher without asking which prior that carries.
        own_loss: name of the loss on labels that it brings as the term ``ce``, and that is left of it without a teacher; empty if none.
    """

    name: ClassVar[str]
    family: ClassVar[str] = ""
    source: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ("logits",)
    note: ClassVar[str] = ""
    min_classes: ClassVar[int] = 2
    zero_at_equal: ClassVar[bool] = False
    within_batch: ClassVar[bool] = False
    balances: ClassVar[bool] = False
    own_loss: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, option in self.options().items():
            option.check(name, getattr(self, name))

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The hyper-parameters that a configuration may set, by name."""
        return options_of(cls)

    @classmethod
    def wants(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The part of ``needs`` that remains with these options."""
        return cls.needs

    @classmethod
    def make(cls, facts: Facts, **options: Any) -> Self:
        """Build the method from what is known and the options that differ from the defaults."""
        return cls(**options)

    @classmethod
    def carries(cls, counts: Tensor, options: Mapping[str, Any]) -> tuple[float, ...] | None:
        """The class prior that a taught student's logits carry; None where it mixes the labels' and the teacher's.

        Args:
            counts: ``(K,)`` training samples per class.
            options: that differ from the defaults.
        """
        return None

    @classmethod
    def corrects(cls, options: Mapping[str, Any]) -> float:
        """How much of the prior that a teacher's logits carry the method takes off them: 0 nothing, 1 all of it."""
        return 0.0

    @property
    def trainable(self) -> nn.Module | None:
        """Layers that are trained beside the student, and thrown away with the method."""
        return None

    @abstractmethod
    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return named scalars, each a mean over the batch; gradients reach the student only."""
