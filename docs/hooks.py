"""Pages of the site that are made from the code: the command line and the tables of distillers and losses."""

from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click
from typer.main import get_command

from raredistill.cli import app
from raredistill.distill.registry import methods_table
from raredistill.losses import losses_table
from raredistill.training.settings import choices_table


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, content in (("reference/cli.md", _command_line()), ("reference/methods.md", _methods())):
        files.append(File.generated(config, path, content=content))
    return files


def _command_line() -> str:
    command = get_command(app)
    return get_docs_for_click(obj=command, ctx=click.Context(command, info_name="raredistill"), name="raredistill", title="Command line")


def _methods() -> str:
    sections = (("Distillers", methods_table()), ("Losses", losses_table()), ("What goes with any of them", choices_table()))
    return "# Distillers and losses\n\n" + "\n\n".join(f"## {title}\n\n{_table(rows)}" for title, rows in sections) + "\n"


def _table(rows: list[dict[str, Any]]) -> str:
    heads = list(rows[0])
    body = ["| " + " | ".join(str(row[name]).replace("|", "\\|") for name in heads) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads), *body])
