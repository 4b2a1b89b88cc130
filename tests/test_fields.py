"""Random fields against the dense matrices that they stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import scipy.fft
import scipy.stats
import torch
from torch import Tensor

from probmed.fields import (
    GaussianField,
    analyse,
    cosine_basis,
    dct,
    idct,
    laplacian_eigenvalues,
    synthesise,
)

GRIDS = [
    ((7,), (1.3,)),
    ((4, 5), (1.0, 2.5)),
    ((3, 4, 2), (1.0, 2.0, 0.7)),
    ((1, 4, 3), (2.0, 1.0, 1.0)),
]

pytestmark = pytest.mark.usefixtures("float64")


def graph_laplacian(shape: Sequence[int], spacing: Sequence[float]) -> Tensor:
    """D − A by its edges: 1/h² between neighbours along an axis of spacing h."""
    index = torch.arange(math.prod(shape)).reshape(tuple(shape))
    laplacian = torch.zeros(index.numel(), index.numel())
    for axis, h in enumerate(spacing):
        n = shape[axis]
        left, right = index.narrow(axis, 0, n - 1).flatten(), index.narrow(axis, 1, n - 1).flatten()
        for i, j in zip(left.tolist(), right.tolist(), strict=True):
            laplacian[i, i] += 1 / h**2
            laplacian[j, j] += 1 / h**2
            laplacian[i, j] -= 1 / h**2
            laplacian[j, i] -= 1 / h**2
    return laplacian


def dense_precision(
    shape: Sequence[int], spacing: Sequence[float], strength: float, kappa: float, alpha: float, channels: int
) -> Tensor:
    """λ(D − A + κ²I)^α for all channels, the power by an eigendecomposition."""
    laplacian = graph_laplacian(shape, spacing)
    values, vectors = torch.linalg.eigh(laplacian + kappa**2 * torch.eye(len(laplacian)))
    power = vectors @ torch.diag(values**alpha) @ vectors.T
    return torch.kron(torch.eye(channels), strength * power)


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
def test_dct_is_scipy_s_orthonormal_dct(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    x = torch.randn(2, *shape)
    d = len(shape)
    axes = tuple(range(1, d + 1))
    expected = torch.from_numpy(scipy.fft.dctn(x.numpy(), axes=axes, norm="ortho"))
    torch.testing.assert_close(dct(x, d), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(idct(dct(x, d), d), x, rtol=0, atol=1e-12)


def test_truncated_bases_synthesise_and_analyse_are_transposes() -> None:
    shape, counts = (6, 5, 4), (3, 2, 4)
    c, x = torch.randn(2, *counts), torch.randn(2, *shape)
    torch.testing.assert_close((synthesise(c, shape) * x).sum(), (c * analyse(x, counts)).sum())
    torch.testing.assert_close(analyse(synthesise(c, shape), counts), c)
    basis = cosine_basis(6, 3, torch.float64)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3))


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
def test_dct_diagonalises_the_graph_laplacian(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    d = len(shape)
    basis = idct(torch.eye(math.prod(shape)).reshape(-1, *shape), d).flatten(1)  # one eigenvector a row
    eigenvalues = laplacian_eigenvalues(shape, spacing).flatten()
    expected = eigenvalues[:, None] * basis
    torch.testing.assert_close(basis @ graph_laplacian(shape, spacing), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("channels", [1, 2])
def test_density_determinant_and_variance_are_those_of_the_dense_gaussian(
    shape: tuple[int, ...], spacing: tuple[float, ...], alpha: float, channels: int
) -> None:
    strength, kappa = 1.7, 0.4
    loc = torch.randn(channels, *shape)
    field = GaussianField(shape, spacing, strength, kappa, alpha, channels, loc)
    precision = dense_precision(shape, spacing, strength, kappa, alpha, channels)
    covariance = torch.linalg.inv(precision)
    exact = torch.distributions.MultivariateNormal(loc.flatten(), precision_matrix=precision)
    value = torch.randn(3, channels, *shape)
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(field.log_prob(value), exact.log_prob(value.flatten(1)), **close)
    torch.testing.assert_close(field.log_det_precision(), torch.logdet(precision), **close)
    torch.testing.assert_close(field.variance.flatten(), covariance.diagonal(), **close)
    torch.testing.assert_close(field.entropy(), exact.entropy(), **close)
    torch.testing.assert_close(field.mean, loc)
    torch.testing.assert_close(
        field.precision_matvec(value).flatten(1), value.flatten(1) @ precision, **close
    )
    torch.testing.assert_close(
        field.covariance_matvec(value).flatten(1), value.flatten(1) @ covariance, **close
    )


def test_density_of_draws_and_their_gradient_are_exact() -> None:
    shape, spacing = (3, 4), (1.0, 2.0)
    value = torch.randn(2, *shape, requires_grad=True)
    field = GaussianField(shape, spacing, 2.0, 0.5, 2.0, 2)
    (gradient,) = torch.autograd.grad(field.log_prob(value), value)
    precision = dense_precision(shape, spacing, 2.0, 0.5, 2.0, 2)
    expected = -(precision @ value.detach().flatten()).reshape(value.shape)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


def test_log_density_has_a_gradient_in_value_strength_and_kappa() -> None:
    def density(value: Tensor, strength: Tensor, kappa: Tensor, loc: Tensor) -> Tensor:
        return GaussianField((3, 2), (1.0, 2.0), strength, kappa, 2.0, 2, loc).log_prob(value)

    inputs = (torch.randn(2, 3, 2), torch.tensor([1.3, 0.4]), torch.tensor([0.5, 0.9]), torch.randn(2, 3, 2))
    assert torch.autograd.gradcheck(density, tuple(x.requires_grad_() for x in inputs))


def test_draws_have_a_gradient_in_strength_and_kappa() -> None:
    def draw(strength: Tensor, kappa: Tensor) -> Tensor:
        torch.manual_seed(3)
        return GaussianField((3, 2), (1.0, 2.0), strength, kappa).rsample()

    inputs = (torch.tensor(1.3, requires_grad=True), torch.tensor(0.6, requires_grad=True))
    assert torch.autograd.gradcheck(draw, inputs)


def test_draws_have_the_mean_and_covariance_of_the_dense_gaussian() -> None:
    """Level 1e-3 in each test: the mean by its chi-square, and the whole covariance by whitening with the
    dense factor, after which the sum of squares of n draws of N numbers is chi-square with nN degrees.
    """
    shape, spacing, channels, n = (3, 2, 2), (1.0, 2.0, 1.5), 2, 4000
    loc = torch.randn(channels, *shape)
    field = GaussianField(shape, spacing, 0.8, 0.5, 2.0, channels, loc)
    draws = field.rsample((n,)).flatten(1) - loc.flatten()
    precision = dense_precision(shape, spacing, 0.8, 0.5, 2.0, channels)
    size = len(precision)
    mean_square = n * draws.mean(0) @ precision @ draws.mean(0)
    assert 5e-4 < scipy.stats.chi2.cdf(mean_square.item(), size) < 1 - 5e-4
    white = draws @ torch.linalg.cholesky(precision)
    assert 5e-4 < scipy.stats.chi2.cdf((white**2).sum().item(), n * size) < 1 - 5e-4
    # Every entry of the covariance of the whitened draws, the largest z score against its Bonferroni bound.
    covariance = white.T @ white / n
    z = (covariance - torch.eye(size)) * math.sqrt(n) / (1 + torch.eye(size)).sqrt()
    assert z.abs().max() < scipy.stats.norm.isf(1e-3 / (size * (size + 1)))


def test_whitening_is_exact_and_undone_by_unwhitening() -> None:
    shape, spacing = (4, 3, 2), (1.0, 0.5, 2.0)
    loc = torch.randn(2, *shape)
    field = GaussianField(shape, spacing, 1.4, 0.3, 2.0, 2, loc)
    value = torch.randn(5, 2, *shape)
    white = field.whiten(value)
    torch.testing.assert_close(field.unwhiten(white), value, rtol=1e-9, atol=1e-9)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(white).flatten(1).sum(-1)
    torch.testing.assert_close(field.log_prob(value), normal + 0.5 * field.log_det_precision())
    root = torch.linalg.cholesky(dense_precision(shape, spacing, 1.4, 0.3, 2.0, 2))
    centred = (value - loc).flatten(1)
    torch.testing.assert_close((white**2).flatten(1).sum(-1), ((centred @ root) ** 2).sum(-1))


def test_batches_and_expansion_are_stacks_of_single_fields() -> None:
    strength, kappa = torch.tensor([0.5, 2.0, 7.0]), torch.tensor([0.3, 0.6, 0.9])
    field = GaussianField((3, 4), (1.0, 2.0), strength, kappa, channels=2)
    assert field.batch_shape == (3,)
    assert field.event_shape == (2, 3, 4)
    value = torch.randn(3, 2, 3, 4)
    singles = [
        GaussianField((3, 4), (1.0, 2.0), s, k, channels=2) for s, k in zip(strength, kappa, strict=True)
    ]
    for index, single in enumerate(singles):
        torch.testing.assert_close(field.log_prob(value)[index], single.log_prob(value[index]))
        torch.testing.assert_close(field.variance[index], single.variance)
        torch.testing.assert_close(field.whiten(value)[index], single.whiten(value[index]))
    grown = field.expand((4, 3))
    assert grown.batch_shape == (4, 3)
    assert grown.rsample((2,)).shape == (2, 4, 3, 2, 3, 4)
    torch.testing.assert_close(grown.log_prob(value), field.log_prob(value).expand(4, 3))


def test_pyro_s_shape_of_a_draw_is_not_hidden_by_the_grid_s() -> None:
    field = GaussianField((3, 4), (1.0, 2.0), channels=2).expand((5,))
    assert field.grid_shape == (3, 4)
    assert field.shape((7,)) == (7, 5, 2, 3, 4)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.0)])
def test_from_sd_sets_the_mean_marginal_variance_on_any_spacing(spacing: tuple[float, ...]) -> None:
    field = GaussianField.from_sd((8, 6, 7), spacing, sd=3.0, length_mm=4.0, channels=3)
    assert field.kappa.item() == pytest.approx(0.25)
    assert field.variance.mean().item() == pytest.approx(9.0, rel=1e-9)
    assert field.variance.shape == (3, 8, 6, 7)


def test_from_sd_means_the_same_correlation_in_mm_on_a_coarse_and_a_fine_grid() -> None:
    """Correlation at 8 mm, on lines of 1 mm and 2 mm: the field is that of the continuum, not of the grid."""

    def correlation(n: int, h: float) -> float:
        field = GaussianField.from_sd((n,), (h,), 1.0, 6.0)
        unit = torch.zeros(1, n)
        unit[0, n // 2] = 1
        covariance = field.covariance_matvec(unit)[0]
        return (covariance[n // 2 + round(8 / h)] / covariance[n // 2]).item()

    assert correlation(129, 1.0) == pytest.approx(correlation(65, 2.0), abs=0.01)
    # Matérn with ν = 3/2 (α = 2 in one dimension).
    assert correlation(129, 1.0) == pytest.approx((1 + 8 / 6) * math.exp(-8 / 6), abs=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"spacing": (1.0, -1.0)},
        {"spacing": (1.0,)},
        {"strength": 0.0},
        {"kappa": 0.0},
        {"kappa": torch.tensor([0.1, -1.0])},
        {"alpha": 0.0},
    ],
)
def test_impossible_parameters_are_refused(options: dict[str, object]) -> None:
    arguments: dict[str, object] = {"shape": (3, 3), "spacing": (1.0, 1.0)} | options
    with pytest.raises(ValueError, match="expected"):
        GaussianField(**arguments)  # type: ignore[arg-type]


def test_float32_fields_stay_float32() -> None:
    field = GaussianField((4, 4), (1.0, 1.0), torch.tensor(1.0, dtype=torch.float32), 0.5)
    assert field.rsample().dtype == torch.float32
    assert field.log_prob(field.rsample()).dtype == torch.float32


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
@pytest.mark.parametrize("channels", [1, 2])
def test_divergence_of_two_fields_is_that_of_dense_algebra(
    shape: tuple[int, ...], spacing: tuple[float, ...], channels: int
) -> None:
    numbers = ((1.7, 0.4, 2.0), (0.6, 0.9, 1.5))
    fields, dense = [], []
    for strength, kappa, alpha in numbers:
        loc = torch.randn(channels, *shape)
        fields.append(GaussianField(shape, spacing, strength, kappa, alpha, channels, loc))
        precision = dense_precision(shape, spacing, strength, kappa, alpha, channels)
        dense.append(torch.distributions.MultivariateNormal(loc.flatten(), precision_matrix=precision))
    expected = torch.distributions.kl_divergence(dense[0], dense[1])
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(torch.distributions.kl_divergence(fields[0], fields[1]), expected, **close)
    itself = torch.distributions.kl_divergence(fields[0], fields[0])
    torch.testing.assert_close(itself, torch.zeros(()), **close)


def test_divergence_of_batches_is_that_of_each_and_of_other_shapes_is_refused() -> None:
    strength = torch.tensor([0.5, 2.0])
    q, p = GaussianField((3, 4), (1.0, 2.0), strength, 0.5), GaussianField((3, 4), (1.0, 2.0), 1.0, 0.8, loc=0.3)
    both = torch.distributions.kl_divergence(q, p)
    assert both.shape == (2,)
    for value, each in zip(both, strength, strict=True):
        one = GaussianField((3, 4), (1.0, 2.0), each, 0.5)
        torch.testing.assert_close(value, torch.distributions.kl_divergence(one, p))
    with pytest.raises(ValueError, match="one shape"):
        torch.distributions.kl_divergence(p, GaussianField((4, 3), (1.0, 2.0)))
