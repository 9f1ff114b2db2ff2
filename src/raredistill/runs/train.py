"""Carry out one run: reuse it if it is finished, otherwise train it, and save its results."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from torch import nn

from raredistill import checkpoint, predictions
from raredistill.cohort.store import Cohort
from raredistill.errors import DataError, RareDistillError
from raredistill.files import lock_if_free, write_text
from raredistill.models import Network, measure_latency, unfold_batch_norm
from raredistill.runs.assemble import make_batches, make_objective, run_promise
from raredistill.runs.cache import Cache
from raredistill.runs.curves import Curves
from raredistill.runs.drafts import abandon, discard, finish, open_draft, origin, read_finished, set_aside
from raredistill.runs.layout import RunFolder, StudyFolder
from raredistill.runs.predict import plain_batches, prediction_table
from raredistill.runs.record import RunRecord, describe
from raredistill.runs.run import Run
from raredistill.runs.second_stage import second_stage
from raredistill.runs.teachers import network_of, patients_before, teacher_files
from raredistill.runs.watcher import Watcher
from raredistill.training.devices import first_before, make_fabric
from raredistill.training.launch import Place, launch
from raredistill.training.loop import DivergedError, Fitted, fit, predict_logits
from raredistill.training.resume import Keeper

Outcome = tuple[RunRecord, bool]
"""A run's record, and whether the run was already finished."""


def attempt(run: Run, cohort: Cohort, folder: StudyFolder, watcher: Watcher, records: Mapping[str, RunRecord]) -> Outcome | None:
    """Carry out one run whose teachers are finished, under its lock.

    Args:
        run: run to carry out.
        cohort: its data.
        folder: of the study.
        watcher: receives the progress.
        records: records by run, at least of its teachers.

    Returns:
        Its record, and whether it was already finished; None while another process works on it.
    """
    with lock_if_free(folder.run(run.id).lock) as ours:
        return _one(run, cohort, folder, watcher, records) if ours else None


def _one(run: Run, cohort: Cohort, folder: StudyFolder, watcher: Watcher, records: Mapping[str, RunRecord]) -> Outcome:
    waiting, own = describe(run, cohort), folder.run(run.id)
    if failed := [teacher.id for teacher in run.teachers if records[teacher.id].status == "failed"]:
        return waiting.failed(f"its teacher {failed[0]} failed"), False
    remarks: list[str] = []
    if own.path.is_dir():
        try:
            return replace(read_finished(own), name=run.entry.name), True
        except DataError as error:
            remarks.append(f"{error}; the run was trained again, and the old one was moved to {set_aside(own)}")
    try:
        record = _train(run, cohort, folder, watcher, remarks)
        changed = _changed_pixels(cohort)
    except torch.AcceleratorError as error:
        raise RareDistillError(
            f"the device failed in {run.id} ({str(error).splitlines()[0]}); the state of the run is saved in {own.draft.path}; "
            "check that the device responds (nvidia-smi), then run the same command again"
        ) from error  # every other run would fail, too
    except OSError:
        raise  # a full disk or a vanished folder is not this run's fault: every other run would fail, too
    except Exception as error:
        # One run's failure must not stop the others; the record and the log report what happened.
        write_text(own.error, traceback.format_exc())
        abandon(own)
        return waiting.failed(str(error) or type(error).__name__), False
    if changed:  # every other run would be affected, too
        discard(own)
        raise DataError(f"{changed}. The run {run.id} was trained in the meantime and has been discarded")
    finish(own, record)
    own.error.unlink(missing_ok=True)
    return record, False


def _changed_pixels(cohort: Cohort) -> str:
    """Message on how the pixels changed since the study checked their hashes; empty if they did not."""
    try:
        cohort.check_pixels()
    except DataError as error:
        return str(error)
    return ""


def _train(run: Run, cohort: Cohort, folder: StudyFolder, watcher: Watcher, remarks: list[str]) -> RunRecord:
    settings, own = run.entry.settings, folder.run(run.id)
    fabric = make_fabric(settings.accelerator, settings.precision, settings.devices)
    now = origin(fabric.device.type, teacher_files(run, folder), run.plugins)
    draft = open_draft(own, now)
    patients_before(run.entry, cohort, run.split)  # refused here if they leak
    with closing(Curves(draft)) as curves:

        def on_epoch(record: dict[str, Any]) -> None:
            curves.add(record)
            watcher.epoch_done(run, record)

        handlers: dict[str, Callable[..., None]] = {
            "start": partial(watcher.run_started, run, settings.epochs), "epoch": on_epoch, "view": partial(watcher.view_kept, run),
        }  # fmt: skip
        made = launch(
            _make, (run, cohort, folder), devices=settings.devices, accelerator=settings.accelerator, precision=settings.precision,
            hear=lambda event, *facts: handlers[event](*facts),
        )  # fmt: skip
    remarks += made.pop("remarks")
    return replace(describe(run, cohort), status="done", **made, remarks=tuple(remarks), made_with=now)


def _make(place: Place, run: Run, cohort: Cohort, folder: StudyFolder) -> dict[str, Any]:
    """Compute a run in one of its processes; the first process writes the results and returns the fields of the record."""
    place.tell("start")
    torch.manual_seed(run.fold_seed)
    network, fabric, draft = network_of(run.entry, cohort), place.fabric, folder.run(run.id).draft
    keeper, cache = Keeper(draft.path), Cache(run, cohort, fabric, folder, partial(place.tell, "view"))
    try:
        fitted = _fit(run, cohort, network, folder, place, keeper, cache)
    except DivergedError as error:
        raise FloatingPointError(_message(error, run, cohort, network, draft, write=fabric.is_global_zero)) from error
    start = time.perf_counter()
    stage = second_stage(run, cohort, network, fitted, fabric, seed=run.fold_seed)
    tables = _predictions(run, cohort, network, fitted, fabric)
    if not fabric.is_global_zero:
        return {}
    _save_checkpoints(run, cohort, network, fitted, draft)
    predictions.write(draft.predictions, tables, cohort.classes, cohort.background)
    latency = measure_latency(network)
    seconds = sum(record["seconds"] for record in fitted.epochs) + time.perf_counter() - start
    return {
        "seconds": round(seconds, 2), "best_epoch": fitted.best_epoch, "epochs": len(fitted.epochs), "micro_batch": fitted.micro_batch,
        "remarks": [*keeper.remarks, *cache.remarks, *_halved(run, fitted), *_unshared(network, fabric)], "teacher_cache": cache.facts,
        "latency_ms": round(latency.milliseconds, 4), "latency_on": latency.device, **stage,
    }  # fmt: skip


def _unshared(network: Network, fabric: Fabric) -> list[str]:
    norms = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())
    if fabric.world_size == 1 or fabric.device.type == "cuda" or not norms:
        return []
    return [
        f"each of the {fabric.world_size} processes computed batch statistics on its own part of a batch, and those of the first "
        "were kept: on the CPU, torch cannot compute them over all parts"
    ]


def _halved(run: Run, fitted: Fitted) -> list[str]:
    if not fitted.micro_batch:
        return []
    size = run.entry.settings.batch_size
    return [
        f"{size} samples did not fit in the device's memory: steps of {size} were split into micro-batches of {fitted.micro_batch}, "
        "on which batch statistics and terms that compare samples were computed"
    ]


def _message(error: DivergedError, run: Run, cohort: Cohort, network: Network, draft: RunFolder, *, write: bool) -> str:
    """Message for a run that diverged; its best epoch so far is saved as a checkpoint."""
    samples = ", ".join(cohort.samples["sample"].to_numpy()[error.rows])
    if not error.fitted.best:
        return f"{error}. The batch's samples: {samples}. No epoch had finished before"
    path = draft.weights("best")
    if write:
        checkpoint.save(path, error.fitted.best, run_promise(run, cohort, network))
    return f"{error}. The batch's samples: {samples}. The last good checkpoint: {path} (epoch {error.fitted.best_epoch})"


def _fit(run: Run, cohort: Cohort, network: Network, folder: StudyFolder, place: Place, keeper: Keeper, cache: Cache) -> Fitted:
    fabric = place.fabric
    channels, train, validation = make_batches(run, cohort, fabric)
    if run.entry.pretrained and unfold_batch_norm(fabric.to_device(network), next(train.undivided().epoch(0)).select(channels)):
        keeper.remarks.append("the batch norms of the pre-trained weights were folded: they were estimated again on the first batch")
    with first_before(fabric):  # the others then read its teacher cache
        objective = make_objective(run, cohort, network, fabric, folder, keep=cache)
    return fit(
        network, objective, train, validation, settings=run.entry.settings, channels=channels, classes=cohort.classes, fabric=fabric,
        on_epoch=partial(place.tell, "epoch"), keeper=keeper, interrupted=place.interrupted, micro_batches=place.micro_batches,
    )  # fmt: skip


def _save_checkpoints(run: Run, cohort: Cohort, network: Network, fitted: Fitted, draft: RunFolder) -> None:
    promise = run_promise(run, cohort, network)
    checkpoint.save(draft.weights("best"), fitted.best, promise)
    checkpoint.save(draft.weights("last"), fitted.last, promise)


def _predictions(run: Run, cohort: Cohort, network: Network, fitted: Fitted, fabric: Fabric) -> pd.DataFrame:
    where, channels = (run.split.repeat, run.split.fold, run.seed), run.entry.channels
    tables = []
    for part, rows in (("validation", run.split.validation), ("test", run.split.test)):
        if not len(rows):
            continue
        batches = plain_batches(cohort, rows, channels, fabric, run.entry.settings.residence)
        for name, weights in (("best", fitted.best), ("last", fitted.last)):
            network.load_state_dict(weights)
            logits, _ = predict_logits(network, batches, channels=channels, fabric=fabric)
            tables.append(prediction_table(cohort, rows, logits.numpy(), run=run.id, split=part, checkpoint=name, where=where))
    if not tables:  # everyone trained
        nobody = np.array([], dtype=np.int64)
        return prediction_table(
            cohort, nobody, np.empty((0, len(cohort.classes))), run=run.id, split="test", checkpoint="best", where=where
        )
    return pd.concat(tables, ignore_index=True)
