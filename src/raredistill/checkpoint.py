"""Weights with metadata: classes, channels, normalisation, prior, training patients. Safetensors and JSON, never a pickle."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialised
from torch import Tensor

from raredistill.errors import CheckpointError
from raredistill.files import atomic
from raredistill.names import fault, shown

PRIOR_TOLERANCE = 1e-3
"""Largest difference of a class prior's sum from 1."""
LARGEST = 1e9
"""Upper limit of all numbers in a promise."""
_PICKLES = (".pth", ".pt", ".ckpt", ".bin", ".pkl", ".pickle")
_NETWORK, _STATE = "raredistill.network.1", "raredistill.state.1"


@dataclass(frozen=True)
class Promise:
    """Metadata of a network's weights, so that nothing has to be guessed when they are used again.

    Attributes:
        model: its name in :mod:`raredistill.models`.
        head: ``linear`` or ``thesis``.
        dropout: dropout of the head.
        classes: class names in the order of the logits.
        channels: channel names in the order of the input.
        image_size: height and width in pixels.
        mean: one value per channel, for images in [0, 1].
        std: one value per channel, for images in [0, 1].
        prior: the class prior that the logits encode, in the order of ``classes``; None when it is unknown.
        training_patients: all patients whose images were trained on, also for its initial weights and for an external teacher; None if
            they are not recorded.
        external: trained elsewhere, on patients that cannot be in the cohort (according to the user).
        split_hash: hash of the split that it was trained on; empty if there was none.
    """

    model: str
    head: str
    dropout: float
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    prior: tuple[float, ...] | None
    training_patients: tuple[str, ...] | None
    external: bool
    split_hash: str

    def __post_init__(self) -> None:
        for name in ("classes", "channels", "mean", "std", "prior", "training_patients"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value) if isinstance(value, list | tuple) else value)
        _check_types(self)
        if self.prior is not None and (said := fault_of_prior(self.prior, len(self.classes))):
            raise CheckpointError(said)
        if not len(self.mean) == len(self.std) == len(self.channels):
            raise CheckpointError(f"mean and std have {len(self.mean)} and {len(self.std)} values for {len(self.channels)} channels")


def fault_of_prior(prior: Sequence[float], classes: int) -> str:
    """Why the numbers are not a valid prior over this many classes; empty if they are."""
    if len(prior) != classes:
        return f"the prior has {len(prior)} values for {classes} classes"
    if not all(isinstance(share, int | float) and math.isfinite(share) and share >= 0 for share in prior):
        return f"the prior contains values that are not class shares: {list(prior)!r:.80}"
    return "" if abs(sum(prior) - 1) <= PRIOR_TOLERANCE else f"the shares of the prior add up to {sum(prior):.4g}, not 1"


def _check_types(promise: Promise) -> None:
    texts = [promise.model, promise.head, promise.split_hash, *_items(promise.classes), *_items(promise.channels)]
    texts += _items(promise.training_patients or ())
    numbers = [promise.dropout, promise.image_size, *_items(promise.mean), *_items(promise.std), *_items(promise.prior or ())]
    wrong = [value for value in texts if not isinstance(value, str)]
    wrong += [value for value in numbers if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST]
    if wrong or not isinstance(promise.external, bool):
        raise CheckpointError(f"it contains {(wrong or [promise.external])[0]!r:.60}, which is not valid there")
    if said := next((f"the name {shown(name)!r:.60} {said}" for name in texts if (said := fault(name))), ""):
        raise CheckpointError(said)


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [value]


def save(path: Path, state_dict: Mapping[str, Tensor], promise: Promise) -> None:
    """Write weights and their promise to a safetensors file, whole or not at all.

    Args:
        path: the file; its folder is created.
        state_dict: tensors on any device.
        promise: stored as JSON in the file's metadata and covered by the same hash as the tensors.
    """
    _write(path, state_dict, _NETWORK, asdict(promise))


def load(path: Path) -> tuple[dict[str, Tensor], Promise]:
    """Read a file of :func:`save`, onto the CPU.

    Raises:
        CheckpointError: missing, truncated, altered, or not a network's checkpoint.
    """
    tensors, record = _read(path, _NETWORK)
    return tensors, _promise(path, record)


def read_promise(path: Path) -> Promise:
    """Read the promise of a checkpoint from its header alone; the tensors are checked only when they are loaded.

    Raises:
        CheckpointError: as :func:`load`, except for altered tensors.
    """
    metadata = read_header(path)
    _refuse_other(path, _NETWORK, metadata)
    return _promise(path, _parsed(path, metadata.get("record", "null")))


def _promise(path: Path, record: Any) -> Promise:
    try:
        return Promise(**record)
    except (TypeError, CheckpointError) as error:
        wanted = ", ".join(field.name for field in fields(Promise))
        raise CheckpointError(f"{path}: its metadata does not match this version ({error}); it needs {wanted}") from None


def content_hash(path: Path) -> str:
    """Hash of a checkpoint's content, independent of the order of safetensors' metadata, which is not fixed.

    Raises:
        CheckpointError: as :func:`load`.
    """
    return read_header(path).get("sha256", "")


def save_state(path: Path, tensors: Mapping[str, Tensor], info: Any) -> None:
    """Write the state of an interrupted training, whole or not at all.

    Args:
        path: the file; its folder is created.
        tensors: named tensors, such as an optimiser's moments; any names are allowed.
        info: any JSON value (NaN and infinities, too).
    """
    _write(path, tensors, _STATE, info)


def load_state(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read a file of :func:`save_state`: tensors on the CPU, and the JSON value.

    Raises:
        CheckpointError: missing, truncated, altered, or not a training state.
    """
    return _read(path, _STATE)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read any safetensors file, onto the CPU: its tensors and its metadata.

    Raises:
        CheckpointError: missing, unreadable, or not safetensors (a pickle is never opened).
    """
    with _opened(path) as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}, dict(handle.metadata() or {})  # noqa: SIM118 - not a mapping


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; no tensor is read.

    Raises:
        CheckpointError: as :func:`read_safetensors`.
    """
    with _opened(path) as handle:
        return dict(handle.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{path}: only .safetensors files are read, because a pickle can run code when it is opened; "
            "if you trust the file, convert it: safetensors.torch.save_file(torch.load(path, weights_only=True), 'weights.safetensors')"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            yield handle
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    # Types unknown to torch (F6, E8M0 and future ones) raise different errors in its bindings.
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); delete it and use another copy") from None


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its record is not JSON ({error}); delete it and use another copy") from None


def _write(path: Path, tensors: Mapping[str, Tensor], kind: str, record: Any) -> None:
    # Cloned, because safetensors refuses tensors that share memory, and a state dict may contain some.
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    text = json.dumps(record)
    metadata = {"format": "pt", "kind": kind, "record": text, "sha256": _digest(plain, kind, text)}
    with atomic(path) as temporary:
        # Not save_file: it first writes to a temporary file under another name, which a kill would leave behind.
        temporary.write_bytes(serialised(plain, metadata=metadata))


def _read(path: Path, kind: str) -> tuple[dict[str, Tensor], Any]:
    tensors, metadata = read_safetensors(path)
    _refuse_other(path, kind, metadata)
    text = metadata.get("record", "")
    if metadata.get("sha256") != _digest(tensors, kind, text):
        raise CheckpointError(
            f"{path}: its content does not match its hash, so it was damaged or edited; delete it and run the command again"
        )
    return tensors, _parsed(path, text)


def _refuse_other(path: Path, kind: str, metadata: Mapping[str, str]) -> None:
    if metadata.get("kind") != kind:
        raise CheckpointError(f"{path}: not a {kind.split('.')[1]} checkpoint of raredistill, but {metadata.get('kind', 'plain weights')}")


def _digest(tensors: Mapping[str, Tensor], kind: str, text: str) -> str:
    digest = hashlib.sha256(f"{kind}\n{text}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
