"""Augmented 224 x 224 batches of 64: ours against a per-sample loader as the thesis had it, interleaved medians.

The thesis' way: one ``.npy`` a sample, np.load, PIL rotation and scale, flips and colour jitter, a DataLoader: in the process, as is its
default, and with a worker a core. Both make views of the same kind, in float32. Then epochs of training the thesis' small network, from
memory and from the cohort's files.
Command: ``python benchmarks/bench_loader.py``
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from raredistill.augment import PRESETS
from raredistill.batches import Batches
from raredistill.cohort.store import Cohort, save
from raredistill.losses import make_loss
from raredistill.models import create
from raredistill.training.devices import make_fabric
from raredistill.training.loop import Trainer
from raredistill.training.objectives import Supervised
from raredistill.training.settings import Settings

SIZE, NUMBER, BATCH, ROUNDS, WORKERS, TRAININGS = 224, 1024, 64, 9, 2, 5


class PerSample(Dataset[tuple[torch.Tensor, int]]):
    """One file, one image, one transform at a time."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.npy"))
        self.transform = transforms.Compose(
            [
                transforms.RandomAffine(30, scale=(0.9, 1.1), interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.RandomHorizontalFlip(),
                transforms.RandomVerticalFlip(),
                transforms.ColorJitter(brightness=0.2, contrast=0.2),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(np.load(self.files[index]))), index % 3


def make_data(root: Path) -> Cohort:
    pixels = np.random.default_rng(0).integers(0, 255, (NUMBER, SIZE, SIZE), dtype=np.uint8)
    (root / "files").mkdir()
    for number, image in enumerate(pixels):
        np.save(root / "files" / f"{number:05d}.npy", image)
    return make_cohort(root / "cohort", pixels)


def make_cohort(root: Path, pixels: np.ndarray) -> Cohort:
    names = [str(number) for number in range(len(pixels))]
    labels = [f"class{number % 3}" for number in range(len(pixels))]
    rows = pd.DataFrame(
        {"sample": names, "patient": names, "patient_label": labels, "label": labels, "slice": -1, "source": "", "split": ""}
    )
    return save(root, rows, {"grey": [pixels]}, classes=("class0", "class1", "class2"), size=pixels.shape[1:])


def serve(cohort: Cohort) -> dict[str, Batches]:
    """The cohort's batches from memory and from its files."""
    rows, fixed = np.arange(len(cohort.samples)), {"channels": ("grey",), "batch_size": BATCH, "device": torch.device("cpu")}
    return {
        residence: Batches(cohort, rows, augmentation=PRESETS["thesis"], residence=residence, **fixed)
        for residence in ("resident", "streamed")
    }


def rate(batches: Iterable[object]) -> float:
    """Images per second of one epoch."""
    start = time.perf_counter()
    for _ in batches:
        pass
    return NUMBER / (time.perf_counter() - start)


def compare_training(cohort: Cohort) -> None:
    """Print seconds of whole epochs of training from memory and from files, interleaved."""
    fabric, settings = make_fabric("cpu", "32-true"), Settings(batch_size=BATCH)
    network = create("small_cnn", channels=1, classes=3, image_size=cohort.size[0])
    loss = Supervised(make_loss("cross_entropy", counts=torch.ones(3)))
    trainer = Trainer(network, loss, settings, ("grey",), cohort.classes, fabric)
    seconds: dict[str, list[float]] = {}
    for turn in range(TRAININGS + 1):
        for residence, batches in serve(cohort).items():
            start = time.perf_counter()
            trainer.epoch(batches, None)
            if turn:
                seconds.setdefault(residence, []).append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(seconds["resident"], seconds["streamed"], strict=True))
    number, (height, width) = len(cohort.samples), cohort.size
    print(f"An epoch of training small_cnn on {number} images of {height} x {width}, medians of {TRAININGS} interleaved epochs\n")
    print("| pixels | s |\n|---|---|")
    for residence, values in seconds.items():
        print(f"| {residence} | {statistics.median(values):.3f} |")
    print(f"| speed from files / speed from memory (median of pairs) | {ratio:.3f} |\n", flush=True)


def main() -> None:
    """Print a table of medians and ratios."""
    in_process, with_workers = "per sample, in the process", f"per sample, {WORKERS} workers"
    with tempfile.TemporaryDirectory() as folder:
        cohort = make_data(Path(folder))
        data = PerSample(Path(folder) / "files")
        plain = DataLoader(data, batch_size=BATCH, shuffle=True)
        pooled = DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)
        ours = serve(cohort)
        rate(pooled)
        rates: dict[str, list[float]] = {name: [] for name in (in_process, with_workers, *ours)}
        for epoch in range(ROUNDS):
            rates[in_process].append(rate(plain))
            rates[with_workers].append(rate(pooled))
            for residence, batches in ours.items():
                rates[residence].append(rate(batches.epoch(epoch)))
        compare_training(make_cohort(Path(folder) / "small", np.array(cohort.pixels("grey")[:512, :64, :64])))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{NUMBER} images of {SIZE} x {SIZE}, batch {BATCH}, {os.cpu_count()} cores, medians of {ROUNDS} interleaved epochs\n")
    print(f"| loader | images / s | times {in_process} | times {with_workers} |\n|---|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.0f} | {value / medians[in_process]:.2f} | {value / medians[with_workers]:.2f} |")


if __name__ == "__main__":
    main()
