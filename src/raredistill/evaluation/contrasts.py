"""Gains and patients' influences from two predictions tables, over the runs that both sides have completed: the input of the test."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from raredistill.errors import DataError
from raredistill.evaluation.gains import FEWEST_PATIENTS, Contrast, Layout
from raredistill.evaluation.ranking import area_influences
from raredistill.evaluation.sums import LOSSES, NEEDS, RANKED, gradients, parse_metric, patient_sums, scores_of
from raredistill.predictions import Predictions

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Cell = tuple[int, int, int]

_ABSENT = "{metric} has no value on these predictions: its class has no samples here; choose another class or part"
_UNEVEN = "{metric} has no value in every fold: a test part lacks its class or has nothing else; use fewer folds"
_FEW = "only {number} patients {kind} {name} are tested: {metric} is described, not tested (at least {least})"


@dataclass(frozen=True)
class Tally:
    """One side's predictions, summed by run and patient.

    Attributes:
        classes: K names.
        runs: T (repeat, seed), sorted.
        patients: P names, sorted.
        cells: finished (repeat, fold, seed).
        fold: ``(T, P)`` fold that tests a patient in a run; -1 if none does.
        sums: ``(T, P, 3 K + 3)`` as :func:`raredistill.evaluation.sums.patient_sums`.
        areas: by metric: each patient's area under the curve of his cell, and his influence on it, ``(T, P)``; NaN where undefined.
        carried: ``(P,)`` the label of a patient; empty if there is none.
        hard: only the predicted class is known.
    """

    classes: tuple[str, ...]
    runs: tuple[tuple[int, int], ...]
    patients: tuple[str, ...]
    cells: frozenset[Cell]
    fold: Integers
    sums: Floats
    areas: dict[str, tuple[Floats, Floats]]
    carried: NDArray[np.object_]
    hard: bool = False


@dataclass(frozen=True)
class Contrasts:
    """Contrasts of one pair on several metrics.

    Attributes:
        found: contrasts by metric.
        problems: why the other metrics have none, and why some of those found may only be described.
        missing: messages on cells without a result on one side or both; their runs are left out.
    """

    found: dict[str, Contrast] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


def tally(predictions: Predictions, metrics: Sequence[str] = ()) -> Tally:
    """Sum one side once, for any number of comparisons.

    Args:
        predictions: one part of one checkpoint; each run (repeat and seed) tests a patient in one fold.
        metrics: areas (``auroc:CLASS``, ``auprc:CLASS``) that will be needed; others need not be listed.

    Raises:
        ConfigError: unknown metric or class.
        DataError: a patient is tested by several folds of one run.
    """
    table = predictions.table
    places, runs = _codes(table, ["repeat", "seed"])
    of_row, patients = predictions.patients
    group, size = places * len(patients) + of_row, len(runs) * len(patients)
    folds = table["fold"].to_numpy()
    fold = np.full(size, -1, dtype=np.int64)
    fold[group] = folds
    if (fold[group] != folds).any():
        raise DataError("folds share test patients: these networks can be compared on them, a recipe cannot; use splits.protocol outer")
    shape = (len(runs), len(patients))
    sums = patient_sums(predictions, group, size).reshape(*shape, -1)
    wanted = {metric: place for metric in metrics for name, place in [parse_metric(metric, predictions.classes)] if name in RANKED}
    areas = {} if predictions.hard else _areas(predictions, wanted, group, shape)
    cells = frozenset(map(tuple, table[["repeat", "fold", "seed"]].drop_duplicates().to_numpy().tolist()))
    names = tuple((int(repeat), int(seed)) for repeat, seed in runs)
    carried = _carried(predictions, of_row)
    return Tally(predictions.classes, names, tuple(patients), cells, fold.reshape(shape), sums, areas, carried, predictions.hard)


def _codes(table: pd.DataFrame, columns: list[str]) -> tuple[Integers, list[tuple[int, ...]]]:
    """Index of each row's combination ``(N,)``, and the combinations, sorted."""
    names = sorted(map(tuple, table[columns].drop_duplicates().to_numpy().tolist()))
    code = pd.MultiIndex.from_tuples(names).get_indexer(pd.MultiIndex.from_frame(table[columns]))
    return code.astype(np.int64), names


def _carried(predictions: Predictions, of_row: Integers) -> NDArray[np.object_]:
    """Each patient's own label, or the rarest label of the patient's samples if the table has none."""
    table = predictions.table
    order = {name: place for place, name in enumerate(table["label"].value_counts().index)}
    rarest = table["label"].map(order).groupby(of_row).max()
    names = np.array(list(order), dtype=object)[rarest.to_numpy()]
    own = table["patient_label"].to_numpy(dtype=object)[np.unique(of_row, return_index=True)[1]]
    return np.asarray(np.where(own != "", own, names), dtype=object)


def _areas(predictions: Predictions, wanted: dict[str, int], group: Integers, shape: tuple[int, int]) -> dict[str, tuple[Floats, Floats]]:
    labels, probability = predictions.labels(), predictions.probabilities()
    found = {metric: (np.full(shape, np.nan), np.full(shape, np.nan)) for metric in wanted}
    cells = _codes(predictions.table, ["repeat", "fold", "seed"])[0]
    for rows in np.split(np.argsort(cells, kind="stable"), np.cumsum(np.bincount(cells))[:-1]) if wanted else ():
        members, of_row = np.unique(group[rows], return_inverse=True)
        for place in set(wanted.values()):
            by_name = area_influences(labels[rows] == place, probability[rows, place], of_row, len(members))
            for metric in (each for each, own in wanted.items() if own == place):
                area, influence = by_name[metric.partition(":")[0]]
                found[metric][0].flat[members], found[metric][1].flat[members] = area, influence
    return found


def contrasts(control: Tally, other: Tally, metrics: Sequence[str], rare: str, *, expected: Collection[Cell] | None = None) -> Contrasts:
    """Compare two sides by several metrics, over the runs that both have completed.

    Args:
        control: first side.
        other: second side; differences are this one minus the control.
        metrics: names as in :func:`raredistill.evaluation.bootstrap.patient_bootstrap`.
        rare: the rare class, by which patients are divided.
        expected: the (repeat, fold, seed) of the study; by default all folds that occur, in each repeat and seed that occurs.

    Raises:
        ConfigError: unknown metric or class.
        DataError: classes, samples or folds differ, or no run is complete on both sides.
    """
    if control.classes != other.classes:
        raise DataError(f"the two tables have different classes: {list(control.classes)} and {list(other.classes)}; compare one cohort")
    wanted = frozenset(expected) if expected is not None else _expected(control.cells | other.cells)
    missing = missing_cells(control.cells, other.cells, wanted)
    sides = _aligned(control, other, wanted)
    rare_patients = sides[0].carried == rare
    layout = Layout(sides[0].runs, sides[0].patients, sides[0].fold, rare_patients)
    found, problems = _found(sides, metrics, layout)
    problems |= _few(sides[0], {metric: each for metric, each in found.items() if metric not in problems}, rare)
    return Contrasts(found, problems, missing)


def _expected(cells: frozenset[Cell]) -> frozenset[Cell]:
    folds = {fold for _, fold, _ in cells}
    return frozenset((repeat, fold, seed) for repeat, seed in {(r, s) for r, _, s in cells} for fold in folds)


def missing_cells(control: Collection[Cell], other: Collection[Cell], expected: Collection[Cell]) -> tuple[str, ...]:
    """Cells without a result, each with the side or sides that lack it."""
    said = []
    for cell in sorted(expected):
        lacking = [cell not in control, cell not in other]
        if any(lacking):
            side = "both sides" if all(lacking) else "the control" if lacking[0] else "the other side"
            said.append("repeat {}, fold {}, seed {} is missing on {}".format(*cell, side))
    return tuple(said)


def _aligned(control: Tally, other: Tally, expected: frozenset[Cell]) -> tuple[Tally, Tally]:
    """Both sides, restricted to the runs that both have completed, with patients in the same order."""
    complete = [run for run in control.runs if run in set(other.runs) and _cells_of(run, expected) <= control.cells & other.cells]
    if not complete:
        raise DataError("no repeat and seed has all its folds on both sides: the difference can be described, not tested; finish its runs")
    sides = [_of_runs(side, complete) for side in (control, other)]
    if lone := sorted({*sides[0].patients} ^ {*sides[1].patients}):
        raise DataError(f"the two tables predict different samples: patient {lone[0]} is on one side only; compare runs of the same splits")
    _check_same(*sides)
    return sides[0], sides[1]


def _cells_of(run: tuple[int, int], expected: frozenset[Cell]) -> set[Cell]:
    return {cell for cell in expected if (cell[0], cell[2]) == run}


def _of_runs(side: Tally, runs: Sequence[tuple[int, int]]) -> Tally:
    places = [side.runs.index(run) for run in runs]
    if places == list(range(len(side.runs))) and (side.fold >= 0).all():
        return side
    kept = np.asarray((side.fold[places] >= 0).any(axis=0))
    fold = side.fold[places][:, kept]
    if (fold < 0).any():
        run, patient = np.argwhere(fold < 0)[0]
        name = np.array(side.patients, dtype=object)[kept][patient]
        raise DataError(f"patient {name} is not tested in repeat {runs[run][0]}, seed {runs[run][1]}; each run must test every patient")
    areas = {metric: (area[places][:, kept], own[places][:, kept]) for metric, (area, own) in side.areas.items()}
    patients = tuple(name for name, there in zip(side.patients, kept, strict=True) if there)
    return replace(side, runs=tuple(runs), patients=patients, fold=fold, sums=side.sums[places][:, kept], areas=areas,
                   carried=side.carried[kept])  # fmt: skip


def _check_same(control: Tally, other: Tally) -> None:
    if (apart := control.fold != other.fold).any():
        run, patient = np.argwhere(apart)[0]
        raise DataError(
            f"patient {control.patients[patient]} is tested in another fold by the second side (repeat {control.runs[run][0]}); "
            "compare runs of the same splits"
        )
    classes = len(control.classes)
    actual = slice(classes, 2 * classes)
    if (apart := (control.sums[..., actual] != other.sums[..., actual]).any(axis=(0, 2))).any():
        patient = control.patients[int(apart.argmax())]
        raise DataError(f"patient {patient} has other samples or labels in the second table; prepare both alike")


def _found(sides: tuple[Tally, Tally], metrics: Sequence[str], layout: Layout) -> tuple[dict[str, Contrast], dict[str, str]]:
    parsed = {metric: parse_metric(metric, sides[0].classes) for metric in metrics}
    ranked = [metric for metric, (name, _) in parsed.items() if name in RANKED]
    counted = [metric for metric in metrics if metric not in ranked]
    by_metric = {**_of_sums(sides, counted, [parsed[each] for each in counted], layout), **_of_areas(sides, ranked, layout)}
    needs = {metric: NEEDS.format(metric=metric) for metric in metrics if sides[0].hard and _needs_probabilities(metric)}
    absent = {metric: (_UNEVEN if metric in ranked and _present(sides[0], parsed[metric][1]) else _ABSENT).format(metric=metric)
              for metric, each in by_metric.items() if np.isnan(each.gain) or np.isnan(each.values).any()}  # fmt: skip
    problems = absent | needs
    return {metric: by_metric[metric] for metric in metrics if metric in by_metric and metric not in problems}, problems


def _needs_probabilities(metric: str) -> bool:
    return metric.partition(":")[0] in (*RANKED, *LOSSES)


def _present(side: Tally, place: int) -> bool:
    return bool(side.sums[..., len(side.classes) + place].any())


def _of_sums(sides: tuple[Tally, Tally], metrics: list[str], parsed: list[tuple[str, int]], layout: Layout) -> dict[str, Contrast]:
    if not metrics:
        return {}
    scores = [scores_of(side.sums.sum(axis=1), parsed).mean(axis=1) for side in sides]
    slopes = [gradients(side.sums.sum(axis=1).mean(axis=0), parsed) for side in sides]
    values = sides[1].sums @ slopes[1].T - sides[0].sums @ slopes[0].T
    gains = scores[1] - scores[0]
    counts, losses = _apart(sides, slice(None, -3)), _apart(sides, slice(-3, None))
    return {
        metric: Contrast(float(gains[place]), values[..., place], layout, losses if parsed[place][0] in LOSSES else counts)
        for place, metric in enumerate(metrics)
    }


def _apart(sides: tuple[Tally, Tally], columns: slice) -> NDArray[np.bool_]:
    return np.asarray((sides[0].sums[..., columns] != sides[1].sums[..., columns]).any(axis=(0, 2)))


def _of_areas(sides: tuple[Tally, Tally], metrics: list[str], layout: Layout) -> dict[str, Contrast]:
    """Gains in areas, as means over cells, since areas rank within one network's test part; a cell's level is spread over its patients."""
    found = {}
    members = np.stack([np.bincount(fold, minlength=int(layout.fold.max()) + 1)[fold] for fold in layout.fold])
    for metric in (each for each in metrics if all(each in side.areas for side in sides)):
        (first, own), (second, others) = (side.areas[metric] for side in sides)
        gained = second - first
        gain = float((gained / members).sum() / (layout.folds * len(layout.runs)))
        values = (others - own + (gained - gain) / members) / layout.folds
        found[metric] = Contrast(gain, values, layout, _apart(sides, slice(-3, None)))
    return found


def _few(side: Tally, found: dict[str, Contrast], rare: str) -> dict[str, str]:
    """Metrics of a class that too few patients have, or too few do not have."""
    said = {}
    for metric in found:
        name = metric.partition(":")[2] or rare
        place = len(side.classes) + side.classes.index(name)
        carriers = int((side.sums[0, :, place] > 0).sum()) if name != rare else int((side.carried == rare).sum())
        others = len(side.patients) - carriers if name == rare else FEWEST_PATIENTS
        for kind, number in (("with", carriers), ("without", others)):
            if number < FEWEST_PATIENTS:
                said[metric] = _FEW.format(number=number, kind=kind, name=name, metric=metric, least=FEWEST_PATIENTS)
    return said
