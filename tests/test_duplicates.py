"""Copies: equal pixels, near-copies, and patients that the pictures contradict."""

import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter

from raredistill.cohort.duplicates import SIDE, Prints, find_copies, implausible_patients, joined
from raredistill.cohort.prepare import prepare
from raredistill.cohort.sources.registry import open_source
from raredistill.cohort.verify import check, examine, write_table
from raredistill.errors import DataError
from raredistill.splits import Patients, make_splits


def picture(seed, side=96):
    """Smooth noise: structure at all the scales that a look keeps."""
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side), dtype=np.uint8))
    smooth = np.asarray(noise.filter(ImageFilter.GaussianBlur(4)), dtype=np.float32)
    return Image.fromarray(np.clip((smooth - smooth.mean()) * 6 + 128, 0, 255).astype(np.uint8))


@pytest.fixture
def table(tmp_path):
    """Ten pictures of ten patients; the caller adds rows."""
    (tmp_path / "img").mkdir()
    rows = []
    for number in range(10):
        picture(number).save(tmp_path / f"img/a{number}.png")
        rows.append([f"img/a{number}.png", "mel" if number % 2 else "nev", f"p{number}", "train"])

    def write(*more):
        frame = pd.DataFrame([*rows, *more], columns=["image", "label", "patient", "split"])
        frame.to_csv(tmp_path / "labels.csv", index=False)
        return tmp_path / "labels.csv"

    return write


def problems(path, level, **options):
    found = examine(open_source("table", path, **options), workers=1)
    return [problem for problem in found.problems if problem.level == level]


def test_equal_pixels_of_two_patients_are_an_error_whose_cures_work(table, tmp_path):
    Image.open(tmp_path / "img/a3.png").save(tmp_path / "img/b3.tif")
    path = table(["img/b3.tif", "mel", "p97", "test"])
    assert [problem.file for problem in problems(path, "error")] == ["img/a3.png"]
    with pytest.raises(DataError, match="duplicates=join"):
        prepare(open_source("table", path), tmp_path / "out", size=(16, 16), workers=1)
    cohort = prepare(open_source("table", path, duplicates="join"), tmp_path / "out", size=(16, 16), workers=1)
    assert (len(cohort.samples), cohort.samples["patient"].nunique()) == (11, 10)
    assert cohort.provenance["joined"] == {"p97": "p3"}
    kept = prepare(open_source("table", path, duplicates="drop"), tmp_path / "kept", size=(16, 16), workers=1)
    assert "img/a3.png" not in set(kept.samples["sample"])  # the tested copy stays
    row = kept.samples.index[kept.samples["sample"] == "img/b3.tif"][0]
    whole = cohort.samples.index[cohort.samples["sample"] == "img/b3.tif"][0]
    np.testing.assert_array_equal(kept.pixels("grey")[row], cohort.pixels("grey")[whole])


def test_equal_pixels_with_two_labels_are_an_error_that_no_treatment_hides(table, tmp_path):
    shutil.copy(tmp_path / "img/a2.png", tmp_path / "img/b2.png")
    path = table(["img/b2.png", "mel", "p98", "test"])
    for treatment in ("refuse", "join", "drop", "near"):
        assert ["labelled differently" in problem.what for problem in problems(path, "error", duplicates=treatment)] == [True]


def test_equal_pixels_of_one_patient_are_a_note(table, tmp_path):
    shutil.copy(tmp_path / "img/a2.png", tmp_path / "img/b2.png")
    path = table(["img/b2.png", "nev", "p2", "train"])
    assert problems(path, "error") == []
    assert [problem.patient for problem in problems(path, "note")] == ["p2"]


def test_one_file_under_two_spellings_is_refused(table, tmp_path):
    (tmp_path / "img/link.png").symlink_to("a2.png")
    path = table(
        ["./img/a0.png", "mel", "p90", "test"], ["img/../img/a1.png", "mel", "p91", "test"], ["img/link.png", "nev", "p92", "test"]
    )
    assert ["the same file as" in problem.what for problem in problems(path, "error")] == [True] * 3


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda image: image.transpose(Image.Transpose.ROTATE_90),
        lambda image: image.resize((60, 60)),
        lambda image: Image.open(io.BytesIO(jpeg(image, 40))),
        lambda image: image.point(lambda value: int(value * 0.8 + 20)),
    ],
    ids=["flipped", "turned", "resized", "quality 40", "brighter"],
)
def test_near_copies_are_found_and_can_be_joined(table, tmp_path, change):
    change(picture(4)).save(tmp_path / "img/near.png")
    path = table(["img/near.png", "nev", "p99", "train"])
    found = examine(open_source("table", path), workers=1)
    pairs = [tuple(found.copies.samples["sample"].iloc[[pair.first, pair.second]]) for pair in found.copies.near.itertuples()]
    assert pairs == [("img/a4.png", "img/near.png")]
    cohort = prepare(open_source("table", path, duplicates="near"), tmp_path / "out", size=(32, 32), workers=1)
    assert cohort.provenance["joined"] == {"p99": "p4"}
    with Image.open(tmp_path / "out/near-duplicates.png") as sheet:
        assert min(sheet.size) > 100


def jpeg(image, quality):
    handle = io.BytesIO()
    image.save(handle, "JPEG", quality=quality)
    return handle.getvalue()


def test_joining_follows_chains():
    samples = pd.DataFrame({"sample": list("abcd"), "patient": list("wxyz"), "patient_label": "", "label": "l", "split": ""})
    looks = np.random.default_rng(0).integers(0, 255, (4, SIDE, SIDE), dtype=np.uint8)
    copies = find_copies(samples, Prints(("1", "1", "2", "3"), looks))
    near = copies.near.reindex([0]).assign(first=1, second=2, similarity=1.0)
    assert joined(type(copies)(samples, copies.equal, near, copies.flat), near=True) == {"x": "w", "y": "w"}
    assert joined(copies, near=False) == {"x": "w"}


def test_blocks_of_slices_called_patients_are_noticed_and_real_patients_are_not(shared_data):
    root = shared_data / "figshare-brain-tumour-128"
    source = open_source("table", root / "labels.csv")
    trials = [check(unit, source) for unit in source.units()]
    samples = pd.DataFrame(
        [row for trial in trials for row in trial.rows], columns=["sample", "patient", "patient_label", "label", "split"]
    )
    looks = np.concatenate([trial.prints.looks for trial in trials])
    assert implausible_patients(samples, looks) == []
    number = samples["sample"].str.extract(r"(\d+)\.png")[0].astype(int)
    place = number.groupby(samples["label"]).rank().astype(int)
    for length in (5, 20):
        blocks = samples.assign(patient=samples["label"] + (place // length).astype(str))
        assert len(implausible_patients(blocks, looks)) == 3


def test_the_real_lesions_are_as_many_samples_and_patients_as_the_file_holds(shared_data):
    source = open_source("arrays", shared_data / "brats2020-lesions" / "brats2020_lesions.npz")
    rows = pd.DataFrame([row for unit in source.units() for row in source.read(unit, (32, 32)).rows])
    assert source.channels == ("t1", "t1ce", "t2", "flair")
    assert len(rows) == 6386
    assert rows.groupby("label")["patient"].agg(["size", "nunique"]).to_numpy().tolist() == [[5136, 292], [1250, 76]]
    assert (rows["patient_label"] == rows["label"]).all()


def test_unlabelled_samples_are_never_in_a_split(table, tmp_path):
    for number in range(20, 32):
        picture(number).save(tmp_path / f"img/u{number}.png")
    extra = [[f"img/u{n}.png", ("mel" if n % 2 else "nev") if n < 28 else "unlabelled", f"p{n}", "train"] for n in range(20, 32)]
    cohort = prepare(open_source("table", table(*extra)), tmp_path / "out", size=(16, 16), workers=1)
    assert (len(cohort.labelled), len(cohort.unlabelled)) == (18, 4)
    assert set(Patients(cohort).names) & {"p28", "p29", "p30", "p31"} == set()
    for split in make_splits(cohort, folds=2):
        rows = np.concatenate([split.train, split.validation, split.test])
        assert set(rows) == set(cohort.labelled)


def test_the_table_of_problems_can_be_sent_on(table, tmp_path):
    (tmp_path / "img/a0.png").unlink()
    found = examine(open_source("table", table()), workers=1)
    assert found.usable == 9
    written = json.loads(write_table(found, tmp_path / "p.json").read_text())
    assert [row["patient"] for row in written if row["level"] == "error"] == ["p0"] * len(written)
    assert len(pd.read_csv(write_table(found, tmp_path / "p.csv"))) == len(written)
    with pytest.raises(DataError, match=r"\.csv or \.json"):
        write_table(found, tmp_path / "p.txt")
