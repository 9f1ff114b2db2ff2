"""Losses for imbalance: pure functions of logits and labels, and the class prior that the logits of each then carry."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, Protocol

import torch
from annotated_types import Ge, Lt
from torch import Tensor
from torch.nn import functional as F

from raredistill.errors import ConfigError
from raredistill.options import NotNegative, Option, Share, check_options, did_you_mean, options_of, show_defaults
from raredistill.plugins import HINT, Plugin, Registry
from raredistill.sampling import POWERS

Reduction = Literal["mean", "none"]
COSINE_SCALE = 30.0
"""Factor that the cosine head applies to its cosines: LDAM's published scale."""


def _reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    # Always divided by N, also with class weights: additive under accumulation and over processes.
    return losses.mean() if reduction == "mean" else losses


def _wide(logits: Tensor) -> Tensor:
    # Half precision has too few digits for a logarithm of a sum of exponentials.
    return logits if logits.dtype == torch.float64 else logits.float()


def _positive(counts: Tensor) -> Tensor:
    if bool((counts <= 0).any()):
        raise ValueError(f"every class needs training samples; the counts are {counts.tolist()}")
    return counts.float()


def cross_entropy(
    logits: Tensor, target: Tensor, *, class_weights: Tensor | None = None, label_smoothing: Share = 0.0, reduction: Reduction = "mean"
) -> Tensor:
    """Cross-entropy; a weighted mean divides by N, not by the sum of weights.

    Args:
        logits: ``(N, K)``, unnormalised.
        target: ``(N,)`` class indices.
        class_weights: ``(K,)``.
        label_smoothing: share of the target spread evenly over all classes.
        reduction: ``mean`` or ``none``.

    Returns:
        Scalar, or ``(N,)`` with ``reduction="none"``, in nats.

    Examples:
        >>> cross_entropy(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), reduction="none")
        tensor([0.1269, 0.3133])
    """
    logits = _wide(logits)
    weight = None if class_weights is None else class_weights.to(logits)
    return _reduced(F.cross_entropy(logits, target, weight=weight, label_smoothing=label_smoothing, reduction="none"), reduction)


def label_aware_smoothing(
    logits: Tensor, target: Tensor, *, counts: Tensor, head: Share = 0.4, tail: Share = 0.1, reduction: Reduction = "mean"
) -> Tensor:
    """Cross-entropy whose label smoothing grows with the class's count: confident head classes are smoothed most.

    Args:
        logits: ``(N, K)``, unnormalised.
        target: ``(N,)`` class indices.
        counts: ``(K,)`` training samples per class, all positive.
        head: share that the most common class gives to the other classes.
        tail: the same for the rarest class.
        reduction: ``mean`` or ``none``.

    Returns:
        Scalar, or ``(N,)`` with ``reduction="none"``, in nats.

    References:
        Zhong et al., Improving Calibration for Long-Tailed Recognition (MiSLAS), CVPR 2021 (concave form).

    Examples:
        >>> label_aware_smoothing(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), counts=torch.tensor([90, 10]))
        tensor(0.6701)
    """
    counts = _positive(counts)
    rank = (counts - counts.min()) / (counts.max() - counts.min()).clamp(min=1e-12)
    smooth = (tail + (head - tail) * torch.sin(rank * (math.pi / 2)))[target]
    log = F.log_softmax(_wide(logits), dim=1)
    own = log.gather(1, target[:, None])[:, 0]
    others = (log.sum(dim=1) - own) / (logits.shape[1] - 1)
    return _reduced(-(1 - smooth) * own - smooth * others, reduction)


def focal(
    logits: Tensor, target: Tensor, *, gamma: NotNegative = 2.0, class_weights: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Focal loss: cross-entropy times ``(1 - p) ** gamma``, so that easy samples count less.

    Args:
        logits: ``(N, K)``, unnormalised.
        target: ``(N,)`` class indices.
        gamma: strength; 0 is cross-entropy.
        class_weights: ``(K,)``.
        reduction: ``mean`` or ``none``.

    Returns:
        Scalar, or ``(N,)`` with ``reduction="none"``, in nats.

    References:
        Lin et al., Focal Loss for Dense Object Detection, ICCV 2017 (softmax form).

    Examples:
        >>> focal(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), reduction="none")
        tensor([0.0018, 0.0227])
    """
    own = F.log_softmax(_wide(logits), dim=1).gather(1, target[:, None])[:, 0]
    # 1 - p by expm1, and no power of exact zero: its gradient is not finite for gamma < 1.
    losses = -((-torch.expm1(own)).clamp(min=1e-12) ** gamma) * own
    return _reduced(losses if class_weights is None else losses * class_weights.to(losses)[target], reduction)


def balanced_softmax(logits: Tensor, target: Tensor, *, counts: Tensor, tau: NotNegative = 1.0, reduction: Reduction = "mean") -> Tensor:
    """Cross-entropy on logits shifted by the log class prior, so that the network learns the balanced posterior.

    Args:
        logits: ``(N, K)``, unnormalised.
        target: ``(N,)`` class indices.
        counts: ``(K,)`` training samples per class, all positive.
        tau: strength of the shift; 0 is plain cross-entropy.
        reduction: ``mean`` or ``none``.

    Returns:
        Scalar, or ``(N,)`` with ``reduction="none"``, in nats.

    Raises:
        ValueError: a class has no training sample.

    References:
        Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS 2020.

    Examples:
        >>> logits, counts = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([90, 10])
        >>> balanced_softmax(logits, torch.tensor([0, 1]), counts=counts, reduction="none")
        tensor([0.0149, 1.4612])
    """
    counts = _positive(counts)
    return cross_entropy(_wide(logits) + tau * (counts / counts.sum()).log(), target, reduction=reduction)


def ldam(
    cosines: Tensor,
    target: Tensor,
    *,
    counts: Tensor,
    max_margin: float = 0.5,
    scale: float = COSINE_SCALE,
    class_weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Label-distribution-aware margin: rarer classes get a larger margin, proportional to ``counts ** -1/4``.

    Args:
        cosines: ``(N, K)`` in [-1, 1], of a cosine classifier.
        target: ``(N,)`` class indices.
        counts: ``(K,)`` training samples per class, all positive.
        max_margin: margin of the rarest class.
        scale: factor of the cosines.
        class_weights: ``(K,)``.
        reduction: ``mean`` or ``none``.

    Returns:
        Scalar, or ``(N,)`` with ``reduction="none"``, in nats.

    References:
        Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS 2019.

    Examples:
        >>> cosines, counts = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([90, 10])
        >>> ldam(cosines, torch.tensor([0, 1]), counts=counts, scale=10.0, reduction="none")
        tensor([0.0060, 0.3133])
    """
    margins = _positive(counts) ** -0.25
    margins = margins * (max_margin / margins.max())
    shifted = _wide(cosines) - F.one_hot(target, cosines.shape[1]) * margins[target][:, None]
    return cross_entropy(scale * shifted, target, class_weights=class_weights, reduction=reduction)


def vector_scaling(
    logits: Tensor, target: Tensor, *, counts: Tensor, tau: NotNegative = 1.0, gamma: NotNegative = 0.2, reduction: Reduction = "mean"
) -> Tensor:
    """Cross-entropy on logits scaled by ``(count / largest count) ** gamma`` and shifted by ``tau`` times the log prior.

    Args:
        logits: ``(N, K)``, unnormalised.
        target: ``(N,)`` class indices.
        counts: ``(K,)`` training samples per class, all positive.
        tau: strength of the shift.
        gamma: strength of the scaling; with ``tau=0`` this is CDT.
        reduction: ``mean`` or ``none``.

    Returns:
        Scalar, or ``(N,)`` with ``reduction="none"``, in nats.

    References:
        Kini et al., Label-Imbalanced and Group-Sensitive Classification under Overparameterization, NeurIPS 2021.

    Examples:
        >>> logits, counts = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([90, 10])
        >>> vector_scaling(logits, torch.tensor([0, 1]), counts=counts, reduction="none")
        tensor([0.0149, 1.7448])
    """
    counts = _positive(counts)
    scaled = _wide(logits) * (counts / counts.max()) ** gamma
    return balanced_softmax(scaled, target, counts=counts, tau=tau, reduction=reduction)


def effective_number_weights(counts: Tensor, *, beta: float = 0.9999) -> Tensor:
    """Class weights ``(1 - beta) / (1 - beta ** count)``, normalised to sum K: ``(K,)``.

    References:
        Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019.

    Examples:
        >>> effective_number_weights(torch.tensor([90, 10]))
        tensor([0.2007, 1.7993])
    """
    # float64: 1 - beta ** count loses its digits in float32.
    weights = (1 - beta) / (1 - beta ** _positive(counts).double())
    return (weights * (len(counts) / weights.sum())).float()


def inverse_frequency_weights(counts: Tensor) -> Tensor:
    """Class weights ``N / (K count)``, in class order: ``(K,)``; scikit-learn's "balanced".

    Examples:
        >>> inverse_frequency_weights(torch.tensor([90, 10]))
        tensor([0.5556, 5.0000])
    """
    counts = _positive(counts)
    return counts.sum() / (len(counts) * counts)


def square_root_weights(counts: Tensor) -> Tensor:
    """Class weights proportional to ``count ** -1/2``, normalised to sum K: ``(K,)``.

    Examples:
        >>> square_root_weights(torch.tensor([90, 10]))
        tensor([0.5000, 1.5000])
    """
    weights = _positive(counts) ** -0.5
    return weights * (len(counts) / weights.sum())


def adjust_logits(logits: Tensor, *, counts: Tensor, tau: float = 1.0) -> Tensor:
    """Correct trained logits after the fact: ``logits - tau * log prior``, ``(N, K)``.

    References:
        Menon et al., Long-Tail Learning via Logit Adjustment, ICLR 2021.

    Examples:
        >>> adjust_logits(torch.zeros(1, 2), counts=torch.tensor([90, 10]))
        tensor([[0.1054, 2.3026]])
    """
    counts = _positive(counts)
    return logits - tau * (counts / counts.sum()).log()


def estimate_prior(logits: Tensor, target: Tensor) -> Tensor:
    """Estimate the class prior that logits encode, ``(K,)``, from held-out samples.

    The shift of the logits that is most likely given the labels turns the encoded prior into that of the labels, so the encoded prior is
    the labels' frequencies times ``exp(-shift)``.

    Args:
        logits: ``(N, K)`` of samples that were not trained on.
        target: ``(N,)`` class indices; every class occurs.

    Raises:
        ValueError: a class has no sample.

    References:
        Saerens et al., Adjusting the Outputs of a Classifier to New a Priori Probabilities, Neural Computation 2002; inverted.
    """
    share = _positive(torch.bincount(target, minlength=logits.shape[1])).double() / len(target)
    shift = torch.zeros_like(share, requires_grad=True)
    solver = torch.optim.LBFGS([shift], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(logits.double() + shift, target)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    prior = share * (-shift.detach() + shift.detach().mean()).exp()
    return prior / prior.sum()


class Loss(Protocol):
    """A loss on labels: ``(N, K)`` logits and ``(N,)`` class indices to a scalar, or to ``(N,)`` with ``reduction="none"``."""

    def __call__(self, logits: Tensor, target: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Return the loss in nats."""


CLASS_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "inverse": inverse_frequency_weights,
    "sqrt": square_root_weights,
    "effective": effective_number_weights,
}


def class_weights(name: str, counts: Tensor) -> Tensor:
    """Class weights by name, ``(K,)``.

    Raises:
        ConfigError: the name is unknown, or a class has no training sample.
    """
    if name not in CLASS_WEIGHTS:
        raise ConfigError(f"unknown class weights {name}{did_you_mean(name, CLASS_WEIGHTS)}; there are {', '.join(CLASS_WEIGHTS)}")
    try:
        return CLASS_WEIGHTS[name](counts)
    except ValueError as error:
        raise ConfigError(f"class weights {name}: {error}") from None


WeightsName = Literal["inverse", "sqrt", "effective"]


def _weights(counts: Tensor, *, weights: WeightsName = "inverse") -> Tensor:
    return CLASS_WEIGHTS[weights](counts)


def _weighted(counts: Tensor, *, weights: WeightsName = "inverse") -> Loss:
    return partial(cross_entropy, class_weights=_weights(counts, weights=weights))


def _balanced_focal(counts: Tensor, *, gamma: NotNegative = 2.0, beta: Annotated[float, Ge(0), Lt(1)] = 0.9999) -> Loss:
    return partial(focal, gamma=gamma, class_weights=effective_number_weights(counts, beta=beta))


def _scaled_ldam(counts: Tensor, *, max_margin: NotNegative = 0.5) -> Loss:
    # The cosine head's logits are already multiplied by this scale.
    def loss(logits: Tensor, target: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        return ldam(_wide(logits) / COSINE_SCALE, target, counts=counts, max_margin=max_margin, scale=COSINE_SCALE, reduction=reduction)

    return loss


@dataclass(frozen=True)
class NamedLoss:
    """A loss that configurations can name.

    Attributes:
        build: returns the loss for ``(K,)`` training samples per class, and options.
        options: its hyper-parameters by name.
        source: the publication.
        carries: returns the class prior that its logits carry in addition to the sampler's, ``(K,)`` up to a factor, for counts ``(K,)``
            and options; None if that is unknown.
        counted: whether every class must have training samples.
        weighs: whether it already weights classes, so that deferred weights would correct twice.
        head: the head that it requires; empty for any.
    """

    build: Callable[..., Loss]
    options: Mapping[str, Option]
    source: str
    carries: Callable[..., Tensor] | None
    counted: bool = True
    weighs: bool = False
    head: str = ""

    @property
    def needs(self) -> str:
        """Requirements, for tables."""
        return ", ".join([*(["counts"] if self.counted else []), *([f"head: {self.head}"] if self.head else [])]) or "nothing"


def _even(counts: Tensor) -> Tensor:
    return torch.ones_like(counts)


def _shifted(counts: Tensor, *, tau: float = 1.0) -> Tensor:
    return counts**-tau


def _of_logits(loss: Callable[..., Tensor], source: str, carries: Callable[..., Tensor] | None = None) -> NamedLoss:
    return NamedLoss(lambda counts, **options: partial(loss, **options), _options(loss), source, carries, counted=False)


def _of_counts(loss: Callable[..., Tensor], source: str, carries: Callable[..., Tensor] | None = None) -> NamedLoss:
    return NamedLoss(lambda counts, **options: partial(loss, counts=_positive(counts), **options), _options(loss), source, carries)


def _options(loss: Callable[..., Any]) -> dict[str, Option]:
    return {name: option for name, option in options_of(loss).items() if name != "reduction"}


BUILT_IN: dict[str, NamedLoss] = {
    "cross_entropy": _of_logits(cross_entropy, "maximum likelihood", _even),
    "weighted_cross_entropy": NamedLoss(_weighted, _options(_weighted), "King & Zeng 2001; Cui et al. 2019", _weights, weighs=True),
    "label_aware_smoothing": _of_counts(label_aware_smoothing, "Zhong et al. 2021"),
    "focal": _of_logits(focal, "Lin et al. 2017"),
    "class_balanced_focal": NamedLoss(_balanced_focal, _options(_balanced_focal), "Cui et al. 2019", None, weighs=True),
    "balanced_softmax": _of_counts(balanced_softmax, "Ren et al. 2020", _shifted),
    "ldam": NamedLoss(_scaled_ldam, _options(_scaled_ldam), "Cao et al. 2019", None, head="cosine"),
    "vector_scaling": _of_counts(vector_scaling, "Kini et al. 2021"),
}


def _adopt(plugin: Plugin) -> NamedLoss:
    """Adopt a plug-in's loss: a function of ``(logits, target)``, of ``counts`` if it has that parameter, and of its options."""
    loss = plugin.thing
    parameters = inspect.signature(loss).parameters
    if list(parameters)[:2] != ["logits", "target"]:
        raise ConfigError(f"the loss {plugin.name} takes {list(parameters)[:2]}; its first parameters are logits and target")
    wrapped = loss if "reduction" in parameters else _reducible(loss)
    facts = {"source": plugin.place, **plugin.facts}
    carries = facts.pop("carries", None)

    def build(counts: Tensor, **options: Any) -> Loss:
        return partial(wrapped, **({"counts": _positive(counts)} if "counts" in parameters else {}), **options)

    return NamedLoss(build, _options(loss), carries=carries, counted="counts" in parameters, **facts)


def _reducible(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give a loss that returns ``(N,)`` the usual ``reduction``."""

    def reduced(logits: Tensor, target: Tensor, *, reduction: Reduction = "mean", **options: Any) -> Tensor:
        return _reduced(loss(logits, target, **options), reduction)

    return reduced


LOSSES: Registry[NamedLoss] = Registry("loss", BUILT_IN, _adopt)
"""All losses that a configuration can name."""


def make_loss(name: str, *, counts: Tensor, **options: Any) -> Loss:
    """Build a supervised loss from its name.

    Args:
        name: name of the loss, as listed by ``raredistill methods``.
        counts: ``(K,)`` training samples per class, on the device of the training.
        options: hyper-parameters that differ from the defaults.

    Raises:
        ConfigError: the name or an option is unknown, a value is out of range, or a class that the loss must weight has no training sample.

    Examples:
        >>> loss = make_loss("balanced_softmax", counts=torch.tensor([90, 10]))
        >>> loss(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        tensor(0.7380)
    """
    row = named_loss(name, options)
    try:
        return row.build(counts.float(), **options)
    except ValueError as error:
        raise ConfigError(f"loss {name}: {error}") from None


def carried_prior(name: str, *, counts: Tensor, sampler: str, deferred: str = "none", **options: Any) -> tuple[float, ...] | None:
    """The class prior that trained logits encode: sampling share x class weight x exp(-logit shift), normalised; None if unknown.

    Args:
        name: name of the loss.
        counts: ``(K,)`` training samples per class.
        sampler: sampler of the training epochs; ``progressive`` ends balanced.
        deferred: class weights of the last epochs, or ``none``.
        options: hyper-parameters of the loss.

    Raises:
        ConfigError: as :func:`make_loss`, or the sampler is unknown.

    Examples:
        >>> carried_prior("cross_entropy", counts=torch.tensor([90, 10]), sampler="natural")
        (0.9, 0.1)
        >>> carried_prior("balanced_softmax", counts=torch.tensor([90, 10]), sampler="natural")
        (0.5, 0.5)
    """
    row = named_loss(name, options)
    if sampler not in POWERS:
        raise ConfigError(f"unknown sampler {sampler}{did_you_mean(sampler, POWERS)}; there are {', '.join(POWERS)}")
    if row.carries is None or options.get("label_smoothing"):
        return None
    try:
        counts = _positive(counts).double()
    except ValueError as error:
        raise ConfigError(f"loss {name}: {error}") from None
    share = counts ** POWERS[sampler] * row.carries(counts, **{key: value for key, value in options.items() if key != "label_smoothing"})
    if deferred != "none":
        share = share * class_weights(deferred, counts)
    return tuple((share / share.sum()).tolist())


def losses_table() -> list[dict[str, str]]:
    """Rows about losses that ``raredistill methods`` prints."""
    return [
        {
            "name": name,
            "source": row.source,
            "needs": row.needs,
            "carried prior": "unknown" if row.carries is None else "known",
            "defaults": show_defaults(row.options),
        }
        for name, row in LOSSES.items()
    ]


def named_loss(name: str, options: Mapping[str, Any]) -> NamedLoss:
    """Look up a loss by name, and check its options.

    Raises:
        ConfigError: the name or an option is unknown, or a value is out of range.
    """
    if name not in LOSSES:
        raise ConfigError(f"unknown loss {name}{did_you_mean(name, LOSSES)}; raredistill methods lists them, {HINT}")
    check_options(f"loss {name}", options, LOSSES[name].options)
    return LOSSES[name]
