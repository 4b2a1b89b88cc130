"""Published training objectives that are not log densities, kept as baselines beside the exact ones.

VoxelMorph's probabilistic objective, as its code has it, is no evidence lower bound: means over grids of different sizes stand in for sums, the
precision's degree is halved, normalisers are left out, and the divergence is multiplied by 0.01. It is reproduced here with all of that.

References: Balakrishnan et al., IEEE TMI 2019; Dalca et al., MedIA 2019; the authors' code, ``losses.py`` and ``train.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from probmed.similarities import window_sums


def mean_squares(moved: Tensor, fixed: Tensor) -> Tensor:
    """Mean of (m∘φ − f)²; unknown voxels count as zeros, as published."""
    return functional.mse_loss(moved.nan_to_num(0.0), fixed.nan_to_num(0.0))


def negative_correlation(moved: Tensor, fixed: Tensor, width: int = 9) -> Tensor:
    """Minus the mean squared local correlation of images ``(B, C, *shape)``, in windows of ``width`` voxels that go on beyond the border as zeros."""
    d = moved.ndim - 2
    m, f, radius, n = moved.nan_to_num(0.0), fixed.nan_to_num(0.0), (width // 2,) * (moved.ndim - 2), width**d
    sum_m, sum_f = window_sums(m, radius), window_sums(f, radius)
    cross = window_sums(m * f, radius) - sum_m * sum_f / n
    var_m, var_f = window_sums(m * m, radius) - sum_m**2 / n, window_sums(f * f, radius) - sum_f**2 / n
    return -(cross**2 / (var_m * var_f + 1e-5)).mean()


def squared_differences(field: Tensor) -> Tensor:
    """Mean squared forward difference of a field ``(B, d, *shape)``, averaged over axes."""
    d = field.shape[1]
    return sum((field.diff(dim=2 + axis).square().mean() for axis in range(d)), field.new_zeros(())) / d


def voxelmorph_divergence(mean: Tensor, log_variance: Tensor, strength: float) -> Tensor:
    """What the published code has for KL(q ‖ p): ½ d [mean(λ D eˢ − s) + λ ½ (1/d) Σ_a mean((Δ_a μ)²)], D the number of a voxel's neighbours.

    Arguments:
        mean, log_variance: ``(B, d, *shape)``, voxels. strength: λ.
    """
    d = mean.shape[1]
    degree = mean.new_zeros(mean.shape[2:])
    for axis, n in enumerate(mean.shape[2:]):
        line = torch.full((n,), 2.0).to(mean)
        line[0] -= 1
        line[-1] -= 1
        degree = degree + line.reshape([-1 if a == axis else 1 for a in range(d)])
    spread = (strength * degree * log_variance.exp() - log_variance).mean()
    return 0.5 * d * (spread + strength * 0.5 * squared_differences(mean))
