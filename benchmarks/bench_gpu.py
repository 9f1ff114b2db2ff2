"""What a GPU does with it: images a second, share of the device's peak, and what of a step is not the network.

- ``networks``: five networks at 224 x 224 in bf16, trained plainly and distilled from a resnet50, against the bare step in memory.
- ``cifar``: the CIFAR ResNet-32 run of 200 epochs on 10,847 images, extrapolated from five epochs; one process, and several at once.
- ``grid``: one epoch of each network of the thesis' grid on pixels of BraTS2020's size (57,195 slices), extrapolated to its 30 runs of 50.

The peak is what a large product of matrices reaches on the same device in bf16. Command: ``python benchmarks/bench_gpu.py [part ...]``;
on a machine without a GPU it says so and ends, unless ``--device cpu --small`` asks for a rehearsal of the script itself.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
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

from raredistill.augment import PRESETS
from raredistill.batches import Batch, Batches
from raredistill.checkpoint import Promise
from raredistill.cohort.store import Cohort, save
from raredistill.distill.contract import Facts
from raredistill.distill.registry import make_method
from raredistill.losses import make_loss
from raredistill.models import create, facts
from raredistill.training.devices import make_fabric
from raredistill.training.loop import Trainer
from raredistill.training.objectives import Distilled, Supervised
from raredistill.training.optimizers import make_optimizer
from raredistill.training.settings import Settings
from raredistill.training.teacher import Teacher

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_v2_s", "densenet121")
TEACHER, ROUNDS = "resnet50", 5
CIFAR_SAMPLES, CIFAR_EPOCHS = 10_847, 200
BRATS_SLICES, GRID_RUNS, GRID_EPOCHS, TRAINED = 57_195, 30, 50, 0.64


def make_cohort(root: Path, *, samples: int, size: int, classes: int, channels: tuple[str, ...]) -> Cohort:
    """Noise of a cohort's size: what is measured does not depend on what is seen."""
    names = [str(n) for n in range(samples)]
    labels = [f"c{n % classes}" for n in range(samples)]
    rows = pd.DataFrame(
        {"sample": names, "patient": names, "patient_label": labels, "label": labels, "slice": -1, "source": "", "split": ""}
    )
    noise = np.random.default_rng(0).integers(0, 255, (min(samples, 512), size, size), dtype=np.uint8)
    blocks = [noise[: min(512, samples - start)] for start in range(0, samples, 512)]
    known = tuple(f"c{n}" for n in range(classes))
    return save(root / "cohort", rows, {channel: blocks for channel in channels}, classes=known, size=(size, size))


def endless(batches: Batches) -> Iterator[Batch]:
    for epoch in itertools.count():
        yield from batches.epoch(epoch)


def make_trainer(name: str, cohort: Cohort, fabric: Fabric, settings: Settings, *, taught: bool = False) -> Trainer:
    shared = {"channels": len(cohort.channels), "classes": len(cohort.classes), "image_size": cohort.size[0]}
    loss = make_loss("cross_entropy", counts=torch.ones(len(cohort.classes), device=fabric.device))
    objective: Any = Supervised(loss)
    if taught:
        promise = Promise(
            model=TEACHER, head="linear", dropout=0.0, classes=cohort.classes, channels=cohort.channels, image_size=cohort.size[0],
            mean=(0.5,) * len(cohort.channels), std=(0.25,) * len(cohort.channels), prior=None, training_patients=None, external=True,
            split_hash="",
        )  # fmt: skip
        method = make_method("kd", Facts(torch.ones(len(cohort.classes), device=fabric.device)))
        objective = Distilled(loss, method, Teacher(create(TEACHER, **shared), promise, fabric), ce_weight=1, kd_weight=1)
    trainer = Trainer(create(name, **shared), objective, settings, cohort.channels, cohort.classes, fabric)
    trainer.model.train()
    return trainer


def make_batches(cohort: Cohort, fabric: Fabric, batch: int, preset: str) -> Batches:
    rows = np.arange(len(cohort.samples))
    return Batches(
        cohort, rows, channels=cohort.channels, batch_size=batch, device=fabric.device, augmentation=PRESETS[preset],
        residence="resident", drop_last=True,
    )  # fmt: skip


def bare(name: str, cohort: Cohort, fabric: Fabric, settings: Settings) -> Callable[[], None]:
    """Forward, backward and optimiser step on one batch in memory."""
    shape = (settings.batch_size, len(cohort.channels), *cohort.size)
    images, labels = torch.rand(shape, device=fabric.device), torch.zeros(settings.batch_size, dtype=torch.int64, device=fabric.device)
    network = create(name, channels=len(cohort.channels), classes=len(cohort.classes), image_size=cohort.size[0])
    model, optimizer = fabric.setup(network.train(), make_optimizer(network, settings))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(F.cross_entropy(model(images), labels))
        optimizer.step()

    return step


def whole(name: str, cohort: Cohort, fabric: Fabric, settings: Settings, *, taught: bool) -> Callable[[], None]:
    trainer = make_trainer(name, cohort, fabric, settings, taught=taught)
    stream = endless(make_batches(cohort, fabric, settings.batch_size, "default"))

    def step() -> None:
        batch = next(stream)
        terms, logits = trainer.step(batch)
        trainer.tally.add(logits, batch.labels, terms)

    return step


def seconds(step: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Of one step, the device's work included."""
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    wait(device)
    return (time.perf_counter() - start) / repeats


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device: torch.device, size: int) -> float:
    """Operations a second of a product of square matrices in bf16."""
    factors = [torch.rand(size, size, device=device, dtype=torch.bfloat16) for _ in range(2)]
    times = [seconds(lambda: torch.mm(*factors), device, 10) for _ in range(ROUNDS)]
    return float(2 * size**3 / statistics.median(times))


def networks(fabric: Fabric, folder: Path, given: argparse.Namespace) -> None:
    """Training and distilling steps against the bare step."""
    size, batch, repeats = (32, 4, 1) if given.small else (224, given.batch, 20)
    cohort = make_cohort(folder, samples=8 * batch, size=size, classes=3, channels=("flair", "t1ce", "t2"))
    settings = Settings(batch_size=batch, precision=given.precision)
    best = peak(fabric.device, 256 if given.small else 8192)
    print(f"\nThe device's peak in bf16: {best / 1e12:.0f} TFLOP/s (measured). {size} x {size}, batch {batch}, {given.precision}\n")
    print("| network | images / s | share of the peak | not the network | distilled, images / s | against its floor |\n" + "|---" * 6 + "|")
    for name in NETWORKS:
        steps = {
            "bare": bare(name, cohort, fabric, settings), "plain": whole(name, cohort, fabric, settings, taught=False),
            "taught": whole(name, cohort, fabric, settings, taught=True), "teacher": forward(cohort, fabric, settings),
        }  # fmt: skip
        times: dict[str, list[float]] = {key: [] for key in steps}
        for _ in range(ROUNDS + 1):
            for key, step in steps.items():
                times[key].append(seconds(step, fabric.device, repeats))
        found = {key: statistics.median(values[1:]) for key, values in times.items()}
        work = 3 * facts(name, channels=3, classes=3, image_size=size).flops * batch
        print(
            f"| {name} | {batch / found['plain']:.0f} | {work / found['plain'] / best:.1%} | {1 - found['bare'] / found['plain']:.1%} "
            f"| {batch / found['taught']:.0f} | {found['taught'] / (found['bare'] + found['teacher']):.3f} |",
            flush=True,
        )


def forward(cohort: Cohort, fabric: Fabric, settings: Settings) -> Callable[[], None]:
    images = torch.rand((settings.batch_size, len(cohort.channels), *cohort.size), device=fabric.device)
    network = create(TEACHER, channels=len(cohort.channels), classes=len(cohort.classes), image_size=cohort.size[0])
    fabric.to_device(network.eval())

    @torch.no_grad()
    def step() -> None:
        with fabric.autocast():
            network(images)

    return step


def cifar(fabric: Fabric, folder: Path, given: argparse.Namespace) -> None:
    """ResNet-32 on CIFAR's sizes, alone and several at once; a child runs this part with ``--epochs`` and prints its seconds."""
    samples, epochs = (256, 1) if given.small else (CIFAR_SAMPLES, 5)
    cohort = make_cohort(folder, samples=samples, size=32, classes=100, channels=("r", "g", "b"))
    if given.child:
        settings = Settings(
            batch_size=128, optimizer="sgd", learning_rate=0.1, weight_decay=2e-4, schedule="constant", epochs=epochs + 1,
            precision=given.precision, compile=given.compile,
        )  # fmt: skip
        trainer, batches = make_trainer("cifar_resnet32", cohort, fabric, settings), make_batches(cohort, fabric, 128, "cifar")
        trainer.epoch(batches, None)
        wait(fabric.device)
        print("ready", flush=True)
        sys.stdin.readline()  # all begin together
        start = time.perf_counter()
        for _ in range(epochs):
            trainer.epoch(batches, None)
        wait(fabric.device)
        print((time.perf_counter() - start) / epochs)
        return
    print("\n| compiled | runs at once | s an epoch of each | min for 200 epochs of each | runs an hour |\n|---|---|---|---|---|")
    for mode, together in itertools.product(
        ("none",) if given.small else ("none", "reduce-overhead"), (1, 2) if given.small else (1, 2, 4, 8)
    ):
        each = at_once(together, mode, given)
        print(
            f"| {mode} | {together} | {each:.2f} | {each * CIFAR_EPOCHS / 60:.1f} | {together * 3600 / (each * CIFAR_EPOCHS):.0f} |",
            flush=True,
        )


def at_once(number: int, mode: str, given: argparse.Namespace) -> float:
    options = ["--compile", mode, "--device", given.device, "--precision", given.precision, *(["--small"] if given.small else [])]
    command = [sys.executable, __file__, "cifar", "--child", *options]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(number)]
    outputs = [child.stdout for child in children]
    for output in outputs:
        while output is not None and "ready" not in output.readline():
            pass  # imports, and the first epoch with its compilation
    for child in children:
        if child.stdin is not None:
            child.stdin.write("go\n")
            child.stdin.flush()
    return statistics.mean(float(child.communicate()[0].split()[-1]) for child in children)


def grid(fabric: Fabric, folder: Path, given: argparse.Namespace) -> None:
    """An epoch of every network of the thesis, with and without a teacher, on a cohort as large as BraTS2020."""
    slices, size = (64, 32) if given.small else (round(TRAINED * BRATS_SLICES), 224)
    cohort = make_cohort(folder, samples=slices, size=size, classes=3, channels=("flair",))
    settings = Settings(batch_size=4 if given.small else given.batch, precision=given.precision)
    batches = make_batches(cohort, fabric, settings.batch_size, "default")
    print(f"\n{slices} training slices of {size} x {size}, one channel, batch {settings.batch_size}, {given.precision}\n")
    print("| network | s an epoch | s an epoch, distilled from a live resnet50 |\n|---|---|---|")
    total = 0.0
    for name in NETWORKS:
        found = []
        for taught in (False, True):
            trainer = make_trainer(name, cohort, fabric, settings, taught=taught)
            wait(fabric.device)
            start = time.perf_counter()
            trainer.epoch(batches, None)
            wait(fabric.device)
            found.append(time.perf_counter() - start)
        total += sum(found)
        print(f"| {name} | {found[0]:.1f} | {found[1]:.1f} |", flush=True)
    hours = total / (2 * len(NETWORKS)) * GRID_RUNS * GRID_EPOCHS / 3600
    print(f"\nMean epoch x {GRID_RUNS} runs x {GRID_EPOCHS} epochs: {hours:.1f} h on one device, validation and report apart")


PARTS = {"networks": networks, "cifar": cifar, "grid": grid}


def main() -> None:
    """Run the named parts, all of them by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="bf16-mixed")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--small", action="store_true", help="a rehearsal: tiny images, no numbers worth keeping")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compile", choices=["none", "default", "reduce-overhead"], default="none", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing to measure")
        return
    fabric = make_fabric(given.device, given.precision)
    if not given.child:
        print(torch.cuda.get_device_name() if given.device == "cuda" else "cpu", f"torch {torch.__version__}")
    for name in given.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](fabric, Path(folder), given)


if __name__ == "__main__":
    main()
