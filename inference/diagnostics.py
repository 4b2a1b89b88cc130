"""Is the posterior any good? Importance weights of a guide, and simulation-based calibration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import arviz
import numpy as np
import pyro
import torch
from pyro import poutine
from scipy.stats import chi2
from torch import Tensor


@dataclass(frozen=True)
class Importance:
    """Arguments: log_evidence, nats, by importance sampling; elbo and its standard error, nats; k_hat, the Pareto shape of the weights: below 0.7 the
    guide covers the posterior well enough for its weighted draws to be trusted."""

    log_evidence: float
    elbo: float
    elbo_error: float
    k_hat: float


@torch.no_grad()
def importance(model: Callable[..., Any], guide: Callable[..., Any], *args: Any, draws: int = 1000) -> Importance:
    """Importance sampling from a guide, with the Pareto diagnostic of its weights (Vehtari et al., JMLR 2024)."""
    weights = []
    with pyro.settings.context(module_local_params=True):
        for _ in range(draws):
            guided = poutine.trace(guide).get_trace(*args)
            modelled = poutine.trace(poutine.replay(model, trace=guided)).get_trace(*args)
            weights.append(float(modelled.log_prob_sum() - guided.log_prob_sum()))
    raw = np.array(weights)
    _, k_hat = arviz.psislw(raw - raw.max())
    evidence = float(raw.max() + np.log(np.mean(np.exp(raw - raw.max()))))
    return Importance(evidence, float(raw.mean()), float(raw.std(ddof=1) / math.sqrt(draws)), float(k_hat))


def calibration_ranks(truth: Tensor, draws: Tensor) -> Tensor:
    """Rank of each true value among its posterior draws: uniform on 0 … S if the posterior is calibrated.

    Arguments:
        truth: ``(N,)``, drawn from the prior; draws: ``(N, S)``, from the posterior given data simulated from each.
    """
    return (draws < truth[:, None]).sum(-1)


def uniformity(ranks: Tensor, draws: int, bins: int = 10) -> float:
    """p-value of a χ² test that ranks in 0 … ``draws`` are uniform (Talts et al., 2018)."""
    if (draws + 1) % bins:
        raise ValueError(f"expected bins that divide the {draws + 1} possible ranks, got {bins}")
    counts = torch.bincount(ranks * bins // (draws + 1), minlength=bins).double()
    expected = counts.sum() / bins
    return float(chi2.sf(float(((counts - expected) ** 2 / expected).sum()), bins - 1))
