"""Every problem of a source at once, also those that only decoding tells."""

from __future__ import annotations

from collections.abc import Callable

from raredistill.cohort.parallel import over_units
from raredistill.cohort.sources import Problem, Source, Unit
from raredistill.errors import DataError

TRIAL_SIZE = (32, 32)
"""Patients are read as ``prepare`` would, at a size that costs little."""
LEVELS = ("error", "warning", "note")


def verify(source: Source, *, workers: int | None = None, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Look at everything in a source, decoding each patient once.

    Args:
        source: raw data.
        workers: processes; all cores by default.
        progress: called with the patients done and the patients in all.

    Returns:
        Problems, errors first, then by patient; empty when all is well.
    """
    found = list(source.problems())
    units = source.units()
    if not units and not any(problem.level == "error" for problem in found):
        found.append(Problem("error", "", "", "no patient can be used", "see the notes for what is missing"))
    for done, problems in enumerate(over_units(check, units, (source,), workers=workers), start=1):
        found += problems
        if progress is not None:
            progress(done, len(units))
    unique = list(dict.fromkeys(found))
    return sorted(unique, key=lambda problem: (LEVELS.index(problem.level), problem.patient, problem.file, problem.what))


def check(unit: Unit, source: Source) -> list[Problem]:
    """Problems of one patient that decoding tells."""
    try:
        slices = source.read(unit, TRIAL_SIZE)
    except DataError as error:
        return [decoding_error(unit, error)]
    if not slices.rows:
        return [
            Problem("warning", unit.patient, "", "every slice is left out by the label rule", "check the patient's files"),
            *slices.problems,
        ]
    return list(slices.problems)


def decoding_error(unit: Unit, error: DataError) -> Problem:
    """Tell a patient that cannot be read as a problem."""
    return Problem("error", unit.patient, "", str(error), "replace what is named, or leave the patient out (leave_out_bad)")
