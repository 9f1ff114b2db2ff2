"""Bombs, animations, commas, little memory and planted links: tried for real."""

import resource
import subprocess
import sys
import time
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from raredistill import predictions
from raredistill.cohort.sources.images import Decoder
from raredistill.cohort.sources.nifti import decode
from raredistill.errors import DataError
from raredistill.files import atomic


def test_a_gzip_bomb_behind_the_voxels_is_refused_at_once():
    squeezed = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [squeezed.compress(nibabel.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)).to_bytes())]
    parts += [squeezed.compress(bytes(2**24)) for _ in range(20)]
    raw = b"".join([*parts, squeezed.flush()])
    assert len(raw) < 400_000
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(DataError, match="more than 16777216 bytes follow its voxels"):
        decode(raw, Path("x.nii.gz"))
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_several_images_in_one_file_are_refused_not_cut_to_the_first(tmp_path, name):
    first, second = (Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (1, 200))
    first.save(tmp_path / name, save_all=True, append_images=[second])
    with pytest.raises(DataError, match=r"holds 2 (pages|frames); .*save one image a file"):
        Decoder("grey", None).read(tmp_path / name, (8, 8))


def test_a_comma_as_decimal_mark_is_told(tmp_path):
    (tmp_path / "t.csv").write_text('label,patient,p_a,p_b\na,x,"0,5","0,5"\nb,y,"0,5","0,5"\n')
    with pytest.raises(DataError, match=r"are not numbers with decimal points .*'0,5'"):
        predictions.read(tmp_path / "t.csv")


@pytest.mark.slow
def test_a_csv_of_a_million_rows_is_read(tmp_path):
    patient = np.arange(1_000_000) // 10
    table = {"label": np.where(patient % 3 == 0, "a", "b"), "patient": patient, "p_a": 0.25, "p_b": 0.75}
    pd.DataFrame(table).to_csv(tmp_path / "t.csv", index=False)
    assert len(predictions.read(tmp_path / "t.csv").table) == 1_000_000


@pytest.mark.parametrize("arguments", [["methods"], ["inspect", "nowhere"]])
def test_little_address_space_is_one_message(tmp_path, arguments):
    program = "import resource; resource.setrlimit(resource.RLIMIT_AS, (400 * 2**20,) * 2); from raredistill.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("raredistill: ")


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    with atomic(tmp_path / "a.json") as temporary:
        temporary.touch()
    planted = temporary
    planted.symlink_to(tmp_path / "precious")
    with atomic(tmp_path / "a.json") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "a.json").read_text() == "new"
