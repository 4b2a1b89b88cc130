"""Tables of scans with label maps: their folds, and the labels' names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from probmed.volumes import UnusableInput

FoldOption = Annotated[
    str | None, typer.Option(help="Rows of this fold are left out of the training and score it; they calibrate a network.", show_default=False)
]
NamesOption = Annotated[Path | None, typer.Option(help='JSON file with the labels\' names, {"1": "GM", …}.', show_default=False)]


def parts_of(
    table: pd.DataFrame, source: Path, fold: str | None, columns: Sequence[str] = ("scan", "labels")
) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Rows for training, and those of the fold.

    Raises:
        UnusableInput: for columns that are missing, and a fold without scans or with all.
    """
    missing = [name for name in (*columns, *([] if fold is None else ["fold"])) if name not in table.columns]
    if missing:
        raise UnusableInput(source, f"has no column {missing[0]} (it has {', '.join(map(str, table.columns))})", "give a column with that name")
    if fold is None:
        return table, None
    own = table["fold"].astype(str) == fold
    if not own.any() or own.all():
        found = ", ".join(sorted(table["fold"].astype(str).unique()))
        raise UnusableInput(source, f"has {'no' if not own.any() else 'only'} scans of fold {fold} (it has {found})", "give one of several folds")
    if table["labels"][own].isna().any():
        raise UnusableInput(source, f"has scans of fold {fold} without labels, which score the others", "give each labels, or leave the scan out")
    return table[~own].reset_index(drop=True), table[own].reset_index(drop=True)


def read_names(path: Path) -> dict[int, str]:
    """Names of labels by their codes.

    Raises:
        UnusableInput: where the file has no names of labels.
    """
    try:
        return {int(code): str(name) for code, name in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UnusableInput(path, f"is no JSON of labels' names ({error})", 'give {"1": "name", …}') from error
