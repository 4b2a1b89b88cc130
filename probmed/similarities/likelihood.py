"""What every similarity is, and what several of them need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import pyro
import torch
from pyro.distributions import InverseGamma, TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import constraints


class Similarity(PyroModule):
    """p(f | m∘φ), a component that returns the distribution of the fixed image.

    Images are ``(C, *shape)``; where latents have leading batch axes, so have images. ``start`` takes a single pair.

    Arguments:
        tempering: the factor on log p(f | m∘φ) for voxels that are not independent. ``update`` reckons with it; densities, gradients and
            curvatures here are without it.
    """

    def __init__(self, tempering: float = 1.0) -> None:
        super().__init__()
        if not tempering > 0:
            raise ValueError(f"expected tempering > 0, got {tempering}")
        self.tempering = float(tempering)

    def prior(self, moved: Tensor) -> dict[str, TorchDistribution]:
        """The distribution of each latent, by site; in the image's dtype."""
        return {}

    def forward(self, moved: Tensor) -> TorchDistribution:
        return self.distribution(moved, {name: pyro.sample(name, prior) for name, prior in self.prior(moved).items()})

    def distribution(self, moved: Tensor, latents: Mapping[str, Tensor]) -> TorchDistribution:
        """p(f | m∘φ) at given latents; ``moved`` is ``(*batch, C, *shape)``, NaN where nothing is known."""
        raise NotImplementedError

    def log_prior(self, moved: Tensor, latents: Mapping[str, Tensor]) -> Tensor:
        """log p(latents), nats."""
        return sum((prior.log_prob(latents[name]) for name, prior in self.prior(moved).items()), moved.new_zeros(()))

    def start(self, moved: Tensor, fixed: Tensor) -> dict[str, Tensor]:
        """Latents to start from, given both images."""
        return {}

    def update(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Latents at which tempering · log p(f | m∘φ, latents) + log p(latents) is no lower."""
        return {}

    def newton(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """d log p(f | m∘φ) in each value of the moved image, and a curvature ≥ 0 that stands for minus the second derivative; zero where missing.

        Each class says what its curvature is.
        """
        raise NotImplementedError


def both_known(moved: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where both are known, and the two with zeros elsewhere: NaN has a gradient of NaN even where it is masked afterwards."""
    if moved.shape != fixed.shape:
        raise ValueError(f"expected a fixed image of the moved one's shape {tuple(moved.shape)}, got {tuple(fixed.shape)}")
    missing = moved.isnan() | fixed.isnan()
    return ~missing, moved.masked_fill(missing, 0.0), fixed.masked_fill(missing, 0.0)


def check_channels(moved: Tensor, batch: int, channels: int) -> None:
    if moved.ndim < batch + 2 or moved.shape[batch] != channels:
        expected = f"(*batch, {channels}, *shape) with {batch} batch axes"
        raise ValueError(f"expected a moved image of shape {expected}, got {tuple(moved.shape)}")


def check_positive(**values: float) -> None:
    if not all(v > 0 for v in values.values()):
        raise ValueError(f"expected positive {', '.join(values)}, got {', '.join(map(str, values.values()))}")


class IncompleteImage(TorchDistribution):
    """Independent values of which some are unknown, log p(f) = Σ_{v observed} log p(f_v).

    Arguments:
        values: the distribution of every value, batch ``(*batch, *event)``.
        missing: where it means nothing, ``(*batch, *event)``: draws are NaN there, and observations are ignored. So are observations that are NaN.
        batch: number of batch axes.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, values: TorchDistribution, missing: Tensor, batch: int = 0, validate_args: bool | None = None) -> None:
        self.values, self.missing = values, missing.expand(values.batch_shape)
        super().__init__(missing.shape[:batch], values.batch_shape[batch:], validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        return bool(self.values.has_rsample)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        missing = self.missing | value.isnan()
        each = self.values.log_prob(value.masked_fill(missing, 0.0)).masked_fill(missing, 0.0)
        return each.flatten(-len(self.event_shape)).sum(-1)

    def rsample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        return self.values.rsample(torch.Size(sample_shape)).masked_fill(self.missing, torch.nan)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        return self.values.sample(torch.Size(sample_shape)).masked_fill(self.missing, torch.nan)

    def expand(self, batch_shape: Sequence[int], _instance: IncompleteImage | None = None) -> IncompleteImage:
        batch = torch.Size(batch_shape)
        return IncompleteImage(self.values.expand(batch + self.event_shape), self.missing.expand(batch + self.event_shape), len(batch), False)


def scaled_inverse_chi2(df: float, scale: float, like: Tensor) -> TorchDistribution:
    """As if ``df`` draws of mean square ``scale``² had been seen. Its mode is df scale² / (df + 2)."""
    return InverseGamma(df / 2 * like, df / 2 * scale**2 * like)
