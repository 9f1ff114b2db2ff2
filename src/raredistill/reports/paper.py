"""For a paper: LaTeX tables that compile as they are, a paragraph on methods with its references, verdicts for other programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from raredistill.errors import DataError
from raredistill.files import read_json, write_json, write_text
from raredistill.reports.headline import Headline
from raredistill.reports.results import Results
from raredistill.reports.words import cell, header

COLUMNS = 7
"""Columns that fit the width of a page; a table with more keeps its first ones."""
ESCAPES = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "±": r"$\pm$", "{": r"\{", "}": r"\}",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "−": r"$-$", "<": r"$<$", ">": r"$>$", "\u202f": r"\,", "–": "--", "’": "'",
}  # fmt: skip


def tex(text: str) -> str:
    """Text as LaTeX shows it."""
    return "".join(ESCAPES.get(letter, letter) for letter in text)


def latex(table: pd.DataFrame, caption: str = "", label: str = "") -> str:
    """A ``table`` with rules from booktabs, its caption above, numbers to the right, at most ``COLUMNS`` columns."""
    kept = table[list(table.columns[:COLUMNS])]
    left_out = [header(name) for name in table.columns[COLUMNS:]]
    said = caption + (f" Not shown: {', '.join(left_out)}; see the CSV file of the same name." if left_out else "")
    rows = [[tex(_cell(value, column)) for column, value in row.items()] for row in kept.to_dict("records")]
    sides = "".join("r" if pd.api.types.is_numeric_dtype(kept[column]) else "l" for column in kept.columns)
    return tabular([tex(header(column)) for column in kept.columns], rows, sides, tex(said), label)


def _cell(value: Any, column: object) -> str:
    return "–" if value is None or (isinstance(value, float) and math.isnan(value)) else cell(value, column)


def tabular(heads: Sequence[str], rows: Sequence[Sequence[str]], sides: str, caption: str, label: str) -> str:
    """A ``table`` from cells that are LaTeX already."""
    return "\n".join([
        r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{caption}}}",
        *([rf"\label{{tab:{label}}}"] if label else []),
        rf"\begin{{tabular}}{{{sides}}}", r"\toprule", " & ".join(heads) + r" \\", r"\midrule",
        *(" & ".join(row) + r" \\" for row in rows), r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
    ])  # fmt: skip


def main_table(first: Headline, results: Results) -> str:
    """The result of the study as a table: scores with and without a teacher, the difference with its interval, the best score bold."""
    rare = results.study.rare
    scores = [score for row in first.rows for score in (row.with_teacher, row.without) if score is not None]
    best = max(scores, default=math.nan)

    def shown(score: float | None) -> str:
        return "--" if score is None else rf"\textbf{{{score:.3f}}}" if score == best else f"{score:.3f}"

    rows = [
        [
            tex(row.entry),
            tex(row.teacher),
            tex(row.control),
            shown(row.with_teacher),
            shown(row.without),
            tex(row.numbers),
            tex(row.verdict),
        ]
        for row in first.rows
    ]
    caption = f"F1 of {rare} with and without a teacher, and the difference with its 95 % interval. The best score is bold."
    heads = ["Student", "Teacher", "Control", "With", "Without", "Difference", "Verdict"]
    return tabular(heads, rows, "lllrrll", tex(caption), "main")


CAPTIONS = {
    "summary": "Means over runs, by slice, checkpoint chosen on validation.", "verdicts": "Verdicts on the rare class's F1.",
    "intervals": "Scores with 95 % intervals over patients.", "comparisons": "All metrics of all pairs; p is not adjusted.",
    "sizes": "Size and latency of the networks.", "operating_points": "Operating points chosen on validation, measured on test.",
    "calibration": "Calibration.", "controls": "Controls that a verdict needs.", "cohort": "The cohort.", "gains": "Gain by pair.",
}  # fmt: skip
PAGE = 60
"""Rows that fit on one page; longer tables are CSV only."""


def write_paper(results: Results, first: Headline, verdicts: Sequence[dict[str, Any]], made: dict[str, pd.DataFrame], folder: Path) -> None:
    """Write what a paper and other programs take from a study: ``tables/*.tex``, ``methods.md``, ``verdicts.json`` and its schema."""
    for name, table in made.items():
        if 0 < len(table) <= PAGE:
            write_text(folder / "tables" / f"{name}.tex", latex(table, CAPTIONS.get(name, f"{header(name)}."), name))
    write_text(folder / "tables" / "main.tex", main_table(first, results))
    write_text(folder / "methods.md", methods_file(results))
    write_json(folder / "verdicts.json", verdict_file(results, first, verdicts).model_dump())
    write_json(folder / "verdicts.schema.json", VerdictFile.model_json_schema())


class VerdictRecord(BaseModel):
    """One comparison of ``verdicts.json``; numbers are null where nothing was tested."""

    model_config = ConfigDict(extra="forbid")

    entry: str
    control: str
    teacher: str
    verdict: Literal["helps", "harms", "makes no practical difference", "not decided", "described"]
    sentence: str
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    detectable: float | None


class VerdictFile(BaseModel):
    """``verdicts.json``: the answer of a study for other programs."""

    model_config = ConfigDict(extra="forbid")

    study: str
    rare: str
    question: str
    answer: str
    warnings: list[str]
    next_step: str
    command: str
    verdicts: list[VerdictRecord]


def verdict_file(results: Results, first: Headline, verdicts: Sequence[dict[str, Any]]) -> VerdictFile:
    """The verdicts as checked plain values; what is infinite or undefined is null."""
    records = [VerdictRecord(**{name: _plain(record.get(name)) for name in VerdictRecord.model_fields}) for record in verdicts]
    return VerdictFile(
        study=results.study.name, rare=results.study.rare, question=first.question, answer=first.answer, warnings=list(first.banners),
        next_step=first.next_step, command=first.command, verdicts=records,
    )  # fmt: skip


def read_verdicts(report: Path) -> VerdictFile:
    """The verdicts that a report has written.

    Raises:
        DataError: the folder holds none, or the file was changed.
    """
    path = report / "verdicts.json"
    if not path.is_file():
        raise DataError(f"{path} is missing; write it with raredistill report {report.parent}")
    try:
        return VerdictFile.model_validate(read_json(path))
    except ValidationError as error:
        raise DataError(f"{path}: {error.errors()[0]['msg'].lower()}; write it again with raredistill report {report.parent}") from None


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


BIBTEX = {
    "torch": r"""@inproceedings{paszke2019pytorch,
  title={PyTorch: An Imperative Style, High-Performance Deep Learning Library},
  author={Paszke, Adam and Gross, Sam and Massa, Francisco and others},
  booktitle={Advances in Neural Information Processing Systems}, volume={32}, year={2019}}""",
    "hinton": r"""@article{hinton2015distilling,
  title={Distilling the Knowledge in a Neural Network},
  author={Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  journal={arXiv preprint arXiv:1503.02531}, year={2015}}""",
    "holm": r"""@article{holm1979simple,
  title={A Simple Sequentially Rejective Multiple Test Procedure},
  author={Holm, Sture}, journal={Scandinavian Journal of Statistics}, volume={6}, number={2}, pages={65--70}, year={1979}}""",
    "nadeau": r"""@article{nadeau2003inference,
  title={Inference for the Generalization Error},
  author={Nadeau, Claude and Bengio, Yoshua}, journal={Machine Learning}, volume={52}, pages={239--281}, year={2003}}""",
}


def methods_paragraph(results: Results) -> str:
    """What was done, as one paragraph for a journal."""
    study = results.study
    cohort, unit = study.cohort, "patients"
    if not study.cohort.patients_known:
        unit = "images, which were treated as independent because no patient identifiers were available"
    networks = dict.fromkeys(f"{run.model} ({run.parameters:,} parameters)" for run in map(results.first, results.entries))
    methods = ", ".join(dict.fromkeys(run.method for run in study.runs if run.method)) or "none"
    return (
        f"We asked whether knowledge distillation improves the recognition of {study.rare}, the rarest class, in {cohort.samples} samples "
        f"of {cohort.patients} {unit}. We used {_layout(results)}; no patient stood on two sides of a split. The networks were "
        f"{', '.join(networks)}; the distillation method was {methods} [@hinton2015distilling]. Training used {_training(results)}. "
        "Each distilled student was compared with the same network trained with the same data, loss and seed without a teacher. The "
        f"primary outcome was the F1 of {study.rare} of the last epoch, with the decision threshold matched on the validation part. "
        f"{_test(results)} Software: {_software(results)} [@paszke2019pytorch]."
    )


def _layout(results: Results) -> str:
    study = results.study
    cells = {(run.repeat, run.fold) for run in study.runs}
    folds, repeats = len({fold for _, fold in cells}), len({repeat for repeat, _ in cells})
    seeds = _times(len({run.seed for run in study.runs}), "random seed")
    if study.protocol == "outer":
        return f"{_times(repeats, 'repeat')} of {folds}-fold outer cross-validation grouped by patient, with {seeds}"
    return f"one test set ({study.protocol}) and {_times(folds, 'training split')} grouped by patient, with {seeds}"


def _training(results: Results) -> str:
    given = results.study.config.get("training") or {}
    return "; ".join(f"{words} {given[key]}" for key, words in TRAINING.items() if key in given) or "the default settings"


def _test(results: Results) -> str:
    if results.study.protocol != "outer":
        return "Because all networks share one test set, differences describe these networks and were not tested as a claim on the method."
    return (
        "Differences were tested two-sided with a variance that covers tested patients, training patients and training runs "
        "[@nadeau2003inference], at a level of 5 % with Holm's adjustment [@holm1979simple]."
    )


def _software(results: Results) -> str:
    known = [f"{name} {version}" for name, version in results.study.versions.items() if name in ("raredistill", "python", "torch", "timm")]
    return ", ".join(known) or "raredistill"


TRAINING = {
    "epochs": "a number of epochs of", "batch_size": "a batch size of", "learning_rate": "a learning rate of",
    "optimizer": "the optimiser", "loss": "the loss", "sampler": "the sampler", "weight_decay": "a weight decay of",
}  # fmt: skip
"""Settings that the paragraph names, in words."""


def _times(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def methods_file(results: Results) -> str:
    """``methods.md``: the paragraph and the BibTeX of what it cites."""
    return f"# Methods\n\n{methods_paragraph(results)}\n\n```bibtex\n" + "\n".join(BIBTEX.values()) + "\n```\n"
