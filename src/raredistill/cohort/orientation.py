"""Directions of a volume's axes, and its reorientation as in BraTS: to the left, to the back, to the head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from nibabel.orientations import io_orientation

from raredistill.errors import DataError

LEFT_POSTERIOR_SUPERIOR = (-1, -1, 1)
"""Signs of the three axes in coordinates that increase to the right, the front and the head."""


@dataclass(frozen=True)
class Axes:
    """Reorientation of a volume, whose axes are the file's third, second and first, into slices from feet to head.

    Attributes:
        order: for numpy's ``transpose``.
        flips: axes to be reversed afterwards.
        tilt: degrees between the axes and the closest ones of the patient; 0 for a scan that is not oblique.
    """

    order: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    tilt: float

    @property
    def identity(self) -> bool:
        """Whether no change is needed, as for BraTS's own files."""
        return self.order == (0, 1, 2) and not any(self.flips)

    def turn(self, volume: np.ndarray) -> np.ndarray:
        """``(slices, height, width)``: axial slices from feet to head, rows from front to back, columns from right to left.

        If only the order of slices changes, the result is a view; else a copy in which each slice is contiguous.
        """
        if self.identity:
            return volume
        turned = volume.transpose(self.order)[tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)]
        return turned if self.order == (0, 1, 2) and not any(self.flips[1:]) else np.ascontiguousarray(turned)


AS_STORED = Axes((0, 1, 2), (False, False, False), 0.0)


def axes_of(affine: np.ndarray) -> Axes:
    """The closest reorientation of a volume, by its affine.

    Args:
        affine: ``(4, 4)`` from indices of the file's first, second and third axis to millimetres right, front and up, as in NIfTI.

    Raises:
        DataError: two of the axes have the same direction, or one has none.
    """
    directions = np.asarray(affine, dtype=np.float64)[:3, :3]
    lengths = np.linalg.norm(directions, axis=0)
    found = io_orientation(affine)  # type: ignore[no-untyped-call]
    if np.isnan(found).any() or not (lengths > 0).all():
        raise DataError("its affine is flat: two axes have one direction, or one has no length")
    world, signs = found[:, 0].astype(int), found[:, 1].astype(int)
    cosines = np.abs(directions[world, [0, 1, 2]] / lengths)
    tilt = float(np.degrees(np.arccos(np.clip(cosines.min(), 0, 1))))
    takes = [int(np.flatnonzero(world == axis)[0]) for axis in (2, 1, 0)]
    flips = [bool(signs[axis] != LEFT_POSTERIOR_SUPERIOR[world[axis]]) for axis in takes]
    return Axes((2 - takes[0], 2 - takes[1], 2 - takes[2]), (flips[0], flips[1], flips[2]), tilt)
