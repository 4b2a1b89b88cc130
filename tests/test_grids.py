"""Grids: where voxels are, derived grids, interpolation."""

from __future__ import annotations

import itertools
import math
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from probmed.grids import Grid, MaskedGrid, channels_last, resample, sample

aff2axcodes: Any = nib.aff2axcodes
OBLIQUE = torch.tensor(
    [[1.8, -0.3, 0.2, -11.0], [0.4, 0.9, -0.5, 7.0], [-0.1, 0.3, 3.1, 20.0], [0.0, 0.0, 0.0, 1.0]],
    dtype=torch.float64,
)
SHEARED_2D = torch.tensor([[0.7, 0.2, 3.0], [-0.1, 1.4, -5.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
# No deadline: the first call of some torch functions is slow.
PROPERTY = settings(max_examples=40, deadline=None)


@st.composite
def grids(draw: st.DrawFn, largest: int = 6) -> Grid:
    """Any number of axes, shape, axis order, spacing, obliqueness and origin; left-handed ones too."""
    d = draw(st.sampled_from((2, 3)))
    shape = tuple(draw(st.integers(1, largest)) for _ in range(d))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rotation, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    affine = torch.eye(d + 1, dtype=torch.float64)
    affine[:d, :d] = rotation * torch.tensor(
        [draw(st.floats(0.2, 6.0)) for _ in range(d)], dtype=torch.float64
    )
    affine[:d, d] = 100 * torch.randn(d, generator=generator, dtype=torch.float64)
    return Grid(shape, affine)


def planes(points: Tensor) -> Tensor:
    """Two affine functions of the world, ``(2, *size)``: linear interpolation reproduces them."""
    slopes = torch.tensor([0.5, -1.25, 2.0], dtype=points.dtype)[: points.shape[-1]]
    return torch.stack([points @ slopes + 3, points @ slopes.flip(0) - 1])


def test_coordinates_by_hand() -> None:
    grid = Grid((4, 3, 2), OBLIQUE)
    found = grid.coordinates(torch.float64)
    assert found.shape == (4, 3, 2, 3)
    for i, j, k in itertools.product(range(4), range(3), range(2)):
        expected = OBLIQUE.numpy() @ (i, j, k, 1)
        np.testing.assert_allclose(found[i, j, k].numpy(), expected[:3], atol=1e-12)
    assert grid.coordinates().dtype == torch.float32
    assert grid.voxel_coordinates()[3, 2, 1].tolist() == [3, 2, 1]


@PROPERTY
@given(grids())
def test_voxel_and_world_are_inverse(grid: Grid) -> None:
    world = grid.coordinates(torch.float64)
    voxels = grid.voxel_coordinates(torch.float64)
    torch.testing.assert_close(grid.voxel_to_world(voxels), world, atol=1e-9, rtol=0)
    torch.testing.assert_close(grid.world_to_voxel(world), voxels, atol=1e-9, rtol=0)


def test_sizes_of_a_voxel() -> None:
    grid = Grid((5, 6, 7), OBLIQUE)
    expected = np.linalg.norm(OBLIQUE.numpy()[:3, :3], axis=0)
    np.testing.assert_allclose(np.array(grid.spacing), expected)
    assert grid.voxel_volume == pytest.approx(abs(np.linalg.det(OBLIQUE.numpy()[:3, :3])))
    assert (grid.ndim, grid.numel) == (3, 210)
    assert Grid((5, 6), SHEARED_2D).voxel_volume == pytest.approx(0.7 * 1.4 + 0.1 * 0.2)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", list(itertools.product((-1, 1), repeat=3)))
def test_axes_codes_agree_with_nibabel(order: tuple[int, ...], signs: tuple[int, ...]) -> None:
    matrix = np.zeros((3, 3))
    matrix[list(order), range(3)] = np.array(signs) * (0.9, 1.5, 3.0)
    affine = np.eye(4)
    # A tilt of 12 degrees keeps every axis nearest to the same anatomical one.
    angle = math.radians(12)
    tilt = np.array(
        [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]]
    )
    affine[:3, :3] = tilt @ matrix
    codes = Grid((2, 3, 4), torch.from_numpy(affine)).axes_codes
    assert codes == "".join(str(code) for code in aff2axcodes(affine))


def test_from_spacing_is_centred() -> None:
    grid = Grid.from_spacing((4, 5, 6), (1.0, 2.0, 0.5))
    torch.testing.assert_close(
        grid.coordinates(torch.float64).flatten(0, 2).mean(0), torch.zeros(3, dtype=torch.float64)
    )
    assert grid.spacing == (1.0, 2.0, 0.5)
    assert Grid.from_spacing((4, 5), 3.0).spacing == (3.0, 3.0)


@PROPERTY
@given(grids(), st.lists(st.integers(1, 4), min_size=3, max_size=3))
def test_subsampled_voxels_stay_where_they_are(grid: Grid, steps: list[int]) -> None:
    steps = steps[: grid.ndim]
    picked = grid.coordinates(torch.float64)[tuple(slice(None, None, s) for s in steps)]
    coarse = grid.subsampled(steps)
    assert coarse.shape == picked.shape[:-1]
    torch.testing.assert_close(coarse.coordinates(torch.float64), picked, atol=1e-9, rtol=0)


@PROPERTY
@given(grids(), st.data())
def test_cropped_and_padded_voxels_stay_where_they_are(grid: Grid, data: st.DataObject) -> None:
    start = [data.draw(st.integers(0, n - 1)) for n in grid.shape]
    stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, grid.shape, strict=True)]
    kept = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    world = grid.coordinates(torch.float64)
    torch.testing.assert_close(
        grid.cropped(start, stop).coordinates(torch.float64), world[kept], atol=1e-9, rtol=0
    )
    margin = data.draw(st.integers(0, 3))
    padded = grid.padded(margin)
    assert padded.shape == tuple(n + 2 * margin for n in grid.shape)
    inner = padded.coordinates(torch.float64)[tuple(slice(margin, margin + n) for n in grid.shape)]
    torch.testing.assert_close(inner, world, atol=1e-9, rtol=0)
    assert padded.cropped([margin] * grid.ndim, [margin + n for n in grid.shape]) == grid


@PROPERTY
@given(grids(), st.floats(0.3, 8.0))
def test_at_spacing_keeps_the_field_of_view(grid: Grid, spacing: float) -> None:
    other = grid.at_spacing(spacing)
    for corner in itertools.product((0, 1), repeat=grid.ndim):
        here = torch.tensor([n * c - 0.5 for n, c in zip(grid.shape, corner, strict=True)]).double()
        there = torch.tensor([n * c - 0.5 for n, c in zip(other.shape, corner, strict=True)]).double()
        torch.testing.assert_close(other.voxel_to_world(there), grid.voxel_to_world(here), atol=1e-9, rtol=0)
    for size, before, found in zip(grid.shape, grid.spacing, other.spacing, strict=True):
        count = size * before / found
        assert abs(count - max(1, size * before / spacing)) <= 0.5 + 1e-9


def test_padding_by_axis_and_moving() -> None:
    grid = Grid((4, 5, 6), OBLIQUE)
    assert grid.padded((0, 1, 2)).shape == (4, 7, 10)
    move = torch.eye(4, dtype=torch.float64)
    move[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
    moved = grid.transformed(move).coordinates() - grid.coordinates()
    torch.testing.assert_close(moved, torch.tensor([1.0, 2.0, 3.0]).expand_as(moved), atol=1e-4, rtol=0)


def test_equality_is_of_place() -> None:
    grid = Grid((4, 5, 6), OBLIQUE)
    assert grid == Grid((4, 5, 6), OBLIQUE.clone()) and hash(grid) == hash(Grid((4, 5, 6), OBLIQUE))
    moved = OBLIQUE.clone()
    moved[0, 3] += 1
    assert grid != Grid((4, 5, 6), moved)
    assert grid != Grid((4, 5, 7), OBLIQUE)
    assert grid != "grid"


@pytest.mark.parametrize(
    ("shape", "affine", "message"),
    [
        ((4,), torch.eye(2), "2 or 3 axes"),
        ((4, 4, 4, 4), torch.eye(5), "2 or 3 axes"),
        ((4, 0, 4), torch.eye(4), "at least one voxel"),
        ((4, 4), torch.eye(4), r"needs an affine of shape \(3, 3\)"),
        ((4, 4, 4), torch.diag(torch.tensor([1.0, 0.0, 1.0, 1.0])), "finite and invertible"),
        ((4, 4, 4), torch.eye(4) * math.nan, "finite and invertible"),
    ],
)
def test_no_grid(shape: tuple[int, ...], affine: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(shape, affine)


def test_wrong_arguments() -> None:
    grid = Grid.from_spacing((4, 4, 4))
    with pytest.raises(ValueError, match="expected points of 3 coordinates, got 2"):
        grid.voxel_to_world(torch.zeros(5, 2))
    for steps in ((1, 1), (1, 0, 1)):
        with pytest.raises(ValueError, match="expected 3 positive steps"):
            grid.subsampled(steps)
    for spacing in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive spacing"):
            grid.at_spacing(spacing)
    image = torch.zeros(1, 4, 4, 4)
    with pytest.raises(ValueError, match="expected an image of shape"):
        sample(torch.zeros(4, 4, 4), grid, torch.zeros(5, 3))
    with pytest.raises(ValueError, match="points with 3 coordinates, got 2"):
        sample(image, grid, torch.zeros(5, 2))
    with pytest.raises(ValueError, match="mode must be"):
        sample(image, grid, torch.zeros(5, 3), mode="cubic")
    with pytest.raises(ValueError, match="not interpolated"):
        sample(image.long(), grid, torch.zeros(5, 3))
    with pytest.raises(ValueError, match="expected a grid with 3 axes, got 2"):
        resample(image, grid, Grid.from_spacing((4, 4)))


@PROPERTY
@given(grids(), st.integers(0, 2**31))
def test_linear_interpolation_is_exact_on_affine_functions(grid: Grid, seed: int) -> None:
    image = planes(grid.coordinates(torch.float64))
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(20, grid.ndim, generator=generator, dtype=torch.float64)
    points = grid.voxel_to_world(share * (torch.tensor(grid.shape) - 1))
    torch.testing.assert_close(sample(image, grid, points), planes(points), atol=1e-8, rtol=1e-9)
    memory = channels_last(image) if grid.ndim == 3 else image
    torch.testing.assert_close(sample(memory, grid, points), planes(points), atol=1e-8, rtol=1e-9)


@PROPERTY
@given(grids())
def test_resampling_to_the_same_grid_changes_nothing(grid: Grid) -> None:
    image = torch.randn(2, *grid.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(resample(image, grid, grid), image, atol=1e-9, rtol=0)
    assert torch.equal(resample(image, grid, grid, "nearest"), image)
    # Labels that float32 does not hold.
    labels = torch.arange(grid.numel).reshape(1, *grid.shape) + 2**24
    assert torch.equal(resample(labels, grid, grid, "nearest"), labels)


def test_nearest_takes_the_nearest() -> None:
    grid = Grid((5, 4, 3), OBLIQUE)
    values = torch.arange(60).reshape(1, 5, 4, 3)
    offset = torch.tensor([0.4, -0.45, 0.3], dtype=torch.float64)
    points = grid.voxel_to_world(grid.voxel_coordinates(torch.float64) + offset)
    for image in (values, values.to(torch.uint8), values.double(), values.float()):
        found = sample(image, grid, points, "nearest")
        assert found.dtype == image.dtype
        assert torch.equal(found, image)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_outside_the_field_of_view(mode: str) -> None:
    grid = Grid((3, 3, 3), OBLIQUE)
    image = torch.full((1, 3, 3, 3), 5.0)
    image[0, 0, 1, 1] = 8.0
    # Half a voxel beyond the outermost centres belongs to the image, with the outermost value.
    points = grid.voxel_to_world(torch.tensor([[-0.49, 1, 1], [-0.51, 1, 1], [-4.0, 1, 1]]).double())
    for stack in (image, image.double(), channels_last(torch.cat([image, image]).double())[:1]):
        assert sample(stack, grid, points, mode)[0].tolist() == [8, 0, 0]
        assert sample(stack, grid, points, mode, fill=-7.0)[0].tolist() == [8, -7, -7]
        assert sample(stack, grid, points, mode, fill="edge")[0].tolist() == [8, 8, 8]
        assert sample(stack, grid, points, mode, fill=math.nan)[0].isnan().tolist() == [False, True, True]
    labels = sample(image.long(), grid, points, "nearest", fill=3)
    assert labels[0].tolist() == [8, 3, 3]


def test_axes_of_one_voxel() -> None:
    grid = Grid((4, 1, 3), OBLIQUE)
    image = torch.arange(12.0).reshape(1, 4, 1, 3)
    assert torch.allclose(resample(image, grid, grid), image, atol=1e-4)
    within = grid.voxel_to_world(torch.tensor([1.0, 0.4, 2.0]).double())
    assert sample(image.double(), grid, within).item() == pytest.approx(5.0)
    beyond = grid.voxel_to_world(torch.tensor([1.0, 0.6, 2.0]).double())
    assert sample(image.double(), grid, beyond).item() == 0


def test_batches() -> None:
    grid = Grid.from_spacing((3, 4, 5), 2.0)
    images = torch.randn(2, 3, 3, 4, 5, dtype=torch.float64)
    points = torch.randn(2, 7, 3, dtype=torch.float64)
    each = sample(images, grid, points)
    assert each.shape == (2, 3, 7)
    for b in range(2):
        torch.testing.assert_close(each[b], sample(images[b], grid, points[b]))
    # A list of as many points as images is still a list of points.
    both = sample(images, grid, points[0, :2])
    torch.testing.assert_close(both, torch.stack([sample(i, grid, points[0, :2]) for i in images]))
    # So is a target whose first axis is as long as the batch.
    target = Grid.from_spacing((2, 6, 6), 1.5)
    expected = torch.stack([resample(i, grid, target) for i in images])
    torch.testing.assert_close(resample(images, grid, target), expected)
    labels = torch.randint(0, 9, (2, 1, 3, 4, 5))
    expected = torch.stack([resample(i, grid, target, "nearest") for i in labels])
    assert torch.equal(resample(labels, grid, target, "nearest"), expected)


def test_gradients_reach_image_and_points() -> None:
    grid = Grid((4, 3, 5), OBLIQUE)
    image = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    share = torch.rand(6, 3, dtype=torch.float64) * 0.8 + 0.1
    points = grid.voxel_to_world(share * (torch.tensor(grid.shape) - 1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, p: sample(i, grid, p), (image, points), atol=1e-6)


def test_masked_grid_is_a_part() -> None:
    grid = Grid((4, 3, 2), OBLIQUE)
    mask = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(1)) > 0.5
    part = MaskedGrid(grid, mask)
    count = int(mask.sum())
    assert part.shape == (count,) and part.numel == count and part.ndim == 3
    assert part.spacing == grid.spacing and part.voxel_volume == grid.voxel_volume
    torch.testing.assert_close(part.coordinates(), grid.coordinates()[mask], atol=1e-4, rtol=0)
    image = torch.randn(2, 4, 3, 2)
    assert torch.equal(part.gather(image), image[:, mask])
    assert torch.equal(part.scatter(part.gather(image)), image * mask)
    assert grid.lattice is grid and torch.equal(grid.scatter(grid.gather(image)), image)
    with pytest.raises(ValueError, match="expected a bool mask"):
        MaskedGrid(grid, mask.float())
    with pytest.raises(ValueError, match="expected a bool mask"):
        MaskedGrid(grid, mask[:3])
