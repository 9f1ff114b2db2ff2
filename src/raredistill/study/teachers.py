"""Where a run's teacher comes from: this study, or elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from lightning.fabric import Fabric

from raredistill.checkpoint import Promise, load, read_safetensors
from raredistill.cohort.store import Cohort
from raredistill.errors import CheckpointError, ConfigError
from raredistill.models import Network, create, restore
from raredistill.study.plan import External, Run
from raredistill.training.teacher import Teacher, check_patients, check_teacher


def load_teacher(run: Run, cohort: Cohort, fabric: Fabric, runs: Path) -> Teacher:
    """The teacher of a run, from this study or from elsewhere, refused where it does not fit."""
    if isinstance(run.entry.teacher, External):
        network, promise = _external_promise(run.entry.teacher)
    elif (file := teacher_file(run, runs)) is not None:
        network, promise = restore(file)
    else:
        raise ConfigError(f"{run.entry.name} has no teacher")
    check_teacher(
        promise, name=teacher_name(run.entry.teacher), classes=cohort.classes, channels=cohort.channels, held_out=held_out(run, cohort)
    )
    return Teacher(network, promise, fabric)


def held_out(run: Run, cohort: Cohort) -> set[str]:
    """The validation and test patients of a run: nothing that it learns from may have seen them."""
    return set(cohort.samples["patient"].to_numpy()[np.concatenate([run.split.validation, run.split.test])])


def check_start(run: Run, cohort: Cohort) -> None:
    """Refuse to start from weights that have seen held-out patients.

    Raises:
        CheckpointError: they have, or they are a checkpoint that does not tell.
    """
    if (promise := _start(run)) is not None:
        check_patients(promise, f"the pre-trained weights {run.entry.pretrained}", held_out(run, cohort))


def patients_before(run: Run) -> set[str]:
    """Patients whom the weights that a run starts from, or its teacher from elsewhere, have seen, as far as their files tell."""
    external = _external_promise(run.entry.teacher)[1] if isinstance(run.entry.teacher, External) else None
    known = [promise.training_patients for promise in (_start(run), external) if promise is not None]
    return {patient for patients in known for patient in patients or ()}


def _start(run: Run) -> Promise | None:
    # Plain weights say nothing of patients; a checkpoint does.
    path = run.entry.pretrained
    return load(path)[1] if isinstance(path, Path) and read_safetensors(path)[1].get("kind") else None


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
    return replace(promise, training_patients=_lines(teacher.training_patients), external=teacher.external)


def _lines(path: Path) -> tuple[str, ...]:
    try:
        # A line is a patient, whose name may hold spaces.
        lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a list of patients ({error})") from None
    if not lines:
        raise ConfigError(f"{path}: names no patient; write one a line")
    return lines
