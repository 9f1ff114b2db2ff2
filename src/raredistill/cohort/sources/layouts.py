"""Grouping of NIfTI files into scans and modalities, in the layouts of public glioma data sets."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raredistill.cohort.labels import CONVENTIONS, Convention
from raredistill.cohort.sources.walk import Skips
from raredistill.errors import DataError

ENDING = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
_ROLES = {
    "flair": "flair|t2[-_]?flair|t2f",
    "t1ce": "t1ce|t1c|t1gd|ct1|t1wce|t1post|t1km",
    "t1": "t1|t1n|t1w|t1pre",
    "t2": "t2|t2w",
    "seg": "seg|segm|(?<!brain_)(?<!parenchyma_)segmentation|tumou?r_?seg(?:mentation)?|glistrboost_manuallycorrected",
    "automatic": "automated_approx_segm|glistrboost",
}
_ROLE = re.compile(
    r"(?:^|[_-])(?:" + "|".join(f"(?P<{role}>{words})" for role, words in sorted(_ROLES.items(), reverse=True)) + r")$", re.IGNORECASE
)
_NEWER = re.compile(r"-(?:t2f|t1n|t1c|t2w|seg)$", re.IGNORECASE)
_NUMBERED = re.compile(r"_(\d{4})$")
_SHARED = re.compile(
    r"images?|labels?|masks?|segs?|segmentations?|images_structural|images_segm|automated_segm|anat|images?t[rs]|labels?t[rs]"
    rf"|{'|'.join(words for words in _ROLES.values())}",
    re.IGNORECASE,
)
"""Folders that hold files of many cases, or of one modality."""
_VISIT = re.compile(
    r"\d{1,4}|(?:19|20)\d{6}|(?:baseline|fu|scan|ses|session|time(?:point)?|tp|visit|week|month|day)(?:[_. -]?\d+)*", re.IGNORECASE
)
UNKNOWN = "NIfTI file of no known modality"
UNUSED = "automatic segmentation beside a corrected one"


@dataclass(frozen=True)
class Scan:
    """The files of one scan.

    Attributes:
        name: of its folder, or what its files' names have in common.
        folder: where most of its files lie.
        files: role (a modality, or ``seg``) -> the files that claim it.
        lanes: role -> its place along the fourth axis of its file, where one file holds all modalities.
        newer: whether its files are named as from BraTS 2023 on.
        convention: what the numbers of its segmentation mean, where a ``dataset.json`` says so.
    """

    name: str
    folder: Path
    files: dict[str, tuple[Path, ...]]
    lanes: dict[str, int] = field(default_factory=dict)
    newer: bool = False
    convention: Convention | None = None

    def missing(self, channels: Sequence[str]) -> list[str]:
        """Modalities without a file."""
        return [role for role in channels if role not in self.files]

    def rivals(self) -> list[tuple[Path, ...]]:
        """Files that claim to be the same modality, other than a file and its compressed copy."""
        return [found for found in self.files.values() if len({ENDING.sub("", file.name) for file in found}) > 1]


@dataclass(frozen=True)
class _Part:
    """One file, and the information in its name."""

    file: Path
    holder: Path
    prefix: str
    role: str
    newer: bool


def find_scans(files: Sequence[Path], root: Path, order: Sequence[str], skips: Skips) -> list[Scan]:
    """Group NIfTI files into scans.

    Args:
        files: all that may be used.
        root: the source's folder.
        order: modalities of files ``_0000``, ``_0001`` ... or of a fourth axis, where no ``dataset.json`` names them.
        skips: counts the files that are no known modality.
    """
    described, rest = _described(files, order)
    parts = [part for file in rest if (part := _part(file, skips, root))]
    scans = [*described, *_merged(_grouped(parts, root))]
    return sorted((_corrected(scan, skips, root) for scan in scans), key=lambda scan: (scan.name, scan.folder))


def role_of(stem: str) -> tuple[str, str]:
    """Prefix before the modality in a file's name without its ending, and the modality; "" if there is none."""
    match = _ROLE.search(stem)
    return (stem[: match.start()], match.lastgroup or "") if match else (stem, "")


def _part(file: Path, skips: Skips, root: Path) -> _Part | None:
    stem, holder = ENDING.sub("", file.name), file.parent
    if ENDING.search(holder.name):  # a mirror of BraTS 2021 keeps each file in a folder of the file's name
        stem, holder = ENDING.sub("", holder.name), holder.parent
    prefix, role = role_of(stem)
    if not role and holder != root:
        _, role = role_of(holder.name) if _SHARED.fullmatch(holder.name) else ("", "")
        role = "seg" if re.fullmatch(r"(?:labels?|masks?)(?:t[rs])?", holder.name, re.IGNORECASE) else role
    if not role:
        skips.add(UNKNOWN, file.relative_to(root).as_posix())
        return None
    return _Part(file, holder, re.sub(r"[_-]nifti$", "", prefix), role, bool(_NEWER.search(stem)))


def _grouped(parts: list[_Part], root: Path) -> list[Scan]:
    holders: dict[Path, list[_Part]] = {}
    for part in parts:
        holders.setdefault(part.holder, []).append(part)
    scans: list[Scan] = []
    for holder, inside in holders.items():
        names = sorted({part.prefix for part in inside})
        if _is_flat(holder, inside, root):
            scans += [_scan(name, holder, [part for part in inside if part.prefix == name]) for name in names if name]
        else:
            scans.append(_scan(_folder_name(holder, names, root), holder, inside))
    return scans


def _is_flat(holder: Path, inside: list[_Part], root: Path) -> bool:
    """Whether a folder holds the files of several scans: names tell which."""
    names = {part.prefix for part in inside}
    if names == {""}:
        return False
    if holder == root or _SHARED.fullmatch(holder.name):
        return True
    if any(name and (holder.name.startswith(name) or name.startswith(holder.name)) for name in names):
        return False
    complete = [name for name in names if len({part.role for part in inside if part.prefix == name}) > 1]
    return len(complete) > 1


def _folder_name(holder: Path, names: list[str], root: Path) -> str:
    plain = re.sub(r"[_-]nifti$", "", holder.name)
    if _VISIT.fullmatch(plain) and holder != root and holder.parent != root:  # Patient-001/week-000
        return f"{holder.parent.name}_{plain}"
    return plain


def _scan(name: str, folder: Path, parts: list[_Part]) -> Scan:
    files: dict[str, list[Path]] = {}
    for part in parts:
        files.setdefault(part.role, []).append(part.file)
    return Scan(name, folder, {role: _own(found, name) for role, found in files.items()}, newer=any(part.newer for part in parts))


def _own(files: list[Path], name: str) -> tuple[Path, ...]:
    """The files that carry the scan's name, where any does: a copy of case 355's segmentation under its right name wins."""
    return tuple(file for file in files if file.name.startswith(name)) or tuple(files)


def _merged(scans: list[Scan]) -> list[Scan]:
    """Put together what has one name and lies in several folders, such as one of images and one of segmentations."""
    whole: list[Scan] = []
    for scan in sorted(scans, key=lambda scan: (-len(scan.files), scan.folder)):
        place = next((i for i, other in enumerate(whole) if other.name == scan.name and not set(other.files) & set(scan.files)), None)
        if place is None:
            whole.append(scan)
        else:
            whole[place] = replace(whole[place], files={**whole[place].files, **scan.files}, newer=whole[place].newer or scan.newer)
    return whole


def _corrected(scan: Scan, skips: Skips, root: Path) -> Scan:
    """An automatic segmentation stands in only where there is no corrected one."""
    if "automatic" not in scan.files:
        return scan
    files = {role: found for role, found in scan.files.items() if role != "automatic"}
    if "seg" in files:
        for file in scan.files["automatic"]:
            skips.add(UNUSED, file.relative_to(root).as_posix())
        return replace(scan, files=files)
    return replace(scan, files={**files, "seg": scan.files["automatic"]})


def _described(files: Sequence[Path], order: Sequence[str]) -> tuple[list[Scan], list[Path]]:
    """Scans in nnU-Net's and the Decathlon's layout, or named by channel numbers, and the files that are none of them."""
    folders = {file.parent for file in files if re.fullmatch(r"images?t[rs]", file.parent.name, re.IGNORECASE)}
    numbered = {file.parent for file in files if ENDING.sub("", file.name).endswith("_0000")}
    scans: list[Scan] = []
    used: set[Path] = set()
    for folder in sorted(folders | numbered):
        roles, convention = _description(folder.parent, order)
        if not roles:
            continue
        for name, found in _by_case([file for file in files if file.parent == folder], roles).items():
            masks = [file for file in files if file.parent.name.lower() == folder.name.lower().replace("image", "label")
                     and file.parent.parent == folder.parent and ENDING.sub("", file.name) == name]  # fmt: skip
            whole = any(ENDING.sub("", file.name) == name for file in found.values())
            lanes = {role: place for place, role in enumerate(roles)} if whole else {}
            mapped = {role: (file,) for role, file in found.items() if role}
            scans.append(Scan(name, folder, {**mapped, **({"seg": tuple(masks)} if masks else {})}, lanes, False, convention))
            used.update((*found.values(), *masks))
    return scans, [file for file in files if file not in used]


def _by_case(files: list[Path], roles: list[str]) -> dict[str, dict[str, Path]]:
    cases: dict[str, dict[str, Path]] = {}
    first = _first_channels(files)
    for file in files:
        stem = ENDING.sub("", file.name)
        match = _NUMBERED.search(stem)
        match = match if match and stem[: match.start()] in first else None
        if match and int(match[1]) < len(roles):
            cases.setdefault(stem[: match.start()], {})[roles[int(match[1])]] = file
        elif not match and not role_of(stem)[1]:
            cases[stem] = dict.fromkeys(roles, file)
    return cases


def _first_channels(files: Sequence[Path]) -> set[str]:
    """Prefix before ``_0000``: if it exists, four final digits are a channel, otherwise the number of a case."""
    return {stem[:-5] for file in files if (stem := ENDING.sub("", file.name)).endswith("_0000")}


def numbered_without_names(files: Sequence[Path], order: Sequence[str]) -> Path | None:
    """A file that holds one or all of several channels without any information on their order."""
    first = _first_channels(files)
    for file in files:
        stem = ENDING.sub("", file.name)
        several = (_NUMBERED.search(stem) and stem[:-5] in first) or re.fullmatch(r"images?t[rs]", file.parent.name, re.IGNORECASE)
        if several and not role_of(stem)[1] and not _description(file.parent.parent, order)[0]:
            return file
    return None


def _description(folder: Path, order: Sequence[str]) -> tuple[list[str], Convention | None]:
    """Modalities in their order, and the meaning of labels, as ``dataset.json`` has them."""
    file = folder / "dataset.json"
    if not file.is_file():
        return list(order), None
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        names = found.get("channel_names") or found.get("modality") or {}
        roles = [role_of(str(names[key]).strip())[1] for key in sorted(names, key=int)]
        return list(order) or roles, _convention(found.get("labels") or {})
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{file}: cannot be understood ({error}); replace it by the original") from None


_PARTS = {
    "cavity": r"cavity|\brc\b",
    "enhancing": r"(?<!non-)(?<!non )(?<!non_)(?<!non)enhanc|\bet\b",
    "necrosis": r"necro|\bncr|net\b|netc|non.?enhanc|\bcore\b|\btc\b",
    "oedema": r"o?edema|\bed\b|snfh|\bwhole\b|\bwt\b",
}


def _convention(labels: dict[str, Any]) -> Convention | None:
    """The meaning of labels from their names, ``{"1": "edema"}`` or ``{"edema": 1}``, regions as nnU-Net writes them included."""
    numbers: dict[str, set[int]] = {}
    for key, value in labels.items():
        name, found = (value, [int(key)]) if isinstance(value, str) else (key, value if isinstance(value, list) else [value])
        part = next((part for part, words in _PARTS.items() if re.search(words, name, re.IGNORECASE)), None)
        if part is not None:
            numbers.setdefault(part, set()).update(map(int, found))
    enhancing, cavity = numbers.get("enhancing", set()), numbers.get("cavity", set())
    necrosis = numbers.get("necrosis", set()) - enhancing - cavity
    oedema = numbers.get("oedema", set()) - necrosis - enhancing - cavity
    if not (enhancing or necrosis or oedema):
        return None
    convention = Convention("dataset.json", tuple(sorted(necrosis)), tuple(sorted(oedema)), tuple(sorted(enhancing)), tuple(sorted(cavity)))
    return next((known for known in CONVENTIONS.values() if replace(convention, name=known.name) == known), convention)
