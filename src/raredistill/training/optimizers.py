"""Optimisers with separate weight decay for biases, and learning-rate schedules: pure functions of the epoch, except plateau."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from raredistill.errors import ConfigError
from raredistill.training.settings import Settings


def make_optimizer(network: nn.Module, settings: Settings, beside: nn.Module | None = None) -> torch.optim.Optimizer:
    """Build the optimiser over the trainable parameters; weights and biases form two groups with their own decay.

    Args:
        network: network to train.
        settings: choice of optimiser, rate and decay.
        beside: the method's own layers, trained together and then discarded.
    """
    modules = [network] if beside is None else [network, beside]
    named = [each for module in modules for each in module.named_parameters() if each[1].requires_grad]
    bias_decay = settings.weight_decay if settings.bias_weight_decay is None else settings.bias_weight_decay
    groups = [
        {"params": [p for name, p in named if not name.endswith("bias")], "weight_decay": settings.weight_decay},
        {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": bias_decay},
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, fused=True)
    family = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return family(groups, lr=settings.learning_rate, fused=True)


@torch.no_grad()
def climb(parameters: Iterable[nn.Parameter], radius: float) -> Callable[[], None]:
    """Move weights by ``radius`` along their gradient, to the worst point nearby; returns a function that moves them back.

    References:
        Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, ICLR 2021.
    """
    moved = [(weight, weight.detach().clone()) for weight in parameters if weight.grad is not None]
    gradients = [weight.grad for weight, _ in moved]
    norm = torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm()
    for weight, _ in moved:
        weight.add_(weight.grad * (radius / (norm + 1e-12)))

    @torch.no_grad()
    def back() -> None:
        for weight, before in moved:
            weight.copy_(before)

    return back


def learning_rate(settings: Settings, epoch: float) -> float:
    """Learning rate at a point of training, in epochs from the start (fractions are steps within an epoch).

    It is a pure function, so a resumed run needs no scheduler state.
    """
    if epoch < settings.warmup_epochs:
        return settings.learning_rate * epoch / settings.warmup_epochs
    return settings.learning_rate * _decay(settings, epoch)


def _decay(settings: Settings, epoch: float) -> float:
    if settings.schedule == "step":
        return float(settings.factor ** (int(epoch) // settings.step_epochs))
    if settings.schedule == "multistep":
        return float(settings.factor ** sum(epoch >= milestone for milestone in settings.milestones))
    if settings.schedule == "cosine":
        span = max(settings.epochs - settings.warmup_epochs, 1e-9)
        return 0.5 * (1 + math.cos(math.pi * (epoch - settings.warmup_epochs) / span))
    return 1.0


class Plateau:
    """The rate after warm-up, lowered by torch's own ``ReduceLROnPlateau`` when validation no longer improves.

    Its state is plain JSON, so that a resumed run lowers the rate in the same epochs.

    Args:
        settings: the initial rate, ``factor``, ``step_epochs`` (torch's patience), and the monitored metric ``select``.
    """

    def __init__(self, settings: Settings) -> None:
        # A separate optimiser, because the rate of the trained one also changes within warm-up epochs.
        self._holder = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
        mode: Literal["min", "max"] = "min" if settings.select == "loss" else "max"
        self._torch = ReduceLROnPlateau(self._holder, mode, factor=settings.factor, patience=settings.step_epochs)

    @property
    def rate(self) -> float:
        """The rate of the next epoch."""
        return float(self._holder.param_groups[0]["lr"])

    def look(self, value: float) -> None:
        """Update with the monitored metric at the end of an epoch."""
        self._torch.step(value)

    def state(self) -> dict[str, Any]:
        """Everything that the next rates depend on."""
        return {"rate": self.rate, **self._torch.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a state from :meth:`state`."""
        set_learning_rate(self._holder, state["rate"])
        self._torch.load_state_dict({key: value for key, value in state.items() if key != "rate"})


def check_schedule(settings: Settings, *, validated: bool) -> None:
    """Refuse a schedule that monitors validation if no validation metric is available.

    Raises:
        ConfigError: there is no validation part, or ``select`` is not a metric.
    """
    if settings.schedule == "plateau" and (settings.select == "last" or not validated):
        lacking = "the split has no validation part" if not validated else "select is last; select by a metric"
        raise ConfigError(f"schedule: plateau monitors validation, but {lacking}, or use another schedule")


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
