"""Available memory, and how the C library handles freed memory."""

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
    """Keep up to 2 GiB of freed memory in this process instead of returning it to the system block by block.

    Each training step on the CPU frees its activations, each patient its volumes, and the next one allocates as much again. The GNU C
    library returns every large block, and new blocks are zeroed page by page: this costs a tenth of a worker's time, a twelfth of a step
    of ``small_cnn``, and a fifth of a step of two networks trained together. With other C libraries this function does nothing.

    Args:
        block: size in bytes from which blocks are still returned to the system.
    """
    library = _library()
    if library is not None and hasattr(library, "mallopt"):
        library.mallopt(_TRIM_THRESHOLD, _KEPT)
        library.mallopt(_MMAP_THRESHOLD, block)


def _library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def available() -> int:
    """Bytes that this process may still allocate, limited by the machine and by a container or a cluster's scheduler.

    Pages of the file cache count as free, since the system reclaims them on demand. Memory that this process has freed but kept is
    returned to the system first.
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
    """Bytes left under each limit that applies to this process (Linux control groups, version 2)."""
    lines = GROUP.read_text().splitlines() if GROUP.is_file() else []
    own = next((GROUPS / line[3:].strip("/") for line in lines if line.startswith("0::")), None)
    folders = [] if own is None else [own, *own.parents]
    return [room for folder in folders if (room := _room(folder)) is not None]


def _room(folder: Path) -> int | None:
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None  # no limit is set here
    return None if limit == "max" else int(limit) - used + int(statistics.get("inactive_file", 0))
