"""The report's figures: vector, colour-blind-safe, one colour for an entry and for a class throughout."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from raredistill.files import atomic
from raredistill.report.results import Results

# Okabe and Ito's palette, without its yellow, which is too pale for lines.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")


def colours(names: Sequence[str]) -> dict[str, str]:
    """One colour a name, in order, repeated when names outnumber the palette."""
    return {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(names)}


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def forest(verdicts: list[dict[str, Any]], rare: str) -> Figure | None:
    """Differences in the rare class's F1 with their intervals, a row an entry."""
    shown = [record for record in verdicts if record["p"] is not None]
    if not shown:
        return None
    figure, (axis,) = _figure(7, 1.2 + 0.45 * len(shown))
    for row, record in enumerate(reversed(shown)):
        axis.plot([record["low"], record["high"]], [row, row], color=PALETTE[0], linewidth=2)
        axis.plot(record["rare_f1"], row, "o", color=PALETTE[0])
    axis.axvline(0, color="0.5", linewidth=1)
    axis.set_yticks(range(len(shown)), [f"{record['entry']} − {record['control']}" for record in reversed(shown)])
    axis.set_ylim(-0.6, len(shown) - 0.4)
    axis.set_xlabel(f"difference in {rare} F1 (95 % interval over patients)")
    return figure


def size_against_score(summary: pd.DataFrame, rare: str) -> Figure | None:
    """Parameters against the rare class's F1, a point an entry."""
    known = summary.dropna(subset=[f"{rare} f1"])
    if known.empty:
        return None
    figure, (axis,) = _figure(6, 3.6)
    for entry, colour in colours(list(summary["entry"])).items():
        row = known[known["entry"] == entry]
        axis.plot(row["parameters"] / 1e6, row[f"{rare} f1"], "o", color=colour, label=entry)
    axis.set(xscale="log", xlabel="parameters (millions)", ylabel=f"{rare} F1, mean over runs")
    axis.legend(frameon=False, fontsize=8)
    return figure


def class_scores(by_class: pd.DataFrame, entries: Sequence[str], classes: Sequence[str]) -> Figure | None:
    """F1 of every class and entry: a dot a run, a bar the mean."""
    chosen = by_class.query("checkpoint == 'best' and level == 'slice'")
    if chosen.empty:
        return None
    figure, (axis,) = _figure(max(6, 1.2 * len(classes) * max(1, len(entries) / 4)), 3.6)
    width = 0.8 / max(len(entries), 1)
    for position, (entry, colour) in enumerate(colours(entries).items()):
        for index, label in enumerate(classes):
            scores = chosen[(chosen["entry"] == entry) & (chosen["class"] == label)]["f1"].to_numpy()
            place = index + (position - (len(entries) - 1) / 2) * width
            axis.bar(
                place, np.nanmean(scores) if len(scores) else 0, width * 0.9, color=colour, alpha=0.5, label=entry if index == 0 else None
            )
            axis.plot(np.full(len(scores), place), scores, ".", color=colour)
    axis.set_xticks(range(len(classes)), classes)
    axis.set(ylabel="F1 on test, by slice", ylim=(0, 1))
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2))
    return figure


def curves(results: Results, entry: str) -> Figure | None:
    """Loss, macro F1 and F1 by class over epochs, means over an entry's runs; dashed: train, solid: validation."""
    histories = [results.epochs[run["id"]] for run in results.of(entry)]
    if not histories:
        return None
    classes = results.study["cohort"]["classes"]
    figure, axes = _figure(9, 2.8, 3)
    for part, style in (("train", "--"), ("validation", "-")):
        for axis, key in zip(axes, ("loss", "macro_f1"), strict=False):
            axis.plot(
                *_mean_curve(histories, lambda row, key=key, part=part: row[part][key] if part in row else None),
                style,
                color="0.25",
                label=part,
            )
            axis.set(xlabel="epoch", ylabel=key.replace("_", " ").replace("f1", "F1"))
        for name, colour in colours(classes).items():
            line = _mean_curve(histories, lambda row, name=name, part=part: row[part]["f1"][name] if part in row else None)
            axes[2].plot(*line, style, color=colour, label=name if part == "train" else None)
    axes[2].set(xlabel="epoch", ylabel="F1", ylim=(0, 1))
    axes[0].legend(frameon=False, fontsize=8)
    axes[2].legend(frameon=False, fontsize=8)
    return figure


def _mean_curve(histories: list[list[dict[str, Any]]], value: Any) -> tuple[list[int], list[float]]:
    length = max(len(history) for history in histories)
    found: list[tuple[int, float]] = []
    for epoch in range(length):
        numbers = [value(history[epoch]) for history in histories if epoch < len(history)]
        known = [number for number in numbers if number is not None]
        if known:
            found.append((epoch + 1, float(np.mean(known))))
    return [epoch for epoch, _ in found], [number for _, number in found]


def confusion(matrix: np.ndarray, classes: Sequence[str]) -> Figure:
    """Counts and shares of each true class: ``matrix (K, K)``, rows true."""
    side = 1.6 + 0.7 * len(classes)
    figure, axes = _figure(2 * side, side, 2)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    for axis, texts, title in (
        (axes[0], matrix.astype(int).astype(str), "slices"),
        (axes[1], np.char.mod("%.2f", share), "share of the true class"),
    ):
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axis.set(xlabel="predicted", ylabel="true", title=title)
        axis.set_xticks(range(len(classes)), classes, rotation=30, ha="right")
        axis.set_yticks(range(len(classes)), classes)
        if len(classes) <= 12:
            for row, column in np.ndindex(*matrix.shape):
                axis.text(
                    column,
                    row,
                    texts[row, column],
                    ha="center",
                    va="center",
                    color="white" if share[row, column] > 0.55 else "black",
                    fontsize=8,
                )
    return figure


def svg(figure: Figure) -> str:
    """The figure as SVG markup for a page, without an XML head."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def write_figures(figures: dict[str, Figure], folder: Path) -> None:
    """Write each figure as SVG (for papers) and PNG (for slides)."""
    for name, figure in figures.items():
        for suffix in ("svg", "png"):
            with atomic(folder / f"{name}.{suffix}") as temporary:
                figure.savefig(temporary, format=suffix, dpi=200)
