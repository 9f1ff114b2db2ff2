"""Comparison of two sides: runs, studies, or prediction files of any program."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raredistill.errors import DataError
from raredistill.evaluation.bootstrap import check_same
from raredistill.evaluation.compare import wilcoxon_over_datasets
from raredistill.evaluation.contrasts import tally
from raredistill.evaluation.differences import FEW_PATIENTS, in_folds, side_sizes
from raredistill.evaluation.levels import by_patient, has_patients
from raredistill.evaluation.subgroups import groups_of, subgroup_gains
from raredistill.evaluation.sums import parse_metric
from raredistill.evaluation.verdicts import signed
from raredistill.predictions import Predictions, concatenate, read
from raredistill.reports.decision import Decision, Sides, decide, last_matched
from raredistill.reports.folder import refuse_foreign
from raredistill.reports.pairs import Pair, compared, comparisons, metrics_of
from raredistill.reports.results import Results, read_results
from raredistill.reports.verdicts import verdicts
from raredistill.runs.drafts import checked_record
from raredistill.runs.layout import RunFolder


@dataclass(frozen=True)
class Versus:
    """A comparison to print: ``rows`` by level and metric, ``sentences`` with the verdict, ``gain`` in the first metric, gains by group."""

    rows: pd.DataFrame
    sentences: list[str]
    gain: float
    groups: pd.DataFrame = field(default_factory=pd.DataFrame)


def versus(
    first: Path, second: Path, *, metric: str | None = None, background: str | None = None, groups: tuple[Path, str] | None = None
) -> Versus:
    """Compare two runs, two studies or two prediction files; the first is the control.

    Args:
        first: a study's folder, a run's folder, or a predictions file (CSV or Parquet).
        second: the same kind; in two studies, entries with the same name are compared.
        metric: a name as in :func:`raredistill.evaluation.bootstrap.patient_bootstrap`; by default the F1 of the rarest class comes first.
        background: the class that is not a patient's label, in files of other programs.
        groups: a CSV file with the column ``patient``, and the column by which gains are also reported.

    Raises:
        ConfigError: unknown metric or class.
        DataError: a file cannot be read, the sides do not match, or nothing can be tested.
    """
    sides = _studies(first, second) if _is_study(first) and _is_study(second) else [_files(first, second, background)]
    rare = rarest(sides[0][1])
    wanted = metrics_of(rare, sides[0][1].classes)
    if metric is not None:
        parse_metric(metric, sides[0][1].classes)
        wanted = [metric]
    pairs = [_pair(names, control, other, wanted) for names, control, other in sides]
    if untested := [pair.problem for pair in pairs if pair.problem and not pair.differences]:
        raise DataError(untested[0])
    gain = pairs[0].differences[wanted[0]].estimate
    by_group = pd.DataFrame() if groups is None else _by_group(sides[0][1], sides[0][2], read_groups(*groups), wanted[:1], rare)
    return Versus(_rows(pairs, wanted), _sentences(pairs, rare, metric), gain, by_group)


def read_groups(path: Path, column: str) -> dict[str, str]:
    """The group of every patient of a table; numbers with many values are cut into thirds.

    Raises:
        DataError: the file cannot be read, lacks a column, or gives a patient two groups.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error})") from None
    if lacking := [name for name in ("patient", column) if name not in table]:
        raise DataError(f"{path}: has no column {lacking[0]}; its columns are {', '.join(map(str, table.columns))}")
    values = table[["patient", column]].drop_duplicates()
    if (twice := values["patient"].duplicated()).any():
        raise DataError(f"{path}: patient {values['patient'][twice].iloc[0]} has two values in {column}; give one")
    return groups_of(dict(zip(values["patient"], values[column], strict=True)))


def _by_group(first: Predictions, second: Predictions, groups: dict[str, str], metrics: list[str], rare: str) -> pd.DataFrame:
    sides = [tally(last_matched(side, rare)) for side in (first, second)]
    return subgroup_gains(sides[0], sides[1], groups, metrics, rare)


def over_datasets(gains: list[float]) -> str:
    """The sentence on several pairs, one per data set.

    Raises:
        DataError: there are fewer than two.
    """
    p, smallest = wilcoxon_over_datasets(gains)
    return (
        f"Over {len(gains)} data sets: mean difference {signed(float(np.mean(gains)))}, Wilcoxon signed-rank p = {p:.3g} "
        f"({len(gains)} data sets cannot reach a p below {smallest:.3g})."
    )


def rarest(predictions: Predictions) -> str:
    """The class with the fewest samples among those that a patient can have."""
    counts = predictions.table["label"].value_counts()
    return min((name for name in predictions.classes if name != predictions.background and name in counts), key=lambda name: counts[name])


def _is_study(path: Path) -> bool:
    return (path / "study.json").is_file()


def _files(first: Path, second: Path, background: str | None) -> tuple[tuple[str, str], Predictions, Predictions]:
    paths = [RunFolder(path).predictions if path.is_dir() else path for path in (first, second)]
    tables = [_own(read(path, background=background), path) for path in paths]
    if tables[0].classes != tables[1].classes:
        # Files of other programs may order their columns differently, and hard labels show only classes that occur.
        classes = list(dict.fromkeys([*tables[0].classes, *tables[1].classes]))
        tables = [read(path, classes=classes, background=background) for path in paths]
    return (str(first), str(second)), tables[0], tables[1]


def _own(table: Predictions, path: Path) -> Predictions:
    """Read the table; one that lies next to a run's record is first compared with it."""
    folder = RunFolder(path.parent)
    if path.name == folder.predictions.name and folder.record.is_file():
        refuse_foreign(table, checked_record(folder, [path.name]), path)
    return table


def _studies(first: Path, second: Path) -> list[tuple[tuple[str, str], Predictions, Predictions]]:
    results = [read_results(path) for path in (first, second)]
    found = []
    for entry in [name for name in results[0].entries if name in results[1].entries]:
        cells = results[0].cells(entry) & results[1].cells(entry)
        if cells:
            tables = [_whole(each, entry, cells) for each in results]
            found.append(((f"{entry} in {first}", f"{entry} in {second}"), tables[0], tables[1]))
    if not found:
        raise DataError(f"{first} and {second} have no finished run of the same name; compare two runs' folders instead")
    return found


def _whole(results: Results, entry: str, cells: set[Any]) -> Predictions:
    parts = [part for part in (results.pooled(entry, cells, split) for split in ("test", "validation")) if part is not None]
    return concatenate(parts)


def _pair(names: tuple[str, str], first: Predictions, second: Predictions, metrics: list[str]) -> Pair:
    sides = first.part("test"), second.part("test")
    check_same(*sides)
    folds = in_folds(sides[0])
    sizes = side_sizes(first.checkpoint("best")) if folds else None
    decision = decide(Sides(dict(zip(names, (first, second), strict=True)).get, rarest(sides[1]), metrics), *names) if folds else Decision()
    pair = Pair(names[1], names[0], "", float("nan"), decision=decision, shared=not folds)
    return compared(pair, sides, metrics, sizes)


def _rows(pairs: list[Pair], metrics: list[str]) -> pd.DataFrame:
    tables = []
    for pair in pairs:
        tables.append(comparisons([pair]).assign(level="slice"))
        if pair.sides is not None and has_patients(pair.sides[0]) and has_patients(pair.sides[1]):
            patients = by_patient(pair.sides[0]), by_patient(pair.sides[1])
            there = [metric for metric in metrics if ":" not in metric or metric.partition(":")[2] in patients[0].classes]
            tables.append(comparisons([compared(pair, patients, there, _sizes_of(pair))]).assign(level="patient"))
    shown = ["level", "metric", "difference", "low", "high", "p", "detectable", "basis"]
    table = pd.concat(tables, ignore_index=True)
    if len(pairs) == 1:
        return table[shown]
    # For many pairs, only the leading metrics are printed; the report of a study has the rest.
    return table[(table["level"] == "slice") & table["metric"].isin([metrics[0], "macro_f1"])][["entry", *shown]]


def _sizes_of(pair: Pair) -> tuple[float, float] | None:
    found = next(iter(pair.differences.values()))
    return (found.train_size, found.test_size) if found.basis == "folds" else None


def _sentences(pairs: list[Pair], rare: str, metric: str | None) -> list[str]:
    said = []
    if metric is None:
        for record in verdicts(pairs, rare):
            said += [f"{record['sentence']} ({record['basis']})" if record["basis"] else record["sentence"], *record["notes"]]
    elif pairs[0].shared:
        said.append("One test set: the interval is over its patients, and the variance of training is not covered.")
    table = pairs[0].sides[0].table if pairs[0].sides else pd.DataFrame()
    patients = table.loc[table["label"] == rare, "patient"].nunique()
    if patients < FEW_PATIENTS:
        said.append(f"Warning: only {patients} patients with {rare} are tested: expect wide intervals and no proof of small gains.")
    return said
