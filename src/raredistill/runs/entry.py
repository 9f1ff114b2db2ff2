"""One line of a study's grid: a network, its training and its teacher, with the rules on how they may be combined.

torch is not imported until an entry is constructed, so that mistakes in a configuration are reported immediately.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Interval, MinLen
from pydantic import BeforeValidator

from raredistill.declared import Declared, Name
from raredistill.errors import ConfigError
from raredistill.objects import name_of
from raredistill.training.settings import Settings

if TYPE_CHECKING:
    from raredistill.distill.contract import Method


@dataclass(frozen=True)
class External(Declared):
    """A teacher trained elsewhere.

    Attributes:
        weights: a checkpoint of raredistill, or a bare safetensors file; the latter needs the fields below.
        model: name of its network.
        classes: in the order of its logits.
        channels: in the order of its input.
        mean: mean of its normalisation, one value per channel.
        std: standard deviation of its normalisation, one value per channel.
        image_size: side in pixels that it was built for.
        training_patients: a text file with one patient per line.
        external: whether it was trained on none of this cohort's patients; the report notes that this is the user's statement.
        prior: class shares that its logits carry, if its file does not state them: those of its training samples, after plain
            cross-entropy.
    """

    weights: Path
    model: str = ""
    classes: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    image_size: int = 0
    training_patients: Path | None = None
    external: bool = False
    prior: tuple[float, ...] = ()

    @property
    def called(self) -> str:
        """Prefix of messages about this teacher."""
        return f"{self.weights}: "

    def conflicts(self) -> list[str]:
        """Messages on fields that bare weights need."""
        described = self.classes and self.channels and self.image_size
        lacking = "a teacher given as bare weights needs model, classes, channels and image_size"
        return [lacking] if self.model and not described else []


def _given(channels: Any) -> Any:
    return () if channels is None else channels


def _switch(value: Any) -> Any:
    """Parse a boolean option: YAML's yes and no arrive as strings, because they may be class names."""
    return {"yes": True, "no": False, "on": True, "off": False}.get(value.lower(), value) if isinstance(value, str) else value


Channels = Annotated[tuple[str, ...], BeforeValidator(_given)]
Weight = Annotated[float, Ge(0)]


@dataclass(frozen=True)
class Entry(Declared):
    """One line of the grid: a network, its training, and its teacher.

    Attributes:
        name: unique in the study.
        model: name of the network; from Python also a module with features ``(N, F)``, or a function from channels to one.
        channels: channels of its input, in order; those of the study when empty.
        settings: training settings; in a configuration, ``training`` lists the differences from the study's.
        pretrained: no, timm's hub, or a local safetensors file.
        mean: normalisation of local weights if it differs from timm's values for that network; together with ``std``.
        std: see ``mean``.
        head: ``linear``, ``thesis`` or ``cosine``.
        dropout: dropout rate before the classifier.
        teacher: another entry's name, several names (their probabilities are averaged), an external teacher, or none.
        cross_fit: train this many copies of the teacher, each without one part of the training patients, which it then teaches; 0 for
            one teacher trained on all of them.
        online: the teacher learns beside the student, ``one_way`` or ``mutual`` (from the student, too); ``no`` for a trained teacher.
        method: distiller, when there is a teacher: its name, or from Python its class or function.
        method_options: its hyper-parameters.
        ce_weight: weight of the supervised loss, if there is a teacher.
        kd_weight: weight of the distillation terms.

    Raises:
        ConfigError: a field has a wrong value, or two of them contradict each other.
    """

    name: Annotated[Name, MinLen(1)]
    model: Annotated[str, BeforeValidator(name_of("network"))]
    channels: Channels = ()
    settings: Settings = field(default_factory=Settings)
    pretrained: Annotated[bool | Path, BeforeValidator(_switch)] = False
    mean: float | None = None
    std: float | None = None
    head: Literal["linear", "thesis", "cosine"] = "linear"
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    teacher: str | Annotated[tuple[str, ...], MinLen(2)] | External | None = None
    cross_fit: Annotated[int, Interval(ge=2, le=20)] | Literal[0] = 0
    online: Literal["no", "one_way", "mutual"] = "no"
    method: Annotated[str, BeforeValidator(name_of("distiller"))] = "kd"
    method_options: dict[str, Any] = field(default_factory=dict)
    ce_weight: Weight = 1.0
    kd_weight: Weight = 1.0

    @property
    def called(self) -> str:
        """Prefix of messages about this entry."""
        return f"runs {self.name}: "

    @property
    def teachers(self) -> tuple[str, ...]:
        """Names of the entries that teach it."""
        if isinstance(self.teacher, str):
            return (self.teacher,)
        return self.teacher if isinstance(self.teacher, tuple) else ()

    @property
    def teacher_name(self) -> str:
        """Its teacher's name in reports and messages; empty without one."""
        if isinstance(self.teacher, External):
            return self.teacher.weights.stem
        return " + ".join(self.teachers)

    @property
    def method_class(self) -> type[Method]:
        """The class of its distiller.

        Raises:
            ConfigError: the method or one of its options is unknown.
        """
        from raredistill.distill.registry import method_class

        try:
            return method_class(self.method, self.method_options)
        except ConfigError as error:
            raise ConfigError(f"{self.called}{error}") from None

    @property
    def wants(self) -> tuple[str, ...]:
        """What its method needs of a teacher: ``logits``, ``features``, ``maps``, ``labels``, ``prior``, ``reliability``.

        Raises:
            ConfigError: the method or one of its options is unknown.
        """
        return () if self.teacher is None else self.method_class.wants(self.method_options)

    def conflicts(self) -> list[str]:
        """Messages on combinations of network, settings and teacher that are not possible."""
        method = None if self.teacher is None else self.method_class
        held = {**_head_conflicts(self), **_speed_conflicts(self, method), **_teaching_conflicts(self, method)}
        return [message for message, wrong in held.items() if wrong]


def _head_conflicts(entry: Entry) -> dict[str, bool]:
    """Possible conflicts of the head with the loss or a second stage: each message, and whether it applies."""
    from raredistill.losses import named_loss

    settings, corrected = entry.settings, ""
    head = named_loss(settings.loss, settings.loss_options).head or entry.head
    if settings.stage == "logit_adjustment":
        corrected = _corrected(entry)
    return {
        f"loss {settings.loss} needs cosines, but head is not cosine: set head: cosine": head != entry.head,
        f"stage {settings.stage} changes a linear classifier, but head is cosine": settings.stage != "none" and entry.head == "cosine",
        f"stage logit_adjustment removes the training prior, but {corrected} already does so; use stage: none": bool(corrected),
    }


def _speed_conflicts(entry: Entry, method: type[Method] | None) -> dict[str, bool]:
    """Possible conflicts of the method with a teacher cache, compiling and several devices."""
    settings, wants = entry.settings, entry.wants
    return {
        f"compile: {settings.compile} compiles whole bodies, but method {entry.method} needs their inner feature maps; use compile: none": (
            settings.compile != "none" and "maps" in wants
        ),
        f"teacher_cache keeps logits and pooled features, but method {entry.method} compares feature maps; leave teacher_cache out": (
            settings.teacher_cache is not None and "maps" in wants
        ),
        f"teacher_cache keeps outputs of a trained teacher, but online: {entry.online} trains it together with the student": (
            settings.teacher_cache is not None and entry.online != "no"
        ),
        f"method {entry.method} relates the samples of a batch to each other, but devices: {settings.devices} divides it; set devices: 1": (
            settings.devices > 1 and method is not None and method.within_batch
        ),
    }


def _teaching_conflicts(entry: Entry, method: type[Method] | None) -> dict[str, bool]:
    """Possible conflicts of the method, its teachers and mixed samples."""
    settings, wants = entry.settings, entry.wants
    own = ["the only loss on labels"] if method is not None and method.own_loss else []
    mixing = settings.mixing != "none"
    return {
        "cross_fit makes copies of a teacher, but it has none; name one with teacher:": bool(entry.cross_fit) and entry.teacher is None,
        f"method {entry.method} brings its own loss on labels, but loss is {settings.loss}; leave loss at cross_entropy": (
            method is not None and bool(method.own_loss) and (settings.loss, settings.deferred) != ("cross_entropy", "none")
        ),
        f"method {entry.method} uses labels, but mixing: {settings.mixing} gives each sample two; use kd or mixing: none": (
            mixing and "labels" in wants
        ),
        f"cross_fit hides patients from their teachers, but mixing: {settings.mixing} mixes patients; use mixing: none": (
            mixing and bool(entry.cross_fit)
        ),
        f"online: {entry.online} trains entries of this study together with the student; name one or more with teacher:": (
            entry.online != "no" and not entry.teachers
        ),
        f"online: {entry.online} compares logits of networks in training, but method {entry.method} needs {', '.join([*wants, *own])}": (
            entry.online != "no" and (not set(wants) <= {"logits", "labels"} or (method is not None and bool(method.own_loss)))
        ),
        f"online: {entry.online} has no trained teacher to copy, but cross_fit is {entry.cross_fit}": (
            entry.online != "no" and bool(entry.cross_fit)
        ),
        "cross_fit needs one teacher of this study": bool(entry.cross_fit) and entry.teacher is not None and len(entry.teachers) != 1,
    }


def _corrected(entry: Entry) -> str:
    """What removes the training prior from the logits during training, for a message; empty if nothing is known to."""
    import torch

    from raredistill.losses import carried_prior

    settings, counts = entry.settings, torch.tensor([1.0, 2.0])
    if entry.teacher is not None:
        return f"method {entry.method}" if entry.method_class.carries(counts, entry.method_options) is not None else ""
    carried = carried_prior(settings.loss, counts=counts, sampler=settings.sampler, deferred=settings.deferred, **settings.loss_options)
    if carried is None or settings.mixing != "none" or abs(carried[0] - 1 / 3) < 1e-6:
        return ""
    return f"loss {settings.loss} with sampler {settings.sampler}"
