"""Markov chain Monte Carlo: NUTS over any model, as the reference that approximations are held against. For small models.

Reference: Hoffman & Gelman, JMLR 2014.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import init_to_mean, init_to_median, init_to_value
from torch import Tensor

from probmed.inference.parameters import cuda_devices, local_parameters, seeded, tensors_within
from probmed.inference.posterior import Posterior


def nuts(
    model: Callable[..., Any],
    *args: Any,
    draws: int = 500,
    warmup: int = 500,
    init: Mapping[str, Tensor] | None = None,
    seed: int | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> Posterior:
    """One chain of the No-U-Turn sampler.

    Arguments:
        args, kwargs: what the model is called with.
        draws: kept; warmup: steps before them, which adapt step size and mass.
        init: starting values by site; the prior's mean elsewhere, or its median where the mean is not finite, as a half Cauchy's.
        seed: torch's generators are left as they were.

    Returns:
        The draws, in order; ``attributes`` holds ``divergences`` and ``effective_draws``, the least over all elements of all sites.

    Raises:
        ValueError: for fewer than 4 draws or no warm-up, or starting values for sites that the model does not have.
    """
    if draws < 4 or warmup < 1:
        raise ValueError(f"expected at least 4 draws and 1 step of warm-up, got {draws} and {warmup}")
    with local_parameters(model), seeded(seed, cuda_devices(tensors_within((args, kwargs)))):
        with torch.no_grad():
            sites = list(poutine.trace(model).get_trace(*args, **kwargs).stochastic_nodes)
        unknown = sorted(set(init or ()) - set(sites))
        if unknown:
            raise ValueError(f"expected starting values for the sites {sites}, got some for {unknown}")
        kernel = NUTS(model, init_strategy=init_to_value(values=dict(init or {}), fallback=_init_to_centre))
        chain = MCMC(kernel, num_samples=draws, warmup_steps=warmup, disable_progbar=not progress)
        chain.run(*args, **kwargs)
        diagnostics = chain.diagnostics()
        samples = {name: value.detach() for name, value in chain.get_samples().items()}
    effective = min(float(torch.as_tensor(diagnostics[name]["n_eff"]).min()) for name in samples)
    divergences = len(diagnostics["divergences"]["chain 0"])
    attributes = {"method": "NUTS", "divergences": divergences, "effective_draws": effective, "seed": seed}
    return Posterior(samples, None, model, args, None, attributes)


def _init_to_centre(site: Mapping[str, Any]) -> Any:
    """The prior's mean; Pyro's own strategy takes an infinite one as it is."""
    try:
        finite = bool(site["fn"].mean.isfinite().all())
    except NotImplementedError:
        finite = False
    return init_to_mean(site) if finite else init_to_median(site)
