"""A trained network in a folder: its weights, ``network.safetensors``, and what it is, ``network.json``; of shapes ``shapes`` in both. Nothing is
pickled."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import probmed
from probmed.volumes import UnusableInput, atomic_write

FORMAT = 1
"""Of what is written; folders of before there was a number have this one."""
STEM = "network"


def write_network(folder: Path, network: nn.Module, system: str, described: Mapping[str, Any], stem: str = STEM) -> None:
    """Both files, each whole or not at all.

    Arguments:
        system: what `probmed train` calls it. described: JSON values. stem: of both files' names.

    Raises:
        UnusableInput: where a file cannot be written.
    """
    with atomic_write(folder / f"{stem}.safetensors") as path:
        # Copies, because safetensors refuses tensors that share memory.
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in network.state_dict().items()}, path)
    whole = {"probmed": probmed.__version__, "format": FORMAT, "system": system, **described}
    with atomic_write(folder / f"{stem}.json") as path:
        path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def read_network(folder: Path, system: str, stem: str = STEM) -> Iterator[dict[str, Any]]:
    """What a folder's network is; whatever is missing or wrong in that, while it is used inside, is told of the file.

    Raises:
        UnusableInput: where there is no network of the system, or one of a format that this version does not read.
    """
    path, remedy = folder / f"{stem}.json", f"give a folder that `probmed train {system}` has written"
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        inside = sorted(each.parent.name for each in folder.glob(f"*/{path.name}"))
        remedy = f"give those inside it, one or several: {', '.join(inside)}" if inside else remedy  # of a cross-validation
        raise UnusableInput(folder, f"holds no {system} network ({path.name}: {error.strerror or error})", remedy) from error
    except ValueError as error:
        raise UnusableInput(path, f"is no JSON ({error})", remedy) from error
    if not isinstance(described, dict) or "system" not in described:
        raise UnusableInput(path, "describes no network", remedy)
    if described["system"] != system:
        raise UnusableInput(path, f"is of a network for {described['system']}, not {system}", remedy)
    if described.get("format", FORMAT) != FORMAT:
        fault = f"has format {described['format']} of probmed {described.get('probmed', 'unknown')}, and probmed {probmed.__version__} reads {FORMAT}"
        raise UnusableInput(path, fault, "use that version of probmed, or train the network again")
    try:
        yield described
    except UnusableInput:
        raise
    except KeyError as error:
        raise UnusableInput(path, f"lacks {error} of a {system} network", remedy) from error
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UnusableInput(path, f"describes no {system} network ({error})", remedy) from error


def read_weights(folder: Path, network: nn.Module, stem: str = STEM) -> None:
    """Put a folder's weights into a network.

    Raises:
        UnusableInput: for a file that is missing, cut off, or of another network; then the network is as it was.
    """
    path, remedy = folder / f"{stem}.safetensors", "copy the folder again from where it was trained, or train the network again"
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UnusableInput(path, f"is no file of weights that can be read ({error})", remedy) from error
    shapes = [{name: tuple(t.shape) for name, t in tensors.items()} for tensors in (network.state_dict(), found)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        expected, got = (group.get(name, "none") for group in shapes)
        if expected != got:
            raise UnusableInput(path, f"has weights of another network than {stem}.json describes: {name} expected {expected}, got {got}", remedy)
    network.load_state_dict(found)
