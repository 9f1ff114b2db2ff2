"""Does a teacher help the rare class? Each distilled entry against its control, with what the evidence allows to say."""

from __future__ import annotations

import math
from typing import Any

from raredistill.errors import RareDistillError
from raredistill.evaluation.bootstrap import paired_patient_bootstrap
from raredistill.evaluation.compare import holm
from raredistill.report.results import Results, cell

RESAMPLES = 2000
LEVEL = 0.05
FEW_PATIENTS = 20


def verdicts(results: Results) -> list[dict[str, Any]]:
    """Compare every distilled entry with the baseline of the same network, loss and channels.

    Returns:
        One record an entry: ``entry, control, teacher, direction, rare_f1, low, high, p, p_holm, rare_recall, macro_f1, verdict`` and
        ``sentence``; where no control exists the numbers are None and the verdict says so.
    """
    found = [_compare(results, name) for name in results.entries if _first(results, name)["kind"] == "distilled"]
    tested = [record for record in found if record["p"] is not None]
    for record, adjusted in zip(tested, holm([record["p"] for record in tested]) if tested else [], strict=True):
        record["p_holm"] = float(adjusted)
    for record in found:
        record["verdict"] = _verdict(record)
        record["sentence"] = _sentence(record, results.study, len(tested))
    return found


def _first(results: Results, name: str) -> dict[str, Any]:
    return next(run for run in results.study["runs"] if run["name"] == name)


def control_of(results: Results, name: str) -> str | None:
    """The baseline that differs from an entry by its teacher only; None when the study has none."""
    own = _first(results, name)
    same = ("model", "loss", "channels")
    others = [_first(results, other) for other in results.entries if other != name]
    found = [run["name"] for run in others if run["kind"] == "baseline" and all(run[key] == own[key] for key in same)]
    return found[0] if found else None


def _compare(results: Results, name: str) -> dict[str, Any]:
    run, control = _first(results, name), control_of(results, name)
    record: dict[str, Any] = {
        "entry": name, "control": control or "", "teacher": run["teacher_name"], "direction": run["direction"], "rare_f1": None,
        "low": None, "high": None, "p": None, "p_holm": None, "rare_recall": None, "macro_f1": None, "cells": 0,
    }  # fmt: skip
    cells = {cell(own) for own in results.of(name)} & {cell(other) for other in results.of(control or "")}
    if control is None or not cells:
        return record
    pair = results.pooled(name, cells), results.pooled(control, cells)
    rare = results.study["rare"]
    try:
        f1, low, high, p = paired_patient_bootstrap(*pair, f"f1:{rare}", resamples=RESAMPLES)  # type: ignore[arg-type]
        recall = paired_patient_bootstrap(*pair, f"recall:{rare}", resamples=200)[0]  # type: ignore[arg-type]
        macro = paired_patient_bootstrap(*pair, "macro_f1", resamples=200)[0]  # type: ignore[arg-type]
    except RareDistillError as error:
        return {**record, "problem": str(error)}
    numbers = {"rare_f1": f1, "low": low, "high": high, "p": p, "rare_recall": recall, "macro_f1": macro, "cells": len(cells)}
    return {**record, **{key: float(value) if key != "cells" else value for key, value in numbers.items()}}


def _verdict(record: dict[str, Any]) -> str:
    if record["p"] is None:
        return "no control"
    if record["p_holm"] >= LEVEL or math.isnan(record["rare_f1"]) or record["low"] <= 0 <= record["high"]:
        return "not shown"
    return "helps" if record["rare_f1"] > 0 else "harms"


def _sentence(record: dict[str, Any], study: dict[str, Any], family: int) -> str:
    if record["p"] is None:
        reason = record.get("problem") or "the study has no finished baseline of the same network, loss and channels"
        return f"{record['entry']}: cannot be judged: {reason}."
    interval = f"[{record['low']:+.3f}, {record['high']:+.3f}]"
    plural = "s" if family > 1 else ""
    return (
        f"{record['entry']} against {record['control']}: {study['rare']} F1 {record['rare_f1']:+.3f} {interval}, "
        f"p = {record['p_holm']:.3f} after Holm over {family} comparison{plural}: {record['verdict']}."
    )


def cautions(results: Results) -> list[str]:
    """What a reader must know before believing a verdict."""
    study, said = results.study, []
    unfinished = len(study["runs"]) - len(results.runs)
    if unfinished:
        said.append(f"This study is unfinished: {unfinished} of {len(study['runs'])} runs are missing or failed.")
    said += [f"{run['id']}: {remark}." for run in results.runs for remark in run.get("remarks", ())]
    if generated(study):
        said.append("The cohort is generated (a phantom): its numbers say nothing about patients.")
    if study["cohort"]["patients"] == study["cohort"]["samples"]:
        said.append("No patients are known: each image is its own unit, so images of one patient may stand on two sides.")
    if study["protocol"] != "outer":
        said.append("All folds share one test set: the intervals cover the patients tested, not the variance of training.")
    said.append("Intervals resample patients of the pooled test parts; they do not cover what another training set would change.")
    rare = next((row["patients"] for row in study["cohort"]["counts"] if row["class"] == study["rare"]), 0)
    if rare < FEW_PATIENTS:
        said.append(f"Only {rare} patients carry {study['rare']}: expect wide intervals and no proof of small gains.")
    if any(run["external_teacher"] for run in study["runs"]):
        said.append("A teacher was trained elsewhere; that it has not seen these patients is the user's word.")
    if study["cohort"]["background"]:
        said.append(f"{study['cohort']['background']} slices come from patients with a disease: they are slices without visible findings.")
    return said


def generated(study: dict[str, Any]) -> bool:
    """Whether the cohort comes from ``raredistill phantom``."""
    return bool(study["cohort"]["provenance"].get("settings", {}).get("generated"))
