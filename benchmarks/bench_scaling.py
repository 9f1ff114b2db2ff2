"""How an epoch grows with samples and classes, splits and bootstraps with patients, folds and classes, and memory with the cohort.

Seconds are of the processor, all threads added, so that other work on the machine does not bend the curve; medians of three turns that
alternate. Training: ``small_cnn`` at 16 x 16, batch 64, CPU.

Memory is looked at in a process of its own for each cohort: pages of its own (RssAnon) and of files that it has mapped (RssFile), at
their greatest during an epoch, less what there was after one batch.

Command: ``python benchmarks/bench_scaling.py``
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from raredistill.augment import PRESETS
from raredistill.batches import Batches
from raredistill.cohort.store import Cohort, save
from raredistill.evaluation import bootstrap, patient_bootstrap
from raredistill.losses import make_loss
from raredistill.metrics import classification_metrics
from raredistill.models import create
from raredistill.predictions import Predictions
from raredistill.splits import make_splits
from raredistill.training.devices import make_fabric
from raredistill.training.loop import Trainer
from raredistill.training.objectives import Supervised
from raredistill.training.settings import Settings

SAMPLES = (1000, 2000, 4000, 8000)
CLASSES = (2, 10, 100, 1000)
PATIENTS = (125, 250, 500, 1000)
FOLDS = (2, 5, 10)
SLICES, SIDE, MEMORY_SIDE, BATCH, ROUNDS, RESAMPLES = 40, 16, 128, 64, 3, 2000
CPU = torch.device("cpu")


def rows_of(number: int, classes: int, patients: int) -> pd.DataFrame:
    """A sample table: sample n is of patient n modulo ``patients``, who carries a class and has slices of no other."""
    patient = np.arange(number) % patients
    label = [f"class{p % classes}" for p in patient]
    names = {"sample": [str(n) for n in range(number)], "patient": [f"p{p}" for p in patient], "patient_label": label, "label": label}
    return pd.DataFrame({**names, "slice": -1, "source": "", "split": ""})


def names_of(classes: int) -> tuple[str, ...]:
    return tuple(f"class{n}" for n in range(classes))


def make_cohort(root: Path, number: int, classes: int, side: int) -> Cohort:
    generator = np.random.default_rng(0)
    blocks = (generator.integers(0, 255, (250, side, side), dtype=np.uint8) for _ in range(number // 250))
    return save(root, rows_of(number, classes, number), {"grey": blocks}, classes=names_of(classes), size=(side, side))


def table_only(number: int, classes: int, patients: int) -> Cohort:
    """A cohort without pixels: splits need its table alone."""
    rows = rows_of(number, classes, patients)
    return Cohort(Path("nowhere"), rows, ("grey",), names_of(classes), (SIDE, SIDE), {}, "hash", None)


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def make_epoch(cohort: Cohort, residence: str) -> Callable[[], object]:
    """What trains one more epoch."""
    classes = cohort.classes
    network = create("small_cnn", channels=1, classes=len(classes), image_size=SIDE)
    loss = Supervised(make_loss("cross_entropy", counts=torch.ones(len(classes))))
    trainer = Trainer(network, loss, Settings(batch_size=BATCH), ("grey",), classes, make_fabric("cpu", "32-true"))
    batches = serve(cohort, residence)
    return lambda: trainer.epoch(batches, None)


def serve(cohort: Cohort, residence: str) -> Batches:
    rows = np.arange(len(cohort.samples))
    return Batches(
        cohort, rows, channels=("grey",), batch_size=BATCH, device=CPU, augmentation=PRESETS["default"], residence=residence, sampler="sqrt"
    )


def interleaved(functions: dict[int, Callable[[], object]]) -> dict[int, float]:
    """Medians of turns that alternate; the first turn warms up."""
    turns = [{key: seconds(function) for key, function in functions.items()} for _ in range(ROUNDS + 1)][1:]
    return {key: statistics.median(turn[key] for turn in turns) for key in functions}


def show(head: str, lines: list[str]) -> None:
    print(f"| {head} |\n|{'---|' * (head.count(' | ') + 1)}")
    print("\n".join(f"| {line} |" for line in lines), flush=True)
    print()


def samples(folder: Path) -> None:
    cohorts = {number: make_cohort(folder / f"s{number}", number, 3, SIDE) for number in SAMPLES}
    found = {
        residence: interleaved({number: make_epoch(cohort, residence) for number, cohort in cohorts.items()})
        for residence in ("resident", "streamed")
    }
    lines = [
        f"{n} | {found['resident'][n]:.3f} | {found['streamed'][n]:.3f} | {found['resident'][n] / n * 1e6:.0f} | "
        f"{found['streamed'][n] / n * 1e6:.0f}" for n in SAMPLES
    ]  # fmt: skip
    show("samples | resident epoch, s | streamed epoch, s | resident, us a sample | streamed, us a sample", lines)


def classes(folder: Path) -> None:
    number, generator = 4000, np.random.default_rng(0)
    epochs = interleaved({k: make_epoch(make_cohort(folder / f"k{k}", number, k, SIDE), "resident") for k in CLASSES})
    scores = {k: (np.arange(number) % k, generator.dirichlet(np.ones(k), number)) for k in CLASSES}
    metrics = interleaved({k: lambda k=k: classification_metrics(*scores[k]) for k in CLASSES})
    cohorts = {k: table_only(number * 5, k, number) for k in CLASSES}
    splits = interleaved({k: lambda k=k: make_splits(cohorts[k], folds=2, validation_share=0.5) for k in CLASSES})
    tables = {k: predicted(k, number, 1) for k in CLASSES}
    intervals = interleaved({k: lambda k=k: interval(tables[k]) for k in CLASSES})
    show(
        f"classes | epoch of {number}, s | metrics of {number}, s | 2 splits of {number * 5}, s | bootstrap of {number} patients, s",
        [f"{k} | {epochs[k]:.3f} | {metrics[k]:.4f} | {splits[k]:.3f} | {intervals[k]:.3f}" for k in CLASSES],
    )


def interval(predictions: Predictions) -> None:
    bootstrap._weights.cache_clear()  # a report draws once for all its metrics and pairs
    patient_bootstrap(predictions, "macro_f1", resamples=RESAMPLES)


def predicted(classes: int, patients: int, slices: int) -> Predictions:
    table = rows_of(patients * slices, classes, patients)
    logits = np.random.default_rng(0).normal(size=(len(table), classes)).astype(np.float32)
    where = {"run": "r", "split": "test", "repeat": 0, "fold": 0, "seed": 0, "checkpoint": "best"}
    return Predictions(table.drop(columns=["slice", "source"]).assign(**where, logits=list(logits)), names_of(classes), None)


def patients() -> None:
    cohorts = {p: table_only(p * SLICES, 3, p) for p in PATIENTS}
    found = {folds: interleaved({p: lambda p=p, f=folds: make_splits(cohorts[p], folds=f) for p in PATIENTS}) for folds in FOLDS}
    tables = {p: predicted(3, p, SLICES) for p in PATIENTS}
    intervals = interleaved({p: lambda p=p: interval(tables[p]) for p in PATIENTS})
    show(
        f"patients ({SLICES} slices) | {' | '.join(f'{f} folds, s' for f in FOLDS)} | ms a patient and fold | bootstrap, s | ms a patient",
        [
            f"{p} | " + " | ".join(f"{found[f][p]:.3f}" for f in FOLDS)
            + f" | {found[FOLDS[-1]][p] / p / FOLDS[-1] * 1e3:.3f} | {intervals[p]:.3f} | {intervals[p] / p * 1e3:.3f}" for p in PATIENTS
        ],
    )  # fmt: skip


def resident_pages() -> tuple[int, int]:
    """MiB of this process' own pages, and of mapped files."""
    facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(facts["RssAnon"].split()[0]) // 1024, int(facts["RssFile"].split()[0]) // 1024


def look_at_memory(root: Path, residence: str) -> None:
    """In a process of its own: serve an epoch and print the growth of both kinds of pages."""
    cohort = Cohort.load(root)
    list(Batches(cohort, np.arange(BATCH), channels=("grey",), batch_size=BATCH, device=CPU, augmentation=PRESETS["default"]).epoch(0))
    before = resident_pages()
    seen = [resident_pages() for _ in serve(cohort, residence).epoch(0)]
    print(*(max(pages[kind] for pages in seen) - before[kind] for kind in (0, 1)))


def ask_itself(root: Path, residence: str) -> list[str]:
    command = [sys.executable, __file__, "--memory", str(root), residence]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def memory(folder: Path) -> None:
    lines = []
    for number in SAMPLES:
        root = folder / f"m{number}"
        make_cohort(root, number, 3, MEMORY_SIDE)
        (own, files), (own_streamed, files_streamed) = (ask_itself(root, residence) for residence in ("resident", "streamed"))
        lines.append(f"{number} | {number * MEMORY_SIDE**2 / 2**20:.0f} | {own} | {files} | {own_streamed} | {files_streamed}")
    show("samples | pixels, MiB | resident: own | resident: of files | streamed: own | streamed: of files", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", nargs=2, metavar=("COHORT", "RESIDENCE"), help="what this script asks of itself")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        look_at_memory(Path(options.memory[0]), options.memory[1])
        return
    with tempfile.TemporaryDirectory() as name:
        samples(Path(name))
        classes(Path(name))
        patients()
        memory(Path(name))


if __name__ == "__main__":
    main()
