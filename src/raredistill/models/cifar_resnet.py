"""The CIFAR ResNets of the long-tail literature, with parameter-free shortcuts."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class CifarResNet(nn.Module):
    """A ResNet of depth 6n + 2 for small images: three stages of 16, 32 and 64 channels.

    Args:
        depth: 8, 14, 20, 32, 44, 56, 110, ...
        channels: of the images.

    References:
        He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2 (shortcut option A).
    """

    def __init__(self, depth: int, channels: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.first_conv = "stem"
        self.feature_info = [{"module": f"stages.{stage}"} for stage in range(3)]
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.stages = nn.Sequential(_stage(16, 16, blocks, 1), _stage(16, 32, blocks, 2), _stage(32, 64, blocks, 2))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` to features ``(N, 64)``."""
        features: Tensor = self.stages(F.relu(self.norm(self.stem(images)))).mean(dim=(2, 3))
        return features


class _Block(nn.Module):
    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, wide - narrow
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)

    def forward(self, images: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(images)))))
        return F.relu(residual + self._shortcut(images))

    def _shortcut(self, images: Tensor) -> Tensor:
        if not self.added:
            return images
        half = self.added // 2
        return F.pad(images[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.added - half))


def _stage(narrow: int, wide: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_Block(narrow, wide, stride), *(_Block(wide, wide, 1) for _ in range(blocks - 1)))
