"""Softened log-probabilities and their divergence, in float32: the basis of all logit distillers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def softened(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities ``(N, K)`` at a temperature, in float32 whatever the precision of the logits.

    Examples:
        >>> import torch
        >>> softened(torch.tensor([[2.0, 0.0]]), 2.0)
        tensor([[-0.3133, -1.3133]])
    """
    return F.log_softmax(logits.float() / temperature, dim=1)


def divergence(teacher_log: Tensor, student_log: Tensor) -> Tensor:
    """KL(teacher || student) of each row, ``(N,)`` in nats; no gradient reaches the teacher.

    Examples:
        >>> import torch
        >>> divergence(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log())
        tensor([0.5108])
    """
    # Both as logarithms, so that probabilities that underflow give 0 and not 0 * inf.
    return F.kl_div(student_log, teacher_log.detach(), log_target=True, reduction="none").sum(dim=1)


def mean_divergence(teacher_log: Tensor, student_log: Tensor) -> Tensor:
    """KL(teacher || student), averaged over the rows."""
    return divergence(teacher_log, student_log).mean()
