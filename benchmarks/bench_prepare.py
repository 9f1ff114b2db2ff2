"""Prepare real cases against reading their files with nibabel, each on two warm processes.

Cohorts: the two segmented cases of ``../shared/data/real-glioma-nifti``, ``--patients`` made of copies of them under other names, in
which what a preparation costs once weighs less, and the two cases stored in other orientations. The two sides alternate; medians are
shown. nibabel has plain processes of its own, as a script that uses it has; ours are those that ``prepare`` starts, which keep the
memory that they free.

Command: ``python benchmarks/bench_prepare.py [--rounds 9] [--patients 12]``. Imports and the start of workers are apart.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from raredistill.cohort import labels, parallel, store, volumes
from raredistill.cohort.labels import LabelRule
from raredistill.cohort.prepare import _write_pixels, prepare
from raredistill.cohort.sources import Source, Unit
from raredistill.cohort.sources.brats_nifti import BratsNifti
from raredistill.cohort.sources.nifti import decode

DATA = Path(__file__).parents[2] / "shared" / "data" / "real-glioma-nifti"
CASES = ("TCGA-DU-7294", "TCGA-FG-6692")
SIZE = (224, 224)
PROCESSES = 2
BRATS2020 = 369


def read_with_nibabel(file: Path) -> float:
    return float(nibabel.load(file).get_fdata()[0, 0, 0])


def peak_memory(_: int) -> float:
    time.sleep(0.05)  # so that each process answers
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def copy_cases(folder: Path, patients: int, code: str = "LPS") -> BratsNifti:
    """The real cases again and again, each time under another name; stored in another orientation if one is given."""
    names = []
    for number in range(patients):
        case = CASES[number % len(CASES)]
        names.append(f"Copy_{number:03d}")
        (folder / names[-1]).mkdir(parents=True)
        for file in (DATA / case).glob("*.nii.gz"):
            copy = folder / names[-1] / file.name.replace(case, names[-1])
            if code == "LPS":
                shutil.copyfile(file, copy)
            else:
                image = nibabel.load(file)
                turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(code))
                nibabel.save(image.as_reoriented(turn), copy)
    (folder / "name_mapping.csv").write_text("patient,grade\n" + "".join(f"{name},LGG\n" for name in names))
    return BratsNifti(folder)


def once(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def prepare_once(source: Source, folder: Path, executor: Executor) -> float:
    out = folder / "cohort"
    shutil.rmtree(out, ignore_errors=True)
    return once(lambda: prepare(source, out, size=SIZE, executor=executor))


def compare(source: BratsNifti, folder: Path, rounds: int) -> tuple[list[float], list[float], float]:
    files = sorted(file for unit in source.units() for file in unit.files)
    ours, theirs = [], []
    plain = ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("forkserver"))
    with parallel.pool(PROCESSES) as executor, plain:
        for turn in range(rounds + 1):
            pair = prepare_once(source, folder, executor), once(lambda: list(plain.map(read_with_nibabel, files)))
            if turn:  # the first round warms processes and page cache
                ours.append(pair[0])
                theirs.append(pair[1])
        memory = max(executor.map(peak_memory, range(2 * PROCESSES)))
    return ours, theirs, memory


class Clock:
    """Adds up the seconds of named stages."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Add the block's seconds to a stage."""
        start = time.perf_counter()
        yield
        self.spent[stage] = self.spent.get(stage, 0) + time.perf_counter() - start


def stages(source: BratsNifti, folder: Path) -> dict[str, float]:
    """Seconds of each stage, all cases one after the other on one core."""
    clock = Clock()
    with store.Writer(folder / "stages", source.channels) as writer:
        rows = [row for unit in source.units() for row in read_in_stages(source, unit, writer, clock)]
        table = store.checked(pd.DataFrame(rows), source.classes())
        with clock("table, description, wait for the disk"):
            writer.finish(table, classes=source.classes(), size=SIZE, provenance={})
    shutil.rmtree(folder / "stages")
    spent = clock.spent
    spent["normalise to bytes"] = spent.pop("all of normalising") - spent["find the brain and its range"]
    return spent


def read_in_stages(source: BratsNifti, unit: Unit, writer: store.Writer, clock: Clock) -> list[dict[str, object]]:
    rendered, mask = volumes.Renderer(), np.empty(0)
    for role, file in zip((*source.channels, "seg"), unit.files, strict=True):
        with clock("read bytes and hash"):
            raw = file.read_bytes()
            hashlib.sha256(raw).hexdigest()
        with clock("decompress and decode"):
            mask, _ = decode(raw, file)
        if role != "seg":
            with clock("find the brain and its range"):
                volumes.window(mask)
            with clock("all of normalising"):
                rendered.add(role, mask)
    with clock("label"):
        called, _ = labels.compare_rules(mask, rendered.brain, rendered.present, rule=LabelRule())
    keep = np.flatnonzero(np.isin(called, [labels.TUMOUR, labels.HEALTHY]))
    with clock("resize"):
        pixels = rendered.resized(keep, SIZE)
    with clock("write parts"):
        for channel, images in pixels.items():
            _write_pixels(writer.root / store.WORK / f"{unit.patient}.{channel}", images)
    with clock("assemble and hash"):
        writer.append({channel: [images] for channel, images in pixels.items()})
    known = {"patient": unit.patient, "patient_label": unit.label, "source": "", "split": ""}
    return [{**known, "sample": f"{unit.patient}:{index}", "label": "healthy", "slice": int(index)} for index in keep]


def measure(name: str, source: BratsNifti, folder: Path, rounds: int) -> float:
    """Print one cohort's rows; returns the seconds of a preparation."""
    ours, theirs, memory = compare(source, folder, rounds)
    ratio = statistics.median(x / y for x, y in zip(ours, theirs, strict=True))
    print(f"| {name} | {statistics.median(ours):.3f} | {statistics.median(theirs):.3f} | {ratio:.2f} | {memory:.0f} |", flush=True)
    return statistics.median(ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--patients", type=int, default=12)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few, many = copy_cases(folder / "few", len(CASES)), copy_cases(folder / "many", options.patients)
        print(f"{PROCESSES} processes, {SIZE[0]} x {SIZE[1]}, four modalities, segmentation; {options.rounds} rounds\n")
        print("| patients | prepare, s | nibabel get_fdata, s | ratio (median of pairs) | peak memory of a worker, MiB |")
        print("|" + "---|" * 5)
        two = measure("2", few, folder, options.rounds)
        all_of_them = measure(str(options.patients), many, folder, options.rounds)
        for code in ("RAS", "PIR"):
            measure(f"2, stored as {code}", copy_cases(folder / code, len(CASES), code), folder, options.rounds)
        parallel._start_worker()
        spent = [stages(few, folder) for _ in range(3)][-1]
    each = (all_of_them - two) / (options.patients - len(CASES))
    once_a_cohort = two - len(CASES) * each
    print(f"\nA patient takes {each:.4f} s, a cohort {once_a_cohort:.3f} s once: {BRATS2020} patients take "
          f"{once_a_cohort:.3f} + {BRATS2020} x {each:.4f} = {once_a_cohort + BRATS2020 * each:.0f} s\n")  # fmt: skip
    total = sum(spent.values())
    print("| stage (one core, two patients) | share |\n|---|---|")
    print("\n".join(f"| {stage} | {seconds / total:.0%} |" for stage, seconds in sorted(spent.items(), key=lambda item: -item[1])))


if __name__ == "__main__":
    main()
