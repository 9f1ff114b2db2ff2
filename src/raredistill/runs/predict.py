"""Batches for evaluation, and the predictions table of a cohort's samples."""

from __future__ import annotations

import numpy as np
import pandas as pd
from lightning_fabric import Fabric

from raredistill.batches import Batches
from raredistill.cohort.store import Cohort

EVALUATION_BATCH = 256


def plain_batches(cohort: Cohort, rows: np.ndarray, channels: tuple[str, ...], fabric: Fabric, residence: str = "auto") -> Batches:
    """Batches for evaluation: every row once, in order, without augmentation."""
    return Batches(
        cohort, rows, channels=channels, batch_size=EVALUATION_BATCH, device=fabric.device, shuffle=False, residence=residence,
        share=(fabric.global_rank, fabric.world_size),
    )  # fmt: skip


def prediction_table(
    cohort: Cohort, rows: np.ndarray, logits: np.ndarray, *, run: str, split: str, checkpoint: str, where: tuple[int, int, int]
) -> pd.DataFrame:
    """Build the predictions table for ``rows`` of a cohort with their ``logits (N, K)``; ``where`` is (repeat, fold, seed)."""
    samples = cohort.samples.iloc[rows]
    repeat, fold, seed = where
    return pd.DataFrame(
        {
            "run": run, "sample": samples["sample"].to_numpy(), "patient": samples["patient"].to_numpy(),
            "patient_label": samples["patient_label"].to_numpy(), "split": split, "repeat": repeat, "fold": fold, "seed": seed,
            "checkpoint": checkpoint, "label": samples["label"].to_numpy(),
            "logits": pd.Series(list(logits.astype(np.float32)), dtype=object),
        }
    )  # fmt: skip
