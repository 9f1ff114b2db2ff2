"""A distiller of your own: match the directions of centred logits.

raredistill study study.yaml --plugin examples/distiller.py        # with method: direction
"""

from torch import Tensor
from torch.nn import functional as F

import raredistill
from raredistill.options import AboveZero
from raredistill.outputs import Outputs


@raredistill.distiller(source="examples/distiller.py", zero_at_equal=True)
def direction(student: Outputs, teacher: Outputs, *, weight: AboveZero = 1.0) -> Tensor:
    """One minus the cosine between centred logits, a mean over the batch."""
    ours, theirs = (side.logits.float() - side.logits.float().mean(dim=1, keepdim=True) for side in (student, teacher))
    return weight * (1 - F.cosine_similarity(ours, theirs.detach(), dim=1, eps=1e-6)).mean()
