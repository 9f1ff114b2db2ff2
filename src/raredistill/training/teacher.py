"""A teacher: frozen for good, with its own channels and normalisation, and refused where it does not fit."""

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
        promise: what its checkpoint says.
        fabric: the device.
        maps: give the feature maps, too.
        prior: that its logits carry, where the promise does not say it and it was estimated.
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
        """Width of its features, and of its feature maps."""
        return self._network.widths()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        """Outputs of the teacher for the view that the student sees."""
        # eval() at each call: whoever holds the network cannot put its batch statistics in motion.
        self._network.eval()
        with self._fabric.autocast():
            seen = self._network.see(batch.select(self.promise.channels), maps=self._maps)
        return seen._replace(log_prior=self.log_prior)


class Ensemble:
    """Several teachers whose probabilities are averaged; they give logits only.

    Args:
        teachers: at least one.
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self._teachers = teachers
        self.log_prior = _shared([teacher.log_prior for teacher in teachers])

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        """Logarithm of the mean probability, as logits; softened afterwards like any logits."""
        logs = torch.stack([F.log_softmax(teacher(batch).logits.float(), dim=1) for teacher in self._teachers])
        return Outputs(torch.logsumexp(logs, dim=0) - math.log(len(self._teachers)), log_prior=self.log_prior)


def _shared(log_priors: Sequence[Tensor | None]) -> Tensor | None:
    # A mean of probabilities under different priors carries no one prior.
    first = log_priors[0]
    alike = first is not None and all(each is not None and torch.allclose(each, first, atol=1e-4) for each in log_priors)
    return first if alike else None


class CrossFitted:
    """Teachers of which each teaches only samples of patients that it has never seen, and runs on no others.

    Args:
        teachers: one a part of the training patients.
        owner: ``(M,)`` for each row of the cohort the number of its teacher; what is read of rows without one is not defined.
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
        promise: what the teacher's checkpoint says about itself.
        name: how to call the teacher in a message.
        classes: the cohort's classes, in order.
        channels: channels that the cohort has.
        held_out: the student's validation and test patients.

    Raises:
        CheckpointError: other classes or another order, channels that are not there, or a teacher that has seen held-out patients.
    """
    if promise.classes != tuple(classes):
        raise CheckpointError(
            f"teacher {name} knows the classes {list(promise.classes)}, this cohort has {list(classes)}: order and names must agree"
        )
    if absent := [channel for channel in promise.channels if channel not in channels]:
        raise CheckpointError(f"teacher {name} needs the channels {absent}, this cohort has {list(channels)}")
    check_patients(promise, f"teacher {name}", held_out)


def check_patients(promise: Promise, name: str, held_out: Collection[str]) -> None:
    """Refuse weights that have seen patients who are held out, or that do not say whom they have seen.

    Raises:
        CheckpointError: names one of them.
    """
    if not promise.training_patients:
        if not promise.external:
            raise CheckpointError(f"{name} does not say which patients it was trained on; give training_patients, or external: true")
        return
    if seen := sorted(set(promise.training_patients) & set(held_out)):
        raise CheckpointError(
            f"{name} was trained on {len(seen)} validation or test patients of this split (such as {seen[0]}): "
            "its knowledge would leak; train it on this study's folds"
        )
