"""Outputs of networks for a batch: the type shared by models, distillers and training."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """Outputs of a network, or of several teachers combined, for a batch.

    Attributes:
        logits: ``(N, K)``.
        features: ``(N, F)``, pooled, before the head; None for several networks combined.
        maps: of each stage ``(N, C, H, W)``, shallow to deep, if a method needs them.
        log_prior: ``(K,)`` or ``(N, K)``, logarithm of the class prior that the logits carry; None if it is unknown.
    """

    logits: Tensor
    features: Tensor | None = None
    maps: tuple[Tensor, ...] = ()
    log_prior: Tensor | None = None

    @property
    def pooled(self) -> Tensor:
        """The features.

        Raises:
            ValueError: there are none.
        """
        if self.features is None:
            raise ValueError("features were not requested")
        return self.features

    @property
    def known_log_prior(self) -> Tensor:
        """The logarithm of the carried prior.

        Raises:
            ValueError: it is unknown.
        """
        if self.log_prior is None:
            raise ValueError("the prior of the teacher is not known")
        return self.log_prior
