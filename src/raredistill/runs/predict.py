"""Predictions of a run's checkpoint: logits of a cohort's samples as a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from lightning_fabric import Fabric

from raredistill import predictions
from raredistill.batches import Batches
from raredistill.cohort.store import Cohort
from raredistill.errors import CheckpointError
from raredistill.models import restore
from raredistill.training.devices import make_fabric
from raredistill.training.loop import predict_logits
from raredistill.training.teacher import check_teacher

EVALUATION_BATCH = 256


def predict(run_folder: Path, cohort: Cohort, out: Path, *, which: str = "best", accelerator: str = "auto") -> pd.DataFrame:
    """Apply a run's checkpoint to every sample of a cohort with the same classes and channels, and write the predictions table.

    Raises:
        CheckpointError: classes, channels or image size do not fit.
    """
    network, promise = restore(run_folder / f"{which}.safetensors")
    check_teacher(promise, name=run_folder.name, classes=cohort.classes, channels=cohort.channels, held_out=())
    if promise.image_size != cohort.size[0]:
        raise CheckpointError(
            f"{run_folder.name} was trained on {promise.image_size} pixels, {cohort.root} has {cohort.size[0]}: "
            f"prepare it with --size {promise.image_size}"
        )
    fabric = make_fabric(accelerator, "32-true")
    rows = np.arange(len(cohort.samples))
    logits, _ = predict_logits(
        fabric.to_device(network), plain_batches(cohort, rows, promise.channels, fabric), channels=promise.channels, fabric=fabric
    )
    table = prediction_table(cohort, rows, logits.numpy(), run=run_folder.name, split="test", checkpoint=which, where=(0, 0, 0))
    predictions.write(out, table, cohort.classes, cohort.background)
    return table


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
            "checkpoint": checkpoint, "label": samples["label"].to_numpy(), "logits": list(logits.astype(np.float32)),
        }
    )  # fmt: skip
