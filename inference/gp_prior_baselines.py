"""Published objectives for autoencoders with a Gaussian process as prior, by name, to compare ``gp_prior`` with; nats, constants included.

References: Casale et al., NeurIPS 2018; Jazbec et al., AISTATS 2021.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probmed.inference.gp_prior import (
    CodeCovariance,
    CodeForecast,
    CodeGuide,
    CodeModel,
    People,
    WeightsCovariance,
    reconstruction,
    stacked_covariances,
)


def gppvae_loss(model: CodeModel, guide: CodeGuide, cohort: People, images: Tensor, noise: Tensor | None = None) -> Tensor:
    """−ELBO of all people as Casale et al. have it: log p(z) is that of the one draw which is decoded.

    Its mean is ``exact_loss``. The divergence that is closed there is an estimate here, whose noise the encoder's and the prior's gradients carry.
    """
    present = cohort.present[..., None]
    mean, sd = guide.encode(cohort, images)
    noise = (torch.randn_like(mean) if noise is None else noise).masked_fill(~present, 0.0)
    prior = model.prior(cohort)
    codes = (mean + sd * noise - prior.mean).flatten(0, 1).mT
    absent = 0.5 * math.log(2 * math.pi) * int((~cohort.present).sum())
    density = torch.stack([covariance.log_prob(z) + absent for covariance, z in zip(stacked_covariances(prior), codes, strict=True)])
    entropy = (sd.log() + 0.5 * math.log(2 * math.pi * math.e)).masked_fill(~present, 0.0).sum()
    return reconstruction(model, cohort, images, mean, sd, noise) - density.sum() - entropy


def svgpvae_loss(model: CodeModel, guide: CodeGuide, cohort: People, images: Tensor, people: Tensor, noise: Tensor | None = None) -> Tensor:
    """−ELBO of all people estimated from some as Jazbec et al. have it, with the weights of the features in the place of inducing values.

    The encoder gives pseudo-data; q(u) is regression on those of the minibatch, each counted P/b times. This is another q for each minibatch, a
    nonlinear function of it, so that the estimate is biased unless everyone is in it. Codes are independent given u: of the covariance that is a
    person's own, only the variance is used.

    Arguments:
        people: indices, drawn without replacement. noise: of theirs, ``(people, T, L)``.
    """
    chosen, seen = cohort.people(people), images[people]
    scale = len(cohort) / len(people)
    prior = model.prior(chosen)
    weights, centre = regressed_weights(prior, *guide.encode(chosen, seen), scale)
    trace = torch.cholesky_inverse(weights.root).diagonal(dim1=-2, dim2=-1).sum(-1)
    divergence = 0.5 * (trace + centre.square().sum(-1) - centre.shape[-1] - weights.logdet())
    mean, sd = regressed_codes(prior, weights, centre)
    return scale * reconstruction(model, chosen, seen, mean, sd, noise) + divergence.sum()


def regressed_weights(prior: CodeCovariance, mean: Tensor, sd: Tensor, scale: float = 1.0) -> tuple[WeightsCovariance, Tensor]:
    """S and μ, ``(L, H)``, of the weights given pseudo-data N(m; z, s²), each counted ``scale`` times."""
    features = prior.features * prior.variances.sqrt()[:, None, None]
    precision = scale * sd.square().reciprocal().movedim(-1, 0)
    eye = torch.eye(features.shape[-1], dtype=features.dtype, device=features.device)
    weights = WeightsCovariance(torch.linalg.cholesky(eye + torch.einsum("lpth,lpt,lptk->lhk", features, precision, features)))
    return weights, weights.solve(torch.einsum("lpth,lpt->lh", features, precision * (mean - prior.mean).movedim(-1, 0)))


def regressed_codes(prior: CodeCovariance, weights: WeightsCovariance, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of codes given q(u), ``(P, T, L)`` each."""
    features = prior.features * prior.variances.sqrt()[:, None, None]
    variance = prior.blocks.diagonal(dim1=-2, dim2=-1) + weights.squares(features)
    return prior.mean + torch.einsum("lpth,lh->ptl", features, centre), variance.sqrt().movedim(0, -1)


def svgpvae_forecast(prior: CodeCovariance, known: Tensor, mean: Tensor, sd: Tensor) -> CodeForecast:
    """As ``forecast_codes``: the codes at all visits given the pseudo-data of the known ones, independent given u."""
    weights, centre = regressed_weights(prior, mean, sd.masked_fill(~known[..., None], math.inf))
    centres, spreads = regressed_codes(prior, weights, centre)
    return CodeForecast(centres, torch.diag_embed(spreads.square().movedim(-1, 0)))
