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
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
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


def stages(source: BratsNifti) -> dict[str, float]:
    """Seconds of each stage of reading, both cases one after the other on one core."""
    clock = Clock()
    for unit in source.units():
        rendered, mask = volumes.Renderer(), np.empty(0)
        for role, file in zip((*source.channels, "seg"), unit.files, strict=True):
            with clock("read bytes and hash"):
                raw = file.read_bytes()
                hashlib.sha256(raw).hexdigest()
            with clock("decompress and decode"):
                mask, _ = decode(raw, file)
            if role != "seg":
                with clock("find brain and its range"):
                    volumes.window(mask)
                with clock("all of normalising"):
                    rendered.add(role, mask)
        with clock("label"):
            called, _ = labels.compare_rules(mask, rendered.brain, rendered.present, rule=LabelRule())
        with clock("resize"):
            rendered.resized(np.flatnonzero(np.isin(called, [labels.TUMOUR, labels.HEALTHY])), SIZE)
    spent = clock.spent
    spent["normalise to bytes"] = spent.pop("all of normalising") - spent["find brain and its range"]
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
    spent["write parts, assemble, wait"] = max(0.0, PROCESSES * a - sum(spent.values()))
    total = sum(spent.values())
    print("| stage (two processes' time) | share |\n|---|---|")
    print("\n".join(f"| {stage} | {seconds / total:.0%} |" for stage, seconds in sorted(spent.items(), key=lambda item: -item[1])))


if __name__ == "__main__":
    main()
