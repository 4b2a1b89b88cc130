"""What a registration network is trained for, as losses of batches of pairs. Objectives, by name:

- ``elbo``: the evidence lower bound of the model in nats (unsupervised; labels, where a pair has them, are one more observation in it);
- ``simulation``: −log q of a deformation drawn from the prior, which made the fixed image (supervised by true deformations);
- ``voxelmorph-mse``, ``voxelmorph-ncc``: dissimilarity + λ ‖∇v‖², as the authors' code has it by default for diffeomorphic networks;
- ``voxelmorph-mse-displacement``, ``voxelmorph-ncc-displacement``: dissimilarity + λ ‖∇u‖², as published, with u = exp(v) − Id;
- ``voxelmorph-probabilistic``: as its code has it (``losses``).

References: Balakrishnan et al., CVPR 2018 and IEEE TMI 2019; Dalca et al., MedIA 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probmed import losses
from probmed.inference.amortised import elbo_loss, posterior_loss
from probmed.transforms import Velocity, warp
from probmed.workflows.registration_networks import TrainedRegistration


@dataclass(frozen=True)
class PairBatch:
    """Pairs on a network's grid.

    Arguments:
        moving, fixed: ``(B, 1, *shape)``, NaN where unknown.
        labels: of both, as zeros and a one, ``(B, K, *shape)`` each, all NaN where a scan has none; None where they are not used.
    """

    moving: Tensor
    fixed: Tensor
    labels: tuple[Tensor, Tensor] | None = None


def loss(trained: TrainedRegistration, pairs: PairBatch) -> Tensor:
    """The network's objective, to be lowered: nats a voxel, or what was published."""
    objective = trained.settings.objective
    if objective == "simulation":
        return simulation_loss(trained, pairs.moving)
    if objective == "elbo":
        return evidence_loss(trained, pairs)
    return published_loss(trained, pairs.moving, pairs.fixed)


def evidence_loss(trained: TrainedRegistration, pairs: PairBatch) -> Tensor:
    """−ELBO of a pair, nats a voxel."""
    grid = trained.grid
    seen: dict[str, Any] = {} if pairs.labels is None else {"moving_labels": pairs.labels[0], "labels": pairs.labels[1]}
    return elbo_loss(trained.model, trained.guide, len(pairs.moving), pairs.moving, grid, grid, pairs.fixed, **seen) / grid.numel


def simulation_loss(trained: TrainedRegistration, moving: Tensor) -> Tensor:
    """Draw v and f from the model, and ask the network for v: −log q(v | m, f), nats a voxel."""
    grid = trained.grid
    with torch.no_grad():
        velocity = trained.model.deformation.prior().expand([len(moving)]).sample()  # type: ignore[operator]
        fixed = warp(moving, grid, Velocity(trained.lattice, velocity), grid, fill=math.nan)
        fixed = fixed + trained.settings.noise * torch.randn_like(fixed)
    return posterior_loss(trained.guide, {"velocity": velocity}, len(moving), moving, grid, grid, fixed) / grid.numel


def published_loss(trained: TrainedRegistration, moving: Tensor, fixed: Tensor) -> Tensor:
    """VoxelMorph's objectives, in voxels of the lattice; what is unknown is zero."""
    settings, grid, lattice = trained.settings, trained.grid, trained.lattice
    moving, fixed = moving.nan_to_num(0.0), fixed.nan_to_num(0.0)
    mean, log_variance = trained.published(moving, fixed)
    probabilistic = settings.objective == "voxelmorph-probabilistic"
    velocity = mean + (log_variance / 2).exp() * torch.randn_like(mean) if probabilistic else mean
    flow = Velocity(lattice, velocity * trained.voxel(mean)).exp(both=False)
    moved = warp(moving, grid, flow, grid, fill="edge")
    weight = PUBLISHED_WEIGHTS[settings.objective] if settings.weight is None else settings.weight
    if probabilistic:
        divergence = losses.voxelmorph_divergence(mean, log_variance, weight)
        return losses.mean_squares(moved, fixed) / settings.image_sd**2 + 0.01 * divergence
    rough = flow.field / trained.voxel(mean) if settings.objective.endswith("displacement") else velocity
    unlike = losses.mean_squares if "-mse" in settings.objective else losses.negative_correlation
    return unlike(moved, fixed) + weight * losses.squared_differences(rough)


PUBLISHED_WEIGHTS = {
    "voxelmorph-mse": 0.01,
    "voxelmorph-ncc": 1.0,
    "voxelmorph-mse-displacement": 0.01,
    "voxelmorph-ncc-displacement": 1.0,
    "voxelmorph-probabilistic": 10.0,
}
"""λ of each objective, as published."""
