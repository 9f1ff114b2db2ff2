"""Batches of uint8 straight from the cohort: gathered and augmented where the compute lives."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raredistill.augment import Augmentation, Mixing, apply, make_params, mix_params
from raredistill.cohort.store import Cohort
from raredistill.errors import ConfigError
from raredistill.sampling import epoch_order

RESIDENT_SHARE = 0.4
AHEAD = 4


@dataclass(frozen=True)
class Mixed:
    """What was mixed into the samples of a batch: labels ``(N,)`` of the partners, and ``share (N,)`` of each target that stays its own."""

    labels: Tensor
    share: Tensor


@dataclass(frozen=True)
class Batch:
    """Samples of one step: the union of the channels that its networks ask for.

    Attributes:
        rows: ``(N,)`` int64 rows of the cohort.
        images: ``(N, C, H, W)`` float32 in [0, 1].
        labels: ``(N,)`` int64 class indices.
        channels: names of the C channels.
        epoch: that the batch belongs to.
        mixed: partners, where samples are mixed.
        view: number of the random views, a new one each epoch unless training cycles through a few.
    """

    rows: Tensor
    images: Tensor
    labels: Tensor
    channels: tuple[str, ...]
    epoch: int = 0
    mixed: Mixed | None = None
    view: int = 0

    def at(self, positions: Tensor) -> Batch:
        """Some samples of the batch; ``positions (M,)`` int64 on the CPU."""
        there = positions.to(self.labels.device)
        return Batch(self.rows[positions], self.images[there], self.labels[there], self.channels, self.epoch, view=self.view)

    def select(self, channels: Sequence[str]) -> Tensor:
        """The view of one network: its channels, in its order."""
        if tuple(channels) == self.channels:
            return self.images
        return self.images[:, [self.channels.index(channel) for channel in channels]]

    def split(self, parts: int) -> list[Batch]:
        """Cut into ``parts`` batches, in order, of sizes that differ by one at most; fewer when there are not as many samples."""
        cuts = torch.arange(len(self.labels)).tensor_split(min(parts, len(self.labels)))
        return [self._cut(slice(int(cut[0]), int(cut[-1]) + 1)) for cut in cuts]

    def _cut(self, part: slice) -> Batch:
        mixed = None if self.mixed is None else Mixed(self.mixed.labels[part], self.mixed.share[part])
        return Batch(self.rows[part], self.images[part], self.labels[part], self.channels, self.epoch, mixed, self.view)


class Batches:
    """Batches of some rows of a cohort, the same whether pixels are resident on the device or streamed from disk.

    Args:
        cohort: where pixels and labels are.
        rows: ``(M,)`` rows to serve.
        channels: union of what the networks need.
        batch_size: samples a batch.
        device: where batches are made.
        sampler: order of an epoch when ``shuffle``.
        epochs: of the whole training, for a sampler that changes over it.
        augmentation: strengths, or none.
        mixing: of each sample with a partner, or none.
        views: random views of a sample that epochs cycle through; a new one each epoch when not given.
        seed: of order and views.
        shuffle: otherwise rows come in the given order.
        residence: ``resident``, ``streamed`` or ``auto`` (resident when the pixels take at most 40 % of the device's free memory).
        drop_last: leave out a smaller last batch.
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
    ) -> None:
        self.rows, self.channels, self.batch_size, self.device = rows, tuple(channels), batch_size, device
        self.sampler, self.augmentation, self.seed, self.shuffle, self.drop_last = sampler, augmentation, seed, shuffle, drop_last
        self.epochs, self.mixing, self.views = epochs, mixing, views
        self._labels = cohort.labels[rows]
        self._pixels = [cohort.pixels(channel) for channel in self.channels]
        self._labels_there = torch.from_numpy(self._labels).to(device)
        self._counts_there = torch.bincount(self._labels_there, minlength=len(cohort.classes))
        self._resident = self._gather(np.arange(len(rows))).to(device) if self._fits(residence) else None

    def __len__(self) -> int:
        whole, rest = divmod(len(self.rows), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Serve an epoch from its batch ``start`` on; order and views are functions of (seed, epoch, row)."""
        parts = [self._with_partners(part, epoch) for part in self._parts(epoch)[start:]]
        for part, pixels in self._pixels_of(parts):
            yield self._batch(part, pixels, epoch)

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

    def _with_partners(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        # A mixed batch is read as its samples followed by their partners.
        if self.mixing is None:
            return positions
        partners, _ = mix_params(self.mixing, seed=self.seed, epoch=epoch, samples=self.rows[positions], population=len(self.rows))
        return np.concatenate([positions, partners])

    def _pixels_of(self, parts: list[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor]]:
        if self._resident is None:
            yield from self._stream(parts)
            return
        # One buffer for all: what is made of it is always a copy, and fresh memory costs page faults.
        size = self.batch_size * (1 if self.mixing is None else 2)
        buffer = torch.empty((size, *self._resident.shape[1:]), dtype=torch.uint8, device=self.device)
        for part in parts:
            yield part, torch.index_select(self._resident, 0, torch.from_numpy(part).to(self.device), out=buffer[: len(part)])

    def _stream(self, parts: list[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor]]:
        waiting: queue.Queue[tuple[np.ndarray, Tensor] | BaseException] = queue.Queue(AHEAD)
        stop = threading.Event()
        reader = threading.Thread(target=self._read, args=(parts, waiting, stop), daemon=True)
        reader.start()
        try:
            for _ in parts:
                item = waiting.get()
                if isinstance(item, BaseException):
                    raise item
                yield item[0], item[1].to(self.device, non_blocking=True)
        finally:
            stop.set()

    def _read(
        self, parts: list[np.ndarray], waiting: queue.Queue[tuple[np.ndarray, Tensor] | BaseException], stop: threading.Event
    ) -> None:
        for part in parts:
            item: tuple[np.ndarray, Tensor] | BaseException
            try:
                item = (part, self._pinned(self._gather(part)))
            except (OSError, ValueError) as error:
                item = error
            while not stop.is_set():
                try:
                    waiting.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue

    def _gather(self, positions: np.ndarray) -> Tensor:
        rows = self.rows[positions]
        return torch.from_numpy(np.stack([pixels[rows] for pixels in self._pixels], axis=1))

    def _pinned(self, pixels: Tensor) -> Tensor:
        return pixels.pin_memory() if self.device.type == "cuda" else pixels

    def _batch(self, positions: np.ndarray, pixels: Tensor, epoch: int) -> Batch:
        rows = self.rows[positions]
        if self.augmentation is None:
            images = pixels.to(torch.float32).mul_(1 / 255)
        else:
            images = apply(pixels, make_params(self.augmentation, seed=self.seed, epoch=self._view(epoch), samples=rows))
        labels = self._labels_there[torch.from_numpy(positions).to(self.device)]
        if self.mixing is not None:
            return self._mixed(self.mixing, rows, images, labels, epoch)
        return Batch(torch.from_numpy(rows), images, labels, self.channels, epoch, view=self._view(epoch))

    def _view(self, epoch: int) -> int:
        return epoch if self.views is None else epoch % self.views

    def _mixed(self, mixing: Mixing, rows: np.ndarray, images: Tensor, labels: Tensor, epoch: int) -> Batch:
        size = len(rows) // 2
        _, strength = mix_params(mixing, seed=self.seed, epoch=epoch, samples=rows[:size], population=len(self.rows))
        own = torch.from_numpy(strength.astype(np.float32)).to(self.device)
        images = torch.lerp(images[size:], images[:size], own[:, None, None, None])
        share = mixing.label_share(own, labels[:size], labels[size:], self._counts_there) if mixing.remix else own
        return Batch(
            torch.from_numpy(rows[:size]), images, labels[:size], self.channels, epoch, Mixed(labels[size:], share), self._view(epoch)
        )

    def _fits(self, residence: str) -> bool:
        if residence not in ("auto", "resident", "streamed"):
            raise ConfigError(f"unknown residence {residence}; there are auto, resident and streamed")
        size = len(self.rows) * sum(pixels[0].size for pixels in self._pixels) if len(self.rows) else 0
        return residence == "resident" or (residence == "auto" and size <= RESIDENT_SHARE * _free_memory(self.device))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
