"""Intensities of tissues in simulated scans, and what a scanner does to them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probmed.appearances import BiasField
from probmed.fields import GaussianField
from probmed.grids import Grid

Mixture = tuple[tuple[float, float, float], ...]
"""Gaussians of one class: (weight, mean, standard deviation) each; weights sum to 1, white matter in T1 is
about 1.
"""

CONTRASTS: dict[str, dict[str, Mixture]] = {
    "T1": {
        "GM": ((1.0, 0.70, 0.05),),
        "WM": ((1.0, 1.00, 0.04),),
        "CSF": ((1.0, 0.25, 0.06),),
        "bone": ((0.7, 0.12, 0.05), (0.3, 0.50, 0.12)),
        "soft": ((0.5, 0.55, 0.10), (0.3, 0.35, 0.10), (0.2, 1.25, 0.15)),
        "air": ((1.0, 0.03, 0.015),),
        "lesion": ((1.0, 0.62, 0.07),),
    },
    "T2": {
        "GM": ((1.0, 0.62, 0.05),),
        "WM": ((1.0, 0.45, 0.04),),
        "CSF": ((1.0, 1.30, 0.12),),
        "bone": ((0.7, 0.10, 0.05), (0.3, 0.40, 0.10)),
        "soft": ((0.5, 0.30, 0.08), (0.3, 0.50, 0.10), (0.2, 0.80, 0.15)),
        "air": ((1.0, 0.03, 0.015),),
        "lesion": ((1.0, 0.90, 0.10),),
    },
    "FLAIR": {
        "GM": ((1.0, 0.80, 0.06),),
        "WM": ((1.0, 0.66, 0.05),),
        "CSF": ((1.0, 0.18, 0.06),),
        "bone": ((0.7, 0.10, 0.05), (0.3, 0.40, 0.10)),
        "soft": ((0.5, 0.45, 0.10), (0.3, 0.35, 0.10), (0.2, 1.00, 0.15)),
        "air": ((1.0, 0.03, 0.015),),
        "lesion": ((1.0, 1.15, 0.12),),
    },
}
"""Class → Gaussians for each named contrast. The classes have the same weights in every contrast, so that
channels share components.
"""

NOISES = ("gaussian", "rician", "correlated")


@dataclass(frozen=True)
class Appearance:
    """The Gaussians behind a simulated scan, in the layout of ``LabelMixture``; noise is counted in the
    covariances.

    Arguments:
        weights: ``(G,)`` share of each Gaussian within its class.
        means: ``(G, C)``; covariances: ``(G, C, C)``.
        owner: ``(G,)`` the class of each Gaussian.
        lesion_mean, lesion_sd: ``(C,)``.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    owner: Tensor
    lesion_mean: Tensor
    lesion_sd: Tensor


def stream(seed: int, *names: str | int) -> torch.Generator:
    """An independent random stream for each name under one seed: switching one effect off leaves the others
    as they were.
    """
    digest = hashlib.sha256(repr((int(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_field(field: GaussianField, generator: torch.Generator) -> Tensor:
    """One draw, ``(C, *shape)``, from a stream of its own."""
    return field.unwhiten(torch.randn(field.event_shape, generator=generator))


def appearance_of(
    contrasts: Sequence[str | Mapping[str, Mixture]],
    names: Sequence[str],
    noise_sd: float,
    generator: torch.Generator,
) -> Appearance:
    """Tables of contrasts, one per channel, to tensors.

    Arguments:
        contrasts: names in ``CONTRASTS``, "random" (class means uniform in [0.1, 1.2]), or tables of one's
            own.
        names: the classes, in the atlas's order.
        noise_sd: standard deviation of the noise that is added to that of each class.

    Raises:
        ValueError: for an unknown contrast, a class without Gaussians, or classes whose weights differ
            between channels.
    """
    tables = [_table(contrast, names, generator) for contrast in contrasts]
    weights, means, deviations, owner = [], [], [], []
    for k, name in enumerate(names):
        mixtures = [table[name] for table in tables]
        shares = [tuple(w for w, _, _ in mixture) for mixture in mixtures]
        if len(set(shares)) != 1 or abs(sum(shares[0]) - 1) > 1e-6:
            raise ValueError(f"the Gaussians of class {name!r} need the same weights, summing to 1, in each contrast, got {shares}")
        for g, share in enumerate(shares[0]):
            weights.append(share)
            means.append([mixture[g][1] for mixture in mixtures])
            deviations.append([mixture[g][2] for mixture in mixtures])
            owner.append(k)
    variances = torch.tensor(deviations) ** 2 + noise_sd**2
    lesion = torch.tensor([table.get("lesion", ((1.0, 0.5, 0.1),))[0] for table in tables])
    return Appearance(
        torch.tensor(weights),
        torch.tensor(means),
        torch.diag_embed(variances),
        torch.tensor(owner),
        lesion[:, 1],
        lesion[:, 2],
    )


def _table(contrast: str | Mapping[str, Mixture], names: Sequence[str], generator: torch.Generator) -> dict[str, Mixture]:
    if not isinstance(contrast, str):
        table = dict(contrast)
    elif contrast == "random":
        draws = torch.rand(len(names) + 1, 2, generator=generator)
        means, deviations = (0.1 + 1.1 * draws[:, 0]).tolist(), (0.03 + 0.05 * draws[:, 1]).tolist()
        # Air is dark in every contrast; the Gaussians of bone and soft tissue lie around a random mean.
        spread: dict[str, Mixture] = {}
        for name, mean, sd in zip([*names, "lesion"], means, deviations, strict=True):
            base = CONTRASTS["T1"].get(name, ((1.0, mean, sd),))
            centre = sum(w * m for w, m, _ in base)
            spread[name] = tuple((w, mean + m - centre, s if len(base) > 1 else sd) for w, m, s in base)
        table = {**spread, "air": CONTRASTS["T1"]["air"]}
    elif contrast.upper() in CONTRASTS:
        table = dict(CONTRASTS[contrast.upper()])
    else:
        raise ValueError(f"contrast must be one of {[*CONTRASTS, 'random']} or a table, got {contrast!r}")
    table.setdefault("background", ((1.0, 0.0, 0.0),))
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(f"the contrast has no Gaussians for {missing}; it knows {sorted(table)}")
    return table


def draw_bias(grid: Grid, channels: int, sd: float, cutoff_mm: float, generator: torch.Generator) -> Tensor:
    """A smooth multiplicative field b, image = b · ideal, ``(C, *shape)``: log b is a draw from
    ``BiasField``'s prior.
    """
    if sd == 0:
        return torch.ones(channels, *grid.shape)
    prior = BiasField(cutoff_mm=cutoff_mm, sd=sd, channels=channels)
    scale = prior.prior_sd(grid).float()
    coefficients = torch.randn(channels, len(scale), generator=generator) * scale
    return (-prior.evaluate(coefficients, grid)).exp()


def add_noise(image: Tensor, grid: Grid, sd: float, kind: str, generator: torch.Generator) -> Tensor:
    """An image ``(C, *shape)`` with noise of standard deviation ``sd``.

    Arguments:
        kind: "gaussian": independent; "rician": the magnitude of a complex image with independent noise in
            both parts; "correlated": Gaussian, smoothed over about two voxels and brought back to ``sd``.
    """
    if kind not in NOISES:
        raise ValueError(f"noise must be one of {NOISES}, got {kind!r}")
    if sd == 0:
        return image
    if kind == "gaussian":
        return image + sd * torch.randn(image.shape, generator=generator)
    if kind == "rician":
        real, imaginary = sd * torch.randn(2, *image.shape, generator=generator)
        return torch.hypot(image + real, imaginary)
    field = GaussianField.from_sd(grid.shape, (1.0,) * grid.ndim, sd, 1.5, 2.0, image.shape[0])
    return image + draw_field(field, generator)


def degraded(
    image: Tensor,
    grid: Grid,
    bias_sd: float = 0.3,
    noise_sd: float = 0.03,
    noise: str = "gaussian",
    cutoff_mm: float = 60.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """A scan made harder: b · image + noise.

    Arguments:
        image: ``(C, *grid.shape)``; ``noise_sd`` is in its unit.
        bias_sd: standard deviation of log b.

    Returns:
        The new image and b, both ``(C, *shape)``.
    """
    if tuple(image.shape[1:]) != grid.shape:
        raise ValueError(f"expected an image of shape (C, *{grid.shape}), got {tuple(image.shape)}")
    bias = draw_bias(grid, image.shape[0], bias_sd, cutoff_mm, stream(seed, "bias"))
    return add_noise(bias * image, grid, noise_sd, noise, stream(seed, "noise")), bias
