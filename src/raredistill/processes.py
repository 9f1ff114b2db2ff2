"""What worker processes have in common."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def end_with_parent() -> None:
    """Let this worker end as soon as the process that started it is gone, however that ended: kill -9 leaves no time to tell workers."""
    threading.Thread(target=_watch, name="end-with-parent", daemon=True).start()


def _watch() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def failure_of(function: Callable[..., Any], seconds: float, **arguments: Any) -> str:
    """Try a call in a process of its own, which can hang, crash or talk without harm.

    Args:
        function: importable by its name.
        seconds: that it may take.
        arguments: of the call, by their names.

    Returns:
        The last line of what went wrong; empty when nothing did.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_try, args=(theirs, function, arguments), daemon=True)
    child.start()
    theirs.close()
    try:
        return str(ours.recv()) if ours.poll(seconds) else f"no answer within {seconds:.0f} s"
    except EOFError:
        return "it ended without an answer"
    finally:
        child.kill()
        child.join()


def _try(answer: Connection, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        function(**arguments)
    except Exception as error:
        answer.send(last_line(error))
    else:
        answer.send("")


def last_line(error: BaseException) -> str:
    """The end of what an error says, which names the cause where it says much."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:200]
