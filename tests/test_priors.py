"""Priors of anatomy: affine maps, flows, atlases where they lie and where they are moved."""

from __future__ import annotations

import math

import pytest
import torch
from cases import LABEL_PRIORS, NAMES, oblique_grid, tiny_atlas, velocity_grid
from pyro import poutine
from torch import Tensor

from probmed.grids import Grid, MaskedGrid, sample
from probmed.priors import (
    FLOOR,
    AffinePrior,
    DeformableAtlas,
    FixedAtlas,
    LabelPrior,
    MarkovField,
    SmoothVelocity,
)
from probmed.transforms import Affine, Velocity

GRID = oblique_grid()

pytestmark = pytest.mark.usefixtures("float64")


def floored(d: int = 3) -> Tensor:
    probabilities = tiny_atlas(d).probabilities + FLOOR
    return probabilities / probabilities.sum(0)


# Deformation priors.


@pytest.mark.parametrize(("d", "count"), [(2, 3), (2, 4), (2, 6), (3, 6), (3, 7), (3, 12)])
def test_affine_prior_is_its_start_moved_by_the_group_about_its_centre(d: int, count: int) -> None:
    start, centre = Affine.exp(0.2 * torch.randn(6 if d == 2 else 12), d), torch.randn(d)
    prior = AffinePrior(d, count, start.matrix, centre)
    torch.testing.assert_close(prior.evaluate(torch.zeros(count)).matrix, start.matrix)
    parameters = 0.2 * torch.randn(count)
    points = torch.randn(5, d)
    group = Affine.exp(parameters, d)
    torch.testing.assert_close(prior.evaluate(parameters)(points), centre + group(start(points) - centre))


def test_affine_prior_has_the_stated_standard_deviations() -> None:
    prior = AffinePrior(3, 12, translation_mm=7.0, rotation=0.3, log_scale=0.2)
    assert prior.sd.tolist() == [7.0] * 3 + [0.3] * 3 + [0.2] * 6
    assert AffinePrior(2, 4, rotation=0.3).sd.tolist() == pytest.approx([20.0, 20.0, 0.3, 0.15])
    trace = poutine.trace(prior).get_trace()
    value = trace.nodes["affine"]["value"]
    expected = torch.distributions.Normal(0.0, prior.sd).log_prob(value).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    with pytest.raises(ValueError, match="expected 6, 7 or 12 parameters in 3D, got 9"):
        AffinePrior(3, 9)


@pytest.mark.parametrize("d", [2, 3])
def test_velocity_prior_has_its_sd_and_length_in_mm(d: int) -> None:
    component = SmoothVelocity(velocity_grid(d), sd_mm=3.0, length_mm=20.0)
    prior = component.prior()
    assert prior.event_shape == (d, *velocity_grid(d).shape)
    assert prior.variance.mean().item() == pytest.approx(9.0)
    assert prior.kappa.item() == pytest.approx(1 / 20)
    trace = poutine.trace(component).get_trace()
    flow, field = trace.nodes["_RETURN"]["value"], trace.nodes["velocity"]["value"]
    assert isinstance(flow, Velocity)
    assert flow.field is field
    torch.testing.assert_close(trace.log_prob_sum(), prior.log_prob(field))


# Label priors.


@pytest.mark.parametrize("d", [2, 3])
def test_fixed_atlas_is_its_floored_probabilities_at_its_own_voxels(d: int) -> None:
    atlas = tiny_atlas(d)
    prior = FixedAtlas(atlas)
    torch.testing.assert_close(prior(atlas.grid).exp(), floored(d))
    assert prior.names == NAMES
    sure = torch.zeros_like(atlas.probabilities)
    sure[1] = 1
    certain = FixedAtlas(type(atlas)(NAMES, sure, atlas.grid, brain=("GM", "WM")))(atlas.grid)
    torch.testing.assert_close(certain[0], torch.full(atlas.grid.shape, math.log(FLOOR / (1 + 3 * FLOOR))))


def test_atlas_extends_beyond_its_edge_as_its_nearest_voxel() -> None:
    atlas = tiny_atlas()
    far = atlas.grid.padded(3)
    values = FixedAtlas(atlas)(far).exp()
    torch.testing.assert_close(values[:, 3:-3, 3:-3, 3:-3], floored())
    torch.testing.assert_close(values[:, 0, 3:-3, 3:-3], floored()[:, 0])


@pytest.mark.parametrize("name", LABEL_PRIORS)
def test_probabilities_sum_to_one_and_masked_grids_pick_from_them(name: str) -> None:
    prior = LABEL_PRIORS[name][0]()
    trace = poutine.trace(prior).get_trace(GRID)
    whole: Tensor = trace.nodes["_RETURN"]["value"]  # type: ignore[assignment]
    assert whole.shape == (3, *GRID.shape)
    torch.testing.assert_close(whole.exp().sum(0), torch.ones(GRID.shape))
    mask = torch.rand(GRID.shape) < 0.4
    state: dict[str, Tensor] = {n: trace.nodes[n]["value"] for n in trace.stochastic_nodes}  # type: ignore[misc]
    again = poutine.condition(prior, data=state)
    torch.testing.assert_close(again(MaskedGrid(GRID, mask)), whole[:, mask])


def test_moved_atlas_is_looked_up_where_the_transform_leads() -> None:
    atlas = tiny_atlas()
    transform = Affine.exp(torch.tensor([3.0, 1.0, -2.0, 0.1, 0.2, 0.0]))
    points = transform(GRID.coordinates(torch.float64))
    expected = sample(floored(), atlas.grid, points, fill="edge").log()
    torch.testing.assert_close(FixedAtlas(atlas, transform)(GRID), expected)
    assert not torch.allclose(FixedAtlas(atlas)(GRID), expected)


def test_deformable_atlas_flows_after_its_affine_map() -> None:
    atlas = tiny_atlas()
    affine, deformation = AffinePrior(centre=torch.ones(3)), SmoothVelocity(velocity_grid())
    prior = DeformableAtlas(atlas, affine, deformation)
    parameters = torch.tensor([4.0, -3.0, 2.0, 0.2, -0.1, 0.3, *[0.05] * 6])
    velocity = deformation.prior().rsample()
    state = {"affine": parameters, "velocity": velocity}
    found = poutine.condition(prior, data=state)(GRID)
    points = GRID.coordinates(torch.float64)
    ends = deformation.evaluate(velocity)(affine.evaluate(parameters)(points))
    expected = sample(floored(), atlas.grid, ends, fill="edge").log()
    torch.testing.assert_close(found, expected)
    other = affine.evaluate(parameters)(deformation.evaluate(velocity)(points))
    assert not torch.allclose(sample(floored(), atlas.grid, other, fill="edge").log(), expected, atol=1e-2)


@pytest.mark.parametrize("d", [2, 3])
def test_deformable_atlas_at_rest_is_the_fixed_one(d: int) -> None:
    atlas, grid = tiny_atlas(d), oblique_grid(d)
    still = FixedAtlas(atlas)(grid)
    torch.testing.assert_close(DeformableAtlas(atlas, None)(grid), still)
    default = DeformableAtlas(atlas, "default", SmoothVelocity(velocity_grid(d)))
    assert isinstance(default.affine, AffinePrior)
    middle = (torch.tensor(atlas.grid.shape) - 1) / 2
    torch.testing.assert_close(default.affine.centre, atlas.grid.voxel_to_world(middle))
    zero = {"affine": torch.zeros(6 if d == 2 else 12), "velocity": torch.zeros(d, *velocity_grid(d).shape)}
    torch.testing.assert_close(poutine.condition(default, data=zero)(grid), still)


def test_motion_gives_positions_and_their_derivative_in_the_affine_parameters() -> None:
    atlas = tiny_atlas()
    prior = DeformableAtlas(atlas, "default", SmoothVelocity(velocity_grid(), sd_mm=2.0))
    assert isinstance(prior.affine, AffinePrior)
    state = {
        "affine": 0.1 * torch.randn(12) * prior.affine.sd,
        "velocity": torch.zeros(3, *velocity_grid().shape),
    }
    # A velocity without kinks between voxels: linear and contracting.
    field = -0.2 * velocity_grid().coordinates(torch.float64).movedim(-1, 0)
    state["velocity"] = field
    motion = prior.motion(state, GRID)
    assert motion is not None
    assert motion.affine is not None
    transform = poutine.condition(prior.transform, data=state)()
    points = GRID.coordinates(torch.float64).flatten(0, -2)
    ends = transform(points)
    assert (motion.positions - ends).norm(dim=-1).max() < 0.3
    torch.testing.assert_close(motion.log_labels(ends), poutine.condition(prior, data=state)(GRID).flatten(1))
    step = 1e-5
    inside = (points.abs() < 12).all(-1)
    for parameter in range(12):
        moved = [state["affine"].clone() for _ in range(2)]
        moved[0][parameter] -= step
        moved[1][parameter] += step
        low, high = (poutine.condition(prior.transform, data=state | {"affine": a})()(points) for a in moved)
        expected = ((high - low) / (2 * step))[inside]
        error = (motion.affine[inside][..., parameter] - expected).norm() / expected.norm()
        assert error < 0.05, parameter
    assert motion.nodes is not None
    nearest = velocity_grid().voxel_coordinates(torch.float64).flatten(0, -2)[motion.nodes]
    world = velocity_grid().voxel_to_world(nearest)
    assert ((world - ends).norm(dim=-1)[inside] < 11.0).all()
    assert FixedAtlas(atlas).motion({}, GRID) is None


def test_markov_field_couples_whole_grids_and_not_parts_of_them() -> None:
    plain = FixedAtlas(tiny_atlas())
    prior = MarkovField(plain, 0.4, sweeps=3)
    assert prior.names == NAMES
    torch.testing.assert_close(prior(GRID), plain(GRID))
    assert prior.coupling is not None
    assert prior.coupling.strength == 0.4
    assert prior.coupling.spacing == GRID.spacing
    assert prior.coupling.sweeps == 3
    prior(MaskedGrid(GRID, torch.ones(GRID.shape, dtype=torch.bool)))
    assert prior.coupling is None
    assert plain.coupling is None


def test_the_abstract_prior_says_nothing() -> None:
    with pytest.raises(NotImplementedError):
        LabelPrior()(Grid.from_spacing((2, 2)))


# Smooth velocities.


def test_strength_and_length_are_learned_from_velocities() -> None:
    """Σ log p(v) over draws has its maximum near the truth: λ's normaliser, log |Λ|, is there."""
    grid = Grid.from_spacing((16, 14), (2.0, 3.0))
    truth = SmoothVelocity(grid, 3.0, 9.0)
    draws = truth.prior().sample((40,))
    prior = SmoothVelocity(grid, 1.0, 30.0, learn=True)
    optimiser = torch.optim.LBFGS(prior.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -prior.prior().log_prob(draws).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert prior.sd_mm == pytest.approx(3.0, rel=0.1)
    assert prior.length_mm == pytest.approx(9.0, rel=0.15)


@pytest.mark.parametrize("splines", [False, True])
def test_velocity_is_interpolated_to_the_grid_of_the_flow(splines: bool) -> None:
    coarse = Grid.from_spacing((9, 8), 4.0)
    fine = Grid.from_spacing((15, 12), 1.5)
    prior = SmoothVelocity(coarse, on=fine, splines=splines)
    x = coarse.coordinates(torch.float64)
    # Both reproduce what is linear in space, away from the edges.
    linear = torch.stack([0.1 * x[..., 0] + 0.2 * x[..., 1], 1 - 0.3 * x[..., 1]])
    y = fine.coordinates(torch.float64)
    expected = torch.stack([0.1 * y[..., 0] + 0.2 * y[..., 1], 1 - 0.3 * y[..., 1]])
    torch.testing.assert_close(prior.evaluate(linear).field, expected)
    bump = torch.zeros(2, 9, 8)
    bump[0, 4, 4] = 1.0
    found = prior.evaluate(bump).field[0]
    # The coefficient's node is at (0, 2) mm.
    u, w = (y[..., 0] / 4).abs(), ((y[..., 1] - 2) / 4).abs()

    def kernel(t: Tensor) -> Tensor:
        if not splines:
            return (1 - t).clamp_min(0)
        near, far = 2 / 3 - t**2 + t**3 / 2, (2 - t).clamp_min(0) ** 3 / 6
        return torch.where(t < 1, near, far)

    torch.testing.assert_close(found, kernel(u) * kernel(w))
