"""The table of distillers: a name becomes a method."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from torch import Tensor

from raredistill.distill.contract import Method
from raredistill.distill.logits import BKD, DIST, DKD, KD, DiVE
from raredistill.errors import ConfigError
from raredistill.losses import effective_number_weights

METHODS: dict[str, Any] = {method.name: method for method in (KD, DKD, BKD, DiVE, DIST)}


def make_method(name: str, *, counts: Tensor, classes: int, **options: float) -> Method:
    """Build a distiller.

    Args:
        name: as ``raredistill methods`` lists it.
        counts: ``(K,)`` training samples per class, for methods that weight classes.
        classes: K.
        options: hyper-parameters that differ from the published defaults.

    Raises:
        ConfigError: the name or an option is unknown, a value is out of range, or the method is not sound for so few classes.
    """
    if name not in METHODS:
        raise ConfigError(f"unknown method {name}{_near(name, METHODS)}; raredistill methods lists them")
    family = METHODS[name]
    if classes < family.min_classes:
        raise ConfigError(f"method {name} carries no sound signal for {classes} classes (at least {family.min_classes}); use kd")
    known = [field.name for field in dataclasses.fields(family) if field.name != "class_weights"]
    for option in options:
        if option not in known:
            raise ConfigError(f"method {name} has no option {option}{_near(option, known)}; it has {', '.join(known)}")
    if "class_weights" in family.__dataclass_fields__:
        options["class_weights"] = effective_number_weights(counts.clamp(min=1))  # type: ignore[assignment]
    try:
        made: Method = family(**options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"method {name}: {error}") from None
    return made


def _near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


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
    fields = dataclasses.fields(method)
    return ", ".join(f"{field.name}={field.default:g}" for field in fields if field.default is not dataclasses.MISSING)
