"""Selection of a source's files: no hidden or system files, and only those that the user's patterns allow."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from raredistill.cohort.sources import Skipped
from raredistill.files import refuse_unread

SYSTEM = frozenset({"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information", "__pycache__"})
"""Folders that operating systems and network drives put beside the data, in lower case; those that begin with a dot are meant too."""
SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini", "icon\r"})
EXAMPLES = 3
HIDDEN = "hidden or system file or folder"
LINKED = "link to a folder"
NOT_INCLUDED, EXCLUDED = "not matched by include", "matched by exclude"


@dataclass
class Skips:
    """Counts unused files by reason, with the first few names."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one file or row."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if self.counts[reason] <= EXAMPLES:
            self.examples.setdefault(reason, []).append(name)

    def listed(self) -> list[Skipped]:
        """The skipped files by reason, the most frequent reason first."""
        order = sorted(self.counts, key=lambda reason: (-self.counts[reason], reason))
        return [Skipped(reason, self.counts[reason], tuple(self.examples[reason])) for reason in order]


@dataclass(frozen=True)
class Patterns:
    """The options ``include`` and ``exclude``: glob patterns on paths relative to the source, with forward slashes.

    A pattern matches a whole relative path, or any one part of it: ``*_seg*``, ``masks``, ``site_b/*``.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def reason(self, name: str) -> str:
        """Why a file is not taken, or ""."""
        if any(map(_is_system, PurePosixPath(name).parts)):
            return HIDDEN
        if self.include and not any(_matches(name, pattern) for pattern in self.include):
            return NOT_INCLUDED
        return EXCLUDED if any(_matches(name, pattern) for pattern in self.exclude) else ""

    def settings(self) -> dict[str, list[str]]:
        """The given options only, for provenance."""
        given = {"include": list(self.include), "exclude": list(self.exclude)}
        return {key: value for key, value in given.items() if value}


def _is_system(part: str) -> bool:
    return part.startswith(".") or part.lower() in SYSTEM or part.lower() in SYSTEM_FILES


def _matches(name: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(candidate, pattern) for candidate in (name, *PurePosixPath(name).parts))


def files_below(root: Path, skips: Skips, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[Path]:
    """All files below a folder that are not hidden, system files, or ruled out by a pattern, in the order of their paths.

    Args:
        root: the folder; links to folders inside it are not followed.
        skips: counts the files left out.
        include: glob patterns; if given, only matching files are used.
        exclude: glob patterns of files to leave out.

    Raises:
        DataError: a folder cannot be read, so that its content is unknown.
    """
    patterns, taken = Patterns(tuple(include), tuple(exclude)), []
    for folder, folders, names in os.walk(root, onerror=refuse_unread):
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                skips.add(LINKED, Path(folder, name).relative_to(root).as_posix())
        for name in names:
            file = Path(folder, name)
            relative = file.relative_to(root).as_posix()
            reason = patterns.reason(relative)
            if reason:
                skips.add(reason, relative)
            else:
                taken.append(file)
    return sorted(taken)


def take(files: Sequence[Path], root: Path, skips: Skips, wanted: Callable[[Path], bool], reason: str) -> list[Path]:
    """Select the wanted files; the others are counted under ``reason``."""
    chosen = []
    for file in files:
        if wanted(file):
            chosen.append(file)
        else:
            skips.add(reason, file.relative_to(root).as_posix())
    return chosen
