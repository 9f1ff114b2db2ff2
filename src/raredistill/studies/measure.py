"""Measure the cost of one kind of run on this machine: a few real steps with the batches, objective and trainer of a run."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from raredistill import checkpoint, predictions
from raredistill.batches import Batch, Batches
from raredistill.cohort.store import Cohort
from raredistill.models import Network, measure_latency
from raredistill.runs.assemble import make_batches, make_objective, run_promise
from raredistill.runs.cache import Cache
from raredistill.runs.layout import RunFolder, StudyFolder
from raredistill.runs.predict import plain_batches, prediction_table
from raredistill.runs.run import Run
from raredistill.runs.teachers import network_of
from raredistill.training.devices import make_fabric
from raredistill.training.loop import Trainer, predict_logits
from raredistill.training.settings import TeacherCache

WARM_UP = 2
GROUPS = 5
"""Number of measurements, of which the median is used: a shared machine is slow now and then."""
GROUP_SECONDS = 0.3
MOST_STEPS = 20
"""Steps per measurement."""
EVALUATED = 512
"""Number of images evaluated to time one."""
COSTLY = (
    "batch_size", "optimizer", "clip_norm", "ema_decay", "augmentation", "mixing", "sam_rho", "stage", "precision", "accelerator",
    "residence", "teacher_cache", "compile",
)  # fmt: skip
"""Settings that time or memory depends on."""


@dataclass(frozen=True)
class Cost:
    """Time, memory and disk of one kind of run on this machine.

    Attributes:
        step: seconds per training step, including its batch.
        image: seconds to evaluate one image.
        load: seconds to open one sample of the training part.
        view: seconds to query the teacher for one sample, for its cache; 0 without a cache.
        once: seconds for work that happens once per run: building, compiling, checkpoints, latency.
        memory: peak bytes on the device or, on the CPU, of the process, without the run's pixels.
        state: bytes of a saved state.
        results: bytes of the checkpoints.
        row: bytes of one sample in the predictions; ``view_row`` in one view of the teacher cache.
        view_row: see ``row``.
        device: device of the measurement.
    """

    step: float
    image: float
    load: float
    view: float
    once: float
    memory: int
    state: int
    results: int
    row: float
    view_row: float
    device: torch.device


def kind_of(run: Run) -> str:
    """Everything the cost of a run depends on, except its numbers of samples and epochs."""
    entry = run.entry
    settings = [getattr(entry.settings, name) for name in COSTLY]
    networks = [(each.model, each.head, each.channels) for each in (entry, *(teacher.entry for teacher in run.teachers), *run.peers)]
    elsewhere = None if isinstance(entry.teacher, str | tuple) else entry.teacher
    method = (entry.method, entry.method_options, entry.online, entry.cross_fit) if entry.teacher is not None else None
    return repr((settings, networks, elsewhere, method))


def measure(run: Run, cohort: Cohort, scratch: Path) -> Cost:
    """Start a run on a few of its samples, with untrained networks as its teachers.

    Args:
        run: one of its kind.
        cohort: its data.
        scratch: folder for temporary files.

    Raises:
        RareDistillError: the run itself would raise it at its start.
    """
    small, folder = _small(run, cohort), StudyFolder(scratch)
    for teacher in small.teachers:
        _stand_in(teacher, cohort, folder.run(teacher.id))
    fabric = make_fabric(small.entry.settings.accelerator, small.entry.settings.precision)
    _forget_peak(fabric.device)
    opened, (channels, train, _) = _timed(lambda: make_batches(small, cohort, fabric))
    built, network = _timed(lambda: network_of(small.entry, cohort))
    cache = Cache(small, cohort, fabric, folder, lambda done, total: None)
    objective = make_objective(small, cohort, network, fabric, folder, keep=cache)
    trainer = Trainer(network, objective, small.entry.settings, channels, cohort.classes, fabric)
    compiled, step = _seconds_of_a_step(trainer, train)
    scratch.mkdir(exist_ok=True)
    image, row = _evaluation(small, cohort, network, fabric, scratch)
    memory = _peak(fabric.device)
    saved, (state, results) = _timed(lambda: _saved(small, cohort, trainer, network, scratch))
    measured, _ = _timed(lambda: measure_latency(network))
    rows = len(small.split.train)
    kept = sum(file.stat().st_size for file in folder.teacher_cache.rglob("*.safetensors")) if cache.facts else 0
    return Cost(
        step=step, image=image, load=opened / rows, view=cache.facts.get("seconds", 0.0) / rows, once=built + compiled + saved + measured,
        memory=memory, state=state, results=results, row=row, view_row=kept / rows, device=fabric.device,
    )  # fmt: skip


def _small(run: Run, cohort: Cohort) -> Run:
    """The same run on a few samples of each part, from scratch, with one view in its teacher cache; likewise its teachers."""
    split, labels = run.split, cohort.labels
    enough = (WARM_UP + GROUPS) * run.entry.settings.batch_size
    few = replace(
        split, train=_few(split.train, labels, enough), validation=_few(split.validation, labels, EVALUATED),
        test=_few(split.test, labels, EVALUATED),
    )  # fmt: skip
    settings = run.entry.settings
    if settings.teacher_cache is not None:
        settings = replace(settings, teacher_cache=TeacherCache(1))
    entry = replace(run.entry, settings=settings, pretrained=False)
    teachers = tuple(
        replace(teacher, split=replace(teacher.split, validation=_few(teacher.split.validation, labels, EVALUATED)))
        for teacher in run.teachers
    )
    return replace(run, entry=entry, split=few, teachers=teachers)


def _few(rows: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Select some of the rows, at least one of each class among them."""
    mixed = np.random.default_rng(0).permutation(rows)
    firsts = np.unique(labels[mixed], return_index=True)[1]
    others = np.setdiff1d(np.arange(len(mixed)), firsts)
    return mixed[np.concatenate([firsts, others])[: max(count, len(firsts))].astype(np.int64)]


def _stand_in(teacher: Run, cohort: Cohort, folder: RunFolder) -> None:
    """Write the files of a trained teacher, but with an untrained network: querying it costs the same."""
    network = network_of(replace(teacher.entry, pretrained=False), cohort)
    folder.path.mkdir(parents=True)
    checkpoint.save(folder.weights("best"), network.state_dict(), run_promise(teacher, cohort, network))
    rows = np.concatenate([teacher.split.validation, teacher.split.test])
    parts = ["validation"] * len(teacher.split.validation) + ["test"] * len(teacher.split.test)
    logits = np.random.default_rng(0).normal(size=(len(rows), len(cohort.classes)))
    table = prediction_table(cohort, rows, logits, run=teacher.id, split="test", checkpoint="best", where=(0, 0, 0))
    predictions.write(folder.predictions, table.assign(split=parts), cohort.classes, cohort.background)


def _seconds_of_a_step(trainer: Trainer, train: Batches) -> tuple[float, float]:
    """Seconds to compile the network before the first step, and seconds per step after that."""
    batches = _endless(train)

    def steps(count: int) -> None:
        for batch in islice(batches, count):
            terms, logits = trainer.step(batch)
            trainer.tally.add(logits, batch.labels, terms)
        _settle(trainer.fabric.device)

    trainer.model.train()
    warmed, _ = _timed(lambda: steps(WARM_UP))
    one, _ = _timed(lambda: steps(1))
    count = int(np.clip(GROUP_SECONDS / one, 1, MOST_STEPS))
    step = statistics.median(_timed(lambda: steps(count))[0] / count for _ in range(GROUPS))
    return (0.0 if trainer.settings.compile == "none" else warmed - WARM_UP * step), step


def _endless(train: Batches) -> Iterator[Batch]:
    for epoch in itertools.count():
        yield from train.epoch(epoch)


def _evaluation(run: Run, cohort: Cohort, network: Network, fabric: Fabric, scratch: Path) -> tuple[float, float]:
    """Seconds to evaluate one image, and bytes of its row in the predictions."""
    rows, channels = run.split.test, run.entry.channels
    batches = plain_batches(cohort, rows, channels, fabric, run.entry.settings.residence)
    logits, _ = predict_logits(network, batches, channels=channels, fabric=fabric)
    seconds = statistics.median(_timed(lambda: predict_logits(network, batches, channels=channels, fabric=fabric))[0] for _ in range(3))
    file = scratch / "few.parquet"
    table = prediction_table(cohort, rows, logits.numpy(), run=run.id, split="test", checkpoint="best", where=(0, 0, 0))
    predictions.write(file, table, cohort.classes, cohort.background)
    return seconds / len(rows), file.stat().st_size / len(rows)


def _saved(run: Run, cohort: Cohort, trainer: Trainer, network: Network, scratch: Path) -> tuple[int, int]:
    """Save a state and both checkpoints as a run does; returns their sizes in bytes."""
    trainer.fitted.best = trainer.weights()
    state = trainer.state()
    checkpoint.save_state(scratch / "state.safetensors", state.tensors, state.facts)
    for name in ("best", "last"):
        checkpoint.save(scratch / f"{name}.safetensors", trainer.fitted.best, run_promise(run, cohort, network))
    return (scratch / "state.safetensors").stat().st_size, 2 * (scratch / "best.safetensors").stat().st_size


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # if the kernel refuses, the peak includes the kinds measured before
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
