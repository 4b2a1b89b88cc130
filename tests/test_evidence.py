"""The evidence against dense algebra."""

from __future__ import annotations

import math

import pytest
import torch
from test_gauss_newton import GRIDS, Local, dense, problem
from torch.distributions import MultivariateNormal

from probmed.fields import GaussianField
from probmed.inference.evidence import Estimate, log_determinant, log_evidence, log_form
from probmed.inference.gauss_newton import ascend_field

pytestmark = pytest.mark.usefixtures("float64")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact_determinant(prior: GaussianField, near: Local) -> float:
    """log |I + Λ⁻¹ H|."""
    precision, hessian = dense(prior, near)
    return float(torch.linalg.slogdet(torch.eye(len(hessian)) + torch.linalg.solve(precision, hessian))[1])


@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_a_quadratic_form_of_the_logarithm(spread: float) -> None:
    root = torch.randn(30, 30)
    basis, values = torch.linalg.qr(root)[0], (spread * torch.randn(30)).exp()
    matrix, probe = basis @ torch.diag(values) @ basis.T, torch.randn(30)
    exact = float(probe @ basis @ torch.diag(values.log()) @ basis.T @ probe)
    assert log_form(lambda x: matrix @ x, probe, 1e-10) == pytest.approx(exact, abs=1e-7)
    # Where it stops early, by what it was told.
    asked: list[torch.Tensor] = []

    def product(x: torch.Tensor) -> torch.Tensor:
        asked.append(x)
        return matrix @ x

    loose = log_form(product, probe, 0.5)
    assert loose == pytest.approx(exact, abs=1.0)
    assert len(asked) < 30


def test_a_probe_in_an_invariant_space_needs_no_more_steps_than_its_dimension() -> None:
    matrix, probe = torch.diag(torch.tensor([1.0, 2.0, 5.0, 7.0])), torch.tensor([0.0, 3.0, -1.0, 0.0])
    assert log_form(lambda x: matrix @ x, probe, 0.0) == pytest.approx(9 * math.log(2) + math.log(5), abs=1e-10)


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
def test_the_determinant_is_that_of_dense_algebra_within_its_error(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    """Also where only few coefficients are treated exactly, so that the probes have something to find."""
    prior, near = problem(shape, spacing)
    exact = exact_determinant(prior, near)
    assert log_determinant(near, prior, 2, generator(), 1e-10, coarse=10_000).value == pytest.approx(exact, abs=1e-8)
    found = [log_determinant(near, prior, 20, generator(seed), 1e-6, coarse=12) for seed in range(40)]
    values, errors = torch.tensor([f.value for f in found]), torch.tensor([f.error for f in found])
    # The error is the spread that other seeds show, and their mean is the truth.
    assert errors.min() > 0.1
    assert float(values.std() / errors.square().mean().sqrt()) == pytest.approx(1, abs=0.4)
    assert abs(float(values.mean()) - exact) < 4 * float(errors.square().mean().sqrt()) / math.sqrt(len(found))


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
def test_the_evidence_of_a_linear_gaussian_model_is_exact(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    prior, near = problem(shape, spacing)
    known = near.weights.flatten() > 0
    precision, _ = dense(prior, near)
    slopes = torch.cat([torch.diag(slope.flatten()) for slope in near.slopes], 1)[known]
    noise = torch.diag(1 / near.weights.flatten()[known])
    exact = MultivariateNormal(slopes @ prior.loc.flatten(), slopes @ torch.linalg.solve(precision, slopes.T) + noise)

    def linearise(field: torch.Tensor) -> Local:
        return Local(near.slopes, near.weights, near.data, field)

    mode = ascend_field(linearise, prior, torch.zeros_like(near.field), 60, 1e-14)
    whole, part = (log_evidence(mode.near, prior, mode.field, 400, generator(), 1e-8, coarse=coarse) for coarse in (10_000, 12))
    # ``Local`` has no normaliser.
    normaliser = float((near.weights.flatten()[known] / (2 * math.pi)).log().sum() / 2)
    expected = float(exact.log_prob(near.data.flatten()[known])) - normaliser
    assert whole.value == pytest.approx(expected, abs=1e-8)
    assert 0.01 < part.error < 0.5
    assert abs(part.value - expected) < 4 * part.error


def test_nothing_observed_is_no_evidence() -> None:
    """The prior's density is gone, whatever its spectrum."""
    prior, near = problem(*GRIDS[0])
    silent = Local(near.slopes, torch.zeros_like(near.weights), near.data, prior.loc)
    assert log_evidence(silent, prior, prior.loc) == Estimate(pytest.approx(0, abs=1e-8), pytest.approx(0, abs=1e-8))  # type: ignore[arg-type]


def test_single_precision_gives_the_same() -> None:
    prior, near = problem(*GRIDS[1])
    single = GaussianField(prior.grid_shape, prior.spacing, prior.strength.float(), prior.kappa.float(), 2.0, prior.channels, prior.loc.float())
    small = Local(near.slopes.float(), near.weights.float(), near.data.float(), near.field.float())
    for seed in (0, 1):
        found, exact = (log_determinant(n, p, 50, generator(seed)) for n, p in ((small, single), (near, prior)))
        assert abs(found.value - exact.value) < 4 * math.hypot(found.error, exact.error) + 0.02


def test_one_probe_has_no_error_and_is_refused() -> None:
    prior, near = problem(*GRIDS[0])
    with pytest.raises(ValueError, match="two probes"):
        log_determinant(near, prior, 1)
