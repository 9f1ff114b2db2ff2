"""Time and memory of all statistics and the report of a large study, Grad-CAM and latency apart.

30 runs (six entries, five outer folds), each predicting the test and validation parts (a fifth, and an eighth of the rest) of 57,000
slices of 369 patients, best and last checkpoint, 2,000 resamples. Then three runs of a hundred classes that share a test set of 10,000
images, each its own patient. The studies are generated and written first; only the reports are timed.
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
from raredistill.reports import write_report

WIDE, IMAGES = tuple(f"c{number:03d}" for number in range(100)), {"test": 10_000, "validation": 1_000}
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


def part(
    cohort: pd.DataFrame, name: str, split: str, fold: int, skill: float, generator: np.random.Generator, classes: tuple[str, ...] = CLASSES
) -> pd.DataFrame:
    """Predictions of one part by both checkpoints."""
    right = cohort["label"].to_numpy()[:, None] == np.array(classes)
    tables = []
    for checkpoint in ("best", "last"):
        logits = (generator.normal(size=right.shape) + skill * right).astype(np.float32)
        fixed: dict[str, Any] = {"run": f"{name}-f{fold}", "split": split, "repeat": 0, "fold": fold, "seed": 0, "checkpoint": checkpoint}
        tables.append(cohort.drop(columns="fold_tested", errors="ignore").assign(**fixed, logits=list(logits)))
    return pd.concat(tables, ignore_index=True)


def write_run(root: Path, cohort: pd.DataFrame, name: str, fold: int) -> dict[str, Any]:
    """One run's folder, and its record."""
    generator = np.random.default_rng([fold, list(ENTRIES).index(name)])
    others = cohort[cohort["fold_tested"] != fold]
    held = others[others["patient"].isin(sorted(others["patient"].unique())[::8])]
    skill = ENTRIES[name][1]
    parts = [part(cohort[cohort["fold_tested"] == fold], name, "test", fold, skill, generator)]
    parts.append(part(held, name, "validation", fold, skill, generator))
    return finish(root, name, fold, parts, CLASSES, "healthy")


def finish(root: Path, name: str, fold: int, parts: list[pd.DataFrame], classes: tuple[str, ...], background: str | None) -> dict[str, Any]:
    """Write what a run leaves, and make its record."""
    folder, (teacher, _, size) = root / "runs" / f"{name}-f{fold}", ENTRIES[name]
    folder.mkdir(parents=True)
    predictions.write(folder / "predictions.parquet", pd.concat(parts, ignore_index=True), classes, background)
    scores = {"loss": 1.0, "macro_f1": 0.6, "f1": dict.fromkeys(classes, 0.6)}
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
    described = {"classes": list(CLASSES), "background": "healthy", "samples": len(cohort), "patients": PATIENTS, "counts": counts}
    describe(root, runs, described, "LGG", FOLDS)


def describe(root: Path, runs: list[dict[str, Any]], cohort: dict[str, Any], rare: str, folds: int) -> None:
    """The study's description."""
    fixed = {"name": "bench", "hash": "0" * 64, "channels": ["flair"], "provenance": {}, "size": [224, 224]}
    study = {
        "name": "bench", "command": "python benchmarks/bench_report.py", "config": {"runs": []}, "cohort": {**fixed, **cohort},
        "protocol": "outer" if folds > 1 else "holdout", "rare": rare, "split_table": cohort["counts"],
        "splits": [{"repeat": 0, "fold": fold, "hash": ""} for fold in range(folds)], "versions": {}, "machine": {}, "runs": runs,
    }  # fmt: skip
    write_json(root / "study.json", study)


def write_wide(root: Path) -> None:
    """A study of a hundred classes: a teacher, a baseline, and a student."""
    runs = [write_wide_run(root, name) for name in ("small", "large", "small-from-large")]
    counts = [{"class": name, "slices": 110, "patients": 110} for name in WIDE]
    described = {"classes": list(WIDE), "background": None, "samples": 11_000, "patients": 11_000, "counts": counts}
    describe(root, runs, described, WIDE[-1], 1)


def write_wide_run(root: Path, name: str) -> dict[str, Any]:
    """One of its runs."""
    generator, parts = np.random.default_rng(list(ENTRIES).index(name)), []
    for split, number in IMAGES.items():
        label = np.repeat(WIDE, number // len(WIDE))
        names = [f"{split}{image}" for image in range(number)]
        images = pd.DataFrame({"sample": names, "patient": names, "patient_label": label, "label": label})
        parts.append(part(images, name, split, 0, ENTRIES[name][1] + 1.5, generator, WIDE))
    return finish(root, name, 0, parts, WIDE, None)


def timed(root: Path, what: str) -> None:
    """Write the report and print what it took."""
    before, used = time.perf_counter(), time.process_time()
    page = write_report(root)
    seconds, used = time.perf_counter() - before, time.process_time() - used
    # On Linux in kibibytes; it holds what was needed to write the study too, so it is an upper bound.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    took = f"{seconds:.1f} s ({used:.1f} s of processor time)"
    print(f"report of {what}: {took}, peak {peak:.2f} GiB, page {page.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_study(Path(folder, "study"))
        timed(Path(folder, "study"), f"{FOLDS * len(ENTRIES)} runs")
        write_wide(Path(folder, "wide"))
        timed(Path(folder, "wide"), "3 runs of 100 classes")
