"""The processes of one run: started for it alone, followed, and ended together, whatever happens to one of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import distributed

from raredistill import plugins
from raredistill.errors import RareDistillError
from raredistill.processes import end_with_parent
from raredistill.training.devices import MemoryEndedError, Precision, join, make_fabric

KEEPING = 60.0
"""Seconds that an interrupted run gets to finish its step and to keep its state."""
GRACE = 10.0
"""Seconds that the other processes get to end, for instance to write down why, once one has failed."""
TOLD = (RareDistillError, OSError, ArithmeticError)
"""Errors that say by themselves what is wrong."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Place:
    """Where one process of a run works, and its line to the process that started it.

    Attributes:
        fabric: its device.
        tell: reports an event by its name and what belongs to it; only what the first process tells is heard.
        interrupted: whether the run is to end after the step.
        micro_batches: parts in which each process takes its samples, as an earlier start has found to be needed.
    """

    fabric: Fabric
    tell: Callable[..., None]
    interrupted: Callable[[], bool] = lambda: False
    micro_batches: int = 1


Work = Callable[..., Any]
"""Called in each process with its place and the arguments; all of them can be pickled."""


def launch(work: Work, arguments: tuple[Any, ...], *, devices: int, accelerator: str, precision: Precision, hear: Work) -> Any:
    """Do the work of a run on its devices: in this process on one, in a new process each on several.

    Where a device's memory ends, all of them start again from the kept state with smaller micro-batches: a process that lacks the memory
    for a step cannot tell the others, who wait for its gradients.

    Args:
        work: called as ``work(place, *arguments)`` in each process.
        arguments: for it.
        devices: how many.
        accelerator: as for :func:`~raredistill.training.devices.make_fabric`.
        precision: likewise.
        hear: called here with what the first process tells.

    Returns:
        What the work of the first process returns: plain values and arrays, no tensors, whose memory would end with the process.

    Raises:
        ConfigError: the machine has not so many devices.
        RareDistillError: a process was killed.
        KeyboardInterrupt: as it came; the state of the run was kept.
    """
    fabric = make_fabric(accelerator, precision, devices)
    if devices == 1:
        return work(Place(fabric, hear), *arguments)
    parts = 1
    while True:
        try:
            return _together(work, arguments, _Crew(devices, fabric.device.type, precision, parts), hear)
        except MemoryEndedError as error:
            parts = error.parts


@dataclass(frozen=True)
class _Crew:
    """What all processes of a start have in common."""

    size: int
    kind: str
    precision: Precision
    parts: int


def _together(work: Work, arguments: tuple[Any, ...], crew: _Crew, hear: Work) -> Any:
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    threads = max(1, torch.get_num_threads() // crew.size)
    # Processes that are forked from a server which has done nothing but import are there at once; CUDA wants a new interpreter.
    context: Any = multiprocessing.get_context("spawn" if crew.kind == "cuda" else "forkserver")
    context.set_forkserver_preload([__name__, work.__module__])
    stop = context.Value("b", 0, lock=False)  # without a lock: one that is killed inside could not let it go
    processes: list[Any] = []
    lines: list[Connection] = []
    patience = GRACE
    try:
        for rank in range(crew.size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(crew, rank, store.port, threads, theirs, stop, plugins.loaded(), work, arguments))
            with _held_signals():
                process.start()
            processes.append(process)
            lines.append(ours)
            theirs.close()  # so that the line ends with the process
        return _follow(processes, lines, hear)
    except (KeyboardInterrupt, SystemExit):
        patience = KEEPING
        raise
    finally:
        try:
            stop.value = 1
            _wait_for(processes, patience)
        finally:  # also when Ctrl-C comes again
            _kill(processes)


def _follow(processes: list[Any], lines: list[Connection], hear: Work) -> Any:
    results: dict[int, Any] = {}
    while len(results) < len(lines):
        ready = wait([line for rank, line in enumerate(lines) if rank not in results])
        for rank in [rank for rank, line in enumerate(lines) if line in ready]:
            kind, value = _word(lines[rank])
            if kind == "told":
                hear(*value)
            elif kind == "done":
                results[rank] = value
            else:
                raise _reason(processes, rank, value)
    return results[0]


def _word(line: Connection) -> tuple[str, Any]:
    try:
        kind, value = line.recv()
    except (EOFError, ConnectionError):
        return "gone", None
    return kind, value


def _reason(processes: list[Any], rank: int, error: Exception | None) -> Exception:
    """A process that is gone takes its connections with it: what the others say of them then explains less than that it is gone."""
    if error is None:
        processes[rank].join(GRACE)
        return _lost(processes, rank)
    if not isinstance(error, TOLD):
        _wait_for([process for process in processes if process is not processes[rank]], 1.0)
        if killed := [other for other, process in enumerate(processes) if (process.exitcode or 0) < 0]:
            return _lost(processes, killed[0])
    return error


def _lost(processes: list[Any], rank: int) -> RareDistillError:
    code = processes[rank].exitcode or 0
    how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended (exit code {code})"
    return RareDistillError(
        f"process {rank + 1} of the {len(processes)} of this run {how}; what was kept is intact, and the same command goes on from there"
    )


def _wait_for(processes: list[Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))


def _kill(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
        process.join()


@contextmanager
def _held_signals() -> Iterator[None]:
    """Ctrl-C in a terminal reaches every process: those that are just starting must not end of it, and this one must not miss it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(
    crew: _Crew,
    rank: int,
    port: int,
    threads: int,
    line: Connection,
    stop: Any,
    known: Mapping[str, str],
    work: Work,
    arguments: tuple[Any, ...],
) -> None:
    """One process: it hears of interruptions from the one that started it, so that all end after the same step."""
    end_with_parent()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    torch.set_num_threads(threads)
    plugins.load_again(known)

    def tell(*event: Any) -> None:
        if rank == 0:
            line.send(("told", event))

    try:
        fabric = join(rank, crew.size, port=port, kind=crew.kind, precision=crew.precision)
        line.send(("done", work(Place(fabric, tell, lambda: bool(stop.value), crew.parts), *arguments)))
        distributed.destroy_process_group()
    except BaseException as error:  # also what ends a process quietly: the others must not wait for it
        line.send(("failed", _portable(error)))
        os._exit(1)  # at once: a connection that waits for another process may not close in order


def _portable(error: BaseException) -> Exception:
    """An error that another process can be told, with where it was raised."""
    told: Exception = RuntimeError(f"{type(error).__name__}: {error}")
    if isinstance(error, torch.AcceleratorError):
        told = torch.AcceleratorError(str(error))
    if isinstance(error, TOLD):
        told = FloatingPointError(str(error)) if isinstance(error, ArithmeticError) else error
    told.add_note("".join(traceback.format_exception(error)))
    return told
