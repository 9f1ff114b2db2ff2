"""Volumes as people have them: orientations, value ranges, persons, label conventions, layouts; each against an independent count."""

import json
import shutil

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from raredistill.cohort import volumes
from raredistill.cohort.orientation import axes_of
from raredistill.cohort.prepare import prepare
from raredistill.cohort.sources.registry import open_source
from raredistill.cohort.verify import verify
from raredistill.errors import ConfigError, DataError
from test_brats import AS_BRATS, CHANNELS, make_case, write_hdf5, write_nifti

NEWER = dict(zip(CHANNELS, ("t2f", "t1n", "t1c", "t2w"), strict=True))


def put(path, volume, affine=AS_BRATS):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)


def reoriented(volume, code, affine=AS_BRATS):
    image = nibabel.Nifti1Image(volume, affine)
    turned = image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(tuple(code))))
    return np.asarray(turned.dataobj), turned.affine


def table(path, rows):
    path.write_text("patient,grade\n" + "".join(f"{name},{grade}\n" for name, grade in rows.items()))
    return path


def opened(tmp_path, rows, **options):
    return open_source("brats_nifti", tmp_path, grades=table(tmp_path / "g.csv", rows), **{"min_tumour_voxels": 20, **options})


def told(source, level="error"):
    return [f"{problem.patient}: {problem.what}" for problem in verify(source, workers=1) if problem.level == level]


@pytest.mark.parametrize("code", ["LPS", "RAS", "PIR", "LAS", "ASR", "SPL", "IRA"])
def test_any_orientation_gives_the_slices_of_brats(tmp_path, code):
    images, mask = make_case(3)
    for role, volume in {**images, "seg": mask}.items():
        put(tmp_path / "a" / f"a_{role}.nii.gz", volume)
        put(tmp_path / "b" / f"b_{role}.nii.gz", *reoriented(volume, code))
    source = opened(tmp_path, {"a": "HGG", "b": "HGG"})
    stored, turned = (source.read(unit, (16, 16)) for unit in source.units())
    assert [row["slice"] for row in stored.rows] == [row["slice"] for row in turned.rows]
    assert stored.tally == turned.tally
    for channel in CHANNELS:
        np.testing.assert_array_equal(stored.pixels[channel], turned.pixels[channel])


def test_an_oblique_affine_takes_the_closest_axes_and_a_flat_one_is_refused():
    angle = np.radians(20)
    tilted = np.array([[-1, 0, 0, 0], [0, -np.cos(angle), -np.sin(angle), 0], [0, -np.sin(angle), np.cos(angle), 0], [0, 0, 0, 1]])
    found = axes_of(tilted)
    assert found.identity
    assert found.tilt == pytest.approx(20)
    with pytest.raises(DataError, match="flat"):
        axes_of(np.diag([1.0, 0, 1, 1]))


def test_a_file_without_a_place_is_no_match_for_files_with_one(tmp_path):
    folder = write_nifti(tmp_path, "a", 1)
    image = nibabel.Nifti1Image(make_case(1)[1], None)
    image.header["qform_code"] = image.header["sform_code"] = 0
    nibabel.save(image, folder / "a_seg.nii.gz")
    [error] = told(opened(tmp_path, {"a": "HGG"}))
    assert "a_seg.nii.gz has no place in space" in error


def test_a_background_inside_the_range_is_found(tmp_path):
    images, mask = make_case(5)
    for role, volume in {**images, "seg": mask}.items():
        put(tmp_path / "a" / f"a_{role}.nii.gz", volume)
        brain = volume[volume > 0]
        scored = np.where(volume > 0, (volume - brain.mean()) / brain.std(), 0).astype(np.float32)
        put(tmp_path / "b" / f"b_{role}.nii.gz", volume if role == "seg" else scored)
    source = opened(tmp_path, {"a": "HGG", "b": "HGG"})
    raw, scored = (source.read(unit, (22, 26)) for unit in source.units())
    assert raw.tally == scored.tally
    for channel in CHANNELS:
        assert np.abs(raw.pixels[channel].astype(int) - scored.pixels[channel]).max() <= 1
    rows = [row["slice"] for row in scored.rows]
    inside = images["t1"].T[rows] > 0
    assert np.mean(scored.pixels["t1"][inside] == 0) < 0.03


def test_ringing_and_padding_below_the_background_are_no_brain():
    volume = make_case(2)[0]["t1"].T.astype(np.float32)
    plain = volumes.window(volume)
    ringing = volume.copy()
    ringing[:, :3] = -1.5 * np.random.default_rng(0).random(ringing[:, :3].shape)
    padded = volume.copy()
    padded[:, :3] = -1000
    for other in (ringing, padded):
        found = volumes.window(other)
        assert found.inside is None
        assert found.brain.tolist() == plain.brain.tolist()


def test_few_grey_values_are_a_warning_with_the_cure(tmp_path):
    images, mask = make_case(2)
    for role, volume in images.items():
        put(tmp_path / "a" / f"a_{role}.nii.gz", (volume // 60).astype(np.int16) if role == "t2" else volume)
    put(tmp_path / "a" / "a_seg.nii.gz", mask)
    [warning] = told(opened(tmp_path, {"a": "HGG"}), "warning")
    values = np.unique(images["t2"][images["t2"] >= 60] // 60).size
    assert f"t2 has only {values} grey values" in warning


@pytest.mark.parametrize("change", [lambda v: v, lambda v: v.astype(np.float32) * 0.5 + 3])
def test_a_modality_that_is_a_copy_of_another_is_an_error(tmp_path, change):
    folder = write_nifti(tmp_path, "a", 1)
    put(folder / "a_t2.nii.gz", change(make_case(1)[0]["flair"]))
    [error] = told(opened(tmp_path, {"a": "HGG"}))
    assert "flair and t2 are the same volume" in error


def visits(tmp_path, names, **options):
    for seed, name in enumerate(names):
        write_nifti(tmp_path, name, seed, newer=True)
    return opened(tmp_path, dict.fromkeys(names, "HGG"), **options)


def test_visits_of_one_person_are_one_patient_with_distinct_samples(tmp_path):
    names = ("BraTS-GLI-00001-000", "BraTS-GLI-00001-001", "BraTS-GLI-00002-000")
    source = visits(tmp_path, names)
    cohort = prepare(source, tmp_path / "c", size=(8, 8), workers=1)
    assert cohort.samples.groupby("patient")["source"].nunique().to_dict() == {"BraTS-GLI-00001": 2, "BraTS-GLI-00002": 1}
    assert cohort.samples["sample"].is_unique
    assert "1 persons have several scans" in told(source, "note")[0]
    apart = visits(tmp_path / "again", names, patient=r"([^/]+)$")
    assert [unit.patient for unit in apart.units()] == list(names)


def test_visits_with_different_grades_are_an_error(tmp_path):
    names = ("BraTS-GLI-00001-000", "BraTS-GLI-00001-001")
    for seed, name in enumerate(names):
        write_nifti(tmp_path, name, seed, newer=True)
    source = opened(tmp_path, dict(zip(names, ("HGG", "LGG"), strict=True)))
    assert any("different grades" in error for error in told(source))
    assert source.units() == []


def test_a_table_joins_the_names_of_several_releases(tmp_path):
    for seed, name in enumerate(("BraTS19_CBICA_AAB_1", "BraTS20_Training_001", "BraTS20_Training_002")):
        write_nifti(tmp_path, name, seed)
    (tmp_path / "name_mapping.csv").write_text(
        "Grade,BraTS_2019_subject_ID,BraTS_2020_subject_ID\nHGG,BraTS19_CBICA_AAB_1,BraTS20_Training_001\nLGG,NA,BraTS20_Training_002\n"
    )
    for kind in ("brats_nifti",):
        units = open_source(kind, tmp_path).units()
        assert [(unit.patient, unit.label, len(unit.files)) for unit in units] == [
            ("BraTS20_Training_002", "LGG", 5), ("BraTS_CBICA_AAB", "HGG", 10),
        ]  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), [({}, "brats2024"), ({"labels": "brats2024"}, "brats2024")])
def test_a_resection_cavity_is_no_tumour(tmp_path, options, expected):
    name = "BraTS-GLI-01000-100"
    write_nifti(tmp_path, name, 0, newer=True, segmentation=None)
    mask = make_case(0)[1]
    cavity = np.where(np.isin(mask, (1, 4)), 4, 0).astype(np.uint8)
    put(tmp_path / name / f"{name}-seg.nii.gz", cavity)
    source = opened(tmp_path, {name: "HGG"}, **options)
    assert source.settings()["labels"] == expected
    rows = source.read(source.units()[0], (8, 8)).rows
    assert {row["label"] for row in rows} == {"healthy"}
    assert not {row["slice"] for row in rows} & set(np.flatnonzero(cavity.any((0, 1))).tolist())


def test_labels_that_names_do_not_explain_are_a_question_for_the_whole_source(tmp_path):
    mask = make_case(0)[1]
    for name, found in (("mine1", mask), ("mine2", np.where(mask == 4, 3, mask).astype(np.uint8))):
        write_nifti(tmp_path, name, int(name[-1]), segmentation=None)
        put(tmp_path / name / f"{name}_seg.nii.gz", found)
    rows = {"mine1": "HGG", "mine2": "HGG"}
    assert any("both 3 and 4" in error for error in told(opened(tmp_path, rows)))
    source = opened(tmp_path, rows, labels="brats2024")
    assert told(source) == []
    first, second = (len([row for row in source.read(unit, (8, 8)).rows if row["label"] == "HGG"]) for unit in source.units())
    counts = [(np.isin(found, (1, 2, 3)).sum((0, 1)) >= 20).sum() for found in (mask, np.where(mask == 4, 3, mask))]
    assert [first, second] == counts


def test_grades_come_from_folders_and_disagreement_with_a_table_is_an_error(tmp_path):
    write_nifti(tmp_path / "raw" / "HGG", "Brats18_TCIA01_131_1", 0)
    write_nifti(tmp_path / "raw" / "LGG", "Brats18_TCIA09_141_1", 1)
    units = open_source("brats_nifti", tmp_path / "raw").units()
    assert [(unit.patient, unit.label) for unit in units] == [("BraTS_TCIA_131", "HGG"), ("BraTS_TCIA_141", "LGG")]
    source = open_source("brats_nifti", tmp_path / "raw", grades=table(tmp_path / "g.csv", {"Brats18_TCIA01_131_1": "LGG"}))
    assert ["lies in a folder HGG, but the table gives LGG" in error for error in told(source)] == [True]


LAYOUTS = {
    "bare": ("case_01/{}.nii.gz", "case_01/seg.nii.gz", CHANNELS, "case_01"),
    "ucsf": ("UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_{}.nii.gz", "UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_tumor_segmentation.nii.gz",
             ("FLAIR", "T1", "T1c", "T2"), "UCSF-PDGM-004"),
    "upenn": ("images_structural/UPENN-GBM-00001_11/UPENN-GBM-00001_11_{}.nii.gz", "images_segm/UPENN-GBM-00001_11_segm.nii.gz",
              ("FLAIR", "T1", "T1GD", "T2"), "UPENN-GBM-00001_11"),
    "flat": ("p7_{}.nii.gz", "p7_seg.nii.gz", CHANNELS, "p7"),
    "by modality": ("{0}/p7_{0}.nii.gz", "seg/p7_seg.nii.gz", CHANNELS, "p7"),
    "folders called like files": ("p7/p7_{}.nii/0057_brain.nii", "p7/p7_seg.nii/0057.nii", CHANNELS, "p7"),
    "visits": ("Patient-001/week-000-1/{}.nii.gz", "Patient-001/week-000-1/seg.nii.gz", ("FLAIR", "T1", "CT1", "T2"), "Patient-001"),
}  # fmt: skip


@pytest.mark.parametrize(("scan", "segmentation", "names", "patient"), LAYOUTS.values(), ids=LAYOUTS)
def test_other_layouts_are_read_as_brats_is(tmp_path, scan, segmentation, names, patient):
    images, mask = make_case(4)
    write_nifti(tmp_path / "plain", "a", 4)
    for channel, name in zip(CHANNELS, names, strict=True):
        put(tmp_path / "raw" / scan.format(name), images[channel])
    put(tmp_path / "raw" / segmentation, mask)
    (tmp_path / "raw" / "x" / "@eaDir").mkdir(parents=True)
    shutil.copytree(tmp_path / "plain", tmp_path / "raw" / ".ipynb_checkpoints")
    plain = opened(tmp_path / "plain", {"a": "LGG"})
    source = opened(tmp_path / "raw", {patient: "LGG"})
    assert told(source) == []
    [unit] = source.units()
    left, right = plain.read(plain.units()[0], (9, 9)), source.read(unit, (9, 9))
    assert [(row["slice"], row["label"]) for row in left.rows] == [(row["slice"], row["label"]) for row in right.rows]
    for channel in CHANNELS:
        np.testing.assert_array_equal(left.pixels[channel], right.pixels[channel])
    assert [skipped.count for skipped in source.skipped() if skipped.reason.startswith("hidden")] == [5]


@pytest.mark.parametrize("kind", ["nnU-Net", "Decathlon", "named by hand"])
def test_numbered_channels_and_fourth_axes_are_named_by_their_description(tmp_path, kind):
    images, mask = make_case(4)
    decathlon = np.select([mask == 1, mask == 2, mask == 4], [2, 1, 3], 0).astype(np.uint8)
    order = ("flair", "t1", "t1ce", "t2")
    if kind == "Decathlon":
        put(tmp_path / "imagesTr" / "BRATS_001.nii.gz", np.stack([images[channel] for channel in order], -1))
    else:
        for number, channel in enumerate(order):
            put(tmp_path / "imagesTr" / f"BRATS_001_{number:04d}.nii.gz", images[channel])
    put(tmp_path / "labelsTr" / "BRATS_001.nii.gz", decathlon)
    names = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    described = {"nnU-Net": {"channel_names": names, "labels": {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3],
                                                                "enhancing tumor": 3}},
                 "Decathlon": {"modality": names, "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor",
                                                             "3": "enhancing tumour"}}}  # fmt: skip
    options = {"channel_order": order, "labels": "msd"}
    if kind in described:
        assert "no dataset.json names them" in told(opened(tmp_path, {"BRATS_001": "HGG"}))[0]
        (tmp_path / "dataset.json").write_text(json.dumps(described[kind]))
        options = {}
    source = opened(tmp_path, {"BRATS_001": "HGG"}, rule="thesis", **options)
    assert told(source) == []
    assert source.settings()["labels"] == "msd"
    write_nifti(tmp_path / "plain", "a", 4)
    plain = opened(tmp_path / "plain", {"a": "HGG"}, rule="thesis")
    left, right = (one.read(one.units()[0], (9, 9)) for one in (plain, source))
    assert [(row["slice"], row["label"]) for row in left.rows] == [(row["slice"], row["label"]) for row in right.rows]
    for channel in CHANNELS:
        np.testing.assert_array_equal(left.pixels[channel], right.pixels[channel])


def test_a_segmentation_saved_through_scaled_bytes_is_rounded_and_said_so(tmp_path):
    folder = write_nifti(tmp_path, "a", 1, segmentation=None)
    write_nifti(tmp_path / "plain", "a", 1)
    image = nibabel.Nifti1Image(make_case(1)[1].astype(float), AS_BRATS)
    image.header.set_data_dtype(np.uint8)
    nibabel.save(image, folder / "a_seg.nii.gz")
    source, plain = opened(tmp_path, {"a": "HGG"}, exclude=["plain"]), opened(tmp_path / "plain", {"a": "HGG"})
    assert "saved as scaled numbers" in told(source, "note")[0]
    assert source.read(source.units()[0], (8, 8)).rows == plain.read(plain.units()[0], (8, 8)).rows


def test_new_patients_need_neither_segmentation_nor_grade(tmp_path):
    write_nifti(tmp_path, "new", 1, segmentation=None)
    assert [unit.patient for unit in open_source("brats_nifti", tmp_path).units()] == []
    source = open_source("brats_nifti", tmp_path, unlabelled=True, channels=["flair"])
    assert source.problems() == []
    [unit] = source.units()
    assert (unit.labelled, unit.label) == (False, "")
    found = source.read(unit, (8, 8))
    brain = (make_case(1)[0]["flair"] > 0).sum((0, 1))
    assert [row["slice"] for row in found.rows] == np.flatnonzero((brain > 0) & (brain >= 0.1 * brain.max())).tolist()
    assert {row["label"] for row in found.rows} == {""}


def test_a_volume_with_far_fewer_slices_is_a_warning_with_numbers(tmp_path):
    for seed, name in enumerate(("a", "b", "c")):
        write_nifti(tmp_path, name, seed)
        write_hdf5(tmp_path / "h5", seed + 1, seed)
    for file in (tmp_path / "c").iterdir():
        put(file, np.asarray(nibabel.load(file).dataobj)[..., :9])
    source = opened(tmp_path, dict.fromkeys("abc", "HGG"))
    assert "c has 9 axial slices; the source's median is 14" in told(source, "warning")[0]
    for number in range(9, 14):
        (tmp_path / "h5" / f"volume_3_slice_{number}.h5").unlink()
    grades = table(tmp_path / "h5" / "g.csv", {f"BraTS20_Training_00{n}": "HGG" for n in (1, 2, 3)})
    hdf5 = open_source("brats_hdf5", tmp_path / "h5", grades=grades, min_tumour_voxels=20)
    assert [problem.what for problem in hdf5.problems()] == ["5 of 14 slices are missing (9, 10, 11, 12, 13)"]
    assert len(hdf5.units()) == 3


@pytest.mark.parametrize("text", ["patient,grade\na,HGG,\n", "patient;grade\na;HGG\n", "\ufeffpatient,grade\r\na, hgg \r\n",
                                  "Patient ID , WHO CNS Grade\nA,4.0\n", "patient,grade\na,IV\n", 
                                  "ID\tGrade\na\tWHO grade IV\n"])  # fmt: skip
def test_tables_as_spreadsheets_save_them_are_read(tmp_path, text):
    write_nifti(tmp_path, "a", 1)
    (tmp_path / "g.csv").write_bytes(text.encode("utf-16" if "\t" in text else "utf-8"))
    assert [unit.label for unit in open_source("brats_nifti", tmp_path, grades=tmp_path / "g.csv").units()] == ["HGG"]


@pytest.mark.parametrize(
    ("row", "message"),
    [("a,III", "WHO grade 3"), ("a,NA", "grade empty"), ("b,HGG", "no row"), ("case_7,HGG", "differs only by zeros")],
)
def test_grades_that_are_in_doubt_are_asked_for(tmp_path, row, message):
    name = "case_007" if "case" in row else "a"
    write_nifti(tmp_path, name, 1)
    (tmp_path / "g.csv").write_text(f"patient,grade\n{row}\n")
    [error] = [p for p in open_source("brats_nifti", tmp_path, grades=tmp_path / "g.csv").problems() if p.level == "error"]
    assert message in error.what
    if "III" in row:
        chosen = open_source("brats_nifti", tmp_path, grades=tmp_path / "g.csv", grade_3="LGG")
        assert [unit.label for unit in chosen.units()] == ["LGG"]


def test_four_digits_at_the_end_are_a_case_where_there_is_no_channel_0000(tmp_path):
    for number in (1, 2):
        images, mask = make_case(number)
        put(tmp_path / "imagesTr" / f"glioma_{number:04d}.nii.gz", np.stack([images[channel] for channel in CHANNELS], -1))
        put(tmp_path / "labelsTr" / f"glioma_{number:04d}.nii.gz", mask)
    rows = {"glioma_0001": "HGG", "glioma_0002": "LGG"}
    source = opened(tmp_path, rows, channel_order=CHANNELS)
    assert told(source) == []
    assert {unit.patient: unit.label for unit in source.units()} == rows


def test_an_unlabelled_visit_of_a_labelled_person_is_left_out_and_named(tmp_path):
    write_nifti(tmp_path, "BraTS-GLI-00001-000", 1, newer=True)
    write_nifti(tmp_path, "BraTS-GLI-00001-001", 2, newer=True, segmentation=None)
    source = opened(tmp_path, {"BraTS-GLI-00001": "HGG"}, unlabelled=True)
    assert [(unit.patient, unit.labelled, len(unit.files)) for unit in source.units()] == [("BraTS-GLI-00001", True, 5)]
    assert any("BraTS-GLI-00001-001: not read: unlabelled" in note for note in told(source, "note"))
    with pytest.raises(ConfigError, match="mask=true needs segmentations"):
        opened(tmp_path, {}, unlabelled=True, mask=True)
