"""Tables as text: TSV and CSV in UTF-8 with a row of names."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from probmed.volumes.files import PathLike, UnusableInput, read_bytes

SEPARATORS = {".tsv": "\t", ".csv": ","}
"""Of a table, by its suffix."""
MISSING = ("", "n/a", "na", "nan", "null", ".")
"""Entries that stand for no value, whatever their case."""


def read_table(path: PathLike) -> pd.DataFrame:
    """Every entry as text without blanks around it; None where it is one of ``MISSING``. Empty lines are passed over.

    Raises:
        UnusableInput: where the file cannot be read, is no ``.tsv`` or ``.csv`` in UTF-8, has no rows, a name twice or none, or a row that is longer
            or shorter than the row of names.
    """
    path = Path(path)
    if path.suffix.lower() not in SEPARATORS:
        raise UnusableInput(path, "is no table by its suffix", "give a .tsv or .csv file")
    remedy = "give a .tsv or .csv file in UTF-8 with a row of names"
    try:
        text = read_bytes(path).decode("utf-8-sig")
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=SEPARATORS[path.suffix.lower()], strict=True)
        rows = [[entry.strip() for entry in line] for line in lines if any(entry.strip() for entry in line)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UnusableInput(path, f"is no table ({error})", remedy) from error
    if len(rows) < 2:
        raise UnusableInput(path, "has no rows below a row of names", remedy)
    names = rows[0]
    if "" in names:
        raise UnusableInput(path, f"has no name for column {names.index('') + 1}", "name or remove it")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UnusableInput(path, f"has several columns {repeated[0]!r}", "rename or remove all but one")
    for i, row in enumerate(rows[1:], 1):
        if len(row) != len(names):
            raise UnusableInput(path, f"has {len(row)} entries in row {i}, and {len(names)} names", "correct the row")
    known = [[None if entry.lower() in MISSING else entry for entry in row] for row in rows[1:]]
    return pd.DataFrame(known, columns=names, dtype=object)


def read_subjects(path: PathLike, *, subject: str = "subject", numeric: Sequence[str] = (), categorical: Sequence[str] = ()) -> pd.DataFrame:
    """A table with one row a person, such as clinical data.

    Arguments:
        subject: the column that names the person.
        numeric: columns of numbers.
        categorical: columns of levels, kept as text.

    Returns:
        Columns ``numeric`` as float64, NaN where missing, and ``categorical`` as text, None where missing; by subject.

    Raises:
        UnusableInput: as ``read_table``, and where a column is not there, holds other than numbers, or a subject is missing or has several rows.
    """
    path = Path(path)
    raw = read_table(path)
    check_columns(path, raw, (subject, *numeric, *categorical))
    people = subject_names(path, raw, subject)
    if repeated := people[people.duplicated()].tolist():
        raise UnusableInput(path, f"has several rows of subject {repeated[0]!r}", "keep one row a subject, or read it as visits")
    table = pd.DataFrame({name: numbers(path, raw, name) for name in numeric} | {name: raw[name] for name in categorical})
    return table.set_axis(pd.Index(people, name="subject"))


def check_columns(path: Path, table: pd.DataFrame, names: Iterable[str]) -> None:
    """Raises UnusableInput where a column is not in the table, or asked for twice."""
    seen: set[str] = set()
    for name in names:
        if name not in table.columns:
            raise UnusableInput(path, f"has no column {name!r}; it has {', '.join(map(str, table.columns))}", "name the column as it is in the table")
        if name in seen:
            raise UnusableInput(path, f"has its column {name!r} asked for in two roles", "give each column one role")
        seen.add(name)


def subject_names(path: Path, table: pd.DataFrame, column: str) -> pd.Series:
    """The subject of each row, as text."""
    names = table[column]
    if names.isna().any():
        raise UnusableInput(path, f"has no subject in column {column}, row {_row(names.isna())}", "name the subject, or remove the row")
    return names.astype(str)


def numbers(path: Path, table: pd.DataFrame, column: str, missing: bool = True) -> pd.Series:
    """A column as float64, NaN where missing.

    Raises:
        UnusableInput: naming the first entry that is no finite number, or that is missing where none may be.
    """
    text = table[column]
    values = pd.to_numeric(text, errors="coerce").astype(np.float64)
    wrong = ~values.abs().lt(np.inf) & (text.notna() if missing else True)
    if wrong.any():
        row = _row(wrong)
        entry = "none" if pd.isna(text.iloc[row - 1]) else repr(str(text.iloc[row - 1])[:40])
        remedy = "correct it, or name the column as categorical if it holds levels" if missing else "correct or remove the row"
        raise UnusableInput(path, f"has no number in column {column}, row {row}: {entry}", remedy)
    return values


def check_not_empty(path: PathLike, table: pd.DataFrame, names: Collection[str]) -> None:
    """Raises UnusableInput where a column has no entry at all."""
    for name in names:
        if table[name].isna().all():
            raise UnusableInput(path, f"has no entry in column {name}", "leave the column out")


def _row(wrong: pd.Series) -> int:
    """Of the first, counted from 1 below the row of names."""
    return int(np.argmax(wrong.to_numpy())) + 1
