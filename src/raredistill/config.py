"""The configuration of a study: one YAML file and ``key=value``, checked whole, every mistake told at once."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Interval, MinLen
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from raredistill.cohort.store import MASK, Cohort
from raredistill.distill.consistent import taught_prior
from raredistill.distill.contract import Shape
from raredistill.distill.registry import make_method, method_class
from raredistill.errors import ConfigError
from raredistill.files import fingerprint, parse_yaml
from raredistill.losses import carried_prior, make_loss
from raredistill.models import facts, widths
from raredistill.splits import Split, make_splits
from raredistill.study.plan import Entry, External
from raredistill.study.run import Study
from raredistill.study.teachers import check_external, expected_facts, network_of, patients_before
from raredistill.training.optimizers import check_schedule
from raredistill.training.settings import Settings


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)  # classes may be called 0 and 1


class SourceConfig(_Strict):
    """Raw data that the study prepares into ``OUT/cohort`` first."""

    source: str
    path: Path
    size: Annotated[int, Interval(ge=8, le=1024)] = 224
    options: dict[str, Any] = {}
    leave_out_bad: bool = False


class SplitConfig(_Strict):
    """How patients are divided; see ``raredistill.splits.make_splits``."""

    protocol: Literal["outer", "holdout", "given"] = "outer"
    folds: Annotated[int, Ge(2)] = 5
    repeats: Annotated[int, Ge(1)] = 1
    validation_share: Annotated[float, Interval(gt=0, lt=1)] = 0.2
    test_share: Annotated[float, Interval(gt=0, lt=1)] = 0.3
    seed: int = 0
    rarefy: dict[str, Annotated[float, Interval(gt=0, le=1)]] = {}
    truncate_validation: bool = False


class ExternalConfig(_Strict):
    """A teacher trained elsewhere; see ``raredistill.study.plan.External``."""

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


class RunConfig(_Strict):
    """One line of the grid. ``training`` overrides the study's settings for this entry."""

    name: Annotated[str, MinLen(1)]
    model: str
    pretrained: bool | Path = False
    mean: float | None = None
    std: float | None = None
    head: Literal["linear", "thesis", "cosine"] = "linear"
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    channels: tuple[str, ...] | None = None
    teacher: str | Annotated[tuple[str, ...], MinLen(2)] | ExternalConfig | None = None
    cross_fit: Annotated[int, Interval(ge=2, le=20)] | Literal[0] = 0
    online: Literal["no", "one_way", "mutual"] = "no"
    method: str = "kd"
    method_options: dict[str, Any] = {}
    ce_weight: Annotated[float, Ge(0)] = 1.0
    kd_weight: Annotated[float, Ge(0)] = 1.0
    training: dict[str, Any] = {}


_CHOICES = ("SourceConfig", "ExternalConfig")
"""Mappings that may stand where a plain word may stand too."""


class StudyConfig(_Strict):
    """A study: which data, which splits, how to train, and a grid of runs."""

    name: str
    cohort: Path | SourceConfig
    channels: tuple[str, ...] | None = None
    splits: SplitConfig = SplitConfig()
    seeds: Annotated[tuple[int, ...], MinLen(1)] = (0,)
    training: dict[str, Any] = {}
    runs: Annotated[tuple[RunConfig, ...], MinLen(1)]


def load_config(path: Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study's YAML and apply ``key=value`` overrides such as ``training.epochs=5`` or ``runs.0.model=resnet50``.

    Raises:
        ConfigError: the file cannot be read, or keys or values are wrong; every mistake is listed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a study is a mapping of keys such as name, cohort and runs")
    for override in overrides:
        _override(raw, override)
    return _checked(raw, path)


def _override(raw: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign:
        raise ConfigError(f"{override}: write an override as key=value, for instance training.epochs=5")
    *parents, last = key.split(".")
    place: Any = raw
    try:
        for parent in parents:
            place = place[int(parent)] if isinstance(place, list) else place.setdefault(parent, {})
        place[int(last) if isinstance(place, list) else last] = parse_yaml(text, override)
    except (ValueError, IndexError, AttributeError, TypeError):
        raise ConfigError(f"{override}: the configuration has no place {key}; lists are counted from 0, as in runs.0.model") from None


def _checked(raw: dict[str, Any], path: Path) -> StudyConfig:
    mistakes: list[str] = []
    try:
        config = StudyConfig.model_validate(raw)
    except ValidationError as error:
        mistakes += _mistakes(error, StudyConfig)
    for where, training in _trainings(raw):
        try:
            TypeAdapter(Settings).validate_python(training)
        except ValidationError as error:
            mistakes += [f"{where}{mistake}" for mistake in _mistakes(error, Settings)]
    if mistakes:
        raise ConfigError(f"{path}:\n" + "\n".join(f"  - {mistake}" for mistake in mistakes))
    return config


def _trainings(raw: dict[str, Any]) -> list[tuple[str, Any]]:
    own = [("training.", raw["training"])] if isinstance(raw.get("training"), dict) else []
    runs = raw["runs"] if isinstance(raw.get("runs"), list) else []
    given = [(f"runs.{n}.training.", run.get("training")) for n, run in enumerate(runs) if isinstance(run, dict)]
    return own + [(where, training) for where, training in given if isinstance(training, dict)]


def _mistakes(error: ValidationError, model: Any) -> list[str]:
    return [_mistake(item, model) for item in map(dict, error.errors()) if not _is_noise(item)]


def _is_noise(item: dict[str, Any]) -> bool:
    """What pydantic adds without telling more: the other branches of a choice between types, and a list whose members are wrong."""
    if item["type"] == "too_short":
        return bool(item["input"])
    if item["type"] == "tuple_type" and _several(item["loc"][-1]):
        return True
    return isinstance(item["input"], dict) if _scalar(item["loc"][-1]) else item["loc"][-1] in _CHOICES


def _scalar(part: int | str) -> bool:
    return part == "str" or str(part).startswith("lax-or-strict")


def _several(part: int | str) -> bool:
    return str(part).startswith("tuple[")


def _mistake(item: dict[str, Any], model: Any) -> str:
    where = ".".join(str(part) for part in item["loc"] if part not in _CHOICES and not _scalar(part) and not _several(part))
    if item["type"] not in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where}: {item['msg'].lower()} (it is {item['input']!r:.60})"
    known = _known_keys(model, item["loc"])
    close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
    return f"{where}: unknown key; " + (f"did you mean {close[0]}?" if close else f"the keys are {', '.join(known)}")


def _known_keys(model: Any, place: tuple[int | str, ...]) -> list[str]:
    if model is Settings:
        return list(Settings.__dataclass_fields__)
    inner: dict[str, type[BaseModel]] = {
        "splits": SplitConfig,
        "runs": RunConfig,
        "SourceConfig": SourceConfig,
        "ExternalConfig": ExternalConfig,
    }
    chosen = next((inner[str(part)] for part in reversed(place[:-1]) if str(part) in inner), StudyConfig)
    return list(chosen.model_fields)


def make_study(config: StudyConfig, cohort: Cohort, command: str) -> Study:
    """Turn a configuration and its cohort into a study.

    Raises:
        ConfigError: a channel, class or model is unknown.
        SplitError: the patients cannot be divided as asked.
    """
    splits = make_splits(cohort, **config.splits.model_dump())
    entries = [_entry(run, config, cohort) for run in config.runs]
    for entry in entries:
        _check(entry, entries, cohort, splits)
        for split in splits:
            check_schedule(entry.settings, validated=len(split.validation) > 0)
            patients_before(entry, cohort, split)
    plain = config.model_dump(mode="json")
    return Study(config.name, cohort, splits, entries, config.seeds, config.splits.protocol, plain, command)


def _entry(run: RunConfig, config: StudyConfig, cohort: Cohort) -> Entry:
    channels = run.channels or config.channels or [channel for channel in cohort.channels if channel != MASK]
    if unknown := [channel for channel in channels if channel not in cohort.channels]:
        raise ConfigError(f"runs {run.name}: the cohort has no channel {unknown[0]}; it has {', '.join(cohort.channels)}")
    settings = TypeAdapter(Settings).validate_python({**config.training, **run.training})
    taken = run.model_dump(exclude={"training", "channels", "teacher"})
    return Entry(**taken, channels=tuple(channels), settings=settings, teacher=_teacher(run.teacher))


def _check(entry: Entry, entries: Sequence[Entry], cohort: Cohort, splits: Sequence[Split]) -> None:
    # Everything that a name can get wrong is found before the first run, not hours later.
    counts, settings = torch.ones(len(cohort.classes)), entry.settings
    facts(entry.model, channels=len(entry.channels), classes=len(cohort.classes), image_size=cohort.size[0], head=entry.head)
    make_loss(settings.loss, counts=counts, **settings.loss_options)
    _check_together(entry)
    if entry.teacher is not None:
        _check_teaching(entry, [each for each in entries if each.name in entry.teachers], cohort, splits)
    elif entry.cross_fit:
        raise ConfigError(f"runs {entry.name}: cross_fit makes copies of a teacher, but it has none; name one with teacher:")
    if entry.pretrained:
        network_of(entry, cohort)


def _check_teaching(entry: Entry, teachers: Sequence[Entry], cohort: Cohort, splits: Sequence[Split]) -> None:
    if len(teachers) != len(entry.teachers):
        return  # the plan names a teacher that does not exist
    shapes = [Shape(*widths(e.model, channels=len(e.channels), image_size=cohort.size[0])) for e in (entry, *teachers)]
    if isinstance(entry.teacher, External):
        check_external(entry.teacher, cohort, splits)
        shapes *= 2
    for split in splits:
        facts_of = expected_facts(entry, teachers, cohort, split, shapes if len(shapes) == 2 else shapes[:1])
        try:
            method = make_method(entry.method, facts_of, **entry.method_options)
        except ConfigError as error:
            raise ConfigError(f"runs {entry.name}: {error}") from None
        if entry.settings.devices > 1 and method.trainable is not None and any(True for _ in method.trainable.buffers()):
            raise ConfigError(f"runs {entry.name}: method {entry.method} keeps what it sees of whole batches; set devices: 1")


def _check_together(entry: Entry) -> None:
    method = None if entry.teacher is None else method_class(entry.method, entry.method_options)
    refused = {**_loss_conflicts(entry), **_speed_conflicts(entry, method), **_teaching_conflicts(entry, method)}
    if found := [message for message, wrong in refused.items() if wrong]:
        raise ConfigError(f"runs {entry.name}: {'; '.join(found)}")


def _loss_conflicts(entry: Entry) -> dict[str, bool]:
    """What a loss, its weights and a second stage cannot do together; each message with whether it holds."""
    settings = entry.settings
    return {
        "loss ldam needs cosines, but head is not cosine: set head: cosine": settings.loss == "ldam" and entry.head != "cosine",
        f"deferred: {settings.deferred} weighs classes that loss {settings.loss} weighs already; use cross_entropy or deferred: none": (
            settings.deferred != "none" and settings.loss in ("weighted_cross_entropy", "class_balanced_focal")
        ),
        f"stage {settings.stage} changes a linear classifier, but head is cosine": settings.stage != "none" and entry.head == "cosine",
        f"stage logit_adjustment takes the training prior off, but {_corrected(entry)} has done so already; use stage: none": (
            settings.stage == "logit_adjustment" and bool(_corrected(entry))
        ),
    }


def _speed_conflicts(entry: Entry, method: Any) -> dict[str, bool]:
    """What a teacher cache, compiling and several devices cannot do."""
    settings, needs = entry.settings, _needs(entry, method)
    return {
        f"teacher_cache keeps what a teacher says of each sample's views, but mixing: {settings.mixing} shows two samples in one": (
            settings.teacher_cache is not None and settings.mixing != "none"
        ),
        f"compile: {settings.compile} is for one device, but devices: {settings.devices}; use compile: none": (
            settings.compile != "none" and settings.devices > 1
        ),
        f"compile: {settings.compile} compiles bodies whole, but method {entry.method} looks into them; use compile: none": (
            settings.compile != "none" and "maps" in needs
        ),
        f"teacher_cache keeps logits and pooled features, but method {entry.method} compares feature maps; leave teacher_cache out": (
            settings.teacher_cache is not None and "maps" in needs
        ),
        f"teacher_cache keeps what a trained teacher says, but online: {entry.online} trains it beside the student": (
            settings.teacher_cache is not None and entry.online != "no"
        ),
        f"devices: {settings.devices} cannot share a batch of {settings.batch_size}; set fewer devices or another batch_size": (
            settings.devices > settings.batch_size
        ),
        f"devices: {settings.devices}, but accelerator: mps is one device; set devices: 1": (
            settings.devices > 1 and settings.accelerator == "mps"
        ),
        f"method {entry.method} relates the samples of a batch to each other, but devices: {settings.devices} divides it; set devices: 1": (
            settings.devices > 1 and method is not None and method.within_batch
        ),
    }


def _teaching_conflicts(entry: Entry, method: Any) -> dict[str, bool]:
    """What a method, its teachers and mixed samples cannot do together."""
    settings, needs = entry.settings, _needs(entry, method)
    own = ["the only loss on labels"] if method is not None and method.own_loss else []
    mixing = settings.mixing != "none"
    return {
        f"method {entry.method} brings its own loss on labels, but loss is {settings.loss}; leave loss at cross_entropy": (
            method is not None and bool(method.own_loss) and (settings.loss, settings.deferred) != ("cross_entropy", "none")
        ),
        f"method {entry.method} looks at labels, but mixing: {settings.mixing} gives each sample two; use kd or mixing: none": (
            mixing and "labels" in needs
        ),
        f"cross_fit keeps patients from their teachers, but mixing: {settings.mixing} mixes patients; use mixing: none": (
            mixing and bool(entry.cross_fit)
        ),
        f"online: {entry.online} trains entries of this study beside the student; name one or more with teacher:": (
            entry.online != "no" and not entry.teachers
        ),
        f"online: {entry.online} compares logits of networks in training, but method {entry.method} needs {', '.join([*needs, *own])}": (
            entry.online != "no" and (not set(needs) <= {"logits", "labels"} or (method is not None and bool(method.own_loss)))
        ),
        f"online: {entry.online} has no trained teacher to copy, but cross_fit is {entry.cross_fit}": (
            entry.online != "no" and bool(entry.cross_fit)
        ),
        "cross_fit needs one teacher of this study": bool(entry.cross_fit) and entry.teacher is not None and len(entry.teachers) != 1,
    }


def _needs(entry: Entry, method: Any) -> tuple[str, ...]:
    return () if method is None else method.wants(entry.method_options)


def _corrected(entry: Entry) -> str:
    """What takes the training prior off the logits during training, for a message; empty when nothing is known to."""
    settings, counts = entry.settings, torch.tensor([1.0, 2.0])
    if entry.teacher is not None:
        return f"method {entry.method}" if taught_prior(entry.method, counts, entry.method_options) is not None else ""
    carried = carried_prior(settings.loss, counts=counts, sampler=settings.sampler, deferred=settings.deferred, **settings.loss_options)
    if carried is None or settings.mixing != "none" or abs(carried[0] - 1 / 3) < 1e-6:
        return ""
    return f"loss {settings.loss} with sampler {settings.sampler}"


def _teacher(teacher: str | tuple[str, ...] | ExternalConfig | None) -> str | tuple[str, ...] | External | None:
    return External(**teacher.model_dump()) if isinstance(teacher, ExternalConfig) else teacher


def cohort_folder(config: StudyConfig, out: Path) -> Path:
    """Where the study's cohort is, or will be prepared: named by what determines it, so that a changed source is a new cohort."""
    if isinstance(config.cohort, Path):
        return config.cohort
    return out / f"cohort-{fingerprint(config.cohort.model_dump(mode='json'))[:8]}"
