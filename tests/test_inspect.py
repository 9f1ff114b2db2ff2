from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from raredistill.cohort import store
from raredistill.cohort.inspect import choose, contact_sheet, patient_table, rule_table, summary
from raredistill.errors import DataError

CLASSES = ("healthy", "HGG", "LGG")


def make_cohort(root, *, splits=False, channels=("flair",), provenance=None):
    """Nine patients of ten slices: six tumour, four healthy; every third patient is an LGG."""
    rows = []
    for patient in range(9):
        grade = "LGG" if patient % 3 == 2 else "HGG"
        for index in range(10):
            label = grade if index < 6 else "healthy"
            split = ("train", "validation", "test")[patient // 3] if splits else ""
            rows.append([f"p{patient}/{index}", f"p{patient}", grade, label, index, f"case{patient}", split])
    table = pd.DataFrame(rows, columns=list(store.COLUMNS))
    shades = np.repeat(np.arange(90, dtype=np.uint8), 64).reshape(90, 8, 8)
    pixels = {channel: [shades + 20 * number] for number, channel in enumerate(channels)}
    return store.save(root, table, pixels, classes=CLASSES, size=(8, 8), provenance=provenance)


def test_the_summary_counts_slices_patients_and_sources_by_class(tmp_path):
    table = summary(make_cohort(tmp_path / "c")).set_index("class")
    assert table["slices"].to_dict() == {"healthy": 36, "HGG": 36, "LGG": 18, "all": 90}
    assert table["patients"].to_dict() == {"healthy": 9, "HGG": 6, "LGG": 3, "all": 9}
    assert table["slices_per_patient"].to_dict() == {"healthy": 4, "HGG": 6, "LGG": 6, "all": 10}
    assert table["share"].to_dict() == {"healthy": 0.4, "HGG": 0.4, "LGG": 0.2, "all": 1.0}
    assert table.loc["all", "sources"] == 9


def test_a_given_split_is_summed_up_part_by_part(tmp_path):
    table = summary(make_cohort(tmp_path / "c", splits=True))
    assert set(table["split"]) == {"train", "validation", "test"}
    whole = table[table["class"] == "all"].set_index("split")
    assert whole["patients"].to_dict() == {"train": 3, "validation": 3, "test": 3}
    assert whole["slices"].sum() == 90


def test_the_patient_table_counts_each_patient(tmp_path):
    table = patient_table(make_cohort(tmp_path / "c"))
    assert table.loc["p2"].to_dict() == {"patient_label": "LGG", "healthy": 4, "HGG": 0, "LGG": 6}
    assert len(table) == 9


def test_the_two_label_rules_stand_side_by_side():
    tally = {"tumour": 7, "thesis tumour / default tumour": 7, "thesis healthy / default left out: little brain": 2}
    cohort = SimpleNamespace(provenance={"tally": tally})
    table = rule_table(cohort)
    assert table.values.tolist() == [["healthy", "left out: little brain", 2], ["tumour", "tumour", 7]]
    assert rule_table(SimpleNamespace(provenance={"tally": {"images": 3}})).empty


def test_shown_samples_come_from_as_many_patients_as_there_are(tmp_path):
    cohort = make_cohort(tmp_path / "c")
    chosen = choose(cohort, per_class=5, seed=0)
    for name, rows in chosen.items():
        shown = cohort.samples.loc[rows]
        assert (shown["label"] == name).all()
        assert len(rows) == len(set(rows)) == 5
        assert shown["patient"].nunique() == min(5, cohort.samples.loc[cohort.samples["label"] == name, "patient"].nunique())
    again, other = choose(cohort, per_class=5, seed=0), choose(cohort, per_class=5, seed=1)
    assert all((again[name] == chosen[name]).all() for name in CLASSES)
    assert any((other[name] != chosen[name]).any() for name in CLASSES)


def test_the_contact_sheet_is_large_shows_the_samples_own_grey_and_repeats_itself(tmp_path):
    cohort = make_cohort(tmp_path / "c")
    first = contact_sheet(cohort, tmp_path / "a.png", per_class=4, seed=2)
    contact_sheet(cohort, tmp_path / "b.png", per_class=4, seed=2)
    assert first.read_bytes() == (tmp_path / "b.png").read_bytes()
    picture = np.asarray(Image.open(first).convert("L"))
    assert picture.shape[0] > 600
    assert picture.shape[1] > 600
    for rows in choose(cohort, per_class=4, seed=2).values():
        for row in rows:  # slice number `row` is uniformly grey `row`; it covers about a hundred pixels squared
            assert (picture == row).sum() > 5000


def test_colour_channels_are_shown_in_colour(tmp_path):
    cohort = make_cohort(tmp_path / "c", channels=("red", "green", "blue"))
    picture = np.asarray(Image.open(contact_sheet(cohort, tmp_path / "a.png", per_class=1)).convert("RGB")).astype(int)
    row = choose(cohort, per_class=1, seed=0)["LGG"][0]
    assert (picture == [row, row + 20, row + 40]).all(-1).sum() > 5000


@pytest.mark.parametrize(("options", "message"), [({"channel": "t9"}, "no channel 't9'"), ({"per_class": 0}, "at least one")])
def test_what_cannot_be_shown_is_refused_and_nothing_is_written(tmp_path, options, message):
    cohort = make_cohort(tmp_path / "c")
    with pytest.raises(DataError, match=message):
        contact_sheet(cohort, tmp_path / "a.png", **options)
    with pytest.raises(DataError, match=r"ends with \.png"):
        contact_sheet(cohort, Path(tmp_path / "a.txt"))
    assert not list(tmp_path.glob("*.png"))


def test_more_samples_than_a_class_has_leave_empty_places(tmp_path):
    cohort = make_cohort(tmp_path / "c")
    assert len(choose(cohort, per_class=25, seed=0)["LGG"]) == 18
