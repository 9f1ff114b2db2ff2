"""Pre-trained weights of a body: from timm's hub or from a local safetensors file, never from a pickle."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn

from raredistill.checkpoint import load, read_safetensors
from raredistill.errors import CheckpointError, ConfigError

# Entries in some files that current networks do not have: computed tables, and Inception's training-time branch.
_HARMLESS = ("relative_position_index", "attn_mask", "num_batches_tracked")
_WRAPPERS = ("module.", "model.", "_orig_mod.", "backbone.", "encoder.", "net.", "network.", "state_dict.")
_TRAINING_ONLY = "AuxLogits."
_SHOWN = 4

Normalisation = tuple[Sequence[float], Sequence[float]]
UNTRAINED: Normalisation = ((0.5,), (0.25,))


@dataclass(frozen=True)
class Weights:
    """A body's weights in single precision, and the normalisation stated in the file, if any."""

    path: Path
    tensors: dict[str, Tensor]
    normalisation: Normalisation | None


def read_weights(path: Path) -> Weights:
    """Read plain weights with timm's names, or a checkpoint of raredistill, whose head is left out.

    Raises:
        CheckpointError: missing, unreadable, or not safetensors.
    """
    tensors, metadata = read_safetensors(path)
    normalisation = _stated(path, metadata)
    if metadata.get("kind", "").startswith("raredistill."):
        state, promise = load(path)
        tensors = {name.removeprefix("body."): tensor for name, tensor in state.items() if name.startswith("body.")}
        normalisation = promise.mean, promise.std
    single = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return Weights(path, _without_wrappers(single), normalisation)


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without what a wrapper put in front of all of them: DataParallel, Lightning, torch.compile and others, also several."""
    while wrapper := next((prefix for prefix in _WRAPPERS if tensors and all(name.startswith(prefix) for name in tensors)), ""):
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def check_names(weights: Weights, body: nn.Module, classifiers: Sequence[str]) -> None:
    """Refuse weights that lack parts of the body, or that contain parts of another body.

    Raises:
        CheckpointError: lists the first few.
    """
    wanted, found = body.state_dict(), weights.tensors
    spare = (*(f"{classifier}." for classifier in classifiers), _TRAINING_ONLY)
    missing = [name for name in wanted if name not in found and not name.endswith(_HARMLESS)]
    unknown = [name for name in found if name not in wanted and not name.startswith(spare) and not name.endswith(_HARMLESS)]
    if missing:
        raise _misfit(weights.path, f"lacks {len(missing)} of the network's {len(wanted)} weights, such as {', '.join(missing[:_SHOWN])}")
    if unknown:
        raise _misfit(weights.path, f"holds {len(unknown)} weights that the network does not have, such as {', '.join(unknown[:_SHOWN])}")


def untrained(name: str, channels: int, **options: Any) -> nn.Module:
    """Build a timm body without its classifier: images ``(N, C, H, W)`` to pooled features ``(N, F)``."""
    with warnings.catch_warnings():
        # timm's resizing of position tables triggers two warnings of torch that users cannot act on. Its values are correct with current
        # torch (a test compares them with scipy); if torch changes its indexing, the shapes no longer match and an error is raised.
        for remark in (r"torch\.searchsorted", "Using a non-tuple sequence for multidimensional indexing"):
            warnings.filterwarnings("ignore", message=remark, category=UserWarning)
        body: nn.Module = timm.create_model(name, num_classes=0, in_chans=channels, **options)
    return body


def load_own(body: nn.Module, weights: Weights, channels: int) -> None:
    """Load weights into one of our own networks; its first convolution is converted if the channels differ.

    Raises:
        CheckpointError: names or shapes do not fit.
    """
    check_names(weights, body, ())
    tensors = dict(weights.tensors)
    if hasattr(body, "first_conv"):  # a plug-in's network need not name its stem
        stem = f"{body.first_conv}.weight"
        tensors[stem] = adapt_input_conv(channels, tensors[stem], base_chans=tensors[stem].shape[1])
    try:
        body.load_state_dict(tensors)
    except RuntimeError as error:
        raise _misfit(weights.path, f"does not fit ({error})") from None


def load_timm(name: str, weights: Weights, channels: int, **options: Any) -> nn.Module:
    """Build a timm body with a file's weights: timm converts the stem and resizes position tables.

    Args:
        name: timm's name.
        weights: three-channel weights, or weights of ``channels`` channels.
        channels: channels of the images.
        options: passed to timm, such as ``img_size``.

    Raises:
        CheckpointError: names or shapes do not fit.
    """
    config: Any = timm.get_pretrained_cfg(name, allow_unregistered=False)
    with torch.device("meta"):
        plain = untrained(name, channels, **options)
    check_names(weights, plain, classifiers_of(name))
    source = {"state_dict": dict(weights.tensors), "input_size": (_channels_of(weights, config), *config.input_size[1:])}
    try:
        return untrained(name, channels, pretrained=True, pretrained_cfg_overlay=source, **options)
    except RuntimeError as error:
        raise _misfit(weights.path, f"does not fit ({error})") from None


def classifiers_of(name: str) -> tuple[str, ...]:
    """Names of a timm network's classifiers; some networks have several."""
    config: Any = timm.get_pretrained_cfg(name)
    classifier = config.classifier or ()
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def load_classifier(head: nn.Module, weights: Weights, names: Sequence[str]) -> None:
    """Copy a file's classifier into a linear head.

    Raises:
        CheckpointError: the file has none, or one with a different number of classes or features.
    """
    found = next((name for name in names if f"{name}.weight" in weights.tensors), None)
    if found is None:
        raise _misfit(weights.path, "holds no classifier, so it cannot be used as it is; train it as `pretrained:` weights")
    weight, bias = weights.tensors[f"{found}.weight"], weights.tensors.get(f"{found}.bias")
    [linear] = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
    if weight.flatten(1).shape != linear.weight.shape:
        raise _misfit(
            weights.path, f"has a classifier {tuple(weight.shape)} where {tuple(linear.weight.shape)} (classes, features) is needed"
        )
    with torch.no_grad():
        linear.weight.copy_(weight.flatten(1))
        linear.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)


def load_hub(name: str, channels: int, **options: Any) -> nn.Module:
    """Build a timm body with the weights of timm's hub (downloaded once, then kept by the hub's cache).

    Raises:
        CheckpointError: timm has none for this name, or they are not available.
    """
    try:
        return untrained(name, channels, pretrained=True, **options)
    except (OSError, RuntimeError) as error:
        cure = "give `pretrained:` the path of a .safetensors file, or `pretrained: false`"
        raise CheckpointError(f"the weights of {name} are not available ({error}); {cure}") from None


def normalisation_for(values: Normalisation, channels: int) -> tuple[list[float], list[float]]:
    """Mean and std for each channel; their averages if the number of values differs from the number of channels.

    Raises:
        ConfigError: a std is not positive.
    """
    mean, std = ([float(value) for value in part] for part in values)
    if min(std) <= 0:
        raise ConfigError(f"the normalisation's std {std} must be positive")
    if len(mean) == len(std) == channels:
        return mean, std
    return [sum(mean) / len(mean)] * channels, [sum(std) / len(std)] * channels


def timm_normalisation(name: str) -> Normalisation:
    """Mean and std that timm's weights of this name were trained with, for images in [0, 1]."""
    config: Any = timm.get_pretrained_cfg(name)
    return config.mean, config.std


def _channels_of(weights: Weights, config: Any) -> int:
    stem = config.first_conv if isinstance(config.first_conv, str) else next(iter(config.first_conv or ()), "")
    tensor = weights.tensors.get(f"{stem}.weight")
    return int(tensor.shape[1]) if tensor is not None and tensor.ndim == 4 else int(config.input_size[0])


def _stated(path: Path, metadata: Mapping[str, str]) -> Normalisation | None:
    if "mean" in metadata and "std" in metadata:
        try:
            return _values(metadata["mean"]), _values(metadata["std"])
        except (TypeError, ValueError):
            raise CheckpointError(f"{path}: mean and std in its metadata must be JSON numbers, one or a list of them") from None
    # "input: RGB in [0,1], mean 0.5, std 0.5" also states the normalisation; ignoring it would train on shifted images.
    match = re.search(r"\bmean ([\d.]+), std ([\d.]+)", " ".join(metadata.values()))
    return ((float(match[1]),), (float(match[2]),)) if match else None


def _values(text: str) -> list[float]:
    value = json.loads(text)
    return [float(one) for one in value] if isinstance(value, list) else [float(value)]


def _misfit(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}; name the model that these weights belong to")
