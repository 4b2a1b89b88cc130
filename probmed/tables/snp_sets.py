"""Sets of SNPs, such as genes or regions of chromosomes, each with a kernel of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probmed.tables.files import check_columns, numbers, read_table
from probmed.tables.genotypes import Genotypes
from probmed.volumes.files import PathLike, UnusableInput


@dataclass(frozen=True)
class SnpSet:
    """A named set.

    Arguments:
        name: of the set.
        snps: names of SNPs in it.
        places: stretches of chromosomes, as ``Genotypes.in_regions`` takes them; SNPs in any are in the set.
    """

    name: str
    snps: tuple[str, ...] = ()
    places: tuple[str, ...] = ()

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> SnpSet:
        """As ``asdict`` gives it."""
        return cls(str(record["name"]), tuple(record["snps"]), tuple(record["places"]))

    def members(self, genotypes: Genotypes) -> NDArray[np.bool_]:
        """Which of the SNPs are in the set, ``(S,)``.

        Raises:
            UnusableInput: where none is.
        """
        inside = genotypes.snps["name"].isin(self.snps).to_numpy(copy=True)
        if self.places:
            inside |= genotypes.inside(self.places)
        if not inside.any():
            fault = f"has no SNP left of the set {self.name}"
            raise UnusableInput(genotypes.path, fault, "leave the set out, widen it, or choose milder limits of frequency and missing genotypes")
        return np.asarray(inside)


def read_snp_sets(path: PathLike) -> tuple[SnpSet, ...]:
    """From a ``.tsv`` or ``.csv`` table: column region, the set's name, and either snp, or chromosome, start and end (base pairs, both included);
    a set may have several rows, and a SNP be in several sets.

    Raises:
        UnusableInput: as ``read_table``; where a column is not there, an entry is missing, or a stretch is none.
    """
    path = Path(path)
    table = read_table(path)
    by_name = "snp" in table.columns
    wanted = ["region", "snp"] if by_name else ["region", "chromosome", "start", "end"]
    check_columns(path, table, wanted)
    for column in wanted:
        if table[column].isna().any():
            row = int(table[column].isna().to_numpy().argmax()) + 1
            raise UnusableInput(path, f"has no {column} in row {row}", "complete or remove the row")
    entries = table["snp"].astype(str) if by_name else _stretches(path, table)
    groups = entries.groupby(table["region"].astype(str), sort=False)
    kind = "snps" if by_name else "places"
    return tuple(SnpSet(str(name), **{kind: tuple(dict.fromkeys(members))}) for name, members in groups)


def all_members(sets: Sequence[SnpSet], genotypes: Genotypes) -> list[str]:
    """Names of the SNPs that are in any of the sets, in the order of the file.

    Raises:
        UnusableInput: as ``SnpSet.members``.
    """
    inside = np.any([each.members(genotypes) for each in sets], axis=0)
    return list(genotypes.snps["name"][inside])


def _stretches(path: Path, table: Any) -> Any:
    start, end = (numbers(path, table, column, missing=False) for column in ("start", "end"))
    wrong = (start < 0) | (end < start) | (start % 1 != 0) | (end % 1 != 0)
    if wrong.any():
        row = int(wrong.to_numpy().argmax()) + 1
        raise UnusableInput(path, f"has no stretch from start to end in row {row}", "give whole base pairs, the end not before the start")
    return table["chromosome"].astype(str) + ":" + start.astype("int64").astype(str) + "-" + end.astype("int64").astype(str)
