"""From a volume's numbers to bytes: find the background, normalise inside the brain, resize once.

Every step gives the same outcome for a volume and for an increasing affine copy of it, so that one patient in two file
formats is one patient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raredistill.errors import DataError

LOW, HIGH = 0.01, 0.99
"""Quantiles of the brain's values that become 0 and 255."""
LANES = 4
"""PyTorch's fast path for bytes resizes up to four interleaved channels at about the cost of one."""


@dataclass(frozen=True)
class Window:
    """How one modality of one patient becomes bytes, and what its slices hold.

    Attributes:
        low: value that becomes 0; below ``high`` also where all of the brain has one value.
        high: value that becomes 255.
        brain: ``(n,)`` voxels above the background, by slice.
        present: ``(n,)`` whether a slice differs from the background anywhere.
        box: rows and columns outside of which no slice has brain.
    """

    low: float
    high: float
    brain: np.ndarray
    present: np.ndarray
    box: tuple[slice, slice]


def commonest(volume: np.ndarray) -> float:
    """The value that most voxels have: the background of a skull-stripped scan, whatever its scale."""
    corner = volume[(0,) * volume.ndim]
    if (
        2 * sum(np.count_nonzero(plane == corner) for plane in volume) > volume.size
    ):  # a majority is the mode; no need to sort nine million numbers
        return float(corner)
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
        raise DataError("values that are not finite (NaN or infinity)")
    level = commonest(volume) if background is None else background
    levels = np.broadcast_to(np.asarray(level).astype(volume.dtype).reshape(-1), len(volume))
    brain, present, touched = _scan(volume, levels)
    if not touched.any():
        raise DataError("nothing but background")
    depth, rows, columns = _extent(brain > 0), _extent(touched.any(axis=1)), _extent(touched.any(axis=0))
    middle = np.ascontiguousarray(volume[depth, rows, columns])  # a fraction of the volume, and twice as fast once it is compact
    low, high = _quantiles(middle[middle > levels[depth].reshape(-1, 1, 1)])
    if low == high:
        low = float(levels.min())  # all of the brain has one value: white on black
    return Window(low, high, brain, present, (rows, columns))


def _scan(volume: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Brain voxels and presence by slice, and where any slice has brain; slice by slice, since a slice fits the processor's cache."""
    brain, present = np.zeros(len(volume), np.int64), np.zeros(len(volume), bool)
    touched = np.zeros(volume.shape[1:], bool)
    for index, (plane, level) in enumerate(zip(volume, levels, strict=True)):
        inside = plane > level
        brain[index] = np.count_nonzero(inside)
        present[index] = brain[index] > 0 or bool((plane != level).any())
        if brain[index]:
            touched |= inside
    return brain, present, touched


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


def to_bytes(volume: np.ndarray, keep: np.ndarray, low: float, high: float, out: np.ndarray) -> None:
    """Map ``low`` .. ``high`` to 0 .. 255, saturating.

    Args:
        volume: ``(n, height, width)``.
        keep: ``(m,)`` slices to take.
        low: becomes 0, and so does everything below, background included.
        high: becomes 255, and so does everything above.
        out: ``(m, height, width)`` uint8, written in place; may be strided.
    """
    precision = np.result_type(volume.dtype, np.float32).type
    buffer = np.empty(volume.shape[1:], precision)
    scale = precision(255 / (high - low))
    for target, index in zip(out, keep, strict=True):
        np.subtract(volume[index], precision(low), out=buffer)
        np.multiply(buffer, scale, out=buffer)
        np.add(buffer, precision(0.5), out=buffer)
        np.clip(buffer, 0, 255, out=buffer)
        target[...] = buffer.astype(np.uint8)


def render(volumes: Sequence[np.ndarray], windows: Sequence[Window], keep: np.ndarray, size: tuple[int, int]) -> list[np.ndarray]:
    """Normalise and resize the kept slices of all modalities of one patient.

    Args:
        volumes: at most four modalities, each ``(n, height, width)``.
        windows: one a modality.
        keep: ``(m,)`` slices to take.
        size: ``(height, width)`` of the outcome; smaller sizes average over the pixels they cover.

    Returns:
        One ``(m, *size)`` uint8 array a modality.
    """
    interleaved = np.zeros((len(keep), *volumes[0].shape[1:], LANES), np.uint8)
    for lane, (volume, limits) in enumerate(zip(volumes, windows, strict=True)):
        rows, columns = limits.box  # all else is below the range: it stays 0
        to_bytes(volume[:, rows, columns], keep, limits.low, limits.high, interleaved[:, rows, columns, lane])
    resized = _resize(interleaved, size)
    return [np.ascontiguousarray(resized[..., lane]) for lane in range(len(volumes))]


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
