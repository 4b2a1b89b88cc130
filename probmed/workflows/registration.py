"""From two images to a warp and its uncertainty: what `probmed register` does, as one function.

Scale both → align by an affine map → the velocity's mode from coarse to fine → draws from its Laplace posterior → everything on the fixed image's
own grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from probmed.fields import along_axes
from probmed.grids import Grid, averaged, interpolation_matrices, sample
from probmed.inference.affine import align_images, mutual_information
from probmed.inference.amortised import Refinement
from probmed.inference.evidence import Estimate, log_evidence
from probmed.inference.gauss_newton import FieldMode, Iteration, ascend_field, field_draws
from probmed.models.registration import HalfFlow, ImageTerm, LandmarkTerm, Linearised, Term, linearise_both_ways, linearise_terms
from probmed.priors import SmoothVelocity
from probmed.similarities import ConditionalMixture, GaussianNoise, LabelAgreement, Landmarks, LocalCorrelation, Similarity, StudentNoise
from probmed.transforms import Affine, Composition, Displacement, Transform, Velocity, determinant, physical_gradient, warp
from probmed.volumes import UnusableInput, Volume, read_scan, scaled
from probmed.workflows.segmentation import tempering_of
from probmed.workflows.stages import Clock, pick_device

EQUATION = "p(f, v, θ) = p(v) p(θ) p(f | m ∘ A ∘ exp(v), θ)"
SIMILARITIES = ("correlation", "gaussian", "student", "mixture")


@dataclass(frozen=True)
class RegistrationSettings:
    """How a pair is registered.

    Arguments:
        similarity: "correlation" (local, for one contrast), "gaussian", "student", or "mixture" (for different contrasts).
        affine: parameters of the affine map, 12, 7 or 6 in 3D, 6, 4 or 3 in 2D; None for all; 0 for none, headers are trusted.
        deformable: whether there is a velocity.
        levels: spacings of the pyramid, in voxels of the finest.
        finest_mm: spacing of the finest level; None for the fixed image's smallest, or what leaves at most ``_LARGEST`` voxels.
        sd_mm, length_mm, alpha: of the velocity's prior; None: ``prior_scales``.
        radius: of the correlation's windows, voxels of each level. noise: τ of the correlation's windows.
        tempering: factor on the likelihood; None is the correlation's own, and of the others the share of independent voxels (``independent_share``).
        landmark_sd_mm: the accuracy of landmarks, where there are some.
        iterations: at most, on each level; None for few, or for many where draws are asked for, which are no better than the mode they surround.
        tolerance: nats per voxel.
        symmetric: whether both images explain each other, at twice the cost, so that neither is the reference.
        apart: whether headers may place the images apart; they are then brought together from their centres of mass.
    """

    similarity: str = "correlation"
    affine: int | None = None
    deformable: bool = True
    levels: tuple[int, ...] = (8, 4, 2, 1)
    finest_mm: float | None = None
    sd_mm: float | None = None
    length_mm: float | None = None
    alpha: float = 3.0
    radius: int = 2
    noise: float = 0.06
    tempering: float | None = None
    landmark_sd_mm: float = 1.0
    iterations: tuple[int, ...] | None = None
    tolerance: float = 1e-5
    symmetric: bool = False
    apart: bool = False


_FEW_ITERATIONS, MANY_ITERATIONS = (30, 20, 10, 6), (100, 60, 40, 40)
_LARGEST = 2_000_000  # voxels of the finest level
_ROUNDS, _STEADY = 4, 0.2  # of tempering and mode, at most; where its logarithm changes less, it holds
_TOLERANCE = 0.05  # of a draw: standard deviations come out one to three per cent too small, in half the time
_SMALL = 300_000  # voxels of the fixed image
_SMALLEST_SIDE = 8  # voxels of the coarsest


@dataclass(frozen=True)
class PointPairs:
    """Landmarks in the fixed image's world and in the moving one's, mm, ``(N, d)`` float64 each; NaN where one was not found in the moving image."""

    fixed: Tensor
    moving: Tensor

    def error(self, transform: Transform) -> float:
        """Mean distance of φ(x) to y, mm."""
        return float((transform(self.fixed) - self.moving).norm(dim=-1).nanmean())


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
        tempering: of the finest level's image; None where no velocity was fitted.
        levels: spacing and iterations of each; converged: of the finest.
        refinement: ELBOs of a network's answer before and after it was refined.
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
    refinement: Refinement | None = None
    log_evidence: Estimate | None = None


@dataclass(frozen=True)
class Answer:
    """A posterior of one pair that comes from a network.

    Arguments:
        affine: rigid, the fixed image's world to the moving one's, middle onto middle.
        velocity: the posterior mean, in the fixed world, on axes parallel to the fixed image's. draws: of it.
        refinement: ELBOs before and after, where it was refined.
    """

    affine: Affine
    velocity: Velocity
    draws: list[Velocity]
    refinement: Refinement | None


def register(
    moving: Path | str | Volume,
    fixed: Path | str | Volume,
    *,
    draws: int = 0,
    seed: int = 0,
    device: str = "auto",
    settings: RegistrationSettings | None = None,
    mask: Tensor | None = None,
    landmarks: PointPairs | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
    amortised: Callable[[Volume, Volume, int], Answer] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> RegistrationResult:
    """Bring a moving image onto a fixed one.

    Arguments:
        moving, fixed: paths or volumes, both 2D or both 3D.
        draws: from the posterior of the velocity.
        seed: same seed, same result on the same machine.
        device: "auto", "cpu" or "cuda".
        mask: ``(*fixed.shape)`` bool, the part of the fixed image that is to be matched; all of it by default.
        landmarks: points that correspond.
        labels: segmentations of the moving and the fixed image that are to agree, ``(*shape)`` int64 each, of one scheme.
        amortised: a network's answer for moving and fixed volumes and a number of draws (``amortisation.answer``), in place of affine map and mode.
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
    clock.lap("read")

    tell("affine", 0.02)
    a, b = (scaled(volume.data.to(where)) for volume in (m, f))
    inside = None if mask is None else mask.to(where)
    if inside is not None:
        b = b.masked_fill(~inside, math.nan)
    answer = None if amortised is None else amortised(m, f, draws)
    if answer is not None:
        affine = answer.affine
    elif settings.affine == 0:
        affine = Affine.identity(f.grid.ndim)
    else:
        affine = Affine(align_images(b.cpu(), f.grid, a.cpu(), m.grid, settings.affine, seed=seed).matrix)
    clock.lap("affine" if answer is None else "network")

    matched = None if labels is None else LabelPair.of(labels[0].to(where), labels[1].to(where), inside)
    pair = Pair(b, f.grid, a, m.grid, affine, landmarks, matched)
    velocity, mode = None if answer is None else Velocity(answer.velocity.grid, answer.velocity.field.to(where)), None
    levels: list[tuple[float, list[Iteration]]] = []
    if settings.deformable and answer is None:
        chosen = settings if settings.iterations or not draws else replace(settings, iterations=MANY_ITERATIONS)
        for level in climb(pair, chosen, lambda share: tell("velocity", 0.1 + 0.3 * share)):
            levels.append((level.spacing_mm, level.mode.iterations))
            velocity, mode = Velocity(level.lattice, level.mode.field), level
        if velocity is not None and f.grid.numel <= _SMALL:
            # Where it costs little, the flow and its inverse are those of a lattice without gaps between voxels.
            velocity = Velocity(f.grid, along_axes(velocity.field, interpolation_matrices(velocity.grid, f.grid, velocity.field)))
    clock.lap("velocity")

    tell("posterior", 0.4)
    flow = None if velocity is None else velocity.exp().with_exact_inverse()
    transform: Transform = affine if flow is None else affine @ flow
    samples = [] if answer is None else [v.exp() for v in answer.draws]
    if mode is not None and draws:
        samples = mode.draws(draws, seed, lambda share: tell("posterior", 0.4 + 0.4 * share))
    evidence = mode.log_evidence(seed) if mode is not None and draws else None
    spread = displacement_sd(samples, affine, f.grid) if len(samples) > 1 else None
    clock.lap("posterior")

    tell("results", 0.9)
    moved, jacobian = carry(m.data.to(where), m.grid, f.grid, affine, velocity)
    coarse, coarse_grid = averaged(b, f.grid, max(f.grid.spacing) if mode is None else mode.spacing_mm)
    stages = (Affine.identity(f.grid.ndim), affine, transform)
    there = [warp(a[None], m.grid, t, coarse_grid, fill=math.nan)[0] for t in stages]
    here = affine if flow is None else affine @ _on_cpu(flow)
    result = RegistrationResult(
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
        draws=[affine @ _on_cpu(sample) for sample in samples],
        correlation=tuple(correlation(image, coarse) for image in there),  # type: ignore[arg-type]
        information=tuple(information(image, coarse) for image in there),  # type: ignore[arg-type]
        landmark_error=None if landmarks is None else tuple(landmarks.error(t) for t in (*stages[:2], here)),  # type: ignore[arg-type]
        log_joint=None if mode is None else mode.log_joint,
        tempering=None if mode is None else mode.tempering,
        levels=levels,
        converged=mode is None or mode.mode.converged,
        settings=settings,
        seed=seed,
        refinement=None if answer is None else answer.refinement,
        log_evidence=evidence,
    )
    clock.lap("results")
    result.seconds = clock.seconds
    tell("done", 1.0)
    return result


@dataclass(frozen=True)
class LabelPair:
    """Segmentations of both images, as zeros and ones ``(K, *shape)``, background first; NaN where nothing is known."""

    moving: Tensor
    fixed: Tensor

    @classmethod
    def of(cls, moving: Tensor, fixed: Tensor, mask: Tensor | None = None) -> LabelPair:
        """Of label maps ``(*shape)``: a channel for 0, and one for each other label of either.

        Arguments:
            mask: where the fixed one counts, bool.
        """
        codes = torch.cat([moving.new_zeros(1), moving.unique(), fixed.unique()]).unique()
        m, f = (torch.stack([(each == code).float() for code in codes]) for each in (moving, fixed))
        return cls(m, f if mask is None else f.masked_fill(~mask, math.nan))


@dataclass(frozen=True)
class Pair:
    """Two scaled images, ``(*shape)`` each, with their grids, the affine map from the fixed world to the moving one, and what else is known."""

    fixed: Tensor
    grid: Grid
    moving: Tensor
    moving_grid: Grid
    affine: Affine
    landmarks: PointPairs | None = None
    labels: LabelPair | None = None

    def at(self, spacing_mm: float) -> tuple[Tensor, Tensor, Grid]:
        """Both ``(1, *shape)`` on the fixed image's grid at a spacing, averaged to it before; NaN where nothing is known."""
        fixed, grid = averaged(self.fixed, self.grid, spacing_mm)
        return fixed[None], self._brought(self.moving[None], spacing_mm, grid), grid

    def labels_at(self, spacing_mm: float) -> LabelPair | None:
        """Each label's share of a voxel, likewise."""
        if self.labels is None:
            return None
        fixed, grids = zip(*(averaged(channel, self.grid, spacing_mm) for channel in self.labels.fixed), strict=True)
        return LabelPair(self._brought(self.labels.moving, spacing_mm, grids[0]), torch.stack(fixed))

    def _brought(self, channels: Tensor, spacing_mm: float, grid: Grid) -> Tensor:
        """Of the moving image, ``(C, *moving_grid.shape)``."""
        coarse, grids = zip(*(averaged(channel, self.moving_grid, spacing_mm) for channel in channels), strict=True)
        return warp(torch.stack(coarse), grids[0], self.affine, grid, fill=math.nan)


@dataclass(frozen=True)
class Observations:
    """What the velocity is fitted to on one level.

    Arguments:
        image, others: the terms of the fixed image given the moving one.
        back: all of them the other way round, where neither image is the reference; else none.
    """

    image: ImageTerm
    others: list[Term]
    back: list[Term]

    @classmethod
    def of(cls, pair: Pair, settings: RegistrationSettings, spacing_mm: float, coarser: Observations | None = None) -> Observations:
        """At a spacing, tempered as at the one before where the data say by how much."""
        fixed, moving, grid = pair.at(spacing_mm)
        similarity = build_similarity(settings, fixed, moving, grid.ndim)
        others: list[Term] = []
        back: list[Term] = [ImageTerm(similarity, fixed, moving, grid)]
        labels = pair.labels_at(spacing_mm)
        if labels is not None:
            agreement = LabelAgreement(len(labels.fixed))
            others.append(ImageTerm(agreement, labels.moving, decided(labels.fixed), grid))
            back.append(ImageTerm(agreement, labels.fixed, decided(labels.moving), grid))
        if pair.landmarks is not None:
            accuracy = Landmarks(settings.landmark_sd_mm)
            x, y = (points.to(fixed) for points in (pair.landmarks.fixed, pair.landmarks.moving))
            others.append(LandmarkTerm(accuracy, x, y, pair.affine))
            back.append(LandmarkTerm(accuracy, pair.affine.inverse()(y), x, Affine.identity(grid.ndim)))
        made = cls(ImageTerm(similarity, moving, fixed, grid), others, back if settings.symmetric else [])
        if coarser is not None:
            for term, before in zip(made.untempered(settings), coarser.untempered(settings), strict=True):
                term.similarity.tempering = before.similarity.tempering
        return made

    def near(self, latents: dict[str, Tensor], lattice: Grid, velocity: Tensor) -> Linearised:
        """The log likelihood near a velocity, from the latents that the last call found."""
        there = [self.image, *self.others]
        found = linearise_both_ways(there, self.back, lattice, velocity, latents) if self.back else linearise_terms(there, lattice, velocity, latents)
        latents.update(found.latents)
        return found

    def untempered(self, settings: RegistrationSettings) -> list[ImageTerm]:
        """Those whose tempering neither the settings nor the likelihood itself gives."""
        labels = [term for term in self.others if isinstance(term, ImageTerm)]
        given = settings.tempering is not None or settings.similarity == "correlation"
        return labels if given else [self.image, *labels]


def decided(shares: Tensor) -> Tensor:
    """Zeros and a one where the share is largest, ``(K, *shape)``, NaN where unknown."""
    unknown = shares.isnan().any(0)
    chosen = functional.one_hot(shares.nan_to_num(0.0).argmax(0), len(shares)).movedim(-1, 0)
    return chosen.to(shares).masked_fill(unknown, math.nan)


def independent_share(term: ImageTerm, flow: HalfFlow) -> float:
    """How many independent voxels one is worth: ``tempering_of`` the likelihood's derivative in m∘φ, whose correlation between neighbours is what
    counts them several times. Of Gaussian noise that is the residual's; a mean over channels.

    References: Simpson et al., NeuroImage 2012 (virtual decimation in registration).
    """
    moved = term.carried(term.moving, flow.whole)
    near = term.similarity.start(moved, term.fixed)
    score, _ = term.similarity.newton(moved, term.fixed, near)
    missing = moved.isnan() | term.fixed.isnan()
    return sum(tempering_of(channel) for channel in score.masked_fill(missing, math.nan)) / len(score)


@dataclass(frozen=True)
class Level:
    """The mode on one level of the pyramid; lattice: of the velocity; tempering: of the image."""

    spacing_mm: float
    grid: Grid
    lattice: Grid
    prior: SmoothVelocity
    mode: FieldMode
    tempering: float

    @property
    def log_joint(self) -> float:
        """log p(f, v, θ) at the mode, nats, the likelihood tempered."""
        return self.mode.near.log_joint + float(self.prior.prior().log_prob(self.mode.field))

    def log_evidence(self, seed: int) -> Estimate:
        """log p(f, θ) by Laplace's method, nats: log ∫ p(f | v, θ)^τ p(v) dv + log p(θ), θ the similarity's latents at their mode. With a tempering τ
        below one (or with both images explaining each other) that is the tempered likelihood's, which compares deformations, priors and affine maps
        of one pair at one τ and level, and no likelihoods."""
        generator = torch.Generator(self.mode.field.device).manual_seed(seed + 2)
        return log_evidence(self.mode.near, self.prior.prior(), self.mode.field, generator=generator)

    def draws(self, count: int, seed: int, tell: Callable[[float], None] = lambda share: None) -> list[Displacement]:
        """exp(v) for draws of v from the Laplace posterior, each with its inverse."""
        field = self.mode.field
        generator = torch.Generator(field.device).manual_seed(seed + 1)
        departures = field_draws(self.mode.near, self.prior.prior(), count, generator, _TOLERANCE, callback=lambda made: tell(made / count))
        return [Velocity(self.lattice, field + departure).exp() for departure in departures]


def climb(pair: Pair, settings: RegistrationSettings, tell: Callable[[float], None] = lambda share: None) -> Iterator[Level]:
    """The velocity's mode on each level, from coarse to fine; each starts where the one before ended."""
    d, extent = pair.grid.ndim, [n * h for n, h in zip(pair.grid.shape, pair.grid.spacing, strict=True)]
    base = settings.finest_mm or max(min(pair.grid.spacing), (math.prod(extent) / _LARGEST) ** (1 / d))
    levels = [k for k in settings.levels if min(extent) / (k * base) >= _SMALLEST_SIDE] or [settings.levels[-1]]
    usual = prior_scales(pair.grid)
    sd, length = settings.sd_mm or usual[0], settings.length_mm or usual[1]
    field: Tensor | None = None
    seen: Observations | None = None
    lattice = pair.grid
    for number, k in enumerate(levels):
        seen = Observations.of(pair, settings, k * base, seen)
        grid = seen.image.grid
        # The finest image moves a velocity of twice its spacing: smoothness leaves nothing between its nodes, and the flow costs an eighth.
        finer = lattice if field is not None and k == levels[-1] and number else grid
        prior = SmoothVelocity(finer, sd, length, settings.alpha).to(pair.fixed)
        start = pair.fixed.new_zeros(d, *finer.shape) if field is None else along_axes(field, interpolation_matrices(lattice, finer, field))
        lattice = finer
        count = (settings.iterations or _FEW_ITERATIONS)[settings.levels.index(k)]
        ascend = partial(ascend_field, partial(seen.near, {}, lattice), prior.prior(), iterations=count, tolerance=settings.tolerance)
        mode = _tempered_mode(ascend, seen.untempered(settings), lattice, start)
        field = mode.field
        tell((number + 1) / len(levels))
        yield Level(k * base, grid, lattice, prior, mode, seen.image.similarity.tempering)


def _tempered_mode(ascend: Callable[[Tensor], FieldMode], terms: Sequence[ImageTerm], lattice: Grid, start: Tensor) -> FieldMode:
    """The mode, with each term tempered by its share of independent voxels there. One is found given the other, in turn, the mode first: where
    images do not match yet, residuals are smoother than their noise, and a share that is too small would keep them so."""
    mode = ascend(start)
    for _ in range(_ROUNDS if terms else 0):
        shares = [independent_share(term, HalfFlow(lattice, mode.field)) for term in terms]
        if all(abs(math.log(share / term.similarity.tempering)) < _STEADY for share, term in zip(shares, terms, strict=True)):
            break
        for share, term in zip(shares, terms, strict=True):
            term.similarity.tempering = share
        before, mode = mode.iterations, ascend(mode.field)
        mode.iterations = before + [replace(later, number=len(before) + later.number) for later in mode.iterations]
    return mode


def prior_scales(grid: Grid) -> tuple[float, float]:
    """Standard deviation and length of the velocity's prior, mm: those of brains after an affine map, less where the field of view is small. With
    α = 3 its draws do not fold, on any grid, which with α = 2 they do on fine ones."""
    shortest = min(n * h for n, h in zip(grid.shape, grid.spacing, strict=True))
    return min(2.0, shortest / 15), min(6.0, shortest / 6)


def build_similarity(settings: RegistrationSettings, fixed: Tensor, moving: Tensor, ndim: int) -> Similarity:
    """The likelihood by its name.

    Raises:
        ValueError: for a name that is none.
    """
    options: dict[str, Any] = {} if settings.tempering is None else {"tempering": settings.tempering}
    if settings.similarity == "correlation":
        return LocalCorrelation(settings.radius, noise=settings.noise, ndim=ndim, **options)
    if settings.similarity == "mixture":
        return ConditionalMixture.for_image(moving, **options)
    kinds = {"gaussian": GaussianNoise, "student": StudentNoise}
    if settings.similarity not in kinds:
        raise ValueError(f"expected a similarity of {SIMILARITIES}, got {settings.similarity!r}")
    return kinds[settings.similarity](**options)


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
    return float(holds(a, coarse.coordinates(torch.float64)).double().mean())


def holds(grid: Grid, points: Tensor) -> Tensor:
    """Whether points ``(*size, d)`` mm lie in the field of view, ``(*size,)`` bool."""
    voxels = grid.world_to_voxel(points)
    top = torch.tensor(grid.shape, dtype=points.dtype) - 0.5
    return ((voxels >= -0.5) & (voxels <= top)).all(-1)


def _middle(grid: Grid) -> Tensor:
    return grid.voxel_to_world((torch.tensor(grid.shape, dtype=torch.float64) - 1) / 2)
