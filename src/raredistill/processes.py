"""Helpers for worker processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def end_with_parent() -> None:
    """End this worker as soon as its parent process is gone, even after kill -9, which leaves no time to notify workers."""
    threading.Thread(target=_watch, name="end-with-parent", daemon=True).start()


def _watch() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def failure_of(function: Callable[..., Any], seconds: float, **arguments: Any) -> str:
    """Try a call in a separate process, which can hang, crash or print without harm.

    Args:
        function: importable by its name.
        seconds: time limit.
        arguments: keyword arguments of the call.

    Returns:
        The last line of the error; empty if there was none.
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
    """Last line of an error's message, which in long messages names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:200]
