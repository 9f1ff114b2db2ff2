"""One self-contained page from tables, figures and verdicts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import pandas as pd
import yaml
from markupsafe import Markup

from raredistill.reports import words
from raredistill.reports.figures import MANY, colours, for_page
from raredistill.reports.headline import Headline
from raredistill.reports.results import Results
from raredistill.runs.record import StudyRecord

ON_PAGE = ("disparity", "size", "gain_ratio", "imbalance", "decision", "reliability", "curves-", "maps-")
"""Figures that the page shows as they are drawn for papers; the others have an interactive one in their place."""
LIBRARIES = ("vega.min.js", "vega-lite.min.js")


@dataclass(frozen=True)
class Page:
    """What the template shows; ``figures`` are SVG markup by name, ``data`` is what the interactive figures are drawn from."""

    results: Results
    first: Headline
    answer: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    figures: dict[str, str]
    data: dict[str, Any]
    methods: str


def render(page: Page) -> str:
    """The page as HTML; everything that comes from data is escaped."""
    folder = files("raredistill.reports")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cell": words.cell, "header": words.header, "score": words.score}
    template = environment.from_string((folder / "templates" / "report.html.j2").read_text(encoding="utf-8"))
    study, entries = page.results.study, page.results.entries
    shown = f"the {MANY} rarest classes" if len(study.cohort.classes) > MANY else "every class"
    drawn = {name: Markup(for_page(markup, name)) for name, markup in page.figures.items() if name.startswith(ON_PAGE)}
    return template.render(
        study=study, first=page.first, answer=page.answer, tables=page.tables, entries=entries, shown=shown, figures=drawn,
        maps=[name for name in drawn if name.startswith("maps-")],
        colours=list(colours(entries).values()), methods=page.methods, data=_json(page.data),
        config=yaml.safe_dump(study.config, sort_keys=False, allow_unicode=True),
        provenance=yaml.safe_dump(_provenance(study), sort_keys=False), source=_source(study.cohort.provenance),
        failed=[run for run in study.runs if run.status == "failed"], done=len(page.results.runs),
        style=Markup((folder / "templates" / "style.css").read_text(encoding="utf-8")),
        libraries=[Markup((folder / "vendor" / name).read_text(encoding="utf-8")) for name in LIBRARIES],
        script=Markup((folder / "templates" / "script.js").read_text(encoding="utf-8")),
    )  # fmt: skip


def _json(data: dict[str, Any]) -> Markup:
    """JSON for a script element: no text in it can end the element or begin a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _provenance(study: StudyRecord) -> dict[str, Any]:
    known = {"command": study.command, "versions": study.versions, "machine": study.machine}
    seeds = sorted({run.seed for run in study.runs})
    return {**known, "cohort_hash": study.cohort.hash, "seeds": seeds, "splits": study.splits}


def _source(provenance: dict[str, Any]) -> str:
    # Hashes of single files are in the cohort's own description: thousands of lines would not help the reader here.
    return yaml.safe_dump({key: value for key, value in provenance.items() if key != "hashes"}, sort_keys=False)
