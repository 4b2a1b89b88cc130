"""Parameters that live in modules, and random states that stay at home: what keeps one fit from touching the next.

Pyro's global store hands the parameters of one guide to the next guide whose names are the same. Here the store is empty before, during and
after: every parameter belongs to the model's or the guide's module.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from torch import Tensor, nn


def modules_within(program: Any) -> Iterator[nn.Module]:
    """The modules that a callable holds: itself, behind handlers and partial applications, in its closure, or as its method's owner."""
    waiting, seen = [program], set()
    while waiting:
        item = waiting.pop()
        if item is None or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            for module in item.modules():
                yield module
                if isinstance(module, AutoGuide):
                    waiting.append(module.model)
        elif isinstance(item, functools.partial):
            waiting += [item.func, *item.args, *item.keywords.values(), getattr(item, "__wrapped__", None)]
        elif inspect.ismethod(item):
            waiting += [item.__self__, item.__func__]
        elif inspect.isfunction(item):
            variables = inspect.getclosurevars(item)
            # Of global names modules only: their functions lead far into libraries.
            waiting += [value for value in variables.globals.values() if isinstance(value, nn.Module)]
            waiting += [*variables.nonlocals.values(), getattr(item, "__wrapped__", None)]


@contextmanager
def local_parameters(*programs: Any) -> Iterator[None]:
    """Within it, parameters are read from and kept in the modules of these models and guides, never in Pyro's global store."""
    for program in programs:
        for module in modules_within(program):
            context = getattr(module, "_pyro_context", None)
            # A module built while the setting was off lacks the dictionary that Pyro looks for while it is on.
            if isinstance(module, PyroModule) and context is not None and not hasattr(context, "param_state"):
                context.param_state = {"params": {}, "constraints": {}}
    with pyro.settings.context(module_local_params=True), pyro.get_param_store().scope():
        yield


def learnable(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, nn.Parameter]:
    """Every parameter that a fit may move, by a name that is the same in every run: of the guide, of the model, and met while both run.

    Raises:
        ValueError: for a bare ``pyro.param``, which no module holds, and where there is no parameter at all.
    """
    with torch.no_grad():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    found: dict[str, nn.Parameter] = {}
    for owner, program in (("guide", guide), ("model", model)):
        if isinstance(program, nn.Module):
            found |= {f"{owner}.{name}": p for name, p in program.named_parameters()}
    known = {id(p) for p in found.values()}
    for owner, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, node in trace.nodes.items():
            if node["type"] != "param":
                continue
            value = node["value"]
            value = value.unconstrained() if hasattr(value, "unconstrained") else value
            if id(value) in known:
                continue
            if name in pyro.get_param_store():
                raise ValueError(f"expected every parameter in a module, got pyro.param({name!r}) in the {owner}: make it an nn.Parameter")
            found[f"{owner}.{name}"] = value
            known.add(id(value))
    found = {name: p for name, p in found.items() if p.requires_grad}
    if not found:
        raise ValueError("expected a guide or a model with parameters to learn, got none")
    return found


def tensors_within(data: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and dictionaries, in order."""
    if isinstance(data, Tensor):
        yield data
    elif isinstance(data, Mapping):
        for key in data:
            yield from tensors_within(data[key])
    elif isinstance(data, (tuple, list)):
        for item in data:
            yield from tensors_within(item)


def cuda_devices(tensors: Iterable[Tensor]) -> list[int]:
    """Indices of the CUDA devices that these tensors are on."""
    return sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})


@contextmanager
def seeded(seed: int | None, devices: Iterable[int] = ()) -> Iterator[None]:
    """Within it, torch draws from ``seed``; afterwards its generators are as they were. With None, nothing is changed."""
    if seed is None:
        yield
        return
    devices = list(devices)
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def random_state(devices: Iterable[int] = ()) -> dict[str, Tensor]:
    """The state of torch's generators, each a uint8 tensor."""
    return {"cpu": torch.get_rng_state()} | {f"cuda:{i}": torch.cuda.get_rng_state(i) for i in devices}


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Set what ``random_state`` gave."""
    for name, value in state.items():
        if name == "cpu":
            torch.set_rng_state(value)
        else:
            torch.cuda.set_rng_state(value, name)
