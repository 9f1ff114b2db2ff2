"""Progress and tables on the console: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from raredistill.names import shown

if TYPE_CHECKING:
    import pandas as pd

LINE_EVERY = 10.0
SETTLED = 5.0
"""Seconds after which the time left is shown: earlier, most of the time is the start of the workers."""


TOLD_FROM = 0.01
"""Share of the steps after which the time left is shown: a single step of thousands does not predict the rest."""


class Progress:
    """Shows progress towards a total and the time left; a context manager."""

    def __init__(self, what: str) -> None:
        self.what, self.start, self.last = what, time.monotonic(), 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)
            )
            self._task = self._bar.add_task(self.what, total=None)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Report that ``done`` of ``total`` steps are finished."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, description=f"{self.what} {note}".strip())
        elif done == total or time.monotonic() - self.last > LINE_EVERY:
            self.last = time.monotonic()
            print(f"{self.what}: {done}/{total}{self._left(done, total)} {note}".rstrip(), file=sys.stderr, flush=True)

    def _left(self, done: int, total: int) -> str:
        if not max(1, TOLD_FROM * total) <= done < total or time.monotonic() - self.start < SETTLED:
            return ""
        return f", about {duration((time.monotonic() - self.start) / done * (total - done))} left"


def duration(seconds: float) -> str:
    """Format seconds for people: ``45 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def said(message: str) -> str:
    """Make a message of several lines safe to print, whatever characters the names in it contain."""
    return "\n".join(map(shown, message.split("\n")))


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a data frame for ``show_table``."""
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def show_table(rows: list[dict[str, Any]], title: str = "") -> None:
    """Print records as a table: numbers to the right, floats to three decimals, no name broken.

    On a terminal the last columns, which matter least, are left out where they do not fit, and named below; elsewhere every column is
    printed as plain text.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        return
    cells = [[_cell(value) for value in row.values()] for row in rows]
    names = [shown(name) for name in rows[0]]
    console = Console()
    wide = console.width if console.is_terminal else None
    kept = len(names) if wide is None else _fitting([max(map(len, column)) for column in zip(names, *cells, strict=True)], wide)
    table = Table(box=box.SIMPLE_HEAD if wide else None, pad_edge=False)
    for name, value in list(rows[0].items())[:kept]:
        table.add_column(
            escape(shown(name)), justify="right" if isinstance(value, (int, float)) else "left", no_wrap=wide is None, overflow="fold"
        )
    for row in cells:
        table.add_row(*map(escape, row[:kept]))
    if title:
        print(shown(title))  # not as the table's own title, which is cut to the table's width
    (console if wide else Console(width=10_000)).print(table)
    if kept < len(names):
        print(f"not shown here: {', '.join(names[kept:])}")


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else shown(str(value))


def _fitting(widths: list[int], limit: int) -> int:
    """How many of the first columns fit beside each other, with two spaces between; the first one always does."""
    used = 0
    for place, width in enumerate(widths):
        used += width + 2
        if used > limit and place:
            return place
    return len(widths)
