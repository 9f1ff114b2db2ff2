"""A teacher: frozen for good, with its own channels and normalisation, and refused where it does not fit."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from lightning.fabric import Fabric

from raredistill.batches import Batch
from raredistill.checkpoint import Promise
from raredistill.distill.contract import Outputs
from raredistill.errors import CheckpointError
from raredistill.models import Network


class Teacher:
    """Calls a network in evaluation mode without gradients; no attribute of a student ever holds it."""

    def __init__(self, network: Network, promise: Promise, fabric: Fabric) -> None:
        network.requires_grad_(False)
        self._network = fabric.to_device(network)
        self._fabric = fabric
        self.promise = promise

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        """Logits of the teacher for the view that the student sees."""
        # eval() at each call: whoever holds the network cannot put its batch statistics in motion.
        self._network.eval()
        with self._fabric.autocast():
            return Outputs(logits=self._network(batch.select(self.promise.channels)))


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
