"""Damaged and hostile NIfTI cases: each is told by ``verify``, refused by ``prepare``, and left out with its name on request."""

import gzip
import os
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest

from raredistill.cohort.prepare import prepare
from raredistill.cohort.sources.nifti import decode
from raredistill.cohort.sources.registry import open_source
from raredistill.cohort.store import Cohort
from raredistill.cohort.verify import verify
from raredistill.errors import DataError

SHAPE = (16, 14, 6)
ROLES = ("flair", "t1", "t1ce", "t2")
BAD = "BraTS20_Training_002"
GOOD = ("BraTS20_Training_001", "BraTS20_Training_003")
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_case(folder, seed):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    brain = np.zeros(SHAPE, bool)
    brain[3:13, 3:11] = True
    mask = np.zeros(SHAPE, np.uint8)
    mask[5:9, 5:9, 2:5] = rng.choice([1, 2, 4], (4, 4, 3))
    for role in ROLES:
        save(folder / f"{folder.name}_{role}.nii.gz", np.where(brain, rng.integers(50, 900, SHAPE), 0).astype(np.int16))
    save(folder / f"{folder.name}_seg.nii.gz", mask)


def save(path, volume, affine=AFFINE):
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)


def volume_of(path):
    return np.asarray(nibabel.load(path).dataobj)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "raw"
    for seed, name in enumerate((*GOOD, BAD)):
        write_case(folder / name, seed)
    (folder / "name_mapping.csv").write_text(
        "Grade,BraTS_2020_subject_ID\n"
        + "".join(f"{grade},{name}\n" for grade, name in zip(("HGG", "LGG", "HGG"), (*GOOD, BAD), strict=True))
    )
    return folder


def source(root):
    return open_source("brats_nifti", root, min_tumour_voxels=2)


def rewrite(role, change):
    def damage(folder):
        file = folder / f"{BAD}_{role}.nii.gz"
        file.write_bytes(change(file.read_bytes()))

    return damage


def replace(role, change, affine=AFFINE):
    def damage(folder):
        file = folder / f"{BAD}_{role}.nii.gz"
        save(file, change(volume_of(file)), affine)

    return damage


def flip(position):
    def change(raw):
        place = position if position >= 0 else len(raw) + position
        return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]

    return change


def header(offset, layout, *values):
    def change(raw):
        plain = bytearray(gzip.decompress(raw))
        struct.pack_into(layout, plain, offset, *values)
        return gzip.compress(bytes(plain))

    return change


def stored_with_another_pixel(raw):
    """A byte that changes a voxel and not the stream: what nibabel reads without a word. Only the check sum can tell."""
    stored = gzip.compress(gzip.decompress(raw), compresslevel=0)
    return flip(len(stored) // 2)(stored)


def poke(value, dtype=np.float32):
    def change(volume):
        changed = volume.astype(dtype)
        changed[8, 8, 3] = value
        return changed

    return change


def drop_t1(folder):
    (folder / f"{BAD}_t1.nii.gz").unlink()


def second_folder(folder):
    shutil.copytree(folder, folder.parent / "again" / BAD)


def second_file(folder):
    shutil.copy(folder / f"{BAD}_t1.nii.gz", folder / f"{BAD}_old_t1.nii.gz")


def link_outside(folder):
    outside = folder.parent.parent / "elsewhere.nii.gz"
    shutil.move(folder / f"{BAD}_t2.nii.gz", outside)
    (folder / f"{BAD}_t2.nii.gz").symlink_to(outside)


def unreadable(folder):
    (folder / f"{BAD}_t2.nii.gz").unlink()
    (folder / f"{BAD}_t2.nii.gz").mkdir()


def regrade(grade):
    def damage(folder):
        table = folder.parent / "name_mapping.csv"
        table.write_text(table.read_text().replace(f"HGG,{BAD}\n", grade))

    return damage


FAULTS = {
    "cut in half": (rewrite("t1", lambda raw: raw[: len(raw) // 2]), "cut short|too early"),
    "trailer cut off": (rewrite("t1", lambda raw: raw[:-8]), "cut short"),
    "flipped byte in the data": (rewrite("t1ce", stored_with_another_pixel), "damaged gzip data"),
    "flipped byte in the check sum": (rewrite("t1ce", flip(-8)), "damaged gzip data"),
    "flipped byte in the length": (rewrite("t1ce", flip(-4)), "damaged gzip data"),
    "empty file": (rewrite("flair", lambda raw: b""), "ends after 0 bytes"),
    "HTML": (rewrite("flair", lambda raw: b"<!DOCTYPE html><html><body>Please log in</body></html>" * 9), "is a web page"),
    "LFS pointer": (
        rewrite("flair", lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"),
        "Git-LFS pointer",
    ),
    "header of 30,000 x 30,000": (rewrite("t2", header(40, "<8h", 3, 30000, 30000, 6, 1, 1, 1, 1)), "at most 536870912 voxels"),
    "header longer than the data": (rewrite("t2", header(40, "<8h", 3, 400, 400, 400, 1, 1, 1, 1)), "too early"),
    "negative extent": (rewrite("t2", header(40, "<8h", 3, -16, 14, 6, 1, 1, 1, 1)), "three axes"),
    "unknown voxel type": (rewrite("t2", header(70, "<h", 9999)), "unknown type 9999"),
    "data that start nowhere": (rewrite("t1", header(108, "<f", float("nan"))), "at byte -1"),
    "data that start past all bounds": (rewrite("t1", header(108, "<f", float("inf"))), "at byte"),
    "NaN": (replace("t1", poke(np.nan)), "not finite"),
    "infinity": (replace("t1", poke(np.inf)), "not finite"),
    "scale without an end": (rewrite("t1", header(112, "<2f", 2, float("inf"))), "scale"),
    "text": (rewrite("flair", lambda raw: b"not found\n" * 99), "is no NIfTI file"),
    "constant": (replace("t1", lambda volume: np.full_like(volume, 7)), "constant"),
    "inverted": (replace("t1", lambda volume: (1000 - volume).astype(np.int16)), "bright and dark are exchanged"),
    "another shape": (replace("t1", lambda volume: volume[:, :, :-1]), "disagree in shape"),
    "another affine": (replace("t1", lambda volume: volume, np.diag([-1.0, -1.0, 2.0, 1.0])), r"5\.0 mm away"),
    "affine of NaN": (rewrite("t1", header(280, "<f", float("nan"))), "leads out of any scanner"),
    "affine out of the world": (rewrite("t1", header(280, "<f", 1e38)), "leads out of any scanner"),
    "another origin": (replace("seg", lambda volume: volume, AFFINE + np.eye(4)[[0]].T @ np.eye(4)[[3]] * 3), r"3\.0 mm away"),
    "four dimensions": (replace("t1", lambda volume: np.stack([volume, volume], -1)), "three axes"),
    "unknown label": (replace("seg", poke(7, np.uint8)), r"label\(s\).*7"),
    "labels 3 and 4 at once": (replace("seg", poke(3, np.uint8)), r"label\(s\).*3, 4"),
    "label 65537, which 16 bits call 1": (replace("seg", poke(65537)), "65537"),
    "fractions in the segmentation": (replace("seg", poke(0.5)), "fractions"),
    "NaN in the segmentation": (replace("seg", poke(np.nan)), "fractions or no numbers"),
    "missing modality": (drop_t1, "no t1 file"),
    "folder in place of a file": (unreadable, "no t2 file"),
    "duplicate patient": (second_folder, "2 folders of this name"),
    "two files of one modality": (second_file, "claim to be the same modality"),
    "link out of the source": (link_outside, "outside the source"),
    "grade unknown": (regrade(f"GBM,{BAD}\n"), "unknown grade 'GBM'"),
    "no grade": (regrade(""), "no row for the patient"),
    "two grades": (regrade(f"HGG,{BAD}\nLGG,{BAD}\n"), "two grades"),
}


@pytest.mark.parametrize(("damage", "said"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_patient_is_told_refused_and_left_out_by_name(root, tmp_path, damage, said):
    damage(root / BAD)
    errors = [problem for problem in verify(source(root), workers=1) if problem.level == "error"]
    assert {problem.patient for problem in errors} == {BAD}
    assert all(problem.cure for problem in errors)
    with pytest.raises(DataError, match=said):
        prepare(source(root), tmp_path / "strict", size=(8, 8), workers=1)
    assert not (tmp_path / "strict" / "cohort.json").exists()
    cohort = prepare(source(root), tmp_path / "cohort", size=(8, 8), workers=1, leave_out_bad=True)
    assert set(cohort.samples["patient"]) == set(GOOD)
    assert {problem["patient"] for problem in Cohort.load(tmp_path / "cohort").provenance["left_out"]} == {BAD}


def test_the_other_patients_are_what_they_are_without_the_bad_one(root, tmp_path):
    shutil.copytree(root, tmp_path / "clean", ignore=lambda folder, names: [BAD] if BAD in names else [])
    FAULTS["cut in half"][0](root / BAD)
    kept = prepare(source(root), tmp_path / "a", size=(8, 8), workers=1, leave_out_bad=True)
    alone = prepare(source(tmp_path / "clean"), tmp_path / "b", size=(8, 8), workers=1)
    assert kept.hash == alone.hash


def test_many_faults_are_told_at_once(root):
    FAULTS["cut in half"][0](root / BAD)
    FAULTS["unknown label"][0](root / BAD)
    rewritten = root / GOOD[0] / f"{GOOD[0]}_t2.nii.gz"
    rewritten.write_bytes(b"")
    told = [(problem.patient, problem.what) for problem in verify(source(root), workers=1)]
    assert [patient for patient, _ in told] == sorted((GOOD[0], BAD))
    assert "t2.nii.gz: ends after 0 bytes" in told[0][1]


def test_nibabel_itself_is_silent_about_a_flipped_byte(root):
    file = root / BAD / f"{BAD}_t1.nii.gz"
    before = volume_of(file).copy()
    file.write_bytes(stored_with_another_pixel(file.read_bytes()))
    after = np.frombuffer(gzip_without_check(file.read_bytes())[352:], np.int16).reshape(SHAPE, order="F")
    assert (after != before).sum() == 1  # the fault is real: one voxel differs
    with pytest.raises(DataError, match="damaged gzip data"):
        decode(file.read_bytes(), file)


def gzip_without_check(raw):
    return zlib.decompressobj(-15).decompress(raw[10:])


@pytest.mark.parametrize("name", ["header of 30,000 x 30,000", "header longer than the data"])
def test_a_header_that_promises_128_mib_and_more_does_not_get_them(root, name):
    FAULTS[name][0](root / BAD)
    file = root / BAD / f"{BAD}_t2.nii.gz"
    tracemalloc.start()
    with pytest.raises(DataError):
        decode(file.read_bytes(), file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25


def test_a_gzip_that_was_unpacked_but_kept_its_name_is_read_by_what_it_holds(root, tmp_path):
    before = prepare(source(root), tmp_path / "zipped", size=(8, 8), workers=1)
    file = root / BAD / f"{BAD}_t1.nii.gz"
    file.write_bytes(gzip.decompress(file.read_bytes()))
    assert prepare(source(root), tmp_path / "plain", size=(8, 8), workers=1).hash == before.hash


def test_spaces_and_any_script_in_paths_are_ordinary(root, tmp_path):
    before = prepare(source(root), tmp_path / "plain", size=(8, 8), workers=1)
    moved = tmp_path / "Ärzte und 患者 – copy (1)"
    shutil.copytree(root, moved)
    assert prepare(source(moved), tmp_path / "出力 2", size=(8, 8), workers=1).hash == before.hash


def test_the_folder_above_an_archive_will_do_as_well(root, tmp_path):
    before = prepare(source(root), tmp_path / "a", size=(8, 8), workers=1)
    shutil.move(root, tmp_path / "archive" / "MICCAI_BraTS2020_TrainingData")
    assert prepare(source(tmp_path / "archive"), tmp_path / "b", size=(8, 8), workers=1).hash == before.hash


def test_files_of_all_cases_in_one_folder_are_read_as_if_each_had_its_own(root, tmp_path):
    before = prepare(source(root), tmp_path / "a", size=(8, 8), workers=1)
    for name in (BAD, *GOOD):
        for file in (root / name).iterdir():
            shutil.move(file, root / file.name)
    assert prepare(source(root), tmp_path / "b", size=(8, 8), workers=1).hash == before.hash


def test_what_macos_leaves_beside_every_file_is_ignored(root, tmp_path):
    before = prepare(source(root), tmp_path / "a", size=(8, 8), workers=1)
    (root / BAD / f"._{BAD}_flair.nii.gz").write_bytes(b"\0\5\x16\7" * 40)
    assert source(root).problems() == []
    assert prepare(source(root), tmp_path / "b", size=(8, 8), workers=1).hash == before.hash


def test_a_copy_under_the_right_name_wins_over_the_misnamed_segmentation_of_case_355(root):
    shutil.copy(root / BAD / f"{BAD}_seg.nii.gz", root / BAD / "W39_1998.09.19_Segm.nii")
    [unit] = [unit for unit in source(root).units() if unit.patient == BAD]
    assert unit.files[-1].name == f"{BAD}_seg.nii.gz"
    assert source(root).problems() == []


def test_a_table_that_lists_a_case_twice_alike_is_no_fault(root):
    regrade(f"HGG,{BAD}\nHGG,{BAD}\n")(root / BAD)
    assert source(root).problems() == []


def test_a_link_inside_the_source_is_followed(root):
    file = root / BAD / f"{BAD}_t2.nii.gz"
    kept = root / "store.bin"
    shutil.move(file, kept)
    os.symlink(os.path.relpath(kept, file.parent), file)
    assert verify(source(root), workers=1) == []


def test_a_patient_whose_name_is_a_formula_or_html_stays_a_name(root, tmp_path):
    names = ("=cmd|' C'!A0", "<script>alert(1)<b>")
    for old, new in zip(GOOD, names, strict=True):
        (root / old).rename(root / new)
    table = "patient,grade\n" + "".join(f'"{name}",{grade}\n' for name, grade in zip((*names, BAD), ("HGG", "LGG", "HGG"), strict=True))
    (tmp_path / "grades.csv").write_text(table)
    found = prepare(
        open_source("brats_nifti", root, min_tumour_voxels=2, grades=tmp_path / "grades.csv"), tmp_path / "c", size=(8, 8), workers=1
    )
    assert set(found.samples["patient"]) == {*names, BAD}


@pytest.mark.parametrize("axes", [2**63 - 1, -(2**63), 8, 0])
def test_a_header_with_axes_that_the_format_does_not_have_is_refused(axes):
    image = nibabel.Nifti2Image(np.ones((4, 4, 4), np.uint8), np.eye(4)).to_bytes()
    assert struct.unpack("<q", image[16:24]) == (3,)  # dim[0], by the NIfTI-2 standard
    with pytest.raises(DataError, match="three axes"):
        decode(image[:16] + struct.pack("<q", axes) + image[24:], Path("a.nii"))
