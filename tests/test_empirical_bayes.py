"""Scales of a field's prior by the evidence: against dense algebra, and recovered from the model's own draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from test_calibration import Setting
from test_gauss_newton import Local, dense
from torch import Tensor
from torch.distributions import MultivariateNormal

from probmed.fields import GaussianField, dct
from probmed.inference.empirical_bayes import Scales, determined, fitted_scales, learn_scales
from probmed.inference.gauss_newton import FieldMode, ascend_field
from probmed.models.registration import linearise

pytestmark = pytest.mark.usefixtures("float64")

SHAPE, SPACING = (9, 8), (1.0, 1.5)
TRUTH = Scales(1.5, 3.0)
LIKE = GaussianField(SHAPE, SPACING, torch.tensor(1.0), 0.3, 2.0, 2)


def observed(scales: Scales = TRUTH) -> tuple[Tensor, Local]:
    """A field, and what is known of it: nothing at a face, little at some nodes and much at others."""
    weights = 8 * torch.rand(SHAPE)
    weights[0] = 0.0
    slopes, field = torch.randn(2, *SHAPE), scales.prior(LIKE).rsample()
    noise = torch.where(weights > 0, weights.rsqrt(), torch.zeros(())) * torch.randn(SHAPE)
    return field, Local(slopes, weights, (slopes * field).sum(0) + noise, torch.zeros(2, *SHAPE))


def ascend(near: Local, prior: GaussianField, start: Tensor) -> FieldMode:
    return ascend_field(lambda field: Local(near.slopes, near.weights, near.data, field), prior, start, 60, 1e-13)


def evidence(near: Local, scales: Scales) -> float:
    known = near.weights.flatten() > 0
    precision, _ = dense(scales.prior(LIKE), near)
    slopes = torch.cat([torch.diag(slope.flatten()) for slope in near.slopes], 1)[known]
    covariance = slopes @ torch.linalg.solve(precision, slopes.T) + torch.diag(1 / near.weights.flatten()[known])
    return float(MultivariateNormal(torch.zeros(len(covariance)), covariance).log_prob(near.data.flatten()[known]))


def test_what_the_data_determine_is_that_of_dense_algebra() -> None:
    _, near = observed()
    prior = TRUTH.prior(LIKE)
    precision, hessian = dense(prior, near)
    basis = dct(torch.eye(len(hessian)).reshape(-1, *prior.event_shape), 2).flatten(1)  # a row a node, a column a coefficient
    exact = (basis.T @ hessian @ torch.linalg.inv(hessian + precision) @ basis).diagonal().reshape(prior.event_shape).sum(0)
    found = determined(near, prior, 4000, torch.Generator().manual_seed(0), 1e-6)
    assert float(exact.sum()) > 20
    assert float((found - exact).sum()) == pytest.approx(0, abs=4 * math.sqrt(2 * float(exact.sum()) / 4000))
    assert (found - exact).abs().max() < 0.2


@pytest.mark.parametrize("length", [False, True])
def test_learned_scales_are_those_of_most_evidence(length: bool) -> None:
    """Of a linear Gaussian model, whose evidence is known."""
    _, near = observed()

    def lost(logs: np.ndarray) -> float:
        return -evidence(near, Scales(math.exp(logs[0]), math.exp(logs[1]) if length else TRUTH.length_mm))

    best = minimize(lost, np.array([0.0, 1.0][: 1 + length]), method="Nelder-Mead", options={"xatol": 1e-4, "fatol": 1e-6})
    found = learn_scales(
        lambda prior, start: ascend(near, prior, start), LIKE, near.field, Scales(0.5, 2.0 if length else TRUTH.length_mm),
        length=length, rounds=60, probes=400, tolerance=1e-4, generator=torch.Generator().manual_seed(0),
    )
    assert found.converged
    assert math.log(found.scales.sd) == pytest.approx(best.x[0], abs=0.03)
    if length:
        assert math.log(found.scales.length_mm) == pytest.approx(best.x[1], abs=0.06)
    else:
        assert found.scales.length_mm == TRUTH.length_mm
    # And hardly any evidence is lost by the noise of γ.
    assert evidence(near, found.scales) == pytest.approx(-best.fun, abs=0.02)
    assert evidence(near, Scales(0.5, 2.0)) < -best.fun - 1


def test_where_everything_is_determined_the_scales_are_those_of_the_field_itself() -> None:
    field = TRUTH.prior(LIKE).rsample()
    found = fitted_scales(torch.full(SHAPE, 2.0), field, LIKE, Scales(0.5, 5.0))

    def lost(logs: np.ndarray) -> float:
        return -float(Scales(math.exp(logs[0]), math.exp(logs[1])).prior(LIKE).log_prob(field))

    exact = minimize(lost, np.array([0.0, 1.0]), method="Nelder-Mead")
    assert [math.log(found.sd), math.log(found.length_mm)] == pytest.approx(list(exact.x), abs=0.01)


def test_single_precision_gives_the_same() -> None:
    """Though the derivative is one of differences."""
    field, gamma, start = TRUTH.prior(LIKE).rsample(), torch.rand(SHAPE), Scales(0.5, 5.0)
    exact = fitted_scales(gamma, field, start.prior(LIKE), start)
    torch.set_default_dtype(torch.float32)  # the fixture sets it back
    like = GaussianField(SHAPE, SPACING, torch.tensor(1.0), 0.3, 2.0, 2)
    found = fitted_scales(gamma.float(), field.float(), start.prior(like), start)
    assert (found.sd, found.length_mm) == pytest.approx((exact.sd, exact.length_mm), rel=1e-3)


def test_data_that_say_nothing_are_refused() -> None:
    _, near = observed()
    silent = Local(near.slopes, 1e-9 * near.weights, near.data, near.field)
    with pytest.raises(ValueError, match="determine the field"):
        learn_scales(lambda prior, start: ascend(silent, prior, start), LIKE, near.field, TRUTH)


@pytest.mark.slow
@pytest.mark.parametrize("sd", [0.4, 0.8])
def test_the_spread_of_velocities_is_recovered(sd: float) -> None:
    """From single simulated pairs, started at half and at twice of it: the mean of its logarithm over pairs. With α = 3: of rougher velocities,
    a flow on their own lattice passes over the finest part."""
    setting = Setting(2, 22, 1.0, sd=sd, length=4.0, texture=3.0, noise=0.05, margin=2, alpha=3.0)
    logs = []
    for seed in range(6):
        torch.manual_seed(seed)
        _, moving, fixed = setting.simulate()

        def climbed(prior: GaussianField, start: Tensor, moving: Tensor = moving, fixed: Tensor = fixed) -> FieldMode:
            return ascend_field(lambda v: linearise(setting.similarity, setting.lattice, v, moving, fixed, setting.grid), prior, start, 30, 1e-5)

        start = Scales(sd * (0.5 if seed % 2 else 2.0), setting.length)
        found = learn_scales(climbed, setting.prior, torch.zeros(setting.prior.event_shape), start, length=False)
        assert found.converged
        logs.append(math.log(found.scales.sd / sd))
    departures = torch.tensor(logs)
    assert departures.std() < 0.4
    assert abs(float(departures.mean())) < 0.15
