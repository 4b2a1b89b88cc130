"""Variational inference where codes of images have a Gaussian process as prior: −ELBO of all visits, or of whole people in minibatches.

With q(z) = Π N(m, s²), W = diag(s²), and a prior N(0, Σ) of each code over all N visits, less its mean,

.. math:: \\mathrm{KL} = \\tfrac12 \\left[\\mathrm{tr}\\,\\Sigma^{-1} W + m^T \\Sigma^{-1} m - N + \\log|\\Sigma| - \\log|W|\\right]

needs everyone at once: ``exact_loss``, or ``accumulated_loss``, where images pass the networks in minibatches and the gradient is the same. Σ =
A Aᵀ + blockdiag(B_p) is z = Au + ε with u ~ N(0, I), so that with q(u | z) = N(μ + S Σ_p A_pᵀB_p⁻¹(z_p − m_p), S) and S = (I + Σ_p A_pᵀB_p⁻¹A_p)⁻¹

.. math:: \\mathrm{KL} \\le \\tfrac12 \\Big[\\sum_p \\big\\{(m_p - A_p\\mu)^T B_p^{-1} (m_p - A_p\\mu) + \\mathrm{tr}\\,B_p^{-1}W_p
          - \\mathrm{tr}\\,S A_p^T B_p^{-1} W_p B_p^{-1} A_p + \\log|B_p| - \\log|W_p| - T_p\\big\\} + \\mu^T\\mu - \\log|S|\\Big]

is a sum over people, of which a minibatch is an unbiased estimate, and equal to the divergence at the best μ: ``GlobalWeights``. S depends on the
prior alone and is made of all people at each step. The term with S is there because u follows z; with the two independent, a gap would be left at
any μ.

References: Casale et al., NeurIPS 2018 (the gradient in two passes); Hoffman et al., JMLR 2013 (natural gradients of global variables).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from probmed.kernels import StackedCovariance, Visits


class People(Protocol):
    """Visits of people: ``present``, ``(P, T)`` bool."""

    @property
    def present(self) -> Tensor: ...
    def __len__(self) -> int: ...
    def people(self, index: Tensor) -> People:
        """Some of the people."""
        ...

    def only(self, visits: Tensor) -> People:
        """Some of the visits."""
        ...


class CodeCovariance(Protocol):
    """The prior of L codes: mean ``(P, T, L)``, features ``(P, T, H)``, their variances ``(L, H)``, blocks ``(L, P, T, T)``; at visits not there
    zero, and blocks of the identity; there q is N(0, 1), so that padding diverges by nothing."""

    @property
    def mean(self) -> Tensor: ...
    @property
    def features(self) -> Tensor: ...
    @property
    def variances(self) -> Tensor: ...
    @property
    def blocks(self) -> Tensor: ...
    @property
    def left_out(self) -> Tensor | None:
        """Covariance of a person's visits that is in neither and makes divergences bounds of those with it, ``(L, P, T, T)``."""
        ...


class CodeModel(Protocol):
    """p(z) p(x | z) of codes ``(P, T, L)``; ``image`` has a log density for each person."""

    prior: Any

    def image(self, codes: Tensor, cohort: Any) -> Any: ...


class CodeGuide(Protocol):
    """q(z | x): means and standard deviations, ``(P, T, L)``."""

    def encode(self, cohort: Any, images: Tensor) -> tuple[Tensor, Tensor]: ...


def stacked_covariances(prior: CodeCovariance, noise: Tensor | None = None) -> list[StackedCovariance]:
    """Σ of each code over all visits, those that are not there too, ``(PT, PT)``; with further variances ``(P, T, L)`` on its diagonal."""
    people, size, _ = prior.features.shape
    everyone = torch.arange(people * size, device=prior.features.device)
    visits = Visits(everyone, everyone[:people], ((size, people),))
    features = prior.features.flatten(0, 1)
    blocks = prior.blocks if noise is None else prior.blocks + torch.diag_embed(noise.movedim(-1, 0))
    return [StackedCovariance(features, v, visits, [block]) for v, block in zip(prior.variances, blocks, strict=True)]


def exact_divergence(prior: CodeCovariance, mean: Tensor, sd: Tensor) -> Tensor:
    """KL(q(z) ‖ p(z)) of each code, ``(L,)``, nats; time N H² + H³ and memory that of features, a code."""
    rests, variances = (mean - prior.mean).flatten(0, 1).mT, sd.square().flatten(0, 1).mT
    totals = []
    for covariance, rest, variance in zip(stacked_covariances(prior), rests, variances, strict=True):
        spread = (covariance.inverse_diagonal() * variance).sum()
        totals.append(spread + covariance.quad_form(rest) - len(rest) + covariance.logdet() - variance.log().sum())
    return 0.5 * torch.stack(totals) + _charge(prior)


def _charge(prior: CodeCovariance) -> Tensor:
    """½ Σ_p tr B_p⁻¹ D_p of what is left out, ``(L,)``, nats."""
    if prior.left_out is None:
        return prior.variances.new_zeros(len(prior.variances))
    return 0.5 * torch.cholesky_solve(prior.left_out, torch.linalg.cholesky(prior.blocks)).diagonal(dim1=-2, dim2=-1).sum((1, 2))


def reconstruction(model: CodeModel, cohort: People, images: Tensor, mean: Tensor, sd: Tensor, noise: Tensor | None = None) -> Tensor:
    """An estimate of −E_q log p(x | z) from one draw, nats; ``noise`` is it before scale and shift, ``(P, T, L)``."""
    codes = mean + sd * (torch.randn_like(mean) if noise is None else noise)
    return -model.image(codes, cohort).log_prob(images).sum()


def exact_loss(model: CodeModel, guide: CodeGuide, cohort: People, images: Tensor, noise: Tensor | None = None) -> Tensor:
    """−ELBO of all people, nats.

    Arguments:
        images: ``(P, T, *shape)``, NaN where missing; each visit of the cohort should have one.
        noise: standard normal, ``(P, T, L)``; drawn by default.
    """
    mean, sd = guide.encode(cohort, images)
    return reconstruction(model, cohort, images, mean, sd, noise) + exact_divergence(model.prior(cohort), mean, sd).sum()


def accumulated_loss(model: CodeModel, guide: CodeGuide, cohort: People, images: Tensor, batch: int, noise: Tensor | None = None) -> Tensor:
    """``exact_loss`` with its gradient, but with the networks' intermediate values of ``batch`` people at a time in memory.

    The first pass encodes everyone without gradient; the divergence gives a = ∂KL/∂m and b = ∂KL/∂s² there; the second pass adds up the gradients of
    reconstruction + Σ a·m + b·s², which is the gradient of the whole. The networks must give the same in both passes: no dropout, no batch norm.

    Raises:
        ValueError: for a batch of none.
    """
    if batch < 1:
        raise ValueError(f"expected a batch of at least one person, got {batch}")
    parameters = _learned(model, guide)
    parts = torch.arange(len(cohort), device=images.device).split(batch)
    with torch.no_grad():
        encoded = [guide.encode(cohort.people(part), images[part]) for part in parts]
        mean, variance = torch.cat([m for m, _ in encoded]), torch.cat([s for _, s in encoded]).square()
        noise = torch.randn_like(mean) if noise is None else noise
    with torch.enable_grad():
        mean, variance = mean.requires_grad_(), variance.requires_grad_()
        divergence = exact_divergence(model.prior(cohort), mean, variance.sqrt()).sum()
        of_mean, of_variance, *total = torch.autograd.grad(divergence, [mean, variance, *parameters], allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, total, strict=True)]
        value = divergence.detach()
        for part in parts:
            chosen, seen = cohort.people(part), images[part]
            m, s = guide.encode(chosen, seen)
            loss = reconstruction(model, chosen, seen, m, s, noise[part])
            linear = (of_mean[part] * m).sum() + (of_variance[part] * s.square()).sum()
            for gradient, step in zip(gradients, torch.autograd.grad(loss + linear, parameters, allow_unused=True), strict=True):
                if step is not None:
                    gradient += step
            value = value + loss.detach()
    return _Known.apply(value, gradients, *parameters)  # type: ignore[no-any-return]


class _Known(torch.autograd.Function):
    """A value whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, None, *(grad * gradient for gradient in ctx.gradients)


def _learned(*modules: Any) -> list[nn.Parameter]:
    """Parameters of some modules, each once."""
    found = {id(p): p for module in modules if isinstance(module, nn.Module) for p in module.parameters() if p.requires_grad}
    return list(found.values())


@dataclass(frozen=True)
class _Whitened:
    """Of some people, by W_p = B_p^(−½): features A, ``(L, P, T, H)``, scaled by their variances; W A; and W, ``(L, P, T, T)``."""

    features: Tensor
    white: Tensor
    whitener: Tensor

    @classmethod
    def of(cls, prior: CodeCovariance) -> _Whitened:
        root = torch.linalg.cholesky(prior.blocks)
        whitener = torch.linalg.solve_triangular(root, torch.eye(root.shape[-1], dtype=root.dtype, device=root.device).expand_as(root), upper=False)
        features = prior.features * prior.variances.sqrt()[:, None, None]
        return cls(features, whitener @ features, whitener)

    def told(self, rest: Tensor) -> Tensor:
        """Σ_p A_pᵀ B_p⁻¹ r_p of ``(L, P, T)``, ``(L, H)``."""
        return torch.einsum("lpth,lpt->lh", self.white, self._whiten(rest))

    def square(self, rest: Tensor) -> Tensor:
        """Σ_p r_pᵀ B_p⁻¹ r_p, ``(L,)``."""
        return self._whiten(rest).square().sum((1, 2))

    def _whiten(self, rest: Tensor) -> Tensor:
        return (self.whitener @ rest[..., None])[..., 0]


@dataclass(frozen=True)
class WeightsCovariance:
    """S = (I + Σ_p A_pᵀ B_p⁻¹ A_p)⁻¹ by the Cholesky factor of its inverse, ``(L, H, H)``."""

    root: Tensor

    @classmethod
    def of(cls, prior: CodeCovariance) -> WeightsCovariance:
        """From all people; intermediate values of one code are kept at a time."""
        grams = [checkpoint(_gram, prior.features, v, blocks, use_reentrant=False) for v, blocks in zip(prior.variances, prior.blocks, strict=True)]
        eye = torch.eye(prior.features.shape[-1], dtype=prior.features.dtype, device=prior.features.device)
        return cls(torch.linalg.cholesky(eye + torch.stack(grams)))

    def solve(self, x: Tensor) -> Tensor:
        """S x of ``(L, H)``."""
        return torch.cholesky_solve(x[..., None], self.root)[..., 0]

    def squares(self, x: Tensor) -> Tensor:
        """xᵀ S x of ``(L, …, H)``, ``(L, …)``."""
        rows = x.flatten(1, -2)
        return torch.linalg.solve_triangular(self.root, rows.mT, upper=False).square().sum(1).reshape(x.shape[:-1])

    def logdet(self) -> Tensor:
        """log|S|, ``(L,)``, nats."""
        return -2 * self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _gram(features: Tensor, variances: Tensor, blocks: Tensor) -> Tensor:
    """Σ_p A_pᵀ B_p⁻¹ A_p of one code, ``(H, H)``."""
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), features * variances.sqrt(), upper=False).flatten(0, 1)
    return white.mT @ white


def people_divergence(prior: CodeCovariance, weights: WeightsCovariance, centre: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """What people add to the bound, the sum over p in it, ``(L,)``, nats.

    Arguments:
        prior: of these people. weights: S, from all. centre: μ, ``(L, H)``.
        mean, sd: of q(z) of these people, ``(P, T, L)``.
    """
    white = _Whitened.of(prior)
    rest, variance = (mean - prior.mean).movedim(-1, 0), sd.square().movedim(-1, 0)
    solved = white.whitener.mT @ white.white
    spread = white.whitener.square().sum(-2) - weights.squares(solved)
    logdet = -2 * white.whitener.diagonal(dim1=-2, dim2=-1).log().sum((1, 2))
    square = white.square(rest - torch.einsum("lpth,lh->lpt", white.features, centre))
    return 0.5 * (square + (spread * variance - variance.log() - 1).sum((1, 2)) + logdet) + _charge(prior)


class GlobalWeights(nn.Module):
    """q(u | z) of weights that all people share, for minibatches of whole people.

    Buffer: ``centre``, μ, ``(L, H)``, moved by natural gradients, not by the optimiser.

    Arguments:
        codes, features: L and H.
        rate: ρ of the natural gradient, the part of the way to the minibatch's own optimum.
    """

    centre: Tensor

    def __init__(self, codes: int, features: int, rate: float = 0.1) -> None:
        super().__init__()
        if not 0 < rate <= 1:
            raise ValueError(f"expected a rate in (0, 1], got {rate}")
        self.rate = rate
        self.register_buffer("centre", torch.zeros(codes, features))

    def divergence(self, prior: CodeCovariance, weights: WeightsCovariance, mean: Tensor, sd: Tensor, scale: float = 1.0) -> Tensor:
        """The bound of KL(q(z) ‖ p(z)), ``(L,)``, nats, from people who stand for ``scale`` times as many."""
        centre = self.centre.clone()  # it moves, in place, before the gradient is asked for
        return scale * people_divergence(prior, weights, centre, mean, sd) + 0.5 * (centre.square().sum(-1) - weights.logdet())

    @torch.no_grad()
    def follow(self, prior: CodeCovariance, weights: WeightsCovariance, mean: Tensor, scale: float = 1.0) -> None:
        """μ ← μ + ρ S (scale · Σ_p A_pᵀB_p⁻¹(m_p − A_p μ) − μ); with everyone and ρ = 1, the optimum."""
        white = _Whitened.of(prior)
        rest = (mean - prior.mean).movedim(-1, 0) - torch.einsum("lpth,lh->lpt", white.features, self.centre)
        self.centre += self.rate * weights.solve(scale * white.told(rest) - self.centre)

    def loss(self, model: CodeModel, guide: CodeGuide, cohort: People, images: Tensor, people: Tensor, noise: Tensor | None = None) -> Tensor:
        """−ELBO of all people estimated from some, nats; in training mode μ then follows them.

        Arguments:
            people: indices, drawn without replacement. noise: of theirs, ``(people, T, L)``.
        """
        chosen, seen = cohort.people(people), images[people]
        scale = len(cohort) / len(people)
        weights, prior = WeightsCovariance.of(model.prior(cohort)), model.prior(chosen)
        mean, sd = guide.encode(chosen, seen)
        value = scale * reconstruction(model, chosen, seen, mean, sd, noise) + self.divergence(prior, weights, mean, sd, scale).sum()
        if self.training:
            self.follow(prior, weights, mean, scale)
        return value


@dataclass(frozen=True)
class CodeForecast:
    """p(z*) of the codes at all visits, given those that were encoded: normal, jointly for a person.

    Arguments:
        mean: ``(P, T, L)``.
        covariance: of a person's visits, ``(L, P, T, T)``.
    """

    mean: Tensor
    covariance: Tensor

    @property
    def sd(self) -> Tensor:
        """``(P, T, L)``."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt().movedim(0, -1)

    def draws(self, count: int) -> Tensor:
        """``(count, P, T, L)``."""
        values, vectors = torch.linalg.eigh(self.covariance)
        white = torch.randn(count, *values.shape, dtype=values.dtype, device=values.device)
        return self.mean + (vectors @ (values.clamp_min(0).sqrt() * white)[..., None])[..., 0].movedim(1, -1)


def forecast_codes(prior: CodeCovariance, known: Tensor, mean: Tensor, sd: Tensor) -> CodeForecast:
    """E_{z ~ q} p(z* | z) at all visits, of people who have known ones, any number of them, or none.

    .. math:: E\\,z^* = K_*^T \\Sigma^{-1} m, \\quad \\mathrm{cov}\\,z^* = K_{**} - K_*^T \\Sigma^{-1} K_* + K_*^T \\Sigma^{-1} W \\Sigma^{-1} K_*

    Arguments:
        prior: of everyone at all visits, known or asked for.
        known: which were encoded, ``(P, T)`` bool; there the answer is q itself.
        mean, sd: of q(z), ``(P, T, L)``, used where known.
    """
    spread = sd.square().masked_fill(~known[..., None], 0.0)
    return conditional_codes(prior, known, mean, torch.zeros_like(spread), spread)


def conditional_codes(prior: CodeCovariance, known: Tensor, mean: Tensor, noise: Tensor, spread: Tensor) -> CodeForecast:
    """Codes at all visits given y = z + ε at the known ones, ε of variance ``noise``, where y is itself uncertain, with variance ``spread``.

    Arguments:
        mean: of y. noise, spread: zero where not known; ``(P, T, L)`` each.
    """
    rest = mean - prior.mean
    each = [_conditional(prior, known, code, rest[..., code], noise[..., code], spread[..., code]) for code in range(rest.shape[-1])]
    return CodeForecast(prior.mean + torch.stack([m for m, _ in each], -1), torch.stack([c for _, c in each]))


def _conditional(prior: CodeCovariance, known: Tensor, code: int, rest: Tensor, noise: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Of one code: mean less the prior's ``(P, T)`` and covariance ``(P, T, T)``. Given u, a person's visits depend on their own known ones alone."""
    blocks, features = prior.blocks[code], prior.features * prior.variances[code].sqrt()
    eye = torch.eye(known.shape[1], dtype=features.dtype, device=features.device)
    rest, there = rest.masked_fill(~known, 0.0), features.masked_fill(~known[..., None], 0.0)
    root = torch.linalg.cholesky(torch.where(known[:, :, None] & known[:, None], blocks, eye) + torch.diag_embed(noise))
    cross = blocks.masked_fill(~known[:, None], 0.0)
    along = torch.cholesky_solve(cross.mT, root).mT  # of a person's codes on their known ones
    solved = torch.cholesky_solve(there, root)
    precision = torch.linalg.cholesky(torch.eye(features.shape[-1]).to(features) + torch.einsum("pth,ptk->hk", there, solved))
    gain = torch.cholesky_solve(solved.flatten(0, 1).mT, precision)  # of the weights on all known codes, (H, N)
    noisy = gain * spread.flatten()
    weights, covariance = gain @ rest.flatten(), torch.cholesky_inverse(precision) + noisy @ gain.mT
    apart = features - along @ there
    both = apart @ noisy.unflatten(1, known.shape).movedim(0, 1) @ along.mT
    own = blocks - along @ cross.mT + (along * spread[:, None]) @ along.mT
    if prior.left_out is not None:
        own = own + prior.left_out[code] * (~known[:, :, None] & ~known[:, None])
    return apart @ weights + (along @ rest[..., None])[..., 0], own + both + both.mT + apart @ covariance @ apart.mT


@torch.no_grad()
def forecast(
    model: CodeModel,
    guide: CodeGuide,
    cohort: People,
    images: Tensor,
    draws: int = 100,
    codes: Callable[[CodeCovariance, Tensor, Tensor, Tensor], CodeForecast] = forecast_codes,
) -> Tensor:
    """Draws of the images at all visits of a cohort, also those that nobody has seen: of codes, then of images given them.

    Arguments:
        cohort: people known from training, and others; visits with an image, and others.
        images: ``(P, T, *shape)``, all NaN where there is none.
        codes: how they follow from those that are known.

    Returns:
        ``(draws, P, T, *shape)``.
    """
    known = cohort.present & ~images.flatten(2).isnan().all(-1)
    mean, sd = guide.encode(cohort.only(known), images)
    drawn = codes(model.prior(cohort), known, mean, sd).draws(draws)
    return torch.stack([model.image(z, cohort).sample() for z in drawn])
