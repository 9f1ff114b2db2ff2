"""The small student: four convolution blocks, after the small CNN of the thesis."""

from __future__ import annotations

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Four times convolution, batch norm, ReLU and pooling, then the global average; 0.39 million weights.

    The thesis names a small CNN student without its widths; these are the usual ones (32 to 256).

    Args:
        channels: of the images, which must be at least 16 x 16.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (32, 64, 128, 256)
        self.first_conv = "blocks.0.0"
        self.feature_info = [{"module": f"blocks.{stage}"} for stage in range(len(widths))]
        self.blocks = nn.Sequential(*(_block(narrow, wide) for narrow, wide in zip((channels, *widths), widths, strict=False)))

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` to features ``(N, 256)``."""
        features: Tensor = self.blocks(images).mean(dim=(2, 3))
        return features


def _block(narrow: int, wide: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(narrow, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(inplace=True), nn.MaxPool2d(2))
