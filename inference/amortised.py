"""Amortised inference: one guide for many data sets, a network inside it.

``elbo_loss`` is the loss of a batch under any model and guide, ``posterior_loss`` that of neural posterior estimation (draws of the model itself,
whose latents are known); both are for ``training.train``. ``refine_field`` goes on from the network's answer on a single data set and says how many
nats that gains.

References: Kingma & Welling, ICLR 2014; Cremer, Li & Duvenaud, ICML 2018 (the amortisation gap); Papamakarios & Murray, NIPS 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmed.fields import ModulatedField
from probmed.inference.parameters import local_parameters, seeded
from probmed.inference.svi import Step, fit

Program = Callable[..., Any]

_LOOKS = 4  # at how many states on the way a refinement looks


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
        guide: refined.
        amortised, refined: ELBOs, nats, each the mean of some draws, of the same random numbers; gap: the second less the first, with its standard
            error.
    """

    guide: FieldPosterior
    amortised: float
    refined: float
    gap: float
    error: float


class FieldPosterior(PyroModule):
    """q of one field of one data set: a ``ModulatedField`` whose mean and amplitude are its own parameters.

    Arguments:
        site: its name.
        start: without batch, or a batch of one.
        companion: gives further sites' values for the field's, called with the data, as a guide that is conditioned on it; None where there are none.
    """

    def __init__(self, site: str, start: ModulatedField, companion: Program | None = None) -> None:
        super().__init__()
        event = start.event_shape
        self.site, self.axes, self.companion = site, start.ndim, companion
        self.loc = nn.Parameter(start.loc.detach().reshape(event).clone())
        self.log_amplitude = nn.Parameter(start.amplitude.detach().reshape(event).log())
        self.register_buffer("spectrum", start.spectrum.detach().reshape(-1, *start.spectrum.shape[-start.ndim :])[0].clone())

    def distribution(self) -> ModulatedField:
        spectrum: Tensor = self.spectrum  # type: ignore[assignment]
        return ModulatedField(self.loc, self.log_amplitude.exp(), spectrum, self.axes)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value = pyro.sample(self.site, self.distribution())
        if self.companion is None:
            return {self.site: value}
        with poutine.block(hide=[self.site]):
            return poutine.condition(self.companion, data={self.site: value})(*args, **kwargs)


def refine_field(
    model: Program,
    guide: Program,
    site: str,
    q: ModulatedField,
    data: tuple[Any, ...],
    *,
    steps: int = 100,
    learning_rate: float = 0.03,
    draws: int = 20,
    seed: int = 0,
) -> Refinement:
    """Go on from an amortised q of a field on one data set, and say what it gains.

    Of the start and some of the states that SVI passes, the best is kept, by ELBOs of the same random numbers, so that it never ends below where it
    began: where little is observed, the noise of single steps may be larger than what there is to gain.

    Arguments:
        guide: the amortised one, for the sites beside the field.
        q: its distribution of the field for this data set.
        data: what model and guide are called with.
        steps: of SVI. draws: for each ELBO.
    """

    def others(*args: Any, **kwargs: Any) -> Any:
        """The guide, but no part of the new one, whose parameters are its own alone."""
        return guide(*args, **kwargs)

    own = FieldPosterior(site, q, others)
    passed = [_copied(own)]

    def keep(step: Step) -> None:
        if step.number % max(1, math.ceil(steps / _LOOKS)) == 0 or step.number == steps:
            passed.append(_copied(own))

    # The network stays as it is.
    frozen = [p for p in guide.parameters() if p.requires_grad] if isinstance(guide, nn.Module) else []
    for p in frozen:
        p.requires_grad_(False)
    options: dict[str, Any] = {"tolerance_nats": None, "elbo": TraceMeanField_ELBO(), "callbacks": (keep,), "seed": seed}
    try:
        fit(model, own, *data, steps=steps, learning_rate=learning_rate, **options)
    finally:
        for p in frozen:
            p.requires_grad_(True)
    found = []
    for state in passed:
        own.load_state_dict(state)
        with seeded(seed):
            found.append(elbo_draws(model, own, draws, *data))
    best = max(range(len(found)), key=lambda i: float(found[i].mean()))
    own.load_state_dict(passed[best])
    gain = found[best] - found[0]
    return Refinement(own, float(found[0].mean()), float(found[best].mean()), float(gain.mean()), float(gain.std() / draws**0.5))


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def elbo_draws(model: Program, guide: Program, draws: int, *args: Any, **kwargs: Any) -> Tensor:
    """Estimates of the ELBO from single draws, ``(draws,)``, nats."""
    estimator = Trace_ELBO()
    with torch.no_grad(), local_parameters(model, guide):
        return torch.tensor([-estimator.loss(model, guide, *args, **kwargs) for _ in range(draws)], dtype=torch.float64)
