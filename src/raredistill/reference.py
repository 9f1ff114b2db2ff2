"""Every key of a study, made from the code: type, default and meaning."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, get_type_hints

from raredistill.cohort.sources.registry import KINDS
from raredistill.config import EvidenceConfig, SourceConfig, SplitConfig, StudyConfig
from raredistill.errors import ConfigError
from raredistill.options import did_you_mean
from raredistill.runs.entry import Entry
from raredistill.splits import make_splits
from raredistill.training.settings import Settings

NEEDED = "(needed)"
STUDY = {
    "name": "for the report", "cohort": "a prepared cohort's folder, or the keys cohort.*", "channels": "of every run; all by default",
    "splits": "the keys splits.*", "seeds": "one run of each entry and split per seed", "training": "the keys training.*, for every run",
    "runs": "the grid: a list with the keys runs.*", "cohort.source": "kind of raw data", "cohort.path": "of the raw data",
    "cohort.size": "side of the square samples, in pixels", "cohort.options": "the keys cohort.options.KIND.*",
    "evidence": "the keys evidence.*", "evidence.margin": "the smallest gain of interest",
    "evidence.wanted": "a gain that, once out of reach, ends the study at a look", "evidence.looks": "repeats after which pairs are judged",
    "evidence.alpha": "level that each look may use",
    "cohort.leave_out_bad": "continue without patients that cannot be read",
}  # fmt: skip
"""Meanings of keys whose classes describe themselves as a whole."""


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a study: where it stands, its type, its default, both as text, and what it means."""

    key: str
    type: str
    default: str
    meaning: str


def all_keys() -> list[Key]:
    """Every key, in the order of a configuration."""
    keys = [*_model("", StudyConfig, {}), *_model("cohort.", SourceConfig, {})]
    for kind, find in KINDS.items():
        keys += _arguments(f"cohort.options.{kind}.", find())
    keys += _model("evidence.", EvidenceConfig, {})
    keys += _model("splits.", SplitConfig, described(make_splits))
    keys += _fields("training.", Settings)
    return keys + [key for key in _fields("runs.", Entry) if key.key != "runs.settings"]


def find_keys(wanted: str) -> list[Key]:
    """The keys called so: a whole key, the keys below it, or every key whose last part it is.

    Raises:
        ConfigError: there is none; names near ones.
    """
    keys = all_keys()
    found = [key for key in keys if key.key == wanted or key.key.startswith(f"{wanted}.") or key.key.rpartition(".")[2] == wanted]
    if not found:
        near = {key.key for key in keys} | {key.key.rpartition(".")[2] for key in keys}
        raise ConfigError(f"no setting is called {wanted!r}{did_you_mean(wanted, near)}; raredistill settings lists all")
    return found


def described(thing: Callable[..., Any]) -> dict[str, str]:
    """Name to meaning of the arguments or attributes in a docstring."""
    section = re.search(r"^(?:Args|Attributes):\n((?:[ \t]+.*\n|\n)+)", inspect.cleandoc(thing.__doc__ or "") + "\n", re.MULTILINE)
    parts = re.split(r"^ {4}(\w+): ", section[1] if section else "", flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def _model(prefix: str, model: Any, meanings: dict[str, str]) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        default = NEEDED if field.is_required() else _text(field.get_default(call_default_factory=True))
        yield Key(f"{prefix}{name}", _type(field.annotation), default, meanings.get(name) or STUDY.get(f"{prefix}{name}", ""))


def _fields(prefix: str, kind: Any) -> Iterator[Key]:
    hints, meanings = get_type_hints(kind), described(kind)
    for field in dataclasses.fields(kind):
        made = field.default_factory is not dataclasses.MISSING
        missing = NEEDED if field.default is dataclasses.MISSING else _text(field.default)
        told = meanings.get(field.name) or next((f"see {prefix}{key}" for key, text in meanings.items() if f"``{field.name}``" in text), "")
        yield Key(f"{prefix}{field.name}", _type(hints[field.name]), "{}" if made else missing, told)


def _arguments(prefix: str, source: Any) -> Iterator[Key]:
    hints, meanings = get_type_hints(source.__init__), described(source)
    for name, parameter in list(inspect.signature(source.__init__).parameters.items())[2:]:  # after self and path
        default = NEEDED if parameter.default is parameter.empty else _text(parameter.default)
        yield Key(f"{prefix}{name}", _type(hints.get(name, Any)), default, meanings.get(name, ""))


def _text(value: Any) -> str:
    if dataclasses.is_dataclass(value) or hasattr(value, "model_dump"):
        return "(see its keys)"
    return "" if value is None else str(list(value)) if isinstance(value, tuple) else str(value)


def _type(hint: Any) -> str:
    """A type in the words of a configuration."""
    plain = hint.__name__ if isinstance(hint, type) and not hasattr(hint, "__args__") else str(hint)
    plain = re.sub(r"typing\.|collections\.abc\.|pathlib\.|raredistill\.(\w+\.)*", "", plain)
    plain = re.sub(r"Annotated\[(.+?), .*\]$", r"\1", plain).replace("NoneType", "None")
    return plain.replace("Literal[", "one of [").replace(" | None", ", or nothing")
