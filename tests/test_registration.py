"""The registration model's linearisation against autograd and dense algebra, and `register` against known deformations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from phantoms import bend, flowed, head
from torch import Tensor

from probmed.fields import dct
from probmed.grids import Grid, sample
from probmed.inference.em import log_joint
from probmed.models.registration import Linearisation, Registration, carried, linearise, linearise_both_ways
from probmed.priors import SmoothVelocity
from probmed.similarities import ConditionalMixture, GaussianNoise, LocalCorrelation, Similarity, StudentNoise
from probmed.transforms import Affine, Velocity
from probmed.volumes import Volume
from probmed.workflows.registration import SIMILARITIES, RegistrationResult, RegistrationSettings, register

DIMENSIONS = pytest.mark.parametrize("d", [2, 3])
NAMES = pytest.mark.parametrize("name", SIMILARITIES)


def likeness(name: str, d: int) -> Similarity:
    kinds = {
        "correlation": LocalCorrelation(2, ndim=d),
        "gaussian": GaussianNoise(tempering=0.6),
        "student": StudentNoise(),
        "mixture": ConditionalMixture(8, (-0.2, 1.8)),
    }
    return kinds[name]


def waves(points: Tensor, phase: float = 0.0) -> Tensor:
    """A smooth image ``(1, *size)`` without edges."""
    x, y = 0.15 * points[..., 0], 0.15 * points[..., 1]
    image = 0.7 + 0.3 * torch.sin(x + 0.4 * torch.sin(y) + phase) * torch.cos(0.8 * y + 0.3 + phase) + 0.1 * torch.cos(0.15 * points.sum(-1))
    return image[None]


def smooth_pair(d: int, size: int) -> tuple[Tensor, Tensor, Grid, Tensor]:
    """Moving and fixed image, grid of 48 mm, and a smooth velocity of unit size that leaves the faces alone."""
    grid = Grid.from_spacing((size,) * d, 48 / size)
    x = grid.coordinates(torch.float64)
    return waves(x), waves(x, 0.2), grid, bend(x, grid, 1.0).movedim(-1, 0)


def rough(d: int, coarse: bool) -> tuple[Linearisation, Grid, Grid]:
    """A small linearisation with missing voxels in both images; the velocity on a lattice of its own, or on the image's."""
    generator = torch.Generator().manual_seed(1)
    grid = Grid.from_spacing((8, 7, 6)[:d], (1.0, 1.5, 2.0)[:d])
    lattice = grid.at_spacing([2.0, 3.0, 4.0][:d]) if coarse else grid
    moving, fixed = torch.rand(2, 1, *grid.shape, generator=generator).unbind(0)
    moving[0, 0], fixed[0, -1] = math.nan, math.nan
    velocity = 0.3 * torch.randn(d, *lattice.shape, generator=generator)
    return linearise(GaussianNoise(), lattice, velocity, moving, fixed, grid), lattice, grid


# The linearised likelihood.


@pytest.mark.usefixtures("float64")
@DIMENSIONS
@NAMES
def test_the_value_is_the_model_s_own_log_density_less_the_velocity_s(d: int, name: str) -> None:
    moving, fixed, grid, unit = smooth_pair(d, 14)
    similarity, velocity = likeness(name, d), 6.0 * unit
    prior = SmoothVelocity(grid, 2.0, 16.0)
    near = linearise(similarity, grid, velocity, moving, fixed, grid)
    state = {"velocity": velocity, **near.latents}
    expected = log_joint(Registration(prior, similarity), state, moving, grid, grid, fixed) - prior.prior().log_prob(velocity)
    assert near.log_joint == pytest.approx(float(expected), rel=1e-9)
    again = linearise(similarity, grid, velocity, moving, fixed, grid, near.latents)
    assert again.log_joint >= near.log_joint - 1e-9


def discrepancy(size: int, size_mm: float, similarity: Similarity, d: int = 2) -> float:
    """Norm of the difference to autograd's gradient, relative to that, in the broad directions that a prior leaves, away from the faces (where
    autograd sees no slope beyond the outermost centres)."""
    moving, fixed, grid, unit = smooth_pair(d, size)
    velocity = size_mm * unit
    near = linearise(similarity, grid, velocity, moving, fixed, grid)
    free = velocity.clone().requires_grad_()
    moved = carried(moving, grid, Velocity(grid, free), grid)
    value = similarity.tempering * similarity.distribution(moved, near.latents).log_prob(fixed).sum()
    (exact,) = torch.autograd.grad(value, free)
    window = torch.cos(math.pi * grid.coordinates(torch.float64) / 48).square().prod(-1)
    broad = (slice(None), *[slice(5)] * d)
    difference, whole = (dct(g * window, d)[broad].norm() for g in (near.gradient - exact, exact))
    return float(difference / whole)


@pytest.mark.usefixtures("float64")
@NAMES
def test_the_gradient_is_autograd_s_to_second_order_in_the_velocity(name: str) -> None:
    large, medium, small = (discrepancy(96, size, likeness(name, 2)) for size in (12.0, 6.0, 3.0))
    assert medium < 0.08
    assert small < 0.03
    # A quarter of the velocity has a sixteenth of the midpoint rule's error, beside what the grid leaves; were it of first order, a quarter.
    assert large > 7 * small


@pytest.mark.usefixtures("float64")
def test_the_gradient_s_error_falls_with_the_grid_s_spacing() -> None:
    coarse, medium, fine = (discrepancy(size, 2.0, GaussianNoise()) for size in (24, 48, 96))
    assert coarse < 0.06
    assert coarse > 2 * medium > 3 * fine


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_the_gradient_in_three_dimensions() -> None:
    coarse, fine = (discrepancy(size, 3.0, GaussianNoise(), 3) for size in (18, 36))
    assert fine < 0.05
    assert coarse > 1.8 * fine


@pytest.mark.usefixtures("float64")
@DIMENSIONS
@pytest.mark.parametrize("coarse", [False, True])
def test_precision_root_and_bound_are_one_positive_matrix(d: int, coarse: bool) -> None:
    near, lattice, grid = rough(d, coarse)
    count, voxels = d * lattice.numel, math.prod(near.elements)
    units = torch.eye(count).reshape(count, d, *lattice.shape)
    precision = near.precision(units).flatten(1)
    torch.testing.assert_close(precision, precision.T)
    assert torch.linalg.eigvalsh(precision).min() > -1e-9 * precision.diagonal().max()
    # Written out: Pᵀ ∇m h ∇mᵀ P with P the interpolation of a velocity at the image's voxels.
    interpolation = torch.stack([sample(u, lattice, grid.coordinates(torch.float64), fill="edge") for u in units])
    along = (near.slopes[0] * interpolation).sum(1).flatten(1)
    torch.testing.assert_close(precision, along @ torch.diag(near.curvature.flatten()) @ along.T)
    root = near.precision_root(torch.eye(voxels).reshape(voxels, *near.elements)).flatten(1)
    torch.testing.assert_close(root.T @ root, precision)
    blocks = near.blocks()
    bound = torch.einsum("de...,be...->bd...", blocks, units).flatten(1)
    spectrum = torch.linalg.eigvalsh(bound - precision)
    assert spectrum.min() > -1e-9 * precision.diagonal().max()
    if not coarse:
        torch.testing.assert_close(bound, precision)
    else:
        assert spectrum.max() > 1e-3


@pytest.mark.usefixtures("float64")
@DIMENSIONS
def test_the_gradient_on_a_lattice_is_that_of_the_interpolated_velocity(d: int) -> None:
    """Pᵀ of the gradient on the image's grid, where nothing moves and both are exact."""
    moving, fixed, grid, _ = smooth_pair(d, 12)
    lattice = grid.at_spacing(8.0)
    near = linearise(GaussianNoise(), lattice, torch.zeros(d, *lattice.shape), moving, fixed, grid)
    fine = linearise(GaussianNoise(), grid, torch.zeros(d, *grid.shape), moving, fixed, grid)
    units = torch.eye(d * lattice.numel).reshape(-1, d, *lattice.shape)
    interpolation = torch.stack([sample(u, lattice, grid.coordinates(torch.float64), fill="edge") for u in units])
    expected = (interpolation * fine.gradient).flatten(1).sum(1)
    torch.testing.assert_close(near.gradient.flatten(), expected)
    assert near.log_joint == pytest.approx(fine.log_joint)


@pytest.mark.usefixtures("float64")
@DIMENSIONS
@NAMES
def test_missing_voxels_say_nothing(d: int, name: str) -> None:
    moving, fixed, grid, unit = smooth_pair(d, 12)
    similarity, velocity = likeness(name, d), 2.0 * unit
    half = (slice(None), slice(0, 6))
    fixed[half] = math.nan
    near = linearise(similarity, grid, velocity, moving, fixed, grid)
    assert math.isfinite(near.log_joint)
    for part in (near.gradient, near.curvature, near.slopes, near.blocks()):
        assert not part.isnan().any()
    # What is more than a step of the flow away from the known half has no force on it, and no weight.
    away = (slice(None), slice(0, 3))
    assert (near.gradient[away] == 0).all()
    assert (near.curvature[away] == 0).all()
    assert (near.gradient[:, 7:-1] != 0).any()
    # And what the moving image is there makes no difference (the correlation's windows included).
    other = moving.clone()
    other[away] += 5.0
    same = linearise(similarity, grid, velocity, other, fixed, grid)
    assert same.log_joint == pytest.approx(near.log_joint)
    everywhere = linearise(similarity, grid, velocity, moving, torch.full_like(fixed, math.nan), grid, near.latents)
    assert (everywhere.gradient == 0).all()
    assert (everywhere.curvature == 0).all()


@pytest.mark.usefixtures("float64")
def test_a_missing_voxel_of_the_moving_image_reaches_no_further_than_its_neighbours() -> None:
    moving, fixed, grid, unit = smooth_pair(2, 16)
    still = torch.zeros_like(unit)
    whole = linearise(GaussianNoise(), grid, still, moving, fixed, grid)
    moving[0, 8, 8] = math.nan
    near = linearise(GaussianNoise(), grid, still, moving, fixed, grid, whole.latents)
    changed = ((near.curvature != 0) != (whole.curvature != 0))[0]
    assert changed[8, 8]
    changed[7:10, 7:10] = False
    assert not changed.any()


# The workflow.


def head_pair(d: int, size_mm: float = 5.0, seed: int = 0) -> tuple[Tensor, Tensor, Grid, Tensor]:
    """A moving head, the same bent, their grid, and where the bend takes the fixed head's voxels. The images are
    known at every point: nothing here is interpolated, nor is the flow made by scaling and squaring.
    """
    grid = Grid.from_spacing((48, 44) if d == 2 else (28, 24, 26), 1.7 if d == 2 else 2.6)
    x = grid.coordinates(torch.float64)
    there = flowed(x, lambda points: bend(points, grid, size_mm))
    generator = torch.Generator().manual_seed(seed)
    images = [head(points, 8.0, 0.25) + 0.02 * torch.randn(grid.shape, generator=generator) for points in (x, there)]
    moving, fixed = (image.clamp_min(0).float() for image in images)
    return moving, fixed, grid, there


def other_contrast(image: Tensor) -> Tensor:
    return (2.5 - image).clamp_min(0) ** 1.5 * (image > 0.3)


def run(moving: Tensor, fixed: Tensor, grid: Grid, moving_grid: Grid | None = None, draws: int = 0, **settings: object) -> RegistrationResult:
    options = replace(RegistrationSettings(), **settings)  # type: ignore[arg-type]
    pair = (Volume.from_grid(moving, moving_grid or grid), Volume.from_grid(fixed, grid))
    return register(*pair, draws=draws, device="cpu", settings=options)


def errors(result: RegistrationResult, grid: Grid, there: Tensor) -> Tensor:
    """Distance to the truth in the head, voxels."""
    x = grid.coordinates(torch.float32)
    within = head(there) > 0.3
    return (result.transform(x) - there).norm(dim=-1)[within] / min(grid.spacing)


@DIMENSIONS
@NAMES
def test_a_known_deformation_is_recovered(d: int, name: str) -> None:
    moving, fixed, grid, there = head_pair(d)
    result = run(moving, other_contrast(fixed) if name == "mixture" else fixed, grid, similarity=name, affine=0)
    before = (there - grid.coordinates(torch.float64)).norm(dim=-1)[head(there) > 0.3] / min(grid.spacing)
    error = errors(result, grid, there)
    assert before.mean() > 0.7
    assert error.mean() < {2: 0.2, 3: 0.4}[d] + 0.2 * (name == "mixture")
    assert error.mean() < 0.6 * before.mean()
    assert result.determinant.min() > 0.2
    assert result.folding == 0
    assert result.correlation[2] > result.correlation[0] or name == "mixture"
    # The inverse undoes it, but for the linear interpolation of steep flows on a lattice of twice the spacing.
    x = grid.coordinates(torch.float32)
    for first, second in ((result.transform, result.inverse), (result.inverse, result.transform)):
        back = (second(first(x)) - x).norm(dim=-1)[head(there) > 0.3] / min(grid.spacing)
        assert back.mean() < 0.1
        assert back.quantile(0.95) < 0.25


@DIMENSIONS
def test_moving_both_headers_changes_nothing_but_the_world(d: int) -> None:
    moving, fixed, grid, _ = head_pair(d)
    values = [30.0, -20.0, 10.0, 0.4, -0.3, 0.5] if d == 3 else [30.0, -20.0, 0.6]
    world = Affine.exp(torch.tensor(values, dtype=torch.float64), d)
    here = run(moving, fixed, grid, affine=0, iterations=(6, 4, 3, 2))
    there = run(moving, fixed, grid.transformed(world.matrix), affine=0, iterations=(6, 4, 3, 2))
    known = ~(here.moved.isnan() | there.moved.isnan())
    assert known.float().mean() > 0.8
    assert (here.moved - there.moved)[known].abs().max() < 0.02 * float(moving.max())
    x = grid.coordinates(torch.float64)
    back = world.inverse()(there.transform(world(x)))
    difference = (back - here.transform(x)).norm(dim=-1) / min(grid.spacing)
    assert difference.max() < 0.05
    torch.testing.assert_close(there.determinant, here.determinant, rtol=0, atol=0.03)


def test_the_seed_fixes_every_bit() -> None:
    moving, fixed, grid, _ = head_pair(2)
    first, again = (run(moving, fixed, grid, draws=3, iterations=(4, 3, 2, 2)) for _ in range(2))
    assert torch.equal(first.moved, again.moved)
    assert first.sd is not None and again.sd is not None
    assert torch.equal(first.sd, again.sd)
    x = grid.coordinates()
    assert torch.equal(first.transform(x), again.transform(x))
    assert (first.sd > 0).all()


@NAMES
def test_a_mask_leaves_the_rest_as_it_is(name: str) -> None:
    """A corner that was not measured, in both images: the rest is found as well as before."""
    moving, fixed, grid, there = head_pair(2)
    if name == "mixture":
        fixed = other_contrast(fixed)
    moving[:, :10], fixed[:12] = math.nan, math.nan
    result = run(moving, fixed, grid, similarity=name, affine=0)
    x = grid.coordinates(torch.float32)
    distance = (result.transform(x) - there).norm(dim=-1) / min(grid.spacing)
    seen = (head(there) > 0.3) & ~fixed.isnan() & ~result.moved.isnan()
    assert seen.sum() > 300
    assert distance[seen].mean() < 0.25 + 0.2 * (name == "mixture")
    assert not result.transform(x).isnan().any()
    assert result.moved[:, :5].isnan().any()
    assert result.folding == 0


def test_what_was_not_measured_is_less_certain() -> None:
    moving, fixed, grid, _ = head_pair(2)
    fixed[:20] = math.nan
    result = run(moving, fixed, grid, draws=12, affine=0, similarity="gaussian")
    assert result.sd is not None
    assert result.sd[:, 3:12].mean() > 3 * result.sd[:, 24:40, 10:34].mean()


def test_an_affine_map_and_a_velocity_together() -> None:
    moving, fixed, grid, there = head_pair(2)
    shift = Affine.exp(torch.tensor([6.0, -5.0, 0.1], dtype=torch.float64), 2)
    result = run(moving, fixed, grid, moving_grid=grid.transformed(shift.matrix))
    assert errors(result, grid, shift(there)).mean() < 0.4
    assert result.correlation[0] < result.correlation[1] < result.correlation[2]
    rigid = run(moving, fixed, grid, moving_grid=grid.transformed(shift.matrix), affine=3, deformable=False)
    assert rigid.velocity is None
    torch.testing.assert_close(rigid.determinant, torch.ones(grid.shape), rtol=0, atol=1e-5)


# Both ways.


@pytest.mark.usefixtures("float64")
@NAMES
def test_both_ways_are_the_mean_of_each_and_opposite_when_the_images_are_exchanged(name: str) -> None:
    moving, fixed, grid, unit = smooth_pair(2, 14)
    similarity, velocity = likeness(name, 2), 3.0 * unit
    there, back = linearise(similarity, grid, velocity, moving, fixed, grid), linearise(similarity, grid, -velocity, fixed, moving, grid)
    both = linearise_both_ways(similarity, grid, velocity, moving, fixed, grid)
    assert both.log_joint == pytest.approx((there.log_joint + back.log_joint) / 2)
    torch.testing.assert_close(both.gradient, (there.gradient - back.gradient) / 2)
    v = torch.randn(2, 2, *grid.shape)
    torch.testing.assert_close(both.precision(v), (there.precision(v) + back.precision(v)) / 2)
    torch.testing.assert_close(both.blocks(), (there.blocks() + back.blocks()) / 2)
    exchanged = linearise_both_ways(similarity, grid, -velocity, fixed, moving, grid)
    torch.testing.assert_close(exchanged.gradient, -both.gradient)
    torch.testing.assert_close(exchanged.blocks(), both.blocks())
    again = linearise_both_ways(similarity, grid, velocity, moving, fixed, grid, both.latents)
    assert again.log_joint >= both.log_joint - 1e-9


@pytest.mark.slow
def test_exchanged_images_have_the_opposite_velocity_where_neither_is_the_reference() -> None:
    grid = Grid.from_spacing((40, 36), 1.6)
    points = grid.coordinates()
    fixed = Volume.from_grid(head(points), grid)
    moving = Volume.from_grid(head(points + bend(points, grid, 4.0)), grid)
    differences = []
    for symmetric in (True, False):
        settings = RegistrationSettings(affine=0, symmetric=symmetric)
        one, other = (register(*pair, settings=settings, device="cpu") for pair in ((moving, fixed), (fixed, moving)))
        assert one.velocity is not None and other.velocity is not None
        assert one.velocity.field.abs().max() > 1.0
        differences.append(float((one.velocity.field + other.velocity.field).norm() / one.velocity.field.norm()))
    assert differences[0] < 1e-3
    assert differences[1] > 10 * differences[0]
