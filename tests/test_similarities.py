"""Likelihoods of registration against dense algebra, quadrature and automatic differentiation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from pyro import poutine
from torch import Tensor

from probmed.similarities import (
    ConditionalMixture,
    GaussianNoise,
    LabelAgreement,
    Landmarks,
    LocalCorrelation,
    Similarity,
    StudentNoise,
    WindowRegressions,
    window_sums,
)

LEVEL = 1e-4
"""Of each goodness-of-fit test; seeds are fixed, so that these fail only where the code changes."""

pytestmark = pytest.mark.usefixtures("float64")

CONFUSION = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.85, 0.05], [0.2, 0.2, 0.6]], dtype=torch.float64)

TILTED = torch.tensor([[4.0, 1.5, -0.5], [1.5, 2.0, 0.3], [-0.5, 0.3, 0.5]], dtype=torch.float64)

BUILDERS: dict[str, Callable[[int], Similarity]] = {
    "gaussian": lambda d: GaussianNoise(2, tempering=0.7),
    "student": lambda d: StudentNoise(3.0, 2, tempering=0.7),
    "correlation": lambda d: LocalCorrelation((1, 2, 1)[:d], location=0.5),
    "mixture": lambda d: ConditionalMixture(6, (-0.2, 1.2), 2, tempering=0.7),
    "labels": lambda d: LabelAgreement(3, tempering=0.7),
    "confusion": lambda d: LabelAgreement(3, confusion=CONFUSION),
    "landmarks": lambda d: Landmarks(2.0),
    "landmarks of unknown accuracy": lambda d: Landmarks(2.0, certainty=3.0, tempering=0.7),
    "landmarks of a covariance": lambda d: Landmarks(certainty=3.0, tempering=0.7, covariance=TILTED[:d, :d]),
}
SITES = {
    "gaussian": {"noise"},
    "student": {"noise"},
    "mixture": {"class_means", "class_variances"},
    "labels": {"error"},
    "landmarks of unknown accuracy": {"landmark_scale"},
    "landmarks of a covariance": {"landmark_scale"},
}

every_similarity = pytest.mark.parametrize("name", BUILDERS)
every_dimension = pytest.mark.parametrize("d", [2, 3])


def one_hot(labels: Tensor, k: int) -> Tensor:
    """``(*shape)`` to ``(K, *shape)``."""
    return torch.nn.functional.one_hot(labels, k).movedim(-1, 0).to(torch.get_default_dtype())


def pair(name: str, d: int = 3, holes: bool = True, shape: Sequence[int] = (5, 4, 6)) -> tuple[Tensor, Tensor]:
    """A moved and a fixed image, each with values of its own missing."""
    space = tuple(shape[:d])
    if name in ("labels", "confusion"):
        moved, fixed = torch.randn(3, *space).softmax(0), one_hot(torch.randint(3, space), 3)
        if holes:
            moved[:, 0, 1], fixed[:, 1, 2] = torch.nan, torch.nan
        return moved, fixed
    if name.startswith("landmarks"):
        moved, fixed = 9 * torch.randn(7, d), 9 * torch.randn(7, d)
    else:
        moved = torch.rand(2, *space)
        fixed = 0.2 + 0.5 * moved + 0.2 * torch.randn(2, *space)
    if holes:
        moved[0, 1], fixed[1, 0] = torch.nan, torch.nan
    return moved, fixed


def draw_latents(similarity: Similarity, moved: Tensor) -> dict[str, Tensor]:
    """Of the prior, but not so wide that values are lost to rounding."""
    trace = poutine.trace(similarity).get_trace(moved)
    latents = {site: trace.nodes[site]["value"] for site in trace.stochastic_nodes}
    bounds = {"noise": (0.01, 1.0), "class_variances": (0.01, 1.0), "class_means": (-1.0, 2.0), "error": (0.01, 0.5), "landmark_scale": (0.1, 10.0)}
    return {site: value.clamp(*bounds[site]) for site, value in latents.items()}


def log_density(similarity: Similarity, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> Tensor:
    value: Tensor = similarity.distribution(moved, latents).log_prob(fixed)
    return value


def observed(moved: Tensor, fixed: Tensor) -> Tensor:
    return ~(moved.isnan() | fixed.isnan())


# What every similarity does.


@every_similarity
@every_dimension
def test_gradient_is_that_of_automatic_differentiation_and_zero_where_missing(name: str, d: int) -> None:
    similarity = BUILDERS[name](d)
    moved, fixed = pair(name, d)
    latents = draw_latents(similarity, moved)
    gradient, curvature = similarity.newton(moved, fixed, latents)
    leaf = moved.clone().requires_grad_()
    (expected,) = torch.autograd.grad(log_density(similarity, leaf, fixed, latents), leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
    assert gradient.shape == curvature.shape == moved.shape
    seen = observed(moved, fixed)
    if name in ("labels", "confusion"):
        seen = seen.all(0).expand_as(moved)
    if name == "landmarks of a covariance":
        seen = seen.all(-1, keepdim=True).expand_as(moved)
    assert (gradient[~seen] == 0).all()
    assert (curvature[~seen] == 0).all()
    assert (curvature[seen] > 0).all()


@every_similarity
def test_latents_have_finite_gradients_where_values_are_missing(name: str) -> None:
    similarity = BUILDERS[name](3)
    moved, fixed = pair(name)
    latents = {site: value.requires_grad_() for site, value in draw_latents(similarity, moved).items()}
    value = log_density(similarity, moved.requires_grad_(), fixed, latents)
    assert torch.isfinite(value)
    for gradient in torch.autograd.grad(value, [moved, *latents.values()]):
        assert torch.isfinite(gradient).all()


@every_similarity
@every_dimension
@pytest.mark.parametrize("side", ["moved", "fixed"])
def test_missing_values_are_as_if_cropped(name: str, d: int, side: str) -> None:
    similarity = BUILDERS[name](d)
    moved, fixed = pair(name, d, holes=False)
    latents = draw_latents(similarity, moved)
    axis = 0 if name.startswith("landmarks") else 1
    keep = moved.shape[axis] - 2
    small = similarity.newton(moved.narrow(axis, 0, keep), fixed.narrow(axis, 0, keep), latents)
    expected = log_density(similarity, moved.narrow(axis, 0, keep), fixed.narrow(axis, 0, keep), latents)
    gone = (moved if side == "moved" else fixed).clone()
    gone.narrow(axis, keep, 2).fill_(torch.nan)
    moved, fixed = (gone, fixed) if side == "moved" else (moved, gone)
    torch.testing.assert_close(log_density(similarity, moved, fixed, latents), expected, rtol=1e-12, atol=1e-12)
    for whole, part in zip(similarity.newton(moved, fixed, latents), small, strict=True):
        torch.testing.assert_close(whole.narrow(axis, 0, keep), part, rtol=1e-9, atol=1e-9)
        assert (whole.narrow(axis, keep, 2) == 0).all()


@every_similarity
def test_nothing_observed_is_a_density_of_zero_nats(name: str) -> None:
    similarity = BUILDERS[name](3)
    moved, fixed = pair(name)
    fixed = torch.full_like(fixed, torch.nan)
    latents = similarity.start(moved, fixed)
    assert log_density(similarity, moved, fixed, latents) == 0
    for value in [*latents.values(), *similarity.update(moved, fixed, latents).values()]:
        assert torch.isfinite(value).all()
    for value in similarity.newton(moved, fixed, latents):
        assert (value == 0).all()


@every_similarity
@every_dimension
@pytest.mark.parametrize("seed", range(5))
def test_update_never_lowers_the_log_joint(name: str, d: int, seed: int) -> None:
    pyro.set_rng_seed(seed)
    similarity = BUILDERS[name](d)
    moved, fixed = pair(name, d)

    def log_joint(latents: Mapping[str, Tensor]) -> float:
        return float(similarity.tempering * log_density(similarity, moved, fixed, latents) + similarity.log_prior(moved, latents))

    for latents in (similarity.start(moved, fixed), draw_latents(similarity, moved)):
        assert set(latents) == SITES.get(name, set())
        before, value = log_joint(latents), math.inf
        for _ in range(6):
            latents = similarity.update(moved, fixed, latents)
            value = log_joint(latents)
            assert value >= before - 1e-9 * abs(before)
            before = value


@pytest.mark.parametrize("name", SITES)
def test_update_ends_where_the_log_joint_is_flat(name: str) -> None:
    similarity = BUILDERS[name](2)
    moved, fixed = pair(name, 2)
    latents = similarity.start(moved, fixed)
    for _ in range(2000):
        latents = similarity.update(moved, fixed, latents)
    leaves = {site: value.clone().requires_grad_() for site, value in latents.items()}
    value = similarity.tempering * log_density(similarity, moved, fixed, leaves) + similarity.log_prior(moved, leaves)
    for site, gradient in zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True):
        assert (gradient * leaves[site]).abs().max() < 1e-5, site


@every_similarity
def test_trace_has_the_sites_and_observes_with_the_tempering(name: str) -> None:
    similarity = BUILDERS[name](3)
    moved, fixed = pair(name)

    def model(fixed: Tensor | None = None) -> Tensor:
        # Before the scale, which would temper the prior of the similarity's own latents.
        distribution = similarity(moved)
        with poutine.scale(scale=similarity.tempering):
            return pyro.sample("fixed", distribution, obs=fixed)

    trace = poutine.trace(model).get_trace(fixed)
    latents = {site: trace.nodes[site]["value"] for site in trace.stochastic_nodes}
    assert set(latents) == SITES.get(name, set())
    expected = similarity.tempering * log_density(similarity, moved, fixed, latents) + similarity.log_prior(moved, latents)
    torch.testing.assert_close(torch.as_tensor(trace.log_prob_sum()), expected)
    draw = poutine.trace(model).get_trace().nodes["fixed"]["value"]
    missing = moved.isnan() if name not in ("labels", "confusion") else moved.isnan().any(0).expand_as(moved)
    missing = missing.any(-1, keepdim=True).expand_as(moved) if name == "landmarks of a covariance" else missing
    assert torch.equal(draw.isnan(), missing)
    assert draw.dtype == torch.float64


@pytest.mark.parametrize("name", sorted(set(BUILDERS) - {"confusion"}))
def test_batches_are_stacks_of_single_images(name: str) -> None:
    similarity = BUILDERS[name](3)
    pairs = [pair(name) for _ in range(3)]
    latents = [draw_latents(similarity, moved) for moved, _ in pairs]
    moved, fixed = (torch.stack(images) for images in zip(*pairs, strict=True))
    stacked = {site: torch.stack([one[site] for one in latents]) for site in latents[0]}
    distribution = similarity.distribution(moved, stacked)
    assert distribution.batch_shape == (3,)
    assert distribution.event_shape == moved.shape[1:]
    assert distribution.sample((2,)).shape == (2, *moved.shape)
    gradients = similarity.newton(moved, fixed, stacked)
    updates = similarity.update(moved, fixed, stacked)
    for b, (m, f) in enumerate(pairs):
        torch.testing.assert_close(distribution.log_prob(fixed)[b], log_density(similarity, m, f, latents[b]))
        for whole, part in zip(gradients, similarity.newton(m, f, latents[b]), strict=True):
            torch.testing.assert_close(whole[b], part, rtol=1e-6, atol=1e-6)
        for site, value in similarity.update(m, f, latents[b]).items():
            torch.testing.assert_close(updates[site][b], value)
    grown = distribution.expand((2, 3))
    assert grown.batch_shape == (2, 3)
    assert grown.sample().shape == (2, *moved.shape)
    torch.testing.assert_close(grown.log_prob(fixed), distribution.log_prob(fixed).expand(2, 3))


@pytest.mark.parametrize("name", SITES)
def test_latents_in_a_plate_are_one_for_each_member(name: str) -> None:
    similarity = BUILDERS[name](3)
    moved = torch.stack([pair(name)[0] for _ in range(2)])

    def model() -> Tensor:
        with pyro.plate("subject", 2):
            return pyro.sample("fixed", similarity(moved))

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["fixed"]["log_prob"].shape == (2,)
    for site in SITES[name]:
        assert trace.nodes[site]["value"].shape[0] == 2


@every_similarity
def test_single_precision_stays_single_and_agrees(name: str) -> None:
    similarity = BUILDERS[name](3)
    moved, fixed = pair(name)
    latents = similarity.start(moved, fixed)
    single = {site: value.float() for site, value in latents.items()}
    density = log_density(similarity, moved.float(), fixed.float(), single)
    assert density.dtype == torch.float32
    torch.testing.assert_close(density.double(), log_density(similarity, moved, fixed, latents), rtol=1e-4, atol=1e-3)
    results = [*similarity.newton(moved.float(), fixed.float(), single), *similarity.update(moved.float(), fixed.float(), single).values()]
    double = [*similarity.newton(moved, fixed, latents), *similarity.update(moved, fixed, latents).values()]
    for a, b in zip(results, double, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("name", ["gaussian", "student", "correlation", "mixture"])
@pytest.mark.parametrize("value", [0.0, 0.7, 5.0])
def test_constant_images_have_finite_densities_and_derivatives(name: str, value: float) -> None:
    similarity = BUILDERS[name](3)
    moved, fixed = torch.full((2, 5, 4, 6), value), torch.full((2, 5, 4, 6), 0.3)
    for m, f in ((moved, fixed), (moved, pair(name, holes=False)[1]), (pair(name, holes=False)[0], fixed)):
        latents = similarity.update(m, f, similarity.start(m, f))
        leaf = m.clone().requires_grad_()
        density = log_density(similarity, leaf, f, latents)
        (automatic,) = torch.autograd.grad(density, leaf)
        for number in (density, automatic, *similarity.newton(m, f, latents)):
            assert torch.isfinite(number).all()


@every_similarity
def test_images_of_different_shapes_are_refused(name: str) -> None:
    similarity = BUILDERS[name](3)
    moved, fixed = pair(name)
    latents = similarity.start(moved, fixed)
    with pytest.raises(ValueError, match="expected a fixed image of the moved one's shape .* got"):
        similarity.newton(moved, fixed[:1], latents)


@pytest.mark.parametrize("name", ["gaussian", "student", "mixture", "labels"])
def test_the_wrong_number_of_channels_is_refused(name: str) -> None:
    similarity = BUILDERS[name](3)
    moved, fixed = pair(name)
    latents = similarity.start(moved, fixed)
    with pytest.raises(ValueError, match="expected a moved image of shape .* got"):
        similarity.distribution(moved[:1], latents)
    with pytest.raises(ValueError, match="expected a moved image of shape .* got"):
        similarity.start(moved[:1], fixed[:1])


@pytest.mark.parametrize(
    "build",
    [
        lambda: GaussianNoise(scale=0.0),
        lambda: GaussianNoise(certainty=-1.0),
        lambda: GaussianNoise(tempering=0.0),
        lambda: StudentNoise(df=0.0),
        lambda: LocalCorrelation(0),
        lambda: LocalCorrelation(()),
        lambda: LocalCorrelation(noise=0.0),
        lambda: LocalCorrelation(3).distribution(torch.zeros(1, 4, 4), {}),
        lambda: ConditionalMixture(3),
        lambda: ConditionalMixture(limits=(1.0, 1.0)),
        lambda: ConditionalMixture(spread=0.0),
        lambda: ConditionalMixture.for_image(torch.full((1, 2, 2), torch.nan)),
        lambda: LabelAgreement(1),
        lambda: LabelAgreement(2, error=1.0),
        lambda: LabelAgreement(2, confusion=torch.eye(2)),
        lambda: LabelAgreement(2, confusion=CONFUSION),
        lambda: LabelAgreement(3, confusion=2 * CONFUSION),
        lambda: Landmarks(0.0),
        lambda: Landmarks(1.0, certainty=0.0),
        lambda: Landmarks(covariance=-TILTED),
        lambda: Landmarks(covariance=TILTED + torch.tensor([[0.0, 0.1, 0], [0, 0, 0], [0, 0, 0]])),
        lambda: Landmarks(covariance=torch.ones(3)),
        lambda: Landmarks().distribution(torch.zeros(3), {}),
    ],
)
def test_settings_that_mean_nothing_are_refused(build: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="expected .* got"):
        build()


# Noise.


def test_gaussian_density_is_scipy_s_over_the_observed_values() -> None:
    similarity, (moved, fixed) = GaussianNoise(2), pair("gaussian")
    noise = torch.tensor([0.04, 0.3])
    seen = observed(moved, fixed)
    sd = noise.sqrt()[:, None, None, None].expand_as(moved)
    expected = scipy.stats.norm(moved[seen].numpy(), sd[seen].numpy()).logpdf(fixed[seen].numpy()).sum()
    assert log_density(similarity, moved, fixed, {"noise": noise}).item() == pytest.approx(expected, abs=1e-9)
    _, curvature = similarity.newton(moved, fixed, {"noise": noise})
    torch.testing.assert_close(curvature[seen], 1 / sd[seen] ** 2)


def test_student_density_is_scipy_s_over_the_observed_values() -> None:
    similarity, (moved, fixed) = StudentNoise(4.0, 2), pair("student")
    noise = torch.tensor([0.04, 0.3])
    seen = observed(moved, fixed)
    sd = noise.sqrt()[:, None, None, None].expand_as(moved)
    expected = scipy.stats.t(4.0, moved[seen].numpy(), sd[seen].numpy()).logpdf(fixed[seen].numpy()).sum()
    assert log_density(similarity, moved, fixed, {"noise": noise}).item() == pytest.approx(expected, abs=1e-9)


def test_prior_of_the_noise_is_as_stated() -> None:
    similarity = GaussianNoise(2, scale=0.2, certainty=6.0)
    value = torch.tensor([0.03, 0.1])
    expected = scipy.stats.invgamma(3.0, scale=3 * 0.04).logpdf(value.numpy()).sum()
    assert similarity.log_prior(torch.zeros(2, 1, 1), {"noise": value}).item() == pytest.approx(expected)


def assert_parabola_lies_below(similarity: Similarity, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> None:
    """log p(m + δ) ≥ log p(m) + gᵀδ − ½ δᵀ diag(h) δ, for steps of all sizes."""
    gradient, curvature = similarity.newton(moved, fixed, latents)
    value = log_density(similarity, moved, fixed, latents)
    directions = [torch.randn_like(moved) for _ in range(30)] + [gradient / curvature.clamp_min(1e-9)]
    for step, size in itertools.product(directions, (1e-3, 0.03, 0.3, 1.0, 10.0)):
        delta = size * step
        bound = value + (gradient * delta - 0.5 * curvature * delta**2).sum()
        assert log_density(similarity, moved + delta, fixed, latents) >= bound - 1e-8 * (1 + bound.abs())


@pytest.mark.parametrize("name", ["gaussian", "student", "correlation", "landmarks"])
@every_dimension
def test_curvature_is_of_a_parabola_below_the_density(name: str, d: int) -> None:
    similarity = BUILDERS[name](d)
    moved, fixed = pair(name, d)
    assert_parabola_lies_below(similarity, moved, fixed, draw_latents(similarity, moved))


@pytest.mark.parametrize("build", [GaussianNoise, lambda: StudentNoise(3.0)])
def test_noise_is_recovered_and_draws_follow_the_density(build: Callable[[], GaussianNoise]) -> None:
    similarity, n = build(), 20_000
    moved, sd = torch.rand(1, 200, n // 200), 0.3
    fixed = similarity.distribution(moved, {"noise": torch.tensor([sd**2])}).sample()
    residual = ((fixed - moved) / sd).flatten().numpy()
    law = scipy.stats.t(3.0) if isinstance(similarity, StudentNoise) else scipy.stats.norm()
    assert scipy.stats.kstest(residual, law.cdf).pvalue > LEVEL
    latents = similarity.start(moved, fixed)
    for _ in range(50):
        latents = similarity.update(moved, fixed, latents)
    # The Fisher information of log σ² is ½ for a Gaussian and ν / (2 (ν + 3)) for a Student.
    information = n / 2 * (0.5 if isinstance(similarity, StudentNoise) else 1.0)
    assert abs(math.log(float(latents["noise"]) / sd**2)) < 4 / math.sqrt(information)


def test_the_update_of_gaussian_noise_is_the_mode_at_once() -> None:
    similarity, (moved, fixed) = BUILDERS["gaussian"](3), pair("gaussian")
    start = similarity.start(moved, fixed)
    torch.testing.assert_close(similarity.update(moved, fixed, start), start)


# Local correlation.


def window(index: tuple[int, ...], radius: Sequence[int]) -> tuple[int | slice, ...]:
    """Of the channel ``index[0]`` about the voxel ``index[1:]``."""
    return (index[0], *(slice(max(i - r, 0), i + r + 1) for i, r in zip(index[1:], radius, strict=True)))


def dense_window(moved: Tensor, fixed: Tensor, s: LocalCorrelation) -> float:
    """The multivariate t of one window's observed values, by scipy."""
    n = len(moved)
    z = moved - moved.mean()
    kappa, precision = (s.noise / s.spread) ** 2, (z**2).mean() + s.noise**2
    shape = s.noise**2 * (torch.eye(n) + torch.ones(n, n) / kappa + torch.outer(z, z) / precision)
    law = scipy.stats.multivariate_t(np.full(n, s.location), shape.numpy(), df=s.certainty)  # type: ignore[arg-type]
    return float(law.logpdf(fixed.numpy()))


@every_dimension
@pytest.mark.parametrize("holes", [False, True])
def test_every_window_is_a_multivariate_t(d: int, holes: bool) -> None:
    similarity = LocalCorrelation((1, 2, 1)[:d], noise=0.1, certainty=2.5, location=0.4, spread=0.7)
    moved, fixed = pair("correlation", d, holes)
    windows = similarity.distribution(moved, {}).window_log_prob(fixed)
    seen = observed(moved, fixed)
    total = 0.0
    for index in itertools.product(*(range(n) for n in moved.shape)):
        if not seen[index]:
            assert windows[index] == 0
            continue
        box = window(index, similarity.radius)
        inside = seen[box]
        expected = dense_window(moved[box][inside], fixed[box][inside], similarity)
        total += expected
        assert windows[index].item() == pytest.approx(expected, abs=1e-9)
    assert log_density(similarity, moved, fixed, {}).item() == pytest.approx(total, abs=1e-7)


def test_a_window_s_density_is_its_regression_integrated() -> None:
    """Two values: α, b and s² integrated numerically; and the density of both integrates to one."""
    s = LocalCorrelation((1, 1), noise=0.3, certainty=3.0, location=0.4, spread=0.6)
    moved, fixed = torch.tensor([[[0.2, 0.9]]]), torch.tensor([[[0.1, 0.8]]])
    z = torch.tensor([-0.35, 0.35])
    kappa, precision = (s.noise / s.spread) ** 2, 0.35**2 + s.noise**2
    log_variance = torch.linspace(-8, 6, 140)
    variance = log_variance.exp()
    prior = scipy.stats.invgamma(1.5, scale=1.5 * s.noise**2).pdf(variance.numpy())
    x = torch.linspace(-7, 7, 101)
    sd = variance.sqrt()[:, None, None]
    alpha = s.location + sd * x[None, :, None] / math.sqrt(kappa)
    gain = sd * x[None, None, :] / math.sqrt(precision)
    weight = torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    inner = torch.ones(())
    for i in range(2):
        inner = inner * torch.distributions.Normal(alpha + gain * z[i], sd).log_prob(fixed[0, 0, i]).exp()
    inner = (inner * weight[:, None] * weight).sum((1, 2))
    integral = torch.trapezoid(inner * torch.tensor(prior) * variance, log_variance)
    windows = s.distribution(moved, {}).window_log_prob(fixed)
    assert windows[0, 0, 0].exp().item() == pytest.approx(integral.item(), rel=1e-4)

    # In polar coordinates with logarithmic radius, since tails are those of a t.
    angle = torch.arange(256) * (2 * math.pi / 256)
    radius = torch.linspace(-12, 12, 1500).exp()
    points = s.location + radius[:, None, None] * torch.stack([angle.cos(), angle.sin()], -1)
    density = s.distribution(moved.expand(*points.shape[:2], 1, 1, 2), {}).window_log_prob(points[:, :, None, None, :])[..., 0, 0, 0].exp()
    mass = torch.trapezoid(density.mean(1) * 2 * math.pi * radius**2, radius.log())
    assert mass.item() == pytest.approx(1, abs=1e-4)


def test_correlation_hardly_depends_on_the_unit_of_the_moved_image() -> None:
    similarity, (moved, fixed) = LocalCorrelation((2, 2), noise=1e-3), pair("correlation", 2)
    value = log_density(similarity, moved, fixed, {})
    for gain, offset in ((2.0, 0.3), (-1.0, 1.0), (0.5, -7.0)):
        changed = log_density(similarity, gain * moved + offset, fixed, {})
        assert changed.item() == pytest.approx(value.item(), abs=0.05)
    # Only its contrast counts exactly.
    torch.testing.assert_close(log_density(similarity, moved + 3, fixed, {}), value)


def test_correlation_prefers_the_image_that_is_aligned() -> None:
    similarity = LocalCorrelation(2, ndim=2)
    assert similarity.tempering == pytest.approx(1 / 25)
    assert similarity.certainty == pytest.approx(2.5)
    x = torch.linspace(0, 6, 30)
    moved = (x.sin()[:, None] * x.cos() + 1)[None] / 2
    fixed = 1.2 - 0.6 * moved + 0.1 * x / 6 + 0.02 * torch.randn_like(moved)
    aligned = log_density(similarity, moved, fixed, {})
    for shift in (1, 2, 4):
        assert log_density(similarity, moved.roll(shift, -1), fixed, {}) < aligned - 10


def test_draws_of_a_tile_follow_its_window_s_density() -> None:
    """By the probability integral transform: Q / (n τ²) of a multivariate t is F(n, ν), and so along any direction."""
    s = LocalCorrelation((1, 1), noise=0.2, certainty=4.0, location=0.4, spread=0.6)
    moved = torch.rand(1, 6, 4)
    moved[0, 4, 3] = torch.nan
    draws = s.distribution(moved, {}).sample((5000,))
    assert draws.isnan().any((0, 1)).sum() == 1
    for rows, columns in itertools.product((slice(0, 3), slice(3, 6)), (slice(0, 3), slice(3, 4))):
        seen = ~moved[0, rows, columns].isnan()
        m = moved[0, rows, columns][seen]
        z, n = m - m.mean(), len(m)
        kappa, precision = (s.noise / s.spread) ** 2, (z**2).mean() + s.noise**2
        shape = s.noise**2 * (torch.eye(n) + torch.ones(n, n) / kappa + torch.outer(z, z) / precision)
        x = draws[:, 0, rows, columns][:, seen] - s.location
        form = (x * torch.linalg.solve(shape, x.T).T).sum(1) / n
        assert scipy.stats.kstest(form.numpy(), scipy.stats.f(n, s.certainty).cdf).pvalue > LEVEL
        for direction in (torch.ones(n), z, torch.eye(n)[0]):
            sd = (direction @ shape @ direction).sqrt()
            assert scipy.stats.kstest(((x @ direction) / sd).numpy(), scipy.stats.t(s.certainty).cdf).pvalue > LEVEL


@pytest.mark.parametrize("radius", [(1,), (2,), (3,), (4,), (7,), (20,), (1, 3), (4, 2, 1)])
def test_window_sums_are_sums_over_windows(radius: tuple[int, ...]) -> None:
    x = torch.randn(2, *(9, 7, 5)[: len(radius)])
    expected = torch.zeros_like(x)
    for index in itertools.product(*(range(n) for n in x.shape[1:])):
        for c in range(2):
            expected[(c, *index)] = x[window((c, *index), radius)].sum()
    torch.testing.assert_close(window_sums(x, radius), expected)


def test_window_densities_differentiate_twice() -> None:
    moved, fixed = pair("correlation", 2, shape=(3, 3))

    def density(m: Tensor, f: Tensor) -> Tensor:
        holes = observed(moved, fixed)
        return WindowRegressions(m.masked_fill(~holes, torch.nan), (1, 1), 0.2, 2.0, 0.5, 1.0).log_prob(f.masked_fill(~holes, torch.nan))

    inputs = (moved.nan_to_num(0.0).requires_grad_(), fixed.nan_to_num(0.0).requires_grad_())
    assert torch.autograd.gradcheck(density, inputs)
    assert torch.autograd.gradgradcheck(density, inputs)


# Conditional mixture.


def splines(moved: np.ndarray, similarity: ConditionalMixture) -> np.ndarray:
    """π of every class by convolution: the cubic B-spline as the density of a sum of four uniforms, ``(..., K)``."""
    position = (moved[..., None] - similarity.limits[0]) / similarity.spacing
    away = position - (np.arange(similarity.classes) - 1)
    return np.asarray(scipy.stats.irwinhall(4).pdf(away + 2))


def test_memberships_are_cubic_b_splines() -> None:
    similarity = ConditionalMixture(7, (-0.5, 1.5))
    moved = torch.linspace(-0.5, 1.5, 41)
    first, weights, slopes = similarity.memberships(moved)
    full = torch.zeros(41, 7).scatter(-1, first[:, None] + torch.arange(4), weights)
    torch.testing.assert_close(full, torch.tensor(splines(moved.numpy(), similarity)), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(full.sum(-1), torch.ones(41))
    leaf = moved.clone().requires_grad_()
    for j in range(4):
        (expected,) = torch.autograd.grad(similarity.memberships(leaf)[1][:, j].sum(), leaf)
        torch.testing.assert_close(slopes[:, j], expected)
    outside = similarity.memberships(torch.tensor([-3.0, 9.0]))
    torch.testing.assert_close(outside[1], weights[[0, -1]])
    assert (outside[2] == 0).all()


def test_mixture_density_is_the_sum_over_all_classes() -> None:
    similarity, (moved, fixed) = BUILDERS["mixture"](3), pair("mixture")
    assert isinstance(similarity, ConditionalMixture)
    latents = draw_latents(similarity, moved)
    seen = observed(moved, fixed)
    total = 0.0
    for c in range(2):
        m, f = moved[c][seen[c]].numpy(), fixed[c][seen[c]].numpy()
        components = scipy.stats.norm(latents["class_means"][c].numpy(), latents["class_variances"][c].sqrt().numpy())
        total += np.log((splines(m, similarity) * components.pdf(f[:, None])).sum(-1)).sum()
    assert log_density(similarity, moved, fixed, latents).item() == pytest.approx(total, abs=1e-8)


def line(value: float, count: int = 4001) -> tuple[Tensor, Tensor, float]:
    """One moved value with every fixed one, as a batch of images of one voxel, and the step of quadrature."""
    fixed = torch.linspace(-8, 8, count)
    return torch.full((1, count, 1), value), fixed[None, :, None], float(fixed[1] - fixed[0])


@pytest.mark.parametrize("value", [-0.2, -0.05, 0.08, 0.5, 0.91, 1.2])
def test_mixture_integrates_to_one_and_its_curvature_is_the_information(value: float) -> None:
    similarity = ConditionalMixture(6, (-0.2, 1.2))
    generator = torch.Generator().manual_seed(3)
    means, variances = torch.rand(1, 6, generator=generator), 0.02 + 0.1 * torch.rand(1, 6, generator=generator)
    latents = {"class_means": means, "class_variances": variances}
    moved, fixed, step = line(value)
    density = similarity.distribution(moved, latents).values.log_prob(fixed).exp()
    assert (density.sum() * step).item() == pytest.approx(1, abs=1e-9)
    gradient, curvature = similarity.newton(moved, fixed, latents)
    information = (density * gradient**2).sum().item() * step
    assert (density * gradient).sum().item() * step == pytest.approx(0, abs=1e-8)
    assert curvature.std() < 1e-12
    assert float(curvature.mean()) == pytest.approx(information, rel=0.02)
    # At the table's own positions there is no interpolation.
    knots = torch.linspace(-0.2, 1.2, 16 * 3 + 1)
    place = int((knots - value).abs().argmin())
    moved, fixed, step = line(float(knots[place]))
    density = similarity.distribution(moved, latents).values.log_prob(fixed).exp()
    gradient, _ = similarity.newton(moved, fixed, latents)
    expected = (density * gradient**2).sum().item() * step
    assert float(similarity.information(latents)[0, place]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_mixture_learns_another_contrast_and_its_draws_follow_the_density() -> None:
    similarity = ConditionalMixture(8, (0.0, 1.0))
    moved = torch.rand(1, 100, 100)
    truth = {"class_means": torch.tensor([[0.9, 0.2, 0.5, 0.5, 0.1, 0.7, 0.3, 0.8]]), "class_variances": torch.full((1, 8), 0.003)}
    fixed = similarity.distribution(moved, truth).sample()
    weights = splines(moved.flatten().numpy(), similarity)
    law = scipy.stats.norm(truth["class_means"].numpy(), math.sqrt(0.003))
    assert scipy.stats.kstest((weights * law.cdf(fixed.reshape(-1, 1).numpy())).sum(-1), "uniform").pvalue > LEVEL
    latents = similarity.start(moved, fixed)
    for _ in range(50):
        latents = similarity.update(moved, fixed, latents)
    assert (latents["class_means"] - truth["class_means"]).abs().max() < 0.1
    assert log_density(similarity, moved, fixed, latents) > log_density(similarity, moved, fixed, truth) - 1
    assert log_density(similarity, moved.roll(3, -1), fixed, latents) < log_density(similarity, moved, fixed, latents) - 100


def test_mixture_for_an_image_spans_its_intensities() -> None:
    moving = torch.linspace(2, 5, 10_000).reshape(1, 100, 100).clone()
    moving[0, 0, 0] = torch.nan
    similarity = ConditionalMixture.for_image(moving, 12, scale=0.3)
    assert similarity.classes == 12
    assert similarity.channels == 1
    assert similarity.limits == pytest.approx((2.003, 4.997), abs=1e-3)


# Labels and landmarks.


@pytest.mark.parametrize("learned", [True, False])
def test_label_density_is_enumerated_and_sums_to_one(learned: bool) -> None:
    similarity = LabelAgreement(3, confusion=None if learned else CONFUSION)
    latents = {"error": torch.tensor(0.2)} if learned else {}
    matrix = torch.full((3, 3), 0.1) + 0.7 * torch.eye(3) if learned else CONFUSION
    moved = torch.randn(3, 1, 2).softmax(0)
    total = 0.0
    for labels in itertools.product(range(3), repeat=2):
        fixed = one_hot(torch.tensor([labels]), 3)
        expected = math.prod(
            sum(float(moved[k, 0, v] * matrix[k, j]) for k in range(3)) for v, j in enumerate(labels)
        )
        density = log_density(similarity, moved, fixed, latents).exp().item()
        assert density == pytest.approx(expected, abs=1e-12)
        total += density
    assert total == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", ["labels", "confusion"])
def test_curvature_of_labels_is_the_expected_one_of_each_value(name: str) -> None:
    similarity = BUILDERS[name](2)
    moved, _ = pair(name, 2, holes=False, shape=(2, 3))
    latents = similarity.start(moved, moved)
    expected = torch.zeros_like(moved)
    for j in range(3):
        fixed = one_hot(torch.full((2, 3), j), 3)
        alone = [log_density(similarity, moved[:, a, b, None, None], fixed[:, a, b, None, None], latents) for a in range(2) for b in range(3)]
        probability = torch.stack(alone).exp().reshape(2, 3)
        gradient, curvature = similarity.newton(moved, fixed, latents)
        # log Σ_k π_k C_kj has the second derivative −g² in each π_k.
        expected += probability * gradient**2
    torch.testing.assert_close(curvature, expected, rtol=1e-9, atol=1e-9)


def test_label_draws_follow_the_probabilities_and_the_error_is_recovered() -> None:
    similarity = LabelAgreement(3)
    moved = torch.randn(3, 100, 100).mul(4).softmax(0)
    distribution = similarity.distribution(moved, {"error": torch.tensor(0.15)})
    fixed = distribution.sample()
    assert torch.equal(fixed.sum(0), torch.ones(100, 100))
    small = similarity.distribution(moved[:, :1, :1], {"error": torch.tensor(0.15)})
    counts = small.sample((5000,)).sum((0, 2, 3)).numpy()
    probabilities = (0.85 - 0.075) * moved[:, 0, 0] + 0.075
    assert scipy.stats.chisquare(counts, 5000 * probabilities.numpy()).pvalue > LEVEL
    latents = similarity.start(moved, fixed)
    for _ in range(100):
        latents = similarity.update(moved, fixed, latents)
    assert float(latents["error"]) == pytest.approx(0.15, abs=0.03)


def test_landmarks_are_gaussian_points_each_with_its_accuracy() -> None:
    moved, fixed = 9 * torch.randn(5, 3), 9 * torch.randn(5, 3)
    fixed[2] = torch.nan
    sd = torch.tensor([1.0, 2.0, 1.0, 3.0, 0.5])
    similarity = Landmarks(sd[:, None])
    expected = sum(
        scipy.stats.multivariate_normal(moved[i].numpy(), float(sd[i]) ** 2 * np.eye(3)).logpdf(fixed[i].numpy()) for i in (0, 1, 3, 4)
    )
    assert log_density(similarity, moved, fixed, {}).item() == pytest.approx(float(expected), abs=1e-9)
    gradient, curvature = similarity.newton(moved, fixed, {})
    seen = [0, 1, 3, 4]
    torch.testing.assert_close(gradient[seen], (fixed - moved)[seen] / sd[seen, None] ** 2)
    torch.testing.assert_close(curvature[seen], (sd[seen, None] ** -2).expand(4, 3))


@pytest.mark.parametrize("each", [False, True])
def test_landmarks_of_a_covariance_are_a_dense_normal(each: bool) -> None:
    """All coordinates as one vector, whose covariance is block-diagonal; gradient and Hessian by algebra."""
    count, certain = 4, 2.5
    covariance = TILTED * (1 + torch.rand(count, 1, 1)) if each else TILTED
    similarity = Landmarks(certainty=3.0, covariance=covariance)
    moved, fixed = 3 * torch.randn(count, 3), 3 * torch.randn(count, 3)
    blocks = torch.block_diag(*(certain * covariance.expand(count, 3, 3)))
    latents = {"landmark_scale": torch.tensor(certain)}
    dense = torch.distributions.MultivariateNormal(moved.flatten(), blocks)
    torch.testing.assert_close(log_density(similarity, moved, fixed, latents), dense.log_prob(fixed.flatten()))
    precision = torch.linalg.inv(blocks)
    gradient, curvature = similarity.newton(moved, fixed, latents)
    torch.testing.assert_close(gradient.flatten(), precision @ (fixed - moved).flatten())
    torch.testing.assert_close(curvature.flatten(), precision.diagonal())
    white = torch.block_diag(*similarity.whitening(moved, latents))
    torch.testing.assert_close(white.T @ white, precision)
    draws = similarity.distribution(moved, latents).sample((40_000,)).flatten(1)
    error = ((blocks**2 + torch.outer(blocks.diagonal(), blocks.diagonal())) / len(draws)).sqrt()
    assert ((draws.T.cov() - blocks).abs() < 4.5 * error).all()


def test_isotropic_covariances_are_accuracies() -> None:
    moved, fixed = pair("landmarks", 3, holes=False)
    plain, full = Landmarks(1.7, certainty=2.0), Landmarks(certainty=2.0, covariance=1.7**2 * torch.eye(3))
    latents = plain.start(moved, fixed)
    torch.testing.assert_close(full.start(moved, fixed), latents)
    torch.testing.assert_close(log_density(full, moved, fixed, latents), log_density(plain, moved, fixed, latents))
    torch.testing.assert_close(full.newton(moved, fixed, latents), plain.newton(moved, fixed, latents))


def test_the_accuracy_of_landmarks_is_at_its_mode() -> None:
    """The scale that ``update`` gives is where the log joint's derivative vanishes; what was not found does not count."""
    moved, fixed = 9 * torch.randn(6, 3), 9 * torch.randn(6, 3)
    fixed[1] = torch.nan
    similarity = Landmarks(2.0, certainty=4.0, tempering=0.5)
    (scale,) = similarity.update(moved, fixed, {}).values()
    assert scale.item() == pytest.approx((0.5 * float(((fixed - moved)[[0, 2, 3, 4, 5]] / 2).square().sum()) + 4) / (0.5 * 15 + 4 + 2))
    free = {"landmark_scale": scale.clone().requires_grad_()}
    value = 0.5 * similarity.distribution(moved, free).log_prob(fixed) + similarity.log_prior(moved, free)
    (slope,) = torch.autograd.grad(value, free["landmark_scale"])
    assert slope.abs() < 1e-9
    assert similarity.start(moved, fixed)["landmark_scale"] == scale
