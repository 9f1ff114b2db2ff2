"""The pilot of a plan: variances measured in finished repeats of the same study, or assumed without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from raredistill.errors import ConfigError, DataError
from raredistill.evaluation.planning import Pilot
from raredistill.reports.decision import rare_kept
from raredistill.reports.pairs import make_pairs
from raredistill.reports.results import read_results
from raredistill.reports.verdicts import tested
from raredistill.runs.layout import StudyFolder
from raredistill.studies.power import Plan, assumed, make_plan_of
from raredistill.studies.study import Study, rare_class


def design_of(made: Study, out: Path, repeats: int, gain: float | None) -> Plan:
    """Evaluate a study's design with the pilot in its folder, or with assumptions.

    Args:
        made: the study.
        out: its folder.
        repeats: repeats of the design.
        gain: gain that should be shown; None to evaluate the design as it is.

    Raises:
        ConfigError: its folds share a test set, so that no plan can be made.
    """
    if made.protocol != "outer":
        raise ConfigError(
            f"splits.protocol {made.protocol}: all runs share one test set, which no repeats make a claim on a recipe; use outer"
        )
    rare, folds = rare_class(made.cohort, made.splits), len({split.fold for split in made.splits})
    patients = next(int(row["patients"]) for row in made.cohort.counts().to_dict("records") if row["class"] == rare)
    pairs = sum(entry.teacher is not None for entry in made.entries)
    design: dict[str, Any] = {
        "folds": folds, "repeats": repeats, "pairs": pairs, "entries": len(made.entries), "rare": rare, "rare_patients": patients,
        "gain": gain, "kept": rare_kept(made.config, rare),
    }  # fmt: skip
    if (known := _pilot(out, rare)) is not None:
        return make_plan_of(known[0], basis=known[1], **design)
    basis = (
        f"Assumed, since {out} holds no two finished repeats: a student and its control that differ little, and single networks whose "
        f"{rare} F1 has a standard deviation of 0.05 by training alone; run two repeats to know"
    )
    plan, apart = (make_plan_of(assumed(patients, folds, alike=each), basis=basis, **design) for each in (True, False))
    wider = f"Where they differ as two methods do it takes {apart.forecast.detectable:.3f}, never less than {apart.forecast.floor:.3f}."
    return replace(plan, sentences=[*plan.sentences, wider])


def _pilot(out: Path, rare: str) -> tuple[Pilot, str] | None:
    """The pair whose standard error is the median of the tested ones."""
    if not StudyFolder(out).description.is_file():
        return None
    try:
        known = [(pair.decision.gain, pair.entry) for pair in tested(make_pairs(read_results(out))) if pair.decision.gain]
    except DataError:
        return None
    finite = sorted((each for each in known if np.isfinite(each[0].se)), key=lambda each: each[0].se)
    if not finite:
        return None
    found, name = finite[(len(finite) - 1) // 2]
    return Pilot.of(
        found
    ), f"Measured on {found.runs} finished runs of {name} in {out} ({rare} F1 {found.gain:+.3f}, standard error {found.se:.3f})"
