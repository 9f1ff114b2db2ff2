"""One self-contained page from tables, figures and verdicts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import pandas as pd
import yaml
from markupsafe import Markup

from raredistill.reports.figures import MANY, colours, for_page
from raredistill.reports.results import Results
from raredistill.runs.record import StudyRecord


@dataclass(frozen=True)
class Page:
    """The input of the template; ``figures`` are SVG markup by name."""

    results: Results
    answer: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    figures: dict[str, str]


def render(page: Page) -> str:
    """Render the page as HTML; everything that comes from data is escaped."""
    folder = files("raredistill.reports") / "templates"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cell": _cell, "breakable": _breakable}
    template = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    study, entries = page.results.study, page.results.entries
    shown = f"the {MANY} rarest classes" if len(study.cohort.classes) > MANY else "every class"
    return template.render(
        study=study, answer=page.answer, tables=page.tables, entries=entries, shown=shown, colours=list(colours(entries).values()),
        figures={name: Markup(for_page(markup, name)) for name, markup in page.figures.items()},
        config=yaml.safe_dump(study.config, sort_keys=False, allow_unicode=True),
        provenance=yaml.safe_dump(_provenance(study), sort_keys=False), source=_source(study.cohort.provenance),
        failed=[run for run in study.runs if run.status == "failed"], done=len(page.results.runs),
        style=Markup((folder / "style.css").read_text(encoding="utf-8")), script=Markup((folder / "script.js").read_text(encoding="utf-8")),
    )  # fmt: skip


def _provenance(study: StudyRecord) -> dict[str, Any]:
    known = {"command": study.command, "versions": study.versions, "machine": study.machine}
    seeds = sorted({run.seed for run in study.runs})
    return {**known, "cohort_hash": study.cohort.hash, "seeds": seeds, "splits": study.splits}


def _source(provenance: dict[str, Any]) -> str:
    # Hashes of single files are in the cohort's own description: thousands of lines would not help the reader here.
    return yaml.safe_dump({key: value for key, value in provenance.items() if key != "hashes"}, sort_keys=False)


def _breakable(name: str) -> Markup:
    """A column's name, escaped, with possible line breaks after underscores."""
    return Markup("_<wbr>").join(str(name).split("_"))


def _cell(value: Any) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "undefined"
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
