"""What commands that train on label maps share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from probmed.volumes import UnusableInput

FoldOption = Annotated[
    str | None, typer.Option(help="Rows of this fold are left out of the training and score it; they calibrate a network.", show_default=False)
]
NamesOption = Annotated[Path | None, typer.Option(help='JSON file with the labels\' names, {"1": "GM", …}.', show_default=False)]


def read_names(path: Path) -> dict[int, str]:
    """Names of labels by their codes.

    Raises:
        UnusableInput: where the file has no names of labels.
    """
    try:
        return {int(code): str(name) for code, name in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UnusableInput(path, f"is no JSON of labels' names ({error})", 'give {"1": "name", …}') from error
