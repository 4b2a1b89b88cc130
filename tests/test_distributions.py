"""Label mixtures and inverse Wisharts against enumeration, quadrature and scipy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.distributions import biject_to, transform_to

from probmed.distributions import Coupling, InverseWishart, LabelMixture, gaussian_log_density

LEVEL = 1e-4
"""Of each goodness-of-fit test; seeds are fixed, so that these fail only where the code changes."""

pytestmark = pytest.mark.usefixtures("float64")


def covariances(count: int, channels: int) -> Tensor:
    root = 0.4 * torch.randn(count, channels, channels).tril()
    return root @ root.mT + 0.1 * torch.eye(channels)


def mixture(
    shape: tuple[int, ...] = (2, 2),
    channels: int = 2,
    outlier: float = 0.0,
    bias: bool = False,
    coupling: Coupling | None = None,
    owner: tuple[int, ...] = (0, 1, 1, 2, 2),
) -> LabelMixture:
    """Three labels, five Gaussians."""
    owners = torch.tensor(owner)
    k, g = int(owners.max()) + 1, len(owner)
    raw = torch.rand(g) + 0.2
    mixing = raw / torch.zeros(k).index_add(0, owners, raw)[owners]
    return LabelMixture(
        torch.randn(k, *shape).log_softmax(0),
        mixing,
        torch.randn(g, channels),
        covariances(g, channels),
        owners,
        0.3 * torch.randn(channels, *shape) if bias else None,
        outlier,
        0.25,
        coupling,
    )


def gaussian(x: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """The marginal density of the channels that are not NaN, by scipy; 1 where there are none."""
    seen = ~np.isnan(x)
    if not seen.any():
        return 1.0
    return float(scipy.stats.multivariate_normal.pdf(x[seen], mean[seen], covariance[np.ix_(seen, seen)]))


def options(m: LabelMixture, image: Tensor) -> list[list[tuple[int, int, float]]]:
    """For each voxel, every explanation: (label, Gaussian or -1 for an outlier, joint density)."""
    channels, n = m.means.shape[-1], math.prod(m.grid_shape)
    log_bias = torch.zeros(channels, n) if m.log_bias is None else m.log_bias.reshape(channels, n)
    flat, prior = image.reshape(channels, n).numpy(), m.log_prior.reshape(m.labels, n).exp().numpy()
    out = []
    for v in range(n):
        beta = log_bias[:, v].exp().numpy()
        x = flat[:, v] * beta
        seen = ~np.isnan(x)
        jacobian = float(beta[seen].prod())
        here = []
        for g, k in enumerate(m.owner.tolist()):
            density = gaussian(x, m.means[g].numpy(), m.covariances[g].numpy())
            weight = float(prior[k, v]) * (1 - m.outlier) * float(m.mixing[g])
            here.append((k, g, weight * density * jacobian))
        if m.outlier:
            uniform = m.outlier_density ** int(seen.sum())
            for k in range(m.labels):
                here.append((k, -1, float(prior[k, v]) * m.outlier * uniform * jacobian))
        out.append(here)
    return out


def by_label(m: LabelMixture, image: Tensor) -> np.ndarray:
    """p(I_v, S_v = k), ``(voxels, K)``."""
    return np.array(
        [
            [sum(p for k, _, p in here if k == label) for label in range(m.labels)]
            for here in options(m, image)
        ]
    )


def energy(labels: np.ndarray, coupling: Coupling) -> float:
    """β Σ_ij w_ij [S_i ≠ S_j], every pair of neighbours once."""
    total = 0.0
    for axis, h in enumerate(coupling.spacing):
        total += (min(coupling.spacing) / h) ** 2 * float((np.diff(labels, axis=axis) != 0).sum())
    return coupling.strength * total


def with_missing(*places: tuple[int, int, int]) -> Tensor:
    """A random image of two channels on 2 × 2 voxels, NaN at (channel, i, j)."""
    image = torch.randn(2, 2, 2)
    for place in places:
        image[place] = torch.nan
    return image


IMAGES: dict[str, Callable[[], Tensor]] = {
    "whole": with_missing,
    "missing_channels": lambda: with_missing((0, 0, 1), (1, 1, 1)),
    "missing_voxel": lambda: with_missing((0, 1, 0), (1, 1, 0)),
}


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("outlier", [0.0, 0.2])
@pytest.mark.parametrize("bias", [False, True])
def test_mixture_is_the_sum_over_every_labelling_and_component(kind: str, outlier: float, bias: bool) -> None:
    m = mixture(outlier=outlier, bias=bias)
    image = IMAGES[kind]()
    total, posterior, responsibilities = 0.0, np.zeros((3, 4)), np.zeros((5, 4))
    for explanation in itertools.product(*options(m, image)):
        joint = math.prod(part[2] for part in explanation)
        total += joint
        for v, (k, g, _) in enumerate(explanation):
            posterior[k, v] += joint
            if g >= 0:
                responsibilities[g, v] += joint
    close: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
    assert m.log_prob(image).item() == pytest.approx(math.log(total), abs=1e-9)
    torch.testing.assert_close(m.posterior(image).flatten(1), torch.tensor(posterior / total), **close)
    expected = torch.tensor(responsibilities / total)
    torch.testing.assert_close(m.responsibilities(image).flatten(1), expected, **close)
    torch.testing.assert_close(m.voxel_log_prob(image).sum(), m.log_prob(image), **close)


def test_labels_likelihood_is_that_of_each_label_alone() -> None:
    m = mixture(outlier=0.1, bias=True)
    image = torch.randn(2, 2, 2)
    prior = m.log_prior
    alone = []
    for k in range(3):
        sure = torch.full_like(prior, -torch.inf)
        sure[k] = 0
        only = LabelMixture(sure, m.mixing, m.means, m.covariances, m.owner, m.log_bias, 0.1, 0.25)
        assert m.log_bias is not None
        alone.append(only.voxel_log_prob(image) - m.log_bias.sum(0))
    torch.testing.assert_close(m.label_log_likelihood(image), torch.stack(alone))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_missing_channels_leave_the_marginal_density(channels: int) -> None:
    means, blocks = torch.randn(4, channels), covariances(4, channels)
    values = torch.randn(channels, 2**channels)
    for pattern in range(2**channels):
        for c in range(channels):
            if pattern >> c & 1:
                values[c, pattern] = torch.nan
    density = gaussian_log_density(values, means, blocks)
    for v, g in itertools.product(range(values.shape[1]), range(4)):
        expected = math.log(gaussian(values[:, v].numpy(), means[g].numpy(), blocks[g].numpy()))
        assert density[g, v].item() == pytest.approx(expected, abs=1e-9)


def test_density_has_gradients_also_where_voxels_are_missing() -> None:
    m = mixture(outlier=0.1, bias=True)
    image = IMAGES["missing_channels"]()
    assert m.log_bias is not None

    def density(prior: Tensor, means: Tensor, root: Tensor, raw: Tensor, log_bias: Tensor) -> Tensor:
        mixing = raw / torch.zeros(3).index_add(0, m.owner, raw)[m.owner]
        spread = root @ root.mT + torch.eye(2)
        moved = LabelMixture(prior.log_softmax(0), mixing, means, spread, m.owner, log_bias, 0.1, 0.25)
        return moved.log_prob(image)

    inputs = (m.log_prior, m.means, torch.randn(5, 2, 2), torch.rand(5) + 0.3, m.log_bias)
    assert torch.autograd.gradcheck(density, tuple(x.clone().requires_grad_() for x in inputs))


def test_far_intensities_keep_a_finite_density_and_posterior() -> None:
    m = mixture()
    image = torch.full((2, 2, 2), 1e4)
    assert torch.isfinite(m.log_prob(image))
    torch.testing.assert_close(m.posterior(image).sum(0), torch.ones(2, 2))


@pytest.mark.parametrize("outlier", [0.0, 0.15])
@pytest.mark.parametrize("log_bias", [0.0, 0.4])
def test_density_of_one_voxel_integrates_to_one_and_draws_follow_it(outlier: float, log_bias: float) -> None:
    """One channel: quadrature over the reach of all components. Outliers lie in [0, 1/u] before the bias, and
    u is a density only there, so the part of their density outside it is subtracted.
    """
    m = mixture((1, 1), 1, outlier)
    m = LabelMixture(
        m.log_prior, m.mixing, m.means, m.covariances, m.owner, torch.full((1, 1, 1), log_bias), outlier, 0.25
    )
    beta = math.exp(log_bias)
    x = torch.linspace(-12, 12, 240_001)
    density = m.expand((len(x),)).log_prob(x[:, None, None, None]).exp()
    outside = (x * beta < 0) | (x * beta > 4)
    density = density - torch.where(outside, outlier * 0.25 * beta, 0.0)
    steps = density[:-1] + density[1:]
    cumulative = torch.cat([torch.zeros(1), (steps * (x[1] - x[0]) / 2).cumsum(0)])
    assert cumulative[-1].item() == pytest.approx(1, abs=1e-4)
    draws = m.sample((4000,)).flatten().numpy()
    test = scipy.stats.kstest(draws, lambda q: np.interp(q, x.numpy(), cumulative.numpy()))
    assert test.pvalue > LEVEL


def test_joint_draws_of_two_channels_follow_the_density() -> None:
    """Chi-square over cells of the plane whose probabilities come from a fine sum of the density."""
    m = mixture((1, 1), 2, bias=True)
    edges = torch.linspace(-6, 6, 241)
    middle = (edges[1:] + edges[:-1]) / 2
    x = torch.stack(torch.meshgrid(middle, middle, indexing="ij"), -1).reshape(-1, 2, 1, 1)
    fine = m.expand((len(x),)).log_prob(x).exp().reshape(240, 240) * (edges[1] - edges[0]) ** 2
    assert fine.sum().item() == pytest.approx(1, abs=1e-3)
    cells = fine.reshape(20, 12, 20, 12).sum((1, 3)).flatten().numpy()
    draws = m.sample((20_000,)).reshape(-1, 2).numpy()
    coarse = edges[::12].numpy()
    counts = np.histogram2d(draws[:, 0], draws[:, 1], [coarse, coarse])[0].flatten()
    assert_chi_square(counts, cells, 20_000)


def assert_chi_square(counts: np.ndarray, probabilities: np.ndarray, total: int) -> None:
    """Cells that expect fewer than five are pooled with all that is in no cell."""
    common = probabilities * total >= 5
    seen = np.append(counts[common], total - counts[common].sum())
    expected = np.append(probabilities[common], 1 - probabilities[common].sum()) * total
    if expected[-1] < 1e-6:
        assert seen[-1] == 0
        seen, expected = seen[:-1], expected[:-1]
    assert scipy.stats.chisquare(seen, expected, sum_check=False).pvalue > LEVEL


def codes(labels: Tensor, k: int) -> np.ndarray:
    """One number for each labelling ``(n, *shape)``, in the order of ``itertools.product``."""
    flat = labels.flatten(1)
    places = k ** torch.arange(flat.shape[1] - 1, -1, -1)
    return np.asarray((flat * places).sum(1).numpy())


@pytest.mark.parametrize("kind", IMAGES)
def test_label_draws_follow_the_exact_posterior(kind: str) -> None:
    m = mixture(outlier=0.1, bias=True)
    image = IMAGES[kind]()
    posterior = by_label(m, image)
    posterior /= posterior.sum(1, keepdims=True)
    exact = np.array([posterior[range(4), list(s)].prod() for s in itertools.product(range(3), repeat=4)])
    draws = m.sample_labels(image, 20_000)
    assert draws.shape == (20_000, 2, 2)
    assert draws.dtype == torch.int64
    assert_chi_square(np.bincount(codes(draws, 3), minlength=81), exact, 20_000)


def test_batched_mixtures_and_expansion_are_stacks_of_single_ones() -> None:
    singles = [mixture(bias=True) for _ in range(3)]
    names = ("log_prior", "mixing", "means", "covariances", "log_bias")
    parts: dict[str, Any] = {name: torch.stack([getattr(s, name) for s in singles]) for name in names}
    stacked = LabelMixture(owner=singles[0].owner, **parts)
    assert stacked.batch_shape == (3,)
    assert stacked.event_shape == (2, 2, 2)
    image = torch.randn(3, 2, 2, 2)
    image[0, 0, 0, 0] = torch.nan
    for index, single in enumerate(singles):
        torch.testing.assert_close(stacked.log_prob(image)[index], single.log_prob(image[index]))
        torch.testing.assert_close(stacked.posterior(image)[index], single.posterior(image[index]))
        expected = single.responsibilities(image[index])
        torch.testing.assert_close(stacked.responsibilities(image)[index], expected)
    assert stacked.sample((4,)).shape == (4, 3, 2, 2, 2)
    assert stacked.sample_labels(image, 5).shape == (5, 3, 2, 2)
    grown = stacked.expand((2, 3))
    assert grown.batch_shape == (2, 3)
    assert grown.shape((4,)) == (4, 2, 3, 2, 2, 2)
    torch.testing.assert_close(grown.log_prob(image), stacked.log_prob(image).expand(2, 3))
    assert grown.sample().shape == (2, 3, 2, 2, 2)


def test_draws_of_a_batch_differ_between_its_members() -> None:
    m = mixture().expand((2,))
    x = m.sample()
    assert not torch.equal(x[0], x[1])


@pytest.mark.parametrize(
    "change",
    [
        {"owner": torch.tensor([0, 1, 1, 2, 3])},
        {"owner": torch.tensor([0, 1])},
        {"mixing": torch.ones(4)},
        {"covariances": torch.ones(5, 2, 3)},
        {"log_prior": torch.zeros(3)},
        {"outlier": 1.0},
        {"outlier_density": 0.0},
    ],
)
def test_mixtures_that_do_not_fit_together_are_refused(change: dict[str, object]) -> None:
    m = mixture()
    names = ("log_prior", "mixing", "means", "covariances", "owner")
    with pytest.raises(ValueError, match="expected"):
        LabelMixture(**({name: getattr(m, name) for name in names} | change))


# Coupled labels.

COUPLINGS = [
    ((2, 2), (1.0, 1.0), 3),
    ((2, 3), (1.0, 2.0), 2),
    ((2, 2, 2), (2.0, 1.0, 1.5), 2),
    ((1, 4), (1.0, 1.0), 3),
]


def enumerated(unary: Tensor, coupling: Coupling) -> np.ndarray:
    """Σ_v unary_v(S_v) − energy(S) of every labelling, in the order of ``itertools.product``."""
    k, shape = unary.shape[0], tuple(unary.shape[1:])
    flat, n = unary.flatten(1).numpy(), math.prod(shape)
    scores = []
    for s in itertools.product(range(k), repeat=n):
        scores.append(flat[list(s), range(n)].sum() - energy(np.array(s).reshape(shape), coupling))
    return np.array(scores)


def log_sum(scores: np.ndarray) -> float:
    return float(torch.logsumexp(torch.tensor(scores), 0))


@pytest.mark.parametrize(("shape", "spacing", "k"), COUPLINGS)
@pytest.mark.parametrize("strength", [0.0, 0.2, 0.8, 3.0])
def test_mean_field_bounds_the_exact_sum_and_the_evidence(
    shape: tuple[int, ...], spacing: tuple[float, ...], k: int, strength: float
) -> None:
    coupling = Coupling(strength, spacing, sweeps=30)
    prior, likelihood = torch.randn(k, *shape).log_softmax(0), 2 * torch.randn(k, *shape)
    bound = coupling.bound(prior + likelihood, 0).item()
    exact = log_sum(enumerated(prior + likelihood, coupling))
    normaliser = log_sum(enumerated(prior, coupling))
    assert bound <= exact + 1e-9
    assert normaliser <= 1e-9  # hence the second bound
    assert bound <= exact - normaliser + 1e-9
    if strength == 0:
        assert bound == pytest.approx(exact, abs=1e-9)
    if strength <= 0.2:
        assert bound > exact - 0.1


def test_mean_field_is_a_local_maximum_of_its_bound() -> None:
    coupling = Coupling(0.5, (1.0, 2.0), sweeps=60)
    unary = torch.randn(3, 3, 2)
    q = coupling.mean_field(unary, 0)

    def value(logits: Tensor) -> Tensor:
        p = logits.softmax(0)
        pairs = torch.zeros(())
        for axis, weight in ((1, 1.0), (2, 0.25)):
            n = p.shape[axis]
            pairs = pairs + weight * (1 - (p.narrow(axis, 0, n - 1) * p.narrow(axis, 1, n - 1)).sum(0)).sum()
        return (p * unary).sum() - 0.5 * pairs + torch.special.entr(p).sum()

    logits = q.log().requires_grad_()
    at_q = value(logits)
    torch.testing.assert_close(at_q.detach(), coupling.bound(unary, 0))
    (gradient,) = torch.autograd.grad(at_q, logits)
    assert gradient.abs().max() < 1e-8


def test_gradient_of_the_bound_is_that_of_a_converged_mean_field() -> None:
    coupling = Coupling(0.4, (1.0, 1.0), sweeps=80)
    unary = torch.randn(3, 2, 3, requires_grad=True)
    # q is held while differentiating, which is exact at its maximum and only there: differences move q.
    assert torch.autograd.gradcheck(lambda u: coupling.bound(u, 0), (unary,), eps=1e-5, atol=1e-6)


def test_coupled_mixture_bounds_its_evidence() -> None:
    coupling = Coupling(0.4, (1.0, 2.0), sweeps=30)
    m = mixture(outlier=0.1, bias=True, coupling=coupling)
    image = torch.randn(2, 2, 2)
    unary = torch.tensor(np.log(by_label(m, image))).T.reshape(3, 2, 2)
    scores = enumerated(unary, coupling)
    evidence = log_sum(scores) - log_sum(enumerated(m.log_prior, coupling))
    assert m.log_prob(image).item() <= evidence
    assert m.log_prob(image).item() == pytest.approx(coupling.bound(unary, 0).item(), abs=1e-9)
    assert m.posterior(image).sum(0).sub(1).abs().max() < 1e-9
    # The mean field is near the exact marginals at this strength, and nearer than independent voxels are.
    weights = np.exp(scores - scores.max())
    marginals = np.zeros((3, 4))
    for s, weight in zip(itertools.product(range(3), repeat=4), weights / weights.sum(), strict=True):
        marginals[list(s), range(4)] += weight
    exact = torch.tensor(marginals).reshape(3, 2, 2)
    error = (m.posterior(image) - exact).abs().max()
    assert error < 0.1
    assert error < (unary.softmax(0) - exact).abs().max()
    draws = m.sample_labels(image, 1000, sweeps=5)
    frequency = torch.stack([(draws == k).double().mean(0) for k in range(3)])
    assert (frequency - exact).abs().max() < 4 * 0.5 / math.sqrt(1000)


@pytest.mark.parametrize(("sweeps", "stationary"), [(1, True), (25, False)])
def test_gibbs_sweeps_keep_and_reach_the_exact_distribution(sweeps: int, stationary: bool) -> None:
    """Chi-square over all labellings of a 2 × 2 grid: one sweep from exact draws, many from a corner."""
    coupling, n = Coupling(0.9, (1.0, 1.3)), 20_000
    unary = torch.randn(3, 2, 2)
    scores = enumerated(unary, coupling)
    exact = np.exp(scores - log_sum(scores))
    start = torch.zeros(n, 2, 2, dtype=torch.int64)
    if stationary:
        drawn = torch.multinomial(torch.tensor(exact), n, replacement=True)
        start = torch.stack([drawn // 3**p % 3 for p in (3, 2, 1, 0)], -1).reshape(n, 2, 2)
    labels = coupling.gibbs(unary.expand(n, 3, 2, 2), start, -3, sweeps)
    assert not torch.equal(labels, start)
    assert_chi_square(np.bincount(codes(labels, 3), minlength=81), exact, n)


# Inverse Wishart.


@pytest.mark.parametrize(("df", "c"), [(3.5, 1), (5.0, 2), (7.5, 3)])
def test_inverse_wishart_density_is_scipy_s(df: float, c: int) -> None:
    scale, value = covariances(1, c)[0], covariances(4, c)
    density = InverseWishart(df, scale).log_prob(value)
    expected = [scipy.stats.invwishart(df, scale.numpy()).logpdf(v.numpy()) for v in value]
    torch.testing.assert_close(density, torch.tensor(np.array(expected)), rtol=1e-9, atol=1e-9)


def test_inverse_wishart_of_one_dimension_is_an_inverse_gamma() -> None:
    value = torch.rand(5, 1, 1) + 0.1
    density = InverseWishart(6.0, torch.full((1, 1), 0.8)).log_prob(value)
    expected = torch.distributions.InverseGamma(3.0, 0.4).log_prob(value)
    torch.testing.assert_close(density, expected.flatten())


def test_inverse_wishart_mode_and_mean_are_where_they_are_said_to_be() -> None:
    scale = covariances(1, 2)[0]
    distribution = InverseWishart(7.0, scale)
    mode = (scale / (7 + 2 + 1)).requires_grad_()
    (gradient,) = torch.autograd.grad(distribution.log_prob(mode), mode)
    assert gradient.abs().max() < 1e-9
    expected = scipy.stats.invwishart(7.0, scale.numpy()).mean()
    torch.testing.assert_close(distribution.mean, torch.tensor(expected))


def test_inverse_wishart_draws_have_its_moments_and_marginals() -> None:
    df, c, n = 12.0, 3, 20_000
    scale = covariances(1, c)[0] + 0.3
    distribution = InverseWishart(df, scale)
    draws = distribution.rsample((n,))
    assert (draws.diagonal(dim1=-2, dim2=-1) > 0).all()
    error = (draws.mean(0) - distribution.mean) / (draws.std(0) / math.sqrt(n))
    assert error.abs().max() < scipy.stats.norm.isf(LEVEL / 12)
    # Whitened by Ψ, every diagonal entry is inverse gamma((ν − C + 1)/2, ½); that of Σ⁻¹ is chi-square(ν).
    root = torch.linalg.inv(torch.linalg.cholesky(scale))
    white = root @ draws @ root.mT
    for i in range(c):
        marginal = scipy.stats.invgamma((df - c + 1) / 2, scale=0.5)
        assert scipy.stats.kstest(white[:, i, i].numpy(), marginal.cdf).pvalue > LEVEL
    precision = torch.linalg.inv(draws)
    for i in range(c):
        ratio = (precision[:, i, i] / torch.linalg.inv(scale)[i, i]).numpy()
        assert scipy.stats.kstest(ratio, scipy.stats.chi2(df).cdf).pvalue > LEVEL


def test_inverse_wishart_expands_and_has_gradients() -> None:
    scale = covariances(3, 2)
    distribution = InverseWishart(5.0, scale)
    value = covariances(3, 2)
    grown = distribution.expand((4, 3))
    assert grown.rsample((2,)).shape == (2, 4, 3, 2, 2)
    torch.testing.assert_close(grown.log_prob(value), distribution.log_prob(value).expand(4, 3))

    def density(scale_root: Tensor, value_root: Tensor) -> Tensor:
        full = scale_root @ scale_root.mT + torch.eye(2)
        return InverseWishart(5.0, full).log_prob(value_root @ value_root.mT + torch.eye(2))

    inputs = (torch.randn(2, 2, requires_grad=True), torch.randn(2, 2, requires_grad=True))
    assert torch.autograd.gradcheck(density, inputs)
    leaf = scale.clone().requires_grad_()
    InverseWishart(5.0, leaf).rsample().sum().backward()
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()


def test_inverse_wishart_refuses_too_few_degrees() -> None:
    with pytest.raises(ValueError, match="df > C - 1 = 1, got 1"):
        InverseWishart(1.0, torch.eye(2))


@pytest.mark.parametrize("c", [1, 2, 3])
def test_support_of_the_inverse_wishart_has_a_bijection_with_its_jacobian(c: int) -> None:
    count = c * (c + 1) // 2
    for registry in (biject_to, transform_to):
        transform = registry(InverseWishart(c + 2.0, torch.eye(c)).support)
        x = torch.randn(4, count)
        y = transform(x)
        assert InverseWishart.support.check(y).all()
        assert transform.forward_shape(x.shape) == y.shape
        assert transform.inverse_shape(y.shape) == x.shape
        torch.testing.assert_close(transform.inv(y), x)
    rows, columns = torch.tril_indices(c, c)
    for index in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda v: transform(v)[rows, columns], x[index])
        expected = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(transform.log_abs_det_jacobian(x[index], y[index]), expected)
    with pytest.raises(ValueError, match="got 5"):
        transform(torch.zeros(5))
