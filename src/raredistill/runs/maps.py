"""Grad-CAM maps of teacher and student on the hardest images of the rare class, with randomised weights as a sanity check.

This step runs networks and writes arrays; the report only draws them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from raredistill import checkpoint
from raredistill.batches import Batches
from raredistill.cohort.store import Cohort
from raredistill.models import Network, restore
from raredistill.runs.layout import StudyFolder

ARRAYS = ("image", "teacher", "student", "randomised")
"""Arrays saved for each request: the student's first channel, and three maps."""


@dataclass(frozen=True)
class MapRequest:
    """One image to be explained by a teacher and its student.

    Attributes:
        entry: name of the student's entry.
        teacher: name of the teacher.
        teacher_run: id of the run that trained the teacher.
        student_run: id of the run that tested the image.
        patient: patient of the image.
        sample: name of the image.
    """

    entry: str
    teacher: str
    teacher_run: str
    student_run: str
    patient: str
    sample: str


@dataclass(frozen=True)
class SliceMaps:
    """The maps of one image.

    Attributes:
        request: the image and the networks.
        like_randomised: rank correlation of the student's map with that of its shuffled weights; near 0 if the map depends on the
            learnt weights, NaN if a map is constant.
        arrays: ``image``, ``teacher``, ``student`` and ``randomised``, each ``(H, W)``.
    """

    request: MapRequest
    like_randomised: float
    arrays: dict[str, NDArray[np.float64]]


def write_maps(folder: StudyFolder, cohort: Cohort, rare: str, requests: Sequence[MapRequest]) -> None:
    """Compute the maps of the rare class for every request whose weights exist, and save them in the study's folder.

    Args:
        folder: of the study.
        cohort: cohort of the study.
        rare: class whose evidence is mapped.
        requests: images and networks.

    Raises:
        OSError: the file cannot be written.
    """
    made = [_maps(folder, cohort, rare, request) for request in requests if _has_weights(folder, request)]
    tensors = {f"{number}.{name}": torch.from_numpy(each.arrays[name]) for number, each in enumerate(made) for name in ARRAYS}
    facts = [{**asdict(each.request), "like_randomised": each.like_randomised} for each in made]
    checkpoint.save_state(folder.maps, tensors, facts)


def read_maps(folder: StudyFolder) -> list[SliceMaps]:
    """Read the maps saved by :func:`write_maps`; empty if there is no file.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not folder.maps.is_file():
        return []
    tensors, facts = checkpoint.load_state(folder.maps)
    return [_slice_maps(facts[number], {name: tensors[f"{number}.{name}"].numpy() for name in ARRAYS}) for number in range(len(facts))]


def _slice_maps(fact: dict[str, Any], arrays: dict[str, NDArray[np.float64]]) -> SliceMaps:
    alike = fact.pop("like_randomised")
    return SliceMaps(MapRequest(**fact), alike, arrays)


def _has_weights(folder: StudyFolder, request: MapRequest) -> bool:
    return all(folder.run(run).weights("best").is_file() for run in (request.teacher_run, request.student_run))


def _maps(folder: StudyFolder, cohort: Cohort, rare: str, request: MapRequest) -> SliceMaps:
    row = np.flatnonzero((cohort.samples["sample"] == request.sample).to_numpy())
    runs = (request.teacher_run, request.student_run, request.student_run)
    networks = [restore(folder.run(run).weights("best")) for run in runs]
    randomised(networks[2][0])
    images = [_images(cohort, row, promise.channels) for _, promise in networks]
    place = cohort.classes.index(rare)
    maps = [grad_cam(network, image, place)[0] for (network, _), image in zip(networks, images, strict=True)]
    arrays = dict(zip(ARRAYS, (images[1][0, 0].detach().double().numpy(), *maps), strict=True))
    return SliceMaps(request, _alike(maps[1], maps[2]), arrays)


def grad_cam(network: Network, images: Tensor, place: int) -> NDArray[np.float64]:
    """Grad-CAM (Selvaraju et al. 2017) of one class on the last feature map that has a spatial extent.

    Args:
        network: it is set to evaluation mode.
        images: ``(N, C, H, W)`` in [0, 1], the network's own channels.
        place: index of the class.

    Returns:
        ``(N, H, W)`` between 0 and 1, each map divided by its own maximum; all 0 if no evidence for the class is found.
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
    """The network with the values of each weight tensor shuffled: same numbers, nothing learnt (Adebayo et al. 2018)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=generator)].reshape(weight.shape))
    return network


def _alike(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    flat = one.ravel(), other.ravel()
    return float(spearmanr(*flat).statistic) if np.ptp(flat[0]) and np.ptp(flat[1]) else float("nan")


def _images(cohort: Cohort, row: NDArray[np.int64], channels: tuple[str, ...]) -> Tensor:
    batches = Batches(cohort, row, channels=channels, batch_size=1, device=torch.device("cpu"), shuffle=False)
    return next(iter(batches.epoch(0))).images
