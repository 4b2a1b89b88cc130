"""Variance components of change: against dense algebra, published values and another package, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import followed_people
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value
from scipy.optimize import minimize_scalar
from scipy.stats import chi2
from test_slopes import dense_covariance
from torch import Tensor
from torch.distributions import HalfCauchy, HalfNormal, MultivariateNormal

from probmed.inference import svi
from probmed.inference.mcmc import nuts
from probmed.inference.parameters import seeded
from probmed.inference.reml import (
    ChangeData,
    ChangeFit,
    at_components,
    average_information,
    compare_component,
    fit_components,
    log_likelihood,
)
from probmed.models.longitudinal import Longitudinal
from probmed.models.longitudinal_field import LongitudinalField
from probmed.slopes import DenseKernels, FeatureKernels, FollowUps, SubjectChange

pytestmark = pytest.mark.usefixtures("float64")

MODES = ["same", "none", "free"]


def variances_of(mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """Components, and the noises that they stand for."""
    free = torch.tensor([0.5, 0.3, 0.2] + ([0.1] if mode == "free" else []))
    return free, free[2], {"same": free[2], "none": torch.tensor(0.0), "free": free[-1]}[mode]


def made_data(mode: str, people: int = 30, seed: int = 1) -> ChangeData:
    torch.manual_seed(seed)
    features = [torch.randn(people, 40) / math.sqrt(40), torch.randn(people, 20) / math.sqrt(20)]
    kernels = DenseKernels(torch.stack([f @ f.T for f in features]))
    subject = torch.repeat_interleave(torch.arange(people), torch.randint(0, 4, (people,)))
    visits = FollowUps(0.3 + 3 * torch.rand(len(subject)), subject, people)
    design = torch.stack([torch.ones(people), torch.randn(people)], 1)
    free, noise, first = variances_of(mode)
    change = SubjectChange(design @ torch.tensor([1.0, 0.5]), kernels, free[:2], visits, noise, first).sample()
    return ChangeData(change, visits, design, kernels, mode)


def dense(data: ChangeData, variances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V, the visits' design and P."""
    assert isinstance(data.relationship, DenseKernels)
    noise, first = data.noises(variances)
    covariance = dense_covariance(data.relationship.matrices, data.visits, variances[:2], noise, first)
    design = data.visits.delta[:, None] * data.design[data.visits.subject]
    inverse = torch.linalg.inv(covariance)
    projection = inverse - inverse @ design @ torch.linalg.solve(design.T @ inverse @ design, design.T @ inverse)
    return covariance, design, projection


@pytest.mark.parametrize("mode", MODES)
def test_likelihoods_and_information_are_those_of_dense_algebra(mode: str) -> None:
    data = made_data(mode)
    variances, *_ = variances_of(mode)
    covariance, design, projection = dense(data, variances)
    d, n = data.change, len(data.change)
    gram = design.T @ torch.linalg.solve(covariance, design)
    full = -0.5 * (n * math.log(2 * math.pi) + torch.logdet(covariance) + d @ projection @ d)
    restricted = full + 0.5 * (2 * math.log(2 * math.pi) - torch.logdet(gram))
    torch.testing.assert_close(log_likelihood(data, variances, False), full, rtol=0, atol=1e-8)
    torch.testing.assert_close(log_likelihood(data, variances), restricted, rtol=0, atol=1e-8)
    leaf = variances.clone().requires_grad_()
    derivatives = torch.autograd.functional.jacobian(lambda v: dense(data, v)[0], leaf.detach()).movedim(-1, 0)
    (gradient,) = torch.autograd.grad(log_likelihood(data, leaf), leaf)
    py = projection @ d
    expected = torch.stack([0.5 * (py @ v @ py - (projection * v).sum()) for v in derivatives])
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8)
    each = torch.stack([v @ py for v in derivatives], 1)
    torch.testing.assert_close(average_information(data, variances), 0.5 * each.T @ projection @ each)


@pytest.mark.parametrize("mode", MODES)
def test_fit_is_a_maximum_and_effects_are_the_best_predictors(mode: str) -> None:
    data = made_data(mode)
    fit = fit_components(data)
    assert fit.converged
    leaf = fit.variances.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_likelihood(data, leaf), leaf)
    assert float((gradient * fit.variances).abs().max()) < 1e-4
    assert (gradient[fit.variances == 0] <= 0).all()
    covariance, design, _ = dense(data, fit.variances)
    beta = torch.linalg.solve(
        design.T @ torch.linalg.solve(covariance, design), design.T @ torch.linalg.solve(covariance, data.change)
    )
    torch.testing.assert_close(fit.coefficients, beta, rtol=1e-7, atol=1e-8)
    weighted = torch.linalg.solve(covariance, data.change - design @ beta)
    alpha = data.visits.sums(data.visits.delta * weighted)
    assert isinstance(data.relationship, DenseKernels)
    effects = torch.stack([t * k @ alpha for t, k in zip(fit.variances[:2], data.relationship.matrices, strict=True)], 1)
    torch.testing.assert_close(fit.effects(), effects, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(fit.dual(), alpha[:, None] * fit.variances[:2], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_predictions_are_the_conditional_normal_of_new_visits(mode: str) -> None:
    data = made_data(mode)
    fit = fit_components(data)
    unseen = int((torch.bincount(data.visits.subject, minlength=30) == 0).nonzero()[0])
    new = FollowUps(torch.tensor([1.0, 2.5, 4.0]), torch.tensor([int(data.visits.subject[0]), int(data.visits.subject[-1]), unseen]), 30)
    joint = FollowUps(torch.cat([data.visits.delta, new.delta]), torch.cat([data.visits.subject, new.subject]), 30)
    assert isinstance(data.relationship, DenseKernels)
    everything = dense_covariance(data.relationship.matrices, joint, fit.variances[:2], *data.noises(fit.variances))
    n = len(data.change)
    covariance, cross, own = everything[:n, :n], everything[n:, :n], everything[n:, n:]
    design, there = (v.delta[:, None] * data.design[v.subject] for v in (data.visits, new))
    gain = torch.linalg.solve(covariance, cross.T).T
    lever = there - gain @ design
    gram = design.T @ torch.linalg.solve(covariance, design)
    variance = own - gain @ cross.T + lever @ torch.linalg.solve(gram, lever.T)
    found = fit.predict(new)
    torch.testing.assert_close(found.mean, there @ fit.coefficients + gain @ (data.change - design @ fit.coefficients))
    torch.testing.assert_close(found.sd, variance.diagonal().sqrt())
    half = 1.6448536269514722 * found.sd
    torch.testing.assert_close(found.interval(0.9), torch.stack([found.mean - half, found.mean + half], 1))


def columns_of(mode: str, scales: Tensor, people: int = 30, seed: int = 1) -> ChangeData:
    """As ``made_data``, in columns."""
    data = made_data(mode, people, seed)
    free, noise, first = variances_of(mode)
    slope = data.design @ torch.stack([torch.ones(len(scales)), torch.linspace(-1, 1, len(scales))])
    change = SubjectChange(slope, data.relationship, free[:2], data.visits, noise, first, scales).sample()
    return ChangeData(change, data.visits, data.design, data.relationship, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("restricted", [True, False])
def test_scales_of_columns_are_those_of_the_greatest_likelihood(mode: str, restricted: bool) -> None:
    data = columns_of(mode, torch.tensor([0.1, 1.0, 7.0]))
    variances, *_ = variances_of(mode)
    covariance, design, projection = dense(data, variances)
    n, q = design.shape
    squares = (data.change * (projection @ data.change)).sum(0)
    count = n - q if restricted else n
    scales = squares / count
    extra = 0.5 * (q * math.log(2 * math.pi) - torch.logdet(design.T @ torch.linalg.solve(covariance, design))) if restricted else torch.zeros(())
    each = -0.5 * (n * math.log(2 * math.pi) + torch.logdet(covariance) + count * scales.log() + squares / scales) + extra
    leaf = variances.clone().requires_grad_()
    found = log_likelihood(data, leaf, restricted)
    torch.testing.assert_close(found.detach(), each.sum(), rtol=0, atol=1e-8)
    (gradient,) = torch.autograd.grad(found, leaf)
    # Only ratios of components are determined.
    assert float(gradient @ variances) == pytest.approx(0.0, abs=1e-8)
    by_hand = torch.zeros(())
    for j, scale in enumerate(scales):
        one = ChangeData(data.change[:, j] / scale.sqrt(), data.visits, data.design, data.relationship, mode)
        by_hand = by_hand + log_likelihood(one, leaf, restricted)
    (expected,) = torch.autograd.grad(by_hand, leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_one_column_is_the_scalar(mode: str) -> None:
    data = made_data(mode)
    scalar, column = fit_components(data), fit_components(ChangeData(data.change[:, None], data.visits, data.design, data.relationship, mode))
    assert float(column.scales) == pytest.approx(1.0)
    assert column.log_likelihood == pytest.approx(scalar.log_likelihood, abs=1e-6)
    torch.testing.assert_close(column.variances, scalar.variances, rtol=1e-3, atol=1e-6)
    same = at_components(ChangeData(data.change[:, None], data.visits, data.design, data.relationship, mode), scalar.variances, scales=torch.ones(1))
    new = FollowUps(torch.tensor([1.0, 2.0]), torch.tensor([0, 7]), 30)
    for a, b in (
        (same.coefficients, scalar.coefficients),
        (same.coefficient_errors, scalar.coefficient_errors),
        (same.effects(), scalar.effects()),
        (same.predict(new).mean, scalar.predict(new).mean),
        (same.predict(new).sd, scalar.predict(new).sd),
        (same.rates(new.subject).sd, scalar.rates(new.subject).sd),
    ):
        torch.testing.assert_close(a[..., 0], b)
    assert same.coefficient_intervals().shape == (2, 1, 2)


@pytest.mark.parametrize("mode", MODES)
def test_fit_of_columns_is_a_maximum_and_predicts_as_each_column_alone(mode: str) -> None:
    data = columns_of(mode, torch.tensor([0.1, 1.0, 7.0, 0.5]))
    fit = fit_components(data)
    assert fit.converged
    assert float(fit.scales.mean()) == pytest.approx(1.0)
    leaf = fit.variances.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_likelihood(data, leaf), leaf)
    assert float((gradient * fit.variances).abs().max()) < 1e-3
    new = FollowUps(torch.tensor([1.0, 2.5, 4.0]), torch.tensor([0, 1, 0]), 30)
    found, rates = fit.predict(new), fit.rates(torch.tensor([4, 0]))
    effects = fit.effects()
    for j, scale in enumerate(fit.scales):
        one = ChangeData(data.change[:, j], data.visits, data.design, data.relationship, mode)
        alone = at_components(one, scale * fit.variances)
        torch.testing.assert_close(found.mean[:, j], alone.predict(new).mean)
        torch.testing.assert_close(found.sd[:, j], alone.predict(new).sd)
        torch.testing.assert_close(effects[..., j], alone.effects())
        torch.testing.assert_close(fit.coefficient_errors[:, j], alone.coefficient_errors)
        torch.testing.assert_close(rates.mean[:, j], alone.rates(torch.tensor([4, 0])).mean)
    # A rate seen over so long a time that noise is nothing is the change divided by that time.
    far = FollowUps(torch.tensor([1e6]), torch.tensor([4]), 30)
    torch.testing.assert_close(fit.predict(far).mean[0] / 1e6, rates.mean[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fit.predict(far).sd[0] / 1e6, rates.sd[0], rtol=1e-4, atol=1e-5)


def test_columns_alone_share_their_kernels() -> None:
    data = columns_of("same", torch.tensor([0.1, 1.0, 7.0]))
    assert len(data.seen) < 30
    parts = data.split()
    assert len(parts) == 3 and all(part.among_seen is data.among_seen for part in parts)
    whole = ChangeData(data.change[:, 1:2], data.visits, data.design, data.relationship)
    variances, *_ = variances_of("same")
    assert float(log_likelihood(parts[1], variances)) == float(log_likelihood(whole, variances))


def test_model_of_a_field_has_the_density_that_is_maximised() -> None:
    data = columns_of("same", torch.tensor([0.1, 1.0, 7.0]))
    fit = fit_components(data, restricted=False)
    given = {
        "coefficients": fit.coefficients,
        "scales": fit.scales.sqrt(),
        "components": fit.variances[:2].sqrt(),
        "noise": fit.variances[2].sqrt(),
        "change": data.change,
    }
    model = poutine.condition(LongitudinalField(3), given)
    trace = poutine.trace(model).get_trace(data.design, data.relationship, data.visits)
    trace.compute_log_prob()
    assert float(trace.nodes["change"]["log_prob_sum"]) == pytest.approx(fit.log_likelihood, abs=1e-7)
    with pytest.raises(ValueError, match="positive number of columns"):
        LongitudinalField(0)


@pytest.mark.slow
def test_shared_shares_and_scales_of_columns_are_recovered_and_rates_are_covered() -> None:
    """Sixty cohorts of 40 people and twelve columns: shares are told far better than by a column alone, and intervals of rates cover."""
    truth = torch.logspace(-2, 1, 12)
    shares, scales, z = [], [], []
    for seed in range(60):
        data = made_data("same", 40, seed)
        torch.manual_seed(seed)
        assert isinstance(data.relationship, DenseKernels)
        tau = torch.tensor([0.5, 0.3])
        values, vectors = torch.linalg.eigh(torch.tensordot(tau, data.relationship.matrices, 1))
        rates = vectors @ (values.clamp_min(0).sqrt()[:, None] * torch.randn(40, 12)) * truth.sqrt()
        first = 0.45 * torch.randn(40, 12) * truth.sqrt()
        noise = 0.45 * torch.randn(len(data.visits), 12) * truth.sqrt()
        change = data.visits.delta[:, None] * rates[data.visits.subject] + noise - first[data.visits.subject]
        fit = fit_components(ChangeData(change, data.visits, data.design, data.relationship, "same"))
        shares.append(fit.share([0])[0])
        scales.append(fit.scales * fit.variances[2] / 0.45**2 / truth)
        posterior = fit.rates(torch.arange(40))
        z.append((posterior.mean - rates) / posterior.sd)
    kernels = made_data("same", 40, 0).relationship
    expected = 0.5 * kernels.diagonal(0).mean() / (0.5 * kernels.diagonal(0).mean() + 0.3 * kernels.diagonal(1).mean())
    estimates = torch.tensor(shares)
    assert abs(float(estimates.mean() - expected)) < 4 * float(estimates.std()) / math.sqrt(60) + 0.02
    assert float(estimates.std()) < 0.2
    ratio = torch.stack(scales)
    assert float((ratio.mean(0) - 1).abs().max()) < 4 * float(ratio.std(0).max()) / math.sqrt(60) + 0.02
    inside = (torch.cat(z).abs() < 1.6448536269514722).double()
    # Columns and people of one cohort are not independent: the standard error is that of cohorts.
    by_cohort = inside.reshape(60, -1).mean(1)
    assert float(inside.mean()) == pytest.approx(0.9, abs=0.01 + 4 * float(by_cohort.std()) / math.sqrt(60))


def once(trait: Tensor, design: Tensor, relationship: DenseKernels | FeatureKernels) -> ChangeData:
    """A trait that was measured once, the ordinary mixed model."""
    people = len(trait)
    return ChangeData(trait, FollowUps(torch.ones(people), torch.arange(people), people), design, relationship, "none")


def test_published_values_of_glimix_core_are_reproduced() -> None:
    features = torch.tensor([[1, 2], [3, -1], [1.1, 0.5], [0.5, -0.4]])
    trait = torch.tensor([-1, 2, 0.3, 0.5])
    for relationship in (DenseKernels((features @ features.T)[None]), FeatureKernels((features,))):
        fit = fit_components(once(trait, torch.ones(4, 1), relationship), restricted=False)
        assert fit.log_likelihood == pytest.approx(-2.2726234086180557, abs=1e-8)
        assert fit.variances.tolist() == pytest.approx([0.33736446158226896, 0.012503600451739165], rel=1e-4)
        assert fit.coefficients.tolist() == pytest.approx([0.0664650291693258], rel=1e-4)


def rational_cohort() -> tuple[Tensor, Tensor, Tensor]:
    """A trait, covariates and features of 40 people by a formula, for values that another package gave."""
    i = torch.arange(40.0)[:, None]
    features = torch.cos((i + 1) * torch.arange(1.0, 13.0) * 0.7)
    design = torch.cat([torch.ones(40, 1), torch.sin(0.9 * (i + 1)), torch.cos(1.3 * (i + 1)) ** 2], 1)
    trait = design @ torch.tensor([1.0, -0.5, 0.3]) + 0.4 * features @ torch.sin(torch.arange(12) + 1.0) + 0.5 * torch.sin(7.1 * i[:, 0] ** 1.5)
    return trait, design, features / math.sqrt(12)


GLIMIX: dict[bool, dict[tuple[float, float], float]] = {
    False: {(0.5, 0.2): -30.073727885669136, (1.2, 0.1): -27.917813396657838},
    True: {(0.5, 0.2): -28.670335667778865, (1.2, 0.1): -26.87280684335458},
}
"""Of glimix-core 3.1.14: whether restricted, (v0, v1) → log likelihood with the best coefficients."""
GLIMIX_BEST = {
    False: (-27.46606126235362, (1.2163994974769494, 0.12621234416069935), (1.1221750799173889, -0.5535868153326521, 0.47152012535866517)),
    True: (-26.103716319519762, (1.3708522613600063, 0.13505638742764808), (1.1238266416058342, -0.554157708795665, 0.4720055517656807)),
}


@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("low_rank", [False, True])
def test_likelihoods_and_optima_are_those_of_glimix_core(restricted: bool, low_rank: bool) -> None:
    trait, design, features = rational_cohort()
    data = once(trait, design, FeatureKernels((features,)) if low_rank else DenseKernels((features @ features.T)[None]))
    # Its restricted likelihood is that of a basis of the contrasts, ours of the data with a flat prior of the coefficients.
    more = 0.5 * float(torch.linalg.slogdet(design.T @ design)[1]) if restricted else 0.0
    for variances, theirs in GLIMIX[restricted].items():
        assert float(log_likelihood(data, torch.tensor(variances), restricted)) + more == pytest.approx(theirs, abs=1e-8)
    value, variances, coefficients = GLIMIX_BEST[restricted]
    fit = fit_components(data, restricted)
    assert fit.converged and fit.log_likelihood + more == pytest.approx(value, abs=1e-8)
    assert fit.variances.tolist() == pytest.approx(variances, rel=1e-5)
    assert fit.coefficients.tolist() == pytest.approx(coefficients, rel=1e-5)


@pytest.mark.parametrize("restricted", [False, True])
def test_likelihoods_and_optima_are_those_of_statsmodels(restricted: bool) -> None:
    mixed = pytest.importorskip("statsmodels.regression.mixed_linear_model")
    torch.manual_seed(3)
    groups = torch.repeat_interleave(torch.arange(12), torch.randint(2, 6, (12,)))
    design = torch.stack([torch.ones(len(groups)), torch.randn(len(groups))], 1)
    trait = design @ torch.tensor([1.0, 2.0]) + 0.8 * torch.randn(12)[groups] + 0.5 * torch.randn(len(groups))
    model = mixed.MixedLM(trait.numpy(), design.numpy(), groups.numpy())
    theirs = model.fit(reml=restricted)
    indicators = torch.nn.functional.one_hot(groups).to(design)
    data = once(trait, design, FeatureKernels((indicators,)))
    at = torch.tensor([float(np.asarray(theirs.cov_re)[0, 0]), float(theirs.scale)])
    assert float(log_likelihood(data, at, restricted)) == pytest.approx(theirs.llf, abs=1e-8)
    fit = fit_components(data, restricted)
    assert fit.log_likelihood >= theirs.llf - 1e-8
    assert fit.variances.tolist() == pytest.approx(at.tolist(), rel=1e-3)
    assert fit.coefficients.tolist() == pytest.approx(list(theirs.fe_params), rel=1e-4)

    # Its own search stops early: of its likelihood, in which only the ratio of the variances is free, the maximum to all digits.
    def fall(ratio: float) -> float:
        parameters = mixed.MixedLMParams.from_components(fe_params=np.asarray(theirs.fe_params), cov_re=np.array([[ratio]]))
        return -float(model.loglike(parameters, profile_fe=True))

    best = minimize_scalar(fall, bounds=(0.1, 20.0), method="bounded", options={"xatol": 1e-9})
    assert fit.log_likelihood == pytest.approx(-best.fun, abs=1e-8)
    assert float(fit.variances[0] / fit.variances[1]) == pytest.approx(best.x, rel=1e-5)


def heritable(people: int, heritability: float, seed: int) -> ChangeData:
    generator = torch.Generator().manual_seed(seed)
    genotypes = torch.bernoulli(torch.full((2, people, 200), 0.3), generator=generator).sum(0)
    standardised = (genotypes - 0.6) / math.sqrt(0.42)
    kernel = standardised @ standardised.T / 200
    value = standardised @ torch.randn(200, generator=generator) / math.sqrt(200)
    trait = math.sqrt(heritability) * value + math.sqrt(1 - heritability) * torch.randn(people, generator=generator)
    return once(trait, torch.ones(people, 1), DenseKernels(kernel[None]))


@pytest.mark.parametrize("seed", [4, 6, 22, 28, 40])
def test_fit_is_the_greatest_of_a_grid_and_does_not_stay_at_a_bound(seed: int) -> None:
    data = heritable(60, 0.9, seed)
    fit = fit_components(data)
    along = [fit_components(data, mixing=torch.tensor([[h], [1 - h]])).log_likelihood for h in torch.linspace(0.001, 0.999, 60).tolist()]
    assert fit.log_likelihood >= max(along) - 1e-6


@pytest.mark.parametrize("people", [8, 14])
def test_components_that_fall_to_their_bounds_do_not_hold_the_others(people: int) -> None:
    """Three kernels and noise of few people: most fits end on a bound, and all of them at a maximum."""
    on_bound = 0
    for seed in range(15):
        data = made_data("same", people, seed)
        assert isinstance(data.relationship, DenseKernels)
        kernels = torch.cat([data.relationship.matrices, torch.eye(people)[None]])
        fit = fit_components(ChangeData(data.change, data.visits, data.design, DenseKernels(kernels)))
        leaf = fit.variances.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(log_likelihood(fit.data, leaf), leaf)
        negligible = fit.variances < 1e-5
        assert fit.converged, seed
        assert float((gradient * fit.variances)[~negligible].abs().max()) < 1e-3
        assert bool((gradient[negligible] < 1e-3).all())
        on_bound += int(negligible.any())
    assert on_bound > 5


@pytest.mark.slow
def test_heritability_is_recovered_and_its_interval_covers() -> None:
    truth, cohorts = 0.5, 200
    fits = [fit_components(heritable(100, truth, seed)) for seed in range(cohorts)]
    estimates = torch.tensor([fit.share([0])[0] for fit in fits])
    assert abs(float(estimates.mean()) - truth) < 4 * float(estimates.std()) / math.sqrt(cohorts)
    stated = torch.tensor([fit.share([0])[1] for fit in fits])
    assert float(stated.median()) == pytest.approx(float(estimates.std()), rel=0.25)
    held = 0
    for fit in fits:
        low, high = fit.share_interval(0)
        held += low <= truth <= high
    # Binomial(200, .95): within four standard deviations.
    assert abs(held - 0.95 * cohorts) < 4 * math.sqrt(cohorts * 0.95 * 0.05)


def statistics_of_many(traits: Tensor, kernel: Tensor, shares: Tensor) -> Tensor:
    """Twice the restricted log likelihood ratio of each column of traits, its maximum over a grid of shares, in the eigenvectors of the kernel."""
    values, vectors = torch.linalg.eigh(kernel)
    y, one = vectors.T @ traits, vectors.sum(0)
    found = []
    for share in shares:
        weights = 1 / (share * values.clamp_min(0) + 1 - share)
        gram = (weights * one**2).sum()
        squares = weights @ y**2 - ((weights * one) @ y) ** 2 / gram
        found.append(-0.5 * ((len(y) - 1) * squares.log() - weights.log().sum() + gram.log()))
    assert shares[0] == 0
    return 2 * (torch.stack(found).amax(0) - found[0])


def test_component_test_has_its_level_over_two_thousand_cohorts() -> None:
    people, cohorts = 200, 2000
    generator = torch.Generator().manual_seed(0)
    genotypes = torch.bernoulli(torch.full((2, people, 400), 0.3), generator=generator).sum(0)
    standardised = (genotypes - 0.6) / math.sqrt(0.42)
    kernel = standardised @ standardised.T / 400
    traits = torch.randn(people, cohorts, generator=generator)
    statistics = statistics_of_many(traits, kernel, torch.cat([torch.zeros(1), torch.linspace(0.002, 0.99, 250)]))
    relationship = DenseKernels(kernel[None])
    tests = []
    for column in range(12):
        tests.append(compare_component(fit_components(once(traits[:, column], torch.ones(people, 1), relationship)), 0))
        # The grid is a little below the maximum.
        assert tests[-1].statistic == pytest.approx(float(statistics[column]), abs=2e-3)
    assert any(test.statistic > 0.1 for test in tests) and any(test.statistic == 0 for test in tests)
    for test in tests:
        assert test.p_value == pytest.approx(1.0 if test.statistic == 0 else 0.5 * float(chi2.sf(test.statistic, 1)))
    p = 0.5 * chi2.sf(statistics.clamp_min(0).numpy(), 1)
    for level in (0.05, 0.01):
        assert abs(int((p < level).sum()) - level * cohorts) < 3 * math.sqrt(cohorts * level * (1 - level))
    # Half of the statistics are zero under the mixture; a χ²₁ alone would reject half as often.
    assert 0.45 < float((statistics <= 0).double().mean()) < 0.56
    assert compare_component(fit_components(heritable(300, 0.7, 1)), 0).p_value < 1e-3


@pytest.mark.slow
def test_predictive_intervals_cover_new_visits_of_known_and_new_people() -> None:
    inside = {True: 0, False: 0}
    total = {True: 0, False: 0}
    for seed in range(60):
        data = made_data("same", 60, seed)
        torch.manual_seed(1000 + seed)
        last = torch.cat([data.visits.subject[1:] != data.visits.subject[:-1], torch.tensor([True])])
        first = ChangeData(data.change[~last], data.visits.only(~last), data.design, data.relationship, "same")
        found = fit_components(first).predict(data.visits.only(last)).interval(0.9)
        held = (found[:, 0] <= data.change[last]) & (data.change[last] <= found[:, 1])
        known = torch.isin(data.visits.subject[last], first.visits.subject)
        for which in (True, False):
            inside[which] += int(held[known == which].sum())
            total[which] += int((known == which).sum())
    for which in (True, False):
        # Plug-in components make intervals a little short; four standard deviations and that.
        assert inside[which] / total[which] == pytest.approx(0.9, abs=0.02 + 4 * math.sqrt(0.09 / total[which]))


def test_components_that_cannot_be_told_apart_have_huge_errors() -> None:
    design, kernels, _ = followed_people()
    visits = FollowUps(torch.full((6,), 2.0), torch.arange(6), 6)
    own = DenseKernels(torch.eye(6)[None])
    fit = fit_components(ChangeData(torch.randn(6), visits, torch.ones(6, 1), own))
    assert fit.data.noise_hides_rates
    assert (fit.standard_errors > 1e3 * fit.variances).all()
    assert not ChangeData(torch.randn(6), FollowUps(torch.arange(1.0, 7.0), torch.arange(6), 6), design, kernels).noise_hides_rates


def small_cohort() -> tuple[Tensor, DenseKernels, FollowUps, Tensor]:
    """Ten people with two follow-ups each, whose one kernel explains rates."""
    torch.manual_seed(0)
    features = torch.randn(10, 3)
    kernels = DenseKernels((features @ features.T / 3)[None])
    visits = FollowUps(0.5 + 3 * torch.rand(20), torch.arange(10).repeat_interleave(2), 10)
    noise = torch.tensor(0.05)
    change = SubjectChange(torch.full((10,), 0.5), kernels, torch.tensor([0.3]), visits, noise, noise).sample()
    return torch.ones(10, 1), kernels, visits, change


def test_sampler_starts_where_a_prior_s_mean_is_infinite() -> None:
    design, kernels, visits, change = small_cohort()
    assert not math.isfinite(float(HalfCauchy(1.0).mean))
    found = nuts(Longitudinal(), design, kernels, visits, change, draws=4, warmup=1, seed=0)
    assert set(found.samples) == {"coefficients", "components", "noise"}
    assert all(bool(draws.isfinite().all()) for draws in found.samples.values())


@pytest.mark.slow
def test_samples_and_variational_posterior_are_those_of_quadrature() -> None:
    """√τ and σ on a grid, the coefficient integrated out: what NUTS and SVI have to find."""
    design, kernels, visits, change = small_cohort()
    components, noise = torch.meshgrid(torch.linspace(-5, 2.5, 60).exp(), torch.linspace(-3.5, 0.5, 50).exp(), indexing="ij")
    flat = torch.stack([components.flatten(), noise.flatten()], 1)
    mean = visits.delta[:, None] * design[visits.subject]
    covariances = torch.stack([dense_covariance(kernels.matrices, visits, row[:1] ** 2, row[1] ** 2, row[1] ** 2) for row in flat])
    marginal = MultivariateNormal(torch.zeros(20), covariances + 100 * mean @ mean.T).log_prob(change)
    # Equal steps of the logarithms.
    weights = torch.softmax(marginal + HalfCauchy(1.0).log_prob(flat[:, 0]) + HalfNormal(1.0).log_prob(flat[:, 1]) + flat.log().sum(1), 0)
    expected = weights @ flat
    spread = (weights @ flat**2 - expected**2).sqrt()
    model = Longitudinal()
    found = nuts(model, design, kernels, visits, change, draws=250, warmup=100, seed=1)
    assert found.attributes["divergences"] < 5
    drawn = torch.stack([found.samples["components"][:, 0], found.samples["noise"]], 1)
    least = math.sqrt(float(found.attributes["effective_draws"]))
    assert float(((drawn.mean(0) - expected) / spread).abs().max()) < 4 / least
    best = fit_components(ChangeData(change, visits, design, kernels))
    start = {"coefficients": best.coefficients, "components": best.variances[:1].sqrt(), "noise": best.variances[1].sqrt()}
    guide = AutoMultivariateNormal(model, init_loc_fn=init_to_value(values=start))
    fitted = svi.fit(model, guide, design, kernels, visits, change, steps=500, learning_rate=0.03, tolerance_nats=None, seed=0)
    with seeded(1), torch.no_grad():
        draws = [guide(design, kernels, visits, change) for _ in range(500)]
    variational = torch.stack([torch.stack([draw["components"][0], draw["noise"]]) for draw in draws])
    # A normal in the logarithm has thinner tails than the half Cauchy's posterior.
    assert float(((variational.mean(0) - expected) / spread).abs().max()) < 0.35
    assert fitted.elbo < float(torch.logsumexp(marginal, 0))
    # All agree with restricted maximum likelihood within the posterior's spread.
    assert bool(((best.variances.sqrt() - expected).abs() < 2 * spread).all())


def test_data_that_cannot_be_fitted_are_refused() -> None:
    design, kernels, visits = followed_people()
    change = torch.randn(len(visits))
    with pytest.raises(ValueError, match="rank 2"):
        ChangeData(change, visits, torch.cat([design, design[:, 1:]], 1), kernels)
    with pytest.raises(ValueError, match="one number of people"):
        ChangeData(change, visits, design[:5], kernels)
    with pytest.raises(ValueError, match="finite"):
        ChangeData(change.index_fill(0, torch.tensor([1]), torch.nan), visits, design, kernels)
    with pytest.raises(ValueError, match="more people seen again"):
        ChangeData(change[:2], FollowUps(visits.delta[:2], torch.tensor([0, 1]), 6), design, kernels)
    with pytest.raises(ValueError, match="baseline"):
        Longitudinal(baseline="other")


def test_shares_name_the_whole_that_fits_the_data() -> None:
    fit = fit_components(made_data("same"))
    alone, _ = fit.share([0])
    kernels = [float(fit.variances[k] * fit.data.relationship.diagonal(k).mean()) for k in range(2)]
    assert alone == pytest.approx(kernels[0] / sum(kernels))
    trait = fit_components(heritable(80, 0.5, 2))
    assert isinstance(trait, ChangeFit)
    mean = float(trait.data.relationship.diagonal(0).mean())
    total = float(trait.variances[0]) * mean + float(trait.variances[1])
    assert trait.share([0])[0] == pytest.approx(float(trait.variances[0]) * mean / total)
