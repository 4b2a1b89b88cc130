"""A template of a cohort, plain or as a function of covariates: what `probmed template` does, as one function.

Bring all scans to one space by affine maps whose mean is the identity → the joint mode of template, covariates' effects, deformations and noise, from
coarse to fine. Deformations go by Gauss–Newton steps scan by scan, the effects in closed form, the template by Gauss–Newton steps too: each is
raised with the others fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.linalg import expm, logm
from torch import Tensor

from probmed.fields import along_axes
from probmed.grids import Grid, averaged, interpolation_matrices
from probmed.inference.affine import align_images
from probmed.inference.gauss_newton import ascend_field
from probmed.models.registration import Linearisation, linearise
from probmed.models.template import Template, TemplateLinearisation, linearise_template
from probmed.priors import SmoothVelocity
from probmed.similarities import GaussianNoise, LocalCorrelation, Similarity
from probmed.transforms import Affine, Displacement, Transform, Velocity, warp
from probmed.volumes import UnusableInput, Volume, scaled
from probmed.workflows.cohorts import common_grid, own_world
from probmed.workflows.registration_fit import prior_scales
from probmed.workflows.stages import pick_device

SIMILARITIES = ("gaussian", "correlation")
_SMALLEST_SIDE = 8  # voxels of the coarsest level
_TOLERANCE = 1e-4  # nats per voxel of a round
_CENTRINGS = 5  # the logarithms of a group that does not commute have a mean of zero after a few


@dataclass(frozen=True)
class TemplateSettings:
    """How a template is estimated.

    Arguments:
        similarity: one of ``SIMILARITIES``.
        affine: parameters of each scan's affine map, as in ``RegistrationSettings``; 0 for middles onto middles alone.
        spacing_mm: of the template; the finest scan's by default.
        levels: spacings of the pyramid, in voxels of the template. rounds: at most, on each.
        iterations: Gauss–Newton steps of each deformation in a round.
        sd_mm, length_mm, alpha: of the velocities' prior; None: ``prior_scales``.
        share: of ``Template``. tempering: factor on the likelihood; None is the similarity's own.
    """

    similarity: str = "correlation"
    affine: int | None = None
    spacing_mm: float | None = None
    levels: tuple[int, ...] = (4, 2, 1)
    rounds: tuple[int, ...] = (6, 6, 6)
    iterations: int = 3
    sd_mm: float | None = None
    length_mm: float | None = None
    alpha: float = 3.0
    share: float = 1.0
    tempering: float | None = None

    def __post_init__(self) -> None:
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"expected a similarity of {SIMILARITIES}, got {self.similarity!r}")
        if not self.levels or len(self.rounds) != len(self.levels):
            raise ValueError(f"expected levels, and rounds for each, got {self.levels} and {self.rounds}")


@dataclass(frozen=True)
class CohortState:
    """All latents of ``Template`` on one level.

    Arguments:
        template: ``(1 + P, *shape)``. effects: ``(P, d, *lattice)``. velocities: ``(N, d, *lattice)`` mm.
        latents: of the similarity, scan by scan.
        log_joint: nats, tempered.
    """

    model: Template
    template: Tensor
    effects: Tensor
    velocities: Tensor
    latents: list[dict[str, Tensor]]
    log_joint: float = -math.inf

    @property
    def lattice(self) -> Grid:
        """Of the velocities."""
        return self.model.deformation.grid

    def on_cpu(self) -> CohortState:
        """The fields there; the latents of the similarity, which only the fit needs, stay."""
        return replace(self, model=self.model.cpu(), template=self.template.cpu(), effects=self.effects.cpu(), velocities=self.velocities.cpu())

    def on(self, model: Template) -> CohortState:
        """Interpolated to another level."""
        fields = partial(along_axes, matrices=interpolation_matrices(self.lattice, model.deformation.grid, self.velocities))
        images = interpolation_matrices(self.model.grid, model.grid, self.template)
        return CohortState(model, along_axes(self.template, images), fields(self.effects), fields(self.velocities), [{} for _ in self.velocities])


@dataclass(frozen=True)
class TemplateResult:
    """A template with its cohort.

    Arguments:
        state: on the finest level; intensities are those of scans whose foreground's mean is one.
        scans: as given. affines: the template's world to each scan's, mm.
        names: of the covariates. values: theirs, ``(N, P)``, in their own units.
        history: spacing and log joint (nats, tempered) of each round.
    """

    state: CohortState
    scans: tuple[Volume, ...]
    affines: tuple[Affine, ...]
    names: tuple[str, ...]
    values: Tensor
    history: tuple[tuple[float, float], ...]
    settings: TemplateSettings

    @property
    def grid(self) -> Grid:
        """Of the template, in a world of its own."""
        return self.state.model.grid

    @property
    def means(self) -> Tensor:
        """Of the covariates, ``(P,)``."""
        return self.values.mean(0)

    @property
    def sds(self) -> Tensor:
        """Of the covariates, ``(P,)``."""
        return spread(self.values)

    def ends(self, index: int) -> tuple[float, float]:
        """Least and greatest value of a covariate."""
        column = self.values[:, index]
        return float(column.min()), float(column.max())

    def intensities(self, values: Sequence[float] | None = None) -> Tensor:
        """t_0 + Σ c_j t_j at values of the covariates, their means by default, ``(*shape)``."""
        return torch.tensordot(self.state.model.design(self._standardised(values))[0], self.state.template, 1)

    def at(self, values: Sequence[float] | None = None) -> Tensor:
        """The template at values of the covariates, their means by default: (t_0 + Σ c_j t_j) ∘ exp(Σ c_j u_j), ``(*shape)``."""
        image, model = self.intensities(values), self.state.model
        velocity = Velocity(self.state.lattice, model.mean_velocity(self._standardised(values), self.state.effects)[0])
        return warp(image[None], model.grid, velocity, model.grid, fill="edge")[0]

    def flow(self, n: int) -> Displacement:
        """exp(v_n), from the space that scan n's affine map brought it to, to the template's, mm; with its inverse."""
        field = self.state.velocities[n]
        # On the template's own grid: between the nodes of a coarser one the inverse is less exact.
        return Velocity(self.grid, along_axes(field, interpolation_matrices(self.state.lattice, self.grid, field))).exp().with_exact_inverse()

    def from_scan(self, n: int) -> Transform:
        """Where points of the template's world come from in scan n's, mm: pulls that scan onto the template."""
        return self.affines[n] @ self.flow(n).inverse()

    def to_scan(self, n: int) -> Transform:
        """Where points of scan n's world come from in the template's, mm: pulls the template onto that scan."""
        return self.flow(n) @ self.affines[n].inverse()

    def _standardised(self, values: Sequence[float] | None) -> Tensor:
        """Covariates ``(1, P)`` with the cohort's mean 0 and standard deviation 1."""
        if values is None:
            return self.state.template.new_zeros(1, len(self.names))
        return ((torch.as_tensor(values, dtype=torch.float64) - self.means) / self.sds)[None].to(self.state.template)


def estimate_template(
    scans: Sequence[Volume],
    covariates: Tensor | None = None,
    names: Sequence[str] = (),
    *,
    settings: TemplateSettings | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Callable[[str, float], None] | None = None,
) -> TemplateResult:
    """The template of a cohort.

    Arguments:
        covariates: ``(N, P)``, in their own units, with ``names``.

    Raises:
        UnusableInput: for fewer than two scans, or scans of different dimensions.
        ValueError: for covariates of another length, constant ones, or such that are not finite.
    """
    settings = settings or TemplateSettings()
    tell = progress or (lambda stage, share: None)
    if len(scans) < 2:
        raise UnusableInput("template", f"needs two scans or more, not {len(scans)}", "give more scans")
    for scan in scans:
        if scan.grid.ndim != scans[0].grid.ndim:
            raise UnusableInput(scan.name, f"has {scan.grid.ndim} axes and {scans[0].name} {scans[0].grid.ndim}", "give scans of one dimension")
    values = torch.zeros(len(scans), 0, dtype=torch.float64) if covariates is None else covariates.double()
    if len(values) != len(scans) or not bool(values.isfinite().all()) or not bool((spread(values) > 0).all()):
        raise ValueError(f"expected finite covariates that vary, for {len(scans)} scans, got {tuple(values.shape)}")
    grid = common_grid([scan.grid for scan in scans], settings.spacing_mm)
    images, grids = [scaled(scan.data) for scan in scans], [scan.grid for scan in scans]
    affines = mean_space(images, grids, grid, settings.affine, seed, lambda share: tell("affine", 0.3 * share))
    standardised = ((values - values.mean(0)) / spread(values)).to(pick_device(device), torch.float32)

    def brought(target: Grid, spacing_mm: float) -> Tensor:
        return torch.stack([_brought(*scan, target, spacing_mm) for scan in zip(images, grids, affines, strict=True)]).to(standardised)

    history = []
    for spacing, share, state in climb(brought, grid, standardised, settings):
        history.append((spacing, state.log_joint))
        tell("template", 0.3 + 0.7 * share)
    return TemplateResult(state.on_cpu(), tuple(scans), tuple(affines), tuple(names), values, tuple(history), settings)


def spread(values: Tensor) -> Tensor:
    """Standard deviation of each covariate, ``(P,)``, of the scans that there are."""
    return (values - values.mean(0)).square().mean(0).sqrt()


def climb(
    brought: Callable[[Grid, float], Tensor], grid: Grid, covariates: Tensor, settings: TemplateSettings
) -> Iterator[tuple[float, float, CohortState]]:
    """The joint mode after each round, from coarse to fine: spacing (mm), share of the work done, state.

    Arguments:
        brought: all scans on a grid, averaged to a spacing, ``(N, *shape)``.
        covariates: ``(N, P)``, standardised.
    """
    levels = [k for k in settings.levels if min(grid.shape) / k >= _SMALLEST_SIDE] or [settings.levels[-1]]
    state: CohortState | None = None
    for number, k in enumerate(levels):
        spacing, rounds = k * min(grid.spacing), settings.rounds[settings.levels.index(k)]
        here = averaged(torch.zeros(grid.shape), grid, spacing)[1]
        images = brought(here, spacing)
        # As in a pair: the finest image moves velocities of twice its spacing.
        lattice = here if state is None or k != levels[-1] else state.lattice
        model = build_template(here, lattice, settings, covariates.shape[1], images.nanmean(0).nan_to_num(0.0)).to(images)
        state = _start(model, len(images)) if state is None else state.on(model)
        for turn in range(1, rounds + 1):
            raised = improve(state, images[:, None], covariates, settings.iterations)
            gain = raised.log_joint - state.log_joint
            if gain < 0:
                break
            state = raised
            yield spacing, (number + turn / rounds) / len(levels), state
            if gain < _TOLERANCE * images.numel():
                break


def build_template(grid: Grid, lattice: Grid, settings: TemplateSettings, covariates: int, mean: Tensor) -> Template:
    """The model on one level; lattice: of the velocities. mean: of the scans, ``(*grid.shape)``."""
    usual = prior_scales(grid)
    deformation = SmoothVelocity(lattice, settings.sd_mm or usual[0], settings.length_mm or usual[1], settings.alpha)
    options: dict[str, Any] = {} if settings.tempering is None else {"tempering": settings.tempering}
    similarity: Similarity = LocalCorrelation(ndim=grid.ndim, **options) if settings.similarity == "correlation" else GaussianNoise(**options)
    return Template(grid, deformation, similarity, covariates, settings.share, mean.cpu())


def _start(model: Template, count: int) -> CohortState:
    """The mean of the scans, nothing deformed."""
    template = model.prior().loc
    still = template.new_zeros(model.grid.ndim, *model.deformation.grid.shape)
    effects, velocities = (still.expand(n, *still.shape) for n in (model.covariates, count))
    return CohortState(model, template, effects, velocities, [{} for _ in range(count)])


def improve(state: CohortState, images: Tensor, covariates: Tensor, iterations: int) -> CohortState:
    """One round: every deformation, the effects, the mean deformation, the template. The log joint is that of the last.

    Arguments:
        images: ``(N, 1, *shape)``. covariates: ``(N, P)``, standardised.
    """
    model, prior = state.model, state.model.deformation.prior()
    expected_velocity = model.mean_velocity(covariates, state.effects)
    templates = torch.tensordot(model.design(covariates), state.template, 1)[:, None]
    velocities, latents = [], []
    for image, template, mean, start, known in zip(images, templates, expected_velocity, state.velocities, state.latents, strict=True):
        near = partial(_near, model, template, image, dict(known))
        mode = ascend_field(near, prior.about(mean), start, iterations)
        velocities.append(mode.field)
        latents.append(mode.near.latents)  # type: ignore[attr-defined]
    field = torch.stack(velocities)
    # What all share belongs to the template: t ∘ exp(v̄) with v̄ taken from every velocity is, to first order, the same likelihood at a higher prior.
    shared = field.mean(0)
    field = field - shared
    template = warp(state.template, model.grid, Velocity(state.lattice, shared), model.grid, fill="edge")
    effects = model.fitted_effects(covariates, field)
    flows = [Velocity(state.lattice, v).exp(both=False) for v in field]

    def near_template(template: Tensor) -> TemplateLinearisation:
        nonlocal latents
        found = linearise_template(model, template, flows, images, covariates, latents)
        latents = found.latents
        return found

    mode = ascend_field(near_template, model.prior(), template, 2)
    departures = prior.about(model.mean_velocity(covariates, effects))
    total = mode.near.log_joint + float(model.prior().log_prob(mode.field)) + float(departures.log_prob(field).sum())
    if model.covariates:
        total += float(prior.log_prob(effects).sum())
    return CohortState(model, mode.field, effects, field, latents, total)


def _near(model: Template, template: Tensor, image: Tensor, latents: dict[str, Tensor], velocity: Tensor) -> Linearisation:
    """``linearise`` from the latents that the last call found."""
    found = linearise(model.similarity, model.deformation.grid, velocity, template, image, model.grid, latents)
    latents.update(found.latents)
    return found


def _brought(image: Tensor, source: Grid, affine: Affine, target: Grid, spacing_mm: float) -> Tensor:
    """A scan on a level's grid, averaged to its spacing, NaN where nothing is known."""
    coarse, grid = averaged(image, source, spacing_mm)
    return warp(coarse[None], grid, affine, target, fill=math.nan)[0]


def mean_space(
    images: Sequence[Tensor],
    grids: Sequence[Grid],
    grid: Grid,
    parameters: int | None,
    seed: int,
    tell: Callable[[float], None] = lambda share: None,
) -> list[Affine]:
    """Affine maps from a space of the cohort's own to the world of each scan; the mean of their logarithms, each scan's middle onto the space's
    middle left out, is zero.

    All scans are aligned to the first, then to the mean of what comes out.

    Arguments:
        grid: of the space, about its origin.
        parameters: of each map; 0 for middles onto middles.
    """
    worlds = [own_world(g) for g in grids]
    if parameters == 0:
        return worlds
    own = [g.transformed(world.inverse().matrix) for g, world in zip(grids, worlds, strict=True)]
    matrices = np.stack([np.eye(grid.ndim + 1)] * len(images))
    target, where = images[0], own[0]
    for step in range(2):
        for n, (image, source) in enumerate(zip(images, own, strict=True)):
            if step or n:
                matrices[n] = align_images(target, where, image, source, parameters, seed=seed).matrix.numpy()
            tell((step * len(images) + n + 1) / (2 * len(images)))
        for _ in range(_CENTRINGS):
            matrices = matrices @ expm(-np.mean([logm(matrix).real for matrix in matrices], 0))
        moved = [warp(i[None], g, Affine(torch.from_numpy(m)), grid, fill=math.nan)[0] for i, g, m in zip(images, own, matrices, strict=True)]
        target, where = torch.stack(moved).nanmean(0), grid
    return [Affine(world.matrix @ torch.from_numpy(m)) for world, m in zip(worlds, matrices, strict=True)]
