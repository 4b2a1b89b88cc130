"""Gauss–Newton on a field against dense algebra."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from probmed.fields import GaussianField
from probmed.inference.gauss_newton import Iteration, ascend_field, field_draws, newton_direction
from probmed.inference.laplace import field_preconditioner

pytestmark = pytest.mark.usefixtures("float64")

GRIDS = [((6, 5), (1.0, 1.5)), ((4, 3, 3), (1.0, 1.5, 2.0))]


@dataclass(frozen=True)
class Local:
    """Data y = Σ_e a_e v_e + noise of precision h at each node, its quadratic about a field."""

    slopes: Tensor
    weights: Tensor
    data: Tensor
    field: Tensor

    @property
    def residual(self) -> Tensor:
        return self.data - (self.slopes * self.field).sum(0)

    @property
    def log_joint(self) -> float:
        return float(-0.5 * (self.weights * self.residual**2).sum())

    @property
    def gradient(self) -> Tensor:
        return self.slopes * self.weights * self.residual

    @property
    def elements(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def precision(self, field: Tensor) -> Tensor:
        return self.slopes * self.weights * (self.slopes * field).sum(1, keepdim=True)

    def precision_root(self, white: Tensor) -> Tensor:
        return self.slopes * (self.weights.sqrt() * white)[:, None]

    def blocks(self) -> Tensor:
        return self.slopes[:, None] * self.slopes * self.weights


class Curved(Local):
    """The same with y = sin 3 v_0: no longer linear in the field."""

    @property
    def residual(self) -> Tensor:
        return self.data - torch.sin(3 * self.field[0])

    @property
    def gradient(self) -> Tensor:
        return self._slopes() * self.weights * self.residual

    def _slopes(self) -> Tensor:
        slopes = torch.zeros_like(self.slopes)
        slopes[0] = 3 * torch.cos(3 * self.field[0])
        return slopes

    def precision(self, field: Tensor) -> Tensor:
        return self._slopes() * self.weights * (self._slopes() * field).sum(1, keepdim=True)

    def blocks(self) -> Tensor:
        return self._slopes()[:, None] * self._slopes() * self.weights


def problem(shape: tuple[int, ...], spacing: tuple[float, ...], kappa: float = 0.4) -> tuple[GaussianField, Local]:
    d = len(shape)
    prior = GaussianField(shape, spacing, torch.tensor(0.8), kappa, 2.0, d, loc=torch.randn(d, *shape))
    weights = 3 * torch.rand(shape)
    weights[0] = 0.0  # nothing is known of a face
    return prior, Local(torch.randn(d, *shape), weights, torch.randn(shape), torch.zeros(d, *shape))


def dense(prior: GaussianField, near: Local) -> tuple[Tensor, Tensor]:
    """Λ and H, written out."""
    unit = torch.eye(prior.event_shape.numel()).reshape(-1, *prior.event_shape)
    return prior.precision_matvec(unit).flatten(1), near.precision(unit).flatten(1)


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
def test_the_mode_of_a_linear_gaussian_problem_is_its_posterior_mean(
    shape: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    prior, near = problem(shape, spacing)
    precision, hessian = dense(prior, near)
    right = near.gradient.flatten() + precision @ prior.loc.flatten()
    expected = torch.linalg.solve(hessian + precision, right).reshape(prior.event_shape)
    found = ascend_field(
        lambda field: Local(near.slopes, near.weights, near.data, field), prior, torch.zeros_like(near.field), 60, 1e-14
    )
    assert found.converged
    torch.testing.assert_close(found.field, expected, rtol=0, atol=1e-6)
    assert found.near.log_joint == pytest.approx(Local(near.slopes, near.weights, near.data, found.field).log_joint)


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
def test_a_whole_newton_step_goes_to_the_mean(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    prior, near = problem(shape, spacing)
    precision, hessian = dense(prior, near)
    right = near.gradient.flatten() + precision @ prior.loc.flatten()
    step = newton_direction(near, prior, near.field, tolerance=1e-12, iterations=300)
    torch.testing.assert_close(step.flatten(), torch.linalg.solve(hessian + precision, right), rtol=0, atol=1e-9)


def curved(data: Tensor, weights: Tensor, prior: GaussianField, start: Tensor, **options: float) -> list[Iteration]:
    told: list[Iteration] = []
    slopes = torch.zeros(prior.event_shape)
    mode = ascend_field(
        lambda field: Curved(slopes, weights, data, field), prior, start, callback=told.append, **options  # type: ignore[arg-type]
    )
    assert told == mode.iterations
    return mode.iterations


def test_the_log_joint_never_falls_and_the_history_adds_up() -> None:
    prior, near = problem(*GRIDS[0])
    start = 4 * torch.randn(prior.event_shape)
    weights = 50 * near.weights
    history = curved(near.data.clamp(-0.8, 0.8), weights, prior, start, iterations=40, tolerance=1e-10)
    before = Curved(near.slopes, weights, near.data.clamp(-0.8, 0.8), start).log_joint + float(prior.log_prob(start))
    assert [i.number for i in history] == list(range(1, len(history) + 1))
    assert any(i.step < 1 for i in history)  # else nothing was too far, and the test says nothing
    for iteration in history:
        assert iteration.gain >= 0
        assert iteration.log_joint == pytest.approx(before + iteration.gain, rel=1e-9)
        before = iteration.log_joint


def test_it_stops_where_little_is_gained_and_says_so() -> None:
    prior, near = problem(*GRIDS[0])

    def linearise(field: Tensor) -> Local:
        return Local(near.slopes, near.weights, near.data, field)

    short = ascend_field(linearise, prior, near.field, 1, 1e-10)
    assert not short.converged
    assert len(short.iterations) == 1
    whole = ascend_field(linearise, prior, near.field, 100, 1e-3)
    assert whole.converged
    enough = 1e-3 * math.prod(near.elements)
    assert whole.iterations[-1].gain < enough
    assert all(i.gain >= enough for i in whole.iterations[:-1])
    # From the mode nothing is gained.
    best = ascend_field(linearise, prior, near.field, 100, 1e-14).field
    again = ascend_field(linearise, prior, best, 5, 1e-10)
    assert again.converged
    assert len(again.iterations) <= 1


def test_a_start_without_a_finite_density_is_refused() -> None:
    prior, near = problem(*GRIDS[0])
    with pytest.raises(FloatingPointError, match="at the start"):
        ascend_field(lambda _: Local(near.slopes, near.weights, near.data * math.nan, near.field), prior, near.field)


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
def test_draws_have_the_covariance_of_the_dense_posterior(shape: tuple[int, ...], spacing: tuple[float, ...]) -> None:
    prior, near = problem(shape, spacing)
    covariance = torch.linalg.inv(sum(dense(prior, near)))
    count = 3000
    draws = field_draws(near, prior, count, torch.Generator().manual_seed(1), tolerance=1e-6).flatten(1)
    found = draws.T @ draws / count
    # The standard error of a sample covariance is √((c_ii c_jj + c_ij²) / S): five bound some 10,000 entries at a level of 0.01.
    variance = covariance.diagonal()
    error = ((variance[:, None] * variance + covariance**2) / count).sqrt()
    assert ((found - covariance).abs() / error).max() < 5
    assert (draws.mean(0).abs() / (variance / count).sqrt()).max() < 4.5


def test_draws_are_as_wide_in_broad_directions_as_in_narrow_ones() -> None:
    """At the tolerance that is used, where most of the image says nothing: there the broadest directions are the prior's alone, a hundred thousand
    times less precise than the mean curvature, and a solver that stops by its residual's plain norm has not begun to find them.
    """
    shape, count = (16, 16), 400
    prior = GaussianField.from_sd(shape, (1.0, 1.0), 1.0, 8.0, 2.0, 2)
    weights = torch.zeros(shape)
    weights[:8] = 400.0
    near = Local(torch.randn(2, *shape), weights, torch.zeros(shape), torch.zeros(2, *shape))
    covariance = torch.linalg.inv(sum(dense(prior, near)))
    where = torch.stack([torch.ones(shape), torch.zeros(shape)]).flatten() / math.prod(shape)
    half = torch.zeros(2, *shape)
    half[0, 8:] = 2 / math.prod(shape)
    draws = field_draws(near, prior, count, torch.Generator().manual_seed(1)).flatten(1)
    for mean in (where, half.flatten()):
        sd = (mean @ covariance @ mean).sqrt()
        # χ² of 400 draws: the standard error of an sd is one in √800.
        assert abs(float((draws @ mean).std() / sd) - 1) < 4 / math.sqrt(2 * count)
    # And as few as 30 iterations are enough.
    few = field_draws(near, prior, 5, torch.Generator().manual_seed(1), iterations=30).flatten(1)
    exact = field_draws(near, prior, 5, torch.Generator().manual_seed(1), tolerance=1e-10, iterations=2000).flatten(1)
    assert float(((few - exact) @ half.flatten()).abs().max()) < 0.02 * float((half.flatten() @ covariance @ half.flatten()).sqrt())


@pytest.mark.parametrize(("shape", "spacing"), GRIDS)
def test_the_preconditioner_is_the_inverse_where_it_is_whole_and_symmetric_positive_elsewhere(
    shape: tuple[int, ...], spacing: tuple[float, ...]
) -> None:
    prior, near = problem(shape, spacing)
    unit = torch.eye(prior.event_shape.numel()).reshape(-1, *prior.event_shape)
    inverse = torch.linalg.inv(sum(dense(prior, near)))
    exact = field_preconditioner(near.blocks(), prior, coarse=10_000)(unit).flatten(1)
    torch.testing.assert_close(exact, inverse, rtol=0, atol=1e-9)
    part = field_preconditioner(near.blocks(), prior, coarse=12)(unit).flatten(1)
    torch.testing.assert_close(part, part.T)
    assert torch.linalg.eigvalsh(part).min() > 0
    assert (part - inverse).abs().max() > 1e-3


def test_draws_are_those_of_the_generator() -> None:
    prior, near = problem(*GRIDS[0])
    first, again, other = (field_draws(near, prior, 2, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


class Ruled(Local):
    """A field that the likelihood rules out."""

    @property
    def log_joint(self) -> float:
        return -math.inf


def test_what_is_ruled_out_is_neither_stepped_to_nor_started_from() -> None:
    prior, near = problem(*GRIDS[0])
    asked: list[float] = []

    def departure(field: Tensor) -> float:
        return float((field - prior.loc).abs().max())

    def linearise(field: Tensor, limit: float = math.inf) -> Local:
        asked.append(departure(field))
        return (Ruled if asked[-1] > limit else Local)(near.slopes, near.weights, near.data, field)

    free = ascend_field(linearise, prior, prior.loc)
    limit = 0.7 * departure(free.field)
    asked.clear()
    found = ascend_field(lambda field: linearise(field, limit), prior, prior.loc + 5 * limit)
    assert asked[0] == pytest.approx(5 * limit)
    assert max(asked[1:]) > limit >= departure(found.field)
    assert [i.gain >= 0 for i in found.iterations] == [True] * len(found.iterations)
    with pytest.raises(FloatingPointError, match="at the start"):
        ascend_field(lambda field: linearise(field, -1.0), prior, prior.loc)
