"""What the machinery costs: steps of training, distillation (live and cached teacher) and evaluation, against the bare ones.

resnet18, 128 x 128, one channel, batch 32, augmentation included. Interleaved medians. Command: ``python benchmarks/bench_step.py``
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from torch.nn import functional as F

from machine import described
from raredistill.augment import PRESETS
from raredistill.batches import Batch, Batches
from raredistill.checkpoint import Promise
from raredistill.cohort.store import Cohort, save
from raredistill.distill.contract import Facts
from raredistill.distill.registry import make_method
from raredistill.losses import make_loss
from raredistill.models import create
from raredistill.training.cache import Kept, look
from raredistill.training.devices import make_fabric
from raredistill.training.loop import Tally, Trainer, predict_logits
from raredistill.training.objectives import Distilled, Supervised
from raredistill.training.optimizers import make_optimizer
from raredistill.training.settings import Settings
from raredistill.training.teacher import Teacher

CLASSES, SIZE, BATCH, ROUNDS, VIEWS = ("a", "b", "c"), 128, 32, 15, 2
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


def whole(cohort: Cohort, taught: str) -> Callable[[], None]:
    """What a study does in a step: gather, augment, forward, terms, backward, optimiser, tally; ``live``, ``cached`` or ``no`` teacher."""
    fabric = make_fabric("cpu", "32-true")
    loss = make_loss("cross_entropy", counts=torch.ones(3))
    objective: Any = Supervised(loss)
    if taught != "no":
        teaches = teacher(fabric) if taught == "live" else cached(cohort, fabric)
        objective = Distilled(loss, make_method("kd", Facts(torch.ones(3))), teaches, ce_weight=1, kd_weight=1)
    trainer = Trainer(create("resnet18", channels=1, classes=3, image_size=SIZE), objective, SETTINGS, ("grey",), CLASSES, fabric)
    trainer.model.train()
    rows = np.arange(len(cohort.samples))
    views = VIEWS if taught == "cached" else None
    stream = endless(
        Batches(cohort, rows, channels=("grey",), batch_size=BATCH, device=fabric.device, augmentation=PRESETS["default"], views=views)
    )
    tally = Tally(CLASSES, fabric.device)

    def step() -> None:
        batch = next(stream)
        terms, logits = trainer.step(batch)
        tally.add(logits, batch.labels, terms)

    return step


def teacher(fabric: Fabric) -> Teacher:
    network = create("resnet18", channels=1, classes=3, image_size=SIZE)
    promise = Promise(model="resnet18", head="linear", dropout=0.0, classes=CLASSES, channels=("grey",), image_size=SIZE,
                      mean=(0.5,), std=(0.25,), prior=None, training_patients=None, external=True, split_hash="")  # fmt: skip
    return Teacher(network, promise, fabric)


def cached(cohort: Cohort, fabric: Fabric) -> Kept:
    """What a live teacher says of all views, and what it took to ask."""
    rows = np.arange(len(cohort.samples))
    plain = Batches(
        cohort, rows, channels=("grey",), batch_size=BATCH, device=fabric.device, augmentation=PRESETS["default"], shuffle=False
    )
    start, live = time.perf_counter(), teacher(fabric)
    tables = [look(live, plain, view, features=False) for view in range(VIEWS)]
    seconds = time.perf_counter() - start
    print(f"filling the cache: {1000 * seconds / VIEWS / len(plain):.0f} ms a batch and view, once for all students of a fold")
    return Kept(tables, rows, fabric.device)


def evaluation(cohort: Cohort, *, bare: bool) -> Callable[[], None]:
    """Logits of a batch of pixels as a study predicts them, and the forward pass alone."""
    fabric, network = make_fabric("cpu", "32-true"), create("resnet18", channels=1, classes=3, image_size=SIZE).eval()
    plain = Batches(cohort, np.arange(BATCH), channels=("grey",), batch_size=BATCH, device=fabric.device, shuffle=False)
    images = torch.rand(BATCH, 1, SIZE, SIZE)

    @torch.no_grad()
    def step() -> None:
        if bare:
            network(images)
        else:
            predict_logits(network, plain, channels=("grey",), fabric=fabric)

    return step


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
    print(described())
    with tempfile.TemporaryDirectory() as folder:
        cohort = make_cohort(Path(folder))
        steps = {
            "bare step": bare(),
            "training step": whole(cohort, "no"),
            "teacher forward": teacher_forward(),
            "distillation step": whole(cohort, "live"),
            "distillation step, cached teacher": whole(cohort, "cached"),
            "bare forward": evaluation(cohort, bare=True),
            "evaluation": evaluation(cohort, bare=False),
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        for round_ in range(ROUNDS + 2):
            for name, step in steps.items():
                elapsed = seconds(step)
                if round_ >= 2:
                    times[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    floors = {
        "training step": ["bare step"], "distillation step": ["bare step", "teacher forward"],
        "distillation step, cached teacher": ["training step"], "evaluation": ["bare forward"],
    }  # fmt: skip
    print(f"resnet18, {SIZE} x {SIZE}, batch {BATCH}, {torch.get_num_threads()} threads, medians of {ROUNDS} interleaved steps\n")
    print("| step | ms | against its floor (median of rounds) | floor |\n|---|---|---|---|")
    for name, value in medians.items():
        parts = floors.get(name, [])
        under = [sum(times[part][round_] for part in parts) for round_ in range(ROUNDS)]
        ratio = f"{statistics.median(own / floor for own, floor in zip(times[name], under, strict=True)):.3f}" if parts else ""
        print(f"| {name} | {1000 * value:.0f} | {ratio} | {' + '.join(parts)} |")


if __name__ == "__main__":
    main()
