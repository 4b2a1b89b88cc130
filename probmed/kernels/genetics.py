"""Kernels over genotypes: counts 0, 1 and 2 of an allele, NaN where missing; people by rows and variants (SNPs) by columns.

Frequencies are those of the people to whom a model is fitted and stay the kernel's own, so that new people are coded in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from gpytorch.kernels import AdditiveKernel, Kernel, ScaleKernel
from torch import Tensor
from torch.distributions import Beta

from probmed.kernels.columns import ColumnGaussian
from probmed.kernels.features import Constants, FeatureKernel


def allele_frequencies(genotypes: Tensor) -> Tensor:
    """p_j, half the mean count of the people who are not missing: ``(N, S)`` → ``(S,)``.

    >>> allele_frequencies(torch.tensor([[0.0, 2.0], [1.0, float("nan")]]))
    tensor([0.2500, 1.0000])
    """
    return genotypes.nanmean(-2) / 2


def power_weights(frequencies: Tensor, alpha: float = -1.0) -> Tensor:
    """w_j = [2p_j(1−p_j)]^α: the variance of an allele's effect falls with its frequency for α < 0; −1 weighs standardised counts equally.

    References: Speed et al., American Journal of Human Genetics 2012; Yang et al., American Journal of Human Genetics 2011 (α = −1).
    """
    return (2 * frequencies * (1 - frequencies)) ** alpha


def beta_weights(frequencies: Tensor, a: float = 1.0, b: float = 25.0) -> Tensor:
    """w_j = Beta(m_j; a, b)², m_j the minor allele's frequency: SKAT's weights, where √w is the density. Rare variants weigh most.

    Reference: Wu et al., American Journal of Human Genetics 2011.
    """
    minor = torch.minimum(frequencies, 1 - frequencies)
    return Beta(torch.as_tensor(a).to(minor), torch.as_tensor(b).to(minor)).log_prob(minor).mul(2).exp()


class GeneticRelationship(FeatureKernel):
    """The linear kernel of centred counts; with its default weights the genetic relationship matrix.

    .. math:: k(x, y) = \\frac{\\sum_j w_j (x_j - 2p_j)(y_j - 2p_j)}{\\sum_j w_j 2p_j(1-p_j)}

    With w_j = 1 / [2p_j(1−p_j)] this is the mean over variants of the products of standardised counts; its diagonal is 1 on average under
    Hardy–Weinberg equilibrium. A missing count is its expectation 2p_j and adds nothing, so the kernel stays an inner product.

    Arguments:
        frequencies: p, ``(S,)``, strictly between 0 and 1.
        weights: w, ``(S,)``, the variance of an allele's effect up to a factor; ``power_weights(frequencies)`` by default.
        active_dims: the columns of a region's variants; then ``frequencies`` and ``weights`` are of these alone.

    Raises:
        ValueError: where frequencies or weights are out of range or do not fit.

    References: VanRaden, Journal of Dairy Science 2008 (w = 1); Yang et al., American Journal of Human Genetics 2011.

    >>> kernel = GeneticRelationship(torch.tensor([0.5, 0.5]))
    >>> kernel(torch.tensor([[0.0, 2.0], [1.0, 2.0]])).to_dense()
    tensor([[2., 1.],
            [1., 1.]])
    """

    def __init__(self, frequencies: Tensor, weights: Tensor | None = None, active_dims: Sequence[int] | None = None) -> None:
        super().__init__(active_dims=active_dims)
        self.coding = Constants(frequencies=frequencies, scale=_scale(frequencies, weights))

    def features(self, x: Tensor) -> Tensor:
        _check_columns(x, self.coding.frequencies)
        return (x - 2 * self.coding.frequencies).nan_to_num(0.0) * self.coding.scale


class GenotypeGaussian(ColumnGaussian):
    """The Gaussian kernel on a set of variants.

    .. math:: k(x, y) = \\exp\\Big(-\\frac{\\sum_j w_j (x_j - y_j)^2}{2 \\ell^2 \\sum_j w_j 2p_j(1-p_j)}\\Big)

    A missing count is integrated out under a Gaussian with its mean 2p_j and variance 2p_j(1−p_j), as ``ColumnGaussian`` says.

    Arguments: as ``GeneticRelationship``; one lengthscale ℓ for all variants unless ``ard_num_dims`` says otherwise.
    """

    def __init__(self, frequencies: Tensor, weights: Tensor | None = None, **kwargs: Any) -> None:
        scale = _scale(frequencies, weights)
        super().__init__(2 * frequencies * scale, (2 * frequencies * (1 - frequencies)).sqrt() * scale, **kwargs)
        self.coding = Constants(scale=scale)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        _check_columns(x1, self.coding.scale)
        return super().forward(x1 * self.coding.scale, x2 * self.coding.scale, diag=diag, **params)


class IdentityByState(FeatureKernel):
    """The mean share of alleles that two people have in common.

    .. math:: k(x, y) = \\sum_j w_j \\Big(1 - \\frac{|x_j - y_j|}{2}\\Big) \\Big/ \\sum_j w_j

    Positive semi-definite: with the signs c_t(x) = ±1 as x ≥ t or not, t = 1 and 2, the share is ½ + ¼ c_1(x) c_1(y) + ¼ c_2(x) c_2(y), an inner
    product. A missing count has the expectation of its signs under Hardy–Weinberg equilibrium, so it is a point of the same feature space and the
    kernel with anyone else is the expected share.

    Arguments:
        frequencies: p, ``(S,)``, strictly between 0 and 1.
        weights: w, ``(S,)``; ones by default, ``beta_weights`` for rare variants.

    Raises:
        ValueError: where frequencies or weights do not fit, or a count is none of 0, 1, 2 and NaN.

    References: Wessel & Schork, American Journal of Human Genetics 2006; Kwee et al., same journal, 2008; Wu et al., same journal, 2011.
    """

    def __init__(self, frequencies: Tensor, weights: Tensor | None = None, active_dims: Sequence[int] | None = None) -> None:
        super().__init__(active_dims=active_dims)
        weights = torch.ones_like(frequencies) if weights is None else weights
        _check_coding(frequencies, weights)
        expected = torch.stack([1 - 2 * (1 - frequencies) ** 2, 2 * frequencies**2 - 1])
        self.coding = Constants(expected=expected, scale=(weights / weights.sum()).sqrt() / 2)

    def features(self, x: Tensor) -> Tensor:
        expected, scale = self.coding.expected, self.coding.scale
        _check_columns(x, scale)
        if not bool(((x == 0) | (x == 1) | (x == 2) | x.isnan()).all()):
            raise ValueError("expected counts of an allele, 0, 1 or 2, or NaN where missing; got others, such as standardised or imputed values")
        signs = [torch.where(x.isnan(), expected[t - 1], 2 * (x >= t).to(scale) - 1) * scale for t in (1, 2)]
        shared = torch.full_like(signs[0][..., :1], 0.5**0.5)
        return torch.cat([shared, *signs], -1)


class GivenRelationship(Kernel):
    """A relationship matrix computed elsewhere: k(i, j) = A_ij for people given by their row of A.

    Arguments:
        matrix: A, ``(P, P)``, symmetric and positive semi-definite up to 1e-6 of its mean diagonal.

    Raises:
        ValueError: where the matrix is not that, or a person has no row.
    """

    def __init__(self, matrix: Tensor, active_dims: Sequence[int] | None = None) -> None:
        super().__init__(active_dims=active_dims)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"expected a square relationship matrix, got {tuple(matrix.shape)}")
        size = matrix.diagonal().mean()
        if not torch.allclose(matrix, matrix.mT, rtol=0.0, atol=1e-6 * float(size)):
            raise ValueError("expected a symmetric relationship matrix, got one that differs from its transpose")
        ridge = 1e-6 * size * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        if int(torch.linalg.cholesky_ex(matrix + ridge).info):
            raise ValueError("expected a positive semi-definite relationship matrix, got one with a negative eigenvalue")
        self.known = Constants(matrix=matrix)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        left, right = (self._rows(x) for x in (x1, x2))
        matrix: Tensor = self.known.matrix
        return matrix[left, right] if diag else matrix[left.unsqueeze(-1), right.unsqueeze(-2)]

    def _rows(self, x: Tensor) -> Tensor:
        rows, people = x[..., 0].long(), len(self.known.matrix)
        if not bool(((rows == x[..., 0]) & (rows >= 0) & (rows < people)).all()):
            raise ValueError(f"expected rows of the relationship matrix, whole numbers from 0 to {people - 1}, got others")
        return rows


def by_region(
    regions: Mapping[str, Sequence[int]], frequencies: Tensor, weights: Tensor | None = None, kernel: type[Kernel] = GeneticRelationship
) -> AdditiveKernel:
    """Σ_r τ_r k_r: a variance of its own for each set of variants, such as genes or chromosomes, in the order of ``regions``.

    Arguments:
        regions: the columns of each region.
        frequencies, weights: of all variants, ``(S,)``.
        kernel: the class of each k_r.

    >>> kernel = by_region({"APOE": [0, 1], "BIN1": [2]}, torch.tensor([0.2, 0.3, 0.4]))
    >>> [part.base_kernel.active_dims.tolist() for part in kernel.kernels]
    [[0, 1], [2]]
    """
    parts = []
    for columns in regions.values():
        chosen = list(columns)
        own = None if weights is None else weights[chosen]
        parts.append(ScaleKernel(kernel(frequencies[chosen], own, active_dims=chosen)))
    return AdditiveKernel(*parts)


def _scale(frequencies: Tensor, weights: Tensor | None) -> Tensor:
    """√(w_j / Σ_i w_i 2p_i(1−p_i)), which multiplies a centred count."""
    if weights is None:
        _check_coding(frequencies, torch.ones_like(frequencies))
        weights = power_weights(frequencies)
    _check_coding(frequencies, weights)
    return (weights / (weights * 2 * frequencies * (1 - frequencies)).sum()).sqrt()


def _check_coding(frequencies: Tensor, weights: Tensor) -> None:
    if frequencies.ndim != 1 or weights.shape != frequencies.shape:
        raise ValueError(f"expected frequencies (S,) and weights (S,), got {tuple(frequencies.shape)} and {tuple(weights.shape)}")
    out = ~((frequencies > 0) & (frequencies < 1))
    if bool(out.any()):
        raise ValueError(f"expected frequencies strictly between 0 and 1, got {int(out.sum())} that are not: leave out variants that do not vary")
    if not bool(((weights >= 0) & weights.isfinite()).all() & (weights.sum() > 0)):
        raise ValueError("expected weights that are finite, not negative and not all zero")


def _check_columns(x: Tensor, known: Tensor) -> None:
    if x.shape[-1] != known.shape[-1]:
        raise ValueError(f"expected genotypes of {known.shape[-1]} variants, as there are frequencies, got {x.shape[-1]}")
