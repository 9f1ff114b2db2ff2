"""The log of a run's epochs: one JSON line each, and scalars for TensorBoard, written immediately and in this thread.

A full disk therefore raises here, not in a background thread where the error goes unnoticed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from raredistill.files import naming
from raredistill.runs.layout import RunFolder


class Curves:
    """Log of epochs; overwritten when training starts again from the first epoch (a run on several devices may restart).

    Args:
        folder: of the run.

    Raises:
        OSError: a file cannot be written.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._open()

    def _open(self) -> None:
        shutil.rmtree(self._folder.board, ignore_errors=True)
        self._log = self._folder.epochs.open("w", encoding="utf-8")
        self._board, self._started = Board(self._folder.board), False

    def add(self, record: dict[str, Any]) -> None:
        """Append an epoch's record."""
        if record["epoch"] == 0 and self._started:
            self.close()
            self._open()
        self._started = True
        with naming(self._folder.epochs):
            self._log.write(json.dumps(record) + "\n")
            self._log.flush()
        with naming(self._folder.board):
            self._board.add(record["epoch"], _scalars(record))

    def close(self) -> None:
        """Close both files."""
        self._log.close()
        self._board.close()


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    found = {}
    for part in ("train", "validation"):
        for key, value in record.get(part, {}).items():
            values = value if isinstance(value, dict) else {"all": value}
            found.update({f"{key}/{part}/{name}": number for name, number in values.items() if number is not None})
    return found


class Board:
    """One TensorBoard event file in a folder.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._file = (folder / f"events.out.tfevents.{int(time.time())}.raredistill").open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add one point to each named curve."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()

    def close(self) -> None:
        """Close the file."""
        self._records.close()
