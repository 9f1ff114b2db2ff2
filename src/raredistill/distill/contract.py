"""What a distiller is: a small class that returns named terms, says what it needs, and checks its own hyper-parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from raredistill.losses import Choice, Option


@dataclass(frozen=True)
class Outputs:
    """What a network, or several that teach together, give for a batch.

    Attributes:
        logits: ``(N, K)``.
        features: ``(N, F)``, pooled, before the head.
        maps: of each stage ``(N, C, H, W)``, shallow to deep, where a method asks for them.
        log_prior: ``(K,)`` or ``(N, K)``, logarithm of the class prior that the logits carry; None when it is unknown.
    """

    logits: Tensor
    features: Tensor | None = None
    maps: tuple[Tensor, ...] = ()
    log_prior: Tensor | None = None


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
        needs: what it asks for: ``logits``, ``features`` or ``maps`` of the teacher, its ``prior`` or ``reliability``, hard ``labels``.
        min_classes: the fewest classes for which its signal is sound.
        zero_at_equal: it has nothing to teach a student that equals its teacher.
        within_batch: it relates the samples of a batch to each other, so its value depends on which come together; of others, the value
            is the mean of those of a batch's parts, weighted by their sizes.
        balances: it takes the training prior off its teacher without asking which prior that carries.
        own_loss: name of the loss on labels that it brings as the term ``ce``, and that is left of it without a teacher; empty if none.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    min_classes: ClassVar[int]
    zero_at_equal: ClassVar[bool]
    within_batch: ClassVar[bool]
    balances: ClassVar[bool]
    own_loss: ClassVar[str]

    @property
    def trainable(self) -> nn.Module | None:
        """What is trained beside the student, and thrown away with the method."""

    def terms(self, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Return named scalars, each a mean over the batch; gradients reach the student only."""


def not_negative(default: float, *, high: float = math.inf) -> Any:
    """A hyper-parameter of a method, at least 0."""
    return dataclasses.field(default=default, metadata={"option": Option(default, high=high)})


def above_zero(default: float, *, high: float = math.inf) -> Any:
    """A hyper-parameter of a method, above 0."""
    return dataclasses.field(default=default, metadata={"option": Option(default, high=high, closed=False)})


def choice(default: str, *others: str) -> Any:
    """A hyper-parameter of a method that takes one of a few values."""
    return dataclasses.field(default=default, metadata={"option": Choice(default, (default, *others))})


def switch(default: bool) -> Any:
    """A part of a method that can be turned off."""
    return dataclasses.field(default=default, metadata={"option": Choice(default, (True, False))})


class Checked:
    """Base of methods: the usual answers, and a hyper-parameter out of its range is refused when the method is made."""

    min_classes: ClassVar[int] = 2
    zero_at_equal: ClassVar[bool] = False
    within_batch: ClassVar[bool] = False
    balances: ClassVar[bool] = False
    own_loss: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, option in hyperparameters(type(self)).items():
            option.check(name, getattr(self, name))

    @classmethod
    def wants(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """What the method asks for with these options."""
        needs: tuple[str, ...] = cls.needs  # type: ignore[attr-defined]
        return needs

    @classmethod
    def make(cls, facts: Facts, **options: Any) -> Self:
        """Build the method from what is known and the options that differ from the defaults."""
        return cls(**options)

    @property
    def trainable(self) -> nn.Module | None:
        """Nothing, as a rule."""
        return None


def hyperparameters(method: Any) -> dict[str, Any]:
    """What a method lets a configuration set, by name: each checks a value and shows its default."""
    return {field.name: field.metadata["option"] for field in dataclasses.fields(method) if "option" in field.metadata}
