"""The report's figures: vector graphics, safe for colour-blind readers, with one colour per entry and per class throughout."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from raredistill.files import atomic, write_text
from raredistill.reports.results import Results

# Found by computer: far apart in CIELAB, also to deuteranopes, and each 3:1 or more on white and on the page's dark ground.
PALETTE = (
    "#0072B2", "#D55E00", "#FF0099", "#6644FF", "#557733", "#BB77CC", "#007777", "#997766", "#4477FF", "#119922", "#BB22AA", "#9988AA",
    "#AA5577", "#BB8833", "#9955DD", "#DD0022", "#AA11DD", "#BB6644", "#559977", "#7788DD",
)  # fmt: skip

CLASS_PALETTE = ("#4477AA", "#CC5566", "#228833", "#AA44AA", "#7766BB", "#888822", "#808080")
MANY = 12
"""Largest number of classes that a figure by class can distinguish."""
DARK_CELL = 0.715
"""Share above which a cell of a confusion matrix is dark enough for white numbers."""


def plain_texts() -> AbstractContextManager[None]:
    """Disable formulas in the texts of figures, so that a dollar sign in a name is shown as it is."""
    return rc_context({"text.parse_math": False})


def colours(names: Sequence[str]) -> dict[str, str]:
    """One colour per name, in order, repeated if there are more names than colours."""
    return {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(names)}


def class_colours(classes: Sequence[str]) -> dict[str, str]:
    """One colour per class, from a palette different from the entries'."""
    return {name: CLASS_PALETTE[index % len(CLASS_PALETTE)] for index, name in enumerate(classes)}


def rarest(counts: Sequence[dict[str, Any]], classes: Sequence[str]) -> list[str]:
    """The classes shown in figures by class, in order: all, or the ``MANY`` with fewest slices."""
    slices = {row["class"]: row["slices"] for row in counts}
    kept = sorted(classes, key=lambda name: slices.get(name, 0))[:MANY]
    return [name for name in classes if name in kept]


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def blank_figure(rows: int, columns: int) -> tuple[Figure, Any]:
    """A grid for images: the figure and its axes ``(rows, columns)``."""
    figure = Figure(figsize=(2 * columns, 2.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def forest(compared: pd.DataFrame, rare: str, entries: Sequence[str]) -> Figure | None:
    """Differences in the rare class's F1 with 95 % intervals, one row per pair."""
    shown = compared[compared["metric"] == f"f1:{rare}"].iloc[::-1].reset_index(drop=True)
    if shown.empty:
        return None
    figure, (axis,) = _figure(7, 1.2 + 0.45 * len(shown))
    tints = colours(entries)
    for row, record in shown.iterrows():
        (line,) = axis.plot([record["low"], record["high"]], [row, row], color=tints[record["entry"]], linewidth=2)
        (dot,) = axis.plot(record["difference"], row, "o", color=tints[record["entry"]])
        _switched([line, dot], entries, record["entry"])
    axis.axvline(0, color="0.5", linewidth=1)
    axis.set_yticks(range(len(shown)), [f"{record['entry']} − {record['control']}" for _, record in shown.iterrows()])
    axis.set_ylim(-0.6, len(shown) - 0.4)
    axis.set_xlabel(f"difference in {rare} F1 (95 % interval)")
    return figure


def size_against_score(sizes: pd.DataFrame, rare: str, entries: Sequence[str]) -> Figure | None:
    """Parameters, FLOPs and measured latency against the rare class's F1, one point per entry; Pareto fronts are ringed."""
    known, score = sizes.dropna(subset=[f"{rare} f1"]), f"{rare} f1"
    if known.empty:
        return None
    costs = {"parameters": ("parameters", "parameters (millions)", 1e6), "flops": ("flops", "FLOPs (millions)", 1e6)}
    if known["latency_ms"].notna().any():
        costs["latency"] = ("latency_ms", "latency of one image (ms)", 1)
    figure, axes = _figure(4.5 * len(costs), 3.8, len(costs))
    for axis, (front, (column, name, unit)) in zip(axes, costs.items(), strict=True):
        for _, row in known.iterrows():
            (dot,) = axis.plot(row[column] / unit, row[score], "o", color=colours(entries)[row["entry"]], label=row["entry"])
            best = row[f"front_{front}"] == "yes"
            ring = axis.plot(row[column] / unit, row[score], "o", ms=12, mfc="none", color="0.4") if best else []
            _switched([dot, *ring], entries, row["entry"])
        axis.set(xscale="log", xlabel=name, ylabel=f"{rare} F1, mean over runs")
        _plain_ticks(axis)
    _legend(figure, axes[0])
    return figure


def gain_against_ratio(gains: pd.DataFrame, rare: str, entries: Sequence[str]) -> Figure | None:
    """The gain of every pair against the ratio of the teacher's size to the student's."""
    known = gains.dropna(subset=["size_ratio"])
    if known.empty:
        return None
    figure, (axis,) = _figure(7, 3.8)
    for _, row in known.iterrows():
        tint = colours(entries)[row["entry"]]
        (line,) = axis.plot([row["size_ratio"]] * 2, [row["low"], row["high"]], color=tint, linewidth=1.5)
        (dot,) = axis.plot(row["size_ratio"], row["gain"], "o", color=tint, label=f"{row['teacher']} → {row['entry']}")
        _switched([line, dot], entries, row["entry"])
    axis.axhline(0, color="0.5", linewidth=1)
    axis.axvline(1, color="0.5", linewidth=1, linestyle=":")
    axis.set(xscale="log", xlabel="parameters of teacher / student", ylabel=f"gain in {rare} F1 (95 % interval)")
    _plain_ticks(axis)
    _legend(figure, axis)
    return figure


def gain_against_imbalance(sweep: pd.DataFrame, rare: str, entries: Sequence[str]) -> Figure:
    """The gain against the imbalance of training, one line per entry over the studies of a sweep."""
    figure, (axis,) = _figure(7, 3.8)
    for entry, tint in colours(entries).items():
        rows = sweep[sweep["entry"] == entry]
        if len(rows):
            (line,) = axis.plot(rows["imbalance_ratio"], rows["gain"], "o-", color=tint, label=entry)
            spread = axis.vlines(rows["imbalance_ratio"], rows["low"], rows["high"], color=tint, linewidth=1.2)
            _switched([line, spread], entries, entry)
    axis.axhline(0, color="0.5", linewidth=1)
    axis.set(xscale="log", xlabel=f"training samples of the largest class for each of {rare}", ylabel=f"gain in {rare} F1 (95 % interval)")
    _plain_ticks(axis)
    _legend(figure, axis)
    return figure


def disparity(compared: pd.DataFrame, classes: Sequence[str]) -> Figure | None:
    """Changes in F1 by class, one group of bars per pair."""
    pairs = list(dict.fromkeys(compared["entry"]))
    if not pairs:
        return None
    figure, (axis,) = _figure(max(6, 1.4 * len(pairs)), 3.4)
    width = 0.8 / len(classes)
    for index, (name, tint) in enumerate(class_colours(classes).items()):
        rows = compared[compared["metric"] == f"f1:{name}"].set_index("entry")["difference"].reindex(pairs)
        axis.bar(np.arange(len(pairs)) + (index - (len(classes) - 1) / 2) * width, rows.to_numpy(), width * 0.9, color=tint, label=name)
    axis.axhline(0, color="0.5", linewidth=1)
    axis.set_xticks(range(len(pairs)), pairs, rotation=20, ha="right")
    axis.set_ylabel("change in F1 against the control")
    _legend(figure, axis)
    return figure


def lines(table: pd.DataFrame, x: str, y: str, entries: Sequence[str], texts: tuple[str, str], *, reference: str = "") -> Figure | None:
    """One panel per level and one line per entry of ``y`` against ``x`` (shares); a common reference column is drawn in grey."""
    if table.empty:
        return None
    levels = list(table["level"].unique())
    figure, axes = _figure(5 * len(levels), 4, len(levels))
    for axis, level in zip(axes, levels, strict=True):
        _lines(axis, table[table["level"] == level], x, y, entries, reference)
        axis.set(title=f"by {level}", xlabel=texts[0], ylabel=texts[1])
    _legend(figure, axes[0])
    return figure


def _lines(axis: Any, table: pd.DataFrame, x: str, y: str, entries: Sequence[str], reference: str) -> None:
    for entry, tint in colours(entries).items():
        rows = table[table["entry"] == entry]
        if len(rows):
            (line,) = axis.plot(rows[x], rows[y], color=tint, label=entry, linewidth=1.6)
            _switched([line], entries, entry)
    if not reference:
        axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    else:
        first = table[table["entry"] == table["entry"].iloc[0]]
        axis.plot(first[x], first[reference], "--", color="0.5", linewidth=1, label=reference.replace("_", " "))
        axis.set_ylim(min(-0.02, float(table[y].min())), max(float(table[y].max()), float(first[reference].max())) * 1.1)


def reliability(table: pd.DataFrame, entries: Sequence[str]) -> Figure | None:
    """Reliability diagrams, one panel per level and stage, one line per entry: confidence against accuracy."""
    panels = list(table.groupby(["level", "stage"], sort=False)) if len(table) else []
    if not panels:
        return None
    figure, axes = _figure(2.9 * len(panels), 3.5, len(panels))
    for axis, ((level, stage), rows) in zip(axes, panels, strict=True):
        axis.plot([0, 1], [0, 1], ":", color="0.5")
        for entry, own in rows.dropna().groupby("entry", sort=False):
            (line,) = axis.plot(own["confidence"], own["accuracy"], "o-", ms=3, color=colours(entries)[str(entry)], label=entry)
            _switched([line], entries, str(entry))
        axis.set(title=f"{stage}, by {level}", xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    _legend(figure, axes[0])
    return figure


def _plain_ticks(axis: Any) -> None:
    # With powers of ten alone, a narrow range has no tick label, and 6 x 10^1 and 7 x 10^1 overlap.
    axis.margins(x=0.2)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def _switched(artists: Sequence[Any], entries: Sequence[str], entry: str) -> None:
    # The page's legend uses this name to find an entry's marks.
    for artist in artists:
        artist.set_gid(f"entry-{list(entries).index(entry)}")


def _legend(figure: Figure, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=min(3, len(labels)), loc="outside upper center")


def class_scores(by_class: pd.DataFrame, entries: Sequence[str], classes: Sequence[str]) -> Figure | None:
    """F1 of every class and entry: dots are runs, bars are means."""
    chosen = by_class.query("checkpoint == 'best' and level == 'slice'")
    if chosen.empty:
        return None
    figure, (axis,) = _figure(max(6, 1.2 * len(classes) * max(1, len(entries) / 4)), 3.6)
    width = 0.8 / max(len(entries), 1)
    for position, (entry, tint) in enumerate(colours(entries).items()):
        for index, label in enumerate(classes):
            scores = chosen[(chosen["entry"] == entry) & (chosen["class"] == label)]["f1"].to_numpy()
            place = index + (position - (len(entries) - 1) / 2) * width
            height = np.nanmean(scores) if len(scores) and not np.isnan(scores).all() else 0
            (bar,) = axis.bar(place, height, width * 0.9, facecolor=(tint, 0.5), edgecolor=tint, label="" if index else entry)
            _switched([bar, *axis.plot(np.full(len(scores), place), scores, ".", color=tint)], entries, entry)
    axis.set_xticks(range(len(classes)), classes)
    axis.set(ylabel="F1 on test, by slice", ylim=(0, 1))
    _legend(figure, axis)
    return figure


def curves(results: Results, entry: str, classes: Sequence[str]) -> Figure | None:
    """Cross-entropy, macro F1 and F1 of these classes over epochs, means over an entry's runs; dashed: train, solid: validation."""
    histories = [results.epochs[run.id] for run in results.of(entry)]
    if not histories:
        return None
    first = results.first(entry)
    # Validation's loss is cross-entropy: a sum with a teacher's terms, or a loss of another kind, is not on its scale.
    comparable = first.kind == "baseline" and first.loss == "cross_entropy"
    figure, axes = _figure(9, 2.8, 3)
    for part, style in (("train", "--"), ("validation", "-")):
        for axis, key in zip(axes, ("loss", "macro_f1"), strict=False):
            if key == "loss" and part == "train" and not comparable:
                continue
            axis.plot(
                *_mean_curve(histories, lambda row, key=key, part=part: row[part][key] if part in row else None),
                style,
                color="0.25",
                label=part,
            )
            axis.set(xlabel="epoch", ylabel="cross-entropy" if key == "loss" else "macro F1")
        for name, colour in class_colours(classes).items():
            line = _mean_curve(histories, lambda row, name=name, part=part: row[part]["f1"][name] if part in row else None)
            axes[2].plot(*line, style, color=colour, label=name if part == "train" else None)
    axes[2].set(xlabel="epoch", ylabel="F1", ylim=(0, 1))
    axes[1].legend(frameon=False, fontsize=8)
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
    many = len(classes) > MANY
    cell = max(0.7 * MANY / len(classes), 0.12) if many else 0.7
    side = 1.6 + cell * len(classes)
    size = min(10.0, 50 * cell)  # font size of row names, in points: less than a row's height (72 points per inch)
    figure, axes = _figure(2 * side, side + (0.8 if many else 0), 2)  # vertical names need more space
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    places = np.arange(len(classes)) + 0.5
    for axis, texts, title in (
        (axes[0], matrix.astype(int).astype(str), "slices"),
        (axes[1], np.char.mod("%.2f", share), "share of the true class"),
    ):
        # Cells as vectors, since an image would be blurred in print; but thousands of them would make the page large.
        axis.pcolormesh(share, cmap="Blues", vmin=0, vmax=1, edgecolors="face" if many else "white", rasterized=many)
        axis.invert_yaxis()
        axis.set(xlabel="predicted", ylabel="true", title=title, aspect="equal")
        axis.set_xticks(places, classes, rotation=90 if many else 30, ha="center" if many else "right", fontsize=size)
        axis.set_yticks(places, classes, fontsize=size)
        for row, column in () if many else np.ndindex(*matrix.shape):
            tint = "white" if share[row, column] > DARK_CELL else "black"
            axis.text(places[column], places[row], texts[row, column], ha="center", va="center", color=tint, fontsize=8)
    return figure


def settled(figure: Figure) -> Figure:
    """Compute the figure's layout once, so that each output format need not repeat it."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def svg(figure: Figure, name: str) -> str:
    """The figure as SVG markup, without an XML header, with identifiers that are unique among figures."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def for_page(markup: str, name: str) -> str:
    """SVG markup for a page: identifiers of its own, an entry's marks ready to be switched off, ink in the page's colour."""
    # The same picture twice in a figure has the same identifier, which nothing refers to.
    markup = re.sub(r'\sid="image[0-9a-f]+"', "", markup)
    markup = re.sub(r"fill: #ffffff", "fill: none", re.sub(r"#(000000|404040)", "currentColor", markup), count=1)
    marked = re.sub(r'<g id="[^"]*"', "<g", re.sub(r'<g id="entry-(\d+)"', r'<g data-shown="\1"', markup))
    return re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", marked)


def write_figures(figures: dict[str, Figure], folder: Path) -> dict[str, str]:
    """Write each figure as SVG, PDF with its texts as text (for papers) and PNG (for slides).

    Returns:
        SVG markup by name.
    """
    markup = {}
    for name, figure in figures.items():
        markup[name] = svg(settled(figure), name)
        write_text(folder / f"{name}.svg", f'<?xml version="1.0" encoding="utf-8"?>\n{markup[name]}')
        with atomic(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        with atomic(folder / f"{name}.pdf") as temporary, rc_context({"pdf.fonttype": 42}):
            figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})
    return markup
