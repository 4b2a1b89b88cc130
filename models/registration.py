"""p(f | φ; m) p(φ): a fixed image explained by a moving one and a deformation.

.. math::
    \\varphi \\sim p(\\varphi), \\quad \\theta \\sim p(\\theta), \\quad f \\sim p(f \\mid m \\circ \\varphi, \\theta)

φ takes the fixed image's world to the moving one's, so that m∘φ lies on the fixed image's grid. Everything is a part: the deformation prior
(``priors``), the likelihood (``similarities``). Where there is more to see than two images, more is observed:

.. math::
    y_i \\sim N(\\varphi(x_i), \\Sigma), \\quad S_f \\sim p(S_f \\mid S_m \\circ \\varphi, \\theta)

landmarks, and segmentations of both.

References: Dalca et al., MedIA 2019; Ashburner, NeuroImage 2007 (the derivative of a flow in its velocity).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmed.fields import ModulatedField, along_axes
from probmed.grids import Grid, interpolation_matrices, resample, sample
from probmed.priors import DeformationPrior, SmoothVelocity
from probmed.similarities import LabelAgreement, Landmarks, Similarity
from probmed.transforms import Affine, Displacement, Transform, Velocity, physical_gradient, warp

_SMALLEST_DETERMINANT = 0.15  # of half the flow


class Registration(PyroModule):
    """Two images of one anatomy.

    Sites: those of the deformation (``affine``, ``velocity``), of the similarities, and ``fixed``, ``(C, *shape)``, ``landmarks``, ``(N, d)``, and
    ``labels``, ``(K, *shape)``, observed where given.

    Arguments:
        deformation: a component that returns a transform from the fixed image's world to the moving one's.
        similarity: how the fixed image looks given the moved one; its ``tempering`` is a factor on the log density, for voxels that are not
            independent. The prior is not scaled.
        landmarks: how points of the moving image lie given those of the fixed one that φ brings there.
        labels: how the fixed image's segmentation looks given the moving one's, moved.
    """

    def __init__(
        self,
        deformation: DeformationPrior,
        similarity: Similarity,
        landmarks: Landmarks | None = None,
        labels: LabelAgreement | None = None,
    ) -> None:
        super().__init__()
        self.deformation, self.similarity, self.landmarks, self.labels = deformation, similarity, landmarks, labels

    def forward(
        self,
        moving: Tensor,
        moving_grid: Grid,
        grid: Grid,
        fixed: Tensor | None = None,
        *,
        points: Tensor | None = None,
        landmarks: Tensor | None = None,
        moving_labels: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """
        Arguments:
            moving: ``(C, *moving_grid.shape)``, NaN where nothing is known.
            grid: of the fixed image.
            points: x in the fixed world, mm, ``(N, d)``; without them there are no landmarks.
            landmarks: y in the moving world, mm, ``(N, d)``, NaN where not found.
            moving_labels: probabilities S_m, ``(K, *moving_grid.shape)``; without them there are no labels.
            labels: S_f as zeros and a one, ``(K, *grid.shape)``, NaN where nothing is known.

        Returns:
            The fixed image.

        Raises:
            ValueError: for points or labels without the part that they are for.
        """
        transform: Transform = self.deformation()
        image = _observed("fixed", self.similarity, carried(moving, moving_grid, transform, grid), fixed)
        if points is not None:
            _observed("landmarks", self.landmarks, transform(points), landmarks)
        if moving_labels is not None:
            _observed("labels", self.labels, carried(moving_labels, moving_grid, transform, grid), labels)
        return image

    def transform(self, state: Mapping[str, Tensor]) -> Transform:
        """φ at given latents."""
        transform: Transform = poutine.condition(self.deformation, data=dict(state))()
        return transform

    def moved(self, state: Mapping[str, Tensor], moving: Tensor, moving_grid: Grid, grid: Grid) -> Tensor:
        """m∘φ at given latents, ``(C, *shape)``."""
        return carried(moving, moving_grid, self.transform(state), grid)


def _observed(site: str, similarity: Similarity | None, moved: Tensor, value: Tensor | None) -> Tensor:
    """What a likelihood gives, tempered."""
    if similarity is None:
        raise ValueError(f"expected a model with a likelihood of its {site}, got one without")
    distribution = similarity(moved)
    with poutine.scale(scale=similarity.tempering):
        return pyro.sample(site, distribution, obs=value)


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
    tells, (Λ + h)^-½ with h learned from a start (``smooth``). The likelihoods' latents are at their best given v (a point mass).

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
        self.deformation, self.similarity, self.labels = model.deformation, model.similarity, model.labels
        self.network, self.posterior = network, posterior
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

    def forward(
        self,
        moving: Tensor,
        moving_grid: Grid,
        grid: Grid,
        fixed: Tensor,
        *,
        moving_labels: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """As the model: one pair, or ``(B, C, *shape)`` in a plate of B pairs. Of pairs without labels all of them are NaN."""
        single = moving.ndim == grid.ndim + 1
        here = moving if moving_grid == grid else resample(moving, moving_grid, grid, fill=math.nan)
        q = self.distribution(*((here[None], fixed[None]) if single else (here, fixed)))
        velocity: Tensor = pyro.sample("velocity", _member(q) if single else q)
        return {"velocity": velocity} | self.beside(velocity, moving, moving_grid, grid, fixed, moving_labels, labels)

    def beside(
        self,
        velocity: Tensor,
        moving: Tensor,
        moving_grid: Grid,
        grid: Grid,
        fixed: Tensor,
        moving_labels: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Sample the likelihoods' latents, at their best given v. The network is not asked."""
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            transform, batch = self.deformation.evaluate(velocity), moving.ndim - grid.ndim - 1
            for likelihood, image, seen in ((self.similarity, moving, fixed), (self.labels, moving_labels, labels)):
                if likelihood is None or image is None or seen is None or not likelihood.prior(image):
                    continue
                moved = carried(image, moving_grid, transform, grid)
                if not batch:
                    found |= _at_best(likelihood, moved, seen)
                    continue
                each = [_at_best(likelihood, m, f) for m, f in zip(moved, seen, strict=True)]
                found |= {name: torch.stack([latents[name] for latents in each]) for name in each[0]}
        return {name: pyro.sample(name, Delta(value, event_dim=value.ndim - batch)) for name, value in found.items()}


def _at_best(likelihood: Similarity, moved: Tensor, fixed: Tensor) -> dict[str, Tensor]:
    """Latents of one pair's likelihood, improved once from its start."""
    return likelihood.update(moved, fixed, likelihood.start(moved, fixed))


def _member(q: ModulatedField) -> ModulatedField:
    """The distribution of the only pair of a batch."""
    return ModulatedField(q.loc[0], q.amplitude[0], q.spectrum[0], q.ndim)


class Linearised(Protocol):
    """The log likelihood near a velocity.

    Arguments:
        log_joint: tempered log likelihood and log prior of the similarity's latents, nats; −∞ where half the flow all but folds on its lattice.
        gradient: of the former in the velocity, ``(d, *velocity.shape)``, nats per mm.
        latents: of the similarity, maximised at this velocity.
        elements: shape of the data.
    """

    @property
    def log_joint(self) -> float: ...
    @property
    def gradient(self) -> Tensor: ...
    @property
    def latents(self) -> dict[str, Tensor]: ...
    @property
    def elements(self) -> tuple[int, ...]: ...

    def precision(self, velocity: Tensor) -> Tensor:
        """The Gauss–Newton Hessian times velocities ``(batch, d, *velocity.shape)``."""

    def precision_root(self, white: Tensor) -> Tensor:
        """Of ``(batch, *elements)``: with white noise, draws ``(batch, d, *velocity.shape)`` whose covariance is the Hessian."""

    def blocks(self) -> Tensor:
        """A block-diagonal bound of the Hessian, ``(d, d, *velocity.shape)``: where the rows of P are positive and sum to one,
        xᵀ Pᵀ H P x ≤ Σ_i x_iᵀ (Pᵀ H)_i x_i."""


@dataclass(frozen=True)
class Linearisation:
    """``Linearised``, of an image: the Hessian is Pᵀ ∇m h ∇mᵀ P.

    Arguments:
        slopes: ∇m of the moved image halfway, ``(C, d, *shape)``, mm⁻¹.
        curvature: h, minus the expected second derivative in each value of m halfway, ``(C, *shape)``.
        matrices: P, from the velocity's lattice to the image's, one an axis.
    """

    log_joint: float
    gradient: Tensor
    latents: dict[str, Tensor]
    slopes: Tensor
    curvature: Tensor
    matrices: list[Tensor]

    @property
    def elements(self) -> tuple[int, ...]:
        return tuple(self.curvature.shape)

    def precision(self, velocity: Tensor) -> Tensor:
        along = torch.einsum("cd...,bd...->bc...", self.slopes, along_axes(velocity, self.matrices))
        back = torch.einsum("cd...,bc...->bd...", self.slopes, self.curvature * along)
        return along_axes(back, [m.T for m in self.matrices])

    def precision_root(self, white: Tensor) -> Tensor:
        back = torch.einsum("cd...,bc...->bd...", self.slopes, self.curvature.sqrt() * white)
        return along_axes(back, [m.T for m in self.matrices])

    def blocks(self) -> Tensor:
        return along_axes(_outer(self.slopes, self.curvature), [m.T for m in self.matrices])


@dataclass(frozen=True)
class PointLinearisation:
    """``Linearised``, of points: the Hessian is Pᵀ Dᵀ h D P.

    Arguments:
        slopes: D, of each point's image, whitened, in the velocity where it is halfway, ``(N, d, d)``, mm⁻¹.
        curvature: h, of each whitened coordinate, ``(N, d)``.
        nodes, shares: P, the corners of each point's cell of the velocity's lattice, flat, and their weights, ``(N, 2^d)``.
        shape: of that lattice.
    """

    log_joint: float
    gradient: Tensor
    latents: dict[str, Tensor]
    slopes: Tensor
    curvature: Tensor
    nodes: Tensor
    shares: Tensor
    shape: tuple[int, ...]

    @property
    def elements(self) -> tuple[int, ...]:
        return tuple(self.curvature.shape)

    def precision(self, velocity: Tensor) -> Tensor:
        there = torch.einsum("bdnk,nk->bnd", velocity.flatten(2)[..., self.nodes], self.shares)
        along = torch.einsum("nad,bnd->bna", self.slopes, there)
        return self._spread(torch.einsum("nad,bna->bdn", self.slopes, self.curvature * along))

    def precision_root(self, white: Tensor) -> Tensor:
        return self._spread(torch.einsum("nad,bna->bdn", self.slopes, self.curvature.sqrt() * white))

    def blocks(self) -> Tensor:
        return self._spread(torch.einsum("nad,nae,na->den", self.slopes, self.slopes, self.curvature))

    def _spread(self, values: Tensor) -> Tensor:
        return spread(values, self.nodes, self.shares, self.shape)


@dataclass(frozen=True)
class JointLinearisation:
    """``Linearised``, of several terms: ``weight`` times the sum of their Hessians."""

    log_joint: float
    gradient: Tensor
    latents: dict[str, Tensor]
    terms: tuple[Linearised, ...]
    weight: float = 1.0

    @property
    def elements(self) -> tuple[int, ...]:
        return (sum(math.prod(term.elements) for term in self.terms),)

    def precision(self, velocity: Tensor) -> Tensor:
        return self.weight * torch.stack([term.precision(velocity) for term in self.terms]).sum(0)

    def precision_root(self, white: Tensor) -> Tensor:
        parts = white.split([math.prod(term.elements) for term in self.terms], 1)
        roots = [term.precision_root(part.unflatten(1, term.elements)) for term, part in zip(self.terms, parts, strict=True)]
        return self.weight**0.5 * torch.stack(roots).sum(0)

    def blocks(self) -> Tensor:
        return self.weight * torch.stack([term.blocks() for term in self.terms]).sum(0)


def _outer(slopes: Tensor, curvature: Tensor) -> Tensor:
    """Σ_c h_c ∇m_c ∇m_cᵀ, ``(d, d, *shape)``."""
    return torch.einsum("cd...,ce...,c...->de...", slopes, slopes, curvature)


def _condensed(slopes: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Channels and their curvature, no more than there are axes, with the same Σ_c h_c ∇m_c ∇m_cᵀ: the columns of its Cholesky factor."""
    if slopes.shape[0] <= slopes.shape[1]:
        return slopes, curvature
    rest = _outer(slopes, curvature)
    enough = 16 * torch.finfo(rest.dtype).eps * rest.diagonal().sum(-1)
    columns = []
    for axis in range(len(rest)):
        pivot = rest[axis, axis]
        column = (rest[axis] * pivot.clamp_min(torch.finfo(pivot.dtype).tiny).rsqrt()).masked_fill(pivot <= enough, 0.0)
        columns.append(column)
        rest = rest - column[:, None] * column
    return torch.stack(columns), torch.ones_like(curvature[: len(columns)])


def spread(values: Tensor, nodes: Tensor, shares: Tensor, shape: Sequence[int]) -> Tensor:
    """Of values at points, ``(*batch, N)``, each corner's share: the transpose of linear interpolation, ``(*batch, *shape)``."""
    total = values.new_zeros(*values.shape[:-1], math.prod(shape))
    return total.index_add(-1, nodes.flatten(), (values[..., None] * shares).flatten(-2)).unflatten(-1, tuple(shape))


def corners(grid: Grid, points: Tensor) -> tuple[Tensor, Tensor]:
    """Of each point, mm ``(N, d)``, the corners of its cell, flat, and their weights in linear interpolation, ``(N, 2^d)`` both; a point beyond the
    edge counts as where the edge is nearest."""
    last = torch.tensor(grid.shape, device=points.device) - 1
    position = torch.minimum(grid.world_to_voxel(points).clamp_min(0), last.to(points))
    corner = torch.minimum(position.floor().long(), (last - 1).clamp_min(0))
    steps = torch.cartesian_prod(*[torch.tensor([0, 1], device=points.device)] * grid.ndim)
    strides = torch.tensor([math.prod(grid.shape[axis + 1 :]) for axis in range(grid.ndim)], device=points.device)
    part = (position - corner)[:, None]
    return torch.minimum(corner[:, None] + steps, last) @ strides, torch.where(steps == 1, part, 1 - part).prod(-1)


@dataclass(frozen=True)
class HalfFlow:
    """exp(v/2), of which derivatives of exp(v) are made.

    Arguments:
        lattice: of the velocity ``(d, *lattice.shape)``, mm.
    """

    lattice: Grid
    velocity: Tensor

    @cached_property
    def there(self) -> Displacement:
        return Velocity(self.lattice, self.velocity / 2).exp()

    @cached_property
    def back(self) -> Displacement:
        return self.there.inverse()

    @cached_property
    def whole(self) -> Displacement:
        return self.there.after(self.there)

    @cached_property
    def volume(self) -> Tensor:
        """det D of the way back, ``(*lattice.shape)``."""
        return self.back.jacobian_determinant(self.lattice, self.velocity.dtype, self.velocity.device)

    @property
    def folds(self) -> bool:
        """Whether it all but does on its lattice. The flow has no folds, its sampled composition may: there the lattice is too coarse."""
        return float(self.volume.min()) < _SMALLEST_DETERMINANT


class Term(Protocol):
    """An observation that depends on the deformation."""

    def linearise(self, flow: HalfFlow, latents: Mapping[str, Tensor]) -> Linearised: ...


@dataclass(frozen=True)
class ImageTerm:
    """p(f | m∘φ).

    Arguments:
        moving, fixed: ``(C, *grid.shape)`` on one grid, whose axes are those of the velocity's lattice; NaN where nothing is known.
    """

    similarity: Similarity
    moving: Tensor
    fixed: Tensor
    grid: Grid

    def linearise(self, flow: HalfFlow, latents: Mapping[str, Tensor]) -> Linearisation:
        """The log likelihood near exp(v), its gradient and curvature, without automatic differentiation.

        With g the likelihood's derivative in m∘φ,

        .. math::
            \\frac{\\partial \\log p}{\\partial v}(y) = \\int_0^1 g(\\varphi_{-s}(y)) \\, |D\\varphi_{-s}(y)|
                \\, \\nabla(m \\circ \\varphi_{1-s})(y) \\, ds

        of which the midpoint s = ½ is taken: both halves of the flow are at hand, and the error is of second order in how much the flow bends its
        own path.

        Arguments:
            latents: of the similarity, from which it is maximised; its own start where there are none.
        """
        similarity, moved = self.similarity, self.carried(self.moving, flow.whole)
        value, latents = _maximised(similarity, moved, self.fixed, latents)
        slopes = physical_gradient(self.carried(self.moving, flow.there).movedim(0, -1), self.grid).nan_to_num(0.0).movedim((-2, -1), (0, 1))
        both = torch.cat(similarity.newton(moved, self.fixed, latents))
        matrices = interpolation_matrices(flow.lattice, self.grid, flow.velocity)
        volume = along_axes(flow.volume, matrices)
        pulled, curvature = (self.carried(both, flow.back, 0.0) * (similarity.tempering * volume)).chunk(2)
        gradient = along_axes(torch.einsum("cd...,c...->d...", slopes, pulled), [m.T for m in matrices])
        return Linearisation(-math.inf if flow.folds else value, gradient, latents, *_condensed(slopes, curvature.clamp_min(0)), matrices)

    def carried(self, image: Tensor, by: Displacement, fill: float = math.nan) -> Tensor:
        """``(C, *grid.shape)`` on the same grid, the displacement interpolated axis by axis, which is several times faster than at points."""
        points = self.grid.coordinates(image.dtype, image.device)
        return sample(image, self.grid, points + along_axes(by.field, interpolation_matrices(by.grid, self.grid, image)).movedim(0, -1), fill=fill)


@dataclass(frozen=True)
class LandmarkTerm:
    """p(y | A φ(x)).

    Arguments:
        points: x, ``(N, d)`` mm, in the world of the velocity.
        landmarks: y, ``(N, d)`` mm, NaN where not found.
        affine: A, which comes after the flow.
    """

    similarity: Landmarks
    points: Tensor
    landmarks: Tensor
    affine: Affine

    def linearise(self, flow: HalfFlow, latents: Mapping[str, Tensor]) -> PointLinearisation:
        """The log likelihood near exp(v), with the midpoint of

        .. math:: \\delta\\varphi_1(x) = \\int_0^1 D\\varphi_{1-s}(\\varphi_s(x)) \\, \\delta v(\\varphi_s(x)) \\, ds
        """
        lattice, d = flow.lattice, flow.lattice.ndim
        half = flow.there(self.points)
        moved = self.affine(flow.whole(self.points))
        value, latents = _maximised(self.similarity, moved, self.landmarks, latents)
        seen, residual = self.similarity.whitened(moved, self.landmarks, latents)
        nodes, shares = corners(lattice, half)
        onward = flow.there.jacobian(lattice, half.dtype, half.device).flatten(0, -3)
        slopes = self.affine.matrix[:d, :d].to(half) @ torch.einsum("nkab,nk->nab", onward[nodes], shares)
        # In coordinates in which the errors are white, whatever their covariance.
        slopes, tempering = self.similarity.whitening(moved, latents).to(half) @ slopes, self.similarity.tempering
        gradient = spread(torch.einsum("nad,na->dn", slopes, tempering * residual), nodes, shares, lattice.shape)
        return PointLinearisation(value, gradient, latents, slopes, tempering * seen.to(half), nodes, shares, lattice.shape)


def _maximised(similarity: Similarity, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The tempered log joint of an observation and its similarity's latents, nats, at latents no worse than those that are known."""
    known = {name: latents[name] for name in similarity.prior(moved) if name in latents}
    found = similarity.update(moved, fixed, known or similarity.start(moved, fixed))
    value = similarity.tempering * similarity.distribution(moved, found).log_prob(fixed).sum() + similarity.log_prior(moved, found).sum()
    return float(value), found


def linearise(
    similarity: Similarity,
    lattice: Grid,
    velocity: Tensor,
    moving: Tensor,
    fixed: Tensor,
    grid: Grid,
    latents: Mapping[str, Tensor] | None = None,
) -> Linearisation:
    """``ImageTerm.linearise``: the log likelihood of ``fixed`` given ``moving`` carried by exp(v), its gradient and curvature.

    Arguments:
        lattice: the velocity's grid, with the axes of ``grid``.
        velocity: ``(d, *lattice.shape)``, mm.
        moving, fixed: ``(C, *grid.shape)`` on one grid, NaN where nothing is known.
        latents: of the similarity, from which it is maximised; its own start by default.
    """
    return ImageTerm(similarity, moving, fixed, grid).linearise(HalfFlow(lattice, velocity), latents or {})


def linearise_terms(terms: Sequence[Term], lattice: Grid, velocity: Tensor, latents: Mapping[str, Tensor] | None = None) -> Linearised:
    """The sum of the log likelihoods of all that is observed, near exp(v).

    Arguments:
        lattice: the velocity's grid; velocity: ``(d, *lattice.shape)``, mm.
        latents: of all similarities, by site.
    """
    flow = HalfFlow(lattice, velocity)
    each = [term.linearise(flow, latents or {}) for term in terms]
    if len(each) == 1:
        return each[0]
    found = {name: value for near in each for name, value in near.latents.items()}
    gradient = torch.stack([near.gradient for near in each]).sum(0)
    return JointLinearisation(sum(near.log_joint for near in each), gradient, found, tuple(each))


def linearise_both_ways(
    there: Sequence[Term], back: Sequence[Term], lattice: Grid, velocity: Tensor, latents: Mapping[str, Tensor] | None = None
) -> JointLinearisation:
    """The mean of two log likelihoods, of the fixed image (and what else is observed) given the moving one and of the moving one given the fixed one
    carried by exp(−v): neither image is the reference, and with the two exchanged the mode is −v.

    Arguments:
        there, back: what is observed each way.
        latents: of both ways, those of the way back with ``back_`` before their names.
    """
    known = dict(latents or {})
    forward = linearise_terms(there, lattice, velocity, {name: value for name, value in known.items() if not name.startswith("back_")})
    returning = {name.removeprefix("back_"): value for name, value in known.items() if name.startswith("back_")}
    reverse = linearise_terms(back, lattice, -velocity, returning)
    return JointLinearisation(
        (forward.log_joint + reverse.log_joint) / 2,
        (forward.gradient - reverse.gradient) / 2,
        forward.latents | {f"back_{name}": value for name, value in reverse.latents.items()},
        (forward, reverse),
        0.5,
    )
