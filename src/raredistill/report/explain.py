"""Where teacher and student look: Grad-CAM of the rare class's hardest slices, with randomised weights as a sanity check."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
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
OPAQUE = 0.65
"""How much of the image the highest point of a map hides."""
LINE, HALO = "#ffffff", "#000000"


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


def overlay(image: NDArray[np.float32], heat: NDArray[np.float64]) -> NDArray[np.float64]:
    """A map over its image, mixed here because SVG viewers disagree on transparent pictures.

    Args:
        image: ``(H, W)``, made to span 0 to 1.
        heat: ``(H, W)`` between 0 and 1; where it is 0 the image shows as it is.

    Returns:
        ``(H, W, 3)``, red, green and blue between 0 and 1.
    """
    grey = (image - image.min()) / max(float(np.ptp(image)), 1e-12)
    share = (OPAQUE * heat)[..., None]
    return np.asarray((1 - share) * grey[..., None] + share * colormaps["inferno"](heat)[..., :3])


def _drawn(found: list[dict[str, Any]], pair: Pair) -> Figure:
    figure, axes = blank_figure(len(found), 4)
    for line, each in zip(axes, found, strict=True):
        alike = "undefined" if np.isnan(each["like_randomised"]) else f"{each['like_randomised']:.2f}"
        titles = (each["sample"], f"teacher {pair.teacher}", f"student {pair.entry}", f"weights shuffled (correlation {alike})")
        nothing = np.zeros_like(each["maps"][0])
        for axis, title, heat in zip(line, titles, (nothing, *each["maps"]), strict=True):
            axis.imshow(overlay(each["image"], heat))
            axis.set_title(fill(title, 26), fontsize=8)
            axis.axis("off")
            if heat is not nothing:
                _outline(axis, heat)
    return figure


def _outline(axis: Any, heat: NDArray[np.float64]) -> None:
    """Half of the map's maximum as a line that is seen on every ground, or a word where the map is empty."""
    if heat.min() < 0.5 < heat.max():
        line = axis.contour(heat, levels=[0.5], colors=[LINE], linewidths=1.2)
        line.set_path_effects([withStroke(linewidth=3.2, foreground=HALO)])
    elif not heat.any():
        box = {"facecolor": HALO, "edgecolor": "none"}
        axis.text(0.5, 0.06, "empty map", transform=axis.transAxes, ha="center", color=LINE, fontsize=8, bbox=box)
