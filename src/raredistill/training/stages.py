"""Second stages: change the classifier of a trained network and leave its features as they are.

Stages that train use features of images without augmentation, computed once; the publications pass augmented images through the
frozen network in each epoch. Each stage only replaces the weights of the last layer, so the format of checkpoints stays the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from raredistill.batches import Batches
from raredistill.errors import ConfigError
from raredistill.metrics import confusion_matrix, metrics_from_confusion
from raredistill.models import Network
from raredistill.sampling import epoch_order
from raredistill.training.loop import in_order

_BATCH, _RATE, _MOMENTUM, _DECAY = 64, 0.1, 0.9, 5e-4
TAUS = {"tau_norm": np.linspace(0, 1, 21), "logit_adjustment": np.linspace(0, 2, 41)}


@dataclass(frozen=True)
class Inputs:
    """Inputs of the last layer: ``values (N, F)`` and ``labels (N,)``, on the CPU."""

    values: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Linear:
    """A last layer: ``weight (K, F)`` and ``bias (K,)``."""

    weight: Tensor
    bias: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Map ``(N, F)`` to logits ``(N, K)``."""
        return F.linear(values, self.weight, self.bias)


def classifier_of(network: Network) -> nn.Linear:
    """The last layer of a network.

    Raises:
        ConfigError: the head does not end in a linear layer.
    """
    last = network.head[-1] if isinstance(network.head, nn.Sequential) else network.head
    if not isinstance(last, nn.Linear):
        raise ConfigError(f"a second stage changes a linear classifier, but {network.name} ends in {type(last).__name__}; set head: linear")
    return last


@torch.no_grad()
def inputs_of(network: Network, batches: Batches, *, channels: tuple[str, ...], fabric: Fabric) -> Inputs:
    """Run all but the last layer over unshuffled batches, in evaluation mode."""
    classifier_of(network)
    network.eval()
    body = network.head[:-1] if isinstance(network.head, nn.Sequential) else nn.Identity()
    parts = []
    for batch in batches.epoch(0):
        with fabric.autocast():
            parts.append((body(network.features(batch.select(channels))).float().cpu(), batch.labels.cpu()))
    values, labels = zip(*parts, strict=True)
    return Inputs(in_order(torch.cat(values), batches, fabric), in_order(torch.cat(labels), batches, fabric))


def retrained(layer: Linear, train: Inputs, *, epochs: int, seed: int) -> Linear:
    """Classifier re-training: a fresh last layer, trained on equally many samples of each class.

    References:
        Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020 (cRT).
    """
    torch.manual_seed(seed)
    classes, width = layer.weight.shape
    fresh = nn.Linear(width, classes)
    _train(list(fresh.parameters()), fresh, train, epochs=epochs, seed=seed)
    return Linear(fresh.weight.detach(), fresh.bias.detach())


def rescaled(layer: Linear, train: Inputs, *, epochs: int, seed: int) -> Linear:
    """Learnable weight scaling: one factor for each class' logit, trained on equally many samples of each class.

    References:
        Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020 (LWS).
    """
    scale = nn.Parameter(torch.ones(len(layer.bias)))
    _train([scale], lambda values: scale * layer(values), train, epochs=epochs, seed=seed)
    factor = scale.detach()
    return Linear(layer.weight * factor[:, None], layer.bias * factor)


def _train(parameters: list[nn.Parameter], logits: Callable[[Tensor], Tensor], train: Inputs, *, epochs: int, seed: int) -> None:
    optimizer = torch.optim.SGD(parameters, lr=_RATE, momentum=_MOMENTUM, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        order = torch.from_numpy(epoch_order(train.labels.numpy(), sampler="balanced", seed=seed, epoch=epoch))
        for rows in torch.split(order, _BATCH):
            optimizer.zero_grad()
            F.cross_entropy(logits(train.values[rows]), train.labels[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()


def normalised(layer: Linear, tau: float) -> Linear:
    """Tau-normalisation: each class' weights divided by their norm to the power tau; no bias.

    References:
        Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020.
    """
    norms = layer.weight.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return Linear(layer.weight / norms**tau, torch.zeros_like(layer.bias))


def adjusted(layer: Linear, tau: float, counts: Tensor) -> Linear:
    """Post-hoc logit adjustment as a change of bias: ``bias - tau * log prior``.

    References:
        Menon et al., Long-Tail Learning via Logit Adjustment, ICLR 2021.
    """
    return Linear(layer.weight, layer.bias - tau * (counts / counts.sum()).log().to(layer.bias))


def best_tau(make: Callable[[float], Linear], taus: np.ndarray, validation: Inputs, *, metric: str) -> float:
    """Return the tau whose layer is best on validation; the smallest of ties.

    Args:
        make: returns the layer for a tau.
        taus: candidates, ascending.
        validation: inputs of validation patients.
        metric: ``macro_f1``, ``balanced_accuracy``, ``accuracy`` or ``loss``.
    """
    return float(max(taus, key=lambda tau: (_score(make(float(tau))(validation.values), validation.labels, metric), -tau)))


def _score(logits: Tensor, labels: Tensor, metric: str) -> float:
    if metric == "loss":
        return -float(F.cross_entropy(logits, labels))
    matrix = confusion_matrix(labels.numpy(), logits.argmax(dim=1).numpy(), logits.shape[1])
    return float(metrics_from_confusion(matrix)[metric])


def refine(
    stage: str, layer: Linear, train: Inputs, validation: Inputs | None, *, classes: int, metric: str, epochs: int, seed: int
) -> tuple[Linear, float | None]:
    """Carry out a second stage.

    Args:
        stage: ``crt``, ``lws``, ``tau_norm`` or ``logit_adjustment``.
        layer: last layer of the trained network.
        train: inputs of the training part.
        validation: chooses tau; not needed by ``crt`` and ``lws``.
        classes: number of classes, K.
        metric: by which tau is chosen.
        epochs: of ``crt`` and ``lws``.
        seed: for the fresh layer and the order of samples.

    Returns:
        The new layer, and tau if one was chosen.

    Raises:
        ConfigError: there is no validation part to choose tau on.
    """
    if stage in ("crt", "lws"):
        return (retrained if stage == "crt" else rescaled)(layer, train, epochs=epochs, seed=seed), None
    if validation is None:
        raise ConfigError(
            f"stage {stage} chooses tau on validation, but this split has none; use stage crt or lws, or give a validation part"
        )
    counts = torch.bincount(train.labels, minlength=classes).float()

    def make(tau: float) -> Linear:
        return normalised(layer, tau) if stage == "tau_norm" else adjusted(layer, tau, counts)

    tau = best_tau(make, TAUS[stage], validation, metric=metric)
    return make(tau), tau
