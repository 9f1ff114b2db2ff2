"""From a volume's numbers to bytes: find the background, normalise inside the brain, resize once.

Every step gives the same outcome for a volume and for an increasing affine copy of it, so that one patient in two file
formats is one patient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raredistill.errors import DataError

LOW, HIGH = 0.01, 0.99
"""Quantiles of the brain's values that become 0 and 255."""
EXACT = 2**20
"""Voxels around the brain up to which its quantiles are exact; of more, every second row and column is looked at."""
FARTHEST = 1e30
"""Greatest value, and one over the smallest range, that single precision can scale."""
LANES = 4
"""PyTorch's fast path for bytes resizes up to four interleaved channels at about the cost of one."""
TOGETHER = 4
"""Slices resized at a time: what one step writes is still in the processor's cache when the next reads it."""


@dataclass(frozen=True)
class Window:
    """How one modality of one patient becomes bytes, and what its slices hold.

    Attributes:
        low: value that becomes 0; below ``high`` also where all of the brain has one value.
        high: value that becomes 255.
        brain: ``(n,)`` voxels above the background, by slice.
        present: ``(n,)`` whether a slice differs from the background anywhere.
        box: slices, rows and columns outside of which there is no brain.
    """

    low: float
    high: float
    brain: np.ndarray
    present: np.ndarray
    box: tuple[slice, slice, slice]


def commonest(volume: np.ndarray) -> float:
    """The value that most voxels have: the background of a skull-stripped scan, whatever its scale."""
    values, counts = np.unique(volume, return_counts=True)
    return float(values[counts.argmax()])


def window(volume: np.ndarray, background: np.ndarray | float | None = None) -> Window:
    """Find the robust range of a volume's brain.

    Args:
        volume: ``(n, height, width)`` numbers in any unit.
        background: the background's value, or ``(n, 1, 1)`` values by slice; by default the commonest value.

    Raises:
        DataError: values are not finite, or no voxel lies above the background.
    """
    if volume.dtype.kind == "f" and not np.isfinite(volume).all():
        raise DataError("holds values that are not finite (NaN or infinity)")
    levels = _levels(volume, volume[0, 0, 0] if background is None else background)
    brain, different, touched = _scan(volume, levels)
    if background is None and 2 * different.sum() >= volume.size:  # a majority is the mode; only else are nine million numbers sorted
        levels = _levels(volume, commonest(volume))
        brain, different, touched = _scan(volume, levels)
    if not touched.any():
        raise DataError(f"holds nothing above its background of {levels[0]:g}: it is constant, or bright and dark are exchanged")
    depth, rows, columns = _extent(brain > 0), _extent(touched.any(axis=1)), _extent(touched.any(axis=0))
    low, high = _range(volume[depth, rows, columns], levels[depth])
    if max(abs(low), abs(high)) > FARTHEST or high - low < 1 / FARTHEST:
        raise DataError(f"holds values from {low:g} to {high:g}, which no scanner gives")
    return Window(low, high, brain, different > 0, (depth, rows, columns))


def _levels(volume: np.ndarray, background: np.ndarray | float) -> np.ndarray:
    return np.broadcast_to(np.asarray(background).astype(volume.dtype).reshape(-1), len(volume))


def _scan(volume: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Voxels above the background and unlike it by slice, and where any slice has brain.

    Slice by slice, since a slice fits the processor's cache and a volume does not.
    """
    brain, different = np.zeros(len(volume), np.int64), np.zeros(len(volume), np.int64)
    touched = np.zeros(volume.shape[1:], bool)
    for index, (plane, level) in enumerate(zip(volume, levels, strict=True)):
        different[index] = np.count_nonzero(plane != level)
        if different[index]:
            inside = plane > level
            brain[index] = np.count_nonzero(inside)
            touched |= inside
    return brain, different, touched


def _range(middle: np.ndarray, levels: np.ndarray) -> tuple[float, float]:
    """Robust least and greatest value of the brain, the background's levels given by slice."""
    step = 2 if middle.size > EXACT else 1
    sample = np.ascontiguousarray(middle[:, ::step, ::step])
    values = sample[sample > levels.reshape(-1, 1, 1)]
    low, high = _quantiles(values if values.size else middle[middle > levels.reshape(-1, 1, 1)])
    return (low, high) if low < high else (float(levels.min()), high)  # all of the brain has one value: white on black


def _extent(touched: Any) -> slice:
    indices = np.flatnonzero(touched)
    return slice(int(indices[0]), int(indices[-1]) + 1)


def _quantiles(values: np.ndarray) -> tuple[float, float]:
    first, second = int(LOW * (values.size - 1)), int(np.ceil(HIGH * (values.size - 1)))
    if values.dtype.kind in "iu" and values.dtype.itemsize <= 2:  # counting beats sorting
        start = int(values.min())
        ranks = np.cumsum(np.bincount(values.astype(np.int64) - start))
        return float(start + np.searchsorted(ranks, first, "right")), float(start + np.searchsorted(ranks, second, "right"))
    ordered = np.partition(values, [first, second])
    return float(ordered[first]), float(ordered[second])


def to_bytes(volume: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map ``low`` .. ``high`` to 0 .. 255, saturating.

    Args:
        volume: ``(n, height, width)``.
        low: becomes 0, and so does everything below, background included.
        high: becomes 255, and so does everything above.

    Returns:
        ``(n, height, width)`` uint8.
    """
    precision = np.result_type(volume.dtype, np.float32).type
    scale = 255 / (high - low)
    slope, intercept = precision(scale), precision(0.5 - low * scale)
    outcome, buffer = np.empty(volume.shape, np.uint8), np.empty(volume.shape[1:], precision)
    for plane, target in zip(volume, outcome, strict=True):
        np.copyto(buffer, plane)  # numpy converts and multiplies faster than it multiplies numbers of two kinds
        with np.errstate(over="ignore"):  # a stray voxel may overflow to infinity, which saturates as it should
            np.multiply(buffer, slope, out=buffer)
        np.add(buffer, intercept, out=buffer)
        np.clip(buffer, 0, 255, out=buffer)
        target[...] = buffer
    return outcome


class Renderer:
    """Makes bytes of the modalities of one patient, which come one after the other: only one at a time is in memory as numbers."""

    def __init__(self) -> None:
        self._windows: dict[str, Window] = {}
        self._boxes: list[np.ndarray] = []
        self._native = (0, 0)

    def add(self, channel: str, volume: np.ndarray, background: np.ndarray | float | None = None) -> None:
        """Normalise a modality.

        Args:
            channel: its name; at most four come.
            volume: ``(n, height, width)`` numbers in any unit, of one shape for all modalities.
            background: as ``window`` takes it.

        Raises:
            DataError: as ``window`` does.
        """
        limits = window(volume, background)
        self._boxes.append(to_bytes(volume[limits.box], limits.low, limits.high))
        self._windows[channel], self._native = limits, (volume.shape[1], volume.shape[2])

    @property
    def brain(self) -> np.ndarray:
        """``(n,)`` voxels of brain by slice, of the modality that has most."""
        counts: np.ndarray = np.array([limits.brain for limits in self._windows.values()]).max(axis=0)
        return counts

    @property
    def present(self) -> np.ndarray:
        """``(n,)`` whether any modality differs from its background."""
        anywhere: np.ndarray = np.array([limits.present for limits in self._windows.values()]).max(axis=0)
        return anywhere

    def resized(self, keep: np.ndarray, size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Channel -> ``(m, *size)`` uint8: the slices ``keep``; a smaller size averages over the pixels that it covers."""
        pictures = {channel: np.zeros((len(keep), *size), np.uint8) for channel in self._windows}
        (rows, rows_there), (columns, columns_there) = (self._part(axis, size[axis]) for axis in (0, 1))
        canvas = np.empty((TOGETHER, rows.stop - rows.start, columns.stop - columns.start, LANES), np.uint8)
        for start in range(0, len(keep), TOGETHER):
            some = keep[start : start + TOGETHER]
            self._paint(canvas, some, rows.start, columns.start)
            images = _resize(canvas[: len(some)], (rows_there.stop - rows_there.start, columns_there.stop - columns_there.start))
            for lane, picture in enumerate(pictures.values()):
                picture[start : start + len(some), rows_there, columns_there] = images[..., lane]
        return pictures

    def _part(self, axis: int, size: int) -> tuple[slice, slice]:
        """What to resize of an axis, and where its outcome belongs: all modalities' brain, with a margin of background."""
        boxes = [limits.box[axis + 1] for limits in self._windows.values()]
        return aligned(min(box.start for box in boxes), max(box.stop for box in boxes), self._native[axis], size)

    def _paint(self, canvas: np.ndarray, some: np.ndarray, top: int, left: int) -> None:
        """Put some slices of every modality side by side, lane by lane."""
        canvas[...] = 0
        for lane, (limits, pixels) in enumerate(zip(self._windows.values(), self._boxes, strict=True)):
            depth, rows, columns = limits.box
            for image, index in zip(canvas, some, strict=False):
                if depth.start <= index < depth.stop:
                    inside = image[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left, lane]
                    inside[...] = pixels[index - depth.start]


def aligned(start: int, stop: int, extent: int, size: int) -> tuple[slice, slice]:
    """Part of an axis that can be resized by itself to the same bytes, where all outside ``start`` .. ``stop`` is 0.

    With ``extent`` and ``size`` in the ratio a : b, every a pixels become b, so a part from a multiple of a to another is a smaller
    axis of the same ratio. The margin lets no pixel of the part look beyond it at anything but 0.

    Args:
        start: first pixel that may not be 0.
        stop: one behind the last.
        extent: pixels of the whole axis.
        size: pixels that it is resized to.

    Returns:
        The part before and after.
    """
    blocks = math.gcd(extent, size)
    before, after = extent // blocks, size // blocks
    margin = 1 + max(1, -(-extent // size))  # half of the resampling filter's width, rounded up
    first, last = max(0, start - margin) // before, -(-min(extent, stop + margin) // before)
    return slice(first * before, last * before), slice(first * after, last * after)


def nearest(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``(m, height, width)`` to ``(m, *size)`` uint8 without values that were not there: each pixel takes the one at its centre."""
    if not len(images):
        return np.zeros((0, *size), np.uint8)
    tensor = torch.from_numpy(images)[:, None]
    outcome: np.ndarray = torch.nn.functional.interpolate(tensor, size, mode="nearest-exact")[:, 0].numpy()
    return outcome


def _resize(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``(m, height, width, LANES)`` to ``(m, *size, LANES)``, bytes to bytes."""
    if not len(images):
        return np.zeros((0, *size, LANES), np.uint8)
    if images.shape[1:3] == size:
        return images
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(tensor, size, mode="bilinear", antialias=True, align_corners=False)
    outcome: np.ndarray = resized.permute(0, 2, 3, 1).numpy()
    return outcome
