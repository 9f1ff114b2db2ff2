"""A loss of your own: Poly-1 (Leng et al., PolyLoss, ICLR 2022).

raredistill study study.yaml --plugin examples/loss.py training.loss=poly1
"""

from torch import Tensor
from torch.nn import functional as F

import raredistill
from raredistill.options import NotNegative


@raredistill.loss(source="Leng et al. 2022")
def poly1(logits: Tensor, target: Tensor, *, epsilon: NotNegative = 1.0) -> Tensor:
    """Cross-entropy plus ``epsilon`` times the probability of being wrong, ``(N,)``."""
    right = F.softmax(logits.float(), dim=1).gather(1, target[:, None])[:, 0]
    return F.cross_entropy(logits.float(), target, reduction="none") + epsilon * (1 - right)
