"""Kernels over the columns of a table: clinical covariates, regional volumes, latent codes; NaN where an entry is missing.

A missing entry stands for its column's distribution, and a kernel with it is the expectation over that distribution. This is positive
semi-definite: an entry, known or missing, is the mean of the kernel's features under some distribution (a point for a known one), and a matrix of
inner products of such means is a Gram matrix; sums and elementwise products of positive semi-definite matrices remain so (Schur). Missing
entries are independent of each other, so one has less than unit covariance with itself: what is lost is noise of that person alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from gpytorch.kernels import AdditiveKernel, IndexKernel, Kernel, LinearKernel, ProductKernel, ScaleKernel
from torch import Tensor

from probmed.kernels.features import Constants, FeatureKernel


class ColumnGaussian(Kernel):
    """The Gaussian kernel with a lengthscale for each column, missing entries integrated out.

    .. math:: k(x, y) = \\prod_d \\frac{\\ell_d}{\\sqrt{\\ell_d^2 + n_d s_d^2}} \\exp\\Big(-\\frac{(x_d - y_d)^2}{2(\\ell_d^2 + n_d s_d^2)}\\Big)

    n_d is how many of x_d and y_d are missing; a missing entry is N(m_d, s_d²) and stands in the numerator as m_d. Positive semi-definite by the
    argument of this module, for each column and so for their product. Without missing entries it is GPyTorch's ``RBFKernel``.

    Arguments:
        mean, sd: m and s, ``(D,)`` or one number for all columns; the defaults are for standardised columns.
        ard_num_dims: D for a lengthscale a column; one for all by default.

    Reference: Girard et al., NIPS 2002 (Gaussian processes with uncertain inputs).
    """

    has_lengthscale = True

    def __init__(self, mean: Tensor | float = 0.0, sd: Tensor | float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.columns = _columns(mean, sd)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        left, right = self._left(x1), self._right(x2)
        exponent = (left * right).sum(-1) if diag else left @ right.mT
        return torch.exp(-0.5 * exponent.clamp_min(0.0))

    # −2 log k is a sum over columns of products of a term in x and a term in y: one matrix product, whatever is missing.

    def _left(self, x: Tensor) -> Tensor:
        value, known, missing = self._split(x)
        return torch.cat([value**2, value, known, missing], -1)

    def _right(self, y: Tensor) -> Tensor:
        value, known, missing = self._split(y)
        none = self.lengthscale**-2
        spread = self.columns.sd**2 * none
        one = none / (1 + spread)
        log_one, log_two = spread.log1p(), (2 * spread).log1p()
        return torch.cat(
            [
                none * known + one * missing,
                -2 * none * value,
                none * value**2 + log_one * missing,
                one * value**2 + log_one * known + log_two * missing,
            ],
            -1,
        )

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values about the mean, zero where missing; indicators of the known and of the missing."""
        value = x - self.columns.mean
        missing = value.isnan().to(value)
        return value.nan_to_num(0.0), 1 - missing, missing


class ColumnLinear(FeatureKernel, LinearKernel):
    """The linear kernel of standardised columns, Σ_d v_d x̃_d ỹ_d with x̃ = (x − m)/s; a missing entry is its expectation, zero.

    It is GPyTorch's ``LinearKernel`` with that coding, and learns its variances v: one a column with ``ard_num_dims``.

    Arguments:
        mean, sd: m and s, ``(D,)`` or one number for all columns.
    """

    def __init__(self, mean: Tensor | float = 0.0, sd: Tensor | float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.columns = _columns(mean, sd)

    def features(self, x: Tensor) -> Tensor:
        return ((x - self.columns.mean) / self.columns.sd).nan_to_num(0.0)

    def feature_variances(self, features: Tensor) -> Tensor:
        variance: Tensor = self.variance
        return variance


class PhenotypeGaussian(ColumnGaussian):
    """``ColumnGaussian`` of an image's phenotype, regional volumes or latent codes ``(N, D)``, with a lengthscale for each."""

    def __init__(self, dimensions: int, mean: Tensor | float = 0.0, sd: Tensor | float = 1.0, **kwargs: Any) -> None:
        super().__init__(mean, sd, ard_num_dims=dimensions, **kwargs)


class PhenotypeLinear(ColumnLinear):
    """``ColumnLinear`` of an image's phenotype, regional volumes or latent codes ``(N, D)``, with a variance for each."""

    def __init__(self, dimensions: int, mean: Tensor | float = 0.0, sd: Tensor | float = 1.0, **kwargs: Any) -> None:
        super().__init__(mean, sd, ard_num_dims=dimensions, **kwargs)


class SameLevel(FeatureKernel):
    """One where two people have the same level of a category and zero otherwise; the expectation of that where a level is missing.

    .. math:: k(x, y) = e(x)^T e(y), \\quad e(l) = \\text{the unit vector of level } l, \\quad e(\\text{missing}) = \\pi

    Arguments:
        frequencies: π, ``(L,)``, of levels 0 to L−1; any positive numbers, made to sum to one.

    Raises:
        ValueError: where an entry is no level.

    >>> SameLevel(torch.tensor([0.75, 0.25]))(torch.tensor([0.0, 1.0, float("nan")])).to_dense()
    tensor([[1.0000, 0.0000, 0.7500],
            [0.0000, 1.0000, 0.2500],
            [0.7500, 0.2500, 0.6250]])
    """

    def __init__(self, frequencies: Tensor, active_dims: Sequence[int] | None = None) -> None:
        super().__init__(active_dims=active_dims)
        if frequencies.ndim != 1 or not bool((frequencies > 0).all()):
            raise ValueError(f"expected a positive frequency for each level, (L,), got {frequencies.tolist()}")
        self.levels = Constants(frequencies=frequencies / frequencies.sum())

    def features(self, x: Tensor) -> Tensor:
        frequencies: Tensor = self.levels.frequencies
        if x.shape[-1] != 1:
            raise ValueError(f"expected one column of levels, got {x.shape[-1]}: give each a kernel with its own active_dims")
        levels = torch.arange(len(frequencies), device=x.device)
        vectors, missing = x == levels, x.isnan()
        if not bool((vectors.any(-1, keepdim=True) | missing).all()):
            raise ValueError(f"expected levels 0 to {len(levels) - 1}, or NaN where missing, got others")
        return torch.where(missing, frequencies, vectors.to(frequencies))


class LevelCorrelation(SameLevel):
    """A learned correlation of levels: k(x, y) = e(x)ᵀ C e(y), C that of W Wᵀ + diag(v) with W ``(L, rank)``, GPyTorch's ``IndexKernel``.

    Arguments:
        frequencies: as in ``SameLevel``.
        rank: of W.
    """

    def __init__(self, frequencies: Tensor, rank: int = 1, active_dims: Sequence[int] | None = None, batch_shape: torch.Size | None = None) -> None:
        super().__init__(frequencies, active_dims)
        self.covariance = IndexKernel(len(frequencies), rank, batch_shape=batch_shape)

    def features(self, x: Tensor) -> Tensor:
        factor = torch.cat([self.covariance.covar_factor, torch.diag_embed(self.covariance.var.sqrt())], -1)
        return super().features(x) @ torch.nn.functional.normalize(factor, dim=-1)


def mixed_columns(
    continuous: Sequence[int],
    categorical: Mapping[int, Tensor],
    combine: Literal["sum", "product"],
    mean: Tensor | float = 0.0,
    sd: Tensor | float = 1.0,
    rank: int | None = None,
) -> Kernel:
    """A kernel over columns of mixed types.

    ``"sum"``: Σ_d τ_d k_d, a variance for each column: effects add up, as Gower's similarity averages over columns. ``"product"``: τ Π_d k_d, which
    lets every column change the effect of every other. Missing entries are integrated out column by column.

    Arguments:
        continuous: columns with a Gaussian kernel, each with its own lengthscale.
        categorical: the frequencies of the levels of each categorical column.
        mean, sd: of the continuous columns, ``(D,)`` in the order of ``continuous``, or one number for all.
        rank: of the learned correlation of levels; without it ``SameLevel``, so that in a product people of different levels are independent.

    Raises:
        ValueError: where there are no columns.

    Reference: Gower, Biometrics 1971.
    """
    means, sds = (torch.as_tensor(value).expand(len(continuous)) for value in (mean, sd))
    parts: list[Kernel] = [ColumnGaussian(m, s, active_dims=[c]) for c, m, s in zip(continuous, means, sds, strict=True)]
    for column, frequencies in categorical.items():
        levels = SameLevel(frequencies, active_dims=[column]) if rank is None else LevelCorrelation(frequencies, rank, active_dims=[column])
        parts.append(levels)
    if not parts:
        raise ValueError("expected at least one column, got none")
    if combine == "sum":
        return AdditiveKernel(*(ScaleKernel(part) for part in parts))
    return ScaleKernel(ProductKernel(*parts))


def _columns(mean: Tensor | float, sd: Tensor | float) -> Constants:
    means, sds = (torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.get_default_dtype()) for value in (mean, sd))
    if not bool((sds > 0).all()):
        raise ValueError(f"expected positive standard deviations of columns, got {sds.tolist()}")
    return Constants(mean=means, sd=sds)
