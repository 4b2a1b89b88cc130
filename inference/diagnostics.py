"""Is it right? Convergence of a fit, the sites to blame for a broken one, the quality of a guide, the calibration of a posterior.

References: Yao et al., Yes, but did it work?, ICML 2018; Vehtari et al., Pareto smoothed importance sampling, JMLR 2024; Talts et al., Validating
Bayesian inference algorithms with simulation-based calibration, 2018.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from scipy.stats import chi2
from torch import Tensor

from probmed.inference.parameters import cuda_devices, local_parameters, seeded, tensors_within

Program = Callable[..., Any]


def load_arviz() -> Any:
    """ArviZ, when first asked for: it takes two seconds to import, and the day's first import warns of its next version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return importlib.import_module("arviz")


def gain_per_window(losses: Sequence[float], window: int) -> tuple[float, float]:
    """By how many nats the mean loss of the last ``window`` steps lies below that of the window before, and the standard error of this.

    Raises:
        ValueError: for a window below 2 or fewer than two windows of losses.
    """
    if window < 2 or len(losses) < 2 * window:
        raise ValueError(f"expected a window of at least 2 and two windows of losses, got {window} and {len(losses)} losses")
    recent = torch.as_tensor(losses[-2 * window :], dtype=torch.float64).reshape(2, window)
    means, variances = recent.mean(1), recent.var(1)
    return float(means[0] - means[1]), math.sqrt(float(variances.sum()) / window)


def has_converged(losses: Sequence[float], window: int, tolerance_nats: float, patience: int = 2) -> bool:
    """Whether the ELBO has stopped rising: its gain over each of the last windows, less one standard error, is below the tolerance.

    Arguments:
        losses: one a step, nats; window: steps averaged; patience: windows that must agree.

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
    """The sites of one run of guide and model whose value or log density is not finite, each in words, the first cause first."""
    faults, guided = [], poutine.trace()
    with torch.no_grad(), local_parameters(model, guide), pyro.validation_enabled(False):
        for owner in ("guide", "model"):
            tracer = guided if owner == "guide" else poutine.trace()
            program = guide if owner == "guide" else poutine.replay(model, trace=guided.trace)
            # Where it breaks off, the sites up to there are in the trace.
            with contextlib.suppress(ValueError, RuntimeError), tracer:
                program(*args, **kwargs)
            for name, node in tracer.trace.nodes.items():
                if node["type"] != "sample" or type(node["fn"]).__name__ == "_Subsample":
                    continue
                value = node["value"]
                if not node["is_observed"] and isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
                    faults.append(f"{name} ({owner}), whose value is not finite")
                    continue
                with contextlib.suppress(ValueError, RuntimeError):
                    density = node["fn"].log_prob(value, *node["args"], **node["kwargs"])
                    if not bool(torch.isfinite(density).all()):
                        faults.append(f"{name} ({owner}), whose log density is {float(density.sum())}")
    return faults


@dataclass(frozen=True)
class Importance:
    """How good a guide is, from draws of it.

    Arguments:
        log_evidence: by Pareto-smoothed importance sampling, nats; exact in the limit of draws.
        elbo: mean of log p(x, z) − log q(z), nats; elbo_error: its standard error.
        k_hat: shape of the weights' tail: below 0.7 the guide covers the posterior well enough for its weighted draws to be trusted. −∞ where
            all weights are equal, which is to say that q is the posterior.
    """

    log_evidence: float
    elbo: float
    elbo_error: float
    k_hat: float


def log_ratios(model: Program, guide: Program, *args: Any, draws: int = 1000, seed: int | None = None, **kwargs: Any) -> Tensor:
    """log p(x, z) − log q(z) at draws z of the guide, ``(draws,)`` float64, nats."""
    ratios = []
    with torch.no_grad(), local_parameters(model, guide), seeded(seed, cuda_devices(tensors_within((args, kwargs)))):
        for _ in range(draws):
            guided = poutine.trace(guide).get_trace(*args, **kwargs)
            modelled = poutine.trace(poutine.replay(model, trace=guided)).get_trace(*args, **kwargs)
            ratios.append(float(modelled.log_prob_sum() - guided.log_prob_sum()))
    return torch.tensor(ratios, dtype=torch.float64)


def importance(model: Program, guide: Program, *args: Any, draws: int = 1000, seed: int | None = None, **kwargs: Any) -> Importance:
    """Importance sampling from a guide, with the Pareto diagnostic of its weights (Vehtari et al., JMLR 2024).

    Arguments:
        args, kwargs: what model and guide are called with; draws: at least 25.

    Raises:
        ValueError: for fewer draws, or weights that are not finite.
    """
    if draws < 25:
        raise ValueError(f"expected at least 25 draws for the tail of the weights, got {draws}")
    ratios = log_ratios(model, guide, *args, draws=draws, seed=seed, **kwargs)
    if not bool(torch.isfinite(ratios).all()):
        raise ValueError(f"expected finite weights, got {int((~torch.isfinite(ratios)).sum())} of {draws} that are not")
    elbo, error = float(ratios.mean()), float(ratios.std()) / math.sqrt(draws)
    if float(ratios.max() - ratios.min()) < 1e-6 * max(1.0, abs(elbo)):
        # No tail to fit.
        return Importance(elbo, elbo, error, -math.inf)
    smoothed, k_hat = load_arviz().psislw(ratios.numpy())
    # The smallest weight is never in the tail that is smoothed: it tells the constant that normalisation took away.
    least = int(ratios.argmin())
    return Importance(float(ratios[least] - smoothed[least]) - math.log(draws), elbo, error, float(k_hat))


def calibration_ranks(truth: Tensor, draws: Tensor) -> Tensor:
    """Rank of each true value among its posterior draws: uniform on 0 … S if the posterior is calibrated.

    Arguments:
        truth: ``(N,)``, drawn from the prior; draws: ``(N, S)``, from the posterior given data simulated from each.
    """
    return (draws < truth[:, None]).sum(-1)


def simulated_ranks(
    model: Program,
    inference: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
    *args: Any,
    observed: Sequence[str],
    simulations: int = 100,
    seed: int | None = 0,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """Simulation-based calibration: ``calibration_ranks`` over simulations from the model.

    Arguments:
        model: called with ``args`` and ``kwargs``, without data.
        inference: takes the simulated data, site → tensor, and gives independent posterior draws, site → ``(S, ...)``, as ``Posterior.samples``.
        observed: the sites that are data.

    Returns:
        for each site that the inference gives, ``(simulations, elements)`` int64, 0 … S.
    """
    ranks: dict[str, list[Tensor]] = {}
    with local_parameters(model), seeded(seed, cuda_devices(tensors_within((args, kwargs)))):
        for _ in range(simulations):
            with torch.no_grad():
                truth = poutine.trace(model).get_trace(*args, **kwargs)
            missing = [name for name in observed if name not in truth.nodes]
            if missing:
                raise ValueError(f"expected observed sites among {list(truth.stochastic_nodes)}, got {missing}")
            for name, draws in inference({name: truth.nodes[name]["value"] for name in observed}).items():
                ranks.setdefault(name, []).append(calibration_ranks(truth.nodes[name]["value"].flatten(), draws.reshape(len(draws), -1).T).cpu())
    return {name: torch.stack(rows) for name, rows in ranks.items()}


def uniformity(ranks: Tensor, draws: int, bins: int = 10) -> float:
    """p-value of a χ² test that ranks in 0 … ``draws`` are uniform (Talts et al., 2018)."""
    if (draws + 1) % bins:
        raise ValueError(f"expected bins that divide the {draws + 1} possible ranks, got {bins}")
    counts = torch.bincount(ranks * bins // (draws + 1), minlength=bins).double()
    expected = counts.sum() / bins
    return float(chi2.sf(float(((counts - expected) ** 2 / expected).sum()), bins - 1))


def rank_deviation(ranks: Tensor, draws: int, level: float = 0.99) -> tuple[float, float]:
    """The largest departure of the ranks' distribution function from the uniform one, and the band that it stays within with probability ``level``.

    Finer than χ² for a bias or a wrong spread, and with few simulations. The band comes from 4000 simulations of uniform ranks.

    Raises:
        ValueError: for ranks outside 0 … ``draws``.
    """
    values = ranks.flatten().cpu().numpy()
    if values.min() < 0 or values.max() > draws:
        raise ValueError(f"expected ranks from 0 to {draws}, got {values.min()} to {values.max()}")
    uniform = np.arange(1, draws + 2) / (draws + 1)
    null = np.random.default_rng(0).multinomial(len(values), np.full(draws + 1, 1 / (draws + 1)), size=4000)
    departures = np.abs(null.cumsum(1) / len(values) - uniform).max(1)
    seen = np.abs(np.bincount(values, minlength=draws + 1).cumsum() / len(values) - uniform).max()
    return float(seen), float(np.quantile(departures, level))
