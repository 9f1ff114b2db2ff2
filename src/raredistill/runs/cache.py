"""The teacher cache of a study: one file a view, shared by every student of a fold, named by all that its content depends on."""

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
from raredistill.training.cache import Kept, Table, look


class Cache:
    """Puts what a run's teacher says of its training views in the teacher's place, where the run asks for that.

    Args:
        run: the student's.
        cohort: what both read.
        fabric: the device.
        folder: of the study.
        on_view: called with the number of views that exist, and with how many there will be.

    Attributes:
        facts: what it took, for the run's record: ``views``, how many of them this run ``computed``, and in how many ``seconds``.
        remarks: which files were damaged.
    """

    def __init__(self, run: Run, cohort: Cohort, fabric: Fabric, folder: StudyFolder, on_view: Callable[[int, int], None]) -> None:
        self._run, self._cohort, self._fabric, self._study, self._on_view = run, cohort, fabric, folder, on_view
        self.facts: dict[str, float] = {}
        self.remarks: list[str] = []

    def __call__(self, taught: Taught) -> Taught:
        """Compute what is not there yet. Another process at the same view is waited for; a kill in between leaves whole views.

        Args:
            taught: the teacher, or several together.

        Raises:
            OSError: a view cannot be written.
        """
        views = self._run.entry.settings.views
        if views is None:
            return taught
        batches = cache(self._batches)  # made for the first view that is not there, and gone with the last
        found = [self._view(lambda view: look(taught, batches(), view, features=self._features), view, views) for view in range(views)]
        seconds = [spent for _, spent in found if spent]
        self.facts = {"views": views, "computed": len(seconds), "seconds": round(sum(seconds), 3)}
        return Kept([table for table, _ in found], self._run.split.train, self._fabric.device)

    def _view(self, compute: Callable[[int], Table], view: int, views: int) -> tuple[Table, float]:
        """The table of a view, and the seconds that it took; none where it was there."""
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
        # Of the student's batch size: the same shapes take the same kernels, also in bf16.
        settings = self._run.entry.settings
        return Batches(
            self._cohort, self._run.split.train, channels=teacher_channels(self._run), batch_size=settings.batch_size,
            device=self._fabric.device, shuffle=False, augmentation=settings.strengths, seed=self._run.fold_seed,
            # The student's pixels have their place already: the teacher's take what is left, or are streamed.
            residence="auto" if settings.residence == "resident" else settings.residence,
        )  # fmt: skip

    @cached_property
    def _folder(self) -> Path:
        return self._study.teacher_cache / fingerprint(self._determines())[:16]

    def _determines(self) -> dict[str, Any]:
        """All that the content depends on: equal where a teacher would say the same of the same views."""
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
