"""Labels of the moving image on the fixed one, with what the posterior of the deformation leaves open."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from probmed.grids import Grid, sample
from probmed.transforms import Transform
from probmed.volumes import UnusableInput, Volume, bids_stem, read_labels
from probmed.workflows.registration import RegistrationResult, places
from probmed.workflows.segmentation import interval_table

_MANY = 1 << 29  # probabilities, 2 GB; a hundred regions of a fine scan are held in half precision


@dataclass(frozen=True)
class Propagation:
    """Labels carried by a registration, on the fixed image's grid.

    Arguments:
        indices, names: of the labels but 0, ``(K,)``.
        labels: ``(*shape)`` int64, each voxel's label at the most probable deformation, of the nearest voxel.
        probabilities: p(label) of each, ``(K, *shape)``, the mean over draws; None without draws.
        volumes: ``interval_table`` in ml; without draws the volume alone.
    """

    indices: tuple[int, ...]
    names: tuple[str, ...]
    labels: Tensor
    probabilities: Tensor | None
    volumes: pd.DataFrame


def propagate(labels: Volume, result: RegistrationResult, names: Mapping[int, str] | None = None) -> Propagation:
    """Carry a label map of the moving image to the fixed one.

    Of each draw of the deformation a voxel has each label's share of its place in the moving image, interpolated linearly; a label's volume is the
    sum of its shares.

    Arguments:
        labels: on the moving image's grid.
        names: of the labels; their numbers by default.
    """
    found = labels.data.unique()
    indices = tuple(int(k) for k in found if k != 0)
    grid = result.fixed.grid
    code = torch.zeros_like(labels.data)
    for number, index in enumerate(indices, 1):
        code[labels.data == index] = number
    nearest = sample(labels.data[None], labels.grid, places(result.transform, grid), "nearest")[0]
    draws = result.draws or [result.transform]
    voxel_ml = result.fixed.as_3d().grid.voxel_volume / 1000
    volumes = torch.zeros(len(draws), len(indices), dtype=torch.float64)
    precision = torch.float16 if len(indices) * grid.numel > _MANY else torch.float32
    probabilities = torch.zeros(len(indices), grid.numel, dtype=precision) if result.draws else None
    for number, draw in enumerate(draws):
        voxels, label, share = label_shares(code, labels.grid, draw, grid)
        volumes[number] = torch.bincount(label, share.double(), len(indices) + 1)[1:] * voxel_ml
        if probabilities is not None:
            inside = label > 0
            probabilities.view(-1).index_add_(0, (label[inside] - 1) * grid.numel + voxels[inside], (share[inside] / len(draws)).to(precision))
    table = interval_table(indices, called(labels, names), volumes.mean(0), volumes if result.draws else volumes[:0])
    shaped = None if probabilities is None else probabilities.clamp_max(1.0).reshape(-1, *grid.shape)
    return Propagation(indices, called(labels, names), nearest, shaped, table)


@dataclass(frozen=True)
class LabelledTemplate:
    """An image with probabilities of the labels, background first, ``(K + 1, *shape)``, that another image gave it."""

    scan: Volume
    probabilities: Tensor


Register = Callable[[Volume, Volume], RegistrationResult]


def label_templates(labels: Volume, scan: Volume, templates: Sequence[Volume], register: Register) -> list[LabelledTemplate]:
    """Carry the labels of one scan to others that have none, which then label further ones (``fuse``).

    Arguments:
        labels: on the scan's grid.
        register: a moving volume onto a fixed one, as ``registration.register``.

    References: Chakravarty et al., Human Brain Mapping 2013 (one atlas, many templates).
    """
    codes = [0, *(int(k) for k in labels.data.unique() if k != 0)]
    shares = torch.stack([(labels.data == k).float() for k in codes])
    return [LabelledTemplate(other, _carried(shares, labels.grid, register(scan, other), other.grid)) for other in templates]


def fuse(templates: Sequence[LabelledTemplate], target: Volume, register: Register) -> Tensor:
    """What each template says of the labels of a scan, ``(T, K + 1, *shape)``; their mean over T is the probability of each.

    The templates' errors, and those of the registrations, are largely their own: the mean has less of them, and the spread over templates shows them.
    """
    return torch.stack([_carried(t.probabilities, t.scan.grid, register(t.scan, target), target.grid) for t in templates])


def _carried(shares: Tensor, source: Grid, result: RegistrationResult, target: Grid) -> Tensor:
    return sample(shares, source, places(result.transform, target), fill="edge")


def called(labels: Volume, names: Mapping[int, str] | None) -> tuple[str, ...]:
    """Names of a label map's labels but 0, in their order, no two the same; numbers where there are none."""
    indices = [int(k) for k in labels.data.unique() if k != 0]
    given = [(names or {}).get(index, str(index)) for index in indices]
    return tuple(name if given.count(name) == 1 else f"{name} {index}" for name, index in zip(given, indices, strict=True))


def label_shares(code: Tensor, source: Grid, transform: Transform, target: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Linear interpolation of a label map's indicator functions, as a list: of voxels of the target, flat, their labels and the labels' shares,
    ``(N,)`` each. A voxel may be there several times, with one label too; those whose neighbours are all 0 are left out.

    Arguments:
        code: ``(*source.shape)`` int64.
        transform: target world to source world, mm.
    """
    d = source.ndim
    shape = torch.tensor(source.shape)
    strides = torch.tensor([int(shape[a + 1 :].prod()) for a in range(d)])
    # A corner is near a label where any of the cell's corners has one.
    pool = functional.max_pool2d if d == 2 else functional.max_pool3d
    edge = [n for _ in range(d) for n in (0, 1)]
    near = pool(functional.pad((code > 0).float()[None, None], edge), 2, 1)[0, 0].flatten() > 0
    places_there = source.world_to_voxel(places(transform, target).reshape(-1, d))
    inside = ((places_there >= -0.5) & (places_there <= shape - 0.5)).all(-1)
    held = torch.minimum(places_there.clamp_min(0), (shape - 1).to(places_there))
    corner = held.floor().long()
    voxels = (inside & near[corner @ strides]).nonzero()[:, 0]
    corner, held = corner[voxels], held[voxels]
    part = held - corner
    flat = code.flatten()
    labels, shares = [], []
    for offset in itertools.product((0, 1), repeat=d):
        step = torch.tensor(offset)
        labels.append(flat[torch.minimum(corner + step, shape - 1) @ strides])
        shares.append(torch.where(step == 1, part, 1 - part).prod(-1))
    return voxels.repeat(2**d), torch.cat(labels), torch.cat(shares)


def read_moving_labels(path: Path, moving: Volume) -> tuple[Volume, dict[int, str]]:
    """A label map of the moving image, and the names of its labels where a table ``.tsv`` beside it, as BIDS has it, tells them.

    Raises:
        UnusableInput: where it cannot be read, is on another grid, or has no labels.
    """
    labels = read_labels(path)
    check_same_grid(labels, moving)
    if not bool(labels.data.any()):
        raise UnusableInput(path, "is empty: every voxel is 0", "give a map of labels other than 0")
    return labels, names_beside(path)


def read_mask(path: Path, fixed: Volume) -> Tensor:
    """Where a mask of the fixed image is not 0, ``(*fixed.shape)`` bool.

    Raises:
        UnusableInput: where it cannot be read, is on another grid, or is empty.
    """
    mask = read_labels(path)
    check_same_grid(mask, fixed)
    if not bool(mask.data.any()):
        raise UnusableInput(path, "is empty: every voxel is 0", "give a mask that is 1 where the images are to be matched, or none")
    return mask.data != 0


def check_same_grid(volume: Volume, other: Volume) -> None:
    """Refuse a volume whose voxels are not those of another, to a hundredth of a voxel.

    Raises:
        UnusableInput: naming both.
    """
    remedy = f"resample it to the voxels of {other.name} with nearest neighbour, or give the one that was drawn on it"
    if volume.shape != other.shape:
        sizes = ["×".join(str(n) for n in v.shape) for v in (volume, other)]
        raise UnusableInput(volume.name, f"is on another grid than {other.name}: {sizes[0]} voxels, not {sizes[1]}", remedy)
    corners = torch.tensor(list(itertools.product(*((0.0, n - 1.0) for n in other.shape))), dtype=torch.float64)
    distance = (volume.grid.voxel_to_world(corners) - other.grid.voxel_to_world(corners)).norm(dim=-1).max()
    if distance > 0.01 * min(other.spacing):
        raise UnusableInput(volume.name, f"is on another grid than {other.name}: its corners are up to {float(distance):.2g} mm away", remedy)


def table_beside(path: Path) -> Path:
    """Where BIDS has the names of a label map's labels."""
    return path.with_name(f"{bids_stem(path)}.tsv")


def names_beside(path: Path) -> dict[int, str]:
    """Of a label map's codes, where a table beside it has them."""
    try:
        rows = pd.read_csv(table_beside(path), sep="\t", dtype=str, keep_default_na=False)
        return {int(index): str(label) for index, label in zip(rows["index"], rows["name"], strict=True) if label}
    except (OSError, ValueError, KeyError):
        # A file of that name may be about something else.
        return {}
