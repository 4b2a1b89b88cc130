"""What a user sees while a subcommand works and when it fails, all on standard error."""

from __future__ import annotations

import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from probmed.cli.options import remove_if_empty
from probmed.volumes import UnusableInput

Tell = Callable[[str, float], None]
_LONGEST = 200  # of an unforeseen error's text; some hold whole tensors


def error_console() -> Console:
    """Standard error as it is now."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(name: str, quiet: bool) -> Iterator[Tell]:
    """A bar with the stage and the time left; gives a function of stage and share done, in [0, 1]."""
    if quiet:
        yield lambda stage, share: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.fields[scan]}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.description}"),
    )
    # A long window, for the stages advance in few and uneven steps.
    with Progress(*columns, console=error_console(), transient=True, speed_estimate_period=300) as bar:
        task = bar.add_task("reading", total=1.0, scan=name)
        yield lambda stage, share: bar.update(task, description=stage, completed=share)


@contextmanager
def collected_warnings(paths: Sequence[str]) -> Iterator[list[str]]:
    """Warnings about the given files, as lines; other warnings are dropped, for they are of libraries."""
    lines: list[str] = []

    def keep(message: Warning | str, *rest: object, **more: object) -> None:
        line = " ".join(str(message).split())
        if any(path in line for path in paths) and line not in lines:
            lines.append(line)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = keep
        yield lines


def say(line: str, style: str = "") -> None:
    """One line on standard error."""
    error_console().print(escape(line), style=style, soft_wrap=True)


@contextmanager
def in_one_line(name: str, debug: bool) -> Iterator[list[Path]]:
    """Whatever goes wrong inside ends the command with one line about ``name`` and status 2 for unusable input, else 1. Folders that are put into the
    list, which the command made, go again where they are still empty."""
    made: list[Path] = []
    try:
        yield made
    except Exception as error:
        say(failure_line(error, name, debug))
        raise typer.Exit(2 if isinstance(error, UnusableInput) else 1) from error
    finally:
        remove_if_empty(made)


def failure_line(error: Exception, name: str, debug: bool) -> str:
    """What went wrong in one line; an unforeseen failure shows its traceback on request."""
    if isinstance(error, UnusableInput):
        return str(error)
    if debug:
        error_console().print(escape("".join(traceback.format_exception(error))))
    what = textwrap.shorten(f"{type(error).__name__}: {error}", _LONGEST, placeholder=" …")
    return f"{name}: failed unexpectedly ({what}); run it with --debug and report what that shows"


def failure_table(failures: Sequence[tuple[str, str]], total: int) -> None:
    """What failed and why, after a list of scans."""
    table = Table(title=f"{len(failures)} of {total} scans failed", title_justify="left", title_style="bold")
    table.add_column("scan", overflow="fold")
    table.add_column("why", overflow="fold")
    for name, line in failures:
        # The line begins with the file, which the first column has already.
        table.add_row(escape(name), escape(line.removeprefix(f"{name}: ")))
    error_console().print(table, soft_wrap=False)
