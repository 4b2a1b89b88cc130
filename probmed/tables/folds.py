"""Folds of a table of labelled scans: what is trained on, and what is left out to score it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from probmed.tables.files import check_columns
from probmed.volumes import UnusableInput


def parts_of(table: pd.DataFrame, source: Path, fold: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows for training, and those of the fold.

    Raises:
        UnusableInput: for no such column, a fold without scans or with all, and scans of it without labels.
    """
    check_columns(source, table, ["fold"])
    own = table["fold"].astype(str) == fold
    if not own.any() or own.all():
        found = ", ".join(sorted(table["fold"].astype(str).unique()))
        raise UnusableInput(source, f"has {'no' if not own.any() else 'only'} scans of fold {fold} (it has {found})", "give one of several folds")
    if table["labels"][own].isna().any():
        raise UnusableInput(source, f"has scans of fold {fold} without labels, which score the others", "give each labels, or leave the scan out")
    return table[~own].reset_index(drop=True), table[own].reset_index(drop=True)


def folds(table: pd.DataFrame, source: Path) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """The name of each fold, with ``parts_of`` it.

    Raises:
        UnusableInput: for no such column, rows without a fold, and names that cannot be a folder's.
    """
    check_columns(source, table, ["fold"])
    if table["fold"].isna().any():
        raise UnusableInput(source, "has scans without a fold", "give each a fold, or leave the scan out")
    for name in sorted(table["fold"].astype(str).unique()):
        if "/" in name or name in (".", ".."):
            raise UnusableInput(source, f"has the fold {name!r}, which cannot name a folder", "give folds other names")
        yield name, *parts_of(table, source, name)
