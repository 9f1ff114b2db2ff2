"""Analyses behind the verdicts: one data frame per question, each the source of a table or a figure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from raredistill.errors import RareDistillError
from raredistill.evaluation.agreement import inheritance
from raredistill.evaluation.bootstrap import patient_intervals
from raredistill.evaluation.calibration import calibration_metrics, fit_temperature, reliability_table, restore_prior, scaled
from raredistill.evaluation.compare import delong, mcnemar
from raredistill.evaluation.conformal import set_coverage
from raredistill.evaluation.levels import RULES, by_patient, has_patients, patient_predictions
from raredistill.evaluation.thresholds import at_threshold, decision_curve, decision_summary, operating_point
from raredistill.metrics import classification_metrics
from raredistill.predictions import Predictions
from raredistill.reports.pairs import Pair, seen_gain
from raredistill.reports.results import Results
from raredistill.runs.record import RunRecord

WANTED = (0.8, 0.9, 0.95)
"""Sensitivities for which operating points are chosen."""
PARTS = ("ece", "ece_equal_mass", "brier", "brier_reliability", "brier_resolution", "brier_uncertainty", "brier_within")
POINT = ("entry", "level", "wanted_sensitivity")
COSTS = {"parameters": "parameters", "flops": "flops", "latency": "latency_ms"}
"""Costs of a gain: name of the Pareto front, and its column in the table of sizes."""
PRIOR = "prior restored"
"""The stage of calibration that is left out at patient level."""
HARDEST = 20
MISS = 0.1
"""Share of each class's samples that prediction sets may miss."""
POINTS = 200


def intervals(results: Results) -> pd.DataFrame:
    """Scores of every entry with percentile and BCa intervals over patients, by level."""
    rare = results.study.rare
    metrics = (f"f1:{rare}", f"recall:{rare}", f"auprc:{rare}", "macro_f1")
    rows = []
    for entry, level, table in results.levels:
        for metric, (estimate, found) in zip(metrics, patient_intervals(table, metrics), strict=True):
            (low, high), (bca_low, bca_high) = found["percentile"], found["bca"]
            limits = {"low": low, "high": high, "bca_low": bca_low, "bca_high": bca_high}
            rows.append({"entry": entry, "level": level, "metric": metric, "estimate": estimate, **limits})
    return pd.DataFrame(rows)


Stages = dict[tuple[str, str], dict[str, tuple[Any, Any]]]
"""Labels ``(N,)`` and probabilities ``(N, K)`` of test parts, by entry and level, then by stage; at patient level, only patient classes."""


def calibration(results: Results, stages: Stages) -> pd.DataFrame:
    """Calibration of every entry by level: raw, with a temperature fitted on validation, and with the deployment prior restored."""
    rare, background = results.study.rare, results.study.cohort.background
    classes = {"slice": list(results.study.cohort.classes)}
    classes["patient"] = [name for name in classes["slice"] if name != background]
    rows = []
    for (entry, level), each in stages.items():
        for stage, (label, probability) in each.items():
            found = calibration_metrics(label, probability)
            of_rare = {f"ece:{rare}": float(found["ece_by_class"][classes[level].index(rare)])}
            where = {"entry": entry, "level": level, "stage": stage, "predictions": len(label)}
            rows.append({**where, **{key: float(found[key]) for key in PARTS}, **of_rare})
    return pd.DataFrame(rows)


def reliability(stages: Stages) -> pd.DataFrame:
    """Reliability diagrams as a table: one row per entry, level, stage and bin."""
    parts = [
        reliability_table(*sides).assign(entry=entry, level=level, stage=stage)
        for (entry, level), each in stages.items()
        for stage, sides in each.items()
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def calibrated_entries(results: Results) -> tuple[Stages, pd.DataFrame]:
    """Every entry's probabilities by level and stage, and the temperature fitted on each run's validation part."""
    fitted = temperatures(results)
    found = {entry: calibrated(results, entry, fitted) for entry in results.entries if results.of(entry)}
    return {(entry, level): stages for entry, each in found.items() for level, stages in each.items()}, fitted


def calibrated(results: Results, entry: str, fitted: pd.DataFrame) -> dict[str, dict[str, tuple[Any, Any]]]:
    """Labels ``(N,)`` and probabilities ``(N, K)`` of an entry's test parts by level and stage; without a validation part raw only.

    The deployment prior is the class share of the cohort outside a run's test part, before any class is made rare; it can be restored if
    the carried prior is known. It is a prior of slices, so it is restored by slice only; patients combine slices after temperature scaling.
    """
    found: dict[str, dict[str, list[tuple[Any, Any]]]] = {}
    known = {tuple(row[:4]): float(row[4]) for row in fitted.itertuples(index=False)}
    for run in results.of(entry):
        temperature = known.get((entry, *run.cell))
        test = results.tables[run.id].part("test")
        for stage, probability in _stages(results, run, test, temperature).items():
            found.setdefault("slice", {}).setdefault(stage, []).append((test.labels(), probability))
            if stage != PRIOR and has_patients(test):
                patients = patient_predictions(test.with_logits(np.log(np.clip(probability, np.finfo(np.float64).tiny, None))))
                found.setdefault("patient", {}).setdefault(stage, []).append((patients.label, patients.probability))
    return {level: {stage: _joined(parts) for stage, parts in each.items()} for level, each in found.items()}


def _joined(parts: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    return np.concatenate([label for label, _ in parts]), np.concatenate([probability for _, probability in parts])


def _stages(results: Results, run: RunRecord, test: Predictions, temperature: float | None) -> dict[str, Any]:
    stages = {"raw": test.probabilities()}
    if temperature is None:
        return stages
    stages["temperature"] = scaled(test.logits(), temperature)
    if run.id in results.priors:
        stages[PRIOR] = restore_prior(test.probabilities(), results.priors[run.id], deployment_prior(results, test))
    return stages


def deployment_prior(results: Results, test: Predictions) -> NDArray[np.float64]:
    """Class shares ``(K,)`` of the cohort without a run's test part; validation may be rarefied or truncated, so it cannot be used."""
    whole = {row["class"]: row["slices"] for row in results.study.cohort.counts}
    counts = np.array([whole[name] for name in test.classes], dtype=np.float64)
    rest = counts - np.bincount(test.labels(), minlength=len(test.classes))
    known = rest if (rest > 0).all() else counts
    return np.asarray(known / known.sum())


def temperatures(results: Results) -> pd.DataFrame:
    """The fitted temperature of every run that has a validation part."""
    rows = []
    for run in results.runs:
        table = results.tables[run.id]
        if (table.table["split"] == "validation").any():
            part = table.part("validation")
            rows.append((run.name, run.repeat, run.fold, run.seed, fit_temperature(part.labels(), part.logits())))
    return pd.DataFrame(rows, columns=["entry", "repeat", "fold", "seed", "temperature"])


def operating_points(results: Results) -> pd.DataFrame:
    """The rare class's threshold, chosen on validation for a given sensitivity, and its performance on test; means over runs, by level."""
    rows = []
    for run in results.runs:
        for level, (chosen, scores), (truth, tested) in _sides(results.tables[run.id], results.study.rare):
            for wanted in WANTED if chosen.any() else ():
                threshold = operating_point(chosen, scores, wanted)
                where = {"entry": run.name, "level": level, "wanted_sensitivity": wanted, "threshold": threshold}
                rows.append({**where, **at_threshold(truth, tested, threshold)})
    if not rows:
        return pd.DataFrame(columns=[*POINT, "threshold", "sensitivity", "specificity", "precision", "flagged"])
    return pd.DataFrame(rows).groupby(list(POINT), sort=False).mean().reset_index()


def _sides(table: Predictions, rare: str) -> Iterator[tuple[str, tuple[Any, Any], tuple[Any, Any]]]:
    """Level, and truth and score of the rare class on validation and on test; nothing without a validation part."""
    if not (table.table["split"] == "validation").any():
        return
    validation, test = table.part("validation"), table.part("test")
    yield "slice", _rare(validation, rare), _rare(test, rare)
    if has_patients(validation) and has_patients(test):
        yield "patient", _rare(by_patient(validation), rare), _rare(by_patient(test), rare)


def _rare(predictions: Predictions, rare: str) -> tuple[Any, Any]:
    place = predictions.classes.index(rare)
    return predictions.labels() == place, predictions.probabilities()[:, place]


def _by_level(results: Results, make: Callable[[Any, Any], pd.DataFrame]) -> pd.DataFrame:
    """A table of the rare class's truth and score over each entry's pooled test parts, by level."""
    tables = []
    for entry, level, pooled in results.levels:
        table = make(*_rare(pooled, results.study.rare))
        table.insert(0, "entry", entry)
        table.insert(1, "level", level)
        tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def decision_curves(results: Results) -> pd.DataFrame:
    """Net benefit of acting on the rare class, by level."""
    return _by_level(results, lambda truth, score: decision_curve(truth, score, np.linspace(0.02, 0.9, 45)))


def decisions(results: Results, curves: pd.DataFrame) -> pd.DataFrame:
    """Each decision curve in five numbers, read at the rare class's share of the cohort: what one would act on without a classifier."""
    counts = {row["class"]: row["slices"] for row in results.study.cohort.counts}
    share = counts[results.study.rare] / sum(counts.values())
    rows = [{"entry": entry, "level": level, **decision_summary(curve, share)} for (entry, level), curve in _curves_of(curves)]
    return pd.DataFrame(rows)


def _curves_of(curves: pd.DataFrame) -> Iterator[tuple[tuple[str, str], pd.DataFrame]]:
    for (entry, level), curve in curves.groupby(["entry", "level"], sort=False) if len(curves) else ():
        yield (str(entry), str(level)), curve


def prediction_sets(results: Results) -> pd.DataFrame:
    """Conformal sets of each class, calibrated on each run's validation part and counted on its test part; means over runs."""
    tables = []
    for run in results.runs:
        table = results.tables[run.id]
        if table.hard or not (table.table["split"] == "validation").any():
            continue
        try:
            tables.append(set_coverage(table.part("validation"), table.part("test"), miss=MISS).assign(entry=run.name))
        except RareDistillError:
            continue  # a validation part without a class calibrates no sets
    if not tables:
        return pd.DataFrame()
    means = pd.concat(tables).groupby(["entry", "class"], sort=False)[["coverage", "size", "only"]].mean().reset_index()
    return means.assign(promised=1 - MISS)


def roc_curves(results: Results) -> pd.DataFrame:
    """ROC of the rare class over the pooled test parts, thinned to ``POINTS`` points per entry and level."""
    return _by_level(results, lambda truth, score: _curve(truth, score)[["threshold", "false_positive_rate", "recall"]])


def precision_recall_curves(results: Results) -> pd.DataFrame:
    """Precision against recall of the rare class over the pooled test parts, thinned to ``POINTS`` points per entry and level."""
    return _by_level(results, lambda truth, score: _curve(truth, score)[["threshold", "recall", "precision"]])


def _curve(truth: Any, score: Any) -> pd.DataFrame:
    order = np.argsort(-score, kind="stable")
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    hits = np.cumsum(truth[order])[last]
    false = last + 1 - hits
    columns = {
        "threshold": score[order][last], "recall": hits / max(int(truth.sum()), 1), "precision": hits / (last + 1),
        "false_positive_rate": false / max(int((~truth).sum()), 1),
    }  # fmt: skip
    kept = np.unique(np.linspace(0, len(last) - 1, min(len(last), POINTS)).astype(int))
    return pd.DataFrame(columns).iloc[kept].reset_index(drop=True)


def patient_rules(results: Results) -> pd.DataFrame:
    """Patient-level scores for each rule that combines a patient's slices; means over runs."""
    rare, rows = results.study.rare, []
    for run in results.runs:
        part = results.tables[run.id].part("test")
        for rule in RULES if has_patients(part) else ():
            found = patient_predictions(part, rule)
            place, metrics = found.classes.index(rare), classification_metrics(found.label, found.probability)
            of_rare = {f"{rare} {key}": float(metrics[key][place]) for key in ("f1", "recall", "specificity", "auroc", "auprc")}
            rows.append({"entry": run.name, "rule": rule, **of_rare, "macro_f1": metrics["macro_f1"]})
    return pd.DataFrame(rows).groupby(["entry", "rule"], sort=False).mean().reset_index() if rows else pd.DataFrame()


def footnotes(pairs: list[Pair], rare: str) -> pd.DataFrame:
    """DeLong's test on patients' scores and McNemar's on correctly classified patients, one row per pair."""
    rows = []
    for pair in pairs:
        if pair.sides is None or not has_patients(pair.sides[0]):
            continue
        control, other = (patient_predictions(side) for side in pair.sides)
        place = control.classes.index(rare)
        try:
            areas = delong(control.label == place, other.probability[:, place], control.probability[:, place])
        except RareDistillError:
            areas = (float("nan"),) * 4
        only, only_control, p = mcnemar(*(side.probability.argmax(axis=1) == side.label for side in (other, control)))
        numbers = {"auroc": areas[0], "control_auroc": areas[1], "delong_p": areas[3]}
        right = {"right_by_entry_only": only, "right_by_control_only": only_control, "mcnemar_p": p}
        rows.append({"entry": pair.entry, "control": pair.control, "patients": len(control.label), **numbers, **right})
    return pd.DataFrame(rows)


def inherited(results: Results, pairs: list[Pair]) -> pd.DataFrame:
    """Agreement of every student with its teacher, and the share of the teacher's errors that it repeats, compared with its control."""
    rows = []
    for pair in pairs:
        cells = results.cells(pair.entry) & results.cells(pair.control) & results.cells(pair.teacher)
        sides = [results.pooled(name, cells) for name in (pair.entry, pair.teacher, pair.control)] if cells else []
        if sides and not any(side is None for side in sides):
            found = inheritance(*sides)  # type: ignore[arg-type]
            rows.append({"entry": pair.entry, "teacher": pair.teacher, **found, "teacher_errors": int(found["teacher_errors"])})
    return pd.DataFrame(rows)


def hardest_patients(results: Results) -> pd.DataFrame:
    """The hardest patients of the rare class: the probability that each entry gives to the rare class, and the mean."""
    columns = {}
    for entry in results.entries:
        pooled = results.pooled(entry)
        if pooled is None or not has_patients(pooled):
            continue
        found = patient_predictions(pooled)
        place = found.classes.index(results.study.rare)
        scores = pd.Series(found.probability[:, place], index=pd.Index(found.patient, name="patient"))
        columns[entry] = scores[found.label == place]
    return _hardest(columns)


def hardest_slices(results: Results) -> pd.DataFrame:
    """The hardest slices of the rare class, by the probability of the rare class, averaged over seeds and repeats."""
    columns = {}
    for entry in results.entries:
        pooled = results.pooled(entry)
        if pooled is not None:
            truth, score = _rare(pooled, results.study.rare)
            rows = pooled.table.loc[truth, ["patient", "sample"]].assign(score=score[truth])
            columns[entry] = rows.groupby(["patient", "sample"])["score"].mean()
    return _hardest(columns)


def _hardest(columns: dict[str, pd.Series]) -> pd.DataFrame:
    if not columns:
        return pd.DataFrame()
    # The prefix keeps entries' names apart from those of other columns.
    table = pd.DataFrame(columns).add_prefix("by ")
    table["mean"] = table.mean(axis=1)
    return table.sort_values("mean").head(HARDEST).reset_index()


def sizes(results: Results, summary: pd.DataFrame) -> pd.DataFrame:
    """Parameters, FLOPs, bytes and measured latency against scores, and whether an entry is on the Pareto front of each.

    Latency is the median over the runs of an entry's network, undefined for runs made before it was measured. It has a front only where
    all entries were measured on one device.
    """
    rare = f"{results.study.rare} f1"
    facts = pd.DataFrame([{key: getattr(results.first(entry), key) for key in ("model", "flops", "bytes")} for entry in results.entries])
    latency = pd.DataFrame([_latency(_same_network(results, entry)) for entry in results.entries])
    table = pd.concat([summary[["entry", "parameters"]], facts, latency, summary[[rare, "macro_f1"]]], axis=1)
    comparable = (
        table["latency_ms"].notna().all() and table["latency_on"].nunique() == 1 and not table["latency_on"].str.contains(";").any()
    )
    fronts = {f"front_{name}": _front(table[column], table[rare]) for name, column in COSTS.items()}
    return table.assign(**fronts if comparable else {**fronts, "front_latency": "unknown"})


def _same_network(results: Results, entry: str) -> list[RunRecord]:
    """Finished runs of an entry's network, by whatever it was taught: one network has one latency."""
    first = results.first(entry)
    return [run for run in results.runs if all(getattr(run, key) == getattr(first, key) for key in ("model", "channels", "parameters"))]


def _latency(runs: list[RunRecord]) -> dict[str, Any]:
    measured = [run for run in runs if run.latency_ms is not None]
    median = float(np.median([float(run.latency_ms or 0) for run in measured])) if measured else float("nan")
    return {"latency_ms": median, "latency_on": "; ".join(sorted({run.latency_on for run in measured}))}


def _front(cost: pd.Series, score: pd.Series) -> list[str]:
    """Whether no other entry is at least as good in both and better in one (Pareto front); ``no`` without a score."""
    pairs = list(zip(cost, score, strict=True))
    beaten = [any(c <= own and s >= reached and (c, s) != (own, reached) for c, s in pairs) for own, reached in pairs]
    return ["no" if worse or np.isnan(reached) else "yes" for worse, (_, reached) in zip(beaten, pairs, strict=True)]


def gains(pairs: list[Pair], rare: str) -> pd.DataFrame:
    """The rare class's gain for every pair, and the relative size of the teacher."""
    rows = []
    for pair in pairs:
        if (gain := seen_gain(pair, rare)) is not None:
            tested = pair.decision.gain or pair.evidence.get(f"f1:{rare}")
            limits = {key: getattr(tested, key, float("nan")) for key in ("low", "high")}
            where = {"entry": pair.entry, "teacher": pair.teacher, "relation": pair.relation, "size_ratio": pair.ratio}
            rows.append({**where, "gain": gain, **limits})
    return pd.DataFrame(rows, columns=["entry", "teacher", "relation", "size_ratio", "gain", "low", "high"])


def imbalance_ratio(results: Results) -> float:
    """Training samples of the most frequent class per sample of the rare class, over all splits."""
    counts: dict[str, int] = {}
    for row in results.study.split_table:
        if row["side"] == "train":
            counts[row["class"]] = counts.get(row["class"], 0) + row["slices"]
    rare = counts.get(results.study.rare, 0)
    return max(counts.values()) / rare if rare else float("nan")


def sweep(studies: Sequence[tuple[Results, list[Pair]]]) -> pd.DataFrame:
    """The rare class's gain for every pair, over studies that differ in the imbalance of training."""
    tables = []
    for results, pairs in studies:
        table = gains(pairs, results.study.rare)
        table.insert(0, "imbalance_ratio", imbalance_ratio(results))
        table.insert(0, "study", results.study.name)
        tables.append(table)
    return pd.concat(tables, ignore_index=True).sort_values(["entry", "imbalance_ratio"], ignore_index=True)
