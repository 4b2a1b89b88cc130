"""Slices of an image as a reader of scans expects them: anatomical planes, true proportions, sides named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

PLANES = ("axial", "coronal", "sagittal")
# Of each plane: the axis (x, y, z = 0, 1, 2) that it is across, and the names of its left and right edges.
_ACROSS = {"axial": 2, "coronal": 1, "sagittal": 0}
_EDGES = {"axial": ("L", "R"), "coronal": ("L", "R"), "sagittal": ("P", "A")}
_ASIDE_MM = 14.0


@dataclass(frozen=True)
class Orientation:
    """The flips and swaps of axes that bring an image nearest to RAS (x to the right, y to the front, z up).

    Nothing is interpolated: an oblique image keeps its own planes.

    Arguments:
        order: nibabel's orientation array, ``(3, 2)``.
        spacing: mm along x, y, z, once reoriented.
    """

    order: NDArray[np.float64]
    spacing: tuple[float, float, float]

    @classmethod
    def of(cls, affine: NDArray[np.float64]) -> Orientation:
        """From a voxel-to-world affine ``(4, 4)``, RAS mm."""
        order = np.asarray(nib.io_orientation(affine))
        steps = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)
        by_axis = [float(steps[int(np.flatnonzero(order[:, 0] == axis)[0])]) for axis in range(3)]
        return cls(order, (by_axis[0], by_axis[1], by_axis[2]))

    def __call__(self, image: Tensor | NDArray[np.generic]) -> Array:
        """An image ``(*shape)``, of two or three axes, with its axes along x, y, z, ``(nx, ny, nz)``."""
        array = np.asarray(image, dtype=np.float64)
        array = array[..., None] if array.ndim == 2 else array
        return np.asarray(nib.apply_orientation(array, self.order))


@dataclass(frozen=True)
class Plane:
    """One plane through the image.

    Arguments:
        name: of ``PLANES``.
        index: which slice along the axis that the plane is across.
        rows, columns: what to show of it, in voxels.
        aspect: height of a voxel over its width.
        step: width of a voxel, mm.
    """

    name: str
    index: int
    rows: slice
    columns: slice
    aspect: float
    step: float

    @property
    def edges(self) -> tuple[str, str]:
        """Names of its left and right edge."""
        return _EDGES[self.name]

    @property
    def size(self) -> tuple[float, float]:
        """Width and height shown, in widths of a voxel."""
        width = self.columns.stop - self.columns.start
        return width, (self.rows.stop - self.rows.start) * self.aspect

    def cut(self, oriented: Array) -> Array:
        """The slice of an image ``(nx, ny, nz)``, for ``imshow`` with its origin below."""
        slab = np.take(oriented, self.index, axis=_ACROSS[self.name]).T
        return np.asarray(slab[self.rows, self.columns])


def planes_through(
    centre: Sequence[int], box: Sequence[slice], shape: Sequence[int], spacing: Sequence[float]
) -> list[Plane]:
    """The anatomical planes through a voxel, cropped to a box; of a single slice, only its own plane.

    The sagittal one is moved to the side, for in the middle there is more falx than brain.
    """
    middle = list(centre)
    aside = min(_ASIDE_MM / spacing[0], (box[0].stop - box[0].start) / 10)
    middle[0] = min(middle[0] + round(aside), shape[0] - 1)
    return [plane_at(name, middle[_ACROSS[name]], box, spacing) for name in PLANES if _is_shown(name, shape)]


def _is_shown(name: str, shape: Sequence[int]) -> bool:
    return all(shape[axis] > 1 for axis in range(3) if axis != _ACROSS[name])


def plane_at(name: str, index: int, box: Sequence[slice], spacing: Sequence[float]) -> Plane:
    """A plane at a given slice."""
    across, down = (axis for axis in range(3) if axis != _ACROSS[name])
    return Plane(name, int(index), box[down], box[across], spacing[down] / spacing[across], spacing[across])


def spread_over(box: Sequence[slice], name: str, count: int) -> list[int]:
    """``count`` slices at even distances through a box, its outer eighths left out."""
    part = box[_ACROSS[name]]
    end = (part.stop - 1 - part.start) / 8
    return sorted({round(float(i)) for i in np.linspace(part.start + end, part.stop - 1 - end, count)})


def bounding_box(mask: Mask, margin_mm: float, spacing: Sequence[float]) -> tuple[slice, ...]:
    """The voxels around a mask ``(nx, ny, nz)``, with a margin; the whole image where the mask is empty."""
    inside = np.argwhere(mask)
    if not len(inside):
        return tuple(slice(0, n) for n in mask.shape)
    steps = [int(np.ceil(margin_mm / s)) for s in spacing]
    low, high = inside.min(0), inside.max(0)
    return tuple(
        slice(max(0, int(a) - k), min(n, int(b) + k + 1))
        for a, b, k, n in zip(low, high, steps, mask.shape, strict=True)
    )


def centre_of(mask: Mask) -> tuple[int, ...]:
    """The voxel at the mean position of a mask; the middle of the image where it is empty."""
    inside = np.argwhere(mask)
    centre = inside.mean(0) if len(inside) else (np.array(mask.shape) - 1) / 2
    return tuple(round(float(c)) for c in centre)


def window(values: Array, inside: Mask | None = None) -> tuple[float, float]:
    """Grey-value limits that a few voxels do not move: percentiles of the values above the darkest.

    Arguments:
        inside: where the image's interest lies; bright fat elsewhere is then left to saturate.
    """
    known = values[np.isfinite(values)]
    lit = known[known > known.min()] if known.size else known
    if not lit.size:
        return 0.0, 1.0
    low, high = np.percentile(lit, [0.5, 99.5])
    if inside is not None and inside.any():
        high = min(high, 1.15 * np.percentile(values[inside], 99.5))
    low = min(low, 0.0) if known.min() >= 0 else low
    return float(low), float(high if high > low else low + 1.0)
