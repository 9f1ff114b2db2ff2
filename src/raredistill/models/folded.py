"""Weights whose batch norms were folded into the preceding convolutions, as in deployed networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Norm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def unfold_batch_norm(network: nn.Module, images: Tensor) -> bool:
    """Re-estimate folded batch norms so that the network can be trained; its outputs in evaluation mode stay the same.

    A folded batch norm only adds its bias. Trained without this step, it would divide by the standard deviation of each batch and lose
    the scale that its weights rely on.

    Args:
        network: its outputs in evaluation mode do not change.
        images: a batch ``(N, C, H, W)`` of training images, on the network's device.

    Returns:
        Whether the batch norms were folded.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, Norm)]
    if not _are_folded(layers):
        return False
    hooks = [layer.register_forward_pre_hook(_measure) for layer in layers]
    training = network.training
    network.eval()(images)
    network.train(training)
    for hook in hooks:
        hook.remove()
    return True


def _are_folded(layers: list[Any]) -> bool:
    # New networks have batch norms without bias, too.
    fixed = all((x.running_mean == 0).all() and (x.running_var == 1).all() and (x.weight == 1).all() for x in layers)
    return fixed and any((layer.bias != 0).any() for layer in layers)


def _measure(layer: Any, inputs: tuple[Tensor, ...]) -> None:
    variance, mean = torch.var_mean(inputs[0].float(), dim=(0, 2, 3), correction=0)
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(variance)
    layer.weight.copy_((variance + layer.eps).sqrt())
    layer.bias.add_(mean)
