"""Does a teacher help the rare class, and does its size matter? Conclusions from the evidence, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from raredistill.errors import RareDistillError
from raredistill.evaluation.differences import FEW_PATIENTS, Evidence
from raredistill.evaluation.gains import assess, slope
from raredistill.evaluation.looks import State
from raredistill.evaluation.planning import error_range
from raredistill.evaluation.verdicts import LEVEL, Ruling, Verdict, p_text, rule, signed
from raredistill.reports.decision import DECIDING, rare_kept
from raredistill.reports.pairs import Pair, seen_gain
from raredistill.reports.results import Results

NETWORKS = "paired bootstrap over the patients of one test set: a claim about these networks only"
BASIS = "gain test over {runs} runs of {folds} folds; {view}"


def verdicts(
    pairs: list[Pair], rare: str, margin: float | None = None, kept: float = 1.0, states: Mapping[str, State] | None = None
) -> list[dict[str, Any]]:
    """One record per pair on the rare class's F1, decided by the gain test, with Holm's adjustment over all tested pairs.

    Args:
        pairs: with their decisions.
        rare: the rare class.
        margin: largest difference without practical meaning, fixed before the study; None for no equivalence test.
        kept: share of the rare class's patients that training keeps.
        states: for a study with looks, their decisions.

    Returns:
        ``entry, control, teacher, relation, difference, low, high, p, p_holm, p_same, detectable, training_share, basis, sentence, notes``,
        the references ``nb_p, worse, equal, better``, the gains in other views ``argmax, best_checkpoint``, and ``verdict``: ``helps``,
        ``harms``, ``makes no practical difference``, ``not decided`` or ``described``; numbers are None if nothing was tested.
    """
    gains = {pair.entry: pair.decision.gain for pair in pairs if pair.decision.gain is not None and not pair.shared}
    barred = {pair.entry: _reason(pair) for pair in pairs if pair.entry not in gains or pair.decision.reason}
    patients = {pair.decision.rare_patients for pair in pairs if pair.entry in gains}
    ruled = rule(gains, controls={pair.entry: pair.control for pair in pairs}, what=f"{rare} F1", described=barred, margin=margin,
                 kept=kept, rare_patients=min(patients) if patients else None, states=states)  # fmt: skip
    return [_record(pair, rare, ruled[pair.entry]) for pair in pairs]


def _reason(pair: Pair) -> str:
    if pair.shared:
        return "all runs share one test set, so only these networks can be compared, not what trained them"
    return pair.decision.reason or pair.problem


def tested(pairs: list[Pair]) -> list[Pair]:
    """The pairs tested by the gain test: Holm's family."""
    return [pair for pair in pairs if pair.decision.gain is not None and not pair.decision.reason and not pair.shared]


def family(pairs: list[Pair], rare: str) -> str:
    """Sentence on the comparisons that Holm's adjustment covers; no other p on the page is adjusted."""
    names = [pair.entry for pair in tested(pairs)]
    if not names:
        return "Nothing could be tested, so no p value was adjusted."
    others = (
        "All other p values of this page (other metrics, the trend over sizes, footnotes) are not adjusted: they describe. "
        "Tests over several data sets, where there are any, are a family of their own."
    )
    if len(names) == 1:
        return f"Holm's family has one comparison, {rare} F1 by slice of {names[0]} against its control, so its p is as it was. {others}"
    named = ", ".join(names)
    return f"Holm's family: {rare} F1 by slice of each tested entry against its control, {len(names)} comparisons ({named}). {others}"


def _record(pair: Pair, rare: str, ruling: Ruling) -> dict[str, Any]:
    gain, reference = ruling.gain if ruling.verdict is not Verdict.DESCRIBED else None, pair.evidence.get(f"f1:{rare}")
    numbers = {key: getattr(gain, key, None) for key in ("low", "high", "p", "detectable", "training_share")}
    references = {"nb_p": getattr(reference, "p", None), **{key: getattr(reference, key, None) for key in ("worse", "equal", "better")}}
    beside = {view.replace(" ", "_"): found.gain for view, found in pair.decision.beside.items()}
    described = pair.shared and reference is not None
    basis = NETWORKS if described else BASIS.format(runs=gain.runs, folds=gain.folds, view=DECIDING) if gain else ""
    return {
        "entry": pair.entry, "control": pair.control, "teacher": pair.teacher, "relation": pair.relation,
        "difference": seen_gain(pair, rare), **numbers, "p_holm": ruling.p_holm, "p_same": ruling.p_same, **references,
        **dict.fromkeys(("argmax", "best_checkpoint")), **beside, "basis": basis, "verdict": str(ruling.verdict),
        "sentence": _networks(pair, rare) if described else _described(pair, rare, ruling),
        "notes": [*ruling.notes, *_notes(pair, rare, ruling)],
    }  # fmt: skip


def _described(pair: Pair, rare: str, ruling: Ruling) -> str:
    seen = seen_gain(pair, rare)
    if ruling.verdict is not Verdict.DESCRIBED or ruling.gain is not None or seen is None:
        return ruling.sentence
    reason = _reason(pair).rstrip(".")
    return f"{pair.entry} against {pair.control or 'no control'}: {rare} F1 {signed(seen)}, described, not tested: {reason}."


def _networks(pair: Pair, rare: str) -> str:
    found = pair.evidence[f"f1:{rare}"]
    numbers = told(vars(found) | {"difference": found.estimate})
    return (
        f"{pair.entry} against {pair.control}: {rare} F1 {numbers} on this test set ({p_text(found.p)}). This is about these networks "
        "only: all runs share one test set, so whether the recipe helps is not tested."
    )


def told(record: dict[str, Any]) -> str:
    """Format a difference with its interval: ``+0.021 [−0.004, +0.046]``."""
    return f"{signed(record['difference'])} [{signed(record['low'])}, {signed(record['high'])}]"


def _notes(pair: Pair, rare: str, ruling: Ruling) -> list[str]:
    notes = [f"Left out: {each}." for each in pair.decision.missing]
    notes += _beside(pair, rare, ruling) + _closed(pair, rare) + _within_cohort(pair, ruling)
    reference = pair.evidence.get(f"f1:{rare}")
    if reference is not None and reference.basis == "folds":
        notes.append(
            f"References, which decide nothing: corrected t over {len(pair.differences[f'f1:{rare}'].values)} folds x repeats (Nadeau and "
            f"Bengio, best checkpoint, argmax) {p_text(reference.p)}; Bayesian correlated t, ±0.01: worse {reference.worse:.0%}, "
            f"equivalent {reference.equal:.0%}, better {reference.better:.0%}."
        )
    return [*notes, *_threshold_note(pair, rare), *_disparity(pair)] if reference is not None else notes


def _beside(pair: Pair, rare: str, ruling: Ruling) -> list[str]:
    """Notes on the other views; a gain with argmax but not with the matched threshold is due to the threshold alone."""
    beside = pair.decision.beside
    if not beside or ruling.gain is None:
        return []
    numbers = "; ".join(f"{view} {signed(each.gain)} [{signed(each.low)}, {signed(each.high)}]" for view, each in beside.items())
    notes = [f"Decided on {DECIDING}; beside it {numbers}."]
    argmax = beside.get("argmax")
    if argmax is not None and argmax.p < LEVEL <= ruling.gain.p:
        notes.append(f"By argmax {rare} F1 moved, at matched thresholds it did not: a gain by threshold alone.")
    return notes


def _within_cohort(pair: Pair, ruling: Ruling) -> list[str]:
    p = pair.decision.swap_p
    if p is None or p >= LEVEL or ruling.verdict is not Verdict.UNDECIDED:
        return []
    return [f"Within this cohort the difference is more than luck of training (swap {p_text(p)}); that it holds for others is not shown."]


def _closed(pair: Pair, rare: str) -> list[str]:
    if pair.decision.closed is None:
        return []
    share, low, high = pair.decision.closed
    return [f"Of {pair.teacher}'s own advantage over the control in {rare} F1 it reaches {share:.0%} ({low:.0%} to {high:.0%}, Fieller)."]


def _threshold_note(pair: Pair, rare: str) -> list[str]:
    recall, area = pair.evidence.get(f"recall:{rare}"), pair.evidence.get(f"auprc:{rare}")
    if recall is None or area is None or _beyond_zero(area) or not _beyond_zero(recall):
        return []
    numbers = f"recall {told(vars(recall) | {'difference': recall.estimate})}, AUPRC {told(vars(area) | {'difference': area.estimate})}"
    return [f"Only recall moved, AUPRC did not ({numbers}): the threshold moved, the ranking did not."]


def _beyond_zero(evidence: Evidence) -> bool:
    return not evidence.low <= 0 <= evidence.high


def _disparity(pair: Pair) -> list[str]:
    moved = {metric.partition(":")[2]: found.estimate for metric, found in pair.differences.items() if metric.startswith("f1:")}
    gained = [f"{name} {signed(value)}" for name, value in moved.items() if value > 0]
    lost = [f"{name} {signed(value)}" for name, value in moved.items() if value < 0]
    return [f"F1 by class: gained {', '.join(gained) or 'none'}; lost {', '.join(lost) or 'none'}."]


def size_verdict(results: Results, pairs: list[Pair]) -> dict[str, Any]:
    """The second question: the gain against the teacher's size, as the slope on log2(teacher / student parameters).

    Returns:
        ``sentences``, and ``slope, low, high, p`` (None if it cannot be tested).
    """
    rare = results.study.rare
    known = [pair for pair in tested(pairs) if not np.isnan(pair.ratio)]
    sentences = [_by_relation(pairs, relation, rare) for relation in ("larger", "equal", "smaller")]
    nothing: dict[str, Any] = {"slope": None, "low": None, "high": None, "p": None}
    try:
        line = slope([pair.decision.contrast for pair in known if pair.decision.contrast], [float(np.log2(pair.ratio)) for pair in known])
        found = assess([line], kept=rare_kept(results.study.config, rare))[0]
    except RareDistillError as error:
        return {**nothing, "sentences": [*sentences, f"Whether size matters cannot be tested: {str(error).rstrip('.')}."]}
    record = {"slope": found.gain, "difference": found.gain, "low": found.low, "high": found.high, "p": found.p}
    answer = "shown" if found.p < LEVEL else "not shown"
    sentences.append(
        f"Each doubling of the teacher against its student changes the {rare} F1 gain by {told(record)}, "
        f"{p_text(found.p)}: an effect of size is {answer}. Pairs share folds and teachers, so this is one trend over {len(known)} pairs."
    )
    return {**record, "sentences": sentences}


def _by_relation(pairs: list[Pair], relation: str, rare: str) -> str:
    seen = [(pair, seen_gain(pair, rare)) for pair in pairs if pair.relation == relation]
    gains = [f"{pair.teacher} → {pair.entry} {signed(gain)}" for pair, gain in seen if gain is not None]
    name = {"larger": "Teacher larger than the student", "equal": "Equal in size", "smaller": "Teacher smaller than the student"}[relation]
    return f"{name}: {'; '.join(gains) if gains else 'no pair in this study'}."


def cautions(results: Results, spared: int = 0) -> list[str]:
    """Cautions for reading the verdicts; ``spared`` runs were not needed, since their pairs were settled."""
    study, said = results.study, []
    unfinished = len(study.runs) - len(results.runs) - spared
    if spared:
        said.append(f"By its looks the study was settled early: {spared} of {len(study.runs)} runs were not needed.")
    if unfinished:
        said.append(f"This study is unfinished: {unfinished} of {len(study.runs)} runs are missing or failed.")
    said += [f"{run.id}: {each}." for run in results.runs for each in run.remarks]
    if study.cohort.generated:
        said.append("The cohort is generated (a phantom): its numbers say nothing about patients.")
    if not study.cohort.patients_known:
        said.append("No patients are known: each image is its own unit, so images of one patient may stand on two sides.")
    rare = next((row["patients"] for row in study.cohort.counts if row["class"] == study.rare), 0)
    if rare < FEW_PATIENTS:
        said.append(f"Only {rare} patients carry {study.rare}: expect wide intervals and no proof of small gains.")
    if any(run.external_teacher for run in study.runs):
        said.append("A teacher was trained elsewhere; that it has not seen these patients is the user's word.")
    if study.cohort.background:
        said.append(f"{study.cohort.background} slices come from patients with a disease: they are slices without visible findings.")
    return said


def notes_on_tests(results: Results) -> list[str]:
    """Notes on what each test on the page can and cannot show."""
    folds = len(results.study.splits)
    if results.study.protocol == "outer":
        said = [
            "Each patient is tested once per repeat, so the gain test applies: it covers new patients, new trainings and a new cohort "
            "of this size. That training patients' luck adds as much variance as tested patients' is an assumption that simulations bear "
            "out.",
            "The corrected t-test over folds and the Bayesian one ask the same with less power and stand beside it. Training sizes leave "
            "validation and rarefied patients out, which widens them by 1.07 to 1.16.",
            "Intervals of single scores resample the patients of all test parts; what another training set would change they do not cover.",
        ]
    else:
        said = [
            "All runs share one test set: scores are averaged over runs and patients are resampled on both sides alike. "
            "The variance of training is not covered: another training set may give another answer, whatever the p."
        ]
    smallest = min(1.0, 2.0 / 2 ** max(folds, 1))
    return [
        *said,
        f"Wilcoxon's test is for several data sets, not for folds: with {folds} it could not reach a p below {smallest:.4g}. "
        "raredistill report --across and raredistill compare take several data sets for that.",
        "DeLong's test compares areas under patients' scores and McNemar's the patients that are correctly classified. Both take the "
        "trained networks as fixed: they are about these networks only, and of true nulls about recipes they reject 13 to 26 %.",
    ]


def rare_power(results: Results, pairs: list[Pair]) -> str:
    """Note on the power of the whole study: the most precise pair, at Holm's level, with its range."""
    known = {pair.entry: pair.decision.gain for pair in tested(pairs) if pair.decision.gain and np.isfinite(pair.decision.gain.se)}
    if not known:
        return "Nothing could be tested, so no gain could have been detected."
    name, best = min(known.items(), key=lambda each: each[1].se)
    level = LEVEL / len(known)
    smallest = best.se * float(stats.t.isf(level / 2, best.df) + stats.t.ppf(0.8, best.df))
    low, high = error_range(best.df)
    return (
        f"The most precise comparison, {name}, could have shown gains in {results.study.rare} F1 of about {smallest:.3f} with 80 % "
        f"power at the level that Holm leaves for {len(known)} comparisons; estimated from so few networks, the true figure may be "
        f"{smallest / high:.3f} to {smallest / low:.3f}. Smaller gains it cannot exclude."
    )
