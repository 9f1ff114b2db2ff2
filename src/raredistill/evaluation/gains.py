"""The gain test, which decides verdicts: the gain of a second method for new patients and new trainings on a cohort of the same size.

Each patient's influence on the gain is split into parts due to the patient, the run, and their interaction, so that repeats average out
the noise of training instead of leaving it in every variance. Derivation, assumptions and measured error rates: docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import brentq

from raredistill.errors import DataError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]

FEWEST_PATIENTS = 10
"""With fewer tested patients of either kind, a difference is described, not tested."""
POWER = 0.8
_NOTHING = 1e-12
_FARTHEST = 1e6


@dataclass(frozen=True)
class Layout:
    """Which network tested which patients.

    Attributes:
        runs: the T (repeat, seed); each tests every patient once.
        patients: the n names.
        fold: ``(T, n)`` fold that tests a patient in a run.
        rare: ``(n,)`` whether a patient has the rare class.
    """

    runs: tuple[tuple[int, int], ...]
    patients: tuple[str, ...]
    fold: Integers
    rare: Bools

    @cached_property
    def repeat(self) -> Integers:
        """Repeat of each run ``(T,)``."""
        return np.array([repeat for repeat, _ in self.runs], dtype=np.int64)

    @cached_property
    def folds(self) -> int:
        """Number of networks per run."""
        return len(np.unique(self.fold[0]))

    def check(self) -> None:
        """Refuse a layout that cannot be tested.

        Raises:
            DataError: a single run, or fewer than ten patients with or without the rare class.
        """
        if len(self.runs) < 2:
            raise DataError("one run of each patient does not show the noise of training; raise splits.repeats to at least 2")
        if (fewest := min(int(self.rare.sum()), int((~self.rare).sum()))) < FEWEST_PATIENTS:
            kind = "with" if self.rare.sum() == fewest else "without"
            raise DataError(f"only {fewest} tested patients {kind} the rare class: described, not tested (at least {FEWEST_PATIENTS})")


@dataclass(frozen=True)
class Gain:
    """A difference, second method minus first, of a recipe: new patients, new trainings, a new cohort of this size.

    Attributes:
        gain: mean over runs of the metric pooled over a run's folds.
        low: end of its interval at the level asked for.
        high: the other end.
        p: two-sided; never smaller than a sign test on the patients that differ could give.
        se: standard error; infinite if no patient differs, since the variance is then unknown.
        df: degrees of freedom.
        variance_patients: V_P, of patients' means over runs.
        variance_interaction: V_I, the part of V_P that is noise of training by patient.
        variance_training: V_M, noise of whole networks.
        detectable: smallest true gain that the test at this level detects with 80 % power.
        training_share: part of the variance that more repeats would reduce.
        variance: total variance.
        folds: number of networks per run.
        runs: repeats x seeds.
        df_patients: degrees of freedom of V_P.
        spread_training: standard deviation of V_M as an estimate.
        patients_apart: number of patients that the two sides classify differently in any run.
    """

    gain: float
    low: float
    high: float
    p: float
    se: float
    df: float
    variance_patients: float
    variance_interaction: float
    variance_training: float
    detectable: float
    training_share: float
    variance: float
    folds: int
    runs: int
    df_patients: float
    spread_training: float
    patients_apart: int

    def interval(self, level: float) -> tuple[float, float]:
        """The interval at another level, such as 0.01 for 99 %."""
        half = float(stats.t.ppf(1 - level / 2, self.df)) * self.se
        return self.gain - half, self.gain + half

    def beyond(self, margin: float) -> tuple[float, float]:
        """One-sided p values of ``gain <= -margin`` and of ``gain >= margin``: small ones exclude a loss, and a gain, that large."""
        above, below = (self.gain + margin) / self.se, (self.gain - margin) / self.se
        return float(stats.t.sf(above, self.df)), float(stats.t.cdf(below, self.df))


@dataclass(frozen=True)
class Contrast:
    """The input of the test: a gain, and the influence of every patient on it in every run.

    Attributes:
        gain: second method minus first, mean over runs.
        values: ``(T, n)``; a run's influences add up to its deviation from the mean run, so their sum is about 0.
        layout: which network tested which patients.
        apart: ``(n,)`` whether the two sides classify a patient differently in any run.
    """

    gain: float
    values: Floats
    layout: Layout
    apart: Bools


def gain_test(
    tp: ArrayLike, pp: ArrayLike, actual: ArrayLike, fold: ArrayLike, rare: ArrayLike, *, kept: float = 1.0, level: float = 0.05
) -> Gain:
    """Test the gain in the rare class's F1, pooled over the folds of a run, of the second arm over the first.

    Args:
        tp: ``(2, repeats, seeds, n)`` samples of each patient that are correctly called rare; the first arm is the control.
        pp: ``(2, repeats, seeds, n)`` all samples of each patient that are called rare, by the network of the fold that tests the patient.
        actual: ``(n,)`` samples of the rare class.
        fold: ``(repeats, n)``.
        rare: ``(n,)`` whether the patient has the rare class.
        kept: share of the rare class's patients that training keeps (``splits.rarefy``).
        level: two-sided level of the interval and of ``detectable``.

    Raises:
        DataError: shapes do not match, there is only one run, fewer than ten patients of either kind, or no sample of the rare class.
    """
    hits, calls = (np.asarray(each, dtype=np.float64) for each in (tp, pp))
    there, folds, carries = np.asarray(actual, dtype=np.float64), np.asarray(fold, dtype=np.int64), np.asarray(rare, dtype=bool)
    if hits.ndim != 4 or hits.shape != calls.shape or hits.shape[0] != 2 or folds.shape != (hits.shape[1], hits.shape[3]):
        raise DataError(f"counts {hits.shape} and {calls.shape} and folds {folds.shape} do not fit (2, repeats, seeds, n) and (repeats, n)")
    if there.shape != carries.shape or there.shape != hits.shape[3:] or not there.sum() > 0:
        raise DataError("actual and rare need one value per patient, and the rare class at least one sample")
    _, repeats, seeds, patients = hits.shape
    runs = tuple((repeat, seed) for repeat in range(repeats) for seed in range(seeds))
    layout = Layout(runs, tuple(map(str, range(patients))), np.repeat(folds, seeds, axis=0), carries)
    hits, calls = hits.reshape(2, -1, patients), calls.reshape(2, -1, patients)
    scores = 2 * hits.sum(axis=-1) / (calls.sum(axis=-1) + there.sum())
    whole = (calls.sum(axis=-1).mean(axis=1) + there.sum())[:, None, None]
    at = 2 * hits.sum(axis=-1).mean(axis=1)[:, None, None] / whole
    influence = (2 * hits - at * (calls + there)) / whole
    apart = ((hits[0] != hits[1]) | (calls[0] != calls[1])).any(axis=0)
    contrast = Contrast(float((scores[1] - scores[0]).mean()), influence[1] - influence[0], layout, apart)
    return assess([contrast], kept=kept, level=level)[0]


def assess(contrasts: Sequence[Contrast], *, kept: float = 1.0, level: float = 0.05) -> list[Gain]:
    """Test several contrasts with the same layout.

    Args:
        contrasts: of the same runs and patients.
        kept: share of the rare class's patients that training keeps.
        level: two-sided level of intervals and of ``detectable``.

    Raises:
        DataError: as :meth:`Layout.check`, or the layouts differ.
    """
    if not contrasts:
        return []
    layout = same_layout(contrasts)
    layout.check()
    if not 0 < kept <= 1:
        raise DataError(f"kept is the share of the rare patients that training keeps, above 0 and at most 1, not {kept}")
    parts = _parts(np.stack([each.values for each in contrasts]), layout)
    parts["apart"] = np.array([each.apart.sum() for each in contrasts], dtype=np.float64)
    return [_gain(each.gain, {name: float(value[place]) for name, value in parts.items()}, layout, kept, level)
            for place, each in enumerate(contrasts)]  # fmt: skip


def training_factor(kept: float) -> float:
    """c0: patient variance with training over that of testing alone; 2 when nothing is rarefied (an assumption, see docs/statistics.md)."""
    return 1 + (1 + 1 / kept) / 2


def combine(contrasts: Sequence[Contrast], weights: Sequence[float]) -> Contrast:
    """A weighted sum of contrasts with the same patients and networks, such as a slope over several pairs.

    Raises:
        DataError: they were not made on the same runs, folds and patients.
    """
    layout = same_layout(contrasts)
    values = np.sum([weight * each.values for weight, each in zip(weights, contrasts, strict=True)], axis=0)
    gain = float(sum(weight * each.gain for weight, each in zip(weights, contrasts, strict=True)))
    return Contrast(gain, values, layout, np.any([each.apart for each in contrasts], axis=0))


def same_layout(contrasts: Sequence[Contrast]) -> Layout:
    """The layout that contrasts share.

    Raises:
        DataError: they have different runs, patients or folds.
    """
    first = contrasts[0].layout
    for other in (each.layout for each in contrasts[1:]):
        if other is not first and (other.runs, other.patients) != (first.runs, first.patients):
            raise DataError(f"these comparisons were not made on the same runs and patients ({_mismatch(first, other)}); finish their runs")
        if other is not first and not np.array_equal(other.fold, first.fold):
            raise DataError("these comparisons were not made on the same folds; compare runs of the same splits")
    return first


def _mismatch(one: Layout, other: Layout) -> str:
    if lone := sorted({*one.runs} ^ {*other.runs}):
        return f"repeat {lone[0][0]}, seed {lone[0][1]} is on one side only"
    lone_patients = sorted({*one.patients} ^ {*other.patients})
    return f"patient {lone_patients[0]} is on one side only" if lone_patients else "their order differs"


def slope(contrasts: Sequence[Contrast], against: Sequence[float]) -> Contrast:
    """Least-squares slope of several pairs' gains on one number per pair, such as log2 of the teacher's size over the student's.

    Raises:
        DataError: fewer than two different numbers, or as :func:`combine`.
    """
    numbers = np.asarray(against, dtype=np.float64)
    if len(numbers) < 2 or np.ptp(numbers) < 1e-9:
        raise DataError("a slope needs pairs of different size ratios with a control each")
    centred = numbers - numbers.mean()
    return combine(contrasts, [float(each) for each in centred / (centred**2).sum()])


def closed_gap(student: Contrast, teacher: Contrast, *, kept: float = 1.0, level: float = 0.05) -> tuple[float, float, float] | None:
    """Share of the teacher's advantage that the student reaches, (student - control) / (teacher - control), with Fieller's interval.

    Args:
        student: against the control.
        teacher: against the same control.
        kept: share of the rare class's patients that training keeps.
        level: two-sided.

    Returns:
        Share, low, high; None if the teacher's advantage over the control is not shown at this level.

    Raises:
        DataError: as :func:`assess`.
    """
    (advantage,) = assess([teacher], kept=kept, level=level)
    if advantage.gain <= 0 or advantage.p >= level:
        return None
    share = student.gain / teacher.gain

    def surplus(ratio: float) -> float:
        return assess([combine([student, teacher], [1.0, -ratio])], kept=kept)[0].p - level

    # Fieller's set of shares that the same test does not reject; it is an interval, since the teacher's advantage is shown.
    ends = []
    for step in (-0.1, 0.1):
        while surplus(share + step) > 0 and abs(step) < _FARTHEST:
            step *= 2
        ends.append(float(brentq(surplus, share, share + step, xtol=1e-6)) if surplus(share + step) <= 0 else step * np.inf)
    return share, ends[0], ends[1]


def _parts(values: Floats, layout: Layout) -> dict[str, Floats]:
    """Components of the variance ``(M,)`` by name from influences ``(M, T, n)``."""
    runs, mean = len(layout.runs), values.mean(axis=1)
    sizes = [int(kind.sum()) for kind in (layout.rare, ~layout.rare)]
    within = [size * mean[:, kind].var(axis=1, ddof=1) for size, kind in zip(sizes, (layout.rare, ~layout.rare), strict=True)]
    patients = within[0] + within[1]
    lost = within[0] ** 2 / (sizes[0] - 1) + within[1] ** 2 / (sizes[1] - 1)
    rest = values - mean[:, None]
    training, spread = _training(rest, layout)
    return {
        "patients": patients, "df_patients": patients**2 / np.maximum(lost, 1e-300),
        "interaction": (rest**2).sum(axis=(1, 2)) / ((runs - 1) * runs),
        "training": training, "spread": spread,
    }  # fmt: skip


def _training(rest: Floats, layout: Layout) -> tuple[Floats, Floats]:
    """V_M ``(M,)``, from products of different patients of one network, and its standard deviation if networks do not differ."""
    runs, folds = len(layout.runs), layout.folds
    products, noise = np.zeros(len(rest)), np.zeros(len(rest))
    for run in range(runs):
        own = (layout.fold[run][:, None] == np.unique(layout.fold[run])).astype(np.float64)
        alike = int((layout.repeat == layout.repeat[run]).sum())
        # Contribution of a network's level to residuals about a patient's mean: in its run, in runs of the same split, in other repeats.
        left = (1 - 1 / runs) ** 2 + (alike - 1) / runs**2 + (runs - alike) / (folds * runs**2)
        squares = rest[:, run] ** 2
        sums = squares @ own
        products += ((rest[:, run] @ own) ** 2 - sums).sum(axis=1) / left
        noise += 2 * (sums**2 - squares**2 @ own).sum(axis=1) / left**2
    return np.maximum(products, 0.0) / runs**2, np.sqrt(np.maximum(noise, 0.0)) / runs**2


def _gain(gain: float, parts: dict[str, float], layout: Layout, kept: float, level: float) -> Gain:
    networks, factor = layout.folds * len(layout.runs), training_factor(kept)
    pure, training = max(parts["patients"] - parts["interaction"], 0.0), parts["training"]
    of_patients = parts["patients"] + (factor - 1) * pure
    variance = of_patients + training
    df = _freedom(of_patients, parts["df_patients"], training, networks - layout.folds, networks)
    fewest = min(1.0, 2.0 ** (1 - parts["apart"]))
    se, p = _bounded(gain, variance, df, fewest)
    quantile = float(stats.t.ppf(1 - level / 2, df))
    return Gain(
        gain, gain - quantile * se, gain + quantile * se, p, se, df, parts["patients"], parts["interaction"], training,
        (quantile + float(stats.t.ppf(POWER, df))) * se, 1 - factor * pure / variance if variance else 0.0, variance, layout.folds,
        len(layout.runs), parts["df_patients"], parts["spread"], int(parts["apart"]),
    )  # fmt: skip


def _freedom(of_patients: float, df_patients: float, training: float, df_training: float, networks: int) -> float:
    """Satterthwaite's degrees of freedom, at most the number of networks, in case the variance of a few runs is small by chance."""
    variance = of_patients + training
    if not variance > 0:
        return 1.0
    lost = of_patients**2 / df_patients + training**2 / df_training
    return float(min(variance**2 / lost, networks))


def _bounded(gain: float, variance: float, df: float, fewest: float) -> tuple[float, float]:
    """Standard error and p, bounded by a sign test on the patients that differ, so that a variance of 0 does not count as certainty."""
    if variance > 0:
        p = float(2 * stats.t.sf(abs(gain) / variance**0.5, df))
        if p >= fewest:
            return variance**0.5, p
    if abs(gain) <= _NOTHING or fewest >= 1:
        return (variance**0.5 if variance > 0 else np.inf), 1.0
    return abs(gain) / float(stats.t.isf(fewest / 2, df)), fewest
