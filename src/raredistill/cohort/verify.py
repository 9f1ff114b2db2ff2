"""Every problem of a source at once, also those that only decoding tells."""

from __future__ import annotations

from collections.abc import Callable

from raredistill.cohort.parallel import over_units
from raredistill.cohort.sources import Problem, Source, Unit
from raredistill.errors import DataError
from raredistill.names import fault, shown

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
    found = problems_of(source)
    units = source.units()
    if not units and not any(problem.level == "error" for problem in found):
        found.append(Problem("error", "", "", "no patient can be used", "see the notes for what is missing"))
    for done, problems in enumerate(over_units(check, units, (source,), workers=workers), start=1):
        found += problems
        if progress is not None:
            progress(done, len(units))
    unique = list(dict.fromkeys(found))
    return sorted(unique, key=lambda problem: (LEVELS.index(problem.level), problem.patient, problem.file, problem.what))


def problems_of(source: Source) -> list[Problem]:
    """What can be told of a source without decoding pixels: its own problems, and every name that breaks the one rule of names."""
    return list(source.problems()) + name_problems(source)


def name_problems(source: Source) -> list[Problem]:
    """Names of classes, channels, patients and files that no cohort can hold. Such a name is mended, not left out."""
    cure = "rename it, in plain UTF-8 (convmv -f utf8 -t utf8 --nfc -r --notest FOLDER composes names from macOS)"
    named = [("the class", name, "") for name in source.classes()] + [("the channel", name, "") for name in source.channels]
    for unit in source.units():
        named += [("the patient", unit.patient, ""), *(("the file", file.name, shown(file)) for file in unit.files)]
    faulty = [(what, name, file, said) for what, name, file in named if (said := fault(name))]
    return [Problem("error", "", file, f"{what} {shown(name)!r:.80} {said}", cure) for what, name, file, said in faulty]


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
