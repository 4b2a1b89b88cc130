"""The same allele counted in two files: swapped alleles, strands, and SNPs that cannot be told."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probmed.tables.genotypes import Genotypes
from probmed.tables.omissions import Omission, omission, summary
from probmed.volumes.files import UnusableInput

_COMPLEMENT = str.maketrans("ACGT", "TGCA")
_UNKNOWN = "0"  # PLINK's, of the allele that no one has
Column: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Alignment:
    """What it took to count the same alleles as a reference.

    Arguments:
        same: SNPs left as they were.
        swapped: SNPs whose counts became 2 − x, on either strand.
        other_strand: SNPs of both kinds that the file has on the other strand.
        omissions: what was left out.
    """

    same: int
    swapped: int
    other_strand: int
    omissions: tuple[Omission, ...]

    def summary(self) -> str:
        """One line."""
        return f"{self.same} SNPs as they were, {self.swapped} swapped, {self.other_strand} on the other strand; {summary(self.omissions)}"

    def record(self) -> dict[str, Any]:
        """As a sidecar holds it."""
        counts = {"Same": self.same, "Swapped": self.swapped, "OtherStrand": self.other_strand}
        return counts | {"LeftOut": [each.record() for each in self.omissions]}


def aligned(
    genotypes: Genotypes, reference: pd.DataFrame, *, by: Literal["name", "position"] = "name", ambiguous: Literal["drop", "keep"] = "drop"
) -> tuple[Genotypes, Alignment]:
    """The SNPs that a reference has as well, in its order and under its names, with its alleles counted.

    Alleles are compared as they are, swapped, and both again on the other strand. The allele that is not known because no one has it (``0``)
    agrees with any. A/T and C/G SNPs look the same on both strands: frequencies apart, nothing tells whether they are swapped.

    Arguments:
        reference: columns chromosome, name, position, counted and other: ``snps`` of other ``Genotypes``, or of a ``GenotypeCoding``.
        by: SNPs are the same if they have one name, or one chromosome and position (in one genome build).
        ambiguous: A/T and C/G SNPs are left out, or kept by their letters with a warning, as is right if both files have the same strand.

    Raises:
        UnusableInput: where no SNP remains.
    """
    bim = genotypes.path.with_suffix(".bim")
    keys, wanted = (_keys(snps, by) for snps in (genotypes.snps, reference))
    several = keys.duplicated(keep=False)
    unclear = wanted.duplicated(keep=False) | wanted.isin(keys[several])
    places = pd.Series(np.arange(len(keys)), index=keys)[~several.to_numpy()]
    rows = places.reindex(wanted.where(~unclear)).fillna(-1).to_numpy(dtype=np.int64)
    common = np.flatnonzero(rows >= 0)
    omissions = (
        *omission("SNPs", "several at one position", reference["name"][unclear]),
        *omission("SNPs", f"not in {bim}", reference["name"][(rows < 0) & ~unclear]),
        *omission("SNPs", "not in the reference", genotypes.snps["name"][~keys.isin(wanted)]),
    )
    if not len(common):
        raise UnusableInput(bim, f"shares no SNP with the reference by {by}", "compare their names, positions and genome builds")

    chosen = genotypes.of_columns(rows[common])
    theirs = reference.iloc[common].reset_index(drop=True)
    agree, swapped, turned = _compared(chosen.snps, theirs)
    unsure = agree & (_palindromic(chosen.snps) | _palindromic(theirs))
    kept = agree & ~unsure if ambiguous == "drop" else agree
    if ambiguous == "keep" and unsure.any():
        warnings.warn(f"{bim}: has {int(unsure.sum())} SNPs with alleles A/T or C/G, which are taken to be on the reference's strand", stacklevel=2)
    omissions += omission("SNPs", "alleles differ from the reference's", theirs["name"][~agree])
    omissions += omission("SNPs", "A/T or C/G, strand unclear", theirs["name"][agree & ~kept])
    if not kept.any():
        raise UnusableInput(bim, f"shares no SNP with the reference ({summary(omissions)})", "compare both files' alleles")

    rest = chosen.of_columns(np.flatnonzero(kept))
    names = theirs[["chromosome", "name", "position", "counted", "other"]][kept].reset_index(drop=True)
    result = replace(rest, snps=names, flipped=rest.flipped ^ swapped[kept], omissions=(*genotypes.omissions, *omissions))
    report = Alignment(int((kept & ~swapped & ~turned).sum()), int((kept & swapped).sum()), int((kept & turned).sum()), omissions)
    return result, report


def _keys(snps: pd.DataFrame, by: str) -> pd.Series:
    return snps["name"] if by == "name" else snps["chromosome"] + ":" + snps["position"].astype(str)


def _compared(ours: pd.DataFrame, theirs: pd.DataFrame) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether alleles agree, whether swapped, and whether on the other strand, ``(S,)`` each; of several ways to agree the one that rests on most
    known alleles, then the simplest."""
    counted, other = (_letters(ours, name) for name in ("counted", "other"))
    minus, minus_other = _complement(counted), _complement(other)
    pairs = [(counted, other), (other, counted), (minus, minus_other), (minus_other, minus)]
    goal = [_letters(theirs, name) for name in ("counted", "other")]
    score = np.stack([_agreement(pair, goal) for pair in pairs])
    best = score.argmax(0)
    agree = score.max(0) > 0
    return agree, agree & (best % 2 == 1), agree & (best >= 2)


def _agreement(pair: tuple[Column, Column], goal: list[Column]) -> NDArray[np.int64]:
    """How many known alleles are equal; 0 where any differ."""
    equal = [(one == two) & (one != _UNKNOWN) for one, two in zip(pair, goal, strict=True)]
    either = [(one == _UNKNOWN) | (two == _UNKNOWN) for one, two in zip(pair, goal, strict=True)]
    possible = (equal[0] | either[0]) & (equal[1] | either[1]) & (pair[0] != "") & (pair[1] != "")
    return np.where(possible, equal[0].astype(np.int64) + equal[1], 0)


def _palindromic(snps: pd.DataFrame) -> NDArray[np.bool_]:
    counted, other = _letters(snps, "counted"), _letters(snps, "other")
    return (_complement(counted) == other) & (counted != _UNKNOWN)


def _letters(snps: pd.DataFrame, column: str) -> Column:
    return snps[column].str.upper().to_numpy(dtype=object)


def _complement(alleles: Column) -> Column:
    """On the other strand, read backwards; ``""`` of what is not in letters ACGT."""
    known = {one: one if one == _UNKNOWN else one.translate(_COMPLEMENT)[::-1] if set(one) <= set("ACGT") else "" for one in set(alleles)}
    return np.array([known[one] for one in alleles], dtype=object)
