"""Images of one contrast, alike up to noise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pyro.distributions import Normal, StudentT, TorchDistribution
from torch import Tensor

from probmed.similarities.likelihood import IncompleteImage, Similarity, both_known, check_channels, check_positive, scaled_inverse_chi2


class GaussianNoise(Similarity):
    """Two images of one contrast, alike up to noise.

    .. math:: \\sigma_c^2 \\sim \\text{Scale-inv-}\\chi^2(n_0, s^2), \\quad f_{vc} \\sim N(m_{vc}, \\sigma_c^2)

    Site: ``noise``, σ², ``(C,)``. ``update`` gives its posterior mode; the curvature 1/σ² is exact.

    Arguments:
        channels: C.
        scale: s, in the unit of the images (scans are scaled so that their foreground's mean is one).
        certainty: n_0, in voxels.
        tempering: of ``Similarity``.

    References: Gelman et al., Bayesian Data Analysis, 3rd edition, §2.6.

    >>> moved = torch.zeros(1, 2, 2)
    >>> GaussianNoise().distribution(moved, {"noise": torch.ones(1)}).log_prob(moved)  # −½ log 2π four times
    tensor(-3.6758)
    """

    def __init__(self, channels: int = 1, scale: float = 0.1, certainty: float = 1.0, tempering: float = 1.0) -> None:
        super().__init__(tempering)
        check_positive(scale=scale, certainty=certainty)
        self.channels, self.scale, self.certainty = channels, scale, certainty

    def prior(self, moved: Tensor) -> dict[str, TorchDistribution]:
        return {"noise": scaled_inverse_chi2(self.certainty, self.scale, moved.new_ones(self.channels)).to_event(1)}

    def distribution(self, moved: Tensor, latents: Mapping[str, Tensor]) -> TorchDistribution:
        variance = self._variance(moved, latents)
        missing = moved.isnan()
        return IncompleteImage(self._values(moved.masked_fill(missing, 0.0), variance.sqrt()), missing, latents["noise"].ndim - 1)

    def _variance(self, moved: Tensor, latents: Mapping[str, Tensor]) -> Tensor:
        """σ² against the image, ``(*batch, C, 1, ...)``."""
        noise = latents["noise"]
        check_channels(moved, noise.ndim - 1, self.channels)
        return noise.reshape(*noise.shape, *[1] * (moved.ndim - noise.ndim))

    def _values(self, mean: Tensor, sd: Tensor) -> TorchDistribution:
        return Normal(mean, sd)

    def _weights(self, squares: Tensor, variance: Tensor) -> Tensor:
        """Expected precision of each value relative to 1/σ²."""
        return torch.ones_like(squares)

    def start(self, moved: Tensor, fixed: Tensor) -> dict[str, Tensor]:
        """One ``update`` from s²."""
        return self.update(moved, fixed, {"noise": moved.new_full((self.channels,), self.scale**2)})

    def update(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        variance, axes = self._variance(moved, latents), latents["noise"].ndim
        seen, m, f = both_known(moved, fixed)
        squares = (f - m) ** 2
        total = (self._weights(squares, variance) * squares).flatten(axes).sum(-1)  # zero where missing, since both are
        count = seen.flatten(axes).sum(-1).to(total)
        prior = self.certainty * self.scale**2
        return {"noise": (self.tempering * total + prior) / (self.tempering * count + self.certainty + 2)}

    def newton(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        variance = self._variance(moved, latents)
        seen, m, f = both_known(moved, fixed)
        precision = self._weights((f - m) ** 2, variance) / variance
        return precision * (f - m), precision * seen


class StudentNoise(GaussianNoise):
    """Two images of one contrast, alike up to noise with heavy tails: lesions, vessels and what one image only has.

    .. math:: f_{vc} = m_{vc} + \\sigma_c t_{vc}, \\quad t_{vc} \\sim t_\\nu, \\quad \\sigma_c^2 \\sim \\text{Scale-inv-}\\chi^2(n_0, s^2)

    As a scale mixture: each value has a precision of its own, w_vc / σ_c² with w ~ Gamma(ν/2, ν/2). ``update`` is one step of EM with w as the hidden
    variable. With r = f − m and w = (ν + 1) / (ν + r² / σ²), its expectation, the gradient is w r / σ² and the curvature w / σ², of a parabola that
    touches the log density in m and lies below it everywhere (iteratively reweighted least squares). Site: ``noise``, σ², ``(C,)``.

    Arguments:
        df: ν.
        channels, scale, certainty, tempering: of ``GaussianNoise``.

    References: Lange, Little & Taylor, JASA 1989.
    """

    def __init__(self, df: float = 3.0, channels: int = 1, scale: float = 0.1, certainty: float = 1.0, tempering: float = 1.0) -> None:
        super().__init__(channels, scale, certainty, tempering)
        check_positive(df=df)
        self.df = df

    def _values(self, mean: Tensor, sd: Tensor) -> TorchDistribution:
        return StudentT(self.df, mean, sd)

    def _weights(self, squares: Tensor, variance: Tensor) -> Tensor:
        return (self.df + 1) / (self.df + squares / variance)
