"""Gauss–Newton on a smooth field: the mode, and draws from its Laplace posterior.

With g the gradient of the log likelihood in a field v and H its Gauss–Newton Hessian, a step solves (H + Λ) δ = g − Λ v. The prior's precision Λ is
diagonal in the DCT, H is local: conjugate gradients preconditioned by (Λ + h̄ I)⁻¹, h̄ the mean curvature, take few iterations, each of two transforms.
A draw of the posterior N(v̂, (H + Λ)⁻¹) is the solution for a right-hand side H^½ η + Λ^½ ξ with η, ξ white. A step may leave broad directions to the
next, a draw may not: there the preconditioner is ``field_preconditioner``.

References: Ashburner & Friston, NeuroImage 2011 (Gauss–Newton for diffeomorphisms); Papandreou & Yuille, NIPS 2010 (perturb and solve).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from probmed.fields import GaussianField, dct, idct
from probmed.inference.laplace import conjugate_gradients, field_preconditioner, with_prior

_SHRINKINGS = 10


class Quadratic(Protocol):
    """A log likelihood near a field: its value (nats, tempered, with the log prior of whatever else was maximised), its gradient, and its
    Gauss–Newton Hessian as a product, as a root applied to white noise, and bounded by blocks ``(d, d, *shape)``."""

    @property
    def log_joint(self) -> float: ...
    @property
    def gradient(self) -> Tensor: ...
    @property
    def elements(self) -> tuple[int, ...]: ...
    def precision(self, field: Tensor) -> Tensor: ...
    def precision_root(self, white: Tensor) -> Tensor: ...
    def blocks(self) -> Tensor: ...


@dataclass(frozen=True)
class Iteration:
    """number from one; log_joint in nats, with the field's prior; gain over the one before; step: the share of the Newton step taken."""

    number: int
    log_joint: float
    gain: float
    step: float


@dataclass
class FieldMode:
    """field ``(d, *shape)``; near: the last linearisation; converged: whether the last gain fell below the tolerance."""

    field: Tensor
    near: Quadratic
    iterations: list[Iteration]
    converged: bool


def ascend_field(
    linearise: Callable[[Tensor], Quadratic],
    prior: GaussianField,
    start: Tensor,
    iterations: int = 20,
    tolerance: float = 1e-4,
    callback: Callable[[Iteration], None] | None = None,
) -> FieldMode:
    """The mode of log p(data | v) + log p(v).

    Arguments:
        linearise: the likelihood near a field; it may maximise over other latents on the way. Where it is −∞ a step is not taken.
        start: ``(d, *shape)``.
        tolerance: stop when an iteration gains fewer nats per element of the data.

    Raises:
        FloatingPointError: where the log joint is not finite at the start.
    """
    field, near = start, linearise(start)
    for _ in range(_SHRINKINGS):
        if near.log_joint != -math.inf:
            break
        # A start from elsewhere may be ruled out here, as a flow that folds on a finer lattice is; towards the mean nothing is.
        field = prior.loc + 0.8 * (field - prior.loc)
        near = linearise(field)
    value = near.log_joint + float(prior.log_prob(field))
    if not math.isfinite(value):
        raise FloatingPointError(f"the log joint is {value} at the start")
    history: list[Iteration] = []
    enough = tolerance * math.prod(near.elements)
    length = 1.0
    for number in range(1, iterations + 1):
        direction = newton_direction(near, prior, field)
        # What was too far a moment ago is likely to be so again.
        step, gain = length, -math.inf
        while step > 0.02:
            moved = field + step * direction
            candidate = linearise(moved)
            gain = candidate.log_joint + float(prior.log_prob(moved)) - value
            if gain >= 0:
                break
            step /= 2
        if not gain >= 0:
            return FieldMode(field, near, history, True)
        field, near, value = moved, candidate, value + gain
        length = min(1.0, 1.5 * step) if step == length else step
        history.append(Iteration(number, value, gain, step))
        if callback is not None:
            callback(history[-1])
        if gain < enough:
            return FieldMode(field, near, history, True)
    return FieldMode(field, near, history, False)


def newton_direction(near: Quadratic, prior: GaussianField, field: Tensor, tolerance: float = 0.05, iterations: int = 8) -> Tensor:
    """(B + Λ)⁻¹ (g − Λ (v − mean)), B the block-diagonal bound of the Hessian."""
    d, eigenvalues, blocks = len(prior.grid_shape), prior.eigenvalues, near.blocks()
    curvature = float(blocks.diagonal().mean())
    right = (near.gradient - prior.precision_matvec(field - prior.loc))[None]

    def bound(x: Tensor) -> Tensor:
        return torch.einsum("de...,be...->bd...", blocks, x)

    def precondition(x: Tensor) -> Tensor:
        return idct(dct(x, d) / (eigenvalues + curvature), d)

    return conjugate_gradients(with_prior(bound, prior), right, precondition, tolerance, iterations)[0]


def field_draws(
    near: Quadratic,
    prior: GaussianField,
    count: int,
    generator: torch.Generator | None = None,
    tolerance: float = 1e-2,
    iterations: int = 200,
    callback: Callable[[int], None] | None = None,
) -> Tensor:
    """Departures from the mode, ``(count, d, *shape)``, of covariance (H + Λ)⁻¹.

    Arguments:
        tolerance: of each draw's error relative to the draw, both in the norm of H + Λ.
        callback: called with the number of draws made so far.
    """
    like = {"dtype": near.gradient.dtype, "device": near.gradient.device}
    d, eigenvalues = len(prior.grid_shape), prior.eigenvalues
    precondition, matvec = field_preconditioner(near.blocks(), prior), with_prior(near.precision, prior)
    draws = []
    for _ in range(count):  # one at a time: a batch would hold as many images
        eta = torch.randn(1, *near.elements, generator=generator, **like)  # type: ignore[call-overload]
        xi = torch.randn(1, *prior.event_shape, generator=generator, **like)  # type: ignore[call-overload]
        right = near.precision_root(eta) + idct(xi * eigenvalues.sqrt(), d)
        draws.append(conjugate_gradients(matvec, right, precondition, tolerance, iterations)[0])
        if callback is not None:
            callback(len(draws))
    return torch.stack(draws)
