"""Parallel processing with one patient per worker process, over all cores."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any, TypeVar

import torch

from raredistill import plugins
from raredistill.cohort.sources import Unit
from raredistill.errors import DataError
from raredistill.memory import keep_freed
from raredistill.processes import end_with_parent

Outcome = TypeVar("Outcome")
LARGEST_KEPT = 2**25
"""Bytes of the largest block that a worker keeps for its next patient."""
AHEAD = 8
"""Units per worker that are submitted before their results are consumed."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def over_units(
    work: Callable[..., Outcome],
    units: Sequence[Unit],
    arguments: Sequence[Any],
    *,
    workers: int | None = None,
    executor: Executor | None = None,
) -> Iterator[Outcome]:
    """Call ``work(unit, *arguments)`` for every unit and yield the results as they arrive, in no particular order.

    One worker, or one unit, runs in this process; several run in processes of one thread each. Leaving the iterator early, as an
    interruption does, waits only for running units.

    Args:
        work: a function at module level.
        units: patients.
        arguments: the rest of the function's arguments.
        workers: processes; all cores by default.
        executor: running processes, used instead of new ones.

    Raises:
        DataError: a worker was killed, for example because memory ran out.
    """
    count = min(workers or cores(), len(units))
    if executor is None and count <= 1:
        yield from (work(unit, *arguments) for unit in units)
        return
    packed = pickle.dumps(tuple(arguments))
    with nullcontext(executor) if executor is not None else pool(count) as processes:
        yield from _results(processes, units, lambda unit: (work, unit, packed), ahead=AHEAD * count)


def _call(work: Callable[..., Outcome], unit: Unit, packed: bytes) -> Outcome:
    return work(unit, *_unpack(packed))


@functools.lru_cache(maxsize=1)
def _unpack(packed: bytes) -> tuple[Any, ...]:
    """Unpickle the arguments once per worker, so that a source computes its cached values once, not once per patient."""
    arguments: tuple[Any, ...] = pickle.loads(packed)
    return arguments


def _results(processes: Executor, units: Sequence[Unit], task: Callable[[Unit], tuple[Any, ...]], *, ahead: int) -> Iterator[Any]:
    """Yield results as they arrive; at most ``ahead`` units are pending or not yet consumed, so that memory stays small."""
    left, open_tasks = iter(units), set[Future[Any]]()
    try:
        open_tasks |= {processes.submit(_call, *task(unit)) for unit in islice(left, ahead)}
        while open_tasks:
            done, open_tasks = wait(open_tasks, return_when=FIRST_COMPLETED)
            open_tasks |= {processes.submit(_call, *task(unit)) for unit in islice(left, len(done))}
            yield from (future.result() for future in done)
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, perhaps because memory ran out; run the same command again with fewer workers"
        ) from None
    finally:
        for future in open_tasks:
            future.cancel()


@contextmanager
def pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that start fast (they share one import of the sources) and leave interruptions to their parent."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(plugins.loaded(),)) as executor:
        yield executor


def _start_worker(known: Mapping[str, str]) -> None:
    plugins.load_again(known)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    keep_freed(LARGEST_KEPT)
    torch.set_num_threads(1)
