"""The order of samples in an epoch, as a function of (seed, epoch)."""

from __future__ import annotations

import numpy as np

from raredistill.errors import ConfigError

# How strongly a class's share of an epoch depends on its count: share ~ count ** power (for progressive sampling, in the last epoch).
POWERS = {"natural": 1.0, "sqrt": 0.5, "balanced": 0.0, "progressive": 0.0}


def epoch_order(labels: np.ndarray, *, sampler: str, seed: int, epoch: int, epochs: int = 1) -> np.ndarray:
    """Draw the order of an epoch.

    Args:
        labels: ``(N,)`` class indices.
        sampler: ``natural`` (each sample once), ``sqrt`` or ``balanced`` (class shares by the root of the counts, or equal; samples of a
            class repeat only after all of them have been drawn), or ``progressive`` (in equal steps from natural shares in the first
            epoch to equal shares in the last).
        seed: of the run.
        epoch: from 0.
        epochs: number of epochs in the training, for ``progressive``.

    Returns:
        ``(N,)`` int64 positions into ``labels``.

    Raises:
        ConfigError: the sampler is unknown.

    References:
        Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition, ICLR 2020.
    """
    if sampler not in POWERS:
        raise ConfigError(f"unknown sampler {sampler}; there are {', '.join(POWERS)}")
    generator = np.random.default_rng([seed, epoch])
    if sampler == "natural":
        return generator.permutation(len(labels)).astype(np.int64)
    present, counts = np.unique(labels, return_counts=True)
    shares = _progressive(counts, epoch / max(epochs - 1, 1)) if sampler == "progressive" else counts ** POWERS[sampler]
    quotas = _quotas(shares, len(labels))
    drawn = [_passes(np.flatnonzero(labels == label), quota, generator) for label, quota in zip(present, quotas, strict=True)]
    return generator.permutation(np.concatenate(drawn)).astype(np.int64)


def _progressive(counts: np.ndarray, progress: float) -> np.ndarray:
    shares: np.ndarray = (1 - progress) * counts / counts.sum() + progress / len(counts)
    return shares


def _quotas(shares: np.ndarray, total: int) -> np.ndarray:
    # Rounding the cumulative sum makes the quotas add up to the total.
    edges = np.round(np.cumsum(shares) / np.sum(shares) * total).astype(np.int64)
    return np.diff(edges, prepend=0)


def _passes(members: np.ndarray, quota: int, generator: np.random.Generator) -> np.ndarray:
    passes = -(-quota // len(members))
    return np.concatenate([generator.permutation(members) for _ in range(max(passes, 1))])[:quota]
