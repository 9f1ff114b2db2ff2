"""Comparison of every distilled entry with its control: all metrics, each with the test that the protocol allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from raredistill.errors import RareDistillError
from raredistill.evaluation.bootstrap import check_same, tested_once
from raredistill.evaluation.differences import Differences, Evidence, differences_of, in_folds, weigh
from raredistill.evaluation.gains import Gain
from raredistill.predictions import Predictions
from raredistill.reports.decision import Decision, Sides, decide, rare_kept
from raredistill.reports.results import Results
from raredistill.runs.record import RunRecord

RESAMPLES = 2000
EQUAL_SIZE = 1.05
"""A teacher whose number of parameters is within five per cent of the student's counts as equal in size."""

SAME = ("model", "loss", "channels", "network")
"""Fields of a record that are equal to its control's: network, initial weights, channels and loss recipe."""


@dataclass(frozen=True)
class Pair:
    """A distilled entry and the baseline that differs from it only in the teacher.

    Attributes:
        entry: its name.
        control: the baseline's name; empty if the study has none.
        teacher: the name of the teacher's entry, or the file of an external teacher.
        ratio: ratio of the teacher's parameters to the student's; NaN for an external teacher.
        sides: test predictions of control and entry over the cells that both have finished; None without predictions.
        differences: entry minus control, by metric.
        evidence: tests of these differences; metrics that cannot be tested are left out.
        problem: why the rare class's F1 has no reference test; empty if it has one.
        decision: the gain test, which alone decides.
        shared: whether all runs share one test set, so that only these networks can be compared.
    """

    entry: str
    control: str
    teacher: str
    ratio: float
    sides: tuple[Predictions, Predictions] | None = None
    differences: dict[str, Differences] = field(default_factory=dict)
    evidence: dict[str, Evidence] = field(default_factory=dict)
    problem: str = ""
    decision: Decision = field(default_factory=Decision)
    shared: bool = False

    @property
    def relation(self) -> str:
        """Size of the teacher relative to the student's: ``larger``, ``equal``, ``smaller``, or ``unknown``."""
        if math.isnan(self.ratio):
            return "unknown"
        if 1 / EQUAL_SIZE <= self.ratio <= EQUAL_SIZE:
            return "equal"
        return "larger" if self.ratio > 1 else "smaller"


def make_pairs(results: Results) -> list[Pair]:
    """Compare every distilled entry with its control, in the order of the study."""
    sides = Sides(results.whole, results.study.rare, metrics_of(results.study.rare, results.study.cohort.classes))
    return [_pair(results, name, sides) for name in results.entries if results.first(name).kind == "distilled"]


def control_of(results: Results, name: str) -> str:
    """Name of the baseline that differs from an entry only in the teacher; empty if the study has none.

    Of several, the one with the most similar training settings; remaining differences are reported among the controls, as its budget.
    """
    own = results.first(name)
    others = [results.first(other) for other in results.entries if other != name]
    found = [run.name for run in others if run.kind == "baseline" and all(getattr(run, key) == getattr(own, key) for key in SAME)]
    return min(found, key=lambda other: _differing(results.settings(name) or {}, results.settings(other) or {}), default="")


def _differing(one: dict[str, Any], other: dict[str, Any]) -> int:
    return sum(one.get(key) != other.get(key) for key in {*one, *other})


def metrics_of(rare: str, classes: Sequence[str]) -> list[str]:
    """Metrics for comparing pairs: first the rare class's F1, then metrics that explain it, then every class."""
    named = [f"{metric}:{rare}" for metric in ("f1", "recall", "precision", "auprc", "auroc")]
    others = [f"{metric}:{name}" for name in classes if name != rare for metric in ("f1", "recall")]
    return [*named, "macro_f1", "balanced_accuracy", *others]


def _pair(results: Results, name: str, tallies: Sides) -> Pair:
    run, control = results.first(name), control_of(results, name)
    fixed: dict[str, Any] = {"entry": name, "control": control, "teacher": run.teacher_name, "ratio": _ratio(results, run)}
    cells = results.cells(name) & results.cells(control)
    if not control or not cells:
        problem = "the study has no finished baseline of the same network, loss recipe and channels"
        return Pair(**fixed, problem=problem, decision=Decision(reason=problem))
    sides = results.pooled(control, cells), results.pooled(name, cells)
    if sides[0] is None or sides[1] is None:
        return Pair(**fixed, problem="the runs have no test part", decision=Decision(reason="the runs have no test part"))
    rare = results.study.rare
    teacher = run.teacher_name if run.teacher_name in results.entries and results.of(run.teacher_name) else ""
    kept = rare_kept(results.study.config, rare)
    decision = decide(tallies, control, name, teacher, expected=results.expected(name, control), kept=kept)
    pair = Pair(**fixed, decision=decision, shared=not tested_once(sides[0]) or not in_folds(sides[0]))
    return compared(pair, (sides[0], sides[1]), metrics_of(rare, results.study.cohort.classes), results.sizes)


def compared(pair: Pair, sides: tuple[Predictions, Predictions], metrics: list[str], sizes: tuple[float, float] | None) -> Pair:
    """The pair with its two sides (control first) compared by every metric; the first metric decides whether there is a problem."""
    try:
        check_same(*sides)
    except RareDistillError as error:
        # In an unfinished study, whose seeds differ by fold, the gain test uses the complete runs, but the references cannot.
        return replace(pair, problem=str(error))
    found, problems = differences_of(*sides, metrics, sizes=sizes, resamples=RESAMPLES)
    evidence: dict[str, Evidence] = {}
    for metric, each in found.items():
        try:
            evidence[metric] = weigh(each)
        except RareDistillError as error:
            problems[metric] = str(error)
    return replace(pair, sides=sides, differences=found, evidence=evidence, problem=problems.get(metrics[0], ""))


def _ratio(results: Results, run: RunRecord) -> float:
    teachers = [other for other in results.study.runs if other.name == run.teacher_name]
    return teachers[0].parameters / run.parameters if teachers and run.parameters else float("nan")


def comparisons(pairs: list[Pair]) -> pd.DataFrame:
    """All pairs and metrics with their tests (the gain test if it applies): the source of the forest plot and of the verdicts."""
    columns = ["entry", "control", "metric", "difference", "low", "high", "p", "detectable", "worse", "equal", "better", "basis", "values"]
    rows = []
    for pair in pairs:
        for metric, found in pair.differences.items():
            reference, gain = pair.evidence.get(metric), pair.decision.gains.get(metric)
            tested: Gain | Evidence | None = gain or reference
            numbers = [getattr(tested, key, np.nan) for key in ("low", "high", "p", "detectable")]
            numbers += [getattr(reference, key, np.nan) for key in ("worse", "equal", "better")]
            seen, basis, values = (gain.gain, "gain test", gain.runs) if gain else (found.estimate, found.basis, len(found.values))
            rows.append((pair.entry, pair.control, metric, seen, *numbers, basis, values))
    return pd.DataFrame(rows, columns=columns)


def seen_gain(pair: Pair, rare: str) -> float | None:
    """The gain in the rare class's F1 for a pair's verdict; on a shared test set or without a complete run, the gain so far."""
    if pair.decision.seen is not None and not pair.shared:
        return pair.decision.seen
    found = pair.differences.get(f"f1:{rare}")
    return found.estimate if found else None


def fold_differences(pairs: list[Pair]) -> pd.DataFrame:
    """Differences by fold and repeat, the input of the corrected t-test; empty for a shared test set."""
    rows = [
        (pair.entry, pair.control, metric, place, float(value))
        for pair in pairs
        for metric, found in pair.differences.items()
        if found.basis == "folds"
        for place, value in enumerate(found.values)
    ]
    return pd.DataFrame(rows, columns=["entry", "control", "metric", "split", "difference"])
