"""Dataclasses that enforce their own annotations, with the same rules and messages from YAML and from Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, cast, get_args, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from raredistill.errors import ConfigError
from raredistill.names import checked
from raredistill.options import did_you_mean

Kind = TypeVar("Kind")
Name = Annotated[str, AfterValidator(checked)]
"""A text that keeps the one rule of names."""


class Declared:
    """Base of frozen dataclasses: fields are checked and coerced against their annotations when an object is constructed.

    A subclass adds rules that relate fields to each other in :meth:`conflicts`.

    Raises:
        ConfigError: on construction, naming every field that is wrong.
    """

    def __post_init__(self) -> None:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # subclasses are dataclasses
        given = {field.name: getattr(self, field.name) for field in fields}
        try:
            valid = schema(cast(Any, type(self))).model_validate(given)
        except ValidationError as error:
            raise ConfigError("; ".join(mistakes(error, type(self)))) from None
        for name in given:
            object.__setattr__(self, name, getattr(valid, name))
        if found := self.conflicts():
            raise ConfigError(f"{self.called}{'; '.join(found)}")

    @property
    def called(self) -> str:
        """Prefix of messages about conflicts, such as ``runs small: ``."""
        return ""

    def conflicts(self) -> list[str]:
        """Messages about fields that contradict each other."""
        return []


@cache
def schema(kind: Any) -> type[BaseModel]:
    """The pydantic model of a dataclass: its fields, annotations and defaults, and no other keys."""
    hints = get_type_hints(kind, include_extras=True)
    fields: dict[str, Any] = {field.name: (hints[field.name], _default(field)) for field in dataclasses.fields(kind)}
    return create_model(kind.__name__, __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return Field(default_factory=field.default_factory)
    return ... if field.default is dataclasses.MISSING else field.default


def read(kind: type[Kind], raw: Mapping[str, Any], where: str = "") -> tuple[Kind | None, list[str]]:
    """Create an object from a mapping read from YAML.

    Args:
        kind: a :class:`Declared` dataclass.
        raw: its fields by name.
        where: position of the mapping in a file, such as ``runs.0.``, put before each message.

    Returns:
        The object and no messages, or None and a message for each mistake.
    """
    if found := field_mistakes(kind, raw, where):
        return None, found
    try:
        return kind(**raw), []
    except ConfigError as error:
        return None, [str(error)]


def field_mistakes(kind: type, raw: Any, where: str = "") -> list[str]:
    """Messages about fields of a mapping that are unknown or have wrong values, without the rules that relate fields."""
    try:
        schema(kind).model_validate(raw)
    except ValidationError as error:
        return [f"{where}{mistake}" for mistake in mistakes(error, kind)]
    except ConfigError as error:  # raised by a nested object
        return [f"{where}{error}"]
    return []


def mistakes(error: ValidationError, kind: type) -> list[str]:
    """Mistakes found by pydantic, one sentence each, with the nearest known key for an unknown one."""
    return [_mistake(item, kind) for item in map(dict, error.errors()) if not _is_noise(item)]


def _mistake(item: dict[str, Any], kind: type) -> str:
    where = ".".join(str(part) for part in item["loc"] if not _is_branch(part))
    if item["type"] not in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where}: {item['msg'].lower()} (it is {item['input']!r:.60})"
    known = _known_keys(kind, item["loc"])
    return f"{where}: unknown key" + (did_you_mean(str(item["loc"][-1]), known) or f"; the keys are {', '.join(known)}")


def _is_noise(item: dict[str, Any]) -> bool:
    """Whether a mistake adds no information: another branch of a union, or a list whose members are already reported."""
    last = item["loc"][-1] if item["loc"] else ""
    if item["type"] == "too_short":
        return bool(item["input"])
    if item["type"] == "tuple_type" and str(last).startswith("tuple["):
        return True
    return isinstance(item["input"], dict) if _is_scalar(last) else _is_object(last)


def _is_branch(part: int | str) -> bool:
    return _is_scalar(part) or _is_object(part) or str(part).startswith("tuple[")


def _is_scalar(part: int | str) -> bool:
    return part == "str" or str(part).startswith("lax-or-strict")


def _is_object(part: int | str) -> bool:
    # pydantic names the branch of a union after its class; none of our keys starts with a capital.
    return isinstance(part, str) and part[:1].isupper()


def _known_keys(kind: type[Any], place: tuple[int | str, ...]) -> list[str]:
    """Names of the fields at a position inside a declared object."""
    for part in place[:-1]:
        kind = _inner(kind, part)
    return list(kind.model_fields) if issubclass(kind, BaseModel) else [field.name for field in dataclasses.fields(kind)]


def _inner(kind: type[Any], part: int | str) -> type[Any]:
    """The class of the objects in a field, or of a branch of a union; the same class if ``part`` leads to none."""

    def classes(hint: Any) -> list[type[Any]]:
        own = [hint] if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or issubclass(hint, BaseModel)) else []
        return own + [found for inner in get_args(hint) for found in classes(inner)]

    hints = get_type_hints(kind, include_extras=True)
    return next(iter(classes(hints.get(str(part)))), kind)
