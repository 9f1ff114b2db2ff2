"""An export on disk: its description, its files, and its network run by onnxruntime alone. Imports nothing of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from raredistill.errors import CheckpointError, ConfigError
from raredistill.files import inside, is_sealed, read_json, seal, sha256, write_json
from raredistill.ship.terms import Preparation, Rule, Terms

FORMAT = "raredistill.export.1"
CONFIG, ONNX, WEIGHTS, CARD, PROBE = "config.json", "model.onnx", "model.safetensors", "README.md", "check.npz"
FP16, INT8 = "model.fp16.onnx", "model.int8.onnx"
TOLERANCE = 1e-4
"""Largest allowed difference of logits in single precision."""
Answer = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class Checked:
    """Result of checking an export: number of samples, and the largest difference in a logit."""

    samples: int
    difference: float


def need(name: str) -> Any:
    """Import a library of the extra ``export``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise ConfigError(f"{name} is not installed; install it with: pip install 'raredistill[export]'") from None


def session(path: Path) -> Answer:
    """An ONNX file as a function from images ``(N, C, H, W)`` in [0, 1] to logits ``(N, K)``.

    Raises:
        CheckpointError: onnxruntime cannot load it.
    """
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        loaded = runtime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); export the model again") from None
    except Exception as error:  # its bindings raise one class for each of a dozen causes
        raise CheckpointError(f"{path}: onnxruntime cannot load it ({str(error).splitlines()[0]:.200}); export the model again") from None

    def answer(images: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = loaded.run(["logits"], {"images": images})[0]
        return found

    return answer


def write_config(folder: Path, terms: Terms, network: dict[str, Any]) -> None:
    """Describe an export: its terms, facts of its network, and the hash of each of its files; written last."""
    record = {
        "format": FORMAT, "name": terms.name, "classes": terms.classes, "background": terms.background, "channels": terms.channels,
        "network": network, "preparation": asdict(terms.preparation), "rule": asdict(terms.rule),
        "seen": {"train": sorted(terms.train), "validation": sorted(terms.validation)},
        "files": {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != CONFIG and not path.name.startswith(".")},
    }  # fmt: skip
    write_json(folder / CONFIG, seal(record))


def read_config(folder: Path) -> dict[str, Any]:
    """Read the description of an export, after checking its own hash and those of its files.

    Raises:
        CheckpointError: another version's, or something was changed or is missing.
    """
    record = read_json(folder / CONFIG)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        told = record.get("format") if isinstance(record, dict) else None
        raise CheckpointError(f"{folder / CONFIG}: its format is {told!r:.60}, this version reads {FORMAT!r}; export the model again")
    if not is_sealed(record):
        raise CheckpointError(f"{folder / CONFIG}: its content does not match its hash, so it was changed; export the model again")
    for name, digest in record["files"].items():
        path = folder / name
        if not inside(path, folder) or not path.is_file() or sha256(path) != digest:
            raise CheckpointError(f"{path}: missing, or its content does not match its hash; export the model again")
    return record


def read_terms(record: dict[str, Any], folder: Path) -> Terms:
    """The terms of an export from its description.

    Raises:
        CheckpointError: a part of them is missing or has another type.
    """
    try:
        seen = {side: frozenset(map(str, record["seen"][side])) for side in ("train", "validation")}
        return Terms(
            str(record["name"]), tuple(record["classes"]), record["background"], tuple(record["channels"]),
            TypeAdapter(Preparation).validate_python(record["preparation"]), TypeAdapter(Rule).validate_python(record["rule"]),
            seen["train"], seen["validation"],
        )  # fmt: skip
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{folder / CONFIG}: not a description of this version ({error}); export the model again") from None


def open_bundle(folder: Path) -> tuple[Terms, Answer]:
    """An export, ready for predictions.

    Raises:
        CheckpointError: it was changed, or is another version's.
        ConfigError: onnxruntime is not installed.
    """
    record = read_config(folder)
    return read_terms(record, folder), session(folder / ONNX)


def check(folder: Path) -> Checked:
    """Run an export on its stored images and compare with the logits of the original network.

    Raises:
        CheckpointError: it was changed, or this machine gives other logits.
    """
    _, answer = open_bundle(folder)
    with np.load(folder / PROBE, allow_pickle=False) as archive:
        images, expected = archive["images"], archive["logits"]
    difference = float(np.abs(answer(images.astype(np.float32) / np.float32(255)) - expected).max())
    if not difference <= TOLERANCE:
        raise CheckpointError(f"{folder / ONNX}: logits differ by {difference:.2g} from those of the network; at most {TOLERANCE:g} may be")
    return Checked(len(images), difference)
