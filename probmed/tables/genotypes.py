"""Genotypes on disk, read a few SNPs at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from bed_reader import open_bed  # type: ignore[import-untyped]
from numpy.typing import NDArray
from torch import Tensor

from probmed.tables import plink
from probmed.tables.codings import GenotypeCoding, Missing, Spread
from probmed.tables.omissions import Omission, omission, summary
from probmed.volumes.files import PathLike, UnusableInput

Identity = Literal["individual", "family and individual"]
_CHUNK_ENTRIES = 1 << 22
_NOT_DIPLOID = {"23": "X", "24": "Y", "26": "MT"}


@dataclass(frozen=True, eq=False)
class Genotypes:
    """People × SNPs in a PLINK 1 file set, some of its rows and columns, as counts 0, 1 and 2 of a named allele; NaN where missing.

    Nothing is read from the ``.bed`` file until ``chunks``, and then as many SNPs at a time as fit. Every selection gives another
    ``Genotypes`` of the same file, which keeps what was left out so far and why.

    Arguments:
        path: of the ``.bed`` file.
        count_A1: whether the file's A1 is counted where ``flipped`` is False.
        people: a row a person: family, individual, father, mother, sex.
        snps: a row a SNP: chromosome (PLINK's number), name, position (base pairs), counted, other (alleles).
        rows: of the file, ``(N,)``.
        columns: of the file, ``(S,)``.
        flipped: ``(S,)``, where counts are 2 − the file's.
        file_shape: people and SNPs in the file.
        omissions: what was left out.

    Reference: PLINK 1.9, File format reference (cog-genomics.org/plink/1.9/formats).
    """

    path: Path
    count_A1: bool
    people: pd.DataFrame
    snps: pd.DataFrame
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    flipped: NDArray[np.bool_]
    file_shape: tuple[int, int]
    omissions: tuple[Omission, ...] = ()

    @classmethod
    def open(cls, path: PathLike, *, count_A1: bool) -> Genotypes:
        """Read ``.fam`` and ``.bim``, and check that ``.bed`` fits them.

        SNPs at a negative position are left out, as PLINK does.

        Arguments:
            path: ``DATA.bed`` or ``DATA``.
            count_A1: count the allele in column 5 of ``.bim``, PLINK's A1 (often the minor allele), as PLINK's ``--recode A`` does; else A2.

        Raises:
            UnusableInput: where a file is missing, is not what PLINK writes, or does not fit the others; where a person or SNP is there twice.
        """
        bed = plink.bed_path(path)
        people, snps = plink.read_fam(bed.with_suffix(".fam")), plink.read_bim(bed.with_suffix(".bim"))
        plink.check_bed(bed, len(people), len(snps))
        alleles = ("a1", "a2") if count_A1 else ("a2", "a1")
        snps = snps.rename(columns=dict(zip(alleles, ("counted", "other"), strict=True)))[["chromosome", "name", "position", "counted", "other"]]
        size = (len(people), len(snps))
        opened = cls(bed, count_A1, people, snps, np.arange(size[0]), np.arange(size[1]), np.zeros(size[1], dtype=bool), size)
        return opened._keeping_snps(snps["position"].to_numpy() >= 0, "at a negative position")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """People and SNPs."""
        return len(self.rows), len(self.columns)

    # Which people, which SNPs.

    def identifiers(self, by: Identity = "individual") -> tuple[str, ...]:
        """Of each person: the individual's (IID), or ``FID_IID``.

        Raises:
            UnusableInput: where two people have one.
        """
        individual = self.people["individual"]
        names = individual if by == "individual" else self.people["family"] + "_" + individual
        if names.duplicated().any():
            fault = f"has {names[names.duplicated()].iloc[0]} as {by} of several people"
            raise UnusableInput(self.path.with_suffix(".fam"), fault, "identify people by family and individual, or rename them")
        return tuple(names)

    def of_people(self, identifiers: Sequence[str], by: Identity = "individual") -> Genotypes:
        """These people, in this order. Others are not recorded as left out: ``join`` does that.

        Raises:
            UnusableInput: where one is not there.
        """
        chosen = self._found(self.identifiers(by), identifiers, "fam", "person")
        return replace(self, people=self.people.iloc[chosen].reset_index(drop=True), rows=self.rows[chosen])

    def of_snps(self, names: Sequence[str]) -> Genotypes:
        """These SNPs, in this order.

        Raises:
            UnusableInput: where one is not there.
        """
        others = self.snps["name"][~self.snps["name"].isin(list(names))]
        chosen = self.of_columns(self._found(self.snps["name"], names, "bim", "SNP"))
        return replace(chosen, omissions=(*self.omissions, *omission("SNPs", "not in the list", others)))

    def of_columns(self, columns: NDArray[np.int64]) -> Genotypes:
        """The SNPs in these places, ``(s,)``, in this order."""
        return replace(self, snps=self.snps.iloc[columns].reset_index(drop=True), columns=self.columns[columns], flipped=self.flipped[columns])

    def in_regions(self, regions: Sequence[str]) -> Genotypes:
        """SNPs in any of these: a chromosome ``"6"``, or ``"6:25000000-35000000"``, base pairs, both ends included.

        Raises:
            ValueError: where a region is neither.
            UnusableInput: where no SNP is in any.
        """
        return self._keeping_snps(self.inside(regions), f"outside {', '.join(regions)}")

    def inside(self, regions: Sequence[str]) -> NDArray[np.bool_]:
        """Which SNPs are ``in_regions``, ``(S,)``.

        Raises:
            ValueError: where a region is none.
        """
        place, position = self.snps["chromosome"].to_numpy(), self.snps["position"].to_numpy()
        inside = np.zeros(len(place), dtype=bool)
        for region in regions:
            name, start, end = _region(region)
            inside |= (place == name) & (position >= start) & (position <= end)
        return inside

    def filtered(self, *, min_frequency: float = 0.0, max_missing: float = 1.0, max_person_missing: float = 1.0) -> Genotypes:
        """Without people who lack many genotypes; then, among those kept, without SNPs that lack many, do not vary, or are rare.

        The order is PLINK's (``--mind``, ``--geno``, ``--maf``). One pass over the file, and another if people are left out.

        Arguments:
            min_frequency: of the minor allele; less is left out.
            max_missing: share of people without a genotype of the SNP; more is left out.
            max_person_missing: share of SNPs without a genotype of the person; more is left out.

        Raises:
            ValueError: where a limit is no share.
            UnusableInput: where nothing remains.
        """
        for name, limit in (("min_frequency", min_frequency), ("max_missing", max_missing), ("max_person_missing", max_person_missing)):
            if not 0.0 <= limit <= 1.0:
                raise ValueError(f"expected {name} between 0 and 1, got {limit}")
        kept = self._keeping_people(self.person_missingness.numpy() <= max_person_missing, f"more than {max_person_missing:g} of SNPs missing")
        missing, minor = kept.missingness.numpy(), kept._totals.minor_frequencies.numpy()
        reasons = {
            f"missing in more than {max_missing:g} of people": missing > max_missing,
            "no genotype of anyone": missing == 1.0,
            "monomorphic": minor == 0.0,
            f"minor-allele frequency below {min_frequency:g}": minor < min_frequency,
        }
        return kept._leaving_snps(reasons)

    # What is in the file.

    def chunks(self, coding: GenotypeCoding | None = None, *, size: int | None = None, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """All SNPs in turn, each ``(N, s)`` with s ≤ ``size``: counts, or coded.

        Arguments:
            size: SNPs at a time; by default as many as make 2²² entries.
            dtype: torch's default float type by default.

        Raises:
            ValueError: where the coding is for other SNPs or counts other alleles.
            UnusableInput: where the file can no longer be read.
        """
        for _, chunk in self._placed_chunks(coding, size, dtype):
            yield chunk

    def counts(self, dtype: torch.dtype | None = None) -> Tensor:
        """All counts, ``(N, S)``, for those that fit in memory."""
        return self._whole(None, dtype)

    def standardised(self, coding: GenotypeCoding | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """All coded, ``(N, S)``, for those that fit in memory; by their own frequencies where no coding is given."""
        return self._whole(self.coding() if coding is None else coding, dtype)

    @property
    def frequencies(self) -> Tensor:
        """p of the counted alleles among these people, ``(S,)`` float64; NaN where no one has a genotype. Every count is taken to be of two copies,
        men's X as well."""
        return self._totals.frequencies

    @property
    def missingness(self) -> Tensor:
        """Share of people without a genotype, of each SNP: ``(S,)`` float64."""
        return (len(self) - self._totals.observed) / len(self)

    @property
    def person_missingness(self) -> Tensor:
        """Share of SNPs without a genotype, of each person: ``(N,)`` float64."""
        return self._totals.person_missing / len(self.columns)

    def coding(
        self, frequencies: Tensor | None = None, *, alpha: float = -1.0, spread: Spread = "expected", missing: Missing = "mean"
    ) -> GenotypeCoding:
        """How to code these SNPs, of these people and of new ones.

        Arguments:
            frequencies: p of the counted alleles, ``(S,)``; of these people by default.
            alpha: of ``GenotypeCoding.of``.
            spread: divide by √(2p(1−p)) (``"expected"``), or by the standard deviation of these people's counts (``"observed"``).
            missing: of ``GenotypeCoding``.

        Raises:
            ValueError: where a SNP does not vary, or frequencies do not fit.
        """
        observed = self._totals.variances if spread == "observed" else None
        p = self.frequencies if frequencies is None else frequencies
        return GenotypeCoding.of(self.snps, p, observed, alpha=alpha, missing=missing)

    def grm(self, coding: GenotypeCoding | None = None, *, missing: Literal["pairwise", "mean"] = "pairwise", size: int | None = None) -> Tensor:
        """The genetic relationship matrix, ``(N, N)`` float64, in one pass that holds N² numbers, or 2N² where pairwise.

        .. math:: A_{ik} = \\sum_j z_{ij} z_{kj} \\Big/ \\sum_j v_j

        with v_j the variance of z_j: for standardised counts the mean over SNPs of the products, in the diagonal too. It expects autosomes.

        Arguments:
            coding: of z; standardised counts by these people's frequencies by default.
            missing: sums over SNPs that both people have, as GCTA does (``"pairwise"``), which need not be positive semi-definite; or over all SNPs
                with missing counts at their mean (``"mean"``), which is, and equals ``kernels.GeneticRelationship``.

        Raises:
            UnusableInput: where two people have no SNP in common.

        Reference: Yang et al., American Journal of Human Genetics 2011 (GCTA; its diagonal has another estimator).
        """
        if haploid := sorted({_NOT_DIPLOID[c] for c in self.snps["chromosome"].unique() if c in _NOT_DIPLOID}):
            warnings.warn(f"{self.path}: relationships expect autosomes, and there are SNPs on {', '.join(haploid)}", stacklevel=2)
        coding = replace(self.coding() if coding is None else coding, missing="keep")
        people = len(self)
        products = torch.zeros(people, people, dtype=torch.float64)
        weights = torch.zeros((people, people) if missing == "pairwise" else (), dtype=torch.float64)
        everyone = 0.0
        for part, chunk in self._placed_chunks(coding, size, torch.float64):
            variances, known = coding.variances[part], ~chunk.isnan()
            gaps = ~known.all(0) if missing == "pairwise" else torch.zeros_like(variances, dtype=torch.bool)
            everyone += float(variances[~gaps].sum())
            if bool(gaps.any()):
                shared = known[:, gaps].double()
                weights.addmm_(shared * variances[gaps], shared.mT)
            chunk.nan_to_num_(0.0)
            products.addmm_(chunk, chunk.mT)
        weights += everyone
        if not bool((weights > 0).all()):
            raise UnusableInput(self.path, "has people without a SNP that both have", "leave people out with max_person_missing")
        return products.div_(weights)

    # What to say of it.

    def record(self) -> dict[str, Any]:
        """As a sidecar holds it; of SNPs and people left out the counts, not the names."""
        left_out = [{key: value for key, value in each.record().items() if key != "Names"} for each in self.omissions]
        return {
            "File": str(self.path),
            "CountedAllele": "A1" if self.count_A1 else "A2",
            "PeopleInFile": self.file_shape[0],
            "SNPsInFile": self.file_shape[1],
            "People": len(self.rows),
            "SNPs": len(self.columns),
            "Flipped": int(self.flipped.sum()),
            "LeftOut": left_out,
        }

    def summary(self) -> str:
        """One line."""
        return f"{self.path}: {len(self.rows)} people and {len(self.columns)} SNPs; {summary(self.omissions)}"

    @cached_property
    def _totals(self) -> _Totals:
        # Filled in place: small tensors made between large ones and kept would hold the large ones' memory.
        people, snps = self.shape
        observed, sums, squares = torch.zeros(3, snps, dtype=torch.float64)
        totals = _Totals(observed, sums, squares, torch.zeros(people, dtype=torch.float64))
        for part, counts in self._placed_chunks(None, dtype=torch.float64):
            missing = counts.isnan()
            totals.person_missing.add_(missing.sum(1))
            totals.observed[part] = people - missing.sum(0).double()
            counts.nan_to_num_(0.0)
            totals.sums[part] = counts.sum(0)
            totals.squares[part] = counts.square_().sum(0)
        return totals

    def _whole(self, coding: GenotypeCoding | None, dtype: torch.dtype | None) -> Tensor:
        out = torch.empty(self.shape, dtype=dtype)
        for part, chunk in self._placed_chunks(coding, dtype=dtype):
            out[:, part] = chunk
        return out

    def _placed_chunks(
        self, coding: GenotypeCoding | None, size: int | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        if coding is not None:
            coding.check(self.snps)
        size = max(1, _CHUNK_ENTRIES // max(1, len(self))) if size is None else size
        dtype = torch.get_default_dtype() if dtype is None else dtype
        for start in range(0, len(self.columns), size):
            part = slice(start, min(start + size, len(self.columns)))
            counts = self._read(part, dtype)
            yield part, counts if coding is None else coding(counts, start)

    def _read(self, part: slice, dtype: torch.dtype) -> Tensor:
        # The format was checked when it was opened; with both sizes known bed-reader opens no other file.
        people, snps = self.file_shape
        bed = open_bed(
            self.path, iid_count=people, sid_count=snps, count_A1=self.count_A1, num_threads=torch.get_num_threads(), skip_format_check=True
        )
        try:
            counts = bed.read((self.rows, self.columns[part]), dtype="int8")
        except (OSError, ValueError) as error:
            raise UnusableInput(self.path, f"cannot be read: {error}", "check the disk and the path") from error
        raw, flipped = torch.from_numpy(counts), torch.from_numpy(self.flipped[part])
        values = raw.to(dtype).masked_fill_(raw < 0, float("nan"))
        values[:, flipped] = 2 - values[:, flipped]
        return values

    def _found(self, known: Sequence[str] | pd.Series, wanted: Sequence[str], suffix: str, what: str) -> NDArray[np.int64]:
        rows = pd.Index(known).get_indexer(pd.Index(list(wanted), dtype=object))
        if (rows < 0).any():
            fault = f"has no {what} {wanted[int((rows < 0).argmax())]} ({int((rows < 0).sum())} such)"
            raise UnusableInput(self.path.with_suffix(f".{suffix}"), fault, "ask for those that it has")
        return rows.astype(np.int64)

    def _keeping_snps(self, kept: NDArray[np.bool_], reason: str) -> Genotypes:
        return self._leaving_snps({reason: ~kept})

    def _leaving_snps(self, reasons: dict[str, NDArray[np.bool_]]) -> Genotypes:
        """A SNP with several reasons is recorded under the first."""
        left, omissions = np.zeros(len(self.columns), dtype=bool), self.omissions
        for reason, out in reasons.items():
            omissions += omission("SNPs", reason, self.snps["name"][out & ~left])
            left |= out
        if left.all():
            raise UnusableInput(self.path, f"has no SNPs left ({summary(omissions)})", "choose others, or milder limits")
        return replace(self.of_columns(np.flatnonzero(~left)), omissions=omissions) if left.any() else self

    def _keeping_people(self, kept: NDArray[np.bool_], reason: str) -> Genotypes:
        if kept.all():
            return self
        names = (self.people["family"] + " " + self.people["individual"])[~kept]
        omissions = (*self.omissions, *omission("people", reason, names))
        if not kept.any():
            raise UnusableInput(self.path, f"has no people left ({summary(omissions)})", "choose milder limits")
        return replace(self, people=self.people[kept].reset_index(drop=True), rows=self.rows[kept], omissions=omissions)


@dataclass(frozen=True)
class _Totals:
    """Of one pass: how many people have each SNP, the sums of their counts and of the squares, ``(S,)``; SNPs missing in each person ``(N,)``."""

    observed: Tensor
    sums: Tensor
    squares: Tensor
    person_missing: Tensor

    @property
    def frequencies(self) -> Tensor:
        return self.sums / self.observed / 2

    @property
    def minor_frequencies(self) -> Tensor:
        # From whole numbers, so that a frequency at a limit is not rounded to the other side of it.
        return torch.minimum(self.sums, 2 * self.observed - self.sums) / (2 * self.observed)

    @property
    def variances(self) -> Tensor:
        return self.squares / self.observed - (self.sums / self.observed) ** 2


def _region(text: str) -> tuple[str, int, float]:
    """Chromosome, first and last base pair."""
    name, colon, span = text.partition(":")
    start, dash, end = span.replace(",", "").partition("-")
    if not name or (colon and not (dash and start.isdigit() and end.isdigit() and int(start) <= int(end))):
        raise ValueError(f"expected a region such as 6 or 6:25000000-35000000, got {text!r}")
    return plink.chromosome(name), int(start or 0), int(end) if colon else np.inf
