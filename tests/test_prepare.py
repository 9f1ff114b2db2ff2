import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest

from raredistill import files
from raredistill.cohort import prepare as preparation
from raredistill.cohort.prepare import PAIRS, prepare
from raredistill.cohort.sources.registry import open_source
from raredistill.cohort.verify import verify
from raredistill.errors import DataError
from test_brats import REAL, independent_labels, write_grades, write_hdf5, write_nifti

GRADES = {"a": "HGG", "b": "LGG", "c": "HGG"}
SIZE = (12, 10)
GLIOMA = REAL / "real-glioma-nifti"


def make_source(root: Path, **options):
    if not root.exists():
        for seed, name in enumerate(GRADES):
            write_nifti(root, name, seed, ending=".nii" if name == "a" else ".nii.gz")
        write_nifti(root, "unlabelled", 9, segmentation=None)
        write_grades(root, GRADES)
    return open_source("brats_nifti", root, **{"min_tumour_voxels": 20, **options})


def test_a_cohort_holds_what_the_source_reads_patient_by_patient(tmp_path):
    source = make_source(tmp_path / "raw")
    told = []
    cohort = prepare(source, tmp_path / "out", size=SIZE, workers=1, progress=lambda *state: told.append(state))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    slices = [source.read(unit, SIZE) for unit in source.units()]
    for channel in source.channels:
        np.testing.assert_array_equal(cohort.pixels(channel), np.concatenate([one.pixels[channel] for one in slices]))
    assert cohort.samples["sample"].tolist() == [row["sample"] for one in slices for row in one.rows]
    assert cohort.samples["label"].tolist() == [row["label"] for one in slices for row in one.rows]
    assert cohort.samples.groupby("patient")["patient_label"].unique().map(list).to_dict() == {k: [v] for k, v in GRADES.items()}
    assert (cohort.background, cohort.patient_classes, cohort.size) == ("healthy", ("HGG", "LGG"), SIZE)


def test_the_provenance_tells_files_rule_tally_and_who_was_left_out(tmp_path):
    source = make_source(tmp_path / "raw")
    told = prepare(source, tmp_path / "out", size=SIZE, workers=1).provenance
    for patient in GRADES:
        assert told["hashes"][patient] == {path.name: files.sha256(path) for path in (tmp_path / "raw" / patient).iterdir()}
    assert told["settings"]["rule"] == "default"
    assert told["settings"]["min_tumour_voxels"] == 20
    assert [(row["patient"], row["what"]) for row in told["left_out"]] == [("unlabelled", "no segmentation")]
    assert told["tally"]["healthy"] + told["tally"]["tumour"] == len(prepare(source, tmp_path / "out", size=SIZE).samples)
    assert told["versions"]["numpy"] == np.__version__


def test_processes_make_the_same_cohort_as_one(tmp_path):
    source = make_source(tmp_path / "raw")
    one = prepare(source, tmp_path / "one", size=SIZE, workers=1)
    many = prepare(source, tmp_path / "many", size=SIZE, workers=2)
    assert one.hash == many.hash
    assert {path.name for path in (tmp_path / "many").iterdir()} - {PAIRS} == {"cohort.json", "pixels", "samples.parquet"}


def test_patients_stand_in_the_sources_order_whichever_is_read_first(tmp_path, monkeypatch):
    source, write, finished = make_source(tmp_path / "raw"), preparation.write_part, []

    def slow_for_the_first(unit, *arguments):
        time.sleep(0.5 if unit.patient == "a" else 0)
        part = write(unit, *arguments)
        finished.append(unit.patient)
        return part

    one = prepare(source, tmp_path / "one", size=SIZE, workers=1)
    monkeypatch.setattr(preparation, "write_part", slow_for_the_first)
    with ThreadPoolExecutor(3) as threads:
        other = prepare(source, tmp_path / "other", size=SIZE, executor=threads)
    assert finished[-1] == "a"
    assert other.hash == one.hash
    assert other.samples["patient"].drop_duplicates().tolist() == ["a", "b", "c"]


def test_both_layouts_make_cohorts_of_the_same_samples(tmp_path):
    for number in (1, 2):
        write_nifti(tmp_path / "nifti", f"BraTS20_Training_{number:03d}", number)
        write_hdf5(tmp_path / "hdf5", number, number)
    for layout in ("nifti", "hdf5"):
        write_grades(tmp_path / layout, {"BraTS20_Training_001": "HGG", "BraTS20_Training_002": "LGG"})
    nifti, hdf5 = (
        prepare(open_source(f"brats_{name}", tmp_path / name), tmp_path / f"{name}-out", size=SIZE, workers=1) for name in ("nifti", "hdf5")
    )
    assert nifti.samples.equals(hdf5.samples)
    for channel in nifti.channels:
        assert np.abs(nifti.pixels(channel).astype(int) - hdf5.pixels(channel)).max() <= 1


def interrupt(source, out, *, after):
    """Prepare until so many patients are done."""

    def stop(done, total):
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, out, size=SIZE, workers=1, progress=stop)


def test_an_interrupted_preparation_goes_on_where_it_stopped(tmp_path, monkeypatch):
    source, out = make_source(tmp_path / "raw"), tmp_path / "out"
    interrupt(source, out, after=2)
    assert not (out / "cohort.json").exists()
    read = []
    original = type(source).read
    monkeypatch.setattr(type(source), "read", lambda self, unit, size: read.append(unit.patient) or original(self, unit, size))
    resumed = prepare(source, out, size=SIZE, workers=1)
    assert read == ["c"]
    assert resumed.hash == prepare(source, tmp_path / "whole", size=SIZE, workers=1).hash


@pytest.mark.parametrize("moment", ["before the description", "before the end"])
def test_what_a_kill_left_beside_the_cohort_is_gone_after_the_next_start(tmp_path, moment):
    source, out = make_source(tmp_path / "raw"), tmp_path / "out"
    prepare(source, out, size=SIZE, workers=1)
    calm = sorted(path.name for path in out.rglob("*"))
    (out / preparation.WORK).mkdir()
    for name in ("lock", "flair.u8", ".job.json.host-1.tmp"):
        (out / preparation.WORK / name).write_bytes(b"rest")
    if moment == "before the description":
        (out / "cohort.json").rename(out / ".cohort.json.host-1.tmp")
    prepare(source, out, size=SIZE, workers=1)
    assert sorted(path.name for path in out.rglob("*")) == calm


def test_a_part_is_read_again_when_its_file_changed_or_its_pixels_are_cut(tmp_path):
    source, out = make_source(tmp_path / "raw"), tmp_path / "out"
    interrupt(source, out, after=3)
    cut = preparation._part_file(out / ".parts", source.units()[1], "t1.u8")
    cut.write_bytes(cut.read_bytes()[:-1])
    preparation._part_file(out / ".parts", source.units()[2], "json").write_bytes(bytes(100))  # as a crash of the machine may leave it
    write_nifti(tmp_path / "new", "a", 77, ending=".nii")  # not compressed, so of the same size as before
    for path in (tmp_path / "new" / "a").iterdir():
        (tmp_path / "raw" / "a" / path.name).write_bytes(path.read_bytes())
    resumed = prepare(source, out, size=SIZE, workers=1)
    assert resumed.hash == prepare(source, tmp_path / "whole", size=SIZE, workers=1).hash


def test_a_part_whose_description_was_edited_is_read_again(tmp_path):
    source, out = make_source(tmp_path / "raw"), tmp_path / "out"
    interrupt(source, out, after=2)
    told = preparation._part_file(out / ".parts", source.units()[0], "json")
    assert '"label": "HGG"' in told.read_text()
    told.write_text(told.read_text().replace('"label": "healthy"', '"label": "LGG"'))
    resumed = prepare(source, out, size=SIZE, workers=1)
    assert resumed.hash == prepare(source, tmp_path / "whole", size=SIZE, workers=1).hash


def test_a_damaged_part_is_never_put_into_a_cohort(tmp_path):
    source, out = make_source(tmp_path / "raw"), tmp_path / "out"

    def damage(done, total):
        if done == 2:
            part = preparation._part_file(out / ".parts", source.units()[1], "t2.u8")
            part.write_bytes(bytes(part.stat().st_size))

    with pytest.raises(DataError, match="was damaged"):
        prepare(source, out, size=SIZE, workers=1, progress=damage)
    assert not (out / "cohort.json").exists()


def test_a_finished_cohort_is_returned_and_other_settings_are_refused(tmp_path):
    source, out = make_source(tmp_path / "raw"), tmp_path / "out"
    first = prepare(source, out, size=SIZE, workers=1)
    stamp = (out / "cohort.json").stat().st_mtime_ns
    assert prepare(source, out, size=SIZE).hash == first.hash
    assert (out / "cohort.json").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match=r"prepared differently \(in size"):
        prepare(source, out, size=(8, 8))
    with pytest.raises(DataError, match=r"prepared differently \(in settings"):
        prepare(make_source(tmp_path / "raw", rule="thesis"), out, size=SIZE)


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="something else"):
        prepare(make_source(tmp_path / "raw"), tmp_path / "out", size=SIZE)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter.txt"]


def spoil(root: Path) -> None:
    """One case without a grade, one with a damaged scan and one whose modalities disagree."""
    write_nifti(root, "gradeless", 4)
    damaged = root / "b" / "b_t2.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4), np.int16), np.eye(4)), root / "c" / "c_t1.nii.gz")


def test_verify_tells_every_problem_at_once_with_one_worker_or_two(tmp_path):
    make_source(tmp_path / "raw")
    spoil(tmp_path / "raw")
    source = make_source(tmp_path / "raw")
    found = verify(source, workers=1)
    assert [(problem.level, problem.patient) for problem in found] == [
        ("error", "b"),
        ("error", "c"),
        ("error", "gradeless"),
        ("note", "unlabelled"),
    ]
    assert "b_t2.nii.gz" in found[0].what
    assert "disagree in shape" in found[1].what
    assert verify(source, workers=2) == found


def test_prepare_refuses_bad_patients_by_name_or_leaves_them_out_on_request(tmp_path):
    make_source(tmp_path / "raw")
    spoil(tmp_path / "raw")
    source = make_source(tmp_path / "raw")
    with pytest.raises(DataError, match=r"1 error\(s\).*\ngradeless: .*no row for the patient"):
        prepare(source, tmp_path / "out", size=SIZE, workers=1)
    assert not (tmp_path / "out").exists()
    write_grades(tmp_path / "raw", {**GRADES, "gradeless": "LGG"})
    source = make_source(tmp_path / "raw")
    with pytest.raises(DataError, match=r"2 error\(s\)(.|\n)*b: .*b_t2(.|\n)*c: .*disagree"):
        prepare(source, tmp_path / "out", size=SIZE, workers=1)
    assert not (tmp_path / "out" / "cohort.json").exists()
    cohort = prepare(source, tmp_path / "out", size=SIZE, workers=1, leave_out_bad=True)
    assert set(cohort.samples["patient"]) == {"a", "gradeless"}
    assert {row["patient"] for row in cohort.provenance["left_out"]} == {"b", "c", "unlabelled"}


def test_a_folder_without_patients_is_refused_also_when_bad_ones_may_be_left_out(tmp_path):
    (tmp_path / "raw").mkdir()
    source = open_source("brats_nifti", tmp_path / "raw")
    for leave_out_bad in (False, True):
        with pytest.raises(DataError, match="no file is called like"):
            prepare(source, tmp_path / "out", size=SIZE, leave_out_bad=leave_out_bad)
    assert [problem.level for problem in verify(source)] == ["error"]


@pytest.mark.skipif(not GLIOMA.is_dir(), reason="../shared/data/real-glioma-nifti is absent")
def test_real_cases_give_the_counts_of_an_independent_look_at_the_raw_volumes(tmp_path):
    cases = ("TCGA-DU-7294", "TCGA-FG-6692")
    grades = tmp_path / "grades.csv"
    grades.write_text("patient,grade\n" + "".join(f"{case},LGG\n" for case in cases))
    expected: dict[str, list[str]] = {"default": [], "thesis": []}
    for case in cases:
        volumes = {path.name.split("_")[1][:-7]: np.asarray(nibabel.load(path).dataobj) for path in (GLIOMA / case).iterdir()}
        mask = volumes.pop("seg")
        for rule, outcomes in expected.items():
            outcomes += independent_labels(volumes, mask, rule)
    cohort = prepare(open_source("brats_nifti", GLIOMA, grades=grades), tmp_path / "out", size=(24, 24), workers=1)
    pairs = [f"thesis {old} / default {new}" for old, new in zip(expected["thesis"], expected["default"], strict=True)]
    assert cohort.provenance["tally"] == dict(Counter(pairs) + Counter(expected["default"]))
    kept = [name.replace("tumour", "LGG") for name in expected["default"] if name in ("tumour", "healthy")]
    assert cohort.samples["label"].tolist() == kept
    assert [(row["patient"], row["what"]) for row in cohort.provenance["left_out"]] == [("BraTS-GLI-00001-000", "no segmentation")]
    thesis = open_source("brats_nifti", GLIOMA, grades=grades, rule="thesis")
    labels = [row["label"] for unit in thesis.units() for row in thesis.read(unit, (8, 8)).rows]
    assert labels == [name.replace("tumour", "LGG") for name in expected["thesis"] if name in ("tumour", "healthy")]


def test_two_preparations_at_once_make_one_cohort(tmp_path, monkeypatch):
    source, second = make_source(tmp_path / "raw"), []
    read = preparation._read_parts

    def reading(*arguments, **options):
        if not second:  # while this one holds the lock, another begins and waits
            second.append(threads.submit(prepare, source, tmp_path / "out", size=SIZE, workers=1))
            time.sleep(0.3)
        return read(*arguments, **options)

    monkeypatch.setattr(preparation, "_read_parts", reading)
    with ThreadPoolExecutor(1) as threads:
        first = prepare(source, tmp_path / "out", size=SIZE, workers=1)
        assert second[0].result().hash == first.hash
    assert len(second) == 1
