"""Write a model that runs without raredistill: networks, description and card, each format compared with the network."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from raredistill.checkpoint import Promise
from raredistill.cohort.store import Cohort, PixelReader
from raredistill.errors import CheckpointError, ConfigError, DataError
from raredistill.models import Network, restore
from raredistill.runs.layout import RunFolder, StudyFolder
from raredistill.runs.record import StudyRecord, read_study
from raredistill.ship import bundle, evidence, formats
from raredistill.ship.card import Card, write_card
from raredistill.ship.find import Found
from raredistill.ship.predictor import read_terms, records_of
from raredistill.ship.terms import Terms
from raredistill.splits import load_split

MOST_CALIBRATION, MOST_PROOF, AT_ONCE = 128, 64, 64
EXTRA = {"fp16": bundle.FP16, "int8": bundle.INT8}
Images = NDArray[np.float32]


@dataclass
class Format:
    """One file of an export.

    Attributes:
        name: ``fp32``, ``fp16``, ``int8`` or ``safetensors``.
        file: its name.
        bytes: its size.
        milliseconds: of one image with onnxruntime on this machine; None where onnxruntime does not read it.
        difference: largest difference from the network's logits on validation samples.
        changes: class to change in ``recall`` and ``f1`` on out-of-fold samples.
    """

    name: str
    file: str
    bytes: int
    milliseconds: float | None
    difference: float
    changes: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Exported:
    """The written files and their folder."""

    folder: Path
    said: str
    formats: list[Format]
    teacher_ms: float | None
    samples: int


def export(found: Found, cohort: Cohort, out: Path, *, checkpoint: str, sensitivity: float, extra: Sequence[str]) -> Exported:
    """Export one network of a study.

    Args:
        found: a run, or a refitted entry.
        cohort: of the study; its validation samples prove and calibrate the formats.
        out: folder to write; new or empty.
        checkpoint: ``best`` or ``last``.
        sensitivity: wanted for the rare class.
        extra: formats beside single precision, ``fp16`` and ``int8``.

    Raises:
        ConfigError: the model is not one network, or a format is unknown.
        DataError: ``out`` holds something.
        CheckpointError: a format does not agree with the network.
    """
    if found.kind not in ("run", "refit"):
        cure = f"for one network of it: raredistill refit {found.path} {found.entry}, or name one run" if found.kind == "ensemble" else ""
        raise ConfigError(f"{found.said}: an export holds one network{'; ' if cure else ''}{cure}")
    if unknown := sorted(set(extra) - set(EXTRA)):
        raise ConfigError(f"format {unknown[0]!r}: besides fp32 there are {', '.join(EXTRA)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is not an empty folder; name another one, or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        made = _Export(found, cohort, draft, checkpoint, sensitivity).write(extra)
        if out.is_dir():
            out.rmdir()
        draft.replace(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Exported(out, found.said, made.formats, made.teacher_ms, made.samples)


class _Export:
    """The steps of one export, with their results so far."""

    def __init__(self, found: Found, cohort: Cohort, folder: Path, checkpoint: str, sensitivity: float) -> None:
        self.found, self.cohort, self.folder, self.checkpoint = found, cohort, folder, checkpoint
        self.study: StudyRecord = read_study(StudyFolder(found.path).description)
        if cohort.hash != self.study.cohort.hash:
            raise DataError(f"{cohort.root} is not the cohort of {found.path}")
        self.terms: Terms = read_terms(found, checkpoint, sensitivity)
        self.network, self.promise = _restored(found.runs[0], checkpoint)
        self.formats: list[Format] = []
        self.teacher_ms: float | None = None
        self.samples = 0

    def write(self, extra: Sequence[str]) -> _Export:
        """All files, the description last."""
        proof = self._images(self._validation(0), MOST_PROOF)
        self.samples, expected = len(proof), _answers(self.network, proof)
        formats.write_onnx(self.network, self.folder / bundle.ONNX)
        self._add("fp32", bundle.ONNX, proof, expected)
        self._refuse_different("fp32", bundle.TOLERANCE)
        architecture, keys = formats.write_weights(self.network, self.promise.head, self.folder / bundle.WEIGHTS)
        self._check_weights(architecture, keys, proof, expected)
        for name in extra:
            self._convert(name, self.folder / bundle.ONNX, self.folder / EXTRA[name], self._validation(0))
            self._add(name, EXTRA[name], proof, expected)
        if extra:
            self._measure_changes(extra)
        self.teacher_ms = self._teacher_ms()
        self._write_probe()
        network = _facts(self.network, self.promise, architecture, keys)
        write_card(self.folder / bundle.CARD, self._card(network))
        bundle.write_config(self.folder, self.terms, network)
        bundle.check(self.folder)
        return self

    def _card(self, network: dict[str, Any]) -> Card:
        return Card(
            self.found, self.study, self.terms, network, self.formats, self.teacher_ms, self.samples,
            evidence.held_out(self.found, self.study, self.checkpoint),
        )  # fmt: skip

    def _validation(self, number: int) -> np.ndarray:
        """Rows of the validation part (else of the training part) of one of the folds that the model comes from."""
        record = records_of(self.found, self.study)[number][1]
        split = load_split(StudyFolder(self.found.path).split(record.repeat, record.fold), self.cohort)
        return split.validation if len(split.validation) else split.train

    def _images(self, rows: np.ndarray, most: int | None = None) -> Images:
        """Pixels of rows, evenly spread over them where there are more than ``most``."""
        chosen = rows if most is None or len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(int)]
        pixels = np.empty((len(chosen), len(self.promise.channels), *self.cohort.size), np.uint8)
        with PixelReader(self.cohort, self.promise.channels) as reader:
            reader.read(chosen, pixels)
        return pixels.astype(np.float32) / np.float32(255)

    def _add(self, name: str, file: str, proof: Images, expected: Images) -> None:
        path = self.folder / file
        answer = bundle.session(path)
        difference = float(np.abs(answer(proof) - expected).max())
        self.formats.append(Format(name, file, path.stat().st_size, formats.milliseconds(answer, proof.shape[1:]), difference))

    def _refuse_different(self, name: str, tolerance: float) -> None:
        if not (difference := self.formats[-1].difference) <= tolerance:
            raise CheckpointError(f"{name}: its logits differ by {difference:.2g} from the network's; nothing was written")

    def _check_weights(self, architecture: str, keys: str, proof: Images, expected: Images) -> None:
        path = self.folder / bundle.WEIGHTS
        if keys == "timm":
            plain = formats.timm_network(architecture, self.network)
            plain.load_state_dict(load_file(path))
            mean, std = (np.array(values, np.float32).reshape(1, -1, 1, 1) for values in (self.promise.mean, self.promise.std))
            found = _answers(plain, (proof - mean) / std)
        else:
            self.network.load_state_dict(load_file(path))
            found = _answers(self.network, proof)
        difference = float(np.abs(found - expected).max())
        self.formats.append(Format("safetensors", bundle.WEIGHTS, path.stat().st_size, None, difference))
        self._refuse_different("safetensors", bundle.TOLERANCE)

    def _convert(self, name: str, source: Path, path: Path, calibration: np.ndarray) -> None:
        if name == "fp16":
            formats.write_half(source, path)
        else:
            formats.write_integers(source, path, self._images(calibration, MOST_CALIBRATION))

    def _measure_changes(self, extra: Sequence[str]) -> None:
        """Recall and F1 of every class on the test parts of the folds, each fold's own network converted in the same way."""
        labels, logits = [], {name: list[Images]() for name in ("fp32", *extra)}
        for number, (folder, record) in enumerate(records_of(self.found, self.study)):
            split = load_split(StudyFolder(self.found.path).split(record.repeat, record.fold), self.cohort)
            if len(split.test):
                labels.append(self.cohort.labels[split.test])
                for name, found in self._fold_logits(folder, split.test, self._validation(number), extra).items():
                    logits[name].append(found)
        if not labels:
            return
        truth = np.concatenate(labels)
        scores = {name: evidence.by_class(truth, np.concatenate(parts), self.terms.classes) for name, parts in logits.items()}
        for each in self.formats:
            if each.name in extra:
                each.changes = _changes(scores[each.name], scores["fp32"])

    def _fold_logits(self, run: RunFolder, rows: np.ndarray, calibration: np.ndarray, extra: Sequence[str]) -> dict[str, Images]:
        with TemporaryDirectory(dir=self.folder, prefix=".fold") as place:
            files = {each.name: self.folder / each.file for each in self.formats}
            if run.path.name != self.found.runs[0].path.name:
                files = {name: Path(place) / f"{name}.onnx" for name in ("fp32", *extra)}
                formats.write_onnx(_restored(run, self.checkpoint)[0], files["fp32"])
                for name in extra:
                    self._convert(name, files["fp32"], files[name], calibration)
            answers = {name: bundle.session(files[name]) for name in ("fp32", *extra)}
        parts = [self._images(rows[start : start + AT_ONCE]) for start in range(0, len(rows), AT_ONCE)]
        return {name: np.concatenate([answer(part) for part in parts]) for name, answer in answers.items()}

    def _teacher_ms(self) -> float | None:
        """The teacher's time of one image, measured as that of the formats; None without a teacher from this study."""
        record = records_of(self.found, self.study)[0][1]
        weights = StudyFolder(self.found.path).run(record.teacher).weights(self.checkpoint) if record.teacher else None
        if weights is None or not weights.is_file():
            return None
        teacher = restore(weights)[0]
        with TemporaryDirectory(dir=self.folder, prefix=".teacher") as place:
            formats.write_onnx(teacher, path := Path(place) / "teacher.onnx")
            return formats.milliseconds(bundle.session(path), (teacher.channels, teacher.image_size, teacher.image_size))

    def _write_probe(self) -> None:
        """Generated images, of no patient, and the network's logits for them: what ``--check`` repeats elsewhere."""
        shape = (8, len(self.promise.channels), *self.cohort.size)
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        logits = _answers(self.network, images.astype(np.float32) / np.float32(255))
        np.savez(self.folder / bundle.PROBE, images=images, logits=logits)


def _changes(scores: dict[str, dict[str, float]], before: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {label: {key: value - before[label][key] for key, value in own.items()} for label, own in scores.items()}


def _restored(run: RunFolder, checkpoint: str) -> tuple[Network, Promise]:
    network, promise = restore(run.weights(checkpoint))
    network.eval()
    return network, promise


@torch.inference_mode()
def _answers(network: torch.nn.Module, images: Images) -> Images:
    parts = [network(torch.from_numpy(images[start : start + AT_ONCE])).numpy() for start in range(0, len(images), AT_ONCE)]
    return np.concatenate(parts)


def _facts(network: Network, promise: Promise, architecture: str, keys: str) -> dict[str, Any]:
    return {
        "model": promise.model, "timm": architecture, "weights": keys, "head": promise.head, "mean": list(promise.mean),
        "std": list(promise.std), "image_size": promise.image_size, "parameters": sum(each.numel() for each in network.parameters()),
    }  # fmt: skip
