"""Every problem of a source at once, also those that only decoding tells."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from raredistill import files
from raredistill.cohort.duplicates import SIDE, Copies, Prints, Treatment, find_copies, implausible_patients, prints_of, problems_of
from raredistill.cohort.parallel import over_units
from raredistill.cohort.sources import Problem, Skipped, Source, Unit
from raredistill.errors import DataError
from raredistill.names import fault, shown

TRIAL_SIZE = (32, 32)
"""Patients are read as ``prepare`` would, at a size that costs little."""
LEVELS = ("error", "warning", "note")
COMPARED = ("sample", "patient", "patient_label", "label", "split")
NARROW = 26
"""Of 256 grey values: a class that uses fewer has been read with another range than its own."""


@dataclass(frozen=True)
class Findings:
    """The result of ``verify``.

    Attributes:
        problems: errors first, then by patient; empty when all is well.
        skipped: what lies in the source and is not taken, by reason.
        usable: units without an error.
        samples: how many can be used, and how many of them have no label.
        unlabelled: samples without a label.
        copies: equal pictures and near-copies.
        looks: ``(samples, SIDE, SIDE)`` uint8 grey, as they were compared.
        seconds: stage -> seconds.
    """

    problems: list[Problem]
    skipped: list[Skipped]
    usable: int
    samples: int
    unlabelled: int
    copies: Copies
    looks: np.ndarray
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """One unit that was read: what was wrong, and what is kept of its samples to compare them."""

    problems: list[Problem]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    prints: Prints = field(default_factory=lambda: Prints((), np.zeros((0, SIDE, SIDE), np.uint8)))


def verify(source: Source, *, workers: int | None = None, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Every problem of a source: those of :func:`examine`."""
    return examine(source, workers=workers, progress=progress).problems


def examine(source: Source, *, workers: int | None = None, progress: Callable[[int, int], None] | None = None) -> Findings:
    """Look at everything in a source, decoding each patient once, and compare all samples with each other.

    Args:
        source: raw data.
        workers: processes; all cores by default.
        progress: called with the patients done and the patients in all.
    """
    start = time.monotonic()
    found, units = listed_problems(source), source.units()
    if not units and not any(problem.level == "error" for problem in found):
        found.append(Problem("error", "", "", "no patient can be used", "see the notes for what is missing"))
    listed = time.monotonic()
    trials: list[Trial] = []
    for done, trial in enumerate(over_units(check, units, (source,), workers=workers), start=1):
        trials.append(trial)
        if progress is not None:
            progress(done, len(units))
    read = time.monotonic()
    samples, prints = gathered([trial.rows for trial in trials], [trial.prints for trial in trials])
    found += [problem for trial in trials for problem in trial.problems]
    copies = find_copies(samples, prints)
    found += compared(copies, prints, source)
    unusable = {problem.patient for problem in found if problem.level == "error" and problem.patient}
    return Findings(
        sorted(dict.fromkeys(found), key=lambda problem: (LEVELS.index(problem.level), problem.patient, problem.file, problem.what)),
        source.skipped(),
        sum(unit.patient not in unusable for unit in units),
        len(samples),
        int((samples["label"] == "").sum()),
        copies,
        prints.looks,
        {"list": listed - start, "read": read - listed, "compare": time.monotonic() - read},
    )


def listed_problems(source: Source) -> list[Problem]:
    """Problems found without decoding pixels: the source's own, and every name that breaks the rule for names."""
    return list(source.problems()) + name_problems(source)


def name_problems(source: Source) -> list[Problem]:
    """Names of classes, channels, patients and files that a cohort cannot contain; such names must be fixed, not left out."""
    cure = "rename it, in plain UTF-8 (convmv -f utf8 -t utf8 --nfc -r --notest FOLDER composes names from macOS)"
    named = [("the class", name, "") for name in source.classes()] + [("the channel", name, "") for name in source.channels]
    for unit in source.units():
        named += [("the patient", unit.patient, ""), *(("the file", file.name, shown(file)) for file in unit.files)]
    faulty = [(what, name, file, said) for what, name, file in named if (said := fault(name))]
    return [Problem("error", "", file, f"{what} {shown(name)!r:.80} {said}", cure) for what, name, file, said in faulty]


def write_table(findings: Findings, path: Path) -> Path:
    """Write problems, and what is left out by reason (level ``left out``), as a table that can be sent on.

    Raises:
        DataError: ``path`` ends neither with .csv nor with .json.
    """
    rows = [asdict(problem) for problem in findings.problems]
    rows += [
        {"level": "left out", "patient": "", "file": ", ".join(skip.examples), "what": f"{skip.count} {skip.reason}", "cure": ""}
        for skip in findings.skipped
    ]
    if path.suffix.lower() not in (".csv", ".json"):
        raise DataError(f"{path}: the table is written as .csv or .json; name such a file")
    table = pd.DataFrame(rows, columns=["level", "patient", "file", "what", "cure"])
    with files.atomic(path) as temporary:
        if path.suffix.lower() == ".csv":
            table.to_csv(temporary, index=False)
        else:
            table.to_json(temporary, orient="records", indent=1, force_ascii=False)
    return path


def gathered(rows: list[list[tuple[str, ...]]], prints: list[Prints]) -> tuple[pd.DataFrame, Prints]:
    """The samples of all units in the order of their names, with their prints."""
    samples = pd.DataFrame([row for some in rows for row in some], columns=list(COMPARED))
    order = samples["sample"].argsort(kind="stable").to_numpy() if len(samples) else np.zeros(0, np.int64)
    digests = [digest for some in prints for digest in some.digests]
    looks = np.concatenate([some.looks for some in prints]) if prints else np.zeros((0, SIDE, SIDE), np.uint8)
    return samples.iloc[order].reset_index(drop=True), Prints(tuple(digests[place] for place in order), looks[order])


def compared(copies: Copies, prints: Prints, source: Source) -> list[Problem]:
    """Problems found by comparing all samples: copies, patients that the images contradict, and classes with little contrast."""
    samples = copies.samples
    found = problems_of(copies, treatment_of(source)) + implausible_patients(samples, prints.looks)
    for name in sorted(set(samples["label"]) - {""}):
        looks = prints.looks[(samples["label"] == name).to_numpy()]
        low, high = int(looks.min()), int(looks.max())
        if 0 < high - low < NARROW:
            what = f"{name}: all values lie between {low} and {high} of 255, under a tenth of the range"
            found.append(Problem("warning", "", "", what, "set window=[low, high] to the values that are black and white"))
    return found


def treatment_of(source: Source) -> Treatment:
    """Treatment of equal images; sources created without ``open_source`` refuse them."""
    return getattr(source, "duplicates", "refuse")


def rows_of(unit: Unit, rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Columns of samples for comparison: ``COMPARED``."""
    own = {"patient": unit.patient, "patient_label": unit.label}
    return [tuple(shown(str({**own, **row}[column])) for column in COMPARED) for row in rows]


def check(unit: Unit, source: Source) -> Trial:
    """Read one patient: problems that decoding tells, and the prints of the samples."""
    try:
        slices = source.read(unit, TRIAL_SIZE)
    except DataError as error:
        return Trial([decoding_error(unit, error)])
    problems = list(slices.problems)
    if not slices.rows:
        what = Problem("warning", unit.patient, "", "every slice is left out by the label rule", "check the patient's files")
        return Trial([what, *problems])
    return Trial(problems, rows_of(unit, slices.rows), prints_of(slices))


def decoding_error(unit: Unit, error: DataError) -> Problem:
    """Tell a patient that cannot be read as a problem."""
    return Problem("error", unit.patient, "", str(error), "replace what is named, or leave the patient out (leave_out_bad)")
