"""The registry of sources by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from raredistill.cohort.duplicates import Treatment
from raredistill.cohort.sources import Source
from raredistill.errors import ConfigError, DataError
from raredistill.options import did_you_mean
from raredistill.plugins import HINT, Plugin, Registry

BUILT_IN = {
    "brats_nifti": ("raredistill.cohort.sources.brats_nifti", "BratsNifti"),
    "brats_hdf5": ("raredistill.cohort.sources.brats_hdf5", "BratsHdf5"),
    "dicom": ("raredistill.cohort.sources.dicom", "Dicom"),
    "image_folder": ("raredistill.cohort.sources.image_folder", "ImageFolder"),
    "table": ("raredistill.cohort.sources.table", "Table"),
    "arrays": ("raredistill.cohort.sources.arrays", "Arrays"),
}
"""Kind -> module and class; modules are imported when they are opened."""


def _built_in(module: str, name: str) -> type[Source]:
    found: type[Source] = getattr(import_module(module), name)
    return found


def _adopt(plugin: Plugin) -> Callable[[], type[Source]]:
    source: Any = plugin.thing
    members = ("units", "classes", "problems", "read", "settings", "channels", "counted")
    lacking = [name for name in members if not hasattr(source, name)]
    if not isinstance(source, type) or lacking:
        raise ConfigError(f"the source {plugin.name} must be a class with {', '.join(lacking or members)}")

    def found() -> Any:
        return source

    return found


KINDS: Registry[Callable[[], type[Source]]] = Registry(
    "source", {kind: partial(_built_in, *place) for kind, place in BUILT_IN.items()}, _adopt
)
"""Kind -> a function that gives its class."""


def open_source(kind: str, path: Path, /, **options: Any) -> Source:
    """Open raw data as a source.

    Args:
        kind: one of ``KINDS``.
        path: the folder or file.
        **options: options of the source's class; see there. Every source has ``duplicates``, the treatment of equal images.

    Raises:
        ConfigError: the kind, an option or its value is unknown.
        DataError: the path does not exist.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown source '{kind}'{did_you_mean(kind, KINDS)}; the sources are {', '.join(KINDS)}, {HINT}")
    duplicates = _value("duplicates", Treatment, options.pop("duplicates", "refuse"))
    source: Any = KINDS[kind]()
    known = {name: hint for name, hint in get_type_hints(source.__init__).items() if name not in ("path", "return")}
    for option in options:
        if option not in known:
            raise ConfigError(f"{kind} has no option '{option}'{did_you_mean(option, known)}; it takes {', '.join([*known, 'duplicates'])}")
    values = {option: _value(f"{kind}: {option}", known[option], value) for option, value in options.items()}
    if not Path(path).exists():
        raise DataError(f"{path}: no such file or folder; give the place of the raw data")
    opened: Source = source(Path(path), **values)
    opened.duplicates = duplicates
    return opened


def _value(name: str, hint: Any, value: Any) -> Any:
    """Convert a value to the type of the option's annotation; ``a,b`` is accepted for a list."""
    adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True))  # classes may be called 0 and 1
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        if isinstance(value, str):
            with suppress(ValidationError):
                return adapter.validate_python([item.strip() for item in value.split(",")])
        raise ConfigError(f"{name}={value!r} does not fit: {error.errors()[0]['msg']}") from None
