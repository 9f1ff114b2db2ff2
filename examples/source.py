"""A source of your own: one ``LABEL-PATIENT.npy`` with ``(n, height, width)`` uint8 per patient.

raredistill prepare npy_folder DIR --plugin examples/source.py --out cohort
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import raredistill
from raredistill.cohort.sources import Problem, Slices, Unit


@raredistill.source
class NpyFolder:
    """A folder of arrays."""

    kind = "npy_folder"
    channels = ("image",)
    counted = "patients"

    def __init__(self, path: Path) -> None:
        self._path = path

    def units(self) -> list[Unit]:
        """One per file, named by what follows the first hyphen."""
        files = sorted(self._path.glob("*.npy"))
        return [Unit(file.stem.partition("-")[2], file.stem.partition("-")[0], (file,)) for file in files]

    def classes(self) -> tuple[str, ...]:
        """The labels that occur, in alphabetical order."""
        return tuple(sorted({unit.label for unit in self.units()}))

    def problems(self) -> list[Problem]:
        """Nothing is known to be wrong before files are read."""
        return []

    def skipped(self) -> list[Any]:
        """Everything that is there is read."""
        return []

    def read(self, unit: Unit, size: tuple[int, int]) -> Slices:
        """Decode one patient; a pickle inside is never opened."""
        stack = np.load(unit.files[0], allow_pickle=False)
        pixels = np.stack([np.asarray(Image.fromarray(image).resize(size[::-1])) for image in stack])
        rows = [
            {"sample": f"{unit.patient}-{n}", "label": unit.label, "slice": n, "source": unit.files[0].name, "split": ""}
            for n in range(len(stack))
        ]
        return Slices(rows, {"image": pixels}, {})

    def settings(self) -> dict[str, Any]:
        """Nothing can be set."""
        return {}
