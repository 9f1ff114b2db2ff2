"""A network of your own: from a number of channels to a module that gives features ``(N, F)``.

raredistill study study.yaml --plugin examples/network.py runs.0.model=patchwork
"""

from torch import Tensor, nn

import raredistill


@raredistill.network
def patchwork(channels: int) -> nn.Module:
    """Patches of 4 x 4 pixels, mixed by two convolutions, averaged: 32 features."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, kernel_size=4, stride=4), nn.BatchNorm2d(32), nn.GELU(),
        nn.Conv2d(32, 32, kernel_size=3, padding=1), nn.BatchNorm2d(32), nn.GELU(), Pooled(),
    )  # fmt: skip


class Pooled(nn.Module):
    """The mean over all places."""

    def forward(self, maps: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C)``."""
        return maps.mean(dim=(2, 3))
