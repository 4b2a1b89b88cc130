"""Affine alignment of a scan to an atlas by mutual information between intensities and labels.

The objective is the mutual information between the scan's intensity bin and the atlas's label at the same point,
I = Σ_bk p(b, k) log p(b, k) / (p(b) p(k)), p(b, k) ∝ Σ_v [I_v in b] T_k(A x_v): it needs no template of the same contrast.

References: Ashburner & Friston, NeuroImage 2005 (spm_maff); D'Agostino et al., MedIA 2006 (intensities against labels).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from probmed.atlases import LabelAtlas
from probmed.grids import Grid, channels_last, sample
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
    joint = probabilities.new_zeros(probabilities.shape[0], count).index_add(1, bins, probabilities)
    joint = joint / joint.sum() + 1e-9
    return (joint * (joint / (joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True))).log()).sum()


def align(image: Tensor, grid: Grid, atlas: LabelAtlas, bins: int = 48, points: int = 30_000, seed: int = 0) -> Alignment:
    """The affine map from a scan's world to an atlas's, from several starts, the best kept.

    Arguments:
        image: ``(*shape)``, NaN where there is nothing.
        atlas: its labels; its ``head_probability`` or brain gives the starting centre.
    """
    generator = torch.Generator().manual_seed(seed)
    index = torch.nonzero(~image.flatten().isnan())[:, 0]
    index = index[torch.randperm(len(index), generator=generator)[:points]]
    values = image.flatten()[index]
    voxels = torch.stack(torch.unravel_index(index, image.shape), -1).to(torch.float32)
    world = grid.voxel_to_world(voxels)
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

    scale = torch.tensor([1.0] * 3 + [1 / 60] * 3 + [1 / 60] * 6)

    def information(parameters: Tensor, start: Tensor, chosen: slice) -> Tensor:
        matrix = Affine.exp(parameters * scale, centre=middle).matrix @ start
        probability = sample(maps, coarse.grid, Affine(matrix)(world[chosen]), fill="edge")
        implausible = ((parameters[6:] * scale[6:] - _EXPECTED) / _PLAUSIBLE).square().sum() / 2
        return label_information(label[chosen], probability, bins) - implausible / _OBSERVATIONS

    def climb(start: Tensor, parameters: Tensor, count: int, steps: int, chosen: slice) -> tuple[Tensor, float]:
        free = parameters[:count].clone().requires_grad_()
        rest = parameters[count:]
        optimiser = torch.optim.LBFGS([free], lr=1.0, max_iter=steps, history_size=12, line_search_fn="strong_wolfe", tolerance_change=1e-6)

        def closure() -> Tensor:
            optimiser.zero_grad()
            # The factor makes a first step of about a centimetre.
            loss = -100 * information(torch.cat([free, rest]), start, chosen)
            loss.backward()
            return loss

        optimiser.step(closure)
        with torch.no_grad():
            found = torch.cat([free, rest])
            return found.detach(), float(information(found, start, chosen))

    candidates = []
    for pitch in (0.0, -0.3, 0.3):
        for lift in (0.0, 20.0, -30.0) if pitch == 0 else (0.0,):
            start = Affine.exp(torch.tensor([0, 0, lift, pitch, 0, 0.0]), centre=middle).matrix
            shift = torch.eye(4)
            shift[:3, 3] = middle - centre
            start = start @ shift
            candidates.append((start, *climb(start, torch.zeros(12), 7, 12, slice(_FEW))))
    candidates.sort(key=lambda c: -c[2])
    best: tuple[Tensor, float] | None = None
    for start, parameters, _ in candidates[:2]:
        parameters, reached = climb(start, parameters, 12, 40, slice(None))
        matrix = Affine.exp(parameters * scale, centre=middle).matrix @ start
        if best is None or reached > best[1]:
            best = matrix, reached
    if best is None or not math.isfinite(best[1]):
        raise ValueError("the alignment found no overlap between the scan and the atlas")
    return Alignment(best[0].double(), best[1])
