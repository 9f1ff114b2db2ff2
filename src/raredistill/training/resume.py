"""The state of an unfinished training: saved periodically to two alternating files, and loaded by the next start."""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raredistill import checkpoint
from raredistill.errors import CheckpointError

SAVE_EVERY = 60.0
"""Seconds of training that a crash can lose if saving a state takes at most ``AFFORDED`` seconds; proportionally more otherwise."""
AFFORDED = 1.0
SLOTS = ("state-a.safetensors", "state-b.safetensors")


@dataclass(frozen=True)
class State:
    """The state of a training between two steps: named tensors on any device, and facts that fit in JSON."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, without its name as prefix."""
        return {key.removeprefix(f"{name}/"): tensor for key, tensor in self.tensors.items() if key.startswith(f"{name}/")}


class Keeper:
    """Saves a run's state in its folder, in two files: if a crash damages the newer one, the older is intact.

    Args:
        folder: of the run; it must exist and keep existing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.remarks: list[str] = []
        self._number = 0
        self._saved, self._cost = time.monotonic(), 0.0

    def load(self) -> State | None:
        """Load the newest intact state; None if training must start from scratch. Damaged files are reported in ``remarks``."""
        found = [state for slot in SLOTS if (state := self._read(self.folder / slot)) is not None]
        if not found:
            return None
        newest = max(found, key=lambda state: int(state.facts["number"]))
        self._number = int(newest.facts["number"]) + 1
        return newest

    def _read(self, path: Path) -> State | None:
        if not path.exists():
            return None
        try:
            return State(*checkpoint.load_state(path))
        except CheckpointError as error:
            self.remarks.append(f"{error}; training resumed from an older state")
            return None

    def due(self) -> bool:
        """Whether enough time has passed since the last save to justify another."""
        return time.monotonic() - self._saved >= SAVE_EVERY * max(1.0, self._cost / AFFORDED)

    def save(self, state: State) -> None:
        """Overwrite the older of the two files with a state.

        Raises:
            OSError: the disk is full, or the folder has vanished or cannot be written; the newer state is intact.
        """
        if not self.folder.is_dir():
            # Writing would recreate the folder, perhaps on another disk mounted in place of the lost one.
            raise FileNotFoundError(errno.ENOENT, "the folder of the run has vanished", str(self.folder))
        start = time.monotonic()
        facts = {**state.facts, "number": self._number}
        checkpoint.save_state(self.folder / SLOTS[self._number % len(SLOTS)], state.tensors, facts)
        self._number += 1
        self._saved = time.monotonic()
        self._cost = self._saved - start


def has_state(folder: Path) -> bool:
    """Whether there is a saved state to resume from."""
    return any((folder / slot).exists() for slot in SLOTS)


def clear_state(folder: Path) -> None:
    """Remove files that only an unfinished run needs."""
    for slot in SLOTS:
        (folder / slot).unlink(missing_ok=True)


def named(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Prefix the names of tensors with the name of their part; the inverse of :meth:`State.part`."""
    return {f"{part}/{name}": tensor for name, tensor in tensors.items()}


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors named ``parameter.key``, and the rest as JSON."""
    state = optimizer.state_dict()
    values = {f"{index}.{key}": value for index, own in state["state"].items() for key, value in own.items()}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    return tensors, {"values": rest, "groups": state["param_groups"]}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Restore an optimiser from the result of :func:`optimizer_state`."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **facts["values"]}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": facts["groups"]})
    for parameter, own in optimizer.state.items():
        # Files hold the default memory layout; sums in a layout other than the weight's would round in a different order.
        own.update({key: torch.empty_like(parameter).copy_(value) for key, value in own.items() if _is_like(value, parameter)})


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's generators, used by dropout; order, views and mixing are functions of (seed, epoch, sample) instead."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def load_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore torch's generators from :func:`random_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    if device.type == "mps":
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def whole() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the block has finished, so that no step is ever half-counted."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
