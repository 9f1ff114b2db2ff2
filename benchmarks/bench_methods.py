"""What each method costs: its training step against the student's step plus the teacher's forward pass.

resnet18 teaches small_cnn, 96 x 96, one channel, batch 64, data in memory, no augmentation. Steps are interleaved; each is set against its
floor in the same round, in time on the wall and of the processor, and the medians of the rounds are printed. Two peers that learn from each
other stand against their two single steps. Command: ``python benchmarks/bench_methods.py [METHOD ...]`` (all of them by default).
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


Times = tuple[float, float]


def seconds(step: Callable[[], object]) -> Times:
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - cpu


def in_rounds(steps: dict[str, Callable[[], object]]) -> dict[str, list[Times]]:
    times: dict[str, list[Times]] = {name: [] for name in steps}
    for turn in range(ROUNDS + 1):
        for name, step in steps.items():
            found = seconds(step)
            if turn >= 1:
                times[name].append(found)
    return times


def row(name: str, times: dict[str, list[Times]], floor: dict[str, int]) -> str:
    """Median milliseconds and median ratio to the floor (so many of other steps), each on the wall and of the processor."""
    cells = []
    for clock in (0, 1):
        own = [each[clock] for each in times[name]]
        lowest = [sum(number * times[part][turn][clock] for part, number in floor.items()) for turn in range(ROUNDS)]
        ratio = statistics.median(one / other for one, other in zip(own, lowest, strict=True)) if floor else None
        cells += [f"{1000 * statistics.median(own):.0f}", "-" if ratio is None else f"{ratio:.3f}"]
    return f"| {name} | {cells[0]} | {cells[1]} | {cells[2]} | {cells[3]} |"


def main() -> None:
    """Print a table of medians and ratios."""
    batch = make_batch()
    steps = {"student step": single(batch), "teacher forward": forward(batch), "two peers": mutual(batch)}
    names = sys.argv[1:] or list(METHODS)
    steps |= {name: taught(name, batch) for name in names}
    floors = {"student step": {}, "teacher forward": {}, "two peers": {"student step": 2}}
    floors |= {name: {"student step": 1, "teacher forward": 1} for name in names}
    times = in_rounds(steps)
    print(f"resnet18 to small_cnn, {SIZE} x {SIZE}, batch {BATCH}, {torch.get_num_threads()} threads, medians of {ROUNDS} rounds\n")
    print("| step | ms (wall) | against its floor | ms (processor) | against its floor |\n|---|---|---|---|---|")
    for name in steps:
        print(row(name, times, floors[name]))


if __name__ == "__main__":
    main()
