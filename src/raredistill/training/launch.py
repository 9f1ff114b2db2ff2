"""The processes of one run: started for it alone, monitored, and ended together, whatever happens to one of them."""

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
"""Seconds that an interrupted run gets to finish its step and save its state."""
GRACE = 10.0
"""Seconds that the other processes get to end (and to log why) once one has failed."""
TOLD = (RareDistillError, OSError, ArithmeticError)
"""Errors whose message alone explains the problem."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Place:
    """The device of one process of a run, and its connection to the process that started it.

    Attributes:
        fabric: Fabric of its device.
        tell: reports an event with its name and values; only events of the first process are used.
        interrupted: whether the run should stop after the current step.
        micro_batches: parts into which each process splits its samples, as an earlier start found necessary.
    """

    fabric: Fabric
    tell: Callable[..., None]
    interrupted: Callable[[], bool] = lambda: False
    micro_batches: int = 1


Work = Callable[..., Any]
"""Called in each process with its place and the arguments; everything must be picklable."""


def launch(work: Work, arguments: tuple[Any, ...], *, devices: int, accelerator: str, precision: Precision, hear: Work) -> Any:
    """Do the work of a run on its devices: in this process for one device, in one new process each for several.

    When a device runs out of memory, all processes restart from the saved state with smaller micro-batches: the failing process cannot
    notify the others, which are waiting for its gradients.

    Args:
        work: called as ``work(place, *arguments)`` in each process.
        arguments: of ``work``.
        devices: number of devices.
        accelerator: as for :func:`~raredistill.training.devices.make_fabric`.
        precision: likewise.
        hear: called in this process with the events of the first process.

    Returns:
        The return value of ``work`` in the first process: plain values and arrays, no tensors, whose memory would vanish with the process.

    Raises:
        ConfigError: the machine does not have that many devices.
        RareDistillError: a process was killed.
        KeyboardInterrupt: the run was interrupted; its state was saved.
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
    """Settings shared by all processes of one start."""

    size: int
    kind: str
    precision: Precision
    parts: int


def _together(work: Work, arguments: tuple[Any, ...], crew: _Crew, hear: Work) -> Any:
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    threads = max(1, torch.get_num_threads() // crew.size)
    # Forking from a server that has only imported modules is fast; CUDA needs a new interpreter.
    context: Any = multiprocessing.get_context("spawn" if crew.kind == "cuda" else "forkserver")
    context.set_forkserver_preload([__name__, work.__module__])
    stop = context.Value("b", 0, lock=False)  # no lock: a process killed while holding it could not release it
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
            theirs.close()  # so that the connection closes with the process
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
    """Prefer a process's death to the connection errors it causes in the others."""
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
        f"process {rank + 1} of the {len(processes)} of this run {how}; its saved state is intact, and the same command resumes from it"
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
    """Hold signals while processes start: Ctrl-C reaches all of them, but must not end a starting one, nor be missed by this one."""
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
    """Body of one process; it is notified of interruptions by the process that started it, so that all end after the same step."""
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
    except BaseException as error:  # also exceptions that end a process silently: the others must not wait for it
        line.send(("failed", _portable(error)))
        os._exit(1)  # at once: a connection that waits for another process may not close in order


def _portable(error: BaseException) -> Exception:
    """Convert an error into one that can be sent to another process, with its traceback."""
    told: Exception = RuntimeError(f"{type(error).__name__}: {error}")
    if isinstance(error, torch.AcceleratorError):
        told = torch.AcceleratorError(str(error))
    if isinstance(error, TOLD):
        told = FloatingPointError(str(error)) if isinstance(error, ArithmeticError) else error
    told.add_note("".join(traceback.format_exception(error)))
    return told
