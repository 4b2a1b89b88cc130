"""Kernels with finitely many features, k(x, y) = Σ_h v_h φ_h(x) φ_h(y), and their sums and products as one stacked root."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from gpytorch.kernels import AdditiveKernel, Kernel, LinearKernel, ProductKernel, ScaleKernel
from linear_operator import LinearOperator, to_dense
from linear_operator.operators import DenseLinearOperator, DiagLinearOperator, LowRankRootLinearOperator, MatmulLinearOperator, RootLinearOperator
from torch import Tensor


class Constants(torch.nn.Module):
    """Tensors that a kernel knows and does not learn, such as allele frequencies; saved with it and moved with it.

    They live in a module of their own because GPyTorch expands and indexes a kernel's own buffers as if these had its batch shape.
    """

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().clone())

    def __getattr__(self, name: str) -> Tensor:
        tensor: Tensor = super().__getattr__(name)  # type: ignore[assignment]
        return tensor


class StackedRoot(MatmulLinearOperator):
    """R Rᵀ with R ``(*batch, N, H)``, H < N, whose sums and products with another are one root; a diagonal added makes it Woodbury's.

    GPyTorch's own ``LowRankRootLinearOperator`` factorises one of two terms by Cholesky when they are added, though it is singular, and forgets that
    the sum has low rank; so it does with a product of three. Make it by ``of``.
    """

    @classmethod
    def of(cls, root: Tensor) -> StackedRoot:
        return cls(root, root.mT)

    @property
    def root(self) -> Tensor:
        root: Tensor = self.left_linear_op.to_dense()
        return root

    def root_decomposition(self, method: str | None = None) -> LinearOperator:
        return RootLinearOperator(self.root)

    def add_diagonal(self, diag: Tensor) -> LinearOperator:
        return LowRankRootLinearOperator(self.root).add_diagonal(diag)

    def __add__(self, other: Any) -> LinearOperator:
        if isinstance(other, DiagLinearOperator):
            return LowRankRootLinearOperator(self.root) + other
        if isinstance(other, StackedRoot):
            batch = torch.broadcast_shapes(self.batch_shape, other.batch_shape)
            return StackedRoot.of(torch.cat([part.root.expand(*batch, *part.root.shape[-2:]) for part in (self, other)], -1))
        return super().__add__(other)

    def _mul_constant(self, other: Tensor) -> LinearOperator:
        if bool((other < 0).any()):
            return super()._mul_constant(other)
        return StackedRoot.of(self.root * other.sqrt()[..., None, None])

    def _mul_matrix(self, other: LinearOperator) -> LinearOperator:
        other = other.evaluate_kernel()
        if isinstance(other, StackedRoot | RootLinearOperator):
            root = to_dense(other.root)
            if self.root.shape[-1] * root.shape[-1] < self.shape[-1]:
                return StackedRoot.of(_products(self.root, root))
        return DenseLinearOperator(self.to_dense() * other.to_dense())


class FeatureKernel(Kernel):
    """What a kernel with finitely many features has: k(x, y) = Σ_h v_h φ_h(x) φ_h(y), positive semi-definite because it is an inner product.

    The matrix is a ``StackedRoot`` where features are fewer than rows, and dense otherwise.
    """

    prediction_strategy = Kernel.prediction_strategy  # a linear kernel's own expects another operator

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """φ, ``(*batch, N, D)`` → ``(*batch, N, H)``."""

    def feature_variances(self, features: Tensor) -> Tensor:
        """v, ``(*batch, 1, H)``; ones unless a kernel learns them."""
        return torch.ones_like(features[..., :1, :])

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Any:
        left, right = (self._root(x) for x in (x1, x2))
        if diag:
            return (left * right).sum(-1)
        low_rank = left.shape[-1] < min(left.shape[-2], right.shape[-2])
        if low_rank:
            return StackedRoot.of(left) if torch.equal(left, right) else MatmulLinearOperator(left, right.mT)
        return left @ right.mT

    def _root(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return features * self.feature_variances(features).sqrt()


def stacked_features(kernel: Kernel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Φ and v of k(x, x) = Φ diag(v) Φᵀ, for scales, sums and products of kernels with finitely many features.

    A sum puts features side by side; a product takes all products of a feature of one and a feature of the other; scales go to v, so that Φ needs
    no gradient and no second copy while variance components are learned.

    Arguments:
        kernel: a ``FeatureKernel``, GPyTorch's ``LinearKernel``, or a ``ScaleKernel``, ``AdditiveKernel`` or ``ProductKernel`` of them, not batched.
        x: ``(N, D)``.

    Returns:
        Φ ``(N, H)`` and v ``(H,)``.

    Raises:
        ValueError: where a kernel has no finite features.
    """
    if kernel.active_dims is not None:
        x = x.index_select(-1, kernel.active_dims)
    return _stacked(kernel, x)


def _stacked(kernel: Kernel, x: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(kernel, FeatureKernel):
        features = kernel.features(x)
        return features, kernel.feature_variances(features).expand(1, features.shape[-1])[0]
    if isinstance(kernel, LinearKernel):
        return x, kernel.variance.expand(1, x.shape[-1])[0]
    if isinstance(kernel, ScaleKernel):
        # Its own selection of columns is its base's, which GPyTorch does not apply twice either.
        features, variances = _stacked(kernel.base_kernel, x)
        return features, variances * kernel.outputscale
    if isinstance(kernel, AdditiveKernel | ProductKernel):
        parts = [stacked_features(part, x) for part in kernel.kernels]
        if isinstance(kernel, AdditiveKernel):
            return torch.cat([features for features, _ in parts], -1), torch.cat([variances for _, variances in parts])
        features, variances = parts[0]
        for other, scales in parts[1:]:
            features, variances = _products(features, other), _products(variances, scales)
        return features, variances
    raise ValueError(f"expected kernels with finitely many features, such as linear, genetic relationship or levels, got {type(kernel).__name__}")


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Every product of an entry of one and an entry of the other along the last axis, ``(…, H₁H₂)``."""
    return (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)
