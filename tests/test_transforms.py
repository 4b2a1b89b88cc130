"""Transforms against matrix exponentials, differential equations and maps with known derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import torch
from cases import oblique_grid
from torch import Tensor

from probmed.fields import GaussianField
from probmed.grids import Grid, channels_last, sample
from probmed.priors import SmoothVelocity
from probmed.transforms import Affine, Composition, Displacement, Transform, Velocity, warp
from probmed.workflows.registration import RegistrationSettings
from probmed.workflows.registration_fit import prior_scales

pytestmark = pytest.mark.usefixtures("float64")


def oblique(d: int, size: int = 12) -> Grid:
    return oblique_grid(d, size, (1.0, 1.5, 2.2), 0.3)


def inside(grid: Grid, margin: int) -> tuple[slice, ...]:
    return (slice(margin, -margin),) * grid.ndim


def field_of(grid: Grid, velocity: Callable[[Tensor], Tensor]) -> Tensor:
    return velocity(grid.coordinates(torch.float64)).movedim(-1, 0)


DIMENSIONS = pytest.mark.parametrize("d", [2, 3])


# Affine maps.


def generator(parameters: list[float], d: int) -> np.ndarray:
    """The Lie algebra written out: translations, rotations, then log scales and shears."""
    m = np.zeros((d + 1, d + 1))
    m[:d, d] = parameters[:d]
    pairs = [(1, 2), (0, 2), (0, 1)] if d == 3 else [(0, 1)]
    rest = parameters[d:]
    for (i, j), angle in zip(pairs, rest, strict=False):
        m[i, j] -= angle
        m[j, i] += angle
    rest = rest[len(pairs) :]
    if len(rest) == 1:
        m[:d, :d] += rest[0] * np.eye(d)
    elif rest:
        m[:d, :d] += np.diag(rest[:d])
        for (i, j), shear in zip(pairs, rest[d:], strict=True):
            m[i, j] += shear
            m[j, i] += shear
    return m


@pytest.mark.parametrize(("d", "count"), [(2, 3), (2, 4), (2, 6), (3, 6), (3, 7), (3, 12)])
def test_affine_exponential_is_scipy_s(d: int, count: int) -> None:
    parameters = 0.3 * torch.randn(count)
    expected = torch.from_numpy(scipy.linalg.expm(generator(parameters.tolist(), d)))
    torch.testing.assert_close(Affine.exp(parameters, d).matrix, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        Affine.exp(-parameters, d).matrix, Affine.exp(parameters, d).inverse().matrix, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("d", "rigid"), [(2, 3), (3, 6)])
def test_rigid_maps_keep_distances_and_similarities_scale_them(d: int, rigid: int) -> None:
    parameters = torch.randn(rigid + 1)
    turn = Affine.exp(parameters[:rigid], d).matrix[:d, :d]
    torch.testing.assert_close(turn @ turn.T, torch.eye(d))
    assert torch.det(turn).item() == pytest.approx(1)
    scaled = Affine.exp(parameters, d).matrix[:d, :d]
    torch.testing.assert_close(scaled @ scaled.T, torch.exp(2 * parameters[-1]) * torch.eye(d))


def test_rotation_parameters_are_angles_and_turn_about_the_centre() -> None:
    angle, centre = 0.4, torch.tensor([3.0, -2.0])
    matrix = Affine.exp(torch.tensor([0.0, 0.0, angle]), 2).matrix[:2, :2]
    c, s = math.cos(angle), math.sin(angle)
    torch.testing.assert_close(matrix, torch.tensor([[c, -s], [s, c]]))
    about = Affine.exp(torch.tensor([0.0, 0.0, angle]), 2, centre)
    torch.testing.assert_close(about(centre), centre)
    torch.testing.assert_close(about(centre + torch.tensor([1.0, 0.0])), centre + torch.tensor([c, s]))
    turn = Affine.exp(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, angle]))
    torch.testing.assert_close(turn(torch.tensor([1.0, 0.0, 0.0])), torch.tensor([c, s, 0.0]))


def test_batched_affines_are_stacks_of_single_ones() -> None:
    parameters = 0.3 * torch.randn(3, 12)
    batch = Affine.exp(parameters)
    points, own = torch.randn(5, 4, 3), torch.randn(3, 5, 3)
    for index in range(3):
        single = Affine.exp(parameters[index])
        torch.testing.assert_close(batch.matrix[index], single.matrix)
        torch.testing.assert_close(batch(points)[index], single(points))
        torch.testing.assert_close(batch(own)[index], single(own[index]))
        torch.testing.assert_close(batch.inverse()(batch(own))[index], own[index])


def test_affine_exponential_has_gradients() -> None:
    points = torch.randn(4, 3)
    inputs = (0.3 * torch.randn(12, requires_grad=True), torch.randn(3, requires_grad=True))
    assert torch.autograd.gradcheck(lambda p, c: Affine.exp(p, 3, c)(points), inputs)


# Composition.


@DIMENSIONS
def test_product_is_the_left_after_the_right_and_its_inverse_undoes_it(d: int) -> None:
    grid = oblique(d)
    a, b = (Affine.exp(0.2 * torch.randn(6 if d == 2 else 12), d) for _ in range(2))
    shift = Displacement(grid, torch.ones(d, *grid.shape))
    points = torch.randn(7, d)
    torch.testing.assert_close((a @ b)(points), a(b(points)))
    assert isinstance(a @ b, Affine)
    chain = a @ shift @ b
    assert isinstance(chain, Composition)
    assert chain.transforms == (a, shift, b)
    torch.testing.assert_close(chain(points), a(b(points) + 1))
    assert not torch.allclose(chain(points), (b @ shift @ a)(points))
    torch.testing.assert_close(chain.inverse()(chain(points)), points, rtol=0, atol=1e-3)
    assert (chain @ chain.inverse()).ndim == d
    with pytest.raises(ValueError, match="one dimension"):
        Composition((Affine.identity(2), Affine.identity(3)))


def test_transform_times_something_else_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        Affine.identity(2) @ 3  # type: ignore[operator]


@DIMENSIONS
def test_a_chain_on_a_grid_is_one_displacement(d: int) -> None:
    grid = oblique(d)
    map_ = Affine.exp(0.1 * torch.randn(6 if d == 2 else 12), d)
    field = map_.displacement_on(grid, torch.float64)
    points = grid.coordinates(torch.float64)
    torch.testing.assert_close(field(points), map_(points))
    # Linear interpolation of a linear map is exact between voxels too.
    between = points[inside(grid, 1)] + 0.2
    torch.testing.assert_close(field(between), map_(between))


# Flows.


@DIMENSIONS
def test_flow_of_an_affine_velocity_is_the_matrix_exponential(d: int) -> None:
    grid = oblique(d)
    # A contraction with rotation, so that paths stay inside the grid, where the velocity is exactly affine.
    linear = torch.tensor([[-0.3, 0.2, 0.0], [-0.25, -0.2, 0.1], [0.0, 0.05, -0.4]])[:d, :d]
    shift = torch.tensor([0.3, -0.2, 0.1])[:d]
    velocity = Velocity(grid, field_of(grid, lambda x: x @ linear.T + shift))
    full = torch.zeros(d + 1, d + 1)
    full[:d, :d], full[:d, d] = linear, shift
    points = grid.coordinates(torch.float64)[inside(grid, 1)]
    expected = Affine(torch.linalg.matrix_exp(full))(points)
    error = (velocity(points) - expected).norm(dim=-1) / min(grid.spacing)
    moved = (expected - points).norm(dim=-1)
    assert moved.max() > 2
    assert error.max() < 0.1
    assert error.mean() < 0.02


@DIMENSIONS
def test_flow_is_the_solution_of_its_differential_equation(d: int) -> None:
    grid = oblique(d)
    frequency = torch.randn(d, d) * 0.1

    def velocity(x: Tensor) -> Tensor:
        return 1.5 * torch.sin(x @ frequency.T + torch.arange(d))

    flow = Velocity(grid, field_of(grid, velocity))
    points = grid.coordinates(torch.float64)[inside(grid, 3)].reshape(-1, d)
    solution = scipy.integrate.solve_ivp(
        lambda _, y: velocity(torch.from_numpy(y).reshape(-1, d)).numpy().ravel(),
        (0, 1), points.numpy().ravel(), rtol=1e-8, atol=1e-8,
    )  # fmt: skip
    expected = torch.from_numpy(solution.y[:, -1]).reshape(-1, d)
    assert (expected - points).norm(dim=-1).max() > 1.2
    # What is left is the linear interpolation of a curved field.
    assert (flow(points) - expected).norm(dim=-1).max() < 0.05 * max(grid.spacing)


def inconsistency(velocity: Velocity) -> float:
    """How far exp(v) ∘ exp(-v) and exp(-v) ∘ exp(v) move points, voxels."""
    grid, flow = velocity.grid, velocity.exp()
    points = grid.coordinates(torch.float64)[inside(grid, 3)]
    assert (flow(points) - points).norm(dim=-1).max() > 1
    pairs = ((flow, flow.inverse()), (flow.inverse(), flow))
    return max(float((back(there(points)) - points).norm(dim=-1).max()) for there, back in pairs) / min(
        grid.spacing
    )


@pytest.mark.parametrize(("spacing_mm", "bound"), [(3.0, 0.05), (6.0, 0.08)])
def test_default_flows_and_their_inverses_undo_each_other(spacing_mm: float, bound: float) -> None:
    """To 0.05 voxel of 3 mm for what a fit with the default prior finds: the covariance applied to forces."""
    grid = Grid.from_spacing((12, 12, 12), spacing_mm)
    component = SmoothVelocity(grid)
    prior = component.prior()
    for _ in range(3):
        forces = torch.randn(3, *grid.shape) * (torch.rand(grid.shape) < 0.05)
        mode = prior.covariance_matvec(forces)
        mode = component.sd_mm * mode / mode.square().mean().sqrt()
        assert inconsistency(Velocity(grid, mode)) < bound


@pytest.mark.parametrize(("alpha", "bound"), [(3.0, 0.05), (2.0, 0.4)])
@pytest.mark.parametrize("spacing_mm", [3.0, 6.0])
def test_random_flows_and_their_inverses_undo_each_other(
    spacing_mm: float, alpha: float, bound: float
) -> None:
    """Draws of the prior, default sd and length: to 0.05 voxel where differentiable (α = 3). In 3D with
    α = 2 they are continuous and no more, and what interpolation between voxels leaves out is visible.
    """
    grid = Grid.from_spacing((12, 12, 12), spacing_mm)
    prior = SmoothVelocity(grid, alpha=alpha).prior()
    assert max(inconsistency(Velocity(grid, prior.rsample())) for _ in range(3)) < bound


def test_default_flows_do_not_fold() -> None:
    grid = Grid.from_spacing((12, 12, 12), 3.0)
    prior = SmoothVelocity(grid).prior()
    for _ in range(3):
        flow = Velocity(grid, prior.rsample()).exp()
        assert flow.jacobian_determinant(grid, torch.float64).min() > 0
        assert flow.inverse().jacobian_determinant(grid, torch.float64).min() > 0


@pytest.mark.parametrize(("d", "size", "spacing_mm"), [(2, 64, 1.0), (2, 48, 4.0), (3, 32, 1.75), (3, 32, 3.5), (3, 20, 2.0)])
def test_draws_of_the_default_prior_of_registration_do_not_fold(d: int, size: int, spacing_mm: float) -> None:
    grid = Grid.from_spacing((size,) * d, spacing_mm)
    prior = SmoothVelocity(grid, *prior_scales(grid), alpha=RegistrationSettings().alpha).prior()
    for _ in range(10):
        flow = Velocity(grid, prior.rsample()).exp()
        assert flow.field.abs().max() > 2
        for each in (flow, flow.inverse()):
            assert each.jacobian_determinant(grid, torch.float64).min() > 0


@pytest.mark.parametrize(("d", "size", "spacing_mm"), [(2, 64, 1.0), (3, 24, 1.75), (3, 24, 3.5)])
def test_exact_inverses_of_draws_of_registration_s_default_prior_undo_them(d: int, size: int, spacing_mm: float) -> None:
    """At every node whose path stays on the grid to 0.05 voxel, which exp(−v) is far from."""
    grid = Grid.from_spacing((size,) * d, spacing_mm)
    prior = SmoothVelocity(grid, *prior_scales(grid), alpha=RegistrationSettings().alpha).prior()
    x = grid.coordinates(torch.float64)
    inner = tuple(slice(4, -4) for _ in range(d))
    for _ in range(3):
        known = Velocity(grid, prior.rsample()).exp()
        exact = known.with_exact_inverse()
        off, before = ((flow(flow.inverse()(x)) - x).norm(dim=-1) / spacing_mm for flow in (exact, known))
        assert off[inner].max() < 0.05
        assert before[inner].max() > 0.08
        assert (off <= before + 1e-9).all()


@DIMENSIONS
def test_squarings_follow_the_largest_velocity(d: int) -> None:
    grid = oblique(d)
    assert Velocity(grid, torch.zeros(d, *grid.shape)).squarings() == 0
    assert Velocity(grid, torch.zeros(d, *grid.shape)).exp().field.abs().max() == 0
    for largest in (0.1, 1.0, 9.0):
        velocity = Velocity(grid, torch.full((d, *grid.shape), largest))
        assert largest / 2 ** velocity.squarings() <= 0.25 * min(grid.spacing) + 1e-12
        # A constant velocity moves everything by itself, to the edge and beyond.
        torch.testing.assert_close(velocity.exp().field, velocity.field)
    with pytest.raises(ValueError, match="NaN"):
        Velocity(grid, torch.full((d, *grid.shape), torch.nan)).exp()


def test_exponential_gives_its_inverse_and_inverting_it_again_gives_it_back() -> None:
    grid = oblique(2)
    velocity = Velocity(grid, 0.5 * torch.randn(2, *grid.shape))
    flow = velocity.exp()
    torch.testing.assert_close(flow.inverse().field, velocity.inverse().exp().field)
    assert flow.inverse().inverse().field is flow.field
    assert velocity.exp(both=False).opposite is None


@DIMENSIONS
def test_batched_flows_are_stacks_of_single_ones(d: int) -> None:
    grid = oblique(d, 6)
    fields = GaussianField.from_sd(grid.shape, grid.spacing, 1.5, 5.0, channels=d).rsample((3,))
    image, points = torch.rand(3, 2, *grid.shape), torch.randn(4, 5, d)
    largest = fields.abs().flatten(1).amax(1).argmax()
    batch = Velocity(grid, fields).exp()
    warped = warp(image, grid, batch, grid)
    determinant = batch.jacobian_determinant(grid, torch.float64)
    assert batch.field.shape == (3, d, *grid.shape)
    # The number of squarings is that of the largest member.
    single = Velocity(grid, fields[largest]).exp()
    torch.testing.assert_close(batch.field[largest], single.field)
    torch.testing.assert_close(batch(points)[largest], single(points))
    for index in range(3):
        alone = Displacement(grid, batch.field[index])
        torch.testing.assert_close(warped[index], warp(image[index], grid, alone, grid))
        torch.testing.assert_close(determinant[index], alone.jacobian_determinant(grid, torch.float64))


@DIMENSIONS
def test_flow_has_a_gradient_in_the_velocity(d: int) -> None:
    grid = oblique(d, 5 if d == 2 else 4)
    points = grid.coordinates(torch.float64)[inside(grid, 1)] + 0.13
    field = (0.4 * torch.randn(d, *grid.shape)).requires_grad_()
    # Both are piecewise smooth: the step is small enough not to cross a kink at this seed.
    assert torch.autograd.gradcheck(lambda v: Velocity(grid, v).exp().field, (field,), eps=1e-7, atol=1e-5)
    assert torch.autograd.gradcheck(lambda v: Velocity(grid, v)(points), (field,), eps=1e-7, atol=1e-5)


# Jacobians.


class Quadratic(Transform):
    """x ↦ L x + Q(x, x): central differences are exact on it."""

    def __init__(self, d: int) -> None:
        self._d = d
        self.linear = torch.eye(d) + 0.2 * torch.randn(d, d)
        half = 0.01 * torch.randn(d, d, d)
        self.quadratic = half + half.mT

    @property
    def ndim(self) -> int:
        return self._d

    def __call__(self, points: Tensor) -> Tensor:
        return points @ self.linear.T + torch.einsum("abc,...b,...c->...a", self.quadratic, points, points)

    def derivative(self, points: Tensor) -> Tensor:
        return self.linear + 2 * torch.einsum("abc,...c->...ab", self.quadratic, points)


@DIMENSIONS
def test_jacobian_is_that_of_the_map_on_an_oblique_anisotropic_grid(d: int) -> None:
    grid, map_ = oblique(d), Quadratic(d)
    where = inside(grid, 1)
    expected = map_.derivative(grid.coordinates(torch.float64))[where]
    torch.testing.assert_close(map_.jacobian(grid, torch.float64)[where], expected)
    determinant = map_.jacobian_determinant(grid, torch.float64)[where]
    torch.testing.assert_close(determinant, torch.det(expected))
    assert determinant.std() > 0.05


@DIMENSIONS
def test_determinant_of_an_affine_map_is_its_own_everywhere(d: int) -> None:
    grid = oblique(d)
    map_ = Affine.exp(0.3 * torch.randn(6 if d == 2 else 12), d)
    determinant = map_.jacobian_determinant(grid, torch.float64)
    torch.testing.assert_close(determinant, torch.det(map_.matrix).expand(grid.shape))
    field = map_.displacement_on(grid, torch.float64)
    torch.testing.assert_close(field.jacobian_determinant(grid, torch.float64), determinant)


def test_reflection_has_a_negative_determinant_and_a_plane_none() -> None:
    grid = oblique(3)
    mirror = Affine(torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0])))
    torch.testing.assert_close(mirror.jacobian_determinant(grid, torch.float64), -torch.ones(grid.shape))
    with pytest.raises(ValueError, match="at least two voxels"):
        mirror.jacobian_determinant(Grid.from_spacing((4, 4, 1)))


# Displacements.


@DIMENSIONS
def test_inverse_of_a_displacement_is_its_fixed_point(d: int) -> None:
    grid = oblique(d)
    field = GaussianField.from_sd(grid.shape, grid.spacing, 1.0, 12.0, alpha=3.0, channels=d).rsample()
    there = Displacement(grid, field)
    back = there.inverse()
    points = grid.coordinates(torch.float64)
    # The inverse's own samples are exact; between them it is interpolated.
    assert (there(back(points)) - points).norm(dim=-1).max() < 1e-3
    middle = points[inside(grid, 3)]
    assert (back(there(middle)) - middle).norm(dim=-1).max() < 0.1 * max(grid.spacing)
    assert (there(middle) - middle).norm(dim=-1).max() > 0.5


def test_folded_displacement_has_no_inverse() -> None:
    grid = Grid.from_spacing((10, 10))
    folded = Displacement(grid, 4 * torch.randn(2, 10, 10))
    assert folded.jacobian_determinant(grid, torch.float64).min() < 0
    with pytest.raises(ValueError, match="no inverse"):
        folded.inverse()


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 4, 5), (1, 1, 2, 4, 4)])
def test_fields_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    grid = Grid.from_spacing((4, 4))
    for kind in (Displacement, Velocity):
        with pytest.raises(ValueError, match="expected a field of shape"):
            kind(grid, torch.zeros(shape))


# Warping.


@DIMENSIONS
def test_warp_by_whole_voxels_shifts_and_fills(d: int) -> None:
    grid = oblique(d)
    image = torch.rand(2, *grid.shape)
    step = torch.eye(d + 1)
    step[:d, d] = grid.affine[:d, 0]
    moved = warp(image, grid, Affine(step), grid, fill=-7.0)
    torch.testing.assert_close(moved[:, :-1], image[:, 1:])
    assert (moved[:, -1] == -7).all()
    torch.testing.assert_close(warp(image, grid, Affine(step), grid, fill="edge")[:, -1], image[:, -1])
    torch.testing.assert_close(warp(image, grid, Affine.identity(d), grid), image)


@DIMENSIONS
def test_warp_of_a_linear_image_is_exact_between_voxels_and_grids(d: int) -> None:
    grid, target = oblique(d), Grid.from_spacing((4, 3, 2)[:d], 0.7)
    slope = torch.randn(d)
    image = (grid.coordinates(torch.float64) @ slope)[None]
    map_ = Affine.exp(0.1 * torch.randn(6 if d == 2 else 12), d)
    expected = map_(target.coordinates(torch.float64)) @ slope
    torch.testing.assert_close(warp(image, grid, map_, target)[0], expected)


@DIMENSIONS
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_warped_labels_are_labels(d: int, dtype: torch.dtype) -> None:
    grid = oblique(d)
    labels = torch.tensor([0, 3, 17, 101], dtype=dtype)[torch.randint(4, (1, *grid.shape))]
    flow = Velocity(grid, GaussianField.from_sd(grid.shape, grid.spacing, 1.5, 6.0, channels=d).rsample())
    moved = warp(labels, grid, flow, grid, mode="nearest")
    assert moved.dtype == dtype
    assert set(moved.unique().tolist()) <= {0, 3, 17, 101}
    assert not torch.equal(moved, labels)
    torch.testing.assert_close(warp(labels, grid, Affine.identity(d), grid, mode="nearest"), labels)


@DIMENSIONS
def test_warp_has_gradients_in_image_and_field(d: int) -> None:
    grid = oblique(d, 5)
    image = torch.rand(2, *grid.shape, requires_grad=True)
    field = (0.3 * torch.randn(d, *grid.shape)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda i, u: warp(i, grid, Displacement(grid, u), grid, fill="edge"),
        (image, field),
        eps=1e-7,
        atol=1e-5,
    )


@pytest.mark.parametrize("fill", [0.0, -3.0, "edge"])
def test_interleaved_channels_interpolate_alike_with_the_same_gradient(fill: float | str) -> None:
    """The fast path for constant images of several channels against the general one."""
    grid = oblique(3, 6)
    image = torch.rand(3, *grid.shape)
    fast = channels_last(image)
    assert fast.shape == image.shape
    assert fast.stride() != image.stride()
    torch.testing.assert_close(fast, image)
    points = (4.5 * torch.randn(40, 3)).requires_grad_()
    expected, found = sample(image, grid, points, fill=fill), sample(fast, grid, points, fill=fill)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(3, 40)
    gradients = [torch.autograd.grad((out * weight).sum(), points)[0] for out in (expected, found)]
    # Where grid_sample has clamped a coordinate it has no slope along it.
    index = grid.world_to_voxel(points.detach())
    whole = ((index > 0) & (index < torch.tensor(grid.shape) - 1)).all(-1)
    assert 5 < whole.sum() < 35
    torch.testing.assert_close(gradients[1], gradients[0])
    inner = points.detach()[whole].requires_grad_()
    assert torch.autograd.gradcheck(lambda p: sample(fast, grid, p, fill=fill), (inner,), eps=1e-7, atol=1e-5)


@DIMENSIONS
def test_float32_in_float32_out(d: int) -> None:
    grid = oblique(d)
    flow = Velocity(grid, torch.randn(d, *grid.shape, dtype=torch.float32)).exp()
    assert flow.field.dtype == torch.float32
    assert warp(torch.rand(1, *grid.shape, dtype=torch.float32), grid, flow, grid).dtype == torch.float32
    assert flow.jacobian_determinant(grid).dtype == torch.float32
