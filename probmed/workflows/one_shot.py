"""What other scans differ in from the one that is labelled, estimated by registration, and the distributions that are fitted to it.

With the labelled scan as the fixed image every velocity is on its voxels, so that velocities of different people can be compared, and so is the
intensity that is left: ψ_i = y_i ∘ φ_i − I_1. Affine maps are compared with the middles of all scans' grids in one place and their axes alike:
nothing is left in them of where scanners have put the origins of their worlds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from pyro import poutine
from torch import Tensor

from probmed.field_priors import AutoencodedField, FieldPrior, FlowPrior, PrincipalAffine, PrincipalField, SmoothField
from probmed.fields import along_axes
from probmed.grids import Grid, interpolation_matrices
from probmed.inference.parameters import seeded
from probmed.models.one_shot import TransformedScan
from probmed.priors import AffineVelocity, DeformationPrior
from probmed.transforms import Affine, Transform, Velocity, warp
from probmed.volumes import Volume, scaled
from probmed.workflows.cohorts import own_world

SPATIAL = ("principal", "autoencoder", "smooth", "random", "none")
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
        velocities: of φ_i but for its affine map, mm, ``(N, d, *lattice.shape)``; affines: those maps, from the labelled scan's world to one in which
            the other scan's grid has its middle and its axes where the labelled scan's has them.
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
        affines.append(without_headers(result.affine, scan.grid, other.grid))
        residuals.append((moved - reference).nan_to_num(0.0))
        tell((number + 1) / len(others))
    if lattice is None:
        raise AssertionError
    return Estimates(scan.grid, lattice, reference, torch.stack(velocities), tuple(affines), torch.stack(residuals))


def without_headers(affine: Affine, fixed: Grid, moving: Grid) -> Affine:
    """An affine map between two scans' worlds as one of the fixed scan's world: their grids' middles and axes are made to agree."""
    return Affine(own_world(fixed).matrix @ own_world(moving).inverse().matrix @ affine.matrix.cpu().double())


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
    affine: bool = True,
) -> TransformedScan:
    """A model whose transforms are distributed as those that were estimated.

    Arguments:
        labels: S_1 as probabilities, ``(K, *grid.shape)``.
        spatial: one of ``SPATIAL``: principal components of velocities, an autoencoder of their scores, a smooth field fitted to them,
            a smooth field that was not, or none.
        appearance: one of ``APPEARANCES``, alike.
        components: at most so many principal components of each; all by default.
        affine: whether affine maps are drawn, too, with the mean and covariance of those that were estimated; none are where ``spatial`` is random
            or none.

    Raises:
        ValueError: for other names.
    """
    if spatial not in SPATIAL or appearance not in APPEARANCES:
        raise ValueError(f"expected spatial of {SPATIAL} and appearance of {APPEARANCES}, got {spatial!r} and {appearance!r}")
    transform: DeformationPrior = FlowPrior(estimates.lattice, _velocity(estimates, spatial, components))
    if affine and spatial not in ("random", "none"):
        transform = AffineVelocity(PrincipalAffine.fit(estimates.affines, _middle(estimates.grid)), transform)
    look: FieldPrior | None = None
    if appearance == "principal":
        look = PrincipalField.fit(estimates.residuals, components, "appearance")
    elif appearance == "smooth":
        look = SmoothField.fit(estimates.residuals, estimates.grid.spacing, site="appearance")
    return TransformedScan(estimates.scan, labels, estimates.grid, transform, look, noise)


def _middle(grid: Grid) -> Tensor:
    """Of the grid, mm, ``(d,)``."""
    return own_world(grid).matrix[: grid.ndim, grid.ndim]


def _velocity(estimates: Estimates, spatial: str, components: int | None) -> FieldPrior:
    if spatial == "principal":
        return PrincipalField.fit(estimates.velocities, components, "velocity")
    if spatial == "autoencoder":
        return AutoencodedField.fit(estimates.velocities, components, site="velocity")
    if spatial == "smooth":
        return SmoothField.fit(estimates.velocities, estimates.lattice.spacing, 3.0, "velocity")
    sd = _RANDOM_SD_MM if spatial == "random" else 1e-6
    return SmoothField(torch.zeros_like(estimates.velocities[0]), estimates.lattice.spacing, sd, _RANDOM_LENGTH_MM, 3.0, "velocity")


def coupled(estimates: Estimates, labels: Tensor, number: int, noise: float = 0.02) -> TransformedScan:
    """The transforms of one other scan, both together, as they were estimated."""
    centre = _middle(estimates.grid)
    parameters = estimates.affines[number].log(centre).to(estimates.velocities)
    affine = PrincipalAffine(PrincipalField(parameters, torch.zeros_like(parameters)[None], "affine"), estimates.grid.ndim, centre)
    own = PrincipalField(estimates.velocities[number], torch.zeros_like(estimates.velocities[:1]), "velocity")
    look = PrincipalField(estimates.residuals[number], torch.zeros_like(estimates.residuals[:1]), "appearance")
    transform = AffineVelocity(affine, FlowPrior(estimates.lattice, own))
    return TransformedScan(estimates.scan, labels, estimates.grid, transform, look, noise)


@torch.no_grad()
def draw_one(model: TransformedScan) -> tuple[Tensor, Tensor]:
    """A labelled scan from the model, by PyTorch's global generator.

    Returns:
        The image ``(1, *shape)``, NaN where unknown, and label indices ``(*shape)``, 0 beyond the labelled scan's field of view, as real scans have
        them where a network's grid goes beyond theirs.
    """
    nodes = poutine.trace(model).get_trace().nodes
    shares = nodes["labels"]["value"]
    return nodes["image"]["value"], shares.nan_to_num(0.0).argmax(0).masked_fill(shares.isnan().any(0), 0)


def draw(model: TransformedScan, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labelled scans from the model.

    Returns:
        Images ``(count, 1, *shape)`` and label indices ``(count, *shape)``, as ``draw_one``.
    """
    with seeded(seed):
        found = [draw_one(model) for _ in range(count)]
    return torch.stack([image for image, _ in found]), torch.stack([labels for _, labels in found])
