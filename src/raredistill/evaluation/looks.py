"""Rules for stopping a study early: looks and their levels, fixed before the first run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raredistill.errors import ConfigError
from raredistill.evaluation.compare import holm
from raredistill.evaluation.gains import Gain
from raredistill.evaluation.planning import Pilot, forecast

Outcome = Literal["helps", "harms", "makes no practical difference", "floor", "budget", "open"]
TOTAL = 0.05


@dataclass(frozen=True)
class Looks:
    """A stopping rule.

    Attributes:
        looks: numbers of repeats after which the study is tested, increasing, at least 2.
        alpha: level of each look; they add up to at most 0.05, which is valid for any dependence of the looks (union bound).
        margin: largest difference without practical meaning; None for no equivalence test.
        wanted: a gain that would matter: a pair whose patients cannot show it is dropped.
    """

    looks: tuple[int, ...] = (2, 4, 10)
    alpha: tuple[float, ...] = (0.01, 0.01, 0.03)
    margin: float | None = None
    wanted: float | None = None

    def __post_init__(self) -> None:
        """Refuse a rule that does not keep its level."""
        if not self.looks or len(self.looks) != len(self.alpha):
            raise ConfigError(f"evidence: give one alpha for each of the looks, not {len(self.alpha)} for {len(self.looks)}")
        if self.looks[0] < 2 or any(later <= earlier for earlier, later in zip(self.looks, self.looks[1:], strict=False)):
            raise ConfigError(f"evidence.looks are increasing numbers of repeats, at least 2, not {list(self.looks)}")
        if min(self.alpha) <= 0 or sum(self.alpha) > TOTAL + 1e-9:
            raise ConfigError(f"evidence.alpha are levels above 0 that add up to at most {TOTAL}, not {list(self.alpha)}")
        if any(each is not None and each <= 0 for each in (self.margin, self.wanted)):
            raise ConfigError("evidence.margin and evidence.wanted are differences above 0")

    def place(self, repeats: int) -> int | None:
        """Index of the last look reached with this many repeats."""
        reached = [place for place, look in enumerate(self.looks) if look <= repeats]
        return reached[-1] if reached else None

    def record(self) -> dict[str, Any]:
        """The rule as recorded before the first run."""
        return {"looks": list(self.looks), "alpha": list(self.alpha), "margin": self.margin, "wanted": self.wanted}


@dataclass(frozen=True)
class State:
    """The state of one pair.

    Attributes:
        outcome: ``open`` while its training continues; ``floor`` if these patients cannot show the wanted gain; ``budget`` after the
            last look.
        look: repeats at which it was settled, or at which it was tested last.
        level: the alpha of that look.
        gain: the gain at that look, with its interval at the look's level.
        p_holm: adjusted over all pairs of the look.
        history: repeats, gain and adjusted p of each look so far.
    """

    outcome: Outcome = "open"
    look: int = 0
    level: float = 0.0
    gain: Gain | None = None
    p_holm: float | None = None
    history: tuple[tuple[int, float, float], ...] = field(default=())


def settle(
    rule: Looks, place: int, found: Mapping[str, Gain], before: Mapping[str, State] | None = None, *, kept: float = 1.0
) -> dict[str, State]:
    """Test every pair at a look, and settle those that are decided.

    Args:
        rule: fixed before the first run.
        place: index of the look.
        found: every pair's gain at this look; a pair that is already settled keeps the gain that settled it.
        before: states after the previous look.
        kept: share of the rare class's patients that training keeps.

    Returns:
        The state of every pair; settled ones are returned as they were.
    """
    states = dict(before or {})
    settled = {name: state for name, state in states.items() if state.outcome != "open"}
    known = {name: settled[name].gain or each if name in settled else each for name, each in found.items()}
    alpha, look = rule.alpha[place], rule.looks[place]
    p = dict(zip(known, map(float, holm([each.p for each in known.values()])), strict=True))
    same = _equivalence(known, rule.margin)
    for name, each in known.items():
        if name in settled:
            continue
        outcome = _outcome(each, p[name], same.get(name), rule, last=place == len(rule.looks) - 1, alpha=alpha, kept=kept)
        earlier = states[name].history if name in states else ()
        states[name] = State(outcome, look, alpha, each, p[name], (*earlier, (look, each.gain, p[name])))
    return states


def _equivalence(gains: Mapping[str, Gain], margin: float | None) -> dict[str, float]:
    if margin is None:
        return {}
    return dict(zip(gains, map(float, holm([max(each.beyond(margin)) for each in gains.values()])), strict=True))


def _outcome(found: Gain, p: float, same: float | None, rule: Looks, *, last: bool, alpha: float, kept: float) -> Outcome:
    if same is not None and same < alpha:
        return "makes no practical difference"
    if p < alpha:
        return "helps" if found.gain > 0 else "harms"
    if rule.wanted is not None and forecast(Pilot.of(found), runs=rule.looks[-1], kept=kept).floor > rule.wanted:
        return "floor"
    return "budget" if last else "open"


def looks_table(states: Mapping[str, State], rule: Looks) -> list[dict[str, Any]]:
    """One row per pair and look: repeats, the look's level, gain, p after Holm, and the outcome at the look that settled it."""
    alphas = dict(zip(rule.looks, rule.alpha, strict=True))
    return [
        {"entry": name, "repeats": look, "alpha": alphas[look], "gain": gain, "p_holm": p,
         "outcome": state.outcome if look == state.look else "open"}
        for name, state in states.items()
        for look, gain, p in state.history
    ]  # fmt: skip
