"""One distillation job through the loops of other toolkits and through ours: same networks, images, batch, optimiser and temperature.

Each toolkit runs as its own documentation uses it: its loop, its loss, a DataLoader with a worker a core over PIL images and torchvision's
transforms. Ours runs as a study does, with a live teacher, and from the teacher cache once that is filled. The floor is the bare student
step and teacher's forward pass on one batch in memory. An epoch of training is timed, without validation and checkpoints; the rounds are
interleaved, medians are shown. What is not installed is left out, and said.

Command: ``python benchmarks/bench_toolkits.py [--size 32] [--images 2048] [--mdistiller PATH] [--repdistiller PATH]``, where the paths are
checkouts; torchdistill and timm (with ``timm.task``) are taken as installed packages.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from machine import described
from raredistill.augment import PRESETS
from raredistill.batches import Batches
from raredistill.checkpoint import Promise
from raredistill.cohort.store import Cohort, save
from raredistill.distill.contract import Facts
from raredistill.distill.registry import make_method
from raredistill.losses import make_loss
from raredistill.models import create
from raredistill.training.cache import Kept, look
from raredistill.training.devices import make_fabric
from raredistill.training.loop import Trainer
from raredistill.training.objectives import Distilled, Supervised
from raredistill.training.settings import Settings
from raredistill.training.teacher import Teacher

TEACHER, STUDENT = "resnet18", "mobilenetv3_small_100"
CHANNELS, CLASSES, BATCH, TEMPERATURE = ("r", "g", "b"), tuple("abcdefghij"), 64, 4.0
RATE, MOMENTUM, DECAY = 0.05, 0.9, 1e-4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WORKERS = torch.get_num_threads()
Epoch = Callable[[], None]


class Images(Dataset[Any]):
    """As torchvision's CIFAR: an array in memory, a PIL image a sample, transforms a sample; with its index where a toolkit wants that."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, *, index: bool = False) -> None:
        self.pixels, self.labels, self.index = pixels, labels, index
        self.transform: Any = transforms.Compose(
            [
                transforms.RandomCrop(pixels.shape[1], padding=4), transforms.RandomHorizontalFlip(),
                transforms.ToTensor(), transforms.Normalize(MEAN, STD),
            ]
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> tuple[Any, ...]:
        image, label = self.transform(Image.fromarray(self.pixels[place])), int(self.labels[place])
        return (image, label, place) if self.index else (image, label)


def loader(images: Images) -> DataLoader[Any]:
    """As the toolkits' own scripts build theirs."""
    return DataLoader(images, batch_size=BATCH, shuffle=True, num_workers=WORKERS, drop_last=True)


def network(name: str) -> nn.Module:
    return timm.create_model(name, num_classes=len(CLASSES), in_chans=3)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)


class WithFeatures(nn.Module):
    """The network in the form that mdistiller and RepDistiller ask for: logits together with features."""

    def __init__(self, model: nn.Module, *, logits_first: bool) -> None:
        super().__init__()
        self.model, self.logits_first = model, logits_first

    def forward(self, images: Tensor, is_feat: bool = True, preact: bool = False) -> Any:
        """Logits ``(N, K)`` with an empty place for the features, which this job does not use."""
        logits = self.model(images)
        return (logits, {}) if self.logits_first else ([], logits)


def floor(pixels: np.ndarray, labels: np.ndarray) -> Epoch:
    """Student step and teacher forward, one batch in memory again and again."""
    student, teacher = network(STUDENT).train(), network(TEACHER).eval()
    optimizer = sgd(student)
    images = torch.from_numpy(pixels[:BATCH]).permute(0, 3, 1, 2).float() / 255
    target = torch.from_numpy(labels[:BATCH])

    def epoch() -> None:
        for _ in range(len(labels) // BATCH):
            with torch.no_grad():
                said = teacher(images)
            logits = student(images)
            loss = F.cross_entropy(logits, target) + kl(logits, said)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def kl(logits: Tensor, said: Tensor) -> Tensor:
    soft = [F.log_softmax(each / TEMPERATURE, dim=1) for each in (logits, said)]
    return TEMPERATURE**2 * F.kl_div(*soft, log_target=True, reduction="batchmean")


def with_timm(pixels: np.ndarray, labels: np.ndarray) -> Epoch:
    """The loop of timm's train.py around its logit distillation task."""
    from timm.data import create_loader
    from timm.task import LogitDistillationTask

    images = Images(pixels, labels)
    own = images.transform
    batches = create_loader(
        images, input_size=(3, *pixels.shape[1:3]), batch_size=BATCH, is_training=True, num_workers=WORKERS, use_prefetcher=False,
        persistent_workers=False,
    )  # fmt: skip
    images.transform = own  # the job's, not timm's default crops
    task = LogitDistillationTask(
        network(STUDENT), network(TEACHER), nn.CrossEntropyLoss(), distill_loss_weight=1.0, temperature=TEMPERATURE, verbose=False
    )
    optimizer = sgd(task.trainable_module)

    def epoch() -> None:
        task.train()
        task.teacher.eval()
        for sample, target in batches:
            loss = task(sample, target)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def with_torchdistill(pixels: np.ndarray, labels: np.ndarray) -> Epoch:
    """The loop of torchdistill's image classification example."""
    from torch.utils.data import RandomSampler
    from torchdistill.core.distillation import get_distillation_box

    logging.disable(logging.WARNING)
    term = {
        "key": "KDLoss",
        "kwargs": {
            "student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".", "teacher_module_io": "output",
            "temperature": TEMPERATURE, "alpha": 1.0, "beta": 1.0, "reduction": "batchmean",
        },
    }  # fmt: skip
    config = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train", "sampler": {"class_or_func": RandomSampler},
            "kwargs": {"batch_size": BATCH, "num_workers": WORKERS, "drop_last": True},
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": RATE, "momentum": MOMENTUM, "weight_decay": DECAY}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": term, "weight": 1.0}}}},
    }  # fmt: skip
    box = get_distillation_box(
        network(TEACHER), network(STUDENT), {"train": Images(pixels, labels)}, config, torch.device("cpu"), None, False, 1.0
    )

    def epoch() -> None:
        box.pre_epoch_process(epoch=0)
        for sample, targets, supplement in box.train_data_loader:
            loss = box.forward_process(sample, targets, supplement)
            box.post_forward_process(loss=loss)
            loss.item()  # its example logs every step's

    return epoch


def with_mdistiller(pixels: np.ndarray, labels: np.ndarray) -> Epoch:
    """The steps of mdistiller's trainer over its loader."""
    from mdistiller.distillers import KD
    from mdistiller.engine import BaseTrainer
    from mdistiller.engine.cfg import CFG
    from mdistiller.engine.utils import AverageMeter

    CFG.SOLVER.LR, CFG.SOLVER.WEIGHT_DECAY, CFG.KD.TEMPERATURE = RATE, DECAY, TEMPERATURE
    CFG.KD.LOSS.CE_WEIGHT, CFG.KD.LOSS.KD_WEIGHT, CFG.LOG.WANDB = 1.0, 1.0, False
    CFG.LOG.PREFIX = tempfile.mkdtemp()
    student, teacher = (WithFeatures(network(name), logits_first=True) for name in (STUDENT, TEACHER))
    distiller = nn.DataParallel(KD(student, teacher, CFG))
    if not torch.cuda.is_available():
        # It moves everything to a GPU, which this machine has not: everything is where it is to be.
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    trainer = BaseTrainer("bench", distiller, loader(Images(pixels, labels, index=True)), None, CFG)

    def epoch() -> None:
        meters = {name: AverageMeter() for name in ("training_time", "data_time", "losses", "top1", "top5")}
        trainer.distiller.train()
        for data in trainer.train_loader:
            trainer.train_iter(data, 1, meters)

    return epoch


def with_repdistiller(pixels: np.ndarray, labels: np.ndarray) -> Epoch:
    """RepDistiller's own loop of an epoch."""
    from distiller_zoo import DistillKL
    from helper.loops import train_distill

    student, teacher = (WithFeatures(network(name), logits_first=False) for name in (STUDENT, TEACHER))
    options = SimpleNamespace(distill="kd", gamma=1.0, alpha=1.0, beta=0.0, print_freq=100)
    batches, optimizer = loader(Images(pixels, labels, index=True)), sgd(student)
    criteria = [nn.CrossEntropyLoss(), DistillKL(TEMPERATURE), DistillKL(TEMPERATURE)]

    def epoch() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            train_distill(1, batches, nn.ModuleList([student, teacher]), criteria, optimizer, options)

    return epoch


def make_cohort(root: Path, pixels: np.ndarray, labels: np.ndarray) -> Cohort:
    names, words = [str(n) for n in range(len(labels))], [CLASSES[label] for label in labels]
    rows = pd.DataFrame({"sample": names, "patient": names, "patient_label": words, "label": words, "slice": -1, "source": "", "split": ""})
    planes = {name: [np.ascontiguousarray(pixels[..., n])] for n, name in enumerate(CHANNELS)}
    return save(root / "cohort", rows, planes, classes=CLASSES, size=pixels.shape[1:3])


def ours(cohort: Cohort, *, kind: str) -> Epoch:
    """An epoch as a study trains it: ``baseline`` without a teacher, with a ``live`` one, or from its ``cached`` outputs."""
    fabric, size = make_fabric("cpu" if not torch.cuda.is_available() else "cuda", "32-true"), cohort.size[0]
    settings = Settings(
        batch_size=BATCH, optimizer="sgd", learning_rate=RATE, weight_decay=DECAY, schedule="constant", augmentation="cifar"
    )
    batches = Batches(
        cohort, np.arange(len(cohort.samples)), channels=CHANNELS, batch_size=BATCH, device=fabric.device, drop_last=True,
        augmentation=PRESETS["cifar"], views=1 if kind == "cached" else None,
    )  # fmt: skip
    loss = make_loss("cross_entropy", counts=torch.ones(len(CLASSES)))
    objective: Any = Supervised(loss)
    if kind != "baseline":
        promise = Promise(
            model=TEACHER, head="linear", dropout=0.0, classes=CLASSES, channels=CHANNELS, image_size=size, mean=MEAN, std=STD,
            prior=None, training_patients=None, external=True, split_hash="",
        )  # fmt: skip
        teacher: Any = Teacher(create(TEACHER, channels=3, classes=len(CLASSES), image_size=size), promise, fabric)
        if kind == "cached":
            plain = Batches(
                cohort,
                batches.rows,
                channels=CHANNELS,
                batch_size=BATCH,
                device=fabric.device,
                shuffle=False,
                augmentation=PRESETS["cifar"],
            )
            start = time.perf_counter()
            teacher = Kept([look(teacher, plain, 0, features=False)], batches.rows, fabric.device)
            print(f"filling the cache: {time.perf_counter() - start:.2f} s a view")
        method = make_method("kd", Facts(torch.ones(len(CLASSES))), temperature=TEMPERATURE)
        objective = Distilled(loss, method, teacher, ce_weight=1.0, kd_weight=1.0)
    trainer = Trainer(create(STUDENT, channels=3, classes=len(CLASSES), image_size=size), objective, settings, CHANNELS, CLASSES, fabric)
    return lambda: trainer.epoch(batches, None) and None


def found(name: str, build: Callable[[], Epoch]) -> dict[str, Epoch]:
    try:
        return {name: build()}
    except ImportError as error:
        print(f"{name} is left out: {error}")
        return {}


def seconds(epoch: Epoch) -> float:
    start = time.perf_counter()
    epoch()
    return time.perf_counter() - start


def main() -> None:
    """Print a table of medians and ratios."""
    print(described())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mdistiller", type=Path)
    parser.add_argument("--repdistiller", type=Path)
    given = parser.parse_args()
    sys.path += [str(path) for path in (given.mdistiller, given.repdistiller) if path is not None]
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (given.images, given.size, given.size, 3), dtype=np.uint8)
    labels = random.integers(len(CLASSES), size=given.images)
    with tempfile.TemporaryDirectory() as folder:
        cohort = make_cohort(Path(folder), pixels, labels)
        epochs = {
            "floor (student step + teacher forward, no data)": floor(pixels, labels),
            "raredistill, no teacher": ours(cohort, kind="baseline"),
            "raredistill": ours(cohort, kind="live"),
            "raredistill, from the teacher cache": ours(cohort, kind="cached"),
            **found("timm.task", lambda: with_timm(pixels, labels)),
            **found("torchdistill", lambda: with_torchdistill(pixels, labels)),
            **found("RepDistiller", lambda: with_repdistiller(pixels, labels)),
            **found("mdistiller", lambda: with_mdistiller(pixels, labels)),
        }
        times: dict[str, list[float]] = {name: [] for name in epochs}
        for round_ in range(given.rounds + 1):
            for name, epoch in epochs.items():
                elapsed = seconds(epoch)
                times[name] += [elapsed] if round_ else []
    show(times, f"{TEACHER} teaches {STUDENT}, {given.images} images of {given.size} x {given.size}, batch {BATCH}, {WORKERS} cores")


def show(times: dict[str, list[float]], title: str) -> None:
    reference = times["raredistill"]
    print(f"\n{title}; medians of {len(reference)} interleaved epochs\n")
    print("| loop | s an epoch | images against ours, live |\n|---|---|---|")
    for name, values in times.items():
        ratio = statistics.median(own / other for own, other in zip(reference, values, strict=True))
        print(f"| {name} | {statistics.median(values):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
