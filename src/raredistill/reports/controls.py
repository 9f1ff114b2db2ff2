"""The controls that a verdict needs: whether each is present, and which question a missing one leaves open."""

from __future__ import annotations

import numpy as np
import pandas as pd

from raredistill.errors import RareDistillError
from raredistill.evaluation.differences import differences
from raredistill.predictions import Predictions
from raredistill.reports.pairs import Pair
from raredistill.reports.results import Results

BUDGET = (
    "epochs", "batch_size", "learning_rate", "optimizer", "weight_decay", "schedule", "warmup_epochs", "ema_decay", "clip_norm", "sampler",
    "augmentation", "select", "patience", "stage_epochs",
)  # fmt: skip
"""Settings that define a training budget; omitted settings have the same default on both sides."""


def controls(results: Results, pairs: list[Pair]) -> pd.DataFrame:
    """One row per pair and control: ``entry, control, present`` (yes or missing) and ``what``, an explanation."""
    rows = []
    for pair in pairs:
        checks = {
            "same loss without a teacher": _same_loss(pair),
            "post-hoc adjustment of the control": _post_hoc(results, pair),
            "the teacher itself": _teacher(results, pair),
            "self-distillation": _self(results, pair),
            "equal training budget": _budget(results, pair),
        }
        rows += [
            {"entry": pair.entry, "control": name, "present": "yes" if there else "missing", "what": what}
            for name, (there, what) in checks.items()
        ]
    return pd.DataFrame(rows, columns=["entry", "control", "present", "what"])


def missing(table: pd.DataFrame) -> dict[str, list[str]]:
    """Names of the controls that each entry lacks."""
    return {str(entry): list(rows.loc[rows["present"] == "missing", "control"]) for entry, rows in table.groupby("entry")}


def _same_loss(pair: Pair) -> tuple[bool, str]:
    if pair.sides is None:
        return False, "no finished baseline of the same network, loss recipe and channels: the gain may be the loss's"
    return True, pair.control


def _teacher(results: Results, pair: Pair) -> tuple[bool, str]:
    rare = results.study.rare
    if not results.cells(pair.teacher):
        return False, "the teacher has no finished run in this study: whether the student reached it is unknown"
    teacher = results.pooled(pair.teacher, results.cells(pair.teacher) & results.cells(pair.entry))
    if teacher is None or pair.sides is None:
        return True, pair.teacher
    return True, f"{pair.teacher}; {rare} F1 of {pair.entry} minus its teacher's {_gain(results, teacher, pair.sides[1])}"


def _self(results: Results, pair: Pair) -> tuple[bool, str]:
    model = results.first(pair.entry).model
    found = [run.name for run in results.runs if run.direction == "self" and run.model == model]
    if found:
        return True, found[0]
    return False, f"no {model} taught by its own kind: the gain may come from any second training, not from this teacher"


def _budget(results: Results, pair: Pair) -> tuple[bool, str]:
    own, other = results.settings(pair.entry), results.settings(pair.control)
    if own is None or other is None:
        return False, "the training settings of both sides are not known"
    apart = [key for key in BUDGET if own.get(key) != other.get(key)]
    if apart:
        return False, "differs in " + ", ".join(f"{key} ({own.get(key)} against {other.get(key)})" for key in apart)
    return True, "equal settings; the teacher's own training comes on top"


def _post_hoc(results: Results, pair: Pair) -> tuple[bool, str]:
    model = results.first(pair.entry).model
    runs = [run for run in results.runs if run.kind == "baseline" and "logit_adjustment" in run.loss and run.model == model]
    entries = [run.name for run in runs]
    if entries:
        return True, entries[0]
    adjusted = adjusted_control(results, pair)
    if adjusted is None or pair.sides is None:
        return False, "the prior that the control's logits carry is unknown: the gain may be had without a teacher"
    if np.allclose(adjusted.logits() - adjusted.logits()[:, :1], pair.sides[0].logits() - pair.sides[0].logits()[:, :1], atol=1e-6):
        return True, f"{pair.control} itself: its training carries the uniform prior already, so there is nothing to take off"
    own, rare = _gain(results, adjusted, pair.sides[1]), results.study.rare
    return True, f"computed here from {pair.control}, its carried prior taken off; {rare} F1 of {pair.entry} minus that {own}"


def adjusted_control(results: Results, pair: Pair) -> Predictions | None:
    """The control with its carried class prior removed from its logits (Menon et al. 2021); None if a prior is unknown."""
    if pair.sides is None:
        return None
    known = {run.id: results.priors.get(run.id) for run in results.of(pair.control) if run.cell in results.cells(pair.entry)}
    if not all(known.values()):
        return None
    control = pair.sides[0]
    offset = np.stack([np.log(np.asarray(known[run])) for run in control.table["run"]])
    return control.with_logits(control.logits() - offset)


def _gain(results: Results, control: Predictions, other: Predictions) -> str:
    try:
        found = differences(control, other, f"f1:{results.study.rare}", sizes=results.sizes, resamples=1)
    except RareDistillError:
        return "is undefined"
    return f"{found.estimate:+.3f}".replace("-", "−")
