"""What a reader sees of a study: one page, its tables and its figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from raredistill.files import write_text
from raredistill.report import figures, tables
from raredistill.report.html import Page, render
from raredistill.report.results import Results, read_results
from raredistill.report.verdicts import cautions, verdicts

STEPS = 4


def write_report(study: Path, *, progress: Callable[[int, int], None] | None = None) -> Path:
    """Write ``STUDY/report``: report.html (self-contained), tables as CSV and LaTeX, figures as SVG and PNG.

    Args:
        study: a study's folder, also an unfinished one.
        progress: called with the steps done and the steps in all.

    Returns:
        Path of the page.

    Raises:
        DataError: the folder is no study, or a finished run is damaged.
    """
    tell = progress or (lambda done, total: None)
    results = read_results(study)
    judged = verdicts(results)
    tell(1, STEPS)
    made = _tables(results, judged)
    tables.write_tables(made, study / "report" / "tables")
    tell(2, STEPS)
    drawn = _figures(results, judged, made)
    figures.write_figures(drawn, study / "report" / "figures")
    tell(3, STEPS)
    page = study / "report" / "report.html"
    write_text(page, render(Page(results, judged, cautions(results), made, drawn)))
    tell(STEPS, STEPS)
    return page


def summary_table(study: Path) -> pd.DataFrame:
    """One row an entry, for the end of ``raredistill study``."""
    results = read_results(study)
    return tables.summary(results, *tables.run_metrics(results))


def _tables(results: Results, judged: list[dict[str, object]]) -> dict[str, pd.DataFrame]:
    overall, by_class = tables.run_metrics(results)
    shown = ["entry", "control", "teacher", "direction", "rare_f1", "low", "high", "p", "p_holm", "rare_recall", "macro_f1", "verdict"]
    return {
        "summary": tables.summary(results, overall, by_class),
        "verdicts": pd.DataFrame(judged, columns=shown),
        "cohort": pd.DataFrame(results.study["cohort"]["counts"]),
        "splits": pd.DataFrame(results.study["split_table"]),
        "overall": tables.mean_and_spread(overall, ["entry", "checkpoint", "level"], tables.OVERALL),
        "by_class": tables.mean_and_spread(by_class, ["entry", "checkpoint", "level", "class"], tables.BY_CLASS),
        "runs": by_class,
    }


def _figures(results: Results, judged: list[dict[str, object]], made: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    rare, classes = results.study["rare"], results.study["cohort"]["classes"]
    drawn = {
        "forest": figures.forest(judged, rare),
        "size": figures.size_against_score(made["summary"], rare),
        "classes": figures.class_scores(made["runs"], results.entries, classes),
    }
    matrices = tables.confusions(results)
    for number, entry in enumerate(results.entries):
        drawn[f"curves-{number}"] = figures.curves(results, entry)
        if entry in matrices:
            drawn[f"confusion-{number}"] = figures.confusion(matrices[entry], classes)
    return {name: figure for name, figure in drawn.items() if figure is not None}
