"""The `probmed` command.

Exit status: 0 on success, 1 where some of several scans failed or something unforeseen went wrong, 2 on
unusable input, 130 and 143 when interrupted and terminated.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from probmed import __version__
from probmed.cli import compare, demo, models, register, segment, template, train, warp
from probmed.cli.predict import predict

app = typer.Typer(
    name="probmed",
    help="Probabilistic models of medical images: segmentation and registration, with uncertainty.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(segment.segment)
app.command()(register.register)
app.command()(warp.warp)
app.command()(template.template)
app.command()(compare.compare)
app.add_typer(train.app, name="train")
app.command()(predict)
app.command()(models.models)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"probmed {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


def main() -> None:
    """The console script."""
    # A terminated run tidies up after itself like an interrupted one.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, _terminate)
    try:
        app(prog_name="probmed")
    except KeyboardInterrupt:
        sys.exit(130)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
