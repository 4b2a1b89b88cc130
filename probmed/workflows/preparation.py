"""Bringing a subject's scans together: one grid, one unit, and nothing where there is nothing to explain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from probmed.atlases import LabelAtlas
from probmed.grids import Grid, MaskedGrid, resample, sample
from probmed.inference.affine import align
from probmed.transforms import Affine
from probmed.volumes import UnusableInput, Volume, foreground_unit

_CONSTANT_SHARE = 0.15
_SURE_LITRES = 2.0  # a brain with some of its fluid
_LARGEST_LITRES = 3.2  # a brain with all of it, in the simulations; heads whose air was set to zero start at 2.5
_SURE_GROWTH = 1.1  # of volume from a brain to the atlas's, which is large; a head that is taken for a brain has to shrink
_SHELL_MM = (6.0, 18.0)


@dataclass(frozen=True)
class Prepared:
    """The channels of one subject on the first one's grid.

    Arguments:
        image: ``(C, *shape)``, (I − offset) / unit, so that the foreground's mean is one; NaN where a channel has nothing.
        grid: of the first channel.
        unit, offset: intensities, ``(C,)``.
        stripped: whether the brain stands alone on a constant background.
        atlas: the atlas for it; for a stripped brain only the brain's labels.
        start: affine from the scan's world to the atlas's, mm.
        points: the subsampled voxels near the brain on which a model is fitted, and their values ``(C, N)``.
    """

    image: Tensor
    grid: Grid
    unit: Tensor
    offset: Tensor
    stripped: bool
    atlas: LabelAtlas
    start: Tensor
    points: MaskedGrid
    values: Tensor


def prepare(
    volumes: Sequence[Volume], atlas: LabelAtlas, spacing_mm: float, margin_mm: float, seed: int, device: torch.device
) -> Prepared:
    """Resample, scale, tell a stripped brain from a head, align the atlas, and choose the voxels to fit.

    Raises:
        UnusableInput: where the channels do not overlap, or the scan shows no brain.
    """
    grid = volumes[0].grid
    channels, units, offsets = [], [], []
    for volume in volumes:
        data = volume.data.to(device)
        offset, unit = foreground_unit(data)
        data = data - offset
        if volume is not volumes[0]:
            data = resample(data[None], volume.grid, grid, fill=float("nan"))[0]
            if bool(data.isnan().all()):
                raise UnusableInput(
                    volume.name, f"does not overlap {volumes[0].name} in the world", "check that both headers describe the same session"
                )
        channels.append(data / unit)
        units.append(unit)
        offsets.append(offset)
    image = torch.stack(channels)

    steps = [max(1, round(spacing_mm / h)) for h in grid.spacing]
    coarse_grid = grid.subsampled(steps)
    coarse = image[:, :: steps[0], :: steps[1], :: steps[2]]
    first = coarse[0].nan_to_num(0.0).cpu()
    stripped, start = _stripped_and_aligned(first, coarse_grid, atlas, seed)
    if stripped:
        # Zeros outside a stripped brain are not an observation of anything.
        background = torch.stack([_is_commonest(channel) for channel in image])
        image = image.masked_fill(background.all(0) | (background & (image == 0)), torch.nan)
        coarse = image[:, :: steps[0], :: steps[1], :: steps[2]]
        atlas = _without_outside(atlas)
    near = (distance_from_brain(atlas, start, coarse_grid) < margin_mm).to(device)
    points = MaskedGrid(coarse_grid, near & ~coarse.isnan().all(0))
    if points.numel < 200:
        raise UnusableInput(volumes[0].name, "shows no brain where the atlas was aligned", "check its orientation and its header")
    return Prepared(
        image, grid, torch.stack(units), torch.stack(offsets), stripped, atlas, start, points, points.gather(coarse)
    )


def _stripped_and_aligned(image: Tensor, grid: Grid, atlas: LabelAtlas, seed: int) -> tuple[bool, Tensor]:
    """Whether the brain stands alone, and the affine from the scan's world to the atlas's, mm.

    A scanner's background is noise; an exactly constant one was made by software, which may have removed the skull as well. It has where the shell
    around the brain is constant too. With the brain's atlas a head would always look so: it shrinks until the whole of it is brain. What is larger
    than a brain, or shrinks, is therefore aligned as a head.

    Arguments:
        image: ``(*grid.shape)``.
    """
    constant = _is_commonest(image)
    litres = float((~constant).sum()) * grid.voxel_volume / 1e6
    if float(constant.float().mean()) <= _CONSTANT_SHARE or litres > _LARGEST_LITRES:
        return False, align(image, grid, atlas, seed=seed).matrix
    bare = align(image, grid, atlas.stripped(), seed=seed).matrix
    sure = litres < _SURE_LITRES and float(torch.linalg.det(bare)) > _SURE_GROWTH
    start = bare if sure else align(image, grid, atlas, seed=seed).matrix
    distance = distance_from_brain(atlas, start, grid)
    above = Affine(start)(grid.coordinates())[..., 2] > 0
    shell = (distance > _SHELL_MM[0]) & (distance < _SHELL_MM[1]) & above
    if not bool(shell.any()) or float(constant[shell].float().mean()) > 0.8:
        return True, bare
    return False, align(image, grid, atlas, seed=seed).matrix if sure else start


def _is_commonest(image: Tensor) -> Tensor:
    """Where an image has its commonest value, which a background has that software made."""
    return image == image[~image.isnan()].mode().values


def distance_from_brain(atlas: LabelAtlas, start: Tensor, grid: Grid) -> Tensor:
    """Distance of each voxel from the atlas's brain once aligned, mm of the atlas, ``(*shape)``."""
    coarse = atlas.resampled(4.0)
    outside = (coarse.brain_probability < 0.3).cpu().numpy()
    distance = torch.as_tensor(distance_transform_edt(outside, sampling=coarse.grid.spacing), dtype=torch.float32)
    return sample(distance[None], coarse.grid, Affine(start)(grid.coordinates()), fill="edge")[0]


def _without_outside(atlas: LabelAtlas) -> LabelAtlas:
    """The atlas for what a skull-stripping left: what is neither grey nor white is fluid. A background of its own would take the dark fluid and
    leave the half-grey voxels to the fluid's label."""
    outside = [name for name in atlas.names if name not in atlas.brain]
    if "CSF" not in atlas.brain or not outside:
        return atlas.stripped()
    merged = atlas.merged({name: [name, *(outside if name == "CSF" else [])] for name in atlas.brain})
    # The fluid keeps its own number, though the outside's, 0, is smaller.
    return replace(merged, indices=tuple(atlas.indices[atlas.names.index(name)] for name in merged.names))
