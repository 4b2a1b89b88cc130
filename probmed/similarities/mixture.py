"""Images of different contrasts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pyro.distributions import Categorical, MixtureSameFamily, Normal, TorchDistribution
from torch import Tensor

from probmed.similarities.likelihood import IncompleteImage, Similarity, both_known, check_channels, check_positive, scaled_inverse_chi2

_TINY = 1e-30


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
        check_positive(spread=spread, scale=scale, certainty=certainty)
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
            "class_variances": scaled_inverse_chi2(self.certainty, self.scale, one).to_event(2),
        }

    def _gathered(self, table: Tensor, first: Tensor) -> Tensor:
        """``(*batch, C, K)`` at the four classes of each voxel, ``(*batch, C, *shape, 4)``."""
        index = (first.flatten(table.ndim - 1)[..., None] + torch.arange(4, device=first.device)).flatten(-2)
        return table.gather(-1, index).unflatten(-1, (*first.shape[table.ndim - 1 :], 4))

    def _mixture(self, moved: Tensor, latents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, TorchDistribution]:
        means, variances = latents["class_means"], latents["class_variances"]
        check_channels(moved, means.ndim - 2, self.channels)
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
        check_channels(moved, 0, self.channels)
        seen, m, f = both_known(moved, fixed)
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
        seen, m, f = both_known(moved, fixed)
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
        seen, m, f = both_known(moved, fixed)
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
