"""Where teacher and student look: Grad-CAM of the rare class's hardest slices, with randomised weights as a sanity check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from raredistill.batches import Batches
from raredistill.cohort.store import Cohort
from raredistill.models import Network, restore
from raredistill.report.figures import blank_figure
from raredistill.report.pairs import Pair
from raredistill.report.results import Results, cell

SHOWN = 4


def grad_cam(network: Network, images: Tensor, place: int) -> NDArray[np.float64]:
    """Grad-CAM (Selvaraju et al. 2017) of one class on the last feature map that has a spatial extent.

    Args:
        network: put into evaluation mode.
        images: ``(N, C, H, W)`` in [0, 1], the network's own channels.
        place: index of the class.

    Returns:
        ``(N, H, W)`` between 0 and 1, each map divided by its own maximum; all 0 where nothing speaks for the class.
    """
    maps: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[-1] > 1 and output.requires_grad:
            maps.append(output)

    hooks = [module.register_forward_hook(keep) for module in network.body.modules()]
    with torch.enable_grad():
        logits = network.eval()(images.requires_grad_())
    for hook in hooks:
        hook.remove()
    (gradient,) = torch.autograd.grad(logits[:, place].sum(), maps[-1])
    found = F.relu((gradient.mean(dim=(2, 3), keepdim=True) * maps[-1]).sum(dim=1, keepdim=True)).detach()
    large = F.interpolate(found, size=images.shape[-2:], mode="bilinear", align_corners=False)[:, 0].double()
    return np.asarray((large / large.amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)).numpy())


def randomised(network: Network, seed: int = 0) -> Network:
    """The network with every weight shuffled in its own tensor: the same numbers, nothing learnt (Adebayo et al. 2018)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=generator)].reshape(weight.shape))
    return network


def explain(study: Path, results: Results, pairs: list[Pair], hardest: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, Figure]]:
    """Maps of the hardest slices by teacher and student of every pair whose weights and cohort are at hand.

    Returns:
        A row a pair and slice (``entry, teacher, patient, sample`` and ``like_randomised``, the rank correlation of the student's map with
        that of its shuffled weights: near 0 when the map depends on what was learnt), and a figure a pair.
    """
    cohort = _cohort(study, results)
    if cohort is None or hardest.empty:
        return pd.DataFrame(), {}
    rows: list[dict[str, Any]] = []
    figures = {}
    for number, pair in enumerate(pairs):
        if found := _of_pair(study, results, cohort, pair, hardest.head(SHOWN)):
            rows += [{"entry": pair.entry, "teacher": pair.teacher, **{key: each[key] for key in _KEPT}} for each in found]
            figures[f"maps-{number}"] = _drawn(found, pair)
    return pd.DataFrame(rows), figures


_KEPT = ("patient", "sample", "like_randomised")


def _cohort(study: Path, results: Results) -> Cohort | None:
    named = results.study["config"].get("cohort")
    folders = [Path(named)] if isinstance(named, str) else sorted(study.glob("cohort-*"))
    there = [folder for folder in folders if (folder / "cohort.json").is_file()]
    return Cohort.load(there[-1]) if there else None


def _of_pair(study: Path, results: Results, cohort: Cohort, pair: Pair, hardest: pd.DataFrame) -> list[dict[str, Any]]:
    teachers = {cell(run): run for run in results.of(pair.teacher)}
    place, found = cohort.classes.index(results.study["rare"]), []
    for _, slice_ in hardest.iterrows():
        student = _tester(results, pair.entry, slice_["sample"])
        teacher = teachers.get(cell(student)) if student else None
        if student is None or teacher is None or not _weights(study, student).is_file() or not _weights(study, teacher).is_file():
            continue
        row = np.flatnonzero((cohort.samples["sample"] == slice_["sample"]).to_numpy())
        networks = [restore(_weights(study, run)) for run in (teacher, student, student)]
        randomised(networks[2][0])
        images = [_images(cohort, row, promise.channels) for _, promise in networks]
        maps = [grad_cam(network, image, place)[0] for (network, _), image in zip(networks, images, strict=True)]
        found.append({"patient": slice_["patient"], "sample": slice_["sample"], "image": images[1][0, 0].detach().numpy(), "maps": maps,
                      "like_randomised": _alike(maps[1], maps[2])})  # fmt: skip
    return found


def _alike(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    flat = one.ravel(), other.ravel()
    return float(spearmanr(*flat).statistic) if np.ptp(flat[0]) and np.ptp(flat[1]) else float("nan")


def _weights(study: Path, run: dict[str, Any]) -> Path:
    return study / "runs" / str(run["id"]) / "best.safetensors"


def _tester(results: Results, entry: str, sample: str) -> dict[str, Any] | None:
    tables = ((run, results.tables[run["id"]].table) for run in results.of(entry))
    return next((run for run, table in tables if ((table["sample"] == sample) & (table["split"] == "test")).any()), None)


def _images(cohort: Cohort, row: NDArray[np.int64], channels: tuple[str, ...]) -> Tensor:
    batches = Batches(cohort, row, channels=channels, batch_size=1, device=torch.device("cpu"), shuffle=False)
    return next(iter(batches.epoch(0))).images


def _drawn(found: list[dict[str, Any]], pair: Pair) -> Figure:
    figure, axes = blank_figure(len(found), 4)
    for line, each in zip(axes, found, strict=True):
        titles = (
            f"{each['sample']}",
            f"teacher {pair.teacher}",
            f"student {pair.entry}",
            f"weights shuffled ({each['like_randomised']:.2f})",
        )
        for axis, title, overlay in zip(line, titles, (None, *each["maps"]), strict=True):
            axis.imshow(each["image"], cmap="gray")
            if overlay is not None:
                axis.imshow(overlay, cmap="inferno", alpha=0.5, vmin=0, vmax=1)
            axis.set_title(title, fontsize=7)
            axis.axis("off")
    return figure
