"""Guides that serve any model: automatic ones by name, and a structured one for smooth fields."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal, init_to_mean
from pyro.nn import PyroModule
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.distributions import constraints, register_kl

from probmed.fields import GaussianField, dct, idct
from probmed.inference.parameters import local_parameters


def _place(init: Mapping[str, Tensor], site: dict[str, Any]) -> Tensor:
    """The starting value of a site: the one given, else the prior's mean, else its median."""
    if site["name"] not in init:
        # A copy, because a mean that is expanded over a plate shares memory between its elements.
        start: Tensor = init_to_mean(site).clone(memory_format=torch.contiguous_format)
        return start
    value, expected = init[site["name"]].detach().clone(), site["fn"].shape()
    if value.shape != expected:
        raise ValueError(f"expected a starting value of shape {tuple(expected)} for site {site['name']!r}, got {tuple(value.shape)}")
    return value


class _Local:
    """Keeps a guide that is called by itself, outside ``fit``, from leaving its parameters in Pyro's global store."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if pyro.settings.get("module_local_params"):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with local_parameters(self):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


class _Started(_Local):
    """Starting values by site for Pyro's automatic guides, refused where no such site exists."""

    def __init__(self, model: Callable[..., Any], init: Mapping[str, Tensor] | None = None, **options: Any) -> None:
        super().__init__(model, init_loc_fn=partial(_place, dict(init or {})), **options)  # type: ignore[call-arg]
        self.starts = tuple(init or ())

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)  # type: ignore[misc]
        sites = list(self.prototype_trace.stochastic_nodes)  # type: ignore[attr-defined]
        unknown = sorted(set(self.starts) - set(sites))
        if unknown:
            raise ValueError(f"expected starting values for the sites {sites}, got some for {unknown}")


class MAP(_Started, AutoDelta):
    """The guide of a maximum a posteriori estimate: a point mass at each site, where the joint density is highest in the site's own coordinates.

    Arguments:
        model: any model.
        init: starting values by site; elsewhere the prior's mean, or its median where it has no mean.

    Raises:
        ValueError: at the first call, for starting values of another shape or for sites that the model does not have.
    """


class DiagonalNormal(_Started, AutoDiagonalNormal):
    """A normal with independent elements over all latents, in unconstrained coordinates. ``init`` as in ``MAP``."""


class LowRankNormal(_Started, AutoLowRankMultivariateNormal):
    """A normal with diagonal plus low-rank covariance over all latents, in unconstrained coordinates. ``init`` as in ``MAP``."""


class FullRankNormal(_Started, AutoMultivariateNormal):
    """A normal with any covariance over all latents, in unconstrained coordinates. ``init`` as in ``MAP``."""


AUTOMATIC: dict[str, Callable[..., Any]] = {"delta": MAP, "diagonal": DiagonalNormal, "low-rank": LowRankNormal, "full": FullRankNormal}
"""Automatic guides over all latents of a model, in their unconstrained coordinates."""


def automatic(name: str, model: Callable[..., Any], init: Mapping[str, Tensor] | None = None, **options: Any) -> Any:
    """An automatic guide by name.

    Raises:
        ValueError: for a name that is not in ``AUTOMATIC``.
    """
    if name not in AUTOMATIC:
        raise ValueError(f"expected a guide among {sorted(AUTOMATIC)}, got {name!r}")
    return AUTOMATIC[name](model, init, **options)


class SpectralNormal(TorchDistribution):
    """A Gaussian over fields, diagonal in the DCT plus low rank: v = m + C (s ∘ ε + Wᵀ η), ε and η white.

    Its covariance is C diag(s²) Cᵀ + U Uᵀ with U = C Wᵀ, C the orthonormal DCT.

    Arguments:
        loc: m, ``(*batch, C, *shape)``.
        scale: s > 0, alike, standard deviations of the DCT coefficients.
        factor: W, in the DCT's coordinates, ``(*batch, R, C, *shape)``; R may be zero.
        ndim: number of axes of ``shape``; by default all but the first of ``loc``, and no batch.

    Event ``(C, *shape)``; log densities in nats, by the matrix determinant lemma.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, factor: Tensor, ndim: int | None = None, validate_args: bool | None = None) -> None:
        self.ndim = loc.ndim - 1 if ndim is None else ndim
        batch, event = loc.shape[: loc.ndim - self.ndim - 1], loc.shape[loc.ndim - self.ndim - 1 :]
        rank = factor.shape[len(batch)] if factor.ndim == loc.ndim + 1 else -1
        if scale.shape != loc.shape or factor.shape != (*batch, rank, *event):
            expected = f"scale {tuple(loc.shape)} and factor {(*batch, 'R', *event)}"
            raise ValueError(f"expected {expected}, got {tuple(scale.shape)} and {tuple(factor.shape)}")
        self.loc, self.scale, self.factor, self.rank = loc, scale, factor, rank
        super().__init__(batch, event, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, self.ndim + 1)

    @property
    def mean(self) -> Tensor:
        return self.loc

    def rsample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        like: dict[str, Any] = {"dtype": self.loc.dtype, "device": self.loc.device}
        lead = torch.Size(sample_shape) + self.batch_shape
        coefficients = self.scale * torch.randn(lead + self.event_shape, **like)
        if self.rank:
            white = torch.randn(*lead, 1, self.rank, **like)
            coefficients = coefficients + (white @ self.factor.flatten(-self.ndim - 1)).squeeze(-2).unflatten(-1, self.event_shape)
        return self.loc + idct(coefficients, self.ndim)

    def _root(self) -> tuple[Tensor, Tensor]:
        """W / s, ``(*batch, R, n)``, and the Cholesky root of I + (W / s)(W / s)ᵀ."""
        thin = (self.factor / self.scale.unsqueeze(-self.ndim - 2)).flatten(-self.ndim - 1)
        capacitance = torch.eye(self.rank, dtype=thin.dtype, device=thin.device) + thin @ thin.mT
        return thin, torch.linalg.cholesky(capacitance)

    def log_det_covariance(self) -> Tensor:
        """log |covariance|, ``(*batch,)``."""
        total = 2 * self.scale.log().flatten(-self.ndim - 1).sum(-1)
        return total + 2 * self._root()[1].diagonal(dim1=-2, dim2=-1).log().sum(-1) if self.rank else total

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        white = (dct(value - self.loc, self.ndim) / self.scale).flatten(-self.ndim - 1)
        quadratic = (white**2).sum(-1)
        if self.rank:
            thin, root = self._root()
            seen = torch.linalg.solve_triangular(root, thin @ white.unsqueeze(-1), upper=False)
            quadratic = quadratic - (seen**2).sum((-2, -1))
        return -0.5 * (quadratic + self.log_det_covariance() + self.event_shape.numel() * math.log(2 * math.pi))

    def entropy(self) -> Tensor:
        return 0.5 * (self.log_det_covariance() + self.event_shape.numel() * (1 + math.log(2 * math.pi)))

    def expand(self, batch_shape: Sequence[int], _instance: SpectralNormal | None = None) -> SpectralNormal:
        batch = torch.Size(batch_shape)
        loc, scale = (x.expand(batch + self.event_shape) for x in (self.loc, self.scale))
        factor = self.factor.expand(batch + torch.Size((self.rank,)) + self.event_shape)
        return SpectralNormal(loc, scale, factor, self.ndim, validate_args=False)


@register_kl(SpectralNormal, GaussianField)  # type: ignore[untyped-decorator]
def _kl_to_prior(q: SpectralNormal, p: GaussianField) -> Tensor:
    """KL(q ‖ p) in closed form, nats: both are diagonal in the DCT but for q's low rank. ``TraceMeanField_ELBO`` uses it."""
    eigenvalues = p.eigenvalues.unsqueeze(-q.ndim - 1)
    variances = q.scale**2 + (q.factor**2).sum(-q.ndim - 2)
    squares = (eigenvalues * (variances + dct(q.loc - p.loc, q.ndim) ** 2)).flatten(-q.ndim - 1).sum(-1)
    return 0.5 * (squares - q.event_shape.numel() - p.log_det_precision() - q.log_det_covariance())


class FieldGuide(_Local, PyroModule):
    """q of one ``GaussianField`` site: ``SpectralNormal``, started at the prior.

    A diagonal q in voxels understates the standard deviation of a region's mean displacement several times; one that is diagonal in the DCT holds
    the prior's correlations exactly, and the low rank those that the data make. Its parameters are whitened by the prior, so that one learning rate
    serves coarse and fine detail.

    Arguments:
        site: its name.
        prior: the site's prior, ``(*batch,)``.
        rank: R.
        spread: the starting standard deviation relative to the prior's.
        plates: the plates that the site is in, with dim and full size.
    """

    def __init__(self, site: str, prior: GaussianField, rank: int = 0, spread: float = 1.0, plates: Sequence[Any] = ()) -> None:
        super().__init__()
        if rank < 0 or spread <= 0:
            raise ValueError(f"expected rank >= 0 and spread > 0, got {rank} and {spread}")
        self.site, self.axes = site, len(prior.grid_shape)
        self.plates = [(p.name, p.size, p.dim) for p in plates]
        shape = prior.batch_shape + prior.event_shape
        sd = prior.eigenvalues.rsqrt().detach().unsqueeze(-self.axes - 1).expand(shape)
        self.register_buffer("prior_mean", prior.mean.detach().expand(shape).clone())
        self.register_buffer("prior_sd", sd.clone())
        self.white_loc = nn.Parameter(torch.zeros_like(sd))
        self.log_scale = nn.Parameter(torch.full_like(sd, math.log(spread)))
        # Small as a whole, whatever the number of voxels, yet not zero, where its gradient would vanish.
        small = 0.1 / math.sqrt(prior.event_shape.numel())
        factor = small * torch.randn(*prior.batch_shape, rank, *prior.event_shape, dtype=sd.dtype, device=sd.device)
        if rank:
            self.factor = nn.Parameter(factor)
        else:
            self.register_buffer("factor", factor)

    def distribution(self) -> SpectralNormal:
        """q, in the site's own coordinates."""
        mean, sd = (getattr(self, name) for name in ("prior_mean", "prior_sd"))
        loc = mean + idct(self.white_loc * sd, self.axes)
        return SpectralNormal(loc, self.log_scale.exp() * sd, self.factor * sd.unsqueeze(-self.axes - 2), self.axes)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with ExitStack() as stack:
            for name, size, dim in self.plates:
                stack.enter_context(pyro.plate(name, size, dim=dim))
            return {self.site: pyro.sample(self.site, self.distribution())}

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The centre of q."""
        with torch.no_grad():
            return {self.site: self.distribution().loc}


class CompositeGuide(_Local, PyroModule):
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

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The centre of each part's q, of those parts that say it."""
        values: dict[str, Tensor] = {}
        for guide in self.parts:
            values.update(guide.median(*args, **kwargs) if hasattr(guide, "median") else {})  # type: ignore[operator]
        return values


def structured(
    model: Callable[..., Any],
    *args: Any,
    rank: int = 0,
    others: str = "diagonal",
    init: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> CompositeGuide:
    """A ``FieldGuide`` for each smooth field that the model samples and an automatic guide for all else.

    Arguments:
        args, kwargs: what the model is called with.
        rank: of the field guides; others: an automatic guide's name; init: starting values of its sites.

    Raises:
        ValueError: for a field in a plate that is subsampled, whose q would have to be amortised.
    """
    with torch.no_grad(), local_parameters(model):
        trace = prune_subsample_sites(poutine.trace(model).get_trace(*args, **kwargs))
    parts: list[Any] = []
    fields: list[str] = []
    for name in trace.stochastic_nodes:
        base = getattr(trace.nodes[name]["fn"], "base_dist", trace.nodes[name]["fn"])
        if isinstance(base, GaussianField):
            frames = [frame for frame in trace.nodes[name]["cond_indep_stack"] if frame.vectorized]
            if any((frame.full_size or frame.size) != frame.size for frame in frames):
                raise ValueError(f"expected the whole plate of the field {name!r}, got a subsample: it needs an amortised guide")
            fields.append(name)
            parts.append(FieldGuide(name, base, rank, plates=frames))
    if len(fields) < len(trace.stochastic_nodes):
        parts.append(automatic(others, poutine.block(model, hide=fields), init))
    return CompositeGuide(*parts)
