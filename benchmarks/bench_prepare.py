"""Prepare the two real cases against reading their ten files with nibabel, on the same two warm processes.

Command: ``python benchmarks/bench_prepare.py [--rounds 9]``. Imports and the start of workers are apart; the two alternate; medians are
shown. It reads the data of ``../shared/data/real-glioma-nifti``.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

import nibabel
import numpy as np

from raredistill.cohort import labels, parallel, volumes
from raredistill.cohort.labels import LabelRule
from raredistill.cohort.prepare import prepare
from raredistill.cohort.sources import Source
from raredistill.cohort.sources.brats_nifti import BratsNifti, decode

DATA = Path(__file__).parents[2] / "shared" / "data" / "real-glioma-nifti"
CASES = ("TCGA-DU-7294", "TCGA-FG-6692")
SIZE = (224, 224)
PROCESSES = 2


def read_with_nibabel(file: Path) -> float:
    return float(nibabel.load(file).get_fdata()[0, 0, 0])


def peak_memory(_: int) -> float:
    time.sleep(0.05)  # so that each process answers
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def open_cases(folder: Path) -> BratsNifti:
    grades = folder / "grades.csv"
    grades.write_text("patient,grade\n" + "".join(f"{case},LGG\n" for case in CASES))
    return BratsNifti(DATA, grades=grades)


def once(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def prepare_once(source: Source, folder: Path, executor: Executor) -> float:
    out = folder / "cohort"
    shutil.rmtree(out, ignore_errors=True)
    return once(lambda: prepare(source, out, size=SIZE, executor=executor))


def compare(source: BratsNifti, folder: Path, rounds: int) -> tuple[list[float], list[float], float]:
    files = sorted(file for case in CASES for file in (DATA / case).glob("*.nii.gz"))
    ours, theirs = [], []
    with parallel.pool(PROCESSES) as memory_of_ours, parallel.pool(PROCESSES) as executor:
        prepare_once(source, folder, memory_of_ours)
        memory = max(memory_of_ours.map(peak_memory, range(2 * PROCESSES)))
        for turn in range(rounds + 1):
            pair = prepare_once(source, folder, executor), once(lambda: list(executor.map(read_with_nibabel, files)))
            if turn:  # the first round warms processes and page cache
                ours.append(pair[0])
                theirs.append(pair[1])
    return ours, theirs, memory


def stages(source: BratsNifti) -> dict[str, float]:
    """Seconds of each stage of reading, both cases one after the other on one core."""
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[[], object]) -> object:
        start = time.perf_counter()
        outcome = function()
        spent[name] = spent.get(name, 0) + time.perf_counter() - start
        return outcome

    for unit in source.units():
        raw = timed("read bytes", lambda unit=unit: [file.read_bytes() for file in unit.files])
        timed("hash", lambda raw=raw: [hashlib.sha256(block).hexdigest() for block in raw])
        *images, mask = timed(
            "decompress and decode", lambda raw=raw, unit=unit: [decode(*pair) for pair in zip(raw, unit.files, strict=True)]
        )
        windows = timed("find brain and its range", lambda images=images: [volumes.window(volume) for volume in images])
        brain = np.maximum.reduce([window.brain for window in windows])
        present = np.logical_or.reduce([window.present for window in windows])
        called, _ = timed("label", lambda v=(mask, brain, present): labels.compare_rules(*v, rule=LabelRule()))
        keep = np.flatnonzero(np.isin(called, [labels.TUMOUR, labels.HEALTHY]))
        timed("normalise to bytes", lambda v=(images, windows, keep): volumes.render(*v, v[0][0].shape[1:]))
        timed("normalise and resize", lambda v=(images, windows, keep): volumes.render(*v, SIZE))
    spent["resize"] = spent.pop("normalise and resize") - spent["normalise to bytes"]
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = open_cases(folder)
        ours, theirs, memory = compare(source, folder, rounds)
        parallel._start_worker()
        spent = [stages(source) for _ in range(3)][-1]
    a, b = statistics.median(ours), statistics.median(theirs)
    ratio = statistics.median(x / y for x, y in zip(ours, theirs, strict=True))
    print(f"| two cases, ten files, {PROCESSES} processes, {rounds} rounds | median seconds |\n|---|---|")
    print(f"| raredistill prepare, {SIZE[0]} x {SIZE[1]}, four modalities, to a finished cohort | {a:.3f} |")
    print(f"| nibabel get_fdata | {b:.3f} |\n| ratio (median of pairs) | {ratio:.2f} |\n| peak memory of a worker, MiB | {memory:.0f} |\n")
    total = sum(spent.values())
    print("| stage of a worker | share |\n|---|---|")
    print("\n".join(f"| {stage} | {seconds / total:.0%} |" for stage, seconds in sorted(spent.items(), key=lambda item: -item[1])))


if __name__ == "__main__":
    main()
