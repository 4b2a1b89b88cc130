"""The evidence of a smooth field's model: what its mode and the curvature there say of log p(data).

With H the Gauss–Newton Hessian of the log likelihood at the mode v̂ of log p(data | v) + log p(v), Laplace's method gives

.. math::
    \\log p(f) \\approx \\log p(f \\mid \\hat v) - \\tfrac12 (\\hat v - \\mu)^T \\Lambda (\\hat v - \\mu)
        - \\tfrac12 \\log \\left| I + \\Lambda^{-1/2} H \\Lambda^{-1/2} \\right|

which is exact where the data are linear in the field and their noise is Gaussian. The normalisers of the prior and of the posterior, hundreds of
thousands of nats each, never appear by themselves. Of the determinant, a preconditioner P = F Fᵀ has most in closed form; what is left is the trace
of log F⁻¹ (H + Λ) F⁻ᵀ, from random signs z: E[zᵀ log(A) z], each by Lanczos' quadrature.

References: Tierney & Kadane, JASA 1986; Ubaru, Chen & Saad, SIAM J. Matrix Anal. 2017 (stochastic Lanczos quadrature); Wenger et al., ICML 2022
(with a preconditioner).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from probmed.fields import GaussianField
from probmed.inference.gauss_newton import Quadratic
from probmed.inference.laplace import LinearMap, field_preconditioner, with_prior


@dataclass(frozen=True)
class Estimate:
    """value and the standard error that random probes leave in it, nats."""

    value: float
    error: float


def log_evidence(
    near: Quadratic,
    prior: GaussianField,
    field: Tensor,
    probes: int = 8,
    generator: torch.Generator | None = None,
    tolerance: float = 0.5,
    iterations: int = 100,
    **options: int,
) -> Estimate:
    """Laplace's approximation of log ∫ p(data | v) p(v) dv, nats. The likelihood is ``near``'s: tempered, and with whatever else it depends on held
    where it was maximised, whose log prior is a part of it.

    Arguments:
        near: the quadratic at the mode; field: the mode, ``(d, *shape)``.
        probes: of the determinant; the standard error falls as one over their root.
        tolerance, iterations: as ``log_form``; options: of ``field_preconditioner``.

    Raises:
        ValueError: for fewer than two probes, which would leave the error unknown.
    """
    departure = field - prior.loc
    penalty = 0.5 * float((departure * prior.precision_matvec(departure)).sum())
    determinant = log_determinant(near, prior, probes, generator, tolerance, iterations, **options)
    return Estimate(near.log_joint - penalty - 0.5 * determinant.value, 0.5 * determinant.error)


def log_determinant(
    near: Quadratic,
    prior: GaussianField,
    probes: int = 8,
    generator: torch.Generator | None = None,
    tolerance: float = 0.5,
    iterations: int = 100,
    **options: int,
) -> Estimate:
    """log |I + Λ^-½ H Λ^-½|, nats: twice the logarithm of how much smaller the posterior's volume is than the prior's.

    Arguments as ``log_evidence``.
    """
    if probes < 2:
        raise ValueError(f"expected two probes or more, got {probes}")
    precision, preconditioner = with_prior(near.precision, prior), field_preconditioner(near.blocks(), prior, **options)

    def whitened(x: Tensor) -> Tensor:
        return preconditioner.forward_solve(precision(preconditioner.backward_solve(x[None])))[0]

    found = []
    for _ in range(probes):  # one at a time: a batch would hold as many images
        white = torch.randn(prior.event_shape, generator=generator, dtype=near.gradient.dtype, device=near.gradient.device)
        found.append(log_form(whitened, torch.where(white < 0, -1.0, 1.0).to(white), tolerance, iterations))
    each = torch.tensor(found, dtype=torch.float64)
    return Estimate(preconditioner.log_det + float(each.mean()), float(each.std()) / math.sqrt(probes))


def log_form(matvec: LinearMap, probe: Tensor, tolerance: float = 0.5, iterations: int = 100) -> float:
    """zᵀ log(A) z of a symmetric positive definite A, by Lanczos' quadrature (Golub & Meurant, 2010).

    Arguments:
        matvec: A x, of tensors like ``probe``, z.
        tolerance: it stops where two further steps change the result by less, or by less than rounding does.
        iterations: at most.
    """
    weight = float(probe.double().square().sum())
    enough = max(tolerance, 4 * torch.finfo(probe.dtype).eps * weight)
    direction, before = probe / weight**0.5, torch.zeros_like(probe)
    diagonal: list[float] = []
    beside: list[float] = []
    values: list[float] = []
    for _ in range(min(iterations, probe.numel())):
        image = matvec(direction)
        if beside:
            image = image - beside[-1] * before
        diagonal.append(float((image * direction).sum()))
        image = image - diagonal[-1] * direction
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if beside:
            off = torch.tensor(beside, dtype=torch.float64)
            matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
        nodes, vectors = torch.linalg.eigh(matrix)
        values.append(weight * float((vectors[0] ** 2 * nodes.clamp_min(torch.finfo(torch.float64).tiny).log()).sum()))
        length = float(image.norm())
        # Nothing new: what the probe touches is an invariant space, and the quadrature is exact.
        if length <= 1e-6 * abs(diagonal[-1]) or (len(values) > 2 and max(abs(values[-1] - v) for v in values[-3:-1]) < enough):
            break
        beside.append(length)
        before, direction = direction, image / length
    return values[-1]
