"""The second stage of a run: replace the last layer of its checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from raredistill.cohort.store import Cohort
from raredistill.models import Network
from raredistill.runs.predict import plain_batches
from raredistill.runs.run import Run
from raredistill.training.loop import Fitted
from raredistill.training.stages import Inputs, Linear, classifier_of, inputs_of, refine


def second_stage(run: Run, cohort: Cohort, network: Network, fitted: Fitted, fabric: Fabric, *, seed: int) -> dict[str, Any]:
    """Apply the run's second stage to the last layer of both checkpoints.

    Args:
        run: its settings name the stage.
        cohort: its data.
        network: holds the weights while they change.
        fitted: its weights are replaced.
        fabric: the device.
        seed: of the run.

    Returns:
        Fields for the run's record; empty without a second stage.
    """
    settings, split = run.entry.settings, run.split
    if settings.stage == "none":
        return {}
    taus = {}
    for name, weights in (("best", fitted.best), ("last", fitted.last)):
        network.load_state_dict(weights)
        layer = classifier_of(network)
        refined, taus[name] = refine(
            settings.stage, Linear(layer.weight.detach().cpu(), layer.bias.detach().cpu()),
            _inputs(run, cohort, network, fabric, split.train),
            _inputs(run, cohort, network, fabric, split.validation) if len(split.validation) else None, classes=len(cohort.classes),
            metric="macro_f1" if settings.select == "last" else settings.select, epochs=settings.stage_epochs, seed=seed,
        )  # fmt: skip
        with torch.no_grad():
            layer.weight.copy_(refined.weight)
            layer.bias.copy_(refined.bias)
        weights.update({key: value.detach().cpu().clone() for key, value in network.state_dict().items()})
    return {"stage": settings.stage, "stage_tau": taus}


def _inputs(run: Run, cohort: Cohort, network: Network, fabric: Fabric, rows: np.ndarray) -> Inputs:
    batches = plain_batches(cohort, rows, run.entry.channels, fabric, run.entry.settings.residence)
    return inputs_of(network, batches, channels=run.entry.channels, fabric=fabric)
