"""p(f | φ; m) p(φ): a fixed image explained by a moving one and a deformation.

.. math::
    \\varphi \\sim p(\\varphi), \\quad \\theta \\sim p(\\theta), \\quad f \\sim p(f \\mid m \\circ \\varphi, \\theta)

φ takes the fixed image's world to the moving one's, so that m∘φ lies on the fixed image's grid. Everything is a part: the deformation prior
(``priors``), the likelihood (``similarities``).

References: Dalca et al., MedIA 2019; Ashburner, NeuroImage 2007 (the derivative of a flow in its velocity).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmed.fields import ModulatedField, along_axes
from probmed.grids import Grid, interpolation_matrices, resample, sample
from probmed.priors import DeformationPrior, SmoothVelocity
from probmed.similarities import Similarity
from probmed.transforms import Displacement, Transform, Velocity, physical_gradient, warp

_SMALLEST_DETERMINANT = 0.15  # of half the flow


class Registration(PyroModule):
    """Two images of one anatomy.

    Sites: those of the deformation (``affine``, ``velocity``), of the similarity, and ``fixed``, ``(C, *shape)``, observed where given.

    Arguments:
        deformation: a component that returns a transform from the fixed image's world to the moving one's.
        similarity: how the fixed image looks given the moved one; its ``tempering`` is a factor on the log density, for voxels that are not
            independent. The prior is not scaled.
    """

    def __init__(self, deformation: DeformationPrior, similarity: Similarity) -> None:
        super().__init__()
        self.deformation, self.similarity = deformation, similarity

    def forward(self, moving: Tensor, moving_grid: Grid, grid: Grid, fixed: Tensor | None = None) -> Tensor:
        """
        Arguments:
            moving: ``(C, *moving_grid.shape)``, NaN where nothing is known.
            grid: of the fixed image.
        """
        transform: Transform = self.deformation()
        moved = carried(moving, moving_grid, transform, grid)
        distribution = self.similarity(moved)
        with poutine.scale(scale=self.similarity.tempering):
            return pyro.sample("fixed", distribution, obs=fixed)

    def transform(self, state: Mapping[str, Tensor]) -> Transform:
        """φ at given latents."""
        transform: Transform = poutine.condition(self.deformation, data=dict(state))()
        return transform

    def moved(self, state: Mapping[str, Tensor], moving: Tensor, moving_grid: Grid, grid: Grid) -> Tensor:
        """m∘φ at given latents, ``(C, *shape)``."""
        return carried(moving, moving_grid, self.transform(state), grid)


def carried(image: Tensor, source: Grid, transform: Transform, target: Grid) -> Tensor:
    """``warp`` of an image ``(*batch, C, *shape)`` with NaN where nothing is known: NaN where a neighbour is, with finite gradients elsewhere."""
    missing = image.isnan()
    if not bool(missing.any()):
        return warp(image, source, transform, target, fill=math.nan)
    channel = image.ndim - source.ndim - 1
    both = torch.cat([image.masked_fill(missing, 0.0), missing.to(image.dtype)], channel)
    moved, unknown = warp(both, source, transform, target, fill=math.nan).chunk(2, channel)
    return moved.masked_fill(unknown.detach() != 0, math.nan)


class RegistrationGuide(PyroModule):
    """q(v, θ | m, f) of many pairs at once: a network reads both images.

    .. math::
        q(v \\mid m, f) = N(\\mu(m, f), \\; \\mathrm{diag}(a) \\, C \\, \\mathrm{diag}(s^2) \\, C^T \\mathrm{diag}(a))

    with a from the network and s either constant (``diagonal``, independent voxels, as published) or the prior's spectrum less what a typical image
    tells, (Λ + h)^-½ with h learned from a start (``smooth``). The similarity's latents are at their best given v (a point mass).

    Arguments:
        model: its deformation is a ``SmoothVelocity``.
        network: (moving, fixed, shape) to mean and log spread, as ``networks.VelocityNetwork``.
        posterior: "smooth" or "diagonal".
        curvature: the start of h, as minus the log likelihood's second derivative in an element of the velocity, mm⁻².

    References: Dalca et al., MedIA 2019 (the diagonal one).
    """

    log_curvature: nn.Parameter | None

    def __init__(self, model: Registration, network: nn.Module, posterior: str = "smooth", curvature: float = 1.0) -> None:
        super().__init__()
        if posterior not in ("smooth", "diagonal"):
            raise ValueError(f'expected a posterior "smooth" or "diagonal", got {posterior!r}')
        if not isinstance(model.deformation, SmoothVelocity):
            raise ValueError(f"expected a model whose deformation is a SmoothVelocity, got a {type(model.deformation).__name__}")
        self.similarity, self.deformation, self.network, self.posterior = model.similarity, model.deformation, network, posterior
        self.log_curvature = nn.Parameter(torch.tensor(math.log(curvature))) if posterior == "smooth" else None

    def distribution(self, moving: Tensor, fixed: Tensor) -> ModulatedField:
        """q(v | m, f) for images ``(B, C, *shape)`` on one grid: batch ``(B,)``."""
        prior = self.deformation.prior()
        loc, spread = self.network(moving, fixed, self.deformation.grid.shape)
        eigenvalues = prior.eigenvalues[None].to(loc)
        if self.log_curvature is None:
            spectrum = eigenvalues.max().rsqrt().expand_as(eigenvalues)
        else:
            spectrum = (eigenvalues + self.log_curvature.exp()).rsqrt()
        return ModulatedField(loc, spread.exp(), spectrum, self.deformation.grid.ndim)

    def forward(self, moving: Tensor, moving_grid: Grid, grid: Grid, fixed: Tensor) -> dict[str, Tensor]:
        """As the model: one pair, or ``(B, C, *shape)`` in a plate of B pairs."""
        single = moving.ndim == grid.ndim + 1
        here = moving if moving_grid == grid else resample(moving, moving_grid, grid, fill=math.nan)
        here, fixed = (here[None], fixed[None]) if single else (here, fixed)
        q = self.distribution(here, fixed)
        velocity: Tensor = pyro.sample("velocity", _member(q) if single else q)
        state = {"velocity": velocity}
        with torch.no_grad():
            moved = carried(moving, moving_grid, self.deformation.evaluate(velocity), grid)
            latents = self._latents(moved[None] if single else moved, fixed)
        for name, value in latents.items():
            state[name] = pyro.sample(name, Delta(value[0] if single else value, event_dim=value.ndim - 1))
        return state

    def _latents(self, moved: Tensor, fixed: Tensor) -> dict[str, Tensor]:
        """The similarity's, pair by pair."""
        each = [self.similarity.start(m, f) for m, f in zip(moved, fixed, strict=True)]
        return {name: torch.stack([latents[name] for latents in each]) for name in each[0]}


def _member(q: ModulatedField) -> ModulatedField:
    """The distribution of the only pair of a batch."""
    return ModulatedField(q.loc[0], q.amplitude[0], q.spectrum[0], q.ndim)


@dataclass(frozen=True)
class Linearisation:
    """The log likelihood near a velocity.

    Arguments:
        log_joint: tempered log likelihood and log prior of the similarity's latents, nats; −∞ where half the flow all but folds on its lattice.
        gradient: of the former in the velocity, ``(d, *velocity.shape)``, nats per mm.
        latents: of the similarity, maximised at this velocity.
        slopes: ∇m of the moved image halfway, ``(C, d, *shape)``, mm⁻¹.
        curvature: minus the expected second derivative in each value of m halfway, ``(C, *shape)``.
        matrices: from the velocity's lattice to the image's, one an axis.
    """

    log_joint: float
    gradient: Tensor
    latents: dict[str, Tensor]
    slopes: Tensor
    curvature: Tensor
    matrices: list[Tensor]

    @property
    def elements(self) -> tuple[int, ...]:
        """Shape of the data, ``(C, *shape)``."""
        return tuple(self.curvature.shape)

    def precision(self, velocity: Tensor) -> Tensor:
        """The Gauss–Newton Hessian times velocities ``(batch, d, *velocity.shape)``: Pᵀ ∇m h ∇mᵀ P."""
        along = torch.einsum("cd...,bd...->bc...", self.slopes, along_axes(velocity, self.matrices))
        back = torch.einsum("cd...,bc...->bd...", self.slopes, self.curvature * along)
        return along_axes(back, [m.T for m in self.matrices])

    def precision_root(self, white: Tensor) -> Tensor:
        """Pᵀ ∇m √h applied to ``(batch, C, *shape)``: with white noise, draws whose covariance is the Hessian."""
        back = torch.einsum("cd...,bc...->bd...", self.slopes, self.curvature.sqrt() * white)
        return along_axes(back, [m.T for m in self.matrices])

    def blocks(self) -> Tensor:
        """A block-diagonal bound of the Hessian, ``(d, d, *velocity.shape)``: since the rows of P are positive and sum to one,
        xᵀ Pᵀ H P x ≤ Σ_i x_iᵀ (Pᵀ H)_i x_i."""
        outer = torch.einsum("cd...,ce...,c...->de...", self.slopes, self.slopes, self.curvature)
        return along_axes(outer, [m.T for m in self.matrices])


def linearise(
    similarity: Similarity,
    lattice: Grid,
    velocity: Tensor,
    moving: Tensor,
    fixed: Tensor,
    grid: Grid,
    latents: Mapping[str, Tensor] | None = None,
) -> Linearisation:
    """The log likelihood of ``fixed`` given ``moving`` carried by exp(v), its gradient and curvature, without automatic differentiation.

    With g the likelihood's derivative in m∘φ,

    .. math::
        \\frac{\\partial \\log p}{\\partial v}(y) = \\int_0^1 g(\\varphi_{-s}(y)) \\, |D\\varphi_{-s}(y)|
            \\, \\nabla(m \\circ \\varphi_{1-s})(y) \\, ds

    of which the midpoint s = ½ is taken: both halves of the flow are at hand, and the error is of second order in how much the flow bends its own
    path.

    Arguments:
        lattice: the velocity's grid, with the axes of ``grid``.
        velocity: ``(d, *lattice.shape)``, mm.
        moving, fixed: ``(C, *grid.shape)`` on one grid, NaN where nothing is known.
        latents: of the similarity, from which it is maximised; its own start by default.
    """
    matrices = interpolation_matrices(lattice, grid, velocity)
    half = Velocity(lattice, velocity / 2).exp()
    back = half.inverse()
    points = grid.coordinates(moving.dtype, moving.device)

    def carried(image: Tensor, by: Displacement, fill: float) -> Tensor:
        return sample(image, grid, points + along_axes(by.field, matrices).movedim(0, -1), fill=fill)

    moved = carried(moving, half.after(half), math.nan)
    latents = similarity.update(moved, fixed, latents or similarity.start(moved, fixed))
    tempering = similarity.tempering
    value = tempering * similarity.distribution(moved, latents).log_prob(fixed).sum() + similarity.log_prior(moved, latents).sum()
    middle = carried(moving, half, math.nan)
    slopes = physical_gradient(middle.movedim(0, -1), grid).nan_to_num(0.0).movedim((-2, -1), (0, 1))
    determinant = back.jacobian_determinant(lattice, velocity.dtype, velocity.device)
    if float(determinant.min()) < _SMALLEST_DETERMINANT:
        # The flow has no folds, its sampled composition may: there the lattice is too coarse for this velocity.
        value = torch.full_like(value, -math.inf)
    volume = along_axes(determinant, matrices)
    both = torch.cat(similarity.newton(moved, fixed, latents))
    pulled, curvature = (carried(both, back, 0.0) * (tempering * volume)).chunk(2)
    gradient = along_axes(torch.einsum("cd...,c...->d...", slopes, pulled), [m.T for m in matrices])
    return Linearisation(float(value), gradient, latents, slopes, curvature.clamp_min(0), matrices)


def linearise_both_ways(
    similarity: Similarity,
    lattice: Grid,
    velocity: Tensor,
    moving: Tensor,
    fixed: Tensor,
    grid: Grid,
    latents: Mapping[str, Tensor] | None = None,
) -> Linearisation:
    """``linearise`` of the mean of two log likelihoods, of the fixed image given the moving one and of the moving one given the fixed one carried by
    exp(−v): neither image is the reference, and with the two exchanged the mode is −v.

    Arguments:
        latents: of both ways, those of the way back with ``back_`` before their names.
    """
    known = dict(latents or {})
    there = {name: value for name, value in known.items() if not name.startswith("back_")}
    returning = {name.removeprefix("back_"): value for name, value in known.items() if name.startswith("back_")}
    forward = linearise(similarity, lattice, velocity, moving, fixed, grid, there)
    back = linearise(similarity, lattice, -velocity, fixed, moving, grid, returning)
    return Linearisation(
        (forward.log_joint + back.log_joint) / 2,
        (forward.gradient - back.gradient) / 2,
        forward.latents | {f"back_{name}": value for name, value in back.latents.items()},
        torch.cat([forward.slopes, back.slopes]),
        torch.cat([forward.curvature, back.curvature]) / 2,
        forward.matrices,
    )
