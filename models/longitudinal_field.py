"""p(c | β, λ, τ, σ; G, C, φ) p(β) p(λ) p(τ) p(σ): how a body deforms from baseline to follow-up, explained by genes, clinic and phenotype.

.. math::
    I_{pt} = I_{pB} \\circ \\exp(-\\Delta x_{pt} \\, w_p), \\quad
    g_p(x) = (D \\varphi_p(x))^{-1} \\, w_p(\\varphi_p(x)), \\quad
    g_p = \\textstyle\\sum_j c_{pj} b_j, \\\\
    c_{pj} = x_p^T \\beta_j + \\textstyle\\sum_k h_{kj}(p), \\quad
    h_{kj} \\sim N(0, \\lambda_j \\tau_k K_k)

w_p, mm per year, is the velocity of person p's body in the space of the baseline scan, and φ_p takes an atlas's points there, so that g_p is the same
flow seen in the atlas, φ_p⁻¹ ∘ exp(w_p) ∘ φ_p = exp(g_p). There all people have one basis b of fields, in which a visit's log velocity is Δx c plus
noise. Each coefficient follows the model of a scalar; the kernels and their shares are common to all of them, the scales λ are their own.

References: Dalca et al., MICCAI 2015; Arsigny et al., MICCAI 2006 (logarithms of diffeomorphisms); Lorenzi & Pennec, IJCV 2013 (their transport).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import pyro
import torch
from pyro.distributions import HalfCauchy, Normal
from torch import Tensor

from probmed.fields import GaussianField, analyse, synthesise
from probmed.grids import Grid, sample
from probmed.models.longitudinal import Longitudinal
from probmed.slopes import FollowUps, Relationship, SubjectChange
from probmed.transforms import Transform, Velocity, determinant, physical_gradient

_STEEPEST = 10.0  # norm of (Dφ)⁻¹; beyond it, as where φ folds, a vector would be a spike


class LongitudinalField(Longitudinal):
    """Rates of change of people's coefficients.

    Sites: ``coefficients``, β, ``(q, J)``; ``scales``, √λ, ``(J,)``; ``components``, √τ, ``(K,)``; ``noise``, σ; ``baseline_noise``, σ_B, where it is
    free; ``change``, ``(N, J)``, observed where given. τ and σ² are relative to λ.

    Arguments:
        columns: J.
        column_scale: prior scale of √λ, in the coefficients' unit: their half Cauchy's. The others are those of ``Longitudinal``.
    """

    def __init__(
        self,
        columns: int,
        column_scale: float = 1.0,
        scale: float = 1.0,
        noise_scale: float = 1.0,
        coefficient_sd: float = 10.0,
        baseline: str = "same",
    ) -> None:
        super().__init__(scale, noise_scale, coefficient_sd, baseline)
        if columns < 1 or not column_scale > 0:
            raise ValueError(f"expected a positive number of columns and a positive scale, got {columns} and {column_scale}")
        self.columns, self.column_scale = columns, column_scale

    def forward(self, design: Tensor, relationship: Relationship, visits: FollowUps, change: Tensor | None = None) -> Tensor:
        """
        Arguments:
            design: x, ``(P, q)``, a column of ones first.
        """
        one = design.new_ones(())
        prior = Normal(design.new_zeros(design.shape[1], self.columns), self.coefficient_sd * one).to_event(2)
        coefficients = pyro.sample("coefficients", prior)
        scales = pyro.sample("scales", HalfCauchy(self.column_scale * one.expand(self.columns)).to_event(1))
        distribution = SubjectChange(design @ coefficients, relationship, *self.draw_variances(relationship, visits, one), scales=scales**2)
        return pyro.sample("change", distribution, obs=change)


class Transport:
    """The adjoint action of a map: (Dφ)⁻¹ w ∘ φ for any velocity w, so that φ⁻¹ ∘ exp(w) ∘ φ = exp of it.

    Arguments:
        transform: φ, from the world of ``grid`` to that of the velocities, mm.
        grid: where the result is wanted.
    """

    def __init__(self, transform: Transform, grid: Grid) -> None:
        self.grid = grid
        self.points = transform(grid.coordinates())
        jacobian = physical_gradient(self.points, grid)
        regular = determinant(jacobian) > torch.finfo(jacobian.dtype).eps
        inverse = torch.linalg.inv(torch.where(regular[..., None, None], jacobian, torch.eye(grid.ndim).to(jacobian)))
        regular &= inverse.flatten(-2).norm(dim=-1) < _STEEPEST
        self._inverse = inverse * regular[..., None, None]

    def __call__(self, velocity: Velocity) -> Velocity:
        """Zero where φ leaves the velocity's grid, and where it folds."""
        there = sample(velocity.field.to(self.points), velocity.grid, self.points, fill=0.0).movedim(0, -1)
        return Velocity(self.grid, (self._inverse @ there[..., None])[..., 0].movedim(-1, 0))


class FieldBasis(Protocol):
    """b: J vector fields on a grid."""

    @property
    def grid(self) -> Grid: ...

    @property
    def columns(self) -> int:
        """J."""
        ...

    def coefficients(self, fields: Tensor) -> Tensor:
        """Of fields ``(N, d, *shape)``, ``(N, J)`` float64: of their projection onto the basis."""
        ...

    def fields(self, coefficients: Tensor) -> Tensor:
        """Σ_j c_j b_j, ``(N, d, *shape)``."""
        ...


@dataclass(frozen=True, eq=False)
class PrincipalFields:
    """Orthogonal fields whose mean square over the grid is 1 mm², so that coefficients are in mm.

    Arguments:
        vectors: b, ``(J, d, *grid.shape)``.
    """

    grid: Grid
    vectors: Tensor

    @property
    def columns(self) -> int:
        return len(self.vectors)

    def coefficients(self, fields: Tensor) -> Tensor:
        return (fields.flatten(1).to(self.vectors) @ self.vectors.flatten(1).mT / self.grid.numel).double()

    def fields(self, coefficients: Tensor) -> Tensor:
        return torch.tensordot(coefficients.to(self.vectors), self.vectors, 1)


@dataclass(frozen=True, eq=False)
class CosineFields:
    """The lowest cosines along each axis, whitened by a Gaussian field: where that is the prior, coefficients are N(0, 1).

    Arguments:
        prior: of one component of a field on ``grid``.
        counts: cosines along each axis; J = d Π counts.
    """

    grid: Grid
    prior: GaussianField
    counts: tuple[int, ...]

    @classmethod
    def of(cls, grid: Grid, finest_mm: float, length_mm: float = 10.0) -> CosineFields:
        """Those of half a wavelength of ``finest_mm`` and more; length_mm: of the prior."""
        counts = [max(1, min(n, round(n * h / finest_mm))) for n, h in zip(grid.shape, grid.spacing, strict=True)]
        return cls(grid, GaussianField.from_sd(grid.shape, grid.spacing, 1.0, length_mm), tuple(counts))

    @property
    def columns(self) -> int:
        return self.grid.ndim * self._root.numel()

    @cached_property
    def _root(self) -> Tensor:
        return self.prior.eigenvalues[tuple(slice(n) for n in self.counts)].sqrt()

    def coefficients(self, fields: Tensor) -> Tensor:
        return (analyse(fields, self.counts) * self._root.to(fields)).flatten(1).double()

    def fields(self, coefficients: Tensor) -> Tensor:
        return synthesise(coefficients.to(self._root).reshape(-1, self.grid.ndim, *self.counts) / self._root, self.grid.shape)
