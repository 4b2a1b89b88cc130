"""Simulated scans of one subject with everything known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from probmed.atlases import LabelAtlas, default_atlas
from probmed.grids import Grid
from probmed.simulation.anatomies import Anatomy, AtrophyFlow, atrophy_flow, position_of
from probmed.simulation.contrasts import (
    NOISES,
    Appearance,
    Mixture,
    add_noise,
    appearance_of,
    draw_bias,
    stream,
)
from probmed.transforms import Transform
from probmed.volumes import Volume


@dataclass(frozen=True, eq=False)
class SimulatedSubject:
    """A simulated scan and its truth. K classes, C channels, G Gaussians; all fields on the grid of the scan.

    Arguments:
        images: one scan per channel.
        labels: the likeliest class in each voxel, as the atlas's label indices.
        names: the classes.
        probabilities: π(x), ``(K, *shape)``, at the voxel centres: what the labels were drawn from.
        fractions: share of each class in each voxel, ``(K, *shape)``; 0 or 1 without partial volume.
        volumes_ml: class → millilitres, from ``fractions``.
        transform: world of the scan to world of the atlas; inverse: back.
        bias: b, ``(C, *shape)``: image = b · ideal.
        appearance: the Gaussians, in the layout of ``LabelMixture``.
        lesion_fraction: ``(*shape)`` share of each voxel that is lesion, or None. Labels and volumes name the
            tissue underneath.
        atrophy: minus the log of the share of GM and WM that is left of what the anatomy had (see
            ``atrophy_flow``).
        seed, session: what it was simulated with.
    """

    images: tuple[Volume, ...]
    labels: Volume
    names: tuple[str, ...]
    probabilities: Tensor
    fractions: Tensor
    volumes_ml: dict[str, float]
    transform: Transform
    inverse: Transform
    bias: Tensor
    appearance: Appearance
    lesion_fraction: Tensor | None
    atrophy: float
    seed: int
    session: int

    @property
    def image(self) -> Volume:
        """The first channel."""
        return self.images[0]

    @property
    def grid(self) -> Grid:
        return self.labels.grid

    @property
    def spacing(self) -> tuple[float, ...]:
        """mm."""
        return self.grid.spacing

    @property
    def means(self) -> Tensor:
        """``(G, C)``."""
        return self.appearance.means

    @property
    def covariances(self) -> Tensor:
        """``(G, C, C)``, noise included."""
        return self.appearance.covariances


def simulate_subject(
    atlas: LabelAtlas | None = None,
    spacing_mm: float | Sequence[float] = 2.0,
    seed: int = 0,
    *,
    contrast: str | Mapping[str, Mixture] | Sequence[str | Mapping[str, Mixture]] = "T1",
    labels: str = "smooth",
    stripped: bool = False,
    deformation_mm: float = 3.0,
    length_mm: float = 30.0,
    alpha: float = 3.0,
    translation_mm: float = 4.0,
    rotation: float = 0.05,
    log_scale: float = 0.05,
    bias_sd: float = 0.2,
    bias_cutoff_mm: float = 60.0,
    noise: str = "gaussian",
    noise_sd: float = 0.02,
    subsamples: int | Sequence[int] = 1,
    lesions: int = 0,
    lesion_radius_mm: tuple[float, float] = (2.0, 6.0),
    atrophy: float = 0.0,
    session: int = 0,
    label_length_mm: float = 3.0,
    sharpness: float = 1.0,
    grid: Grid | None = None,
) -> SimulatedSubject:
    """A scan with known truth: anatomy from an atlas, imaged.

    The story. π = T∘φ with φ = ψ ∘ exp(v) ∘ A; S ~ labels(π); ideal = Gaussian of S at each voxel;
    image = b · ideal. With ``labels="independent"`` and the rest as it is by default this is exactly the
    model of classical segmentation. Departures from it, to be chosen: smooth labels, noise that is not
    Gaussian, partial volume, lesions, atrophy.

    Arguments:
        atlas: by default ``default_atlas()``.
        spacing_mm: one number, or one per axis (thick slices), over the atlas's field of view; ``grid``
            overrides it.
        seed: the same seed gives the same bytes on the same machine. Each effect has a random stream of its
            own.
        contrast: "T1", "T2", "FLAIR", "random", a table (see ``CONTRASTS``), or a sequence of these, one per
            channel.
        labels, deformation_mm, length_mm, alpha, log_scale, lesions, lesion_radius_mm, label_length_mm,
            sharpness: see ``Anatomy``.
        stripped: merge what is not brain into a background where the image is exactly 0.
        translation_mm, rotation: standard deviations of the head's position, mm and radians.
        bias_sd, bias_cutoff_mm: see ``BiasField``; 0 for none.
        noise: "gaussian" (part of each class's Gaussian, scaled by b), or added after b: "rician",
            "correlated".
        noise_sd: in units in which white matter in T1 is 1.
        subsamples: points along each axis of a voxel at which labels are drawn; above 1 voxels hold fractions
            of classes (partial volume).
        atrophy: a, for an anatomy that keeps the share exp(-a) of its GM and WM; ψ is ``atrophy_flow`` at a.
        session: another acquisition of the same anatomy: position, bias, noise and independent labels differ.

    Raises:
        ValueError: for an option out of range.

    >>> from probmed.atlases import default_atlas
    >>> head = simulate_subject(default_atlas(spacing_mm=8.0), spacing_mm=8.0, seed=1)
    >>> sorted(head.volumes_ml)
    ['CSF', 'GM', 'WM', 'air', 'bone', 'soft']
    """
    atlas = default_atlas() if atlas is None else atlas
    atlas = atlas.stripped() if stripped else atlas
    anatomy = Anatomy(
        atlas,
        seed,
        deformation_mm=deformation_mm,
        length_mm=length_mm,
        alpha=alpha,
        log_scale=log_scale,
        labels=labels,
        label_length_mm=label_length_mm,
        sharpness=sharpness,
        lesions=lesions,
        lesion_radius_mm=lesion_radius_mm,
    )
    shrinking = None if atrophy == 0 else atrophy_flow(atlas)
    return scan(
        anatomy,
        atlas.grid.at_spacing(spacing_mm) if grid is None else grid,
        contrast=contrast,
        translation_mm=translation_mm,
        rotation=rotation,
        bias_sd=bias_sd,
        bias_cutoff_mm=bias_cutoff_mm,
        noise=noise,
        noise_sd=noise_sd,
        subsamples=subsamples,
        atrophy=atrophy,
        shrinking=shrinking,
        session=session,
    )


def scan(
    anatomy: Anatomy,
    grid: Grid,
    *,
    contrast: str | Mapping[str, Mixture] | Sequence[str | Mapping[str, Mixture]] = "T1",
    translation_mm: float = 4.0,
    rotation: float = 0.05,
    bias_sd: float = 0.2,
    bias_cutoff_mm: float = 60.0,
    noise: str = "gaussian",
    noise_sd: float = 0.02,
    subsamples: int | Sequence[int] = 1,
    atrophy: float = 0.0,
    shrinking: AtrophyFlow | None = None,
    session: int = 0,
) -> SimulatedSubject:
    """One acquisition of an anatomy. The arguments are those of ``simulate_subject``; ``shrinking`` is the
    flow along which ``atrophy`` goes.
    """
    if noise not in NOISES or noise_sd < 0 or bias_sd < 0:
        raise ValueError(f"expected noise in {NOISES}, noise_sd >= 0, bias_sd >= 0, got {noise!r}, {noise_sd}, {bias_sd}")
    counts = [subsamples] * grid.ndim if isinstance(subsamples, int) else list(subsamples)
    if len(counts) != grid.ndim or min(counts) < 1:
        raise ValueError(f"expected {grid.ndim} positive subsamples, got {subsamples}")
    if atrophy != 0 and shrinking is None:
        raise ValueError("atrophy needs the flow that it follows: see atrophy_flow")
    contrasts = [contrast] if isinstance(contrast, str | Mapping) else list(contrast)
    atlas, seed = anatomy.atlas, anatomy.seed
    within = noise_sd if noise == "gaussian" else 0.0
    appearance = appearance_of(contrasts, atlas.names, within, stream(seed, "contrast"))
    flow = None if shrinking is None or atrophy == 0 else shrinking.at(atrophy)
    transform = anatomy.transform(position_of(seed, session, anatomy, translation_mm, rotation), flow)

    probabilities, fractions, lesion = _anatomy_on(anatomy, grid, transform, counts, session)
    chosen = fractions.argmax(0)
    ideal = _render(anatomy, appearance, fractions, lesion, grid, transform, session)
    bias = draw_bias(grid, len(contrasts), bias_sd, bias_cutoff_mm, stream(seed, "bias", session))
    image = bias * ideal
    if noise != "gaussian":
        image = add_noise(image, grid, noise_sd, noise, stream(seed, "noise", session))
    if "background" in atlas.names:
        image = image * (chosen != atlas.names.index("background"))
    millilitres = fractions.flatten(1).double().sum(-1) * grid.voxel_volume / 1000
    return SimulatedSubject(
        images=tuple(Volume.from_grid(channel, grid) for channel in image),
        labels=Volume.from_grid(torch.tensor(atlas.indices)[chosen], grid),
        names=atlas.names,
        probabilities=probabilities,
        fractions=fractions,
        volumes_ml=dict(zip(atlas.names, millilitres.tolist(), strict=True)),
        transform=transform,
        inverse=transform.inverse(),
        bias=bias,
        appearance=appearance,
        lesion_fraction=lesion,
        atrophy=float(atrophy),
        seed=seed,
        session=session,
    )


def _offsets(counts: Sequence[int]) -> Iterator[Tensor]:
    """Positions inside a voxel, in voxels from its centre."""
    for steps in product(*(range(n) for n in counts)):
        yield torch.tensor([(i + 0.5) / n - 0.5 for i, n in zip(steps, counts, strict=True)], dtype=torch.float64)


def _anatomy_on(anatomy: Anatomy, grid: Grid, transform: Transform, counts: Sequence[int], session: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """π at the centres, fractions and the lesions' fraction."""
    generator = stream(anatomy.seed, "independent labels", session)
    centres = grid.coordinates()
    k, total = len(anatomy.atlas.names), math.prod(counts)
    brain = torch.tensor([name in anatomy.atlas.brain for name in anatomy.atlas.names])
    fractions = torch.zeros(k, *grid.shape)
    lesion = None if anatomy.lesions is None else torch.zeros(grid.shape)
    probabilities: Tensor | None = None
    for offset in _offsets(counts):
        points = transform(centres + (grid.affine[:-1, :-1] @ offset).float())
        log_probabilities = anatomy.log_probabilities(points)
        if total == 1:
            probabilities = log_probabilities.exp()
        labels = anatomy.draw_labels(log_probabilities, points, generator)
        fractions.scatter_add_(0, labels[None], torch.ones(1, *grid.shape))
        if lesion is not None and anatomy.lesions is not None:
            lesion += anatomy.lesions.contains(points) & brain[labels]
    if probabilities is None:
        probabilities = anatomy.log_probabilities(transform(centres)).exp()
    return probabilities, fractions / total, None if lesion is None else lesion / total


def _render(
    anatomy: Anatomy,
    appearance: Appearance,
    fractions: Tensor,
    lesion: Tensor | None,
    grid: Grid,
    transform: Transform,
    session: int,
) -> Tensor:
    """The ideal image ``(C, *shape)``: mean and variance of a voxel are its classes' in the proportion of
    their fractions.
    """
    choice = _component_choice(anatomy, appearance, grid, transform, session)
    channels = appearance.means.shape[1]
    mean, variance = torch.zeros(2, channels, *grid.shape)
    spread = appearance.covariances.diagonal(dim1=-2, dim2=-1)
    for k, fraction in enumerate(fractions):
        gaussians = torch.nonzero(appearance.owner == k).flatten()
        if len(gaussians) == 1 or choice is None:
            mean += appearance.means[gaussians[0]].reshape(-1, *[1] * grid.ndim) * fraction
            variance += spread[gaussians[0]].reshape(-1, *[1] * grid.ndim) * fraction
            continue
        edges = appearance.weights[gaussians].cumsum(0)[:-1]
        picked = gaussians[torch.bucketize(choice, edges)]
        mean += appearance.means.T[:, picked] * fraction
        variance += spread.T[:, picked] * fraction
    if lesion is not None:
        shape = (-1, *[1] * grid.ndim)
        mean += lesion * (appearance.lesion_mean.reshape(shape) - mean)
        variance += lesion * (appearance.lesion_sd.reshape(shape) ** 2 - variance)
    white = torch.randn(mean.shape, generator=stream(anatomy.seed, "intensities", session))
    image: Tensor = mean + variance.clamp_min(0).sqrt() * white
    return image


def _component_choice(anatomy: Anatomy, appearance: Appearance, grid: Grid, transform: Transform, session: int) -> Tensor | None:
    """Uniform numbers that pick a Gaussian of each voxel's class: independent, or smooth where the labels
    are.
    """
    if len(appearance.owner) == int(appearance.owner.max()) + 1:
        return None
    if anatomy.labels == "independent":
        return torch.rand(grid.shape, generator=stream(anatomy.seed, "components", session))
    return anatomy.texture(transform(grid.coordinates()))
