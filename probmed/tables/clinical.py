"""Visits whose covariates are in a table of their own, a row a person."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from probmed.tables.files import check_not_empty, read_subjects, read_table
from probmed.tables.omissions import omission
from probmed.tables.visits import Visits
from probmed.volumes.files import PathLike, UnusableInput


def read_with_clinical(
    path: PathLike,
    clinical: PathLike,
    *,
    subject: str = "subject",
    covariates: Sequence[str] = (),
    categorical: Sequence[str] = (),
    empty: bool = False,
    **more: Any,
) -> Visits:
    """``Visits.read``, with the covariates that the clinical table has taken from there: one value a person, at every visit.

    People who are not in the clinical table are left out, and recorded; where columns may be ``empty`` they stay, without its covariates, with a
    warning.

    Arguments:
        clinical: a table with a row a person, whose column ``subject`` is named as that of the visits.
        more: of ``Visits.read``.

    Raises:
        UnusableInput: as ``Visits.read`` and ``read_subjects``; where a covariate is in both tables; where no one is in both.
    """
    path, clinical = Path(path), Path(clinical)
    names = set(read_table(clinical).columns)
    if both := [name for name in (*covariates, *categorical) if name in names and name in read_table(path).columns]:
        raise UnusableInput(clinical, f"has a column {both[0]!r}, which {path} has as well", "remove or rename one of them")
    numeric, levels = ([name for name in asked if name in names] for asked in (covariates, categorical))
    more["covariates"], more["categorical"] = ([name for name in asked if name not in names] for asked in (covariates, categorical))
    visits = Visits.read(path, subject=subject, empty=empty, **more)
    table = read_subjects(clinical, subject=subject, numeric=numeric, categorical=levels)
    there = [name for name in visits.subjects if name in table.index]
    absent = [name for name in visits.subjects if name not in table.index]
    if empty and absent:
        names_of = f"{absent[0]} and {len(absent) - 1} others" if len(absent) > 1 else absent[0]
        warnings.warn(f"{path}: has {names_of}, who are not in {clinical}; what it would say of them counts as missing", stacklevel=2)
    elif not there:
        raise UnusableInput(clinical, f"shares no subject with {path} ({table.index[0]}, {visits.subjects[0]})", "name people in the same way")
    else:
        visits = replace(visits.of_subjects(there), omissions=omission("subjects", "not in the clinical table", absent))
    columns = table.reindex(visits.table["subject"]).set_axis(visits.table.index)
    if not empty:
        check_not_empty(clinical, columns, [*numeric, *levels])
    whole = visits.table.assign(**{name: columns[name] for name in (*numeric, *levels)})
    return replace(visits, table=whole, covariates=tuple(covariates), categorical=tuple(categorical))
