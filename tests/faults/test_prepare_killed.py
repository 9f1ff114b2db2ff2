"""A preparation that is killed, interrupted and ended goes on where it stopped, to the same cohort."""

import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
from PIL import Image

from raredistill.cohort.prepare import prepare
from raredistill.cohort.sources.registry import open_source
from raredistill.cohort.store import WORK

PATIENTS, IMAGES = 120, 3
COMMAND = [sys.executable, "-c", "from raredistill.cli import main; main()", "prepare", "table"]


def write_images(root):
    root.mkdir()
    rng, rows = np.random.default_rng(0), []
    for patient in range(PATIENTS):
        for number in range(IMAGES):
            name = f"{patient:03d}-{number}.png"
            Image.fromarray(rng.integers(0, 255, (300, 300), dtype=np.uint8)).save(root / name, compress_level=1)
            rows.append({"image": name, "label": "ab"[patient % 2], "patient": f"p{patient}"})
    pd.DataFrame(rows).to_csv(root / "t.csv", index=False)
    return root / "t.csv"


def parts(out):
    return len(list((out / WORK).glob("*.json"))) - (out / WORK / "job.json").exists()


def stop(table, out, number):
    """Start the command, wait until it has done more patients than were done before, and send it a signal: its exit code and the parts."""
    before = parts(out)
    process = subprocess.Popen([*COMMAND, str(table), "--out", str(out), "--size", "64"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while parts(out) <= before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    return process.returncode, told


def test_signals_leave_parts_that_the_next_start_goes_on_with(tmp_path):
    table, out = write_images(tmp_path / "raw"), tmp_path / "out"
    code, _ = stop(table, out, signal.SIGKILL)
    assert code == -signal.SIGKILL  # and its workers are gone with it: the pipe that they share with it came to its end
    assert 0 < parts(out) < PATIENTS
    code, told = stop(table, out, signal.SIGINT)
    assert code == 130
    assert f"interrupted; resume with: raredistill prepare table {table}" in told
    assert "Traceback" not in told
    code, told = stop(table, out, signal.SIGTERM)
    assert code == 143
    assert "Traceback" not in told
    kept = {file: file.stat().st_mtime_ns for file in (out / WORK).glob("*.json")}
    assert not (out / "cohort.json").exists()
    seen = []
    source = open_source("table", table)
    cohort = prepare(source, out, size=(64, 64), workers=1, progress=lambda done, total: seen.append(done))
    assert seen[0] == len(kept) - 1  # all but job.json
    assert cohort.hash == prepare(source, tmp_path / "undisturbed", size=(64, 64), workers=1).hash
