"""Where the scans of a cohort are brought together: a world of each scan's own, and one grid for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from probmed.grids import Grid
from probmed.transforms import Affine

_MULTIPLE = 4  # sides of the common grid


def own_world(grid: Grid) -> Affine:
    """From the world whose origin is a grid's middle and whose axes are its voxel axes, in the order and direction nearest to the world's, to the
    world of the grid: rigid."""
    d = grid.ndim
    directions = grid.affine[:d, :d] / grid.affine[:d, :d].norm(dim=0)
    matrix = torch.eye(d + 1, dtype=torch.float64)
    for row, column in enumerate(grid.nearest_axes):
        matrix[:d, row] = directions[:, column] * directions[row, column].sign()
    matrix[:d, d] = grid.voxel_to_world((torch.tensor(grid.shape, dtype=torch.float64) - 1) / 2)
    return Affine(matrix)


def common_grid(grids: Sequence[Grid], spacing_mm: float | None = None) -> Grid:
    """The grid on which the network sees every scan, in their own worlds: the largest field of view along each axis, at the smallest spacing."""
    sides = [[(g.shape[a] * g.spacing[a], g.spacing[a]) for a in g.nearest_axes] for g in grids]
    axes = range(grids[0].ndim)
    spacing = [spacing_mm or min(side[a][1] for side in sides) for a in axes]
    shape = [_MULTIPLE * math.ceil(max(side[a][0] for side in sides) / (_MULTIPLE * spacing[a]) - 1e-6) for a in axes]
    return Grid.from_spacing(shape, spacing)
