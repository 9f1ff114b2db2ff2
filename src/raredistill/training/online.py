"""Teachers trained together with their student: one-way, or each learning from all the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from raredistill.batches import Batch
from raredistill.distill.contract import Method
from raredistill.losses import Loss
from raredistill.models import Network
from raredistill.outputs import Outputs
from raredistill.training.objectives import Deferred, OnLabels


@dataclass(frozen=True, eq=False)
class Peer:
    """A network trained together with the student, with its channels and its loss on labels."""

    network: Network
    channels: tuple[str, ...]
    loss: Loss


class Together:
    """The terms of the student and of its peers: one forward pass per peer and step, with all targets detached.

    Peers are trained by the student's optimiser, at its learning rate, and discarded after training.

    Args:
        loss: the student's loss on labels.
        method: a logit distiller.
        peers: at least one.
        fabric: the device.
        mutual: whether peers also learn from the student and from each other.
        ce_weight: weight of the loss on labels, for networks that also learn from others.
        kd_weight: weight of the method's terms, averaged over the networks learnt from.
        deferred: class weights of the student's loss.

    References:
        Zhang et al., Deep Mutual Learning, CVPR 2018.
    """

    maps = False
    apart = True

    def __init__(
        self,
        loss: Loss,
        method: Method,
        peers: Sequence[Peer],
        fabric: Fabric,
        *,
        mutual: bool,
        ce_weight: float,
        kd_weight: float,
        deferred: Deferred | None = None,
    ) -> None:
        self.losses = [OnLabels(loss, deferred), *(OnLabels(peer.loss) for peer in peers)]
        self.method, self.peers, self.mutual = method, peers, mutual
        self.ce_weight, self.kd_weight = ce_weight, kd_weight
        self.trainable = nn.ModuleList(peer.network for peer in peers)
        self._fabric = fabric
        fabric.to_device(self.trainable.train())

    def __call__(self, batch: Batch, student: Outputs) -> dict[str, Tensor]:
        """Return the student's terms under their own names, and the peers' prefixed with ``peer`` and a number."""
        outputs = [student, *(self._outputs(peer, batch) for peer in self.peers)]
        fixed = [each._replace(logits=each.logits.detach(), features=None) for each in outputs]
        terms = self._terms(0, batch, outputs, fixed)
        for number in range(1, len(outputs)):
            taught = (
                self._terms(number, batch, outputs, fixed) if self.mutual else {"ce": self.losses[number](outputs[number].logits, batch)}
            )
            terms.update({f"peer{number}_{name}": term for name, term in taught.items()})
        return terms

    def _outputs(self, peer: Peer, batch: Batch) -> Outputs:
        with self._fabric.autocast():
            return Outputs(peer.network(batch.select(peer.channels)))

    def _terms(self, learner: int, batch: Batch, outputs: Sequence[Outputs], fixed: Sequence[Outputs]) -> dict[str, Tensor]:
        found = [self.method.terms(batch, outputs[learner], other) for number, other in enumerate(fixed) if number != learner]
        taught = {name: self.kd_weight * torch.stack([each[name] for each in found]).mean() for name in found[0]}
        return {"ce": self.ce_weight * self.losses[learner](outputs[learner].logits, batch), **taught}
