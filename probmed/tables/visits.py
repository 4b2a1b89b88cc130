"""Long tables: people seen once or several times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probmed.tables.covariates import CovariateCoding, Missing
from probmed.tables.files import check_columns, check_not_empty, numbers, read_table, subject_names
from probmed.tables.omissions import Omission
from probmed.volumes.files import PathLike, UnusableInput

Unit = Literal["years", "days"]
_DAYS_PER_YEAR = 365.25


@dataclass(frozen=True, eq=False)
class Changes:
    """d = y_t − y_B and Δx = t − t_B of every visit after the first; F such visits, P people, K scalars.

    Arguments:
        subjects: P, all people of the table, those seen once as well.
        person: ``(F,)`` whose visit it is, a position in ``subjects``.
        years: Δx, ``(F,)``.
        differences: d, ``(F, K)``; NaN where either value is missing.
        baseline: y_B, ``(P, K)``; NaN where missing.
        scalars: K names.
    """

    subjects: tuple[str, ...]
    person: Tensor
    years: Tensor
    differences: Tensor
    baseline: Tensor
    scalars: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Visits:
    """A row a visit; a subject's first visit is its baseline.

    Scalars are what is modelled: missing ones stay NaN. Covariates may be imputed, by ``CovariateCoding``.

    Arguments:
        path: where it was read.
        table: columns subject, years (time since whatever zero the file has), and those below under the file's names; subjects as they first come
            in the file, each one's visits by time.
        scalars, covariates: columns of float64, NaN where missing.
        categorical: covariates of text, None where missing.
        scans: columns of absolute paths, None where missing.
        omissions: people who were left out.
    """

    path: Path
    table: pd.DataFrame
    scalars: tuple[str, ...] = ()
    covariates: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    scans: tuple[str, ...] = ()
    omissions: tuple[Omission, ...] = ()

    @classmethod
    def read(
        cls,
        path: PathLike,
        *,
        time_unit: Unit,
        subject: str = "subject",
        time: str = "time",
        scalars: Sequence[str] = (),
        covariates: Sequence[str] = (),
        categorical: Sequence[str] = (),
        scans: Sequence[str] = (),
        empty: bool = False,
    ) -> Visits:
        """From ``.tsv`` or ``.csv``; columns that are not asked for are passed over.

        Arguments:
            time_unit: of the column of time; 365.25 days are a year.
            subject, time: columns with the person, and with numbers that tell when the visit was.
            covariates: numeric ones.
            scans: columns with paths, relative ones to the table's folder.
            empty: whether a column may be wholly missing, as in a table of visits to come.

        Raises:
            UnusableInput: as ``read_table``; where a column is not there, is wholly missing unless it may, or holds other than numbers; where a
                subject or time is missing, a subject is seen twice at one time, or a scan does not exist.
            ValueError: for another unit of time.
        """
        path = Path(path)
        if time_unit not in ("years", "days"):
            raise ValueError(f"expected time in years or days, got {time_unit!r}")
        raw = read_table(path)
        check_columns(path, raw, (subject, time, *scalars, *covariates, *categorical, *scans))
        if not empty:
            check_not_empty(path, raw, (*scalars, *covariates, *categorical, *scans))
        if clash := {"subject", "years"} & {*scalars, *covariates, *categorical, *scans}:
            raise UnusableInput(path, f"has a column {min(clash)!r} that is asked for as something else", "rename it")
        years = numbers(path, raw, time, missing=False) / (_DAYS_PER_YEAR if time_unit == "days" else 1.0)
        columns: dict[str, pd.Series] = {"subject": subject_names(path, raw, subject), "years": years}
        columns |= {name: numbers(path, raw, name) for name in (*scalars, *covariates)}
        columns |= {name: raw[name] for name in categorical} | {name: _scan_paths(path, raw[name]) for name in scans}
        table = pd.DataFrame(columns)
        _check_distinct(path, table)
        order = np.lexsort((table["years"], pd.factorize(table["subject"])[0]))
        rows = table.iloc[order].reset_index(drop=True)
        return cls(path, rows, tuple(scalars), tuple(covariates), tuple(categorical), tuple(scans))

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def subjects(self) -> tuple[str, ...]:
        """Each once, in the table's order."""
        return tuple(self.table["subject"].unique())

    @cached_property
    def person(self) -> Tensor:
        """Whose each visit is: ``(N,)`` int64 positions in ``subjects``."""
        return torch.tensor(pd.factorize(self.table["subject"])[0], dtype=torch.int64)

    @property
    def years_since_baseline(self) -> Tensor:
        """Δx = time − the subject's first time, ``(N,)`` float64, years."""
        return torch.tensor((self.table["years"] - self.table.groupby("subject")["years"].transform("first")).to_numpy())

    @cached_property
    def baseline(self) -> pd.DataFrame:
        """The first visit of each subject, by subject."""
        return self.table[~self.table["subject"].duplicated()].set_index("subject")

    @property
    def seen_once(self) -> tuple[str, ...]:
        """Subjects with a baseline alone."""
        return tuple(self.table["subject"][~self.table["subject"].duplicated(keep=False)])

    def changes(self, scalars: Sequence[str] | None = None) -> Changes:
        """Of these scalars, or all, from baseline to every later visit."""
        names = list(self.scalars if scalars is None else scalars)
        values, first = (torch.tensor(table[names].to_numpy(dtype=np.float64)) for table in (self.table, self.baseline))
        later = torch.tensor(self.table["subject"].duplicated().to_numpy())
        return Changes(self.subjects, self.person[later], self.years_since_baseline[later], (values - first[self.person])[later], first, tuple(names))

    def covariate_coding(self, missing: Missing = "keep") -> CovariateCoding:
        """Learned from the covariates at baseline.

        Raises:
            UnusableInput: where a covariate has no entry at any baseline.
        """
        table = self.baseline[[*self.covariates, *self.categorical]]
        return CovariateCoding.fit(table, self.categorical, missing=missing, source=self.path)

    def of_subjects(self, subjects: Sequence[str]) -> Visits:
        """These people's visits, people in this order.

        Raises:
            UnusableInput: where one is not there.
        """
        place = {name: i for i, name in enumerate(subjects)}
        if absent := place.keys() - set(self.subjects):
            raise UnusableInput(self.path, f"has no subject {min(absent)} ({len(absent)} such)", "ask for those that it has")
        places = self.table["subject"].map(place)
        return replace(self, table=self.table[places.notna()].iloc[places.dropna().argsort(kind="stable")].reset_index(drop=True))

    def summary(self) -> str:
        """One line."""
        return f"{self.path}: {len(self)} visits of {len(self.subjects)} people, {len(self.seen_once)} of them seen once"

    def record(self) -> dict[str, Any]:
        """As a sidecar holds it."""
        roles = {"Scalars": self.scalars, "Covariates": self.covariates, "Categorical": self.categorical, "Scans": self.scans}
        counts = {"Visits": len(self), "People": len(self.subjects), "SeenOnce": len(self.seen_once)}
        missing = {name: int(self.table[name].isna().sum()) for names in roles.values() for name in names}
        return {"File": str(self.path), **counts, **{role: list(names) for role, names in roles.items()}, "Missing": missing}


def _check_distinct(path: Path, table: pd.DataFrame) -> None:
    repeated = table[table.duplicated(["subject", "years"])]
    if len(repeated):
        name, row = repeated["subject"].iloc[0], repeated.index[0] + 1
        raise UnusableInput(path, f"has two visits of subject {name} at one time (row {row}; {len(repeated)} such rows)", "keep one of them")


def _scan_paths(path: Path, column: pd.Series) -> pd.Series:
    places = column.map(lambda text: str(path.parent.resolve() / text), na_action="ignore")
    for row, place in enumerate(places, 1):
        if isinstance(place, str) and not Path(place).is_file():
            fault = f"does not exist ({path}, column {column.name}, row {row})"
            raise UnusableInput(place, fault, "correct the table; paths are relative to its folder")
    return places
