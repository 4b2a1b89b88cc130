"""Kernels against their formulas, one conformance suite for all of them, and covariances of many visits against dense algebra."""

from __future__ import annotations

import functools
import inspect
import io
import math
from collections.abc import Callable
from typing import Any

import gpytorch
import numpy as np
import pytest
import scipy.stats
import torch
from gpytorch.kernels import (
    AdditiveKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    ProductKernel,
    RBFKernel,
    ScaleKernel,
)
from linear_operator.operators import DenseLinearOperator
from linear_operator.operators.low_rank_root_added_diag_linear_operator import (
    LowRankRootAddedDiagLinearOperator,
)
from torch import Tensor
from torch.distributions import Binomial, MultivariateNormal

import probmed.kernels
from probmed.kernels import (
    ColumnGaussian,
    ColumnLinear,
    FeatureKernel,
    GeneticRelationship,
    GenotypeGaussian,
    GivenRelationship,
    IdentityByState,
    InterceptSlope,
    LevelCorrelation,
    PhenotypeGaussian,
    PhenotypeLinear,
    SameLevel,
    SameSubject,
    StackedCovariance,
    Visits,
    VisitSums,
    allele_frequencies,
    beta_weights,
    by_region,
    covariances,
    exact_algebra,
    mixed_columns,
    power_weights,
    stacked_features,
)
from probmed.kernels.features import StackedRoot

pytestmark = pytest.mark.usefixtures("float64")

NAN = float("nan")
FREQUENCIES = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.05], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 1.5, 3.0], dtype=torch.float64)
LEVELS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def dense(kernel: Kernel, *x: Tensor) -> Tensor:
    matrix: Tensor = kernel(*x).to_dense()
    return matrix


def genotypes(*size: int, frequencies: Tensor = FREQUENCIES) -> Tensor:
    return Binomial(2, frequencies).sample(size)


def levels(*size: int) -> Tensor:
    return torch.multinomial(LEVELS, math.prod(size), replacement=True).reshape(*size, 1).to(LEVELS)


def with_gaps(x: Tensor, fraction: float) -> Tensor:
    return torch.where(torch.rand(x.shape) < fraction, NAN, x)


def shaken(kernel: Kernel) -> Kernel:
    """Parameters away from their symmetric starts."""
    for parameter in kernel.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return kernel


# What every kernel must do.


class Conformance:
    """A kernel's class says how to make one and its rows; the tests are these."""

    missing = True
    """Whether its rows may have NaN."""

    def kernel(self, **kwargs: Any) -> Kernel:
        raise NotImplementedError

    def rows(self, *size: int) -> Tensor:
        """Rows of input without gaps, ``(*size, D)``."""
        raise NotImplementedError

    def input(self, *size: int, fraction: float = 0.3) -> Tensor:
        return with_gaps(self.rows(*size), fraction if self.missing else 0.0)

    @pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("n", [3, 40])
    def test_symmetric_and_positive_semi_definite_whatever_is_missing(self, n: int, fraction: float) -> None:
        x = self.input(n, fraction=fraction)
        x = torch.cat([x, x[:2]])
        matrix = dense(shaken(self.kernel()), x).detach()
        torch.testing.assert_close(matrix, matrix.mT, rtol=0, atol=1e-13)
        values = torch.linalg.eigvalsh(matrix)
        assert values[-1] > 0 or fraction == 1.0
        assert values[0] > -1e-12 * max(1.0, float(values[-1]))

    @pytest.mark.parametrize("n", [3, 40])
    def test_diagonal(self, n: int) -> None:
        kernel, x = shaken(self.kernel()), self.input(n)
        matrix = dense(kernel, x)
        torch.testing.assert_close(kernel(x, diag=True), matrix.diagonal())
        torch.testing.assert_close(kernel(x).diagonal(dim1=-1, dim2=-2), matrix.diagonal())

    @pytest.mark.parametrize(("n", "m"), [(3, 2), (40, 30), (40, 1)])
    def test_cross_covariance_is_the_corner_of_the_joint_matrix(self, n: int, m: int) -> None:
        kernel, x = shaken(self.kernel()), self.input(n + m)
        joint = dense(kernel, x)
        torch.testing.assert_close(dense(kernel, x[:n], x[n:]), joint[:n, n:])
        torch.testing.assert_close(dense(kernel, x[:n]), joint[:n, :n])

    @pytest.mark.parametrize("n", [3, 40])
    def test_batch_of_rows(self, n: int) -> None:
        kernel, x = shaken(self.kernel()), self.input(2, n)
        torch.testing.assert_close(dense(kernel, x), torch.stack([dense(kernel, part) for part in x]))
        torch.testing.assert_close(
            dense(kernel, x, x[0]), torch.stack([dense(kernel, part, x[0]) for part in x])
        )

    def test_gradient_of_every_parameter(self) -> None:
        kernel, x = shaken(self.kernel()), self.input(12)
        weights = torch.randn(12, 12)

        def total() -> Tensor:
            return (weights * dense(kernel, x)).sum()

        for name, parameter in kernel.named_parameters():
            (gradient,) = torch.autograd.grad(total(), parameter)
            assert gradient.any(), name
            flat, numerical = parameter.data.view(-1), torch.zeros(parameter.numel())
            for i, value in enumerate(flat.tolist()):
                ends = []
                for step in (1e-5, -1e-5):
                    flat[i] = value + step
                    ends.append(total().item())
                flat[i] = value
                numerical[i] = (ends[0] - ends[1]) / 2e-5
            torch.testing.assert_close(gradient.flatten(), numerical, rtol=1e-6, atol=1e-7)

    def test_dtype(self) -> None:
        kernel, x = shaken(self.kernel()), self.input(12)
        expected = dense(kernel, x)
        single = dense(kernel.to(torch.float32), x.to(torch.float32))
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)

    def test_save_and_load(self) -> None:
        kernel, other, x = shaken(self.kernel()), shaken(self.kernel()), self.input(12)
        for constant in other.buffers():
            if constant.is_floating_point():
                constant.mul_(0.9)
        buffer = io.BytesIO()
        torch.save(kernel.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        assert torch.equal(dense(other, x), dense(kernel, x))


class OneKernel(Conformance):
    """A class of its own, not a composition: it has batches of parameters and chooses its columns."""

    learns = True
    """Whether it has parameters; without any, its scale has the batches."""

    @pytest.mark.parametrize("n", [3, 40])
    def test_batch_of_parameters(self, n: int) -> None:
        two, x = torch.Size([2]), self.input(2, n)
        kernel = shaken(
            self.kernel(batch_shape=two) if self.learns else ScaleKernel(self.kernel(), batch_shape=two)
        )
        assert kernel(x[0]).shape == (2, n, n)
        singles = [kernel[i] for i in range(2)]
        torch.testing.assert_close(
            dense(kernel, x), torch.stack([dense(k, part) for k, part in zip(singles, x, strict=True)])
        )
        torch.testing.assert_close(
            dense(kernel, x[0]).expand(2, n, n), torch.stack([dense(k, x[0]) for k in singles])
        )
        torch.testing.assert_close(
            kernel(x, diag=True).expand(2, n), dense(kernel, x).diagonal(dim1=-2, dim2=-1)
        )
        torch.testing.assert_close(kernel(x)[1, :2, 1:].to_dense(), dense(kernel, x)[1, :2, 1:])

    def test_active_dims(self) -> None:
        kernel, x = shaken(self.kernel()), self.input(12)
        d = x.shape[-1]
        wide = torch.randn(12, d + 2)
        wide[:, 1 : d + 1] = x
        chosen = self.kernel(active_dims=list(range(1, d + 1)))
        chosen.load_state_dict({**kernel.state_dict(), "active_dims": chosen.active_dims})
        torch.testing.assert_close(dense(chosen, wide), dense(kernel, x))


class TestGeneticRelationship(OneKernel):
    learns = False

    def kernel(self, **kwargs: Any) -> Kernel:
        return GeneticRelationship(FREQUENCIES, WEIGHTS, **kwargs)

    def rows(self, *size: int) -> Tensor:
        return genotypes(*size)


class TestGenotypeGaussian(TestGeneticRelationship):
    learns = True

    def kernel(self, **kwargs: Any) -> Kernel:
        return GenotypeGaussian(FREQUENCIES, WEIGHTS, **kwargs)


class TestIdentityByState(TestGeneticRelationship):
    def kernel(self, **kwargs: Any) -> Kernel:
        return IdentityByState(FREQUENCIES, WEIGHTS, **kwargs)


class TestGivenRelationship(OneKernel):
    learns = missing = False

    def kernel(self, **kwargs: Any) -> Kernel:
        root = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
        return GivenRelationship(root @ root.mT, **kwargs)

    def rows(self, *size: int) -> Tensor:
        return torch.randint(6, (*size, 1)).to(torch.get_default_dtype())


class TestColumnGaussian(OneKernel):
    def kernel(self, **kwargs: Any) -> Kernel:
        return ColumnGaussian(
            torch.tensor([0.1, -1.0, 2.0]), torch.tensor([0.5, 1.0, 3.0]), ard_num_dims=3, **kwargs
        )

    def rows(self, *size: int) -> Tensor:
        return torch.randn(*size, 3)


class TestOneLengthscale(TestColumnGaussian):
    def kernel(self, **kwargs: Any) -> Kernel:
        return ColumnGaussian(**kwargs)


class TestColumnLinear(TestColumnGaussian):
    def kernel(self, **kwargs: Any) -> Kernel:
        return ColumnLinear(
            torch.tensor([0.1, -1.0, 2.0]), torch.tensor([0.5, 1.0, 3.0]), ard_num_dims=3, **kwargs
        )


class TestPhenotypeGaussian(TestColumnGaussian):
    def kernel(self, **kwargs: Any) -> Kernel:
        return PhenotypeGaussian(3, **kwargs)


class TestPhenotypeLinear(TestColumnGaussian):
    def kernel(self, **kwargs: Any) -> Kernel:
        return PhenotypeLinear(3, **kwargs)


class TestSameLevel(OneKernel):
    learns = False

    def kernel(self, **kwargs: Any) -> Kernel:
        return SameLevel(LEVELS, **kwargs)

    def rows(self, *size: int) -> Tensor:
        return levels(*size)


class TestLevelCorrelation(TestSameLevel):
    learns = True

    def kernel(self, **kwargs: Any) -> Kernel:
        return LevelCorrelation(LEVELS, rank=2, **kwargs)


class TestSameSubject(OneKernel):
    learns = missing = False

    def kernel(self, **kwargs: Any) -> Kernel:
        return SameSubject(**kwargs)

    def rows(self, *size: int) -> Tensor:
        return torch.randint(5, (*size, 1)).to(torch.get_default_dtype())


class TestInterceptSlope(OneKernel):
    missing = False

    def kernel(self, **kwargs: Any) -> Kernel:
        return InterceptSlope(**kwargs)

    def rows(self, *size: int) -> Tensor:
        return torch.randn(*size, 1)


class TestMixedSum(Conformance):
    def kernel(self, **kwargs: Any) -> Kernel:
        return mixed_columns([0, 2], {1: LEVELS}, "sum", sd=torch.tensor([0.5, 2.0]), rank=1)

    def rows(self, *size: int) -> Tensor:
        return torch.cat([torch.randn(*size, 1), levels(*size), torch.randn(*size, 1)], -1)


class TestMixedProduct(TestMixedSum):
    def kernel(self, **kwargs: Any) -> Kernel:
        return mixed_columns([0, 2], {1: LEVELS}, "product", sd=torch.tensor([0.5, 2.0]), rank=1)


class TestRegions(Conformance):
    def kernel(self, **kwargs: Any) -> Kernel:
        return by_region({"a": [0, 3], "b": [1, 2, 4]}, FREQUENCIES, WEIGHTS, IdentityByState)

    def rows(self, *size: int) -> Tensor:
        return genotypes(*size)


class TestGenotypesTimesTime(Conformance):
    """A genetic effect on the rate of change, and each person's own process."""

    missing = False

    def kernel(self, **kwargs: Any) -> Kernel:
        genetic = GeneticRelationship(FREQUENCIES, active_dims=[0, 1, 2, 3, 4]) * LinearKernel(
            active_dims=[5]
        )
        own = SameSubject(active_dims=[6]) * MaternKernel(1.5, active_dims=[5])
        return ScaleKernel(genetic) + ScaleKernel(own)

    def rows(self, *size: int) -> Tensor:
        return torch.cat([genotypes(*size), torch.rand(*size, 1), torch.randint(4, (*size, 1))], -1)


def test_every_kernel_has_its_conformance_class() -> None:
    exported = [getattr(probmed.kernels, name) for name in probmed.kernels.__all__]
    kernels = {item for item in exported if inspect.isclass(item) and issubclass(item, Kernel)} - {
        FeatureKernel
    }
    suites = [
        item
        for item in globals().values()
        if inspect.isclass(item) and issubclass(item, OneKernel) and item is not OneKernel
    ]
    assert {type(suite().kernel()) for suite in suites} == kernels
    assert all(suite.__name__.startswith("Test") for suite in suites)


# Genotypes.


def test_allele_frequencies_ignore_the_missing() -> None:
    frequencies = allele_frequencies(torch.tensor([[0.0, 2.0], [1.0, NAN], [1.0, 1.0]]))
    torch.testing.assert_close(frequencies, torch.tensor([1 / 3, 0.75]))


def test_weights() -> None:
    torch.testing.assert_close(power_weights(FREQUENCIES, 0.5), (2 * FREQUENCIES * (1 - FREQUENCIES)).sqrt())
    minor = np.minimum(FREQUENCIES.numpy(), 1 - FREQUENCIES.numpy())
    np.testing.assert_allclose(beta_weights(FREQUENCIES).numpy(), scipy.stats.beta.pdf(minor, 1, 25) ** 2)


def test_genetic_relationship_is_the_mean_product_of_standardised_counts() -> None:
    x = genotypes(4)
    standardised = (x - 2 * FREQUENCIES) / (2 * FREQUENCIES * (1 - FREQUENCIES)).sqrt()
    torch.testing.assert_close(dense(GeneticRelationship(FREQUENCIES), x), standardised @ standardised.mT / 5)
    x[1, 2] = NAN
    standardised[1, 2] = 0
    torch.testing.assert_close(dense(GeneticRelationship(FREQUENCIES), x), standardised @ standardised.mT / 5)


@pytest.mark.parametrize("alpha", [-1.0, -0.25, 0.0])
def test_genetic_relationship_has_unit_variance_under_hardy_weinberg(alpha: float) -> None:
    kernel = GeneticRelationship(FREQUENCIES, power_weights(FREQUENCIES, alpha))
    counts = torch.cartesian_prod(*[torch.arange(3.0)] * 5)
    chances = Binomial(2, FREQUENCIES).log_prob(counts).sum(-1).exp()
    assert float(chances @ kernel(counts, diag=True)) == pytest.approx(1.0)


@pytest.mark.parametrize("make", [GeneticRelationship, GenotypeGaussian, IdentityByState])
def test_genetic_kernels_do_not_depend_on_which_allele_is_counted(make: Callable[..., Kernel]) -> None:
    x = with_gaps(genotypes(8), 0.2)
    torch.testing.assert_close(
        dense(make(1 - FREQUENCIES, WEIGHTS), 2 - x), dense(make(FREQUENCIES, WEIGHTS), x)
    )


def test_few_variants_make_a_low_rank_root_and_many_a_dense_matrix() -> None:
    kernel = GeneticRelationship(FREQUENCIES)
    assert isinstance(kernel(genotypes(6)).evaluate_kernel(), StackedRoot)
    assert isinstance(kernel(genotypes(5)).evaluate_kernel(), DenseLinearOperator)


def test_genotype_gaussian_without_gaps_is_gpytorchs_on_scaled_counts() -> None:
    x, kernel, other = genotypes(9), GenotypeGaussian(FREQUENCIES), RBFKernel()
    kernel.lengthscale = other.lengthscale = 0.7
    scaled = x / (2 * FREQUENCIES * (1 - FREQUENCIES) * 5).sqrt()
    torch.testing.assert_close(dense(kernel, x), dense(other, scaled))


def test_identity_by_state_is_the_weighted_mean_share_of_alleles() -> None:
    x, share = genotypes(7), WEIGHTS / WEIGHTS.sum()
    expected = ((1 - (x.unsqueeze(1) - x).abs() / 2) * share).sum(-1)
    torch.testing.assert_close(dense(IdentityByState(FREQUENCIES, WEIGHTS), x), expected)
    torch.testing.assert_close(dense(IdentityByState(FREQUENCIES), x).diagonal(), torch.ones(7))


def test_identity_by_state_with_a_missing_count_is_its_expectation() -> None:
    p = torch.tensor([0.3])
    kernel, counts = IdentityByState(p), torch.arange(3.0).unsqueeze(-1)
    chances = Binomial(2, p).log_prob(counts).exp()
    full, gap = dense(kernel, counts), torch.full((1, 1), NAN)
    torch.testing.assert_close(dense(kernel, gap, counts), chances.mT @ full)
    torch.testing.assert_close(dense(kernel, gap), chances.mT @ full @ chances)


def test_regions_add_up_to_the_whole() -> None:
    x, regions = with_gaps(genotypes(9), 0.2), {"a": [0, 3], "b": [1, 2, 4]}
    parts = by_region(regions, FREQUENCIES)
    for part, columns in zip(parts.kernels, regions.values(), strict=True):
        part.outputscale = len(columns) / 5
    torch.testing.assert_close(dense(parts, x), dense(GeneticRelationship(FREQUENCIES), x))


def test_unusable_genotypes() -> None:
    with pytest.raises(ValueError, match="got 2 that are not: leave out variants that do not vary"):
        GeneticRelationship(torch.tensor([0.0, 0.5, 1.0]))
    with pytest.raises(ValueError, match=r"got \(5,\) and \(4,\)"):
        IdentityByState(FREQUENCIES, WEIGHTS[:4])
    for bad in (-WEIGHTS, 0 * WEIGHTS, WEIGHTS / 0):
        with pytest.raises(ValueError, match="expected weights that are finite"):
            GenotypeGaussian(FREQUENCIES, bad)
    for kernel in (
        GeneticRelationship(FREQUENCIES),
        GenotypeGaussian(FREQUENCIES),
        IdentityByState(FREQUENCIES),
    ):
        with pytest.raises(
            ValueError, match="expected genotypes of 5 variants, as there are frequencies, got 4"
        ):
            dense(kernel, genotypes(3)[:, :4])
    with pytest.raises(ValueError, match="standardised or imputed"):
        dense(IdentityByState(FREQUENCIES), torch.full((1, 5), 0.5))


def test_unusable_relationships() -> None:
    for matrix, fault in (
        (torch.ones(2, 3), "square"),
        (torch.tensor([[1.0, 0.5], [0.4, 1.0]]), "symmetric"),
        (torch.tensor([[1.0, 1.1], [1.1, 1.0]]), "negative eigenvalue"),
    ):
        with pytest.raises(ValueError, match=fault):
            GivenRelationship(matrix)
    kernel = GivenRelationship(torch.eye(2))
    for row in (2.0, -1.0, 0.5):
        with pytest.raises(ValueError, match="from 0 to 1"):
            dense(kernel, torch.tensor([[row]]))


# Columns of tables.


def test_column_gaussian_without_gaps_is_gpytorchs() -> None:
    x, kernel, other = torch.randn(9, 3), ColumnGaussian(ard_num_dims=3), RBFKernel(ard_num_dims=3)
    kernel.lengthscale = other.lengthscale = torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(dense(kernel, x), dense(other, x))


def test_column_gaussian_with_gaps_is_its_expectation() -> None:
    kernel, other = ColumnGaussian(1.0, 0.6), RBFKernel()
    kernel.lengthscale = other.lengthscale = 0.8
    nodes, weights = (torch.tensor(part) for part in np.polynomial.hermite_e.hermegauss(60))
    points, weights = (1.0 + 0.6 * nodes).unsqueeze(-1), (weights / weights.sum()).unsqueeze(-1)
    known, gap = torch.randn(4, 1), torch.full((1, 1), NAN)
    torch.testing.assert_close(dense(kernel, known, gap), dense(other, known, points) @ weights)
    torch.testing.assert_close(dense(kernel, gap), weights.mT @ dense(other, points) @ weights)


def test_column_gaussian_of_near_rows_far_from_the_mean_is_at_most_one() -> None:
    x = (1000 + torch.rand(50, 3)).to(torch.float32)
    assert float(dense(ColumnGaussian().to(torch.float32), x).detach().max()) <= 1


def test_column_linear_standardises_and_reads_a_gap_as_the_mean() -> None:
    kernel = ColumnLinear(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]), ard_num_dims=2)
    kernel.variance = torch.tensor([[0.5, 3.0]])
    x = torch.tensor([[3.0, 6.0], [NAN, -2.0]])
    torch.testing.assert_close(dense(kernel, x), torch.tensor([[3.5, -3.0], [-3.0, 3.0]]))


def test_level_correlation_is_that_of_gpytorchs_index_kernel() -> None:
    kernel = LevelCorrelation(LEVELS, rank=2)
    sd = kernel.covariance._eval_covar_matrix().diagonal().sqrt()
    correlation = kernel.covariance._eval_covar_matrix() / torch.outer(sd, sd)
    torch.testing.assert_close(dense(kernel, torch.arange(3.0)), correlation)
    with_gap = dense(kernel, torch.tensor([NAN, 1.0]))
    torch.testing.assert_close(
        with_gap[0], torch.stack([LEVELS @ correlation @ LEVELS, (correlation @ LEVELS)[1]])
    )


@pytest.mark.parametrize("combine", ["sum", "product"])
def test_mixed_columns(combine: Any) -> None:
    x = torch.cat([torch.randn(6, 1), levels(6)], -1)
    kernel = mixed_columns([0], {1: LEVELS}, combine)
    parts = kernel.kernels if combine == "sum" else kernel.base_kernel.kernels
    parts[0].initialize(**{("base_kernel." if combine == "sum" else "") + "lengthscale": 0.4})
    gaussian, same = torch.exp(-((x[:, :1] - x[:, 0]) ** 2) / 0.32), (x[:, 1:] == x[:, 1]).to(x)
    scale = math.log(2)
    torch.testing.assert_close(
        dense(kernel, x), scale * (gaussian + same if combine == "sum" else gaussian * same)
    )


def test_unusable_columns() -> None:
    with pytest.raises(ValueError, match="positive standard deviations"):
        ColumnGaussian(sd=torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="levels 0 to 2"):
        dense(SameLevel(LEVELS), torch.tensor([[3.0]]))
    with pytest.raises(ValueError, match="one column of levels, got 2"):
        dense(SameLevel(LEVELS), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="positive frequency"):
        SameLevel(torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match="at least one column"):
        mixed_columns([], {}, "sum")


# Visits.


def test_intercept_and_slope() -> None:
    kernel, t = InterceptSlope(), torch.tensor([0.0, 1.0, 3.0])
    kernel.variances, kernel.correlation = torch.tensor([[4.0, 0.25]]), torch.tensor([[-0.6]])
    design = torch.stack([torch.ones(3), t], -1)
    covariance = torch.tensor([[4.0, -0.6], [-0.6, 0.25]])
    torch.testing.assert_close(dense(kernel, t), design @ covariance @ design.mT)


def test_a_process_for_each_subject() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.5], [2.0, 0.0], [1.0, 2.0]])
    kernel = SameSubject(active_dims=[0]) * MaternKernel(0.5, active_dims=[1])
    kernel.kernels[1].lengthscale = 2.0
    first = torch.tensor([True, True, False, True])
    expected = torch.exp(-(x[:, 1:] - x[:, 1]).abs() / 2) * (first.unsqueeze(-1) == first)
    torch.testing.assert_close(dense(kernel, x), expected)
    with pytest.raises(ValueError, match="subject for each visit, got NaN"):
        dense(SameSubject(), torch.tensor([1.0, NAN]))


# Stacked features.


def composition() -> AdditiveKernel:
    genes, time, level = [0, 1, 2, 3, 4], [5], [6]
    return AdditiveKernel(
        ScaleKernel(GeneticRelationship(FREQUENCIES, active_dims=genes)),
        ScaleKernel(
            ProductKernel(
                IdentityByState(FREQUENCIES, active_dims=genes),
                LinearKernel(active_dims=time),
                SameLevel(LEVELS, active_dims=level),
            )
        ),
        LevelCorrelation(LEVELS, active_dims=level),
        ColumnLinear(active_dims=time),
    )


def table(n: int) -> Tensor:
    return torch.cat([genotypes(n), torch.rand(n, 1), levels(n)], -1)


def test_stacked_features_make_the_kernel() -> None:
    kernel, x = shaken(composition()), table(40)
    features, variances = stacked_features(kernel, x)
    assert features.shape == (40, 5 + 11 * 3 + 4 + 1)
    torch.testing.assert_close(features * variances @ features.mT, dense(kernel, x))
    weights, parameters = torch.randn(40, 40), list(kernel.parameters())
    matrices = (dense(kernel, x), features * variances @ features.mT)
    torch.testing.assert_close(
        *(torch.autograd.grad((weights * matrix).sum(), parameters) for matrix in matrices)
    )


def test_sum_of_low_rank_kernels_is_one_root_to_gpytorch() -> None:
    kernel, x, y = shaken(composition()), table(200), torch.randn(200)
    operator = kernel(x).evaluate_kernel()
    assert isinstance(operator, StackedRoot)
    assert isinstance(operator.add_jitter(0.2), LowRankRootAddedDiagLinearOperator)
    gpytorchs = gpytorch.distributions.MultivariateNormal(torch.zeros(200), operator.add_jitter(0.2))
    exact = MultivariateNormal(torch.zeros(200), operator.to_dense() + 0.2 * torch.eye(200))
    torch.testing.assert_close(gpytorchs.log_prob(y), exact.log_prob(y))


def test_products_of_roots_stay_low_rank_while_they_are() -> None:
    kernel, other = IdentityByState(FREQUENCIES), SameLevel(LEVELS)
    x, category = genotypes(34), levels(34)
    for n, kind in ((34, StackedRoot), (33, DenseLinearOperator)):
        product = kernel(x[:n]).evaluate_kernel() * other(category[:n]).evaluate_kernel()
        assert type(product) is kind
        close_to = dense(kernel, x[:n]) * dense(other, category[:n])
        torch.testing.assert_close(product.to_dense(), close_to)


class Regression(gpytorch.models.ExactGP):
    def __init__(self, kernel: Kernel, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean, self.kernel = gpytorch.means.ZeroMean(), kernel
        self.likelihood.noise = 0.2

    def forward(self, x: Tensor) -> Any:
        return gpytorch.distributions.MultivariateNormal(self.mean(x), self.kernel(x))


@pytest.mark.parametrize("make", [composition, lambda: ScaleKernel(ColumnLinear())])
def test_gpytorch_predicts_with_low_rank_kernels(make: Callable[[], Kernel]) -> None:
    x, new, y = table(60), table(4), torch.randn(60)
    kernel = shaken(make()).requires_grad_(False)
    gain = dense(kernel, new, x) @ (dense(kernel, x) + 0.2 * torch.eye(60)).inverse()
    with exact_algebra():
        prediction = Regression(kernel, x, y).eval()(new)
        torch.testing.assert_close(prediction.mean, gain @ y)
        torch.testing.assert_close(
            prediction.covariance_matrix, dense(kernel, new) - gain @ dense(kernel, x, new)
        )


def test_no_finite_features() -> None:
    with pytest.raises(ValueError, match="finitely many features.*got RBFKernel"):
        stacked_features(ScaleKernel(RBFKernel()) + LinearKernel(), torch.zeros(3, 1))


# Covariances of many visits.

SUBJECTS = torch.tensor([7, 3, 7, 1, 9, 3, 7, 4, 9, 1, 4])


class Cohort:
    """Irregular visits of five subjects, a stacked root of four features, an intercept, slope and noise; and the dense matrix of it all."""

    def __init__(self, subjects: Tensor = SUBJECTS, features: int = 4) -> None:
        n = len(subjects)
        self.subjects, self.visits = subjects, Visits.of(subjects)
        self.features, self.variances = torch.randn(n, features), torch.rand(features) + 0.1
        self.times, self.y = torch.rand(n, 1), torch.randn(n)
        self.kernel, self.noise = shaken(InterceptSlope()), torch.tensor(0.3)

    def covariance(self, **changes: Any) -> StackedCovariance:
        parts = {"features": self.features, "variances": self.variances, "noise": self.noise} | changes
        return StackedCovariance(
            parts["features"],
            parts["variances"],
            self.visits,
            self.visits.blocks(self.kernel, self.times, parts["noise"]),
        )

    def dense(self) -> Tensor:
        same = dense(SameSubject(), self.subjects.to(self.y).unsqueeze(-1))
        blocks = same * dense(self.kernel, self.times) + self.noise * torch.eye(len(self.y))
        return (self.features * self.variances @ self.features.mT + blocks).detach()


@pytest.fixture(params=["whole", "chunks"])
def cohort(request: pytest.FixtureRequest, float64: None, monkeypatch: pytest.MonkeyPatch) -> Cohort:
    """A cohort in one chunk, and in chunks of one or two people and panels of three features."""
    if request.param == "chunks":
        monkeypatch.setattr(covariances, "_CHUNK", 4)
        monkeypatch.setattr(covariances, "_PANEL", 3)
    return Cohort()


def test_visits_bring_people_with_as_many_visits_together() -> None:
    visits = Visits.of(SUBJECTS)
    assert visits.groups == ((2, 4), (3, 1))
    assert SUBJECTS[visits.order].tolist() == [1, 1, 3, 3, 4, 4, 9, 9, 7, 7, 7]
    assert visits.order[:4].tolist() == [3, 9, 1, 5]
    assert SUBJECTS.unique()[visits.people].tolist() == [1, 3, 4, 9, 7]
    rows = torch.randn(11, 2)
    assert torch.equal(visits.unsorted(visits.sorted(rows)), rows)
    ordered = Visits.of(SUBJECTS[visits.order])
    assert ordered.sorted(rows) is rows
    with pytest.raises(ValueError, match="subject of each row"):
        Visits.of(torch.zeros(0))


def test_stacked_covariance_is_the_dense_one(cohort: Cohort) -> None:
    covariance, matrix, columns = cohort.covariance(), cohort.dense(), torch.randn(11, 3)
    close = functools.partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)
    assert covariance.shape == matrix.shape
    for x in (cohort.y, columns):
        close(covariance.matmul(x), matrix @ x)
        close(covariance.solve(x), torch.linalg.solve(matrix, x))
        close(
            covariance.quad_form(x),
            x.T @ torch.linalg.solve(matrix, x) if x.ndim > 1 else x @ matrix.inverse() @ x,
        )
    close(covariance.logdet(), matrix.logdet())
    close(covariance.inverse_diagonal(), matrix.inverse().diagonal())
    gaussian = MultivariateNormal(torch.zeros(11), matrix)
    close(covariance.log_prob(cohort.y), gaussian.log_prob(cohort.y))
    close(covariance.log_prob(columns), gaussian.log_prob(columns.mT))


def test_stacked_covariance_has_exact_gradients(cohort: Cohort) -> None:
    inputs = [
        part.clone().requires_grad_() for part in (cohort.features, cohort.variances, cohort.noise, cohort.y)
    ]

    def results(features: Tensor, variances: Tensor, noise: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        covariance = cohort.covariance(features=features, variances=variances, noise=noise)
        return (
            covariance.log_prob(y),
            covariance.solve(y),
            covariance.inverse_diagonal(),
            covariance.matmul(y),
        )

    assert torch.autograd.gradcheck(results, inputs)
    assert torch.autograd.gradgradcheck(lambda *parts: results(*parts)[0], inputs)


def test_whitened_gram_has_exact_gradients_whatever_becomes_of_it(cohort: Cohort) -> None:
    whitener, rows, weights = torch.randn(5, 2, 2), torch.randn(5, 2, 4), torch.randn(4, 4)
    inputs = (whitener.requires_grad_(), rows.requires_grad_())
    assert torch.autograd.gradcheck(lambda w, z: weights * covariances._WhitenedGram.apply(w, z), inputs)


def test_likelihood_keeps_no_second_copy_of_the_features() -> None:
    n, h = 600, 64
    cohort = Cohort(torch.arange(n // 3).repeat_interleave(3), h)
    cohort.variances.requires_grad_()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() != cohort.features.untyped_storage().data_ptr():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = cohort.covariance().log_prob(cohort.y)
    assert sum(kept.values()) < 8 * n * h
    value.backward()
    assert cohort.variances.grad is not None and cohort.kernel.raw_correlation.grad is not None


def test_unusable_covariances() -> None:
    cohort = Cohort()
    with pytest.raises(
        ValueError, match=r"features \(11, H\) and variances \(H,\), got \(10, 4\) and \(4,\)"
    ):
        cohort.covariance(features=cohort.features[:10])
    with pytest.raises(ValueError, match=r"got \(11, 4\) and \(3,\)"):
        cohort.covariance(variances=cohort.variances[:3])
    with pytest.raises(
        ValueError, match=r"expected blocks \[\(4, 2, 2\), \(1, 3, 3\)\], got \[\(4, 2, 2\)\]"
    ):
        StackedCovariance(cohort.features, cohort.variances, cohort.visits, [torch.eye(2).expand(4, 2, 2)])
    with pytest.raises(ValueError, match=r"expected \(11,\) or \(11, C\), got \(10,\)"):
        cohort.covariance().solve(cohort.y[:10])


def constant_cohort(copies: int = 1) -> tuple[Tensor, Tensor, Visits]:
    subjects = torch.cat([SUBJECTS + 100 * i for i in range(copies)])
    return torch.randn(5 * copies, 4), torch.randn(11 * copies, 2), Visits.of(subjects)


def test_sums_over_visits_give_the_stacked_likelihood() -> None:
    features, y, visits = constant_cohort()
    sums = VisitSums.of(features, y, visits)
    variances, intercept, noise = torch.rand(4), torch.tensor(0.7), torch.tensor(0.4)
    by_rows = features[SUBJECTS.unique(return_inverse=True)[1]]
    blocks = [(noise * torch.eye(t) + intercept).expand(people, t, t) for t, people in visits.groups]
    covariance = StackedCovariance(by_rows, variances, visits, blocks)
    torch.testing.assert_close(sums.logdet(variances, intercept, noise), covariance.logdet())
    torch.testing.assert_close(sums.quad_form(variances, intercept, noise), covariance.quad_form(y))
    torch.testing.assert_close(sums.log_prob(variances, intercept, noise), covariance.log_prob(y))
    inputs = [part.clone().requires_grad_() for part in (variances, intercept, noise)]
    assert torch.autograd.gradcheck(sums.log_prob, inputs)
    assert torch.autograd.gradgradcheck(sums.log_prob, inputs)
    single = VisitSums.of(features, y[:, 0], visits)
    torch.testing.assert_close(single.log_prob(variances, intercept, noise), covariance.log_prob(y)[:1])


def test_sums_over_visits_do_not_grow_with_people() -> None:
    few, many = (VisitSums.of(*constant_cohort(copies)) for copies in (1, 30))
    assert many.rows == 330
    for name in ("gram", "cross", "between", "within"):
        assert getattr(few, name).shape == getattr(many, name).shape
    features, y, visits = constant_cohort()
    with pytest.raises(ValueError, match="features of 5 people and 11 rows of y, got 4 and 11"):
        VisitSums.of(features[:4], y, visits)


# GPyTorch's own algebra.


def test_exact_algebra_mends_gpytorchs_default_above_800_rows() -> None:
    n, noise = 1000, 1e-3
    x, kernel = torch.rand(n, 1), RBFKernel().requires_grad_(False)
    kernel.lengthscale = 0.02
    gaussian = MultivariateNormal(torch.zeros(n), dense(kernel, x) + noise * torch.eye(n))
    y = gaussian.sample()

    def error() -> float:
        gpytorchs = gpytorch.distributions.MultivariateNormal(torch.zeros(n), kernel(x).add_jitter(noise))
        return abs(float(gpytorchs.log_prob(y) - gaussian.log_prob(y)))

    before = gpytorch.settings.max_cholesky_size.value()
    with exact_algebra():
        assert error() < 1e-6
    assert gpytorch.settings.max_cholesky_size.value() == before
    assert error() > 50  # nats
