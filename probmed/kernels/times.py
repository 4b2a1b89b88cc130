"""Kernels over visits: who was seen, and when. The Matérn kernels of time are GPyTorch's ``MaternKernel``, the linear one is ``ColumnLinear``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gpytorch.constraints import Interval, Positive
from gpytorch.kernels import Kernel
from torch import Tensor

from probmed.kernels.features import FeatureKernel


class SameSubject(Kernel):
    """One between visits of one person and zero otherwise: times a kernel of time it makes a process for each person, independent of others'.

    Positive semi-definite: an inner product of people's unit vectors.

    Raises:
        ValueError: where a visit has no subject.

    >>> SameSubject()(torch.tensor([7.0, 7.0, 3.0])).to_dense()
    tensor([[1., 1., 0.],
            [1., 1., 0.],
            [0., 0., 1.]])
    """

    def __init__(self, active_dims: Sequence[int] | None = None) -> None:
        super().__init__(active_dims=active_dims)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Tensor:
        if bool(x1.isnan().any()) or bool(x2.isnan().any()):
            raise ValueError("expected a subject for each visit, got NaN")
        left, right = x1[..., 0], x2[..., 0]
        return (left == right if diag else left.unsqueeze(-1) == right.unsqueeze(-2)).to(x1)


class InterceptSlope(FeatureKernel):
    """A random intercept and slope with covariance G: k(t, t') = [1 t] G [1 t']ᵀ, G_00 = v_0, G_11 = v_1, G_01 = ρ√(v_0 v_1).

    One draw of them for all rows; multiply by ``SameSubject`` for one a person. t in years or whatever the table has: v_1 is per its square.

    Parameters: ``variances`` v, ``(*batch, 1, 2)``, positive; ``correlation`` ρ, ``(*batch, 1, 1)``, between −1 and 1.

    Reference: Laird & Ware, Biometrics 1982.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_parameter("raw_variances", torch.nn.Parameter(torch.zeros(*self.batch_shape, 1, 2)))
        self.register_parameter("raw_correlation", torch.nn.Parameter(torch.zeros(*self.batch_shape, 1, 1)))
        self.register_constraint("raw_variances", Positive())
        self.register_constraint("raw_correlation", Interval(-1.0, 1.0))

    @property
    def variances(self) -> Tensor:
        return self.raw_variances_constraint.transform(self.raw_variances)

    @variances.setter
    def variances(self, value: Tensor) -> None:
        self.initialize(raw_variances=self.raw_variances_constraint.inverse_transform(value))

    @property
    def correlation(self) -> Tensor:
        return self.raw_correlation_constraint.transform(self.raw_correlation)

    @correlation.setter
    def correlation(self, value: Tensor) -> None:
        self.initialize(raw_correlation=self.raw_correlation_constraint.inverse_transform(value))

    def features(self, x: Tensor) -> Tensor:
        """[1 t] times the Cholesky factor of G."""
        intercept, slope = self.variances.sqrt().split(1, -1)
        rho = self.correlation
        return torch.cat([intercept + rho * slope * x, (1 - rho**2).sqrt() * slope * x], -1)
