"""Assemble one run: its batches, its objective with the teachers loaded, and the metadata of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from lightning_fabric import Fabric

from raredistill.augment import MIXINGS
from raredistill.batches import Batches, free_memory
from raredistill.checkpoint import Promise
from raredistill.cohort.store import Cohort
from raredistill.distill.contract import Facts
from raredistill.distill.registry import make_method
from raredistill.losses import class_weights, make_loss
from raredistill.models import Network
from raredistill.runs.layout import StudyFolder
from raredistill.runs.predict import plain_batches
from raredistill.runs.run import Run
from raredistill.runs.teachers import Taught, patients_before, peers_of, prior_of, teach, teacher_channels
from raredistill.training.objectives import Deferred, Distilled, Objective, Supervised
from raredistill.training.online import Together


def pixels_of(run: Run, cohort: Cohort) -> int:
    """Bytes of pixels in a run's training part (for student and teachers) and validation part."""
    own = set(run.entry.channels)
    both = own | (set(teacher_channels(run)) if run.entry.settings.views is None else set())
    return (len(run.split.train) * len(both) + len(run.split.validation) * len(own)) * cohort.size[0] * cohort.size[1]


def too_large(run: Run, cohort: Cohort, device: torch.device) -> str:
    """Message on why a run's resident pixels do not fit on a device, with the remedy; empty if they fit."""
    holders = run.entry.settings.devices if device.type == "cpu" else 1
    needed, free = holders * pixels_of(run, cohort), free_memory(device)
    if needed <= free:
        return ""
    return (
        f"residence is resident, but its pixels take {needed / 1e9:.3g} GB and {device} has {free / 1e9:.3g} GB free; "
        "set residence=auto or streamed, prepare with a smaller --size, or name fewer channels"
    )


def make_batches(run: Run, cohort: Cohort, fabric: Fabric) -> tuple[tuple[str, ...], Batches, Batches | None]:
    """The channels of a run's network, its training batches, and its validation batches, if it has a validation part."""
    settings, channels = run.entry.settings, run.entry.channels
    teachers = teacher_channels(run) if settings.views is None else ()  # a cached teacher needs no pixels
    wanted = (*channels, *(name for name in teachers if name not in channels))
    train = Batches(
        cohort, run.split.train, channels=wanted, batch_size=settings.batch_size, device=fabric.device, sampler=settings.sampler,
        epochs=settings.epochs, augmentation=settings.strengths, mixing=MIXINGS[settings.mixing], views=settings.views,
        seed=run.fold_seed, residence=settings.residence,
        drop_last=len(run.split.train) > settings.batch_size, share=(fabric.global_rank, fabric.world_size),
    )  # fmt: skip
    validation = plain_batches(cohort, run.split.validation, channels, fabric, settings.residence) if len(run.split.validation) else None
    return channels, train, validation


def make_objective(
    run: Run, cohort: Cohort, network: Network, fabric: Fabric, folder: StudyFolder, *, keep: Callable[[Taught], Taught]
) -> Objective:
    """The terms that a run minimises, with its teachers loaded and checked; ``keep`` may replace them by their cached outputs."""
    entry, settings = run.entry, run.entry.settings
    counts = torch.from_numpy(_counts(run, cohort)).to(fabric.device)
    loss = make_loss(settings.loss, counts=counts, **settings.loss_options)
    deferred = None if settings.deferred == "none" else Deferred(class_weights(settings.deferred, counts), settings.deferred_epoch)
    if entry.teacher is None:
        return Supervised(loss, deferred)
    weights = {"ce_weight": entry.ce_weight, "kd_weight": entry.kd_weight}
    if run.peers:
        method = make_method(entry.method, Facts(counts, classes=cohort.classes), **entry.method_options)
        peers = peers_of(run, cohort, counts=counts)
        return Together(loss, method, peers, fabric, mutual=entry.online == "mutual", deferred=deferred, **weights)
    teacher, facts = teach(run, cohort, network, fabric, folder, counts=counts)
    method = make_method(entry.method, facts, **entry.method_options)
    return Distilled(loss, method, keep(teacher), deferred=deferred, **weights)


def _counts(run: Run, cohort: Cohort) -> np.ndarray:
    return np.bincount(cohort.labels[run.split.train], minlength=len(cohort.classes))


def run_promise(run: Run, cohort: Cohort, network: Network) -> Promise:
    """The metadata stored in the checkpoints of a run."""
    entry = run.entry
    patients = {*cohort.samples["patient"].to_numpy()[run.split.train], *patients_before(entry, cohort, run.split)}
    return Promise(
        model=entry.model, head=entry.head, dropout=entry.dropout, classes=cohort.classes, channels=entry.channels,
        image_size=cohort.size[0], mean=tuple(network.mean), std=tuple(network.std),
        prior=prior_of(entry, torch.from_numpy(_counts(run, cohort))),
        training_patients=tuple(sorted(patients)), external=False, split_hash=run.split.hash,
    )  # fmt: skip
