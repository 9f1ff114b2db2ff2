"""Frozen teachers with their own channels and normalisation, and checks that they fit the student's data."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.nn import functional as F

from raredistill.batches import Batch
from raredistill.checkpoint import Promise
from raredistill.errors import CheckpointError
from raredistill.models import Network
from raredistill.outputs import Outputs


class Teacher:
    """Calls a network in evaluation mode without gradients; no attribute of a student ever holds it.

    Args:
        network: frozen from here on.
        promise: metadata of its checkpoint.
        fabric: the device.
        maps: whether to return the feature maps, too.
        prior: estimated class prior of its logits, if the checkpoint does not state it.
    """

    def __init__(
        self, network: Network, promise: Promise, fabric: Fabric, *, maps: bool = False, prior: Sequence[float] | None = None
    ) -> None:
        network.requires_grad_(False)
        fabric.to_device(network)
        self._network, self._fabric, self._maps = network, fabric, maps
        self.promise = promise
        known = promise.prior if promise.prior is not None else prior
        self.log_prior = None if known is None else torch.tensor(known, device=fabric.device).log()

    def widths(self) -> tuple[int, tuple[int, ...]]:
        """Widths of its features and of its feature maps."""
        return self._network.widths()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        """Outputs of the teacher for the view that the student sees."""
        # eval() at each call, so that no other code can switch its batch norms to training mode.
        self._network.eval()
        with self._fabric.autocast():
            seen = self._network.see(batch.select(self.promise.channels), maps=self._maps)
        return seen._replace(log_prior=self.log_prior)


class Ensemble:
    """Several teachers whose probabilities are averaged; returns logits only.

    Args:
        teachers: at least one.
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self._teachers = teachers
        self.log_prior = _shared([teacher.log_prior for teacher in teachers])

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        """Logarithm of the mean probability, used as logits; softened later like any logits."""
        logs = torch.stack([F.log_softmax(teacher(batch).logits.float(), dim=1) for teacher in self._teachers])
        return Outputs(torch.logsumexp(logs, dim=0) - math.log(len(self._teachers)), log_prior=self.log_prior)


def _shared(log_priors: Sequence[Tensor | None]) -> Tensor | None:
    # A mean of probabilities with different priors has no single prior.
    first = log_priors[0]
    alike = first is not None and all(each is not None and torch.allclose(each, first, atol=1e-4) for each in log_priors)
    return first if alike else None


class CrossFitted:
    """Several teachers, each of which teaches (and runs on) only samples of patients it was not trained on.

    Args:
        teachers: one per part of the training patients.
        owner: ``(M,)`` number of the teacher for each row of the cohort; undefined for rows without a teacher.
    """

    def __init__(self, teachers: Sequence[Teacher], owner: Tensor) -> None:
        self._teachers, self._owner = teachers, owner

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        """Outputs of each sample's own teacher."""
        owners = self._owner[batch.rows]
        parts = [torch.nonzero(owners == number)[:, 0] for number in range(len(self._teachers))]
        outputs = [teacher(batch.at(part)) for teacher, part in zip(self._teachers, parts, strict=True) if len(part)]
        back = torch.argsort(torch.cat(parts)).to(batch.labels.device, non_blocking=True)
        maps = zip(*(each.maps for each in outputs), strict=True)
        return Outputs(
            torch.cat([each.logits for each in outputs])[back],
            torch.cat([each.features for each in outputs if each.features is not None])[back],
            tuple(torch.cat(stage)[back] for stage in maps),
            _by_row(outputs, back),
        )


def _by_row(outputs: Sequence[Outputs], back: Tensor) -> Tensor | None:
    rows = [each.log_prior.expand(len(each.logits), -1) for each in outputs if each.log_prior is not None]
    return torch.cat(rows)[back] if len(rows) == len(outputs) else None


def check_teacher(promise: Promise, *, name: str, classes: Sequence[str], channels: Sequence[str], held_out: Collection[str]) -> None:
    """Refuse a teacher that does not fit the student's data.

    Args:
        promise: metadata of the teacher's checkpoint.
        name: name of the teacher in messages.
        classes: the cohort's classes, in order.
        channels: channels of the cohort.
        held_out: the student's validation and test patients.

    Raises:
        CheckpointError: classes or their order differ, channels are missing, or the teacher was trained on held-out patients.
    """
    if promise.classes != tuple(classes):
        raise CheckpointError(
            f"teacher {name} knows the classes {list(promise.classes)}, this cohort has {list(classes)}: order and names must agree"
        )
    if absent := [channel for channel in promise.channels if channel not in channels]:
        raise CheckpointError(f"teacher {name} needs the channels {absent}, this cohort has {list(channels)}")
    check_patients(promise, f"teacher {name}", held_out)


def check_patients(promise: Promise, name: str, held_out: Collection[str]) -> None:
    """Refuse weights that were trained on held-out patients, or that do not state their training patients.

    Raises:
        CheckpointError: names one such patient.
    """
    if not promise.training_patients:
        if not promise.external:
            raise CheckpointError(f"{name} does not state which patients it was trained on; give training_patients, or external: true")
        return
    if seen := sorted(set(promise.training_patients) & set(held_out)):
        raise CheckpointError(
            f"{name} was trained on {len(seen)} validation or test patients of this split (such as {seen[0]}): "
            "its knowledge would leak; train it on this study's folds"
        )
