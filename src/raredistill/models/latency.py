"""Latency of one image on a network's device."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from raredistill.models.network import Network

WARM_UP = 2
MOST, FEWEST = 21, 3
LIMIT = 0.15
"""Seconds after which no further forward pass is started."""


@dataclass(frozen=True)
class Latency:
    """The median time of a forward pass of one image.

    Attributes:
        milliseconds: time until the logits are back on the CPU, in single precision.
        device: such as ``cpu, 2 threads`` or ``cuda, NVIDIA H100``; times of different devices cannot be compared.
    """

    milliseconds: float
    device: str


@torch.no_grad()
def measure_latency(network: Network) -> Latency:
    """Time single images on the network's own device, after a few warm-up passes.

    A network slower than ``LIMIT / MOST`` gets fewer passes, at least ``FEWEST``.
    """
    training, place = network.training, next(network.parameters()).device
    image = torch.full((1, network.channels, network.image_size, network.image_size), 0.5, device=place)
    network.eval()
    for _ in range(WARM_UP):
        network(image).cpu()
    times: list[float] = []
    while len(times) < FEWEST or (len(times) < MOST and sum(times) < LIMIT):
        start = time.perf_counter()
        network(image).cpu()  # GPU calls return before the work is finished; copying the result to the CPU waits for it
        times.append(time.perf_counter() - start)
    network.train(training)
    return Latency(1000 * statistics.median(times), _described(place))


def _described(place: torch.device) -> str:
    if place.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu, {threads} thread{'s' if threads > 1 else ''}"
    return f"cuda, {torch.cuda.get_device_name(place)}" if place.type == "cuda" else place.type
