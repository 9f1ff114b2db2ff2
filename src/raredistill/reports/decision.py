"""The decision on a pair: the gain test on the last epoch with a threshold matched on validation; argmax and best are also reported."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from raredistill.errors import RareDistillError
from raredistill.evaluation.compare import swap_within_cells
from raredistill.evaluation.contrasts import Tally, contrasts, tally
from raredistill.evaluation.gains import Contrast, Gain, assess, closed_gap
from raredistill.evaluation.thresholds import matched_shift
from raredistill.evaluation.verdicts import not_learned
from raredistill.predictions import Predictions

View = Callable[[Predictions, str], Predictions]
Cell = tuple[int, int, int]


@dataclass(frozen=True)
class Decision:
    """A pair's gain in the rare class's F1.

    Attributes:
        gain: the tested gain; None if it can only be described.
        contrast: the contrast behind it, for slopes over pairs.
        reason: why the gain may only be described; empty if it was tested.
        missing: messages on cells that a side lacks.
        beside: gains in the other views, by name (``argmax``, ``best checkpoint``).
        closed: share of the teacher's advantage that the student reaches, with its interval; None if no advantage is shown.
        rare_patients: number of tested patients with the rare class.
        seen: the observed gain, even if nothing was tested but the sides can be compared.
        gains: gains of all metrics that could be tested, by name; only the rare class's F1 decides.
        swap_p: of "the teacher changes nothing at all in this cohort"; a reference that decides nothing.
    """

    gain: Gain | None = None
    contrast: Contrast | None = None
    reason: str = ""
    missing: tuple[str, ...] = ()
    beside: dict[str, Gain] = field(default_factory=dict)
    closed: tuple[float, float, float] | None = None
    rare_patients: int = 0
    seen: float | None = None
    gains: dict[str, Gain] = field(default_factory=dict)
    swap_p: float | None = None


def last_matched(whole: Predictions, rare: str) -> Predictions:
    """Test predictions of the last epoch, with each run's rare logit shifted to predict the right number of rare samples on validation."""
    test = last_argmax(whole, rare)
    table, place = whole.table, whole.classes.index(rare)
    chosen = (table["split"] == "validation") & (table["checkpoint"] == test.table["checkpoint"].iloc[0])
    if whole.hard or not chosen.any():
        return test
    validation = whole.rows(np.flatnonzero(chosen))
    shift = np.zeros(len(test.table))
    groups = test.table.groupby(["repeat", "fold", "seed"]).indices
    for cell, rows in validation.table.groupby(["repeat", "fold", "seed"]).indices.items():
        if cell in groups:
            shift[groups[cell]] = matched_shift(validation.labels()[rows] == place, validation.logits()[rows], place)
    moved = test.logits().copy()
    moved[:, place] -= shift
    return test.with_logits(moved)


def last_argmax(whole: Predictions, rare: str) -> Predictions:
    """Test predictions of the last epoch, unchanged; in files with a single checkpoint, of that one."""
    there = set(whole.table.loc[whole.table["split"] == "test", "checkpoint"])
    return whole.part("test", "last" if "last" in there else "best")


def best_argmax(whole: Predictions, rare: str) -> Predictions:
    """Test predictions of the best checkpoint on validation."""
    there = set(whole.table.loc[whole.table["split"] == "test", "checkpoint"])
    return whole.part("test", "best" if "best" in there else "last")


SWAPS = 1999
DECIDING = "last epoch, threshold matched on validation"
BESIDE: dict[str, View] = {"argmax": last_argmax, "best checkpoint": best_argmax}
VIEWS: dict[str, View] = {DECIDING: last_matched, **BESIDE}


class Sides:
    """Predictions of entries by name, summed once for all pairs."""

    def __init__(self, whole: Callable[[str], Predictions | None], rare: str, metrics: Sequence[str] = ()) -> None:
        self._whole, self.rare = whole, rare
        self.metrics = list(dict.fromkeys([f"f1:{rare}", *metrics]))
        self._known: dict[tuple[str, str], Tally] = {}

    def tally(self, name: str, view: str) -> Tally | None:
        """An entry's tally in a view; None without predictions."""
        if (name, view) not in self._known:
            whole = self._whole(name)
            if whole is None or not (whole.table["split"] == "test").any():
                return None
            self._known[name, view] = tally(VIEWS[view](whole, self.rare), self.metrics if view == DECIDING else ())
        return self._known[name, view]


def decide(
    sides: Sides, control: str, other: str, teacher: str = "", *, expected: Collection[Cell] | None = None, kept: float = 1.0
) -> Decision:
    """Test a pair in every view.

    Args:
        sides: predictions by name.
        control: name of the first side.
        other: name of the second.
        teacher: name of the second side's teacher; empty without one in this study.
        expected: the planned cells of a side.
        kept: share of the rare class's patients that training keeps.
    """
    metric = f"f1:{sides.rare}"
    try:
        tallies = _both(sides, control, other, DECIDING)
        made = contrasts(*tallies, sides.metrics, sides.rare, expected=expected)
    except RareDistillError as error:
        return Decision(reason=str(error).rstrip("."))
    if metric not in made.found:
        return Decision(reason=made.problems[metric].rstrip("."), missing=made.missing)
    contrast = made.found[metric]
    rare = int(contrast.layout.rare.sum())
    try:
        gains = dict(zip(made.found, assess(list(made.found.values()), kept=kept), strict=True))
    except RareDistillError as error:
        return Decision(None, contrast, str(error).rstrip("."), made.missing, rare_patients=rare, seen=contrast.gain)
    reason = made.problems.get(metric, "") or _not_learned(sides, {"control": control, "entry": other, "teacher": teacher})
    beside = {view: found for view in BESIDE if (found := _beside(sides, control, other, view, expected, kept)) is not None}
    closed = _closed(sides, control, teacher, contrast, expected, kept) if teacher else None
    return Decision(
        gains[metric],
        contrast,
        reason.rstrip("."),
        made.missing,
        beside,
        closed,
        rare,
        contrast.gain,
        gains,
        swap_p(*tallies, contrast, sides.rare),
    )


def swap_p(control: Tally, other: Tally, contrast: Contrast, rare: str) -> float:
    """p-value of the swap test within cells, over the runs of a contrast."""
    layout, place, classes = contrast.layout, control.classes.index(rare), len(control.classes)
    cells = [(run, np.flatnonzero(layout.fold[run] == fold)) for run in range(len(layout.runs)) for fold in np.unique(layout.fold[run])]
    counts = []
    for side in (control, other):
        places = {name: number for number, name in enumerate(side.patients)}
        kept = [places[name] for name in layout.patients]
        sums = side.sums[[side.runs.index(run) for run in layout.runs]][:, kept]
        counts.append([[sums[run, members, column].sum() for run, members in cells] for column in (place, 2 * classes + place)])
    actual = float(control.sums[control.runs.index(layout.runs[0]), :, classes + place].sum())
    right, called = np.swapaxes(np.array(counts), 0, 1)
    return swap_within_cells(right, called, actual, [run for run, _ in cells], draws=SWAPS)


def _both(sides: Sides, control: str, other: str, view: str) -> tuple[Tally, Tally]:
    first, second = sides.tally(control, view), sides.tally(other, view)
    if first is None or second is None:
        raise RareDistillError("a side has no finished run with a test part")
    return first, second


def _beside(sides: Sides, control: str, other: str, view: str, expected: Collection[Cell] | None, kept: float) -> Gain | None:
    metric = f"f1:{sides.rare}"
    try:
        made = contrasts(*_both(sides, control, other, view), [metric], sides.rare, expected=expected)
        return assess([made.found[metric]], kept=kept)[0]
    except (RareDistillError, KeyError):
        return None


def _not_learned(sides: Sides, names: dict[str, str]) -> str:
    for role, name in names.items():
        for view in (DECIDING, "argmax"):
            side = sides.tally(name, view) if name else None
            if side is not None and (reason := not_learned(side, sides.rare)):
                return f"of the {role} {name}, {reason}" if reason.startswith("a network") else f"the {role} {name} did not learn: {reason}"
    return ""


def _closed(
    sides: Sides, control: str, teacher: str, student: Contrast, expected: Collection[Cell] | None, kept: float
) -> tuple[float, float, float] | None:
    metric = f"f1:{sides.rare}"
    try:
        made = contrasts(*_both(sides, control, teacher, DECIDING), [metric], sides.rare, expected=expected)
        return closed_gap(student, made.found[metric], kept=kept)
    except (RareDistillError, KeyError):
        return None


def rare_kept(config: dict[str, object], rare: str) -> float:
    """Share of the rare class's patients that training keeps, according to a study's configuration."""
    splits = config.get("splits")
    rarefy = splits.get("rarefy") if isinstance(splits, dict) else None
    return float(rarefy.get(rare, 1.0)) if isinstance(rarefy, dict) else 1.0
