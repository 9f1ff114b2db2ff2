"""Verdicts on gains: helps, harms, makes no practical difference, not decided; or described only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from raredistill.evaluation.compare import holm
from raredistill.evaluation.contrasts import Tally
from raredistill.evaluation.gains import Gain
from raredistill.evaluation.looks import State
from raredistill.evaluation.planning import Pilot, forecast

LEVEL = 0.05
MORE_REPEATS = 5


class Verdict(StrEnum):
    """The answers to "does it help?"."""

    HELPS = "helps"
    HARMS = "harms"
    SAME = "makes no practical difference"
    UNDECIDED = "not decided"
    DESCRIBED = "described"


@dataclass(frozen=True)
class Ruling:
    """A verdict with its basis.

    Attributes:
        verdict: the answer.
        sentence: the answer in words, with its numbers.
        notes: what would decide it, and the sources of its uncertainty.
        gain: the tested gain; None if nothing was tested.
        p_holm: p value adjusted over the family; None if nothing was tested.
        p_same: adjusted p value of a difference as large as the margin in either direction; None without a margin.
        family: number of comparisons that the adjustment covers.
    """

    verdict: Verdict
    sentence: str
    notes: tuple[str, ...] = ()
    gain: Gain | None = None
    p_holm: float | None = None
    p_same: float | None = None
    family: int = 0


def rule(
    gains: Mapping[str, Gain], *, controls: Mapping[str, str], what: str, described: Mapping[str, str] | None = None,
    margin: float | None = None, kept: float = 1.0, rare_patients: int | None = None, states: Mapping[str, State] | None = None,
) -> dict[str, Ruling]:  # fmt: skip
    """Decide a family of comparisons.

    Args:
        gains: tested comparisons by name.
        controls: the name of each comparison's control.
        what: the metric in words, such as ``LGG F1``.
        described: why other comparisons (or tested ones, such as networks that did not learn) may only be described.
        margin: largest difference without practical meaning, fixed before the study; None for no equivalence test.
        kept: share of the rare class's patients that training keeps.
        rare_patients: number of tested rare patients, for the sentence on the floor.
        states: for a study with looks, the state of each comparison: then the looks decide, at their levels.

    Returns:
        A ruling by name; Holm's adjustment covers every comparison that is tested, at 5 %, and again for equivalence.
    """
    barred = dict(described or {})
    tested = [name for name in gains if name not in barred]
    p = dict(zip(tested, holm([gains[name].p for name in tested]), strict=True))
    same = dict(zip(tested, holm([max(gains[name].beyond(margin)) for name in tested]), strict=True)) if margin else {}
    rulings = {}
    for name in tested:
        state, p_same = None if states is None else states.get(name, State()), float(same[name]) if margin else None
        adjusted = float(p[name]) if state is None or state.p_holm is None else state.p_holm
        verdict = verdict_of(gains[name].gain, adjusted, p_same) if state is None else _of_look(state)
        level = state.level if state is not None and state.level else LEVEL
        sentence = _sentence(name, controls[name], what, gains[name], verdict, adjusted, len(tested), margin, level)
        notes = _notes(gains[name], verdict, what, level / len(tested), kept, rare_patients)
        rulings[name] = Ruling(verdict, sentence, notes, gains[name], adjusted, p_same, len(tested))
    for name, reason in barred.items():
        seen = f"{what} {signed(gains[name].gain)}, " if name in gains else ""
        said = f"{name} against {controls.get(name) or 'no control'}: {seen}described, not tested: {reason.rstrip('.')}."
        rulings[name] = Ruling(Verdict.DESCRIBED, said, gain=gains.get(name))
    return rulings


def _of_look(state: State) -> Verdict:
    return Verdict(state.outcome) if state.outcome in ("helps", "harms", "makes no practical difference") else Verdict.UNDECIDED


def verdict_of(gain: float, p: float, p_same: float | None = None, level: float = LEVEL) -> Verdict:
    """The verdict from adjusted p values.

    A gain that is shown but smaller than the margin makes no practical difference: this is the purpose of a margin.

    Examples:
        >>> verdict_of(0.03, p=0.01).value, verdict_of(0.03, p=0.2).value
        ('helps', 'not decided')
    """
    if p_same is not None and p_same < level:
        return Verdict.SAME
    if p < level:
        return Verdict.HELPS if gain > 0 else Verdict.HARMS
    return Verdict.UNDECIDED


def _sentence(
    name: str, control: str, what: str, found: Gain, verdict: Verdict, p: float, family: int, margin: float | None, level: float
) -> str:
    low, high = found.interval(level)
    numbers = f"{signed(found.gain)} [{signed(low)}, {signed(high)}]"
    over = f"{p_text(p)}, Holm over {family}" if family > 1 else p_text(p)
    recipe = "for new patients and new trainings on a cohort of this size"
    if verdict is Verdict.SAME:
        return (
            f"{name} makes no practical difference to {what} against {control}: {numbers}; gains and losses above {margin:g} are excluded."
        )
    if verdict is Verdict.UNDECIDED:
        return f"{name} against {control}: {what} {numbers} ({over}): not decided. {_excluded(found, low, high, level)}"
    word = "gains" if verdict is Verdict.HELPS else "loses"
    return f"{name} {verdict.value}: in {what} it {word} {numbers} against {control} {recipe} ({over})."


def _excluded(found: Gain, low: float, high: float, level: float) -> str:
    if not np.isfinite(found.se):
        return "The two sides classify every patient alike, so nothing is excluded."
    return f"Gains above {max(high, 0.0):.3f} and losses above {max(-low, 0.0):.3f} are excluded at {1 - level:.0%}.".replace("%", " %")


def _notes(found: Gain, verdict: Verdict, what: str, level: float, kept: float, rare_patients: int | None) -> tuple[str, ...]:
    if not np.isfinite(found.se):
        return ()
    share = f"Of its uncertainty {max(found.training_share, 0.0):.0%} is noise of training, which more repeats would narrow."
    if verdict is not Verdict.UNDECIDED:
        return (share,)
    pilot, now = Pilot.of(found), found.runs
    later = forecast(pilot, runs=now + MORE_REPEATS, kept=kept, level=level)
    whom = f"with these {rare_patients} rare patients" if rare_patients else "with these patients"
    return (
        share,
        f"With {MORE_REPEATS} more repeats a true difference of {later.detectable:.3f} would be found with 80 % power "
        f"({later.low:.3f} to {later.high:.3f}); {whom} never less than {later.floor:.3f} in {what}, however many trainings.",
    )


def not_learned(side: Tally, rare: str) -> str:
    """Why a side's networks did not learn the rare class (one never predicts it, or none beats a constant); empty if they did."""
    place, classes = side.classes.index(rare), len(side.classes)
    right, actual, guessed = (side.sums[..., start * classes + place] for start in range(3))
    for run, fold in zip(side.runs, side.fold, strict=True):
        tested = fold >= 0  # an unfinished run tests only some patients
        calls = np.bincount(fold[tested], weights=guessed[side.runs.index(run)][tested])
        for which in np.unique(fold[tested][calls[fold[tested]] == 0]):
            return f"a network never predicts {rare} (repeat {run[0]}, fold {which}, seed {run[1]})"
    share = actual.sum() / side.sums[..., -1].sum()
    score, constant = 2 * right.sum() / (actual.sum() + guessed.sum()), 2 * share / (1 + share)
    if score <= constant:
        return f"its {rare} F1 of {score:.3f} is no better than that of calling every sample {rare} ({constant:.3f})"
    return ""


def signed(value: float) -> str:
    """Three decimals with a true minus sign.

    Examples:
        >>> signed(-0.0213)
        '−0.021'
    """
    return f"{value:+.3f}".replace("-", "−").replace("inf", "∞")


def p_text(p: float) -> str:
    """``p = 0.09``; two significant digits, never 0.

    Examples:
        >>> p_text(0.0912), p_text(0.0004)
        ('p = 0.091', 'p < 0.001')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
