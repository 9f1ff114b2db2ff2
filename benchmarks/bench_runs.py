"""A study of small runs: one process with all cores, or as many processes as there are cores with one each, sharing the study by its locks.

Eight runs (two small networks, four folds) of ``raredistill study`` on generated images, started from nothing; what is timed is the whole
command, imports and report included. The two ways alternate; medians are shown. Command: ``python benchmarks/bench_runs.py [--rounds 3]``
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml

CLASSES, SAMPLES, SIZE = 3, 768, 64
PROGRAM = (sys.executable, "-c", "from raredistill.cli import main; main()")
STUDY = {
    "name": "many-small-runs", "splits": {"folds": 4, "repeats": 1}, "training": {"epochs": 4, "batch_size": 32, "accelerator": "cpu"},
    "runs": [{"name": "small", "model": "small_cnn"}, {"name": "residual", "model": "cifar_resnet8"}],
}  # fmt: skip


def write_source(folder: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 255, (SAMPLES, SIZE, SIZE), dtype=np.uint8)
    path = folder / "images.npz"
    np.savez(path, x_train=images, y_train=np.arange(SAMPLES) % CLASSES)
    return path


def study(config: Path, out: Path, processes: int) -> float:
    """Seconds until all processes have ended."""
    command = [*PROGRAM, "study", str(config), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
    start = time.perf_counter()
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(processes)]
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit(f"a study ended with {codes}; run {' '.join(command)} to see why")
    return time.perf_counter() - start


def main() -> None:
    """Print both ways, and the ratio of pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds, cores = parser.parse_args().rounds, torch.get_num_threads()
    times: dict[int, list[float]] = {1: [], cores: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_source(folder)
        subprocess.run(
            [*PROGRAM, "prepare", "arrays", str(source), "--out", str(folder / "cohort"), "--size", str(SIZE)],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        config = folder / "study.yaml"
        config.write_text(yaml.safe_dump({**STUDY, "cohort": str(folder / "cohort")}))
        for round_ in range(rounds):
            for processes, found in times.items():
                found.append(study(config, folder / f"study-{processes}-{round_}", processes))
    ratio = statistics.median(several / one for one, several in zip(times[1], times[cores], strict=True))
    print(
        f"8 runs of small networks, {SIZE} x {SIZE}, {cores} cores, medians of {rounds}\n\n| processes | s | against one |\n|---|---|---|"
    )
    print(f"| 1 with {cores} threads | {statistics.median(times[1]):.1f} | 1.00 |")
    print(f"| {cores} with one thread | {statistics.median(times[cores]):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
