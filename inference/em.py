"""Maximum a posteriori by blocks: closed-form steps where a model has them, gradients in whitened coordinates for the other sites.

A model takes part by three methods and one attribute, and is otherwise an ordinary Pyro callable:

- ``start(*data)`` → starting values, a dict of site → tensor;
- ``em_step(state, *data)`` → the state after steps that do not lower the log joint;
- ``remaining(state, *data)`` → a program of the other sites, with the model's log joint up to a constant;
- ``closed_form_sites``: the sites that those steps update.

Everything else that the model samples is moved by L-BFGS on the log joint of Pyro's own trace, so nothing about the model is known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from pyro import poutine
from torch import Tensor

from probmed.fields import GaussianField, dct, idct

State = dict[str, Tensor]


class ClosedForm(Protocol):
    """A model with closed-form steps for some of its sites."""

    @property
    def closed_form_sites(self) -> Sequence[str]: ...

    def __call__(self, *data: Any) -> Any: ...

    def start(self, *data: Any) -> State: ...

    def em_step(self, state: State, *data: Any) -> State: ...

    def remaining(self, state: State, *data: Any) -> Callable[[], Any]: ...


@dataclass(frozen=True)
class Round:
    """One round of block ascent: its number, the log joint after it in nats, and the gain."""

    number: int
    log_joint: float
    gain: float


@dataclass(frozen=True)
class Mode:
    """Where ``em`` stopped.

    Arguments:
        state: every site's value.
        rounds: the history, nats.
        converged: whether the last gain fell below the tolerance.
    """

    state: State
    rounds: list[Round] = field(default_factory=list)
    converged: bool = False

    @property
    def log_joint(self) -> float:
        return self.rounds[-1].log_joint


def log_joint(model: Callable[..., Any], state: Mapping[str, Tensor], *data: Any) -> Tensor:
    """log p(data, state) in nats, at given values of every latent site; differentiable in them."""
    trace = poutine.trace(poutine.condition(model, data=dict(state))).get_trace(*data)
    return torch.as_tensor(trace.log_prob_sum())


class _Whitener:
    """A linear change of variables under which a site's posterior is roughly isotropic: (Λ + h I)^-½ for a field, prior sd for a normal."""

    def __init__(self, distribution: Any, value: Tensor) -> None:
        base = getattr(distribution, "base_dist", distribution)
        self.value, self.field = value.detach(), base if isinstance(base, GaussianField) else None
        self.scale = torch.ones_like(value)
        if self.field is not None:
            self.scale = self.field.eigenvalues.rsqrt().unsqueeze(-len(self.field.grid_shape) - 1).expand_as(value)
        elif hasattr(base, "stddev"):
            self.scale = base.stddev.detach().expand_as(value)

    def add_curvature(self, h: float) -> None:
        """Account for a likelihood whose curvature is about h in each coordinate of the site."""
        self.scale = (self.scale**-2 + h).rsqrt() if self.field is not None else self.scale / math.sqrt(1 + h * float((self.scale**2).mean()))

    def __call__(self, u: Tensor) -> Tensor:
        if self.field is None:
            return self.value + self.scale * u
        d = len(self.field.grid_shape)
        return self.value + idct(self.scale * u, d)

    def pull(self, gradient: Tensor) -> Tensor:
        """The gradient in whitened coordinates."""
        return self.scale * (gradient if self.field is None else dct(gradient, len(self.field.grid_shape)))


def ascend(
    model: Callable[..., Any],
    state: State,
    sites: Sequence[str],
    *data: Any,
    steps: int = 8,
    curvatures: dict[str, float] | None = None,
) -> State:
    """Raise the log joint over some sites by L-BFGS in coordinates whitened by their priors and by the curvature found on the way.

    Arguments:
        state: values of every latent; those of ``sites`` are moved, the others held.
        steps: iterations.
        curvatures: the likelihood's curvature at each site, found and written here where missing, so that a later call can do without.

    Returns:
        The new state, whose log joint is not lower.
    """
    if not sites:
        return state
    held = {name: value.detach() for name, value in state.items()}
    prior = poutine.trace(poutine.condition(model, data=held)).get_trace(*data)
    whiteners = {name: _Whitener(prior.nodes[name]["fn"], held[name]) for name in sites}

    def value_and_gradient(values: State) -> tuple[Tensor, State]:
        leaves = {name: values[name].detach().requires_grad_() for name in sites}
        total = log_joint(model, {**held, **leaves}, *data)
        return total.detach(), dict(zip(sites, torch.autograd.grad(total, list(leaves.values())), strict=True))

    start, slope = value_and_gradient(held)
    # Curvature along each site's preconditioned gradient, by one more gradient each: it sets the length of the first step.
    curvatures = {} if curvatures is None else curvatures
    for name in sites:
        whitener = whiteners[name]
        if name not in curvatures:
            direction = whitener(whitener.pull(slope[name])) - held[name]
            direction = direction / direction.norm().clamp_min(1e-20)
            reach = 1e-2 * float(whitener.scale.max())
            _, there = value_and_gradient({**held, name: held[name] + reach * direction})
            curvatures[name] = max(float(((slope[name] - there[name]) * direction).sum()) / reach, 0.0)
        whitener.add_curvature(curvatures[name])
    coordinates = {name: torch.zeros_like(held[name]).requires_grad_() for name in sites}
    optimiser = torch.optim.LBFGS(
        list(coordinates.values()), lr=1.0, max_iter=steps, max_eval=2 * steps + 2, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        values = {name: whiteners[name](coordinates[name].detach()) for name in sites}
        total, gradient = value_and_gradient(values)
        for name in sites:
            coordinates[name].grad = -whiteners[name].pull(gradient[name])
        return -total

    optimiser.step(closure)
    moved = {**held, **{name: whiteners[name](coordinates[name].detach()) for name in sites}}
    with torch.no_grad():
        return moved if float(log_joint(model, moved, *data)) >= float(start) else held


def em(
    model: ClosedForm,
    *data: Any,
    state: State | None = None,
    rounds: int = 30,
    steps: int = 8,
    tolerance: float = 1e-4,
    callback: Callable[[Round], None] | None = None,
) -> Mode:
    """The mode of a model with closed-form steps, by alternating them with gradient steps on the remaining sites.

    Arguments:
        data: what the model is called with.
        state: where to start; ``model.start(*data)`` by default.
        rounds: at most this many; steps: L-BFGS iterations in each, for the sites without closed form.
        tolerance: stop when a round gains fewer nats per element of the largest observed site.

    Raises:
        FloatingPointError: where the log joint stops being finite; the message names the sites that are not.
    """
    state = dict(model.start(*data)) if state is None else dict(state)
    trace = poutine.trace(poutine.condition(model, data=state)).get_trace(*data)
    observed = [node["value"] for node in trace.nodes.values() if node["type"] == "sample" and node["is_observed"]]
    sizes = [int((~value.isnan()).sum()) for value in observed if isinstance(value, Tensor)]
    free = [name for name in state if name not in model.closed_form_sites]
    enough = tolerance * max(sizes, default=1)
    history: list[Round] = []
    curvatures: dict[str, float] = {}
    with torch.no_grad():
        last = float(log_joint(model, state, *data))
    for number in range(1, rounds + 1):
        state = model.em_step(state, *data)
        state = ascend(model.remaining(state, *data), state, free, steps=steps, curvatures=curvatures)
        with torch.no_grad():
            value = float(log_joint(model, state, *data))
        if not math.isfinite(value):
            broken = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())] or ["the observation"]
            raise FloatingPointError(f"the log joint is {value} after round {number}; not finite: {', '.join(broken)}")
        history.append(Round(number, value, value - last))
        if callback is not None:
            callback(history[-1])
        if value - last < enough:
            return Mode(state, history, True)
        last = value
    return Mode(state, history, False)
