"""The model card of an export: Hugging Face's format, every number from the study's tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from jinja2 import Environment, PackageLoader, StrictUndefined

from raredistill.files import write_text
from raredistill.predictions import Predictions
from raredistill.runs.record import StudyRecord
from raredistill.ship import evidence
from raredistill.ship.find import Found
from raredistill.ship.terms import Terms

if TYPE_CHECKING:
    from raredistill.ship.export import Format


@dataclass(frozen=True)
class Card:
    """The input of a model card.

    Attributes:
        found: the model.
        study: that it comes from.
        terms: of its use.
        network: facts, as ``config.json`` has them.
        formats: the files.
        teacher_ms: time of one image of the teacher; None without one.
        samples: validation samples on which the formats were compared.
        held_out: test predictions of the runs that it comes from; None without any.
    """

    found: Found
    study: StudyRecord
    terms: Terms
    network: dict[str, Any]
    formats: list[Format]
    teacher_ms: float | None
    samples: int
    held_out: Predictions | None


def write_card(path: Path, card: Card) -> None:
    """Write the card."""
    environment = Environment(
        loader=PackageLoader("raredistill.ship"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters |= {"number": _number, "cell": _cell, "signed": lambda value: _number(value, "+.3f")}
    write_text(path, environment.get_template("card.md").render(_facts(card)))


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _facts(card: Card) -> dict[str, Any]:
    table, rule, record = card.held_out, card.terms.rule, next(run for run in card.study.runs if run.name == card.found.entry)
    return {
        "card": card, "study": card.study, "terms": card.terms, "rule": rule, "network": card.network, "record": record,
        "scores": [] if table is None else evidence.scores(table),
        "calibration": None if table is None or not rule.samples else evidence.calibration(table, rule),
        "points": [] if table is None else evidence.operating_points(table, rule),
        "tested": 0 if table is None else table.table["patient"].nunique(),
        "verdict": evidence.verdict(card.study, card.found), "weights": _weights(record.network, card.network["timm"]),
        "pictures": card.terms.preparation.pictures and list(card.terms.channels) in (["grey"], ["red", "green", "blue"]),
        "grey": list(card.terms.channels) == ["grey"], "version": version("raredistill"),
    }  # fmt: skip


def _weights(network: str, name: str) -> str:
    """Source of the initial weights, and their licence as recorded by timm."""
    if ", from scratch" in network:
        return "trained from scratch on the cohort below; whoever owns the cohort decides on a licence"
    config = timm.get_pretrained_cfg(name) if name else None
    told = getattr(config, "license", None) if config is not None else None
    return f"started from pre-trained weights; their licence by timm's record: {told or 'not recorded, ask their authors'}"
