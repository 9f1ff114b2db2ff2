"""DICOM series: order, orientation, rescale and photometry against the volumes that they were made of; identifiers stay behind."""

import json

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from raredistill.cohort.prepare import prepare
from raredistill.cohort.sources.registry import open_source
from raredistill.cohort.verify import verify
from raredistill.errors import ConfigError, DataError
from test_brats import make_case

AXIAL = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
SAGITTAL = ((0, 1, 0), (0, 0, -1), (1, 0, 0))
"""Directions of columns, rows and slices, in DICOM's world: left, back, head."""
SECRETS = ("DOE^JANE", "MRN-0815", "19610203", "Dr. House")


def write_series(
    folder, volume, *, patient="MRN-0815", study="1.2.3", description="AX FLAIR", axes=AXIAL, change=lambda head: None, skip=()
):
    """Write a volume of axes (left, back, head) as the pictures of a series, under names in no order."""
    folder.mkdir(parents=True, exist_ok=True)
    series = generate_uid(entropy_srcs=[str(folder), description, patient])
    moved = [int(np.flatnonzero(direction)[0]) for direction in axes]
    stack = np.transpose(volume, moved)
    flips = [sum(direction) < 0 for direction in axes]
    stack = stack[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    start = np.array([volume.shape[axis] - 1 if flip else 0 for axis, flip in zip(moved, flips, strict=True)])
    origin = np.zeros(3)
    origin[moved] = start
    for number in range(stack.shape[2]):
        if number in skip:
            continue
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.4"
        meta.MediaStorageSOPInstanceUID = f"{series[:50]}.{number + 1}"
        head = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        head.SOPClassUID, head.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        head.PatientName, head.PatientID, head.PatientBirthDate, head.ReferringPhysicianName = "DOE^JANE", patient, "19610203", "Dr. House"
        head.StudyInstanceUID, head.SeriesInstanceUID, head.SeriesDescription, head.Modality = study, series, description, "MR"
        plane = np.ascontiguousarray(stack[:, :, number].T.astype(np.uint16))
        head.Rows, head.Columns = plane.shape
        head.SamplesPerPixel, head.PhotometricInterpretation, head.PixelRepresentation = 1, "MONOCHROME2", 0
        head.BitsAllocated, head.BitsStored, head.HighBit = 16, 12, 11
        head.ImagePositionPatient = [float(value) for value in origin + number * np.array(axes[2])]
        head.ImageOrientationPatient = [float(value) for value in (*axes[0], *axes[1])]
        head.PixelSpacing, head.PixelData = [1.0, 1.0], plane.tobytes()
        change(head)
        head.save_as(folder / f"IM{(number * 5) % stack.shape[2]:04d}", enforce_file_format=True)


def grades(tmp_path, rows):
    path = tmp_path / "grades.csv"
    path.write_text("patient,grade\n" + "".join(f"{name},{grade}\n" for name, grade in rows.items()))
    return path


def wide(volume):
    """``(first axis, second axis, third axis)`` int: above zero inside the brain only."""
    return np.where(volume > 0, volume, 0).astype(int)


def told(source, level="error"):
    return [problem.what for problem in verify(source, workers=1) if problem.level == level]


def read(source, size=(22, 26)):
    [unit] = source.units()
    return source.read(unit, size)


@pytest.mark.parametrize("axes", [AXIAL, SAGITTAL])
def test_slices_are_sorted_by_place_and_turned_by_orientation(tmp_path, axes):
    flair = wide(make_case(1)[0]["flair"])
    write_series(tmp_path / "dcm", flair, axes=axes)
    found = read(open_source("dicom", tmp_path / "dcm", grades=grades(tmp_path, {"MRN-0815": "HGG"})))
    brain = (flair > 0).sum((0, 1))
    kept = np.flatnonzero((brain > 0) & (brain >= 0.1 * brain.max()))
    assert [row["slice"] for row in found.rows] == kept.tolist()
    values = np.sort(flair[flair > 0])
    low, high = values[int(0.01 * (values.size - 1))], values[int(np.ceil(0.99 * (values.size - 1)))]
    expected = np.floor(np.clip((flair - low) / (high - low), 0, 1) * 255 + 0.5)
    assert np.abs(found.pixels["flair"].astype(int) - expected.T[kept]).max() <= 1
    assert {row["label"] for row in found.rows} == {"HGG"}


def test_rescale_and_inverted_photometry_change_nothing(tmp_path):
    flair = wide(make_case(1)[0]["flair"])

    def change(head):
        head.RescaleSlope, head.RescaleIntercept, head.PhotometricInterpretation = 2, -100, "MONOCHROME1"

    write_series(tmp_path / "a", flair)
    write_series(tmp_path / "b", 4095 - flair, change=change)
    table = grades(tmp_path, {"MRN-0815": "LGG"})
    plain, inverted = (read(open_source("dicom", tmp_path / name, grades=table)) for name in "ab")
    assert np.abs(plain.pixels["flair"].astype(int) - inverted.pixels["flair"]).max() <= 1


def test_the_files_own_window_is_used_if_asked_for(tmp_path):
    flair = wide(make_case(1)[0]["flair"])

    def change(head):
        head.WindowCenter, head.WindowWidth = 400, 200

    write_series(tmp_path / "a", flair, change=change)
    found = read(open_source("dicom", tmp_path / "a", window="dicom", grades=grades(tmp_path, {"MRN-0815": "LGG"})))
    expected = np.floor(np.clip((flair - 300) / 200, 0, 1) * 255 + 0.5).T[[row["slice"] for row in found.rows]]
    assert np.abs(found.pixels["flair"].astype(int) - expected).max() <= 1


def test_no_identifying_tag_reaches_the_cohort_or_a_message(tmp_path):
    for number in (1, 2):
        write_series(tmp_path / "dcm" / str(number), wide(make_case(number)[0]["flair"]), patient=f"MRN-0815-{number}", study=f"1.{number}")
    (tmp_path / "dcm" / "report.txt").write_text("no picture")
    table = grades(tmp_path, {"MRN-0815-1": "HGG", "MRN-0815-2": "LGG"})
    source = open_source("dicom", tmp_path / "dcm", grades=table)
    cohort = prepare(source, tmp_path / "c", size=(16, 16), workers=1)
    assert sorted(cohort.samples.groupby("patient")["label"].unique().map(list)) == [["HGG"], ["LGG"]]
    kept = (tmp_path / "c" / "cohort.json").read_text() + cohort.samples.to_csv() + json.dumps(source.settings())
    ungraded = open_source("dicom", tmp_path / "dcm", grades=grades(tmp_path, {"MRN-815-1": "HGG"}))
    kept += " ".join(told(ungraded)) + "".join(f"{p.patient} {p.file}" for p in ungraded.problems())
    assert not [secret for secret in (*SECRETS, "MRN") if secret in kept]
    assert [(skipped.reason, skipped.count) for skipped in source.skipped()] == [("not a DICOM file", 1)]


def test_a_missing_slice_is_a_warning_and_several_candidates_are_a_question(tmp_path):
    images = {name: wide(volume) for name, volume in make_case(1)[0].items()}
    table = grades(tmp_path, {"MRN-0815": "HGG"})
    write_series(tmp_path / "a" / "1", images["flair"], skip=(6,))
    assert "1 slices are missing between the 13 of flair" in told(open_source("dicom", tmp_path / "a", grades=table), "warning")[0]
    write_series(tmp_path / "a" / "2", images["t2"], description="COR FLAIR fs")
    assert "2 series may be flair" in told(open_source("dicom", tmp_path / "a", grades=table))[0]
    chosen = open_source("dicom", tmp_path / "a", grades=table, series="flair:cor*")
    assert told(chosen) == []
    assert sum(skipped.count for skipped in chosen.skipped()) == 13
    with pytest.raises(ConfigError, match="CHANNEL:DESCRIPTION"):
        open_source("dicom", tmp_path / "a", series="flair")


def test_channels_are_told_by_their_description_and_must_share_a_grid(tmp_path):
    images = {name: wide(volume) for name, volume in make_case(1)[0].items()}
    names = {"flair": "AX T2 FLAIR", "t1": "AX T1", "t1ce": "AX T1 POST GAD", "t2": "AX T2 TSE"}
    for channel, description in names.items():
        write_series(tmp_path / "a" / channel, images[channel], description=description)
    table = grades(tmp_path, {"MRN-0815": "HGG"})
    source = open_source("dicom", tmp_path / "a", channels=list(names), grades=table)
    found = read(source)
    alone = read(open_source("dicom", tmp_path / "a", channels=["t1ce"], grades=table))
    assert tuple(found.pixels) == tuple(names)
    np.testing.assert_array_equal(found.pixels["t1ce"], alone.pixels["t1ce"])
    write_series(tmp_path / "a" / "t2", images["t2"][:, :, ::2][:, :, :5], description="AX T2 TSE")
    for file in sorted((tmp_path / "a" / "t2").iterdir())[5:]:
        file.unlink()
    with pytest.raises(DataError, match=r"another grid"):
        read(open_source("dicom", tmp_path / "a", channels=list(names), grades=table))


def test_slices_take_the_labels_of_a_table_or_none(tmp_path):
    flair = wide(make_case(1)[0]["flair"])
    write_series(tmp_path / "a", flair)
    uids = {pydicom.dcmread(file).ImagePositionPatient[2]: pydicom.dcmread(file).SOPInstanceUID for file in (tmp_path / "a").iterdir()}
    (tmp_path / "s.csv").write_text("slice,label\n" + f"{uids[6]},tumour\n{uids[7]},healthy\n")
    source = open_source("dicom", tmp_path / "a", slice_labels=tmp_path / "s.csv")
    assert source.classes() == ("healthy", "tumour")
    found = read(source)
    assert [(row["slice"], row["label"]) for row in found.rows] == [(6, "tumour"), (7, "healthy")]
    assert len(found.pixels["flair"]) == 2
    new = open_source("dicom", tmp_path / "a", unlabelled=True)
    assert [(unit.labelled, unit.label) for unit in new.units()] == [(False, "")]
    assert {row["label"] for row in read(new).rows} == {""}


def test_a_head_in_noise_is_told_from_the_air(tmp_path):
    rng = np.random.default_rng(0)
    grid = np.indices((40, 44, 12)) - np.array([20, 22, 6]).reshape(3, 1, 1, 1)
    head = (grid[0] / 14) ** 2 + (grid[1] / 16) ** 2 < 1
    volume = np.where(head, rng.integers(300, 900, head.shape), rng.integers(0, 25, head.shape))
    write_series(tmp_path / "a", volume)
    found = read(open_source("dicom", tmp_path / "a", patient=r"^[^/]+", unlabelled=True), (44, 40))
    shown = np.stack([head[:, :, row["slice"]].T for row in found.rows])
    assert np.mean(found.pixels["flair"][~shown] == 0) == 1
    assert np.mean(found.pixels["flair"][shown] > 0) > 0.95
