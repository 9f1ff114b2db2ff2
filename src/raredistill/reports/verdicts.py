"""Does a teacher help the rare class, and does its size matter? What the evidence allows to say, in sentences."""

from __future__ import annotations

from typing import Any

import numpy as np

from raredistill.errors import RareDistillError
from raredistill.evaluation.compare import holm
from raredistill.evaluation.differences import FEW_PATIENTS, Differences, Evidence, combine, weigh
from raredistill.reports.pairs import Pair
from raredistill.reports.results import Results

LEVEL = 0.05
BASES = {
    "folds": "corrected t-test over {n} folds x repeats (Nadeau and Bengio)",
    "patients": "paired bootstrap over the patients of one test set; the variance of training is not covered",
}


def verdicts(pairs: list[Pair], rare: str) -> list[dict[str, Any]]:
    """A record a pair on the rare class's F1, with Holm's adjustment over all pairs.

    Args:
        pairs: compared by ``f1:RARE`` first.
        rare: the rare class.

    Returns:
        ``entry, control, teacher, relation, difference, low, high, p, p_holm, detectable, worse, equal, better, basis, sentence, notes``
        and ``verdict``: ``helps``, ``harms``, ``not shown`` or ``cannot be tested``; numbers are None where nothing could be tested.
    """
    tested = [pair for pair in pairs if not pair.problem]
    adjusted = dict(zip([pair.entry for pair in tested], _adjusted([pair.evidence[f"f1:{rare}"].p for pair in tested]), strict=True))
    return [_record(pair, rare, adjusted.get(pair.entry), len(tested)) for pair in pairs]


def family(pairs: list[Pair], rare: str) -> str:
    """Which comparisons Holm's adjustment covers, and that no other p on the page is adjusted."""
    tested = [pair.entry for pair in pairs if not pair.problem]
    if not tested:
        return "Nothing could be tested, so no p value was adjusted."
    others = (
        "All other p values of this page (other metrics, the trend over sizes, footnotes) are not adjusted: they describe. "
        "Tests over several data sets, where there are any, are a family of their own."
    )
    if len(tested) == 1:
        return f"Holm's family has one comparison, {rare} F1 by slice of {tested[0]} against its control, so its p is as it was. {others}"
    named = ", ".join(tested)
    return f"Holm's family: {rare} F1 by slice of each tested entry against its control, {len(tested)} comparisons ({named}). {others}"


def _adjusted(values: list[float]) -> list[float]:
    return [float(value) for value in holm(values)] if values else []


def _record(pair: Pair, rare: str, p_holm: float | None, family: int) -> dict[str, Any]:
    record: dict[str, Any] = {"entry": pair.entry, "control": pair.control, "teacher": pair.teacher, "relation": pair.relation}
    found, tested = pair.differences.get(f"f1:{rare}"), pair.evidence.get(f"f1:{rare}")
    keys = ("low", "high", "p", "detectable", "worse", "equal", "better")
    record |= {"difference": found.estimate if found else None, **{key: getattr(tested, key, None) for key in keys}, "p_holm": p_holm}
    verdict = _verdict(tested, p_holm)
    basis = BASES[found.basis].format(n=len(found.values)) if found else ""
    record |= {"basis": basis, "verdict": verdict, "sentence": _sentence(pair, rare, record, verdict, family)}
    return {**record, "notes": _notes(pair, rare)}


def _verdict(tested: Evidence | None, p_holm: float | None) -> str:
    if tested is None or p_holm is None:
        return "cannot be tested"
    if p_holm >= LEVEL:
        return "not shown"
    return "helps" if tested.estimate > 0 else "harms"


def _sentence(pair: Pair, rare: str, record: dict[str, Any], verdict: str, family: int) -> str:
    teacher = f" (teacher {pair.teacher})" if pair.teacher else ""
    against = f"{pair.entry}{teacher} against {pair.control or 'no control'}: "
    if verdict == "cannot be tested":
        described = f"{rare} F1 {signed(record['difference'])}, " if record["difference"] is not None else ""
        return f"{against}{described}cannot be tested: {pair.problem.rstrip('.')}."
    plural = "s" if family > 1 else ""
    where = " on this test set" if pair.evidence[f"f1:{rare}"].basis == "patients" and verdict != "not shown" else ""
    return f"{against}{rare} F1 {told(record)}, {p_text(record['p_holm'])} after Holm over {family} comparison{plural}: {verdict}{where}."


def told(record: dict[str, Any]) -> str:
    """A difference with its interval: ``+0.021 [−0.004, +0.046]``."""
    return f"{signed(record['difference'])} [{signed(record['low'])}, {signed(record['high'])}]"


def signed(value: float) -> str:
    """Three decimals with a true minus sign."""
    return f"{value:+.3f}".replace("-", "−")


def p_text(p: float) -> str:
    """``p = 0.09``; two significant digits, never 0."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _notes(pair: Pair, rare: str) -> list[str]:
    tested = pair.evidence.get(f"f1:{rare}")
    if tested is None:
        return []
    notes = [f"The smallest {rare} F1 gain that this comparison would find with 80 % power is about {tested.detectable:.3f}."]
    if tested.basis == "folds":
        notes.append(
            f"Bayesian correlated t-test, region of practical equivalence ±0.01: worse {tested.worse:.0%}, "
            f"equivalent {tested.equal:.0%}, better {tested.better:.0%}."
        )
    return [*notes, *_threshold_note(pair, rare), *_disparity(pair)]


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
        ``sentences``, and ``slope, low, high, p`` (None where it cannot be tested).
    """
    metric = f"f1:{results.study.rare}"
    known = [pair for pair in pairs if metric in pair.differences and not np.isnan(pair.ratio)]
    sentences = [_by_relation(known, relation, metric) for relation in ("larger", "equal", "smaller")]
    nothing: dict[str, Any] = {"slope": None, "low": None, "high": None, "p": None}
    try:
        tested = weigh(_slope(known, metric))
    except RareDistillError as error:
        return {**nothing, "sentences": [*sentences, f"Whether size matters cannot be tested: {error}."]}
    record = {"slope": tested.estimate, "difference": tested.estimate, "low": tested.low, "high": tested.high, "p": tested.p}
    answer = "shown" if tested.p < LEVEL else "not shown"
    sentences.append(
        f"Each doubling of the teacher against its student changes the {results.study.rare} F1 gain by {told(record)}, "
        f"{p_text(tested.p)}: an effect of size is {answer}. Pairs share folds and teachers, so this is one trend over {len(known)} pairs."
    )
    return {**record, "sentences": sentences}


def _by_relation(pairs: list[Pair], relation: str, metric: str) -> str:
    gains = [f"{pair.teacher} → {pair.entry} {signed(pair.differences[metric].estimate)}" for pair in pairs if pair.relation == relation]
    name = {"larger": "Teacher larger than the student", "equal": "Equal in size", "smaller": "Teacher smaller than the student"}[relation]
    return f"{name}: {'; '.join(gains) if gains else 'no pair in this study'}."


def _slope(pairs: list[Pair], metric: str) -> Differences:
    sizes = np.log2([pair.ratio for pair in pairs])
    if len(pairs) < 2 or np.ptp(sizes) < 1e-9:
        raise RareDistillError("it needs pairs of different size ratios with a control each")
    centred = sizes - sizes.mean()
    return combine([pair.differences[metric] for pair in pairs], list(centred / (centred**2).sum()))


def cautions(results: Results) -> list[str]:
    """What a reader must know before believing a verdict."""
    study, said = results.study, []
    unfinished = len(study.runs) - len(results.runs)
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
    """What each test on the page can and cannot show."""
    folds = len(results.study.splits)
    if results.study.protocol == "outer":
        said = [
            "Each patient is tested once a repeat, so folds are compared by Nadeau and Bengio's corrected t-test: it covers patients and "
            "training, and allows for training sides that overlap. Seeds are averaged within a fold first; sizes are in patients.",
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
        "DeLong's test compares areas under patients' scores and McNemar's the patients called rightly; both take the trained networks as "
        "given, so they are footnotes: another training may turn them.",
    ]


def rare_power(results: Results, pairs: list[Pair]) -> str:
    """The power note of the whole study: the smallest gain that its best comparison could have found."""
    known = [pair.evidence[f"f1:{results.study.rare}"].detectable for pair in pairs if not pair.problem]
    if not known:
        return "Nothing could be tested, so no gain could have been detected."
    return (
        f"With these patients and splits the study could have detected gains in {results.study.rare} F1 of "
        f"{min(known):.3f} or more (80 % power, before Holm); smaller ones it cannot exclude."
    )
