"""The person that a name refers to, independent of visit, scan and release of a data set."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import regex

from raredistill.errors import ConfigError, DataError
from raredistill.names import shown

PATIENCE = 1.0
"""Time limit in seconds for matching one name; usual patterns take a few microseconds."""

TOLD = 5
"""Number of groups of ids that a message lists; further ones are only counted."""
_SCHEMES = (
    # BraTS-GLI-00001-000, BraTS-MEN-RT-0001-1: the last number is the time point (BraTS 2023 and later).
    re.compile(r"(?P<person>BraTS-(?:[A-Za-z]+-)+\d+)(?:-\d{1,3}[a-z]?)?", re.IGNORECASE),
    re.compile(r"(?P<person>BraTSReg_\d+)(?:_\d+)*", re.IGNORECASE),
    # Two scans of one person are UPENN-GBM-00001_11 and _21.
    re.compile(r"(?P<person>(?:UPENN-GBM|UCSD-PTGBM|UCSD-PTGBM-Post)-\d+)(?:_\d+)?", re.IGNORECASE),
    # TCGA's bar code and CPTAC's case id: what follows is a sample, a date or a scan.
    re.compile(r"(?P<person>TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})(?:[-_.].*)?", re.IGNORECASE),
    re.compile(r"(?P<person>C3[LN]-\d{5})(?:[-_.].*)?", re.IGNORECASE),
    # BIDS: sub-01_ses-02_run-1. OASIS: OAS1_0001_MR1, OAS30001_MR_d0129.
    re.compile(r"(?P<person>sub-[A-Za-z0-9]+)(?:_.*)?"),
    re.compile(r"(?P<person>OAS\d_\d{4}|OAS\d{5})_MR.*"),
)
_EARLY_BRATS = re.compile(r"brats1[5-9]_(?P<person>.+?)(?:_\d{1,4})?", re.IGNORECASE)
"""BraTS17_TCIA_425_1, Brats18_TCIA01_425_1 and BraTS19_TCIA01_425_1 are one person (all 335 of the name mapping of 2019 agree)."""
_UCSF = re.compile(r"UCSF-PDGM-0*(?P<number>\d+)[a-z]?(?:[_-].*)?", re.IGNORECASE)
"""Files write four digits, the metadata three; follow-ups end with _FU001d."""
_WORDS = "baseline|day|follow-?up|fu|month|post-?op|post|pre-?op|pre|scan|session|ses|timepoint|time|tp|visit|week|wk|year"
_SUFFIXES = (
    re.compile(r"[_-]nifti$", re.IGNORECASE),
    re.compile(r"[_. -](?:19|20)\d\d[._-]?(?:0[1-9]|1[0-2])[._-]?(?:[0-2]\d|3[01])$"),  # a date
    re.compile(rf"[_. -](?:{_WORDS})(?:[_. -]?\d+)*[a-z]?$", re.IGNORECASE),
    re.compile(r"(?<=\d{3})[a-z]$", re.IGNORECASE),  # 0998a and 0998b
)


def person_of(name: str) -> str:
    """The person that a name of a scan, visit or copy refers to, according to the naming schemes of public data sets.

    Visits (``BraTS-GLI-00001-000``, ``UCSF-PDGM-0429_FU001d``, ``UPENN-GBM-00001_21``, ``sub-01_ses-02``, ``P7_week-040-1``), dates,
    single letters after three digits (``0998a``), and the releases 2017 to 2019 of BraTS are removed. Unknown parts are kept.

    >>> person_of("BraTS-GLI-00001-001"), person_of("0998b"), person_of("Brats18_TCIA01_425_1"), person_of("lena_3")
    ('BraTS-GLI-00001', '0998', 'BraTS_TCIA_425', 'lena_3')
    """
    if match := _UCSF.fullmatch(name):
        return f"UCSF-PDGM-{int(match['number']):04d}"
    if match := _EARLY_BRATS.fullmatch(name):
        return "BraTS_" + re.sub(r"^TCIA\d\d_", "TCIA_", match["person"])
    for scheme in _SCHEMES:
        if match := scheme.fullmatch(name):
            return match["person"]
    return _without_visit(name)


def _without_visit(name: str) -> str:
    shorter = name
    for _ in range(len(_SUFFIXES)):
        for suffix in _SUFFIXES:
            shorter = suffix.sub("", shorter) or shorter
    return shorter


def compile_pattern(pattern: str, option: str = "patient") -> regex.Pattern[str]:
    """The regular expression that a user gave for an option.

    Raises:
        ConfigError: it is not a regular expression.
    """
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError) as error:
        raise ConfigError(f"{option}={pattern!r} is not a regular expression ({error})") from None


def apply_pattern(pattern: regex.Pattern[str], name: str) -> str | None:
    """The patient in a name: the group ``patient``, else the first group, else the whole match; None if nothing matches.

    Raises:
        ConfigError: the pattern can match in too many ways.
    """
    try:
        match = pattern.search(name, timeout=PATIENCE)
    except TimeoutError:
        raise ConfigError(
            f"patient={pattern.pattern!r} takes more than {PATIENCE:.0f} s to match {shown(name)!r:.80}: repetitions inside repetitions, "
            "such as (a+)+, can be matched in too many ways; write it without them"
        ) from None
    if match is None:
        return None
    group: int | str = "patient" if "patient" in pattern.groupindex else min(pattern.groups, 1)
    return match[group] or None


def join_rows(rows: Iterable[Sequence[str]]) -> dict[str, str]:
    """One key for all names that the rows of a table connect, also over several rows.

    Args:
        rows: the names of one person each, as in a table that maps the names of several releases.

    Returns:
        Every name -> the name that represents its group (the first in the table).
    """
    leader: dict[str, str] = {}
    place: dict[str, int] = {}

    def find(name: str) -> str:
        while leader[name] != name:
            leader[name] = leader[leader[name]]
            name = leader[name]
        return name

    for row in rows:
        for name in row:
            leader.setdefault(name, name)
            place.setdefault(name, len(place))
            first, second = sorted((find(name), find(row[0])), key=place.__getitem__)
            leader[second] = first
    return {name: find(name) for name in leader}


def spelling_key(name: str) -> str:
    """The id without features that spreadsheets change: leading zeros, a final ``.0``, blanks, and case."""
    shorter = re.sub(r"\.0+$", "", name.strip())
    return re.sub(r"(?<![\d.])0+(?=\d)", "", shorter).casefold()


def refuse_ambiguous_ids(ids: Iterable[str], where: str) -> None:
    """Refuse ids such as 7, 007 and 7.0, which may or may not be the same patient.

    Args:
        ids: ids of patients.
        where: the file or folder, for the message.

    Raises:
        DataError: some ids differ by leading zeros, ``.0``, blanks or case only.
    """
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(ids):
        groups.setdefault(spelling_key(name), []).append(name)
    doubtful = [" and ".join(map(repr, sorted(names))) for names in groups.values() if len(names) > 1]
    if doubtful:
        more = f" and {len(doubtful) - TOLD} more" if len(doubtful) > TOLD else ""
        raise DataError(
            f"{where}: patients {'; '.join(doubtful[:TOLD])}{more} differ only by leading zeros, '.0', blanks or case; "
            "write one patient one way (as text, not as a number), or make the ids differ"
        )
