"""Stochastic variational inference: any model, any guide, parameters held in modules.

``fit`` maximises the ELBO E_q[log p(data, z) − log q(z)] in nats. Parameters live in the guide (and, where they are learnable, in the model) as module
parameters; Pyro's global store is never used, so that two fits in one process know nothing of each other.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, init_to_median
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Program = Callable[..., Any]


@dataclass(frozen=True)
class Step:
    """What a callback is told: the step's number (from 1), its negative ELBO in nats, and the learning rate."""

    number: int
    loss: float
    learning_rate: float


@dataclass(frozen=True)
class Fit:
    """Arguments: guide, the fitted one; losses, negative ELBO of each step in nats; converged, whether the test stopped it; steps taken."""

    guide: Program
    losses: list[float]
    converged: bool
    steps: int

    @property
    def elbo(self) -> float:
        """Mean ELBO over the last tenth of the steps, nats."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return -sum(tail) / len(tail)


def MAP(model: Program, init: dict[str, Tensor] | None = None) -> AutoDelta:
    """The guide of a maximum a posteriori estimate: a point mass at each site, in the site's own coordinates.

    Arguments:
        init: starting values by site; the prior's median elsewhere.
    """
    start = dict(init or {})

    def place(site: dict[str, Any]) -> Tensor:
        if site["name"] in start:
            return start[site["name"]].detach().clone()
        value: Tensor = init_to_median(site, num_samples=15)
        return value

    return AutoDelta(model, init_loc_fn=place)


def fit(
    model: Program,
    guide: Program,
    *args: Any,
    steps: int = 2000,
    learning_rate: float = 0.01,
    schedule: str | Callable[[float], float] = "cosine",
    tolerance: float | None = None,
    window: int = 100,
    particles: int = 1,
    clip: float | None = None,
    callbacks: Sequence[Callable[[Step], None]] = (),
    progress: bool = False,
    checkpoint: Path | str | None = None,
    every: int = 100,
    seed: int | None = None,
    **kwargs: Any,
) -> Fit:
    """Fit a guide to a model by Adam on the ELBO.

    Arguments:
        args, kwargs: the data, with which both are called.
        steps: at most this many; learning_rate: Adam's; schedule: "cosine" (to a hundredth), "constant", or a function of the share done, in [0, 1],
            to a factor.
        tolerance: stop when the mean ELBO of the last ``window`` steps gained less than this over that of the window before, in nats, and less than
            twice the difference's standard error; None runs all steps.
        particles: draws of the ELBO a step. clip: largest norm of the gradient.
        callbacks: told of each step.
        checkpoint: a file, written every ``every`` steps; a fit that finds it goes on from there and ends at the same numbers as one that was never
            interrupted. Safetensors and JSON, nothing is unpickled.
        seed: of the draws.

    Raises:
        FloatingPointError: at a loss that is NaN or infinite; the message names the sites to blame.
        ValueError: where there is nothing to fit, or the checkpoint belongs to another fit.
    """
    if seed is not None:
        pyro.set_rng_seed(seed)
    factor = _schedule(schedule)
    with pyro.settings.context(module_local_params=True):
        elbo = Trace_ELBO(num_particles=particles)
        with torch.no_grad():
            poutine.trace(guide).get_trace(*args, **kwargs)  # automatic guides make their parameters at the first call
        parameters = _parameters(model, guide)
        if not parameters:
            raise ValueError("neither the guide nor the model has a parameter to fit")
        if seed is not None:
            pyro.set_rng_seed(seed)
        optimiser = torch.optim.Adam(parameters.values(), lr=learning_rate)
        losses: list[float] = []
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None and path.exists():
            losses = _restore(path, parameters, optimiser)
        with Progress(disable=not progress) as bar:
            task = bar.add_task("fitting", total=steps, completed=len(losses))
            for number in range(len(losses) + 1, steps + 1):
                if tolerance is not None and _converged(losses, window, tolerance):
                    return Fit(guide, losses, True, len(losses))
                rate = learning_rate * factor((number - 1) / steps)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                optimiser.zero_grad()
                loss = elbo.differentiable_loss(model, guide, *args, **kwargs)
                if not math.isfinite(float(loss)):
                    raise FloatingPointError(f"the ELBO is {-float(loss)} at step {number}; not finite: {_culprits(model, guide, *args, **kwargs)}")
                loss.backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(list(parameters.values()), clip)
                optimiser.step()
                losses.append(float(loss))
                for callback in callbacks:
                    callback(Step(number, losses[-1], rate))
                bar.update(task, completed=number)
                if path is not None and (number % every == 0 or number == steps):
                    _save(path, parameters, optimiser, losses)
        return Fit(guide, losses, tolerance is not None and _converged(losses, window, tolerance), len(losses))


def _schedule(schedule: str | Callable[[float], float]) -> Callable[[float], float]:
    if callable(schedule):
        return schedule
    known: dict[str, Callable[[float], float]] = {
        "constant": lambda share: 1.0,
        "cosine": lambda share: 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)),
    }
    if schedule not in known:
        raise ValueError(f"schedule must be one of {sorted(known)} or a function, got {schedule!r}")
    return known[schedule]


def _parameters(model: Program, guide: Program) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for prefix, part in (("guide", guide), ("model", model)):
        if isinstance(part, nn.Module):
            found.update({f"{prefix}.{name}": p for name, p in part.named_parameters() if p.requires_grad and all(p is not q for q in found.values())})
    return found


def _converged(losses: Sequence[float], window: int, tolerance: float) -> bool:
    if len(losses) < 2 * window:
        return False
    late, early = torch.tensor(losses[-window:]).double(), torch.tensor(losses[-2 * window : -window]).double()
    gain = float(early.mean() - late.mean())
    error = math.sqrt(float(late.var() + early.var()) / window)
    return gain < max(tolerance, 2 * error) and error < tolerance


def _culprits(model: Program, guide: Program, *args: Any, **kwargs: Any) -> str:
    """Sites of either program whose value or log density is not finite."""
    with torch.no_grad():
        guided = poutine.trace(guide).get_trace(*args, **kwargs)
        modelled = poutine.trace(poutine.replay(model, trace=guided)).get_trace(*args, **kwargs)
    names: list[str] = []
    for where, trace in (("guide", guided), ("model", modelled)):
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or type(node["fn"]).__name__ == "_Subsample":
                continue
            value_bad = isinstance(node["value"], Tensor) and not node["is_observed"] and not bool(torch.isfinite(node["value"]).all())
            if value_bad or not bool(torch.isfinite(node["fn"].log_prob(node["value"])).all()):
                names.append(f"{name} ({where})")
    return ", ".join(names) or "a gradient"


def _save(path: Path, parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, losses: list[float]) -> None:
    tensors = {f"parameter/{name}": p.detach().contiguous() for name, p in parameters.items()}
    for name, p in parameters.items():
        for key, value in optimiser.state[p].items():
            tensors[f"optimiser/{name}/{key}"] = value.detach().contiguous()
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"parameters": json.dumps(sorted(parameters))})
    os.replace(partial, path)


def _restore(path: Path, parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> list[float]:
    tensors = load_file(path)
    saved = {name.split("/", 1)[1] for name in tensors if name.startswith("parameter/")}
    if saved != set(parameters):
        raise ValueError(f"{path} belongs to another fit: it holds {sorted(saved)}, this one has {sorted(parameters)}")
    for name, p in parameters.items():
        p.data.copy_(tensors[f"parameter/{name}"])
        prefix = f"optimiser/{name}/"
        optimiser.state[p] = {key[len(prefix) :]: value.to(p.device if value.ndim else "cpu") for key, value in tensors.items() if key.startswith(prefix)}
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    losses: list[float] = tensors["losses"].tolist()
    return losses
