"""Teacher outputs, computed once per view: a view depends on (seed, view, sample) only, and a frozen teacher's output on the view only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from raredistill.batches import Batch, Batches
from raredistill.outputs import Outputs

Table = dict[str, Tensor]
"""Outputs for the rows of one view, in the order of the rows: ``logits (M, K)`` and, if requested, ``features (M, F)`` and others."""


def compute_view(taught: Callable[[Batch], Outputs], batches: Batches, view: int, *, features: bool) -> Table:
    """Compute a teacher's outputs for every sample of one view.

    Args:
        taught: returns the outputs of a frozen teacher, or of several combined.
        batches: unshuffled, with all rows that the teacher is to teach.
        view: number of the view.
        features: whether to keep the pooled features, too.

    Returns:
        On the CPU: float32 logits, so that the cache is exact, and features in float16 if they are within its range.
    """
    outputs = [part for batch in batches.epoch(view) for part in _outputs(taught, batch, features=features)]
    table = {"logits": torch.cat([each.logits for each in outputs])}
    if features:
        table["features"] = _compact(torch.cat([each.features for each in outputs if each.features is not None]))
    priors = [each.log_prior for each in outputs if each.log_prior is not None]
    if len(priors) == len(outputs):
        # One prior for all rows or, if each sample has its own teacher, one per row.
        table["log_prior"] = priors[0] if priors[0].ndim == 1 else torch.cat(priors)
    return table


def _outputs(taught: Callable[[Batch], Outputs], batch: Batch, *, features: bool) -> list[Outputs]:
    # Moved to the CPU at once, so that the device holds one batch only; the batch is halved until it fits in the device's memory.
    try:
        outputs = taught(batch)
    except torch.OutOfMemoryError:
        if len(batch.labels) == 1:
            raise
    else:
        kept = (outputs.features if features else None, outputs.log_prior)
        pooled, prior = (None if each is None else each.float().cpu() for each in kept)
        return [Outputs(outputs.logits.float().cpu(), pooled, log_prior=prior)]
    return [part for half in batch.split(2) for part in _outputs(taught, half, features=features)]


def _compact(features: Tensor) -> Tensor:
    half = features.half()
    return half if bool(half.isfinite().all()) else features


class CachedTeacher:
    """A teacher replaced by its cached outputs, looked up by row and view.

    Args:
        tables: one per view.
        rows: ``(M,)`` rows of the cohort that the tables hold.
        device: device of the outputs.
    """

    def __init__(self, tables: Sequence[Mapping[str, Tensor]], rows: np.ndarray, device: torch.device) -> None:
        self._tables = [{name: values.to(device) for name, values in table.items()} for table in tables]
        self._places = torch.zeros(int(rows.max()) + 1, dtype=torch.int64)
        self._places[torch.from_numpy(rows)] = torch.arange(len(rows))
        self._device = device

    def __call__(self, batch: Batch) -> Outputs:
        """Look up the teacher's outputs for these samples in this view."""
        table, places = self._tables[batch.view], self._places[batch.rows].to(self._device, non_blocking=True)
        outputs = {name: values if values.ndim == 1 else values[places].float() for name, values in table.items()}
        return Outputs(outputs["logits"], outputs.get("features"), log_prior=outputs.get("log_prior"))
