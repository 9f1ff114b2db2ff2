"""Teachers trained elsewhere: metadata from the file and from the user, read once."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raredistill import checkpoint
from raredistill.checkpoint import Promise
from raredistill.errors import CheckpointError, ConfigError
from raredistill.models import Network, create, restore
from raredistill.objects import name_of
from raredistill.runs.entry import External

Stamp = tuple[int, int]


def promise_of(teacher: External) -> Promise:
    """Classes, channels, normalisation, prior and training patients of an external teacher.

    Only the header of its file is read, and cached, since a study needs it on every fold.

    Raises:
        CheckpointError: the file cannot be read, or its metadata does not match this version.
        ConfigError: the stated prior or list of patients does not fit.
    """
    return _promise(teacher, _stamp(teacher.weights), _stamp(teacher.training_patients))


@lru_cache(maxsize=64)
def _promise(teacher: External, weights: Stamp, patients: Stamp) -> Promise:
    # The stamps invalidate the cache when a file is edited.
    stated = _bare(teacher) if teacher.model else checkpoint.read_promise(teacher.weights)
    if teacher.model or stated.training_patients is None:
        stated = replace(stated, training_patients=_patients(teacher), external=teacher.external)
    return _with_prior(stated, teacher)


def _stamp(path: Path | None) -> Stamp:
    if path is None or not path.is_file():
        return 0, 0
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def load_external(teacher: External) -> tuple[Network, Promise]:
    """Build the network of an external teacher with its weights, and its metadata.

    Raises:
        CheckpointError: the weights cannot be read or do not fit the network.
    """
    network = _network(teacher) if teacher.model else restore(teacher.weights)[0]
    return network, promise_of(teacher)


def _network(teacher: External) -> Network:
    normalisation = (teacher.mean, teacher.std) if teacher.mean and teacher.std else None
    return create(
        teacher.model, channels=len(teacher.channels), classes=len(teacher.classes), image_size=teacher.image_size,
        pretrained=teacher.weights, normalisation=normalisation, keep_classifier=True,
    )  # fmt: skip


def _bare(teacher: External) -> Promise:
    network = _network(teacher)  # loads the weights early, to check them and to get a normalisation that is not stated
    return Promise(
        model=teacher.model, head="linear", dropout=0.0, classes=teacher.classes, channels=teacher.channels, image_size=teacher.image_size,
        mean=tuple(network.mean), std=tuple(network.std), prior=None, training_patients=None, external=teacher.external, split_hash="",
    )  # fmt: skip


def _patients(teacher: External) -> tuple[str, ...] | None:
    return None if teacher.training_patients is None else _lines(teacher.training_patients)


def _lines(path: Path) -> tuple[str, ...]:
    try:
        # One patient per line, since a name may contain spaces.
        lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a list of patients ({error})") from None
    if not lines:
        raise ConfigError(f"{path}: names no patient; write one per line")
    return lines


def _with_prior(promise: Promise, teacher: External) -> Promise:
    if not teacher.prior:
        return promise
    shares = ", ".join(f"{share:g}" for share in teacher.prior)
    if promise.prior is not None:
        raise ConfigError(f"teacher {teacher.weights}: the file itself states the prior {list(promise.prior)}; leave out prior: [{shares}]")
    if len(teacher.prior) != len(promise.classes) or min(teacher.prior) <= 0 or abs(sum(teacher.prior) - 1) > 0.01:
        raise ConfigError(
            f"teacher {teacher.weights}: prior: [{shares}] must be shares above 0, together 1, one for each of {list(promise.classes)}"
        )
    return replace(promise, prior=tuple(share / sum(teacher.prior) for share in teacher.prior))


def save_module(module: nn.Module, file: Path, *, classes: tuple[str, ...], image_size: int, **stated: Any) -> None:
    """Write an external classifier as a checkpoint: its logits become the features of a network with an identity head.

    Args:
        module: from normalised images ``(N, C, H, W)`` to logits ``(N, K)``.
        file: to write.
        classes: K, in order.
        image_size: side in pixels.
        stated: the other fields of :class:`~raredistill.checkpoint.Promise` that are not the network's own.

    Raises:
        CheckpointError: its logits are not one per class.
    """
    name = name_of("network")(module)
    network = create(
        name, channels=len(stated["channels"]), classes=len(classes), image_size=image_size, normalisation=(stated["mean"], stated["std"])
    )
    if network.widths()[0] != len(classes):
        raise CheckpointError(f"{file}: the module gives {network.widths()[0]} numbers per image, for {len(classes)} classes")
    last = network.head[-1]  # type: ignore[index]
    with torch.no_grad():
        last.weight.copy_(torch.eye(len(classes)))
        last.bias.zero_()
    promise = Promise(model=name, head="linear", dropout=0.0, classes=classes, image_size=image_size, split_hash="", **stated)
    checkpoint.save(file, network.state_dict(), promise)
