"""Simulated anatomies: where each tissue is in one body, before anything is imaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probmed.atlases import LabelAtlas
from probmed.fields import GaussianField, dct, idct, laplacian_eigenvalues
from probmed.grids import Grid, average_onto, sample
from probmed.priors import FixedAtlas
from probmed.simulation.contrasts import draw_field, stream
from probmed.transforms import Affine, Displacement, Transform, Velocity


@dataclass(frozen=True, eq=False)
class AtrophyFlow:
    """A family of diffeomorphisms exp(τ w), indexed by the loss of tissue that they cause in the atlas.

    Arguments:
        velocity: w, mm per unit of τ.
        times, losses: ``(m,)`` increasing: τ and minus the log of the share of the atlas's tissue that is
            left.
    """

    velocity: Velocity
    times: Tensor
    losses: Tensor

    def time(self, loss: float) -> float:
        """τ at which exp(-loss) of the tissue is left."""
        k = int(torch.searchsorted(self.losses, loss).clamp(1, len(self.losses) - 1))
        (low, high), (start, stop) = self.losses[k - 1 : k + 1].tolist(), self.times[k - 1 : k + 1].tolist()
        return float(start + (stop - start) * (loss - low) / (high - low))

    def at(self, loss: float) -> Displacement:
        """The map by which to pull an anatomy back that is to lose the share 1 - exp(-loss) of its tissue."""
        return Velocity(self.velocity.grid, self.time(loss) * self.velocity.field).exp()


def atrophy_flow(
    atlas: LabelAtlas,
    tissues: Sequence[str] = ("GM", "WM"),
    fluid: Sequence[str] = ("CSF",),
    spacing_mm: float = 3.0,
) -> AtrophyFlow:
    """The flow that makes each tissue shrink at the same rate while fluid fills what it leaves.

    .. math:: w = \\nabla \\psi, \\quad \\Delta \\psi = \\sum_k a_k p_k^3, \\quad
        \\int \\nabla p_k \\cdot w = -r_k \\int p_k

    The a_k solve the second equation with r = 1 for each tissue and 0 for what is neither tissue nor fluid,
    so that the head keeps its size. Σ_k a_k ∫ p_k³ = 0, and nothing flows through the boundary of the grid.
    The cubes put sources and sinks where a class dominates. The loss is measured in the atlas as it is, and
    follows there to interpolation's accuracy; in a deformed head it is nearly the same, and ``volumes_ml``
    has the truth.

    Arguments:
        tissues: what shrinks.
        fluid: what grows.
        spacing_mm: of the velocity's grid, over the atlas's field of view.

    References:
        B. Karaçali and C. Davatzikos, Simulation of tissue atrophy using a topology preserving transformation
        model, TMI 25, 2006 (Jacobians prescribed by tissue).
    """
    unknown = sorted({*tissues, *fluid} - set(atlas.names))
    if unknown:
        raise ValueError(f"the atlas has no classes {unknown}; it has {atlas.names}")
    rest = [name for name in atlas.names if name not in (*tissues, *fluid)]
    groups = [*([name] for name in tissues), *([rest] if rest else [])]
    coarse = atlas.resampled([max(spacing_mm, h) for h in atlas.grid.spacing])
    fine = atlas.resampled([max(spacing_mm / 1.5, h) for h in atlas.grid.spacing])
    sink = _group(coarse, fluid) ** 3
    maps = torch.stack([_group(fine, group).float() for group in groups])
    slopes = torch.stack([_gradient(probability, fine.grid) for probability in maps])
    flows, changes = [], []
    for group in groups:  # a class each: few
        source = _group(coarse, group) ** 3
        flow = _potential_flow(source / source.sum() - sink / sink.sum(), coarse.grid).float()
        dense = average_onto(flow, coarse.grid, fine.grid)
        flows.append(flow)
        changes.append(torch.stack([(slope * dense).sum(dtype=torch.float64) for slope in slopes]))
    wanted = -maps.flatten(1).sum(-1, dtype=torch.float64)
    wanted[len(tissues) :] = 0
    amounts = torch.linalg.solve(torch.stack(changes, -1), wanted)
    velocity = Velocity(coarse.grid, torch.einsum("k,kb...->b...", amounts.float(), torch.stack(flows)))
    return AtrophyFlow(velocity, *_losses(velocity, maps[: len(tissues)].sum(0), fine.grid))


def _losses(velocity: Velocity, tissue: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """τ and the loss of tissue that exp(τ w) causes, at a few τ."""
    # Points away from the voxels' centres, where linear interpolation has its kinks, see a map as a moved
    # head does.
    jitter = torch.rand(*grid.shape, grid.ndim, generator=stream(0, "jitter")) - 0.5
    points = grid.coordinates() + jitter @ grid.affine[:-1, :-1].T.float()

    def total(transform: Transform | None) -> float:
        where = points if transform is None else transform(points)
        return float(sample(tissue[None], grid, where, fill="edge").sum(dtype=torch.float64))

    whole, pairs = total(None), [(0.0, 0.0)]
    for time in (0.05, 0.1, 0.2, 0.4):
        flow = Velocity(velocity.grid, time * velocity.field).exp()
        pairs += [(time, -math.log(total(flow) / whole)), (-time, -math.log(total(flow.inverse()) / whole))]
    times, losses = zip(*sorted(pairs), strict=True)
    return torch.tensor(times, dtype=torch.float64), torch.tensor(losses, dtype=torch.float64)


def _group(atlas: LabelAtlas, names: Sequence[str]) -> Tensor:
    return atlas.probabilities[[atlas.names.index(name) for name in names]].double().sum(0)


def _gradient(values: Tensor, grid: Grid) -> Tensor:
    """Derivatives along the world's axes, ``(d, *shape)``."""
    slopes = torch.stack(torch.gradient(values))
    return torch.einsum("a...,ab->b...", slopes, grid.inverse_affine[: grid.ndim, : grid.ndim].to(values))


def _potential_flow(source: Tensor, grid: Grid) -> Tensor:
    """∇ψ with Δψ = source and no flow through the boundary, ``(d, *shape)``; the source must sum to 0."""
    d = grid.ndim
    eigenvalues = laplacian_eigenvalues(grid.shape, grid.spacing)
    eigenvalues.view(-1)[0] = math.inf
    return _gradient(idct(-dct(source, d) / eigenvalues, d), grid)


@dataclass(frozen=True, eq=False)
class Lesions:
    """Ellipsoids in the atlas's world: centres ``(n, d)`` mm and matrices ``(n, d, d)`` that take them to the
    unit ball.
    """

    centres: Tensor
    shapes: Tensor

    def contains(self, points: Tensor) -> Tensor:
        """``(*size)`` bool for points ``(*size, d)`` in mm."""
        inside = torch.zeros(points.shape[:-1], dtype=torch.bool)
        for centre, shape in zip(self.centres, self.shapes, strict=True):
            inside |= ((points - centre) @ shape.T).square().sum(-1) < 1
        return inside


def draw_lesions(
    atlas: LabelAtlas,
    count: int,
    radius_mm: tuple[float, float],
    generator: torch.Generator,
    within: str = "WM",
) -> Lesions:
    """``count`` ellipsoids with semi-axes in ``radius_mm``, centred where the class ``within`` is likely."""
    if within not in atlas.names or not 0 < radius_mm[0] <= radius_mm[1]:
        raise ValueError(f"expected a class of {atlas.names} and radii 0 < low <= high, got {within!r} and {radius_mm}")
    d = atlas.grid.ndim
    weights = atlas.probabilities[atlas.names.index(within)].flatten() ** 4
    # torch.multinomial takes at most 2^24 categories; a search in the cumulative sum takes any number.
    cumulative = weights.double().cumsum(0)
    voxels = torch.searchsorted(cumulative, torch.rand(count, generator=generator, dtype=torch.float64) * cumulative[-1])
    index = torch.stack(torch.unravel_index(voxels.clamp_max(len(weights) - 1), atlas.grid.shape), -1)
    centres = atlas.grid.voxel_to_world(index.double()).float()
    axes = radius_mm[0] + (radius_mm[1] - radius_mm[0]) * torch.rand(count, d, generator=generator)
    frames = torch.linalg.qr(torch.randn(count, d, d, generator=generator)).Q
    return Lesions(centres, frames / axes[:, :, None])


class Anatomy:
    """One simulated body: a deformed atlas and the labels drawn from it.

    .. math:: \\pi(x) = T(\\psi \\circ \\exp(v) \\circ A\\, x)

    Arguments:
        atlas: T.
        seed: of everything here.
        deformation_mm, length_mm, alpha: standard deviation, correlation length and smoothness of v
            (``GaussianField``).
        log_scale: standard deviation of the affine map's log scales and shears.
        labels: "independent": S_x ~ Cat(π(x)) at each voxel, the assumption of a model without coupling;
            "smooth": S = argmax_k (log π_k + g_k) with g_k a smooth field with standard Gumbel marginals, so
            that S_x ~ Cat(π(x)) still holds at each voxel (up to interpolation) but neighbours agree.
        label_length_mm: correlation length of g.
        sharpness: of smooth labels: log π is multiplied by it. Above 1 the anatomies look more like real ones
            and
            less like draws from the atlas: S_x ~ Cat(π^sharpness / Σ).
        lesions, lesion_radius_mm: number of ellipsoids in the white matter and the range of their semi-axes.
        velocity_spacing_mm: spacing of the grid of v.
    """

    def __init__(
        self,
        atlas: LabelAtlas,
        seed: int = 0,
        *,
        deformation_mm: float = 3.0,
        length_mm: float = 30.0,
        alpha: float = 3.0,
        log_scale: float = 0.05,
        labels: str = "smooth",
        label_length_mm: float = 3.0,
        sharpness: float = 1.0,
        lesions: int = 0,
        lesion_radius_mm: tuple[float, float] = (2.0, 6.0),
        velocity_spacing_mm: float = 6.0,
    ) -> None:
        if labels not in ("independent", "smooth"):
            raise ValueError(f'labels must be "independent" or "smooth", got {labels!r}')
        self.atlas, self.seed, self.labels, self.sharpness = atlas, seed, labels, sharpness
        self.prior = FixedAtlas(atlas)
        d = atlas.grid.ndim
        middle = (torch.tensor(atlas.grid.shape, dtype=torch.float64) - 1) / 2
        self.centre = atlas.grid.voxel_to_world(middle)
        rigid = d + (3 if d == 3 else 1)
        sizes = log_scale * torch.randn(2 * rigid, generator=stream(seed, "size"), dtype=torch.float64)
        sizes[:rigid] = 0
        self.size = Affine.exp(sizes, d, self.centre)
        self.deformation: Displacement | None = None
        if deformation_mm > 0:
            grid = atlas.grid.at_spacing([max(velocity_spacing_mm, h) for h in atlas.grid.spacing])
            field = GaussianField.from_sd(grid.shape, grid.spacing, deformation_mm, length_mm, alpha, d)
            self.deformation = Velocity(grid, draw_field(field, stream(seed, "velocity"))).exp()
        self.lesions = draw_lesions(atlas, lesions, lesion_radius_mm, stream(seed, "lesions")) if lesions else None
        self._gumbel: tuple[Grid, Tensor] | None = None
        if labels == "smooth":
            grid = atlas.grid.at_spacing([max(label_length_mm / 2, h) for h in atlas.grid.spacing])
            normal = unit_field(grid, label_length_mm, len(atlas.names), stream(seed, "labels"))
            self._gumbel = grid, -torch.log(-torch.special.log_ndtr(normal))
            self._texture = unit_field(grid, label_length_mm, 1, stream(seed, "texture"))

    def transform(self, position: Affine, shrinking: Transform | None = None) -> Transform:
        """World of the scan to world of the atlas: ``shrinking`` after exp(v) after the affine map after
        ``position``.
        """
        out: Transform = self.size @ position
        for later in (self.deformation, shrinking):
            out = out if later is None else later @ out
        return out

    def log_probabilities(self, points: Tensor) -> Tensor:
        """log π at points of the atlas's world, ``(K, *size)``."""
        return self.prior.at(points)

    def draw_labels(self, log_probabilities: Tensor, points: Tensor, generator: torch.Generator) -> Tensor:
        """S, class numbers ``(*size)``, at points of the atlas's world; ``generator`` is used for independent
        labels only.
        """
        if self._gumbel is not None:
            grid, field = self._gumbel
            scores = sample(field, grid, points, fill="edge").add_(log_probabilities, alpha=self.sharpness)
            return scores.max(0).indices
        below = log_probabilities.exp().cumsum(0)[:-1]
        return (torch.rand(points.shape[:-1], generator=generator) > below).sum(0)

    def texture(self, points: Tensor) -> Tensor:
        """A smooth field with uniform marginals (up to interpolation) at points of the atlas's world,
        ``(*size)``.
        """
        if self._gumbel is None:
            raise ValueError('a smooth texture belongs to labels="smooth"')
        uniform: Tensor = torch.special.ndtr(sample(self._texture, self._gumbel[0], points, fill="edge")[0])
        return uniform


def unit_field(grid: Grid, length_mm: float, channels: int, generator: torch.Generator) -> Tensor:
    """A smooth field of independent channels with variance 1 at every voxel, ``(channels, *shape)``."""
    # In units of the smallest spacing, for numbers near one; alpha 3 gives surfaces without fringes.
    unit = min(grid.spacing)
    field = GaussianField(grid.shape, [h / unit for h in grid.spacing], 1.0, unit / length_mm, 3.0, channels)
    return draw_field(field, generator) / field.variance.sqrt()


def position_of(seed: int, session: int, anatomy: Anatomy, translation_mm: float, rotation: float) -> Affine:
    """Where a head lies in the scanner: a random rigid map about the atlas's centre (standard deviations in
    mm and radians).
    """
    d = anatomy.atlas.grid.ndim
    sd = torch.tensor([translation_mm] * d + [rotation] * (3 if d == 3 else 1), dtype=torch.float64)
    draw = sd * torch.randn(len(sd), generator=stream(seed, "position", session), dtype=torch.float64)
    return Affine.exp(draw, d, anatomy.centre)
