"""The power of a study before its first epoch: from a pilot on its own cohort, or from stated assumptions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from raredistill.evaluation.planning import Forecast, Pilot, floor_sentence, forecast, power_table, runs_needed

LEVEL = 0.05
FOLDS = (3, 5, 10)
REPEATS = (2, 3, 4, 6, 8, 10, 15, 20)
_ALIKE, _APART, _INTERACTION, _TRAINING = 0.0012, 0.021, 0.032, 0.006
"""V_P - V_I of arms that differ little and of arms that differ as two methods do, V_I of one run (all times the rare patients), and V_M of
one network: simulated, benchmarks/sim_gain.py, where a single network's F1 has a standard deviation of 0.05 by training alone."""


@dataclass(frozen=True)
class Plan:
    """The power of a design.

    Attributes:
        forecast: forecast at Holm's level.
        alone: forecast for one comparison at 5 %.
        repeats: repeats of the design.
        folds: folds of the design.
        trainings: total number of networks to train.
        basis: source of the variances.
        table: power by repeats (rows) and true gain (columns), at Holm's level.
        designs: cheapest number of repeats for each number of folds that shows the wanted gain; without rows where none was asked for.
        sentences: the answer in words.
    """

    forecast: Forecast
    alone: Forecast
    repeats: int
    folds: int
    trainings: int
    basis: str
    table: pd.DataFrame
    designs: pd.DataFrame
    sentences: list[str]


def assumed(rare_patients: int, folds: int, *, alike: bool = True) -> Pilot:
    """A pilot of two runs for a cohort without one: the simulated scenarios, scaled with the rare patients.

    Args:
        rare_patients: that are tested.
        folds: networks of a run.
        alike: a student and its control that differ little; otherwise they differ as two methods do.
    """
    interaction = _INTERACTION / rare_patients / 2
    return Pilot((_ALIKE if alike else _APART) / rare_patients + interaction, interaction, _TRAINING / (2 * folds), 2, folds)


def make_plan_of(
    pilot: Pilot, *, basis: str, folds: int, repeats: int, pairs: int, entries: int, rare: str, rare_patients: int,
    gain: float | None = None, kept: float = 1.0,
) -> Plan:  # fmt: skip
    """Judge a design, or find the cheapest that shows a gain.

    Args:
        pilot: measured or assumed.
        basis: in words.
        folds: of the design.
        repeats: of the design, one seed each; where ``gain`` is given and can be shown, the fewest that show it take its place.
        pairs: comparisons of Holm's family.
        entries: networks to train in each fold.
        rare: the rare class.
        rare_patients: that are tested.
        gain: a true gain that should be shown with 80 % power.
        kept: share of the rare class's patients that training keeps.
    """
    level = LEVEL / max(pairs, 1)
    found = None if gain is None else runs_needed(pilot, gain, folds=folds, kept=kept, level=level)
    repeats = found or repeats
    plan, alone = (forecast(pilot, runs=repeats, folds=folds, kept=kept, level=each) for each in (level, LEVEL))
    shown = sorted({*(round(plan.detectable * share, 3) for share in (0.5, 1.0, 1.5)), *([gain] if gain else [])})
    table = power_table(pilot, shown, sorted({*REPEATS, repeats}), folds=folds, kept=kept, level=level)
    said = _sentences(plan, alone, repeats, folds, pairs, rare, rare_patients, gain, found is not None)
    designs = _designs(pilot, gain, entries, kept, level)
    return Plan(plan, alone, repeats, folds, entries * folds * repeats, basis, table, designs, [f"{basis}.", *said])


def _sentences(
    plan: Forecast, alone: Forecast, repeats: int, folds: int, pairs: int, rare: str, patients: int, gain: float | None, reached: bool
) -> list[str]:
    over = f"at Holm's level for {pairs} comparisons" if pairs > 1 else "at 5 %"
    single = f"; a single comparison at 5 % would find {alone.detectable:.3f}" if pairs > 1 else ""
    known = f" ({plan.low:.3f} to {plan.high:.3f}, as far as the pilot tells)" if plan.low < plan.high else ""
    said = [
        f"{folds} folds x {repeats} repeats find gains in {rare} F1 of {plan.detectable:.3f} or more with 80 % power {over}{known}{single}."
    ]
    if gain is not None and not reached:
        said.append(
            f"A gain of {gain:g} is not found by any number of trainings: it takes more {rare} patients, or arms that are more alike."
        )
    return [*said, floor_sentence(plan, f"{rare} F1", f"these {patients} {rare} patients")]


def _designs(pilot: Pilot, gain: float | None, entries: int, kept: float, level: float) -> pd.DataFrame:
    rows = []
    for folds in FOLDS if gain is not None else ():
        if (repeats := runs_needed(pilot, gain or 0.0, folds=folds, kept=kept, level=level)) is not None:
            # A network's training side grows with the folds, and its time with it.
            rows.append((folds, repeats, entries * folds * repeats, entries * (folds - 1) * repeats))
    table = pd.DataFrame(rows, columns=["folds", "repeats", "trainings", "cost"])
    return table.sort_values("cost", kind="stable", ignore_index=True)


def repeats_within(seconds_of_repeat: float, hours: float) -> int:
    """Number of repeats possible in a given time, at least one."""
    return max(int(hours * 3600 // seconds_of_repeat), 1) if seconds_of_repeat > 0 else 1


def chart(table: pd.DataFrame, gain: str, width: int = 40) -> Sequence[str]:
    """Power against repeats as lines of a terminal, for one column of a power table."""
    return [f"{repeats:>4} repeats {'█' * round(width * power):{width}} {power:4.0%}" for repeats, power in table[gain].items()]
