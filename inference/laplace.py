"""The Laplace posterior at a mode: Gauss–Newton precision plus prior, with joint draws by preconditioned conjugate gradients.

At the mode, with J the score of every independent element of the data (its log density's gradient in the latents) the posterior is nearly

.. math:: N(\\hat\\theta, (\\tau J^T J + \\Lambda)^{-1})

and a draw is the solution of (τ JᵀJ + Λ) δ = √τ Jᵀ η + Λ^½ ξ with η, ξ white: perturb, then solve. Latents come in two kinds: a dense block of
some hundreds (appearance, bias, affine), and a smooth field of many thousands, whose prior the DCT diagonalises and of which each datum sees
one node. The field's part of JᵀJ is then block-diagonal and the solve costs two DCTs an iteration.

References: Papandreou & Yuille, NIPS 2010 (perturb and solve); Tierney & Kadane, JASA 1986.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probmed.fields import GaussianField, along_axes, cosine_basis, dct, idct
from probmed.scores import Scores

LinearMap = Callable[[Tensor], Tensor]

_COARSE = 1000  # coefficients: a Cholesky factor of a fraction of a second, and its use cheaper than a DCT of a large image


def laplace_draws(
    scores: Scores, count: int, tempering: float = 1.0, generator: torch.Generator | None = None, tolerance: float = 1e-2, iterations: int = 200
) -> tuple[Tensor, Tensor | None]:
    """Draws of the departure from the mode.

    Arguments:
        count: draws; tempering: τ on the data's part.
        tolerance: of each draw's error, as ``conjugate_gradients``.

    Returns:
        the dense part, ``(count, P)``, and the field's, ``(count, d, *shape)`` or None.

    Raises:
        ValueError: where the dense block's precision is not positive definite.
    """
    dense = scores.dense.double()
    n, p = dense.shape
    like: dict[str, Any] = {"dtype": torch.float64, "device": dense.device}
    prior = torch.diag(scores.precision.double()) if scores.precision.ndim == 1 else scores.precision.double()
    precision = tempering * dense.T @ dense + prior
    root, failed = torch.linalg.cholesky_ex(precision)
    if int(failed):
        raise ValueError("the posterior precision of the dense block is not positive definite: the mode was not reached")
    noise = torch.randn(n, count, generator=generator, **like)
    prior_root = torch.linalg.cholesky(prior)
    right_dense = tempering**0.5 * dense.T @ noise + prior_root @ torch.randn(p, count, generator=generator, **like)
    if scores.field is None or scores.nodes is None or scores.slopes is None:
        return torch.cholesky_solve(right_dense, root).T.to(scores.dense), None

    shape, d, total = scores.field.grid_shape, scores.slopes.shape[-1], scores.field.event_shape[1:].numel()
    single: dict[str, Any] = {"dtype": torch.float32, "device": dense.device}
    slopes, nodes = scores.slopes.float(), scores.nodes
    eigenvalues = scores.field.eigenvalues.to(**single)

    def scatter(rows: Tensor) -> Tensor:
        return torch.zeros(total, *rows.shape[1:], **single).index_add_(0, nodes, rows)

    # Every array of the field is (draws, d, nodes); blocks of the data's precision are (nodes, d, d).
    blocks = tempering * scatter(slopes[:, :, None] * slopes[:, None, :])
    cross = torch.stack([scatter(tempering * slopes[:, a, None] * scores.dense.float()) for a in range(d)])  # (d, nodes, P)
    data_part = torch.stack([scatter(tempering**0.5 * slopes[:, a, None] * noise.float()) for a in range(d)]).permute(2, 0, 1)
    white = torch.randn(count, d, *shape, generator=generator, **single)
    right = data_part + idct(white * eigenvalues.sqrt(), len(shape)).flatten(2)
    by_field = field_preconditioner(blocks.permute(1, 2, 0).unflatten(-1, shape), scores.field)
    inverse_dense = torch.cholesky_inverse(root).float()

    def precision_times(x: Tensor) -> Tensor:
        """Schur complement of the dense block: (W + Λ − C A⁻¹ Cᵀ) x."""
        smooth = idct(dct(x.unflatten(-1, shape), len(shape)) * eigenvalues, len(shape)).flatten(2)
        local = torch.einsum("nab,cbn->can", blocks, x)
        seen = torch.einsum("anp,can->cp", cross, x) @ inverse_dense
        return smooth + local - torch.einsum("anp,cp->can", cross, seen)

    def precondition(x: Tensor) -> Tensor:
        return by_field(x.unflatten(-1, shape)).flatten(2)

    reduced = right - torch.einsum("anp,cp->can", cross, (inverse_dense @ right_dense.float()).T)
    solution = conjugate_gradients(precision_times, reduced, precondition, tolerance, iterations)
    pulled = torch.einsum("anp,can->pc", cross, solution).double()
    dense_draws = torch.cholesky_solve(right_dense - pulled, root).T
    return dense_draws.to(scores.dense), solution.unflatten(-1, shape)


@dataclass(frozen=True)
class FieldPreconditioner:
    """P near B + Λ, with P = F Fᵀ: exact among the field's lowest DCT coefficients, with the mean of B among the others. Calling it gives P⁻¹ x, of
    fields ``(batch, d, *shape)``.

    Arguments:
        root: Cholesky root of the lowest coefficients' block, ``(n, n)`` float64; spectrum: which they are along each axis.
        others: variance⁻¹ of the other coefficients, ``(*shape)``.
        axes: of ``shape``.
        log_det: log |P| − log |Λ|, nats.
    """

    root: Tensor
    spectrum: tuple[slice, ...]
    others: Tensor
    axes: int
    log_det: float

    def __call__(self, x: Tensor) -> Tensor:
        return self._through(x, lambda low: torch.cholesky_solve(low, self.root), 1.0)

    def forward_solve(self, x: Tensor) -> Tensor:
        """F⁻¹ x, fields on either side."""
        return self._through(x, lambda low: torch.linalg.solve_triangular(self.root, low, upper=False), 0.5)

    def backward_solve(self, x: Tensor) -> Tensor:
        """F⁻ᵀ x."""
        return self._through(x, lambda low: torch.linalg.solve_triangular(self.root.mT, low, upper=True), 0.5)

    def _through(self, x: Tensor, solve: LinearMap, power: float) -> Tensor:
        low: tuple[Any, ...] = (..., *self.spectrum)
        coefficients = dct(x, self.axes)
        broad = coefficients[low]
        solved = solve(broad.flatten(1).double().T).T.reshape(broad.shape)
        coefficients = coefficients / self.others.to(x) ** power
        coefficients[low] = solved.to(x)
        return idct(coefficients, self.axes)


def field_preconditioner(blocks: Tensor, prior: GaussianField, coarse: int = _COARSE) -> FieldPreconditioner:
    """(B + Λ)⁻¹, exact among the field's lowest DCT coefficients and with the mean of B among the others, on ``(batch, d, *shape)``.

    Where the data say nothing, the broadest directions have a precision of the prior's alone, up to a millionth of what the mean of B would make it:
    without the exact part, conjugate gradients take hundreds of iterations to find them.

    Arguments:
        blocks: of the data's precision B, ``(d, d, *shape)``.
        coarse: how many coefficients at most are treated exactly, over all channels.
    """
    shape, d, like = prior.grid_shape, prior.channels, prior.eigenvalues
    count = max(1, round((coarse / d) ** (1 / len(shape))))
    bases = [cosine_basis(n, min(n, count), torch.float64, str(like.device)) for n in shape]
    # The product of two cosines is what a block adds between their coefficients: one matrix an axis makes all of them.
    dense = along_axes(blocks.double(), [(b[:, :, None] * b[:, None, :]).flatten(1).T for b in bases])
    for axis, b in enumerate(bases):
        dense = dense.unflatten(2 + 2 * axis, (b.shape[1], b.shape[1]))
    axes = len(shape)
    dense = dense.permute(0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2)).flatten(0, axes).flatten(1)
    spectrum = tuple(slice(b.shape[1]) for b in bases)
    lowest = like[spectrum].double()
    root = torch.linalg.cholesky(dense + torch.diag(lowest.flatten().repeat(d)))
    mean = float(blocks.diagonal().mean())
    shrunk = torch.log1p(mean / like.double())
    shrunk[spectrum] = 0
    log_det = 2 * root.diagonal().log().sum() - d * lowest.log().sum() + d * shrunk.sum()
    return FieldPreconditioner(root, spectrum, like + mean, axes, float(log_det))


def with_prior(hessian: LinearMap, prior: GaussianField) -> LinearMap:
    """H + Λ, on fields ``(batch, d, *shape)``. Λ's spectrum is made once, not at every product."""
    d, eigenvalues = len(prior.grid_shape), prior.eigenvalues
    return lambda x: hessian(x) + idct(dct(x, d) * eigenvalues, d)


def conjugate_gradients(
    matvec: LinearMap, right: Tensor, precondition: LinearMap, tolerance: float = 1e-6, iterations: int = 200
) -> Tensor:
    """Solve A x = b for a batch of right-hand sides ``(batch, ...)`` with a symmetric positive definite A.

    Arguments:
        matvec, precondition: linear maps of the batch.
        tolerance: of each residual relative to its right-hand side, in the norm of the preconditioner. The nearer that is to A⁻¹, the nearer is this
            the error of x in the norm of A, in which a posterior's broad and narrow directions count alike. In the plain norm the broad ones, which
            are what regions move by, would hardly count.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(-1).reshape(-1, *[1] * (a.ndim - 1))

    x = torch.zeros_like(right)
    residual = right.clone()
    direction = z = precondition(residual)
    rho = dot(residual, z)
    goal = tolerance**2 * rho
    for _ in range(iterations):
        if bool((rho <= goal).all()):
            break
        image = matvec(direction)
        step = rho / dot(direction, image).clamp_min(torch.finfo(right.dtype).tiny)
        x = x + step * direction
        residual = residual - step * image
        z = precondition(residual)
        rho_next = dot(residual, z)
        direction = z + rho_next / rho.clamp_min(torch.finfo(right.dtype).tiny) * direction
        rho = rho_next
    return x
