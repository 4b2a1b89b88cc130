"""Change since a baseline visit, as a rate that people differ in: one number a person is all that the visits tell about it. Several columns of
change, such as the coefficients of a field, have the same kernels, each with a scale of its own.

.. math::
    y_{pt} - y_{pB} = \\Delta x_{pt} \\, g_p + \\varepsilon_{pt} - \\varepsilon_{pB}, \\quad
    g \\sim N\\left(m, \\textstyle\\sum_k \\tau_k K_k\\right), \\quad
    \\varepsilon_{pt} \\sim N(0, \\sigma^2), \\; \\varepsilon_{pB} \\sim N(0, \\sigma_B^2)

With R_p = σ² I + σ_B² 11ᵀ, s_p = Δxᵀ R⁻¹ Δx and b_p = Δxᵀ R⁻¹ d / s_p, the likelihood of g is N(b_p; g_p, 1/s_p) times what g is not in, so that
visits, however many and irregular, cost nothing: what is left is b ~ N(m, Σ τ_k K_k + diag 1/s), of the size of the number of people. In column j all
variances are multiplied by λ_j, the columns are independent, Cov = Λ ⊗ (Σ τ_k K_k + diag 1/s), and one factor serves them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

_LOG_2PI = math.log(2 * math.pi)


class Factor(Protocol):
    """M = Σ_k τ_k K_k + diag(w), ready for use."""

    def solve(self, x: Tensor) -> Tensor:
        """M⁻¹ x, ``(P, columns)``."""
        ...

    def logdet(self) -> Tensor: ...


class Relationship(Protocol):
    """Kernels between P people."""

    @property
    def people(self) -> int: ...
    @property
    def components(self) -> int: ...

    def plus(self, variances: Tensor, diagonal: Tensor) -> Factor:
        """Σ_k τ_k K_k + diag(w) of ``(K,)`` and ``(P,)``."""
        ...

    def product(self, component: int, x: Tensor) -> Tensor:
        """K_k x, ``(P, columns)``."""
        ...

    def diagonal(self, component: int) -> Tensor:
        """Of K_k, ``(P,)``."""
        ...

    def draw(self, variances: Tensor, count: int) -> Tensor:
        """From N(0, Σ_k τ_k K_k), ``(P, count)``."""
        ...


@dataclass(frozen=True)
class _Cholesky:
    root: Tensor

    def solve(self, x: Tensor) -> Tensor:
        return torch.cholesky_solve(x, self.root)

    def logdet(self) -> Tensor:
        return 2 * self.root.diagonal().log().sum()


@dataclass(frozen=True)
class _Spectral:
    """τ Q diag(λ) Qᵀ + c I; values: τ λ + c."""

    values: Tensor
    vectors: Tensor

    def solve(self, x: Tensor) -> Tensor:
        return self.vectors @ ((self.vectors.mT @ x) / self.values[:, None])

    def logdet(self) -> Tensor:
        return self.values.log().sum()


@dataclass(frozen=True)
class DenseKernels:
    """Kernels as matrices, for up to some five thousand people: time is that of a Cholesky factor, or, of one kernel and a constant diagonal, of one
    decomposition for all factors.

    Arguments:
        matrices: ``(K, P, P)``, symmetric and positive semi-definite.
    """

    matrices: Tensor

    def __post_init__(self) -> None:
        if self.matrices.ndim != 3 or self.matrices.shape[1] != self.matrices.shape[2]:
            raise ValueError(f"expected matrices (K, P, P), got {tuple(self.matrices.shape)}")
        if not torch.allclose(self.matrices, self.matrices.mT, atol=1e-8 * float(self.matrices.abs().max())):
            raise ValueError("expected symmetric matrices, got some that are not")

    @property
    def people(self) -> int:
        return self.matrices.shape[1]

    @property
    def components(self) -> int:
        return self.matrices.shape[0]

    @cached_property
    def _decomposed(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.matrices[0])
        return values.clamp_min(0), vectors

    def plus(self, variances: Tensor, diagonal: Tensor) -> Factor:
        if self.components == 1 and bool((diagonal == diagonal[0]).all()):
            values, vectors = self._decomposed
            # Their mean, for each has its part in the gradient.
            return _Spectral(variances[0] * values + diagonal.mean(), vectors)
        return _Cholesky(torch.linalg.cholesky(torch.tensordot(variances, self.matrices, 1) + diagonal.diag()))

    def product(self, component: int, x: Tensor) -> Tensor:
        return self.matrices[component] @ x

    def diagonal(self, component: int) -> Tensor:
        return self.matrices[component].diagonal()

    def draw(self, variances: Tensor, count: int) -> Tensor:
        values, vectors = torch.linalg.eigh(torch.tensordot(variances, self.matrices, 1))
        return vectors @ (values.clamp_min(0).sqrt()[:, None] * torch.randn(len(values), count).to(values))


@dataclass(frozen=True)
class _Woodbury:
    """diag(w) + U Uᵀ."""

    diagonal: Tensor
    features: Tensor
    root: Tensor

    @classmethod
    def of(cls, diagonal: Tensor, features: Tensor) -> _Woodbury:
        capacitance = features.mT @ (features / diagonal[:, None])
        return cls(diagonal, features, torch.linalg.cholesky(capacitance + torch.eye(len(capacitance)).to(capacitance)))

    def solve(self, x: Tensor) -> Tensor:
        first = x / self.diagonal[:, None]
        return first - self.features @ torch.cholesky_solve(self.features.mT @ first, self.root) / self.diagonal[:, None]

    def logdet(self) -> Tensor:
        return self.diagonal.log().sum() + 2 * self.root.diagonal().log().sum()


@dataclass(frozen=True)
class FeatureKernels:
    """Kernels K_k = F_k F_kᵀ of few features, for any number of people: time P H² + H³ with H features in all.

    Arguments:
        features: ``(P, H_k)`` of each kernel.
    """

    features: tuple[Tensor, ...]

    @property
    def people(self) -> int:
        return len(self.features[0])

    @property
    def components(self) -> int:
        return len(self.features)

    def plus(self, variances: Tensor, diagonal: Tensor) -> Factor:
        scales = [tau.sqrt() for tau in variances.clamp_min(1e-300)]
        return _Woodbury.of(diagonal, torch.cat([scale * f for scale, f in zip(scales, self.features, strict=True)], 1))

    def product(self, component: int, x: Tensor) -> Tensor:
        return self.features[component] @ (self.features[component].mT @ x)

    def diagonal(self, component: int) -> Tensor:
        return self.features[component].square().sum(1)

    def draw(self, variances: Tensor, count: int) -> Tensor:
        parts = [tau.sqrt() * f @ torch.randn(f.shape[1], count).to(f) for tau, f in zip(variances, self.features, strict=True)]
        return torch.stack(parts).sum(0)


@dataclass(frozen=True)
class FollowUps:
    """When people were seen again.

    Arguments:
        delta: Δx since each person's baseline, ``(N,)``, not 0.
        subject: index of the person, ``(N,)``.
        people: P; a person without a follow-up tells nothing and is predicted from the others.
    """

    delta: Tensor
    subject: Tensor
    people: int

    def __post_init__(self) -> None:
        if self.delta.shape != self.subject.shape or self.delta.ndim != 1:
            raise ValueError(f"expected delta and subject (N,), got {tuple(self.delta.shape)} and {tuple(self.subject.shape)}")
        if not bool(self.delta.isfinite().all()) or bool((self.delta == 0).any()):
            raise ValueError("expected finite times since baseline other than 0, got some that are not")
        if len(self.subject) and (int(self.subject.min()) < 0 or int(self.subject.max()) >= self.people):
            raise ValueError(f"expected subjects in [0, {self.people}), got {int(self.subject.min())} to {int(self.subject.max())}")

    def __len__(self) -> int:
        return len(self.delta)

    def only(self, chosen: Tensor) -> FollowUps:
        """Some of the visits, of ``(N,)`` bool."""
        return FollowUps(self.delta[chosen], self.subject[chosen], self.people)

    def sums(self, values: Tensor) -> Tensor:
        """Of ``(N, *size)`` by person, ``(P, *size)``."""
        return values.new_zeros(self.people, *values.shape[1:]).index_add(0, self.subject, values)


@dataclass(frozen=True)
class Collapsed:
    """What visits say of each person's rate, N(slope; g, 1 / precision) in every column, and the rest of their density.

    Arguments:
        seen: persons with a follow-up, ``(S,)`` indices; slope: ``(S, J)``; precision: ``(S,)``.
        squares: what is left of dᵀR⁻¹d beside the slopes, ``(J,)``.
        constant: log density of the rest of a column less those squares' part, nats.
    """

    seen: Tensor
    slope: Tensor
    precision: Tensor
    squares: Tensor
    constant: Tensor


def collapse(visits: FollowUps, change: Tensor, noise: Tensor, baseline: Tensor) -> Collapsed:
    """The visits of each person as one number a column, exactly.

    Arguments:
        change: d = y_t − y_B, ``(N,)`` or ``(N, J)``.
        noise, baseline: σ² and σ_B².
    """
    change = change.reshape(len(visits), -1)
    delta = visits.delta.to(change)
    count = visits.sums(torch.ones_like(delta))
    seen = (count > 0).nonzero()[:, 0]
    count, x, xx = (v[seen] for v in (count, visits.sums(delta), visits.sums(delta**2)))
    d, xd, dd = (visits.sums(v)[seen] for v in (change, delta[:, None] * change, change**2))
    # R⁻¹ = (I − ρ 11ᵀ) / σ²
    rho = baseline / (noise + count * baseline)
    precision = (xx - rho * x * x) / noise
    slope = (xd - (rho * x)[:, None] * d) / (noise * precision)[:, None]
    squares = ((dd - rho[:, None] * d * d) / noise - precision[:, None] * slope**2).sum(0)
    logdet = count * noise.log() + torch.log1p(count * baseline / noise)
    constant = 0.5 * (_LOG_2PI - precision.log() - count * _LOG_2PI - logdet).sum()
    return Collapsed(seen, slope, precision, squares, constant)


class SubjectChange(TorchDistribution):
    """Change since baseline of all visits of all people, ``(N,)`` or ``(N, J)``; where an observation is NaN, that visit is left out.

    Arguments:
        slope: mean rate m of each person, ``(P,)``, or ``(P, J)`` in J columns.
        relationship: kernels between people; variances: τ, ``(K,)``.
        visits: N of them.
        noise, baseline: σ² and σ_B².
        scales: λ of each column, ``(J,)``; one by default.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        slope: Tensor,
        relationship: Relationship,
        variances: Tensor,
        visits: FollowUps,
        noise: Tensor,
        baseline: Tensor,
        scales: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not len(slope) == relationship.people == visits.people:
            raise ValueError(f"expected one number of people, got {len(slope)}, {relationship.people} and {visits.people}")
        columns = slope.shape[1:].numel()
        if slope.ndim > 2 or (scales is not None and scales.shape != (columns,)):
            raise ValueError(f"expected slope (P,) or (P, J) and scales (J,), got {tuple(slope.shape)} and {None if scales is None else len(scales)}")
        self.slope, self.relationship, self.variances = slope, relationship, variances
        self.visits, self.noise, self.baseline = visits, noise, baseline
        self.scales = slope.new_ones(columns) if scales is None else scales
        super().__init__(torch.Size(), torch.Size([len(visits), *slope.shape[1:]]), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        known = ~value.reshape(len(self.visits), -1).isnan().any(1)
        told = collapse(self.visits.only(known), value[known], self.noise, self.baseline)
        residual = told.slope - self.slope.reshape(len(self.slope), -1)[told.seen]
        factor = among(self.relationship, told.seen).plus(self.variances, 1 / told.precision)
        squares = told.squares + (residual * factor.solve(residual)).sum(0)
        determinants = told.constant - 0.5 * (len(residual) * _LOG_2PI + factor.logdet())
        return len(self.scales) * determinants - 0.5 * (squares / self.scales + known.sum() * self.scales.log()).sum()

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        draws = [self._draw() for _ in range(torch.Size(sample_shape).numel())]
        return torch.stack(draws).reshape(*sample_shape, *self.event_shape)

    def _draw(self) -> Tensor:
        whose, columns = self.visits.subject, len(self.scales)
        rate = self.relationship.draw(self.variances, columns)
        first = self.baseline.sqrt() * torch.randn_like(rate)
        noise = self.noise.sqrt() * torch.randn_like(rate[whose])
        delta = self.visits.delta.to(rate)[:, None]
        departure = delta * rate[whose] + noise - first[whose]
        return delta * self.slope.reshape(-1, columns)[whose] + self.scales.sqrt() * departure

    def expand(self, batch_shape: Sequence[int], _instance: SubjectChange | None = None) -> SubjectChange:
        if len(batch_shape):
            raise ValueError(f"expected no batch: people are related to each other, got {tuple(batch_shape)}")
        return self


def among(relationship: Relationship, people: Tensor) -> Relationship:
    """The kernels between some of the people."""
    if len(people) == relationship.people:
        return relationship
    if isinstance(relationship, FeatureKernels):
        return FeatureKernels(tuple(f[people] for f in relationship.features))
    if isinstance(relationship, DenseKernels):
        return DenseKernels(relationship.matrices[:, people][:, :, people])
    raise TypeError(f"expected DenseKernels or FeatureKernels, got {type(relationship).__name__}")
