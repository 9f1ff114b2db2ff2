"""A network as ONNX in single precision, half precision and 8-bit integers, and as plain weights."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from raredistill.errors import ConfigError
from raredistill.models import Network, resolve
from raredistill.models.names import OWN
from raredistill.models.weights import classifiers_of
from raredistill.ship.bundle import Answer, need

WARM_UP, TIMED = 3, 15
Images = NDArray[np.float32]


def write_onnx(network: Network, path: Path) -> None:
    """Write a network, its normalisation included, for batches of any size: ``images (N, C, H, W)`` in [0, 1] to ``logits (N, K)``."""
    need("onnxscript")
    example = torch.full((2, network.channels, network.image_size, network.image_size), 0.5)
    with _quiet():
        program = torch.onnx.export(
            network.eval().cpu(), (example,), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
        assert program is not None
        program.save(str(path), external_data=False)


def write_half(source: Path, path: Path) -> None:
    """Convert an ONNX file to half precision; images and logits stay in single precision."""
    onnx, need_float16 = need("onnx"), need("onnxruntime.transformers.float16")
    with _quiet():
        onnx.save(need_float16.convert_float_to_float16(onnx.load(str(source)), keep_io_types=True), str(path))


def write_integers(source: Path, path: Path, calibration: Images) -> None:
    """Quantise an ONNX file to 8-bit integers (static, a scale per output channel), with the ranges that ``calibration`` shows."""
    quantization = need("onnxruntime.quantization")
    prepared = path.with_name(f".{path.name}.prepared")
    try:
        with _quiet():
            need("onnxruntime.quantization.shape_inference").quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            quantization.quantize_static(str(prepared), str(path), _Reader(calibration), per_channel=True)
    finally:
        prepared.unlink(missing_ok=True)


class _Reader:
    """Gives calibration images one batch after the other, as onnxruntime asks for them."""

    def __init__(self, images: Images) -> None:
        self._batches: Iterator[Images] = iter(np.array_split(images, max(1, len(images) // 16)))

    def get_next(self) -> dict[str, Images] | None:
        """The next batch; None at the end."""
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of their own internals, which nobody can mend here; what they make is compared with the network."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def timm_state(network: Network, head: str) -> tuple[str, dict[str, Tensor]] | None:
    """A network's weights under timm's own keys, and timm's name; None where timm has no such network."""
    name = resolve(network.name)
    if name in OWN or head != "linear" or len(keys := classifiers_of(name)) != 1:
        return None
    linear = network.head.get_submodule("1")
    state = {**network.body.state_dict(), **{f"{keys[0]}.{part}": value for part, value in linear.state_dict().items()}}
    architecture = name.split(".")[0]
    try:
        timm_network(architecture, network).load_state_dict(state)
    except (RuntimeError, ConfigError):
        return None
    return architecture, state


def timm_network(architecture: str, network: Network) -> Any:
    """The same network as timm builds it, untrained."""
    shape: dict[str, Any] = {"num_classes": network.classes, "in_chans": network.channels}
    try:
        return timm.create_model(architecture, **shape, img_size=network.image_size).eval()
    except TypeError:  # networks that take any size do not know the word
        return timm.create_model(architecture, **shape).eval()


def write_weights(network: Network, head: str, path: Path) -> tuple[str, str]:
    """Write weights as safetensors; returns timm's name of the network and whose keys they have, ``timm`` or ``raredistill``."""
    found = timm_state(network, head)
    name, state = found or ("", network.state_dict())
    save_file({key: value.detach().cpu().clone().contiguous() for key, value in state.items()}, path, metadata={"format": "pt"})
    return name, "timm" if found else "raredistill"


def milliseconds(answer: Answer, shape: tuple[int, ...]) -> float:
    """Median time of one image through an ONNX file on this machine's CPU."""
    image, times = np.full((1, *shape), 0.5, np.float32), []
    for _ in range(WARM_UP):
        answer(image)
    for _ in range(TIMED):
        start = time.perf_counter()
        answer(image)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)
