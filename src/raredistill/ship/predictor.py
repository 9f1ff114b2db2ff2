"""From a model's files to probabilities of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from raredistill.errors import CheckpointError, ConfigError, DataError
from raredistill.models import restore
from raredistill.predictions import Predictions
from raredistill.reports.folder import patients_of_sides, read_results_of
from raredistill.runs.layout import RunFolder, StudyFolder
from raredistill.runs.record import RunRecord, StudyRecord, read_study
from raredistill.ship.bundle import open_bundle
from raredistill.ship.find import Found, find
from raredistill.ship.terms import DEFAULT_SENSITIVITY, Preparation, Rule, Terms, digests, fit_rule
from raredistill.training.devices import make_fabric

Floats = NDArray[np.float64]
Answer = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``."""


class Predictor:
    """A model that is ready: ``Predictor("study:student")(images)`` gives calibrated probabilities.

    Args:
        model: a run's folder, ``STUDY:ENTRY``, ``STUDY/runs/NAME`` with the beginning of a name, or an export.
        checkpoint: ``best`` or ``last``; an export holds one.
        sensitivity: wanted for the rare class; 0.9 by default, of an export the one that it was made with.
        augment: also answer the mirrored image, and average (test-time augmentation).
        accelerator: as in training.

    Raises:
        RareDistillError: the model is not there, is damaged, or cannot be used as asked.
    """

    def __init__(
        self, model: Path | str, *, checkpoint: str = "best", sensitivity: float | None = None, augment: bool = False,
        accelerator: str = "auto",
    ) -> None:  # fmt: skip
        if checkpoint not in ("best", "last"):
            raise ConfigError(f"checkpoint {checkpoint!r}: choose best or last")
        self.found, self.augment, self.checkpoint = find(model), augment, checkpoint
        if self.found.kind == "export":
            self.terms, answer = open_bundle(self.found.path)
            self._answers: Sequence[Answer] = [answer]
            if sensitivity is not None:
                self.terms = replace(self.terms, rule=self.terms.rule.at(sensitivity))
        else:
            self.terms = read_terms(self.found, checkpoint, DEFAULT_SENSITIVITY if sensitivity is None else sensitivity)
            self._answers = [_answer(run.weights(checkpoint), accelerator) for run in self.found.runs]

    def logits(self, images: ArrayLike | Tensor) -> list[Floats]:
        """Logits ``(N, K)`` of each of the model's networks.

        Args:
            images: ``(N, C, height, width)``, bytes or numbers in [0, 1], prepared as the training cohort was.

        Raises:
            DataError: another shape, or values out of range.
        """
        plain = self._checked(images)
        answers = [answer(plain).astype(np.float64) for answer in self._answers]
        if not self.augment:
            return answers
        mirrored = np.ascontiguousarray(plain[..., ::-1])
        return [(one + answer(mirrored)) / 2 for one, answer in zip(answers, self._answers, strict=True)]

    def __call__(self, images: ArrayLike | Tensor) -> Floats:
        """Calibrated probabilities ``(N, K)`` in the order of ``terms.classes``; arguments as :meth:`logits`."""
        return self.terms.rule.probabilities(self.logits(images))

    def _checked(self, images: ArrayLike | Tensor) -> NDArray[np.float32]:
        array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
        wanted = (len(self.terms.channels), *self.terms.preparation.size)
        if array.ndim != 4 or array.shape[1:] != wanted:
            raise DataError(f"images of shape {array.shape}; the model takes (N, {', '.join(map(str, wanted))})")
        if array.dtype == np.uint8:
            return array.astype(np.float32) / np.float32(255)
        if array.size and (float(array.min()) < 0 or not float(array.max()) <= 1):
            raise DataError("images: numbers are in [0, 1], or bytes (uint8)")
        return array.astype(np.float32)


def _answer(path: Path, accelerator: str) -> Answer:
    fabric = make_fabric(accelerator, "32-true")
    network = fabric.to_device(restore(path)[0]).eval()

    @torch.inference_mode()
    def answer(images: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = network(torch.from_numpy(images).to(fabric.device)).float().cpu().numpy()
        return found

    return answer


def read_terms(found: Found, checkpoint: str, sensitivity: float) -> Terms:
    """The terms of runs of a study, from its description, its splits and its validation predictions.

    Raises:
        DataError: the study or one of its runs is damaged.
        CheckpointError: the networks do not agree with each other.
    """
    study = read_study(StudyFolder(found.path).description)
    promises = [restore(run.weights(checkpoint))[1] for run in found.runs]
    shapes = {(promise.classes, promise.channels, promise.image_size) for promise in promises}
    if len(shapes) != 1:
        raise CheckpointError(f"{found.said}: its networks differ in classes, channels or size; name one run")
    cohort, told = study.cohort, study.cohort.provenance
    preparation = Preparation(str(told.get("kind", "")), (cohort.size[0], cohort.size[1]), dict(told.get("settings", {})))
    train = {name for promise in promises for name in promise.training_patients or ()}
    return Terms(
        found.entry, promises[0].classes, cohort.background, promises[0].channels, preparation,
        _rule(found, study, checkpoint, sensitivity), digests(train), digests(_validated(found, study) - train), _files(told),
    )  # fmt: skip


def _files(provenance: dict[str, object]) -> dict[str, str]:
    hashes = provenance.get("hashes")
    if not isinstance(hashes, dict):
        return {}
    return {each: patient for patient, files in hashes.items() if isinstance(files, dict) for each in files.values()}


def records_of(found: Found, study: StudyRecord) -> list[tuple[RunFolder, RunRecord]]:
    """The runs of a study whose validation predictions a model's rule is fitted on: its own, or all folds' of a refitted entry."""
    folder = StudyFolder(found.path)
    wanted = {run.path.name for run in found.runs}
    chosen = [run for run in study.runs if run.status == "done" and run.kind != "cross-fitted teacher"]
    own = [run for run in chosen if (run.name == found.entry if found.kind == "refit" else run.id in wanted)]
    return [(folder.run(run.id), run) for run in own]


def part_of(found: Found, study: StudyRecord, split: str, checkpoint: str) -> list[Predictions]:
    """What each run of :func:`records_of` predicted for one part; runs without that part are left out."""
    tables = [read_results_of(folder, record, study.cohort.classes)[0] for folder, record in records_of(found, study)]
    there = [((table.table["split"] == split) & (table.table["checkpoint"] == checkpoint)).any() for table in tables]
    return [table.part(split, checkpoint) for table, has in zip(tables, there, strict=True) if has]


def _rule(found: Found, study: StudyRecord, checkpoint: str, sensitivity: float) -> Rule:
    tables = part_of(found, study, "validation", checkpoint)
    whole = found.kind == "refit"
    if not tables or (not whole and len(tables) != len(found.runs)):
        return Rule(study.rare, (1.0,) * len(found.runs), basis="no validation part, so probabilities are not calibrated")
    basis = "out-of-fold validation predictions of the study's folds" if whole or len(tables) > 1 else "the run's validation predictions"
    return fit_rule(tables, study.rare, sensitivity=sensitivity, basis=basis, shared=whole)


def _validated(found: Found, study: StudyRecord) -> set[str]:
    """Patients on whom epochs, temperatures and thresholds were chosen."""
    folder = StudyFolder(found.path)
    places = {folder.split(record.repeat, record.fold) for _, record in records_of(found, study)}
    return {name for place in sorted(places) if place.is_file() for name in patients_of_sides(place)["validation"]}
