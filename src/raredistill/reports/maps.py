"""Figures of Grad-CAM maps of teacher and student, drawn from the maps saved by the study."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from raredistill.reports.analyses import hardest_slices
from raredistill.reports.figures import blank_figure
from raredistill.reports.results import Results
from raredistill.runs.maps import ARRAYS, MapRequest, SliceMaps
from raredistill.runs.record import RunRecord

SHOWN = 4
OPAQUE = 0.65
"""Opacity of a map at its maximum."""
LINE, HALO = "#ffffff", "#000000"


def wanted_maps(results: Results) -> list[MapRequest]:
    """The hardest slices of every distilled entry, with the runs of student and teacher that tested them."""
    hardest, wanted = hardest_slices(results).head(SHOWN), []
    for name in results.entries:
        teacher = results.first(name).teacher_name
        teachers = {run.cell: run for run in results.of(teacher)}
        for slice_ in hardest.to_dict("records"):
            student = _tester(results, name, slice_["sample"]) if results.first(name).kind == "distilled" else None
            if student is not None and student.cell in teachers:
                run = teachers[student.cell]
                wanted.append(MapRequest(name, teacher, run.id, student.id, slice_["patient"], slice_["sample"]))
    return wanted


def _tester(results: Results, entry: str, sample: str) -> RunRecord | None:
    tables = ((run, results.tables[run.id].table) for run in results.of(entry))
    return next((run for run, table in tables if ((table["sample"] == sample) & (table["split"] == "test")).any()), None)


def map_rows(maps: Sequence[SliceMaps]) -> pd.DataFrame:
    """One row per pair and slice: ``entry, teacher, patient, sample, like_randomised``."""
    rows = [(m.request.entry, m.request.teacher, m.request.patient, m.request.sample, m.like_randomised) for m in maps]
    return pd.DataFrame(rows, columns=["entry", "teacher", "patient", "sample", "like_randomised"]) if rows else pd.DataFrame()


def map_figures(results: Results, maps: Sequence[SliceMaps]) -> dict[str, Figure]:
    """One figure per distilled entry with maps."""
    distilled = [name for name in results.entries if results.first(name).kind == "distilled"]
    drawn = {}
    for number, name in enumerate(distilled):
        if found := [each for each in maps if each.request.entry == name]:
            drawn[f"maps-{number}"] = _drawn(found)
    return drawn


def overlay(image: NDArray[np.float64], heat: NDArray[np.float64]) -> NDArray[np.float64]:
    """Blend a map over its image; done here because SVG viewers render transparent images differently.

    Args:
        image: ``(H, W)``, rescaled to 0 to 1.
        heat: ``(H, W)`` between 0 and 1; at 0, the image is unchanged.

    Returns:
        ``(H, W, 3)``, red, green and blue between 0 and 1.
    """
    grey = (image - image.min()) / max(float(np.ptp(image)), 1e-12)
    share = (OPAQUE * heat)[..., None]
    return np.asarray((1 - share) * grey[..., None] + share * colormaps["inferno"](heat)[..., :3])


def _drawn(found: Sequence[SliceMaps]) -> Figure:
    figure, axes = blank_figure(len(found), 4)
    for line, each in zip(axes, found, strict=True):
        request, arrays = each.request, each.arrays
        alike = "undefined" if np.isnan(each.like_randomised) else f"{each.like_randomised:.2f}"
        titles = (request.sample, f"teacher {request.teacher}", f"student {request.entry}", f"weights shuffled (correlation {alike})")
        nothing = np.zeros_like(arrays["image"])
        for axis, title, heat in zip(line, titles, (nothing, *(arrays[name] for name in ARRAYS[1:])), strict=True):
            axis.imshow(overlay(arrays["image"], heat))
            axis.set_title(fill(title, 26), fontsize=8)
            axis.axis("off")
            if heat is not nothing:
                _outline(axis, heat)
    return figure


def _outline(axis: Any, heat: NDArray[np.float64]) -> None:
    """Draw the contour at half of the map's maximum, visible on any background, or a word if the map is empty."""
    if heat.min() < 0.5 < heat.max():
        line = axis.contour(heat, levels=[0.5], colors=[LINE], linewidths=1.2)
        line.set_path_effects([withStroke(linewidth=3.2, foreground=HALO)])
    elif not heat.any():
        box = {"facecolor": HALO, "edgecolor": "none"}
        axis.text(0.5, 0.06, "empty map", transform=axis.transAxes, ha="center", color=LINE, fontsize=8, bbox=box)
