"""The contract of a distiller: a small class that returns named loss terms, declares its needs, and checks its hyper-parameters."""

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
    """Widths of a network's features, and of the feature maps of its stages (empty for a network without maps)."""

    features: int
    maps: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)  # == is not defined for tensors as a whole
class Facts:
    """Facts that a method may use before training.

    Attributes:
        counts: ``(K,)`` training samples per class, on the device of the training.
        share: ``(K,)`` share of each class in the student's epochs; the training prior when not given.
        classes: names of the classes.
        background: index of the class that is not a patient's label.
        teacher: its name, for messages.
        prior: ``(K,)`` class prior that the teacher's logits carry; None if it is unknown.
        reliability: ``(K,)`` recall of the teacher on patients it was not trained on.
        student_shape: widths of the student.
        teacher_shape: widths of the teacher; None for several teachers combined, which only return logits.
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
        name: its name in configurations.
        family: logits, features, relations, ...
        source: the publication.
        needs: of ``logits``, ``features`` or ``maps`` of the teacher, its ``prior`` or ``reliability``, and hard ``labels``.
        note: addition to the defaults in its table row.
        min_classes: the smallest number of classes for which it is valid.
        zero_at_equal: whether its terms are 0 for a student that equals its teacher.
        within_batch: whether it relates the samples of a batch to each other, so that its value depends on their combination; otherwise,
            its value is the mean over a batch's parts, weighted by their sizes.
        balances: whether it removes the training prior from its teacher's logits without knowing which prior they carry.
        own_loss: name of the loss on labels that it defines as the term ``ce``, and that remains without a teacher; empty if none.
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
        """The hyper-parameters that a configuration can set, by name."""
        return options_of(cls)

    @classmethod
    def wants(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The part of ``needs`` that applies with these options."""
        return cls.needs

    @classmethod
    def make(cls, facts: Facts, **options: Any) -> Self:
        """Build the method from facts and from options that differ from the defaults."""
        return cls(**options)

    @classmethod
    def carries(cls, counts: Tensor, options: Mapping[str, Any]) -> tuple[float, ...] | None:
        """The class prior that a student's logits will carry; None if it is a mixture of the labels' and the teacher's.

        Args:
            counts: ``(K,)`` training samples per class.
            options: options that differ from the defaults.
        """
        return None

    @classmethod
    def corrects(cls, options: Mapping[str, Any]) -> float:
        """Share of the teacher's carried prior that the method removes: 0 nothing, 1 all of it."""
        return 0.0

    @property
    def trainable(self) -> nn.Module | None:
        """Layers that are trained together with the student and then discarded."""
        return None

    @abstractmethod
    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return named scalars, each a mean over the batch; gradients reach the student only."""
