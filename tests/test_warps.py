"""Transform files against ANTs, ITK and nitransforms; `probmed warp` against antsApplyTransforms."""

from __future__ import annotations

import errno
import gzip
import os
import pickle
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from cases import oblique_grid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from results import refused
from torch import Tensor
from typer.testing import CliRunner, Result

from probmed import cli
from probmed.grids import Grid
from probmed.transforms import Affine, Composition, Displacement, Transform
from probmed.volumes import UnusableInput
from probmed.warps import (
    TransformFile,
    inverse_at,
    read_affine,
    read_transform,
    read_transforms,
    read_warp,
    write_affine,
    write_warp,
)

nib: Any = nibabel  # its classes are partly untyped
Array = NDArray[Any]
DIMENSIONS = pytest.mark.parametrize("d", [2, 3])

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["probmed", "warp"])
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["warp", *arguments])


def done(*arguments: str) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


# Grids: what a scanner, a flip, a slice of another plane and a coarse axis make of the axes.


def turned(d: int, angles: Sequence[float], spacing: Sequence[float], signs: Sequence[int], shape: Sequence[int]) -> Grid:
    """A grid of any orientation, its centre near the world's origin."""
    turn = Affine.exp(torch.tensor([*[0.0] * d, *angles], dtype=torch.float64), d).matrix[:d, :d]
    affine = torch.eye(d + 1, dtype=torch.float64)
    affine[:d, :d] = turn * (torch.tensor(spacing, dtype=torch.float64) * torch.tensor(signs))
    affine[:d, d] = 1.5 - affine[:d, :d] @ ((torch.tensor(shape, dtype=torch.float64) - 1) / 2)
    return Grid(tuple(shape), affine)


GRIDS: dict[str, Callable[[int], Grid]] = {
    "straight": lambda d: Grid.from_spacing((20, 18, 16)[:d], 2.0),
    "oblique": lambda d: turned(d, [0.3, -0.2, 0.4] if d == 3 else [0.5], (2.0, 2.0, 2.0)[:d], (1, 1, 1)[:d], (19, 20, 17)[:d]),
    "flipped": lambda d: turned(d, [0.0] * (3 if d == 3 else 1), (2.0, 2.2, 1.8)[:d], (-1, 1, -1)[:d], (18, 17, 19)[:d]),
    "anisotropic": lambda d: turned(d, [0.1] * (3 if d == 3 else 1), (1.1, 3.5, 2.4)[:d], (1, -1, 1)[:d], (30, 11, 14)[:d]),
    "permuted": lambda d: permuted(turned(d, [0.2] * (3 if d == 3 else 1), (2.0, 1.5, 2.5)[:d], (-1, -1, 1)[:d], (17, 21, 14)[:d])),
}


def permuted(grid: Grid) -> Grid:
    """Its axes in another order."""
    order = [*range(1, grid.ndim), 0]
    return Grid(tuple(grid.shape[a] for a in order), grid.affine[:, [*order, grid.ndim]])


def smooth(points: Tensor) -> Tensor:
    """A function of the world with no symmetry, about 0 to 100."""
    weights = torch.tensor([0.11, -0.17, 0.13])[: points.shape[-1]]
    return 50 + 30 * torch.sin(points @ weights) + 20 * torch.cos(points[..., 0] * 0.21 - points[..., -1] * 0.08)


def deformation(grid: Grid, size_mm: float = 3.0) -> Displacement:
    """Smooth, invertible, to about ``size_mm``."""
    x = grid.coordinates(torch.float64)
    parts = [size_mm * torch.sin(0.12 * x[..., a] + 0.1 * x[..., (a + 1) % grid.ndim] + a) for a in range(grid.ndim)]
    return Displacement(grid, torch.stack(parts))


def linear(d: int) -> Affine:
    """A general affine map, mm."""
    parameters = [2.0, -1.5, 1.0, 0.1, -0.2, 0.15, 0.05, -0.1, 0.08, 0.04, -0.03, 0.05]
    chosen = parameters if d == 3 else [2.0, -1.5, 0.2, 0.05, -0.1, 0.04]
    return Affine.exp(torch.tensor(chosen, dtype=torch.float64), d)


def space(grid: Grid) -> Array:
    """The affine of an image in three dimensions."""
    d = grid.ndim
    affine = np.eye(4)
    affine[np.ix_([*range(d), 3], [*range(d), 3])] = grid.affine.numpy()
    return affine


def save(values: Tensor | Array, grid: Grid, name: str) -> str:
    array = values.numpy() if isinstance(values, Tensor) else values
    nib.save(nib.Nifti1Image(array, space(grid), dtype=array.dtype), name)
    return name


def scan(grid: Grid, name: str) -> str:
    return save(smooth(grid.coordinates(torch.float64)).float(), grid, name)


def regions(grid: Grid, name: str, kind: str = "int16") -> str:
    levels = (smooth(grid.coordinates(torch.float64)) / 12).floor()
    return save(levels.numpy().astype(kind), grid, name)


def voxels(name: str) -> Array:
    return np.asarray(nib.load(name).dataobj)


def chain(kind: str, d: int, fixed: Grid) -> tuple[list[str], Transform]:
    """Files in ANTs' order, and what they should amount to."""
    field, affine = deformation(fixed), linear(d)
    write_warp("field.nii.gz", field, fixed, torch.float64)
    write_affine("affine.mat", affine)
    write_affine("affine.txt", affine)
    return {
        "text": (["affine.txt"], affine),
        "binary": (["affine.mat"], affine),
        "warp": (["field.nii.gz"], field),
        "warp after affine": (["field.nii.gz", "affine.mat"], affine @ field),
        "inverse": (["[affine.mat,1]"], affine.inverse()),
        "inverse, warp": (["field.nii.gz", "[affine.mat,1]"], affine.inverse() @ field),
    }[kind]


CHAINS = ("text", "binary", "warp", "warp after affine", "inverse", "inverse, warp")


def by_ants(ants: Any, fixed: str, moving: str, files: Sequence[str], interpolator: str = "linear") -> Array:
    """antsApplyTransforms in float64."""
    parsed = [TransformFile.parse(file) for file in files]
    out = ants.apply_transforms(
        ants.image_read(fixed),
        ants.image_read(moving),
        [str(file.path) for file in parsed],
        interpolator=interpolator,
        whichtoinvert=[file.inverted for file in parsed],
    )
    return np.asarray(out.numpy())


def clear_of_edges(source: Grid, places: Tensor, margin: float = 1e-3) -> Array:
    """Which places, ``(..., d)`` mm, are not within ``margin`` voxels of the boundary of the image."""
    at = source.world_to_voxel(places)
    top = torch.tensor(source.shape, dtype=torch.float64) - 0.5
    return np.asarray((((at + 0.5).abs() > margin) & ((at - top).abs() > margin)).all(-1).numpy())


@DIMENSIONS
@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize(("fixed", "moving"), [("straight", "oblique"), ("oblique", "flipped"), ("flipped", "anisotropic"), ("permuted", "permuted")])
def test_images_and_labels_are_those_of_ants(kind: str, fixed: str, moving: str, d: int) -> None:
    """To 2e-4 of a range of 100, everywhere but at the image's boundary; labels all but those halfway between two voxels."""
    ants = pytest.importorskip("ants")
    target, source = GRIDS[fixed](d), GRIDS[moving](d)
    files, transform = chain(kind, d, target)
    image, atlas, reference = scan(source, "image.nii.gz"), regions(source, "labels.nii.gz"), scan(target, "reference.nii.gz")
    options = [word for file in files for word in ("-t", file)]
    done(image, *options, "-r", reference, "-o", "out.nii.gz")
    done(atlas, *options, "-r", reference, "-o", "parts.nii.gz", "--labels")
    places = transform(target.coordinates(torch.float64))
    clear = clear_of_edges(source, places)
    assert clear.mean() > 0.98
    expected = by_ants(ants, reference, image, files)
    assert (expected != 0).mean() > 0.3
    np.testing.assert_allclose(voxels("out.nii.gz")[clear], expected[clear], rtol=0, atol=2e-4)
    at = source.world_to_voxel(places)
    untied = clear & ((at - at.floor() - 0.5).abs() > 1e-3).all(-1).numpy()
    assert untied.mean() > 0.9
    found = voxels("parts.nii.gz")
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found[untied], by_ants(ants, reference, atlas, files, "nearestNeighbor")[untied])


@DIMENSIONS
def test_points_are_those_of_ants(d: int) -> None:
    """antsApplyTransformsToPoints takes points in LPS from the fixed to the moving world."""
    ants = pytest.importorskip("ants")
    names = ["x", "y", "z"][:d]
    target = GRIDS["oblique"](d)
    files, _ = chain("warp after affine", d, target)
    points = 5 * torch.randn(200, d)
    # Beyond the field ITK moves nothing, and a Displacement like its edge.
    inside = ((target.world_to_voxel(points) + 0.5) / torch.tensor(target.shape)).sub(0.5).abs().amax(-1) < 0.5
    points = points[inside][:100]
    assert len(points) == 100
    flip = np.array([-1, -1, 1])[:d]
    expected = ants.apply_transforms_to_points(d, pd.DataFrame(points.numpy() * flip, columns=names), files, whichtoinvert=[False, False])
    expected = expected[names].to_numpy() * flip
    np.testing.assert_allclose(read_transforms(files)(points).numpy(), expected, rtol=0, atol=1e-5)
    table = pd.DataFrame(points.numpy(), columns=names).assign(name=[f"p{i}" for i in range(100)])
    table.to_csv("points.tsv", sep="\t", index=False)
    options = [word for file in files for word in ("-t", file)]
    done("--points", "points.tsv", *options, "-o", "moving.csv", "--invert")
    moving = pd.read_csv("moving.csv")
    np.testing.assert_allclose(moving[names].to_numpy(), expected, rtol=0, atol=1e-5)
    assert list(moving["name"]) == list(table["name"])
    # And the way of the image brings them back.
    done("--points", "moving.csv", *options, "-o", "back.tsv")
    np.testing.assert_allclose(pd.read_csv("back.tsv", sep="\t")[names].to_numpy(), points.numpy(), rtol=0, atol=1e-4)


def test_points_follow_the_image() -> None:
    """A bright spot, and its coordinates, through the same command end at the same place."""
    grid = GRIDS["oblique"](3)
    centre = torch.tensor([4.0, -3.0, 2.0])
    save(torch.exp(-((grid.coordinates(torch.float64) - centre) ** 2).sum(-1) / 40).float(), grid, "spot.nii.gz")
    pd.DataFrame([centre.tolist()], columns=["x", "y", "z"]).to_csv("spot.csv", index=False)
    options = [word for file in chain("warp after affine", 3, grid)[0] for word in ("-t", file)]
    done("spot.nii.gz", *options, "-r", "spot.nii.gz", "-o", "moved.nii.gz")
    done("--points", "spot.csv", *options, "-o", "moved.csv")
    image = torch.from_numpy(voxels("moved.nii.gz").astype(np.float64))
    brightest = grid.coordinates(torch.float64).reshape(-1, 3)[image.argmax()]
    moved = torch.from_numpy(pd.read_csv("moved.csv").to_numpy())[0]
    assert (brightest - moved).norm() < 2.5  # mm, about a voxel
    assert (centre - moved).norm() > 3


@DIMENSIONS
def test_composite_is_one_field(d: int) -> None:
    """And ANTs takes it for the list."""
    ants = pytest.importorskip("ants")
    target, source = GRIDS["flipped"](d), GRIDS["oblique"](d)
    files, transform = chain("warp after affine", d, target)
    image, reference = scan(source, "image.nii.gz"), scan(target, "reference.nii.gz")
    done("--compose", *(word for file in files for word in ("-t", file)), "-r", reference, "-o", "one.nii.gz")
    assert voxels("one.nii.gz").shape == (*target.shape, *[1] * (4 - d), d)
    points = target.coordinates(torch.float64)
    torch.testing.assert_close(read_warp("one.nii.gz")(points), transform(points), rtol=0, atol=1e-4)
    clear = clear_of_edges(source, transform(points))
    difference = by_ants(ants, reference, image, ["one.nii.gz"]) - by_ants(ants, reference, image, files)
    assert np.abs(difference[clear]).max() < 1e-3
    ours = ants.apply_transforms(
        ants.image_read(reference), ants.image_read(image), files, whichtoinvert=[False, False], compose="ants_"
    )
    torch.testing.assert_close(read_warp(ours)(points), transform(points), rtol=0, atol=1e-4)


@DIMENSIONS
def test_transforms_that_ants_writes(d: int) -> None:
    """Text and binary, with centres, rotations in their own parameters, and a field."""
    ants = pytest.importorskip("ants")
    points = 20 * torch.randn(30, d)
    flip = torch.tensor([-1.0, -1.0, 1.0])[:d]
    centre, shift = [3.0, -4.0, 5.0][:d], [1.0, 2.0, -3.0][:d]
    parameters = {
        "AffineTransform": (torch.eye(d).flatten() + 0.1 * torch.randn(d * d)).tolist() + shift,
        **(
            {"Euler2DTransform": [0.3, *shift], "Rigid2DTransform": [0.3, *shift], "Similarity2DTransform": [1.2, 0.3, *shift]}
            if d == 2
            else {
                "Euler3DTransform": [0.3, -0.2, 0.4, *shift],
                "Similarity3DTransform": [0.1, -0.2, 0.3, *shift, 1.2],
                "QuaternionRigidTransform": [0.1, -0.2, 0.3, (1 - 0.14) ** 0.5, *shift],
            }
        ),
    }
    for kind, values in parameters.items():
        transform = ants.new_ants_transform("double", d, kind)
        fixed = list(transform.fixed_parameters)
        fixed[:d] = centre
        transform.set_fixed_parameters(fixed)
        transform.set_parameters(values)
        expected = torch.tensor([transform.apply_to_point(p) for p in (points * flip).tolist()]) * flip
        for name in (f"{kind}.mat", f"{kind}.txt"):
            ants.write_transform(transform, name)
            assert torch.allclose(read_affine(name)(points), expected, rtol=0, atol=1e-4), name


def itk_orders(sitk: Any) -> dict[str, Any]:
    """Transforms of ITK that antspyx does not make."""
    euler = sitk.Euler3DTransform((3.0, -4.0, 5.0), 0.3, -0.2, 0.4, (1.0, 2.0, -3.0))
    other = sitk.Euler3DTransform(euler)
    other.SetComputeZYX(True)
    versor = sitk.VersorRigid3DTransform((0.0, 0.6, 0.8), 0.7, (1.0, 2.0, -3.0), (3.0, -4.0, 5.0))
    return {"euler": euler, "euler zyx": other, "versor": versor, "translation": sitk.TranslationTransform(3, (1.0, 2.0, -3.0))}


@pytest.mark.parametrize("kind", ["euler", "euler zyx", "versor", "translation"])
@pytest.mark.parametrize("suffix", ["tfm", "mat"])
def test_transforms_that_itk_writes(kind: str, suffix: str) -> None:
    sitk = pytest.importorskip("SimpleITK")
    transform = itk_orders(sitk)[kind]
    sitk.WriteTransform(transform, f"a.{suffix}")
    flip = torch.tensor([-1.0, -1.0, 1.0])
    points = 20 * torch.randn(30, 3)
    expected = torch.tensor([transform.TransformPoint(p) for p in (points * flip).tolist()]) * flip
    torch.testing.assert_close(read_affine(f"a.{suffix}")(points), expected, rtol=0, atol=1e-9)


def test_nitransforms_reads_the_same() -> None:
    """A second reader of the convention, in three dimensions and to its float32."""
    io = pytest.importorskip("nitransforms.io.itk")
    grid = GRIDS["oblique"](3)
    write_affine("a.txt", linear(3))
    write_affine("a.mat", linear(3))
    for name in ("a.txt", "a.mat"):
        np.testing.assert_allclose(io.ITKLinearTransform.from_filename(name).to_ras(), linear(3).matrix.numpy(), atol=1e-5)
    field = deformation(grid)
    write_warp("w.nii.gz", field, grid)
    theirs = io.ITKDisplacementsField.from_image(nib.load("w.nii.gz"))
    np.testing.assert_allclose(theirs.get_fdata(), field.field.movedim(0, -1).numpy(), atol=1e-5)


# Files and back.


@DIMENSIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["w.nii.gz", "w.nii"])
def test_warp_and_back(d: int, dtype: torch.dtype, name: str) -> None:
    grid = oblique_grid(d)
    field = Displacement(grid, torch.randn(d, *grid.shape, dtype=dtype))
    write_warp(name, field, grid, dtype)
    back = read_warp(name)
    assert back.grid == grid
    assert back.field.dtype == dtype
    assert torch.equal(back.field, field.field)
    image = nib.load(name)
    assert image.shape == (*grid.shape, *[1] * (4 - d), d)
    assert int(image.header["intent_code"]) == 1007
    assert image.get_data_dtype() == np.dtype(str(dtype).removeprefix("torch."))


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    d = draw(st.sampled_from([2, 3]))
    shape = draw(st.lists(st.integers(1, 5), min_size=d, max_size=d))
    spacing = draw(st.lists(st.floats(0.25, 8), min_size=d, max_size=d))
    signs = draw(st.lists(st.sampled_from([-1, 1]), min_size=d, max_size=d))
    angles = draw(st.lists(st.floats(-3, 3), min_size=2 * d - 3, max_size=2 * d - 3))
    grid = turned(d, angles, spacing, signs, shape)
    return permuted(grid) if draw(st.booleans()) else grid


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(grid=grids(), seed=st.integers(0, 1000), double=st.booleans(), suffix=st.sampled_from([".nii", ".nii.gz"]))
def test_any_warp_and_back(grid: Grid, seed: int, double: bool, suffix: str) -> None:
    dtype = torch.float64 if double else torch.float32
    generator = torch.Generator().manual_seed(seed)
    field = 10 * torch.randn(grid.ndim, *grid.shape, generator=generator, dtype=dtype)
    write_warp(f"w{suffix}", Displacement(grid, field), grid, dtype)
    back = read_transform(f"w{suffix}")
    assert isinstance(back, Displacement)
    assert torch.equal(back.field, field)
    torch.testing.assert_close(back.grid.affine, grid.affine, rtol=1e-6, atol=1e-6)  # a header's float32


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(d=st.sampled_from([2, 3]), data=st.data(), suffix=st.sampled_from(["txt", "tfm", "mat"]))
def test_any_affine_and_back(d: int, data: st.DataObject, suffix: str) -> None:
    values = data.draw(st.lists(st.floats(-1e3, 1e3), min_size=d * d + d, max_size=d * d + d))
    matrix = torch.eye(d + 1)
    matrix[:d] = torch.tensor(values).reshape(d, d + 1)
    matrix[:d, :d] += 3000 * torch.eye(d)  # invertible: its diagonal dominates
    write_affine(f"a.{suffix}", Affine(matrix))
    back = read_transform(f"a.{suffix}")
    assert isinstance(back, Affine)
    assert torch.equal(back.matrix, matrix)


def test_same_warp_same_bytes() -> None:
    grid = oblique_grid()
    for name in ("a.nii.gz", "b.nii.gz"):
        write_warp(name, linear(3), grid)
    assert Path("a.nii.gz").read_bytes() == Path("b.nii.gz").read_bytes()


def test_names_of_files_are_no_matter() -> None:
    """What a file holds decides."""
    write_affine("a.mat", linear(3))
    os.rename("a.mat", "a.txt")
    assert torch.equal(read_affine("a.txt").matrix, linear(3).matrix)


def test_big_endian_and_float32_binary() -> None:
    title = b"AffineTransform_float_3_3\0"
    values = np.r_[np.eye(3).ravel(), 1, 2, 3].astype(">f4")
    first = struct.pack(">5i", 1010, 12, 1, 0, len(title)) + title + values.tobytes()
    second = struct.pack(">5i", 1010, 3, 1, 0, 6) + b"fixed\0" + np.zeros(3, ">f4").tobytes()
    Path("a.mat").write_bytes(first + second)
    np.testing.assert_array_equal(read_affine("a.mat").matrix[:3, 3].numpy(), [-1, -2, 3])


def test_vectors_of_intent_displacement_are_ras() -> None:
    """As recent versions of ITK have it, and so ANTs."""
    ants = pytest.importorskip("ants")
    grid = GRIDS["straight"](3)
    write_warp("w.nii", Displacement(grid, torch.ones(3, *grid.shape)), grid)
    image = nib.load("w.nii")
    header = image.header.copy()
    header["intent_code"] = 1006
    nib.save(nib.Nifti1Image(np.ones((*grid.shape, 1, 3), np.float32), image.affine, header), "ras.nii.gz")
    assert read_warp("ras.nii.gz").field.unique().tolist() == [1.0]
    scan(grid, "i.nii.gz")
    np.testing.assert_array_equal(by_ants(ants, "i.nii.gz", "i.nii.gz", ["ras.nii.gz"]), by_ants(ants, "i.nii.gz", "i.nii.gz", ["w.nii"]))


def test_order_and_inverses_of_a_list() -> None:
    grid = GRIDS["straight"](3)
    shift = Affine(torch.tensor([[1.0, 0, 0, 4], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    double = Affine(torch.diag(torch.tensor([2.0, 1, 1, 1])))
    write_affine("shift.txt", shift)
    write_affine("double.txt", double)
    write_warp("w.nii.gz", deformation(grid), grid, torch.float64)
    x = torch.tensor([[1.0, 2, 3]])
    assert read_transforms(["shift.txt", "double.txt"])(x)[0, 0] == 10
    assert read_transforms(["double.txt", "shift.txt"])(x)[0, 0] == 6
    assert read_transforms(["[double.txt,1]", "shift.txt"])(x)[0, 0] == 4.5
    assert read_transforms(["[double.txt,0]"])(x)[0, 0] == 2
    # The inverse of a field is one on the same grid, so good to interpolation.
    there = read_transforms(["w.nii.gz", "shift.txt"])(x)
    torch.testing.assert_close(read_transforms(["[shift.txt,1]", "[w.nii.gz,1]"])(there), x, rtol=0, atol=0.05)
    with pytest.raises(ValueError, match="at least one"):
        read_transforms([])


def test_a_file_called_like_an_inverse() -> None:
    Path("[a,1]").write_bytes(b"")
    assert TransformFile.parse("[a,1]") == TransformFile(Path("[a,1]"))
    assert TransformFile.parse("[b,1]") == TransformFile(Path("b"), True)
    assert TransformFile.parse("[b,1]").inverse() == TransformFile(Path("b"))


@DIMENSIONS
def test_inverse_at_points(d: int) -> None:
    grid = GRIDS["anisotropic"](d)
    transform = Composition((linear(d), deformation(grid)))
    points = 5 * torch.randn(50, d)
    torch.testing.assert_close(transform(inverse_at(transform, points)), points, rtol=0, atol=2e-5)
    assert inverse_at(transform, points[:0]).shape == (0, d)
    x = grid.coordinates(torch.float64).movedim(-1, 0)
    stretched = Displacement(grid, 4 * x)
    torch.testing.assert_close(stretched(inverse_at(stretched, points)), points, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="no inverse"):
        inverse_at(Displacement(grid, 30 * torch.randn(d, *grid.shape)), points)


def test_invert_takes_the_whole_list() -> None:
    """There and back gives the image again, to interpolation."""
    grid = GRIDS["straight"](3)
    image = scan(grid, "image.nii.gz")
    files, _ = chain("warp after affine", 3, grid)
    options = [word for file in files for word in ("-t", file)]
    done(image, *options, "-r", image, "-o", "there.nii.gz")
    done("there.nii.gz", *options, "--invert", "-r", image, "-o", "back.nii.gz")
    inner = (slice(5, -5),) * 3
    assert np.abs(voxels("there.nii.gz") - voxels(image))[inner].max() > 20
    assert np.abs(voxels("back.nii.gz") - voxels(image))[inner].max() < 4


# What the output is like.


def test_output_has_the_header_of_the_reference() -> None:
    grid, target = GRIDS["straight"](3), GRIDS["oblique"](3)
    scan(grid, "image.nii.gz")
    write_affine("a.txt", linear(3))
    reference = nib.Nifti1Image(np.zeros((*target.shape, 1), np.uint8), target.affine.numpy())
    reference.set_sform(target.affine.numpy(), 4)
    reference.set_qform(target.affine.numpy(), 1)
    nib.save(reference, "r.nii.gz")  # constant, with a trailing axis: only its voxels' places matter
    result = done("image.nii.gz", "-t", "a.txt", "-r", "r.nii.gz", "-o", "new/folder/out.nii.gz")
    assert "new/folder/out.nii.gz" in result.stdout
    out = nib.load("new/folder/out.nii.gz")
    assert out.shape == reference.shape
    for field in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "pixdim", "xyzt_units"):
        np.testing.assert_array_equal(out.header[field], nib.load("r.nii.gz").header[field])
    assert [path.name for path in Path("new/folder").iterdir()] == ["out.nii.gz"]
    assert done("image.nii.gz", "-t", "a.txt", "-r", "r.nii.gz", "-o", "out.nii.gz", "--quiet").output == ""


@pytest.mark.parametrize(
    ("kind", "out", "expected"),
    [("uint8", "o.nii.gz", "uint8"), ("uint16", "o.nii.gz", "uint16"), ("int64", "o.nii.gz", "int64"),
     ("float32", "o.nii.gz", "uint8"), ("uint16", "o.mgz", "uint8"), ("int32", "o.mgz", "int32")],
)  # fmt: skip
def test_labels_keep_their_type_and_values(kind: str, out: str, expected: str) -> None:
    grid = GRIDS["oblique"](3)
    regions(grid, "l.nii.gz", kind)
    write_affine("a.txt", Affine.identity(3))
    done("l.nii.gz", "-t", "a.txt", "-r", "l.nii.gz", "-o", out, "--labels")
    assert nib.load(out).get_data_dtype().newbyteorder("=") == expected
    np.testing.assert_array_equal(voxels(out), voxels("l.nii.gz"))


def test_large_labels_are_exact() -> None:
    grid = GRIDS["straight"](3)
    save(np.full(grid.shape, 2**24 + 1, np.int32), grid, "l.nii.gz")
    write_affine("a.txt", Affine.identity(3))
    done("l.nii.gz", "-t", "a.txt", "-r", "l.nii.gz", "-o", "o.nii.gz", "--labels")
    assert np.unique(voxels("o.nii.gz")).tolist() == [2**24 + 1]


def test_a_slice_through_a_transform_of_three_dimensions() -> None:
    """One layer of voxels, of any plane; a volume's slice is the same as the volume's."""
    grid, target = GRIDS["straight"](3), GRIDS["straight"](3).cropped((0, 0, 7), (20, 18, 8))
    scan(grid, "image.nii.gz")
    scan(target, "slice.nii.gz")
    save(smooth(target.coordinates(torch.float64))[..., 0].float(), target, "flat.nii.gz")
    write_affine("a.txt", Affine.exp(torch.tensor([1.0, 0.5, 0, 0.1, 0.05, 0])))
    for reference in ("image", "slice", "flat"):
        done("image.nii.gz", "-t", "a.txt", "-r", f"{reference}.nii.gz", "-o", f"to_{reference}.nii.gz")
    np.testing.assert_array_equal(voxels("to_image.nii.gz")[..., 7:8], voxels("to_slice.nii.gz"))
    np.testing.assert_array_equal(voxels("to_image.nii.gz")[..., 7], voxels("to_flat.nii.gz"))
    done("flat.nii.gz", "-t", "a.txt", "-r", "image.nii.gz", "-o", "from_flat.nii.gz")
    assert 0 < (voxels("from_flat.nii.gz") != 0).mean() < 0.5


def test_warps_of_segment_are_read(workplace: Path) -> None:
    """On a coarser grid than the image's; slabs, as of large images, make no difference."""
    grid = Grid.from_spacing((40, 30, 20), 2.0)
    scan(grid, "image.nii.gz")
    write_warp("w.nii.gz", linear(3), grid.at_spacing(3.0))
    done("image.nii.gz", "-t", "w.nii.gz", "-r", "image.nii.gz", "-o", "a.nii.gz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("probmed.cli.warp._SLAB", 1000)
        done("image.nii.gz", "-t", "w.nii.gz", "-r", "image.nii.gz", "-o", "b.nii.gz")
    assert Path("a.nii.gz").read_bytes() == Path("b.nii.gz").read_bytes()


def test_help() -> None:
    result = done("--help")
    assert "Example" in result.stdout
    assert "probmed warp" in result.stdout
    assert "[FILE,1]" in result.stdout


def test_a_warp_is_where_what_comes_to_it_is(files: Path) -> None:
    """Far from the scan, but not from where an affine map before it brings the scan's points."""
    elsewhere()
    with pytest.raises(AssertionError):
        done("image.nii.gz", "-t", "other.nii.gz", "-r", "image.nii.gz", "-o", "o.nii.gz")
    done("image.nii.gz", "-t", "there.txt", "-t", "other.nii.gz", "-t", "[there.txt,1]", "-r", "image.nii.gz", "-o", "o.nii.gz")
    write_affine("by_one.txt", Affine.exp(torch.tensor([1.0, 1, 1, 0, 0, 0])))
    done("image.nii.gz", "-t", "by_one.txt", "-r", "image.nii.gz", "-o", "expected.nii.gz")
    np.testing.assert_allclose(voxels("o.nii.gz"), voxels("expected.nii.gz"), atol=1e-3)


# Bad input.


def patched(source: str, name: str, **fields: Any) -> None:
    """A copy of an image with other values in its header."""
    content = bytearray(nib.load(source).to_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for field, value in fields.items():
        header[field] = value
    content[:348] = header.binaryblock
    Path(name).write_bytes(gzip.compress(bytes(content)))


def text(*lines: str) -> None:
    Path("t").write_text("\n".join(["#Insight Transform File V1.0", "#Transform 0", *lines, ""]))


def cut(name: str, share: float) -> None:
    content = Path(name).read_bytes()
    Path("t").write_bytes(content[: int(len(content) * share)])


def with_nan() -> None:
    values = np.zeros((20, 18, 16, 1, 3), np.float32)
    values[1, 2, 3, 0, 0] = np.nan
    image = nib.Nifti1Image(values, np.eye(4))
    image.header.set_intent("vector")
    nib.save(image, "t.nii.gz")
    os.rename("t.nii.gz", "t")


def binary(name: bytes, values: Array) -> bytes:
    return struct.pack("<5i", 0, len(values), 1, 0, len(name) + 1) + name + b"\0" + values.astype("<f8").tobytes()


IDENTITY = "Parameters: 1 0 0 0 1 0 0 0 1 0 0 0"
CENTRE = "FixedParameters: 0 0 0"
KIND = "Transform: AffineTransform_double_3_3"
TRANSFORM_FAULTS: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "missing": (lambda: None, ("does not exist", "check the path")),
    "folder": (lambda: Path("t").mkdir(), ("is a folder",)),
    "no bytes": (lambda: Path("t").write_bytes(b""), ("0 bytes",)),
    "scan": (lambda: os.link("image.nii.gz", "t"), ("is no warp: its shape is (20, 18, 16)",)),
    "scan of five axes": (lambda: patched("w3.nii.gz", "t", intent_code=0), ("is no warp: its intent code is 0",)),
    "truncated gzip": (lambda: cut("w3.nii.gz", 0.5), ("cut off", "gzip")),
    "truncated warp": (lambda: cut("w3.nii", 0.5), ("cut off or damaged",)),
    "truncated header": (lambda: cut("w3.nii", 0.0022), ("t: ",)),
    "NaN": (with_nan, ("holds 1 vectors that are NaN",)),
    "no place": (lambda: patched("w3.nii.gz", "t", sform_code=0, qform_code=0), ("neither sform nor qform",)),
    "metres": (lambda: patched("w3.nii.gz", "t", xyzt_units=1), ("metres",)),
    "singular sform": (lambda: patched("w3.nii.gz", "t", srow_x=[0, 0, 0, 0]), ("no usable geometry",)),
    "NaN sform": (lambda: patched("w3.nii.gz", "t", srow_x=[np.nan, 0, 0, 0]), ("no usable geometry",)),
    "plain text": (lambda: Path("t").write_text("1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n"), ("is no transform of ITK",)),
    "pickle": (lambda: Path("t").write_bytes(pickle.dumps(np.eye(4))), ("is no transform of ITK",)),
    "zeros": (lambda: Path("t").write_bytes(bytes(100)), ("cut off or damaged",)),
    "HDF5": (lambda: Path("t").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)), ("HDF5", "CompositeTransformUtil")),
    "MATLAB 5": (lambda: Path("t").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200)), ("version 5",)),
    "truncated .mat": (lambda: cut("a3.mat", 0.6), ("cut off or damaged",)),
    ".mat without centre": (lambda: Path("t").write_bytes(binary(b"AffineTransform_double_3_3", np.zeros(12))), ("holds AffineTransform",)),
    "other .mat": (lambda: Path("t").write_bytes(binary(b"x", np.zeros(3)) + binary(b"fixed", np.zeros(3))), ("type 'x'",)),
    "truncated text": (lambda: cut("a3.txt", 0.5), ("cut off or damaged",)),
    "no number": (lambda: text(KIND, IDENTITY + "o", CENTRE), ("no number",)),
    "few parameters": (lambda: text(KIND, "Parameters: 1 0 0", CENTRE), ("12 parameters, the file 3",)),
    "no centre": (lambda: text(KIND, IDENTITY, "FixedParameters:"), ("centre has 0 of 3",)),
    "NaN parameter": (lambda: text(KIND, IDENTITY.replace("1", "nan"), CENTRE), ("NaN",)),
    "singular": (lambda: text(KIND, IDENTITY.replace("1", "0"), CENTRE), ("singular matrix",)),
    "two transforms": (lambda: text(KIND, IDENTITY, CENTRE, "#Transform 1", KIND, IDENTITY, CENTRE), ("holds 2 transforms",)),
    "spline": (lambda: text("Transform: BSplineTransform_double_3_3", IDENTITY, CENTRE), ("BSplineTransform", "not linear")),
    "mixed dimensions": (lambda: text("Transform: Affine_double_2_3", IDENTITY, CENTRE), ("not linear or not known",)),
}  # fmt: skip


@pytest.fixture
def files(workplace: Path) -> Path:
    """An image, and transforms of two and three dimensions."""
    grid = GRIDS["straight"](3)
    scan(grid, "image.nii.gz")
    save(smooth(GRIDS["straight"](2).coordinates(torch.float64)).float(), GRIDS["straight"](2), "flat.nii.gz")
    for d in (2, 3):
        write_affine(f"a{d}.txt", linear(d))
        write_affine(f"a{d}.mat", linear(d))
        for suffix in ("nii", "nii.gz"):
            write_warp(f"w{d}.{suffix}", deformation(GRIDS["straight"](d)), GRIDS["straight"](d))
    return workplace


@pytest.mark.parametrize("fault", TRANSFORM_FAULTS)
def test_unusable_transform(fault: str, files: Path) -> None:
    make, words = TRANSFORM_FAULTS[fault]
    make()
    before = sorted(files.iterdir())
    refused(call("image.nii.gz", "-t", "t", "-r", "image.nii.gz", "-o", "new/out.nii.gz"), "t: ", *words)
    assert sorted(files.iterdir()) == before
    with pytest.raises(UnusableInput):
        read_transform("t")


def far() -> None:
    write_affine("far.txt", Affine.exp(torch.tensor([500.0, 0, 0, 0, 0, 0])))


def elsewhere() -> None:
    """A warp of a scan 300 mm away, and the affine map that takes this one there."""
    grid, shift = GRIDS["straight"](3), torch.eye(4, dtype=torch.float64)
    shift[0, 3] = 300
    moved = grid.transformed(shift)
    write_warp("other.nii.gz", Displacement(moved, torch.ones(3, *moved.shape)), moved)
    write_affine("there.txt", Affine(shift))


def elsewhere_with_points() -> None:
    elsewhere()
    table("x,y,z\n1,2,3\n")


def fold() -> None:
    grid = GRIDS["straight"](3)
    write_warp("fold.nii.gz", Displacement(grid, 30 * torch.randn(3, *grid.shape)), grid)


def save_stack() -> None:
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((4, 4, 4, 3), np.float32), np.eye(4)), "stack.nii.gz")


def tilted() -> None:
    affine = np.eye(4)[[0, 2, 1, 3]]
    nib.save(nib.Nifti1Image(np.arange(20, dtype=np.float32).reshape(5, 4), affine), "coronal.nii.gz")


def table(content: str, name: str = "p.csv") -> None:
    Path(name).write_text(content)


def nothing() -> None:
    """The files are as they are."""


def folding_points() -> None:
    fold()
    table("x,y,z\n" + "".join(f"{x},2,3\n" for x in range(-9, 9)))


ON = " -r image.nii.gz -o o.nii.gz"
Fault = tuple[Callable[[], object], str, tuple[str, ...]]
COMMAND_FAULTS: dict[str, Fault] = {
    "2D warp, 3D image": (
        nothing,
        "image.nii.gz -t w2.nii.gz" + ON,
        ("w2.nii.gz: is two-dimensional", "image.nii.gz"),
    ),
    "2D affine, 3D image": (nothing, "image.nii.gz -t a2.mat" + ON, ("a2.mat: is two-dimensional",)),
    "2D warp, 3D reference": (nothing, "flat.nii.gz -t w2.nii.gz" + ON, ("w2.nii.gz: is two-dimensional",)),
    "2D and 3D": (
        nothing,
        "image.nii.gz -t w3.nii.gz -t a2.txt" + ON,
        ("a2.txt: is two-dimensional, and w3.nii.gz",),
    ),
    "2D warp, coronal slice": (
        tilted,
        "coronal.nii.gz -t a2.txt -r coronal.nii.gz -o o.nii.gz",
        ("coronal.nii.gz: is no axial",),
    ),
    "no overlap": (
        far,
        "image.nii.gz -t far.txt" + ON,
        ("image.nii.gz: does not overlap image.nii.gz", "--invert"),
    ),
    "warp of another place": (
        elsewhere,
        "image.nii.gz -t other.nii.gz" + ON,
        ("other.nii.gz: is a warp of another place", "holds nothing of image.nii.gz", "300 mm from its own", "--invert"),
    ),
    "warp of another place, composed": (
        elsewhere,
        "--compose -t a3.mat -t other.nii.gz -r image.nii.gz -o o.nii.gz",
        ("other.nii.gz: is a warp of another place",),
    ),
    "warp of another place, inverted": (elsewhere, "image.nii.gz -t other.nii.gz --invert" + ON, ("other.nii.gz: is a warp of another place",)),
    "points of another place": (
        elsewhere_with_points,
        "--points p.csv -t other.nii.gz -o o.csv",
        ("other.nii.gz: is a warp of another place", "holds nothing of p.csv"),
    ),
    "points of another place, inverted": (
        elsewhere_with_points,
        "--points p.csv -t other.nii.gz -o o.csv --invert",
        ("other.nii.gz: is a warp of another place",),
    ),
    "folded": (
        fold,
        "image.nii.gz -t fold.nii.gz --invert" + ON,
        ("fold.nii.gz: cannot be inverted", "its inverse"),
    ),
    "folded, by ANTs' mark": (
        fold,
        "image.nii.gz -t [fold.nii.gz,1]" + ON,
        ("fold.nii.gz: cannot be inverted",),
    ),
    "missing image": (nothing, "no.nii.gz -t a3.mat" + ON, ("no.nii.gz: does not exist",)),
    "missing reference": (nothing, "image.nii.gz -t a3.mat -r no.nii -o o.nii", ("no.nii: does not exist",)),
    "image of four axes": (
        save_stack,
        "stack.nii.gz -t a3.mat" + ON,
        ("stack.nii.gz: holds 3 images", "split it"),
    ),
    "reference of four axes": (
        save_stack,
        "image.nii.gz -t a3.mat -r stack.nii.gz -o o.nii",
        ("stack.nii.gz: holds 3",),
    ),
    "labels with fractions": (nothing, "image.nii.gz -t a3.mat --labels" + ON, ("no whole numbers",)),
    "output is the image": (
        nothing,
        "image.nii.gz -t a3.mat -r flat.nii.gz -o image.nii.gz",
        ("image.nii.gz: is an input",),
    ),
    "output is the reference": (nothing, "image.nii.gz -t a3.mat -r w3.nii -o ./w3.nii", ("is an input",)),
    "output is a transform": (
        nothing,
        "image.nii.gz -t w3.nii.gz -r image.nii.gz -o w3.nii.gz",
        ("w3.nii.gz: is an input",),
    ),
    "output is an inverted one": (
        nothing,
        "image.nii.gz -t [w3.nii.gz,1] -r image.nii.gz -o w3.nii.gz",
        ("is an input",),
    ),
    "output is a folder": (
        lambda: Path("d.nii").mkdir(),
        "image.nii.gz -t a3.mat -r image.nii.gz -o d.nii",
        ("d.nii: is a folder",),
    ),
    "output is no image": (
        nothing,
        "image.nii.gz -t a3.mat -r image.nii.gz -o o.png",
        ("o.png: has no suffix",),
    ),
    "output below a file": (
        nothing,
        "image.nii.gz -t a3.mat -r image.nii.gz -o a3.mat/o.nii",
        ("a3.mat: is a file",),
    ),
    "no transform": (nothing, "image.nii.gz" + ON, ("--transform: is missing",)),
    "no reference": (nothing, "image.nii.gz -t a3.mat -o o.nii", ("--reference: is missing",)),
    "no output": (nothing, "image.nii.gz -t a3.mat -r image.nii.gz", ("--out: is missing",)),
    "nothing to carry": (
        nothing,
        "-t a3.mat" + ON,
        ("one thing at a time", "IMAGE, --points and --compose"),
    ),
    "two things to carry": (nothing, "image.nii.gz --compose -t a3.mat" + ON, ("one thing at a time",)),
    "labels of points": (
        nothing,
        "--points p.csv --labels -t a3.mat -o o.csv",
        ("--labels: is for images",),
    ),
    "composite as MGH": (nothing, "--compose -t a3.mat -r image.nii.gz -o o.mgz", ("o.mgz: has no suffix",)),
    "missing points": (nothing, "--points p.csv -t a3.mat -o o.csv", ("p.csv: does not exist",)),
    "points into an image": (
        lambda: table("x,y,z\n1,2,3\n"),
        "--points p.csv -t a3.mat -o o.nii",
        ("o.nii: has no suffix",),
    ),
    "points onto themselves": (
        lambda: table("x,y,z\n1,2,3\n"),
        "--points p.csv -t a3.mat -o p.csv",
        ("is an input",),
    ),
    "points of two axes": (
        lambda: table("x,y\n1,2\n"),
        "--points p.csv -t a3.mat -o o.csv",
        ("p.csv: has no column z", "x, y, z"),
    ),
    "points of three axes": (
        lambda: table("x,y,z\n1,2,3\n"),
        "--points p.csv -t a2.mat -o o.csv",
        ("p.csv: has a column z",),
    ),
    "points of words": (
        lambda: table("x,y,z\n1,2,3\n1,b,3\n"),
        "--points p.csv -t a3.mat -o o.csv",
        ("column y, row 2: 'b'",),
    ),
    "points of infinity": (
        lambda: table("x,y,z\n1,2,inf\n"),
        "--points p.csv -t a3.mat -o o.csv",
        ("column z, row 1",),
    ),
    "points in no table": (lambda: table(""), "--points p.csv -t a3.mat -o o.csv", ("p.csv: has no rows below a row of names",)),
    "points in an image": (nothing, "--points image.nii.gz -t a3.mat -o o.csv", ("no table by its suffix",)),
    "ragged points": (
        lambda: table("x,y,z\n1,2,3,4\n"),
        "--points p.csv -t a3.mat -o o.csv",
        ("has 4 entries in row 1, and 3 names",),
    ),
    "points that fold": (
        folding_points,
        "--points p.csv -t fold.nii.gz -o o.csv",
        ("p.csv: cannot be carried",),
    ),
}


@pytest.mark.parametrize("fault", COMMAND_FAULTS)
def test_unusable_command(fault: str, files: Path) -> None:
    make, arguments, words = COMMAND_FAULTS[fault]
    make()
    before = {path: path.read_bytes() if path.is_file() else b"" for path in files.iterdir()}
    refused(call(*arguments.split()), *words)
    assert {path: path.read_bytes() if path.is_file() else b"" for path in files.iterdir()} == before


@pytest.mark.parametrize("arguments", ["image.nii.gz" + ON, "--compose" + ON, "--points p.csv -o o.csv"])
def test_disk_full(arguments: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table("x,y,z\n1,2,3\n")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("probmed.volumes.files.os.replace", full)
    before = sorted(files.iterdir())
    refused(call(*arguments.split(), "-t", "a3.mat"), "o.", "No space left on device", "free space")
    assert sorted(files.iterdir()) == before


def test_image_of_unknown_place_is_a_warning(files: Path) -> None:
    patched("image.nii.gz", "lost.nii.gz", sform_code=0, qform_code=0)
    result = done("lost.nii.gz", "-t", "a3.mat", *ON.split())
    assert "warning: lost.nii.gz: has neither sform nor qform" in result.stderr


def test_unforeseen_failure_is_1_with_traceback_on_request(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("probmed.cli.warp.pulled", broken)
    for options, shown in ((), False), (("--debug",), True):
        result = call("image.nii.gz", "-t", "a3.mat", *ON.split(), *options)
        assert result.exit_code == 1
        assert ("Traceback" in result.stderr) == shown
    assert not Path("o.nii.gz").exists()


def test_what_cannot_be_written(files: Path) -> None:
    grid = oblique_grid()
    pair = Affine(torch.eye(4).expand(2, 4, 4))
    for call_, message in (
        (lambda: write_warp("o.nii", linear(2), grid), "3 dimensions"),
        (lambda: write_warp("o.nii", pair, grid), "batch"),
        (lambda: write_warp("o.nii", linear(3), grid, torch.int32), "float32 or float64"),
        (lambda: write_warp("o.nii", Affine(torch.full((4, 4), torch.nan)), grid), "finite"),
        (lambda: write_warp("o.mgz", linear(3), grid), "no suffix"),
        (lambda: write_affine("o.nii", linear(3)), "no suffix"),
        (lambda: write_affine("o.txt", pair), "one matrix"),
        (lambda: write_affine("o.txt", Affine(torch.zeros(4, 4))), "invertible"),
        (lambda: write_affine("o.txt", Affine(torch.eye(4) + torch.eye(4)[[1, 2, 3, 0]])), "last row|invertible"),
        (lambda: write_warp("no/o.nii", linear(3), grid), "folder does not exist"),
        (lambda: write_affine("a3.txt", linear(3), ["a3.txt"]), "is an input"),
    ):
        with pytest.raises(ValueError, match=message):
            call_()
    assert not list(files.glob("o.*"))
