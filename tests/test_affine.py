"""Affine alignment of two images against known maps."""

from __future__ import annotations

import math

import pytest
import torch
from phantoms import head
from torch import Tensor

from probmed.grids import Grid, sample
from probmed.inference.affine import _interpolated, _JointHistogram, align_images, mutual_information
from probmed.transforms import Affine

pytestmark = pytest.mark.usefixtures("float64")

DIMENSIONS = pytest.mark.parametrize("d", [2, 3])
SPACING = 2.0


def head_grid(d: int) -> Grid:
    return Grid.from_spacing((44, 40, 36)[:d], SPACING)


def known_map(d: int, count: int | None = None) -> Affine:
    """Shift, turn, scales and shears; or the first ``count`` of these."""
    values = [5.0, -4.0, 3.0, 0.1, -0.12, 0.15, 0.08, -0.06, 0.05, 0.04, -0.03, 0.05]
    values = values if d == 3 else [5.0, -4.0, 0.15, 0.08, -0.06, 0.05]
    if count is not None:
        values = [v if i < count else 0.0 for i, v in enumerate(values)]
    return Affine.exp(torch.tensor(values), d)


def scans(d: int, map_: Affine) -> tuple[Tensor, Tensor, Grid]:
    """A fixed head, and the moving one that ``map_`` takes it to; float32, as scans are."""
    grid = head_grid(d)
    x = grid.coordinates(torch.float64)
    return head(x).float(), head(map_.inverse()(x)).float(), grid


def errors(found: Tensor, truth: Affine, grid: Grid) -> Tensor:
    """Distance between two maps at every voxel of the head, voxels."""
    x = grid.coordinates(torch.float64)
    x = x[head(x) > 0.3]
    return (Affine(found)(x) - truth(x)).norm(dim=-1) / SPACING


# The alignment computes in float32 whatever the default.
@pytest.fixture(autouse=True)
def float32_inside(float64: None) -> None:
    torch.set_default_dtype(torch.float32)


def test_mutual_information_of_independent_and_of_identical_variables() -> None:
    p, q = torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([0.6, 0.4]).double()
    assert mutual_information(7 * p[:, None] * q).item() == pytest.approx(0, abs=1e-6)
    entropy = -(p * p.log()).sum().item()
    assert mutual_information(torch.diag(3 * p)).item() == pytest.approx(entropy, abs=1e-6)


@pytest.mark.parametrize("shape", [(6, 5), (6, 1), (5, 4, 6), (5, 1, 6)])
def test_interpolation_and_its_slopes_are_those_of_sample(shape: tuple[int, ...]) -> None:
    """Also beyond the edge, of an image that lies otherwise in memory, and along an axis of one voxel."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(shape[::-1], generator=generator, dtype=torch.float64).permute(*reversed(range(len(shape))))
    grid = Grid(shape, torch.eye(len(shape) + 1))
    positions = 9 * torch.rand(200, len(shape), generator=generator, dtype=torch.float64) - 2
    positions.requires_grad_()
    expected = sample(image[None], grid, positions, fill="edge")[0]
    (slopes,) = torch.autograd.grad(expected.sum(), positions)
    value, found = _interpolated(image, positions.detach().T)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(found.T, slopes)


def test_the_joint_histogram_and_its_gradient() -> None:
    """Every point is shared by two cells; the derivative is that of finite differences."""
    generator = torch.Generator().manual_seed(0)
    bins, count = 5, 40
    image = (bins - 1 - 1e-4) * torch.rand(7, 6, 5, generator=generator, dtype=torch.float64)
    points = torch.cat([8 * torch.rand(3, count, generator=generator, dtype=torch.float64) - 1, torch.ones(1, count).double()])
    first = bins * torch.randint(0, bins, (count,), generator=generator)
    matrix = torch.eye(3, 4, dtype=torch.float64) + 0.1 * torch.rand(3, 4, generator=generator, dtype=torch.float64)
    joint = _JointHistogram.apply(matrix, points, first, image, bins)
    rows = torch.bincount(first // bins, minlength=bins).double()
    torch.testing.assert_close(joint.reshape(bins, bins).sum(1), rows)
    value = _interpolated(image, matrix @ points)[0]
    torch.testing.assert_close((joint.reshape(bins, bins) @ torch.arange(bins).double()).sum(), value.sum())
    matrix.requires_grad_()
    assert torch.autograd.gradcheck(lambda m: _JointHistogram.apply(m, points, first, image, bins), (matrix,))


@DIMENSIONS
def test_a_translation_is_recovered_to_a_twentieth_of_a_voxel(d: int) -> None:
    shift = Affine.exp(torch.tensor([4.2, -3.1, 2.6][:d] + [0.0] * (d * (d - 1) // 2)).double(), d)
    fixed, moving, grid = scans(d, shift)
    assert errors(torch.eye(d + 1).double(), shift, grid).min() > 2
    found = align_images(fixed, grid, moving, grid, parameters=d * (d + 1) // 2)
    assert errors(found.matrix, shift, grid).max() < 0.05


@DIMENSIONS
@pytest.mark.parametrize("inverted", [False, True])
def test_an_affine_map_is_recovered_also_between_contrasts(d: int, inverted: bool) -> None:
    truth = known_map(d)
    fixed, moving, grid = scans(d, truth)
    assert errors(torch.eye(d + 1).double(), truth, grid).mean() > 2.5
    found = align_images(fixed, grid, 1.5 - 0.7 * moving if inverted else moving, grid)
    error = errors(found.matrix, truth, grid)
    assert error.mean() < 0.25
    assert error.max() < 0.4


@DIMENSIONS
def test_the_number_of_parameters_is_respected(d: int) -> None:
    fixed, moving, grid = scans(d, known_map(d))
    rigid = d * (d + 1) // 2
    eye = torch.eye(d, dtype=torch.float64)
    turn = align_images(fixed, grid, moving, grid, parameters=rigid).matrix[:d, :d]
    torch.testing.assert_close(turn @ turn.T, eye, rtol=0, atol=1e-5)
    assert torch.linalg.det(turn) > 0
    shrunk = known_map(d).matrix.clone()
    shrunk[:d, :d] *= 0.95
    fixed, moving, grid = scans(d, Affine(shrunk))
    similar = align_images(fixed, grid, moving, grid, parameters=rigid + 1).matrix[:d, :d]
    square = similar @ similar.T
    torch.testing.assert_close(square, square[0, 0] * eye, rtol=0, atol=1e-5)
    assert abs(float(square[0, 0]) - 1) > 0.01
    full = align_images(fixed, grid, moving, grid).matrix[:d, :d]
    square = full @ full.T
    assert (square - square[0, 0] * eye).abs().max() > 0.05


@DIMENSIONS
def test_moving_the_world_moves_the_answer_with_it(d: int) -> None:
    """Patients lie anywhere in a scanner: both headers transformed by one rigid map change nothing else."""
    fixed, moving, grid = scans(d, known_map(d))
    values = [30.0, -20.0, 10.0, 0.4, -0.3, 0.5] if d == 3 else [30.0, -20.0, 0.6]
    world = Affine.exp(torch.tensor(values).double(), d).matrix
    here = align_images(fixed, grid, moving, grid)
    there = align_images(fixed, grid.transformed(world), moving, grid.transformed(world))
    back = torch.linalg.inv(world) @ there.matrix @ world
    # The two climbs have other axes to climb along, and stop at slightly other places on a flat top.
    assert errors(back, Affine(here.matrix), grid).max() < 0.15
    assert there.information == pytest.approx(here.information, abs=2e-3)


def test_missing_voxels_are_left_out() -> None:
    fixed, moving, grid = scans(2, known_map(2, 3))
    hole = fixed.clone()
    hole[:8] = 1e6
    masked = hole.masked_fill(hole == 1e6, math.nan)
    found = align_images(masked, grid, moving, grid, parameters=3)
    assert errors(found.matrix, known_map(2, 3), grid).max() < 0.1
    assert not torch.isnan(found.matrix).any()


@pytest.mark.parametrize("gap", [0.0, 0.3])
def test_the_joint_histogram_of_what_is_known(gap: float) -> None:
    """Each point counts by the share of its corners that are known, with their mean; the gradient is that of differences."""
    torch.manual_seed(0)
    bins, image = 6, 5 * torch.rand(7, 6, dtype=torch.float64)
    known = (torch.rand(7, 6) >= gap).double()
    points = torch.cat([torch.rand(2, 40, dtype=torch.float64) * 4 + 0.7, torch.ones(1, 40, dtype=torch.float64)])
    first, matrix = bins * torch.randint(bins, (40,)), torch.eye(3, dtype=torch.float64)[:2] + 0.02

    def histogram(m: Tensor, mask: Tensor | None) -> Tensor:
        return _JointHistogram.apply(m, points, first, image if mask is None else image * mask, bins, mask)  # type: ignore[no-any-return]

    if gap == 0:
        torch.testing.assert_close(histogram(matrix, known), histogram(matrix, None))
    else:
        shares, _ = _interpolated(known, matrix @ points)
        assert float(shares.sum()) < 39
        torch.testing.assert_close(histogram(matrix, known).sum(), shares.sum())
    weights = torch.randn(bins * bins, dtype=torch.float64)
    leaf = matrix.clone().requires_grad_()
    (histogram(leaf, known) @ weights).backward()
    assert leaf.grad is not None
    for index in ((0, 0), (1, 2), (0, 1)):
        step = torch.zeros_like(matrix)
        step[index] = 1e-6
        slope = float((histogram(matrix + step, known) - histogram(matrix - step, known)) @ weights) / 2e-6
        assert float(leaf.grad[index]) == pytest.approx(slope, rel=1e-4, abs=1e-4)


@DIMENSIONS
def test_unknown_voxels_of_the_moving_image_are_left_out(d: int) -> None:
    """Not taken for dark ones: a large part of the head is unknown, and the map is nearly what it is with all of it."""
    fixed, moving, grid = scans(d, known_map(d, 3 * (d - 1)))
    masked = moving.clone()
    masked[: 2 * len(moving) // 5] = math.nan
    found = align_images(fixed, grid, masked, grid, parameters=3 * (d - 1))
    assert errors(found.matrix, known_map(d, 3 * (d - 1)), grid).max() < 0.25


def test_unknown_voxels_are_not_dark_ones() -> None:
    """A faint texture, dark in one square of the fixed image and unknown in another of the moving one: the squares are no match of each other."""
    grid = Grid.from_spacing((60, 60), 1.0)
    x = grid.coordinates(torch.float64)
    shift = torch.tensor([4.0, -3.0], dtype=torch.float64)

    def texture(points: Tensor) -> Tensor:
        wave = torch.sin(0.35 * points[..., 0] + torch.sin(0.2 * points[..., 1])) + torch.cos(0.3 * points[..., 1])
        return (1.5 + 0.25 * wave).float()

    def square(points: Tensor, *centre: float) -> Tensor:
        return ((points - torch.tensor(centre)).abs() < 9).all(-1)

    torch.manual_seed(0)
    fixed = texture(x).masked_fill(square(x, -5.0, 5.0), 0.0) + 0.15 * torch.randn(grid.shape)
    moving = texture(x - shift) + 0.15 * torch.randn(grid.shape)
    masked = moving.masked_fill(square(x, 8.0, -4.0), math.nan)
    truth = Affine(torch.tensor([[1.0, 0.0, 4.0], [0.0, 1.0, -3.0], [0.0, 0.0, 1.0]]))
    off = [float((Affine(align_images(fixed, grid, m, grid, 3).matrix)(x) - truth(x)).norm(dim=-1).mean()) for m in (masked, masked.nan_to_num(0.0))]
    assert off[0] < 1
    assert off[1] > 3


def test_the_seed_fixes_the_result() -> None:
    fixed, moving, grid = scans(2, known_map(2))
    first, again, other = (align_images(fixed, grid, moving, grid, points=800, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.matrix, again.matrix)
    assert not torch.equal(first.matrix, other.matrix)


def test_images_without_overlap_are_refused() -> None:
    fixed, _, grid = scans(2, known_map(2))
    nothing = torch.full_like(fixed, math.nan)
    with pytest.raises(ValueError, match="no overlap"):
        align_images(fixed, grid, nothing, grid)
    with pytest.raises(ValueError, match="no overlap"):
        align_images(nothing, grid, fixed, grid)
