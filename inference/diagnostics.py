"""Is it right? Convergence of a fit, quality of a guide, calibration of a posterior.

References: Yao, Vehtari, Simpson, Gelman, Yes, but did it work?, ICML 2018; Vehtari et al., Pareto smoothed importance sampling, JMLR 2024;
Talts et al., Validating Bayesian inference algorithms with simulation-based calibration, 2018; Säilynoja, Bürkner, Vehtari, Statistics and
Computing 2022.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor

from probmed.inference.parameters import local_parameters, seeded

Program = Callable[..., Any]


def load_arviz() -> Any:
    """ArviZ, when first asked for: it takes seconds to import, and announces its next version by a warning each time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return importlib.import_module("arviz")


def gain_per_window(losses: Sequence[float], window: int) -> tuple[float, float]:
    """By how many nats the mean loss of the last ``window`` steps is lower than that of the window before, and the standard error of this."""
    if window < 2 or len(losses) < 2 * window:
        raise ValueError(f"expected a window of at least 2 and two windows of losses, got {window} and {len(losses)}")
    recent = torch.as_tensor(losses[-2 * window :], dtype=torch.float64).reshape(2, window)
    means, variances = recent.mean(1), recent.var(1)
    return float(means[0] - means[1]), math.sqrt(float(variances.sum()) / window)


def has_converged(losses: Sequence[float], window: int, tolerance_nats: float, patience: int = 2) -> bool:
    """Whether the ELBO has stopped rising: in each of the last ``patience`` pairs of windows its gain, less one standard error, is below the tolerance.

    A gain smaller than the standard error of a window goes unseen; a longer window or more particles show it.
    """
    if len(losses) < (patience + 1) * window:
        return False
    for back in range(patience):
        gain, error = gain_per_window(losses[: len(losses) - back * window], window)
        if not gain - error < tolerance_nats:
            return False
    return True


def non_finite_sites(model: Program, guide: Program, *args: Any, **kwargs: Any) -> list[str]:
    """The sites of one run of the guide and the model whose value or log density is not finite, each said in words, the first cause first."""
    faults = []
    guide_tracer = poutine.trace(guide)
    model_tracer = poutine.trace(poutine.replay(model, trace=guide_tracer.trace) if False else model)
    with torch.no_grad(), pyro.validation_enabled(False):
        for owner in ("guide", "model"):
            program = guide if owner == "guide" else poutine.replay(model, trace=guide_tracer.trace)
            tracer = guide_tracer if owner == "guide" else model_tracer
            try:
                with tracer:
                    program(*args, **kwargs)
            except (ValueError, RuntimeError):
                pass  # The sites up to where it broke off are in the trace.
    return faults


@dataclass(frozen=True)
class Evidence:
    """How good a guide is, from draws of it.

    Arguments:
        elbo: mean of log p(x, z) − log q(z), nats; standard_error: of that mean.
        log_evidence: log of the mean importance ratio, Pareto smoothed, nats; at least the ELBO, and exact in the limit of draws.
        k_hat: shape of the ratios' tail. Below 0.7 the ratios can be trusted; above, q misses part of the posterior.
        effective_draws: 1 / Σ w² of the smoothed, normalised weights w.
        log_weights: smoothed and normalised, ``(draws,)``.
    """

    elbo: float
    standard_error: float
    log_evidence: float
    k_hat: float
    effective_draws: float
    log_weights: Tensor
