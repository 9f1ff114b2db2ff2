"""What the machinery costs: a training step and a distillation step against the bare step on data already in memory.

resnet18, 128 x 128, one channel, batch 32, augmentation included. Interleaved medians. Command: ``python benchmarks/bench_step.py``
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from raredistill.augment import PRESETS
from raredistill.batches import Batch, Batches
from raredistill.checkpoint import Promise
from raredistill.cohort.store import Cohort, save
from raredistill.distill.contract import Facts
from raredistill.distill.registry import make_method
from raredistill.losses import make_loss
from raredistill.models import create
from raredistill.training.devices import make_fabric
from raredistill.training.loop import Tally, Trainer
from raredistill.training.objectives import Distilled, Supervised
from raredistill.training.optimizers import make_optimizer
from raredistill.training.settings import Settings
from raredistill.training.teacher import Teacher

CLASSES, SIZE, BATCH, ROUNDS = ("a", "b", "c"), 128, 32, 15
SETTINGS = Settings(batch_size=BATCH)


def make_cohort(root: Path) -> Cohort:
    number = 512
    labels = [CLASSES[n % 3] for n in range(number)]
    names = [str(n) for n in range(number)]
    rows = pd.DataFrame(
        {"sample": names, "patient": names, "patient_label": labels, "label": labels, "slice": -1, "source": "", "split": ""}
    )
    pixels = np.random.default_rng(0).integers(0, 255, (number, SIZE, SIZE), dtype=np.uint8)
    return save(root / "cohort", rows, {"grey": [pixels]}, classes=CLASSES, size=(SIZE, SIZE))


def endless(batches: Batches) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from batches.epoch(epoch)
        epoch += 1


def bare() -> Callable[[], None]:
    """The floor: forward, backward and optimiser step, data in memory."""
    network = create("resnet18", channels=1, classes=3, image_size=SIZE).train()
    optimizer = make_optimizer(network, SETTINGS)
    images, labels = torch.rand(BATCH, 1, SIZE, SIZE), torch.randint(3, (BATCH,))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def whole(cohort: Cohort, *, taught: bool) -> Callable[[], None]:
    """What a study does in a step: gather, augment, forward, terms, backward, optimiser, tally."""
    fabric = make_fabric("cpu", "32-true")
    loss = make_loss("cross_entropy", counts=torch.ones(3))
    objective = (
        Distilled(loss, make_method("kd", Facts(torch.ones(3))), teacher(fabric), ce_weight=1, kd_weight=1) if taught else Supervised(loss)
    )
    trainer = Trainer(create("resnet18", channels=1, classes=3, image_size=SIZE), objective, SETTINGS, ("grey",), CLASSES, fabric)
    trainer.model.train()
    rows = np.arange(len(cohort.samples))
    stream = endless(Batches(cohort, rows, channels=("grey",), batch_size=BATCH, device=fabric.device, augmentation=PRESETS["default"]))
    tally = Tally(CLASSES, fabric.device)

    def step() -> None:
        batch = next(stream)
        terms, logits = trainer.step(batch)
        tally.add(logits, batch.labels, terms)

    return step


def teacher(fabric: object) -> Teacher:
    network = create("resnet18", channels=1, classes=3, image_size=SIZE)
    promise = Promise(model="resnet18", head="linear", dropout=0.0, classes=CLASSES, channels=("grey",), image_size=SIZE,
                      mean=(0.5,), std=(0.25,), prior=None, training_patients=None, external=True, split_hash="")  # fmt: skip
    return Teacher(network, promise, fabric)  # type: ignore[arg-type]


def teacher_forward() -> Callable[[], None]:
    network = create("resnet18", channels=1, classes=3, image_size=SIZE).eval()
    images = torch.rand(BATCH, 1, SIZE, SIZE)

    @torch.no_grad()
    def step() -> None:
        network(images)

    return step


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    """Print a table of medians and ratios."""
    with tempfile.TemporaryDirectory() as folder:
        cohort = make_cohort(Path(folder))
        steps = {
            "bare step": bare(),
            "training step": whole(cohort, taught=False),
            "teacher forward": teacher_forward(),
            "distillation step": whole(cohort, taught=True),
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for round_ in range(ROUNDS + 2):
            for name, step in steps.items():
                elapsed = seconds(step)
                if round_ >= 2:
                    times[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    floors = {"training step": medians["bare step"], "distillation step": medians["bare step"] + medians["teacher forward"]}
    print(f"resnet18, {SIZE} x {SIZE}, batch {BATCH}, {torch.get_num_threads()} threads, medians of {ROUNDS} interleaved steps\n")
    print("| step | ms | against its floor |\n|---|---|---|")
    for name, value in medians.items():
        ratio = f"{value / floors[name]:.3f}" if name in floors else "-"
        print(f"| {name} | {1000 * value:.0f} | {ratio} |")


if __name__ == "__main__":
    main()
