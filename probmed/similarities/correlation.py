"""Images whose intensities are related linearly within a window."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from pyro.distributions import InverseGamma, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from probmed.similarities.likelihood import Similarity, both_known, check_positive


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
        seen, m, f = both_known(moved, value)
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
        check_positive(noise=noise, certainty=certainty, spread=spread)
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
