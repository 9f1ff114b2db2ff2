"""Build networks by name, count their cost, and restore them from checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from raredistill.checkpoint import Promise, load
from raredistill.errors import CheckpointError, ConfigError
from raredistill.models.names import own_network, resolve
from raredistill.models.network import Network, build_head
from raredistill.models.weights import (
    UNTRAINED,
    Normalisation,
    Weights,
    classifiers_of,
    load_classifier,
    load_hub,
    load_own,
    load_timm,
    normalisation_for,
    read_weights,
    timm_normalisation,
    untrained,
)

_TRIED_SIZES = (28, 32, 64, 75, 96, 128, 160, 192, 224, 256, 384)
_BYTES_PER_WEIGHT = 4


@dataclass(frozen=True)
class ModelFacts:
    """The cost of a network.

    Attributes:
        parameters: trainable and frozen, head included.
        flops: operations of one image's forward pass, with a multiply-add counted as two; element-wise operations are not counted.
        bytes: size of its parameters in single precision.
    """

    parameters: int
    flops: int
    bytes: int


def create(
    name: str,
    *,
    channels: int,
    classes: int,
    image_size: int,
    pretrained: bool | Path = False,
    head: str = "linear",
    dropout: float = 0.0,
    normalisation: Normalisation | None = None,
    keep_classifier: bool = False,
) -> Network:
    """Build a network by name.

    Args:
        name: one of :func:`list_models`, optionally with a timm weights tag.
        channels: channels of the images; a pre-trained first convolution is summed for one channel, else repeated and rescaled.
        classes: number of logits.
        image_size: height and width in pixels.
        pretrained: True for timm's hub, or a ``.safetensors`` file: timm's weights of this network, or a checkpoint of raredistill.
        head: ``linear``, or ``thesis`` for its two layers.
        dropout: dropout rate in the head.
        normalisation: mean and std for images in [0, 1]. By default those in the file's metadata, else those of timm's weights of this
            name, averaged if there are not three channels; 0.5 and 0.25 if not pre-trained.
        keep_classifier: also load the file's classifier as the linear head, for a finished classifier that was trained elsewhere.

    Raises:
        ConfigError: unknown name, head or weights tag, or an image size that this network does not support (lists sizes that it does).
        CheckpointError: weights are not available or do not fit.
    """
    timm_name = resolve(name)
    if min(channels, classes, image_size) < 1:
        raise ConfigError(f"{name}: channels, classes and image size must be positive, not {channels}, {classes} and {image_size}")
    weights = read_weights(Path(pretrained)) if not isinstance(pretrained, bool) else None
    with _sizes_explained(name, timm_name, channels, image_size):
        body = _body(timm_name, channels, image_size, weights or bool(pretrained))
        features = _features_of(body, channels, image_size)
    mean, std = normalisation_for(normalisation or _normalisation(timm_name, weights, bool(pretrained)), channels)
    built = build_head(head, features, classes, dropout)
    if keep_classifier:
        _keep_classifier(timm_name, built, head, weights)
    return Network(body, built, name=name, channels=channels, classes=classes, image_size=image_size, mean=mean, std=std)


@cache
def facts(name: str, *, channels: int, classes: int, image_size: int, head: str = "linear") -> ModelFacts:
    """Count a network's parameters, operations and bytes, without computing anything.

    Raises:
        ConfigError: as :func:`create`.
    """
    with torch.device("meta"):
        network = create(name, channels=channels, classes=classes, image_size=image_size, head=head).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(torch.empty(1, channels, image_size, image_size))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return ModelFacts(parameters, counter.get_total_flops(), parameters * _BYTES_PER_WEIGHT)


@cache
def widths(name: str, *, channels: int, image_size: int) -> tuple[int, tuple[int, ...]]:
    """Width of a network's features and of its feature maps, without computing anything.

    Raises:
        ConfigError: as :func:`create`.
    """
    with torch.device("meta"):
        return create(name, channels=channels, classes=2, image_size=image_size).widths()


def restore(path: Path | str) -> tuple[Network, Promise]:
    """Build the network of a checkpoint, with its weights and its normalisation, on the CPU.

    Raises:
        CheckpointError: a damaged file, or weights that do not fit the network that it names.
    """
    state, promise = load(Path(path))
    try:
        network = create(
            promise.model,
            channels=len(promise.channels),
            classes=len(promise.classes),
            image_size=promise.image_size,
            head=promise.head,
            dropout=promise.dropout,
            normalisation=(promise.mean, promise.std),
        )
        network.load_state_dict(state)
    except (ConfigError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be rebuilt as {promise.model} ({error})") from None
    return network, promise


def _body(name: str, channels: int, size: int, weights: Weights | bool) -> nn.Module:
    if (factory := own_network(name)) is not None:
        return _own_body(factory, name, channels, weights)
    build: Callable[..., nn.Module]
    if isinstance(weights, Weights):
        build = partial(load_timm, name, weights, channels)
    else:
        build = partial(load_hub if weights else untrained, name, channels)
    try:
        return build(img_size=size)
    except TypeError:
        # Networks that accept any size do not have this argument.
        return build()


def _keep_classifier(name: str, built: nn.Module, head: str, weights: Weights | None) -> None:
    if weights is None or head != "linear":
        raise ConfigError(f"{name}: keeping a classifier needs `pretrained:` the path of a file, and the linear head")
    load_classifier(built, weights, classifiers_of(name) if own_network(name) is None else ())


def _own_body(factory: Callable[[int], nn.Module], name: str, channels: int, weights: Weights | bool) -> nn.Module:
    if weights is True:
        raise ConfigError(f"{name} has no published weights; give `pretrained:` the path of a checkpoint, or `pretrained: false`")
    body = factory(channels)
    if isinstance(weights, Weights):
        load_own(body, weights, channels)
    return body


def _features_of(body: nn.Module, channels: int, size: int) -> int:
    """Try one empty image, so that an unsupported size fails now, not after hours of preparation."""
    patch = getattr(getattr(body, "patch_embed", None), "patch_size", 1)
    for step in patch if isinstance(patch, tuple) else (patch,):
        # Vision transformers silently drop pixels that do not fill a patch.
        if size % int(step):
            raise ValueError(f"not a multiple of its {step}-pixel patches")
    training = body.training
    with torch.no_grad():
        features: Tensor = body.eval()(torch.zeros(1, channels, size, size))
    body.train(training)
    if features.ndim != 2:
        raise ValueError(f"its features have the shape {tuple(features.shape)}, not (N, F)")
    return features.shape[1]


@contextmanager
def _sizes_explained(name: str, timm_name: str, channels: int, size: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        fitting = [str(tried) for tried in _TRIED_SIZES if tried != size and _takes(timm_name, channels, tried)]
        raise ConfigError(
            f"{name} does not support images of {size} x {size} ({error}); of the usual sizes it supports {', '.join(fitting) or 'none'}"
        ) from None


def _takes(name: str, channels: int, size: int) -> bool:
    try:
        with torch.device("meta"):
            _features_of(_body(name, channels, size, False), channels, size)
    except (RuntimeError, AssertionError, ValueError, IndexError):
        return False
    return True


def _normalisation(name: str, weights: Weights | None, pretrained: bool) -> Normalisation:
    if weights and weights.normalisation:
        return weights.normalisation
    return timm_normalisation(name) if pretrained and own_network(name) is None else UNTRAINED
