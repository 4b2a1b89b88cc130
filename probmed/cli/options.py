"""Options that several subcommands share, and what they turn into."""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from probmed.volumes import UnusableInput


class Device(str, Enum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


DeviceOption = Annotated[Device, typer.Option(help="Where to compute; auto takes a GPU if there is one.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**31, help="Same seed, same bytes on the same machine.")]
DrawsOption = Annotated[
    int, typer.Option(min=2, max=10_000, help="Joint posterior draws behind the intervals.")
]
MixedPrecisionOption = Annotated[bool, typer.Option("--mixed-precision", help="The network in bfloat16.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but what failed.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an unforeseen failure.")]


def command_line() -> str:
    """The command as typed, without the folder of the program."""
    return shlex.join(["probmed", *sys.argv[1:]])


def check_device(device: Device) -> None:
    """Refuse a device that is not there.

    Raises:
        UnusableInput: for cuda without one.
    """
    if device is Device.cuda and not torch.cuda.is_available():
        raise UnusableInput(
            "--device cuda", "there is no CUDA device that PyTorch can use", "use --device cpu or auto"
        )


def make_folder(path: Path) -> list[Path]:
    """Create a folder for outputs, with those above it; give the ones that were not there, innermost first.

    Raises:
        UnusableInput: where it cannot be created or is a file.
    """
    missing = [p for p in (path, *path.parents) if not p.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UnusableInput(path, "is a file, not a folder", "give another folder with --out") from error
    except OSError as error:
        remedy = "give a folder with --out that you may write to"
        raise UnusableInput(path, f"cannot be created: {error.strerror or error}", remedy) from error
    return missing


def remove_if_empty(folders: list[Path]) -> None:
    """Take back what ``make_folder`` made, where nothing was put into it."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def check_run(out: Path, resume: bool) -> None:
    """A run is gone on with when asked for, and never replaced."""
    check_runs([out], resume)


def check_runs(folders: Sequence[Path], resume: bool) -> None:
    """As ``check_run``, of runs one after another, of which the later ones may not have begun."""
    begun, done = ([folder for folder in folders if (folder / name).exists()] for name in ("checkpoint.safetensors", "network.json"))
    if begun and not resume:
        raise UnusableInput(begun[0], "holds a run already", "go on with it by --resume, or give another folder with --out")
    if alone := [folder for folder in done if folder not in begun]:
        raise UnusableInput(alone[0], "holds a network without the checkpoint of its training", "give another folder with --out")
    if resume and not begun:
        raise UnusableInput(folders[0], "holds no run to go on with", "leave out --resume, or give the run's folder with --out")


def load_amortisation() -> Any:
    """Training and networks, when first asked for: MONAI and Fabric take seconds to import, which no other command should have to wait for."""
    return importlib.import_module("probmed.workflows.amortisation")


def load_networks() -> Any:
    """Registration networks; likewise."""
    return importlib.import_module("probmed.workflows.registration_networks")


def given_options(context: typer.Context) -> list[str]:
    """Names of the parameters that the command line has, in the order of the command's definition."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
