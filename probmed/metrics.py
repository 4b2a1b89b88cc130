"""How good a result is: overlap, surfaces, folding, calibration, proper scores, and intervals over subjects.

Everything here takes tensors and gives numbers. A surface is the boundary voxels of a set; distances, in
millimetres, come from scipy's exact Euclidean distance transform, and agree with MONAI's.

References:
    T. Gneiting and A. Raftery, Strictly proper scoring rules, prediction, and estimation, JASA 102, 2007.
    C. Guo et al., On calibration of modern neural networks, ICML 2017.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor


def dice(a: Tensor, b: Tensor) -> float:
    """Overlap of two sets of voxels, 2|a ∩ b| / (|a| + |b|); NaN where both are empty.

    Arguments:
        a, b: bool, of the same shape.

    >>> dice(torch.tensor([True, True, False]), torch.tensor([True, False, False])).__round__(4)
    0.6667
    """
    _same(a, b)
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else float("nan")


def mean_dice(a: Tensor, b: Tensor, codes: Iterable[int]) -> float:
    """Mean ``dice`` of two label maps over those codes that either has; NaN where there is none.

    >>> mean_dice(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]), (1, 2, 3)).__round__(4)
    0.3333
    """
    found = [dice(a == code, b == code) for code in codes]
    known = [value for value in found if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


class SurfaceDistances(NamedTuple):
    """From each boundary voxel of one set to the nearest of the other, mm, both ways."""

    forward: Tensor
    backward: Tensor

    def hausdorff(self, quantile: float = 0.95) -> float:
        """The larger of the two directed quantiles, mm: HD95 by default, the Hausdorff distance at 1.

        Infinite where one set is empty, so that a missed structure counts as the worst and not as nothing;
        NaN where both are.
        """
        if not 0 <= quantile <= 1:
            raise ValueError(f"expected a quantile in [0, 1], got {quantile}")
        if self._unmatched():
            return self._unmatched()
        # numpy: torch.quantile refuses more than 2^24 values.
        return max(float(np.quantile(d.numpy(), quantile)) for d in self)

    def average(self) -> float:
        """Average symmetric surface distance: the mean over both boundaries' voxels, mm.

        Empty sets as for `hausdorff`.
        """
        return self._unmatched() or float(torch.cat(tuple(self)).mean())

    def _unmatched(self) -> float:
        if not len(self.forward) and not len(self.backward):
            return float("nan")
        return 0.0 if len(self.forward) and len(self.backward) else float("inf")


def surface_distances(a: Tensor, b: Tensor, spacing: Sequence[float]) -> SurfaceDistances:
    """Distances between the boundaries of two sets of voxels.

    A boundary voxel is one of the set with a face neighbour outside it; beyond the image counts as outside.

    Arguments:
        a, b: bool, ``(*shape)``, two or three dimensions.
        spacing: of the voxels, mm.

    Returns:
        Distances from a's boundary to b's and back. Where one set is empty, the other's are infinite.
    """
    _same(a, b)
    if len(spacing) != a.ndim or min(spacing) <= 0:
        raise ValueError(f"expected {a.ndim} positive spacings, got {tuple(spacing)}")
    a, b = a.bool().cpu(), b.bool().cpu()
    either = (a | b).nonzero()
    if not len(either):
        return SurfaceDistances(torch.zeros(0), torch.zeros(0))
    box = tuple(
        slice(int(low), int(high) + 1) for low, high in zip(either.amin(0), either.amax(0), strict=True)
    )
    edges = [_boundary(x[box]) for x in (a, b)]

    def to(target: Tensor, source: Tensor) -> Tensor:
        if not target.any():
            return torch.full((int(source.sum()),), float("inf"), dtype=torch.float64)
        distance = ndimage.distance_transform_edt(~target.numpy(), sampling=tuple(float(h) for h in spacing))
        return torch.as_tensor(distance)[source]

    return SurfaceDistances(to(edges[1], edges[0]), to(edges[0], edges[1]))


def folding(determinant: Tensor, mask: Tensor | None = None) -> float:
    """Share of voxels where a transform folds, i.e. where its Jacobian determinant is not positive.

    Arguments:
        determinant: of ∂φ/∂x in physical space, ``(*shape)``.
        mask: bool, ``(*shape)``; all voxels by default. NaN where it is empty.
    """
    inside = determinant if mask is None else determinant[mask]
    return float((inside <= 0).double().mean())


def negative_log_likelihood(
    probabilities: Tensor, labels: Tensor, mask: Tensor | None = None, floor: float = 1e-6
) -> float:
    """Mean over voxels of −log p(label), nats.

    Arguments:
        probabilities: ``(K, *shape)``, summing to one over K.
        labels: positions of the true classes, ``(*shape)`` int64 in [0, K).
        mask: which voxels count, ``(*shape)`` bool.
        floor: a probability counts as at least this, or one voxel that was thought impossible makes the mean
            infinite.
    """
    truth = _at(probabilities, labels, mask)[1]
    return float(-truth.double().clamp_min(floor).log().mean())


def brier_score(probabilities: Tensor, labels: Tensor, mask: Tensor | None = None) -> float:
    """Mean over voxels of Σ_k (p_k − [k is the label])², in [0, 2].

    Arguments as in `negative_log_likelihood`.
    """
    chosen, truth = _at(probabilities, labels, mask)
    return float((chosen.double().square().sum(0) - 2 * truth.double() + 1).mean())


def calibration_error(
    probability: Tensor, outcome: Tensor, mask: Tensor | None = None, bins: int = 15
) -> float:
    """Expected calibration error of one class: Σ_b (n_b / n) |mean probability − frequency| over bins b.

    Bins are equal steps of the probability. Over a whole image an error is diluted by the voxels that
    everybody gets right: give a mask (see `boundary_band`).

    Arguments:
        probability: that a voxel is of the class, ``(*shape)``.
        outcome: whether it is, ``(*shape)`` bool.
        mask: which voxels count, ``(*shape)`` bool.

    >>> outcome = torch.tensor([True, True, True, False])
    >>> calibration_error(torch.full((4,), 0.8), outcome).__round__(4)
    0.05
    """
    _same(probability, outcome)
    if bins < 1:
        raise ValueError(f"expected at least one bin, got {bins}")
    p, y = (probability, outcome) if mask is None else (probability[mask], outcome[mask])
    p, y = p.flatten().double(), y.flatten().double()
    if not len(p):
        return float("nan")
    place = (p * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=p.device).index_add_(0, place, p - y)
    return float(gap.abs().sum() / len(p))


def boundary_band(mask: Tensor, width_mm: float, spacing: Sequence[float]) -> Tensor:
    """Voxels whose centre is within a distance of a voxel on the other side of a set's boundary.

    Arguments:
        mask: the set, ``(*shape)`` bool.
        width_mm: on each side. At or above the largest spacing both sides of every boundary are in the band.

    Returns:
        ``(*shape)`` bool.
    """
    if len(spacing) != mask.ndim or min(spacing) <= 0:
        raise ValueError(f"expected {mask.ndim} positive spacings, got {tuple(spacing)}")
    inside = mask.bool().cpu().numpy()
    if inside.all() or not inside.any():
        return torch.zeros_like(mask, dtype=torch.bool)
    sampling = tuple(float(h) for h in spacing)
    outwards = ndimage.distance_transform_edt(~inside, sampling=sampling)
    inwards = ndimage.distance_transform_edt(inside, sampling=sampling)
    return torch.as_tensor(np.maximum(outwards, inwards) <= width_mm + 1e-6).to(mask.device)


def interval_coverage(lower: Tensor, upper: Tensor, truth: Tensor) -> float:
    """Share of the intervals that hold the truth; tensors of one shape."""
    _same(lower, truth)
    _same(upper, truth)
    return float(((lower <= truth) & (truth <= upper)).double().mean())


def interval_score(lower: Tensor, upper: Tensor, truth: Tensor, level: float) -> float:
    """Mean score of central intervals: (u − l) + (2/α) (l − x)₊ + (2/α) (x − u)₊, α = 1 − level.

    Less is better. Proper: the true quantiles have the least expectation. In the unit of the truth.
    """
    _same(lower, truth)
    _same(upper, truth)
    if not 0 < level < 1:
        raise ValueError(f"expected a level in (0, 1), got {level}")
    miss = (lower - truth).clamp_min(0) + (truth - upper).clamp_min(0)
    return float((upper - lower + 2 / (1 - level) * miss).double().mean())


def normal_crps(mean: Tensor, sd: Tensor, truth: Tensor) -> Tensor:
    """Continuous ranked probability score of normal predictions, each in the unit of the truth; less is better, and it is proper.

    With z = (x − μ)/σ it is σ [z (2Φ(z) − 1) + 2φ(z) − 1/√π] (Gneiting & Raftery, JASA 2007).
    """
    _same(mean, truth)
    _same(sd, truth)
    if not bool((sd > 0).all()):
        raise ValueError("expected standard deviations > 0, got some that are not")
    z = (truth - mean) / sd
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return sd * (z * torch.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))


class Difference(NamedTuple):
    """A mean difference and its interval."""

    mean: float
    lower: float
    upper: float


def paired_bootstrap(
    a: Tensor, b: Tensor, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Difference:
    """Mean of a − b over subjects, with a percentile bootstrap interval that resamples subjects.

    Arguments:
        a, b: a score of each subject by two methods, ``(n,)``; finite.
    """
    _same(a, b)
    if a.ndim != 1 or len(a) < 2:
        raise ValueError(f"expected the scores of at least two subjects, got shape {tuple(a.shape)}")
    difference = (a.double() - b.double()).cpu()
    if not difference.isfinite().all():
        raise ValueError(f"expected finite scores, got {int((~difference.isfinite()).sum())} that are not")
    if not 0 < level < 1:
        raise ValueError(f"expected a level in (0, 1), got {level}")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(difference), (draws, len(difference)), generator=generator)
    means = difference[chosen].mean(1)
    bounds = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    lower, upper = np.quantile(means.numpy(), bounds.numpy()).tolist()
    return Difference(float(difference.mean()), lower, upper)


def _same(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"expected tensors of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")


def _boundary(inside: Tensor) -> Tensor:
    return inside & ~torch.as_tensor(ndimage.binary_erosion(inside.numpy()))


def _at(probabilities: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities ``(K, N)`` of the voxels that count, and that of each one's label ``(N,)``."""
    if probabilities.shape[1:] != labels.shape:
        raise ValueError(
            f"expected labels of shape {tuple(probabilities.shape[1:])}, got {tuple(labels.shape)}"
        )
    chosen = probabilities.flatten(1) if mask is None else probabilities[:, mask]
    place = labels.flatten() if mask is None else labels[mask]
    if place.numel() and (int(place.min()) < 0 or int(place.max()) >= len(probabilities)):
        raise ValueError(
            f"expected labels in [0, {len(probabilities)}), got {int(place.min())} to {int(place.max())}"
        )
    return chosen, chosen.gather(0, place[None])[0]
