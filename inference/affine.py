"""Affine alignment by mutual information, of a scan to an atlas or of one image to another.

The objective is the mutual information between the scan's intensity bin and the atlas's label at the same point,
I = Σ_bk p(b, k) log p(b, k) / (p(b) p(k)), p(b, k) ∝ Σ_v [I_v in b] T_k(A x_v): it needs no template of the same contrast. Between two images the
labels are intensity classes of the moving one, with linear Parzen windows.

References: Ashburner & Friston, NeuroImage 2005 (spm_maff); D'Agostino et al., MedIA 2006 (intensities against labels); Mattes et al., IEEE TMI
2003 (two images).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probmed.atlases import LabelAtlas
from probmed.grids import Grid, averaged, channels_last, sample
from probmed.transforms import Affine

# Heads are a little smaller than the MNI152, and none is half as high: log scales and shears are normal, their log density divided by the number
# of independent observations that the mutual information is worth. Without it some heads shrink into the atlas's brain.
_EXPECTED = torch.tensor([0.1] * 3 + [0.0] * 3)
_PLAUSIBLE = torch.tensor([0.12] * 3 + [0.06] * 3)
_OBSERVATIONS = 200.0
_FEW = 8_000  # points, in random order, that tell a good start from a bad one
# Between two images, also standard deviations: of what follows a start's translation, as a part of the points' root mean square distance from their
# middle; of rotations, radians; of log scales. That of shears is theirs over √2, so that nothing depends on the world's axes.
_TRANSLATION, _ROTATION, _STRETCH = 0.3, 0.2, 0.1


@dataclass(frozen=True)
class Alignment:
    """matrix: scan's world to atlas's world, mm, float64; information: the mutual information reached, less what the prior takes, nats."""

    matrix: Tensor
    information: float


def label_information(bins: Tensor, probabilities: Tensor, count: int) -> Tensor:
    """Mutual information in nats between intensity bins ``(N,)`` and soft labels ``(K, N)`` at the same points."""
    return mutual_information(probabilities.new_zeros(probabilities.shape[0], count).index_add(1, bins, probabilities))


def mutual_information(joint: Tensor) -> Tensor:
    """I of a joint histogram ``(A, B)``, nats."""
    joint = joint / joint.sum() + 1e-9
    return (joint * (joint / (joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True))).log()).sum()


def align(image: Tensor, grid: Grid, atlas: LabelAtlas, bins: int = 48, points: int = 30_000, seed: int = 0) -> Alignment:
    """The affine map from a scan's world to an atlas's, from several starts, the best kept.

    Arguments:
        image: ``(*shape)``, NaN where there is nothing.
        atlas: its labels; its ``head_probability`` or brain gives the starting centre.
    """
    world, values = _random_points(image, grid, points, seed)
    # Equal widths between robust ends of what is not background, so that a stripped scan's zeros fill one bin and not all of them.
    inside = values[values > values.min()]
    ends = torch.quantile(inside, torch.tensor([0.002, 0.998]))
    edges = torch.linspace(float(ends[0]), float(ends[1]), bins - 1)
    label = torch.bucketize(values, edges)
    coarse = atlas.resampled(4.0)
    maps = channels_last(coarse.probabilities)
    tissue = 1 - coarse.probabilities[[k for k, n in enumerate(coarse.names) if n in ("air", "background")]].sum(0)
    target = coarse.grid.coordinates()
    middle = (target * tissue[..., None]).flatten(0, -2).sum(0) / tissue.sum()
    low, high = torch.quantile(values, 0.02), torch.quantile(values, 0.98)
    weight = ((values - low) / (high - low)).clamp(0, 1)
    centre = (world * weight[:, None]).sum(0) / weight.sum()

    def information(matrix: Tensor, parameters: Tensor, chosen: slice) -> Tensor:
        probability = sample(maps, coarse.grid, Affine(matrix)(world[chosen]), fill="edge")
        implausible = ((parameters[6:] - _EXPECTED) / _PLAUSIBLE).square().sum() / 2
        return label_information(label[chosen], probability, bins) - implausible / _OBSERVATIONS

    starts = []
    shift = _translation(middle - centre)
    for pitch in (0.0, -0.3, 0.3):
        for lift in (0.0, 20.0, -30.0) if pitch == 0 else (0.0,):
            starts.append((Affine.exp(torch.tensor([0, 0, lift, pitch, 0, 0.0]), centre=middle).matrix @ shift, torch.zeros(6)))
    return _climb(information, starts, middle, 60.0, (7, 12))


def align_images(
    fixed: Tensor,
    grid: Grid,
    moving: Tensor,
    moving_grid: Grid,
    parameters: int | None = None,
    bins: int = 32,
    points: int = 20_000,
    spacing_mm: float | None = None,
    seed: int = 0,
) -> Alignment:
    """The affine map from a fixed image's world to a moving one's, from several starts, the best kept.

    Arguments:
        fixed, moving: ``(*shape)`` in 2D or 3D, NaN where there is nothing.
        parameters: 6, 7 or 12 in 3D, 3, 4 or 6 in 2D; all by default.
        spacing_mm: both images are averaged to this; by default a sixtieth of the fixed image's longest side, if that is coarser.

    Raises:
        ValueError: where no start brings the images to overlap.
    """
    d = grid.ndim
    full = d * (d + 1)
    parameters = full if parameters is None else parameters
    rigid = d * (d + 1) // 2
    spacing_mm = max(n * h for n, h in zip(grid.shape, grid.spacing, strict=True)) / 60 if spacing_mm is None else spacing_mm
    (fixed, grid), (moving, moving_grid) = averaged(fixed, grid, spacing_mm), averaged(moving, moving_grid, spacing_mm)
    if bool(fixed.isnan().all()) or bool(moving.isnan().all()):
        raise ValueError("the alignment found no overlap between the images: one of them has no values")
    world, values = _random_points(fixed, grid, points, seed)
    label = torch.bucketize(values, _edges(values, bins)[1:-1])
    edges = _edges(moving[~moving.isnan()], bins)
    # Beyond its edge the image goes on as its nearest voxel, so that images that part gain nothing by it.
    known = None if not bool(moving.isnan().any()) else (~moving.isnan()).float()
    image = ((moving - edges[0]) / (edges[1] - edges[0]) - 0.5).clamp(0, bins - 1 - 1e-4).nan_to_num(0.0)
    homogeneous = torch.cat([world, torch.ones(len(world), 1)], 1).T.contiguous()
    to_voxels = moving_grid.inverse_affine[:d].float()
    centre, middle = _centre_of_mass(fixed, grid), _centre_of_mass(moving, moving_grid)
    reach = float(((world - centre) ** 2).sum(-1).mean().sqrt())
    shears = rigid - d
    plausible = torch.tensor([_TRANSLATION * reach] * d + [_ROTATION] * shears + [_STRETCH] * d + [_STRETCH / math.sqrt(2)] * shears)

    def information(matrix: Tensor, values: Tensor, chosen: slice) -> Tensor:
        joint = _JointHistogram.apply(to_voxels @ matrix, homogeneous[:, chosen], bins * label[chosen], image, bins, known)
        found = mutual_information(joint.reshape(bins, bins))
        if known is not None:
            # Points where the moving image is unknown tell nothing: without their share in the sum, an image would hide what does not match.
            found = found * joint.sum() / len(label[chosen])
        return found - (values / plausible).square().sum() / 2 / _OBSERVATIONS

    by_mass, none = _translation(middle - centre), torch.zeros(rigid)
    starts = [(torch.eye(d + 1), none), (by_mass, none)]
    for axis in range(d, rigid):
        for angle in (-0.3, 0.3):
            turn = none.clone()
            turn[axis] = angle
            starts.append((by_mass, turn))
    counts = (min(parameters, rigid + 1), parameters)
    return _climb(information, starts, middle, reach, counts, tries=3, finals=1, tolerance=1e-6)


class _JointHistogram(torch.autograd.Function):
    """Joint histogram ``(bins²,)`` of what points have in one image and of another image there, differentiable in the map between them.

    Arguments:
        matrix: points to voxels of the image, ``(d, d+1)``. points: homogeneous, ``(d+1, N)``. first: cell with which a point's row begins, ``(N,)``.
        image: ``(*shape)`` in bins, in [0, bins − 1), 0 where unknown; linear Parzen windows.
        known: ``(*shape)``, 1 where the image is known and 0 elsewhere: a point counts by the share of its corners that are, and has their mean. None
            where all of it is.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, points: Tensor, first: Tensor, image: Tensor, bins: int, known: Tensor | None = None) -> Tensor:
        position = matrix @ points
        value, slopes = _interpolated(image, position)
        weight = weight_slopes = None
        if known is not None:
            weight, weight_slopes = _interpolated(known, position)
            some = weight.clamp_min(1e-6)
            value = (value / some).clamp_max(bins - 1 - 1e-4)  # rounding apart, a mean of values in bins
            slopes = (slopes - value * weight_slopes) / some
        low = value.floor()
        share, cell = value - low, first + low.long()
        ctx.save_for_backward(points, slopes, cell, share, weight, weight_slopes)
        one, other = (1 - share, share) if weight is None else (weight * (1 - share), weight * share)
        return value.new_zeros(bins * bins).index_add_(0, cell, one).index_add_(0, cell + 1, other)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        points, slopes, cell, share, weight, weight_slopes = ctx.saved_tensors
        here, next_ = gradients[0][cell], gradients[0][cell + 1]
        change = next_ - here
        along = slopes * change
        if weight is not None:
            along = weight * along + weight_slopes * (here + share * change)
        return along @ points.T, None, None, None, None, None


def _interpolated(image: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Linear interpolation at voxel positions ``(d, N)``, the nearest voxel's value beyond the edge: value ``(N,)`` and its slopes ``(d, N)``.

    One channel, an axis at a time: a third of the time of ``grid_sample`` with its gradient.
    """
    image = image.contiguous()
    values, shape, strides = image.flatten(), torch.tensor(image.shape)[:, None], torch.tensor(image.stride())[:, None]
    inside = torch.minimum(positions.clamp_min(0), shape - 1)
    low = torch.minimum(inside.floor(), (shape - 2).clamp_min(0))
    voxel = (low.long() * strides).sum(0)
    offsets = [0]
    for stride in (strides * (shape > 1)).flatten().tolist():
        offsets = [offset + step for offset in offsets for step in (0, stride)]
    corners = [[values[voxel + offset]] for offset in offsets]
    for part in reversed(inside - low):
        # Of each corner its value, then its slopes along the axes that are done.
        changes = [[q - p for p, q in zip(a, b, strict=True)] for a, b in zip(corners[::2], corners[1::2], strict=True)]
        along = [[p + part * change for p, change in zip(a, each, strict=True)] for a, each in zip(corners[::2], changes, strict=True)]
        corners = [[a[0], each[0], *a[1:]] for a, each in zip(along, changes, strict=True)]
    value, *slopes = corners[0]
    return value, torch.stack(slopes) * (inside == positions)


def _climb(
    information: Callable[[Tensor, Tensor, slice], Tensor],
    starts: Sequence[tuple[Tensor, Tensor]],
    middle: Tensor,
    reach_mm: float,
    counts: tuple[int, int],
    tries: int = 5,
    finals: int = 2,
    tolerance: float = 1e-8,
) -> Alignment:
    """The ``tries`` best starts climb a few steps with few points and ``counts[0]`` parameters, the ``finals`` best of these with all points and
    ``counts[1]``; the best is kept.

    Arguments:
        starts: each a matrix and the rigid parameters, mm and radians, of a map about the middle that follows it, of which the climb starts.
        tolerance: nats.
    """
    d = len(middle)
    rigid, full = d * (d + 1) // 2, d * (d + 1)
    # A unit of any parameter moves the image by about a millimetre.
    scale = torch.tensor([1.0] * d + [1 / reach_mm] * (full - d))

    def expand(values: Tensor) -> Tensor:
        """The full parameters: a similarity's scale is that of every axis."""
        if len(values) == rigid + 1:
            values = torch.cat([values[:rigid], values[rigid:].expand(d)])
        return torch.cat([values, values.new_zeros(full - len(values))])

    def matrix(parameters: Tensor, start: Tensor) -> Tensor:
        return Affine.exp(expand(parameters) * scale, d, middle).matrix @ start

    def grown(parameters: Tensor, count: int) -> Tensor:
        if len(parameters) == rigid:
            return torch.cat([parameters, parameters.new_zeros(count - rigid)])
        return parameters if len(parameters) == count else expand(parameters)

    def climb(start: Tensor, parameters: Tensor, steps: int, chosen: slice) -> tuple[Tensor, float]:
        free = parameters.clone().requires_grad_()
        optimiser = torch.optim.LBFGS(
            [free], lr=1.0, max_iter=steps, history_size=12, line_search_fn="strong_wolfe", tolerance_change=100 * tolerance
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            # The factor makes a first step of about a centimetre.
            loss = -100 * information(matrix(free, start), expand(free) * scale, chosen)
            loss.backward()
            return loss

        optimiser.step(closure)
        with torch.no_grad():
            return free.detach(), float(information(matrix(free, start), expand(free) * scale, chosen))

    few = slice(_FEW)
    begun = [(start, first / scale[:rigid]) for start, first in starts]
    if len(starts) > tries:
        with torch.no_grad():
            known = [float(information(matrix(first, start), expand(first) * scale, few)) for start, first in begun]
        begun = [begun[i] for i in sorted(range(len(begun)), key=lambda i: -known[i])[:tries]]
    candidates = [(start, *climb(start, grown(first, counts[0]), 12, few)) for start, first in begun]
    candidates.sort(key=lambda c: -c[2] if math.isfinite(c[2]) else math.inf)
    best: tuple[Tensor, float] | None = None
    for start, parameters, _ in candidates[:finals]:
        parameters, reached = climb(start, grown(parameters, counts[1]), 40, slice(None))
        if best is None or reached > best[1]:
            best = matrix(parameters, start), reached
    if best is None or not math.isfinite(best[1]):
        raise ValueError("the alignment found no overlap between the images")
    return Alignment(best[0].double(), best[1])


def _random_points(image: Tensor, grid: Grid, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """World points ``(N, d)`` and values ``(N,)`` of at most ``count`` voxels with a value, in random order."""
    index = torch.nonzero(~image.flatten().isnan())[:, 0]
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))[:count]]
    voxels = torch.stack(torch.unravel_index(index, image.shape), -1).to(torch.float32)
    return grid.voxel_to_world(voxels), image.flatten()[index]


def _edges(values: Tensor, bins: int) -> Tensor:
    """Ends of equal bins between robust ends of what is not background, ``(bins + 1,)``."""
    inside = values[values > values.min()]
    inside = values if len(inside) < 2 else inside
    inside = inside[:: max(1, len(inside) // 100_000)]
    low, high = torch.quantile(inside, torch.tensor([0.002, 0.998], dtype=inside.dtype)).tolist()
    return torch.linspace(low, high if high > low else low + 1, bins + 1)


def _centre_of_mass(image: Tensor, grid: Grid) -> Tensor:
    """Mean position weighted by intensity above the second percentile, mm."""
    inside = image[~image.isnan()]
    low, high = torch.quantile(inside[:: max(1, len(inside) // 100_000)], torch.tensor([0.02, 0.98], dtype=inside.dtype))
    weight = ((image - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).nan_to_num(0.0)
    return (grid.coordinates() * weight[..., None]).flatten(0, -2).sum(0) / weight.sum().clamp_min(1e-12)


def _translation(by: Tensor) -> Tensor:
    matrix = torch.eye(len(by) + 1)
    matrix[: len(by), len(by)] = by
    return matrix
