"""Duration of a plan on several devices: each takes the first run that is ready, as the processes of a study do."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A run with its duration in seconds, and the names of the runs it depends on."""

    name: str
    seconds: float
    waits_for: tuple[str, ...] = ()


def makespan(tasks: Sequence[Task], devices: int) -> float:
    """Seconds until the last task ends.

    Args:
        tasks: in the order in which they are started; each comes after those it depends on.
        devices: number of devices, each of which works on one task at a time.

    References:
        Graham, Bounds on Multiprocessing Timing Anomalies, SIAM J. Appl. Math. 17, 1969 (list scheduling).
    """
    ends: dict[str, float] = {}
    at_work: list[tuple[float, str]] = []
    waiting, now = list(tasks), 0.0
    while waiting or at_work:
        ready = [task for task in waiting if all(name in ends for name in task.waits_for)][: devices - len(at_work)]
        waiting = [task for task in waiting if task not in ready]
        for task in ready:
            heapq.heappush(at_work, (now + task.seconds, task.name))
        now, name = heapq.heappop(at_work)
        ends[name] = now
    return now


def critical_path(tasks: Sequence[Task]) -> tuple[float, list[str]]:
    """Seconds and names of the longest chain of tasks, a lower bound for any number of devices."""
    chains: dict[str, tuple[float, list[str]]] = {}
    for task in tasks:
        before, names = max((chains[name] for name in task.waits_for), default=(0.0, []), key=lambda chain: chain[0])
        chains[task.name] = before + task.seconds, [*names, task.name]
    return max(chains.values(), default=(0.0, []), key=lambda chain: chain[0])
