"""Safe file operations: atomic writes, hashes, locks."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

import yaml

from raredistill.errors import ConfigError, DataError
from raredistill.names import shown

MOST_TEXT = 2**20
"""Most characters in a YAML file."""
MOST_VALUES = 100_000
"""Most values in a YAML file."""
DEEPEST = 100
"""Deepest nesting of lists and mappings in a YAML file."""

FORGOTTEN = 3600.0
"""Seconds without a change after which an unfinished file counts as abandoned."""


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which replaces it only if the block succeeds.

    Raises:
        DataError: ``path`` is a folder.
        OSError: the disk is full or the folder cannot be written, with the file's name; what stood at ``path`` is intact.
    """
    if path.is_dir():
        raise DataError(f"{shown(path)} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    # Two nodes that share a folder may use the same process id.
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # its name can be foreseen, so that it may be a link that someone has put there
    try:
        with naming(path):
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to errors while it is written: for a full disk, the system does not report it."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or str(error.filename).endswith(".tmp")):
            error.filename = str(path)
        raise


def _sweep(path: Path) -> None:
    """Remove temporary files of killed writers of ``path``; active writers, on any machine, have changed theirs recently."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > FORGOTTEN:
                leftover.unlink()


def tidy(folder: Path) -> None:
    """Remove temporary files of killed writers in a folder, whatever their age; the caller must be the only writer there."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def start_writing(handle: IO[bytes], start: int) -> None:
    """Start writing bytes from ``start`` on to disk without waiting, so that a later sync is short."""
    handle.flush()
    if hasattr(os, "posix_fadvise"):  # Linux writes (and keeps) dirty pages that are declared unneeded
        os.posix_fadvise(handle.fileno(), start, 0, os.POSIX_FADV_DONTNEED)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as readable JSON to ``path``, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON from ``path``.

    Raises:
        DataError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); delete it and run the command again") from None


def parse_yaml(text: str, name: str) -> Any:
    """Parse plain YAML, which cannot refer to code; ``name`` is for messages.

    Stricter than YAML's safe subset: no tags, no repeated keys, no merge keys (``<<``, whose cost can double with each line), no numbers
    in base 60 and no dates (``1:30`` and ``2026-01-01`` stay strings).

    Raises:
        ConfigError: it is not YAML, repeats a key, or exceeds the limits on size and depth.
    """
    if len(text) > MOST_TEXT:
        raise ConfigError(f"{name}: has {len(text)} characters of YAML; at most {MOST_TEXT} are read")
    try:
        _refuse_tags_and_depth(text, name)  # first, because the C library's composer could overflow its stack
        with closing(_plain_loader()(text)) as loader:
            value = loader.get_single_data()
        repeats = _values(value, {}) > MOST_VALUES
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise ConfigError(f"{name}: cannot be read as YAML ({' '.join(str(error).split())}); lists are written [flair, t1ce]") from None
    if repeats:
        raise ConfigError(f"{name}: its aliases (&, *) stand for more than {MOST_VALUES} values; write them out")
    return value


def _refuse_tags_and_depth(text: str, name: str) -> None:
    depth = values = 0
    for event in yaml.parse(text, Loader=_base_loader()):
        if (tag := getattr(event, "tag", None)) is not None:
            raise ConfigError(f"{name}: YAML tags such as {str(tag)!r:.60} are not read; write plain values")
        values += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST or values > MOST_VALUES:
            raise ConfigError(f"{name}: holds more than {MOST_VALUES} values, or lists and mappings nested more than {DEEPEST} deep")


def _base_loader() -> Any:
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # PyYAML may be built without its C library


@cache
def _plain_loader() -> Any:
    base = _base_loader()
    changed = {"construct_mapping": _mapping, "yaml_implicit_resolvers": _resolvers(base.yaml_implicit_resolvers), "close": base.dispose}
    return type("PlainLoader", (base,), changed)


def _resolvers(known: Mapping[str, list[tuple[str, Any]]]) -> dict[str, list[tuple[str, Any]]]:
    """Types of unquoted words other than strings: YAML 1.1's numbers without a colon, ``true`` and ``false``, and null.

    ``yes`` and ``no`` are texts, as in YAML 1.2: they are names of classes.
    """
    kinds = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "int", "null")}
    return {
        letter: [
            (tag, re.compile(rf"(?!.*:)(?:{pattern.pattern})", pattern.flags))
            for tag, pattern in pairs
            if tag in kinds and (not tag.endswith(":bool") or letter in "tTfF")
        ]
        for letter, pairs in known.items()
    }


def _mapping(loader: Any, node: Any, deep: bool = False) -> dict[Any, Any]:
    """Build a mapping, refusing complex and repeated keys with their position."""
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=deep)
        if key == "<<" or not isinstance(key, Hashable):
            raise yaml.constructor.ConstructorError(None, None, f"{str(key)!r:.60} cannot be a key", key_node.start_mark)
        if key in found:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r:.60} is given twice", key_node.start_mark)
        found[key] = loader.construct_object(value_node, deep=deep)
    return found


def _values(value: Any, known: dict[int, float]) -> float:
    """Number of values in a value when all aliases are expanded."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = float("inf")  # until it is counted, so that a list that contains itself is infinite
        known[id(value)] = 1 + sum(_values(item, known) for item in (value.values() if isinstance(value, dict) else value))
    return known[id(value)]


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones; links to folders are included.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        return sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    except OSError as error:
        refuse_unread(error)
        raise  # never reached: the line before has raised


def refuse_unread(error: OSError) -> None:
    """For ``os.walk``: a folder that cannot be read is an error, not an empty one.

    Raises:
        DataError: always.
    """
    raise DataError(
        f"{shown(error.filename)}: cannot be read ({error.strerror}), so its content is unknown; "
        "give yourself read permission (chmod u+rX), or move it out of the source"
    ) from None


def inside(path: Path, folder: Path) -> bool:
    """Whether ``path``, with all links resolved, is inside ``folder``: a source must not expose other files of the machine."""
    return path.resolve().is_relative_to(folder.resolve())


def sha256(path: Path) -> str:
    """Hash the bytes of a file (hexadecimal)."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Hash any JSON-like value, independent of the order of keys (hexadecimal)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` while the block runs; other processes wait. The lock ends with the process in any case."""
    with _lock_file(path) as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def lock_if_free(path: Path) -> Iterator[bool]:
    """Like :func:`locked`, but without waiting: yields whether the lock was free, and holds it while the block runs."""
    with _lock_file(path) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def _lock_file(path: Path) -> Iterator[IO[str]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as handle:  # closing it releases the lock
        yield handle


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """Add a hash of its content to a JSON-like record."""
    return {**record, "seal": fingerprint(record)}


def is_sealed(record: Mapping[str, Any]) -> bool:
    """Whether a record is unchanged since it was sealed."""
    return record.get("seal") == fingerprint({key: value for key, value in record.items() if key != "seal"})


def claim_folder(path: Path, marker: str) -> None:
    """Prepare ``path`` for output: it must be new, empty, or contain ``marker`` from an earlier output.

    Raises:
        DataError: it is a file, or contains something else.
    """
    try:
        if path.is_file():
            raise DataError(f"{path} is a file; name a folder for the output")
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()) and not (path / marker).exists():
            raise DataError(f"{path} already contains something else; name another folder or empty it")
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}); name another folder") from None
