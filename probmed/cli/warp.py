"""`probmed warp`: images, labels and points through transforms of ITK, ANTs and `probmed segment`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from probmed.cli import progress
from probmed.cli.options import DebugOption, QuietOption, make_folder
from probmed.grids import Grid, sample
from probmed.tables import read_table
from probmed.tables.files import SEPARATORS
from probmed.tables.points import AXES, coordinates
from probmed.transforms import Transform
from probmed.volumes import UnusableInput, Volume, atomic_write, read_labels, read_scan, write_labels, write_scan
from probmed.volumes.files import image_suffix
from probmed.volumes.formats import decode, spatial_shape
from probmed.warps import TransformFile, TransformList, inverse_at, write_warp

_SLAB = 1 << 20  # voxels moved at once


@dataclass(frozen=True)
class _Request:
    """How to carry, and where to; nothing is read yet."""

    transforms: tuple[TransformFile, ...]
    invert: bool
    labels: bool
    out: Path
    inputs: tuple[Path, ...]

    def read(self) -> TransformList:
        """All transforms, reference world to the image's world, mm."""
        files = self.transforms
        return TransformList.read([file.inverse() for file in reversed(files)] if self.invert else files)


def warp(
    image: Annotated[
        Path | None,
        typer.Argument(
            metavar="IMAGE",
            help="Image to carry: NIfTI or MGH, in two or three dimensions. None with --points and --compose.",
            show_default=False,
        ),
    ] = None,
    transform: Annotated[
        list[str] | None,
        typer.Option(
            "--transform",
            "-t",
            metavar="FILE",
            help="Warp (.nii.gz) or linear transform (.txt, .tfm, .mat) of ITK, ANTs or probmed. May be repeated, "
            "in the order of antsApplyTransforms: the last one given moves the image first. '\\[FILE,1]' is the "
            "inverse of FILE.",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", "-r", help="Image whose voxels the output has.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write.", show_default=False)] = None,
    labels: Annotated[
        bool, typer.Option("--labels", help="IMAGE is a label map: nearest voxel, whole numbers kept.")
    ] = False,
    invert: Annotated[bool, typer.Option("--invert", help="Go the other way: invert the whole list.")] = False,
    points: Annotated[
        Path | None,
        typer.Option(
            metavar="TABLE",
            help="Carry points instead of an image: .tsv or .csv with columns x, y (and z), RAS mm; other columns "
            "are kept.",
            show_default=False,
        ),
    ] = None,
    compose: Annotated[
        bool, typer.Option("--compose", help="Write all transforms as one warp over the reference instead.")
    ] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Carry an image, a label map or points through transforms onto a reference.

    The image is interpolated linearly, a label map takes the nearest voxel; outside the image there is 0. The output
    has the reference's voxels and header. Beyond a warp's field points move like the nearest edge of it.

    Points go the same way as the image, from its world to the reference's, which is with the inverse of the map in
    the file. So with the same -t, antsApplyTransformsToPoints goes the other way, as --invert does here; and its
    points are in LPS: negate x and y.

    [bold]Examples[/bold]

        probmed warp T1w.nii.gz -t T1w_from-scan_to-atlas_mode-image_xfm.nii.gz -r atlas.nii.gz -o T1w_atlas.nii.gz

        probmed warp regions.nii.gz -t warp.nii.gz -t affine.mat -r T1w.nii.gz -o T1w_regions.nii.gz --labels

        probmed warp --points landmarks.tsv -t warp.nii.gz -t affine.mat -o moved.tsv
    """
    with progress.in_one_line(f"{image or points or out}", debug) as made:
        if (image is not None) + (points is not None) + compose != 1:
            raise UnusableInput(
                "probmed warp", "carries one thing at a time", "give one of IMAGE, --points and --compose"
            )
        if out is None:
            raise UnusableInput("--out", "is missing", "name the file to write with -o")
        if not transform:
            raise UnusableInput("--transform", "is missing", "give at least one file with -t")
        if labels and image is None:
            raise UnusableInput("--labels", "is for images", "leave it out")
        files = tuple(TransformFile.parse(text) for text in transform)
        inputs = tuple(path for path in (image, points, reference, *(file.path for file in files)) if path)
        request = _Request(files, invert, labels, out, inputs)
        with progress.collected_warnings([str(path) for path in inputs]) as lines:
            if points is not None:
                _check_out(request, tuple(SEPARATORS))
                made += make_folder(out.parent)
                said = _move_points(request, points)
            elif reference is None:
                raise UnusableInput("--reference", "is missing", "name the image whose voxels the output has with -r")
            elif image is None:
                _check_out(request, (".nii.gz", ".nii"))
                made += make_folder(out.parent)
                said = _compose(request, reference)
            else:
                _check_out(request, (".nii.gz", ".nii", ".mgz", ".mgh"))
                made += make_folder(out.parent)
                said = _move_image(request, image, reference)
    if not quiet:
        for line in lines:
            progress.say(f"warning: {line}", "yellow")
        typer.echo(f"{said}\n  {out}")


def _check_out(request: _Request, suffixes: Sequence[str]) -> None:
    """Refuse, before any work, a file that cannot be written or is an input."""
    out = request.out
    if not out.name.lower().endswith(tuple(suffixes)):
        raise UnusableInput(out, "has no suffix that can be written", f"name it {' or '.join(suffixes)}")
    for path in request.inputs:
        if out.resolve() == path.resolve() or (out.exists() and path.exists() and out.samefile(path)):
            raise UnusableInput(out, "is an input and would be overwritten", "choose another output")
    if out.is_dir():
        raise UnusableInput(out, "is a folder", "give the name of a file to write")


def _move_image(request: _Request, image_path: Path, reference_path: Path) -> str:
    """Write the image on the reference's voxels; give what was done."""
    image = read_labels(image_path) if request.labels else read_scan(image_path)
    reference = _read_place(reference_path)
    transforms = request.read()
    source = _placed(image, image_path, transforms.ndim, request)
    target = _placed(reference, reference_path, transforms.ndim, request)
    transforms.check_place(_some_of(target.grid), str(reference_path))
    data, share = pulled(source.data, source.grid, transforms.whole, target.grid, "nearest" if request.labels else "linear")
    if share == 0:
        remedy = "check the order and the direction of the transforms (--invert), and that all are of one subject"
        raise UnusableInput(reference_path, f"does not overlap {image_path} after the transform", remedy)
    shaped = data.reshape(reference.shape)
    kind = _label_type(image, request.out) if request.labels else "float32"
    if kind is None:
        write_labels(request.out, shaped, reference, request.inputs)
    else:
        write_scan(request.out, shaped, reference, kind, request.inputs)
    size = " × ".join(str(n) for n in reference.file_shape)
    return f"{image_path}: on {size} voxels of {reference_path}, {100 * share:.0f} % of them inside the image"


def pulled(image: Tensor, source: Grid, transform: Transform, target: Grid, mode: str) -> tuple[Tensor, float]:
    """``image(transform(x))`` at the voxels x of ``target``, slab by slab, with places in float64.

    Arguments:
        image: ``(*source.shape)``, floating or, with ``mode="nearest"``, integers.
        transform: target world to source world, mm.
        mode: ``"linear"`` or ``"nearest"``; 0 outside the image.

    Returns:
        The image ``(*target.shape)``, and the share of its voxels that lie inside the source.
    """
    top = torch.tensor(source.shape, dtype=torch.float64) - 0.5
    step = max(1, _SLAB * target.shape[0] // target.numel)
    parts, inside = [], 0
    for start in range(0, target.shape[0], step):
        stop = min(start + step, target.shape[0])
        first, last = [0] * target.ndim, list(target.shape)
        first[0], last[0] = start, stop
        places = transform(target.cropped(first, last).coordinates(torch.float64)).reshape(-1, target.ndim)
        voxels = source.world_to_voxel(places)
        inside += int(((voxels >= -0.5) & (voxels <= top)).all(-1).sum())
        parts.append(sample(image[None], source, places, mode)[0].reshape(stop - start, *target.shape[1:]))
    return torch.cat(parts), inside / target.numel


def _compose(request: _Request, reference_path: Path) -> str:
    """Write all transforms as one field over the reference; give what was done."""
    transforms = request.read()
    target = _placed(_read_place(reference_path), reference_path, transforms.ndim, request)
    transforms.check_place(_some_of(target.grid), str(reference_path))
    write_warp(request.out, transforms.whole, target.grid, protect=request.inputs)
    count = len(request.transforms)
    return f"{count} transform{'s' * (count > 1)} as one warp over {reference_path}"


def _move_points(request: _Request, path: Path) -> str:
    """Write the table with its points moved; give what was done."""
    table = read_table(path)
    transforms = TransformList.read(request.transforms)
    names = list(AXES[: transforms.ndim])
    missing = [name for name in names if name not in table.columns]
    if missing or (transforms.ndim == 2 and "z" in table.columns):
        wrong = f"has no column {missing[0]}" if missing else "has a column z"
        fault = f"{wrong}, and {request.transforms[0].path} is {_of(transforms.ndim)}"
        raise UnusableInput(path, fault, f"give columns {', '.join(names)} in mm, RAS")
    given = coordinates(path, table, names)
    try:
        moved = transforms.whole(given) if request.invert else inverse_at(transforms.whole, given)
    except ValueError as error:
        remedy = "remove the points far from the image, or give the file of the inverse with --invert"
        raise UnusableInput(path, f"cannot be carried ({error})", remedy) from error
    transforms.check_place(given if request.invert else moved, str(path))
    for column, values in zip(names, moved.T.tolist(), strict=True):
        table[column] = [f"{value:.6f}" for value in values]
    separator = SEPARATORS[request.out.suffix.lower()]
    with atomic_write(request.out, request.inputs) as temporary:
        temporary.write_text(table.to_csv(sep=separator, index=False, na_rep="n/a", lineterminator="\n"), encoding="utf-8")
    return f"{path}: {len(table)} points"


def _read_place(path: Path) -> Volume:
    """An image's voxels in the world; its values, all 0 here, do not matter."""
    stored = decode(path)
    file_shape = tuple(int(n) for n in stored.raw.shape)
    shape = (*spatial_shape(file_shape), 1)[:3]
    grid = Grid(shape, torch.from_numpy(stored.affine))
    return Volume(torch.zeros(shape), grid, stored.affine, stored.header, path, file_shape)


def _some_of(grid: Grid) -> Tensor:
    """Points of a grid, at most 32 along each axis, its ends' among them or less than a step away, ``(..., d)`` mm."""
    return grid.subsampled([-(-n // 32) for n in grid.shape]).coordinates(torch.float64)


def _placed(volume: Volume, path: Path, ndim: int, request: _Request) -> Volume:
    """The volume in the transforms' dimension: a slice as one layer of voxels, or flat in the axial plane.

    Raises:
        UnusableInput: for a two-dimensional transform and a volume, or a slice that is not axial.
    """
    solid = volume.as_3d()
    if ndim == 3:
        return solid
    warp_path = request.transforms[0].path
    if solid.shape[2] > 1:
        remedy = "give a transform of three dimensions, or a single slice"
        raise UnusableInput(warp_path, f"is two-dimensional, and {path} is three-dimensional", remedy)
    affine = solid.affine
    if np.abs(affine[2, :2]).max() > 1e-3 * np.linalg.norm(affine[:3, :2], axis=0).min():
        remedy = "give a transform of three dimensions"
        raise UnusableInput(path, f"is no axial slice, and {warp_path} is two-dimensional", remedy)
    flat = torch.from_numpy(affine[np.ix_([0, 1, 3], [0, 1, 3])])
    return dataclasses.replace(volume, data=solid.data[..., 0], grid=Grid(solid.shape[:2], flat))


def _label_type(labels: Volume, out: Path) -> str | None:
    """The integers that the label map's file has, None where they are none or ``out`` cannot hold them."""
    kind = np.dtype(labels.header.get_data_dtype())
    held = kind.kind in "iu" and (image_suffix(out) in (".nii", ".nii.gz") or kind.name in ("uint8", "int16", "int32"))
    fits = held and np.iinfo(kind).min <= int(labels.data.min()) and int(labels.data.max()) <= np.iinfo(kind).max
    return kind.name if fits else None


def _of(d: int) -> str:
    return "two-dimensional" if d == 2 else "three-dimensional"
