"""From two images to a warp and its uncertainty: what `probmed register` does, as one function.

Scale both → align by an affine map → the velocity's mode from coarse to fine (``registration_fit``) → draws from its Laplace posterior →
everything on the fixed image's own grid. A trained network (``amortisation.answer``) may stand for affine map, mode and posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from probmed.fields import along_axes
from probmed.grids import Grid, averaged, interpolation_matrices, sample
from probmed.inference.affine import align_images, mutual_information
from probmed.inference.amortised import Refinement
from probmed.inference.evidence import Estimate
from probmed.inference.gauss_newton import Iteration
from probmed.transforms import Affine, Composition, Displacement, Transform, Velocity, determinant, physical_gradient, warp
from probmed.volumes import UnusableInput, Volume, read_scan, scaled
from probmed.workflows.registration_fit import MANY_ITERATIONS, LabelPair, Level, Pair, PointPairs, RegistrationSettings, climb
from probmed.workflows.stages import Clock, pick_device

__all__ = ["Amortised", "Answer", "PointPairs", "RegistrationResult", "RegistrationSettings", "register"]

EQUATION = "p(f, v, θ) = p(v) p(θ) p(f | m ∘ A ∘ exp(v), θ)"
_SMALL = 300_000  # voxels of the fixed image

Tell = Callable[[str, float], None]


@dataclass
class RegistrationResult:
    """Everything that is known of a registered pair; tensors on the fixed image's grid.

    Arguments:
        transform, inverse: fixed world to moving world and back, mm. affine: its affine part. velocity: in the fixed world.
        moved: m∘φ, ``(*shape)``, in the moving image's unit, NaN outside its field of view.
        determinant: det Dφ, ``(*shape)``. folding: share of voxels where it is not positive.
        sd: posterior standard deviation of the displacement, ``(d, *shape)`` mm; None without draws.
        draws: transforms from the posterior.
        correlation: of the two images where they overlap: by their headers, after the affine map, after all.
        information: their mutual information there, nats, which also means something between contrasts.
        landmark_error: mean distance of landmarks at the same stages, mm, where there are some.
        log_joint: of the finest level's data and velocity, tempered, nats; None where no velocity was fitted.
        log_evidence: of the finest level's data, the velocity integrated out (``Level.log_evidence``); None without draws of it.
        prior_scales: standard deviation and length of the velocity's prior, mm; None where no velocity was fitted.
        tempering: of the finest level's image; None where no velocity was fitted.
        levels: spacing and iterations of each; converged: of the finest.
        elbo_network: of a network's answer under its model, nats, where it has a posterior.
        refinement: ELBOs of that answer before and after it was refined.
    """

    fixed: Volume
    moving: Volume
    transform: Transform
    inverse: Transform
    affine: Affine
    velocity: Velocity | None
    moved: Tensor
    determinant: Tensor
    folding: float
    sd: Tensor | None
    draws: list[Transform]
    correlation: tuple[float, float, float]
    information: tuple[float, float, float]
    landmark_error: tuple[float, float, float] | None
    log_joint: float | None
    tempering: float | None
    levels: list[tuple[float, list[Iteration]]]
    converged: bool
    settings: RegistrationSettings
    seconds: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    equation: str = EQUATION
    elbo_network: float | None = None
    refinement: Refinement | None = None
    log_evidence: Estimate | None = None
    prior_scales: tuple[float, float] | None = None


@dataclass(frozen=True)
class Answer:
    """A posterior of one pair that comes from a network.

    Arguments:
        affine: rigid, the fixed image's world to the moving one's, middle onto middle.
        velocity: the posterior mean, in the fixed world, on axes parallel to the fixed image's. draws: of it.
        similarity: of the network's model, one of ``registration_fit.SIMILARITIES``.
        elbo: of the network's posterior, nats, where it was asked for and there is one. refinement: ELBOs before and after, where it was refined.
    """

    affine: Affine
    velocity: Velocity
    draws: list[Velocity]
    similarity: str
    elbo: float | None
    refinement: Refinement | None


class Amortised(Protocol):
    """What answers in place of a fit: ``amortisation.answer`` of a trained network."""

    def __call__(self, moving: Volume, fixed: Volume, *, draws: int, mask: Tensor | None, moving_mask: Tensor | None) -> Answer: ...


def register(
    moving: Path | str | Volume,
    fixed: Path | str | Volume,
    *,
    draws: int = 0,
    seed: int = 0,
    device: str = "auto",
    settings: RegistrationSettings | None = None,
    mask: Tensor | None = None,
    moving_mask: Tensor | None = None,
    landmarks: PointPairs | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
    amortised: Amortised | None = None,
    progress: Tell | None = None,
) -> RegistrationResult:
    """Bring a moving image onto a fixed one.

    Arguments:
        moving, fixed: paths or volumes, both 2D or both 3D.
        draws: from the posterior of the velocity.
        seed: same seed, same result on the same machine.
        device: "auto", "cpu" or "cuda".
        mask: ``(*fixed.shape)`` bool, the part of the fixed image that is to be matched; all of it by default.
        moving_mask: ``(*moving.shape)`` bool, the part of the moving image that may explain it; likewise.
        landmarks: points that correspond.
        labels: segmentations of the moving and the fixed image that are to agree, ``(*shape)`` int64 each, of one scheme.
        amortised: a network's answer, in place of affine map and mode; of the settings nothing counts then.
        progress: called with a stage's name and the share of the work done, in [0, 1].

    Raises:
        UnusableInput: for images that cannot be read, of different dimensions, or that do not overlap, and for an affine map of another dimension.
    """
    settings = settings or RegistrationSettings()
    tell = progress or (lambda stage, share: None)
    clock = Clock()
    torch.manual_seed(seed)
    where = pick_device(device)
    m, f = (image if isinstance(image, Volume) else read_scan(image) for image in (moving, fixed))
    check_pair(m, f, settings, placed=amortised is None)
    a, b = (known(volume, inside, where) for volume, inside in ((m, moving_mask), (f, mask)))
    clock.lap("read")

    tell("affine", 0.02)
    found = _Found(Affine.identity(f.grid.ndim))
    if amortised is not None:
        answer = amortised(m, f, draws=draws, mask=mask, moving_mask=moving_mask)
        found = _Found.of(answer, where)
        settings = replace(settings, similarity=answer.similarity)
    elif settings.affine != 0:
        found.affine = Affine(align_images(b.cpu(), f.grid, a.cpu(), m.grid, settings.affine, seed=seed).matrix)
    clock.lap("affine" if amortised is None else "network")

    if settings.deformable and amortised is None:
        matched = None if labels is None else LabelPair.of(labels[0].to(where), labels[1].to(where), mask, moving_mask)
        pair = Pair(b, f.grid, a, m.grid, found.affine, landmarks, matched)
        found.fit(pair, settings if settings.iterations or not draws else replace(settings, iterations=MANY_ITERATIONS), tell)
    clock.lap("velocity")

    tell("posterior", 0.4)
    if found.mode is not None and draws:
        found.samples = found.mode.draws(draws, seed, lambda share: tell("posterior", 0.4 + 0.4 * share))
        found.evidence = found.mode.log_evidence(seed)
    clock.lap("posterior")

    tell("results", 0.9)
    result = _result(found, m, f, (a, b), settings, seed, landmarks)
    clock.lap("results")
    result.seconds = clock.seconds
    tell("done", 1.0)
    return result


def known(volume: Volume, mask: Tensor | None, device: torch.device | None = None) -> Tensor:
    """A scan in units of its foreground's mean, ``(*shape)``, NaN where it is masked; the unit is that of the whole scan."""
    data = scaled(volume.data.to(device))
    return data if mask is None else data.masked_fill(~mask.to(data.device), math.nan)


@dataclass
class _Found:
    """What is known of a pair's deformation so far, on the device that computes.

    Arguments:
        samples: exp(v) of draws of the velocity.
        mode: of the finest level that was fitted, with ``levels`` and ``evidence`` as ``RegistrationResult`` has them.
        answer: where a network gave all this.
    """

    affine: Affine
    velocity: Velocity | None = None
    samples: list[Displacement] = field(default_factory=list)
    mode: Level | None = None
    levels: list[tuple[float, list[Iteration]]] = field(default_factory=list)
    evidence: Estimate | None = None
    answer: Answer | None = None

    @classmethod
    def of(cls, answer: Answer, device: torch.device) -> _Found:
        velocity = Velocity(answer.velocity.grid, answer.velocity.field.to(device))
        return cls(answer.affine, velocity, [v.exp() for v in answer.draws], answer=answer)

    def fit(self, pair: Pair, settings: RegistrationSettings, tell: Tell) -> None:
        """The velocity's mode, from coarse to fine."""
        for level in climb(pair, settings, lambda share: tell("velocity", 0.1 + 0.3 * share)):
            self.levels.append((level.spacing_mm, level.mode.iterations))
            self.velocity, self.mode = Velocity(level.lattice, level.mode.field), level
        if self.velocity is not None and pair.grid.numel <= _SMALL:
            # Where it costs little, the flow and its inverse are those of a lattice without gaps between voxels.
            finer = along_axes(self.velocity.field, interpolation_matrices(self.velocity.grid, pair.grid, self.velocity.field))
            self.velocity = Velocity(pair.grid, finer)


def _result(
    found: _Found,
    m: Volume,
    f: Volume,
    images: tuple[Tensor, Tensor],
    settings: RegistrationSettings,
    seed: int,
    landmarks: PointPairs | None,
) -> RegistrationResult:
    """Everything on the fixed image's grid, and how well the images match at each stage.

    Arguments:
        images: the moving and the fixed one, scaled, NaN where they are masked.
    """
    affine, velocity, mode = found.affine, found.velocity, found.mode
    flow = None if velocity is None else velocity.exp().with_exact_inverse()
    spread = displacement_sd(found.samples, affine, f.grid) if len(found.samples) > 1 else None
    moved, jacobian = carry(m.data.to(images[0].device), m.grid, f.grid, affine, velocity)
    coarse, coarse_grid = averaged(images[1], f.grid, max(f.grid.spacing) if mode is None else mode.spacing_mm)
    stages = (Affine.identity(f.grid.ndim), affine, affine if flow is None else affine @ flow)
    there = [warp(images[0][None], m.grid, t, coarse_grid, fill=math.nan)[0] for t in stages]
    here = affine if flow is None else affine @ _on_cpu(flow)
    return RegistrationResult(
        fixed=f,
        moving=m,
        transform=here,
        inverse=here.inverse(),
        affine=affine,
        velocity=None if velocity is None else Velocity(velocity.grid, velocity.field.cpu()),
        moved=moved.cpu(),
        determinant=jacobian.cpu(),
        folding=float((jacobian <= 0).float().mean()),
        sd=None if spread is None else spread.cpu(),
        draws=[affine @ _on_cpu(sample) for sample in found.samples],
        correlation=tuple(correlation(image, coarse) for image in there),  # type: ignore[arg-type]
        information=tuple(information(image, coarse) for image in there),  # type: ignore[arg-type]
        landmark_error=None if landmarks is None else tuple(landmarks.error(t) for t in (*stages[:2], here)),  # type: ignore[arg-type]
        log_joint=None if mode is None else mode.log_joint,
        log_evidence=found.evidence,
        prior_scales=None if mode is None else (mode.prior.sd_mm, mode.prior.length_mm),
        tempering=None if mode is None else mode.tempering,
        levels=found.levels,
        converged=mode is None or mode.mode.converged,
        settings=settings,
        seed=seed,
        elbo_network=None if found.answer is None else found.answer.elbo,
        refinement=None if found.answer is None else found.answer.refinement,
    )


def carry(image: Tensor, source: Grid, grid: Grid, affine: Affine, velocity: Velocity | None) -> tuple[Tensor, Tensor]:
    """An image ``(*shape)`` carried to a grid by A ∘ exp(v), NaN outside its field of view, and det Dφ, both ``(*grid.shape)``.

    The displacement is interpolated axis by axis, which is several times faster than at points.
    """
    points = grid.coordinates(image.dtype, image.device)
    if velocity is not None:
        field = velocity.exp(both=False).field
        points = points + along_axes(field, interpolation_matrices(velocity.grid, grid, field)).movedim(0, -1)
    stretch = float(torch.linalg.det(affine.matrix[: grid.ndim, : grid.ndim]))
    moved = sample(image[None], source, affine(points), fill=math.nan)[0]
    if velocity is None:
        return moved, torch.full_like(moved, stretch)
    return moved, stretch * determinant(physical_gradient(points, grid))


def correlation(a: Tensor, b: Tensor) -> float:
    """Of the values where both are known; NaN where there are none."""
    both = ~(a.isnan() | b.isnan())
    if int(both.sum()) < 2:
        return math.nan
    return float(torch.corrcoef(torch.stack([a[both], b[both]]))[0, 1])


def information(a: Tensor, b: Tensor, bins: int = 32) -> float:
    """Mutual information of the values where both are known, in bins of equal counts, nats; NaN where there are none."""
    both = ~(a.isnan() | b.isnan())
    if int(both.sum()) < 2:
        return math.nan
    ranks = []
    for values in (a[both], b[both]):
        edges = torch.quantile(values[:: max(1, len(values) // 100_000)], torch.linspace(0, 1, bins + 1).to(values)[1:-1])
        ranks.append(torch.bucketize(values, edges.unique()))
    joint = torch.bincount(ranks[0] * bins + ranks[1], minlength=bins * bins).reshape(bins, bins)
    return float(mutual_information(joint.double()))


def displacement_sd(draws: Sequence[Displacement], affine: Affine, grid: Grid) -> Tensor:
    """Standard deviation over draws of each component of the displacement, ``(d, *grid.shape)`` mm.

    Arguments:
        draws: on one grid, with the axes of ``grid``, before the affine map.
    """
    d = grid.ndim
    turn = affine.matrix[:d, :d].to(draws[0].field)
    mean, squares = torch.zeros_like(draws[0].field), torch.zeros_like(draws[0].field)
    for number, draw in enumerate(draws, 1):
        there = torch.einsum("ab,b...->a...", turn, draw.field)
        change = there - mean
        mean = mean + change / number
        squares = squares + change * (there - mean)
    spread = (squares / (len(draws) - 1)).sqrt()
    return along_axes(spread, interpolation_matrices(draws[0].grid, grid, spread))


def places(transform: Transform, grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """Where a transform takes the voxels of a grid, ``(*grid.shape, d)`` mm, as calling it on their coordinates does. A displacement that comes
    first, on axes parallel to the grid's, is interpolated axis by axis, which is several times faster."""
    first, *others = reversed(transform.transforms) if isinstance(transform, Composition) else [transform]
    points = grid.coordinates(dtype)
    if isinstance(first, Displacement):
        field = along_axes(first.field, interpolation_matrices(first.grid, grid, first.field))
        points = points + field.movedim(0, -1).to(points)
    else:
        points = first(points)
    for part in others:
        points = part(points)
    return points


def _on_cpu(flow: Displacement) -> Displacement:
    return Displacement(flow.grid, flow.field.cpu(), None if flow.opposite is None else flow.opposite.cpu())


def check_pair(moving: Volume, fixed: Volume, settings: RegistrationSettings, placed: bool = True) -> None:
    """Refuse a pair that cannot be registered.

    Arguments:
        placed: whether it matters where the headers place the images.

    Raises:
        UnusableInput: for different dimensions, an affine map of another dimension, and images that do not overlap.
    """
    d = fixed.grid.ndim
    if moving.grid.ndim != d:
        raise UnusableInput(moving.name, f"has {moving.grid.ndim} axes and {fixed.name} {d}", "register images of one dimension")
    counts = (d * (d + 1) // 2, d * (d + 1) // 2 + 1, d * (d + 1))
    if settings.affine not in (None, 0, *counts):
        remedy = f"choose {counts[0]} (rigid), {counts[1]} (similarity) or {counts[2]} (affine)"
        raise UnusableInput(fixed.name, f"has {d} axes, for which there is no affine map of {settings.affine} parameters", remedy)
    if placed and overlap(moving.grid, fixed.grid) == 0 and not (settings.apart and settings.affine != 0):
        gap = _middle(moving.grid) - _middle(fixed.grid)
        remedy = "correct the header, or start from the centres of mass with --apart, which needs an affine map"
        fault = f"does not overlap {fixed.name}: 0 % of the latter lies inside it, and their middles are {float(gap.norm()):.0f} mm apart"
        raise UnusableInput(moving.name, fault, remedy)


def overlap(a: Grid, b: Grid) -> float:
    """Share of b's field of view that lies inside a's, by at most 32 points an axis."""
    coarse = b.subsampled([-(-n // 32) for n in b.shape])
    return float(a.holds(coarse.coordinates(torch.float64)).double().mean())


def _middle(grid: Grid) -> Tensor:
    return grid.voxel_to_world((torch.tensor(grid.shape, dtype=torch.float64) - 1) / 2)
