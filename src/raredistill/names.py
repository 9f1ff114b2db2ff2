"""The rule for all names from outside: patients, classes, channels, studies, runs and files."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable

LONGEST = 1000
"""Most characters in a name; names of files are limited to :data:`LONGEST_PART` bytes."""
LONGEST_PART = 255
"""Most bytes in a file's name that all common file systems accept."""


def fault(name: str) -> str:
    """Message on what is wrong with a name; empty if it is valid.

    A name must be valid UTF-8, composed (Unicode NFC, so that two encodings of one name cannot be two names), without control characters
    (which terminals execute and XML forbids), and at most :data:`LONGEST` characters long.
    """
    if name.isascii() and name.isprintable() and len(name) <= LONGEST:
        return ""  # fast path: nearly all names are ASCII, and a cohort has many
    if len(name) > LONGEST:
        return f"has {len(name)} characters; at most {LONGEST} are allowed"
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        return "is not valid UTF-8"
    if control := next((letter for letter in name if _is_control(letter)), ""):
        return f"contains the control character U+{ord(control):04X}"
    if not unicodedata.is_normalized("NFC", name):
        return "is not composed (Unicode NFC), as in some names from macOS, so it differs from the same name typed elsewhere"
    return ""


def fault_of_part(name: str) -> str:
    """Like :func:`fault`, for names that become names of files or folders: they must not lead out of their folder."""
    if said := fault(name):
        return said
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        return "cannot be the name of a file: it is empty, or contains a part of a path"
    return f"has more than {LONGEST_PART} bytes" if len(name.encode()) > LONGEST_PART else ""


def first_fault(names: Iterable[str]) -> tuple[str, str]:
    """The first invalid name, as :func:`shown`, and why; two empty strings if all are valid."""
    return next(((shown(name), said) for name in dict.fromkeys(names) if (said := fault(name))), ("", ""))


def checked(name: str) -> str:
    """Return the name itself if it is valid; for pydantic's ``AfterValidator``.

    Raises:
        ValueError: it is not valid.
    """
    if said := fault(name):
        raise ValueError(f"the name {shown(name)} {said}")
    return name


def shown(text: str | os.PathLike[str]) -> str:
    """Make text safe for terminals, logs and XML: characters that would be executed or refused there are escaped."""
    return "".join(_escaped(letter) if _is_control(letter) else letter for letter in os.fspath(text))


def _is_control(letter: str) -> bool:
    # Control characters, lone surrogates, non-characters, line separators, and marks that change the direction of text.
    category = unicodedata.category(letter)
    return category in ("Cc", "Cs", "Zl", "Zp") or letter in _BIDIRECTIONAL or (category == "Cn" and ord(letter) & 0xFFFE == 0xFFFE)


_BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"  # a byte of a file's name that is not UTF-8
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")
