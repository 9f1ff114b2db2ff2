"""A first study for a cohort: a commented configuration whose sizes fit the cohort and this machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from raredistill.cohort.store import Cohort
from raredistill.errors import DataError
from raredistill.files import write_text

NETWORKS = (
    (48, "cifar_resnet14", "cifar_resnet8"),
    (128, "resnet18", "mobilenetv3_small_050"),
    (1024, "resnet50", "mobilenetv3_small_100"),
)
"""Up to which size of the images: teacher and student."""
MOST_FOLDS, FEWEST_A_FOLD = 5, 2
RECALL = 0.8


@dataclass(frozen=True)
class Start:
    """A first study.

    Attributes:
        text: its YAML.
        rare: the class that fewest patients carry, or fewest samples where patients carry none.
        patients: who carry it.
        precision: half of the 95 % interval that a recall of 0.8 has with so many patients, all of them tested once.
    """

    text: str
    rare: str
    patients: int
    precision: float


def start(cohort: Cohort) -> Start:
    """Choose networks, folds and epochs for a cohort.

    Raises:
        DataError: the rarest class has too few patients for two folds.
    """
    counts = cohort.counts().set_index("class")["patients"].loc[list(cohort.patient_classes)]
    rare, patients = str(counts.idxmin()), int(counts.min())
    folds = min(MOST_FOLDS, patients // FEWEST_A_FOLD)
    if folds < 2:
        raise DataError(f"{cohort.root}: {rare} has {patients} patients; two folds need {2 * FEWEST_A_FOLD}")
    gpu = torch.cuda.is_available()
    teacher, student = next(pair for size, *pair in NETWORKS if max(cohort.size) <= size)
    environment = Environment(loader=PackageLoader("raredistill.ship"), undefined=StrictUndefined, trim_blocks=True, autoescape=False)
    text = environment.get_template("study.yaml").render(
        cohort=cohort, rare=rare, patients=patients, folds=folds, epochs=30 if gpu else 10, batch=64 if gpu else 32, teacher=teacher,
        student=student, machine=torch.cuda.get_device_name() if gpu else f"a CPU with {torch.get_num_threads()} threads",
    )  # fmt: skip
    return Start(text, rare, patients, 1.96 * math.sqrt(RECALL * (1 - RECALL) / patients))


def write_start(cohort: Cohort, out: Path) -> Start:
    """Write a first study to ``out``.

    Raises:
        DataError: the file exists, or as :func:`start`.
    """
    if out.exists():
        raise DataError(f"{out} exists; name another file with --out")
    made = start(cohort)
    write_text(out, made.text)
    return made
