"""A tiny cohort that is learnable: bright blobs whose side tells the class; healthy slices have none."""

import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from raredistill.cohort.store import Cohort, save

torch.set_num_threads(1)
# A shell that starts tests in the background has them ignore Ctrl-C, and so would every process that they start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def tiny_rows(patients: dict[str, int], slices: int) -> pd.DataFrame:
    """Rows of a BraTS-like cohort: each patient has ``slices`` tumour slices and as many healthy ones."""
    rows = []
    for label, number in patients.items():
        for n in range(number):
            for index in range(2 * slices):
                name = f"{label}{n:03d}"
                rows.append(
                    {
                        "sample": f"{name}-{index}", "patient": name, "patient_label": label,
                        "label": label if index < slices else "healthy", "slice": index, "source": name, "split": "",
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def tiny_pixels(rows: pd.DataFrame, size: int, seed: int) -> np.ndarray:
    """``(N, size, size)`` uint8: HGG bright on the left, LGG on the right, healthy nowhere."""
    images = np.random.default_rng(seed).integers(0, 80, (len(rows), size, size), dtype=np.uint8)
    half = size // 2
    images[(rows["label"] == "HGG").to_numpy(), :, :half] += 120
    images[(rows["label"] == "LGG").to_numpy(), :, half:] += 120
    return images


def write_tiny(root: Path, *, patients: dict[str, int] | None = None, slices: int = 3, size: int = 16) -> Cohort:
    """Write the cohort with two channels."""
    rows = tiny_rows(patients or {"HGG": 12, "LGG": 6}, slices)
    pixels = {channel: [tiny_pixels(rows, size, seed)] for seed, channel in enumerate(("flair", "t1ce"))}
    return save(root, rows, pixels, classes=("healthy", "HGG", "LGG"), size=(size, size), provenance={"kind": "test"})


class Silent:
    """Watches a study and says nothing: runs that were trained and reused, and views of teachers that were kept."""

    def __init__(self):
        self.trained, self.reused, self.views = [], [], []

    def run_started(self, run, epochs):
        self.trained.append(run.id)

    def view_kept(self, run, done, total):
        self.views.append((run.entry.name, run.split.fold, done, total))

    def epoch_done(self, run, record):
        pass

    def run_done(self, run, record, *, reused):
        if reused:
            self.reused.append(run.id)


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """18 patients, 108 slices of 16 x 16, two channels."""
    return write_tiny(tmp_path_factory.mktemp("cohorts") / "tiny")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data beside the project; the test is skipped where they are absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data (../shared/data) are not on this machine")
    return folder
