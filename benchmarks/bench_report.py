"""Time and memory of all statistics and the report of a large study, Grad-CAM and latency apart.

30 runs (six entries, five outer folds), each predicting the test and validation parts (a fifth, and an eighth of the rest) of 57,000
slices of 369 patients, best and last checkpoint, 2,000 resamples. The study is generated and written first; only the report is timed.
Command: ``python benchmarks/bench_report.py``
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raredistill import predictions
from raredistill.files import write_json
from raredistill.report import write_report

CLASSES, PATIENTS, RARE, SLICES, FOLDS = ("healthy", "HGG", "LGG"), 369, 76, 155, 5
ENTRIES = {
    "small": ("", 0.9, 1), "medium": ("", 1.1, 4), "large": ("", 1.3, 16),
    "small-from-large": ("large", 1.0, 1), "medium-from-small": ("small", 1.1, 4), "large-from-small": ("small", 1.25, 16),
}  # fmt: skip


def slices(generator: np.random.Generator) -> pd.DataFrame:
    """Every slice of the cohort with its fold."""
    patient = np.repeat(np.arange(PATIENTS), SLICES)
    grade = np.where(patient < RARE, "LGG", "HGG")
    label = np.where(generator.random(len(patient)) < 0.52, "healthy", grade)
    names = np.char.add("patient", patient.astype(str))
    sample = [f"{name}-{index}" for name, index in zip(names, np.tile(np.arange(SLICES), PATIENTS), strict=True)]
    return pd.DataFrame({"sample": sample, "patient": names, "patient_label": grade, "label": label, "fold_tested": patient % FOLDS})


def part(cohort: pd.DataFrame, name: str, split: str, fold: int, skill: float, generator: np.random.Generator) -> pd.DataFrame:
    """Predictions of one part by both checkpoints."""
    right = cohort["label"].to_numpy()[:, None] == np.array(CLASSES)
    tables = []
    for checkpoint in ("best", "last"):
        logits = (generator.normal(size=right.shape) + skill * right).astype(np.float32)
        fixed: dict[str, Any] = {"run": f"{name}-f{fold}", "split": split, "repeat": 0, "fold": fold, "seed": 0, "checkpoint": checkpoint}
        tables.append(cohort.drop(columns="fold_tested").assign(**fixed, logits=list(logits)))
    return pd.concat(tables, ignore_index=True)


def write_run(root: Path, cohort: pd.DataFrame, name: str, fold: int) -> dict[str, Any]:
    """One run's folder, and its record."""
    teacher, skill, size = ENTRIES[name]
    generator = np.random.default_rng([fold, list(ENTRIES).index(name)])
    others = cohort[cohort["fold_tested"] != fold]
    held = others[others["patient"].isin(sorted(others["patient"].unique())[::8])]
    parts = [part(cohort[cohort["fold_tested"] == fold], name, "test", fold, skill, generator)]
    parts.append(part(held, name, "validation", fold, skill, generator))
    folder = root / "runs" / f"{name}-f{fold}"
    folder.mkdir(parents=True)
    predictions.write(folder / "predictions.parquet", pd.concat(parts, ignore_index=True), CLASSES, "healthy")
    scores = {"loss": 1.0, "macro_f1": 0.6, "f1": dict.fromkeys(CLASSES, 0.6)}
    (folder / "epochs.jsonl").write_text("".join(json.dumps({"epoch": n, "train": scores, "validation": scores}) + "\n" for n in range(30)))
    return {
        "id": folder.name, "name": name, "kind": "distilled" if teacher else "baseline", "direction": "", "model": name.split("-")[0],
        "loss": "cross_entropy", "method": "kd", "teacher": "", "teacher_name": teacher, "external_teacher": False, "channels": ["flair"],
        "repeat": 0, "fold": fold, "seed": 0, "status": "done", "error": "", "parameters": size * 10**6, "flops": size * 10**8,
        "bytes": size * 4 * 10**6,
    }  # fmt: skip


def write_study(root: Path) -> None:
    """The whole study's folder."""
    cohort = slices(np.random.default_rng(0))
    runs = [write_run(root, cohort, name, fold) for name in ENTRIES for fold in range(FOLDS)]
    counts = [{"class": name, "slices": int((cohort["label"] == name).sum()), "patients": RARE} for name in CLASSES]
    described = {
        "name": "bench", "hash": "0" * 64, "classes": list(CLASSES), "background": "healthy", "channels": ["flair"], "samples": len(cohort),
        "patients": PATIENTS, "provenance": {}, "counts": counts, "size": [224, 224],
    }  # fmt: skip
    study = {
        "name": "bench", "command": "python benchmarks/bench_report.py", "config": {"runs": []}, "cohort": described, "protocol": "outer",
        "rare": "LGG", "split_table": counts, "splits": [{"repeat": 0, "fold": fold, "hash": ""} for fold in range(FOLDS)], "versions": {},
        "machine": {}, "runs": runs,
    }  # fmt: skip
    write_json(root / "study.json", study)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_study(Path(folder))
        before, used = time.perf_counter(), time.process_time()
        page = write_report(Path(folder))
        seconds, used = time.perf_counter() - before, time.process_time() - used
        # On Linux in kibibytes; it holds what was needed to write the study too, so it is an upper bound.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        took = f"{seconds:.1f} s ({used:.1f} s of processor time)"
        print(f"report of {FOLDS * len(ENTRIES)} runs: {took}, peak {peak:.2f} GiB, page {page.stat().st_size / 2**20:.1f} MiB")
