"""Points that correspond."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pyro.distributions import MultivariateNormal, Normal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from probmed.similarities.likelihood import IncompleteImage, Similarity, both_known, check_positive, scaled_inverse_chi2


class IncompletePoints(TorchDistribution):
    """Independent points of which some are unknown, log p(y) = Σ_{i observed} log p(y_i).

    Arguments:
        points: the distribution of every point, batch ``(*batch, N)``, event ``(d,)``.
        missing: which mean nothing, ``(*batch, N)``: draws are NaN there, observations are ignored. So are those with a NaN in them.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, points: TorchDistribution, missing: Tensor, validate_args: bool | None = None) -> None:
        self.points, self.missing = points, missing.expand(points.batch_shape)
        super().__init__(points.batch_shape[:-1], points.batch_shape[-1:] + points.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, 2)

    def log_prob(self, value: Tensor) -> Tensor:
        missing = self.missing | value.isnan().any(-1)
        return self.points.log_prob(value.masked_fill(missing[..., None], 0.0)).masked_fill(missing, 0.0).sum(-1)

    def rsample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        return self.points.rsample(torch.Size(sample_shape)).masked_fill(self.missing[..., None], torch.nan)

    def expand(self, batch_shape: Sequence[int], _instance: IncompletePoints | None = None) -> IncompletePoints:
        batch = torch.Size(batch_shape) + self.points.batch_shape[-1:]
        return IncompletePoints(self.points.expand(batch), self.missing.expand(batch), False)


class Landmarks(Similarity):
    """Points that correspond.

    .. math:: y_i \\sim N(\\varphi(x_i), s^2 \\, \\Sigma_i), \\quad s^2 \\sim \\text{Scale-inv-}\\chi^2(n_0, 1)

    The moved "image" is φ(x), ``(N, d)``, and the fixed one y, ``(N, d)``, both mm; NaN where a landmark was not found. Site: ``landmark_scale``, s²,
    a scalar, where ``certainty`` is given; else s is one. ``update`` gives its posterior mode; the curvature, the diagonal of Σ⁻¹ / s², is exact of
    each coordinate alone, and ``whitening`` has what they tell together.

    Arguments:
        sd_mm: the accuracy with which landmarks are placed, Σ = sd² I: a number, or a tensor for ``(N, d)``, as ``(N, 1)`` for one a landmark.
        certainty: n_0, in coordinates; None where the accuracy is known.
        tempering: of ``Similarity``.
        covariance: Σ in place of sd², ``(d, d)``, or ``(N, d, d)`` for one a landmark, mm², symmetric and positive definite: a point on a vessel or a
            thick slice is better known across than along. A landmark with a NaN among its coordinates is then missing as a whole.

    Raises:
        ValueError: for an accuracy that is not positive, and a covariance that is none.

    References: Rohr et al., IEEE TMI 2001 (anisotropic errors of landmarks).
    """

    sd_mm: Tensor
    root: Tensor | None

    def __init__(
        self, sd_mm: float | Tensor = 1.0, certainty: float | None = None, tempering: float = 1.0, covariance: Tensor | None = None
    ) -> None:
        super().__init__(tempering)
        sd = torch.as_tensor(sd_mm, dtype=torch.float64)
        if not bool((sd > 0).all()):
            raise ValueError(f"expected sd_mm > 0, got {sd_mm}")
        if certainty is not None:
            check_positive(certainty=certainty)
        self.certainty = certainty
        self.register_buffer("sd_mm", sd)
        self.register_buffer("root", None if covariance is None else _cholesky(covariance.to(torch.float64)))

    def prior(self, moved: Tensor) -> dict[str, TorchDistribution]:
        return {} if self.certainty is None else {"landmark_scale": scaled_inverse_chi2(self.certainty, 1.0, moved.new_ones(()))}

    def _sd(self, moved: Tensor, latents: Mapping[str, Tensor]) -> Tensor:
        """s sd, against the points."""
        return self.sd_mm.to(moved) * self._scale(latents)

    def _scale(self, latents: Mapping[str, Tensor]) -> Tensor | float:
        """s, against the points."""
        return 1.0 if self.certainty is None else latents["landmark_scale"].sqrt()[..., None, None]

    def whitening(self, moved: Tensor, latents: Mapping[str, Tensor]) -> Tensor:
        """W with Wᵀ W = Σ⁻¹ / s², ``(*moved.shape, d)``: W (y − φ(x)) is white noise."""
        if self.root is None:
            return (1 / self._sd(moved, latents)).expand_as(moved).diag_embed()
        root = self.root.to(moved)
        identity = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device).expand_as(root)
        whole = torch.linalg.solve_triangular(root, identity, upper=False).expand(*moved.shape, moved.shape[-1])
        scale = self._scale(latents)
        return whole / (scale[..., None] if isinstance(scale, Tensor) else scale)

    def distribution(self, moved: Tensor, latents: Mapping[str, Tensor]) -> TorchDistribution:
        if moved.ndim < 2:
            raise ValueError(f"expected points of shape (*batch, N, d), got {tuple(moved.shape)}")
        missing = moved.isnan()
        if self.root is None:
            return IncompleteImage(Normal(moved.masked_fill(missing, 0.0), self._sd(moved, latents)), missing, moved.ndim - 2)
        scale = self._scale(latents)
        root = self.root.to(moved) * (scale[..., None] if isinstance(scale, Tensor) else scale)
        missing = missing.any(-1)
        return IncompletePoints(MultivariateNormal(moved.masked_fill(missing[..., None], 0.0), scale_tril=root), missing)

    def start(self, moved: Tensor, fixed: Tensor) -> dict[str, Tensor]:
        """The posterior mode."""
        return self.update(moved, fixed, {})

    def update(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.certainty is None:
            return {}
        one = {"landmark_scale": torch.ones_like(moved[..., 0, 0])}
        seen, residual = self.whitened(moved, fixed, one)
        total, count = residual.square().sum((-2, -1)), seen.sum((-2, -1)).to(moved)
        return {"landmark_scale": (self.tempering * total + self.certainty) / (self.tempering * count + self.certainty + 2)}

    def whitened(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Which coordinates are known, and W (y − φ(x)), zero elsewhere, ``(*batch, N, d)`` both."""
        seen, m, f = both_known(moved, fixed)
        seen = seen if self.root is None else seen.all(-1, keepdim=True).expand_as(seen)
        return seen, (self.whitening(m, latents) @ ((f - m) * seen)[..., None])[..., 0]

    def newton(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        seen, residual = self.whitened(moved, fixed, latents)
        white = self.whitening(moved, latents)
        return (white.mT @ residual[..., None])[..., 0], white.square().sum(-2) * seen


def _cholesky(covariance: Tensor) -> Tensor:
    if covariance.ndim in (2, 3) and covariance.shape[-1] == covariance.shape[-2] and torch.allclose(covariance, covariance.mT):
        root, failed = torch.linalg.cholesky_ex(covariance)
        if not bool(failed.any()):
            return root
    raise ValueError(f"expected a symmetric, positive definite covariance of shape (d, d) or (N, d, d), got {covariance}")
