"""Guides that serve any model: automatic ones by name, and a structured one for smooth fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from probmed.fields import GaussianField, dct, idct

AUTOMATIC: dict[str, Callable[..., Any]] = {
    "delta": AutoDelta,
    "diagonal": AutoDiagonalNormal,
    "low-rank": AutoLowRankMultivariateNormal,
    "full": AutoMultivariateNormal,
}
"""Automatic guides over all latents of a model, in their unconstrained coordinates."""


def automatic(name: str, model: Callable[..., Any], **options: Any) -> Any:
    """An automatic guide by name.

    Raises:
        ValueError: for a name that is not in ``AUTOMATIC``.
    """
    if name not in AUTOMATIC:
        raise ValueError(f"expected a guide among {sorted(AUTOMATIC)}, got {name!r}")
    return AUTOMATIC[name](model, **options)


class SpectralNormal(TorchDistribution):
    """A Gaussian over fields, diagonal in the DCT plus low rank: v = m + C (s ∘ ε) + U η, ε and η white.

    Arguments:
        loc: m, ``(C, *shape)``.
        scale: s > 0, ``(C, *shape)``, standard deviations of the DCT coefficients.
        factor: U in the DCT's coordinates, ``(R, C, *shape)``; R may be zero.

    Event ``(C, *shape)``; log densities in nats, by the matrix determinant lemma.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, factor: Tensor, validate_args: bool | None = None) -> None:
        if scale.shape != loc.shape or factor.shape[1:] != loc.shape:
            raise ValueError(f"expected scale {tuple(loc.shape)} and factor (R, *{tuple(loc.shape)}), got {tuple(scale.shape)}, {tuple(factor.shape)}")
        self.loc, self.scale, self.factor = loc, scale, factor
        super().__init__(torch.Size(), loc.shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, self.loc.ndim)

    @property
    def mean(self) -> Tensor:
        return self.loc

    def rsample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        lead = torch.Size(sample_shape)
        coefficients = self.scale * torch.randn(lead + self.loc.shape, dtype=self.loc.dtype, device=self.loc.device)
        if len(self.factor):
            white = torch.randn(*lead, len(self.factor), dtype=self.loc.dtype, device=self.loc.device)
            coefficients = coefficients + (white @ self.factor.flatten(1)).unflatten(-1, self.loc.shape)
        return self.loc + idct(coefficients, self.loc.ndim - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        d, n = self.loc.ndim - 1, self.loc.numel()
        white = (dct(value - self.loc, d) / self.scale).flatten(-d - 1)
        quadratic, log_det = (white**2).sum(-1), 2 * self.scale.log().sum()
        if len(self.factor):
            thin = (self.factor / self.scale).flatten(1)
            capacitance = torch.eye(len(thin), dtype=thin.dtype, device=thin.device) + thin @ thin.T
            root = torch.linalg.cholesky(capacitance)
            seen = torch.linalg.solve_triangular(root, (white @ thin.T).unsqueeze(-1), upper=False).squeeze(-1)
            quadratic = quadratic - (seen**2).sum(-1)
            log_det = log_det + 2 * root.diagonal().log().sum()
        return -0.5 * (quadratic + log_det + n * math.log(2 * math.pi))

    def expand(self, batch_shape: Sequence[int], _instance: SpectralNormal | None = None) -> SpectralNormal:
        if torch.Size(batch_shape) != torch.Size():
            raise ValueError("a spectral normal has no batch")
        return self


class FieldGuide(PyroModule):
    """q of one ``GaussianField`` site: ``SpectralNormal``, started at the prior.

    A diagonal q in voxels understates the standard deviation of a region's mean displacement several times; one that is diagonal in the DCT holds
    the prior's correlations exactly, and the low rank those that the data make.

    Arguments:
        site: its name.
        prior: the site's prior.
        rank: R.
        spread: the starting standard deviation relative to the prior's.
    """

    def __init__(self, site: str, prior: GaussianField, rank: int = 0, spread: float = 1.0) -> None:
        super().__init__()
        self.site = site
        scale = prior.eigenvalues.rsqrt().detach().expand(prior.event_shape) * spread
        self.loc = nn.Parameter(prior.mean.detach().clone())
        self.log_scale = nn.Parameter(scale.log())
        self.factor = nn.Parameter(1e-3 * scale * torch.randn(rank, *prior.event_shape, dtype=scale.dtype, device=scale.device))

    def distribution(self) -> SpectralNormal:
        return SpectralNormal(self.loc, self.log_scale.exp(), self.factor)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {self.site: pyro.sample(self.site, self.distribution())}


class CompositeGuide(PyroModule):
    """Guides of different sites as one; they are independent of each other under q."""

    def __init__(self, *guides: Callable[..., Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleList([guide for guide in guides if isinstance(guide, nn.Module)])
        if len(self.parts) != len(guides):
            raise ValueError("expected guides that are modules")

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for guide in self.parts:
            values.update(guide(*args, **kwargs) or {})
        return values


def structured(model: Callable[..., Any], *args: Any, rank: int = 0, others: str = "diagonal", **kwargs: Any) -> CompositeGuide:
    """A ``FieldGuide`` for each smooth field that the model samples and an automatic guide for all else.

    Arguments:
        args, kwargs: what the model is called with.
        rank: of the field guides; others: an automatic guide's name.
    """
    trace = poutine.trace(model).get_trace(*args, **kwargs)
    fields = {}
    for name in trace.stochastic_nodes:
        base = getattr(trace.nodes[name]["fn"], "base_dist", trace.nodes[name]["fn"])
        if isinstance(base, GaussianField):
            fields[name] = base
    parts: list[Any] = [FieldGuide(name, prior, rank) for name, prior in fields.items()]
    if len(fields) < len(trace.stochastic_nodes):
        parts.append(automatic(others, poutine.block(model, hide=list(fields))))
    return CompositeGuide(*parts)
