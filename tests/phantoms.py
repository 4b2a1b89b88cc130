"""Heads of ellipses, known at every point of the world: deformed and sampled without interpolation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from probmed.grids import Grid

# Centre, semi-axes (mm) and height of each ellipse. None is symmetric to another.
_ELLIPSES: tuple[tuple[tuple[float, ...], tuple[float, ...], float], ...] = (
    ((0, 0, 0), (30, 24, 25), 1.0),
    ((8, 6, -5), (9, 7, 8), 0.8),
    ((-11, 4, 6), (6, 10, 7), -0.5),
    ((-2, -11, 3), (9, 5, 6), 0.6),
    ((12, -8, 2), (5, 5, 9), -0.4),
)


def head(points: Tensor, sharpness: float = 14.0, folds: float = 0.0) -> Tensor:
    """The image's value at points ``(..., d)`` in mm, zero outside the head.

    Arguments:
        folds: contrast of a wave of about 10 mm inside the head.
    """
    d, out = points.shape[-1], torch.zeros(points.shape[:-1], dtype=points.dtype)
    for number, (centre, axes, height) in enumerate(_ELLIPSES):
        x = (points - torch.tensor(centre[:d], dtype=points.dtype)) / torch.tensor(axes[:d], dtype=points.dtype)
        inside = torch.sigmoid(sharpness * (1 - x.square().sum(-1).sqrt()))
        out = out + height * inside
        if number == 0:
            wave = torch.sin(0.6 * points + 0.5 * torch.roll(points, 1, -1)).prod(-1)
            out = out + folds * inside * wave
    return out


def bend(points: Tensor, grid: Grid, size_mm: float) -> Tensor:
    """A smooth velocity at points ``(..., d)``, mm, zero at the faces of a grid centred at the origin."""
    extent = torch.tensor([n * h for n, h in zip(grid.shape, grid.spacing, strict=True)], dtype=points.dtype)
    waves = [torch.sin(0.07 * torch.roll(points, 1, -1)[..., a] + 0.05 * points[..., a] + 1 + a) for a in range(points.shape[-1])]
    window = torch.cos(math.pi * points / extent).clamp_min(0).square().prod(-1)
    return size_mm * window[..., None] * torch.stack(waves, -1)


def flowed(points: Tensor, velocity: Callable[[Tensor], Tensor], steps: int = 40) -> Tensor:
    """Points after the flow of a velocity over time one, by Runge–Kutta."""
    for _ in range(steps):
        first = velocity(points) / steps
        second = velocity(points + first / 2) / steps
        third = velocity(points + second / 2) / steps
        fourth = velocity(points + third) / steps
        points = points + (first + 2 * second + 2 * third + fourth) / 6
    return points
