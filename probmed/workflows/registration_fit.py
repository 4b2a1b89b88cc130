"""How the deformation of a pair is fitted: what is observed on each level of a pyramid, and the velocity's mode there.

Both images are averaged to the level's spacing, the moving one after the affine map; labels and landmarks are observed beside them. The mode of one
level is where the next starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from probmed.fields import GaussianField, along_axes
from probmed.grids import Grid, averaged, interpolation_matrices
from probmed.inference.empirical_bayes import Scales, learn_scales
from probmed.inference.evidence import Estimate, log_evidence
from probmed.inference.gauss_newton import FieldMode, ascend_field, field_draws
from probmed.models.registration import HalfFlow, ImageTerm, LandmarkTerm, Linearised, Term, linearise_both_ways, linearise_terms
from probmed.priors import SmoothVelocity
from probmed.similarities import ConditionalMixture, GaussianNoise, LabelAgreement, Landmarks, LocalCorrelation, Similarity, StudentNoise
from probmed.transforms import Affine, Displacement, Transform, Velocity, warp
from probmed.volumes import UnusableInput
from probmed.workflows.segmentation import tempering_of

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
        learn_prior: whether standard deviation and length are those of most evidence, on the two finest levels, and what was given only their start.
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
    learn_prior: bool = False
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
_LEARNING_ROUNDS = 10  # of the prior's scales and mode, at most
_TOLERANCE = 0.05  # of a draw: standard deviations come out one to three per cent too small, in half the time
_SMALLEST_SIDE = 8  # voxels of the coarsest


@dataclass(frozen=True)
class PointPairs:
    """Landmarks in the fixed image's world and in the moving one's, mm, ``(N, d)`` float64 each; NaN where one was not found in the moving image.

    Arguments:
        covariance: of their errors, in the moving world, ``(d, d)`` or ``(N, d, d)`` mm²; None: as the settings have it, alike in all directions.
    """

    fixed: Tensor
    moving: Tensor
    covariance: Tensor | None = None

    def error(self, transform: Transform) -> float:
        """Mean distance of φ(x) to y, mm."""
        return float((transform(self.fixed) - self.moving).norm(dim=-1).nanmean())


@dataclass(frozen=True)
class LabelPair:
    """Segmentations of both images, as zeros and ones ``(K, *shape)``, background first; NaN where nothing is known."""

    moving: Tensor
    fixed: Tensor

    @classmethod
    def of(cls, moving: Tensor, fixed: Tensor, mask: Tensor | None = None, moving_mask: Tensor | None = None) -> LabelPair:
        """Of label maps ``(*shape)``: a channel for 0, and one for each other label of either.

        Arguments:
            mask, moving_mask: where the fixed and the moving one count, bool.
        """
        codes = torch.cat([moving.new_zeros(1), moving.unique(), fixed.unique()]).unique()
        m, f = (torch.stack([(each == code).float() for code in codes]) for each in (moving, fixed))
        m, f = (x if inside is None else x.masked_fill(~inside.to(x.device), math.nan) for x, inside in ((m, moving_mask), (f, mask)))
        return cls(m, f)


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
            x, y = (points.to(fixed) for points in (pair.landmarks.fixed, pair.landmarks.moving))
            others.append(LandmarkTerm(_accuracy(pair.landmarks.covariance, settings), x, y, pair.affine))
            returning = pair.affine.inverse()
            turn = returning.matrix[: grid.ndim, : grid.ndim].double()
            errors = None if pair.landmarks.covariance is None else turn @ pair.landmarks.covariance.double() @ turn.T
            back.append(LandmarkTerm(_accuracy(errors, settings), returning(y), x, Affine.identity(grid.ndim)))
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


def _accuracy(covariance: Tensor | None, settings: RegistrationSettings) -> Landmarks:
    return Landmarks(settings.landmark_sd_mm) if covariance is None else Landmarks(covariance=(covariance + covariance.mT) / 2)


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
    scales = Scales(settings.sd_mm or usual[0], settings.length_mm or usual[1])
    field: Tensor | None = None
    seen: Observations | None = None
    lattice = pair.grid
    for number, k in enumerate(levels):
        seen = Observations.of(pair, settings, k * base, seen)
        grid = seen.image.grid
        # The finest image moves a velocity of twice its spacing: smoothness leaves nothing between its nodes, and the flow costs an eighth.
        finer = lattice if field is not None and k == levels[-1] and number else grid
        start = pair.fixed.new_zeros(d, *finer.shape) if field is None else along_axes(field, interpolation_matrices(lattice, finer, field))
        lattice = finer
        prior = SmoothVelocity(lattice, scales.sd, scales.length_mm, settings.alpha).to(pair.fixed)
        count = (settings.iterations or _FEW_ITERATIONS)[settings.levels.index(k)]
        ascend = partial(ascend_field, partial(seen.near, {}, lattice), iterations=count, tolerance=settings.tolerance)
        mode = _tempered_mode(partial(ascend, prior.prior()), seen.untempered(settings), lattice, start)
        if settings.learn_prior and k in levels[-2:]:
            scales, mode = _learned(ascend, prior.prior(), mode, scales)
            prior = SmoothVelocity(lattice, scales.sd, scales.length_mm, settings.alpha).to(pair.fixed)
        field = mode.field
        tell((number + 1) / len(levels))
        yield Level(k * base, grid, lattice, prior, mode, seen.image.similarity.tempering)


def _learned(ascend: Callable[[GaussianField, Tensor], FieldMode], prior: GaussianField, mode: FieldMode, scales: Scales) -> tuple[Scales, FieldMode]:
    """The prior's scales of most evidence, and the mode under it, with what the modes on the way took."""
    generator = torch.Generator(mode.field.device).manual_seed(0)
    try:
        found = learn_scales(ascend, prior, mode.field, scales, rounds=_LEARNING_ROUNDS, generator=generator)
    except ValueError as error:
        remedy = "leave it out (learn_prior=False), for there is nothing to learn from"
        raise UnusableInput("--learn-prior", f"cannot tell how these images deform: {error}", remedy) from error
    before, after = mode.iterations, found.mode
    after.iterations = before + [replace(later, number=len(before) + later.number) for later in after.iterations]
    return found.scales, after


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
