"""Scans and label maps: voxels in the world, read from and written to image files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probmed.grids import Grid, resample
from probmed.volumes.files import PathLike, UnusableInput, atomic_write
from probmed.volumes.formats import Stored, decode, encode, spatial_shape


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan or a label map, in two or three dimensions, with all that is needed to write its like.

    Arguments:
        data: voxels ``(*grid.shape)``; float32 of a scan, int64 of a label map.
        grid: the voxels in the world, mm. A slice has a two-dimensional grid in its own plane, whose axes are
            the two anatomical ones that lie nearest to the plane (an axial slice keeps its x and y).
        affine: voxel to world, mm, ``(4, 4)`` float64, also of a slice.
        header: the file's header (NIfTI or MGH), None where there is no file.
        path: the file, None where there is none.
        file_shape: axes in the file, with trailing axes of size 1.

    Raises:
        ValueError: where the parts do not match.
    """

    data: Tensor
    grid: Grid
    affine: NDArray[np.float64]
    header: Any = None
    path: Path | None = None
    file_shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape == (3, 3) and self.grid.ndim == 2:
            affine = _in_space(affine, np.eye(4))
        if affine.shape != (4, 4):
            raise ValueError(f"expected an affine of shape (4, 4), got {affine.shape}")
        if tuple(self.data.shape) != self.grid.shape:
            raise ValueError(
                f"expected data of the grid's shape {self.grid.shape}, got {tuple(self.data.shape)}"
            )
        file_shape = tuple(self.file_shape) or self.grid.shape
        if math.prod(file_shape) != self.grid.numel:
            raise ValueError(f"expected a file shape with the voxels of {self.grid.shape}, got {file_shape}")
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "file_shape", file_shape)

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.path or "the scan")

    @classmethod
    def from_grid(cls, data: Tensor, grid: Grid) -> Volume:
        """A volume without a file. A two-dimensional grid is the axial plane at height 0."""
        return cls(data, grid, grid.affine.numpy())

    @property
    def shape(self) -> tuple[int, ...]:
        return self.grid.shape

    @property
    def spacing(self) -> tuple[float, ...]:
        """mm."""
        return self.grid.spacing

    def with_data(self, data: Tensor) -> Volume:
        """Other voxels, in the same place."""
        return dataclasses.replace(self, data=data)

    def as_3d(self) -> Volume:
        """A slice as a volume ``(nx, ny, 1)`` in three-dimensional world space; a volume as it is."""
        if self.grid.ndim == 3:
            return self
        shape = (*self.grid.shape, 1)
        return dataclasses.replace(
            self, data=self.data[..., None], grid=Grid(shape, torch.from_numpy(self.affine))
        )

    def resampled(self, target: Grid | Volume, mode: str = "linear", fill: float | str = 0.0) -> Volume:
        """The scan on other voxels of the same world, by ``probmed.grids.resample``.

        Arguments:
            target: a grid, or a volume whose file's geometry the result takes on too.
            mode: ``"linear"`` or ``"nearest"``.
            fill: value outside the field of view, or ``"edge"``.

        Raises:
            ValueError: for a label map (integers) and ``"linear"``; where one is a slice and the other is
                not.
        """
        grid = target.grid if isinstance(target, Volume) else target
        if grid.ndim != self.grid.ndim:
            raise ValueError(
                f"expected a grid with {self.grid.ndim} axes, got {grid.ndim}; "
                "as_3d() makes a volume of a slice"
            )
        return self._on(target, resample(self.data[None], self.grid, grid, mode, fill)[0])

    def resampled_labels(self, target: Grid | Volume, vote: bool = False, fill: int = 0) -> Volume:
        """The label map on other voxels of the same world; labels are never blended.

        Arguments:
            target: a grid, or a volume whose file's geometry the result takes on too.
            vote: False takes the nearest voxel's label. True takes the label with the largest linearly
                interpolated membership (the smaller label in a tie), which is smoother where the target is
                finer.
            fill: label outside the field of view.

        Raises:
            ValueError: where the data are not integers.
        """
        if self.data.is_floating_point():
            raise ValueError(f"expected a label map of integers, got {self.data.dtype}")
        if not vote:
            return self.resampled(target, "nearest", fill)
        outside = (
            self.with_data(torch.ones_like(self.data, dtype=torch.float32))
            .resampled(target, "nearest", 0.0)
            .data
            == 0
        )
        out = torch.full(outside.shape, fill, dtype=self.data.dtype, device=self.data.device)
        best = torch.zeros(outside.shape, dtype=torch.float32, device=self.data.device)
        # One label at a time: all memberships at once would need a volume for each of a hundred or so
        # regions.
        for label in torch.unique(self.data).tolist():
            share = self.with_data((self.data == label).float()).resampled(target, "linear", "edge").data
            out = torch.where(share > best, label, out)
            best = torch.maximum(best, share)
        return self._on(target, out.masked_fill(outside, fill))

    def _on(self, target: Grid | Volume, data: Tensor) -> Volume:
        if isinstance(target, Volume):
            return dataclasses.replace(target, data=data, path=None)
        affine = target.affine.numpy()
        return Volume(data, target, affine if target.ndim == 3 else _in_space(affine, self.affine))


def read_scan(path: PathLike, allow_nan: bool = False) -> Volume:
    """Read a scan: one image with intensities, float32 ``(*shape)``.

    Arguments:
        path: ``.nii``, ``.nii.gz``, ``.mgh`` or ``.mgz``.
        allow_nan: let NaN through, as voxels that were not measured.

    Raises:
        UnusableInput: where the file is missing, a folder, not permitted, cut off, corrupt, of another
            format, or holds colours, complex numbers, several images, infinities or NaN, one value only, zero
            spacing, or a singular affine.
    """
    volume = _read(Path(path), _scan_values)
    low, high = (value.item() for value in volume.data.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        known = volume.data.isfinite()
        advice = "" if volume.data.isinf().any() else ", or allow NaN as missing (allow_nan=True)"
        remedy = "replace them by numbers" + advice
        if not allow_nan or volume.data.isinf().any():
            count = volume.data.numel() - int(known.sum())
            raise UnusableInput(
                path, f"holds {count} voxels that are infinite, NaN or beyond float32", remedy
            )
        if not known.any():
            raise UnusableInput(path, "is empty: every voxel is NaN", "export the scan again")
        low, high = (value.item() for value in volume.data[known].aminmax())
    if low == high:
        fault = "is empty: every voxel is 0" if low == 0 else f"is constant: every voxel is {low:g}"
        raise UnusableInput(path, fault, "export the scan again, and check that it is not a mask")
    return volume


def read_labels(path: PathLike) -> Volume:
    """Read a label map: int64 ``(*shape)``, exact. It may be all zero.

    Raises:
        UnusableInput: as ``read_scan`` but for empty and constant images, and where a voxel is not a whole
            number.
    """
    return _read(Path(path), _label_values)


def write_scan(
    path: PathLike, data: Tensor, like: Volume, dtype: str = "float32", protect: Iterable[PathLike] = ()
) -> None:
    """Write voxels with the geometry of ``like``: axes in the file, affine, forms with their codes, units.

    Arguments:
        path: the suffix chooses the format.
        data: ``(*like.shape)``.
        dtype: voxel type in the file, a numpy name. Integers are rounded to, never rescaled.
        protect: files that must not be replaced, beside ``like.path``.

    Raises:
        ValueError: for another shape, or values that ``dtype`` cannot hold.
        UnusableInput: where the file cannot be written there, or would replace an input.
    """
    kind = np.dtype(dtype)
    values = data.detach().cpu()
    if kind.kind in "iu":
        info = np.iinfo(kind)
        if values.is_floating_point():
            values = values.round()
        # NaN fails this comparison too. A Python comparison, because int64's bounds are no floats.
        if values.numel() and not (info.min <= values.min().item() and values.max().item() <= info.max):
            raise ValueError(
                f"expected values that {kind} holds, got {values.min().item():g} to {values.max().item():g}"
            )
    elif kind.kind != "f":
        raise ValueError(f"expected a scalar voxel type, got {dtype!r}")
    _write(Path(path), values, kind, like, protect)


def write_labels(path: PathLike, data: Tensor, like: Volume, protect: Iterable[PathLike] = ()) -> None:
    """Write a label map with the geometry of ``like``, in the smallest of uint8, int16 and int32.

    Raises:
        ValueError: for another shape, or data that are not integers.
        UnusableInput: where the file cannot be written there, would replace an input, or a label exceeds
            int32.
    """
    if data.is_floating_point() or data.is_complex():
        raise ValueError(f"expected a label map of integers, got {data.dtype}")
    low, high = (int(data.min()), int(data.max())) if data.numel() else (0, 0)
    for kind in (np.uint8, np.int16, np.int32):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return _write(Path(path), data.detach().cpu(), np.dtype(kind), like, protect)
    raise UnusableInput(
        path, f"would hold labels from {low} to {high}, beyond 32 bits", "number the labels anew"
    )


def _read(path: Path, convert: Callable[[Path, Stored], NDArray[Any]]) -> Volume:
    stored = decode(path)
    file_shape = tuple(int(n) for n in stored.raw.shape)
    shape = spatial_shape(file_shape)
    # Files are in Fortran order; torch transposes on all cores, numpy does not.
    data = (
        torch.from_numpy(convert(path, stored))
        .reshape(file_shape[::-1])
        .permute(*range(len(file_shape))[::-1])
        .contiguous()
        .view(shape)
    )
    affine = torch.from_numpy(stored.affine if len(shape) == 3 else _in_plane(stored.affine))
    return Volume(data, Grid(shape, affine), stored.affine, stored.header, path, file_shape)


def _scan_values(path: Path, stored: Stored) -> NDArray[np.float32]:
    flat = stored.raw.ravel(order="F")
    # A value too large for float32 becomes infinite, which read_scan reports.
    with np.errstate(over="ignore", invalid="ignore"):
        if (stored.slope, stored.intercept) != (1.0, 0.0):
            flat = flat.astype(np.float64) * stored.slope + stored.intercept
        return np.array(flat, dtype=np.float32)


def _label_values(path: Path, stored: Stored) -> NDArray[np.int64]:
    flat = stored.raw.ravel(order="F")
    if (stored.slope, stored.intercept) != (1.0, 0.0):
        flat = flat.astype(np.float64) * stored.slope + stored.intercept
    if flat.dtype.kind == "f":
        # Beyond 2^53 floats skip whole numbers, so that a label there is no longer exact.
        wrong = ~((np.rint(flat) == flat) & (np.abs(flat) <= 2.0**53))
    elif flat.dtype.kind == "u" and flat.dtype.itemsize == 8:
        wrong = flat > np.iinfo(np.int64).max
    else:
        wrong = np.zeros(1, dtype=bool)
    if wrong.any():
        count, example = np.count_nonzero(wrong), flat[wrong.argmax()]
        fault = f"holds {count} voxels that are no whole numbers, such as {example:g}"
        raise UnusableInput(
            path, fault, "give a label map; if it was resampled, do so again with nearest neighbour"
        )
    return np.array(flat, dtype=np.int64)


def _write(
    path: Path, values: Tensor, dtype: np.dtype[Any], like: Volume, protect: Iterable[PathLike]
) -> None:
    if tuple(values.shape) != like.shape:
        raise ValueError(f"expected data of shape {like.shape}, got {tuple(values.shape)}")
    # Before compressing, so that nobody waits for a refusal.
    with atomic_write(path, [*protect, *([] if like.path is None else [like.path])]) as temporary:
        temporary.write_bytes(encode(path, values.reshape(like.file_shape), dtype, like.affine, like.header))


def _plane(affine: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Orthonormal axes ``(3, 2)`` of a slice's plane, nearest to anatomical ones, and its normal ``(3,)``."""
    cross = np.cross(affine[:3, 0], affine[:3, 1])
    normal = np.asarray(cross / np.linalg.norm(cross), dtype=np.float64)
    kept = [axis for axis in range(3) if axis != int(np.abs(normal).argmax())]
    left, _, right = np.linalg.svd((np.eye(3) - np.outer(normal, normal))[:, kept], full_matrices=False)
    return np.asarray(left @ right, dtype=np.float64), normal


def _in_plane(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Voxel to the plane's millimetres, ``(3, 3)``, of a slice with ``affine`` (4, 4)."""
    axes, _ = _plane(affine)
    out = np.eye(3)
    out[:2, :2] = axes.T @ affine[:3, :2]
    out[:2, 2] = axes.T @ affine[:3, 3]
    return out


def _in_space(affine: NDArray[np.float64], like: NDArray[np.float64]) -> NDArray[np.float64]:
    """Voxel to world, ``(4, 4)``, of a grid with ``affine`` (3, 3) in the plane of ``like`` (4, 4)."""
    axes, normal = _plane(like)
    out = np.eye(4)
    out[:3, :2] = axes @ affine[:2, :2]
    out[:3, 2] = like[:3, 2]
    out[:3, 3] = axes @ affine[:2, 2] + normal * (normal @ like[:3, 3])
    return out


def foreground_unit(data: Tensor) -> tuple[Tensor, Tensor]:
    """Offset and unit of an image: (data − offset) / unit is not negative and has a foreground of mean one. Scanners' units are arbitrary.

    The foreground is what exceeds the mean of all that is not the darkest: in an image of two values the higher, in a constant one everything.

    Arguments:
        data: ``(*shape)``, NaN where nothing is known.

    Raises:
        ValueError: where nothing is known anywhere.
    """
    known = data[~data.isnan()]
    if not len(known):
        raise ValueError("expected an image with some values, got one of NaN alone")
    offset = known.min().clamp_max(0.0)
    seen = known[known > known.min()] - offset
    if not len(seen):
        same = known.max() - offset
        return offset, torch.where(same > 0, same, torch.ones_like(same))
    bright = seen[seen > seen.mean()]
    return offset, bright.mean() if len(bright) else seen.mean()


def scaled(data: Tensor) -> Tensor:
    """An image with a foreground of mean one."""
    offset, unit = foreground_unit(data)
    return (data - offset) / unit
