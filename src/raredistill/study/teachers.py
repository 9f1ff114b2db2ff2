"""Where a run's teacher comes from: this study, or elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from lightning.fabric import Fabric

from raredistill.checkpoint import Promise
from raredistill.cohort.store import Cohort
from raredistill.errors import CheckpointError, ConfigError
from raredistill.models import Network, create, restore
from raredistill.splits import Split
from raredistill.study.plan import External, Run
from raredistill.training.teacher import Teacher, check_teacher


def load_teacher(run: Run, cohort: Cohort, fabric: Fabric, runs: Path) -> Teacher:
    """The teacher of a run, from this study or from elsewhere, refused where it does not fit."""
    if isinstance(run.entry.teacher, External):
        network, promise = _external_promise(run.entry.teacher)
    elif (file := teacher_file(run, runs)) is not None:
        network, promise = restore(file)
    else:
        raise ConfigError(f"{run.entry.name} has no teacher")
    _check(promise, teacher_name(run.entry.teacher), cohort, run.split)
    return Teacher(network, promise, fabric)


def check_external(teacher: External, cohort: Cohort, splits: Sequence[Split]) -> None:
    """Refuse a teacher from elsewhere that does not fit one of the splits, before anything is trained.

    Raises:
        CheckpointError: it cannot be read, lacks what it must say of itself, or does not fit.
    """
    _, promise = _external_promise(teacher)
    for split in splits:
        _check(promise, teacher_name(teacher), cohort, split)


def _check(promise: Promise, name: str, cohort: Cohort, split: Split) -> None:
    held_out = set(cohort.samples["patient"].to_numpy()[np.concatenate([split.validation, split.test])])
    check_teacher(promise, name=name, classes=cohort.classes, channels=cohort.channels, held_out=held_out)
    if promise.image_size != cohort.size[0]:
        raise CheckpointError(
            f"teacher {name} was trained on {promise.image_size} pixels, {cohort.root} has {cohort.size[0]}: "
            f"prepare the cohort with --size {promise.image_size}"
        )


def teacher_file(run: Run, runs: Path) -> Path | None:
    """The checkpoint of a teacher from this study; none without one."""
    return runs / run.teacher.id / "best.safetensors" if run.teacher is not None else None


def teacher_channels(run: Run) -> tuple[str, ...]:
    """Channels that a run's teacher takes; none without a teacher."""
    if run.teacher is not None:
        return run.teacher.entry.channels
    return _external_promise(run.entry.teacher)[1].channels if isinstance(run.entry.teacher, External) else ()


def teacher_name(teacher: str | External | None) -> str:
    """How a teacher is called in reports and messages."""
    if isinstance(teacher, External):
        return teacher.weights.stem
    return teacher or ""


def _external_promise(teacher: External) -> tuple[Network, Promise]:
    if not teacher.model:
        network, promise = restore(teacher.weights)
        return network, promise if promise.training_patients is not None else _with_patients(promise, teacher)
    if not (teacher.classes and teacher.channels and teacher.image_size):
        raise CheckpointError(f"{teacher.weights}: a teacher given as bare weights needs model, classes, channels and image_size")
    normalisation = (teacher.mean, teacher.std) if teacher.mean and teacher.std else None
    network = create(
        teacher.model, channels=len(teacher.channels), classes=len(teacher.classes), image_size=teacher.image_size,
        pretrained=teacher.weights, normalisation=normalisation, keep_classifier=True,
    )  # fmt: skip
    bare = Promise(
        model=teacher.model, head="linear", dropout=0.0, classes=teacher.classes, channels=teacher.channels, image_size=teacher.image_size,
        mean=tuple(network.mean), std=tuple(network.std), prior=None, training_patients=None, external=teacher.external, split_hash="",
    )  # fmt: skip
    return network, _with_patients(bare, teacher)


def _with_patients(promise: Promise, teacher: External) -> Promise:
    if teacher.training_patients is None:
        return replace(promise, external=teacher.external)
    return replace(
        promise, training_patients=tuple(teacher.training_patients.read_text(encoding="utf-8").split()), external=teacher.external
    )
