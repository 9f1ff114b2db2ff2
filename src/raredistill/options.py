"""Hyper-parameters, declared as keyword parameters whose annotations state the allowed values.

A loss, a distiller, a network or an augmentation declares an option as a parameter with a default and one of these annotations: a
number (``float`` or ``int``, with bounds of ``annotated_types``), ``bool``, ``Literal[...]``, or ``Annotated[..., check]`` with its
own check.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Protocol, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt

from raredistill.errors import ConfigError

NotNegative = Annotated[float, Ge(0)]
AboveZero = Annotated[float, Gt(0)]
Share = Annotated[float, Interval(ge=0, le=1)]


class Option(Protocol):
    """The allowed values of one hyper-parameter; its ``str`` is the default."""

    def check(self, name: str, value: object) -> None:
        """Raise ValueError, naming the option and its values, for a value that is not allowed."""


@dataclass(frozen=True)
class Number:
    """A finite number between two bounds.

    Attributes:
        default: used if a configuration gives none.
        low: the lowest value, included only if ``closed``.
        high: the highest value, included only if ``closed_above``.
        closed: whether ``low`` is allowed.
        closed_above: whether ``high`` is allowed.
        whole: whether fractions are refused.
    """

    default: float
    low: float = -math.inf
    high: float = math.inf
    closed: bool = True
    closed_above: bool = True
    whole: bool = False

    def check(self, name: str, value: object) -> None:
        """Refuse a value that is not a finite number between the bounds.

        Raises:
            ValueError: names the option and the bounds.
        """
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not self._takes(value):  # type: ignore[arg-type]
            bounds = " and ".join(self._bounds())
            raise ValueError(f"{name} must be a {'whole ' if self.whole else ''}number{bounds and f' {bounds}'}, not {value!r}")

    def _takes(self, value: float) -> bool:
        inside = (self.low <= value if self.closed else self.low < value) and (
            value <= self.high if self.closed_above else value < self.high
        )
        return inside and (not self.whole or value == int(value))

    def _bounds(self) -> list[str]:
        below = [f"{'at least' if self.closed else 'above'} {self.low:g}"] if self.low > -math.inf else []
        above = [f"{'at most' if self.closed_above else 'below'} {self.high:g}"] if self.high < math.inf else []
        return below + above

    def __str__(self) -> str:
        return f"{self.default:g}"


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    default: str | bool
    known: tuple[str | bool, ...]

    def check(self, name: str, value: object) -> None:
        """Refuse a value that is not one of the choices.

        Raises:
            ValueError: names the option and its values.
        """
        if type(value) is not type(self.default) or value not in self.known:
            raise ValueError(f"{name} must be one of {', '.join(map(str, self.known))}, not {value!r}")

    def __str__(self) -> str:
        return str(self.default).lower()


@cache
def options_of(maker: Callable[..., Any]) -> dict[str, Option]:
    """The hyper-parameters that a function or class declares, by name, in the order of its parameters.

    Other parameters, such as tensors, and those without a default are not options: the caller supplies them.

    Raises:
        ConfigError: an annotation names something that its module does not define.
    """
    plain_class = inspect.isclass(maker) and not is_dataclass(maker)
    try:
        hints = get_type_hints(maker.__init__ if plain_class else maker, include_extras=True)
    except NameError as error:
        raise ConfigError(f"{maker.__module__}.{maker.__qualname__}: {error}; its annotations must be importable") from None
    parameters = inspect.signature(maker).parameters.values()
    found = {each.name: _option(hints[each.name], each.default) for each in parameters if each.name in hints}
    return {name: option for name, option in found.items() if option is not None}


def defaults_of(maker: Callable[..., Any]) -> dict[str, Any]:
    """The default of each hyper-parameter that has one."""
    parameters = inspect.signature(maker).parameters
    return {name: parameters[name].default for name in options_of(maker) if parameters[name].default is not inspect.Parameter.empty}


def _option(hint: Any, default: Any) -> Option | None:
    kind, *metadata = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    own: Option | None = next((each for each in metadata if hasattr(each, "check")), None)
    if own is not None or default is inspect.Parameter.empty:
        return own
    if get_origin(kind) is Literal:
        return Choice(default, get_args(kind))
    if kind is bool:
        return Choice(default, (True, False))
    return _number(default, metadata, whole=kind is int) if kind in (int, float) else None


def _number(default: float, metadata: Iterable[Any], *, whole: bool) -> Number:
    bounds: dict[str, Any] = {}
    for each in metadata:
        for bound in each if isinstance(each, Interval) else (each,):
            if isinstance(bound, (Ge, Gt)):
                closed = isinstance(bound, Ge)
                bounds.update(low=bound.ge if isinstance(bound, Ge) else bound.gt, closed=closed)
            elif isinstance(bound, (Le, Lt)):
                closed = isinstance(bound, Le)
                bounds.update(high=bound.le if isinstance(bound, Le) else bound.lt, closed_above=closed)
    return Number(default, **bounds, whole=whole)


def check_options(owner: str, given: Mapping[str, Any], known: Mapping[str, Option]) -> None:
    """Refuse unknown options and values that are not allowed.

    Args:
        owner: name for messages, such as ``loss focal``.
        given: values by option.
        known: the options that the owner declares.

    Raises:
        ConfigError: names the option, and the nearest known one or the allowed values.
    """
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"{owner} has no option {name}{did_you_mean(name, known)}; it has {', '.join(known) or 'none'}")
        try:
            known[name].check(name, value)
        except ValueError as error:
            raise ConfigError(f"{owner}: {error}") from None


def show_defaults(known: Mapping[str, Option]) -> str:
    """Options with their defaults, formatted for tables: ``temperature=4, alpha=1``."""
    return ", ".join(f"{name}={option}" for name, option in known.items())


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1) -> str:
    """End of a message about an unknown name: at most ``most`` similar known names, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=most)
    return f"; did you mean {' or '.join(close)}?" if close else ""
