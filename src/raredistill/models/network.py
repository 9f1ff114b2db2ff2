"""The contract of all networks: they normalise their own images, and their logits are ``head(features(images))``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from raredistill.errors import ConfigError
from raredistill.losses import COSINE_SCALE
from raredistill.outputs import Outputs

_THESIS_WIDTH = 256


def linear_head(features: int, classes: int, dropout: float) -> nn.Module:
    """Dropout, then one linear layer."""
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(features, classes))


def thesis_head(features: int, classes: int, dropout: float) -> nn.Module:
    """The thesis's two layers: dropout, linear to 256, ReLU, dropout, linear to the classes."""
    return nn.Sequential(
        nn.Dropout(dropout), nn.Linear(features, _THESIS_WIDTH), nn.ReLU(), nn.Dropout(dropout), nn.Linear(_THESIS_WIDTH, classes)
    )


class CosineHead(nn.Module):
    """Dropout, then cosines between the features and one direction per class, times a fixed scale, as angular margins require.

    References:
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS 2019.
    """

    def __init__(self, features: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.weight = nn.Parameter(torch.empty(classes, features))
        nn.init.xavier_normal_(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Map features ``(N, F)`` to logits ``(N, K)`` in [-scale, scale]."""
        return COSINE_SCALE * F.linear(F.normalize(self.dropout(features), dim=1), F.normalize(self.weight, dim=1))


HEADS: dict[str, Callable[[int, int, float], nn.Module]] = {"linear": linear_head, "thesis": thesis_head, "cosine": CosineHead}


class Network(nn.Module):
    """A body from images to features and a head from features to logits, with the body's own normalisation.

    The normalisation is not part of ``state_dict``: a checkpoint's promise carries it.

    Args:
        body: from normalised images ``(N, C, H, W)`` to features ``(N, F)``.
        head: from features ``(N, F)`` to logits ``(N, K)``.
        name: name as requested, alias or timm's name.
        channels: number of channels, C.
        classes: number of classes, K.
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
        self._compiled: dict[bool, Callable[[Tensor], Tensor]] = {}
        self.name, self.channels, self.classes, self.image_size = name, channels, classes, image_size
        self.mean, self.std = list(mean), list(std)
        self.register_buffer("_mean", torch.tensor(self.mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std).reshape(1, -1, 1, 1), persistent=False)
        # Channels last, the layout that convolutions use anyway; saves a fifth to a third of a step on CPUs, and suits tensor cores.
        self.to(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` in [0, 1] to pooled features ``(N, F)``."""
        body = self._compiled.get(self.training, self.body)
        return body(((images - self._mean) / self._std).contiguous(memory_format=torch.channels_last))

    def compile_body(self, mode: Literal["none", "default", "reduce-overhead"], *, training: bool) -> None:
        """Let torch compile the body for one mode; the other mode, with batches of any size, stays uncompiled."""
        if mode == "none":
            return
        compiled = torch.compile(self.body, mode=None if mode == "default" else mode)
        # A CUDA graph reuses its output memory at each call, so outputs must be copied to survive the next call.
        self._compiled[training] = compiled if mode == "default" else lambda images: compiled(images).clone()

    def see(self, images: Tensor, *, maps: bool = False) -> Outputs:
        """Map images ``(N, C, H, W)`` in [0, 1] to logits, features and, if requested, feature maps.

        Args:
            images: as for :meth:`forward`.
            maps: also return the map ``(N, C, H, W)`` of each stage, shallow to deep; none if the network has no maps.
        """
        caught: list[Tensor] = []
        # Hooks exist for this call only, so two methods in one process never share them.
        hooks = [stage.register_forward_hook(lambda _, __, output: caught.append(output)) for stage in self._stages()] if maps else []
        try:
            features = self.features(images)
        finally:
            for hook in hooks:
                hook.remove()
        return Outputs(self.head(features), features, tuple(each for each in caught if each.ndim == 4))

    def _stages(self) -> list[nn.Module]:
        # timm's networks list the modules at the end of their stages, as entries or in an object that holds them.
        listed = getattr(self.body, "feature_info", ())
        return [self.body.get_submodule(stage["module"]) for stage in getattr(listed, "info", listed)]

    @torch.no_grad()
    def widths(self) -> tuple[int, tuple[int, ...]]:
        """Widths of the features and of the maps of its stages (empty if it has no maps)."""
        training = self.training
        seen = self.eval().see(torch.zeros(1, self.channels, self.image_size, self.image_size, device=self._mean.device), maps=True)
        self.train(training)
        return seen.pooled.shape[1], tuple(each.shape[1] for each in seen.maps)

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
