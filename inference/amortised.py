"""Amortised inference: one guide for many data sets, a network inside it.

``elbo`` is the loss of a batch under any model and guide, ``posterior_loss`` that of neural posterior estimation (draws of the model itself, whose
latents are known); both are for ``training.train``. ``refine`` goes on from the network's answer on a single data set and says how many nats that
gains.

References: Kingma & Welling, ICLR 2014; Cremer, Li & Duvenaud, ICML 2018 (the amortisation gap); Papamakarios & Murray, NIPS 2016.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from probmed.inference.parameters import local_parameters

Program = Callable[..., Any]


def in_plate(program: Program, name: str, size: int) -> Program:
    """The program for ``size`` independent data sets at once."""

    def batched(*args: Any, **kwargs: Any) -> Any:
        with pyro.plate(name, size, dim=-1):
            return program(*args, **kwargs)

    return batched


def elbo_loss(model: Program, guide: Program, size: int, *args: Any, particles: int = 1, **kwargs: Any) -> Tensor:
    """−ELBO of a batch, divided by its size, nats. KL divergences are in closed form where there is one."""
    estimator = TraceMeanField_ELBO(num_particles=particles)
    with local_parameters(model, guide):
        total: Tensor = estimator.differentiable_loss(in_plate(model, "member", size), in_plate(guide, "member", size), *args, **kwargs)
    return total / size


def posterior_loss(guide: Program, state: dict[str, Tensor], size: int, *args: Any, **kwargs: Any) -> Tensor:
    """−log q(state | data), divided by the batch's size, nats: lowest on average at the true posterior where (state, data) come from the model."""
    with local_parameters(guide):
        trace = poutine.trace(poutine.condition(in_plate(guide, "member", size), data=state)).get_trace(*args, **kwargs)
        trace.compute_log_prob(lambda name, site: name in state)
        total = sum((trace.nodes[name]["log_prob_sum"] for name in state), torch.zeros(()))
    return -total / size


@dataclass(frozen=True)
class Refinement:
    """What a guide of one data set gained over the amortised one.

    Arguments:
        guide: refined. amortised, refined: ELBOs, nats, each the mean of ``draws`` draws. gap: the second less the first, with its standard error.
    """

    guide: Program
    amortised: float
    refined: float
    gap: float
    error: float


def mean_elbo(model: Program, guide: Program, draws: int, *args: Any, **kwargs: Any) -> Tensor:
    """Estimates of the ELBO from single draws, ``(draws,)``, nats."""
    estimator = Trace_ELBO()
    with torch.no_grad(), local_parameters(model, guide):
        return torch.tensor([-estimator.loss(model, guide, *args, **kwargs) for _ in range(draws)], dtype=torch.float64)


def refinement(model: Program, amortised: Program, refined: Program, *args: Any, draws: int = 20, **kwargs: Any) -> Refinement:
    """Compare two guides on one data set."""
    before, after = (mean_elbo(model, guide, draws, *args, **kwargs) for guide in (amortised, refined))
    error = ((before.var() + after.var()) / draws).sqrt()
    return Refinement(refined, float(before.mean()), float(after.mean()), float(after.mean() - before.mean()), float(error))
