"""Progress callbacks of the runs of a study."""

from __future__ import annotations

from typing import Any, Protocol

from raredistill.runs.record import RunRecord
from raredistill.runs.run import Run


class Watcher(Protocol):
    """Receives the progress of a study."""

    def run_started(self, run: Run, epochs: int) -> None:
        """A run starts training."""

    def view_kept(self, run: Run, done: int, total: int) -> None:
        """``done`` of ``total`` views of the teacher cache exist."""

    def epoch_done(self, run: Run, record: dict[str, Any]) -> None:
        """An epoch is finished."""

    def run_done(self, run: Run, record: RunRecord, *, reused: bool) -> None:
        """A run has finished (now or earlier) or failed."""


class Unwatched:
    """Reports nothing."""

    def run_started(self, run: Run, epochs: int) -> None:
        """Ignored."""

    def view_kept(self, run: Run, done: int, total: int) -> None:
        """Ignored."""

    def epoch_done(self, run: Run, record: dict[str, Any]) -> None:
        """Ignored."""

    def run_done(self, run: Run, record: RunRecord, *, reused: bool) -> None:
        """Ignored."""
