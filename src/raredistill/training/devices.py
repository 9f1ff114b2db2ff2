"""Devices and processes: Lightning Fabric on cpu, cuda and mps, and the communication between the processes of one run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, distributed, nn

from raredistill.errors import ConfigError, RareDistillError

Precision = Literal["32-true", "bf16-mixed"]
PATIENCE = timedelta(days=1)
"""How long processes wait for each other: computing a teacher cache may take hours (a process that dies ends the others at once)."""


class MemoryEndedError(RareDistillError):
    """One of several processes ran out of memory in a step: all must restart with ``parts`` micro-batches."""

    def __init__(self, parts: int) -> None:
        super().__init__(parts)
        self.parts = parts


def make_fabric(accelerator: str, precision: Precision, devices: int = 1) -> Fabric:
    """Open one device, the first of those requested.

    Raises:
        ConfigError: the machine has no such device, or not enough of them.
    """
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("accelerator: cuda, but this machine has no usable NVIDIA GPU; set accelerator=auto or cpu")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("accelerator: mps, but this machine has none; set accelerator=auto or cpu")
    fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(fabric.device.type, devices)
    if devices > there:
        raise ConfigError(f"devices: {devices}, but this machine has {there} of kind {fabric.device.type}; set devices={there}")
    return fabric


def join(rank: int, size: int, *, port: int, kind: str, precision: Precision) -> Fabric:
    """Make this process one of several on one machine that train together; each has its own device.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        port: of the store through which they find each other; the process that starts them owns it.
        kind: ``cpu`` or ``cuda``.
        precision: as for :func:`make_fabric`.
    """
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0")
    # Decisions are exchanged on the CPU through gloo, even where gradients use NCCL, so that nothing waits for a device.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if kind == "cuda":
        torch.cuda.set_device(rank)
    store = distributed.TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    # A separate environment, because a surrounding Slurm job has other ranks.
    strategy = DDPStrategy(cluster_environment=LightningEnvironment(), process_group_backend=backend)
    fabric = Fabric(accelerator=kind, devices=size, precision=precision, strategy=strategy)
    fabric.launch()
    return fabric


@contextmanager
def first_before(fabric: Fabric) -> Iterator[None]:
    """Run the block in the first process before the others, which can then read the files it wrote."""
    team = Team(fabric)
    if team.rank > 0:
        team.agreed(True)
    yield
    if team.rank == 0:
        team.agreed(True)


class Team:
    """The processes that train one network, seen from one of them; a single process needs no communication.

    Args:
        fabric: Fabric of this process.

    Attributes:
        rank: number of this process; the first (0) decides and writes.
        size: how many there are.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.rank, self.size, self._kind = int(fabric.global_rank), int(fabric.world_size), fabric.device.type

    def agreed(self, *facts: bool) -> tuple[bool, ...]:
        """Return the first process's facts in all processes (waits for it)."""
        if self.size == 1:
            return facts
        shared = torch.tensor(facts, dtype=torch.uint8)
        distributed.broadcast(shared, src=0)
        return tuple(bool(fact) for fact in shared)

    def all_sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, elementwise."""
        if self.size == 1:
            return values
        total = values.clone()
        distributed.all_reduce(total)
        return total

    def earliest(self, step: int | None) -> int | None:
        """The smallest step of any process; None if no process has one."""
        if self.size == 1:
            return step
        smallest = torch.tensor(torch.iinfo(torch.int64).max if step is None else step)
        distributed.all_reduce(smallest, op=distributed.ReduceOp.MIN)
        return None if int(smallest) == torch.iinfo(torch.int64).max else int(smallest)

    def each(self, own: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Tensors gathered from all ranks, on the CPU; names, shapes and types must be the same in all processes."""
        if self.size == 1:
            return [dict(own)]
        gathered: list[dict[str, Tensor]] = [{} for _ in range(self.size)]
        for name, tensor in own.items():
            for theirs, part in zip(gathered, self._gathered(tensor.cpu()), strict=True):
                theirs[name] = part
        return gathered

    def gather(self, rows: Tensor) -> Tensor:
        """Concatenate the rows ``(n, ...)`` of all processes on the CPU; ``n`` may differ."""
        rows = rows.cpu()
        if self.size == 1:
            return rows
        counts = [int(count) for count in torch.cat(self._gathered(torch.tensor([len(rows)])))]
        padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
        return torch.cat([part[:count] for part, count in zip(self._gathered(padded), counts, strict=True)])

    def _gathered(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(parts, tensor.contiguous())
        return parts

    def own_generator(self) -> None:
        """Reseed torch's generator (dropout) from the current seed and the rank, so that processes draw different numbers."""
        if self.rank > 0:
            torch.manual_seed(int(np.random.SeedSequence([torch.initial_seed(), self.rank]).generate_state(1)[0]))

    def synchronise(self, module: nn.Module | None) -> None:
        """On GPUs, compute batch-norm statistics over all processes; torch does not support this elsewhere."""
        if self.size > 1 and self._kind == "cuda" and module is not None:
            convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]  # timm's version also converts batch norms fused with an activation

    def mean_gradients(self, module: nn.Module | None) -> None:
        """Average gradients over all processes for modules trained beside the network, which DDP does not manage."""
        if self.size == 1 or module is None:
            return
        gradients = [weight.grad for weight in module.parameters() if weight.grad is not None]
        means = self.all_sum(torch.cat([gradient.flatten() for gradient in gradients])) / self.size
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, mean in zip(gradients, torch.split(means, sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def follow_first(self, *modules: nn.Module) -> None:
        """Copy the running statistics of the first process to all others."""
        if self.size > 1:
            for module in modules:
                for buffer in module.buffers():
                    distributed.broadcast(buffer, src=0)
