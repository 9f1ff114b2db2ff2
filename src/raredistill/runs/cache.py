"""The teacher cache of a study: one file per view, shared by all students of a fold, in a folder named by a hash of all inputs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from raredistill import checkpoint
from raredistill.batches import Batches
from raredistill.cohort.store import Cohort
from raredistill.errors import CheckpointError
from raredistill.files import fingerprint, locked
from raredistill.runs.drafts import code, versions
from raredistill.runs.layout import StudyFolder
from raredistill.runs.run import Run, external_facts
from raredistill.runs.teachers import Taught, teacher_channels, teacher_files
from raredistill.training.cache import CachedTeacher, Table, compute_view


class Cache:
    """Replaces a run's teacher by its cached outputs for the training views, if the run's settings request it.

    Args:
        run: the student's run.
        cohort: cohort of both.
        fabric: the device.
        folder: of the study.
        on_view: called with the number of finished views and the total.

    Attributes:
        facts: cost, for the run's record: ``views``, how many of them this run ``computed``, and in how many ``seconds``.
        remarks: messages about damaged files.
    """

    def __init__(self, run: Run, cohort: Cohort, fabric: Fabric, folder: StudyFolder, on_view: Callable[[int, int], None]) -> None:
        self._run, self._cohort, self._fabric, self._study, self._on_view = run, cohort, fabric, folder, on_view
        self.facts: dict[str, float] = {}
        self.remarks: list[str] = []

    def __call__(self, taught: Taught) -> Taught:
        """Compute the missing views. Waits for another process that computes the same view; after a kill, finished views are intact.

        Args:
            taught: the teacher, or several combined.

        Raises:
            OSError: a view cannot be written.
        """
        views = self._run.entry.settings.views
        if views is None:
            return taught
        batches = cache(self._batches)  # created for the first missing view, freed after the last
        tables = [
            self._view(lambda view: compute_view(taught, batches(), view, features=self._features), view, views) for view in range(views)
        ]
        seconds = [spent for _, spent in tables if spent]
        self.facts = {"views": views, "computed": len(seconds), "seconds": round(sum(seconds), 3)}
        return CachedTeacher([table for table, _ in tables], self._run.split.train, self._fabric.device)

    def _view(self, compute: Callable[[int], Table], view: int, views: int) -> tuple[Table, float]:
        """The table of a view, and the seconds spent on computing it; 0 if it was cached."""
        self._on_view(view, views)
        path = self._folder / f"view{view}.safetensors"
        with locked(self._folder / f".view{view}.lock"):
            if (table := self._read(path)) is not None:
                return table, 0.0
            start = time.perf_counter()
            table = compute(view)
            checkpoint.save_state(path, table, {"view": view})
            return table, time.perf_counter() - start

    def _read(self, path: Path) -> Table | None:
        if not path.exists():
            return None
        try:
            return checkpoint.load_state(path)[0]
        except CheckpointError as error:
            self.remarks.append(f"{error}; the view was computed again")
            return None

    @property
    def _features(self) -> bool:
        return "features" in self._run.entry.wants

    def _batches(self) -> Batches:
        # Same batch size as the student: equal shapes use the same kernels, also in bf16.
        settings = self._run.entry.settings
        return Batches(
            self._cohort, self._run.split.train, channels=teacher_channels(self._run), batch_size=settings.batch_size,
            device=self._fabric.device, shuffle=False, augmentation=settings.strengths, seed=self._run.fold_seed,
            # The student's pixels are already resident: the teacher's use the remaining memory, or are streamed.
            residence="auto" if settings.residence == "resident" else settings.residence,
        )  # fmt: skip

    @cached_property
    def _folder(self) -> Path:
        return self._study.teacher_cache / fingerprint(self._determines())[:16]

    def _determines(self) -> dict[str, Any]:
        """All inputs of the cached outputs: equal inputs give equal outputs."""
        entry, split, device = self._run.entry, self._run.split, self._fabric.device
        augmentation = entry.settings.strengths
        return {
            "teachers": {name: checkpoint.content_hash(file) for name, file in teacher_files(self._run, self._study).items()},
            "external": external_facts(entry.teacher),
            "cross_fit": entry.cross_fit,
            "cohort": self._cohort.hash,
            "rows": hashlib.sha256(split.train.tobytes()).hexdigest(),
            "views": None if augmentation is None else {**asdict(augmentation), "seed": self._run.fold_seed},
            "features": self._features,
            "batch_size": entry.settings.batch_size,
            "precision": entry.settings.precision,
            "compile": entry.settings.compile,
            "threads": torch.get_num_threads() if device.type == "cpu" else 0,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "versions": versions(),
            "code": {**code(), **self._run.plugins},
        }
