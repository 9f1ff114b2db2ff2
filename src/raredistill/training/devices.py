"""Where training runs: Lightning Fabric over cpu, cuda and mps."""

from __future__ import annotations

from typing import Literal

import torch
from lightning.fabric import Fabric

from raredistill.errors import ConfigError


def make_fabric(accelerator: str, precision: Literal["32-true", "bf16-mixed"]) -> Fabric:
    """Open one device.

    Raises:
        ConfigError: the machine has no such device.
    """
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("accelerator: cuda, but this machine has no usable NVIDIA GPU; set accelerator=auto or cpu")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("accelerator: mps, but this machine has none; set accelerator=auto or cpu")
    return Fabric(accelerator=accelerator, devices=1, precision=precision)
