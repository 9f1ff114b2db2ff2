"""Layout of a study's folder: the only module that defines the names of its files and folders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNFINISHED, DAMAGED = ".unfinished", ".damaged"
RESULTS = ("best.safetensors", "last.safetensors", "predictions.parquet", "epochs.jsonl")
"""Files whose hashes a finished run's record holds."""


@dataclass(frozen=True)
class RunFolder:
    """The files of one run, finished or not.

    Attributes:
        path: the folder that holds them.
    """

    path: Path

    def weights(self, checkpoint: str) -> Path:
        """The checkpoint ``best`` or ``last``."""
        return self.path / f"{checkpoint}.safetensors"

    @property
    def predictions(self) -> Path:
        """Logits of the validation and test samples."""
        return self.path / "predictions.parquet"

    @property
    def epochs(self) -> Path:
        """One JSON line per epoch."""
        return self.path / "epochs.jsonl"

    @property
    def board(self) -> Path:
        """TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def record(self) -> Path:
        """The run's record, written last."""
        return self.path / "run.json"

    @property
    def origin(self) -> Path:
        """Code, versions and teacher that the run was started with."""
        return self.path / "origin.json"

    @property
    def draft(self) -> RunFolder:
        """The folder of the run until it is finished."""
        return RunFolder(self.path.with_name(self.path.name + UNFINISHED))

    @property
    def damaged(self) -> Path:
        """The folder to which a damaged run is moved."""
        return self.path.with_name(self.path.name + DAMAGED)

    @property
    def error(self) -> Path:
        """The traceback of a failed run."""
        return self.path.with_name(f"{self.path.name}.error.txt")

    @property
    def lock(self) -> Path:
        """Locked by the process that works on the run."""
        return self.path.with_name(f".{self.path.name}.lock")


@dataclass(frozen=True)
class StudyFolder:
    """The files of a study.

    Attributes:
        path: its folder, named by ``--out``.
    """

    path: Path

    @property
    def description(self) -> Path:
        """Description and progress of the study."""
        return self.path / "study.json"

    @property
    def lock(self) -> Path:
        """Locked while the description is written."""
        return self.path / ".lock"

    @property
    def looks(self) -> Path:
        """The rule of stopping, and what each look has found."""
        return self.path / "looks.json"

    @property
    def splits(self) -> Path:
        """One JSON file per split."""
        return self.path / "splits"

    @property
    def runs(self) -> Path:
        """One folder per run."""
        return self.path / "runs"

    @property
    def teacher_cache(self) -> Path:
        """Cached teacher outputs; it may be deleted at any time and is then computed again."""
        return self.path / "teacher-cache"

    @property
    def maps(self) -> Path:
        """Grad-CAM maps of the hardest slices."""
        return self.path / "maps.safetensors"

    @property
    def report(self) -> Path:
        """The report: page, tables and figures."""
        return self.path / "report"

    @property
    def page(self) -> Path:
        """The report's HTML page."""
        return self.report / "report.html"

    def run(self, name: str) -> RunFolder:
        """The folder of a finished run."""
        return RunFolder(self.runs / name)

    def refit(self, entry: str) -> StudyFolder:
        """An entry trained once more on all patients, with its teachers: a study of one split."""
        return StudyFolder(self.path / "refit" / entry)

    def split(self, repeat: int, fold: int) -> Path:
        """The patients and rows of one split."""
        return self.splits / f"r{repeat}f{fold}.json"

    def locks(self) -> Iterator[Path]:
        """The locks of all runs that this folder has ever contained."""
        yield from sorted(self.runs.glob(".*.lock"))

    def cohorts(self) -> list[Path]:
        """Cohorts that the study prepared itself."""
        return sorted(self.path.glob("cohort-*"))
