"""The training loop for all runs: it sums named loss terms without knowing what they mean."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from raredistill.batches import Batch, Batches
from raredistill.memory import keep_freed
from raredistill.metrics import metrics_from_confusion
from raredistill.models import Network
from raredistill.training.devices import MemoryEndedError, Team
from raredistill.training.objectives import Objective
from raredistill.training.optimizers import Plateau, check_schedule, climb, learning_rate, make_optimizer, set_learning_rate
from raredistill.training.resume import (
    Keeper,
    State,
    load_optimizer_state,
    load_random_state,
    named,
    optimizer_state,
    random_state,
    whole,
)
from raredistill.training.settings import Settings

Weights = dict[str, Tensor]
LARGEST_KEPT = 2**30
"""Bytes of the largest memory block that a process keeps for its next step on the CPU."""


@dataclass
class Fitted:
    """The result of training: weights on the CPU, and one record per epoch.

    ``micro_batch`` is the number of samples per forward pass: less than the batch size if the device ran out of memory.
    """

    best: Weights = field(default_factory=dict)
    last: Weights = field(default_factory=dict)
    best_epoch: int = -1
    best_score: float = -math.inf
    epochs: list[dict[str, Any]] = field(default_factory=list)
    micro_batch: int = 0


class DivergedError(FloatingPointError):
    """The loss is not finite; carries the epoch, the step, the rows of the batch, and the fit up to then."""

    def __init__(self, epoch: int, step: int, rows: np.ndarray, fitted: Fitted) -> None:
        super().__init__(f"the training loss is not finite in epoch {epoch}, step {step}; lower learning_rate or set clip_norm")
        self.rows, self.fitted = rows, fitted


def fit(
    network: Network,
    objective: Objective,
    train: Batches,
    validation: Batches | None,
    *,
    settings: Settings,
    channels: tuple[str, ...],
    classes: tuple[str, ...],
    fabric: Fabric,
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
    keeper: Keeper | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    micro_batches: int = 1,
) -> Fitted:
    """Train a network; the best epoch is chosen on validation data, never on test data.

    An interruption (Ctrl-C, ``sys.exit``) takes effect between two steps, after the state was saved.

    Args:
        network: randomly initialised or pre-trained; it is trained in place.
        objective: terms to minimise.
        train: shuffled, augmented batches of the training part.
        validation: plain batches of the validation part; without one the last epoch is the best.
        settings: epochs, optimiser, schedule, selection.
        channels: channels of a batch that this network uses.
        classes: class names for the records.
        fabric: the device.
        on_epoch: called with each epoch's record, for logs and progress; a resumed training first repeats its earlier records.
        keeper: saves the state from time to time and restores it; without one, nothing is saved.
        interrupted: called after each step; if true, the state is saved and the training ends with ``KeyboardInterrupt``.
        micro_batches: parts into which this process splits its samples of each batch; raised when the device runs out of memory.

    Raises:
        ConfigError: the schedule depends on validation, and there is none.
        DivergedError: the loss is not finite.
        MemoryEndedError: one of several processes ran out of device memory.
        OSError: the state cannot be written; the last saved state is intact.
    """
    check_schedule(settings, validated=validation is not None)
    trainer = Trainer(network, objective, settings, channels, classes, fabric)
    trainer.team.own_generator()
    if keeper is not None and (state := keeper.load()) is not None:
        trainer.load_state(state)
    if micro_batches > trainer.micro_batches:
        trainer.divide(micro_batches, -(-min(train.batch_size, len(train.rows)) // trainer.team.size))
    for record in trainer.fitted.epochs:
        on_epoch(record)
    try:
        while not trainer.is_over():
            on_epoch(trainer.epoch(train, validation, keeper, interrupted))
        trainer.fitted.last = trainer.weights()
        trainer.keep(keeper)
    except (KeyboardInterrupt, SystemExit):
        trainer.keep(keeper)
        raise
    return trainer.fitted


def _score(record: dict[str, Any], select: str) -> float:
    if select == "last":
        return float(record["epoch"])
    value = float(record["validation"][select])
    return -value if select == "loss" else value


class Trainer:
    """One network with its optimiser, trained one epoch at a time."""

    def __init__(
        self,
        network: Network,
        objective: Objective,
        settings: Settings,
        channels: tuple[str, ...],
        classes: tuple[str, ...],
        fabric: Fabric,
    ) -> None:
        self.settings, self.channels, self.classes, self.fabric = settings, channels, classes, fabric
        self.team, self.objective, self.network = Team(fabric), objective, network
        self.team.synchronise(network)
        self.team.synchronise(objective.trainable)
        self.model, self.optimizer = fabric.setup(network, make_optimizer(network, settings, objective.trainable))
        self.model.mark_forward_method("see")
        if fabric.device.type == "cpu":
            keep_freed(LARGEST_KEPT)
        self.average = _average(network, settings)
        network.compile_body(settings.compile, training=True)
        self.plateau = Plateau(settings) if settings.schedule == "plateau" else None
        self.fitted = Fitted()
        self.micro_batches = 1
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.tally, self.steps, self.seconds = Tally(self.classes, self.fabric.device), 0, 0.0

    def is_over(self) -> bool:
        """Whether all epochs are finished, or patience is exhausted."""
        done, patience = len(self.fitted.epochs), self.settings.patience
        return done >= self.settings.epochs or (patience is not None and done - 1 - self.fitted.best_epoch >= patience)

    def epoch(
        self,
        train: Batches,
        validation: Batches | None,
        keeper: Keeper | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Train one epoch, or the rest of one, and evaluate on validation; returns the epoch's record."""
        start = time.perf_counter() - self.seconds
        epoch = len(self.fitted.epochs)
        self.model.train()
        for batch in train.epoch(epoch, self.steps):
            # The rate at the middle of the step: warm-up wastes no step at rate 0, and the last step still belongs to its epoch.
            set_learning_rate(self.optimizer, self._rate(epoch + (self.steps + 0.5) / len(train)))
            with whole():
                self.tally.add(*self._counted(batch))
                self.steps += 1
                self.seconds = time.perf_counter() - start
            due, stop = self.team.agreed(keeper is not None and keeper.due(), interrupted())
            if due:
                self._check_finite(train)
                self.keep(keeper)
            if stop:
                raise KeyboardInterrupt
        self._check_finite(train)
        return self._end_epoch(epoch, validation, start)

    def _rate(self, epoch: float) -> float:
        settings = self.settings if self.plateau is None else replace(self.settings, learning_rate=self.plateau.rate)
        return learning_rate(settings, epoch)

    def _counted(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        terms, logits = self.step(batch)
        return logits, batch.labels, terms

    def _check_finite(self, train: Batches) -> None:
        epoch, step = len(self.fitted.epochs), self.team.earliest(self.tally.first_bad())
        if step is not None:
            raise DivergedError(epoch, step, train.rows_of(epoch, step), self.fitted)

    def _end_epoch(self, epoch: int, validation: Batches | None, start: float) -> dict[str, Any]:
        ending = self.settings.average_epochs
        if self.average is not None and ending is not None and epoch >= self.settings.epochs - ending:
            self.average.update_parameters(self.network)
        self.team.follow_first(*dict.fromkeys((self.network, self._evaluated())))
        train = self.tally.over(self.team).summary()
        record: dict[str, Any] = {"epoch": epoch, "train": train, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        if validation is not None:
            record["validation"] = self._look(validation)
        record["seconds"] = round(time.perf_counter() - start, 3)
        with whole():
            self.fitted.epochs.append(record)
            self._keep_best(record, self.settings.select if validation is not None else "last")
            if self.plateau is not None:
                self.plateau.look(float(record["validation"][self.settings.select]))
            self._begin_epoch()
        return record

    def _keep_best(self, record: dict[str, Any], select: str) -> None:
        score = _score(record, select)
        if score > self.fitted.best_score:
            self.fitted.best, self.fitted.best_epoch, self.fitted.best_score = self.weights(), record["epoch"], score

    def step(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Take one optimiser step on a batch; returns the detached terms and logits, still on the device."""
        terms, logits = self._slope(batch)
        if self.settings.sam_rho is not None:
            backs = [climb(learner, self.settings.sam_rho) for learner in self._learners()]
            self._slope(batch)
            for back in backs:
                back()
        if self.settings.clip_norm is not None:
            for learner in self._learners():
                # Non-finite values show up in the loss, which is checked without synchronising the device at every step.
                nn.utils.clip_grad_norm_(learner, self.settings.clip_norm, error_if_nonfinite=False)
        self.optimizer.step()
        if self.average is not None and self.settings.ema_decay is not None:
            self.average.update_parameters(self.network)
        return terms, logits

    def _learners(self) -> list[list[nn.Parameter]]:
        """Groups of weights clipped together: the student's with its method's layers, and each peer's."""
        own, beside = list(self.network.parameters()), self.objective.trainable
        if beside is None or not self.objective.apart:
            return [[*own, *([] if beside is None else beside.parameters())]]
        return [own, *(list(peer.parameters()) for peer in beside.children())]

    def _slope(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Compute gradients of the terms; if the device runs out of memory, halve the micro-batches from now on and retry."""
        before = [buffer.clone() for buffer in self._buffers()]
        while True:
            try:
                return self._accumulate(batch.split(self.micro_batches))
            except torch.OutOfMemoryError:
                if self.micro_batches >= len(batch.labels):
                    raise
                if self.team.size > 1:
                    raise MemoryEndedError(2 * self.micro_batches) from None  # the others are waiting for these gradients
            # Outside the handler: inside it, the error still holds the memory of the failed pass.
            for buffer, value in zip(self._buffers(), before, strict=True):
                buffer.copy_(value)  # undo the failed pass's update of the running statistics
            self.divide(2 * self.micro_batches, len(batch.labels))
            if self.fabric.device.type == "cuda":
                torch.cuda.empty_cache()

    def divide(self, micro_batches: int, samples: int) -> None:
        """Split this process's ``samples`` of a batch into this many parts from now on."""
        self.micro_batches = micro_batches
        self.fitted.micro_batch = -(-samples // micro_batches)

    def _buffers(self) -> Iterator[Tensor]:
        yield from self.network.buffers()
        if self.objective.trainable is not None:
            yield from self.objective.trainable.buffers()

    def _accumulate(self, parts: Sequence[Batch]) -> tuple[dict[str, Tensor], Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        samples = sum(len(part.labels) for part in parts)
        sums: dict[str, Tensor] = {}
        logits = []
        for number, part in enumerate(parts):
            # Gradients are exchanged between processes only at the last part, when they have been summed over all parts.
            with self.fabric.no_backward_sync(self.model, enabled=number < len(parts) - 1):
                terms, seen = self._pass(part, len(part.labels) / samples)
            sums = {name: sums[name] + term if name in sums else term for name, term in terms.items()}
            logits.append(seen)
        self.team.mean_gradients(self.objective.trainable)
        return sums, torch.cat(logits)

    def _pass(self, batch: Batch, share: float) -> tuple[dict[str, Tensor], Tensor]:
        # Terms are means over the batch, so each part is weighted by its share of the samples.
        student = self.model.see(batch.select(self.channels), maps=self.objective.maps)
        terms = {name: term * share for name, term in self.objective(batch, student).items()}
        self.fabric.backward(batch.weight * torch.stack(list(terms.values())).sum())
        return {name: term.detach() for name, term in terms.items()}, student.logits.detach()

    def keep(self, keeper: Keeper | None) -> None:
        """Save the state of training, unless the loss is not finite: then the last saved state is the last good one."""
        good = self.team.earliest(self.tally.first_bad()) is None
        if keeper is not None and good and all(bool(value.isfinite().all()) for value in self.network.parameters()):
            state = self.state()
            if self.team.rank == 0:
                keeper.save(state)

    def state(self) -> State:
        """Everything that the next step and the choice of the best epoch depend on."""
        moments, groups = optimizer_state(self.optimizer)
        parts = {
            "network": self.network.state_dict(), "optimizer": moments, "best": self.fitted.best,
            "average": {} if self.average is None else self.average.state_dict(),
            "beside": {} if self.objective.trainable is None else self.objective.trainable.state_dict(),
        }  # fmt: skip
        own = {"terms": self.tally.terms, "tally": {"confusion": self.tally.confusion}, "random": random_state(self.fabric.device)}
        for part, tensors in own.items():
            parts.update({f"{part}-{rank}": theirs for rank, theirs in enumerate(self.team.each(tensors))})
        fitted = {name: getattr(self.fitted, name) for name in ("best_epoch", "best_score", "epochs", "micro_batch")}
        facts = {
            "fitted": fitted, "optimizer": groups, "steps": self.steps, "seconds": self.seconds,
            "micro_batches": self.micro_batches, "plateau": None if self.plateau is None else self.plateau.state(),
        }  # fmt: skip
        return State({key: value for part, tensors in parts.items() for key, value in named(part, tensors).items()}, facts)

    def load_state(self, state: State) -> None:
        """Restore a state from :meth:`state`."""
        facts, device, rank = state.facts, self.fabric.device, self.team.rank
        self.network.load_state_dict(state.part("network"))
        load_optimizer_state(self.optimizer, state.part("optimizer"), facts["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state.part("average"))
        if self.objective.trainable is not None:
            self.objective.trainable.load_state_dict(state.part("beside"))
        if self.plateau is not None:
            self.plateau.load_state(facts["plateau"])
        self.fitted = Fitted(best=state.part("best"), **facts["fitted"])
        self.steps, self.seconds, self.micro_batches = facts["steps"], facts["seconds"], facts["micro_batches"]
        self.tally.load(state.part(f"tally-{rank}")["confusion"].to(device), state.part(f"terms-{rank}"), self.steps)
        load_random_state(state.part(f"random-{rank}"), device)

    def _look(self, batches: Batches) -> dict[str, Any]:
        logits, labels = predict_logits(self._evaluated(), batches, channels=self.channels, fabric=self.fabric)
        tally = Tally(self.classes, torch.device("cpu"))
        tally.add(logits, labels, {"loss": nn.functional.cross_entropy(logits, labels)})
        summary = tally.summary()
        summary.pop("terms")
        return summary

    def _evaluated(self) -> nn.Module:
        begun = self.average is not None and (self.settings.ema_decay is not None or int(self.average.n_averaged) > 0)
        return self.average.module if self.average is not None and begun else self.network

    def weights(self) -> Weights:
        """The weights that are evaluated (the moving average if there is one), copied to the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._evaluated().state_dict().items()}


def _average(network: Network, settings: Settings) -> torch.optim.swa_utils.AveragedModel | None:
    """The averaged copy of the weights: exponentially over steps, or evenly over the ends of the last epochs."""
    if settings.ema_decay is None and settings.average_epochs is None:
        return None
    decay = settings.ema_decay
    weigh = None if decay is None else torch.optim.swa_utils.get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    # Batch statistics are copied, not averaged: they already are running means.
    return torch.optim.swa_utils.AveragedModel(copy.deepcopy(network), multi_avg_fn=weigh)


class Tally:
    """Sums over an epoch that stay on the device until its end: one transfer per epoch."""

    def __init__(self, classes: tuple[str, ...], device: torch.device) -> None:
        self.classes = classes
        self.confusion = torch.zeros(len(classes) ** 2, dtype=torch.int64, device=device)
        self.terms: dict[str, Tensor] = {}
        self.samples = 0
        self.batches = 0
        self._bad = torch.full((), -1, device=device)

    def load(self, confusion: Tensor, terms: dict[str, Tensor], batches: int) -> None:
        """Restore the running sums of a partly finished epoch; every loss in them was finite."""
        self.confusion, self.samples, self.batches = confusion, int(confusion.sum()), batches
        self.terms = {name: term.to(confusion.device) for name, term in terms.items()}

    def add(self, logits: Tensor, labels: Tensor, terms: dict[str, Tensor]) -> None:
        """Count a batch: ``logits (N, K)``, ``labels (N,)``, scalar terms that are means over the batch."""
        size = len(self.classes)
        places = labels * size + logits.argmax(dim=1)
        self.confusion.index_add_(0, places, torch.ones_like(places))  # updates one count per sample, not all K * K
        for name, term in terms.items():
            self.terms[name] = self.terms.get(name, torch.zeros_like(term, dtype=torch.float32)) + term.float() * len(labels)
        finite = torch.stack([term.float() for term in terms.values()]).sum().isfinite()
        self._bad = torch.where(finite | (self._bad >= 0), self._bad, self.batches)
        self.samples += len(labels)
        self.batches += 1

    def over(self, team: Team) -> Tally:
        """Sum over all processes."""
        if team.size == 1:
            return self
        terms = torch.stack([term.double() for term in self.terms.values()])
        sums = team.all_sum(torch.cat([self.confusion.double(), terms]))
        confusion, totals = sums[: len(self.confusion)], sums[len(self.confusion) :]
        found = Tally(self.classes, self.confusion.device)
        found.load(confusion.long(), dict(zip(self.terms, totals, strict=True)), self.batches)
        return found

    def first_bad(self) -> int | None:
        """Number of the first batch of the epoch whose loss was not finite; None if there is none."""
        bad = int(self._bad)
        return bad if bad >= 0 else None

    def summary(self) -> dict[str, Any]:
        """Loss, terms, accuracy, macro F1 and per-class precision, recall and F1 of the counted samples."""
        terms = {name: float(total) / max(self.samples, 1) for name, total in self.terms.items()}
        found = metrics_from_confusion(self.confusion.cpu().numpy().reshape(len(self.classes), -1))
        record: dict[str, Any] = {"loss": sum(terms.values()), "terms": terms}
        for key in ("accuracy", "macro_f1", "balanced_accuracy"):
            record[key] = round(float(found[key]), 6)
        for key in ("precision", "recall", "f1"):
            record[key] = {name: _number(value) for name, value in zip(self.classes, np.asarray(found[key]), strict=True)}
        return record


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


@torch.no_grad()
def predict_logits(network: nn.Module, batches: Batches, *, channels: tuple[str, ...], fabric: Fabric) -> tuple[Tensor, Tensor]:
    """Run a network in evaluation mode over unshuffled batches; returns ``logits (N, K)`` float32 and ``labels (N,)`` on the CPU.

    With several processes, each row is computed once, and every process receives all rows in order.
    """
    was_training = network.training
    network.eval()
    logits, labels = [], []
    for batch in batches.epoch(0):
        with fabric.autocast():
            logits.append(_logits(network, batch.select(channels)).float())
        labels.append(batch.labels)
    network.train(was_training)
    return in_order(torch.cat(logits), batches, fabric), in_order(torch.cat(labels), batches, fabric)


def in_order(rows: Tensor, batches: Batches, fabric: Fabric) -> Tensor:
    """Gather the processes' results for unshuffled batches, ``(n, ...)`` each, on the CPU in the order of the batches' rows."""
    team = Team(fabric)
    return rows.cpu() if team.size == 1 else team.gather(rows)[batches.back()]


def _logits(network: nn.Module, images: Tensor) -> Tensor:
    # Halved until it fits in memory: in evaluation mode no sample depends on the others.
    try:
        logits: Tensor = network(images)
        return logits
    except torch.OutOfMemoryError:
        if len(images) == 1:
            raise
    return torch.cat([_logits(network, half) for half in images.tensor_split(2)])
