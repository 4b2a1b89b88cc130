"""Covariances of many visits of many people: a stacked low-rank root plus a block for each person, by Woodbury's identity.

.. math:: \\Sigma = Z \\,\\mathrm{diag}(v)\\, Z^T + B, \\quad B = \\mathrm{blockdiag}(B_p), \\quad M = I + \\sqrt v\\, Z^T B^{-1} Z \\sqrt v
          \\;\\Rightarrow\\; \\log|\\Sigma| = \\log|B| + \\log|M|, \\quad
          \\Sigma^{-1} = B^{-1} - B^{-1} Z \\sqrt v\\, M^{-1} \\sqrt v\\, Z^T B^{-1}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from gpytorch.kernels import Kernel
from linear_operator import to_dense
from torch import Tensor

_CHUNK = 1 << 14  # rows at a time where Z is whitened: bounds the memory of (rows, H) intermediates
_PANEL = 128  # features at a time in a symmetric product: what lies left of the panel is known already


@dataclass(frozen=True)
class Visits:
    """Which rows are one person's, with people of as many visits together, so that their blocks are one batch.

    Arguments:
        order: ``(N,)`` rows of the table, sorted by the number of visits of their person, then by person, then as they come.
        people: ``(P,)`` the persons in that order, as positions in the sorted distinct subjects.
        groups: (T, how many people have T visits), by rising T.
    """

    order: Tensor
    people: Tensor
    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, subjects: Tensor) -> Visits:
        """From the subject of each row, ``(N,)``; numbers of any kind.

        >>> Visits.of(torch.tensor([5, 2, 5, 9])).groups
        ((1, 2), (2, 1))
        """
        if subjects.ndim != 1 or not len(subjects):
            raise ValueError(f"expected the subject of each row, (N,), got {tuple(subjects.shape)}")
        _, person, counts = subjects.unique(return_inverse=True, return_counts=True)
        by_person = person.argsort(stable=True)
        order = by_person[counts[person[by_person]].argsort(stable=True)]
        sizes, people = counts.unique(return_counts=True)
        return cls(order, counts.argsort(stable=True), tuple(zip(sizes.tolist(), people.tolist(), strict=True)))

    @cached_property
    def in_order(self) -> bool:
        """Whether the table's rows already are in this order."""
        return bool((self.order == torch.arange(len(self.order), device=self.order.device)).all())

    def sorted(self, rows: Tensor) -> Tensor:
        """``(N, …)`` in this order; the same tensor, not a copy, where it already is."""
        return rows if self.in_order else rows[self.order]

    def unsorted(self, rows: Tensor) -> Tensor:
        """``(N, …)`` back in the table's order."""
        return rows if self.in_order else rows[self.order.argsort()]

    def batches(self, rows: Tensor) -> list[Tensor]:
        """Sorted rows ``(N, …)`` as one ``(people, T, …)`` a group."""
        pieces = rows.split([visits * people for visits, people in self.groups])
        return [piece.unflatten(0, (people, visits)) for piece, (visits, people) in zip(pieces, self.groups, strict=True)]

    def blocks(self, kernel: Kernel, x: Tensor, noise: Tensor) -> list[Tensor]:
        """B_p = k(x_p, x_p) + noise · I of a kernel of single people's visits, one ``(people, T, T)`` a group.

        Arguments:
            kernel: of time, without ``SameSubject``: only visits of one person meet.
            x: ``(N, D)`` in the table's order, times for instance.
            noise: variance, ``()``.
        """
        blocks = []
        for batch in self.batches(self.sorted(x)):
            eye = torch.eye(batch.shape[1], dtype=noise.dtype, device=noise.device)
            blocks.append(to_dense(kernel(batch)) + noise * eye)
        return blocks


class _Capacitance:
    """M = I + √v G √v for G = ZᵀB⁻¹Z, factorised once."""

    def __init__(self, gram: Tensor, variances: Tensor) -> None:
        self.scale = variances.sqrt()
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        self.root = torch.linalg.cholesky(eye + self.scale.unsqueeze(-1) * gram * self.scale)

    def logdet(self) -> Tensor:
        return 2 * self.root.diagonal().log().sum()

    def whiten(self, cross: Tensor) -> Tensor:
        """M^(−½) √v c, ``(H, C)``."""
        return torch.linalg.solve_triangular(self.root, self.scale.unsqueeze(-1) * cross, upper=False)

    def solve(self, cross: Tensor) -> Tensor:
        """√v M⁻¹ √v c, ``(H, C)``."""
        return self.scale.unsqueeze(-1) * torch.cholesky_solve(self.scale.unsqueeze(-1) * cross, self.root)


def _gaussian_log_density(squares: Tensor, logdet: Tensor, rows: int) -> Tensor:
    return -0.5 * (squares + logdet + rows * math.log(2 * math.pi))


class StackedCovariance:
    """Σ = Z diag(v) Zᵀ + blockdiag(B_p): low-rank terms, stacked as one root with a variance for each feature, plus a block for each person.

    An object is for one value of the parameters: make another for the next. Time N H² + Σ T_p³ + H³ and memory that of Z: ZᵀB⁻¹Z is summed over
    chunks of people, and again for its gradient. Where rows are not in the visits' own order each object has a sorted copy of Z, so sort a large
    table once (``Visits.order``). Everything differentiates in v, the blocks, Z and the right-hand side; variances must be positive where their
    gradient is wanted.

    Arguments:
        features: Z, ``(N, H)``, as ``stacked_features`` gives.
        variances: v, ``(H,)``.
        visits: whose rows are whose.
        blocks: B_p, one ``(people, T, T)`` a group of ``visits``, as ``Visits.blocks`` gives; positive definite.

    Raises:
        ValueError: where shapes do not fit.

    >>> visits = Visits.of(torch.tensor([0, 0, 1]))
    >>> blocks = [torch.full((1, 1, 1), 2.0), 2 * torch.eye(2).unsqueeze(0)]
    >>> StackedCovariance(torch.ones(3, 1), torch.ones(1), visits, blocks).matmul(torch.tensor([1.0, 0.0, 0.0]))
    tensor([3., 1., 1.])
    """

    def __init__(self, features: Tensor, variances: Tensor, visits: Visits, blocks: Sequence[Tensor]) -> None:
        if features.ndim != 2 or len(features) != len(visits.order) or variances.shape != features.shape[1:]:
            expected = f"features ({len(visits.order)}, H) and variances (H,)"
            raise ValueError(f"expected {expected}, got {tuple(features.shape)} and {tuple(variances.shape)}")
        shapes = [(people, size, size) for size, people in visits.groups]
        if [tuple(block.shape) for block in blocks] != shapes:
            raise ValueError(f"expected blocks {shapes}, got {[tuple(block.shape) for block in blocks]}")
        self.variances, self.visits, self.blocks = variances, visits, list(blocks)
        self._rows = visits.batches(visits.sorted(features))
        self._whiteners = [_inverse_root(block) for block in self.blocks]

    @property
    def shape(self) -> torch.Size:
        rows = len(self.visits.order)
        return torch.Size((rows, rows))

    def matmul(self, x: Tensor) -> Tensor:
        """Σx of ``(N,)`` or ``(N, C)``."""
        batches = self._batches(x)
        inner = self.variances.unsqueeze(-1) * self._project(batches)
        return self._joined([b @ y + z @ inner for b, y, z in zip(self.blocks, batches, self._rows, strict=True)], x)

    def solve(self, x: Tensor) -> Tensor:
        """Σ⁻¹x of ``(N,)`` or ``(N, C)``."""
        batches = self._batches(x)
        inner = self._capacitance.solve(self._project([w.mT @ (w @ y) for w, y in zip(self._whiteners, batches, strict=True)]))
        rest = [y - z @ inner for y, z in zip(batches, self._rows, strict=True)]
        return self._joined([w.mT @ (w @ y) for w, y in zip(self._whiteners, rest, strict=True)], x)

    def logdet(self) -> Tensor:
        """log|Σ|, nats."""
        return self._capacitance.logdet() - 2 * sum(w.diagonal(dim1=-2, dim2=-1).log().sum() for w in self._whiteners)

    def quad_form(self, y: Tensor) -> Tensor:
        """yᵀΣ⁻¹y: a number for ``(N,)``, ``(C, C)`` for ``(N, C)``."""
        batches = self._batches(y)
        white = [w @ batch for w, batch in zip(self._whiteners, batches, strict=True)]
        cross = self._capacitance.whiten(self._project([w.mT @ v for w, v in zip(self._whiteners, white, strict=True)]))
        stacked = torch.cat([v.flatten(0, 1) for v in white])
        square = stacked.mT @ stacked - cross.mT @ cross
        return square[0, 0] if y.ndim == 1 else square

    def log_prob(self, y: Tensor) -> Tensor:
        """log N(y; 0, Σ), nats: a number for ``(N,)``, ``(C,)`` for C independent columns ``(N, C)``."""
        squares = self.quad_form(y)
        return _gaussian_log_density(squares if y.ndim == 1 else squares.diagonal(), self.logdet(), len(self.visits.order))

    def inverse_diagonal(self) -> Tensor:
        """The diagonal of Σ⁻¹, ``(N,)``; the cost is that of a likelihood, and memory N H where a gradient is wanted."""
        pieces = []
        for whitener, rows in zip(self._whiteners, self._rows, strict=True):
            for w, z in zip(*_chunks(whitener, rows), strict=True):
                solved = w.mT @ (w @ z)
                inner = self._capacitance.whiten(solved.flatten(0, 1).mT)
                pieces.append((w**2).sum(-2).flatten() - (inner**2).sum(0))
        return self.visits.unsorted(torch.cat(pieces))

    @cached_property
    def _capacitance(self) -> _Capacitance:
        grams = [_WhitenedGram.apply(w, z) for w, z in zip(self._whiteners, self._rows, strict=True)]
        return _Capacitance(torch.stack(grams).sum(0), self.variances)

    def _batches(self, x: Tensor) -> list[Tensor]:
        if x.shape[0] != len(self.visits.order) or x.ndim > 2:
            raise ValueError(f"expected ({len(self.visits.order)},) or ({len(self.visits.order)}, C), got {tuple(x.shape)}")
        return self.visits.batches(self.visits.sorted(x.reshape(len(x), -1)))

    def _project(self, batches: Sequence[Tensor]) -> Tensor:
        """Zᵀx, ``(H, C)``."""
        return torch.stack([z.flatten(0, 1).mT @ x.flatten(0, 1) for z, x in zip(self._rows, batches, strict=True)]).sum(0)

    def _joined(self, batches: Sequence[Tensor], like: Tensor) -> Tensor:
        return self.visits.unsorted(torch.cat([batch.flatten(0, 1) for batch in batches])).reshape(like.shape)


def _inverse_root(blocks: Tensor) -> Tensor:
    """C⁻¹ of B = C Cᵀ, ``(people, T, T)``."""
    root = torch.linalg.cholesky(blocks)
    eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device).expand_as(root)
    return torch.linalg.solve_triangular(root, eye, upper=False)


def _chunks(*batches: Tensor) -> list[tuple[Tensor, ...]]:
    people = max(1, _CHUNK // batches[0].shape[1])
    return [batch.split(people) for batch in batches]


class _WhitenedGram(torch.autograd.Function):
    """Σ_p (W_p Z_p)ᵀ(W_p Z_p) over people, without keeping the whitened rows: the backward pass makes them again, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, whitener: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(whitener, rows)
        gram = rows.new_zeros(rows.shape[-1], rows.shape[-1])
        for w, z in zip(*_chunks(whitener, rows), strict=True):
            white = (w @ z).flatten(0, 1)
            for start in range(0, white.shape[-1], _PANEL):
                gram[start : start + _PANEL, start:].addmm_(white[:, start : start + _PANEL].mT, white[:, start:])
        return gram.triu() + gram.triu(1).mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        whitener, rows = ctx.saved_tensors
        twice = grad + grad.mT
        of_whitener, of_rows = [], []
        for w, z in zip(*_chunks(whitener, rows), strict=True):
            white = (w @ z) @ twice
            if ctx.needs_input_grad[0]:
                of_whitener.append(white @ z.mT)
            if ctx.needs_input_grad[1]:
                of_rows.append(w.mT @ white)
        return torch.cat(of_whitener) if of_whitener else None, torch.cat(of_rows) if of_rows else None


@dataclass(frozen=True)
class VisitSums:
    """What a likelihood needs of the data where features are constant within a person and blocks are σ²I + σ_b²11ᵀ.

    Sums over people with T visits, for each T that occurs, are made once; then Z'ᵀB⁻¹Z = Σ_T T/(σ² + Tσ_b²) Σ_p z_p z_pᵀ and its like cost H²,
    and each likelihood H³, whatever N. Differentiates in the variances; those of the features must be positive where their gradient is wanted.

    Arguments:
        groups: (T, how many people have T visits).
        gram: Σ_p z_p z_pᵀ a group, ``(G, H, H)``.
        cross: Σ_p z_p s_pᵀ a group, s_p the sum of a person's rows of y, ``(G, H, C)``.
        between: Σ_p s_p s_pᵀ a group, ``(G, C, C)``.
        within: Σ_p Σ_t (y_t − ȳ_p)(y_t − ȳ_p)ᵀ, ``(C, C)``.
    """

    groups: tuple[tuple[int, int], ...]
    gram: Tensor
    cross: Tensor
    between: Tensor
    within: Tensor

    @classmethod
    def of(cls, features: Tensor, y: Tensor, visits: Visits) -> VisitSums:
        """From features of people and data of visits.

        Arguments:
            features: ``(P, H)``, people in the order of the sorted distinct subjects.
            y: ``(N,)`` or ``(N, C)`` in the table's order; covariates may stand beside the phenotype as further columns.

        Raises:
            ValueError: where shapes do not fit.
        """
        if len(features) != len(visits.people) or len(y) != len(visits.order):
            raise ValueError(f"expected features of {len(visits.people)} people and {len(visits.order)} rows of y, got {len(features)} and {len(y)}")
        people = features[visits.people].split([count for _, count in visits.groups])
        batches = visits.batches(visits.sorted(y.reshape(len(y), -1)))
        sums = [batch.sum(1) for batch in batches]
        rest = torch.cat([(batch - batch.mean(1, keepdim=True)).flatten(0, 1) for batch in batches])
        return cls(
            visits.groups,
            torch.stack([z.mT @ z for z in people]),
            torch.stack([z.mT @ s for z, s in zip(people, sums, strict=True)]),
            torch.stack([s.mT @ s for s in sums]),
            rest.mT @ rest,
        )

    @property
    def rows(self) -> int:
        return sum(visits * people for visits, people in self.groups)

    def quad_form(self, variances: Tensor, intercept: Tensor, noise: Tensor) -> Tensor:
        """yᵀΣ⁻¹y, ``(C, C)``, for v ``(H,)``, σ_b² and σ²."""
        return self._quad_form(self._capacitance(variances, intercept, noise), intercept, noise)

    def logdet(self, variances: Tensor, intercept: Tensor, noise: Tensor) -> Tensor:
        """log|Σ|, nats."""
        return self._capacitance(variances, intercept, noise).logdet() + self._logdet_blocks(intercept, noise)

    def log_prob(self, variances: Tensor, intercept: Tensor, noise: Tensor) -> Tensor:
        """log N(y_c; 0, Σ), nats, of each column of y, ``(C,)``."""
        capacitance = self._capacitance(variances, intercept, noise)
        squares = self._quad_form(capacitance, intercept, noise).diagonal()
        return _gaussian_log_density(squares, capacitance.logdet() + self._logdet_blocks(intercept, noise), self.rows)

    def _precisions(self, intercept: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """T and 1/(σ² + Tσ_b²) of each group, ``(G, 1, 1)``."""
        visits = torch.tensor([t for t, _ in self.groups], dtype=self.gram.dtype, device=self.gram.device).reshape(-1, 1, 1)
        return visits, 1 / (noise + visits * intercept)

    def _capacitance(self, variances: Tensor, intercept: Tensor, noise: Tensor) -> _Capacitance:
        visits, precision = self._precisions(intercept, noise)
        return _Capacitance((visits * precision * self.gram).sum(0), variances)

    def _quad_form(self, capacitance: _Capacitance, intercept: Tensor, noise: Tensor) -> Tensor:
        visits, precision = self._precisions(intercept, noise)
        cross = capacitance.whiten((precision * self.cross).sum(0))
        return self.within / noise + (precision / visits * self.between).sum(0) - cross.mT @ cross

    def _logdet_blocks(self, intercept: Tensor, noise: Tensor) -> Tensor:
        people = torch.tensor([count for _, count in self.groups], dtype=self.gram.dtype, device=self.gram.device)
        _, precision = self._precisions(intercept, noise)
        return (self.rows - people.sum()) * noise.log() - (people * precision.flatten().log()).sum()
