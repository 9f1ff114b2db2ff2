"""The one training loop. It adds up named terms and does not know what they are."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from raredistill.batches import Batches
from raredistill.distill.contract import Outputs
from raredistill.metrics import metrics_from_confusion
from raredistill.models import Network
from raredistill.training.objectives import Objective
from raredistill.training.optimizers import climb, learning_rate, make_optimizer, set_learning_rate
from raredistill.training.settings import Settings

Weights = dict[str, Tensor]


@dataclass
class Fitted:
    """What training leaves behind: weights on the CPU, and one record an epoch."""

    best: Weights = field(default_factory=dict)
    last: Weights = field(default_factory=dict)
    best_epoch: int = -1
    best_score: float = -math.inf
    epochs: list[dict[str, Any]] = field(default_factory=list)


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
) -> Fitted:
    """Train a network; the best epoch is chosen on validation, never on test.

    Args:
        network: as built or pre-trained; it is trained in place.
        objective: terms to minimise.
        train: shuffled, augmented batches of the training part.
        validation: plain batches of the validation part; without one the last epoch is the best.
        settings: epochs, optimiser, schedule, selection.
        channels: what this network sees of a batch.
        classes: names for the records.
        fabric: the device.
        on_epoch: called with each epoch's record, for logs and progress.

    Raises:
        FloatingPointError: the loss is not finite; the message names the epoch.
    """
    trainer = Trainer(network, objective, settings, channels, classes, fabric)
    fitted = Fitted()
    for epoch in range(settings.epochs):
        record = trainer.epoch(train, validation, epoch)
        fitted.epochs.append(record)
        on_epoch(record)
        _keep_best(fitted, record, trainer, settings.select if validation is not None else "last")
        if settings.patience is not None and epoch - fitted.best_epoch >= settings.patience:
            break
    fitted.last = trainer.weights()
    return fitted


def _keep_best(fitted: Fitted, record: dict[str, Any], trainer: Trainer, select: str) -> None:
    score = _score(record, select)
    if score > fitted.best_score:
        fitted.best, fitted.best_epoch, fitted.best_score = trainer.weights(), record["epoch"], score


def _score(record: dict[str, Any], select: str) -> float:
    if select == "last":
        return float(record["epoch"])
    value = float(record["validation"][select])
    return -value if select == "loss" else value


class Trainer:
    """One network with its optimiser, trained an epoch at a time."""

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
        self.objective = objective
        self.network = network
        self.model, self.optimizer = fabric.setup(network, make_optimizer(network, settings, objective.trainable))
        self.model.mark_forward_method("see")
        self.average = _moving_average(network, settings.ema_decay)

    def epoch(self, train: Batches, validation: Batches | None, epoch: int) -> dict[str, Any]:
        """Train one epoch and look at validation; returns the epoch's record."""
        start = time.perf_counter()
        record: dict[str, Any] = {"epoch": epoch, "train": self._train(train, epoch)}
        record["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        if validation is not None:
            record["validation"] = self._look(validation)
        return {**record, "seconds": round(time.perf_counter() - start, 3)}

    def _train(self, batches: Batches, epoch: int) -> dict[str, Any]:
        self.model.train()
        tally = Tally(self.classes, self.fabric.device)
        for step, batch in enumerate(batches.epoch(epoch)):
            set_learning_rate(self.optimizer, learning_rate(self.settings, epoch + (step + 1) / len(batches)))
            terms, logits = self.step(batch)
            tally.add(logits, batch.labels, terms)
        summary = tally.summary()
        if not math.isfinite(summary["loss"]):
            raise FloatingPointError(f"the training loss is {summary['loss']} in epoch {epoch}; lower learning_rate or set clip_norm")
        return summary

    def step(self, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
        """One optimiser step on a batch; returns the detached terms and logits, still on the device."""
        terms, logits = self._slope(batch)
        if self.settings.sam_rho is not None:
            back = climb(self.network.parameters(), self.settings.sam_rho)
            self._slope(batch)
            back()
        if self.settings.clip_norm is not None:
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=self.settings.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        return terms, logits

    def _slope(self, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        seen = self.model.see(batch.select(self.channels), maps=self.objective.maps)
        student = Outputs(seen.logits, seen.features, seen.maps)
        terms = self.objective(batch, student)
        self.fabric.backward(torch.stack(list(terms.values())).sum())
        return {name: term.detach() for name, term in terms.items()}, student.logits.detach()

    def _look(self, batches: Batches) -> dict[str, Any]:
        logits, labels = predict_logits(self._evaluated(), batches, channels=self.channels, fabric=self.fabric)
        tally = Tally(self.classes, torch.device("cpu"))
        tally.add(logits, labels, {"loss": nn.functional.cross_entropy(logits, labels)})
        summary = tally.summary()
        summary.pop("terms")
        return summary

    def _evaluated(self) -> nn.Module:
        return self.network if self.average is None else self.average.module

    def weights(self) -> Weights:
        """The weights that count (averaged ones, where an average is kept), copied to the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._evaluated().state_dict().items()}


def _moving_average(network: Network, decay: float | None) -> torch.optim.swa_utils.AveragedModel | None:
    if decay is None:
        return None
    average = torch.optim.swa_utils.AveragedModel(
        copy.deepcopy(network),
        multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay),  # type: ignore[no-untyped-call]
    )
    # Batch statistics are copied, not averaged: they are running means already.
    return average


class Tally:
    """Sums over an epoch that stay on the device until its end: one transfer an epoch."""

    def __init__(self, classes: tuple[str, ...], device: torch.device) -> None:
        self.classes = classes
        self.confusion = torch.zeros(len(classes) ** 2, dtype=torch.int64, device=device)
        self.terms: dict[str, Tensor] = {}
        self.samples = 0

    def add(self, logits: Tensor, labels: Tensor, terms: dict[str, Tensor]) -> None:
        """Count a batch: ``logits (N, K)``, ``labels (N,)``, scalar terms that are means over the batch."""
        size = len(self.classes)
        self.confusion += torch.bincount(labels * size + logits.argmax(dim=1), minlength=size * size)
        for name, term in terms.items():
            self.terms[name] = self.terms.get(name, torch.zeros_like(term, dtype=torch.float32)) + term.float() * len(labels)
        self.samples += len(labels)

    def summary(self) -> dict[str, Any]:
        """Loss, terms, accuracy, macro F1 and per-class precision, recall and F1 of what was counted."""
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
    """Run a network in evaluation mode over unshuffled batches; returns ``logits (N, K)`` float32 and ``labels (N,)`` on the CPU."""
    was_training = network.training
    network.eval()
    logits, labels = [], []
    for batch in batches.epoch(0):
        with fabric.autocast():
            logits.append(network(batch.select(channels)).float())
        labels.append(batch.labels)
    network.train(was_training)
    return torch.cat(logits).cpu(), torch.cat(labels).cpu()
