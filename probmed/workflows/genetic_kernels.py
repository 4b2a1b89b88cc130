"""Kernels between people from genotypes on disk, a few SNPs at a time; what the classes of ``probmed.kernels`` give of all at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from probmed.kernels import GenotypeGaussian, IdentityByState
from probmed.tables import GenotypeCoding, Genotypes, SnpSet

KINDS = ("grm", "ibs", "gaussian")


def genetic_kernels(genotypes: Genotypes, reference: Sequence[str], kind: str = "grm", sets: Sequence[SnpSet] = ()) -> list[tuple[str, Tensor]]:
    """Names and matrices ``(P, P)`` float64: of all SNPs, or one of each set.

    Arguments:
        genotypes: of P people, without SNPs that do not vary among the reference people.
        reference: people by whom alleles are counted.
        kind: "grm", the genetic relationship matrix; "ibs", the share of alleles that are identical by state; "gaussian", exp(−½ mean squared
            difference of standardised counts). The latter two are not centred: of unrelated people they are about the mean share, and e⁻¹, which adds
            a level that all rates have in common.

    Raises:
        UnusableInput: where a set has no SNP.
        ValueError: for another kind.
    """
    coding = genotypes.of_people(reference).coding()
    if not sets:
        return [("genetics", relationship(genotypes, coding, kind))]
    found = []
    for each in sets:
        columns = np.flatnonzero(each.members(genotypes))
        part = genotypes.of_columns(columns)
        found.append((f"genetics {each.name}", relationship(part, coding.of_snps(list(part.snps["name"])), kind)))
    return found


def relationship(genotypes: Genotypes, coding: GenotypeCoding, kind: str) -> Tensor:
    """One kernel, ``(P, P)`` float64.

    Arguments:
        coding: of these SNPs, by whose frequencies alleles are expected.
    """
    if kind == "grm":
        return genotypes.grm(coding, missing="mean")
    if kind == "ibs":
        return _identical(genotypes, coding)
    if kind == "gaussian":
        return _gaussian(genotypes, coding)
    raise ValueError(f"expected a kind of {KINDS}, got {kind!r}")


def _parts(genotypes: Genotypes, coding: GenotypeCoding) -> Iterator[tuple[Tensor, Tensor]]:
    """Counts of some SNPs after others, and their frequencies."""
    coding.check(genotypes.snps)
    start = 0
    for counts in genotypes.chunks(dtype=torch.float64):
        yield counts, coding.frequencies[start : start + counts.shape[1]]
        start += counts.shape[1]


@torch.no_grad()
def _identical(genotypes: Genotypes, coding: GenotypeCoding) -> Tensor:
    """A mean over SNPs."""
    people, snps = genotypes.shape
    total = torch.zeros(people, people, dtype=torch.float64)
    for counts, frequencies in _parts(genotypes, coding):
        total += len(frequencies) / snps * IdentityByState(frequencies)(counts).to_dense()
    return total


@torch.no_grad()
def _gaussian(genotypes: Genotypes, coding: GenotypeCoding) -> Tensor:
    """Squared distances add up over SNPs, so kernels of parts multiply: each with the length that its share of the SNPs makes longer."""
    people, snps = genotypes.shape
    logs = torch.zeros(people, people, dtype=torch.float64)
    for counts, frequencies in _parts(genotypes, coding):
        kernel = GenotypeGaussian(frequencies).double()
        kernel.lengthscale = (snps / len(frequencies)) ** 0.5
        logs += kernel(counts).to_dense().log()
    return logs.exp()
