"""Changes since baseline: the collapsed density against the dense one."""

from __future__ import annotations

import math

import pytest
import torch
from cases import followed_people
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import MultivariateNormal

from probmed.slopes import DenseKernels, FeatureKernels, FollowUps, SubjectChange, among, collapse

pytestmark = pytest.mark.usefixtures("float64")

TAU = [0.7, 0.3]


def dense_covariance(matrices: Tensor, visits: FollowUps, tau: Tensor, noise: Tensor, baseline: Tensor) -> Tensor:
    n = len(visits)
    spread = torch.zeros(n, visits.people).index_put((torch.arange(n), visits.subject), visits.delta)
    same = (visits.subject[:, None] == visits.subject).to(tau)
    return spread @ torch.tensordot(tau, matrices, 1) @ spread.T + noise * torch.eye(n) + baseline * same


@pytest.mark.parametrize("baseline", [0.0, 0.2])
def test_density_is_the_dense_one_with_the_same_gradient(baseline: float) -> None:
    design, kernels, visits = followed_people()
    slope, change = design @ torch.tensor([0.5, -1.0]), torch.randn(len(visits))

    def collapsed(tau: Tensor, noise: Tensor, first: Tensor, slope: Tensor, change: Tensor) -> Tensor:
        return SubjectChange(slope, kernels, tau, visits, noise, first).log_prob(change)

    def dense(tau: Tensor, noise: Tensor, first: Tensor, slope: Tensor, change: Tensor) -> Tensor:
        covariance = dense_covariance(kernels.matrices, visits, tau, noise, first)
        return MultivariateNormal(visits.delta * slope[visits.subject], covariance).log_prob(change)

    leaves = [x.requires_grad_() for x in (torch.tensor(TAU), torch.tensor(0.4), torch.tensor(baseline), slope, change)]
    ours, theirs = collapsed(*leaves), dense(*leaves)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    assert gradcheck(lambda tau: collapsed(tau, *(x.detach() for x in leaves[1:])), (leaves[0],))


def test_kernels_of_few_features_are_the_dense_ones() -> None:
    _, _, visits = followed_people()
    features = (torch.randn(6, 2), torch.randn(6, 3))
    dense, low = DenseKernels(torch.stack([f @ f.T for f in features])), FeatureKernels(features)
    tau, diagonal, x = torch.tensor([0.5, 0.0]), torch.rand(6) + 0.1, torch.randn(6, 2)
    a, b = dense.plus(tau, diagonal), low.plus(tau, diagonal)
    torch.testing.assert_close(a.solve(x), b.solve(x))
    torch.testing.assert_close(a.logdet(), b.logdet())
    for k in range(2):
        torch.testing.assert_close(dense.product(k, x), low.product(k, x))
        torch.testing.assert_close(dense.diagonal(k), low.diagonal(k))
    change = torch.randn(len(visits))
    both = [SubjectChange(torch.zeros(6), r, torch.tensor(TAU), visits, torch.tensor(0.3), torch.tensor(0.3)).log_prob(change) for r in (dense, low)]
    torch.testing.assert_close(both[0], both[1])


def test_one_kernel_and_a_constant_diagonal_take_one_decomposition_and_give_the_same() -> None:
    root = torch.randn(6, 4)
    kernel, x = DenseKernels((root @ root.T)[None]), torch.randn(6, 2)

    def of(tau: Tensor, c: Tensor, last: float) -> Tensor:
        factor = kernel.plus(tau[None], c * torch.tensor([1.0] * 5 + [last]))
        return factor.logdet() + factor.solve(x).square().sum()

    leaves = torch.tensor(0.6, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    one, other = of(*leaves, 1.0), of(*leaves, 1.0 + 1e-15)
    torch.testing.assert_close(one, other)
    assert type(kernel.plus(leaves[0][None], torch.ones(6))) is not type(kernel.plus(leaves[0][None], torch.rand(6)))
    for a, b in zip(torch.autograd.grad(one, leaves), torch.autograd.grad(other, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("low_rank", [False, True])
def test_draws_have_the_covariance_of_the_density(low_rank: bool) -> None:
    features = (torch.randn(6, 2), torch.randn(6, 3))
    _, _, visits = followed_people()
    dense = DenseKernels(torch.stack([f @ f.T for f in features]))
    relationship = FeatureKernels(features) if low_rank else dense
    tau, noise, first, slope = torch.tensor(TAU), torch.tensor(0.4), torch.tensor(0.2), torch.linspace(-1, 1, 6)
    draws = SubjectChange(slope, relationship, tau, visits, noise, first).sample((20_000,))
    covariance = dense_covariance(dense.matrices, visits, tau, noise, first)
    mean = visits.delta * slope[visits.subject]
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (draws - mean).T, upper=False)
    # Whitened by the stated covariance they are white: entries of the sample covariance have an sd of 1/√20000 (√2 of it on the diagonal).
    assert float((torch.cov(z) - torch.eye(len(visits))).abs().max()) < 5 * math.sqrt(2 / 20_000)
    assert float(z.mean(1).abs().max()) < 5 / math.sqrt(20_000)


def test_columns_have_the_kronecker_density_with_the_same_gradient() -> None:
    design, kernels, visits = followed_people()
    slope, change = design @ torch.randn(2, 3), torch.randn(len(visits), 3)

    def collapsed(tau: Tensor, noise: Tensor, first: Tensor, scales: Tensor) -> Tensor:
        return SubjectChange(slope, kernels, tau, visits, noise, first, scales).log_prob(change)

    def kronecker(tau: Tensor, noise: Tensor, first: Tensor, scales: Tensor) -> Tensor:
        covariance = torch.kron(scales.diag(), dense_covariance(kernels.matrices, visits, tau, noise, first))
        mean = (visits.delta[:, None] * slope[visits.subject]).T.flatten()
        return MultivariateNormal(mean, covariance).log_prob(change.T.flatten())

    leaves = [torch.tensor(x, requires_grad=True) for x in (TAU, 0.4, 0.2, [0.5, 2.0, 1.3])]
    ours, theirs = collapsed(*leaves), kronecker(*leaves)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_draws_of_columns_have_their_scales_and_a_row_with_a_gap_is_left_out() -> None:
    design, kernels, visits = followed_people()
    scales = torch.tensor([0.25, 4.0])
    rest = (kernels, torch.tensor(TAU), visits, torch.tensor(0.4), torch.tensor(0.2))
    distribution = SubjectChange(design @ torch.ones(2, 2), *rest, scales)
    assert distribution.event_shape == (len(visits), 2)
    draws = distribution.sample((20_000,))
    covariance = dense_covariance(kernels.matrices, visits, torch.tensor(TAU), torch.tensor(0.4), torch.tensor(0.2))
    ratio = draws.var(0) / torch.outer(covariance.diagonal(), scales)
    # A sample variance of 20000 has a relative standard deviation of √(2/20000); twelve of them.
    assert float((ratio - 1).abs().max()) < 5 * math.sqrt(2 / 20_000)
    departures = draws - draws.mean(0)
    assert float((departures[..., 0] * departures[..., 1]).mean(0).abs().max()) < 5 * float(covariance.diagonal().max()) / math.sqrt(20_000)
    change = draws[0].clone()
    change[2, 1] = torch.nan
    known = torch.arange(len(visits)) != 2
    short = SubjectChange(design @ torch.ones(2, 2), kernels, torch.tensor(TAU), visits.only(known), *rest[3:], scales)
    torch.testing.assert_close(distribution.log_prob(change), short.log_prob(change[known]))


def test_visits_that_are_not_known_are_left_out() -> None:
    design, kernels, visits = followed_people()
    change = torch.randn(len(visits))
    rest = (design[:, 1], kernels, torch.tensor(TAU))
    noises = torch.tensor(0.3), torch.tensor(0.1)
    known = torch.ones(len(visits), dtype=torch.bool)
    known[[2, 4]] = False  # person 1 then has none
    holed = SubjectChange(*rest, visits, *noises).log_prob(change.masked_fill(~known, torch.nan))
    short = SubjectChange(*rest, visits.only(known), *noises).log_prob(change[known])
    torch.testing.assert_close(holed, short)
    told = collapse(visits.only(known), change[known], *noises)
    assert told.seen.tolist() == [0, 2, 3, 5]
    assert among(kernels, told.seen).people == 4


def test_what_is_no_cohort_is_refused() -> None:
    with pytest.raises(ValueError, match="other than 0"):
        FollowUps(torch.tensor([0.0]), torch.tensor([0]), 1)
    with pytest.raises(ValueError, match="other than 0"):
        FollowUps(torch.tensor([torch.nan]), torch.tensor([0]), 1)
    with pytest.raises(ValueError, match=r"subjects in \[0, 2\)"):
        FollowUps(torch.tensor([1.0]), torch.tensor([2]), 2)
    with pytest.raises(ValueError, match="delta and subject"):
        FollowUps(torch.tensor([1.0, 2.0]), torch.tensor([0]), 2)
    with pytest.raises(ValueError, match="symmetric"):
        DenseKernels(torch.tensor([[[1.0, 0.5], [0.2, 1.0]]]))
    with pytest.raises(ValueError, match="matrices"):
        DenseKernels(torch.eye(2))
    _, kernels, visits = followed_people()
    with pytest.raises(ValueError, match="one number of people"):
        SubjectChange(torch.zeros(5), kernels, torch.tensor(TAU), visits, torch.tensor(1.0), torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"scales \(J,\)"):
        SubjectChange(torch.zeros(6, 2), kernels, torch.tensor(TAU), visits, torch.tensor(1.0), torch.tensor(0.0), torch.ones(3))
    with pytest.raises(ValueError, match="no batch"):
        SubjectChange(torch.zeros(6), kernels, torch.tensor(TAU), visits, torch.tensor(1.0), torch.tensor(0.0)).expand([2])
