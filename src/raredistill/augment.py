"""Random views of images: drawing parameters (``make_params``) is separate from computing views (``apply``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor
from torch.nn import functional as F

from raredistill.plugins import Plugin, Registry
from raredistill.views import PRESETS, Augmentation

__all__ = ["PRESETS", "Augmentation"]

CACHED_PIXELS = 4 * 224 * 224


@dataclass(frozen=True)
class Step:
    """An augmentation of a plug-in, applied after the built-in one.

    Attributes:
        function: from images ``(N, C, H, W)`` in [0, 1] and ``(N, D)`` random numbers in [0, 1) to the changed images.
        draws: D.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    draws: int


def _adopt(plugin: Plugin) -> Step:
    return Step(plugin.thing, int(plugin.facts.get("draws", 1)))


STEPS: Registry[Step] = Registry("augmentation", {}, _adopt)
"""Augmentations that ``training.augmentation.steps`` may name."""
FIRST_STREAM = 1000
"""Streams of random numbers of the steps; those below belong to what is built in."""


def step_draws(steps: tuple[str, ...], *, seed: int, epoch: int, samples: np.ndarray, device: torch.device | None = None) -> list[Tensor]:
    """Random numbers ``(N, D)`` of each step, as a function of (seed, epoch, sample).

    Args:
        steps: their names.
        seed: of the run.
        epoch: epoch, or number of the view.
        samples: ``(N,)`` rows of the cohort.
        device: device on which the views will be computed; the CPU when not given.
    """
    made = []
    for place, name in enumerate(steps):
        streams = FIRST_STREAM * (place + 1) + np.arange(STEPS[name].draws)[:, None]
        made.append(
            torch.from_numpy(uniform(seed, epoch, samples, streams).astype(np.float32).T.copy()).to(device or "cpu", non_blocking=True)
        )
    return made


class Params(NamedTuple):
    """One view per image, ``(N,)`` float32 each: angle in radians, zoom, signs of the flips (-1 or 1), factors, and shifts in pixels."""

    angle: Tensor
    zoom: Tensor
    hsign: Tensor
    vsign: Tensor
    brightness: Tensor
    contrast: Tensor
    right: Tensor
    down: Tensor

    def part(self, images: slice) -> Params:
        """The views of some of the images."""
        return Params(*(values[images] for values in self))


def make_params(augmentation: Augmentation, *, seed: int, epoch: int, samples: np.ndarray, device: torch.device | None = None) -> Params:
    """Draw the views of some samples as a function of (seed, epoch, sample), independent of their batch.

    Args:
        augmentation: strengths.
        seed: of the run.
        epoch: epoch, or number of the view.
        samples: ``(N,)`` rows of the cohort.
        device: device on which the views will be computed; the CPU when not given.
    """
    draws = uniform(seed, epoch, samples, np.array([0, 1, 2, 3, 4, 5, 8, 9])[:, None]).astype(np.float32)
    low, high = augmentation.scale
    fields = dict(
        angle=np.deg2rad(augmentation.rotation * (2 * draws[0] - 1)),
        zoom=low + (high - low) * draws[1],
        hsign=np.where(draws[2] < augmentation.hflip, -1, 1).astype(np.float32),
        vsign=np.where(draws[3] < augmentation.vflip, -1, 1).astype(np.float32),
        brightness=1 + augmentation.brightness * (2 * draws[4] - 1),
        contrast=1 + augmentation.contrast * (2 * draws[5] - 1),
        right=_shifts(augmentation.crop, draws[6]),
        down=_shifts(augmentation.crop, draws[7]),
    )
    # One transfer for all fields.
    return Params(*torch.from_numpy(np.stack([fields[name] for name in Params._fields])).to(device or "cpu", non_blocking=True))


def _shifts(largest: int, draws: np.ndarray) -> np.ndarray:
    # A float32 draw just below 1 may round up to it.
    shifts: np.ndarray = np.minimum(np.floor(draws * (2 * largest + 1)), 2 * largest) - largest
    return shifts


@dataclass(frozen=True)
class Mixing:
    """Mixing of samples with partners.

    Attributes:
        alpha: parameter of the Beta distribution of the own share.
        remix: assign the label to the rarer class if the counts of the two classes differ enough.
        ratio: smallest ratio of the counts at which the label goes to the rarer class (kappa).
        threshold: largest share of the rarer class's image at which it still does not (tau).

    References:
        Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018; Chou et al., Remix: Rebalanced Mixup, ECCV Workshops 2020.
    """

    alpha: float = 1.0
    remix: bool = False
    ratio: float = 3.0
    threshold: float = 0.5

    def label_share(self, own: Tensor, labels: Tensor, partners: Tensor, counts: Tensor) -> Tensor:
        """Share of each target that remains the sample's own label: ``(N,)``.

        Args:
            own: ``(N,)`` share of the sample's own image.
            labels: ``(N,)`` of the samples.
            partners: ``(N,)`` labels of their partners.
            counts: ``(K,)`` training samples per class.
        """
        commoner = counts[labels] / counts[partners]
        to_partner = (commoner >= self.ratio) & (own < self.threshold)
        to_own = (commoner <= 1 / self.ratio) & (1 - own < self.threshold)
        return own.masked_fill(to_partner, 0.0).masked_fill(to_own, 1.0)


MIXINGS: dict[str, Mixing | None] = {"none": None, "mixup": Mixing(), "remix": Mixing(remix=True)}


def mix_params(mixing: Mixing, *, seed: int, epoch: int, samples: np.ndarray, population: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw partners and strengths as functions of (seed, epoch, sample).

    Args:
        mixing: strength.
        seed: of the run.
        epoch: from 0.
        samples: ``(N,)`` rows of the cohort.
        population: number of positions that partners are drawn from.

    Returns:
        ``(N,)`` int64 positions of the partners, and ``(N,)`` float64 shares of the own images.
    """
    draws = uniform(seed, epoch, samples, np.array([[6], [7]]))
    return (draws[0] * population).astype(np.int64), betaincinv(mixing.alpha, mixing.alpha, draws[1])


def uniform(seed: int, epoch: int, samples: np.ndarray, stream: int | np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) from a counter: ``(N,)`` float64, or ``(S, N)`` for streams ``(S, 1)``.

    References:
        Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014 (the mixing function of SplitMix64).
    """
    state = samples.astype(np.uint64)
    for word in (seed, epoch, stream):
        state = _mix(state ^ _mix(np.atleast_1d(word).astype(np.uint64)))
    return (state >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def _mix(value: np.ndarray) -> np.ndarray:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)))


def apply(images: Tensor, params: Params) -> Tensor:
    """Compute views: one affine resampling (rotation, zoom and flips together), then contrast and brightness.

    Args:
        images: ``(N, C, H, W)``, uint8 or float32 in [0, 1].
        params: one view per image.

    Returns:
        ``(N, C, H, W)`` float32 in [0, 1]; pixels from outside the image are 0.
    """
    columns, rows = _positions(params, images)
    unit = 1 / 255 if images.dtype == torch.uint8 else 1.0
    contrast, brightness = params.contrast[:, None, None, None], unit * params.brightness[:, None, None, None]
    views = torch.empty(images.shape, device=images.device)
    parts = _parts(images)
    # Reused for all parts: page faults of new memory would cost more than the computation.
    grids = torch.empty((len(images[parts[0]]), *images.shape[2:]), dtype=torch.complex64, device=images.device)
    for part in parts:
        grid = torch.view_as_real(torch.add(columns[part], rows[part], out=grids[: len(columns[part])]))
        turned = F.grid_sample(views[part].copy_(images[part]), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        mean = turned.mean(dim=(2, 3), keepdim=True)
        # b (m + c (x - m)) = b c x + b m (1 - c), in place, with as few passes over the pixels as possible.
        factor, shift = brightness[part] * contrast[part], brightness[part] * mean * (1 - contrast[part])
        torch.clamp(turned.mul_(factor).add_(shift), 0, 1, out=views[part])
    return views


def _parts(images: Tensor) -> list[slice]:
    # On a CPU, a few images at a time, so that the output of one operation is still in cache for the next (1.8 times as fast).
    step = len(images) if images.device.type != "cpu" else max(1, CACHED_PIXELS // images[0].numel())
    return [slice(start, start + step) for start in range(0, len(images), step)]


def _positions(params: Params, images: Tensor) -> tuple[Tensor, Tensor]:
    # Input positions (x, y) in [-1, 1] of every output pixel are a column's share (N, 1, W) plus a row's (N, H, 1), each a complex number
    # x + iy: one broadcast addition, several times faster than affine_grid's matrix products. The ratio of the sides keeps angles true on
    # oblong images.
    height, width = images.shape[2:]
    ratio = height / width
    cos, sin = torch.cos(params.angle) / params.zoom, torch.sin(params.angle) / params.zoom
    across = params.hsign * torch.complex(cos, sin / ratio)
    down = params.vsign * torch.complex(-sin * ratio, cos)
    offset = torch.complex(2 / width * params.right, 2 / height * params.down)
    columns = across[:, None, None] * _centres(width, images.device) + offset[:, None, None]
    return columns, down[:, None, None] * _centres(height, images.device)[:, None]


def _centres(size: int, device: torch.device) -> Tensor:
    # Centres of pixels if the image spans [-1, 1].
    return (2 * torch.arange(size, dtype=torch.float32, device=device) + 1) / size - 1
