"""A fit on disk: parameters, the optimiser's state, losses and random states in one safetensors file with JSON in its header.

Nothing is pickled, so a file from outside can be read safely, and the file is replaced whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from probmed.inference.parameters import random_state, set_random_state, tensors_within
from probmed.volumes import UnusableInput, atomic_write

FORMAT = "probmed fit 1"
_LONGEST = 80  # characters of a setting in a message


def fingerprint(data: Any) -> str:
    """SHA-256 of the shapes, types and bytes of every tensor in nested data."""
    digest = hashlib.sha256()
    for tensor in tensors_within(data):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def buffers_of(programs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The buffers of those programs that are modules (running means, say), by owner and name."""
    return {
        f"{owner}.{name}": value
        for owner, program in programs.items()
        if isinstance(program, nn.Module)
        for name, value in program.named_buffers()
    }


def write_checkpoint(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    losses: list[float],
    settings: Mapping[str, Any],
    devices: list[int],
) -> None:
    """Write the state of a fit after ``len(losses)`` steps.

    Raises:
        UnusableInput: where the file cannot be written.
    """
    tensors: dict[str, Tensor] = {f"parameter/{name}": p for name, p in parameters.items()}
    tensors |= {f"buffer/{name}": b for name, b in buffers.items()}
    numbers: dict[str, Any] = {}
    for name, parameter in parameters.items():
        for key, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimiser/{name}/{key}"] = value
            else:
                numbers[f"{name}/{key}"] = value
    tensors |= {f"random/{name}": state for name, state in random_state(devices).items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    header = {"format": FORMAT, "settings": json.dumps(dict(settings)), "optimiser": json.dumps(numbers), "step": str(len(losses))}
    with atomic_write(path) as temporary:
        # Copies, because safetensors refuses tensors that share memory.
        save_file({name: t.detach().clone().contiguous() for name, t in tensors.items()}, temporary, metadata=header)


def read_checkpoint(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    buffers: Mapping[str, Tensor],
    optimiser: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    remedy: str = "fit with resume=False to start again, or name another checkpoint",
) -> list[float]:
    """Put back what ``write_checkpoint`` wrote and return the losses so far.

    Arguments:
        remedy: what the caller's user can do about a file that is refused.

    Raises:
        UnusableInput: for a file that is not a fit, or is one of another model, guide, data or settings; the message says which. Nothing has changed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise UnusableInput(path, f"is not a readable checkpoint ({error})", remedy) from error
    if header.get("format") != FORMAT:
        raise UnusableInput(path, f"is not a checkpoint of a fit: expected format {FORMAT!r}, got {header.get('format')!r}", remedy)
    before = json.loads(header["settings"])
    for key, value in settings.items():
        if before.get(key) != value:
            raise UnusableInput(path, f"was written with another {key}: expected {_short(value)}, got {_short(before.get(key))}", remedy)
    expected: dict[str, Tensor] = {f"parameter/{n}": t for n, t in parameters.items()}
    expected.update({f"buffer/{n}": t for n, t in buffers.items()})
    found = {name: t for name, t in stored.items() if name.startswith(("parameter/", "buffer/"))}
    for name in expected.keys() | found.keys():
        shapes = [tuple(group[name].shape) if name in group else "none" for group in (expected, found)]
        if shapes[0] != shapes[1]:
            raise UnusableInput(path, f"is of another model or guide: {name} expected {shapes[0]}, got {shapes[1]}", remedy)
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(stored[name])
    numbers = json.loads(header["optimiser"])
    for name, parameter in parameters.items():
        prefix = f"optimiser/{name}/"
        state: dict[str, Any] = {key.removeprefix(f"{name}/"): v for key, v in numbers.items() if key.startswith(f"{name}/")}
        for key, value in stored.items():
            if key.startswith(prefix):
                # A scalar such as Adam's step count stays where torch keeps it, on the CPU.
                state[key.removeprefix(prefix)] = value.to(parameter.device) if value.shape == parameter.shape and value.ndim else value
        if state:
            optimiser.state[parameter] = state
    set_random_state({name.removeprefix("random/"): t for name, t in stored.items() if name.startswith("random/")})
    losses: list[float] = stored["losses"].tolist()
    return losses


def _short(value: Any) -> str:
    """A list of hundreds of scans has no place in a line."""
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
