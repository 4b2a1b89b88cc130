"""Volumes: scans and label maps through files, in every geometry; every input that cannot be used."""

from __future__ import annotations

import errno
import gzip
import os
import pickle
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from probmed.grids import Grid
from probmed.volumes import (
    UnusableInput,
    Volume,
    atomic_write,
    bids_stem,
    read_label_colours,
    read_label_names,
    read_labels,
    read_scan,
    scaled,
    sha256,
    write_label_names,
    write_labels,
    write_scan,
)

Nifti1Image: Any = nib.Nifti1Image
Nifti2Image: Any = nib.Nifti2Image
MGHImage: Any = nib.MGHImage
Nifti1Header: Any = nib.Nifti1Header
# No deadline: files and first calls are slow at times.
PROPERTY = settings(max_examples=60, deadline=None)
DTYPES = ("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")
OBLIQUE = np.array(
    [[1.2, -0.3, 0.2, -30.0], [0.4, 0.9, -0.5, 12.0], [-0.1, 0.3, 2.9, 5.0], [0.0, 0.0, 0.0, 1.0]]
)


def ramp(shape: tuple[int, ...], dtype: str = "float32") -> NDArray[Any]:
    return (np.arange(np.prod(shape)).reshape(shape) % 101).astype(dtype)


def save(path: Path, data: NDArray[Any], affine: NDArray[Any] | None = None, **fields: Any) -> Path:
    """A NIfTI-1 file, some of its header's fields set by hand."""
    image = Nifti1Image(data, np.diag([1.0, 1.0, 2.0, 1.0]) if affine is None else affine, dtype=data.dtype)
    raw = bytearray(image.to_bytes())
    header = Nifti1Header(bytes(raw[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    raw[:348] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(raw)) if path.suffix == ".gz" else bytes(raw))
    return path


def load(path: Path) -> Any:
    """The file as nibabel sees it, no header field repaired and no file left open."""
    content = path.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    if ".mg" in path.name:
        return MGHImage.from_bytes(content)
    kind = Nifti2Image if content[4:7] == b"n+2" else Nifti1Image
    return kind.from_bytes(content)


def raw_header(path: Path) -> Any:
    return Nifti1Header(path.read_bytes()[:348], check=False)


def geometry(header: Any) -> dict[str, Any]:
    names = ["dim", "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x"]
    names += ["qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units"]
    return {name: np.asarray(header[name]).tolist() for name in names}


@st.composite
def affines(draw: st.DrawFn) -> NDArray[np.float64]:
    """Any axis order and obliqueness, of either handedness, some with shear."""
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    matrix: NDArray[np.float64] = np.linalg.qr(generator.normal(size=(3, 3)))[0]
    if draw(st.booleans()):
        matrix = np.eye(3)[draw(st.permutations(range(3)))] * draw(st.sampled_from((1, -1)))
    if draw(st.booleans()):
        matrix = matrix @ (np.eye(3) + np.triu(generator.uniform(-0.2, 0.2, (3, 3)), 1))
    affine = np.eye(4)
    affine[:3, :3] = matrix * [draw(st.floats(0.2, 8.0)) for _ in range(3)]
    affine[:3, 3] = generator.uniform(-200, 200, 3)
    return affine


@st.composite
def images(draw: st.DrawFn) -> tuple[Any, str]:
    """A nibabel image and the suffix to save it by."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=2, max_size=3)))
    shape += (1,) * draw(st.integers(0, 2))
    if np.prod(shape) == 1:
        shape = (2, *shape[1:])
    dtype = draw(st.sampled_from(DTYPES))
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    data = generator.integers(0, 100, shape).astype(dtype)
    data.flat[0], data.flat[-1] = 100, 0
    affine = draw(affines())
    kind, suffixes = draw(
        st.sampled_from(
            [
                (Nifti1Image, (".nii", ".nii.gz")),
                (Nifti2Image, (".nii", ".nii.gz")),
                (MGHImage, (".mgh", ".mgz")),
            ]
        )
    )
    if kind is MGHImage:
        data = data.astype(draw(st.sampled_from(("uint8", "int16", "int32", "float32"))))
        data = data.reshape((*shape, 1)[:3])
        return kind(data, affine), draw(st.sampled_from(suffixes))
    image = kind(data, affine, dtype=dtype)
    form = draw(st.sampled_from(("sform", "qform", "both")))
    # A qform holds no shear.
    image.set_sform(affine, 0 if form == "qform" else draw(st.integers(1, 4)))
    image.set_qform(affine, 0 if form == "sform" else draw(st.integers(1, 4)), strip_shears=True)
    image.header.set_xyzt_units(
        draw(st.sampled_from(("unknown", "mm"))), draw(st.sampled_from(("sec", "unknown")))
    )
    return image, draw(st.sampled_from(suffixes))


@PROPERTY
@given(images())
def test_a_scan_comes_back_where_it_was(case: tuple[Any, str]) -> None:
    image, suffix = case
    with tempfile.TemporaryDirectory() as folder:
        source, copy = Path(folder) / f"in{suffix}", Path(folder) / f"out{suffix}"
        nib.save(image, source)
        stored: Any = load(source)
        scan = read_scan(source)
        assert scan.data.dtype == torch.float32 and scan.data.is_contiguous()
        assert scan.file_shape == stored.shape
        np.testing.assert_array_equal(
            scan.data.numpy().ravel(), np.asarray(stored.dataobj, dtype=np.float32).ravel()
        )
        if scan.grid.ndim == 3:
            np.testing.assert_allclose(scan.grid.affine.numpy(), stored.affine, atol=1e-4)
        write_scan(copy, scan.data, scan)
        again, written = read_scan(copy), load(copy)
        assert torch.equal(again.data, scan.data)
        assert again.file_shape == scan.file_shape
        np.testing.assert_array_equal(again.affine, scan.affine)
        assert torch.equal(again.grid.affine, scan.grid.affine)
        if suffix.startswith(".nii"):
            assert type(written) is type(image)
            assert geometry(written.header) == geometry(stored.header)
        else:
            for field in ("delta", "Mdc", "Pxyz_c", "dims"):
                np.testing.assert_array_equal(written.header[field], stored.header[field])
        labels = read_labels(source)
        write_labels(copy, labels.data, labels)
        assert torch.equal(read_labels(copy).data, labels.data)
        assert load(copy).get_data_dtype() == np.uint8


@PROPERTY
@given(affines(), st.sampled_from((".nii", ".nii.gz", ".mgz")), st.integers(2, 3))
def test_a_volume_without_a_file_is_written_where_it_is(
    affine: NDArray[np.float64], suffix: str, ndim: int
) -> None:
    matrix = torch.from_numpy(affine)
    if ndim == 2:
        matrix = torch.tensor([[0.8, 0.1, 3.0], [-0.2, 1.5, 7.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    volume = Volume.from_grid(torch.rand((4, 3, 5)[:ndim]), Grid((4, 3, 5)[:ndim], matrix))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"out{suffix}"
        write_scan(path, volume.data, volume)
        again = read_scan(path)
    assert torch.equal(again.data, volume.data)
    torch.testing.assert_close(again.grid.affine, volume.grid.affine, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("swapped", [False, True])
def test_slopes_and_byte_orders(tmp_path: Path, dtype: str, swapped: bool) -> None:
    data = ramp((4, 3, 5), dtype)
    order: Literal["<", ">"] = ">" if swapped else "<"
    header = Nifti1Header(endianness=order)
    header.set_data_dtype(dtype)
    image = Nifti1Image(data, OBLIQUE, header)
    image.header.set_slope_inter(0.5, -3)
    # nibabel divides by the slope when it writes.
    image = Nifti1Image(data * 0.5 - 3, OBLIQUE, image.header)
    nib.save(image, tmp_path / "a.nii")
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[112:120] = struct.pack(f"{order}2f", 0.5, -3)
    raw[352:] = data.astype(np.dtype(dtype).newbyteorder(order)).tobytes("F")
    (tmp_path / "a.nii").write_bytes(raw)
    scan = read_scan(tmp_path / "a.nii")
    np.testing.assert_array_equal(scan.data.numpy(), data.astype(np.float64) * 0.5 - 3)
    np.testing.assert_allclose(scan.affine, OBLIQUE, atol=1e-6)
    write_scan(tmp_path / "b.nii", scan.data, scan)
    written: Any = load(tmp_path / "b.nii")
    assert written.header.get_slope_inter() in ((None, None), (1.0, 0.0))
    assert written.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.asarray(written.dataobj), scan.data.numpy())
    with pytest.raises(UnusableInput, match="no whole numbers"):
        read_labels(tmp_path / "a.nii")


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mgz", ".mgh"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
def test_the_voxel_type_is_the_one_asked_for(tmp_path: Path, suffix: str, dtype: str) -> None:
    like = Volume.from_grid(torch.zeros(3, 4, 5), Grid((3, 4, 5), torch.from_numpy(OBLIQUE)))
    data = torch.arange(60.0).reshape(3, 4, 5) + 0.25
    write_scan(tmp_path / f"a{suffix}", data, like, dtype)
    written: Any = load(tmp_path / f"a{suffix}")
    assert written.get_data_dtype() == np.dtype(dtype).newbyteorder(written.get_data_dtype().byteorder)
    expected = data if dtype == "float32" else data.round()
    np.testing.assert_array_equal(np.asarray(written.dataobj), expected.numpy())


def test_values_that_a_voxel_type_cannot_hold(tmp_path: Path) -> None:
    like = Volume.from_grid(torch.zeros(3, 4), Grid.from_spacing((3, 4)))
    for bad in (300.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="expected values that uint8 holds"):
            write_scan(tmp_path / "a.nii", torch.full((3, 4), bad), like, "uint8")
    with pytest.raises(ValueError, match="scalar voxel type"):
        write_scan(tmp_path / "a.nii", torch.zeros(3, 4), like, "complex64")
    with pytest.raises(ValueError, match=r"expected data of shape \(3, 4\), got \(4, 3\)"):
        write_scan(tmp_path / "a.nii", torch.zeros(4, 3), like)
    with pytest.raises(UnusableInput, match=r"cannot hold voxels of type float64; write uint8"):
        write_scan(tmp_path / "a.mgz", torch.zeros(3, 4), like, "float64")
    with pytest.raises(UnusableInput, match="cannot hold voxels of type float16"):
        write_scan(tmp_path / "a.nii", torch.zeros(3, 4), like, "float16")
    with pytest.raises(UnusableInput, match="no suffix of an image format"):
        write_scan(tmp_path / "a.png", torch.zeros(3, 4), like)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(0, 255, "uint8"), (0, 256, "int16"), (-1, 3, "int16"), (0, 2035, "int16"), (0, 70000, "int32")],
)
def test_labels_take_the_smallest_type(tmp_path: Path, low: int, high: int, dtype: str) -> None:
    data = torch.full((3, 4, 5), low)
    data[1, 2, 3] = high
    volume = Volume.from_grid(data, Grid.from_spacing((3, 4, 5)))
    write_labels(tmp_path / "a.nii.gz", data, volume)
    assert load(tmp_path / "a.nii.gz").get_data_dtype() == np.dtype(dtype)
    found = read_labels(tmp_path / "a.nii.gz")
    assert found.data.dtype == torch.int64 and torch.equal(found.data, data)


def test_labels_are_exact(tmp_path: Path) -> None:
    big = np.array([[2**53 + 1, 5], [0, -(2**62)]])
    path = save(tmp_path / "a.nii", big)
    assert torch.equal(read_labels(path).data, torch.from_numpy(big))
    with pytest.raises(UnusableInput, match="beyond 32 bits; number the labels anew"):
        write_labels(tmp_path / "b.nii", torch.from_numpy(big), read_labels(path))
    floats = save(tmp_path / "c.nii", ramp((3, 4), "float32"))
    assert torch.equal(read_labels(floats).data, torch.from_numpy(ramp((3, 4), "int64")))
    assert int(read_labels(save(tmp_path / "d.nii", np.zeros((3, 4), np.uint8))).data.sum()) == 0
    for value in (0.5, float("nan"), 1e20):
        data = ramp((3, 4), "float64")
        data[1, 1] = value
        with pytest.raises(UnusableInput, match="holds 1 voxels that are no whole numbers"):
            read_labels(save(tmp_path / "e.nii", data))
    with pytest.raises(UnusableInput, match="no whole numbers"):
        read_labels(save(tmp_path / "f.nii", np.full((3, 4), 2**64 - 1, np.uint64)))
    with pytest.raises(ValueError, match="label map of integers, got torch.float32"):
        write_labels(tmp_path / "g.nii", torch.zeros(3, 4), read_labels(floats))
    write_labels(tmp_path / "h.nii", read_labels(floats).data > 3, read_labels(floats))
    assert torch.unique(read_labels(tmp_path / "h.nii").data).tolist() == [0, 1]


def test_trailing_axis_with_zero_spacing(tmp_path: Path) -> None:
    pixdim = np.array([1, 0.94, 1.5, 0.94, 0, 0, 0, 0])
    affine = np.diag([0.94, 1.5, 0.94, 1.0])
    path = save(tmp_path / "a.nii.gz", ramp((5, 3, 6, 1), "int16"), affine, pixdim=pixdim)
    scan = read_scan(path)
    assert scan.shape == (5, 3, 6) and scan.file_shape == (5, 3, 6, 1)
    np.testing.assert_allclose(scan.spacing, (0.94, 1.5, 0.94), rtol=1e-6)
    write_scan(tmp_path / "b.nii.gz", scan.data, scan)
    assert load(tmp_path / "b.nii.gz").shape == (5, 3, 6, 1)
    assert geometry(load(tmp_path / "b.nii.gz").header) == geometry(load(path).header)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 1, 1)])
def test_a_slice_lies_in_its_plane(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = save(tmp_path / "a.nii", ramp(shape), OBLIQUE)
    scan = read_scan(path)
    assert scan.shape == (4, 5) and scan.data.shape == (4, 5) and scan.file_shape == shape
    solid = scan.as_3d()
    assert solid.shape == (4, 5, 1) and solid.as_3d() is solid
    np.testing.assert_allclose(solid.grid.affine.numpy(), OBLIQUE, atol=1e-6)
    flat = scan.grid.coordinates(torch.float64).reshape(-1, 2)
    world = solid.grid.coordinates(torch.float64).reshape(-1, 3)
    # The plane keeps distances.
    torch.testing.assert_close(torch.cdist(flat, flat), torch.cdist(world, world))
    write_scan(tmp_path / "b.nii", solid.data, solid)
    assert load(tmp_path / "b.nii").shape == shape
    assert torch.equal(read_scan(tmp_path / "b.nii").data, scan.data)


@pytest.mark.parametrize(("axes", "kept"), [((0, 1), (0, 1)), ((1, 2), (1, 2)), ((2, 0), (0, 2))])
def test_a_straight_slice_keeps_its_anatomical_axes(
    tmp_path: Path, axes: tuple[int, int], kept: tuple[int, int]
) -> None:
    affine = np.zeros((4, 4))
    affine[axes[0], 0], affine[axes[1], 1], affine[3 - sum(axes), 2], affine[3, 3] = -2, 3, 4, 1
    affine[:3, 3] = (10, 20, 30)
    scan = read_scan(save(tmp_path / "a.nii", ramp((4, 5)), affine))
    expected = affine[[*kept, 3]][:, [0, 1, 3]]
    np.testing.assert_allclose(scan.grid.affine.numpy(), expected, atol=1e-6)


def test_a_slice_without_a_third_column(tmp_path: Path) -> None:
    affine = OBLIQUE.copy()
    path = save(tmp_path / "a.nii", ramp((4, 5)), affine)
    raw = bytearray(path.read_bytes())
    header = Nifti1Header(bytes(raw[:348]), check=False)
    for row in ("srow_x", "srow_y", "srow_z"):
        header[row][2] = 0
    header["pixdim"][3] = 0
    path.write_bytes(header.binaryblock + bytes(raw[348:]))
    scan = read_scan(path)
    column = scan.affine[:3, 2]
    np.testing.assert_allclose(column @ OBLIQUE[:3, :2], 0, atol=1e-6)
    assert np.linalg.norm(column) == pytest.approx(1)
    write_scan(tmp_path / "b.nii", scan.data, scan)
    assert geometry(raw_header(tmp_path / "b.nii")) == geometry(header)


def test_which_form_places_the_scan(tmp_path: Path) -> None:
    data, other = ramp((4, 5, 6)), np.diag([-1.0, 1.0, 2.0, 1.0])
    image = Nifti1Image(data, None)
    image.set_sform(np.diag([1.0, 1.0, 2.0, 1.0]), 2)
    image.set_qform(other, 1)
    nib.save(image, tmp_path / "a.nii")
    assert read_scan(tmp_path / "a.nii").grid.axes_codes == "RAS"
    image.set_sform(None, 0)
    nib.save(image, tmp_path / "a.nii")
    assert read_scan(tmp_path / "a.nii").grid.axes_codes == "LAS"
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "b.nii")
    with pytest.warns(UserWarning, match="neither sform nor qform"):
        scan = read_scan(tmp_path / "b.nii")
    np.testing.assert_allclose(scan.affine, load(tmp_path / "b.nii").affine)
    assert scan.grid.axes_codes == "LAS" and scan.spacing == (1.0, 1.0, 2.0)
    write_scan(tmp_path / "c.nii", scan.data, scan)
    assert geometry(load(tmp_path / "c.nii").header) == geometry(load(tmp_path / "b.nii").header)


def test_units_are_converted(tmp_path: Path) -> None:
    micro = save(tmp_path / "a.nii", ramp((4, 5, 6)), np.diag([500.0, 500.0, 800.0, 1.0]), xyzt_units=3)
    with pytest.warns(UserWarning, match="in microns; converted to millimetres"):
        scan = read_scan(micro)
    np.testing.assert_allclose(scan.spacing, (0.5, 0.5, 0.8))
    write_scan(tmp_path / "b.nii", scan.data, scan)
    assert geometry(load(tmp_path / "b.nii").header) == geometry(load(micro).header)
    write_scan(tmp_path / "c.mgz", scan.data, scan)
    np.testing.assert_allclose(read_scan(tmp_path / "c.mgz").affine, scan.affine, atol=1e-6)
    with pytest.warns(UserWarning, match="in metres"):
        scan = read_scan(
            save(tmp_path / "d.nii", ramp((4, 5, 6)), np.diag([1e-3, 1e-3, 2e-3, 1]), xyzt_units=1)
        )
    np.testing.assert_allclose(scan.spacing, (1, 1, 2), rtol=1e-6)


def test_spacings_that_disagree(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", ramp((4, 5, 6)), pixdim=np.array([1, 3, 3, 3, 1, 1, 1, 1]))
    with pytest.warns(UserWarning, match="sform has spacing 1 × 1 × 2 mm, its pixdim 3 × 3 × 3"):
        assert read_scan(path).spacing == (1.0, 1.0, 2.0)


def test_content_decides_the_format(tmp_path: Path) -> None:
    packed = save(tmp_path / "a.nii.gz", ramp((4, 5, 6)))
    plain = packed.rename(tmp_path / "b.nii")
    assert read_scan(plain).shape == (4, 5, 6)
    save(tmp_path / "c.nii", ramp((4, 5, 6))).rename(tmp_path / "c.nii.gz")
    assert torch.equal(read_scan(tmp_path / "c.nii.gz").data, read_scan(plain).data)


def test_from_one_format_to_another(tmp_path: Path) -> None:
    scan = read_scan(save(tmp_path / "a.nii.gz", ramp((4, 5, 6)), OBLIQUE))
    write_scan(tmp_path / "b.mgz", scan.data, scan)
    surfer = read_scan(tmp_path / "b.mgz")
    np.testing.assert_allclose(surfer.affine, OBLIQUE, atol=1e-5)
    write_scan(tmp_path / "c.nii.gz", surfer.data, surfer)
    back = read_scan(tmp_path / "c.nii.gz")
    np.testing.assert_allclose(back.affine, OBLIQUE, atol=1e-5)
    assert torch.equal(back.data, scan.data)
    assert int(load(tmp_path / "c.nii.gz").header["sform_code"]) == 1
    longer = read_scan(save(tmp_path / "e.nii", ramp((4, 5, 6, 1, 1))))
    write_scan(tmp_path / "f.mgz", longer.data, longer)
    assert torch.equal(read_scan(tmp_path / "f.mgz").data, longer.data)
    slab = Volume.from_grid(torch.rand(40000, 1, 2), Grid.from_spacing((40000, 1, 2)))
    write_scan(tmp_path / "d.nii", slab.data, slab)
    assert isinstance(load(tmp_path / "d.nii"), nib.Nifti2Image)


def test_a_header_that_disagrees_with_the_affine_is_not_used(tmp_path: Path) -> None:
    scan = read_scan(save(tmp_path / "a.nii", ramp((4, 5, 6))))
    grid = Grid((4, 5, 6), torch.from_numpy(OBLIQUE))
    moved = Volume(scan.data, grid, OBLIQUE, scan.header)
    write_scan(tmp_path / "b.nii", moved.data, moved)
    np.testing.assert_allclose(load(tmp_path / "b.nii").affine, OBLIQUE, atol=1e-6)


def test_missing_voxels_on_request(tmp_path: Path) -> None:
    data = ramp((4, 5, 6))
    data[0, 0, :2] = np.nan
    path = save(tmp_path / "a.nii", data)
    with pytest.raises(UnusableInput, match=r"holds 2 voxels that are infinite, NaN.*allow_nan=True"):
        read_scan(path)
    scan = read_scan(path, allow_nan=True)
    assert int(scan.data.isnan().sum()) == 2
    data[1] = np.inf
    with pytest.raises(UnusableInput, match="replace them by numbers$"):
        read_scan(save(tmp_path / "a.nii", data), allow_nan=True)
    with pytest.raises(UnusableInput, match="every voxel is NaN"):
        read_scan(save(tmp_path / "a.nii", data * np.nan), allow_nan=True)
    with pytest.raises(UnusableInput, match="beyond float32"):
        read_scan(save(tmp_path / "a.nii", ramp((4, 5), "float64") * 1e300))


def truncated(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def damaged(path: Path) -> Path:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    return path


def text(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def mgh(path: Path, where: int | None = None, value: bytes = b"", keep: int | None = None) -> Path:
    content = bytearray(MGHImage(ramp((4, 5, 6)), OBLIQUE).to_bytes())
    if where is not None:
        content[where : where + len(value)] = value
    path.write_bytes(content[:keep])
    return path


RGB = np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
FLAT = np.diag([1.0, 1.0, 0.0, 1.0])
ONES = np.ones(8)
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda d: d / "a.nii.gz", "does not exist; check the path"),
    "folder": (lambda d: d, "is a folder; give one file"),
    "no bytes": (lambda d: text(d / "a.nii.gz", b""), "file of 0 bytes; copy or download it again"),
    "text": (
        lambda d: text(d / "a.nii.gz", b"hello" * 99),
        "neither NIfTI nor MGH, or its header is corrupt; give",
    ),
    "short": (lambda d: text(d / "a.nii", b"hi"), "neither NIfTI nor MGH"),
    "DICOM": (lambda d: text(d / "a.dcm", bytes(128) + b"DICM"), "is a DICOM file; convert the series"),
    "pair": (lambda d: text(d / "a.hdr", bytes(344) + b"ni1\0"), "half of a NIfTI pair; convert"),
    "Analyze": (lambda d: text(d / "a.hdr", b"\x5c\x01\0\0" + bytes(344)), "Analyze header.*; convert it"),
    "gzip cut off": (
        lambda d: truncated(save(d / "a.nii.gz", ramp((9, 9, 9))), 0.6),
        "cut off: its gzip .*; copy",
    ),
    "gzip cut near the end": (
        lambda d: truncated(save(d / "a.nii.gz", ramp((9, 9, 9))), 0.995),
        "cut off.*; copy",
    ),
    "gzip damaged": (
        lambda d: damaged(save(d / "a.nii.gz", ramp((9, 9, 9)))),
        "is damaged: its gzip .*; copy",
    ),
    "gzip of nothing": (lambda d: text(d / "a.nii.gz", b"\x1f\x8b"), "cut off|damaged"),
    "cut off": (
        lambda d: truncated(save(d / "a.nii", ramp((9, 9, 9))), 0.6),
        r"cut off: it has \d+ bytes of voxels, its header promises 2916; copy",
    ),
    "header cut off": (
        lambda d: truncated(save(d / "a.nii", ramp((4, 5))), 0.5),
        "cut off within its header; copy",
    ),
    "NIfTI-2 header cut off": (
        lambda d: text(d / "a.nii", struct.pack("<i", 540) + b"n+2\0" + bytes(400)),
        "cut off within its header",
    ),
    "header size": (lambda d: save(d / "a.nii", ramp((4, 5)), sizeof_hdr=5), "its size is given as"),
    "axes": (lambda d: save(d / "a.nii", ramp((4, 5, 6)), dim=[9] + [4] * 7), r"corrupt header \(9 axes\)"),
    "negative size": (
        lambda d: save(d / "a.nii", ramp((4, 5, 6)), dim=[3, 4, -5, 6, 1, 1, 1, 1]),
        "corrupt header .shape",
    ),
    "huge size": (
        lambda d: save(d / "a.nii", ramp((4, 5, 6)), dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]),
        "cut off: it has 480 bytes",
    ),
    "datatype": (lambda d: save(d / "a.nii", ramp((4, 5, 6)), datatype=77), "corrupt header"),
    "offset": (
        lambda d: save(d / "a.nii", ramp((4, 5, 6)), vox_offset=9),
        "corrupt header .voxels start at byte 9",
    ),
    "offset NaN": (lambda d: save(d / "a.nii", ramp((4, 5, 6)), vox_offset=np.nan), "corrupt header"),
    "intercept": (
        lambda d: save(d / "a.nii", ramp((4, 5, 6)), scl_slope=1, scl_inter=np.inf),
        "corrupt header",
    ),
    "several images": (
        lambda d: save(d / "a.nii", ramp((4, 5, 6, 3))),
        r"holds 3 images \(shape .*; split it",
    ),
    "five axes": (lambda d: save(d / "a.nii", ramp((4, 5, 6, 1, 3))), "holds 3 images"),
    "one axis": (lambda d: save(d / "a.nii", ramp((4,))), "has one axis .*; give an image with two or three"),
    "colours": (lambda d: save(d / "a.nii", RGB), r"holds colours \(RGB\), not intensities; convert"),
    "complex": (
        lambda d: save(d / "a.nii", ramp((4, 5, 6), "complex64")),
        "complex numbers; give the magnitude",
    ),
    "no voxels": (
        lambda d: save(d / "a.nii", ramp((4, 5, 6)), dim=[3, 4, 0, 6, 1, 1, 1, 1]),
        r"is empty: its shape is \(4, 0, 6\); export",
    ),
    "all zero": (
        lambda d: save(d / "a.nii", np.zeros((4, 5, 6), np.int16)),
        "is empty: every voxel is 0; export",
    ),
    "constant": (
        lambda d: save(d / "a.nii", np.full((4, 5, 6), 7, "f4")),
        "is constant: every voxel is 7; export",
    ),
    "NaN": (lambda d: save(d / "a.nii", np.full((4, 5, 6), np.nan, "f4")), "holds 120 voxels that are inf"),
    "zero spacing": (
        lambda d: save(d / "a.nii", ramp((4, 5, 6)), pixdim=ONES * [1, 1, 0, 1, 1, 1, 1, 1]),
        "voxel spacing of 1 × 0 × 1; correct pixdim",
    ),
    "NaN spacing": (
        lambda d: save(d / "a.nii", ramp((4, 5, 6)), pixdim=ONES * [1, 1, np.nan, 1, 1, 1, 1, 1]),
        "voxel spacing of 1 × nan × 1",
    ),
    "singular": (
        lambda d: save(d / "a.nii", ramp((4, 5, 6)), srow_z=[0, 0, 0, 0]),
        "singular affine.*; correct the sform",
    ),
    "singular slice": (lambda d: save(d / "a.nii", ramp((4, 5)), srow_y=[0, 0, 0, 0]), "singular affine"),
    "infinite affine": (lambda d: save(d / "a.nii", ramp((4, 5, 6)), srow_z=[0, 0, np.inf, 0]), "not finite"),
    "implausible": (
        lambda d: save(d / "a.nii", ramp((4, 5, 6)), srow_z=[0, 0, 1e6, 0]),
        "no plausible geometry: spacing 1 × 1 × 1e.06 mm, origin 0, 0, 0; correct",
    ),
    "quaternion": (
        lambda d: save(d / "a.nii", ramp((4, 5, 6)), sform_code=0, qform_code=1, quatern_b=2),
        "qform that is no rotation",
    ),
    "MGH cut off": (lambda d: mgh(d / "a.mgh", keep=500), "cut off: it has 216 bytes of voxels"),
    "MGH header cut off": (lambda d: mgh(d / "a.mgh", keep=100), "cut off within its header"),
    "MGH shape": (lambda d: mgh(d / "a.mgh", 4, struct.pack(">i", -4)), "corrupt header"),
    "MGH no voxels": (lambda d: mgh(d / "a.mgh", 4, struct.pack(">i", 0)), "is empty: its shape"),
    "MGH type": (lambda d: mgh(d / "a.mgh", 20, struct.pack(">i", 99)), "corrupt header"),
    "MGH spacing": (lambda d: mgh(d / "a.mgh", 30, bytes(4)), "voxel spacing of 0 × "),
    "MGH singular": (lambda d: mgh(d / "a.mgh", 42, bytes(12)), "singular affine"),
}


@pytest.mark.parametrize("case", BAD)
def test_unusable_inputs(tmp_path: Path, case: str) -> None:
    make, message = BAD[case]
    path = make(tmp_path)
    with pytest.raises(UnusableInput, match=message) as caught:
        read_scan(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line and line.count("; ") >= 1
    assert caught.value.path == path and caught.value.remedy
    assert isinstance(caught.value, ValueError)
    if case not in ("all zero", "constant"):
        with pytest.raises(UnusableInput):
            read_labels(path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be read: permission denied; ask its owner"),
        (OSError(errno.EIO, "Input/output error"), "cannot be read: Input/output error; check the disk"),
    ],
    ids=["permission denied", "a disk that fails"],
)
def test_a_file_that_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, message: str) -> None:
    path = save(tmp_path / "a.nii", ramp((4, 5, 6)))

    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UnusableInput, match=message):
        read_scan(path)


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    scan = read_scan(save(tmp_path / "a.nii", ramp((4, 5, 6))))
    (tmp_path / "b.nii").write_bytes(b"before")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(
            UnusableInput, match="cannot be written: No space left on device; free space"
        ) as caught:
            write_scan(tmp_path / "b.nii", scan.data, scan)
    assert caught.value.path == tmp_path / "b.nii"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii", "b.nii"]
    assert (tmp_path / "b.nii").read_bytes() == b"before"


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        assert temporary.parent == tmp_path and temporary.suffix == ".json"
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text("whole")
        assert not (tmp_path / "a.json").exists()
    assert (tmp_path / "a.json").read_text() == "whole"
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_no_input_is_overwritten(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", ramp((4, 5, 6)))
    before, scan = path.read_bytes(), read_scan(path)
    (tmp_path / "link.nii").symlink_to(path)
    os.link(path, tmp_path / "hard.nii")
    other = tmp_path / "sub"
    other.mkdir()
    for name in (path, tmp_path / "sub" / ".." / "a.nii", tmp_path / "link.nii", tmp_path / "hard.nii"):
        with pytest.raises(
            UnusableInput, match="is an input and would be overwritten; choose another output"
        ):
            write_scan(name, scan.data * 0, scan)
        with pytest.raises(UnusableInput, match="is an input"):
            write_labels(name, scan.data.long(), scan)
        with pytest.raises(UnusableInput, match="is an input"), atomic_write(name, protect=[path]):
            pass
    with pytest.raises(UnusableInput, match="is an input"):
        write_scan(tmp_path / "b.nii", scan.data, scan, protect=[tmp_path / "c.nii", tmp_path / "b.nii"])
    assert path.read_bytes() == before
    with pytest.raises(UnusableInput, match="its folder does not exist; create"):
        write_scan(tmp_path / "no" / "b.nii", scan.data, scan)
    with pytest.raises(UnusableInput, match="is a folder; give the name of a file"):
        write_scan(other, scan.data, scan)


def test_same_data_same_bytes(tmp_path: Path) -> None:
    grid = Grid.from_spacing((80, 70, 60))
    noise = torch.randn(grid.shape, generator=torch.Generator().manual_seed(0))
    volume = Volume.from_grid(noise, grid)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_scan(tmp_path / name, noise, volume)
    assert sha256(tmp_path / "a.nii.gz") == sha256(tmp_path / "b.nii.gz")
    # More than one block of the compressor, read by others.
    assert len(gzip.decompress((tmp_path / "a.nii.gz").read_bytes())) == 352 + 4 * grid.numel
    np.testing.assert_array_equal(np.asarray(load(tmp_path / "a.nii.gz").dataobj), noise.numpy())


def test_resampling(tmp_path: Path) -> None:
    scan = read_scan(save(tmp_path / "a.nii", ramp((6, 5, 4)), OBLIQUE))
    assert torch.allclose(scan.resampled(scan).data, scan.data, atol=1e-3)
    finer = scan.resampled(scan.grid.at_spacing(0.7))
    assert finer.shape == finer.grid.shape and finer.header is None and finer.path is None
    write_scan(tmp_path / "b.nii", finer.data, finer)
    assert read_scan(tmp_path / "b.nii").grid == finer.grid
    back = finer.resampled(scan)
    assert back.header is scan.header and back.file_shape == scan.file_shape and back.path is None
    with pytest.raises(ValueError, match="expected a grid with 3 axes, got 2"):
        scan.resampled(Grid.from_spacing((3, 3)))
    flat = read_scan(save(tmp_path / "c.nii", ramp((6, 5)), OBLIQUE))
    fine = flat.resampled(flat.grid.at_spacing(0.5), fill="edge")
    corner = torch.tensor([-0.5, -0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(
        fine.as_3d().grid.voxel_to_world(corner), flat.as_3d().grid.voxel_to_world(corner), atol=1e-5, rtol=0
    )


def test_resampling_labels(tmp_path: Path) -> None:
    data: Tensor = torch.zeros(6, 6, 6, dtype=torch.int64)
    data[2:5, 1:4, 2:] = 2**24 + 1
    data[0] = 7
    labels = Volume.from_grid(data, Grid((6, 6, 6), torch.from_numpy(OBLIQUE)))
    for vote in (False, True):
        assert torch.equal(labels.resampled_labels(labels, vote).data, data)
        finer = labels.resampled_labels(labels.grid.at_spacing(0.5), vote)
        assert set(torch.unique(finer.data).tolist()) == {0, 7, 2**24 + 1}
        wider = labels.resampled_labels(labels.grid.padded(1), vote, fill=9)
        assert torch.equal(wider.data[1:-1, 1:-1, 1:-1], data) and (wider.data[0] == 9).all()
    smooth, blocky = (labels.resampled_labels(labels.grid.at_spacing(0.3), v).data for v in (True, False))
    assert 0.9 < (smooth == blocky).double().mean() < 1
    with pytest.raises(ValueError, match="not interpolated"):
        labels.resampled(labels.grid)
    with pytest.raises(ValueError, match="label map of integers"):
        labels.with_data(data.float()).resampled_labels(labels)


def test_parts_that_do_not_match() -> None:
    grid = Grid.from_spacing((3, 4, 5))
    with pytest.raises(ValueError, match="expected data of the grid's shape"):
        Volume.from_grid(torch.zeros(3, 4), grid)
    with pytest.raises(ValueError, match="expected an affine of shape"):
        Volume(torch.zeros(3, 4, 5), grid, np.eye(3))
    with pytest.raises(ValueError, match="expected a file shape with the voxels of"):
        Volume(torch.zeros(3, 4, 5), grid, np.eye(4), file_shape=(3, 4))


def test_an_error_survives_a_process_border() -> None:
    error = UnusableInput("a.nii", "is two\nlines", "join them")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "a.nii: is two lines; join them"
    assert (again.path, again.fault, again.remedy) == (error.path, error.fault, error.remedy)


@pytest.mark.parametrize("suffix", ["", ".nii", ".nii.gz", ".mgz", ".mgh", ".NII.GZ"])
def test_stems(suffix: str) -> None:
    assert bids_stem(f"data/sub-01_T1w{suffix}") == "sub-01_T1w"
    assert bids_stem(Path(f"sub.01{suffix}")) == "sub.01"


def test_checksums(tmp_path: Path) -> None:
    path = text(tmp_path / "a", b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(UnusableInput, match="does not exist"):
        sha256(tmp_path / "b")


def test_label_names(tmp_path: Path) -> None:
    names, colours = {2: "WM", 1: "GM", -3: "Rückenmark"}, {1: "#cc4444"}
    write_label_names(tmp_path / "a.json", names, colours)
    assert read_label_names(tmp_path / "a.json") == names
    assert read_label_colours(tmp_path / "a.json") == colours
    assert read_label_names(text(tmp_path / "b.json", b'{"1": "GM", "2": {"name": "WM"}}')) == {
        1: "GM",
        2: "WM",
    }
    assert read_label_colours(tmp_path / "b.json") == {}
    for bad in ({4: "#000000"}, {1: "red"}):
        with pytest.raises(ValueError, match="expected a colour #rrggbb of a named label"):
            write_label_names(tmp_path / "c.json", names, bad)
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON .*; correct it"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", 'holds a list, not an object; write {"1": "name"'),
        (b'{"GM": "1"}', "no whole number with a name at 'GM'"),
        (b'{"1": 5}', "no whole number with a name at '1': 5"),
        (b'{"1": {"colour": "#ffffff"}}', "no whole number with a name at '1'"),
        (b'{"1": {"name": "GM", "colour": "red"}}', "no colour #rrggbb at '1': 'red'"),
        (b'{"1": "a", "01": "b"}', "names label 1 twice"),
    ],
)
def test_unusable_label_names(tmp_path: Path, content: bytes, message: str) -> None:
    path = text(tmp_path / "names.json", content)
    for read in (read_label_names, read_label_colours):
        with pytest.raises(UnusableInput, match=message) as caught:
            read(path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(UnusableInput, match="does not exist"):
        read_label_names(tmp_path / "other.json")


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(("nii", "nii2", "mgh")),
    st.lists(st.tuples(st.integers(0, 543), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_any_corrupt_header_is_read_or_refused_in_one_line(kind: str, bytes_: list[tuple[int, int]]) -> None:
    maker = {"nii": Nifti1Image, "nii2": Nifti2Image, "mgh": MGHImage}[kind]
    content = bytearray(maker(ramp((4, 5, 6)), OBLIQUE).to_bytes())
    start = {"nii": 348, "nii2": 540, "mgh": 90}[kind]
    for where, value in bytes_:
        content[where % start] = value
    with tempfile.TemporaryDirectory() as folder:
        path = text(Path(folder) / ("a.mgh" if kind == "mgh" else "a.nii"), bytes(content))
        for read in (read_scan, read_labels):
            try:
                volume = read(path)
            except UnusableInput as error:
                assert "\n" not in str(error)
            else:
                assert volume.grid.shape == tuple(volume.data.shape)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 1.0, 1.0], [0.0, 1.0, 1.0]), ([-2.0, 4.0], [0.0, 1.0]), ([3.0, 3.0], [1.0, 1.0]), ([0.0, 0.0], [0.0, 0.0]), ([-1.0, -1.0], [0.0, 0.0])],
)
def test_images_of_one_or_two_values_have_a_unit(values: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(scaled(torch.tensor(values)), torch.tensor(expected))
