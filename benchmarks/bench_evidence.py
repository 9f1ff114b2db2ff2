"""How long the tests of a large study take: all metrics of 30 pairs over 57,000 slices of 369 patients, 3 repeats of 5 folds.

Command: ``python benchmarks/bench_evidence.py`` (a minute on one core)
"""

from __future__ import annotations

import time

import numpy as np
import pandas as pd

from raredistill.evaluation.contrasts import contrasts, tally
from raredistill.evaluation.gains import assess
from raredistill.predictions import Predictions

CLASSES, PATIENTS, SLICES, REPEATS, FOLDS, PAIRS = ("healthy", "HGG", "LGG"), 369, 57_000, 3, 5, 30
BY_CLASS = ("f1", "recall", "precision", "specificity", "auroc", "auprc")
METRICS = [*(f"{name}:{label}" for name in BY_CLASS for label in CLASSES), "macro_f1", "balanced_accuracy", "accuracy", "mcc", "kappa",
           "brier", "log_loss"]  # fmt: skip


def side(seed: int) -> Predictions:
    """One entry's test predictions of all runs."""
    generator = np.random.default_rng(seed)
    patient, sample = np.arange(SLICES) % PATIENTS, np.arange(SLICES).astype(str)
    grade = np.where(np.arange(PATIENTS) < 76, "LGG", "HGG")[patient]
    label = np.where(np.arange(SLICES) // PATIENTS % 2, "healthy", grade)
    fold = [np.random.default_rng(repeat).permutation(np.arange(PATIENTS) % FOLDS)[patient] for repeat in range(REPEATS)]
    fixed = {"run": "r", "sample": sample, "patient": np.char.zfill(patient.astype(str), 3), "patient_label": grade, "split": "test"}
    tables = [
        pd.DataFrame({**fixed, "repeat": r, "fold": fold[r], "seed": r, "checkpoint": "last", "label": label}) for r in range(REPEATS)
    ]
    logits = generator.normal(size=(SLICES * REPEATS, 3)) + (np.tile(label, REPEATS)[:, None] == np.array(CLASSES))
    return Predictions(pd.concat(tables, ignore_index=True).assign(logits=None), CLASSES, "healthy").with_logits(logits)


if __name__ == "__main__":
    tables = [side(seed) for seed in range(2)]
    start = time.perf_counter()
    sides = [tally(table, METRICS) for table in tables]
    each = (time.perf_counter() - start) / 2
    start = time.perf_counter()
    for _ in range(PAIRS):
        assess(list(contrasts(sides[0], sides[1], METRICS, "LGG").found.values()))
    tested = time.perf_counter() - start
    print(f"{len(METRICS)} metrics: {each:.2f} s to add up a side of {SLICES * REPEATS:,} rows, {tested:.2f} s to test {PAIRS} pairs; "
          f"{(PAIRS + 1) * each + tested:.1f} s for {PAIRS} pairs with a side each and one control")  # fmt: skip
