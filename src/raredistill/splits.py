"""Patients to train, validation and test parts. A split that shares a patient between two sides cannot be constructed or loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedKFold, train_test_split

from raredistill.cohort.store import Cohort
from raredistill.errors import SplitError
from raredistill.files import fingerprint, read_json, write_json
from raredistill.limits import LARGEST_SEED, MOST_REPEATS

SIDES = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """One division of a cohort.

    Attributes:
        repeat: number of the repetition of the cross-validation.
        fold: number of the fold in it.
        train: rows of ``cohort.samples``, int64; so are ``validation`` (may be empty) and ``test``.
        patients: side -> its patients, sorted.
        hash: hash of the patients and rows of each side.

    Raises:
        SplitError: on construction, when a patient is on two sides.
    """

    repeat: int
    fold: int
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    patients: Mapping[str, tuple[str, ...]]
    hash: str = ""

    def __post_init__(self) -> None:
        for one, other in combinations(SIDES, 2):
            if shared := sorted(set(self.patients[one]) & set(self.patients[other])):
                raise SplitError(
                    f"fold {self.fold}: patient {shared[0]} is in both the {one} and the {other} part ({len(shared)} shared in all)"
                )
        rows = {side: getattr(self, side).tolist() for side in SIDES}
        content = {"patients": {side: list(self.patients[side]) for side in SIDES}, "rows": rows}
        object.__setattr__(self, "hash", fingerprint(content))


def make_splits(
    cohort: Cohort,
    *,
    protocol: str = "outer",
    folds: int = 5,
    repeats: int = 1,
    validation_share: float = 0.2,
    test_share: float = 0.3,
    seed: int = 0,
    rarefy: Mapping[str, float] | None = None,
    truncate_validation: bool = False,
) -> list[Split]:
    """Divide a cohort by patient.

    Args:
        cohort: cohort to divide.
        protocol: ``outer`` (each patient is tested once per repeat; validation is cut from the training side), ``holdout`` (one fixed test
            set and ``folds`` divisions of the rest; the thesis' protocol) or ``given`` (the column ``split`` of the samples).
        folds: number of folds.
        repeats: repetitions of ``outer`` with different shuffles.
        validation_share: share of the training side's patients used for validation, ``outer`` only.
        test_share: share of the rarest patient class in the test set of ``holdout``; every other class contributes as many patients.
        seed: of the shuffles.
        rarefy: class -> share of its patients kept in training and validation; test parts keep every patient.
        truncate_validation: reduce the validation part to the same number of samples of each class, as the thesis did.

    Raises:
        SplitError: a part would lack a class, or the protocol does not fit the cohort.
    """
    if not (0 <= seed <= LARGEST_SEED and 1 <= repeats <= MOST_REPEATS):
        raise SplitError(f"seed {seed} and repeats {repeats}: seeds go from 0 to {LARGEST_SEED}, repeats from 1 to {MOST_REPEATS}")
    people = Patients(cohort)
    _check_rarefy(rarefy or {}, people)
    if protocol == "given":
        parts = [_given(cohort)]
    else:
        people.check(folds)
        parts = (
            _holdout(people, folds, test_share, seed) if protocol == "holdout" else _outer(people, folds, repeats, validation_share, seed)
        )
    made = [
        _make(people, part, rarefy or {}, seed=seed, truncate=truncate_validation, needs_validation=protocol != "given") for part in parts
    ]
    return made


@dataclass(frozen=True)
class _Part:
    repeat: int
    fold: int
    sides: dict[str, np.ndarray]  # patient names


class Patients:
    """Patients of a cohort, each stratified by its own label, or by the rarest class among its samples."""

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort
        samples = cohort.samples.iloc[cohort.labelled]
        order = samples["label"].value_counts().sort_values(kind="stable").index
        rank = samples["label"].map({name: position for position, name in enumerate(order)})
        rarest = rank.groupby(samples["patient"], sort=True).min()
        own = samples.groupby("patient", sort=True)["patient_label"].first()
        stratum = [label or order[position] for label, position in zip(own, rarest, strict=True)]
        self.stratum = pd.Series(stratum, index=rarest.index, dtype=object)
        self.names = self.stratum.index.to_numpy(dtype=object)
        self.strata = self.stratum.to_numpy(dtype=object)

    def of(self, stratum: str) -> np.ndarray:
        """Names of the patients of one class."""
        return np.asarray(self.names[self.strata == stratum])

    def check(self, folds: int) -> None:
        """Refuse folds that would leave a class without a test patient, or with fewer than two to train and validate on."""
        for stratum, number in self.stratum.value_counts().items():
            if number < folds or number - -(-number // folds) < 2:
                raise SplitError(
                    f"class {stratum} has {number} patients: too few for {folds} folds with a validation part; "
                    "use fewer folds or gather more patients"
                )

    def rows(self, names: Sequence[str] | np.ndarray) -> np.ndarray:
        """Rows of the labelled samples of some patients, in the cohort's order."""
        return self.cohort.labelled[self.cohort.samples["patient"].iloc[self.cohort.labelled].isin(list(names)).to_numpy()]


def _outer(people: Patients, folds: int, repeats: int, validation_share: float, seed: int) -> list[_Part]:
    parts = []
    for repeat in range(repeats):
        cut = StratifiedKFold(folds, shuffle=True, random_state=seed + repeat)
        for fold, (rest, test) in enumerate(cut.split(people.names, people.strata)):
            train, validation = _cut(people, rest, validation_share, seed + repeat)
            parts.append(_Part(repeat, fold, {"train": train, "validation": validation, "test": people.names[test]}))
    return parts


def _cut(people: Patients, rest: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    # At least one patient of each class must be in validation, even where a plain share would leave the class out.
    counts = pd.Series(people.strata[rest]).value_counts()
    number = max(round(share * len(rest)), len(counts))
    train, validation = train_test_split(rest, test_size=number, stratify=people.strata[rest], random_state=seed)
    train, validation = list(train), list(validation)
    for stratum in counts.index:
        if stratum not in people.strata[validation]:
            moved = next(index for index in train if people.strata[index] == stratum)
            train.remove(moved)
            validation.append(moved)
    return people.names[train], people.names[validation]


def _holdout(people: Patients, folds: int, test_share: float, seed: int) -> list[_Part]:
    number = max(1, round(test_share * people.stratum.value_counts().min()))
    generator = np.random.default_rng(seed)
    test = np.concatenate([generator.permutation(people.of(stratum))[:number] for stratum in sorted(set(people.strata))])
    rest = np.flatnonzero(~np.isin(people.names, test))
    smallest = pd.Series(people.strata[rest]).value_counts().min()
    if smallest < folds:
        raise SplitError(
            f"after the test set a class has {smallest} patients: too few for {folds} folds; use fewer folds or a smaller test_share"
        )
    cut = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return [
        _Part(0, fold, {"train": people.names[rest[train]], "validation": people.names[rest[validation]], "test": test})
        for fold, (train, validation) in enumerate(cut.split(rest, people.strata[rest]))
    ]


def _given(cohort: Cohort) -> _Part:
    labelled = cohort.samples.iloc[cohort.labelled]
    split = labelled["split"]
    if not {"train", "test"} <= set(split):
        raise SplitError(
            f"protocol given: {cohort.root} has no split column with train and test parts; use protocol outer or name the column"
        )
    patients = labelled["patient"]
    return _Part(0, 0, {side: patients[split == side].unique() for side in SIDES})


def _check_rarefy(rarefy: Mapping[str, float], people: Patients) -> None:
    for name in rarefy:
        if name not in set(people.strata):
            raise SplitError(f"rarefy: no patient carries the class {name}; patients carry {', '.join(sorted(set(people.strata)))}")


def _make(people: Patients, part: _Part, rarefy: Mapping[str, float], *, seed: int, truncate: bool, needs_validation: bool) -> Split:
    sides = {side: _rarefied(people, names, rarefy, seed) if side != "test" else names for side, names in part.sides.items()}
    rows = {side: people.rows(names) for side, names in sides.items()}
    if truncate and len(rows["validation"]):
        rows["validation"] = _equal_classes(people.cohort, rows["validation"], seed)
    patients = {side: tuple(sorted(map(str, names))) for side, names in sides.items()}
    split = Split(part.repeat, part.fold, rows["train"], rows["validation"], rows["test"], patients)
    _check_classes(people.cohort, split, needs_validation=needs_validation)
    return split


def _rarefied(people: Patients, names: np.ndarray, rarefy: Mapping[str, float], seed: int) -> np.ndarray:
    kept = list(names)
    stratum = people.stratum
    for label, share in sorted(rarefy.items()):
        members = sorted(name for name in names if stratum[name] == label)
        number = max(1, round(share * len(members)))
        chosen = set(np.random.default_rng(seed).permutation(np.array(members, dtype=object))[:number])
        kept = [name for name in kept if stratum[name] != label or name in chosen]
    return np.array(kept, dtype=object)


def _equal_classes(cohort: Cohort, rows: np.ndarray, seed: int) -> np.ndarray:
    labels = cohort.labels[rows]
    number = np.bincount(labels, minlength=len(cohort.classes)).min()
    generator = np.random.default_rng(seed)
    chosen = [generator.permutation(rows[labels == label])[:number] for label in range(len(cohort.classes))]
    return np.sort(np.concatenate(chosen))


def _check_classes(cohort: Cohort, split: Split, *, needs_validation: bool) -> None:
    labels = cohort.labels
    for side in SIDES:
        rows = getattr(split, side)
        if side == "validation" and not len(rows) and not needs_validation:
            continue
        _refuse_unlabelled(labels[rows], f"fold {split.fold}: the {side} part")
        counts = np.bincount(labels[rows], minlength=len(cohort.classes))
        if absent := [name for name, count in zip(cohort.classes, counts, strict=True) if not count]:
            raise SplitError(
                f"fold {split.fold}: the {side} part has no sample of class {absent[0]}; use fewer folds, another seed or more patients"
            )


def _refuse_unlabelled(labels: np.ndarray, where: str) -> None:
    if (labels < 0).any():
        raise SplitError(f"{where} holds {int((labels < 0).sum())} samples without a label; make the splits again")


def cross_fit(cohort: Cohort, split: Split, folds: int) -> list[Split]:
    """Divide a split's training part by patient, so that each training patient is left out of one of ``folds`` smaller training parts.

    Validation stays unchanged; the left-out patients are the ``test`` side of each part, and the outer test patients are on no side.

    Raises:
        SplitError: a training part would lack a class.
    """
    people = Patients(cohort)
    places = np.flatnonzero(np.isin(people.names, list(split.patients["train"])))
    fewest = int(pd.Series(people.strata[places]).value_counts().min())
    if fewest < folds:
        raise SplitError(f"cross_fit: a class has {fewest} training patients in fold {split.fold}: too few for {folds} parts; use fewer")
    cut = StratifiedKFold(folds, shuffle=True, random_state=split.fold)
    parts = []
    for kept, left in cut.split(places, people.strata[places]):
        names = {"train": people.names[places[kept]], "validation": np.array(split.patients["validation"], dtype=object)}
        names["test"] = people.names[places[left]]
        # Rows come from the split, which may hold only some of its patients' rows.
        rows = {side: np.intersect1d(people.rows(names[side]), split.train) for side in ("train", "test")}
        patients = {side: tuple(sorted(map(str, who))) for side, who in names.items()}
        part = Split(split.repeat, split.fold, rows["train"], split.validation, rows["test"], patients)
        _check_classes(cohort, part, needs_validation=False)
        parts.append(part)
    return parts


def split_table(cohort: Cohort, splits: Sequence[Split]) -> pd.DataFrame:
    """Counts to check before training: columns ``repeat, fold, side, class, slices, patients``."""
    records = []
    for split in splits:
        for side in SIDES:
            samples = cohort.samples.iloc[getattr(split, side)]
            for name in cohort.classes:
                chosen = samples[samples["label"] == name]
                where = {"repeat": split.repeat, "fold": split.fold, "side": side, "class": name}
                records.append({**where, "slices": len(chosen), "patients": int(chosen["patient"].nunique())})
    return pd.DataFrame(records)


def save_split(path: Path, split: Split, cohort: Cohort) -> None:
    """Write a split as JSON, with the hash of its cohort."""
    rows = {side: getattr(split, side).tolist() for side in SIDES}
    patients = {side: list(split.patients[side]) for side in SIDES}
    write_json(
        path, {"cohort": cohort.hash, "repeat": split.repeat, "fold": split.fold, "hash": split.hash, "patients": patients, "rows": rows}
    )


def load_split(path: Path, cohort: Cohort) -> Split:
    """Read a split and check it against its cohort and its own hash.

    Raises:
        SplitError: it belongs to another cohort, lacks its patients, was changed, or shares a patient.
    """
    raw: Any = read_json(path)
    known = set(raw) if isinstance(raw, dict) else set()
    if missing := {"cohort", "repeat", "fold", "hash", "patients", "rows"} - known:
        raise SplitError(f"{path}: not a split: {', '.join(sorted(missing))} missing")
    if raw["cohort"] != cohort.hash:
        raise SplitError(f"{path}: made for another cohort than {cohort.root}; make the splits again")
    try:
        rows = {side: np.array(raw["rows"][side], dtype=np.int64).reshape(-1) for side in SIDES}
        patients = {side: tuple(map(str, raw["patients"][side])) for side in SIDES}
        names = {side: set(cohort.samples["patient"].to_numpy()[rows[side]]) for side in SIDES}
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        raise SplitError(f"{path}: a side lacks its patients or its rows, or holds something else; make the splits again") from None
    if not all(type(raw[key]) is int for key in ("repeat", "fold")):
        raise SplitError(f"{path}: its repeat and fold are not whole numbers; make the splits again")
    split = Split(raw["repeat"], raw["fold"], rows["train"], rows["validation"], rows["test"], patients)
    for side in SIDES:
        _refuse_unlabelled(cohort.labels[rows[side]], f"{path}: the {side} part")
        if not names[side] <= set(patients[side]):
            raise SplitError(f"{path}: the {side} rows hold patients that its list does not name; make the splits again")
    if split.hash != raw["hash"]:
        raise SplitError(f"{path}: its content does not match its hash; make the splits again")
    return split
