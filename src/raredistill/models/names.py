"""Names of networks: timm's, the thesis's names for some of them, and networks that timm lacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timm
from torch import nn

from raredistill.errors import ConfigError
from raredistill.models.cifar_resnet import CifarResNet
from raredistill.models.small_cnn import SmallCNN
from raredistill.objects import find, is_object
from raredistill.options import did_you_mean
from raredistill.plugins import HINT, Plugin, Registry


@dataclass(frozen=True)
class Alias:
    """A name from the thesis, the timm network with the same or the closest weights, and torchvision's name."""

    timm: str
    torchvision: str
    same_weights: bool


ALIASES: dict[str, Alias] = {
    "resnet18": Alias("resnet18.tv_in1k", "ResNet18_Weights.IMAGENET1K_V1", True),
    "resnet50": Alias("resnet50.tv_in1k", "ResNet50_Weights.IMAGENET1K_V1", True),
    "densenet121": Alias("densenet121.tv_in1k", "DenseNet121_Weights.IMAGENET1K_V1", True),
    "inception_v3": Alias("inception_v3.tv_in1k", "Inception_V3_Weights.IMAGENET1K_V1", True),
    "mobilenet_v2": Alias("mobilenetv2_100.ra_in1k", "MobileNet_V2_Weights.IMAGENET1K_V1", False),
    "efficientnet_v2_s": Alias("tf_efficientnetv2_s.in1k", "EfficientNet_V2_S_Weights.IMAGENET1K_V1", False),
    "convnext_tiny": Alias("convnext_tiny.fb_in1k", "ConvNeXt_Tiny_Weights.IMAGENET1K_V1", False),
    "swin_t": Alias("swin_tiny_patch4_window7_224.ms_in1k", "Swin_T_Weights.IMAGENET1K_V1", False),
    "vit_b_16": Alias("vit_base_patch16_224", "ViT_B_16_Weights.IMAGENET1K_V1", False),
    "maxvit_t": Alias("maxvit_tiny_tf_224.in1k", "MaxVit_T_Weights.IMAGENET1K_V1", False),
}

BUILT_IN: dict[str, Callable[[int], nn.Module]] = {
    "small_cnn": SmallCNN,
    **{f"cifar_resnet{depth}": partial(CifarResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
}


def _adopt(plugin: Plugin) -> Callable[[int], nn.Module]:
    if plugin.name in ALIASES or plugin.name in timm.list_models():
        raise ConfigError(f"the network {plugin.name} of {plugin.place} has the name of one of timm's; give it another name")
    return plugin.thing


OWN: Registry[Callable[[int], nn.Module]] = Registry("network", BUILT_IN, _adopt)
"""Networks that timm lacks: called with a number of channels, they map images ``(N, C, H, W)`` to features ``(N, F)``."""


def own_network(name: str) -> Callable[[int], nn.Module] | None:
    """The factory of a network that timm lacks: built in, a plug-in's, or an object; None for timm's.

    Raises:
        ConfigError: an object that is not there.
    """
    return find(name) if is_object(name) else OWN.get(name)


def list_models() -> list[str]:
    """All names without weights tags: aliases, our own networks and timm's architectures."""
    return sorted({*ALIASES, *OWN, *timm.list_models()})


def resolve(name: str) -> str:
    """Resolve aliases to timm's names; other known names are returned unchanged.

    Raises:
        ConfigError: no such network or weights tag; the message suggests similar names.
    """
    if name in ALIASES:
        return ALIASES[name].timm
    if is_object(name):
        find(name)
        return name
    if name in OWN:
        return name
    architecture, _, tag = name.partition(".")
    # is_model alone would also accept "hf-hub:...", which downloads a model and runs its code.
    if architecture not in timm.list_models():
        raise ConfigError(
            f"unknown model {name!r}{did_you_mean(name, list_models(), most=3)}; `raredistill.models.list_models()` names them all, {HINT}"
        )
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise ConfigError(f"model {architecture!r} has no weights {tag!r}{did_you_mean(name, tags, most=3)}")
    return name
