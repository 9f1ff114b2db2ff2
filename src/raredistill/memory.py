"""How much memory is left, and what the C library does with what is freed."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
GROUP = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


# Names and numbers of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT = 2**31 - 1


def keep_freed(block: int) -> None:
    """Keep up to 2 GiB of freed memory in this process, instead of giving it back to the system block by block.

    Each step of training on the CPU frees its activations, each patient its volumes, and the next one asks for as many. The GNU library
    gives every large block back, and what comes anew comes empty, page by page: a tenth of a worker's time, a twelfth of a step of
    ``small_cnn``, a fifth where two networks learn together. With other C libraries nothing changes.

    Args:
        block: bytes from which a block is still the system's own.
    """
    library = _library()
    if library is not None and hasattr(library, "mallopt"):
        library.mallopt(_TRIM_THRESHOLD, _KEPT)
        library.mallopt(_MMAP_THRESHOLD, block)


def _library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def available() -> int:
    """Bytes that this process may still take: what the machine has, and what a container or a cluster's scheduler grants.

    Pages that only keep files at hand count as free: the system gives them up when memory is asked for. What this process has freed and
    keeps is given back first.
    """
    _give_back()
    return min([_of_machine(), *_of_groups()])


def _give_back() -> None:
    library = _library()
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def _of_machine() -> int:
    if MEMINFO.is_file():
        kilobytes = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
        if "MemAvailable" in kilobytes:
            return int(kilobytes["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups() -> list[int]:
    """What is left of each limit above this process (version 2 of Linux' control groups)."""
    lines = GROUP.read_text().splitlines() if GROUP.is_file() else []
    own = next((GROUPS / line[3:].strip("/") for line in lines if line.startswith("0::")), None)
    folders = [] if own is None else [own, *own.parents]
    return [room for folder in folders if (room := _room(folder)) is not None]


def _room(folder: Path) -> int | None:
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None  # no limit is kept here
    return None if limit == "max" else int(limit) - used + int(facts.get("inactive_file", 0))
