"""The table of distillers: a name becomes a method."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from raredistill.distill.contract import Method, hyperparameters
from raredistill.distill.logits import BKD, DIST, DKD, KD, DiVE
from raredistill.errors import ConfigError
from raredistill.losses import did_you_mean, effective_number_weights

METHODS: dict[str, Any] = {method.name: method for method in (KD, DKD, BKD, DiVE, DIST)}


def make_method(name: str, *, counts: Tensor, classes: int, **options: float) -> Method:
    """Build a distiller.

    Args:
        name: as ``raredistill methods`` lists it.
        counts: ``(K,)`` training samples per class, for methods that weight classes; on the device of the training.
        classes: K.
        options: hyper-parameters that differ from the published defaults.

    Raises:
        ConfigError: the name or an option is unknown, a value is out of range, the method is not sound for so few classes, or a class that
            it must weight has no training sample.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown method {name}{did_you_mean(name, METHODS)}; raredistill methods lists them")
    family = METHODS[name]
    if classes < family.min_classes:
        raise ConfigError(f"method {name} carries no sound signal for {classes} classes (at least {family.min_classes}); use kd")
    known = hyperparameters(family)
    for option in options:
        if option not in known:
            raise ConfigError(f"method {name} has no option {option}{did_you_mean(option, known)}; it has {', '.join(known)}")
    try:
        weights = {"class_weights": effective_number_weights(counts)} if _weighs_classes(family) else {}
        made: Method = family(**weights, **options)
    except ValueError as error:
        raise ConfigError(f"method {name}: {error}") from None
    return made


def _weighs_classes(method: Any) -> bool:
    return "class_weights" in method.__dataclass_fields__


def methods_table() -> list[dict[str, Any]]:
    """What ``raredistill methods`` prints."""
    return [
        {
            "name": method.name,
            "family": method.family,
            "source": method.source,
            "needs": method.needs,
            "classes": f">= {method.min_classes}",
            "defaults": _defaults(method),
        }
        for method in METHODS.values()
    ]


def _defaults(method: Any) -> str:
    shown = [f"{name}={option.default:g}" for name, option in hyperparameters(method).items()]
    return ", ".join([*shown, *(["class weights by effective number"] if _weighs_classes(method) else [])])
