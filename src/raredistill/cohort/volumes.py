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
APART = 0.02
"""Least depth below the background, as a share of the brain's range, at which dark brain is told from the ringing of a resampling."""
FEWEST_BELOW = 0.05
"""Share of the voxels unlike the background that must lie below it before the background can lie inside the brain's range."""
FEW_LEVELS = 26
"""A tenth of 256: with fewer grey values in all of a brain, the file keeps less than it could."""
SAMPLE = 2**15
"""Voxels of the brain among which grey values are counted."""
TOGETHER = 4
"""Slices resized at a time: what one step writes is still in the processor's cache when the next reads it."""


@dataclass(frozen=True)
class Window:
    """Conversion of one patient's modality to bytes, and the content of its slices.

    Attributes:
        low: value that becomes 0; below ``high`` also where all of the brain has one value.
        high: value that becomes 255.
        brain: ``(n,)`` voxels above the background, by slice; unlike the background where that lies inside the brain's range.
        present: ``(n,)`` whether a slice differs from the background anywhere.
        box: slices, rows and columns outside of which there is no brain.
        inside: the background's value where brain is darker than it, as after a z-score inside the brain; else None.
        greys: different values among a sample of the brain.
    """

    low: float
    high: float
    brain: np.ndarray
    present: np.ndarray
    box: tuple[slice, slice, slice]
    inside: float | None = None
    greys: int = 256


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
    counts = _scan(volume, levels)
    if background is None and 2 * counts.different.sum() >= volume.size:  # else a majority is the mode, unsorted
        levels = _levels(volume, commonest(volume))
        counts = _scan(volume, levels)
    if not counts.touched.any():
        raise DataError(f"holds nothing above its background of {levels[0]:g}: it is constant, or bright and dark are exchanged")
    inside = background is None and counts.dark > FEWEST_BELOW * counts.different.sum() and _is_dark_brain(volume, float(levels[0]))
    if inside:
        counts = _scan_unlike(volume, levels[0])
    box = _extent(counts.brain > 0), _extent(counts.touched.any(axis=1)), _extent(counts.touched.any(axis=0))
    values = _sample(volume[box], levels[box[0]], inside=inside)
    low, high = _range(values, levels)
    if max(abs(low), abs(high)) > FARTHEST or high - low < 1 / FARTHEST:
        raise DataError(f"holds values from {low:g} to {high:g}, which no scanner gives")
    greys = np.unique(values[:: max(1, values.size // SAMPLE)]).size
    return Window(low, high, counts.brain, counts.different > 0, box, float(levels[0]) if inside else None, greys)


@dataclass(frozen=True)
class _Counts:
    """Voxels above the background and unlike it by slice, those below it, and where any slice has brain."""

    brain: np.ndarray
    different: np.ndarray
    dark: int
    touched: np.ndarray


def _levels(volume: np.ndarray, background: np.ndarray | float) -> np.ndarray:
    return np.broadcast_to(np.asarray(background).astype(volume.dtype).reshape(-1), len(volume))


def _scan(volume: np.ndarray, levels: np.ndarray) -> _Counts:
    """Slice by slice, since a slice fits the processor's cache and a volume does not."""
    brain, different = np.zeros(len(volume), np.int64), np.zeros(len(volume), np.int64)
    touched = np.zeros(volume.shape[1:], bool)
    for index, (plane, level) in enumerate(zip(volume, levels, strict=True)):
        different[index] = np.count_nonzero(plane != level)
        if different[index]:
            inside = plane > level
            brain[index] = np.count_nonzero(inside)
            touched |= inside
    return _Counts(brain, different, int(different.sum() - brain.sum()), touched)


def _scan_unlike(volume: np.ndarray, level: Any) -> _Counts:
    """As ``_scan``, where everything unlike the background is brain."""
    unlike = volume != level
    brain = np.count_nonzero(unlike, axis=(1, 2))
    return _Counts(brain, brain, 0, unlike.any(axis=0))


def _is_dark_brain(volume: np.ndarray, level: float) -> bool:
    """Whether what lies below the background is brain, and neither the ringing of a resampling nor padding of one value."""
    below, above = volume[volume < level].astype(np.float64), volume[volume > level].astype(np.float64)
    deep = level - np.median(below) >= APART * (np.quantile(above, HIGH) - np.quantile(below, LOW))
    _, counts = np.unique(below, return_counts=True)
    return bool(deep and 2 * counts.max() <= below.size)


def _sample(middle: np.ndarray, levels: np.ndarray, *, inside: bool) -> np.ndarray:
    """Values of the brain, those of every second row and column where it is large; the background's levels are given by slice."""
    step = 2 if middle.size > EXACT else 1
    for pace in (step, 1):
        sample = np.ascontiguousarray(middle[:, ::pace, ::pace])
        values: np.ndarray = sample[sample != levels[0]] if inside else sample[sample > levels.reshape(-1, 1, 1)]
        if values.size:
            break
    return values


def _range(values: np.ndarray, levels: np.ndarray) -> tuple[float, float]:
    """Robust least and greatest value of the brain."""
    low, high = _quantiles(values)
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
    """Makes bytes of the modalities of one scan, which come one after the other: only one at a time is in memory as numbers.

    Attributes:
        remarks: what is odd about the values of a modality, though it can be read.
    """

    def __init__(self) -> None:
        self.remarks: list[str] = []
        self._windows: dict[str, Window] = {}
        self._boxes: list[np.ndarray] = []
        self._native = (0, 0)

    def add(
        self,
        channel: str,
        volume: np.ndarray,
        background: np.ndarray | float | None = None,
        limits: tuple[float, float] | None = None,
    ) -> None:
        """Normalise a modality.

        Args:
            channel: its name; at most four come.
            volume: ``(n, height, width)`` numbers in any unit, of one shape for all modalities.
            background: as ``window`` takes it.
            limits: values that become 0 and 255, in place of the brain's robust range.

        Raises:
            DataError: as ``window`` does.
        """
        found = window(volume, background)
        low, high = limits or (found.low, found.high)
        middle = volume[found.box]
        pixels = to_bytes(middle, low, high)
        if found.inside is not None:
            pixels[middle == found.inside] = 0
        if found.greys < FEW_LEVELS:
            self.remarks.append(f"{channel} has only {found.greys} grey values in the brain, under a tenth of the 256 that are kept")
        self._boxes.append(pixels)
        self._windows[channel], self._native = found, (volume.shape[1], volume.shape[2])

    def twins(self) -> list[tuple[str, str]]:
        """Modalities whose pixels are the same up to rounding: one of them is a copy of the other, whatever its type and scale."""
        boxes = list(zip(self._windows.items(), self._boxes, strict=True))
        pairs = [(one, other) for place, one in enumerate(boxes) for other in boxes[:place]]
        return [(there[0][0], here[0][0]) for here, there in pairs if here[0][1].box == there[0][1].box and _alike(here[1], there[1])]

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
        """Part of an axis to resize, and position of the result: all modalities' brain, with a margin of background."""
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


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two volumes of bytes differ by one at most; a few voxels tell most that do not."""
    for step in (7, 1):
        a, b = one[::step, ::step, ::step], other[::step, ::step, ::step]
        if (np.maximum(a, b) - np.minimum(a, b) > 1).any():
            return False
    return True


def air(volume: np.ndarray) -> float:
    """Upper end of the noise around a head that is not skull-stripped: Otsu's threshold on a sample, halved towards the darkest value.

    Args:
        volume: ``(n, height, width)`` numbers.

    References:
        Otsu, A threshold selection method from gray-level histograms, IEEE Trans. Syst. Man Cybern. 9 (1979), 62-66.
    """
    step = max(1, round((volume.size / 2**18) ** (1 / 3)))
    sample = volume[::step, ::step, ::step].astype(np.float64)
    lowest, highest = sample.min(), np.quantile(sample, 0.995)
    if not highest > lowest:
        return float(lowest)
    counts, edges = np.histogram(sample, bins=256, range=(lowest, highest))
    weight = np.cumsum(counts)
    total = np.cumsum(counts * (edges[:-1] + edges[1:]) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (total[-1] * weight - total * weight[-1]) ** 2 / (weight * (weight[-1] - weight))
    return float(lowest + (edges[int(np.nanargmax(between[:-1])) + 1] - lowest) / 2)


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
