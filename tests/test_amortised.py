"""Amortised inference: the family of posteriors, losses of batches, the published objectives, and what a refinement gains."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from cases import MODELS, amortised_guide, oblique_grid, smooth_image
from pyro.distributions import Normal
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from probmed import losses
from probmed.fields import GaussianField, ModulatedField, idct
from probmed.inference.amortised import elbo_draws, elbo_loss, in_plate, posterior_loss, refine_field
from probmed.inference.em import log_joint
from probmed.inference.parameters import seeded
from probmed.inference.training import TrainingSettings, train
from probmed.networks import VelocityNetwork

pytestmark = pytest.mark.usefixtures("float64", "local_parameters")

SHAPE = (4, 3)


def modulated(constant: bool = False, seed: int = 0) -> ModulatedField:
    generator = torch.Generator().manual_seed(seed)
    loc, amplitude, spectrum = (torch.randn(2, *SHAPE, generator=generator) for _ in range(3))
    spectrum = torch.full((1, *SHAPE), 0.7) if constant else (0.5 * spectrum[:1]).exp()
    return ModulatedField(loc, (0.3 * amplitude).exp(), spectrum, 2)


def dense(q: ModulatedField) -> MultivariateNormal:
    n = math.prod(q.event_shape)
    basis = torch.stack([idct(e.reshape(q.event_shape), 2).flatten() for e in torch.eye(n)], 1)
    root = q.amplitude.flatten()[:, None] * basis * q.spectrum.expand(q.loc.shape).flatten()
    return MultivariateNormal(q.loc.flatten(), root @ root.T)


def dense_prior(p: GaussianField) -> MultivariateNormal:
    n = p.event_shape.numel()
    precision = torch.stack([p.precision_matvec(e.reshape(p.event_shape)).flatten() for e in torch.eye(n)])
    return MultivariateNormal(p.loc.flatten(), precision_matrix=precision)


def prior() -> GaussianField:
    return GaussianField(SHAPE, (1.0, 2.0), torch.tensor(0.8), torch.tensor(0.6), channels=2)


def test_modulated_field_is_the_normal_that_it_says() -> None:
    q = modulated()
    value = torch.randn(5, *q.event_shape)
    torch.testing.assert_close(q.log_prob(value), dense(q).log_prob(value.flatten(1)))
    torch.testing.assert_close(q.variance.flatten(), dense(q).variance)
    torch.manual_seed(0)
    draws = q.rsample((40_000,)).flatten(1)
    found, expected = draws.T.cov(), dense(q).covariance_matrix
    # Four standard errors of each element.
    error = ((expected**2 + torch.outer(expected.diagonal(), expected.diagonal())) / len(draws)).sqrt()
    assert ((found - expected).abs() < 4.5 * error).all()
    torch.testing.assert_close(draws.mean(0), q.loc.flatten(), atol=0.05, rtol=0)


def test_modulated_field_expands() -> None:
    q = modulated().expand([3])
    assert q.batch_shape == (3,)
    value = q.rsample()
    torch.testing.assert_close(q.log_prob(value), modulated().log_prob(value))


def test_modulated_field_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="expected amplitude"):
        ModulatedField(torch.zeros(2, *SHAPE), torch.ones(1, *SHAPE), torch.ones(1, *SHAPE), 2)


def test_divergence_from_independent_elements_is_exact() -> None:
    q = modulated(constant=True)
    torch.testing.assert_close(kl_divergence(q, prior()), kl_divergence(dense(q), dense_prior(prior())))


def test_divergence_of_smooth_draws_is_estimated_without_bias() -> None:
    torch.manual_seed(0)
    q = modulated()
    estimates = torch.stack([kl_divergence(q, prior()) for _ in range(2000)])
    exact = kl_divergence(dense(q), dense_prior(prior()))
    assert (estimates.mean() - exact).abs() < 4 * estimates.std() / math.sqrt(len(estimates))
    assert estimates.std() > 0


def test_divergence_has_an_exact_gradient_in_the_mean() -> None:
    q = modulated()
    loc = q.loc.clone().requires_grad_()
    estimate = kl_divergence(ModulatedField(loc, q.amplitude, q.spectrum, 2), prior())
    (gradient,) = torch.autograd.grad(estimate, loc)
    torch.testing.assert_close(gradient, prior().precision_matvec(q.loc))


# Networks.


@pytest.mark.parametrize("shape", [(21, 18), (9, 33, 12)])
def test_network_starts_at_the_identity_and_takes_any_size(shape: tuple[int, ...]) -> None:
    d = len(shape)
    network = VelocityNetwork(d, 2, features=(4, 4, 4, 4, 4, 4))
    moving, fixed = torch.rand(2, 3, 2, *shape)
    moving[0, 0, 0] = torch.nan
    lattice = tuple((n + 1) // 2 + 1 for n in shape)
    velocity, spread = network(moving, fixed, lattice)
    assert velocity.shape == spread.shape == (3, d, *lattice)
    assert not velocity.any() and not spread.any()
    nn.init.normal_(network.head.weight)
    assert network(moving, fixed, lattice)[0].isfinite().all()


def test_mixed_precision_gives_what_full_precision_does_but_for_rounding() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    network = VelocityNetwork(2, features=(4, 4, 4, 4, 4, 4))
    nn.init.normal_(network.head.weight)
    images = torch.rand(2, 1, 1, 16, 16)
    exact, _ = network(*images, (8, 8))
    network.mixed_precision = True
    rounded, _ = network(*images, (8, 8))
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.05 * exact.norm()


# The published objectives.


def test_published_divergence_is_the_published_sum() -> None:
    torch.manual_seed(0)
    mean, log_variance = torch.randn(2, 1, 2, 3, 4)
    degree = torch.tensor([[2.0, 3, 3, 2], [3, 4, 4, 3], [2, 3, 3, 2]])
    spread = sum(5.0 * degree[i, j] * log_variance[0, c, i, j].exp() - log_variance[0, c, i, j] for c in range(2) for i in range(3) for j in range(4))
    down = (mean[:, :, 1:] - mean[:, :, :-1]).square().mean()
    along = (mean[..., 1:] - mean[..., :-1]).square().mean()
    expected = 0.5 * 2 * (spread / 24 + 5.0 * 0.5 * (down + along) / 2)
    torch.testing.assert_close(losses.voxelmorph_divergence(mean, log_variance, 5.0), expected)


def test_published_correlation_is_that_of_each_window() -> None:
    torch.manual_seed(0)
    m, f = torch.rand(2, 1, 1, 6, 5)
    total = torch.zeros(())
    padded = [torch.nn.functional.pad(x[0, 0], [1] * 4) for x in (m, f)]
    for i in range(6):
        for j in range(5):
            a, b = (x[i : i + 3, j : j + 3].flatten() for x in padded)
            cross = ((a - a.mean()) * (b - b.mean())).sum()
            total += cross**2 / ((a - a.mean()).square().sum() * (b - b.mean()).square().sum() + 1e-5)
    torch.testing.assert_close(losses.negative_correlation(m, f, 3), -total / 30)


# Batches.


def test_model_in_a_plate_has_the_sum_of_its_members_densities() -> None:
    case = MODELS["Registration_velocity_gaussian"]
    model = case.build()
    moving, source = smooth_image()
    batch = torch.stack([moving, 0.5 * moving, moving.flip(1)])
    grid = oblique_grid()
    velocity = model.deformation.prior().expand([3]).sample()
    # A batch takes as many squarings as its fastest member.
    velocity = 3 * velocity / velocity.abs().amax((1, 2, 3, 4), keepdim=True)
    fixed, noise = torch.rand(3, 1, *grid.shape), torch.rand(3, 1) + 0.1
    whole = log_joint(in_plate(model, "member", 3), {"velocity": velocity, "noise": noise}, batch, source, grid, fixed)
    parts = [log_joint(model, {"velocity": velocity[i], "noise": noise[i]}, batch[i], source, grid, fixed[i]) for i in range(3)]
    torch.testing.assert_close(whole, torch.stack(parts).sum())


def test_posterior_loss_is_minus_log_q() -> None:
    model = MODELS["Registration_velocity_correlation"].build()
    guide = amortised_guide(model)
    grid = model.deformation.grid
    moving, fixed = torch.rand(2, 2, 1, *grid.shape)
    velocity = torch.randn(2, 3, *grid.shape)
    found = posterior_loss(guide, {"velocity": velocity}, 2, moving, grid, grid, fixed)
    torch.testing.assert_close(found, -guide.distribution(moving, fixed).log_prob(velocity).mean())


class Line(PyroModule):
    """z ~ N(0, 1), y ~ N(z, 1)."""

    def forward(self, y: Tensor) -> None:
        z = pyro.sample("z", Normal(torch.zeros(()), 1.0))
        pyro.sample("y", Normal(z, 1.0), obs=y)


class LineGuide(PyroModule):
    """q(z | y) = N(a y + b, s²); the truth is a = ½, b = 0, s² = ½."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.offset, self.log_sd = (nn.Parameter(torch.zeros(())) for _ in range(3))

    def forward(self, y: Tensor) -> None:
        pyro.sample("z", Normal(self.slope * y + self.offset, self.log_sd.exp()))


@pytest.mark.parametrize("objective", ["elbo", "simulation"])
def test_both_losses_find_the_exact_posterior(objective: str) -> None:
    model, guide = Line(), LineGuide()

    def loss(y: tuple[Tensor, Tensor]) -> Tensor:
        z, data = y
        return elbo_loss(model, guide, 64, data) if objective == "elbo" else posterior_loss(guide, {"z": z}, 64, data)

    def batches(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z = torch.randn(64, generator=generator)
        return z, z + torch.randn(64, generator=generator)

    train(loss, {"guide": guide}, batches, TrainingSettings(steps=600, learning_rate=0.05, every=600))
    found = torch.stack([guide.slope, guide.offset, (2 * guide.log_sd).exp()]).detach()
    torch.testing.assert_close(found, torch.tensor([0.5, 0.0, 0.5]), atol=0.04, rtol=0)


class NoisyField(PyroModule):
    """v ~ field, y ~ N(v, 0.5²): the posterior is a normal that is diagonal in the DCT."""

    def forward(self, y: Tensor) -> None:
        v = pyro.sample("velocity", prior())
        pyro.sample("y", Normal(v, 0.5).to_event(3), obs=y)


def test_refinement_reaches_the_evidence_and_says_what_it_gained() -> None:
    torch.manual_seed(0)
    y = prior().sample() + 0.5 * torch.randn(2, *SHAPE)
    exact = MultivariateNormal(torch.zeros(24), dense_prior(prior()).covariance_matrix + 0.25 * torch.eye(24)).log_prob(y.flatten())
    model = NoisyField()
    start = ModulatedField(torch.zeros(1, 2, *SHAPE), torch.ones(1, 2, *SHAPE), (prior().eigenvalues + 4.0).rsqrt()[None], 2)

    def guide(y: Tensor) -> None:
        pyro.sample("velocity", ModulatedField(start.loc[0], start.amplitude[0], start.spectrum[0], 2))

    found = refine_field(model, guide, "velocity", start, (y,), steps=400, learning_rate=0.05, draws=200)
    assert found.gap > 5 * found.error
    assert abs(found.refined - float(exact)) < 0.2  # of 135
    assert found.refined <= float(exact) + 3 * found.error
    torch.testing.assert_close(found.gap, found.refined - found.amortised)
    posterior_mean = dense_prior(prior()).covariance_matrix @ torch.linalg.solve(
        dense_prior(prior()).covariance_matrix + 0.25 * torch.eye(24), y.flatten()
    )
    torch.testing.assert_close(found.guide.distribution().loc.flatten().detach(), posterior_mean, atol=0.1, rtol=0)
    assert elbo_draws(model, found.guide, 4, y).shape == (4,)


@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_refinement_never_ends_below_where_it_began(rate: float) -> None:
    """From the exact posterior there is nothing to gain, and long steps lose."""
    torch.manual_seed(0)
    y = prior().sample() + 0.5 * torch.randn(2, *SHAPE)
    covariance = dense_prior(prior()).covariance_matrix
    mean = (covariance @ torch.linalg.solve(covariance + 0.25 * torch.eye(24), y.flatten())).reshape(1, 2, *SHAPE)
    start = ModulatedField(mean, torch.ones_like(mean), (prior().eigenvalues + 4.0).rsqrt()[None], 2)
    found = refine_field(NoisyField(), lambda y: None, "velocity", start, (y,), steps=8, learning_rate=rate)
    assert found.gap >= 0
    assert found.refined >= found.amortised
    if rate == 1.0:
        assert found.gap == 0
        torch.testing.assert_close(found.guide.loc, mean[0], rtol=0, atol=0)


def test_the_bound_of_a_refinement_is_that_of_its_guide() -> None:
    torch.manual_seed(0)
    y = prior().sample() + 0.5 * torch.randn(2, *SHAPE)
    start = ModulatedField(torch.zeros(1, 2, *SHAPE), torch.ones(1, 2, *SHAPE), (prior().eigenvalues + 4.0).rsqrt()[None], 2)
    found = refine_field(NoisyField(), lambda y: None, "velocity", start, (y,), steps=60, learning_rate=0.05)
    assert found.gap > 5 * found.error > 0
    # The draws are those of the guide that is given.
    with seeded(0):
        again = elbo_draws(NoisyField(), found.guide, 20, y)
    assert float(again.mean()) == pytest.approx(found.refined, abs=1e-9)
