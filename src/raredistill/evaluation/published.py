"""Published confusion matrices: they can be described but, without patients or predictions, not tested."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from raredistill.errors import DataError
from raredistill.metrics import metrics_from_confusion
from raredistill.predictions import is_text_table, read_text_table

_BETWEEN = "_as_"
_RUN = ("fold", "repeat", "seed")
_OVERALL = ("accuracy", "macro_f1", "balanced_accuracy", "g_mean", "mcc", "kappa")


def is_published(path: Path) -> bool:
    """Whether a file is a CSV of confusion matrices: columns such as ``HGG_as_LGG``."""
    if not is_text_table(path) or not path.is_file():
        return False
    try:
        return any(_BETWEEN in str(column) for column in read_text_table(path).columns)
    except DataError:
        return False  # what is wrong is said where the table is read as predictions


def read_published(path: Path) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Compute metrics of each row's matrix, next to its descriptive columns.

    Args:
        path: CSV with a column ``TRUE_as_PREDICTED`` for each pair of classes, and any others; ``fold`` numbers the runs of a method.

    Returns:
        The other columns, the overall metrics, and ``precision_CLASS``, ``recall_CLASS``, ``f1_CLASS``; and the classes.

    Raises:
        DataError: a column is missing, or a count is not a whole number.
    """
    table = read_text_table(path)
    names = [str(column) for column in table.columns if _BETWEEN in str(column)]
    classes = tuple(dict.fromkeys(name.split(_BETWEEN)[0] for name in names))
    wanted = [f"{true}{_BETWEEN}{guess}" for true in classes for guess in classes]
    if lacking := [name for name in wanted if name not in names]:
        raise DataError(f"{path}: lacks the column {lacking[0]}; give a count for each true and predicted class")
    counts = table[wanted].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=np.float64)
    if not (np.isfinite(counts) & (counts >= 0) & (counts == np.round(counts))).all():
        raise DataError(f"{path}: a count is not a whole number; give numbers of samples")
    found = metrics_from_confusion(counts.reshape(-1, len(classes), len(classes)))
    by_class = {f"{key}_{name}": found[key][:, k] for key in ("precision", "recall", "f1") for k, name in enumerate(classes)}
    return table.drop(columns=names).assign(**{key: found[key] for key in _OVERALL}, **by_class), classes


def published_tables(path: Path) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Metrics of every run, their mean and standard deviation by method, and sentences on their interpretation.

    Raises:
        DataError: as :func:`read_published`.
    """
    runs, classes = read_published(path)
    by = [str(column) for column in runs.columns if column not in _RUN and not pd.api.types.is_numeric_dtype(runs[column])]
    shown = ["macro_f1", "balanced_accuracy", *(f"f1_{name}" for name in classes)]
    grouped = runs.groupby(by or (lambda _: "all"), sort=False)[shown]
    means = grouped.agg(["mean", "std"])
    means.columns = pd.Index([" ".join(column) for column in means.columns])
    per_run = [*by, *(column for column in _RUN if column in runs), *shown]
    tables = {"every run": runs[per_run], "mean and standard deviation over runs": means.reset_index()}
    return tables, [*_descriptions(grouped.size(), means.reset_index(), by, classes), _caution(int(grouped.size().max()))]


def _descriptions(number: pd.Series, means: pd.DataFrame, by: list[str], classes: tuple[str, ...]) -> list[str]:
    """One sentence per distilled student, compared with the same student without a teacher, if the columns name the teachers."""
    if not {"teacher", "student"} <= set(by):
        return []
    same = [column for column in by if column not in ("teacher", "experiment")]
    alone = means[means["teacher"] == ""].set_index(same)
    said = []
    for place, (_, row) in enumerate(means.iterrows()):
        key = row[same[0]] if len(same) == 1 else tuple(row[same])
        if row["teacher"] and key in alone.index:
            gains = [f"{name} F1 {row[f'f1_{name} mean'] - alone.loc[key, f'f1_{name} mean']:+.3f}" for name in classes]
            said.append(
                f"{row['teacher']} teaches {row['student']} ({number.iloc[place]} runs): {', '.join(gains)} against it alone; not tested."
            )
    return said


def _caution(number: int) -> str:
    return (
        f"Descriptive only: {number} runs per method on one test set, without patients or predictions, cannot be tested. "
        "Differences between rows may be due to the patients of the test set or to chance in training; these data cannot separate them."
    )
