"""An augmentation of your own: noise, as a function of the random numbers that it is given, so that runs repeat themselves.

raredistill study study.yaml --plugin examples/augmentation.py 'training.augmentation={preset: default, steps: [grain]}'
"""

import torch
from torch import Tensor

import raredistill


@raredistill.augmentation(draws=2)
def grain(images: Tensor, draws: Tensor) -> Tensor:
    """Add a wave of random phase and strength to images ``(N, C, H, W)`` in [0, 1]; ``draws`` is ``(N, 2)`` in [0, 1)."""
    columns = torch.arange(images.shape[3], device=images.device)
    wave = torch.sin(columns + 6.28 * draws[:, :1])[:, None, None, :]
    return (images + 0.1 * draws[:, 1, None, None, None] * wave).clamp(0, 1)
