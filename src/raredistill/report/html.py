"""One self-contained page from tables, figures and verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import pandas as pd
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from raredistill.report.figures import svg
from raredistill.report.results import Results


@dataclass(frozen=True)
class Page:
    """What the template shows."""

    results: Results
    verdicts: list[dict[str, Any]]
    cautions: list[str]
    tables: dict[str, pd.DataFrame]
    figures: dict[str, Figure]


def render(page: Page) -> str:
    """The page as HTML; everything that comes from data is escaped."""
    folder = files("raredistill.report") / "templates"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = _cell
    template = environment.from_string((folder / "report.html.j2").read_text(encoding="utf-8"))
    study = page.results.study
    return template.render(
        study=study, verdicts=page.verdicts, cautions=page.cautions, tables=page.tables, entries=page.results.entries,
        figures={name: Markup(svg(figure)) for name, figure in page.figures.items()},
        config=yaml.safe_dump(study["config"], sort_keys=False, allow_unicode=True),
        provenance=yaml.safe_dump({key: study[key] for key in ("command", "versions", "machine", "splits")}, sort_keys=False),
        source=_source(study["cohort"]["provenance"]),
        failed=[run for run in study["runs"] if run["status"] == "failed"], done=len(page.results.runs),
        style=Markup((folder / "style.css").read_text(encoding="utf-8")), script=Markup((folder / "script.js").read_text(encoding="utf-8")),
    )  # fmt: skip


def _source(provenance: dict[str, Any]) -> str:
    # Hashes of single files are in the cohort's own description: thousands of lines help no reader here.
    return yaml.safe_dump({key: value for key, value in provenance.items() if key != "hashes"}, sort_keys=False)


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
