"""Looks at a study: every pair's gain so far, and the pairs that are settled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from raredistill.evaluation.looks import Looks, State, looks_table, settle
from raredistill.reports.decision import rare_kept
from raredistill.reports.pairs import make_pairs
from raredistill.reports.results import Results, read_results
from raredistill.reports.verdicts import tested
from raredistill.runs.layout import StudyFolder
from raredistill.studies.looks import read_states

COLUMNS = ("entry", "repeats", "alpha", "gain", "p_holm", "outcome")


def take_look(study: Path, rule: Looks, place: int, before: Mapping[str, State]) -> dict[str, State]:
    """Test the pairs of a study on its finished runs, and settle those that the look decides; pairs that cannot be tested stay open."""
    results = read_results(study)
    found = {pair.entry: pair.decision.gain for pair in tested(make_pairs(results)) if pair.decision.gain is not None}
    return settle(rule, place, found, before, kept=rare_kept(results.study.config, results.study.rare))


def needed_by(study: Path) -> dict[str, list[str]]:
    """Each distilled entry with the names of its control and its teachers in the study."""
    results = read_results(study)
    return {pair.entry: [name for name in (pair.control, pair.teacher) if name in results.entries] for pair in make_pairs(results)}


def rule_of(results: Results) -> Looks | None:
    """The stopping rule of a study; None if it runs all its repeats."""
    given = results.study.config.get("evidence") or {}
    if not given.get("looks"):
        return None
    return Looks(tuple(given["looks"]), tuple(given["alpha"]), given.get("margin"), given.get("wanted"))


def states_of(study: Path, results: Results) -> dict[str, State] | None:
    """The state of each pair after the looks; None for a study without looks."""
    rule = rule_of(results)
    return None if rule is None else read_states(StudyFolder(study), rule)


def rows_of_looks(states: Mapping[str, State] | None, results: Results) -> pd.DataFrame:
    """Results of the looks, one row per pair and look; without columns for a study without looks."""
    rule = rule_of(results)
    if rule is None:
        return pd.DataFrame()
    return pd.DataFrame(looks_table(states or {}, rule), columns=list(COLUMNS))


def spared(states: Mapping[str, State] | None, results: Results) -> int:
    """Number of runs that were not needed because their pairs were settled, once no pair is open."""
    if not states or any(state.outcome == "open" for state in states.values()):
        return 0
    return sum(run.status == "waiting" for run in results.study.runs)
