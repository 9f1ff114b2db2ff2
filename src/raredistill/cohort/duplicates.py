"""Images that occur more than once: equal pixels, near-copies, and patient names that the images contradict."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from raredistill.cohort.sources import Problem, Slices

Treatment = Literal["refuse", "join", "drop", "near"]
"""Treatment of equal images: an error; join their patients; keep one of them; join, for near-copies too."""

SIDE = 32
"""Side in pixels of the small grey image used to compare samples."""
STRICTEST, SHARE = 0.985, 0.05
"""Two looks are near-copies when their correlation is a twentieth as far from 1 as that of usual nearest neighbours.

On real sets (brain MRI 128 x 128, chest X-rays 64 x 64) copies that were resized, or saved as JPEG of quality 20 to 90, have 0.994
and more, and the most alike pictures of different patients 0.977; where pictures differ more, the bound is lower."""
NEIGHBOURS = 8
_FREQUENCIES, _DIMENSIONS = 6, 24
_SAMPLED, _BLOCK = 200, 2048
_CHANCE_PAIRS = 4_000
_FEWEST_PAIRS, _SUSPICIOUS = 20, 0.25
_LISTED = 3
_HELD_OUT = {"test": 0, "validation": 1, "train": 2}


@dataclass(frozen=True)
class Prints:
    """Data for comparing samples: a digest of each sample's decoded pixels, and a small version of it (its look).

    Attributes:
        digests: one per sample.
        looks: ``(n, SIDE, SIDE)`` uint8 grey.
    """

    digests: tuple[str, ...]
    looks: np.ndarray

    def record(self) -> dict[str, Any]:
        """JSON-like."""
        return {"digests": list(self.digests), "looks": base64.b85encode(self.looks.tobytes()).decode()}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Prints:
        """The prints of :meth:`record`."""
        looks = np.frombuffer(base64.b85decode(record["looks"]), np.uint8).reshape(-1, SIDE, SIDE)
        return cls(tuple(record["digests"]), looks)


def prints_of(slices: Slices) -> Prints:
    """The prints of a source's samples; if the source gives no digests, those of the resized pixels."""
    planes = list(slices.pixels.values())
    digests = slices.digests or tuple(digest_of(*(plane[row] for plane in planes)) for row in range(len(slices.rows)))
    looks = np.zeros((len(slices.rows), SIDE, SIDE), np.uint8)
    for row in range(len(looks)):
        looks[row] = np.mean([_look(plane[row]) for plane in planes[:3]], axis=0)
    return Prints(digests, looks)


def digest_of(*planes: np.ndarray) -> str:
    """A digest of pixels with their shape and type: equal for equal pictures only."""
    digest = hashlib.blake2b(digest_size=16)
    for plane in planes:
        digest.update(f"{plane.shape}{plane.dtype.str}".encode())
        digest.update(np.ascontiguousarray(plane).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _look(plane: np.ndarray) -> np.ndarray:
    if plane.shape == (SIDE, SIDE):
        return plane
    return np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


@dataclass(frozen=True)
class Copies:
    """The result of a search for copies.

    Attributes:
        samples: the compared rows: ``sample, patient, patient_label, label, split``.
        equal: groups of rows with equal pixels, in the order of their first rows.
        near: columns ``first, second`` (rows of different patients) and ``similarity`` (correlation), the closest first.
        flat: rows of constant images, which are not compared.
    """

    samples: pd.DataFrame
    equal: tuple[np.ndarray, ...]
    near: pd.DataFrame
    flat: np.ndarray


def find_copies(samples: pd.DataFrame, prints: Prints) -> Copies:
    """Search samples for equal pixels and near-copies (re-saved, resized, turned or flipped), in near-linear time.

    Args:
        samples: N rows with ``sample, patient, patient_label, label, split``.
        prints: theirs, in the same order.
    """
    samples = samples.reset_index(drop=True)
    flat = np.flatnonzero(np.ptp(prints.looks.reshape(len(samples), -1), axis=1) == 0) if len(samples) else np.zeros(0, np.int64)
    codes = pd.factorize(np.array(prints.digests, dtype=object))[0]
    varied = np.setdiff1d(np.arange(len(samples)), flat)
    equal = _groups(codes, varied)
    # One of each group of equal images is enough: all have the same near-copies.
    single = varied[~pd.Series(codes[varied]).duplicated().to_numpy()]
    return Copies(samples, equal, _near(samples, prints.looks, single), flat)


def _groups(codes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    order = rows[np.argsort(codes[rows], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1) if len(order) else []
    return tuple(sorted((group for group in groups if len(group) > 1), key=lambda group: int(group[0])))


def _near(samples: pd.DataFrame, looks: np.ndarray, rows: np.ndarray) -> pd.DataFrame:
    patients = pd.factorize(samples["patient"])[0]
    if len(np.unique(patients[rows])) < 2:
        return pd.DataFrame({"first": [], "second": [], "similarity": []})
    bound = _bound(looks, rows, patients)
    first, second = _candidates(looks, rows, bound)
    first, second = _apart(first, second, patients)  # neighbouring slices of one patient are alike, and harmless
    similarity = _similarities(looks, first, second)
    found = pd.DataFrame({"first": first, "second": second, "similarity": similarity})[similarity >= bound]
    return found.sort_values(["similarity", "first", "second"], ascending=[False, True, True], ignore_index=True)


def _bound(looks: np.ndarray, rows: np.ndarray, patients: np.ndarray) -> float:
    """The correlation above which two looks are near-copies, from the usual similarity of nearest images of different patients."""
    chosen = np.random.default_rng(0).permutation(rows)[:_SAMPLED]
    nearest = np.zeros(len(chosen), np.float32)
    sample = _unit(looks[chosen]).reshape(len(chosen), -1)
    for block in _blocks(rows):
        alike = sample @ _unit(looks[block]).reshape(len(block), -1).T
        alike[patients[chosen][:, None] == patients[block][None]] = 0
        nearest = np.maximum(nearest, alike.max(axis=1, initial=0))
    usual = float(np.median(nearest)) if len(nearest) else 0.0
    return min(1 - SHARE * (1 - usual), STRICTEST)


def _candidates(looks: np.ndarray, rows: np.ndarray, bound: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows with similar lowest frequencies: a few nearest neighbours of each row, so that time and memory stay near-linear."""
    if len(rows) < 2:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    keys = np.concatenate([_keys(_unit(looks[block])) for block in _blocks(rows)])
    keys = np.ascontiguousarray(keys[:, np.argsort(-keys.var(axis=0), kind="stable")[:_DIMENSIONS]])
    reach = float(np.sqrt(2 * (1 - bound))) + 1e-3
    _, near = KDTree(keys).query(keys, k=min(NEIGHBOURS + 1, len(rows)), distance_upper_bound=reach, workers=-1)
    first = np.repeat(np.arange(len(rows)), near.shape[1])
    second = near.reshape(-1)
    kept = (second < len(rows)) & (second != first)
    pairs = np.unique(np.sort(np.stack([first[kept], second[kept]]), axis=0), axis=1)
    return rows[pairs[0]], rows[pairs[1]]


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), _BLOCK):
        yield rows[start : start + _BLOCK]


def _unit(looks: np.ndarray) -> np.ndarray:
    """Looks ``(n, SIDE, SIDE)`` with mean 0 and norm 1: their products are correlations, whatever the brightness and contrast."""
    centred = looks - looks.mean(axis=(1, 2), keepdims=True, dtype=np.float32)
    norms = np.linalg.norm(centred.reshape(len(looks), SIDE * SIDE), axis=1)
    return np.asarray(centred / np.maximum(norms, 1e-6)[:, None, None], dtype=np.float32)


def _keys(units: np.ndarray) -> np.ndarray:
    """Low-frequency components of normalised thumbnails, invariant to flips and quarter turns; they never increase a distance.

    A flip changes signs of the coefficients of the cosine transform, a transposition exchanges two of them: sizes, and the sum and the
    size of the difference of two that are exchanged, stay.
    """
    basis = _cosines()
    sizes = np.abs(basis @ units @ basis.T)
    upper, right = np.triu_indices(_FREQUENCIES, 1)
    one, other = sizes[:, upper, right], sizes[:, right, upper]
    diagonal = np.diagonal(sizes, axis1=1, axis2=2)[:, 1:]
    return np.concatenate([diagonal, (one + other) / np.sqrt(2), np.abs(one - other) / np.sqrt(2)], axis=1)


def _cosines() -> np.ndarray:
    """The first rows ``(_FREQUENCIES, SIDE)`` of the orthonormal discrete cosine transform (type II)."""
    places = (np.arange(SIDE) + 0.5) * np.pi / SIDE
    basis = np.cos(np.arange(_FREQUENCIES)[:, None] * places) * np.sqrt(2 / SIDE)
    basis[0] /= np.sqrt(2)
    return np.asarray(basis, dtype=np.float32)


def _similarities(looks: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The correlation of each pair of looks in the best of the eight flips and quarter turns."""
    found = [_best_turn(_unit(looks[first[block]]), _unit(looks[second[block]])) for block in _blocks(np.arange(len(first)))]
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def _best_turn(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    turns = [np.rot90(side, quarter, axes=(1, 2)) for side in (theirs, theirs.transpose(0, 2, 1)) for quarter in range(4)]
    return np.asarray(np.max([np.einsum("nij,nij->n", ours, turn) for turn in turns], axis=0))


def joined(copies: Copies, *, near: bool) -> dict[str, str]:
    """Patients that share equal images (or near-copies), each with its new name: the first of their names.

    Returns:
        Only patients whose names change.
    """
    patients, names = pd.factorize(copies.samples["patient"], sort=True)
    edges = [(group[0], other) for group in copies.equal for other in group[1:]]
    edges += list(copies.near[["first", "second"]].itertuples(index=False, name=None)) if near else []
    ends = patients[np.array(edges, dtype=np.int64).reshape(-1, 2)]
    graph = coo_array((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(len(names), len(names)))
    component = connected_components(graph, directed=False)[1]
    leaders = pd.Series(names).groupby(component).transform("first")
    return {str(name): str(leader) for name, leader in zip(names, leaders, strict=True) if name != leader}


def dropped(copies: Copies) -> np.ndarray:
    """Rows to drop so that one of each group of equal images remains: a held-out one if possible, else the first."""
    rank = copies.samples["split"].map(_HELD_OUT).fillna(len(_HELD_OUT)).to_numpy()
    kept = [min(group, key=lambda row: (rank[row], row)) for group in copies.equal]
    return np.setdiff1d(np.concatenate([*copies.equal, np.zeros(0, np.int64)]).astype(np.int64), np.array(kept, dtype=np.int64))


def problems_of(copies: Copies, treatment: Treatment = "refuse") -> list[Problem]:
    """Problems with copies: contradictions and leaks are errors, copies that are already treated are notes."""
    found = [_equal_problem(copies, groups, treatment) for groups in _by_patients(copies).values()]
    if len(copies.near):
        found.append(_near_problem(copies, treatment))
    if len(copies.flat):
        what = f"{len(copies.flat)} samples are of one value all over, such as {copies.samples['sample'][copies.flat[0]]}"
        found.append(Problem("warning", "", "", what, "look at them; leave them out with exclude= if they are empty"))
    return found


def _by_patients(copies: Copies) -> dict[tuple[Any, ...], list[np.ndarray]]:
    """Groups of equal images by their patients: a patient copied under another name is one problem, not one per slice."""
    found: dict[tuple[Any, ...], list[np.ndarray]] = {}
    for group in copies.equal:
        rows = copies.samples.iloc[group]
        found.setdefault((*sorted(set(rows["patient"])), _contradicts(rows)), []).append(group)
    return found


def _contradicts(rows: pd.DataFrame) -> bool:
    return any(len(set(rows[column]) - {""}) > 1 for column in ("label", "patient_label"))


def _equal_problem(copies: Copies, groups: list[np.ndarray], treatment: Treatment) -> Problem:
    rows = copies.samples.iloc[groups[0]]
    who = sorted(set(rows["patient"]))
    what = f"{_named(rows)} {'are equal' if len(rows) > 1 else ''} pixel for pixel"
    what += f", and {len(groups) - 1} more pictures of the same patients" if len(groups) > 1 else ""
    if any(_contradicts(copies.samples.iloc[group]) for group in groups):
        cure = "only one label can be right: correct it, or leave the pictures out with exclude="
        return Problem("error", "", str(rows["sample"].iloc[0]), f"{what}, but labelled differently", cure)
    if treatment == "drop":
        return Problem("note", who[0], "", what, "one of them is kept (duplicates=drop)")
    if len(who) == 1:
        return Problem("note", who[0], "", what, "duplicates=drop keeps one of them")
    if treatment != "refuse":
        return Problem("note", who[0], "", what, f"their patients are one unit (duplicates={treatment})")
    cure = "duplicates=join makes their patients one unit, duplicates=drop keeps one of the pictures"
    return Problem("error", "", str(rows["sample"].iloc[0]), f"{what}, so a split could leak", cure)


def _named(rows: pd.DataFrame) -> str:
    shown = [_one(row) for row in rows.head(_LISTED).to_dict("records")]
    more = [f"{len(rows) - _LISTED} more"] if len(rows) > _LISTED else []
    *most, last = [*shown, *more]
    return f"{', '.join(most)} and {last}" if most else last


def _one(row: Mapping[Any, Any]) -> str:
    facts = [f"patient {row['patient']}"] if row["patient"] != row["sample"] else []
    facts += [row["label"] or "no label", *filter(None, [row["split"]])]
    return f"{row['sample']} ({', '.join(facts)})"


def _near_problem(copies: Copies, treatment: Treatment) -> Problem:
    closest = copies.samples.iloc[copies.near.iloc[0][["first", "second"]].astype(int)]
    what = f"{len(copies.near)} pairs of pictures of different patients are near-copies (re-saved, resized, flipped, turned)"
    what += f", such as {_named(closest)}"
    if treatment == "near":
        return Problem("note", "", "", what, "their patients are one unit (duplicates=near)")
    return Problem("warning", "", "", what, "look at the sheet of the pairs; duplicates=near makes their patients one unit")


def implausible_patients(samples: pd.DataFrame, looks: np.ndarray) -> list[Problem]:
    """Classes in which consecutive images (by name) of different patients are far more alike than by chance.

    In each class, the correlation of neighbours by name that belong to different patients is compared with that of random pairs of
    different patients. One in a hundred neighbours should exceed the 99 % quantile; a quarter of them doing so means that the names of
    the patients (or the lack of any) separate pictures of one person. Measured on 3,064 slices of 209 real patients: 0.5 to 2.6 % with
    the real patients, 66 to 91 % with blocks of 5 to 20 consecutive slices called patients.

    Args:
        samples: rows with ``sample, patient, label``.
        looks: ``(N, SIDE, SIDE)`` uint8, in the same order.
    """
    patients, order = pd.factorize(samples["patient"])[0], _natural_order(samples["sample"])
    labels = samples["label"].to_numpy()
    found = []
    for name in sorted(set(labels) - {""}):
        own = order[labels[order] == name]
        pairs, share = _alike_neighbours(looks, own, patients)
        if pairs >= _FEWEST_PAIRS and share >= _SUSPICIOUS:
            what = (
                f"{name}: {share:.0%} of {pairs} pictures are as like the next one by name, of another patient, as 1 % of random pairs are"
            )
            cure = "patients may be cut into pieces: neighbours often show one person; take the patients from where the pictures come from"
            found.append(Problem("warning", "", "", what, cure))
    return found


def _alike_neighbours(looks: np.ndarray, rows: np.ndarray, patients: np.ndarray) -> tuple[int, float]:
    """Number of rows followed by a row of another patient, and the share of these that would be 1 % by chance."""
    first, second = _apart(rows[:-1], rows[1:], patients)
    rng = np.random.default_rng(0)
    if len(first) < _FEWEST_PAIRS:
        return len(first), 0.0
    chance = _apart(rng.choice(rows, _CHANCE_PAIRS), rng.choice(rows, _CHANCE_PAIRS), patients)
    bound = np.quantile(_correlations(looks, *chance), 0.99)
    return len(first), float(np.mean(_correlations(looks, first, second) > bound))


def _apart(first: np.ndarray, second: np.ndarray, patients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept = patients[first] != patients[second]
    return first[kept], second[kept]


def _correlations(looks: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    blocks = _blocks(np.arange(len(first)))
    return np.concatenate([np.einsum("nij,nij->n", _unit(looks[first[block]]), _unit(looks[second[block]])) for block in blocks])


def _natural_order(names: Sequence[str] | pd.Series[str]) -> np.ndarray:
    """Positions of names in natural order: 9 before 10."""
    keys = [[(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)] for name in names]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
