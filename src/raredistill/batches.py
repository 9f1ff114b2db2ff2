"""Batches of uint8 pixels read directly from the cohort, gathered and augmented on the compute device."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raredistill import memory
from raredistill.augment import STEPS, Augmentation, Mixing, Params, apply, make_params, mix_params, step_draws
from raredistill.cohort.store import Cohort, PixelReader
from raredistill.errors import ConfigError
from raredistill.sampling import epoch_order

RESIDENT_SHARE = 0.4
AHEAD = 4


@dataclass
class _Buffer:
    """Memory for the pixels of a batch, and an event that marks when the device has copied them."""

    pixels: Tensor
    copied: torch.cuda.Event | None = None


@dataclass(frozen=True)
class Mixed:
    """Partners mixed into a batch: their labels ``(N,)``, and ``share (N,)``, the share of each target that remains the sample's own."""

    labels: Tensor
    share: Tensor


@dataclass(frozen=True)
class Batch:
    """Samples of one step, with the union of the channels that its networks need.

    Attributes:
        rows: ``(N,)`` int64 rows of the cohort.
        images: ``(N, C, H, W)`` float32 in [0, 1].
        labels: ``(N,)`` int64 class indices.
        channels: names of the C channels.
        epoch: epoch that the batch belongs to.
        mixed: partners, if samples are mixed.
        view: number of the random view: a new one each epoch unless training cycles through a few.
        weight: weight of these samples' mean in the mean over all processes, which share a batch in nearly equal parts.
    """

    rows: Tensor
    images: Tensor
    labels: Tensor
    channels: tuple[str, ...]
    epoch: int = 0
    mixed: Mixed | None = None
    view: int = 0
    weight: float = 1.0

    def at(self, positions: Tensor) -> Batch:
        """Select samples of the batch; ``positions (M,)`` int64 on the CPU."""
        there = positions.to(self.labels.device, non_blocking=True)
        return Batch(self.rows[positions], self.images[there], self.labels[there], self.channels, self.epoch, view=self.view)

    def select(self, channels: Sequence[str]) -> Tensor:
        """Select the channels of one network, in its order."""
        if tuple(channels) == self.channels:
            return self.images
        # Slices, because an index would be a tensor on the CPU, and copying it would stall the device.
        places = [self.channels.index(channel) for channel in channels]
        return torch.cat([self.images[:, place : place + 1] for place in places], dim=1)

    def split(self, parts: int) -> list[Batch]:
        """Split into ``parts`` batches, in order, whose sizes differ by at most one; fewer if there are fewer samples."""
        cuts = torch.arange(len(self.labels)).tensor_split(min(parts, len(self.labels)))
        return [self._cut(slice(int(cut[0]), int(cut[-1]) + 1)) for cut in cuts]

    def _cut(self, part: slice) -> Batch:
        mixed = None if self.mixed is None else Mixed(self.mixed.labels[part], self.mixed.share[part])
        return Batch(self.rows[part], self.images[part], self.labels[part], self.channels, self.epoch, mixed, self.view, self.weight)


@dataclass(frozen=True)
class _Served:
    """The inputs of an epoch's batches.

    Attributes:
        parts: positions of each batch, on the CPU.
        positions: of all batches, one after the other, on the device.
        params: of their views; None where nothing is random.
        draws: random numbers of each step that plug-ins add to the views.
        strength: share of the own image, of each sample that is mixed.
    """

    parts: list[np.ndarray]
    positions: Tensor
    params: Params | None
    draws: list[Tensor]
    strength: Tensor | None

    @functools.cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(map(len, self.parts), initial=0))

    def place(self, number: int) -> slice:
        """Slice of one batch in the concatenated positions."""
        return slice(self._ends[number], self._ends[number + 1])


class Batches:
    """Batches of some rows of a cohort, identical whether pixels are resident on the device or streamed from disk.

    Args:
        cohort: source of pixels and labels.
        rows: ``(M,)`` rows to serve.
        channels: union of the channels that the networks need.
        batch_size: samples per batch, over all processes.
        device: device on which batches are made.
        sampler: order of an epoch if ``shuffle``.
        epochs: number of epochs in the training, for a sampler that changes over time.
        augmentation: strengths, or none.
        mixing: mixing of each sample with a partner, or none.
        views: number of random views per sample that epochs cycle through; a new one each epoch when not given.
        seed: of order and views.
        shuffle: whether to shuffle; otherwise rows come in the given order.
        residence: ``resident``, ``streamed`` or ``auto`` (resident when the pixels take at most 40 % of the device's free memory).
        drop_last: whether to leave out a smaller last batch.
        share: rank of this process, and number of processes: each serves its part of every batch.

    Raises:
        ConfigError: pixels should be resident but exceed the device's free memory, or there are more processes than samples in a training
            batch.
    """

    def __init__(
        self,
        cohort: Cohort,
        rows: np.ndarray,
        *,
        channels: Sequence[str],
        batch_size: int,
        device: torch.device,
        sampler: str = "natural",
        epochs: int = 1,
        augmentation: Augmentation | None = None,
        mixing: Mixing | None = None,
        views: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        residence: str = "auto",
        drop_last: bool = False,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.rows, self.channels, self.batch_size, self.device = rows, tuple(channels), batch_size, device
        self.sampler, self.augmentation, self.seed, self.shuffle, self.drop_last = sampler, augmentation, seed, shuffle, drop_last
        self.epochs, self.mixing, self.views, self.share = epochs, mixing, views, share
        if shuffle and share[1] > self._smallest():
            raise ConfigError(f"devices: {share[1]} cannot share a batch of {self._smallest()}; set fewer devices or another batch_size")
        self._labels = cohort.labels[rows]
        self._pixels = [cohort.pixels(channel) for channel in self.channels]
        self._labels_there = torch.from_numpy(self._labels).to(device)
        self._counts_there = torch.bincount(self._labels_there, minlength=len(cohort.classes))
        self._open = functools.partial(PixelReader, cohort, self.channels)
        self._resident = self._load() if self._fits(residence) else None

    def __len__(self) -> int:
        whole, rest = divmod(len(self.rows), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def _smallest(self) -> int:
        rest = len(self.rows) % self.batch_size
        return rest if rest and not self.drop_last else self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, starting with batch ``start``; order and views are functions of (seed, epoch, row)."""
        whole = self._parts(epoch)[start:]
        served = self._serve([self._own(part, self.share[0]) for part in whole], epoch)
        for number, (pixels, part) in enumerate(zip(self._pixels_of(served), whole, strict=True)):
            batch = self._batch(served, number, pixels, epoch)
            yield replace(batch, weight=self.share[1] * len(batch.labels) / len(part))

    def _own(self, part: np.ndarray, rank: int) -> np.ndarray:
        return np.array_split(part, self.share[1])[rank]

    def undivided(self) -> Batches:
        """The same batches, undivided: each complete in this process."""
        same = copy.copy(self)
        same.share = (0, 1)
        return same

    def back(self) -> Tensor:
        """Positions ``(M,)`` int64 that put the concatenated outputs of all processes back into the order of an unshuffled epoch."""
        served = [self._own(part, rank) for rank in range(self.share[1]) for part in self._parts(0)]
        return torch.from_numpy(np.argsort(np.concatenate(served)))

    def rows_of(self, epoch: int, step: int) -> np.ndarray:
        """Rows of the cohort in one batch of an epoch."""
        return np.asarray(self.rows[self._parts(epoch)[step]])

    def _parts(self, epoch: int) -> list[np.ndarray]:
        positions = self._order(epoch)
        return [positions[step * self.batch_size : (step + 1) * self.batch_size] for step in range(len(self))]

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(len(self.rows))
        return epoch_order(self._labels, sampler=self.sampler, seed=self.seed, epoch=epoch, epochs=self.epochs)

    def _serve(self, parts: list[np.ndarray], epoch: int) -> _Served:
        """Draw all views and partners of an epoch and copy them to the device before its first step, so that no step waits for them."""
        strength = None
        if self.mixing is not None and parts:
            samples = self.rows[np.concatenate(parts)]
            partners, shares = mix_params(self.mixing, seed=self.seed, epoch=epoch, samples=samples, population=len(self.rows))
            strength = torch.from_numpy(shares.astype(np.float32)).to(self.device)
            # A mixed batch is stored as its samples followed by their partners.
            cuts = np.split(partners, np.cumsum([len(part) for part in parts])[:-1])
            parts = [np.concatenate(pair) for pair in zip(parts, cuts, strict=True)]
        positions = np.concatenate(parts) if parts else np.empty(0, np.int64)
        params, draws = None, []
        if self.augmentation is not None:
            drawn: dict[str, Any] = {"seed": self.seed, "epoch": self._view(epoch), "samples": self.rows[positions], "device": self.device}
            params, draws = make_params(self.augmentation, **drawn), step_draws(self.augmentation.steps, **drawn)
        return _Served(parts, torch.from_numpy(positions).to(self.device), params, draws, strength)

    def _pixels_of(self, served: _Served) -> Iterator[Tensor]:
        if self._resident is None:
            yield from self._stream(served.parts)
            return
        # One buffer for all batches: later operations always copy, and new memory costs page faults.
        size = max(map(len, served.parts), default=0)
        buffer = torch.empty((size, *self._resident.shape[1:]), dtype=torch.uint8, device=self.device)
        for number, part in enumerate(served.parts):
            yield torch.index_select(self._resident, 0, served.positions[served.place(number)], out=buffer[: len(part)])

    def _stream(self, parts: list[np.ndarray]) -> Iterator[Tensor]:
        # A reader thread fills a few buffers in turn; each is reused once its pixels have been copied to the device or augmented.
        free: queue.SimpleQueue[_Buffer | None] = queue.SimpleQueue()
        ready: queue.SimpleQueue[_Buffer | BaseException] = queue.SimpleQueue()
        shape = (max(map(len, parts), default=0), *self._image_shape())
        for _ in range(min(AHEAD, len(parts))):
            free.put(_Buffer(torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")))
        reader = threading.Thread(target=self._read, args=(parts, free, ready), daemon=True)
        reader.start()
        try:
            for part in parts:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                pixels = item.pixels[: len(part)].to(self.device, non_blocking=True)
                item.copied = _event(self.device)
                yield pixels
                free.put(item)
        finally:
            free.put(None)

    def _read(
        self, parts: list[np.ndarray], free: queue.SimpleQueue[_Buffer | None], ready: queue.SimpleQueue[_Buffer | BaseException]
    ) -> None:
        try:
            with self._open() as files:
                for part in parts:
                    if (buffer := free.get()) is None:
                        return
                    if buffer.copied is not None:
                        buffer.copied.synchronize()
                    files.read(self.rows[part], buffer.pixels[: len(part)].numpy())
                    ready.put(buffer)
        except Exception as error:  # any error is raised again where the batch is consumed
            ready.put(error)

    def _load(self) -> Tensor:
        """Load all pixels onto the device, a few at a time, so that memory holds them only once."""
        shape = (len(self.rows), *self._image_shape())
        self._refuse_too_many(math.prod(shape))
        there = torch.empty(shape, dtype=torch.uint8, device=self.device)
        with self._open() as files:
            for start in range(0, len(self.rows), self.batch_size):
                rows = self.rows[start : start + self.batch_size]
                pixels = np.empty((len(rows), *shape[1:]), np.uint8)
                files.read(rows, pixels)
                there[start : start + len(rows)] = torch.from_numpy(pixels)
        return there

    def _refuse_too_many(self, size: int) -> None:
        size *= self._holders()
        free = free_memory(self.device)
        if size > free:
            raise ConfigError(
                f"residence: {len(self.rows)} samples of {len(self.channels)} channel(s) take {size / 1e9:.3g} GB, and {self.device} has "
                f"{free / 1e9:.3g} GB free; set residence=auto or streamed, prepare a cohort with a smaller --size, or name fewer channels"
            )

    def _image_shape(self) -> tuple[int, ...]:
        return (len(self._pixels), *self._pixels[0].shape[1:])

    def _batch(self, served: _Served, number: int, pixels: Tensor, epoch: int) -> Batch:
        own, rows = served.place(number), torch.from_numpy(self.rows[served.parts[number]])
        images = pixels.to(torch.float32).mul_(1 / 255) if served.params is None else apply(pixels, served.params.part(own))
        for name, draws in zip(self.augmentation.steps if self.augmentation is not None else (), served.draws, strict=True):
            images = STEPS[name].function(images, draws[own])
        labels = self._labels_there[served.positions[own]]
        if self.mixing is None or served.strength is None:
            return Batch(rows, images, labels, self.channels, epoch, view=self._view(epoch))
        size = len(rows) // 2
        return self._mixed(self.mixing, rows[:size], images, labels, served.strength[own.start // 2 : own.stop // 2], epoch)

    def _view(self, epoch: int) -> int:
        return epoch if self.views is None else epoch % self.views

    def _mixed(self, mixing: Mixing, rows: Tensor, images: Tensor, labels: Tensor, own: Tensor, epoch: int) -> Batch:
        size = len(rows)
        images = torch.lerp(images[size:], images[:size], own[:, None, None, None])
        share = mixing.label_share(own, labels[:size], labels[size:], self._counts_there) if mixing.remix else own
        return Batch(rows, images, labels[:size], self.channels, epoch, Mixed(labels[size:], share), self._view(epoch))

    def _fits(self, residence: str) -> bool:
        if residence not in ("auto", "resident", "streamed"):
            raise ConfigError(f"unknown residence {residence}; there are auto, resident and streamed")
        size = len(self.rows) * sum(pixels[0].size for pixels in self._pixels) if len(self.rows) else 0
        return residence == "resident" or (residence == "auto" and self._holders() * size <= RESIDENT_SHARE * free_memory(self.device))

    def _holders(self) -> int:
        # Each process holds all pixels, since it may need any of them in the next epoch. On the CPU they share one memory.
        return self.share[1] if self.device.type == "cpu" else 1


def _event(device: torch.device) -> torch.cuda.Event | None:
    """An event that marks the device's work so far; None on devices that work synchronously."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def free_memory(device: torch.device) -> int:
    """Free bytes on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return memory.available()
