"""The report's tables: data frames first, then CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raredistill.evaluation.levels import evaluate
from raredistill.files import write_text
from raredistill.metrics import confusion_matrix
from raredistill.reports.results import Results

OVERALL = ("macro_f1", "balanced_accuracy", "g_mean", "mcc", "kappa", "accuracy")
BY_CLASS = ("precision", "recall", "specificity", "f1", "auroc", "auprc")
WHERE = ("entry", "repeat", "fold", "seed", "checkpoint", "level")


def run_metrics(results: Results) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every metric of every finished run on its test part.

    Returns:
        Overall metrics (one row per run, checkpoint and level), and metrics by class (one row per run, checkpoint, level and class).
    """
    overall: list[dict[str, Any]] = []
    by_class: list[dict[str, Any]] = []
    for run in results.runs:
        for checkpoint in ("best", "last"):
            found = evaluate(results.tables[run.id], checkpoint=checkpoint)
            for level in ("slice", "patient"):
                if found[level] is not None:
                    where = dict(zip(WHERE, (run.name, run.repeat, run.fold, run.seed, checkpoint, level), strict=True))
                    _add(where, found[level], found[level].get("classes", found["classes"]), overall, by_class)
    return pd.DataFrame(overall, columns=[*WHERE, *OVERALL]), pd.DataFrame(by_class, columns=[*WHERE, "class", *BY_CLASS])


def _add(where: dict[str, Any], found: dict[str, Any], classes: Any, overall: list[dict[str, Any]], by_class: list[dict[str, Any]]) -> None:
    metrics = found["metrics"]
    overall.append({**where, **{key: float(metrics[key]) for key in OVERALL}})
    for index, name in enumerate(classes):
        by_class.append({**where, "class": name, **{key: float(metrics[key][index]) for key in BY_CLASS}})


def mean_and_spread(table: pd.DataFrame, by: list[str], metrics: tuple[str, ...]) -> pd.DataFrame:
    """``mean ± sd`` over runs, as text, with the number of runs."""
    rows = []
    for key, group in table.groupby(by, sort=False):
        cells = {metric: _spread(group[metric]) for metric in metrics}
        rows.append({**dict(zip(by, key, strict=True)), "runs": len(group), **cells})
    return pd.DataFrame(rows, columns=[*by, "runs", *metrics])


def _spread(values: pd.Series) -> str:
    if values.isna().all():
        return "undefined"
    spread = "" if values.notna().sum() < 2 else f" ± {values.std():.3f}"
    return f"{values.mean():.3f}{spread}"


def summary(results: Results, overall: pd.DataFrame, by_class: pd.DataFrame) -> pd.DataFrame:
    """One row per entry: the rare class and overall scores, by slice, best checkpoint, mean over runs."""
    rare = results.study.rare
    rows = []
    for entry in results.entries:
        own = by_class.query("entry == @entry and checkpoint == 'best' and level == 'slice' and `class` == @rare")
        whole = overall.query("entry == @entry and checkpoint == 'best' and level == 'slice'")
        size = results.first(entry).parameters
        rare_part = {f"{rare} {key}": _mean(own[key]) for key in ("f1", "recall", "auprc")}
        rows.append(
            {"entry": entry, "runs": len(whole), "parameters": size, **rare_part, **{key: _mean(whole[key]) for key in OVERALL[:2]}}
        )
    return pd.DataFrame(rows)


def _mean(values: pd.Series) -> float:
    return float(values.mean()) if len(values) else float("nan")


def confusions(rows: pd.DataFrame, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """Entry -> ``(K, K)`` counts over all its test parts (rows: true class), from :func:`confusion_rows`."""
    if rows.empty:
        return {}
    found, columns = rows.groupby("entry", sort=False), [f"as {name}" for name in classes]
    return {str(entry): own.groupby("true")[columns].sum().reindex(list(classes)).to_numpy() for entry, own in found}


def confusion_rows(results: Results) -> pd.DataFrame:
    """Confusion matrices as a table, one row per run and true class: slices predicted as each class."""
    rows = []
    for run in results.runs:
        part = results.tables[run.id].part("test")
        matrix = confusion_matrix(part.labels(), part.probabilities().argmax(axis=1), len(part.classes))
        for name, counts in zip(part.classes, matrix, strict=True):
            where = {"entry": run.name, "repeat": run.repeat, "fold": run.fold, "seed": run.seed, "true": name}
            rows.append({**where, **{f"as {guess}": int(count) for guess, count in zip(part.classes, counts, strict=True)}})
    return pd.DataFrame(rows)


def epoch_rows(results: Results) -> pd.DataFrame:
    """Loss and scores by epoch, one row per run, epoch and part: the source of the curves."""
    rows = []
    for run in results.runs:
        for epoch, record in enumerate(results.epochs[run.id], start=1):
            for part in ("train", "validation"):
                if part in record:
                    scores = {f"f1_{name}": value for name, value in record[part]["f1"].items()}
                    where = {"entry": run.name, "repeat": run.repeat, "fold": run.fold, "seed": run.seed, "epoch": epoch}
                    rows.append({**where, "part": part, "loss": record[part]["loss"], "macro_f1": record[part]["macro_f1"], **scores})
    return pd.DataFrame(rows)


def write_tables(tables: dict[str, pd.DataFrame], folder: Path) -> None:
    """Write each table as CSV."""
    for name, table in tables.items():
        write_text(folder / f"{name}.csv", safe(table).to_csv(index=False))


def safe(table: pd.DataFrame) -> pd.DataFrame:
    """A copy whose texts (including column names) no spreadsheet executes as formulas."""
    return table.map(_quoted).rename(columns=_quoted)


def _quoted(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
