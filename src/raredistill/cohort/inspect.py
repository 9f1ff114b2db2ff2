"""Summaries and contact sheets of a cohort."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from raredistill import files
from raredistill.cohort.duplicates import Copies
from raredistill.cohort.store import Cohort
from raredistill.errors import DataError

ALL = "all"
PAIRS_SHOWN = 24
_COLOUR = ("red", "green", "blue")
GENERATED = "generated data (phantom), not patients"
"""Notice shown wherever generated data appear."""


def summary(cohort: Cohort) -> pd.DataFrame:
    """Slices and patients by class, and by part if the source gives a split.

    Returns:
        Columns ``split`` (only with a given split), ``class``, ``slices``, ``share`` (of its part's slices), ``patients``,
        ``slices_per_patient`` (median) and ``sources`` (files or cases). The class ``all`` sums up a part; a patient with several
        classes counts once there. If no patient is known, ``images`` replaces ``slices``, and patients are not counted.
    """
    table = _summary(cohort)
    return table if cohort.patients_known else table.drop(columns=["patients", "slices_per_patient"]).rename(columns={"slices": "images"})


def _summary(cohort: Cohort) -> pd.DataFrame:
    if not (cohort.samples["split"] != "").any():
        return _part_summary(cohort.samples, cohort.classes)
    parts = [_part_summary(part, cohort.classes) for _, part in cohort.samples.groupby("split", sort=False)]
    for name, part in zip(cohort.samples["split"].unique(), parts, strict=True):
        part.insert(0, "split", name or "(none)")
    return pd.concat(parts, ignore_index=True)


def _part_summary(samples: pd.DataFrame, classes: Iterable[str]) -> pd.DataFrame:
    groups = [(name, samples[samples["label"] == name]) for name in classes]
    return pd.DataFrame([_row(name, group, len(samples)) for name, group in [*groups, (ALL, samples)]])


def _row(name: str, group: pd.DataFrame, total: int) -> dict[str, str | int | float]:
    return {
        "class": name,
        "slices": len(group),
        "share": round(len(group) / max(total, 1), 4),
        "patients": group["patient"].nunique(),
        "slices_per_patient": float(group.groupby("patient").size().median()) if len(group) else 0.0,
        "sources": group["source"].nunique(),
    }


def patient_table(cohort: Cohort) -> pd.DataFrame:
    """Slices of each patient by class: index ``patient``, columns ``patient_label`` and one per class."""
    samples = cohort.samples
    counts = pd.crosstab(samples["patient"], samples["label"]).reindex(columns=list(cohort.classes), fill_value=0)
    counts.insert(0, "patient_label", samples.groupby("patient")["patient_label"].first())
    return counts.rename_axis(columns=None)


def rule_table(cohort: Cohort) -> pd.DataFrame:
    """Differences between the two label rules on the data: columns ``thesis``, ``default`` and ``slices``; empty if no rule was used."""
    pairs = [(*name.split(" / "), count) for name, count in cohort.provenance.get("tally", {}).items() if " / " in name]
    rows = [(old.removeprefix("thesis "), new.removeprefix("default "), count) for old, new, count in pairs]
    return pd.DataFrame(rows, columns=["thesis", "default", "slices"]).sort_values(["thesis", "default"], ignore_index=True)


def is_generated(cohort: Cohort) -> bool:
    """Whether the cohort comes from ``raredistill phantom``."""
    return bool(cohort.provenance.get("settings", {}).get("generated"))


def choose(cohort: Cohort, *, per_class: int, seed: int) -> dict[str, np.ndarray]:
    """Rows to show of each class, drawn at random, from as many patients as there are: class -> ``(<= per_class,)`` int64."""
    rng = np.random.default_rng(seed)
    shuffled = cohort.samples.loc[rng.permutation(len(cohort.samples)), ["label", "patient"]]
    shuffled["turn"] = shuffled.groupby(["label", "patient"]).cumcount()
    ordered = shuffled.sort_values("turn", kind="stable")  # every patient's first slice, then every patient's second
    return {name: ordered.index[ordered["label"] == name].to_numpy()[:per_class] for name in cohort.classes}


def contact_sheet(cohort: Cohort, path: Path, *, per_class: int = 8, channel: str | None = None, seed: int = 0) -> Path:
    """Draw a row of samples a class, captioned with patient and slice; the same seed draws the same sheet.

    Args:
        cohort: what to show.
        path: the PNG to write.
        per_class: samples a row, of as many patients as there are.
        channel: what to show; by default colour where the channels are red, green and blue, else the first channel.
        seed: of the choice.

    Raises:
        DataError: the cohort lacks the channel, ``path`` does not end with .png, or ``per_class`` is not positive.
    """
    if per_class < 1:
        raise DataError(f"per_class={per_class}; show at least one sample a class")
    if path.suffix.lower() != ".png":
        raise DataError(f"{path}: a contact sheet is a picture; name a file that ends with .png")
    shown = _planes(cohort, channel)
    figure = Figure(figsize=(1.9 * per_class + 1, 2.3 * len(cohort.classes) + 0.7), layout="constrained")
    axes = figure.subplots(len(cohort.classes), per_class, squeeze=False)
    for row, (name, chosen) in zip(axes, choose(cohort, per_class=per_class, seed=seed).items(), strict=True):
        _draw_class(row, name, cohort, chosen, shown)
    figure.suptitle(_title(cohort, channel), fontsize=14)
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar sign in a name does not start a formula
    with files.atomic(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=110, metadata={"Software": None})
    return path


def pair_sheet(copies: Copies, looks: np.ndarray, path: Path) -> Path:
    """Draw near-copies side by side, the closest first, each with its sample's name; at most ``PAIRS_SHOWN`` pairs.

    Args:
        copies: result of the search.
        looks: ``(N, side, side)`` uint8 grey, the images that the search compared.
        path: the PNG to write.
    """
    pairs = copies.near.head(PAIRS_SHOWN)
    figure = Figure(figsize=(8, 1.9 * -(-len(pairs) // 2) + 0.7), layout="constrained")
    axes = figure.subplots(-(-len(pairs) // 2), 4, squeeze=False).reshape(-1)
    for axis in axes:
        _bare(axis)
    rows = pairs[["first", "second"]].to_numpy().reshape(-1)
    for axis, row in zip(axes, rows, strict=False):
        axis.imshow(looks[row], cmap="gray", vmin=0, vmax=255)
        axis.set_title(str(copies.samples["sample"].iloc[row])[-28:], fontsize=7, parse_math=False)
    figure.suptitle(f"near-copies: {len(pairs)} of {len(copies.near)} pairs, in columns 1 and 2, 3 and 4", fontsize=10)
    with files.atomic(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png", dpi=110, metadata={"Software": None})
    return path


def _is_colour(cohort: Cohort, channel: str | None) -> bool:
    return channel is None and set(_COLOUR) <= set(cohort.channels)


def _planes(cohort: Cohort, channel: str | None) -> list[np.ndarray]:
    """Red, green and blue planes ``(N, h, w)``; a grey channel is repeated, since a colour map would round its values."""
    names = _COLOUR if _is_colour(cohort, channel) else (channel or cohort.channels[0],) * 3
    return [cohort.pixels(name) for name in names]


def _draw_class(row: np.ndarray, name: str, cohort: Cohort, chosen: np.ndarray, shown: list[np.ndarray]) -> None:
    for axis in row:
        _bare(axis)
    row[0].set_ylabel(name, fontsize=14)
    for axis, index in zip(row, chosen, strict=False):
        axis.imshow(np.stack([plane[index] for plane in shown], axis=-1))
        axis.set_title(_caption(cohort.samples.loc[index]), fontsize=8)


def _bare(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def _caption(sample: pd.Series) -> str:
    patient = str(sample["patient"])
    short = patient if len(patient) <= 24 else f"…{patient[-23:]}"
    return f"{short}\nslice {sample['slice']}" if sample["slice"] >= 0 else short


def _title(cohort: Cohort, channel: str | None) -> str:
    parts = [cohort.name, "colour" if _is_colour(cohort, channel) else channel or cohort.channels[0], f"{len(cohort.samples)} slices"]
    parts += [f"{cohort.samples['patient'].nunique()} patients"] if cohort.patients_known else ["no patient is known"]
    return " · ".join(parts + ([GENERATED] if is_generated(cohort) else []))
