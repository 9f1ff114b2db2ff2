"""The contract of every network: it normalises its own images, and its logits are ``head(features(images))``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from raredistill.errors import ConfigError

_THESIS_WIDTH = 256


def linear_head(features: int, classes: int, dropout: float) -> nn.Module:
    """Dropout, then one linear layer."""
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(features, classes))


def thesis_head(features: int, classes: int, dropout: float) -> nn.Module:
    """The thesis' two layers: dropout, linear to 256, ReLU, dropout, linear to the classes."""
    return nn.Sequential(
        nn.Dropout(dropout), nn.Linear(features, _THESIS_WIDTH), nn.ReLU(), nn.Dropout(dropout), nn.Linear(_THESIS_WIDTH, classes)
    )


HEADS: dict[str, Callable[[int, int, float], nn.Module]] = {"linear": linear_head, "thesis": thesis_head}


class Network(nn.Module):
    """A body from images to features and a head from features to logits, with the body's own normalisation.

    The normalisation is not part of ``state_dict``: a checkpoint's promise carries it.

    Args:
        body: from normalised images ``(N, C, H, W)`` to features ``(N, F)``.
        head: from features ``(N, F)`` to logits ``(N, K)``.
        name: as asked for, alias or timm's name.
        channels: C.
        classes: K.
        image_size: H and W that it was built for.
        mean: C values, for images in [0, 1].
        std: C values, for images in [0, 1].
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        body: nn.Module,
        head: nn.Module,
        *,
        name: str,
        channels: int,
        classes: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.name, self.channels, self.classes, self.image_size = name, channels, classes, image_size
        self.mean, self.std = list(mean), list(std)
        self.register_buffer("_mean", torch.tensor(self.mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std).reshape(1, -1, 1, 1), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` in [0, 1] to pooled features ``(N, F)``."""
        features: Tensor = self.body((images - self._mean) / self._std)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``."""
        logits: Tensor = self.head(self.features(images))
        return logits


def build_head(head: str, features: int, classes: int, dropout: float) -> nn.Module:
    """Build a head by name.

    Raises:
        ConfigError: unknown name, or a dropout outside [0, 1).
    """
    if head not in HEADS:
        raise ConfigError(f"unknown head {head!r}; there are {', '.join(HEADS)}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout {dropout} must be at least 0 and less than 1")
    return HEADS[head](features, classes, dropout)
