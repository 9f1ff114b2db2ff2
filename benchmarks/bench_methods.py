"""What each method costs: its training step against the student's step plus the teacher's forward pass.

resnet18 teaches small_cnn, 96 x 96, one channel, batch 64, data in memory, no augmentation. Interleaved medians; two peers that learn from
each other stand against their two single steps. Command: ``python benchmarks/bench_methods.py [METHOD ...]`` (all of them by default).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from raredistill.batches import Batch
from raredistill.checkpoint import Promise
from raredistill.distill.contract import Facts, Shape
from raredistill.distill.registry import METHODS, make_method
from raredistill.losses import make_loss
from raredistill.models import Network, create
from raredistill.training.devices import make_fabric
from raredistill.training.loop import Trainer
from raredistill.training.objectives import Distilled, Objective, Supervised
from raredistill.training.online import Peer, Together
from raredistill.training.settings import Settings
from raredistill.training.teacher import Teacher

CLASSES, CHANNELS, SIZE, BATCH, ROUNDS = ("a", "b", "c"), ("grey",), 96, 64, 5
COUNTS = torch.tensor([500.0, 300.0, 60.0])
FABRIC = make_fabric("cpu", "32-true")
LOSS = make_loss("cross_entropy", counts=COUNTS)


def network(name: str) -> Network:
    return create(name, channels=1, classes=3, image_size=SIZE)


def make_batch() -> Batch:
    torch.manual_seed(0)
    return Batch(torch.arange(BATCH), torch.rand(BATCH, 1, SIZE, SIZE), torch.randint(3, (BATCH,)), CHANNELS)


def trainer(objective: Objective, student: Network) -> Trainer:
    made = Trainer(student, objective, Settings(), CHANNELS, CLASSES, FABRIC)
    made.model.train()
    return made


def frozen(maps: bool) -> Teacher:
    prior = tuple((COUNTS / COUNTS.sum()).tolist())
    promise = Promise(model="resnet18", head="linear", dropout=0.0, classes=CLASSES, channels=CHANNELS, image_size=SIZE, mean=(0.5,),
                      std=(0.25,), prior=prior, training_patients=None, external=True, split_hash="")  # fmt: skip
    return Teacher(network("resnet18"), promise, FABRIC, maps=maps)


def taught(name: str, batch: Batch) -> Callable[[], object]:
    student, teacher = network("small_cnn"), frozen("maps" in METHODS[name].needs)
    facts = Facts(COUNTS, prior=COUNTS / COUNTS.sum(), reliability=torch.ones(3) / 2, student_shape=Shape(*student.widths()),
                  teacher_shape=Shape(*teacher.widths()))  # fmt: skip
    step = trainer(Distilled(LOSS, make_method(name, facts), teacher, ce_weight=1, kd_weight=1), student)
    return lambda: step.step(batch)


def mutual(batch: Batch) -> Callable[[], object]:
    peers = [Peer(network("small_cnn"), CHANNELS, LOSS)]
    method = make_method("kd", Facts(COUNTS), temperature=1)
    step = trainer(Together(LOSS, method, peers, FABRIC, mutual=True, ce_weight=1, kd_weight=1), network("small_cnn"))
    return lambda: step.step(batch)


def single(batch: Batch) -> Callable[[], object]:
    step = trainer(Supervised(LOSS), network("small_cnn"))
    return lambda: step.step(batch)


def forward(batch: Batch) -> Callable[[], object]:
    teacher = frozen(maps=False)
    return lambda: teacher(batch)


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    """Print a table of medians and ratios."""
    batch = make_batch()
    steps = {"student step": single(batch), "teacher forward": forward(batch), "two peers": mutual(batch)}
    names = sys.argv[1:] or list(METHODS)
    steps |= {name: taught(name, batch) for name in names}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS + 1):
        for name, step in steps.items():
            elapsed = seconds(step)
            if turn >= 1:
                times[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    floors = dict.fromkeys(names, medians["student step"] + medians["teacher forward"]) | {"two peers": 2 * medians["student step"]}
    print(
        f"resnet18 to small_cnn, {SIZE} x {SIZE}, batch {BATCH}, {torch.get_num_threads()} threads, medians of {ROUNDS} interleaved steps\n"
    )
    print("| step | ms | against its floor |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {1000 * value:.0f} | {f'{value / floors[name]:.3f}' if name in floors else '-'} |")


if __name__ == "__main__":
    main()
