"""Columns of a table as numbers, by what the training people had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from probmed.tables.files import check_not_empty
from probmed.tables.omissions import Omission, omission
from probmed.volumes.files import PathLike, UnusableInput

Missing = Literal["keep", "impute"]


@dataclass(frozen=True)
class CovariateCoding:
    """Means of numeric covariates and levels of categorical ones, learned from training people by ``fit`` and applied to any.

    Arguments:
        numeric: (mean, standard deviation) of each, over those that have it.
        levels: of each categorical covariate its levels in alphabetical order, and the share of each.
        missing: stays NaN (``"keep"``), or becomes the mean or the most frequent level (``"impute"``).
        with_gaps: covariates that training people lack, which have an indicator in ``design`` where missing ones are imputed.
        constant: covariates left out because all training people have one value.
    """

    numeric: Mapping[str, tuple[float, float]]
    levels: Mapping[str, Mapping[str, float]]
    missing: Missing
    with_gaps: tuple[str, ...]
    constant: tuple[str, ...]

    @classmethod
    def fit(
        cls, table: pd.DataFrame, categorical: Sequence[str] = (), *, missing: Missing = "keep", source: PathLike = "covariates"
    ) -> CovariateCoding:
        """From a row a person.

        Arguments:
            table: covariates alone; numbers, NaN where missing, or text, None where missing.
            categorical: columns of text.
            source: what errors name.

        Raises:
            UnusableInput: where a column has no entry.
        """
        check_not_empty(source, table, list(table.columns))
        constant = tuple(str(name) for name in table if table[name].nunique() == 1)
        varying = table.drop(columns=list(constant))
        shares = {name: varying[name].value_counts(normalize=True).sort_index() for name in varying if name in categorical}
        return cls(
            numeric={str(name): (float(varying[name].mean()), float(varying[name].std())) for name in varying if name not in categorical},
            levels={str(name): {str(level): float(share) for level, share in counts.items()} for name, counts in shares.items()},
            missing=missing,
            with_gaps=tuple(str(name) for name in varying if varying[name].isna().any()),
            constant=constant,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the covariates in use: numeric, then categorical."""
        return (*self.numeric, *self.levels)

    @property
    def omissions(self) -> tuple[Omission, ...]:
        """The constant covariates."""
        return omission("covariates", "constant", self.constant)

    def numbers(self, table: pd.DataFrame, source: PathLike = "covariates") -> pd.DataFrame:
        """A float64 column a covariate: numbers as they are and levels as 0 to L−1, as the kernels of columns take them.

        Raises:
            UnusableInput: where a covariate is not there, or has a level that training people have not.
        """
        if absent := [name for name in self.names if name not in table.columns]:
            raise UnusableInput(source, f"has no column {absent[0]!r}, which the training table has", "add it, with missing entries if need be")
        columns = {name: table[name].astype(np.float64) for name in self.numeric}
        columns |= {name: self._places(table[name], source) for name in self.levels}
        coded = pd.DataFrame(columns, index=table.index, columns=list(self.names), dtype=np.float64)
        return coded.fillna(self._typical()) if self.missing == "impute" else coded

    def design(self, table: pd.DataFrame, source: PathLike = "covariates") -> pd.DataFrame:
        """Columns for linear effects, float64: numbers as they are; ``name=level`` for each level but the first; and, where missing entries are
        imputed, ``name missing`` for each covariate in ``with_gaps`` (others were never missing in training, so have no effect to multiply). A
        missing level that is kept is NaN in all its columns.

        Raises:
            UnusableInput: as ``numbers``.
        """
        coded = self.numbers(table, source)
        columns = {name: coded[name] for name in self.numeric}
        for name, shares in self.levels.items():
            for place, level in enumerate(shares):
                if place:
                    columns[f"{name}={level}"] = (coded[name] == place).astype(np.float64).where(coded[name].notna())
        if self.missing == "impute":
            columns |= {f"{name} missing": table[name].isna().astype(np.float64) for name in self.with_gaps}
        return pd.DataFrame(columns, index=table.index)

    def record(self) -> dict[str, Any]:
        """As a sidecar holds it; ``from_record`` takes it back."""
        return asdict(self) | {"numeric": {name: list(pair) for name, pair in self.numeric.items()}}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> CovariateCoding:
        """The coding of a sidecar."""
        numeric = {name: (float(mean), float(sd)) for name, (mean, sd) in record["numeric"].items()}
        return cls(numeric, record["levels"], record["missing"], tuple(record["with_gaps"]), tuple(record["constant"]))

    def _places(self, column: pd.Series, source: PathLike) -> pd.Series:
        known = {level: float(place) for place, level in enumerate(self.levels[str(column.name)])}
        places = column.map(known).astype(np.float64)
        unknown = places.isna() & column.notna()
        if unknown.any():
            level = str(column[unknown].iloc[0])
            fault = f"has level {level!r} in column {column.name}, training people have {', '.join(known)}"
            raise UnusableInput(source, fault, "leave the entry empty, or train with people of that level")
        return places

    def _typical(self) -> dict[str, float]:
        means = {name: mean for name, (mean, _) in self.numeric.items()}
        return means | {name: float(np.argmax(list(shares.values()))) for name, shares in self.levels.items()}
