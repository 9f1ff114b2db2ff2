"""What the page's interactive figures are drawn from: plain values and Vega-Lite specifications."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from raredistill.predictions import Predictions
from raredistill.reports.figures import MANY, colours
from raredistill.reports.results import Results
from raredistill.reports.words import metric_name

STEPS = 100
"""The slider's steps from probability 0 to 1."""
SLICES = 12
"""Slices of one of the hardest patients that the page shows."""
POINTS = 80
"""Points of one curve that the page draws."""


def page_data(results: Results, made: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Everything that the page's script reads, as plain values."""
    rare = results.study.rare
    first = next((name for name in results.entries if results.first(name).kind == "distilled"), results.entries[0])
    return {
        "rare": rare, "entries": [{"name": name, "colour": tint} for name, tint in colours(results.entries).items()], "first": first,
        "metrics": {key: metric_name(key) for key in _metrics(rare)}, "runs": run_rows(made["runs"], made["runs_overall"], rare),
        "counts": [counts(entry, level, table, rare) for entry, level, table in results.levels],
        "curves": curve_rows(made["roc"], made["precision_recall"]) if "roc" in made else [],
        "patients": hardest(results, made["hardest_patients"]) if "hardest_patients" in made else [],
        "specs": specs(colours(results.entries), rare),
    }  # fmt: skip


def _metrics(rare: str) -> list[str]:
    return [f"{kind}:{rare}" for kind in ("f1", "recall", "precision", "auprc", "auroc")] + ["balanced_accuracy", "macro_f1"]


def run_rows(by_class: pd.DataFrame, overall: pd.DataFrame, rare: str) -> list[dict[str, Any]]:
    """One row per run, level and metric (checkpoint that is best on validation); undefined scores are left out."""
    where = ["entry", "repeat", "fold", "seed", "level"]
    sides = [by_class[by_class["class"] == rare].rename(columns=lambda name: f"{name}:{rare}" if name not in where else name), overall]
    names = {"checkpoint": f"checkpoint:{rare}"}
    rows: list[dict[str, Any]] = []
    for side in sides:
        column = "checkpoint" if "checkpoint" in side else names["checkpoint"]
        chosen = side[side[column] == "best"]
        for metric in (name for name in _metrics(rare) if name in chosen):
            for row in chosen[[*where, metric]].dropna().to_dict("records"):
                run = f"repeat {row['repeat']}, fold {row['fold']}, seed {row['seed']}"
                rows.append({"entry": row["entry"], "level": row["level"], "metric": metric, "run": run, "value": round(row[metric], 4)})
    return rows


def counts(entry: str, level: str, table: Predictions, rare: str) -> dict[str, Any]:
    """Confusion matrices of an entry at every step of the threshold.

    A sample is called rare where its probability reaches the threshold, and otherwise the likeliest of the other classes. With many classes
    the others are put together.

    Returns:
        ``entry, level, classes`` (K names, the rare one first) and ``matrices``: for each of the ``STEPS + 1`` thresholds ``K * K`` counts,
        by true class, then by predicted one.
    """
    names = [rare, *(name for name in table.classes if name != rare)]
    order = [table.classes.index(name) for name in names]
    probability = table.probabilities()[:, order]
    label = np.argsort(order)[table.labels()]
    if len(names) > MANY:
        names, label = [rare, "other"], np.minimum(label, 1)
        probability = np.column_stack([probability[:, 0], 1 - probability[:, 0]])
    used = [index for index in range(len(names)) if index == 0 or (label == index).any() or level == "slice"]
    matrices = _matrices(label, probability, len(names))[:, used][:, :, used]
    return {
        "entry": entry,
        "level": level,
        "classes": [names[index] for index in used],
        "matrices": matrices.reshape(STEPS + 1, -1).tolist(),
    }


def _matrices(label: NDArray[np.int64], probability: NDArray[np.float64], classes: int) -> NDArray[np.int64]:
    """``(STEPS + 1, K, K)``: the rare class is 0."""
    step = np.minimum((probability[:, 0] * STEPS + 1e-9).astype(np.int64), STEPS)
    other = 1 + probability[:, 1:].argmax(axis=1)
    place = (label * classes + other) * (STEPS + 1) + step
    seen = np.bincount(place, minlength=classes * classes * (STEPS + 1)).reshape(classes, classes, STEPS + 1)
    reached = seen[..., ::-1].cumsum(axis=2)[..., ::-1]  # called rare at a threshold: all at or above its step
    found = seen.sum(axis=2, keepdims=True) - reached
    found[:, 0] = reached.sum(axis=1)
    return np.moveaxis(found, 2, 0)


def curve_rows(roc: pd.DataFrame, ranked: pd.DataFrame) -> list[dict[str, Any]]:
    """Points of the ROC and precision-recall curves, which share their thresholds."""
    table = pd.concat([roc, ranked[["precision"]]], axis=1)
    rows: list[dict[str, Any]] = []
    for (entry, level), own in table.groupby(["entry", "level"], sort=False):
        kept = np.unique(np.linspace(0, len(own) - 1, min(len(own), POINTS)).astype(int))
        start = {"entry": entry, "level": level, "order": 0, "fpr": 0.0, "recall": 0.0, "precision": None, "threshold": None}
        rows.append(start)
        for order, row in enumerate(own.iloc[kept].round(4).to_dict("records"), start=1):
            rows.append({
                "entry": entry, "level": level, "order": order, "fpr": row["false_positive_rate"], "recall": row["recall"],
                "precision": row["precision"], "threshold": row["threshold"],
            })  # fmt: skip
    return rows


def hardest(results: Results, table: pd.DataFrame) -> list[dict[str, Any]]:
    """The hardest patients with the probability of the rare class that each entry gives to them and to their hardest rare slices."""
    rare = results.study.rare
    by_slice = {entry: _slices(table_of, rare, set(table["patient"])) for entry, level, table_of in results.levels if level == "slice"}
    found = []
    for row in table.to_dict("records"):
        own = pd.DataFrame({entry: scores.get(row["patient"], pd.Series(dtype=float)) for entry, scores in by_slice.items()})
        own = own.assign(mean=own.mean(axis=1)).sort_values("mean").head(SLICES).drop(columns="mean")
        slices = [
            {"sample": str(name), "scores": [_rounded(value) for value in values]}
            for name, values in zip(own.index, own.to_numpy(), strict=True)
        ]
        scores = [_rounded(row.get(f"by {entry}")) for entry in results.entries]
        found.append({"patient": row["patient"], "scores": scores, "entries": list(by_slice), "slices": slices})
    return found


def _slices(table: Predictions, rare: str, patients: set[Any]) -> dict[Any, pd.Series]:
    place = table.classes.index(rare)
    chosen = (table.table["patient"].isin(patients)).to_numpy() & (table.labels() == place)
    rows = table.table.loc[chosen, ["patient", "sample"]].assign(score=table.probabilities()[chosen, place])
    means = rows.groupby(["patient", "sample"])["score"].mean()
    return {patient: means[patient] for patient in means.index.get_level_values(0).unique()}


def _rounded(value: Any) -> float | None:
    return None if value is None or np.isnan(value) else round(float(value), 3)


def specs(tints: dict[str, str], rare: str) -> dict[str, Any]:
    """Vega-Lite specifications by figure, without their data; texts take the page's colour."""
    colour = {
        "field": "entry", "type": "nominal", "legend": None, "scale": {"domain": list(tints), "range": list(tints.values())},
    }  # fmt: skip
    return {
        "runs": _runs_spec(colour),
        "roc": _curve_spec(colour, ("fpr", "1 − specificity"), ("recall", f"Sensitivity for {rare}"), diagonal=True),
        "precision_recall": _curve_spec(colour, ("recall", f"Sensitivity for {rare}"), ("precision", "Precision")),
    }


def _base(description: str, height: Any) -> dict[str, Any]:
    ink: dict[str, Any] = {"labelColor": "currentColor", "titleColor": "currentColor", "labelFontSize": 12, "titleFontSize": 12}
    lines = {"domainColor": "#808080", "tickColor": "#808080", "gridColor": "#808080", "gridOpacity": 0.25}
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json", "description": description, "width": "container", "height": height,
        "background": None,
        "config": {"axis": {**ink, **lines}, "view": {"stroke": None}, "aria": False, "font": "system-ui, sans-serif"},
    }  # fmt: skip


def _runs_spec(colour: dict[str, Any]) -> dict[str, Any]:
    places = {
        "y": {"field": "entry", "type": "nominal", "sort": colour["scale"]["domain"], "title": None, "axis": {"labelLimit": 130}},
        "x": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False, "nice": True}},
    }
    tips = [{"field": "entry", "title": "Entry"}, {"field": "run", "title": "Run"}, {"field": "value", "title": "Score"}]
    dots = {
        "mark": {"aria": False, "type": "point", "filled": True, "size": 55, "opacity": 0.75},
        "encoding": {"color": colour, "tooltip": tips},
    }
    mean = {
        "mark": {"aria": False, "type": "tick", "thickness": 3, "size": 18},
        "encoding": {
            "x": {**places["x"], "aggregate": "mean"}, "color": colour,
            "tooltip": [{"field": "value", "aggregate": "mean", "title": "Mean"}],
        },
    }  # fmt: skip
    return {**_base("Scores of every run by entry; a line marks each mean", {"step": 26}), "data": {"name": "runs"}, "encoding": places,
            "layer": [dots, mean]}  # fmt: skip


def _curve_spec(colour: dict[str, Any], x: tuple[str, str], y: tuple[str, str], *, diagonal: bool = False) -> dict[str, Any]:
    def axis(field: tuple[str, str]) -> dict[str, Any]:
        return {
            "field": field[0],
            "type": "quantitative",
            "title": field[1],
            "scale": {"domain": [0, 1]},
            "axis": {"values": [0, 0.2, 0.4, 0.6, 0.8, 1]},
        }

    tips = [{"field": "entry", "title": "Entry"}, *({"field": key, "title": name, "format": ".2f"} for key, name in (x, y))]
    line = {
        "data": {"name": "curves"}, "mark": {"aria": False, "type": "line", "strokeWidth": 2, "interpolate": "linear"},
        "encoding": {"x": axis(x), "y": axis(y), "color": colour, "order": {"field": "order"},
                     "tooltip": [*tips, {"field": "threshold", "title": "Threshold", "format": ".2f"}]},
    }  # fmt: skip
    point = {
        "data": {"name": "points"},
        "mark": {"aria": False, "type": "point", "filled": True, "size": 130, "stroke": "currentColor", "strokeWidth": 1.5, "opacity": 1},
        "encoding": {"x": axis(x), "y": axis(y), "color": colour, "tooltip": tips},
    }  # fmt: skip
    chance = {
        "data": {"values": [{"a": 0}, {"a": 1}]},
        "mark": {"aria": False, "type": "line", "strokeDash": [4, 4], "color": "#808080", "strokeWidth": 1},
        "encoding": {"x": {"field": "a", "type": "quantitative"}, "y": {"field": "a", "type": "quantitative"}},
    }  # fmt: skip
    what = f"{y[1]} against {x[1]}; dots mark the chosen threshold"
    return {**_base(what, 280), "layer": [*([chance] if diagonal else []), line, point]}
