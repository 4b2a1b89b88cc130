"""Draws of data: from the prior, and from the posterior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from probmed.inference.posterior import Posterior


@torch.no_grad()
def prior_draws(model: Callable[..., Any], count: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Draws of every site of a model called without data, ``(count, ...)`` each."""
    traces = [poutine.trace(model).get_trace(*args, **kwargs) for _ in range(count)]
    names = [name for name in traces[0].nodes if traces[0].nodes[name]["type"] == "sample" and isinstance(traces[0].nodes[name]["value"], Tensor)]
    return {name: torch.stack([trace.nodes[name]["value"] for trace in traces]) for name in names}


@torch.no_grad()
def predictive_draws(model: Callable[..., Any], posterior: Posterior, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Draws of the sites that are not latents of the posterior, one for each of its draws: replicated data where the model is called without."""
    traces = []
    for i in range(posterior.count):
        state = {name: value[i] for name, value in posterior.samples.items()}
        traces.append(poutine.trace(poutine.condition(model, data=state)).get_trace(*args, **kwargs))
    names = [name for name, node in traces[0].nodes.items() if node["type"] == "sample" and name not in posterior.samples]
    return {name: torch.stack([trace.nodes[name]["value"] for trace in traces]) for name in names if isinstance(traces[0].nodes[name]["value"], Tensor)}
