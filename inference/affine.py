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


@dataclass(frozen=True)
class Alignment:
    """matrix: scan's world to atlas's world, mm, float64; information: the mutual information reached, nats."""

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
            starts.append(Affine.exp(torch.tensor([0, 0, lift, pitch, 0, 0.0]), centre=middle).matrix @ shift)
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
    width = edges[1] - edges[0]
    # Beyond its edge the image goes on as its nearest voxel, so that images that part gain nothing by it.
    image = moving.masked_fill(moving.isnan(), float(edges[0]))[None]
    centre, middle = _centre_of_mass(fixed, grid), _centre_of_mass(moving, moving_grid)
    reach = ((world - centre) ** 2).sum(-1).mean().sqrt()

    def information(matrix: Tensor, values: Tensor, chosen: slice) -> Tensor:
        moved = sample(image, moving_grid, Affine(matrix)(world[chosen]), fill="edge")[0]
        position = ((moved - edges[0]) / width - 0.5).clamp(0, bins - 1 - 1e-4)
        low = position.detach().floor().long()
        share, cell = position - low, label[chosen] * bins + low
        joint = moved.new_zeros(bins * bins).index_add(0, cell, 1 - share).index_add(0, cell + 1, share).reshape(bins, bins)
        implausible = (values[rigid:] / 0.3).square().sum() / 2
        return mutual_information(joint) - implausible / _OBSERVATIONS

    turns = [torch.zeros(rigid)]
    for axis in range(d, rigid):
        for angle in (-0.3, 0.3):
            turn = torch.zeros(rigid)
            turn[axis] = angle
            turns.append(turn)
    by_mass = _translation(middle - centre)
    starts = [torch.eye(d + 1), *(Affine.exp(turn, d, middle).matrix.float() @ by_mass for turn in turns)]
    return _climb(information, starts, middle, float(reach), (min(parameters, rigid + 1), parameters), tries=3, finals=1)


def _climb(
    information: Callable[[Tensor, Tensor, slice], Tensor],
    starts: Sequence[Tensor],
    middle: Tensor,
    reach_mm: float,
    counts: tuple[int, int],
    tries: int = 5,
    finals: int = 2,
) -> Alignment:
    """The ``tries`` best starts climb with few points and ``counts[0]`` parameters, the ``finals`` best of these with all points and
    ``counts[1]``; the best is kept."""
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

    def climb(start: Tensor, parameters: Tensor, steps: int, chosen: slice) -> tuple[Tensor, float]:
        free = parameters.clone().requires_grad_()
        optimiser = torch.optim.LBFGS([free], lr=1.0, max_iter=steps, history_size=12, line_search_fn="strong_wolfe", tolerance_change=1e-6)

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
    if len(starts) > tries:
        with torch.no_grad():
            known = [float(information(start, torch.zeros(full), few)) for start in starts]
        starts = [starts[i] for i in sorted(range(len(starts)), key=lambda i: -known[i])[:tries]]
    candidates = [(start, *climb(start, torch.zeros(counts[0]), 12, few)) for start in starts]
    candidates.sort(key=lambda c: -c[2] if math.isfinite(c[2]) else math.inf)
    best: tuple[Tensor, float] | None = None
    for start, parameters, _ in candidates[:finals]:
        parameters, reached = climb(start, parameters if counts[1] == counts[0] else expand(parameters), 40, slice(None))
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
    weight = image.nan_to_num(0.0)
    low, high = torch.quantile(weight.flatten()[:: max(1, weight.numel() // 100_000)], torch.tensor([0.02, 0.98]))
    weight = ((weight - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return (grid.coordinates() * weight[..., None]).flatten(0, -2).sum(0) / weight.sum().clamp_min(1e-12)


def _translation(by: Tensor) -> Tensor:
    matrix = torch.eye(len(by) + 1)
    matrix[: len(by), len(by)] = by
    return matrix
