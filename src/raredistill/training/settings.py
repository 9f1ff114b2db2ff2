"""Training settings, with the defaults that a careful practitioner would choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

from annotated_types import Ge, Gt, Interval, Le
from pydantic import BeforeValidator

from raredistill.declared import Declared
from raredistill.errors import ConfigError
from raredistill.objects import name_of
from raredistill.views import PRESETS, Augmentation, from_preset

Share = Annotated[float, Interval(ge=0, lt=1)]
Positive = Annotated[float, Gt(0)]
Count = Annotated[int, Ge(1)]
Preset = Literal["none", "default", "thesis", "cifar"]
Metric = Literal["macro_f1", "balanced_accuracy", "accuracy", "loss", "last"]


@dataclass(frozen=True)
class TeacherCache(Declared):
    """Number of random views per sample that training cycles through, so that a teacher runs only once on each."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    views: Count


def _cache(value: Any) -> Any:
    key, sign, number = value.partition("=") if isinstance(value, str) else ("", "", "")
    return {key.strip(): number.strip()} if sign else value


@dataclass(frozen=True)
class Settings(Declared):
    """Training settings of a network.

    Attributes:
        epochs: passes over the training part.
        batch_size: samples per step, over all devices.
        optimizer: ``adam`` (coupled L2), ``adamw`` (decoupled) or ``sgd`` (with ``momentum``).
        learning_rate: the rate after warm-up.
        weight_decay: strength on weights; ``bias_weight_decay`` on biases (the same when not given).
        schedule: ``constant``, ``step`` (times ``factor`` every ``step_epochs``), ``multistep`` (at ``milestones``), ``cosine`` (to 0) or
            ``plateau`` (times ``factor`` when ``select`` has not improved on validation for more than ``step_epochs``).
        warmup_epochs: epochs over which the rate rises linearly from 0.
        clip_norm: largest gradient norm of each network in training; none when not given.
        ema_decay: decay of an exponential moving average of the weights, which is then evaluated; none when not given.
        average_epochs: evaluate the mean of the weights at the ends of the last so many epochs; the weights as they are when not given.
        select: the validation metric that chooses the best checkpoint; ``last`` takes the last epoch, as does a split without validation.
        patience: stop after this many epochs without improvement; never when not given.
        sampler: order of samples: ``natural``, ``sqrt``, ``balanced`` or ``progressive``.
        augmentation: a preset, ``none``, ``default``, ``thesis`` or ``cifar`` (crops after padding by 4, and flips), or strengths by
            name, ``{preset: default, rotation: 10, steps: [...]}``; see :class:`raredistill.views.Augmentation`.
        mixing: mixing of each sample with a partner: ``none``, ``mixup`` or ``remix``.
        loss: name of the supervised loss; ``loss_options`` are its hyper-parameters.
        deferred: class weights on any loss from ``deferred_epoch`` on: ``none``, ``inverse``, ``sqrt`` or ``effective``.
        sam_rho: radius of sharpness-aware minimisation (two passes per step); plain steps when not given.
        stage: second stage of the trained classifier: ``none``, ``crt`` (re-training on balanced classes), ``lws`` (learnt scale of each
            class), ``tau_norm`` or ``logit_adjustment`` (tau of both chosen on validation by ``select``, or macro F1).
        stage_epochs: epochs of ``crt`` and ``lws``.
        precision: ``32-true`` or ``bf16-mixed`` (Lightning Fabric's names).
        accelerator: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        compile: ``none``, ``default`` (torch.compile of the student's and the teachers' bodies: half a minute to two minutes per network,
            then 0.75 to 1.05 times the time of a step on a CPU) or ``reduce-overhead`` (with CUDA graphs, for small networks on a GPU).
        devices: GPUs that train one network together, each a part of every batch; with ``accelerator: cpu``, processes.
        residence: whether pixels stay on the device: ``auto``, ``resident`` or ``streamed``.
        teacher_cache: ``views=V``: cycle through V random views instead of a new one each epoch, and cache the teachers' outputs; a run
            without a teacher cycles too, so that it stays a fair control.

    Raises:
        ConfigError: a field has a wrong value, the loss or one of its options is unknown, or two fields contradict each other.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    epochs: Count = 50
    batch_size: Count = 64
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    learning_rate: Positive = 3e-4
    weight_decay: Annotated[float, Ge(0)] = 0.01
    bias_weight_decay: Annotated[float, Ge(0)] | None = None
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    schedule: Literal["constant", "step", "multistep", "cosine", "plateau"] = "cosine"
    step_epochs: Count = 10
    factor: Annotated[float, Gt(0), Le(1)] = 0.1
    milestones: tuple[int, ...] = ()
    warmup_epochs: Annotated[float, Ge(0)] = 0.0
    clip_norm: Positive | None = None
    ema_decay: Annotated[float, Gt(0), Interval(lt=1)] | None = None
    average_epochs: Count | None = None
    select: Metric = "macro_f1"
    patience: Count | None = None
    sampler: Literal["natural", "sqrt", "balanced", "progressive"] = "natural"
    augmentation: Preset | Annotated[Augmentation, BeforeValidator(from_preset)] = "default"
    mixing: Literal["none", "mixup", "remix"] = "none"
    loss: Annotated[str, BeforeValidator(name_of("loss"))] = "cross_entropy"
    loss_options: dict[str, Any] = field(default_factory=dict)
    deferred: Literal["none", "inverse", "sqrt", "effective"] = "none"
    deferred_epoch: Annotated[int, Ge(0)] = 0
    sam_rho: Positive | None = None
    stage: Literal["none", "crt", "lws", "tau_norm", "logit_adjustment"] = "none"
    stage_epochs: Count = 10
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    compile: Literal["none", "default", "reduce-overhead"] = "none"
    devices: Count = 1
    residence: Literal["auto", "resident", "streamed"] = "auto"
    teacher_cache: Annotated[TeacherCache | None, BeforeValidator(_cache)] = None

    def conflicts(self) -> list[str]:
        """Messages on settings that contradict each other: loss and class weights, teacher cache, compiling, several devices."""
        held = {**_loss_conflicts(self), **_speed_conflicts(self)}
        return [message for message, wrong in held.items() if wrong]

    @property
    def strengths(self) -> Augmentation | None:
        """Strengths of augmentation; None if nothing is random."""
        return self.augmentation if isinstance(self.augmentation, Augmentation) else PRESETS[self.augmentation]

    @property
    def views(self) -> int | None:
        """Number of views that training cycles through: one if nothing is random, None for a new view each epoch."""
        if self.teacher_cache is None:
            return None
        return 1 if self.strengths is None else min(self.teacher_cache.views, self.epochs)

    @property
    def recipe(self) -> str:
        """The loss and all settings that reweight classes, as named in reports: baselines with the same recipe differ in network only."""
        options = ", ".join(f"{name}={value}" for name, value in sorted(self.loss_options.items()))
        begin = f" from epoch {self.deferred_epoch}" if self.deferred_epoch else ""
        extras = {
            f"deferred {self.deferred}{begin}": self.deferred != "none",
            f"{self.sampler} sampling": self.sampler != "natural",
            self.mixing: self.mixing != "none",
            "sam": self.sam_rho is not None,
            f"{self.views} views": self.views is not None,
            self.stage: self.stage != "none",
        }
        return ", ".join([f"{self.loss} ({options})" if options else self.loss, *(extra for extra, given in extras.items() if given)])


def _loss_conflicts(settings: Settings) -> dict[str, bool]:
    """Possible conflicts of the loss: each message, and whether it applies."""
    from raredistill.losses import named_loss

    try:
        loss = named_loss(settings.loss, settings.loss_options)
    except ConfigError as error:
        return {str(error): True}
    return {
        f"deferred: {settings.deferred} weights classes, but loss {settings.loss} already does; use cross_entropy or deferred: none": (
            settings.deferred != "none" and loss.weighs
        ),
    }


def _speed_conflicts(settings: Settings) -> dict[str, bool]:
    """Possible conflicts of averages, teacher cache, compiling and several devices: each message, and whether it applies."""
    several = settings.devices > 1
    return {
        "ema_decay and average_epochs are two averages of the weights; set one of them": (
            settings.ema_decay is not None and settings.average_epochs is not None
        ),
        f"teacher_cache keeps a teacher's outputs for each sample's views, but mixing: {settings.mixing} combines two samples into one": (
            settings.teacher_cache is not None and settings.mixing != "none"
        ),
        f"compile: {settings.compile} is for one device, but devices: {settings.devices}; use compile: none": (
            settings.compile != "none" and several
        ),
        f"devices: {settings.devices} cannot share a batch of {settings.batch_size}; set fewer devices or another batch_size": (
            settings.devices > settings.batch_size
        ),
        f"devices: {settings.devices}, but accelerator: mps is one device; set devices: 1": several and settings.accelerator == "mps",
    }


def choices_table() -> list[dict[str, str]]:
    """Rows that ``raredistill methods`` prints besides losses and distillers: every setting with named choices."""
    hints = get_type_hints(Settings)
    chosen = ("sampler", "mixing", "deferred", "stage", "optimizer")
    rows = [{"setting": f"training.{name}", "one of": ", ".join(get_args(hints[name]))} for name in chosen]
    return [*rows, {"setting": "training.augmentation", "one of": f"{', '.join(PRESETS)}, or strengths by name"}]
