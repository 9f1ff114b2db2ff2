"""Names to persons: known schemes, patterns, joined names, and ids that a spreadsheet changed."""

import re

import pytest

from raredistill.cohort.identity import apply_pattern, compile_pattern, join_rows, person_of, refuse_ambiguous_ids
from raredistill.cohort.sources.walk import Skips, files_below
from raredistill.errors import ConfigError, DataError

SAME = [
    ("BraTS-GLI-00001-000", "BraTS-GLI-00001-001"),
    ("BraTS-MET-00086-000", "BraTS-MET-00086-002"),
    ("BraTS-PED-00001-000", "BraTS-PED-00001"),
    ("BraTS-SSA-00002-000", "BraTS-SSA-00002-001"),
    ("BraTS-MEN-RT-0001-1", "BraTS-MEN-RT-0001-2"),
    ("BraTS-GoAT-00012-000", "BraTS-GoAT-00012"),
    ("UCSF-PDGM-0429_nifti", "UCSF-PDGM-0429_FU001d_nifti", "UCSF-PDGM-429"),
    ("0998a", "0998b"),
    ("BraTS2021_00998a", "BraTS2021_00998b"),
    ("UPENN-GBM-00001_11", "UPENN-GBM-00001_21"),
    ("UCSD-PTGBM-0002_01", "UCSD-PTGBM-0002_02"),
    ("TCGA-02-0006_1996.08.23", "TCGA-02-0006-01", "TCGA-02-0006"),
    ("W39_1998.09.19", "W39_1999.01.02"),
    ("sub-01_ses-1_run-2", "sub-01_ses-2", "sub-01"),
    ("Patient-001_week-000-1", "Patient-001_week-044"),
    ("PatientID_0003_Timepoint_1", "PatientID_0003_Timepoint_5"),
    ("BraTSReg_001_00_0000", "BraTSReg_001_01_0106"),
    ("Brats17_TCIA_425_1", "Brats18_TCIA01_425_1", "BraTS19_TCIA01_425_1", "BraTS19_TCIA01_425_2"),
    ("P0001_20200203", "P0001_2021-03-04"),
]


@pytest.mark.parametrize("names", SAME)
def test_scans_of_one_person_are_one_person(names):
    assert len({person_of(name) for name in names}) == 1


def test_different_persons_stay_different():
    persons = [names[0] for names in SAME] + ["BraTS20_Training_001", "BraTS20_Training_002", "case_1", "case_2", "lena_3", "BRATS_001"]
    persons += ["BraTS-GLI-00002-000", "UCSF-PDGM-0428", "TCGA-02-0007", "BraTS19_TCIA02_426_1", "BraTS2021_00001", "a", "b"]
    assert len({person_of(name) for name in persons}) == len(persons)


@pytest.mark.parametrize("name", ["BraTS20_Training_001", "case_01", "BRATS_001", "lena_3", "P7", "image (1)", "", "week", "visit_1"])
def test_a_name_of_no_known_scheme_stays(name):
    assert person_of(name) == name


def test_a_pattern_gives_its_group_or_all_that_it_matches():
    assert apply_pattern(compile_pattern(r"p(\d+)_"), "p12_x.png") == "12"
    assert apply_pattern(compile_pattern(r"(x)?(?P<patient>p\d+)"), "p12_x.png") == "p12"
    assert apply_pattern(compile_pattern(r"p\d+"), "site/p12_x.png") == "p12"
    assert apply_pattern(compile_pattern(r"q\d+"), "p12") is None
    with pytest.raises(ConfigError, match="not a regular expression"):
        compile_pattern("p(")


def test_rows_that_share_a_name_are_one_person():
    joined = join_rows([("a17", "a18"), ("b18", "b19"), ("a18", "a20"), ("c",)])
    assert joined["a17"] == joined["a18"] == joined["a20"] == "a17"
    assert joined["b18"] == joined["b19"] != joined["a17"]
    assert joined["c"] == "c"


@pytest.mark.parametrize("ids", [("7", "007"), ("7", "7.0"), ("P01", "p1"), ("site1_007", "site1_7"), ("x", "x ")])
def test_ids_that_differ_by_zeros_or_spelling_only_are_refused_with_both(ids):
    with pytest.raises(DataError, match=rf"t\.csv.*{re.escape(repr(sorted(ids)[0]))}.*write one patient one way"):
        refuse_ambiguous_ids((*ids, "other"), "t.csv")


def test_ids_that_differ_otherwise_are_no_matter():
    refuse_ambiguous_ids(["7", "70", "700", "1.5", "1.05x", "10", "100.5", "7"], "t.csv")


def test_hidden_and_system_files_are_never_taken_and_all_is_counted(tmp_path):
    names = ("a.nii", ".a.nii", "x/b.nii", "x/.ipynb_checkpoints/b.nii", "x/@eaDir/b.nii", "__MACOSX/y/b.nii", "x/Thumbs.db", "m/c.nii")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    skips = Skips()
    taken = files_below(tmp_path, skips, include=["*.nii"], exclude=["m"])
    assert [file.relative_to(tmp_path).as_posix() for file in taken] == ["a.nii", "x/b.nii"]
    assert {skipped.reason.split()[0]: skipped.count for skipped in skips.listed()} == {"hidden": 5, "matched": 1}
    assert len(taken) + sum(skipped.count for skipped in skips.listed()) == len(names)
