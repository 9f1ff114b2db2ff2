"""Random views of images: randomness (``make_params``) apart from computation (``apply``)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Augmentation:
    """How strongly views differ.

    Attributes:
        rotation: largest angle to either side, in degrees.
        hflip: probability of a left-right flip.
        vflip: probability of an up-down flip.
        scale: smallest and largest zoom.
        brightness: largest change of the brightness factor (0.2: 0.8 to 1.2).
        contrast: the same around each image's mean.
    """

    rotation: float = 0.0
    hflip: float = 0.0
    vflip: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    brightness: float = 0.0
    contrast: float = 0.0


PRESETS: dict[str, Augmentation | None] = {
    "none": None,
    "default": Augmentation(rotation=15, hflip=0.5, scale=(0.9, 1.1), brightness=0.2, contrast=0.2),
    "thesis": Augmentation(rotation=30, hflip=0.5, vflip=0.5, scale=(0.9, 1.1), brightness=0.2, contrast=0.2),
}


@dataclass(frozen=True)
class Params:
    """One view an image, ``(N,)`` float32 each: angle in radians, zoom, signs of the flips (-1 or 1), brightness and contrast factors."""

    angle: np.ndarray
    zoom: np.ndarray
    hsign: np.ndarray
    vsign: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray


def make_params(augmentation: Augmentation, *, seed: int, epoch: int, samples: np.ndarray) -> Params:
    """Draw the views of some samples as a function of (seed, epoch, sample), whatever batch they are in.

    Args:
        augmentation: strengths.
        seed: of the run.
        epoch: or number of the view.
        samples: ``(N,)`` rows of the cohort.
    """
    draws = [uniform(seed, epoch, samples, stream).astype(np.float32) for stream in range(6)]
    low, high = augmentation.scale
    return Params(
        angle=np.deg2rad(augmentation.rotation * (2 * draws[0] - 1)),
        zoom=low + (high - low) * draws[1],
        hsign=np.where(draws[2] < augmentation.hflip, -1, 1).astype(np.float32),
        vsign=np.where(draws[3] < augmentation.vflip, -1, 1).astype(np.float32),
        brightness=1 + augmentation.brightness * (2 * draws[4] - 1),
        contrast=1 + augmentation.contrast * (2 * draws[5] - 1),
    )


def uniform(seed: int, epoch: int, samples: np.ndarray, stream: int) -> np.ndarray:
    """Numbers in [0, 1) from a counter: ``(N,)`` float64.

    References:
        Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014 (the mixing function of SplitMix64).
    """
    state = samples.astype(np.uint64)
    for word in (seed, epoch, stream):
        state = _mix(state ^ _mix(np.array([word], dtype=np.uint64)))
    return (state >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def _mix(value: np.ndarray) -> np.ndarray:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)))


def apply(images: Tensor, params: Params) -> Tensor:
    """Compute views: one affine resampling (rotation, zoom and flips together), then contrast and brightness.

    Args:
        images: ``(N, C, H, W)`` in [0, 1].
        params: one view an image.

    Returns:
        ``(N, C, H, W)`` in [0, 1]; what comes from outside the image is 0.
    """
    grid = _grid(params, images)
    turned = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    contrast, brightness = (
        torch.from_numpy(values).to(images.device)[:, None, None, None] for values in (params.contrast, params.brightness)
    )
    mean = turned.mean(dim=(1, 2, 3), keepdim=True)
    # b (m + c (x - m)) = b c x + b m (1 - c), in place: the picture is touched as few times as can be.
    return turned.mul_(brightness * contrast).add_(brightness * mean * (1 - contrast)).clamp_(0, 1)


def _grid(params: Params, images: Tensor) -> Tensor:
    # Input positions (x, y) in [-1, 1] of every output pixel, (N, H, W, 2). A column's share plus a row's share, each a complex number, are
    # one broadcast addition: several times faster than affine_grid's matrix products. The ratio of the sides keeps angles true on oblong
    # images.
    height, width = images.shape[2:]
    ratio = height / width
    cos, sin = np.cos(params.angle) / params.zoom, np.sin(params.angle) / params.zoom
    across = params.hsign * (cos + 1j * sin / ratio)
    down = params.vsign * (-sin * ratio + 1j * cos)
    columns, rows = across[:, None] * _centres(width), down[:, None] * _centres(height)
    shares = [torch.from_numpy(share.astype(np.complex64)).to(images.device) for share in (columns[:, None, :], rows[:, :, None])]
    return torch.view_as_real(shares[0] + shares[1])


def _centres(size: int) -> np.ndarray:
    # Centres of pixels when the image spans [-1, 1].
    return (2 * np.arange(size, dtype=np.float32) + 1) / size - 1
