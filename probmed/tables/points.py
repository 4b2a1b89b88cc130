"""Points in tables, one a row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from probmed.tables.files import numbers

AXES = ("x", "y", "z")


def coordinates(path: Path, table: pd.DataFrame, columns: Sequence[str]) -> Tensor:
    """Columns of text as points ``(N, d)`` float64.

    Raises:
        UnusableInput: naming the first that is no finite number.
    """
    values = pd.concat([numbers(path, table, column, missing=False) for column in columns], axis=1)
    return torch.from_numpy(values.to_numpy(copy=True))
