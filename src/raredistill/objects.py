"""Python objects where a configuration has names: networks, losses and distillers of the calling program.

A class or function at the top of a module is named by its import path, ``package.module:Name``, and found again wherever that module is
imported. Everything else (a module instance, a lambda, a class in a notebook) lives as long as the Python session that made it.
"""

from __future__ import annotations

import copy
import hashlib
import re
import sys
from collections.abc import Callable
from typing import Any

from raredistill import plugins
from raredistill.errors import ConfigError

SESSION = "object"
"""Placeholder for the module in the name of an object without an import path."""


def name_of(kind: plugins.Kind) -> Callable[[Any], Any]:
    """A validator that turns an object into a name, and leaves names as they are.

    Args:
        kind: ``network``, ``loss`` or ``distiller``.
    """

    def named(thing: Any) -> Any:
        if isinstance(thing, str) or thing is None:
            return thing
        if known := next((each.name for each in plugins.registered() if each.thing is thing), None):
            return known
        if kind == "network" and not callable(thing):
            raise ConfigError(f"{thing!r:.60} is no network: give a name, a module, or a function from a number of channels to a module")
        return _network_name(thing) if kind == "network" else _registered(kind, thing)

    return named


def _registered(kind: plugins.Kind, thing: Any) -> str:
    given: str = getattr(thing, "name", "") or getattr(thing, "__name__", "") or type(thing).__name__
    name = re.sub(r"[^\w-]", "_", given).strip("_")
    plugins.register(kind, thing, {"name": name})
    return name


def _network_name(thing: Any) -> str:
    if _is_module(thing):
        digest = hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in thing.state_dict().values())).hexdigest()
        factory, name = _copies(thing), type(thing).__name__
    else:
        if (path := _import_path(thing)) is not None:
            return path
        digest, factory, name = plugins.source_digest(thing), thing, getattr(thing, "__name__", type(thing).__name__)
    session = f"{SESSION}:{re.sub(r'[^0-9A-Za-z]', '_', name)}-{digest[:8]}"
    plugins.keep_object(session, factory, digest[:16])
    return session


def _is_module(thing: Any) -> bool:
    torch = sys.modules.get("torch")  # an instance cannot exist before torch is imported
    return torch is not None and isinstance(thing, torch.nn.Module)


def _copies(module: Any) -> Callable[[int], Any]:
    """A factory that gives a copy of a module with the weights that it has now."""
    kept = copy.deepcopy(module)

    def build(channels: int) -> Any:
        return copy.deepcopy(kept)

    return build


def _import_path(thing: Any) -> str | None:
    module, name = getattr(thing, "__module__", "__main__"), getattr(thing, "__qualname__", "")
    if module in ("__main__", "__mp_main__") or "<" in name or "." in name or not name:
        return None
    return f"{module}:{name}" if getattr(sys.modules.get(module), name, None) is thing else None


def is_object(name: str) -> bool:
    """Whether a network's name refers to an object, by import path or kept in this session."""
    return ":" in name and not name.startswith("hf-hub:")


def find(name: str) -> Callable[[int], Any]:
    """The factory behind the name of an object. Nothing is imported for a name: its module must be imported already.

    Raises:
        ConfigError: it is not there, with what to do.
    """
    module, _, attribute = name.partition(":")
    if module == SESSION:
        if (kept := plugins.kept_object(name)) is None:
            raise ConfigError(
                f"the network {name} was an object of a Python session and has no import path, so it cannot be rebuilt here; "
                "train with a class or function at the top of a module to be able to"
            )
        return kept
    found = getattr(sys.modules.get(module), attribute, None)
    if not callable(found):
        raise ConfigError(f"the network {name} is code of your own: import {module} before, or add --plugin {module}")
    factory: Callable[[int], Any] = found
    return factory
