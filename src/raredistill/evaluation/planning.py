"""Power of a planned study, from a pilot of two or more runs on the same cohort, or from stated assumptions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from scipy import stats

from raredistill.errors import ConfigError
from raredistill.evaluation.gains import POWER, Gain, training_factor

LEVEL = 0.05
MOST_FREEDOM = 60
MOST_RUNS = 1000
_RANGE = (0.05, 0.95)
_FLOOR = 2.8  # 1.96 + 0.84: two-sided 5 %, 80 % power, variance known


@dataclass(frozen=True)
class Pilot:
    """The parts of a gain's variance, measured or assumed.

    Attributes:
        patients: V_P of the pilot, in squared units of the metric.
        interaction: V_I of the pilot.
        training: V_M of the pilot.
        runs: its repeats x seeds.
        folds: networks per run.
        df_patients: degrees of freedom of V_P; infinite for an assumption.
        spread_training: standard deviation of V_M as an estimate; 0 for an assumption.
    """

    patients: float
    interaction: float
    training: float
    runs: int
    folds: int
    df_patients: float = float("inf")
    spread_training: float = 0.0

    @classmethod
    def of(cls, found: Gain) -> Pilot:
        """The parts measured by a test."""
        return cls(found.variance_patients, found.variance_interaction, found.variance_training, found.runs, found.folds,
                   found.df_patients, found.spread_training)  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """Precision and power of a planned study.

    Attributes:
        se: standard error of its gain.
        se_low: the 5 % end of its range.
        se_high: the 95 % end.
        detectable: smallest true gain detected with 80 % power.
        low: the 5 % end of its range.
        high: the 95 % end.
        floor: lower limit of ``detectable`` for any number of trainings on these patients.
        df: degrees of freedom of the planned test.
        level: two-sided level of ``detectable``.
    """

    se: float
    se_low: float
    se_high: float
    detectable: float
    low: float
    high: float
    floor: float
    df: float
    level: float


def forecast(
    pilot: Pilot, *, runs: int, folds: int | None = None, patients: float = 1.0, kept: float = 1.0, level: float = LEVEL
) -> Forecast:
    """Standard error and detectable gain of a planned study.

    Args:
        pilot: measured on the same cohort, or assumed.
        runs: planned repeats x seeds.
        folds: planned networks per run; by default the pilot's.
        patients: planned number of patients, relative to the pilot's.
        kept: share of the rare class's patients that training keeps.
        level: two-sided; divide it by the number of comparisons for the worst case of Holm's adjustment.

    Raises:
        ConfigError: fewer than one run, or a share that is not positive.
    """
    if runs < 1 or patients <= 0 or not 0 < level < 1:
        raise ConfigError(f"a plan needs at least one run, patients and a level between 0 and 1, not {runs}, {patients} and {level}")
    folds, factor = folds or pilot.folds, training_factor(kept)
    pure = factor * max(pilot.patients - pilot.interaction, 0.0) / patients
    shrink = pilot.folds * pilot.runs / (folds * runs)
    variance = pure + pilot.interaction * pilot.runs / runs / patients + pilot.training * shrink
    df = float(min(folds * runs, MOST_FREEDOM))
    needed = float(stats.t.isf(level / 2, df) + stats.t.ppf(POWER, df))
    low, high = _range(pilot, variance, factor / patients, shrink)
    se = variance**0.5
    return Forecast(se, low, high, needed * se, needed * low, needed * high, float(_FLOOR * pure**0.5), df, level)


def _range(pilot: Pilot, variance: float, of_patients: float, shrink: float) -> tuple[float, float]:
    """Range of the standard error in 90 % of studies: V_P and V_M are estimates, and so are the study's own variances."""
    if pilot.df_patients == float("inf") and not pilot.spread_training:
        return variance**0.5, variance**0.5
    networks = pilot.folds * max(pilot.runs - 1, 1)
    moved = (of_patients * pilot.patients) ** 2 * 2 / pilot.df_patients
    trained = shrink**2 * (2 * pilot.training**2 / networks + pilot.spread_training**2)
    freedom = 2 * variance**2 / max(moved + trained, 1e-300)
    low, high = (float((variance * freedom / stats.chi2.isf(share, freedom)) ** 0.5) for share in _RANGE)
    return low, high


def power(pilot: Pilot, gain: float, *, runs: int, folds: int | None = None, kept: float = 1.0, level: float = LEVEL) -> float:
    """Probability that a study with this many runs shows a true gain."""
    plan = forecast(pilot, runs=runs, folds=folds, kept=kept, level=level)
    return float(stats.t.cdf(abs(gain) / plan.se - stats.t.isf(level / 2, plan.df), plan.df)) if plan.se else 1.0


def runs_needed(pilot: Pilot, gain: float, *, folds: int | None = None, kept: float = 1.0, level: float = LEVEL) -> int | None:
    """Fewest runs (repeats x seeds) that show a true gain with 80 % power; None if no number of trainings on these patients does."""
    found = (runs for runs in range(2, MOST_RUNS) if forecast(pilot, runs=runs, folds=folds, kept=kept, level=level).detectable <= gain)
    return next(found, None)


def power_table(
    pilot: Pilot, gains: Sequence[float], runs: Sequence[int], *, folds: int | None = None, kept: float = 1.0, level: float = LEVEL
) -> pd.DataFrame:
    """Power by gain (columns) and number of runs (rows)."""
    rows = [[power(pilot, gain, runs=number, folds=folds, kept=kept, level=level) for gain in gains] for number in runs]
    return pd.DataFrame(rows, index=pd.Index(list(runs), name="runs"), columns=[f"{gain:g}" for gain in gains])


def error_range(df: float) -> tuple[float, float]:
    """Range of an estimated standard error in 90 % of studies, relative to the true one: 0.42 to 1.54 with 4 degrees of freedom.

    Examples:
        >>> low, high = error_range(4)
        >>> round(low, 2), round(high, 2)
        (0.42, 1.54)
    """
    low, high = ((float(stats.chi2.ppf(share, df)) / df) ** 0.5 for share in _RANGE)
    return low, high


def floor_sentence(plan: Forecast, what: str, patients: str) -> str:
    """Sentence on the lower limit of detectable gains for any number of trainings."""
    return f"With {patients} no number of trainings finds gains in {what} below {plan.floor:.3f} (80 % power)."
