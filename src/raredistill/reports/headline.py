"""The answer in ten seconds: one sentence, what it rests on, what stands in its way, and the next thing to do."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raredistill.evaluation.planning import Pilot, runs_needed
from raredistill.evaluation.verdicts import LEVEL, not_learned
from raredistill.reports.decision import DECIDING, Sides, rare_kept
from raredistill.reports.pairs import Pair, seen_gain
from raredistill.reports.results import Results
from raredistill.reports.words import change, score, share

HALF_WIDTH = 46.0
"""Of the forest plot, in per cent of its width, on each side of zero."""
WORDS = {
    "helps": "helps", "harms": "harms", "makes no practical difference": "no practical difference", "not decided": "not decided",
    "described": "not tested",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One pair on the first screen; scores are the rare class's F1 as the verdict sees it, and places are per cent of the plot's width."""

    entry: str
    control: str
    teacher: str
    verdict: str
    with_teacher: float | None
    without: float | None
    of_teacher: float | None
    gain: float | None
    low: float | None
    high: float | None
    closed: str
    places: dict[str, float]

    @property
    def numbers(self) -> str:
        """The gain with its interval, in words for every reader."""
        if self.gain is None:
            return "not measured"
        if self.low is None or self.high is None or not math.isfinite(self.low + self.high):
            return change(self.gain)
        return f"{change(self.gain)} ({change(self.low)} to {change(self.high)})"


@dataclass(frozen=True)
class Headline:
    """What the first screen shows.

    Attributes:
        question: in words.
        answer: one plain sentence.
        banners: what must be known before the answer is believed.
        rows: one per pair.
        margin: half of the region of practical equivalence, in per cent of the plot's width; 0 without a margin.
        limits: the ends of the plot's axis.
        next_step: in words.
        command: that does it; empty where no command does.
    """

    question: str
    answer: str
    banners: tuple[str, ...]
    rows: tuple[Row, ...]
    margin: float
    limits: tuple[str, str]
    next_step: str
    command: str


def headline(results: Results, pairs: Sequence[Pair], verdicts: Sequence[dict[str, Any]], spared: int = 0) -> Headline:
    """Make the first screen from the verdicts.

    Args:
        results: of the study.
        pairs: with their decisions.
        verdicts: one record per pair, in the same order.
        spared: runs that were not needed.
    """
    rare, margin = results.study.rare, float((results.study.config.get("evidence") or {}).get("margin") or 0)
    ends = [record[key] for record in verdicts for key in ("low", "high", "difference") if record[key] is not None]
    reach = max([abs(end) for end in ends if math.isfinite(end)] + [margin, 0.01])
    sides = Sides(results.whole, rare)
    unlearned = _unlearned(results, sides)
    rows = tuple(_row(sides, pair, record, reach) for pair, record in zip(pairs, verdicts, strict=True))
    step, command = _next(results, pairs, verdicts, unlearned, spared)
    return Headline(
        f"Does a teacher help {rare}?", _answer(rare, rows, verdicts, pairs, unlearned), _banners(results, unlearned, spared), rows,
        HALF_WIDTH * margin / reach, (change(-reach), change(reach)), step, command,
    )  # fmt: skip


def _unlearned(results: Results, sides: Sides) -> dict[str, str]:
    """Why an entry's networks did not learn the rare class by what they call likeliest, by entry; those that learnt are left out."""
    tallies = {name: sides.tally(name, "argmax") for name in results.entries}
    found = {name: not_learned(tally, sides.rare) for name, tally in tallies.items() if tally is not None}
    return {name: reason for name, reason in found.items() if reason}


def _row(sides: Sides, pair: Pair, record: dict[str, Any], reach: float) -> Row:
    scores = _scores(sides, pair)
    finite = {key: record[key] for key in ("low", "high") if record[key] is not None and math.isfinite(record[key])}
    known = {**finite, **({} if record["difference"] is None else {"gain": record["difference"]})}
    places = {key: 50 + HALF_WIDTH * value / reach for key, value in known.items()}
    closed = pair.decision.closed
    told = "" if closed is None else f"{share(closed[0])} ({share(closed[1])} to {share(closed[2])})"
    return Row(
        pair.entry, pair.control, pair.teacher, WORDS[record["verdict"]], scores[1], scores[0], scores[2],
        record["difference"], record["low"], record["high"], told, places,
    )  # fmt: skip


def _scores(sides: Sides, pair: Pair) -> tuple[float | None, float | None, float | None]:
    """F1 of control, entry and teacher over the runs that control and entry have completed."""
    contrast = pair.decision.contrast
    if contrast is None:
        return None, None, None
    found = [_f1(sides, name, contrast.layout.runs) for name in (pair.control, pair.entry, pair.teacher)]
    return found[0], found[1], found[2]


def _f1(sides: Sides, name: str, runs: Sequence[tuple[int, int]]) -> float | None:
    tally = sides.tally(name, DECIDING)
    if tally is None or not set(runs) <= set(tally.runs):
        return None
    place, classes = tally.classes.index(sides.rare), len(tally.classes)
    kept = [tally.runs.index(run) for run in runs]
    right, actual, called = (tally.sums[kept, :, start * classes + place].sum(axis=1) for start in range(3))
    return float(np.mean(2 * right / np.maximum(actual + called, 1)))


def _answer(rare: str, rows: Sequence[Row], verdicts: Sequence[dict[str, Any]], pairs: Sequence[Pair], unlearned: dict[str, str]) -> str:
    if not rows:
        return "The study has no distilled student yet, so there is nothing to answer."
    for verdict, words in (("helps", "Yes: a teacher helps {} find {}"), ("harms", "No: a teacher makes {} worse at finding {}")):
        found = [row for row in rows if row.verdict == verdict]
        if found:
            whose = f" ({found[0].entry})" if len(found) > 1 else ""
            return f"{words.format(_named(found), rare)}: {_numbers(found[0])}{whose}.{_rest(rows, found)}"
    same, open_ = ([row for row in rows if row.verdict == WORDS[key]] for key in ("makes no practical difference", "not decided"))
    if same and not open_:
        return f"A teacher makes no practical difference to how well {_named(same)} find {rare}: {_numbers(same[0])}."
    if open_:
        detectable = [record["detectable"] for record in verdicts if record["verdict"] == "not decided" and record["detectable"]]
        small = min(detectable, default=math.inf)
        limit = f"; this study could only have found gains above {small:.2f}" if math.isfinite(small) else ""
        first = min(open_, key=lambda row: (row.high or math.inf) - (row.low or -math.inf))
        several = "" if len(open_) == 1 else f" (the most precise of {len(open_)} comparisons)"
        return f"No evidence that a teacher helps {first.entry} find {rare}{several}: {_numbers(first)}{limit}."
    if unlearned:
        return f"This study cannot answer yet: {_several(list(unlearned))} did not learn {rare}."
    reason = next((pair.decision.reason or pair.problem for pair in pairs if pair.decision.reason or pair.problem), "")
    why = reason.rstrip(".") or "all runs share one test set, so only these networks can be compared"
    return f"This study cannot answer yet: {why}."


def _named(rows: Sequence[Row]) -> str:
    return _several([row.entry for row in rows])


def _several(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _rest(rows: Sequence[Row], found: Sequence[Row]) -> str:
    left = len(rows) - len(found)
    return f" The other {left} comparisons do not show it." if left > 1 else " The other comparison does not show it." if left else ""


def _numbers(row: Row) -> str:
    found = f"F1 {score(row.with_teacher)} with, {score(row.without)} without"
    if row.gain is None:
        return found
    between = ""
    if row.low is not None and row.high is not None and math.isfinite(row.low + row.high):
        between = f", 95 % interval {change(row.low)} to {change(row.high)}"
    return f"{found}; difference {change(row.gain)}{between}"


def _banners(results: Results, unlearned: dict[str, str], spared: int) -> tuple[str, ...]:
    study, said = results.study, []
    unfinished = len(study.runs) - len(results.runs) - spared
    if unfinished:
        said.append(f"Unfinished: {unfinished} of {len(study.runs)} runs are missing or failed.")
    if unlearned:
        name, reason = next(iter(unlearned.items()))
        more = f"; likewise {_several([other for other in unlearned if other != name])}" if len(unlearned) > 1 else ""
        said.append(f"Networks did not learn: of {name}, {reason}{more}.")
    if study.cohort.generated:
        said.append("Generated data: the numbers say nothing about patients.")
    if not study.cohort.patients_known:
        said.append("Patients are not known: images of one patient may stand on both sides of a split.")
    return tuple(said)


def _next(
    results: Results, pairs: Sequence[Pair], verdicts: Sequence[dict[str, Any]], unlearned: dict[str, str], spared: int
) -> tuple[str, str]:
    study = results.study
    if len(study.runs) - len(results.runs) - spared:
        return "Finish the study; runs that are done are reused.", study.command
    if unlearned:
        epochs = int((study.config.get("training") or {}).get("epochs", 30))
        return "Train longer, until every network predicts every class.", _again(study.command, f"training.epochs={3 * epochs}")
    if study.protocol != "outer":
        return "Use outer folds, so that the recipe can be judged and not only these networks.", _again(
            study.command, "splits.protocol=outer"
        )
    if any(record["verdict"] == "helps" for record in verdicts):
        return "Try the student on patients from elsewhere before you rely on it.", ""
    undecided = [pair for pair, record in zip(pairs, verdicts, strict=True) if record["verdict"] == "not decided"]
    if undecided:
        return _more(results, undecided, len([record for record in verdicts if record["verdict"] != "described"]))
    if pairs and all(record["verdict"] == "described" for record in verdicts):
        repeats = max(2, 2 * int((study.config.get("splits") or {}).get("repeats", 1)))
        return "Add repeats, so that the gain can be tested.", _again(study.command, f"splits.repeats={repeats}")
    return "Nothing more to train: the question is settled at the margin that the study has named.", ""


def _more(results: Results, undecided: Sequence[Pair], family: int) -> tuple[str, str]:
    """How many repeats would show the gain that was seen, for the pair with the largest one."""
    rare = results.study.rare
    pair = max(undecided, key=lambda each: abs(seen_gain(each, rare) or 0))
    found = pair.decision.gain
    if found is None or not math.isfinite(found.se) or not found.gain:
        return "Add repeats: so far both sides treat every patient alike.", ""
    seeds = max(len({run.seed for run in results.runs}), 1)
    kept = rare_kept(results.study.config, rare)
    runs = runs_needed(Pilot.of(found), abs(found.gain), kept=kept, level=LEVEL / max(family, 1))
    if runs is None or runs > 100:
        return (
            f"More repeats would not settle a difference as small as {change(found.gain)}; more patients with {rare} would, or a margin "
            "(evidence.margin) below which a difference does not matter.",
            "",
        )
    now, wanted = math.ceil(found.runs / seeds), math.ceil(runs / seeds)
    if wanted <= now:
        wanted = now + 1
    more = wanted - now
    words = f"About {more} more repeat{'' if more == 1 else 's'} would settle a true difference of {change(found.gain)} ({pair.entry})."
    return words, _again(results.study.command, f"splits.repeats={wanted}")


def _again(command: str, setting: str) -> str:
    """The study's command with another setting; empty for a command that takes none."""
    words = shlex.split(command) if command else []
    if words[:2] != ["raredistill", "study"]:
        return ""
    key = setting.partition("=")[0]
    return shlex.join([*(word for word in words if not word.startswith(f"{key}=")), setting])
