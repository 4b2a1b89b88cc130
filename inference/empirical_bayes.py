"""Empirical Bayes: strength and length of a smooth field's prior by the evidence of the data that the field explains.

With λ_k the prior's precision of the field's k-th DCT coefficient v_k and Σ = (H + Λ)⁻¹ the posterior's covariance at the mode, the evidence's
derivative (Laplace's, H held) in any parameter of the prior is

.. math::
    \\frac{\\partial \\log p}{\\partial \\theta}
        = \\tfrac12 \\sum_k \\frac{\\partial \\log \\lambda_k}{\\partial \\theta} \\left(\\gamma_k - \\lambda_k \\hat v_k^2\\right),
    \\qquad \\gamma_k = 1 - \\lambda_k \\Sigma_{kk} = (H \\Sigma)_{kk}

γ_k is how much of a coefficient the data determine. A round holds γ and v̂ and sets that to zero, which is the maximum of
Σ_k (γ_k log λ_k − λ_k v̂_k²) / 2; of the strength alone it is MacKay's λ ← λ Σ_k γ_k / Σ_k λ_k v̂_k². EM has the same fixed points, but of a field
whose data determine one per cent it takes hundreds of rounds. γ comes from E[x (Σ x)ᵀ] = H Σ with x = H^½ η, η white: one solve a probe, and a noise
that is as small as γ.

References: MacKay, Neural Computation 1992; Tipping & Faul, AISTATS 2003.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from probmed.fields import GaussianField, dct
from probmed.inference.gauss_newton import FieldMode, Quadratic
from probmed.inference.laplace import conjugate_gradients, field_preconditioner, with_prior

_MOST = math.log(10.0)  # by which a round changes the standard deviation or the length


@dataclass(frozen=True)
class Scales:
    """Of a ``GaussianField.from_sd``: marginal standard deviation and correlation length, in the field's unit and mm."""

    sd: float
    length_mm: float

    def prior(self, like: GaussianField) -> GaussianField:
        """On the grid, with the smoothness, channels and mean of another field."""
        sd, length = (torch.tensor(value, dtype=like.strength.dtype, device=like.strength.device) for value in (self.sd, self.length_mm))
        return GaussianField.from_sd(like.grid_shape, like.spacing, sd, length, like.alpha, like.channels).about(like.loc)


@dataclass(frozen=True)
class Learned:
    """scales; mode: under their prior; rounds: how many it took; converged: whether the last changed both by less than the tolerance."""

    scales: Scales
    mode: FieldMode
    rounds: int
    converged: bool


def determined(
    near: Quadratic,
    prior: GaussianField,
    probes: int = 8,
    generator: torch.Generator | None = None,
    tolerance: float = 1e-2,
    iterations: int = 200,
) -> Tensor:
    """γ, ``(*shape)``, of the DCT coefficients, summed over channels: an unbiased estimate, whose sum has a variance of at most 2 Σ γ / probes.

    Arguments:
        probes: solves. tolerance, iterations: of each, as ``field_draws``.
    """
    precision, preconditioner = with_prior(near.precision, prior), field_preconditioner(near.blocks(), prior)
    axes, total = len(prior.grid_shape), torch.zeros_like(prior.eigenvalues)
    for _ in range(probes):  # one at a time: a batch would hold as many images
        white = torch.randn(1, *near.elements, generator=generator, dtype=near.gradient.dtype, device=near.gradient.device)
        pulled = near.precision_root(white)
        solved = conjugate_gradients(precision, pulled, preconditioner, tolerance, iterations)
        total = total + (dct(pulled, axes) * dct(solved, axes))[0].sum(0)
    return total / probes


def fitted_scales(gamma: Tensor, field: Tensor, prior: GaussianField, scales: Scales, length: bool = True) -> Scales:
    """One round: where the evidence's derivative vanishes, γ and the mode held.

    Arguments:
        gamma: ``(*shape)``, of ``determined``; field: the mode, ``(d, *shape)``.
        prior: of the mode, whose scales these are.
        length: whether the length is learned as well.
    """
    axes = len(prior.grid_shape)
    squares = (dct(field - prior.loc, axes).double() ** 2).sum(0)
    weight = gamma.double()

    def loss(logs: np.ndarray) -> float:
        there = Scales(math.exp(logs[0]), math.exp(logs[1]) if length else scales.length_mm)
        # Only the spectrum is needed, in double precision.
        like = GaussianField(prior.grid_shape, prior.spacing, torch.ones((), dtype=torch.float64), 1.0, prior.alpha, prior.channels)
        eigenvalues = there.prior(like).eigenvalues.to(weight.device)
        return float((eigenvalues * squares - weight * eigenvalues.log()).sum()) / 2

    start = [math.log(scales.sd), math.log(scales.length_mm)][: 1 + length]
    longest = math.log(max(n * h for n, h in zip(prior.grid_shape, prior.spacing, strict=True)))
    shortest = math.log(min(prior.spacing) / 4)
    ends = [(start[0] - _MOST, start[0] + _MOST), *([(max(start[1] - _MOST, shortest), min(start[1] + _MOST, longest))] if length else [])]
    found = minimize(loss, start, method="L-BFGS-B", bounds=ends).x
    return Scales(math.exp(found[0]), math.exp(found[1]) if length else scales.length_mm)


def learn_scales(
    ascend: Callable[[GaussianField, Tensor], FieldMode],
    like: GaussianField,
    start: Tensor,
    scales: Scales,
    *,
    length: bool = True,
    rounds: int = 20,
    probes: int = 8,
    tolerance: float = 0.02,
    generator: torch.Generator | None = None,
) -> Learned:
    """The scales of most evidence, and the mode there: in turn the mode under given scales, and the scales by ``fitted_scales``.

    Arguments:
        ascend: the mode under a prior, from a start.
        like: a prior with the grid, smoothness, channels and mean of the field. start: ``(d, *shape)``. scales: the first.
        length: whether the length is learned, and not the standard deviation alone.
        rounds: at most. probes: of each round's γ, the same noise in every round, so that it comes to rest.
        tolerance: it stops where both logarithms change by less.

    Raises:
        ValueError: where the data determine nothing, so that the evidence has no maximum.
    """
    seed = int(torch.randint(2**62, (), generator=generator, device=None if generator is None else generator.device))
    mode, converged, number = ascend(scales.prior(like), start), False, 0
    while number < rounds and not converged:
        number += 1
        prior = scales.prior(like)
        gamma = determined(mode.near, prior, probes, torch.Generator(mode.field.device).manual_seed(seed))
        if not float(gamma.sum()) > 1:
            raise ValueError(f"expected data that determine the field, got some that determine {float(gamma.sum()):.2g} of its coefficients")
        before, scales = scales, fitted_scales(gamma, mode.field, prior, scales, length)
        change = max(abs(math.log(scales.sd / before.sd)), abs(math.log(scales.length_mm / before.length_mm)))
        mode, converged = ascend(scales.prior(like), mode.field), change < tolerance
    return Learned(scales, mode, number, converged)
