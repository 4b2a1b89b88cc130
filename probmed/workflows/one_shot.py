"""What other scans differ in from the one that is labelled, estimated by registration, and the distributions that are fitted to it.

With the labelled scan as the fixed image every velocity is on its voxels, so that velocities of different people can be compared, and so is the
intensity that is left: ψ_i = y_i ∘ φ_i − I_1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from pyro import poutine
from torch import Tensor

from probmed.field_priors import FieldPrior, FlowPrior, PrincipalField, SmoothField
from probmed.fields import along_axes
from probmed.grids import Grid, interpolation_matrices
from probmed.inference.parameters import seeded
from probmed.models.one_shot import TransformedScan
from probmed.transforms import Affine, Transform, Velocity, warp
from probmed.volumes import Volume, scaled

SPATIAL = ("principal", "smooth", "random", "none")
APPEARANCES = ("principal", "smooth", "none")
_RANDOM_SD_MM, _RANDOM_LENGTH_MM = 2.0, 8.0  # of transforms that nothing was learned from


class Found(Protocol):
    """A registration: its affine map and velocity, and both together."""

    @property
    def affine(self) -> Affine: ...
    @property
    def velocity(self) -> Velocity | None: ...
    @property
    def transform(self) -> Transform: ...


Register = Callable[[Volume, Volume], Found]


@dataclass(frozen=True)
class Estimates:
    """How N scans differ from the labelled one, on its grid.

    Arguments:
        scan: I_1, scaled, ``(1, *grid.shape)``.
        velocities: of φ_i but for its affine map, mm, ``(N, d, *lattice.shape)``; affines: those maps.
        residuals: ψ_i, ``(N, 1, *grid.shape)``; 0 where a scan does not reach.
    """

    grid: Grid
    lattice: Grid
    scan: Tensor
    velocities: Tensor
    affines: tuple[Affine, ...]
    residuals: Tensor


def estimate(scan: Volume, others: Sequence[Volume], register: Register, tell: Callable[[float], None] = lambda share: None) -> Estimates:
    """Register other scans to the labelled one.

    Arguments:
        register: a moving volume onto a fixed one, as ``registration.register``, with a deformation.
        tell: called with the share of the work done.

    Raises:
        ValueError: for fewer than two other scans.
    """
    if len(others) < 2:
        raise ValueError(f"expected two scans or more beside the labelled one, got {len(others)}")
    reference = scaled(scan.data)[None]
    velocities, affines, residuals = [], [], []
    lattice: Grid | None = None
    for number, other in enumerate(others):
        result = register(other, scan)
        if result.velocity is None:
            raise ValueError("expected a registration with a deformation, got an affine map alone")
        lattice = lattice or result.velocity.grid
        field = result.velocity.field
        if result.velocity.grid != lattice:
            field = along_axes(field, interpolation_matrices(result.velocity.grid, lattice, field))
        moved = warp(scaled(other.data)[None], other.grid, result.transform, scan.grid, fill=math.nan)
        velocities.append(field)
        affines.append(result.affine)
        residuals.append((moved - reference).nan_to_num(0.0))
        tell((number + 1) / len(others))
    if lattice is None:
        raise AssertionError
    return Estimates(scan.grid, lattice, reference, torch.stack(velocities), tuple(affines), torch.stack(residuals))


def model_of(
    scan: Volume,
    labels: Volume,
    others: Sequence[Volume],
    codes: Sequence[int],
    register: Register,
    tell: Callable[[float], None] = lambda share: None,
) -> TransformedScan:
    """What is drawn from: both transforms independent, each with the principal components of what was estimated.

    Arguments:
        labels: on the scan's grid. codes: of the labels, 0 first. others: scans without labels.
    """
    shares = torch.stack([(labels.data == code).float() for code in codes])
    return learned(estimate(scan, others, register, tell), shares)


def carried(
    scan: Volume,
    labels: Volume,
    others: Sequence[Volume],
    register: Register,
    tell: Callable[[float], None] = lambda share: None,
) -> list[Volume]:
    """The labels of one scan on others' voxels, the likeliest of each by linear interpolation: what a network is trained on as if they were drawn.

    The errors of one registration are its own, and a network learns what many have in common.

    Arguments:
        labels: on the scan's grid. register: a moving volume onto a fixed one. tell: called with the share of the work done.
    """
    codes = labels.data.unique()
    shares = torch.stack([(labels.data == code).float() for code in codes])
    found = []
    for number, other in enumerate(others):
        moved = warp(shares, labels.grid, register(scan, other).transform, other.grid, fill="edge")
        found.append(other.with_data(codes[moved.argmax(0)]))
        tell((number + 1) / len(others))
    return found


def learned(
    estimates: Estimates,
    labels: Tensor,
    spatial: str = "principal",
    appearance: str = "principal",
    components: int | None = None,
    noise: float = 0.02,
) -> TransformedScan:
    """A model whose transforms are distributed as those that were estimated.

    Arguments:
        labels: S_1 as probabilities, ``(K, *grid.shape)``.
        spatial: one of ``SPATIAL``: principal components of velocities, a smooth field fitted to them, a smooth field that was not, or none.
        appearance: one of ``APPEARANCES``, alike.
        components: at most so many principal components of each; all by default.

    Raises:
        ValueError: for other names.
    """
    if spatial not in SPATIAL or appearance not in APPEARANCES:
        raise ValueError(f"expected spatial of {SPATIAL} and appearance of {APPEARANCES}, got {spatial!r} and {appearance!r}")
    flow = FlowPrior(estimates.lattice, _velocity(estimates, spatial, components))
    look: FieldPrior | None = None
    if appearance == "principal":
        look = PrincipalField.fit(estimates.residuals, components, "appearance")
    elif appearance == "smooth":
        look = SmoothField.fit(estimates.residuals, estimates.grid.spacing, site="appearance")
    return TransformedScan(estimates.scan, labels, estimates.grid, flow, look, noise)


def _velocity(estimates: Estimates, spatial: str, components: int | None) -> FieldPrior:
    if spatial == "principal":
        return PrincipalField.fit(estimates.velocities, components, "velocity")
    if spatial == "smooth":
        return SmoothField.fit(estimates.velocities, estimates.lattice.spacing, 3.0, "velocity")
    sd = _RANDOM_SD_MM if spatial == "random" else 1e-6
    return SmoothField(torch.zeros_like(estimates.velocities[0]), estimates.lattice.spacing, sd, _RANDOM_LENGTH_MM, 3.0, "velocity")


def coupled(estimates: Estimates, labels: Tensor, number: int, noise: float = 0.02) -> TransformedScan:
    """The transforms of one other scan, both together, as they were estimated."""
    own = PrincipalField(estimates.velocities[number], torch.zeros_like(estimates.velocities[:1]), "velocity")
    look = PrincipalField(estimates.residuals[number], torch.zeros_like(estimates.residuals[:1]), "appearance")
    return TransformedScan(estimates.scan, labels, estimates.grid, FlowPrior(estimates.lattice, own), look, noise)


@torch.no_grad()
def draw(model: TransformedScan, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labelled scans from the model.

    Returns:
        Images ``(count, 1, *shape)`` and label indices ``(count, *shape)``.
    """
    with seeded(seed):
        nodes = [poutine.trace(model).get_trace().nodes for _ in range(count)]
    return torch.stack([node["image"]["value"] for node in nodes]), torch.stack([node["labels"]["value"].argmax(0) for node in nodes])
