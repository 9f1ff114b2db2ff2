"""The teachers of a run: trained in this study, or external."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from torch import Tensor

from raredistill import predictions
from raredistill.batches import Batch
from raredistill.checkpoint import Promise, read_header, read_promise
from raredistill.cohort.store import Cohort
from raredistill.distill.contract import Facts, Shape
from raredistill.distill.imbalance import shrunk_recall
from raredistill.errors import CheckpointError
from raredistill.losses import carried_prior, estimate_prior, make_loss
from raredistill.models import Network, create, restore
from raredistill.outputs import Outputs
from raredistill.runs.entry import Entry, External
from raredistill.runs.external import load_external, promise_of
from raredistill.runs.layout import StudyFolder
from raredistill.runs.run import Run
from raredistill.sampling import POWERS
from raredistill.splits import Split
from raredistill.training.online import Peer
from raredistill.training.teacher import CrossFitted, Ensemble, Teacher, check_patients, check_teacher

Taught = Callable[[Batch], Outputs]


def teach(run: Run, cohort: Cohort, network: Network, fabric: Fabric, folder: StudyFolder, *, counts: Tensor) -> tuple[Taught, Facts]:
    """Load the teacher of a run, and the facts about it that the method may use.

    Args:
        run: the student's run.
        cohort: cohort of both.
        network: the student.
        fabric: the device.
        folder: of the study, which contains the teachers' runs.
        counts: ``(K,)`` training samples of the student per class.

    Raises:
        CheckpointError: a teacher does not fit the cohort, or was trained on held-out patients.
    """
    wants = run.entry.wants
    teachers = _teachers(run, cohort, fabric, folder, maps="maps" in wants)
    alone = len(teachers) == 1 or run.entry.cross_fit
    taught = teachers[0] if len(teachers) == 1 else _together(run, cohort, teachers)
    facts = Facts(
        counts=counts, share=counts.float() ** POWERS[run.entry.settings.sampler], classes=cohort.classes, background=_background(cohort),
        teacher=run.entry.teacher_name, prior=_prior(teachers, taught),
        reliability=_reliability(run, cohort, teachers, folder) if "reliability" in wants else None,
        student_shape=Shape(*network.widths()), teacher_shape=Shape(*teachers[0].widths()) if alone else None,
    )  # fmt: skip
    return taught, facts


def _background(cohort: Cohort) -> int | None:
    return None if cohort.background is None else cohort.classes.index(cohort.background)


def _teachers(run: Run, cohort: Cohort, fabric: Fabric, folder: StudyFolder, *, maps: bool) -> list[Teacher]:
    made = []
    for name, network, promise, prior in _sources(run, folder):
        _check(promise, name, cohort, run.split)
        network.compile_body(run.entry.settings.compile, training=False)
        made.append(Teacher(network, promise, fabric, maps=maps, prior=prior))
    return made


def _sources(run: Run, folder: StudyFolder) -> Iterator[tuple[str, Network, Promise, Sequence[float] | None]]:
    if isinstance(run.entry.teacher, External):
        yield (run.entry.teacher_name, *load_external(run.entry.teacher), None)
    for teacher, file in zip(run.teachers, teacher_files(run, folder).values(), strict=True):
        network, promise = restore(file)
        yield teacher.entry.name, network, promise, None if promise.prior is not None else _estimated(teacher, folder)


def _estimated(teacher: Run, folder: StudyFolder) -> list[float] | None:
    # The teacher was not trained on validation patients.
    logits, labels = _seen_by(teacher, folder, "validation")
    if len(set(labels.tolist())) < logits.shape[1]:
        return None
    prior: list[float] = estimate_prior(logits, labels).tolist()
    return prior


def _seen_by(teacher: Run, folder: StudyFolder, part: str) -> tuple[Tensor, Tensor]:
    """Logits and labels of a part; empty if the teacher has no such part."""
    found = predictions.read(folder.run(teacher.id).predictions)
    kept = found.table[(found.table["split"] == part) & (found.table["checkpoint"] == "best")]
    labels = pd.Categorical(kept["label"], categories=found.classes).codes.astype(np.int64)
    logits = np.array(kept["logits"].to_list(), dtype=np.float64).reshape(-1, len(found.classes))
    return torch.from_numpy(logits), torch.from_numpy(labels)


def _together(run: Run, cohort: Cohort, teachers: Sequence[Teacher]) -> Ensemble | CrossFitted:
    if not run.entry.cross_fit:
        return Ensemble(teachers)
    owner = torch.zeros(len(cohort.samples), dtype=torch.int64)
    for number, teacher in enumerate(run.teachers):
        owner[torch.from_numpy(teacher.split.test)] = number
    return CrossFitted(teachers, owner)


def _prior(teachers: Sequence[Teacher], taught: Teacher | Ensemble | CrossFitted) -> Tensor | None:
    if not isinstance(taught, CrossFitted):
        return None if taught.log_prior is None else taught.log_prior.exp()
    known = [teacher.log_prior.exp() for teacher in teachers if teacher.log_prior is not None]
    return torch.stack(known).mean(dim=0) if len(known) == len(teachers) else None


def prior_of(entry: Entry, counts: Tensor) -> tuple[float, ...] | None:
    """The class prior that an entry's logits will carry; None if its settings do not determine it.

    Args:
        entry: entry to be trained.
        counts: ``(K,)`` training samples per class.
    """
    settings = entry.settings
    if settings.stage in ("crt", "lws"):
        return tuple([1 / len(counts)] * len(counts))
    if settings.stage != "none":
        return None
    if entry.teacher is not None:
        # The prior of a student's logits also depends on its teacher's: only a consistent method determines it.
        return entry.method_class.carries(counts, entry.method_options)
    if settings.mixing != "none":
        return None
    return carried_prior(settings.loss, counts=counts, sampler=settings.sampler, deferred=settings.deferred, **settings.loss_options)


def expected_facts(entry: Entry, teachers: Sequence[Entry], cohort: Cohort, split: Split, shapes: Sequence[Shape]) -> Facts:
    """Facts about a run's teacher that are known before training; unknown ones get placeholders that pass all checks.

    Args:
        entry: the student's entry.
        teachers: the teachers that are entries of the study.
        cohort: cohort of all.
        split: split of the run.
        shapes: of the student, and of its teacher if that is a single network.
    """
    labels = cohort.labels
    counts = torch.from_numpy(np.bincount(labels[split.train], minlength=len(cohort.classes)))
    unseen = bool(teachers) and (bool(entry.cross_fit) or len(split.validation) > 0)
    return Facts(
        counts=counts, classes=cohort.classes, background=_background(cohort), teacher=entry.teacher_name,
        prior=_expected_prior(entry, teachers, counts, held_out=labels[split.validation]),
        reliability=torch.ones(len(counts)) if unseen else None,
        student_shape=shapes[0], teacher_shape=shapes[1] if len(shapes) > 1 else None,
    )  # fmt: skip


def _expected_prior(entry: Entry, teachers: Sequence[Entry], counts: Tensor, *, held_out: np.ndarray) -> Tensor | None:
    if isinstance(entry.teacher, External):
        stated = promise_of(entry.teacher).prior
        return None if stated is None else torch.tensor(stated)
    priors = [prior_of(teacher, counts) for teacher in teachers]
    if any(prior is None for prior in priors):
        # If the settings do not determine the prior, it will be estimated on validation.
        return counts / counts.sum() if len(set(held_out.tolist())) == len(counts) else None
    known = torch.tensor(priors)
    return known[0] if torch.allclose(known, known[:1], atol=1e-4) else None


def _reliability(run: Run, cohort: Cohort, teachers: Sequence[Teacher], folder: StudyFolder) -> Tensor | None:
    """Recalls of the corrected teachers: out of fold if they are cross-fitted, else on validation; None without either."""
    part = "test" if run.entry.cross_fit else "validation"
    shift = run.entry.method_class.corrects(run.entry.method_options)
    found = []
    for source, teacher in zip(run.teachers, teachers, strict=False):
        logits, labels = _seen_by(source, folder, part)
        prior = 0.0 if teacher.log_prior is None else teacher.log_prior.cpu().double()
        found.append(((logits - shift * prior).argmax(dim=1), labels))
    if not found or not len(found[0][1]):
        return None
    predicted, target = (torch.cat(side) for side in zip(*found, strict=True))
    return shrunk_recall(predicted, target, classes=len(cohort.classes))


def check_external(teacher: External, cohort: Cohort, splits: Sequence[Split]) -> None:
    """Refuse an external teacher that does not fit one of the splits, before any training.

    Raises:
        CheckpointError: it cannot be read, lacks required metadata, or does not fit.
    """
    for split in splits:
        _check(promise_of(teacher), teacher.weights.stem, cohort, split)


def _check(promise: Promise, name: str, cohort: Cohort, split: Split) -> None:
    check_teacher(promise, name=name, classes=cohort.classes, channels=cohort.channels, held_out=_held_out(cohort, split))
    if promise.image_size != cohort.size[0]:
        raise CheckpointError(
            f"teacher {name} was trained on {promise.image_size} pixels, {cohort.root} has {cohort.size[0]}: "
            f"prepare the cohort with --size {promise.image_size}"
        )


def _held_out(cohort: Cohort, split: Split) -> set[str]:
    """Validation and test patients: no weights that a run learns from may have been trained on them."""
    return set(cohort.samples["patient"].to_numpy()[np.concatenate([split.validation, split.test])])


def patients_before(entry: Entry, cohort: Cohort, split: Split) -> set[str]:
    """Patients that an entry's pre-trained weights or external teacher were trained on, as far as the files state them.

    Raises:
        CheckpointError: the weights were trained on held-out patients, or are a checkpoint that does not state its patients.
    """
    teacher = promise_of(entry.teacher).training_patients if isinstance(entry.teacher, External) else ()
    path = entry.pretrained
    if isinstance(path, bool) or not read_header(path).get("kind"):
        return set(teacher or ())
    promise = read_promise(path)
    check_patients(promise, f"the pre-trained weights {path}", _held_out(cohort, split))
    return {*(teacher or ()), *(promise.training_patients or ())}


def teacher_files(run: Run, folder: StudyFolder) -> dict[str, Path]:
    """The checkpoints of the teachers trained in this study, by run name."""
    return {teacher.id: folder.run(teacher.id).weights("best") for teacher in run.teachers}


def network_of(entry: Entry, cohort: Cohort) -> Network:
    """Build an entry's network as it is before training.

    Raises:
        ConfigError: the name is unknown, or the network does not support the image size.
        CheckpointError: pre-trained weights are not available or do not fit.
    """
    given = None if entry.mean is None or entry.std is None else ([entry.mean] * len(entry.channels), [entry.std] * len(entry.channels))
    return create(
        entry.model, channels=len(entry.channels), classes=len(cohort.classes), image_size=cohort.size[0],
        pretrained=entry.pretrained, head=entry.head, dropout=entry.dropout, normalisation=given,
    )  # fmt: skip


def peers_of(run: Run, cohort: Cohort, *, counts: Tensor) -> list[Peer]:
    """The networks trained together with a run's own, each with its own loss and channels."""
    return [
        Peer(network_of(peer, cohort), peer.channels, make_loss(peer.settings.loss, counts=counts, **peer.settings.loss_options))
        for peer in run.peers
    ]


def teacher_channels(run: Run) -> tuple[str, ...]:
    """Channels that a run's teachers or peers use; empty without them."""
    if entries := [*(teacher.entry for teacher in run.teachers), *run.peers]:
        return tuple(dict.fromkeys(channel for entry in entries for channel in entry.channels))
    return promise_of(run.entry.teacher).channels if isinstance(run.entry.teacher, External) else ()
