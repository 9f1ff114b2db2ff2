"""The registry of distillers by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch
from torch import Tensor

from raredistill.distill.consistent import PCKD
from raredistill.distill.contract import Facts, Labelled, Method
from raredistill.distill.features import CBD, CRD, RKD, AttentionTransfer, FitNet
from raredistill.distill.imbalance import LTKD, SSD, XERM, ReliableKD
from raredistill.distill.logits import BKD, DIST, DKD, KD, DiVE, StandardisedKD
from raredistill.errors import ConfigError
from raredistill.options import check_options, defaults_of, did_you_mean, options_of, show_defaults
from raredistill.outputs import Outputs
from raredistill.plugins import HINT, Plugin, Registry

BUILT_IN: dict[str, type[Method]] = {
    method.name: method
    for method in (
        KD, StandardisedKD, DKD, DIST, FitNet, AttentionTransfer, RKD, CRD, BKD, DiVE, LTKD, XERM, CBD, SSD, ReliableKD, PCKD,
    )
}  # fmt: skip


def _adopt(plugin: Plugin) -> type[Method]:
    """The class of a plug-in's distiller; a plain function becomes the single term of a class.

    Raises:
        ConfigError: the class is not a :class:`Method`, or is incomplete.
    """
    thing = plugin.thing
    if not isinstance(thing, type):
        return _from_function(plugin)
    if not issubclass(thing, Method) or inspect.isabstract(thing) or not dataclasses.is_dataclass(thing):
        raise ConfigError(f"the distiller {plugin.name} must be a frozen dataclass on raredistill.distill.Method that has terms()")
    thing.name = plugin.name
    thing.options()  # read its annotations now, not in the first run
    return thing


def _from_function(plugin: Plugin) -> type[Method]:
    function, options = plugin.thing, options_of(plugin.thing)
    given = list(inspect.signature(function).parameters)
    hints = get_type_hints(function, include_extras=True)
    labelled = "labels" in given
    if given[:2] != ["student", "teacher"]:
        raise ConfigError(
            f"the distiller {plugin.name} takes {given[:3]}; a function takes student, teacher, labels where needed, and options"
        )

    def terms(self: Any, batch: Labelled, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        chosen = {name: getattr(self, name) for name in options}
        return {plugin.name: function(student, teacher, **({"labels": batch.labels} if labelled else {}), **chosen)}

    facts = {"name": plugin.name, "family": "plug-in", "source": plugin.place, **plugin.facts}
    if "needs" not in facts:
        facts["needs"] = ("logits", "labels") if labelled else ("logits",)
    fields = [(name, hints[name], dataclasses.field(default=value)) for name, value in defaults_of(function).items()]
    made: type[Method] = dataclasses.make_dataclass(plugin.name, fields, bases=(Method,), frozen=True, namespace={**facts, "terms": terms})
    return made


METHODS: Registry[type[Method]] = Registry("distiller", BUILT_IN, _adopt)
"""All distillers that a configuration can name."""


def make_method(name: str, facts: Facts, **options: Any) -> Method:
    """Build a distiller.

    Args:
        name: name of the method, as listed by ``raredistill methods``.
        facts: facts about the classes, the student and the teacher.
        options: hyper-parameters that differ from the published defaults.

    Raises:
        ConfigError: the name or an option is unknown, a value is out of range, the method is not valid for so few classes, or the
            teacher does not provide what it needs.
    """
    family = method_class(name, options)
    if len(facts.counts) < family.min_classes:
        raise ConfigError(f"method {name} carries no sound signal for {len(facts.counts)} classes (at least {family.min_classes}); use kd")
    try:
        _check_teacher(family, facts, options)
        return family.make(facts, **options)
    except ValueError as error:
        raise ConfigError(f"method {name}: {error}") from None


def method_class(name: str, options: Mapping[str, Any]) -> type[Method]:
    """Look up the class of a distiller, and check its options.

    Raises:
        ConfigError: the name or an option is unknown, or a value is out of range.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown method {name}{did_you_mean(name, METHODS)}; raredistill methods lists them, {HINT}")
    check_options(f"method {name}", options, METHODS[name].options())
    return METHODS[name]


def _check_teacher(family: type[Method], facts: Facts, options: Mapping[str, Any]) -> None:
    wants = family.wants(options)
    if "prior" in wants and facts.prior is None:
        raise ValueError(
            f"it removes the carried class prior of {facts.teacher}, which is unknown; give it a validation part to estimate it on, "
            "or train that teacher with cross_entropy, weighted_cross_entropy or balanced_softmax; for an external teacher, state it: "
            "teacher: {weights: ..., prior: [share of each class]}"
        )
    for need in ("features", "maps"):
        if need in wants and not (facts.student_shape and facts.teacher_shape and getattr(facts.teacher_shape, need)):
            raise ValueError(f"it compares {need}, but {facts.teacher} has none; use a method of logits or one teacher that has them")
    if "maps" in wants and facts.student_shape is not None and not facts.student_shape.maps:
        raise ValueError("it compares maps, but the student has none; use a method of logits or a convolutional student")
    if family.balances and facts.prior is not None:
        _refuse_second_correction(facts.prior, facts)


def _refuse_second_correction(prior: Tensor, facts: Facts) -> None:
    training = (facts.counts / facts.counts.sum()).double().cpu()
    carried = prior.double().cpu()
    uniform = torch.full_like(training, 1 / len(training))
    # Cross-fitted teachers are trained on slightly less than the training part, so their priors are near its prior, but not equal.
    if _distance(carried, training) > 0.5 * _distance(uniform, training):
        shown = [[round(value, 3) for value in side.tolist()] for side in (carried, training)]
        raise ValueError(
            f"it balances its teacher's outputs against the training prior {shown[1]}, but {facts.teacher} carries {shown[0]}: "
            "a second correction of a corrected teacher overshoots; use kd or pckd, or train the teacher with cross_entropy"
        )


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one.log() - other.log()).abs().max())


def methods_table() -> list[dict[str, Any]]:
    """Rows about distillers that ``raredistill methods`` prints."""
    return [
        {
            "name": method.name,
            "family": method.family,
            "source": method.source,
            "needs": ", ".join(method.needs),
            "classes": f">= {method.min_classes}",
            "defaults": ", ".join(part for part in (show_defaults(method.options()), method.note) if part),
        }
        for method in METHODS.values()
    ]
