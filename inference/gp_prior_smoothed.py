"""A posterior of the codes that has the prior's own correlations: images say where a code is, with an error, and the Gaussian process smooths that.

.. math:: q(z) \\propto p(z) \\prod_i N(m_i; z_i, s_i^2), \\quad
          \\mathrm{KL}(q \\| p) = \\sum_i E_q \\log N(m_i; z_i, s_i^2) - \\log N(m; 0, \\Sigma + W)

for each code less its prior mean, m and s² from the encoder. Where the prior has little noise, independent q(z_i) cannot be close to it, and the
bound of ``gp_prior`` favours priors of much noise, whose forecasts are vague; here q follows the prior, and what is trained is what forecasts.

Marginals are m − Wα, α = (Σ + W)⁻¹ m, and s_i² − s_i⁴ [(Σ + W)⁻¹]_ii: Σ + W is Σ with s² on the diagonals of people's blocks, and all costs what a
likelihood does.

References: Khan & Lin, AISTATS 2017 (conjugate computations); Jazbec et al., AISTATS 2021 (with inducing points, in biased minibatches).
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
    conditional_codes,
    reconstruction,
    stacked_covariances,
)


def smoothed_codes(prior: CodeCovariance, present: Tensor, mean: Tensor, sd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q(z) of pseudo-data.

    Arguments:
        present: visits that there are, ``(P, T)`` bool. mean, sd: m and s, ``(P, T, L)``.

    Returns:
        Marginal means and standard deviations, ``(P, T, L)``, and KL(q ‖ p) of each code, ``(L,)``, nats.
    """
    there = present[..., None]
    noise = sd.square().masked_fill(~there, 0.0)
    rest = mean - prior.mean
    absent = int((~present).sum())
    solved, diagonal, evidence = [], [], []
    for code, covariance in enumerate(stacked_covariances(prior, noise)):
        y = rest[..., code].flatten()
        solved.append(covariance.solve(y))
        diagonal.append(covariance.inverse_diagonal())
        evidence.append(covariance.log_prob(y) + 0.5 * math.log(2 * math.pi) * absent)
    smooth = mean - noise * torch.stack(solved, -1).unflatten(0, present.shape)
    variance = (noise - noise**2 * torch.stack(diagonal, -1).unflatten(0, present.shape)).masked_fill(~there, 1.0)
    variance = variance.clamp_min(torch.finfo(variance.dtype).tiny)
    filled = noise.masked_fill(~there, 1.0)
    expected = -0.5 * ((2 * math.pi * filled).log() + ((mean - smooth).square() + variance) / filled).masked_fill(~there, 0.0)
    return smooth, variance.sqrt(), expected.sum((0, 1)) - torch.stack(evidence)


def smoothed_loss(model: CodeModel, guide: CodeGuide, cohort: People, images: Tensor, noise: Tensor | None = None) -> Tensor:
    """−ELBO of all people, nats; arguments as of ``exact_loss``."""
    mean, sd, divergence = smoothed_codes(model.prior(cohort), cohort.present, *guide.encode(cohort, images))
    return reconstruction(model, cohort, images, mean, sd, noise) + divergence.sum()


def smoothed_forecast(prior: CodeCovariance, known: Tensor, mean: Tensor, sd: Tensor) -> CodeForecast:
    """p(z* | m) at all visits given the pseudo-data of the known ones; there it is q."""
    noise = sd.square().masked_fill(~known[..., None], 0.0)
    return conditional_codes(prior, known, mean, noise, torch.zeros_like(noise))
