"""Autoencoders with a Gaussian process as prior against dense algebra.

What minibatches, two passes and inducing points may not change, and what the published objectives do.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from probmed.grids import Grid
from probmed.inference.gp_prior import (
    GlobalWeights,
    WeightsCovariance,
    accumulated_loss,
    exact_divergence,
    exact_loss,
    forecast,
    forecast_codes,
    reconstruction,
)
from probmed.inference.gp_prior_baselines import (
    gppvae_loss,
    regressed_weights,
    svgpvae_forecast,
    svgpvae_loss,
)
from probmed.inference.gp_prior_smoothed import smoothed_codes, smoothed_forecast, smoothed_loss
from probmed.inference.training import TrainingSettings, train
from probmed.kernels import ColumnLinear, SameLevel
from probmed.models.gp_prior_vae import (
    CodeCovariance,
    CodePrior,
    Cohort,
    DeformationDecoder,
    Features,
    GPPriorGuide,
    GPPriorVAE,
    Inducing,
    Intercept,
    Linear,
    PixelBernoulli,
    PixelNormal,
    Slope,
    VisitNormal,
    Within,
    pad_visits,
    weights_given_codes,
)
from probmed.priors import SmoothVelocity
from probmed.transforms import Velocity, warp

pytestmark = pytest.mark.usefixtures("float64", "local_parameters")

SUBJECTS = torch.tensor([4, 4, 1, 1, 1, 2, 0, 0, 0, 3])
PIXELS = 6


def columns(subjects: Tensor = SUBJECTS) -> dict[str, Tensor]:
    """Genotypes of people, a covariate that changes with time, and time."""
    people = int(subjects.max()) + 1
    return {
        "genetics": torch.randn(people, 4)[subjects],
        "clinical": torch.randn(len(subjects), 2),
        "time": torch.randn(len(subjects), 1),
        "slope": torch.randn(len(subjects), 1),
    }


def cohort(subjects: Tensor = SUBJECTS) -> Cohort:
    return Cohort.of(subjects, columns(subjects))


def code_prior(codes: int = 2) -> CodePrior:
    parts = {
        "genetics": Linear(),
        "clinical": Linear(),
        "level": Intercept(),
        "time": Within(MaternKernel(nu=2.5)),
        "slope": Slope(),
    }
    prior = CodePrior(codes, parts, mean={"clinical": nn.Linear(2, codes)})
    with torch.no_grad():
        prior.logits.normal_()
    return prior


def encoded(people: Cohort, codes: int = 2) -> tuple[Tensor, Tensor]:
    """Some q(z), as a guide gives it."""
    there = people.present[..., None]
    mean, sd = torch.randn(*people.present.shape, codes), 0.1 + torch.rand(*people.present.shape, codes)
    return mean.masked_fill(~there, 0.0), sd.masked_fill(~there, 1.0)


def dense(prior: CodeCovariance, present: Tensor, code: int) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and Σ = A Aᵀ + B of a code over the visits there are."""
    root = prior.features[present] * prior.variances[code].sqrt()
    pairs = zip(prior.blocks[code], present, strict=True)
    blocks = torch.block_diag(*[block[there][:, there] for block, there in pairs])
    return root, blocks, root @ root.mT + blocks


def dense_divergence(prior: CodeCovariance, present: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    totals = []
    for code in range(mean.shape[-1]):
        q = MultivariateNormal(mean[present][:, code], torch.diag(sd[present][:, code] ** 2))
        p = MultivariateNormal(prior.mean[present][:, code], dense(prior, present, code)[2])
        totals.append(kl_divergence(q, p))
    return torch.stack(totals)


class Decoder(nn.Module):
    """A nonlinear one."""

    def __init__(self, codes: int = 2, covariates: int = 0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(codes + covariates, 5), nn.Tanh(), nn.Linear(5, PIXELS))

    def forward(self, *inputs: Tensor) -> Tensor:
        decoded: Tensor = self.body(torch.cat(inputs, -1))
        return decoded


class Encoder(nn.Module):
    def __init__(self, codes: int = 2, covariates: int = 0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(PIXELS + covariates, 5), nn.Tanh(), nn.Linear(5, 2 * codes))

    def forward(self, *inputs: Tensor) -> Tensor:
        found: Tensor = self.body(torch.cat(inputs, -1))
        return found


def autoencoder(
    prior: CodePrior | None = None, covariates: tuple[str, ...] = (), width: int = 0
) -> tuple[GPPriorVAE, GPPriorGuide]:
    model = GPPriorVAE(prior or code_prior(), Decoder(covariates=width), PixelNormal(0.3), covariates)
    return model, GPPriorGuide(model, Encoder(covariates=width))


def images(people: Cohort) -> Tensor:
    return torch.randn(*people.present.shape, PIXELS).masked_fill(~people.present[..., None], math.nan)


def gradients(loss: Tensor, *modules: nn.Module) -> list[Tensor]:
    parameters = list({id(p): p for module in modules for p in module.parameters()}.values())
    return [g.clone() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]


# The prior.


def test_rows_of_a_table_by_person_and_visit() -> None:
    values = torch.arange(10.0)
    padded = pad_visits(SUBJECTS, values)
    expected = [
        [6.0, 7.0, 8.0],
        [2.0, 3.0, 4.0],
        [5.0, math.nan, math.nan],
        [9.0, math.nan, math.nan],
        [0.0, 1.0, math.nan],
    ]
    torch.testing.assert_close(padded, torch.tensor(expected), equal_nan=True)
    people = Cohort.of(SUBJECTS, {"x": values[:, None]})
    assert torch.equal(people.present, ~padded.isnan())
    some = people.people(torch.tensor([1, 4]))
    assert len(some) == 2
    assert torch.equal(some.rows(["x"])[0][:, 0], torch.tensor([2.0, 3.0, 4.0, 0.0, 1.0]))
    assert torch.equal(some.padded(some.rows(["x"])[0]), some.inputs["x"])


def test_covariance_is_the_sum_of_its_components() -> None:
    people, prior = cohort(), code_prior()
    found, kernel = prior(people), prior.components["time"]
    assert isinstance(kernel, Within)
    there = people.present
    x = {name: value[there] for name, value in people.inputs.items()}
    person = torch.arange(5)[:, None].expand(5, 3)[there]
    same = (person[:, None] == person).double()
    matern = kernel.kernel(x["time"]).to_dense()
    parts = [x["genetics"] @ x["genetics"].mT / 4, x["clinical"] @ x["clinical"].mT / 2, same]
    parts += [matern * same, x["slope"] @ x["slope"].mT * same, torch.eye(10)]
    torch.testing.assert_close(prior.shares.sum(-1), torch.ones(2))
    for code in range(2):
        expected = sum(
            (share * part for share, part in zip(prior.shares[code], parts, strict=True)), torch.zeros(10, 10)
        )
        torch.testing.assert_close(dense(found, there, code)[2], expected)
    torch.testing.assert_close(found.mean[there], prior.mean["clinical"](x["clinical"]))
    assert (found.mean[~there] == 0).all()


def test_missing_columns_are_a_normal_of_the_person_s_own() -> None:
    x = torch.randn(200_000, 2, 3)
    x[:, :, 1] = x[:, :1, 1]  # constant within a person, and not known
    complete = (x[:, 0] * x[:, 1]).mean(-1).mean()
    features, own, _ = Linear()(torch.tensor([[[0.0, math.nan, 0.0], [0.0, math.nan, 0.0]]]))
    assert (features == 0).all()
    torch.testing.assert_close(own, torch.full((1, 2, 2), 1 / 3))
    assert abs(complete - own[0, 0, 1]) < 0.01


def test_kernels_with_features_enter_by_them() -> None:
    kernel = ScaleKernel(ColumnLinear(active_dims=[0])) * SameLevel(torch.tensor([0.5, 0.5]), active_dims=[1])
    x = torch.stack([torch.randn(4, 3), torch.randint(2, (4, 3)).double()], -1)
    features, own, _ = Features(kernel)(x)
    flat = features.flatten(0, 1)
    torch.testing.assert_close(flat @ flat.mT, kernel(x.flatten(0, 1)).to_dense())
    assert (own == 0).all()


def test_inducing_points_at_the_data_are_the_kernel_and_others_keep_variances() -> None:
    x = torch.randn(4, 3, 2)
    kernel = RBFKernel()
    full = kernel(x.flatten(0, 1)).to_dense()
    features, own, _ = Inducing(kernel, x.flatten(0, 1))(x)
    flat = features.flatten(0, 1)
    torch.testing.assert_close(flat @ flat.mT, full, rtol=0, atol=1e-7)
    torch.testing.assert_close(own, torch.zeros(4, 3, 3), rtol=0, atol=1e-7)
    features, own, _ = Inducing(kernel, torch.randn(5, 2))(x)
    flat = features.flatten(0, 1)
    found = flat @ flat.mT + torch.block_diag(*own)
    same = torch.block_diag(*torch.ones(4, 3, 3)) == 1
    torch.testing.assert_close(found[same], full[same])
    assert (found - full).abs().max() > 1e-3
    assert torch.linalg.eigvalsh(own).min() > -1e-12


def test_inducing_points_bound_the_divergence_of_the_full_kernel() -> None:
    subjects = torch.arange(8).repeat_interleave(3)
    x = torch.randn(24, 1)
    people = Cohort.of(subjects, {"x": x})
    mean, sd = encoded(people, 1)

    def divergences(points: Tensor) -> tuple[Tensor, Tensor]:
        prior = CodePrior(1, {"x": Inducing(RBFKernel(), points, bound=True), "level": Intercept()})(people)
        q = GlobalWeights(1, len(points), rate=1.0)
        weights = WeightsCovariance.of(prior)
        q.follow(prior, weights, mean)
        return exact_divergence(prior, mean, sd), q.divergence(prior, weights, mean, sd)

    same = (subjects[:, None] == subjects).double()
    covariance = (RBFKernel()(x).to_dense() + same + torch.eye(24)) / 3
    q = MultivariateNormal(mean.flatten(), torch.diag(sd.flatten() ** 2))
    full = kl_divergence(q, MultivariateNormal(torch.zeros(24), covariance))
    for divergence in divergences(x):
        torch.testing.assert_close(divergence[0], full, rtol=1e-6, atol=0)
    prior = CodePrior(1, {"x": Inducing(RBFKernel(), torch.zeros(1, 1), bound=True)})(people)
    found = forecast_codes(prior, torch.zeros_like(people.present), mean, sd)
    torch.testing.assert_close(found.sd, torch.ones_like(sd))  # what points leave is not forgotten
    before = full + 1e-4
    for count in (9, 5, 3):
        exact, minibatch = divergences(torch.linspace(-1.5, 1.5, count)[:, None])
        torch.testing.assert_close(exact, minibatch)
        assert exact > before  # fewer of the same range bound less well
        before = exact[0]


# Pyro's model and guide.


def test_log_density_is_the_equation_s() -> None:
    people = cohort()
    model, _ = autoencoder()
    trace = poutine.trace(model).get_trace(people)
    trace.compute_log_prob()
    there, prior = people.present, model.prior(people)
    weights, codes = trace.nodes["weights"]["value"], trace.nodes["codes"]["value"]
    expected = Normal(0.0, 1.0).log_prob(weights).sum()
    for code in range(2):
        root, blocks, _ = dense(prior, there, code)
        z = MultivariateNormal(prior.mean[there][:, code] + root @ weights[code], blocks)
        expected = expected + z.log_prob(codes[there][:, code])
    decoded = model.decoder(codes[there])
    expected = expected + Normal(decoded, 0.3).log_prob(trace.nodes["images"]["value"][there]).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    assert (codes[~there] == 0).all()
    assert trace.nodes["images"]["value"][~there].isnan().all()


def test_visits_of_a_person_are_drawn_together() -> None:
    people, prior = cohort(), code_prior()
    covariance = prior(people)
    q = VisitNormal(covariance.mean, covariance.blocks, people.present)
    draws = q.sample(torch.Size([100_000]))
    for person, there in enumerate(people.present):
        for code in range(2):
            rows = draws[:, person, there, code]
            expected = covariance.blocks[code, person][there][:, there]
            torch.testing.assert_close(
                torch.cov(rows.mT).reshape(expected.shape), expected, rtol=0, atol=0.02
            )


def test_minibatches_of_people_stand_for_all() -> None:
    people, model = cohort(), autoencoder()[0]
    full = poutine.trace(model).get_trace(people)
    data = {name: full.nodes[name]["value"] for name in ("weights", "codes", "images")}
    full.compute_log_prob()
    total = torch.zeros(())
    for index in torch.arange(5).split(1):
        state = {"weights": data["weights"], "codes": data["codes"][index]}
        part = poutine.trace(poutine.condition(model, data=state)).get_trace(people, data["images"], index)
        part.compute_log_prob()
        total = total + part.nodes["codes"]["log_prob_sum"] + part.nodes["images"]["log_prob_sum"]
    expected = full.nodes["codes"]["log_prob_sum"] + full.nodes["images"]["log_prob_sum"]
    torch.testing.assert_close(total / 5, expected)


def test_weights_given_codes_are_the_exact_conditional() -> None:
    people = cohort()
    prior, (codes, _) = code_prior()(people), encoded(people)
    u = torch.randn(2, 6)
    joint = (
        Normal(0.0, 1.0).log_prob(u).sum()
        + VisitNormal(prior.given(u), prior.blocks, people.present).log_prob(codes).sum()
    )
    marginal = torch.zeros(())
    for code in range(2):
        p = MultivariateNormal(prior.mean[people.present][:, code], dense(prior, people.present, code)[2])
        marginal = marginal + p.log_prob(codes[people.present][:, code])
    torch.testing.assert_close(joint - weights_given_codes(prior, codes).log_prob(u), marginal)


def test_guide_s_weights_leave_the_marginal_density_of_the_codes() -> None:
    """log p(x, z, u) − log q(z, u | x) of the traces is log p(x | z) + log p(z) − log q(z | x), whatever u."""
    people = cohort()
    model, guide = autoencoder()
    data = images(people)
    guided = poutine.trace(guide).get_trace(people, data)
    state = {name: guided.nodes[name]["value"] for name in ("codes", "weights")}
    total = (
        poutine.trace(poutine.condition(model, data=state)).get_trace(people, data).log_prob_sum()
        - guided.log_prob_sum()
    )
    codes, there, prior = state["codes"], people.present, model.prior(people)
    mean, sd = guide.encode(people, data)
    expected = model.image(codes, people).log_prob(data).sum() - Normal(mean, sd).log_prob(codes)[there].sum()
    for code in range(2):
        p = MultivariateNormal(prior.mean[there][:, code], dense(prior, there, code)[2])
        expected = expected + p.log_prob(codes[there][:, code])
    torch.testing.assert_close(total, expected)


# Divergences.


def test_exact_divergence_is_the_dense_one() -> None:
    people = cohort()
    prior, (mean, sd) = code_prior()(people), encoded(people)
    torch.testing.assert_close(
        exact_divergence(prior, mean, sd), dense_divergence(prior, people.present, mean, sd)
    )


def test_bound_is_the_divergence_at_the_best_weights_and_above_it_elsewhere() -> None:
    people, module = cohort(), code_prior()
    prior, (mean, sd) = module(people), encoded(people)
    exact, weights = exact_divergence(prior, mean, sd), WeightsCovariance.of(prior)
    q = GlobalWeights(2, 6, rate=1.0)
    for _ in range(3):
        q.centre.normal_()
        assert (q.divergence(prior, weights, mean, sd) > exact + 1e-3).all()
    # One natural step with everyone is the optimum, from anywhere.
    q.follow(prior, weights, mean)
    torch.testing.assert_close(q.divergence(prior, weights, mean, sd), exact)
    before = q.centre.clone()
    q.follow(prior, weights, mean)
    torch.testing.assert_close(q.centre, before)


def test_bound_has_the_divergence_s_gradient_at_the_best_weights() -> None:
    people, module = cohort(), code_prior()
    mean, sd = (x.requires_grad_() for x in encoded(people))
    prior = module(people)
    weights = WeightsCovariance.of(prior)
    q = GlobalWeights(2, 6, rate=1.0)
    q.follow(prior, weights, mean)
    wanted = [mean, sd, *module.parameters()]
    found = torch.autograd.grad(q.divergence(prior, weights, mean, sd).sum(), wanted, retain_graph=True)
    expected = torch.autograd.grad(exact_divergence(prior, mean, sd).sum(), wanted)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_minibatches_average_to_the_full_bound_where_a_regression_in_each_does_not() -> None:
    people = cohort()
    model, guide = autoencoder()
    data, noise = images(people), torch.randn(5, 3, 2)
    q = GlobalWeights(2, 6)
    q.centre.normal_()
    q.eval()
    everyone = torch.arange(5)
    full = q.loss(model, guide, people, data, everyone, noise)
    parts = [q.loss(model, guide, people, data, index, noise[index]) for index in everyone.split(1)]
    torch.testing.assert_close(torch.stack(parts).mean(), full)
    for a, b in zip(gradients(torch.stack(parts).mean(), model), gradients(full, model), strict=True):
        torch.testing.assert_close(a, b)
    full = svgpvae_loss(model, guide, people, data, everyone, noise)
    parts = [svgpvae_loss(model, guide, people, data, index, noise[index]) for index in everyone.split(1)]
    assert (torch.stack(parts).mean() - full).abs() > 0.1


def test_two_passes_give_the_gradient_of_one() -> None:
    people = cohort()
    model, guide = autoencoder()
    data, noise = images(people), torch.randn(5, 3, 2)
    one = exact_loss(model, guide, people, data, noise)
    expected = gradients(one, model, guide)
    for batch in (1, 2, 5):
        two = accumulated_loss(model, guide, people, data, batch, noise)
        torch.testing.assert_close(two, one)
        for a, b in zip(gradients(2 * two, model, guide), expected, strict=True):
            torch.testing.assert_close(a, 2 * b, rtol=1e-10, atol=1e-10)


def test_global_weights_follow_in_training_only() -> None:
    people = cohort()
    model, guide = autoencoder()
    q, data = GlobalWeights(2, 6, rate=0.5), images(people)
    q.eval()
    q.loss(model, guide, people, data, torch.arange(3))
    assert (q.centre == 0).all()
    q.train()
    q.loss(model, guide, people, data, torch.arange(5))
    prior = model.prior(people)
    mean, _ = guide.encode(people, data)
    best = weights_given_codes(prior, mean).mean
    torch.testing.assert_close(q.centre, 0.5 * best.detach())


# Closed forms.


def test_elbo_reaches_the_marginal_likelihood_less_what_a_diagonal_posterior_costs() -> None:
    """Probabilistic principal components with a Gaussian process as prior, one code."""
    people, module = cohort(), code_prior(1)
    prior, there = module(people), people.present
    loading, sd = torch.randn(PIXELS), 1.5
    x = torch.randn(10, PIXELS)
    covariance = dense(prior, there, 0)[2]
    mean = prior.mean[there][:, 0]
    marginal = MultivariateNormal(
        torch.kron(mean, loading),
        torch.kron(covariance, torch.outer(loading, loading)) + sd**2 * torch.eye(10 * PIXELS),
    ).log_prob(x.flatten())
    precision = torch.linalg.inv(covariance) + loading @ loading / sd**2 * torch.eye(10)
    best = torch.linalg.solve(precision, torch.linalg.solve(covariance, mean) + x @ loading / sd**2)

    def elbo(m: Tensor, variance: Tensor) -> Tensor:
        expected = (
            Normal(torch.outer(m, loading), sd).log_prob(x).sum()
            - 0.5 * loading @ loading / sd**2 * variance.sum()
        )
        q = (
            people.padded(m[:, None]),
            people.padded(variance.sqrt()[:, None]).masked_fill(~there[..., None], 1.0),
        )
        return expected - exact_divergence(prior, *q).sum()

    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    assert gap > 0.01
    torch.testing.assert_close(elbo(best, 1 / precision.diagonal()) + gap, marginal)
    for _ in range(5):
        other = elbo(best + 0.1 * torch.randn(10), (1 / precision.diagonal()) * torch.rand(10).exp())
        assert other < marginal - gap


def test_without_components_it_is_the_variational_autoencoder() -> None:
    people = cohort()
    model, guide = autoencoder(CodePrior(2))
    data, noise = images(people), torch.randn(5, 3, 2)
    assert "weights" not in poutine.trace(model).get_trace(people)
    mean, sd = guide.encode(people, data)
    expected = kl_divergence(Normal(mean, sd), Normal(torch.zeros_like(mean), 1.0)).sum()
    found = exact_loss(model, guide, people, data, noise) - reconstruction(
        model, people, data, mean, sd, noise
    )
    torch.testing.assert_close(found, expected)


def test_fixed_effects_and_a_level_of_each_person_are_the_mixed_model() -> None:
    people = cohort()
    prior = CodePrior(2, {"level": Intercept()}, mean={"clinical": nn.Linear(2, 2)})
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([[0.3, 0.7], [0.9, 0.1]]).log())
    there, found = people.present, prior(people)
    expected = 0.9 * torch.block_diag(*[torch.ones(int(n), int(n)) for n in there.sum(-1)]) + 0.1 * torch.eye(
        10
    )
    torch.testing.assert_close(dense(found, there, 1)[2], expected)
    torch.testing.assert_close(found.mean[there], prior.mean["clinical"](people.inputs["clinical"][there]))


def test_covariates_that_networks_read_are_the_conditional_autoencoder() -> None:
    people = cohort()
    model, guide = autoencoder(CodePrior(2), ("clinical", "time"), 3)
    codes, _ = guide.encode(people, images(people))
    other = Cohort(people.present, dict(people.inputs) | {"time": people.inputs["time"] + 1})
    changed = model.image(codes, other).values.mean - model.image(codes, people).values.mean
    assert (changed[people.present].abs().sum(-1) > 0).all()
    again, _ = guide.encode(other, torch.zeros(5, 3, PIXELS))
    first, _ = guide.encode(people, torch.zeros(5, 3, PIXELS))
    assert (again[people.present] != first[people.present]).any(-1).all()


def test_published_objectives() -> None:
    people = cohort()
    model, guide = autoencoder()
    data, prior, there = images(people), model.prior(people), people.present
    noise = torch.randn(5, 3, 2)
    mean, sd = guide.encode(people, data)
    codes = (mean + sd * noise)[there]
    density = torch.zeros(())
    for code in range(2):
        p = MultivariateNormal(prior.mean[there][:, code], dense(prior, there, code)[2])
        density = density + p.log_prob(codes[:, code])
    expected = (
        reconstruction(model, people, data, mean, sd, noise)
        - density
        - Normal(mean, sd).entropy()[there].sum()
    )
    torch.testing.assert_close(gppvae_loss(model, guide, people, data, noise), expected)

    centres, spreads, divergence = [], [], torch.zeros(())
    for code in range(2):
        root, blocks, _ = dense(prior, there, code)
        precision = torch.eye(6) + root.mT @ (root / sd[there][:, code, None] ** 2)
        covariance = torch.linalg.inv(precision)
        centre = covariance @ root.mT @ ((mean - prior.mean)[there][:, code] / sd[there][:, code] ** 2)
        divergence = divergence + kl_divergence(
            MultivariateNormal(centre, covariance), MultivariateNormal(torch.zeros(6), torch.eye(6))
        )
        centres.append(prior.mean[there][:, code] + root @ centre)
        spreads.append((blocks.diagonal() + (root @ covariance @ root.mT).diagonal()).sqrt())
    q = people.padded(torch.stack(centres, -1)), people.padded(torch.stack(spreads, -1))
    everyone = torch.arange(5)
    found = svgpvae_loss(model, guide, people, data, everyone, noise)
    torch.testing.assert_close(found, reconstruction(model, people, data, *q, noise) + divergence)
    told = svgpvae_forecast(prior, there, mean, sd)
    torch.testing.assert_close(told.mean[there], q[0][there])
    torch.testing.assert_close(told.sd[there], q[1][there])
    part = there.clone()
    part[0] = False
    _, fewer = regressed_weights(model.prior(people.people(everyone[1:])), mean[1:], sd[1:])
    apart = svgpvae_forecast(prior, part, mean, sd).mean[0] - prior.mean[0]
    root = prior.features[0] * prior.variances.sqrt()[:, None]
    torch.testing.assert_close(apart, torch.einsum("lth,lh->tl", root, fewer))


# Predictions.


def test_forecast_is_the_dense_conditional() -> None:
    people = cohort()
    prior, (mean, sd) = code_prior()(people), encoded(people)
    there = people.present
    known = there.clone()
    known[3] = False  # nothing known
    known[0, 1:] = False  # a baseline alone
    known[1, 1] = False  # one in between
    found = forecast_codes(
        prior,
        known,
        mean.masked_fill(~known[..., None], math.nan),
        sd.masked_fill(~known[..., None], math.nan),
    )
    rows = known[there]
    for code in range(2):
        covariance = dense(prior, there, code)[2]
        gain = covariance[:, rows] @ torch.linalg.inv(covariance[rows][:, rows])
        expected = prior.mean[there][:, code] + gain @ (mean - prior.mean)[known][:, code]
        spread = covariance - gain @ covariance[rows] + gain @ torch.diag(sd[known][:, code] ** 2) @ gain.mT
        torch.testing.assert_close(found.mean[there][:, code], expected)
        own = torch.block_diag(
            *[block[t][:, t] for block, t in zip(found.covariance[code], there, strict=True)]
        )
        same = torch.block_diag(*[torch.ones(int(n), int(n)) for n in there.sum(-1)]) == 1
        torch.testing.assert_close(own[same], spread[same])
    draws = found.draws(50_000)
    torch.testing.assert_close(draws.mean(0)[there], found.mean[there], rtol=0, atol=0.03)
    torch.testing.assert_close(draws.std(0)[there], found.sd[there], rtol=0, atol=0.03)


def test_intervals_of_codes_hold_as_often_as_they_say() -> None:
    subjects = torch.arange(300).repeat_interleave(4)
    people, module = cohort(subjects), code_prior(3)
    prior = module(people)
    with torch.no_grad():
        truth = VisitNormal(prior.given(torch.randn(3, 6)), prior.blocks, people.present).sample()
        known = people.present.clone()
        known[:, 2:] = False
        known[250:] = False
        found = forecast_codes(prior, known, truth, torch.full_like(truth, 1e-9))
    asked = ~known
    error = (found.mean - truth)[asked]
    held = (error.abs() <= 1.6449 * found.sd[asked]).double().mean()
    assert 0.88 < held < 0.92
    assert error.square().mean() < 0.8 * (truth - prior.mean)[asked].square().mean()
    torch.testing.assert_close(found.mean[known], truth[known])


class Linearly(nn.Module):
    """A network of one layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def smoothed(model: GPPriorVAE, guide: GPPriorGuide, people: Cohort, data: Tensor) -> Any:
    return lambda index: smoothed_loss(model, guide, people, data), {}


def in_minibatches(model: GPPriorVAE, guide: GPPriorGuide, people: Cohort, data: Tensor) -> Any:
    q = GlobalWeights(2, 20, rate=0.2)
    return lambda index: q.loss(model, guide, people, data, index), {"weights": q}


def in_full(model: GPPriorVAE, guide: GPPriorGuide, people: Cohort, data: Tensor) -> Any:
    return lambda index: exact_loss(model, guide, people, data), {}


@pytest.mark.slow
@pytest.mark.parametrize("objective", [in_minibatches, in_full, smoothed])
def test_fit_finds_the_components_and_predicts_the_images_to_come(objective: Any) -> None:
    subjects = torch.arange(150).repeat_interleave(4)
    people = Cohort.of(subjects, {"genetics": torch.randn(150, 20)[subjects]})

    def build() -> GPPriorVAE:
        prior = CodePrior(2, {"genetics": Linear(), "level": Intercept()})
        return GPPriorVAE(prior, Linearly(2, 12), PixelNormal(0.3))

    truth = build()
    with torch.no_grad():
        truth.prior.logits.copy_(torch.tensor([0.65, 0.25, 0.1]).log().expand(2, 3))
        next(truth.decoder.parameters()).normal_()
        data = truth(people)
    seen = people.present.clone()
    seen[:, 3] = False
    seen[130:, 1:] = False
    known = data.masked_fill(~seen[..., None], math.nan)
    model = build()
    guide = GPPriorGuide(model, Linearly(12, 4))
    fitted = people.only(seen)
    loss, further = objective(model, guide, fitted, known)
    settings = TrainingSettings(steps=1000, learning_rate=0.03)
    modules = {"model": model, "guide": guide, **further}
    train(loss, modules, lambda generator: torch.randperm(150, generator=generator)[:50], settings)
    genetics, level, noise = model.prior.shares.mean(0).tolist()
    assert genetics > level > noise
    codes = smoothed_forecast if objective is smoothed else forecast_codes
    draws = forecast(model, guide, people, known, draws=200, codes=codes)
    asked = ~seen
    error = (draws.mean(0) - data)[asked]
    lower, upper = draws[:, asked].quantile(torch.tensor([0.05, 0.95]), 0)
    held = ((data[asked] >= lower) & (data[asked] <= upper)).double().mean()
    assert 0.86 < held < 0.94
    assert error.square().mean() < 0.45 * (data[asked] - data[seen].mean(0)).square().mean()


def blob(radius_mm: Tensor, grid: Grid) -> Tensor:
    """Balls, ``(N, 1, *shape)``, their edge half a millimetre wide."""
    distance = grid.coordinates(torch.float64).square().sum(-1).sqrt()
    return torch.sigmoid((radius_mm[:, None, None] - distance) / 0.5)[:, None]


def shapes(codes: int) -> DeformationDecoder:
    grid = Grid.from_spacing((16, 16), 1.0)
    lattice = SmoothVelocity(Grid.from_spacing((6, 6), 3.2), sd_mm=1.0, length_mm=6.0)
    return DeformationDecoder(blob(torch.tensor([4.0]), grid)[0], grid, lattice, Linearly(codes, 2 * 36))


def test_decoder_of_shapes_deforms_template_and_labels_alike() -> None:
    decoder = shapes(2)
    codes = torch.randn(3, 2)
    image = decoder(codes)
    for n, code in enumerate(codes):
        white = decoder.network(code).reshape(2, 6, 6)
        velocity = Velocity(decoder.deformation.grid, decoder.deformation.prior().unwhiten(white))
        expected = warp(decoder.template, decoder.grid, velocity, decoder.grid, fill="edge")
        # Not to the last digit: the whole batch has the squarings of its largest velocity.
        torch.testing.assert_close(image[n], expected, rtol=0, atol=0.01)
    torch.testing.assert_close(decoder.carried(2 * decoder.template, codes), 2 * image)
    (image.square().sum()).backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())
    with pytest.raises(ValueError, match="expected a template"):
        DeformationDecoder(torch.zeros(1, 4, 4), decoder.grid, decoder.deformation, decoder.network)


@pytest.mark.slow
def test_growing_bodies_are_forecast_with_intervals() -> None:
    """Radii grow at a rate that a covariate explains in part; the last image of some is to be predicted."""
    number, times = 60, torch.tensor([0.0, 1.0, 2.0])
    covariate = torch.randn(number, 1)
    rate = 0.6 + 0.25 * covariate + 0.1 * torch.randn(number, 1)
    radius = 3.5 + 0.3 * torch.randn(number, 1) + rate * times
    waited = times.expand(number, -1)[..., None]
    inputs = {"growth": waited * torch.stack([torch.ones(number, 1), covariate], -1), "slope": waited}
    people = Cohort(torch.ones(number, 3, dtype=torch.bool), inputs)
    decoder = shapes(2)
    truth = blob(radius.flatten(), decoder.grid).unflatten(0, (number, 3))
    data = truth + 0.1 * torch.randn_like(truth)
    seen = people.present.clone()
    seen[:30, 2] = False
    known = data.masked_fill(~seen[..., None, None, None], math.nan)
    model = GPPriorVAE(
        CodePrior(2, {"growth": Linear(), "level": Intercept(), "slope": Slope()}), decoder, PixelNormal(0.2)
    )
    guide = GPPriorGuide(model, nn.Sequential(nn.Flatten(), nn.Linear(256, 20), nn.Tanh(), nn.Linear(20, 4)))
    fitted = people.only(seen)
    settings = TrainingSettings(steps=500, learning_rate=0.01)
    train(
        lambda _: exact_loss(model, guide, fitted, known),
        {"model": model, "guide": guide},
        lambda _: None,
        settings,
    )
    with torch.no_grad():
        told = forecast_codes(model.prior(people), seen, *guide.encode(fitted, known))
        draws = told.draws(200)[:, :30, 2].flatten(0, 1)
        labels = (decoder.template > 0.5).double()
        areas = decoder.carried(labels, draws).sum((1, 2, 3)).unflatten(0, (200, 30))
    expected = truth[:30, 2].sum((1, 2, 3))
    before = truth[:30, 1].sum((1, 2, 3))
    mean_growth = (truth[30:, 2] - truth[30:, 1]).sum((1, 2, 3)).mean()
    lower, upper = areas.quantile(torch.tensor([0.05, 0.95]), 0)
    held = ((expected >= lower) & (expected <= upper)).double().mean()
    assert held > 0.75
    assert (areas.mean(0) - expected).square().mean() < 0.25 * (
        before + mean_growth - expected
    ).square().mean()
    draws = forecast(model, guide, people, known, draws=50)[:, :30, 2]
    assert (draws.mean(0) - truth[:30, 2]).square().mean() < 0.3 * (
        truth[:30, 1] - truth[:30, 2]
    ).square().mean()


# What is refused.


def test_bad_input_is_refused() -> None:
    people = cohort()
    model, guide = autoencoder()
    with pytest.raises(ValueError, match="subject of each of 3 rows"):
        pad_visits(SUBJECTS, torch.zeros(3))
    with pytest.raises(ValueError, match=r"visits \(P, T\) of bool"):
        Cohort(people.present, {"x": torch.zeros(2, 3, 1)})
    with pytest.raises(ValueError, match="expected an input 'genetics'"):
        model.prior(Cohort(people.present, {}))
    with pytest.raises(ValueError, match="inputs 'time' whose covariance is finite"):
        model.prior(Cohort(people.present, dict(people.inputs) | {"time": torch.full((5, 3, 1), math.nan)}))
    with pytest.raises(ValueError, match="at least one code"):
        CodePrior(0)
    with pytest.raises(ValueError, match="distinct points"):
        Inducing(RBFKernel(), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="positive standard deviation"):
        PixelNormal(0.0)
    with pytest.raises(ValueError, match="expected images"):
        guide.encode(people, torch.zeros(4, 3, PIXELS))
    with pytest.raises(ValueError, match="4 numbers for 2 codes"):
        GPPriorGuide(model, Linearly(PIXELS, 3)).encode(people, images(people))
    with pytest.raises(ValueError, match="at least one person"):
        accumulated_loss(model, guide, people, images(people), 0)
    with pytest.raises(ValueError, match="positive standard deviation"):
        GPPriorGuide(model, guide.encoder, sd=0.0)
    with pytest.raises(ValueError, match="batch of"):
        VisitNormal(torch.zeros(2, 1, 1), torch.ones(1, 2, 1, 1), torch.ones(2, 1, dtype=torch.bool)).expand(
            [3]
        )
    with pytest.raises(ValueError, match="rate in"):
        GlobalWeights(2, 6, rate=0.0)


def test_zeros_and_ones() -> None:
    people = cohort()
    model = GPPriorVAE(code_prior(), Decoder(), PixelBernoulli())
    trace = poutine.trace(model).get_trace(people)
    drawn = trace.nodes["images"]["value"]
    assert set(drawn[people.present].unique().tolist()) == {0.0, 1.0}
    logits = model.decoder(trace.nodes["codes"]["value"][people.present])
    trace.compute_log_prob()
    expected = -nn.functional.binary_cross_entropy_with_logits(logits, drawn[people.present], reduction="sum")
    torch.testing.assert_close(trace.nodes["images"]["log_prob_sum"], expected)


def test_smoothed_posterior_is_the_prior_given_pseudo_data() -> None:
    people = cohort()
    prior, there = code_prior()(people), people.present
    mean, sd = encoded(people)
    smooth, spread, divergence = smoothed_codes(prior, there, mean, sd)
    told = smoothed_forecast(prior, there, mean, sd)
    for code in range(2):
        covariance, centre = dense(prior, there, code)[2], prior.mean[there][:, code]
        gain = covariance @ torch.linalg.inv(covariance + torch.diag(sd[there][:, code] ** 2))
        q = MultivariateNormal(
            centre + gain @ (mean[there][:, code] - centre), covariance - gain @ covariance
        )
        torch.testing.assert_close(smooth[there][:, code], q.mean)
        torch.testing.assert_close(spread[there][:, code], q.stddev)
        torch.testing.assert_close(divergence[code], kl_divergence(q, MultivariateNormal(centre, covariance)))
    torch.testing.assert_close(told.mean[there], smooth[there])
    torch.testing.assert_close(told.sd[there], spread[there])
    known = there.clone()
    known[0, 2] = known[3] = False
    told = smoothed_forecast(prior, known, mean, sd)
    rows = known[there]
    for code in range(2):
        covariance, centre = dense(prior, there, code)[2], prior.mean[there][:, code]
        noisy = covariance[rows][:, rows] + torch.diag(sd[known][:, code] ** 2)
        gain = covariance[:, rows] @ torch.linalg.inv(noisy)
        torch.testing.assert_close(
            told.mean[there][:, code], centre + gain @ (mean[known][:, code] - centre[rows])
        )
        variance = (covariance - gain @ covariance[rows]).diagonal()
        torch.testing.assert_close(told.sd[there][:, code], variance.sqrt())


def test_smoothed_posterior_reaches_the_marginal_likelihood_of_a_linear_model() -> None:
    """With one code and a linear decoder the posterior is the prior given pseudo-data: nothing is lost."""
    people, module = cohort(), code_prior(1)
    prior, there = module(people), people.present
    loading, sd = torch.randn(PIXELS), 1.5
    x = torch.randn(10, PIXELS)
    covariance, centre = dense(prior, there, 0)[2], prior.mean[there][:, 0]
    scale = loading @ loading
    outer = torch.kron(covariance, torch.outer(loading, loading)) + sd**2 * torch.eye(10 * PIXELS)
    marginal = MultivariateNormal(torch.kron(centre, loading), outer).log_prob(x.flatten())

    def elbo(pseudo: Tensor, spread: Tensor) -> Tensor:
        told = (
            people.padded(pseudo[:, None]),
            people.padded(spread[:, None]).masked_fill(~there[..., None], 1.0),
        )
        mean, deviation, divergence = smoothed_codes(prior, there, *told)
        fit = Normal(torch.outer(mean[there][:, 0], loading), sd).log_prob(x).sum()
        return fit - 0.5 * scale / sd**2 * deviation[there].square().sum() - divergence.sum()

    best = x @ loading / scale, (sd / scale.sqrt()).expand(10)
    torch.testing.assert_close(elbo(*best), marginal)
    for _ in range(5):
        assert elbo(best[0] + 0.2 * torch.randn(10), best[1] * torch.randn(10).exp()) < marginal - 1e-3
