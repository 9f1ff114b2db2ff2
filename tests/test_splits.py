"""Patients to parts: never on two sides, each tested once, every part with every class."""

import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import tiny_pixels, tiny_rows, write_tiny
from raredistill.cohort.store import save
from raredistill.errors import SplitError
from raredistill.splits import Split, cross_fit, load_split, make_splits, save_split, split_table


def patients_of(cohort, rows):
    return set(cohort.samples["patient"].to_numpy()[rows])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), folds=st.integers(2, 4), repeats=st.integers(1, 2), share=st.floats(0.1, 0.4))
def test_outer_tests_each_patient_once_a_repeat_and_shares_none(tiny_cohort, seed, folds, repeats, share):
    splits = make_splits(tiny_cohort, folds=folds, repeats=repeats, validation_share=share, seed=seed)
    tested = Counter((split.repeat, patient) for split in splits for patient in patients_of(tiny_cohort, split.test))
    assert set(tested.values()) == {1}
    assert len(tested) == repeats * tiny_cohort.samples["patient"].nunique()
    for split in splits:
        sides = [patients_of(tiny_cohort, rows) for rows in (split.train, split.validation, split.test)]
        assert sum(map(len, sides)) == len(set.union(*sides)) == 18
        assert all(set(tiny_cohort.labels[rows]) == {0, 1, 2} for rows in (split.train, split.validation, split.test))


def test_a_shared_patient_cannot_be_constructed():
    rows = np.array([0])
    with pytest.raises(SplitError, match="patient p is in both the train and the test part"):
        Split(0, 0, rows, rows, rows, {"train": ("p",), "validation": (), "test": ("p",)})


def test_the_same_seed_gives_the_same_hash_and_another_seed_another(tiny_cohort):
    hashes = [[split.hash for split in make_splits(tiny_cohort, folds=3, seed=seed)] for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1]
    assert not set(hashes[0]) & set(hashes[2])


def test_holdout_is_the_thesis_variant(tmp_path):
    cohort = write_tiny(tmp_path / "c", patients={"HGG": 30, "LGG": 10})
    splits = make_splits(cohort, protocol="holdout", folds=3, test_share=0.3, truncate_validation=True)
    tests = {tuple(split.test) for split in splits}
    assert len(tests) == 1
    tested = cohort.samples.iloc[splits[0].test].groupby("patient_label")["patient"].nunique()
    assert tested.to_dict() == {"HGG": 3, "LGG": 3}
    for split in splits:
        assert len(set(np.bincount(cohort.labels[split.validation]))) == 1
    validated = [patient for split in splits for patient in patients_of(cohort, split.validation)]
    assert len(validated) == len(set(validated))


def test_rarefying_thins_training_and_validation_but_never_test(tmp_path):
    cohort = write_tiny(tmp_path / "c", patients={"HGG": 20, "LGG": 20})
    plain, rare = (make_splits(cohort, folds=2, rarefy=rarefy) for rarefy in ({}, {"LGG": 0.25}))
    for before, after in zip(plain, rare, strict=True):
        assert before.patients["test"] == after.patients["test"]
        for side in ("train", "validation"):
            count = {name: sum(p.startswith(name) for p in after.patients[side]) for name in ("HGG", "LGG")}
            assert count["HGG"] == sum(p.startswith("HGG") for p in before.patients[side])
            assert count["LGG"] == max(1, round(0.25 * sum(p.startswith("LGG") for p in before.patients[side])))


def given_cohort(root, split):
    rows = tiny_rows({"HGG": 4, "LGG": 4}, 2).assign(split=lambda table: table["patient"].map(lambda name: split(int(name[-3:]))))
    return save(root, rows, {"flair": [tiny_pixels(rows, 8, 0)]}, classes=("healthy", "HGG", "LGG"), size=(8, 8))


def test_given_follows_the_column_and_may_lack_validation(tmp_path):
    (split,) = make_splits(given_cohort(tmp_path / "a", lambda n: "train" if n < 2 else "test"), protocol="given")
    assert len(split.validation) == 0
    assert {name[-1] for name in split.patients["train"]} == {"0", "1"}
    with pytest.raises(SplitError, match="train and test"):
        make_splits(given_cohort(tmp_path / "b", lambda n: "train"), protocol="given")


def test_given_refuses_a_column_that_leaks(tmp_path):
    rows = tiny_rows({"HGG": 2, "LGG": 2}, 2)
    rows["split"] = ["train" if n % 2 else "test" for n in range(len(rows))]
    cohort = save(tmp_path / "c", rows, {"flair": [tiny_pixels(rows, 8, 0)]}, classes=("healthy", "HGG", "LGG"), size=(8, 8))
    with pytest.raises(SplitError, match="both the train and the test"):
        make_splits(cohort, protocol="given")


@pytest.mark.parametrize("protocol", ["outer", "holdout"])
def test_too_few_patients_are_told_with_the_cure(tiny_cohort, protocol):
    with pytest.raises(SplitError, match="fewer folds"):
        make_splits(tiny_cohort, protocol=protocol, folds=8)


def test_an_unknown_class_to_rarefy_is_refused(tiny_cohort):
    with pytest.raises(SplitError, match="healthy"):
        make_splits(tiny_cohort, folds=2, rarefy={"healthy": 0.5})


def test_images_without_patients_are_their_own_units(tmp_path):
    rows = pd.DataFrame({"sample": [f"s{n}" for n in range(60)], "slice": -1, "source": "", "split": ""})
    rows["patient"] = rows["sample"]
    rows["label"] = ["a" if n % 3 else "b" for n in range(60)]
    rows["patient_label"] = rows["label"]
    cohort = save(tmp_path / "c", rows, {"grey": [np.zeros((60, 8, 8), np.uint8)]}, classes=("a", "b"), size=(8, 8))
    splits = make_splits(cohort, folds=3)
    assert sorted(np.concatenate([split.test for split in splits])) == list(range(60))


def test_the_table_counts_slices_and_patients(tiny_cohort):
    table = split_table(tiny_cohort, make_splits(tiny_cohort, folds=2))
    total = table[table["fold"] == 0].groupby("class")["slices"].sum()
    assert total.to_dict() == {"healthy": 54, "HGG": 36, "LGG": 18}


def test_a_saved_split_comes_back_and_a_changed_one_is_refused(tiny_cohort, tmp_path):
    split = make_splits(tiny_cohort, folds=2)[0]
    path = tmp_path / "split.json"
    save_split(path, split, tiny_cohort)
    assert load_split(path, tiny_cohort).hash == split.hash
    raw = json.loads(path.read_text())
    changed = {**raw, "rows": {**raw["rows"], "test": raw["rows"]["test"][1:]}}
    leaking = {**raw, "patients": {**raw["patients"], "test": [*raw["patients"]["test"], raw["patients"]["train"][0]]}}
    unlisted = {**raw, "patients": {**raw["patients"], "test": []}}
    for content, said in (
        (changed, "hash"),
        (leaking, "both"),
        (unlisted, "does not name"),
        ({**raw, "cohort": "x"}, "another cohort"),
        ({}, "missing"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(SplitError, match=said):
            load_split(path, tiny_cohort)


def test_cross_fitting_leaves_each_training_patient_out_once_and_the_test_patients_out_of_sight(tiny_cohort):
    for split in make_splits(tiny_cohort, folds=2, validation_share=0.34):
        parts = cross_fit(tiny_cohort, split, 2)
        left_out = np.concatenate([part.test for part in parts])
        assert sorted(left_out) == split.train.tolist()
        for part in parts:
            assert sorted([*part.train, *part.test]) == split.train.tolist()
            assert set(part.patients["train"]) | set(part.patients["test"]) == set(split.patients["train"])
            assert not {name for side in part.patients.values() for name in side} & set(split.patients["test"])
            assert part.validation.tolist() == split.validation.tolist()
    with pytest.raises(SplitError, match="cross_fit: a class has"):
        cross_fit(tiny_cohort, split, 10)
