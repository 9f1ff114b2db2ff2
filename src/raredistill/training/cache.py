"""What a teacher says of each view, computed once: views are functions of (seed, view, sample), and a frozen teacher of the view alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from raredistill.batches import Batch, Batches
from raredistill.outputs import Outputs

Table = dict[str, Tensor]
"""Outputs for the rows of one view, in the rows' order: ``logits (M, K)``, and where they are asked for ``features (M, F)`` and more."""


def look(taught: Callable[[Batch], Outputs], batches: Batches, view: int, *, features: bool) -> Table:
    """Let a teacher look at every sample of one view.

    Args:
        taught: gives the outputs of a frozen teacher, or of several together.
        batches: unshuffled, of all rows that it is to teach.
        view: which.
        features: keep the pooled features, too.

    Returns:
        On the CPU: float32 logits, so that what is kept is what the teacher said, and float16 features where they fit in its range.
    """
    said = [part for batch in batches.epoch(view) for part in _ask(taught, batch, features=features)]
    table = {"logits": torch.cat([each.logits for each in said])}
    if features:
        table["features"] = _compact(torch.cat([each.features for each in said if each.features is not None]))
    priors = [each.log_prior for each in said if each.log_prior is not None]
    if len(priors) == len(said):
        # One prior for all, or, where each sample has its own teacher, one a row.
        table["log_prior"] = priors[0] if priors[0].ndim == 1 else torch.cat(priors)
    return table


def _ask(taught: Callable[[Batch], Outputs], batch: Batch, *, features: bool) -> list[Outputs]:
    # On the CPU at once, so that the device holds one batch; halved for as long as its memory does not suffice.
    try:
        said = taught(batch)
    except torch.OutOfMemoryError:
        if len(batch.labels) == 1:
            raise
    else:
        pooled, prior = (None if each is None else each.float().cpu() for each in (said.features if features else None, said.log_prior))
        return [Outputs(said.logits.float().cpu(), pooled, log_prior=prior)]
    return [part for half in batch.split(2) for part in _ask(taught, half, features=features)]


def _compact(features: Tensor) -> Tensor:
    half = features.half()
    return half if bool(half.isfinite().all()) else features


class Kept:
    """A teacher that is not there any more: what it said of each view, by row and view.

    Args:
        tables: one a view.
        rows: ``(M,)`` rows of the cohort that the tables are of.
        device: where the outputs are wanted.
    """

    def __init__(self, tables: Sequence[Mapping[str, Tensor]], rows: np.ndarray, device: torch.device) -> None:
        self._tables = [{name: values.to(device) for name, values in table.items()} for table in tables]
        self._places = torch.zeros(int(rows.max()) + 1, dtype=torch.int64)
        self._places[torch.from_numpy(rows)] = torch.arange(len(rows))
        self._device = device

    def __call__(self, batch: Batch) -> Outputs:
        """What the teacher said of these samples in this view."""
        table, places = self._tables[batch.view], self._places[batch.rows].to(self._device, non_blocking=True)
        found = {name: values if values.ndim == 1 else values[places].float() for name, values in table.items()}
        return Outputs(found["logits"], found.get("features"), log_prior=found.get("log_prior"))
