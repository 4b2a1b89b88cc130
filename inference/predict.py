"""Draws of data: from the prior, and from the posterior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from probmed.inference.parameters import cuda_devices, local_parameters, seeded, tensors_within
from probmed.inference.posterior import Posterior


@torch.no_grad()
def prior_draws(model: Callable[..., Any], count: int, *args: Any, seed: int | None = None, **kwargs: Any) -> dict[str, Tensor]:
    """Draws of every site of a model called without data, ``(count, ...)`` each."""
    if count < 1:
        raise ValueError(f"expected at least one draw, got {count}")
    return _stacked([model] * count, model, set(), args, kwargs, seed)


@torch.no_grad()
def predictive_draws(
    model: Callable[..., Any], posterior: Posterior, *args: Any, seed: int | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    """Draws of the sites that are not latents of the posterior, one for each of its draws: replicated data where the model is called without."""
    states = [{name: value[i] for name, value in posterior.samples.items()} for i in range(posterior.count)]
    programs = [poutine.condition(model, data=state) for state in states]
    return _stacked(programs, model, set(posterior.samples), args, kwargs, seed)


def _stacked(
    programs: Sequence[Callable[..., Any]], model: Any, without: set[str], args: Any, kwargs: Any, seed: int | None
) -> dict[str, Tensor]:
    """The sample sites of one run of each program, without some, along a new first axis."""
    rows: list[dict[str, Tensor]] = []
    with local_parameters(model), seeded(seed, cuda_devices(tensors_within((args, kwargs)))):
        for program in programs:
            nodes: dict[str, Any] = dict(prune_subsample_sites(poutine.trace(program).get_trace(*args, **kwargs)).nodes)
            sampled = {name: node["value"] for name, node in nodes.items() if node["type"] == "sample" and name not in without}
            rows.append({name: value for name, value in sampled.items() if isinstance(value, Tensor)})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
