"""Strengths of random augmentations, as settings; the computation is in :mod:`raredistill.augment`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Interval, Le

from raredistill.declared import Declared
from raredistill.errors import ConfigError
from raredistill.options import did_you_mean

Probability = Annotated[float, Interval(ge=0, le=1)]
Zoom = Annotated[float, Gt(0), Le(10)]


@dataclass(frozen=True)
class Augmentation(Declared):
    """Strengths of the random transformations.

    Attributes:
        rotation: largest angle to either side, in degrees.
        hflip: probability of a left-right flip.
        vflip: probability of an up-down flip.
        scale: smallest and largest zoom.
        brightness: largest change of the brightness factor (0.2: 0.8 to 1.2).
        contrast: the same around the mean of each channel of each image, so that a view does not depend on which channels are loaded.
        crop: largest shift up, down, left and right, in whole pixels; new pixels are 0, as in a random crop after padding.
        steps: augmentations of plug-ins by name, applied in this order after all others.
    """

    rotation: Annotated[float, Interval(ge=0, le=180)] = 0.0
    hflip: Probability = 0.0
    vflip: Probability = 0.0
    scale: tuple[Zoom, Zoom] = (1.0, 1.0)
    brightness: Probability = 0.0
    contrast: Probability = 0.0
    crop: Annotated[int, Ge(0)] = 0
    steps: tuple[str, ...] = ()

    def conflicts(self) -> list[str]:
        """Messages on limits in the wrong order."""
        return ["scale: the smallest zoom comes first"] if self.scale[0] > self.scale[1] else []


PRESETS: dict[str, Augmentation | None] = {
    "none": None,
    "default": Augmentation(rotation=15, hflip=0.5, scale=(0.9, 1.1), brightness=0.2, contrast=0.2),
    "thesis": Augmentation(rotation=30, hflip=0.5, vflip=0.5, scale=(0.9, 1.1), brightness=0.2, contrast=0.2),
    "cifar": Augmentation(hflip=0.5, crop=4),
}


def from_preset(value: Any) -> Any:
    """Complete a mapping that names a ``preset`` and changes some of its strengths; other values are returned unchanged.

    Raises:
        ConfigError: there is no such preset.
    """
    if not isinstance(value, Mapping) or "preset" not in value:
        return value
    name, changed = value["preset"], {key: each for key, each in value.items() if key != "preset"}
    if name not in PRESETS:
        raise ConfigError(f"augmentation: no preset {name}{did_you_mean(str(name), PRESETS)}; there are {', '.join(PRESETS)}")
    preset = PRESETS[name]
    return {**({} if preset is None else asdict(preset)), **changed}
