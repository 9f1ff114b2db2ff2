"""The report of a study: one page with tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from raredistill.evaluation.looks import State
from raredistill.files import write_text
from raredistill.reports import analyses, datasets, figures, tables
from raredistill.reports.controls import controls, missing
from raredistill.reports.costs import costs
from raredistill.reports.decision import rare_kept
from raredistill.reports.headline import headline
from raredistill.reports.html import Page, render
from raredistill.reports.interactive import page_data
from raredistill.reports.looks import rows_of_looks, spared, states_of
from raredistill.reports.maps import map_figures, map_rows
from raredistill.reports.pairs import Pair, comparisons, fold_differences, make_pairs
from raredistill.reports.paper import methods_paragraph, write_paper
from raredistill.reports.results import Results, read_results
from raredistill.reports.verdicts import cautions, family, notes_on_tests, rare_power, size_verdict, verdicts
from raredistill.runs.layout import StudyFolder
from raredistill.runs.maps import read_maps

STEPS = 5
VERDICT_COLUMNS = (
    "entry", "control", "teacher", "relation", "difference", "low", "high", "p", "p_holm", "p_same", "detectable", "training_share",
    "argmax", "best_checkpoint", "nb_p", "worse", "equal", "better", "verdict", "basis",
)  # fmt: skip


def write_report(
    study: Path,
    results: Results | None = None,
    *,
    sweep: Sequence[Path] = (),
    across: Sequence[Path] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write ``STUDY/report``: report.html (self-contained), verdicts.json, methods.md, tables (CSV, LaTeX), figures (SVG, PDF, PNG).

    Args:
        study: folder of a study, finished or not.
        results: its content, if it was already read.
        sweep: folders of further studies with the same entries and a different imbalance in training; gains are plotted against it.
        across: folders of studies with the same entries on other data sets; gains are tested over them.
        progress: called with the number of finished steps and the total.

    Returns:
        Path of the page.

    Raises:
        DataError: the folder is not a study's, a finished run is damaged, or two data sets are the same.
    """
    tell = progress or (lambda done, total: None)
    folder, results = StudyFolder(study), results or read_results(study)
    tell(1, STEPS)
    pairs = make_pairs(results)
    states = states_of(study, results)
    answer = _answer(results, pairs, states)
    tell(2, STEPS)
    made = {**_tables(results, pairs, answer), "looks": rows_of_looks(states, results)}
    if sweep:
        made["imbalance"] = analyses.sweep([(results, pairs), *((other, make_pairs(other)) for other in map(read_results, sweep))])
    if across:
        made["datasets"] = datasets.across([(results, pairs), *((other, make_pairs(other)) for other in map(read_results, across))])
        made["datasets_tested"] = datasets.tested_across(made["datasets"])
        made["dataset_ranks"] = datasets.ranked_across(made["datasets"])
    maps = read_maps(folder)
    made["maps"] = map_rows(maps)
    answer["missing"] = missing(made["controls"])
    made = {name: table for name, table in made.items() if len(table.columns)}
    first = headline(results, pairs, answer["verdicts"], spared(states, results))
    tables.write_tables(made, folder.report / "tables")
    write_paper(results, first, answer["verdicts"], made, folder.report)
    tell(3, STEPS)
    with figures.plain_texts():
        drawn = figures.write_figures({**_figures(results, made), **map_figures(results, maps)}, folder.report / "figures")
    tell(4, STEPS)
    write_text(folder.page, render(Page(results, first, answer, made, drawn, page_data(results, made), methods_paragraph(results))))
    tell(STEPS, STEPS)
    return folder.page


def summary_table(study: Path) -> pd.DataFrame:
    """One row per entry, for the end of ``raredistill study``."""
    results = read_results(study)
    return tables.summary(results, *tables.run_metrics(results))


def verdict_sentences(study: Path) -> list[str]:
    """The conclusions supported by a study, one sentence per distilled entry."""
    results = read_results(study)
    return [record["sentence"] for record in _answer(results, make_pairs(results), states_of(study, results))["verdicts"]]


def _answer(results: Results, pairs: list[Pair], states: Mapping[str, State] | None) -> dict[str, Any]:
    rare, config = results.study.rare, results.study.config
    margin = (config.get("evidence") or {}).get("margin")
    return {
        "verdicts": verdicts(pairs, rare, margin, rare_kept(config, rare), states), "family": family(pairs, rare),
        "size": size_verdict(results, pairs), "power": rare_power(results, pairs), "cautions": cautions(results, spared(states, results)),
        "tests": notes_on_tests(results),
    }  # fmt: skip


def _tables(results: Results, pairs: list[Pair], answer: dict[str, Any]) -> dict[str, pd.DataFrame]:
    overall, by_class = tables.run_metrics(results)
    stages, fitted = analyses.calibrated_entries(results)
    summary, rare = tables.summary(results, overall, by_class), results.study.rare
    made = {
        "summary": summary,
        "verdicts": pd.DataFrame(answer["verdicts"], columns=list(VERDICT_COLUMNS)),
        "controls": controls(results, pairs),
        "comparisons": comparisons(pairs),
        "fold_differences": fold_differences(pairs),
        "footnotes": analyses.footnotes(pairs, rare),
        "inherited": analyses.inherited(results, pairs),
        "cohort": pd.DataFrame(results.study.cohort.counts),
        "splits": pd.DataFrame(results.study.split_table),
        "intervals": analyses.intervals(results),
        "overall": tables.mean_and_spread(overall, ["entry", "checkpoint", "level"], tables.OVERALL),
        "by_class": tables.mean_and_spread(by_class, ["entry", "checkpoint", "level", "class"], tables.BY_CLASS),
        "patient_rules": analyses.patient_rules(results),
        "sizes": analyses.sizes(results, summary),
        "costs": costs(results),
        "gains": analyses.gains(pairs, rare),
        "confusions": tables.confusion_rows(results),
        "calibration": analyses.calibration(results, stages),
        "temperatures": fitted,
        "reliability": analyses.reliability(stages),
        "operating_points": analyses.operating_points(results),
        "decision": (curves := analyses.decision_curves(results)),
        "decisions": analyses.decisions(results, curves),
        "prediction_sets": analyses.prediction_sets(results),
        "roc": analyses.roc_curves(results),
        "precision_recall": analyses.precision_recall_curves(results),
        "hardest_patients": analyses.hardest_patients(results),
        "hardest_slices": analyses.hardest_slices(results),
        "epochs": tables.epoch_rows(results),
        "runs": by_class,
        "runs_overall": overall,
    }
    return made


def _figures(results: Results, made: dict[str, pd.DataFrame]) -> dict[str, Figure]:
    rare, classes, entries = results.study.rare, results.study.cohort.classes, results.entries
    few = figures.rarest(results.study.cohort.counts, classes)
    drawn = {
        "forest": figures.forest(made["comparisons"], rare, entries),
        "disparity": figures.disparity(made["comparisons"], few),
        "size": figures.size_against_score(made["sizes"], rare, entries),
        "gain_ratio": figures.gain_against_ratio(made["gains"], rare, entries),
        "classes": figures.class_scores(made["runs"], entries, few),
        **_curves(made, rare, entries),
        **({"imbalance": figures.gain_against_imbalance(made["imbalance"], rare, entries)} if "imbalance" in made else {}),
    }
    matrices = tables.confusions(made.get("confusions", pd.DataFrame()), classes)
    for number, entry in enumerate(entries):
        drawn[f"curves-{number}"] = figures.curves(results, entry, few)
        if entry in matrices:
            drawn[f"confusion-{number}"] = figures.confusion(matrices[entry], classes)
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _curves(made: dict[str, pd.DataFrame], rare: str, entries: list[str]) -> dict[str, Figure | None]:
    if "roc" not in made:
        return {}
    act = ("probability at which one acts", "net benefit")
    return {
        "roc": figures.lines(made["roc"], "false_positive_rate", "recall", entries, ("1 − specificity", f"sensitivity for {rare}")),
        "precision_recall": figures.lines(made["precision_recall"], "recall", "precision", entries, (f"recall of {rare}", "precision")),
        "decision": figures.lines(made["decision"], "threshold", "benefit", entries, act, reference="act_on_all"),
        "reliability": figures.reliability(made["reliability"], entries),
    }
