"""Stochastic variational inference: raise the ELBO over the parameters of any guide and any model.

.. math:: \\max_{\\phi, \\theta} \\; E_{q_\\phi(z)} [\\log p_\\theta(x, z) - \\log q_\\phi(z)]

References: Ranganath, Gerrish, Blei, AISTATS 2014; Kucukelbir et al., JMLR 2017.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from probmed.inference.checkpoints import buffers_of, fingerprint, read_checkpoint, write_checkpoint
from probmed.inference.diagnostics import has_converged, non_finite_sites
from probmed.inference.parameters import cuda_devices, learnable, local_parameters, random_state, seeded, set_random_state, tensors_within

Schedule = Callable[[float], float]

SCHEDULES: dict[str, Schedule] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "polynomial": lambda done: (1 - done) ** 0.9,
}
"""Factors on the learning rate by the part of the steps that is done, from 0 to 1; the polynomial is that of Isensee et al., Nature Methods 2021."""

ADAM = partial(torch.optim.Adam, betas=(0.9, 0.99))
"""Adam with a memory of 100 squared gradients: with the usual 1000, the steep start of a well-observed coefficient slows it for most of a fit."""


class NotFinite(FloatingPointError):
    """The loss or its gradient stopped being finite.

    Arguments:
        step: the step at which it did, from 1; 0 for the start.
        faults: the sites or parameters concerned, in words, the first cause first.
    """

    def __init__(self, step: int, faults: Sequence[str]) -> None:
        self.step, self.faults = step, tuple(faults)
        super().__init__(f"step {step} is not finite: {'; '.join(faults) or 'the sum over sites'}")


@dataclass(frozen=True)
class Step:
    """One step of a fit: its number from 1, the loss (an estimate of −ELBO, nats), the learning rate, the norm of the unclipped gradient."""

    number: int
    loss: float
    learning_rate: float
    gradient_norm: float


@dataclass(frozen=True)
class Fit:
    """What ``fit`` gives.

    Arguments:
        guide: the guide, fitted in place.
        losses: −ELBO estimates, nats, one a step.
        converged: whether the ELBO had stopped rising (``has_converged``).
        steps: how many were taken.
    """

    guide: Callable[..., Any]
    losses: list[float]
    converged: bool
    steps: int

    @property
    def elbo(self) -> float:
        """Mean ELBO over the last tenth of the steps, nats. Parameters still moved meanwhile; ``diagnostics.importance`` holds them still."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return -sum(tail) / len(tail)


def _annealing_starts(losses: Sequence[float], window: int, tolerance_nats: float | None, patience: int) -> bool:
    if tolerance_nats is None or len(losses) % window:
        return False
    return has_converged(losses, window, tolerance_nats, patience)


def _factor(schedule: str | Schedule) -> Schedule:
    """By its name, or the function itself."""
    factor = SCHEDULES.get(schedule) if isinstance(schedule, str) else schedule
    if factor is None:
        raise ValueError(f"expected a schedule among {sorted(SCHEDULES)} or a function, got {schedule!r}")
    return factor


def _parameters(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, nn.Parameter]:
    """``learnable``; what stops it is often a value that is not finite, and then that is named."""
    try:
        return learnable(model, guide, args, kwargs)
    except (ValueError, RuntimeError) as error:
        found = non_finite_sites(model, guide, *args, **kwargs)
        if found:
            raise NotFinite(0, found) from error
        raise


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    steps: int = 2000,
    learning_rate: float = 0.02,
    schedule: str | Schedule = "cosine",
    tolerance_nats: float | None = 0.01,
    window: int = 100,
    patience: int = 3,
    particles: int = 1,
    clip_norm: float | None = None,
    elbo: Any = None,
    optimiser: Callable[..., torch.optim.Optimizer] = ADAM,
    callbacks: Sequence[Callable[[Step], None]] = (),
    progress: bool = False,
    checkpoint: Path | str | None = None,
    checkpoint_every: int = 100,
    resume: bool = True,
    seed: int | None = None,
    **kwargs: Any,
) -> Fit:
    """Fit a guide, and whatever a model has to learn, to data.

    Parameters stay in the modules of guide and model; Pyro's global store is neither read nor written, so fits do not touch each other.

    Arguments:
        args, kwargs: what model and guide are called with.
        steps: at most this many; learning_rate: of the optimiser, at first.
        schedule: ``"cosine"``, ``"constant"``, or a function from the part done (0 to 1) to a factor on the learning rate.
        tolerance_nats: converged when the mean ELBO of a window of steps has risen by less than this, allowing for one standard error of the rise,
            ``patience`` windows running. The learning rate then falls to zero over one more window, and the fit stops. None: take all the steps.
        window: steps over which the ELBO is averaged.
        particles: draws for each estimate of the ELBO.
        clip_norm: greatest norm of the gradient, nats per unit of parameter.
        elbo: another estimator, such as ``TraceMeanField_ELBO(num_particles=4)``; ``particles`` is then its own.
        optimiser: called as ``optimiser(parameters, lr=...)``.
        callbacks: called with a ``Step`` after each.
        progress: show a bar with the ELBO and the time left.
        checkpoint: a file to write every ``checkpoint_every`` steps and at the end. With ``resume`` a fit whose file exists goes on from there, and
            ends in the same bits as one that was never stopped.
        seed: of every draw; torch's generators are left as they were. None: draw from torch's generators.

    Raises:
        NotFinite: where loss or gradient is not finite; the message names the sites.
        ValueError: for settings out of range, parameters outside modules, none to learn.
        UnusableInput: for a checkpoint of another fit.
    """
    factor = _factor(schedule)
    if steps < 1 or learning_rate <= 0 or window < 2 or patience < 1 or particles < 1 or checkpoint_every < 1:
        raise ValueError(
            "expected steps, patience, particles and checkpoint_every >= 1, learning_rate > 0 and window >= 2, got "
            f"{steps}, {patience}, {particles}, {checkpoint_every}, {learning_rate} and {window}"
        )
    elbo = Trace_ELBO(num_particles=particles) if elbo is None else elbo
    held = [p for f in (model, guide) if isinstance(f, nn.Module) for p in f.parameters()]
    devices = cuda_devices([*held, *tensors_within((args, kwargs))])
    path = None if checkpoint is None else Path(checkpoint)
    settings: dict[str, Any] = {
        "steps": steps,
        "learning_rate": learning_rate,
        "schedule": schedule if isinstance(schedule, str) else getattr(schedule, "__qualname__", "function"),
        "tolerance_nats": tolerance_nats,
        "window": window,
        "patience": patience,
        "particles": elbo.num_particles,
        "clip_norm": clip_norm,
        "elbo": type(elbo).__name__,
        "optimiser": getattr(optimiser, "__qualname__", repr(optimiser)),
        "seed": seed,
        "data": fingerprint((args, kwargs)) if path is not None else None,
    }
    with seeded(seed, devices), local_parameters(model, guide), warnings.catch_warnings():
        # Pyro warns of a loss that is not finite; here that is an error which says where.
        warnings.filterwarnings("ignore", message="Encountered", category=UserWarning)
        parameters = _parameters(model, guide, args, kwargs)
        chosen = optimiser(list(parameters.values()), lr=learning_rate)
        buffers = buffers_of({"guide": guide, "model": model})
        losses: list[float] = []
        if path is not None and resume and path.exists():
            losses = read_checkpoint(path, parameters, buffers, chosen, settings)
        annealing = next((n for n in range(len(losses) + 1) if _annealing_starts(losses[:n], window, tolerance_nats, patience)), None)
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn()
        with Progress(*columns, transient=True, disable=not progress) as bar:
            task = bar.add_task("fit", total=steps, completed=len(losses))
            while len(losses) < steps and (annealing is None or len(losses) < annealing + window):
                rate = learning_rate * factor(len(losses) / steps)
                if annealing is not None:
                    rate *= 1 - (len(losses) - annealing) / window
                for group in chosen.param_groups:
                    group["lr"] = rate
                loss, norm = _gradient_step(model, guide, args, kwargs, elbo, chosen, parameters, clip_norm, len(losses) + 1, devices)
                losses.append(loss)
                if annealing is None and _annealing_starts(losses, window, tolerance_nats, patience):
                    annealing = len(losses)
                if path is not None and len(losses) % checkpoint_every == 0:
                    write_checkpoint(path, parameters, buffers, chosen, losses, settings, devices)
                description = f"ELBO {-sum(losses[-window:]) / len(losses[-window:]):.1f} nats"
                bar.update(task, completed=len(losses), description=description)
                for callback in callbacks:
                    callback(Step(len(losses), loss, rate, norm))
        if path is not None and len(losses) % checkpoint_every:
            write_checkpoint(path, parameters, buffers, chosen, losses, settings, devices)
    done = annealing is not None or (tolerance_nats is not None and has_converged(losses, window, tolerance_nats, patience))
    return Fit(guide, losses, done, len(losses))


def _gradient_step(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    elbo: Any,
    optimiser: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    clip_norm: float | None,
    number: int,
    devices: list[int],
) -> tuple[float, float]:
    """One step: loss and norm of the gradient. Raises NotFinite before any parameter moves."""
    before = random_state(devices)

    def faults() -> list[str]:
        # The same draws again, to see where they lead.
        set_random_state(before)
        return non_finite_sites(model, guide, *args, **kwargs)

    optimiser.zero_grad(set_to_none=True)
    try:
        loss = elbo.differentiable_loss(model, guide, *args, **kwargs)
    except (ValueError, RuntimeError) as error:
        # A distribution whose parameters are not finite refuses them without saying at which site.
        found = faults()
        if found:
            raise NotFinite(number, found) from error
        raise
    if not bool(torch.isfinite(loss)):
        raise NotFinite(number, faults())
    loss.backward()  # type: ignore[no-untyped-call]
    limit = math.inf if clip_norm is None else clip_norm
    norm = float(nn.utils.clip_grad_norm_(list(parameters.values()), limit))
    if not math.isfinite(norm):
        broken = [name for name, p in parameters.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
        raise NotFinite(number, faults() or [f"gradient of {name}" for name in broken or parameters])
    optimiser.step()
    return float(loss.detach()), norm
