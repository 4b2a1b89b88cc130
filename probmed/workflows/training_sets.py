"""What segmentation networks are trained on: labelled scans with augmentation, draws of a one-shot model, scans of contrasts that nobody has seen.

Each is a function that draws a batch: images ``(B, 1, *shape)`` on one grid, and labels as indices, ``(B, *shape)``, −1 where they are not known,
0 where nothing is seen.
Draws are of PyTorch's global generator, which the training seeds for each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from pyro import poutine
from torch import Tensor

from probmed.fields import GaussianField, along_axes
from probmed.grids import Grid, interpolation_matrices
from probmed.models.one_shot import TransformedScan
from probmed.models.segmentation import Segmentation
from probmed.priors import SmoothVelocity
from probmed.transforms import Velocity, warp
from probmed.volumes import Volume
from probmed.workflows.amortisation import Cohort, brought
from probmed.workflows.cohorts import own_world
from probmed.workflows.one_shot import draw_one

Examples = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of shape and appearance, the same for an image and its labels where they are of shape. All are standard deviations.

    Arguments:
        velocity_mm, length_mm: of a smooth velocity. rotation: radians, and log_scale, of a linear one. translation_mm.
        gamma: of the logarithm of an exponent. bias: of the logarithm of a smooth factor, over bias_mm. noise: at most, of a foreground's mean.
    """

    velocity_mm: float = 1.5
    length_mm: float = 10.0
    rotation: float = 0.1
    log_scale: float = 0.07
    translation_mm: float = 1.5
    gamma: float = 0.25
    bias: float = 0.15
    bias_mm: float = 30.0
    noise: float = 0.06

    def __call__(self, images: Tensor, labels: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """
        Arguments:
            images: ``(B, 1, *grid.shape)``, NaN where unknown. labels: ``(B, *grid.shape)``.
        """
        transform = self.transform(len(images), grid, images.device)
        moved = warp(images, grid, transform, grid, fill=math.nan)
        carried = warp(labels[:, None], grid, transform, grid, "nearest")[:, 0]
        return self.appearance(moved, grid), carried

    def transform(self, count: int, grid: Grid, device: torch.device | None = None) -> Velocity:
        """A smooth velocity and a linear one, whose flow is an affine map when it is alone; ``count`` of them."""
        lattice = grid.at_spacing([2 * h for h in grid.spacing])
        d = grid.ndim
        prior = SmoothVelocity(lattice, max(self.velocity_mm, 1e-6), self.length_mm, 3.0).to(device)
        smooth = prior.prior().expand([count]).sample()
        points = lattice.coordinates(device=device)
        points = points - points.flatten(0, -2).mean(0)
        skew = self.rotation * torch.randn(count, d, d, device=device).triu(1)
        linear = skew - skew.mT + self.log_scale * torch.diag_embed(torch.randn(count, d, device=device))
        shift = self.translation_mm * torch.randn(count, d, device=device)
        flow = torch.einsum("nij,...j->ni...", linear, points) + shift.reshape(count, d, *[1] * d)
        return Velocity(lattice, smooth + flow.to(smooth))

    def appearance(self, images: Tensor, grid: Grid) -> Tensor:
        """Gamma, bias and noise."""
        each = (len(images), *[1] * (images.ndim - 1))
        bent = images.clamp_min(0.0) ** (self.gamma * torch.randn(each, device=images.device)).exp()
        if self.bias > 0:
            coarse = grid.at_spacing([max(h, self.bias_mm / 4) for h in grid.spacing])
            field = GaussianField.from_sd(coarse.shape, coarse.spacing, self.bias, self.bias_mm, 2.0).expand([len(images)]).sample().to(images)
            bent = bent * along_axes(field, interpolation_matrices(coarse, grid, field)).exp()
        return bent + self.noise * torch.rand(each, device=images.device) * torch.randn_like(bent)


@dataclass(frozen=True)
class Resolution:
    """Scans of thick slices, brought to the voxels of finer ones: blurred over the slice along one axis, and interpolated between slices.

    Arguments:
        chance: that a scan has thick slices, across an axis that is drawn alike often. thickest: slices, in voxels; from one to this, uniform.
    """

    chance: float = 0.5
    thickest: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.chance <= 1 or self.thickest < 1:
            raise ValueError(f"expected 0 <= chance <= 1 and thickest >= 1, got {self.chance} and {self.thickest}")

    def __call__(self, images: Tensor) -> Tensor:
        """Of images ``(B, C, *shape)``, NaN where unknown, and so where most of what is blurred is."""
        count, d = len(images), images.ndim - 2
        thick = 1 + (self.thickest - 1) * torch.rand(count, device=images.device)
        axis = torch.where(torch.rand(count, device=images.device) < self.chance, torch.randint(d, (count,), device=images.device), d)
        known = ~images.isnan()
        values = torch.cat([images.nan_to_num(0.0), known.to(images)], 1)
        for a in range(d):
            n = images.shape[2 + a]
            matrix = thick_slices(n, torch.where(axis == a, thick, 1.0), torch.where(axis == a, torch.rand(count, device=images.device), 0.0))
            values = torch.einsum("bij,bcj...->bci...", matrix.to(images), values.movedim(2 + a, 2)).movedim(2, 2 + a)
        found, share = values.chunk(2, 1)
        missing = ~(share > 0.5)
        return (found / share.masked_fill(missing, 1.0)).masked_fill(missing, math.nan)


def thick_slices(count: int, thickness: Tensor, offset: Tensor) -> Tensor:
    """What slices of some voxels' thickness make of ``count`` voxels: means over each slice, and lines between their middles, ``(B, count, count)``.

    Arguments:
        thickness: in voxels, at least 1, ``(B,)``. offset: where the first slice begins before the first voxel, in slices, ``(B,)``, from 0 to 1.
    """
    voxel, width = torch.arange(count, device=thickness.device, dtype=thickness.dtype), thickness[:, None, None]
    begin = (torch.arange(count + 1, device=thickness.device, dtype=thickness.dtype)[:, None] - offset[:, None, None]) * width
    overlap = (torch.minimum(begin + width, voxel + 1) - torch.maximum(begin, voxel)).clamp_min(0.0)
    # A slice of which less than half lies within would say more of one voxel than others do of theirs.
    inside = overlap.sum(2, keepdim=True) >= 0.5 * torch.minimum(width, width.new_tensor(float(count)))
    mean = overlap / overlap.sum(2, keepdim=True).clamp_min(1e-6)
    near = (1 - (voxel[:, None] + 0.5 - (begin + width / 2).mT).abs() / width).clamp_min(0.0) * inside.mT
    # Beyond the middles of the outermost slices there is one neighbour.
    return near / near.sum(2, keepdim=True) @ mean


def labelled(images: Tensor, labels: Tensor, grid: Grid, batch: int, augmentation: Augmentation | None = None) -> Examples:
    """Random scans of those that are labelled, ``(N, 1, *shape)`` and ``(N, *shape)``, with augmentation where asked for."""

    def draw() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(images), (batch,)).to(images.device)
        found = images[chosen], labels[chosen]
        return found if augmentation is None else augmentation(*found, grid)

    return draw


def completed(cohort: Cohort, labels: Sequence[Volume], grid: Grid) -> Cohort:
    """A cohort whose scans without labels get these, in their order.

    Arguments:
        labels: label maps with the cohort's codes, on the scans' own voxels. grid: the cohort's.
    """
    codes, filled = torch.tensor(cohort.codes), cohort.labels.clone()
    maps = [torch.searchsorted(codes, brought(volume, grid, labels=True).contiguous()) for volume in labels]
    filled[(filled < 0).flatten(1).all(1)] = torch.stack(maps)
    return replace(cohort, labels=filled)


def one_shot(models: list[TransformedScan], batch: int, augmentation: Augmentation | None = None) -> Examples:
    """Draws of random ones of some models of a labelled scan, all on its grid."""

    def draw() -> tuple[Tensor, Tensor]:
        found = [draw_one(models[int(torch.randint(len(models), ()))]) for _ in range(batch)]
        images, labels = torch.stack([image for image, _ in found]), torch.stack([own for _, own in found])
        return (images, labels) if augmentation is None else augmentation(images, labels, models[0].grid)

    return draw


def drawn_from(model: Segmentation, grid: Grid, batch: int, resolution: Resolution | None = None) -> Examples:
    """Scans and labels of a generative model's own: every latent from its prior, hence any contrast, bias and place that it allows.

    Labels follow the image by their exact conditional, so that both are a draw of the joint. A network that is trained on them answers p(S | I) at
    once (neural posterior estimation).

    Arguments:
        grid: of the scans, in the model's world.
        resolution: of scans whose slices may be thick, which the model does not know of; None for its own scans alone.
    """

    def draw() -> tuple[Tensor, Tensor]:
        sites = [poutine.trace(model).get_trace(grid=grid).nodes["image"] for _ in range(batch)]
        images, labels = torch.stack([site["value"] for site in sites]), torch.stack([site["fn"].sample_labels(site["value"])[0] for site in sites])
        return images if resolution is None else resolution(images), labels

    return draw


def on_grid(examples: Examples, source: Grid, grid: Grid) -> Examples:
    """Examples of a scan's own voxels on a network's grid; beyond the scan nothing is seen, and labels are the background."""
    there = own_world(source)

    def draw() -> tuple[Tensor, Tensor]:
        images, labels = examples()
        return warp(images, source, there, grid, fill=math.nan), warp(labels[:, None], source, there, grid, "nearest")[:, 0]

    return draw


def random_contrast(
    regions: Tensor,
    labels: Tensor,
    grid: Grid,
    batch: int,
    augmentation: Augmentation | None = None,
    resolution: Resolution | None = None,
) -> Examples:
    """Scans that are made of regions, each of an intensity that is drawn anew, so that a network learns shapes and no contrast.

    Arguments:
        regions: ``(N, *shape)``, numbers of places of one intensity, such as ``intensity_regions`` gives. labels: ``(N, *shape)``.
        resolution: of scans whose slices may be thick; ``Resolution()`` by default, and one of chance 0 for none.

    References: Billot et al., MedIA 2023 (SynthSeg).
    """
    shape, slices = augmentation or Augmentation(), resolution or Resolution()
    count = int(regions.max()) + 1

    def draw() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(regions), (batch,)).to(regions.device)
        transform = shape.transform(batch, grid, regions.device)
        means, sds = torch.rand(batch, count, device=regions.device), 0.01 + 0.07 * torch.rand(batch, count, device=regions.device)
        flat = regions[chosen].flatten(1)
        image = (means.gather(1, flat) + sds.gather(1, flat) * torch.randn_like(means.gather(1, flat))).reshape(batch, 1, *grid.shape)
        blur = GaussianField.from_sd(grid.shape, grid.spacing, 1.0, 0.3 * min(grid.spacing) * (1 + float(torch.rand(()))), 3.0)
        smooth = blur.covariance_matvec(image)
        moved = warp(smooth * (image.mean() / smooth.mean()), grid, transform, grid, fill=math.nan)
        carried = warp(labels[chosen][:, None], grid, transform, grid, "nearest")[:, 0]
        return slices(shape.appearance(moved, grid)), carried

    return draw


def regions_of(images: Tensor, labels: Tensor) -> Tensor:
    """``intensity_regions`` of each of several scans, ``(N, 1, *shape)``."""
    return torch.stack([intensity_regions(image, own) for image, own in zip(images[:, 0], labels, strict=True)])


def intensity_regions(image: Tensor, labels: Tensor, parts: int = 6) -> Tensor:
    """Each label a region, and the background as ``parts`` more, by quantiles of its intensities.

    Arguments:
        image: ``(*shape)``, NaN where unknown. labels: ``(*shape)``, 0 the background.
    """
    values = image.nan_to_num(0.0)
    outside = labels <= 0
    ends = torch.quantile(values[outside].double(), torch.linspace(0, 1, parts + 1, dtype=torch.float64)[1:-1].to(values.device)).to(values)
    part = torch.bucketize(values, ends)
    return torch.where(outside, part, parts + labels)
