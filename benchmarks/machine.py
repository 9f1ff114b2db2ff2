"""What a benchmark must say of its machine, so that two occasions can be compared."""

import os
import platform
from pathlib import Path

import torch


def described() -> str:
    """Processor, cores, frequency now, load, threads and versions, in one line."""
    info = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in info.read_text().splitlines()] if info.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in lines}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    return (
        f"machine: {facts.get('model name', platform.processor())}, {cores} cores, {facts.get('cpu MHz', '?')} MHz, load {load}; "
        f"torch {torch.__version__} with {torch.get_num_threads()} threads, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"
    )
