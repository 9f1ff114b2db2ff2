"""The one rule for every name that comes from outside: patients, classes, channels, studies, runs and files."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable

LONGEST = 1000
"""Characters of a name. What becomes a file's name is held to :data:`LONGEST_PART` bytes."""
LONGEST_PART = 255
"""Bytes of a file's name that every usual file system takes."""


def fault(name: str) -> str:
    """What is wrong with a name, for a message; empty when nothing is.

    A name is valid UTF-8, composed (Unicode's NFC, so that two spellings of one name cannot be two names), without control characters
    (which a terminal obeys and XML forbids), and at most :data:`LONGEST` characters long.
    """
    if name.isascii() and name.isprintable() and len(name) <= LONGEST:
        return ""  # nearly all are, and a cohort has many
    if len(name) > LONGEST:
        return f"has {len(name)} characters; at most {LONGEST} are allowed"
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        return "is not valid UTF-8"
    if control := next((letter for letter in name if _is_control(letter)), ""):
        return f"holds the control character U+{ord(control):04X}"
    if not unicodedata.is_normalized("NFC", name):
        return "is not composed (Unicode NFC), as names from macOS may be, so that it is unlike the same name typed elsewhere"
    return ""


def fault_of_part(name: str) -> str:
    """As :func:`fault`, for a name that becomes the name of a file or folder: it cannot leave the folder that it is put into."""
    if said := fault(name):
        return said
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        return "cannot be the name of a file: it is empty, or holds a part of a path"
    return f"has more than {LONGEST_PART} bytes" if len(name.encode()) > LONGEST_PART else ""


def first_fault(names: Iterable[str]) -> tuple[str, str]:
    """The first name that breaks the rule, as :func:`shown`, and why; two empty texts when none does."""
    return next(((shown(name), said) for name in dict.fromkeys(names) if (said := fault(name))), ("", ""))


def checked(name: str) -> str:
    """The name itself, for pydantic's ``AfterValidator``.

    Raises:
        ValueError: it breaks the rule.
    """
    if said := fault(name):
        raise ValueError(f"the name {shown(name)} {said}")
    return name


def shown(text: str | os.PathLike[str]) -> str:
    """Any text as a terminal, a log or an XML file can show it: what would be obeyed or refused there is written as an escape."""
    return "".join(_escaped(letter) if _is_control(letter) else letter for letter in os.fspath(text))


def _is_control(letter: str) -> bool:
    # Control characters, lone surrogates, non-characters, line separators, and marks that turn the direction of what follows.
    category = unicodedata.category(letter)
    return category in ("Cc", "Cs", "Zl", "Zp") or letter in _BIDIRECTIONAL or (category == "Cn" and ord(letter) & 0xFFFE == 0xFFFE)


_BIDIRECTIONAL = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"  # a byte of a file's name that is no UTF-8
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")
