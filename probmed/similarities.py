"""Similarities: how a fixed image looks given the moved one, p(f | m∘φ), the likelihoods of registration.

A voxel that is NaN in either image (outside a field of view or a mask, or gone with a resection) contributes nothing. What remains is the log
density of the observed voxels, in nats, with all constants. For voxels that are not independent there is one number, ``tempering``, by which whoever
observes the image multiplies the log density.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import pyro
import torch
from pyro.distributions import (
    Beta,
    Categorical,
    InverseGamma,
    MixtureSameFamily,
    Normal,
    StudentT,
    TorchDistribution,
)
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import constraints

_TINY = 1e-30


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


def _both(moved: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where both are known, and the two with zeros elsewhere: NaN has a gradient of NaN even where it is masked afterwards."""
    if moved.shape != fixed.shape:
        raise ValueError(f"expected a fixed image of the moved one's shape {tuple(moved.shape)}, got {tuple(fixed.shape)}")
    missing = moved.isnan() | fixed.isnan()
    return ~missing, moved.masked_fill(missing, 0.0), fixed.masked_fill(missing, 0.0)


def _check_channels(moved: Tensor, batch: int, channels: int) -> None:
    if moved.ndim < batch + 2 or moved.shape[batch] != channels:
        expected = f"(*batch, {channels}, *shape) with {batch} batch axes"
        raise ValueError(f"expected a moved image of shape {expected}, got {tuple(moved.shape)}")


def _check_positive(**values: float) -> None:
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
        _check_positive(scale=scale, certainty=certainty)
        self.channels, self.scale, self.certainty = channels, scale, certainty

    def prior(self, moved: Tensor) -> dict[str, TorchDistribution]:
        return {"noise": _scaled_inverse_chi2(self.certainty, self.scale, moved.new_ones(self.channels)).to_event(1)}

    def distribution(self, moved: Tensor, latents: Mapping[str, Tensor]) -> TorchDistribution:
        variance = self._variance(moved, latents)
        missing = moved.isnan()
        return IncompleteImage(self._values(moved.masked_fill(missing, 0.0), variance.sqrt()), missing, latents["noise"].ndim - 1)

    def _variance(self, moved: Tensor, latents: Mapping[str, Tensor]) -> Tensor:
        """σ² against the image, ``(*batch, C, 1, ...)``."""
        noise = latents["noise"]
        _check_channels(moved, noise.ndim - 1, self.channels)
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
        seen, m, f = _both(moved, fixed)
        squares = (f - m) ** 2
        total = (self._weights(squares, variance) * squares).flatten(axes).sum(-1)  # zero where missing, since both are
        count = seen.flatten(axes).sum(-1).to(total)
        prior = self.certainty * self.scale**2
        return {"noise": (self.tempering * total + prior) / (self.tempering * count + self.certainty + 2)}

    def newton(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        variance = self._variance(moved, latents)
        seen, m, f = _both(moved, fixed)
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
        _check_positive(df=df)
        self.df = df

    def _values(self, mean: Tensor, sd: Tensor) -> TorchDistribution:
        return StudentT(self.df, mean, sd)

    def _weights(self, squares: Tensor, variance: Tensor) -> Tensor:
        return (self.df + 1) / (self.df + squares / variance)


def _scaled_inverse_chi2(df: float, scale: float, like: Tensor) -> TorchDistribution:
    """As if ``df`` draws of mean square ``scale``² had been seen. Its mode is df scale² / (df + 2)."""
    return InverseGamma(df / 2 * like, df / 2 * scale**2 * like)


class _Regressions(NamedTuple):
    """Of f on m in the window around every voxel, each ``(*batch, C, *shape)``.

    Arguments:
        seen: whether the voxel has a window; m, f: less a constant, zero where missing.
        voxels: n(x), at least one; mean_m, mean_f: of ``m`` and ``f``.
        sum_mm: about the mean; precision: λ; gain: b's posterior mean.
        residual: sum of squares about the regression, with what its coefficients cost under their prior.
    """

    seen: Tensor
    m: Tensor
    f: Tensor
    voxels: Tensor
    mean_m: Tensor
    mean_f: Tensor
    sum_mm: Tensor
    precision: Tensor
    gain: Tensor
    residual: Tensor


class WindowRegressions(TorchDistribution):
    """The composite likelihood of ``LocalCorrelation``: Σ_x log p(f_W(x) | m_W(x)), over the windows W(x) about all voxels seen in both images.

    Every summand is the normalised log density of one window. Their sum counts every value of f as often as there are windows that hold it and is
    therefore not the log of a density of the image, whatever it is tempered by.

    Draws are of windows that tile the image: in each, coefficients from their prior and values from the regression. A whole tile is an exact draw
    from the density of the window about its middle.

    Arguments:
        moved: ``(*batch, C, *shape)``.
        radius: r on each axis, voxels.
        noise, certainty, location, spread: of ``LocalCorrelation``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        moved: Tensor,
        radius: Sequence[int],
        noise: float,
        certainty: float,
        location: float,
        spread: float,
        validate_args: bool | None = None,
    ) -> None:
        self.moved, self.radius = moved, tuple(radius)
        self.noise, self.certainty, self.location, self.spread = noise, certainty, location, spread
        axes = len(self.radius) + 1
        super().__init__(moved.shape[:-axes], moved.shape[-axes:], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def offset_precision(self) -> float:
        """κ."""
        return (self.noise / self.spread) ** 2

    def _regressions(self, value: Tensor) -> _Regressions:
        moved, value = torch.broadcast_tensors(self.moved, value)
        seen, m, f = _both(moved, value)
        one, d = seen.to(m), len(self.radius)
        space = tuple(range(-d, 0))
        # Sums of squares about the windows' means lose fewer digits where the image's mean has gone before; they don't depend on it.
        total = one.sum(space, keepdim=True).clamp_min(1)
        m = (m - (m.detach().sum(space, keepdim=True) / total)) * one
        shift = f.detach().sum(space, keepdim=True) / total
        f = (f - shift) * one
        # The same for all channels, unless voxels are missing.
        count = window_sums(one if bool((~seen).any()) else one[(0,) * (one.ndim - d)], self.radius).clamp_min(1)
        sum_m, sum_f = window_sums(m, self.radius), window_sums(f, self.radius)
        mean_m, mean_f = sum_m / count, sum_f / count
        sum_mm = (window_sums(m * m, self.radius) - sum_m * mean_m).clamp_min(0)
        sum_ff = (window_sums(f * f, self.radius) - sum_f * mean_f).clamp_min(0)
        sum_mf = window_sums(m * f, self.radius) - sum_m * mean_f
        precision = sum_mm / count + self.noise**2
        gain = sum_mf / (sum_mm + precision)
        kappa = self.offset_precision
        offset = kappa * count / (count + kappa) * (mean_f + (shift - self.location)) ** 2
        residual = (sum_ff - gain * sum_mf).clamp_min(0) + offset
        return _Regressions(seen, m, f, count, mean_m, mean_f, sum_mm, precision, gain, residual)

    def window_log_prob(self, value: Tensor) -> Tensor:
        """log p(f_W(x) | m_W(x)) for every x, ``(*batch, C, *shape)``; zero where either image is missing."""
        r, nu, kappa = self._regressions(value), self.certainty, self.offset_precision
        scale = nu * self.noise**2
        n = r.voxels
        constant = torch.lgamma((nu + n) / 2) - math.lgamma(nu / 2) - n * (0.5 * math.log(math.pi * scale)) - 0.5 * torch.log1p(n / kappa)
        density = constant - 0.5 * torch.log1p(r.sum_mm / r.precision) - (nu + n) / 2 * torch.log1p(r.residual / scale)
        return density.masked_fill(~r.seen, 0.0)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.window_log_prob(value).flatten(-len(self.event_shape)).sum(-1)

    @torch.no_grad()
    def newton(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient in ``moved`` and the curvature, both ``(*batch, C, *shape)``."""
        r, eta = self._regressions(value), self.noise**2
        variance = (self.certainty * eta + r.residual) / (self.certainty + r.voxels)
        # Twice minus the derivative of a window's log density in the sum of squares of m, and its derivative in the sum of products.
        by_square = eta / ((r.sum_mm + r.precision) * r.precision) + (1 + 1 / r.voxels) * r.gain**2 / variance
        by_square, by_product = by_square * r.seen, r.gain / variance * r.seen
        curvature = window_sums(by_square, self.radius)
        mean = window_sums(by_square * r.mean_m - by_product * r.mean_f, self.radius)
        gradient = mean - curvature * r.m + window_sums(by_product, self.radius) * r.f
        return gradient * r.seen, curvature * r.seen

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        lead, spatial = torch.Size(sample_shape), self.event_shape[1:]
        tile = torch.zeros(spatial, dtype=torch.int64, device=self.moved.device)
        for axis, (n, r) in enumerate(zip(spatial, self.radius, strict=True)):
            index = torch.arange(n, device=tile.device) // (2 * r + 1)
            tile = tile * (int(index[-1]) + 1) + index.reshape([-1 if a == axis else 1 for a in range(len(spatial))])
        tile = tile.flatten()

        def sums(x: Tensor) -> Tensor:
            return x.new_zeros(*x.shape[:-1], int(tile[-1]) + 1).index_add(-1, tile, x)

        missing = self.moved.isnan().flatten(-len(spatial))
        one = (~missing).to(self.moved)
        m = self.moved.flatten(-len(spatial)).masked_fill(missing, 0.0)
        count = sums(one).clamp_min(1)
        centred = (m - (sums(m) / count)[..., tile]) * one
        precision = sums(centred**2) / count + self.noise**2
        half = self.certainty / 2 * torch.ones_like(precision)
        variance = InverseGamma(half, half * self.noise**2).sample(lead)
        offset = self.location + (variance / self.offset_precision).sqrt() * torch.randn_like(variance)
        gain = (variance / precision).sqrt() * torch.randn_like(variance)
        mean = offset[..., tile] + gain[..., tile] * centred
        value = mean + variance.sqrt()[..., tile] * torch.randn_like(mean)
        return value.masked_fill(missing, torch.nan).unflatten(-1, spatial)

    def expand(self, batch_shape: Sequence[int], _instance: WindowRegressions | None = None) -> WindowRegressions:
        moved = self.moved.expand(torch.Size(batch_shape) + self.event_shape)
        return WindowRegressions(moved, self.radius, self.noise, self.certainty, self.location, self.spread, False)


def window_sums(x: Tensor, radius: Sequence[int]) -> Tensor:
    """Σ_{|y − x| ≤ r} x_y over the last axes, windows being cut at the border.

    Sums of two, four, eight neighbours are made from one another, about 2 log₂ r additions an axis. Differences of cumulative sums are slower and
    lose digits where a window's sum is small beside its row's.
    """
    for axis, r in enumerate(radius):
        dim = x.ndim - len(radius) + axis
        n = x.shape[dim]
        width, size, at = 2 * min(r, n - 1) + 1, 1, 1
        part = torch.nn.functional.pad(x, [0, 0] * (x.ndim - 1 - dim) + [width // 2, width // 2])
        total = part.narrow(dim, 0, n)
        while 2 * size <= width:
            length = part.shape[dim] - size
            part = part.narrow(dim, 0, length) + part.narrow(dim, size, length)
            size *= 2
            if width & size:
                total = total + part.narrow(dim, at, n)
                at += size
        x = total
    return x


class LocalCorrelation(Similarity):
    """Two images whose intensities are related linearly within a window, differently in each: bias fields, and similar contrasts.

    In the window W(x) of n = n(x) voxels that both images have, with z = m − m̄, the intensities of f are a regression on m:

    .. math::
        s^2 \\sim \\text{Scale-inv-}\\chi^2(\\nu, \\tau^2), \\quad \\alpha \\mid s^2 \\sim N(\\alpha_0, s^2 / \\kappa), \\quad
        b \\mid s^2 \\sim N(0, s^2 / \\lambda), \\quad f_i \\sim N(\\alpha + b z_i, s^2), \\; i \\in W(x)

    with λ = Σz²/n + τ²: the gain's prior is worth one voxel, so that the unit of m matters only where its contrast is below the noise, and there m is
    not matched. Coefficients and variance integrated out, the window is a multivariate t, a proper density of its n values:

    .. math::
        p(f_W \\mid m_W) = t_\\nu\\big(f_W; \\; \\alpha_0 1, \\; \\tau^2 (I + 11^T / \\kappa + zz^T / \\lambda)\\big)
            \\propto \\Big(1 + \\frac{S_{ff} (1 - \\tilde\\rho^2) + \\ldots}{\\nu \\tau^2}\\Big)^{-(\\nu + n) / 2}

    where ρ̃² = S_mf² / (S_ff (S_mm + λ)) is the squared correlation, shrunk. The image's likelihood is a composite one, Σ_x log p(f_W(x) | m_W(x))
    over the windows about all voxels that both images have, times ``tempering``: one over the voxels in a whole window, since every value is in that
    many. Each term is the log of a density. Their sum is not: but for the border, it is that of the geometric mean of the densities of all tilings of
    the image by windows. See ``WindowRegressions`` for draws. No sites.

    The curvature is that of a parabola, separate for each value, that touches the log likelihood in m and lies below it everywhere: a step along a
    gradient divided by it never lowers the likelihood. It is Σ_W (1 + 1/n) b²/s², with each window's coefficients at their posterior mean, and a term
    that vanishes where m has contrast.

    Arguments:
        radius: r, voxels; a number for all axes or one for each. A window has Π(2r + 1) voxels.
        noise: τ, the residual's standard deviation under the prior, in the unit of the images.
        certainty: ν, in voxels; by default a tenth of a window. A window's s² is never taken for less than ν τ² / (ν + n), so that windows of
            nothing but background do not outweigh all others.
        location, spread: α_0, and the prior's standard deviation of α where s = τ, hence κ = (τ / spread)².
        tempering: one over the voxels in a window by default.
        ndim: number of spatial axes, where ``radius`` does not say. Axes before ``(C, *shape)`` are batch.

    References: Avants et al., MedIA 2008 (the correlation); Varin, Reid & Firth, Statistica Sinica 2011 (composite likelihoods); Kass & Wasserman,
    JASA 1995 (priors worth one observation).
    """

    def __init__(
        self,
        radius: int | Sequence[int] = 4,
        noise: float = 0.05,
        certainty: float | None = None,
        location: float = 0.7,
        spread: float = 1.0,
        tempering: float | None = None,
        ndim: int = 3,
    ) -> None:
        each = (radius,) * ndim if isinstance(radius, int) else tuple(radius)
        if not each or min(each) < 1:
            raise ValueError(f"expected a radius of at least 1 voxel on each axis, got {radius}")
        voxels = math.prod(2 * r + 1 for r in each)
        super().__init__(1 / voxels if tempering is None else tempering)
        certainty = voxels / 10 if certainty is None else certainty
        _check_positive(noise=noise, certainty=certainty, spread=spread)
        self.radius = each
        self.noise, self.certainty, self.location, self.spread = noise, certainty, location, spread

    def distribution(self, moved: Tensor, latents: Mapping[str, Tensor]) -> WindowRegressions:
        if moved.ndim < len(self.radius) + 1:
            raise ValueError(f"expected a moved image of shape (*batch, C, *shape) with {len(self.radius)} spatial axes, got {tuple(moved.shape)}")
        return WindowRegressions(moved, self.radius, self.noise, self.certainty, self.location, self.spread)

    def newton(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        if moved.shape != fixed.shape:
            raise ValueError(f"expected a fixed image of the moved one's shape {tuple(moved.shape)}, got {tuple(fixed.shape)}")
        return self.distribution(moved, latents).newton(fixed)


class ConditionalMixture(Similarity):
    """Two contrasts: what the moved image's intensity says of the fixed one's, as mutual information does, but as a density.

    .. math::
        \\mu_k \\sim N(\\mu_0, spread^2), \\quad \\sigma_k^2 \\sim \\text{Scale-inv-}\\chi^2(n_0, s^2), \\quad
        f_v \\sim \\sum_k \\pi_k(m_v) N(\\mu_k, \\sigma_k^2)

    π_k are the cubic B-splines on equally spaced knots from ``limits[0]`` to ``limits[1]``: non-negative, one in sum, twice differentiable, four of
    them at a time not zero. Beyond the limits the moved image says nothing more. The mean log density of a voxel plus the entropy of f is a lower
    bound of the mutual information of the two images. Sites, a row a channel: ``class_means`` and ``class_variances``, ``(C, K)``. ``update`` is one
    step of EM (the means, then the variances at the new means).

    The gradient is exact; the curvature is the expected one, the Fisher information of m_v, the integral of (∂p/∂m)² / p over f. It is interpolated
    linearly between 16 values in each interval of knots.

    Arguments:
        classes: K, four or more.
        limits: of the moved image's intensities.
        channels: C; each channel of f depends on the same channel of m.
        location, spread: μ_0 and its standard deviation.
        scale, certainty: s and n_0, voxels.
        tempering: of ``Similarity``.

    References: Leventon & Grimson, MICCAI 1998 (a learned density as similarity); Mattes et al., IEEE TMI 2003 (B-splines as Parzen windows); Barber
    & Agakov, NIPS 2003 (the bound); Meng & Rubin, Biometrika 1993 (EM by conditional maximisation).
    """

    _positions = 16

    def __init__(
        self,
        classes: int = 16,
        limits: tuple[float, float] = (0.0, 2.0),
        channels: int = 1,
        location: float = 0.7,
        spread: float = 1.0,
        scale: float = 0.1,
        certainty: float = 10.0,
        tempering: float = 1.0,
    ) -> None:
        super().__init__(tempering)
        if classes < 4:
            raise ValueError(f"expected at least 4 classes, got {classes}")
        if not limits[0] < limits[1]:
            raise ValueError(f"expected increasing limits, got {limits}")
        _check_positive(spread=spread, scale=scale, certainty=certainty)
        self.classes, self.limits, self.channels = classes, limits, channels
        self.location, self.spread, self.scale, self.certainty = location, spread, scale, certainty

    @classmethod
    def for_image(cls, moving: Tensor, classes: int = 16, **options: float) -> ConditionalMixture:
        """Limits at the thousandths from the bottom and the top of an image's intensities, for all its channels, ``(C, *shape)``."""
        values = moving[~moving.isnan()]
        if not len(values):
            raise ValueError("expected an image with voxels that are not NaN, got none")
        rank = max(1, len(values) // 1000)
        limits = (float(values.kthvalue(rank).values), float(values.kthvalue(len(values) + 1 - rank).values))
        return cls(classes, limits, channels=len(moving), **options)  # type: ignore[arg-type]

    @property
    def spacing(self) -> float:
        """Of the knots, in the moved image's unit."""
        return (self.limits[1] - self.limits[0]) / (self.classes - 3)

    def memberships(self, moved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The number of the first of four classes, π of the four and dπ/dm, ``(*moved.shape)`` int64 and ``(*moved.shape, 4)`` twice."""
        position = (moved - self.limits[0]) / self.spacing
        inside = (position >= 0) & (position <= self.classes - 3)
        position = position.clamp(0, self.classes - 3)
        first = position.detach().floor().clamp_max(self.classes - 4)
        u = position - first
        v = 1 - u
        weights = torch.stack([v**3, 3 * u**3 - 6 * u**2 + 4, 3 * v**3 - 6 * v**2 + 4, u**3], -1) / 6
        slopes = torch.stack([-(v**2), 3 * u**2 - 4 * u, 4 * v - 3 * v**2, u**2], -1) / (2 * self.spacing)
        return first.long(), weights, slopes * inside[..., None]

    def prior(self, moved: Tensor) -> dict[str, TorchDistribution]:
        one = moved.new_ones(self.channels, self.classes)
        return {
            "class_means": Normal(self.location * one, self.spread * one).to_event(2),
            "class_variances": _scaled_inverse_chi2(self.certainty, self.scale, one).to_event(2),
        }

    def _gathered(self, table: Tensor, first: Tensor) -> Tensor:
        """``(*batch, C, K)`` at the four classes of each voxel, ``(*batch, C, *shape, 4)``."""
        index = (first.flatten(table.ndim - 1)[..., None] + torch.arange(4, device=first.device)).flatten(-2)
        return table.gather(-1, index).unflatten(-1, (*first.shape[table.ndim - 1 :], 4))

    def _mixture(self, moved: Tensor, latents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, TorchDistribution]:
        means, variances = latents["class_means"], latents["class_variances"]
        _check_channels(moved, means.ndim - 2, self.channels)
        first, weights, slopes = self.memberships(moved)
        # Four numbers a voxel are many to validate.
        components = Normal(self._gathered(means, first), self._gathered(variances, first).sqrt(), validate_args=False)
        classes = Categorical(logits=weights.clamp_min(_TINY).log(), validate_args=False)
        return first, weights, slopes, MixtureSameFamily(classes, components, validate_args=False)

    def distribution(self, moved: Tensor, latents: Mapping[str, Tensor]) -> TorchDistribution:
        missing = moved.isnan()
        *_, mixture = self._mixture(moved.masked_fill(missing, self.limits[0]), latents)
        return IncompleteImage(mixture, missing, latents["class_means"].ndim - 2)

    def start(self, moved: Tensor, fixed: Tensor) -> dict[str, Tensor]:
        """One ``update`` from the means that make Σ_k π_k(m) μ_k nearest to f. Averages over the voxels of a class would be its neighbours' too."""
        _check_channels(moved, 0, self.channels)
        seen, m, f = _both(moved, fixed)
        first, weights, _ = self.memberships(m)
        weights = weights * seen[..., None]
        flat, index, values = weights.flatten(1, -2), first.flatten(1), f.flatten(1)
        ridge = (self.scale / self.spread) ** 2
        right = m.new_full((self.channels, self.classes), ridge * self.location)
        normal = m.new_zeros(self.channels, self.classes**2)
        for a in range(4):
            right.scatter_add_(-1, index + a, flat[..., a] * values)
            for b in range(4):
                normal.scatter_add_(-1, (index + a) * self.classes + index + b, flat[..., a] * flat[..., b])
        normal = normal.unflatten(-1, (self.classes, self.classes)) + ridge * torch.eye(self.classes).to(m)
        means = torch.linalg.solve(normal, right)
        squares = (f - (weights * self._gathered(means, first)).sum(-1)) ** 2
        total, count = squares.flatten(1).sum(-1), seen.flatten(1).sum(-1).to(m)
        variances = (total + self.certainty * self.scale**2) / (count + self.certainty)
        return self.update(moved, fixed, {"class_means": means, "class_variances": variances[:, None].expand_as(means)})

    def update(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen, m, f = _both(moved, fixed)
        first, weights, _, mixture = self._mixture(m, latents)
        joint = mixture.component_distribution.log_prob(f[..., None]) + weights.clamp_min(_TINY).log()
        return self._maximised(first, joint.softmax(-1) * seen[..., None], f, latents["class_variances"])

    def _maximised(self, first: Tensor, responsibilities: Tensor, fixed: Tensor, variances: Tensor) -> dict[str, Tensor]:
        """Arguments: responsibilities: ``(*batch, C, *shape, 4)``, zero where missing; variances: the present ones."""
        start = variances.ndim - 1
        index = (first.flatten(start)[..., None] + torch.arange(4, device=first.device)).flatten(-2)
        values = fixed.flatten(start)

        def by_class(x: Tensor) -> Tensor:
            return self.tempering * torch.zeros_like(variances).scatter_add(-1, index, x.flatten(start))

        r = responsibilities.flatten(start, -2)
        mass, total = by_class(r), by_class(r * values[..., None])
        means = (total / variances + self.location / self.spread**2) / (mass / variances + 1 / self.spread**2)
        around = (values[..., None] - means.gather(-1, index).unflatten(-1, (-1, 4))) ** 2
        squares = by_class(r * around) + self.certainty * self.scale**2
        return {"class_means": means, "class_variances": squares / (mass + self.certainty + 2)}

    @torch.no_grad()
    def newton(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        seen, m, f = _both(moved, fixed)
        _, weights, slopes, mixture = self._mixture(m, latents)
        components = mixture.component_distribution.log_prob(f[..., None])
        density = (components + weights.clamp_min(_TINY).log()).logsumexp(-1, keepdim=True)
        gradient = (slopes * (components - density).exp()).sum(-1)
        return gradient * seen, self._interpolated(self.information(latents), m) * seen

    def information(self, latents: Mapping[str, Tensor]) -> Tensor:
        """The integral of (∂p/∂m)² / p over f, at 16 equally spaced m in each interval of knots and at the end, ``(*batch, C, 16 (K − 3) + 1)``."""
        means, variances = latents["class_means"].double(), latents["class_variances"].double()
        sd = variances.sqrt()
        low, high = (means - 8 * sd).amin(-1), (means + 8 * sd).amax(-1)
        steps = min(int((4 * (high - low) / sd.amin(-1)).max()) + 2, 8192)
        f = low[..., None] + (high - low)[..., None] * torch.linspace(0, 1, steps).to(means)
        densities = Normal(means[..., None], sd[..., None]).log_prob(f[..., None, :]).exp()
        points = torch.linspace(*self.limits, self._positions * (self.classes - 3) + 1).to(means)
        first, *parts = self.memberships(points)
        index = first[:, None] + torch.arange(4, device=first.device)
        weights, slopes = (means.new_zeros(len(points), self.classes).scatter(-1, index, part) for part in parts)
        ratio = (slopes @ densities) ** 2 / (weights @ densities).clamp_min(torch.finfo(torch.float64).tiny)
        return torch.trapezoid(ratio, f[..., None, :]).to(latents["class_means"])

    def _interpolated(self, table: Tensor, moved: Tensor) -> Tensor:
        intervals = table.shape[-1] - 1
        position = (moved - self.limits[0]) / self.spacing
        inside = (position >= 0) & (position <= self.classes - 3)
        position = (self._positions * position).clamp(0, intervals).flatten(table.ndim - 1)
        below = position.floor().clamp_max(intervals - 1)
        index, share = below.long(), position - below
        value = (1 - share) * table.gather(-1, index) + share * table.gather(-1, index + 1)
        return value.reshape(moved.shape) * inside


class OneHotLabels(TorchDistribution):
    """Independent labels, log p(S) = Σ_{v observed} log q_v(S_v); S as zeros and a one.

    Arguments:
        probabilities: q, ``(*batch, K, *shape)``.
        missing: where they mean nothing, ``(*batch, *shape)``: draws are NaN there, and observations are ignored. So are observations that are NaN.
        batch: number of batch axes.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(self, probabilities: Tensor, missing: Tensor, batch: int = 0, validate_args: bool | None = None) -> None:
        self.probabilities, self.missing = probabilities, missing
        super().__init__(probabilities.shape[:batch], probabilities.shape[batch:], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        labels = -len(self.event_shape)
        missing = (self.missing.unsqueeze(labels) | value.isnan().any(labels, keepdim=True)).expand(torch.broadcast_shapes(value.shape, self.shape()))
        likelihood = (value.masked_fill(missing, 1.0) * self.probabilities.masked_fill(missing, 1.0)).sum(labels)
        return likelihood.log().masked_fill(missing.select(labels, 0), 0.0).flatten(labels + 1).sum(-1)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        labels = -len(self.event_shape)
        weights = self.probabilities.movedim(labels, -1)
        drawn = torch.distributions.OneHotCategorical(weights, validate_args=False).sample(torch.Size(sample_shape))
        return drawn.movedim(-1, labels).masked_fill(self.missing.unsqueeze(labels), torch.nan)

    def expand(self, batch_shape: Sequence[int], _instance: OneHotLabels | None = None) -> OneHotLabels:
        batch = torch.Size(batch_shape)
        return OneHotLabels(self.probabilities.expand(batch + self.event_shape), self.missing.expand(batch + self.event_shape[1:]), len(batch), False)


class LabelAgreement(Similarity):
    """Two segmentations: the fixed one has the moved one's label, or by mistake another.

    .. math:: \\epsilon \\sim Beta(1 + n_0 e, 1 + n_0 (1 - e)), \\quad S_{fv} \\sim \\sum_k \\pi_k(v) C(k, \\cdot), \\quad
              C(k, j) = (1 - \\epsilon) [j = k] + \\frac{\\epsilon}{K - 1} [j \\ne k]

    The moved image is π, ``(K, *shape)``: label probabilities carried by the deformation, one in sum. The fixed one is S as zeros and a one,
    ``(K, *shape)``. A voxel with a NaN among its K numbers is missing. Site: ``error``, ε, a scalar, unless ``confusion`` is given. ``update`` is one
    step of EM, the mistakes being the hidden variable. The gradient is C(k, S_v) / Σ_l π_l C(l, S_v); the curvature is the expected one of each value
    alone, Σ_j C(k, j)² / Σ_l π_l C(l, j).

    Arguments:
        labels: K, two or more.
        error: e, the prior's mode of ε; certainty: n_0, voxels.
        confusion: C, ``(K, K)``, rows one in sum, positive; then nothing is learned.
        tempering: of ``Similarity``.

    References: Warfield, Zou & Wells, IEEE TMI 2004 (confusion matrices by EM).
    """

    confusion: Tensor | None

    def __init__(
        self, labels: int, error: float = 0.05, certainty: float = 100.0, confusion: Tensor | None = None, tempering: float = 1.0
    ) -> None:
        super().__init__(tempering)
        _check_positive(certainty=certainty)
        if labels < 2 or not 0 < error < 1:
            raise ValueError(f"expected at least two labels and 0 < error < 1, got {labels} and {error}")
        if confusion is not None:
            if confusion.shape != (labels, labels) or not bool((confusion > 0).all()):
                raise ValueError(f"expected a positive confusion matrix of shape {(labels, labels)}, got {tuple(confusion.shape)}, {confusion}")
            if not torch.allclose(confusion.sum(-1), torch.ones_like(confusion[0]), atol=1e-5):
                raise ValueError(f"expected rows of the confusion matrix to sum to one, got {confusion.sum(-1)}")
        self.labels, self.error, self.certainty = labels, error, certainty
        self.register_buffer("confusion", confusion)

    def prior(self, moved: Tensor) -> dict[str, TorchDistribution]:
        if self.confusion is not None:
            return {}
        one, n = moved.new_ones(()), self.certainty
        return {"error": Beta((1 + n * self.error) * one, (1 + n * (1 - self.error)) * one)}

    def confusion_matrix(self, moved: Tensor, latents: Mapping[str, Tensor]) -> Tensor:
        """C, ``(*batch, K, K)``."""
        if self.confusion is not None:
            return self.confusion.to(moved)
        error = latents["error"][..., None, None]
        same = torch.eye(self.labels, dtype=moved.dtype, device=moved.device)
        return (1 - error) * same + error / (self.labels - 1) * (1 - same)

    def distribution(self, moved: Tensor, latents: Mapping[str, Tensor]) -> TorchDistribution:
        matrix = self.confusion_matrix(moved, latents)
        batch = matrix.ndim - 2
        _check_channels(moved, batch, self.labels)
        missing = moved.isnan().any(batch)
        filled = moved.masked_fill(missing.unsqueeze(batch), 1 / self.labels)
        return OneHotLabels((matrix.mT @ filled.flatten(batch + 1)).reshape(moved.shape), missing, batch)

    def start(self, moved: Tensor, fixed: Tensor) -> dict[str, Tensor]:
        _check_channels(moved, 0, self.labels)
        return {} if self.confusion is not None else {"error": moved.new_tensor(self.error)}

    def _flat(self, moved: Tensor, fixed: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Voxels on one axis: where both are known, ``(*batch, 1, N)``, and both, ``(*batch, K, N)``, equal probabilities where not."""
        _check_channels(moved, batch, self.labels)
        seen, *_ = _both(moved, fixed)
        seen = seen.all(batch, keepdim=True)
        return seen.flatten(batch + 1), moved.masked_fill(~seen, 1 / self.labels).flatten(batch + 1), fixed.masked_fill(~seen, 0.0).flatten(batch + 1)

    def update(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.confusion is not None:
            return {}
        matrix = self.confusion_matrix(moved, latents)
        seen, m, f = self._flat(moved, fixed, matrix.ndim - 2)
        right = (1 - latents["error"])[..., None] * (m * f).sum(-2)
        total = ((matrix.mT @ m) * f).sum(-2) + ~seen[..., 0, :]
        mistakes = ((1 - right / total) * seen[..., 0, :]).sum(-1)
        count = seen.sum((-2, -1)).to(mistakes)
        return {"error": (self.tempering * mistakes + self.certainty * self.error) / (self.tempering * count + self.certainty)}

    def newton(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        matrix = self.confusion_matrix(moved, latents)
        seen, m, f = self._flat(moved, fixed, matrix.ndim - 2)
        inverse = 1 / (matrix.mT @ m)
        gradient, curvature = matrix @ (f * inverse), matrix**2 @ inverse
        return (gradient * seen).reshape(moved.shape), (curvature * seen).reshape(moved.shape)


class Landmarks(Similarity):
    """Points that correspond.

    .. math:: y_i \\sim N(\\varphi(x_i), s^2 \\, sd_i^2 I), \\quad s^2 \\sim \\text{Scale-inv-}\\chi^2(n_0, 1)

    The moved "image" is φ(x), ``(N, d)``, and the fixed one y, ``(N, d)``, both mm; NaN where a landmark was not found. Site: ``landmark_scale``, s²,
    a scalar, where ``certainty`` is given; else s is one. ``update`` gives its posterior mode; the curvature, 1 / (s² sd²), is exact.

    Arguments:
        sd_mm: the accuracy with which landmarks are placed: a number, or a tensor for ``(N, d)``, as ``(N, 1)`` for one a landmark.
        certainty: n_0, in coordinates; None where the accuracy is known.
        tempering: of ``Similarity``.
    """

    sd_mm: Tensor

    def __init__(self, sd_mm: float | Tensor = 1.0, certainty: float | None = None, tempering: float = 1.0) -> None:
        super().__init__(tempering)
        sd = torch.as_tensor(sd_mm, dtype=torch.float64)
        if not bool((sd > 0).all()):
            raise ValueError(f"expected sd_mm > 0, got {sd_mm}")
        if certainty is not None:
            _check_positive(certainty=certainty)
        self.certainty = certainty
        self.register_buffer("sd_mm", sd)

    def prior(self, moved: Tensor) -> dict[str, TorchDistribution]:
        return {} if self.certainty is None else {"landmark_scale": _scaled_inverse_chi2(self.certainty, 1.0, moved.new_ones(()))}

    def _sd(self, moved: Tensor, latents: Mapping[str, Tensor]) -> Tensor:
        """s sd, against the points."""
        sd = self.sd_mm.to(moved)
        return sd if self.certainty is None else sd * latents["landmark_scale"].sqrt()[..., None, None]

    def distribution(self, moved: Tensor, latents: Mapping[str, Tensor]) -> TorchDistribution:
        if moved.ndim < 2:
            raise ValueError(f"expected points of shape (*batch, N, d), got {tuple(moved.shape)}")
        missing = moved.isnan()
        return IncompleteImage(Normal(moved.masked_fill(missing, 0.0), self._sd(moved, latents)), missing, moved.ndim - 2)

    def start(self, moved: Tensor, fixed: Tensor) -> dict[str, Tensor]:
        """The posterior mode."""
        return self.update(moved, fixed, {})

    def update(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.certainty is None:
            return {}
        seen, m, f = _both(moved, fixed)
        total, count = ((f - m) / self.sd_mm.to(moved)).square().sum((-2, -1)), seen.sum((-2, -1)).to(m)
        return {"landmark_scale": (self.tempering * total + self.certainty) / (self.tempering * count + self.certainty + 2)}

    def newton(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        seen, m, f = _both(moved, fixed)
        precision = self._sd(moved, latents) ** -2
        return precision * (f - m), precision * seen
