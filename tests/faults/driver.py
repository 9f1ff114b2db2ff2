"""Faults as they happen: real processes that are killed, stopped, crowded, or robbed of their disk.

One import of the program, then a fork for every start. ``python driver.py FOLDER`` leaves in FOLDER what each scenario wrote, and in
``outcome.json`` how its processes ended; the tests beside this file look at both.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pandas as pd
import torch
import yaml
from PIL import Image

from conftest import Silent, write_tiny
from raredistill import cli
from raredistill.cohort.prepare import prepare
from raredistill.cohort.sources.registry import open_source
from raredistill.cohort.store import Cohort
from raredistill.config import StudyConfig, make_study
from raredistill.reports import write_report
from raredistill.studies.study import run_study
from raredistill.training import resume

CONFIG = {
    "name": "killed", "channels": ["flair"], "splits": {"folds": 2, "repeats": 1, "validation_share": 0.34},
    "training": {
        "epochs": 3, "batch_size": 16, "accelerator": "cpu", "learning_rate": 0.01, "ema_decay": 0.8, "patience": 2, "clip_norm": 1.0,
        "sampler": "balanced", "mixing": "mixup", "schedule": "plateau", "step_epochs": 1, "factor": 0.5,
    },
    "runs": [
        {"name": "large", "model": "cifar_resnet8", "channels": ["flair", "t1ce"], "dropout": 0.4},
        {"name": "taught", "model": "small_cnn", "teacher": "large", "dropout": 0.3},
    ],
}  # fmt: skip


class Diary(Silent):
    """Writes down which runs a process has trained."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def run_started(self, run, epochs):
        with self.path.open("a") as handle:
            handle.write(f"{run.id}\n")


def train(folder: Path, out: Path) -> None:
    """Train four runs."""
    cohort = Cohort.load(folder / "cohort")
    raw = yaml.safe_load((folder / "study.yaml").read_text())
    run_study(make_study(StudyConfig.model_validate(raw), cohort, "test"), out, Diary(folder / f"diary-{os.getpid()}"))


def command(folder: Path, out: Path) -> None:
    """The same from the command line, with its report."""
    sys.argv = ["raredistill", "study", str(folder / "study.yaml"), "--out", str(out)]
    cli.main()


def images(folder: Path, out: Path) -> None:
    """Prepare a table of images."""
    prepare(open_source("table", folder / "images" / "labels.csv"), out, size=(32, 32), workers=1)


def report(folder: Path, out: Path) -> None:
    """Write a finished study's report."""
    write_report(out)


def write_images(folder: Path) -> None:
    generator, rows = np.random.default_rng(0), []
    (folder / "images").mkdir(parents=True)
    for patient in range(40):
        for n in range(4):
            name = f"p{patient}-{n}.png"
            Image.fromarray(generator.integers(0, 255, (64, 64), dtype=np.uint8)).save(folder / "images" / name)
            rows.append({"image": name, "label": "ab"[patient % 2], "patient": f"p{patient}"})
    pd.DataFrame(rows).to_csv(folder / "images" / "labels.csv", index=False)


def start(work, folder: Path, out: Path, *, file_limit: int | None = None) -> int:
    """Fork a child that does the work; what it says goes to ``FOLDER/said-PID``."""
    child = os.fork()
    if child:
        return child
    try:
        said = os.open(folder / f"said-{os.getpid()}", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        if file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        work(folder, out)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(child: int, seconds: float) -> int | None:
    """Wait so long for a child; its exit code, or None while it works."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def code_and_words(child: int, folder: Path) -> tuple[int | None, str]:
    code = ended(child, 240)
    return code, (folder / f"said-{child}").read_text()


def timed(work, folder: Path, out: Path) -> tuple[list, float]:
    """Undisturbed, with the seconds that it takes on this machine: kills must come earlier."""
    began = time.monotonic()
    told = code_and_words(start(work, folder, out), folder)
    return told, time.monotonic() - began


def killed(work, folder: Path, out: Path, *, kills: int, within: float) -> dict:
    """Kill -9 at random times, then let it end."""
    chance, met = random.Random(kills), 0
    for _ in range(kills):
        child = start(work, folder, out)
        if ended(child, chance.uniform(0, within)) is not None:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        met += 1
    return {"met": met, "end": code_and_words(start(work, folder, out), folder)}


def signalled(folder: Path, out: Path) -> dict:
    """Ctrl-C, then SIGTERM, each when a run is in the middle of its training; then to the end."""
    found = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        seen = len(list((out / "runs").glob("*")))
        child = start(command, folder, out)
        while not (len(list((out / "runs").glob("*"))) > seen and any((out / "runs").glob("*.unfinished/epochs.jsonl"))):
            if (code := ended(child, 0.002)) is not None:
                return {number.name: (code, (folder / f"said-{child}").read_text())}
        time.sleep(0.05)
        os.kill(child, number)
        found[number.name] = code_and_words(child, folder)
    return {**found, "end": code_and_words(start(command, folder, out), folder)}


def crowded(folder: Path, out: Path) -> dict:
    """Two processes at once on one study."""
    children = [start(train, folder, out) for _ in range(2)]
    ends = [code_and_words(child, folder) for child in children]
    diaries = [folder / f"diary-{child}" for child in children]
    return {"ends": ends, "trained": [diary.read_text().split() if diary.exists() else [] for diary in diaries]}


def full(folder: Path, out: Path) -> dict:
    """A limit of the size of files, that stops writing as a full disk does; then without it."""
    first = code_and_words(start(command, folder, out, file_limit=30_000), folder)
    return {"limited": first, "end": code_and_words(start(train, folder, out), folder)}


def small_disk(folder: Path, out: Path) -> dict:
    """A disk that is full, then read-only, then as large as it must be."""
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(out)], capture_output=True, check=False).returncode:
        return {}
    try:
        found = {"full": code_and_words(start(command, folder, out / "study"), folder)}
        for name, options in (("readonly", "remount,ro,size=64m"), ("end", "remount,rw,size=64m")):
            subprocess.run(["mount", "-o", options, str(out)], check=True)
            found[name] = code_and_words(start(command if name == "readonly" else train, folder, out / "study"), folder)
        shutil.copytree(out / "study" / "runs", folder / "from-small-disk" / "runs")
    finally:
        subprocess.run(["umount", str(out)], check=True)
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    cohort = write_tiny(folder / "cohort")
    (folder / "study.yaml").write_text(yaml.safe_dump({**CONFIG, "cohort": str(cohort.root)}))
    write_images(folder)
    outcome: dict = {}
    outcome["calm"], training = timed(train, folder, folder / "calm")
    outcome["calm_images"], preparing = timed(images, folder, folder / "calm-images")
    outcome["full"] = full(folder, folder / "full")
    outcome["small_disk"] = small_disk(folder, folder / "disk")
    resume.SAVE_EVERY = 0.0
    outcome["crowded"] = crowded(folder, folder / "crowded")
    outcome["killed"] = killed(train, folder, folder / "killed", kills=7, within=min(1.5, training / 4))
    outcome["killed_images"] = killed(images, folder, folder / "killed-images", kills=6, within=min(0.3, preparing / 2))
    outcome["signalled"] = signalled(folder, folder / "signalled")
    outcome["killed_report"] = killed(report, folder, folder / "signalled", kills=1, within=2.0)
    (folder / "outcome.json").write_text(json.dumps(outcome, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
