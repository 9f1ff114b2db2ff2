"""Inputs that once gave a wrong result without a word: each is done for real, and refused or told now."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import Silent, write_tiny
from raredistill import checkpoint
from raredistill.checkpoint import Promise
from raredistill.cohort.prepare import prepare
from raredistill.cohort.sources.registry import open_source
from raredistill.cohort.store import Cohort
from raredistill.cohort.verify import verify
from raredistill.errors import CheckpointError, DataError
from raredistill.files import fingerprint, read_json, seal, write_json
from raredistill.reports import write_report
from raredistill.reports.versus import versus
from raredistill.studies.study import run_study
from test_study import study

DROP, READ_ALL = 24, (1, 2)
"""prctl's PR_CAPBSET_DROP, and CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: what root has beyond an ordinary user."""


def images(root, names):
    """One small picture for each path."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 10 * number % 250, np.uint8)).save(path)
    return root


# Folders that cannot be read


def as_a_user(*arguments):
    """The command line, also for root without the right to read everything: a process that has given it up passes that on."""
    call = (
        f"import ctypes, os, sys; [ctypes.CDLL(None).prctl({DROP}, right) for right in {READ_ALL}]; os.execv(sys.executable, sys.argv[1:])"
    )
    program = [sys.executable, "-c", "from raredistill.cli import main; main()", *map(str, arguments)]
    return subprocess.run([sys.executable, "-c", call, *program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("mode", [0o000, 0o400], ids=["unreadable", "without entry"])
@pytest.mark.parametrize("hidden", ["a/p2", "b"], ids=["a patient", "a class"])
def test_a_folder_that_cannot_be_read_is_an_error_with_its_name(tmp_path, mode, hidden):
    root = images(tmp_path / "raw", [f"{label}/p{n}/{n}.png" for label in "ab" for n in range(3)])
    (root / hidden).chmod(mode)
    found = as_a_user("verify", "image_folder", root, "patient=folder", "--workers", "1")
    (root / hidden).chmod(0o755)
    assert found.returncode == 2
    assert hidden in found.stdout + found.stderr
    assert "Traceback" not in found.stderr
    whole = as_a_user("verify", "image_folder", root, "patient=folder", "--workers", "1")
    assert (whole.returncode, "3 usable patients" in whole.stdout, "; 0 errors" in whole.stdout) == (0, True, True), whole.stderr


@pytest.mark.parametrize(("kind", "file"), [("brats_nifti", "p1/p1_flair.nii"), ("brats_hdf5", "part/volume_1_slice_0.h5")])
def test_no_source_skips_a_folder_that_it_cannot_walk(tmp_path, kind, file, monkeypatch):
    path = tmp_path / file
    path.parent.mkdir()
    path.write_bytes(b"x")
    scandir = os.scandir  # as root every folder can be read, so the system's answer is given in its place

    def refusing(place):
        if Path(place) == path.parent:
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=rf"{path.parent}: cannot be read \(Permission denied\)"):
        open_source(kind, tmp_path)


# Another run's predictions


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    cohort = write_tiny(tmp_path_factory.mktemp("cohort") / "c")
    out = tmp_path_factory.mktemp("finished") / "s"
    training = {"epochs": 1, "batch_size": 16, "accelerator": "cpu"}
    run_study(study(cohort, [{"name": name, "model": "small_cnn"} for name in "ab"], training=training), out, Silent())
    return out


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "s")
    return tmp_path / "s"


def folders(out):
    return sorted(path for path in (out / "runs").iterdir() if path.is_dir())


def test_another_runs_predictions_are_refused_by_report_and_compare(copied):
    one, *_, other = folders(copied)
    shutil.copy(other / "predictions.parquet", one)
    with pytest.raises(DataError, match=r"predictions.parquet: missing, or its content does not match its hash"):
        write_report(copied)
    with pytest.raises(DataError, match="does not match its hash"):
        versus(one, other)
    record = read_json(one / "run.json")
    files = {**record["files"], "predictions.parquet": read_json(other / "run.json")["files"]["predictions.parquet"]}
    write_json(one / "run.json", seal({**{key: value for key, value in record.items() if key != "seal"}, "files": files}))
    for refused in (lambda: write_report(copied), lambda: versus(one / "predictions.parquet", other)):
        with pytest.raises(DataError, match=rf"contains predictions of the run '{other.name}', but its record is that of '{one.name}'"):
            refused()


def test_another_runs_whole_folder_is_refused(copied):
    one, *_, other = folders(copied)
    shutil.rmtree(one)
    shutil.copytree(other, one)
    with pytest.raises(DataError, match=r"run.json: its id.* differs from study.json"):
        write_report(copied)


def test_a_record_without_its_seal_is_refused(copied):
    path = folders(copied)[0] / "run.json"
    write_json(path, {key: value for key, value in read_json(path).items() if key != "seal"})
    with pytest.raises(DataError, match=r"run.json: its content does not match its hash"):
        write_report(copied)


# The description of a cohort


@pytest.fixture
def cohort(tmp_path):
    write_tiny(tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.parametrize("change", [{"background": "A"}, {"background": "zzz"}, {"provenance": None}, {"samples_file": ""}, {"more": 1}])
def test_any_edit_of_a_cohorts_description_is_noticed(cohort, change):
    write_json(cohort / "cohort.json", {**read_json(cohort / "cohort.json"), **change})
    with pytest.raises(DataError, match="does not match its hash, so it was changed after the cohort was made; prepare the cohort again"):
        Cohort.load(cohort)


def forged(cohort, **changes):
    """A description that someone has sealed anew after changing it."""
    content = {key: value for key, value in {**read_json(cohort / "cohort.json"), **changes}.items() if key != "seal"}
    content["hash"] = fingerprint({key: content[key] for key in ("classes", "channels", "size", "pixels", "samples")})
    write_json(cohort / "cohort.json", seal(content))


@pytest.mark.parametrize("channel", ["../secret", "/etc/passwd", "a/b", "..", "", "x\\y", "e\x1b[2J"])
def test_a_channel_cannot_leave_its_cohort_whatever_the_file_says(cohort, channel):
    forged(cohort, channels=[channel], pixels={channel: "0"})
    with pytest.raises(DataError, match=r"cannot be the name of a file|control character"):
        Cohort.load(cohort)


def test_pixels_that_are_a_link_out_of_the_cohort_are_refused(cohort, tmp_path):
    [pixels, *_] = sorted((cohort / "pixels").iterdir())
    pixels.rename(tmp_path / "elsewhere.u8")
    pixels.symlink_to(tmp_path / "elsewhere.u8")
    with pytest.raises(DataError, match="is a link out of the cohort"):
        Cohort.load(cohort)


def test_a_background_that_is_no_class_is_refused_even_when_sealed(cohort):
    forged(cohort, background="zzz")
    with pytest.raises(DataError, match="the background is not among the classes"):
        Cohort.load(cohort)


def test_a_cohort_of_the_version_before_is_refused_with_the_cure(cohort):
    forged(cohort, format=1)
    with pytest.raises(DataError, match="another version of raredistill; prepare the cohort again"):
        Cohort.load(cohort)


@pytest.mark.parametrize("name", ["../../out", "/etc", "..", "a/b"])
def test_a_run_cannot_leave_its_study_whatever_the_file_says(copied, name):
    description = read_json(copied / "study.json")
    description["runs"][0]["id"] = name
    write_json(copied / "study.json", description)
    with pytest.raises(DataError, match="cannot be the name of a file"):
        write_report(copied)


def test_a_run_that_is_a_link_out_of_its_study_is_refused(copied, tmp_path):
    folder = folders(copied)[0]
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="leads out of the study"):
        write_report(copied)


# Pixels that change while a study trains


class Vandal(Silent):
    """Overwrites pixels, in place and at the same length, when the second epoch of the study is over."""

    def __init__(self, cohort):
        super().__init__()
        self.path, self.epochs = next((cohort.root / "pixels").iterdir()), 0

    def epoch_done(self, run, record):
        self.epochs += 1
        if self.epochs == 2:
            with self.path.open("r+b") as file:
                file.write(b"\x01\x02\x03")


def test_pixels_overwritten_during_training_stop_the_study_and_cost_the_run(tmp_path):
    cohort = write_tiny(tmp_path / "c")
    before = next((cohort.root / "pixels").iterdir()).read_bytes()
    made = study(cohort, [{"name": "a", "model": "small_cnn"}], training={"epochs": 2, "batch_size": 16, "accelerator": "cpu"})
    vandal = Vandal(cohort)
    with pytest.raises(DataError, match=r"was changed after the cohort was made; prepare the cohort again\. The run .* has been discarded"):
        run_study(made, tmp_path / "s", vandal)
    assert folders(tmp_path / "s") == []  # neither finished, nor a state from which it could be gone on with
    vandal.path.write_bytes(before)
    assert {record.status for record in run_study(made, tmp_path / "s", Silent())} == {"done"}


# Priors


PROMISE = Promise("small_cnn", "linear", 0.0, ("a", "b"), ("x",), 16, (0.5,), (0.5,), (0.25, 0.75), ("p",), False, "")


@pytest.mark.parametrize(
    ("prior", "said"),
    [
        ([float("nan"), 1.0], "nan, which is not valid"), ([-0.5, 1.5], "not class shares"), ([0.5, 0.6], "add up to 1.1"),
        ([1.0], "1 values for 2 classes"), (["a", "b"], "'a', which is not valid"), ([float("inf"), 0], "inf, which is not valid"),
    ],
)  # fmt: skip
def test_a_prior_that_is_none_is_refused_on_its_way_in_and_out(tmp_path, prior, said):
    with pytest.raises(CheckpointError, match=said):
        replace(PROMISE, prior=tuple(prior))
    record = json.loads(json.dumps({**PROMISE.__dict__, "prior": prior}))
    checkpoint._write(tmp_path / "w.safetensors", {}, checkpoint._NETWORK, record)
    for read in (checkpoint.load, checkpoint.read_promise):
        with pytest.raises(CheckpointError, match=said):
            read(tmp_path / "w.safetensors")


# Spellings


def test_two_spellings_of_one_patient_are_an_error_not_two_patients(tmp_path):
    root = images(tmp_path / "raw", ["a/M\u00fcller/1.png", "a/Mu\u0308ller/2.png", "b/x/1.png"])
    source = open_source("image_folder", root, patient="folder")
    told = [problem for problem in verify(source, workers=1) if problem.level == "error"]
    assert ["not composed (Unicode NFC)" in problem.what for problem in told] == [True]
    with pytest.raises(DataError, match="not composed"):
        prepare(source, tmp_path / "c", size=(8, 8), workers=1)
    assert not (tmp_path / "c").exists()
