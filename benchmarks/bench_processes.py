"""What several processes for one run cost or gain: epoch time against one process, at the same global batch and the same threads in all.

On the CPU: resnet18, 64 x 64, 256 images, batch 64, two processes against one. With two GPUs or more, also resnet50, 224 x 224, 4,096
images, batch 512 in bf16 on 1, 2, 4 ... of them. Each start trains three epochs, of which the first is not counted; starts are interleaved.
Command: ``python benchmarks/bench_processes.py``
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from raredistill.augment import PRESETS
from raredistill.batches import Batches
from raredistill.cohort.store import Cohort, save
from raredistill.losses import make_loss
from raredistill.models import create
from raredistill.training.launch import Place, launch
from raredistill.training.loop import fit
from raredistill.training.objectives import Supervised
from raredistill.training.settings import Settings

CLASSES, ROUNDS, EPOCHS = ("a", "b", "c"), 5, 3


@dataclass(frozen=True)
class Job:
    """What is trained, and on what."""

    accelerator: str
    model: str
    size: int
    samples: int
    batch: int
    precision: Any


CPU = Job("cpu", "resnet18", 64, 256, 64, "32-true")
GPU = Job("cuda", "resnet50", 224, 4096, 512, "bf16-mixed")


def make_cohort(root: Path, job: Job) -> Cohort:
    labels, names = [CLASSES[n % 3] for n in range(job.samples)], [str(n) for n in range(job.samples)]
    rows = pd.DataFrame(
        {"sample": names, "patient": names, "patient_label": labels, "label": labels, "slice": -1, "source": "", "split": ""}
    )
    pixels = np.random.default_rng(0).integers(0, 255, (job.samples, job.size, job.size), dtype=np.uint8)
    return save(root / job.accelerator, rows, {"grey": [pixels]}, classes=CLASSES, size=(job.size, job.size))


def train(place: Place, cohort: Cohort, job: Job) -> list[float]:
    """Seconds of each epoch but the first."""
    fabric = place.fabric
    torch.manual_seed(0)
    network = create(job.model, channels=1, classes=3, image_size=job.size)
    batches = Batches(
        cohort, np.arange(job.samples), channels=("grey",), batch_size=job.batch, device=fabric.device, augmentation=PRESETS["default"],
        share=(fabric.global_rank, fabric.world_size),
    )  # fmt: skip
    place.tell("ready")
    fitted = fit(
        network, Supervised(make_loss("cross_entropy", counts=torch.ones(3, device=fabric.device))), batches, None,
        settings=Settings(epochs=EPOCHS, batch_size=job.batch), channels=("grey",), classes=CLASSES, fabric=fabric,
    )  # fmt: skip
    return [record["seconds"] for record in fitted.epochs[1:]]


def compare(root: Path, job: Job, sides: list[int]) -> None:
    """Print epoch times of each number of devices, and the median ratio to one device, start by start."""
    cohort = make_cohort(root, job)
    epochs: dict[int, list[float]] = {side: [] for side in sides}
    starts: dict[int, list[float]] = {side: [] for side in sides}
    for _ in range(ROUNDS):
        for side in sides:
            begin = time.perf_counter()
            ready: list[float] = []
            seconds = launch(
                train, (cohort, job), devices=side, accelerator=job.accelerator, precision=job.precision,
                hear=lambda event, ready=ready: ready.append(time.perf_counter()),
            )  # fmt: skip
            epochs[side].append(statistics.median(seconds))
            starts[side].append(ready[0] - begin)
    print(f"\n{job.model}, {job.size} x {job.size}, {job.samples} images, batch {job.batch}, {job.precision}, {job.accelerator}, ", end="")
    print(f"{torch.get_num_threads()} threads in all, medians of {ROUNDS} interleaved starts\n")
    print("| devices | s an epoch | against one | s to start |\n|---|---|---|---|")
    for side in sides:
        ratio = statistics.median(ours / alone for ours, alone in zip(epochs[side], epochs[1], strict=True))
        print(f"| {side} | {statistics.median(epochs[side]):.3f} | {ratio:.3f} | {statistics.median(starts[side]):.1f} |")


def main() -> None:
    """Print a table for the CPU, and one for GPUs where there are two or more."""
    torch.set_num_threads(max(2, torch.get_num_threads()))
    gpus = torch.cuda.device_count()
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), CPU, [1, 2])
        if gpus >= 2:
            compare(Path(folder), GPU, [2**power for power in range(gpus.bit_length()) if 2**power <= gpus])


if __name__ == "__main__":
    main()
