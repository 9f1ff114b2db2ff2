"""Networks by name: timm's, the thesis's and the CIFAR ResNets, all with the same contract, ``head(features(images))``."""

from raredistill.models.build import ModelFacts, create, facts, restore, widths
from raredistill.models.folded import unfold_batch_norm
from raredistill.models.latency import Latency, measure_latency
from raredistill.models.names import ALIASES, Alias, list_models, resolve
from raredistill.models.network import HEADS, Network

__all__ = [
    "ALIASES", "HEADS", "Alias", "Latency", "ModelFacts", "Network", "create", "facts", "list_models", "measure_latency", "resolve",
    "restore", "unfold_batch_norm", "widths",
]  # fmt: skip
