import json
import tempfile
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raredistill.cohort import store
from raredistill.cohort.store import Cohort
from raredistill.errors import DataError

CLASSES = ("healthy", "HGG", "LGG")
# What the one rule of names allows: composed, no control characters.
NAMES = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), min_size=1).map(lambda text: unicodedata.normalize("NFC", text))


def _table(n: int = 6) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "sample": [f"s{i}" for i in range(n)],
            "patient": ["a"] * (n // 2) + ["b"] * (n - n // 2),
            "patient_label": ["HGG"] * (n // 2) + ["LGG"] * (n - n // 2),
            "label": ["healthy", "HGG", "HGG", "healthy", "LGG", "LGG"][:n],
            "slice": range(n),
            "source": "made",
            "split": "",
        }
    )


def _pixels(n: int = 6) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {channel: generator.integers(0, 256, (n, 4, 5), dtype=np.uint8) for channel in ("flair", "t1")}


def _save(root, **changes):
    arguments = {"samples": _table(), "pixels": _pixels(), "classes": CLASSES, "size": (4, 5), "provenance": {"source": "x"}} | changes
    return store.save(root, arguments.pop("samples"), arguments.pop("pixels"), **arguments)


def test_a_saved_cohort_reads_back_bit_for_bit(tmp_path):
    _save(tmp_path / "c")
    cohort = Cohort.load(tmp_path / "c")
    for channel, expected in _pixels().items():
        np.testing.assert_array_equal(cohort.pixels(channel), expected)
    assert cohort.samples["sample"].tolist() == [f"s{i}" for i in range(6)]
    assert cohort.labels.tolist() == [0, 1, 1, 0, 2, 2]
    assert (cohort.name, cohort.channels, cohort.classes, cohort.size) == ("c", ("flair", "t1"), CLASSES, (4, 5))
    assert (cohort.background, cohort.patient_classes) == ("healthy", ("HGG", "LGG"))
    assert cohort.provenance == {"source": "x"}


def test_counts_are_slices_and_patients_of_each_class_also_of_an_absent_one(tmp_path):
    cohort = _save(tmp_path / "c", classes=(*CLASSES, "rare"))
    assert cohort.counts().to_dict("records") == [
        {"class": "healthy", "slices": 2, "patients": 2},
        {"class": "HGG", "slices": 2, "patients": 1},
        {"class": "LGG", "slices": 2, "patients": 1},
        {"class": "rare", "slices": 0, "patients": 0},
    ]


def test_there_is_no_background_when_patients_carry_the_first_class_or_no_label(tmp_path):
    table = _table().assign(patient_label=lambda t: t["label"])
    assert _save(tmp_path / "own", samples=table).background is None
    assert _save(tmp_path / "none", samples=_table().assign(patient_label="")).background is None


def test_blocks_and_whole_arrays_give_the_same_cohort_and_the_place_does_not_matter(tmp_path):
    whole = _save(tmp_path / "whole")
    blocks = _save(tmp_path / "b", pixels={c: iter([p[:2], p[2:3], p[3:]]) for c, p in _pixels().items()})
    assert whole.hash == blocks.hash


@pytest.mark.parametrize("change", ["pixel", "label", "class order"])
def test_the_hash_tells_different_cohorts_apart(tmp_path, change):
    pixels, table, classes = _pixels(), _table(), CLASSES
    if change == "pixel":
        pixels["t1"][3, 2, 1] ^= 1
    elif change == "label":
        table.loc[1, "label"] = "healthy"
    else:
        classes = ("healthy", "LGG", "HGG")
    assert _save(tmp_path / "a").hash != _save(tmp_path / "b", pixels=pixels, samples=table, classes=classes).hash


def test_pixels_are_read_only(tmp_path):
    pixels = _save(tmp_path / "c").pixels("t1")
    with pytest.raises(ValueError, match="read-only"):
        pixels[0, 0, 0] = 1


def test_an_unknown_channel_names_the_known_ones(tmp_path):
    with pytest.raises(DataError, match="'t2'; it has flair, t1"):
        _save(tmp_path / "c").pixels("t2")


def test_damage_is_noticed_on_loading(tmp_path):
    root = tmp_path / "c"
    _save(root)
    pixel_file = root / "pixels" / "t1.u8"
    pixel_file.write_bytes(pixel_file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"t1\.u8 holds 119 bytes instead of 120"):
        Cohort.load(root)
    pixel_file.unlink()
    with pytest.raises(DataError, match="is missing; prepare"):
        Cohort.load(root)
    table = pd.read_parquet(root / "samples.parquet")
    table.to_csv(root / "samples.parquet")
    with pytest.raises(DataError, match="was changed after"):
        Cohort.load(root)


def test_a_flipped_bit_in_the_pixels_is_noticed(tmp_path):
    root = tmp_path / "c"
    _save(root).check_pixels()
    file = root / "pixels" / "t1.u8"
    raw = bytearray(file.read_bytes())
    raw[60] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DataError, match=r"t1\.u8 was changed"):
        Cohort.load(root).check_pixels()


@pytest.mark.parametrize("key", ["classes", "channels", "size", "pixels", "samples"])
def test_a_description_that_was_changed_or_lacks_something_is_refused(tmp_path, key):
    root = tmp_path / "c"
    _save(root)
    whole = json.loads((root / "cohort.json").read_text())
    for changed in ({**whole, key: list(whole[key])[::-1]}, {name: value for name, value in whole.items() if name != key}):
        (root / "cohort.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match="was changed after"):
            Cohort.load(root)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.sampled_from(CLASSES), st.integers(-1, 154)), min_size=1, max_size=12),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 2**32),
)
def test_whatever_is_saved_comes_back_in_order_and_is_counted_right(rows, height, width, seed):
    table = pd.DataFrame(rows, columns=["patient", "label", "slice"])
    table = table.assign(sample=[f"s{i}" for i in range(len(rows))], patient_label="", source=table["patient"], split="")
    pixels = np.random.default_rng(seed).integers(0, 256, (len(rows), height, width), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        cut = seed % len(rows)
        _save(Path(folder) / "c", samples=table, pixels={"x": [pixels[:cut], pixels[cut:]]}, size=(height, width))
        cohort = Cohort.load(Path(folder) / "c")
        np.testing.assert_array_equal(cohort.pixels("x"), pixels)
        cohort.check_pixels()
    assert cohort.samples["patient"].tolist() == [patient for patient, _, _ in rows]
    slices, patients = Counter(label for _, label, _ in rows), {name: {p for p, label, _ in rows if label == name} for name in CLASSES}
    assert cohort.counts()["slices"].tolist() == [slices[name] for name in CLASSES]
    assert cohort.counts()["patients"].tolist() == [len(patients[name]) for name in CLASSES]


def test_a_folder_that_is_no_cohort_says_so(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        Cohort.load(tmp_path / "absent")
    with pytest.raises(DataError, match="is no cohort"):
        Cohort.load(tmp_path)
    (tmp_path / ".parts").mkdir()
    with pytest.raises(DataError, match="unfinished cohort"):
        Cohort.load(tmp_path)
    (tmp_path / "cohort.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(DataError, match=r"another version.*prepare the cohort again"):
        Cohort.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": _table().drop(columns="patient")}, "lacks the column"),
        ({"samples": _table().head(0)}, "no sample is left"),
        ({"samples": _table().assign(label="typo")}, "unknown label"),
        ({"samples": _table().assign(sample="same")}, "occurs twice"),
        ({"samples": _table(5)}, "120 bytes of pixels where .* ask for 100"),
        ({"pixels": {"t1": np.zeros((6, 4, 5))}}, "must be uint8"),
    ],
)
def test_a_cohort_that_does_not_fit_together_is_refused_and_never_loads(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        _save(tmp_path / "c", **change)
    with pytest.raises(DataError):
        Cohort.load(tmp_path / "c")


def test_nothing_is_written_over(tmp_path):
    first = _save(tmp_path / "c")
    with pytest.raises(DataError, match="already holds a cohort"):
        _save(tmp_path / "c")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="something else"):
        _save(tmp_path / "other")
    assert Cohort.load(tmp_path / "c").hash == first.hash


def test_an_interrupted_write_can_be_done_again(tmp_path):
    def broken():
        yield _pixels()["t1"][:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _save(tmp_path / "c", pixels={"flair": _pixels()["flair"], "t1": broken()})
    with pytest.raises(DataError, match="unfinished cohort"):
        Cohort.load(tmp_path / "c")
    assert _save(tmp_path / "c").hash == _save(tmp_path / "d").hash
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["cohort.json", "pixels", "samples.parquet"]
