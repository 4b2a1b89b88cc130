"""Bias fields and Gaussian mixtures against explicit cosines, dense algebra, brute force and known truth."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro
import pyro.distributions
import pytest
import torch
from pyro import poutine
from torch import Tensor

from probmed.appearances import GAUSSIANS, BiasField, GaussianMixture, sufficient_statistics
from probmed.distributions import InverseWishart, LabelMixture
from probmed.grids import Grid, MaskedGrid

pytestmark = pytest.mark.usefixtures("float64")

GRID = Grid.from_spacing((8, 6, 5), (2.0, 3.0, 4.0))


def explicit_functions(domain: Grid, counts: tuple[int, ...]) -> Tensor:
    """φ_k at the voxels of the domain, ``(M, *shape)``, one cosine after the other, the constant left out."""
    functions = []
    for frequencies in itertools.product(*[range(c) for c in counts]):
        if not any(frequencies):
            continue
        value = torch.ones(domain.shape)
        for axis, (n, f) in enumerate(zip(domain.shape, frequencies, strict=True)):
            line = torch.cos(math.pi * f * (torch.arange(n) + 0.5) / n) * (math.sqrt(2) if f else 1)
            value = value * line.reshape([-1 if a == axis else 1 for a in range(domain.ndim)])
        functions.append(value)
    return torch.stack(functions)


def random_labels(shape: tuple[int, ...], k: int = 3, sharpness: float = 2.0) -> Tensor:
    return (sharpness * torch.randn(k, *shape)).log_softmax(0)


# The bias field.


@pytest.mark.parametrize("grid", [GRID, Grid.from_spacing((8, 7), (3.0, 5.0))])
def test_bias_is_a_sum_of_cosines_of_unit_mean_square(grid: Grid) -> None:
    bias = BiasField(cutoff_mm=14.0, channels=2)
    counts = bias.counts(grid)
    assert counts == tuple(math.ceil(2 * n * h / 14) for n, h in zip(grid.shape, grid.spacing, strict=True))
    functions = explicit_functions(grid, counts)
    coefficients = torch.randn(2, len(functions))
    expected = torch.einsum("cm,m...->c...", coefficients, functions)
    torch.testing.assert_close(bias.evaluate(coefficients, grid), expected)
    flat = functions.flatten(1)
    torch.testing.assert_close(flat @ flat.T / flat.shape[1], torch.eye(len(flat)))
    torch.testing.assert_close(flat.mean(1), torch.zeros(len(flat)), rtol=0, atol=1e-12)


def test_bias_is_the_same_field_on_subsampled_cropped_and_masked_grids() -> None:
    bias = BiasField(cutoff_mm=10.0, domain=GRID)
    coefficients = torch.randn(1, bias.prior_sd(GRID).numel())
    whole = bias.evaluate(coefficients, GRID)
    sparse = GRID.subsampled((2, 3, 1))
    torch.testing.assert_close(bias.evaluate(coefficients, sparse), whole[:, ::2, ::3])
    part = GRID.cropped((1, 2, 0), (7, 5, 4))
    torch.testing.assert_close(bias.evaluate(coefficients, part), whole[:, 1:7, 2:5, :4])
    mask = torch.rand(GRID.shape) < 0.3
    torch.testing.assert_close(bias.evaluate(coefficients, MaskedGrid(GRID, mask)), whole[:, mask])
    assert bias.counts(sparse) == bias.counts(GRID)


def test_bias_refuses_axes_that_are_not_its_domain_s() -> None:
    turned = GRID.transformed(
        torch.tensor([[0.8, -0.6, 0, 0], [0.6, 0.8, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    )
    bias = BiasField(cutoff_mm=10.0, domain=GRID)
    with pytest.raises(ValueError, match="same axes"):
        bias.evaluate(torch.zeros(1, bias.prior_sd(GRID).numel()), turned)
    with pytest.raises(ValueError, match="positive"):
        BiasField(cutoff_mm=0.0)


def test_bias_prior_has_the_stated_sd_and_damps_high_frequencies() -> None:
    bias = BiasField(cutoff_mm=6.0, sd=0.4, length_mm=9.0)
    sd = bias.prior_sd(GRID)
    functions = explicit_functions(GRID, bias.counts(GRID))
    variance = torch.einsum("m,m...->...", sd**2, functions**2)
    assert variance.mean().item() == pytest.approx(0.16, rel=1e-9)
    squares = []
    for f in itertools.product(*[range(c) for c in bias.counts(GRID)]):
        if any(f):
            waves = zip(f, GRID.shape, GRID.spacing, strict=True)
            squares.append(sum((math.pi * k / (n * h)) ** 2 for k, n, h in waves))
    shape = (torch.tensor(squares) + 9.0**-2) ** -1
    torch.testing.assert_close(sd / sd[0], shape / shape[0])


def test_bias_draws_its_prior_and_a_single_cosine_makes_none() -> None:
    bias = BiasField(cutoff_mm=12.0, sd=0.4, channels=2)
    trace = poutine.trace(bias).get_trace(GRID)
    value: Tensor = trace.nodes["bias"]["value"]  # type: ignore[assignment]
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"], bias.evaluate(value, GRID))
    normal = torch.distributions.Normal(0.0, bias.prior_sd(GRID).expand(2, -1)).log_prob(value).sum()
    torch.testing.assert_close(trace.log_prob_sum(), normal)
    flat = BiasField(cutoff_mm=1000.0)
    assert flat.counts(GRID) == (1, 1, 1)
    torch.testing.assert_close(flat(GRID), torch.zeros(1, *GRID.shape))


@pytest.mark.parametrize("masked", [False, True])
def test_bias_newton_step_is_the_dense_newton_step(masked: bool) -> None:
    bias = BiasField(cutoff_mm=14.0, channels=2)
    mask = torch.rand(GRID.shape) < 0.4
    grid = MaskedGrid(GRID, mask) if masked else GRID
    functions = explicit_functions(GRID, bias.counts(GRID))
    functions = functions[:, mask] if masked else functions.flatten(1)
    old = torch.randn(2, len(functions))
    gradient, curvature = torch.randn(2, functions.shape[1]), torch.rand(2, functions.shape[1])
    precision = bias.prior_sd(GRID) ** -2
    shaped = (grid.numel,) if masked else GRID.shape
    found = bias.newton_step(old, grid, gradient.reshape(2, *shaped), curvature.reshape(2, *shaped), step=0.7)
    for c in range(2):
        hessian = (functions * curvature[c]) @ functions.T + torch.diag(precision)
        slope = functions @ gradient[c] - precision * old[c]
        torch.testing.assert_close(found[c], old[c] + 0.7 * torch.linalg.solve(hessian, slope))


def test_bias_newton_steps_reach_the_maximum_of_a_quadratic_at_once() -> None:
    bias = BiasField(cutoff_mm=14.0)
    target, weight = torch.randn(1, *GRID.shape), torch.rand(1, *GRID.shape) + 0.5
    start = torch.zeros(1, bias.prior_sd(GRID).numel())
    moved = bias.newton_step(start, GRID, weight * target, weight).requires_grad_()
    precision = bias.prior_sd(GRID) ** -2
    error = target - bias.evaluate(moved, GRID)
    objective = -0.5 * (weight * error**2).sum() - 0.5 * (precision * moved**2).sum()
    (slope,) = torch.autograd.grad(objective, moved)
    assert slope.abs().max() < 1e-9


# Statistics and updates of the mixture.


def appearance(channels: int = 1, outlier: float = 0.0, **options: Any) -> GaussianMixture:
    return GaussianMixture([1, 2, 1], channels, outlier=outlier, **options)


def simulated(
    shape: tuple[int, ...], channels: int, missing: float = 0.0, outliers: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """log prior, image and labels of three well separated labels, the second of two Gaussians."""
    log_prior = random_labels(shape)
    labels = torch.distributions.Categorical(logits=log_prior.movedim(0, -1)).sample()
    component = torch.where(labels == 2, 3, torch.where((labels == 1) & (torch.rand(shape) < 0.4), 2, labels))
    means = torch.tensor([0.3, 0.6, 0.9, 1.3])[:, None] * torch.tensor([1.0, -0.7, 0.4])[:channels]
    image = means[component] + 0.07 * torch.randn(*shape, channels)
    odd = torch.rand(shape) < outliers
    image = torch.where(odd[..., None], 4 * torch.rand(*shape, channels), image).movedim(-1, 0)
    return log_prior, torch.where(torch.rand(image.shape) < missing, torch.nan, image), labels


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_sufficient_statistics_are_conditional_moments_voxel_by_voxel(channels: int, missing: float) -> None:
    n, g = 30, 2
    values = torch.where(torch.rand(channels, n) < missing, torch.nan, torch.randn(channels, n))
    responsibilities = torch.rand(g, n) * ~values.isnan().all(0)
    means, root = torch.randn(g, channels), torch.randn(g, channels, channels)
    covariances = root @ root.mT + torch.eye(channels)
    mass, first, second = torch.zeros(g), torch.zeros(g, channels), torch.zeros(g, channels, channels)
    for k, v in itertools.product(range(g), range(n)):
        seen = ~values[:, v].isnan()
        if not seen.any():
            continue
        x, spread = means[k].clone(), covariances[k].clone()
        gain = covariances[k][:, seen] @ torch.linalg.inv(covariances[k][seen][:, seen])
        x = x + gain @ (values[seen, v] - means[k][seen])
        spread = spread - gain @ covariances[k][seen]
        mass[k] += responsibilities[k, v]
        apart = x - means[k]
        first[k] += responsibilities[k, v] * apart
        second[k] += responsibilities[k, v] * (torch.outer(apart, apart) + spread)
    found = sufficient_statistics(values, responsibilities, means, covariances)
    for a, b in zip(found, (mass, first, second), strict=True):
        torch.testing.assert_close(a, b)


def test_many_voxels_of_one_value_leave_the_prior_s_covariance_in_single_precision() -> None:
    """Without noise, what is left of the covariance is Ψ over its count; sums of squares about zero are 1e9 here, and their rounding 100."""
    a = GaussianMixture([1, 1], 1)
    log_prior = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat_interleave(500_000, 1).clamp_min(1e-6).log().float()
    image = torch.tensor([0.5, 43.7]).repeat_interleave(500_000)[None].float()
    state = a.start(log_prior, image)
    for _ in range(3):
        mixture = a.mixture(log_prior, state["weights"], state["means"], state["covariances"])
        state = a.em_update(log_prior, mixture, image, state["weights"])
    distance = torch.tensor([0.5, 43.7], dtype=torch.float32) - a.location
    expected = (a.df * a.scale**2 + a.certainty * distance.square()) / (500_000 + a.df + 3)
    torch.testing.assert_close(state["covariances"][:, 0, 0], expected, rtol=0.05, atol=0.0)


def log_joint(
    a: GaussianMixture, log_prior: Tensor, image: Tensor, state: dict[str, Tensor], factor: float
) -> Tensor:
    """Tempered log density of the image and the prior's, written out."""
    mixture = a.mixture(log_prior, state["weights"], state["means"], state["covariances"])
    prior = torch.distributions.Gamma(a.weight_certainty * a.shares + 1, a.weight_certainty).log_prob(
        state["weights"]
    )
    psi = a.df * a.scale**2 * torch.eye(a.channels)
    wishart = InverseWishart(a.df, psi).log_prob(state["covariances"])
    centre = torch.full((a.channels,), a.location)
    normal = torch.distributions.MultivariateNormal(centre, state["covariances"][a.noise[: a.pure]] / a.certainty).log_prob(
        state["means"]
    )
    return factor * mixture.log_prob(image) + prior.sum() + wishart.sum() + normal.sum()


BORDERS: dict[str, Any] = {"tied": (0, 2), "borders": [(0, 2)]}


@pytest.mark.parametrize("options", [{}, BORDERS])
def test_log_joint_of_the_component_is_the_stated_density(options: dict[str, Any]) -> None:
    a = appearance(2, 0.01, **options)
    log_prior, image, _ = simulated((3, 4), 2)

    def model() -> None:
        pyro.sample("image", a(log_prior), obs=image)

    state = a.start(log_prior, image)
    trace = poutine.trace(poutine.condition(model, data=state)).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), log_joint(a, log_prior, image, state, 1.0))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("tempering", [1.0, 0.2])
@pytest.mark.parametrize(
    ("missing", "outlier", "options"),
    [(0.0, 0.0, {}), (0.25, 0.0, {}), (0.0, 0.02, {}), (0.25, 0.02, {}), (0.0, 0.0, BORDERS), (0.25, 0.02, BORDERS)],
)
def test_no_update_lowers_the_log_joint(
    channels: int, tempering: float, missing: float, outlier: float, options: dict[str, Any]
) -> None:
    """Twenty rounds from a poor start, each update alone too."""
    a = appearance(channels, outlier, **options)
    log_prior, image, _ = simulated((7, 6, 5), channels, missing, outlier)
    state = a.start(log_prior, image, spread=0.3)
    state["means"] = state["means"] + 0.1 * torch.randn_like(state["means"])
    last = first = log_joint(a, log_prior, image, state, tempering)
    for _ in range(20):
        mixture = a.mixture(log_prior, state["weights"], state["means"], state["covariances"])
        new = a.em_update(log_prior, mixture, image, state["weights"], tempering)
        for part in (("weights",), ("means", "covariances")):
            alone = state | {name: new[name] for name in part}
            assert log_joint(a, log_prior, image, alone, tempering) >= last - 1e-9
        state = new
        value = log_joint(a, log_prior, image, state, tempering)
        assert value >= last - 1e-9
        last = value
    assert last > first + 5


@pytest.mark.parametrize("channels", [1, 2])
def test_repeated_updates_reach_a_stationary_point(channels: int) -> None:
    a = appearance(channels, 0.01)
    log_prior, image, _ = simulated((6, 6, 4), channels, missing=0.1)
    state = a.start(log_prior, image)
    for _ in range(400):
        mixture = a.mixture(log_prior, state["weights"], state["means"], state["covariances"])
        state = a.em_update(log_prior, mixture, image, state["weights"], 0.5)
    leaves = {name: value.detach().requires_grad_() for name, value in state.items()}
    value = log_joint(a, log_prior, image, leaves, 0.5)
    for name, gradient in zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True):
        assert (gradient * leaves[name]).abs().max() < 1e-3, name  # nats for a relative change


def test_update_of_one_gaussian_is_the_conjugate_mode() -> None:
    a = GaussianMixture([1], 2, outlier=0.0)
    image = torch.randn(2, 40) * 0.3 + 0.5
    log_prior = torch.zeros(1, 40)
    start = a.start(log_prior, image)
    mixture = a.mixture(log_prior, start["weights"], start["means"], start["covariances"])
    found = a.em_update(log_prior, mixture, image, start["weights"])
    n, n0, centre = 40, a.certainty, torch.full((2,), a.location)
    mean = (image.sum(1) + n0 * centre) / (n + n0)
    centred = image - mean[:, None]
    scatter = centred @ centred.T + n0 * torch.outer(mean - centre, mean - centre)
    psi = a.df * a.scale**2 * torch.eye(2)
    torch.testing.assert_close(found["means"][0], mean)
    torch.testing.assert_close(found["covariances"][0], (psi + scatter) / (a.df + n + 2 + 2))
    torch.testing.assert_close(found["weights"], torch.ones(1))


@pytest.mark.parametrize(("missing", "outlier"), [(0.0, 0.0), (0.2, 0.0), (0.0, 0.03)])
def test_updates_recover_the_truth_of_a_simulated_image(missing: float, outlier: float) -> None:
    a = appearance(2, outlier or 1e-3)
    log_prior, image, labels = simulated((12, 12, 12), 2, missing, outlier)
    state = a.start(log_prior, image)
    for _ in range(150):
        mixture = a.mixture(log_prior, state["weights"], state["means"], state["covariances"])
        state = a.em_update(log_prior, mixture, image, state["weights"])
    truth = torch.tensor([0.3, 0.6, 0.9, 1.3])[:, None] * torch.tensor([1.0, -0.7])
    order = [0, *(1 + state["means"][1:3, 0].argsort()).tolist(), 3]
    assert (state["means"][order] - truth).abs().max() < 0.02
    sd = state["covariances"].diagonal(dim1=-2, dim2=-1).sqrt()
    assert (sd - 0.07).abs().max() < 0.01
    weights = state["weights"][order]
    torch.testing.assert_close(weights[1] / (weights[1] + weights[2]), torch.tensor(0.6), rtol=0, atol=0.06)
    # The labels were drawn from the prior as it is: nothing to reweight.
    assert (a.label_weights(state["weights"]) - 1).abs().max() < 0.15
    mixture = a.mixture(log_prior, state["weights"], state["means"], state["covariances"])
    assert (mixture.posterior(image).argmax(0) == labels).double().mean() > 0.93


def test_weights_reweight_the_label_prior() -> None:
    """Labels three times as frequent as the atlas says: the weights find the ratio."""
    a = GaussianMixture([1, 1], 1, outlier=0.0, weight_certainty=1.0)
    log_prior = random_labels((12, 12, 12), 2, 1.0)
    tilted = (log_prior + torch.tensor([3.0, 1.0]).log()[:, None, None, None]).log_softmax(0)
    labels = torch.distributions.Categorical(logits=tilted.movedim(0, -1)).sample()
    image = (torch.tensor([0.4, 1.0])[labels] + 0.05 * torch.randn(12, 12, 12))[None]
    state = a.start(log_prior, image)
    for _ in range(60):
        mixture = a.mixture(log_prior, state["weights"], state["means"], state["covariances"])
        state = a.em_update(log_prior, mixture, image, state["weights"])
    assert (state["weights"][0] / state["weights"][1]).item() == pytest.approx(3, rel=0.2)
    torch.testing.assert_close(
        mixture.log_prior, (log_prior + state["weights"].log()[:, None, None, None]).log_softmax(0)
    )


def test_mixture_splits_weights_into_a_label_s_share_and_its_gaussians() -> None:
    a = appearance(1)
    log_prior, weights = random_labels((2, 3)), torch.tensor([0.5, 0.2, 0.6, 2.0])
    mixture = a.mixture(log_prior, weights, torch.zeros(4, 1), torch.ones(4, 1, 1))
    torch.testing.assert_close(mixture.mixing, torch.tensor([1.0, 0.25, 0.75, 1.0]))
    prior = log_prior.exp() * torch.tensor([0.5, 0.8, 2.0])[:, None, None]
    torch.testing.assert_close(mixture.log_prior.exp(), prior / prior.sum(0))
    # In a batch, the same for each member.
    batch = a.mixture(
        log_prior.expand(2, 3, 2, 3),
        torch.stack([weights, weights.flip(0)]),
        torch.zeros(2, 4, 1),
        torch.ones(2, 4, 1, 1),
    )
    torch.testing.assert_close(batch.mixing[0], mixture.mixing)
    torch.testing.assert_close(batch.log_prior[0], mixture.log_prior)
    assert not torch.allclose(batch.log_prior[1], mixture.log_prior)


def test_start_is_each_label_s_own_mean_and_variance() -> None:
    a = GaussianMixture([1, 1], 2, outlier=0.0, scale=1e-3)
    labels = torch.rand(6, 6, 6) < 0.5
    log_prior = torch.stack([labels, ~labels]).double().clamp_min(1e-30).log()
    image = torch.where(labels, 1.0, 2.0) + 0.1 * torch.randn(2, 6, 6, 6)
    image[0, 0, 0, 0] = torch.nan
    state = a.start(log_prior, image)
    for k, where in enumerate((labels, ~labels)):
        for c in range(2):
            seen = image[c][where & ~image[c].isnan()]
            assert state["means"][k, c].item() == pytest.approx(seen.mean().item())
            assert state["covariances"][k, c, c].item() == pytest.approx(
                seen.var(unbiased=False).item(), rel=1e-6
            )
    assert state["covariances"][:, 0, 1].abs().max() == 0


def test_bias_derivatives_are_those_of_the_log_density() -> None:
    a = appearance(2, 0.02)
    log_prior, image, _ = simulated((3, 4), 2, missing=0.2)
    state = a.start(log_prior, image)
    log_bias = 0.1 * torch.randn(2, 3, 4)
    mixture = a.mixture(log_prior, state["weights"], state["means"], state["covariances"], log_bias)
    gradient, curvature = a.bias_derivatives(mixture, image)
    step = 1e-6
    for c, i, j in itertools.product(range(2), range(3), range(4)):
        moved = []
        for sign in (-1, 1):
            shifted = log_bias.clone()
            shifted[c, i, j] += sign * step
            density = a.mixture(log_prior, state["weights"], state["means"], state["covariances"], shifted)
            moved.append(density.log_prob(image).item())
        if image[c, i, j].isnan():
            assert gradient[c, i, j] == 0
            assert curvature[c, i, j] == 0
        else:
            assert gradient[c, i, j].item() == pytest.approx(
                (moved[1] - moved[0]) / (2 * step), abs=1e-5, rel=1e-5
            )
            assert curvature[c, i, j] > 0


def test_bias_changes_variables_with_its_jacobian() -> None:
    """One voxel: the density of β I times β, integrated over I, is one whatever the bias."""
    x = torch.linspace(-20, 20, 100_001)
    for log_bias in (-0.5, 0.0, 0.7):
        m = LabelMixture(
            torch.zeros(1, 1), torch.ones(1), torch.tensor([[0.4]]), torch.tensor([[[0.3]]]),
            torch.zeros(1, dtype=torch.int64), torch.full((1, 1), log_bias),
        )  # fmt: skip
        density = m.expand((len(x),)).log_prob(x[:, None, None]).exp()
        assert torch.trapezoid(density, x).item() == pytest.approx(1, abs=1e-6)


def test_gaussians_by_name_and_impossible_counts() -> None:
    a = GaussianMixture.for_labels(("GM", "CSF", "bone", "lesion"), 2)
    assert a.counts == (GAUSSIANS["GM"], GAUSSIANS["CSF"], GAUSSIANS["bone"], 1)
    assert a.owner[: a.pure].bincount().tolist() == list(a.counts)
    assert (a.owner[: a.pure].diff() >= 0).all()
    for counts in ([], [1, 0]):
        with pytest.raises(ValueError, match="at least one Gaussian"):
            GaussianMixture(counts)


def test_a_border_is_one_gaussian_more_in_either_label_half_way_between_them() -> None:
    a = GaussianMixture([1, 2, 1], outlier=0.0, weight_certainty=7.0, **BORDERS, border_share=0.3)
    assert a.owner.tolist() == [0, 1, 1, 2, 0, 2]
    torch.testing.assert_close(a.shares, torch.tensor([0.7, 0.5, 0.5, 0.7, 0.3, 0.3]))
    means = torch.tensor([[1.0], [2.0], [3.0], [5.0]])
    assert a.component_means(means).flatten().tolist() == [1, 2, 3, 5, 3, 3]
    mixture = a.mixture(torch.zeros(3, 1), a.shares, means, torch.full((a.covariance_count, 1, 1), 0.01))
    # At the mean of the two, what tells the labels apart is their prior alone.
    first, second = mixture.label_log_likelihood(torch.tensor([[3.0]]))[[0, 2], 0]
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("mixed", [0.0, 0.3])
def test_updates_recover_the_means_and_the_noise_under_mixed_voxels(mixed: float) -> None:
    """What pure Gaussians take for noise is mixture; with borders the noise is found, and the share of what is mixed when it is free."""
    labels = (torch.rand(40000) < 0.5).long()
    half = torch.rand(40000) < mixed
    image = torch.where(half, 1.0, 0.8 + 0.4 * labels) + 0.05 * torch.randn(40000)
    log_prior = torch.full((2, 40000), 0.5).log()
    a = GaussianMixture([1, 1], outlier=0.0, weight_certainty=1.0, tied=(0, 1), borders=[(0, 1)], location=1.0)
    state = a.start(log_prior, image[None])
    state["means"] = torch.tensor([[0.9], [1.1]])
    for _ in range(200):
        mixture = a.mixture(log_prior, state["weights"], state["means"], state["covariances"])
        state = a.em_update(log_prior, mixture, image[None], state["weights"])
    torch.testing.assert_close(state["means"].flatten(), torch.tensor([0.8, 1.2]), atol=0.01, rtol=0)
    torch.testing.assert_close(state["covariances"].flatten().sqrt(), torch.tensor([0.05]), atol=0.002, rtol=0)
    found = state["weights"][2:].sum() / state["weights"].sum()
    torch.testing.assert_close(found, torch.tensor(mixed), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{"borders": [(0, 2)]}, {"tied": (0, 1), "borders": [(0, 1)]}, {**BORDERS, "border_share": 1.0}],
)
def test_borders_that_are_none_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="border"):
        GaussianMixture([1, 2, 1], **options)
