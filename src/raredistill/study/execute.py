"""Carry out a plan in this process: reuse what is done, train what is not, write predictions."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from lightning.fabric import Fabric
from torch import nn

from raredistill import checkpoint, predictions
from raredistill.augment import MIXINGS, PRESETS
from raredistill.batches import Batches, free_memory
from raredistill.checkpoint import Promise
from raredistill.cohort.store import Cohort
from raredistill.distill.contract import Facts
from raredistill.distill.registry import METHODS, make_method
from raredistill.errors import ConfigError, DataError, RareDistillError
from raredistill.files import lock_if_free, write_text
from raredistill.losses import class_weights, make_loss
from raredistill.models import Network, facts, measure_latency, unfold_batch_norm
from raredistill.study.board import Curves
from raredistill.study.cache import Cache
from raredistill.study.drafts import abandon, check_origin, discard, finish, open_draft, origin, read_finished, set_aside, unfinished
from raredistill.study.plan import Entry, External, Run
from raredistill.study.predict import plain_batches, prediction_table
from raredistill.study.stages import second_stage
from raredistill.study.teachers import (
    Taught,
    network_of,
    patients_before,
    peers_of,
    prior_of,
    teach,
    teacher_channels,
    teacher_files,
    teacher_name,
)
from raredistill.training.devices import first_before, make_fabric
from raredistill.training.launch import Place, launch
from raredistill.training.loop import DivergedError, Fitted, fit, predict_logits
from raredistill.training.objectives import Deferred, Distilled, Objective, Supervised
from raredistill.training.online import Together
from raredistill.training.resume import Keeper

Record = dict[str, Any]
LOOK_AGAIN = 2.0
"""Seconds until runs that another process works at are looked at again."""


class Watcher(Protocol):
    """Who is told how a study goes."""

    def run_started(self, run: Run, epochs: int) -> None:
        """A run begins to train."""

    def view_kept(self, run: Run, done: int, total: int) -> None:
        """So many views of the teacher cache are there."""

    def epoch_done(self, run: Run, record: Record) -> None:
        """An epoch is over."""

    def run_done(self, run: Run, record: Record, *, reused: bool) -> None:
        """A run is done, was done before, or failed."""


def execute(plan: Sequence[Run], cohort: Cohort, out: Path, watcher: Watcher, on_record: Callable[[Record], None]) -> list[Record]:
    """Carry out every run; a run that fails is recorded and those that wait for it are skipped, the others go on.

    Runs at which another process works are left to it, and waited for at the end.

    Args:
        plan: runs, each after its teacher.
        cohort: what they read.
        out: study folder; run ``id`` goes to ``out/runs/id``.
        watcher: is told of progress.
        on_record: called with each run's record as soon as it is known.

    Raises:
        OSError: the disk is full, or a folder has vanished or cannot be written; what was written before is intact.
    """
    records: dict[str, Record] = {}
    waiting = list(plan)
    while waiting:
        for run in [run for run in waiting if all(teacher.id in records for teacher in run.teachers)]:
            if (found := attempt(run, cohort, out, watcher, records)) is None:
                continue
            record, reused = found
            waiting.remove(run)
            records[run.id] = record
            on_record(record)
            watcher.run_done(run, record, reused=reused)
        if waiting:
            time.sleep(LOOK_AGAIN)
    return [records[run.id] for run in plan]


def attempt(run: Run, cohort: Cohort, out: Path, watcher: Watcher, records: Mapping[str, Record]) -> tuple[Record, bool] | None:
    """Carry out one run whose teachers are done, under its lock.

    Args:
        run: what to do.
        cohort: what it reads.
        out: study folder.
        watcher: is told of progress.
        records: of its teachers at least, by run.

    Returns:
        Its record, and whether it was done before; None while another process works at it.
    """
    with lock_if_free(lock_of(out, run.id)) as ours:
        return _one(run, cohort, out, watcher, records) if ours else None


def refuse_changed(plan: Sequence[Run], out: Path) -> None:
    """Look at every unfinished run before anything is trained.

    Raises:
        CheckpointError: one was begun under other code or versions.
    """
    for run in plan:
        settings = run.entry.settings
        now = origin(make_fabric(settings.accelerator, settings.precision, settings.devices).device.type, {})
        # Its teacher's weights are compared when its turn comes: until then they may be made anew.
        check_origin(out / "runs" / run.id, {part: now[part] for part in ("versions", "code")})


def pixels_of(run: Run, cohort: Cohort) -> int:
    """Bytes of the pixels of a run's training part, for student and teachers, and of its validation part."""
    own = set(run.entry.channels)
    both = own | (set(teacher_channels(run)) if run.entry.settings.views is None else set())
    return (len(run.split.train) * len(both) + len(run.split.validation) * len(own)) * cohort.size[0] * cohort.size[1]


def refuse_too_large(plan: Sequence[Run], cohort: Cohort, out: Path) -> None:
    """Look at every run that is not done and wants its pixels resident.

    Raises:
        ConfigError: this machine has not the memory for one.
    """
    for run in plan:
        settings = run.entry.settings
        if settings.residence == "resident" and not (out / "runs" / run.id).is_dir():
            device = make_fabric(settings.accelerator, settings.precision).device
            if problem := too_large(run, cohort, device):
                raise ConfigError(f"runs {run.entry.name}: {problem}")


def too_large(run: Run, cohort: Cohort, device: torch.device) -> str:
    """Why a run's resident pixels do not fit on a device, with the cure; empty when they do."""
    holders = run.entry.settings.devices if device.type == "cpu" else 1
    needed, free = holders * pixels_of(run, cohort), free_memory(device)
    if needed <= free:
        return ""
    return (
        f"residence is resident, but its pixels take {needed / 1e9:.3g} GB and {device} has {free / 1e9:.3g} GB free; "
        "set residence=auto or streamed, prepare with a smaller --size, or name fewer channels"
    )


def lock_of(out: Path, run: str) -> Path:
    """The file whose lock is held by the process that makes a run."""
    return out / "runs" / f".{run}.lock"


def _one(run: Run, cohort: Cohort, out: Path, watcher: Watcher, records: Mapping[str, Record]) -> tuple[Record, bool]:
    if failed := [teacher.id for teacher in run.teachers if records[teacher.id]["status"] == "failed"]:
        return {**describe(run, cohort), "status": "failed", "error": f"its teacher {failed[0]} failed"}, False
    folder, failure = out / "runs" / run.id, out / "runs" / f"{run.id}.error.txt"
    remarks: list[str] = []
    if folder.is_dir():
        try:
            return {**read_finished(folder), "name": run.entry.name}, True
        except DataError as error:
            remarks.append(f"{error}; the run was made again, what was there is in {set_aside(folder)}")
    try:
        record = _train(run, cohort, folder, watcher, remarks)
        changed = _changed_pixels(cohort)
    except torch.AcceleratorError as error:
        raise RareDistillError(
            f"the device failed in {run.id} ({str(error).splitlines()[0]}); what was kept of the run is in {unfinished(folder)}; "
            "see that the device answers (nvidia-smi), then run the same command again"
        ) from error  # every other run would meet it too
    except OSError:
        raise  # a full disk or a vanished folder is not this run's failure: every other run would meet it too
    except Exception as error:
        # One run's failure must not take the others with it; the record and the log say what happened.
        write_text(failure, traceback.format_exc())
        abandon(folder)
        return {**describe(run, cohort), "status": "failed", "error": str(error) or type(error).__name__}, False
    if changed:  # every other run would meet it too
        discard(folder)
        raise DataError(f"{changed}. The run {run.id} was trained meanwhile and is thrown away")
    finish(folder, record)
    failure.unlink(missing_ok=True)
    return record, False


def _changed_pixels(cohort: Cohort) -> str:
    """What happened to the pixels since the study compared them with their hashes; empty where nothing did."""
    try:
        cohort.check_pixels()
    except DataError as error:
        return str(error)
    return ""


def describe(run: Run, cohort: Cohort) -> Record:
    """What the study's files say of a run before it is done."""
    entry, teacher = run.entry, run.entry.teacher
    size = facts(entry.model, channels=len(entry.channels), classes=len(cohort.classes), image_size=cohort.size[0], head=entry.head)
    return {
        "id": run.id, "name": entry.name, "kind": _kind(run), "direction": direction(run, cohort),
        "model": entry.model, "loss": _recipe(entry), "method": "" if teacher is None else entry.method,
        "teacher": run.teacher.id if run.teacher else "", "teacher_name": teacher_name(teacher),
        "external_teacher": isinstance(teacher, External) and teacher.external,
        "network": _network(entry), "channels": list(entry.channels), "repeat": run.split.repeat, "fold": run.split.fold, "seed": run.seed,
        "status": "waiting", "error": "", "parameters": size.parameters, "flops": size.flops, "bytes": size.bytes,
    }  # fmt: skip


def _recipe(entry: Entry) -> str:
    # What is left of a run without its teacher: its fair control is the baseline of that loss.
    own = "" if entry.teacher is None else METHODS[entry.method].own_loss
    return (replace(entry.settings, loss=own) if own else entry.settings).recipe


def _network(entry: Entry) -> str:
    # What its name does not say of a network, and what two entries must share to differ by their teacher only.
    weights = "from scratch" if entry.pretrained is False else "pre-trained" if entry.pretrained is True else f"from {entry.pretrained}"
    scale = f", mean {entry.mean}, std {entry.std}" if entry.mean is not None else ""
    return f"{entry.head} head, dropout {entry.dropout}, {weights}{scale}"


def _kind(run: Run) -> str:
    if run.part is not None:
        return "cross-fitted teacher"
    return "baseline" if run.entry.teacher is None else "distilled"


def direction(run: Run, cohort: Cohort) -> str:
    """``large-to-small``, ``small-to-large`` or ``self``, by parameters; empty without a teacher from this study."""
    if run.teacher is None:
        return ""
    if run.teacher.entry.model == run.entry.model:
        return "self"
    shared = {"classes": len(cohort.classes), "image_size": cohort.size[0]}
    taught, teaches = (facts(e.model, channels=len(e.channels), **shared).parameters for e in (run.entry, run.teacher.entry))
    return "large-to-small" if teaches > taught else "small-to-large"


def _train(run: Run, cohort: Cohort, folder: Path, watcher: Watcher, remarks: list[str]) -> Record:
    settings = run.entry.settings
    fabric = make_fabric(settings.accelerator, settings.precision, settings.devices)
    now = origin(fabric.device.type, teacher_files(run, folder.parent))
    draft = open_draft(folder, now)
    patients_before(run.entry, cohort, run.split)  # refused here where they leak
    with closing(Curves(draft)) as curves:

        def on_epoch(record: Record) -> None:
            curves.add(record)
            watcher.epoch_done(run, record)

        heard: dict[str, Callable[..., None]] = {
            "start": partial(watcher.run_started, run, settings.epochs), "epoch": on_epoch, "view": partial(watcher.view_kept, run),
        }  # fmt: skip
        made = launch(
            _make, (run, cohort, draft), devices=settings.devices, accelerator=settings.accelerator, precision=settings.precision,
            hear=lambda event, *facts: heard[event](*facts),
        )  # fmt: skip
    return {**describe(run, cohort), "status": "done", **made, "remarks": [*remarks, *made["remarks"]], "made_with": now}


def _make(place: Place, run: Run, cohort: Cohort, draft: Path) -> Record:
    """All that a run computes, in one of its processes: the first writes what is kept of it, and its answer counts."""
    place.tell("start")
    torch.manual_seed(run.fold_seed)
    network, fabric = network_of(run.entry, cohort), place.fabric
    keeper, cache = Keeper(draft), Cache(run, cohort, fabric, draft.parent, partial(place.tell, "view"))
    try:
        fitted = _fit(run, cohort, network, draft, place, keeper, cache)
    except DivergedError as error:
        raise FloatingPointError(_told(error, run, cohort, network, draft, write=fabric.is_global_zero)) from error
    start = time.perf_counter()
    stage = second_stage(run, cohort, network, fitted, fabric, seed=run.fold_seed)
    tables = _predictions(run, cohort, network, fitted, fabric)
    if not fabric.is_global_zero:
        return {}
    _save_checkpoints(run, cohort, network, fitted, draft)
    predictions.write(draft / "predictions.parquet", tables, cohort.classes, cohort.background)
    latency = measure_latency(network)
    seconds = sum(record["seconds"] for record in fitted.epochs) + time.perf_counter() - start
    return {
        "seconds": round(seconds, 2), "best_epoch": fitted.best_epoch, "epochs": len(fitted.epochs), "micro_batch": fitted.micro_batch,
        "remarks": [*keeper.remarks, *cache.remarks, *_halved(run, fitted), *_apart(network, fabric)], "teacher_cache": cache.facts,
        "latency_ms": round(latency.milliseconds, 4), "latency_on": latency.device, **stage,
    }  # fmt: skip


def _apart(network: Network, fabric: Fabric) -> list[str]:
    norms = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())
    if fabric.world_size == 1 or fabric.device.type == "cuda" or not norms:
        return []
    return [
        f"each of the {fabric.world_size} processes took batch statistics from its own part of a batch, and those of the first were kept: "
        "on the CPU torch cannot take them over all"
    ]


def _halved(run: Run, fitted: Fitted) -> list[str]:
    if not fitted.micro_batch:
        return []
    size = run.entry.settings.batch_size
    return [
        f"the device's memory did not hold {size} samples: steps of {size} were made of micro-batches of {fitted.micro_batch}, "
        "from which batch statistics and terms that compare samples then come"
    ]


def _told(error: DivergedError, run: Run, cohort: Cohort, network: Network, draft: Path, *, write: bool) -> str:
    """What a run diverged on, and what is left of it: its best epoch so far becomes a checkpoint of its own."""
    samples = ", ".join(cohort.samples["sample"].to_numpy()[error.rows])
    if not error.fitted.best:
        return f"{error}. The batch's samples: {samples}. No epoch had ended before"
    path = draft / "best.safetensors"
    if write:
        checkpoint.save(path, error.fitted.best, promise_of(run, cohort, network))
    return f"{error}. The batch's samples: {samples}. The last good checkpoint: {path} (epoch {error.fitted.best_epoch})"


def _fit(run: Run, cohort: Cohort, network: Network, draft: Path, place: Place, keeper: Keeper, cache: Cache) -> Fitted:
    fabric = place.fabric
    channels, train, validation = make_batches(run, cohort, fabric)
    if run.entry.pretrained and unfold_batch_norm(fabric.to_device(network), next(train.undivided().epoch(0)).select(channels)):
        keeper.remarks.append("the batch norms of the pre-trained weights were folded: they were measured anew on the first batch")
    with first_before(fabric):  # what it keeps of a teacher is there for the others
        objective = make_objective(run, cohort, network, fabric, draft.parent, keep=cache)
    return fit(
        network, objective, train, validation, settings=run.entry.settings, channels=channels, classes=cohort.classes, fabric=fabric,
        on_epoch=partial(place.tell, "epoch"), keeper=keeper, interrupted=place.interrupted, micro_batches=place.micro_batches,
    )  # fmt: skip


def make_batches(run: Run, cohort: Cohort, fabric: Fabric) -> tuple[tuple[str, ...], Batches, Batches | None]:
    """The channels of a run's network, the batches that it trains on, and those of its validation part, if it has one."""
    settings, channels = run.entry.settings, run.entry.channels
    teachers = teacher_channels(run) if settings.views is None else ()  # a teacher that was kept needs no pixels
    wanted = (*channels, *(name for name in teachers if name not in channels))
    train = Batches(
        cohort, run.split.train, channels=wanted, batch_size=settings.batch_size, device=fabric.device, sampler=settings.sampler,
        epochs=settings.epochs, augmentation=PRESETS[settings.augmentation], mixing=MIXINGS[settings.mixing], views=settings.views,
        seed=run.fold_seed, residence=settings.residence,
        drop_last=len(run.split.train) > settings.batch_size, share=(fabric.global_rank, fabric.world_size),
    )  # fmt: skip
    validation = plain_batches(cohort, run.split.validation, channels, fabric, settings.residence) if len(run.split.validation) else None
    return channels, train, validation


def make_objective(
    run: Run, cohort: Cohort, network: Network, fabric: Fabric, runs: Path, *, keep: Callable[[Taught], Taught]
) -> Objective:
    """The terms that a run minimises, with its teachers loaded and checked; ``keep`` may put what they said in their place."""
    entry, settings = run.entry, run.entry.settings
    counts = torch.from_numpy(_counts(run, cohort)).to(fabric.device)
    loss = make_loss(settings.loss, counts=counts, **settings.loss_options)
    deferred = None if settings.deferred == "none" else Deferred(class_weights(settings.deferred, counts), settings.deferred_epoch)
    if entry.teacher is None:
        return Supervised(loss, deferred)
    weights = {"ce_weight": entry.ce_weight, "kd_weight": entry.kd_weight}
    if run.peers:
        method = make_method(entry.method, Facts(counts, classes=cohort.classes), **entry.method_options)
        peers = peers_of(run, cohort, counts=counts)
        return Together(loss, method, peers, fabric, mutual=entry.online == "mutual", deferred=deferred, **weights)
    teacher, facts = teach(run, cohort, network, fabric, runs, counts=counts)
    method = make_method(entry.method, facts, **entry.method_options)
    return Distilled(loss, method, keep(teacher), deferred=deferred, **weights)


def _counts(run: Run, cohort: Cohort) -> np.ndarray:
    return np.bincount(cohort.labels[run.split.train], minlength=len(cohort.classes))


def _save_checkpoints(run: Run, cohort: Cohort, network: Network, fitted: Fitted, draft: Path) -> None:
    promise = promise_of(run, cohort, network)
    checkpoint.save(draft / "best.safetensors", fitted.best, promise)
    checkpoint.save(draft / "last.safetensors", fitted.last, promise)


def promise_of(run: Run, cohort: Cohort, network: Network) -> Promise:
    """What the checkpoints of a run promise."""
    entry = run.entry
    patients = {*cohort.samples["patient"].to_numpy()[run.split.train], *patients_before(entry, cohort, run.split)}
    return Promise(
        model=entry.model, head=entry.head, dropout=entry.dropout, classes=cohort.classes, channels=entry.channels,
        image_size=cohort.size[0], mean=tuple(network.mean), std=tuple(network.std),
        prior=prior_of(entry, torch.from_numpy(_counts(run, cohort))),
        training_patients=tuple(sorted(patients)), external=False, split_hash=run.split.hash,
    )  # fmt: skip


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
    return pd.concat(tables, ignore_index=True)
