"""Counts of alleles as numbers that models use: centred, scaled and weighted by the frequencies of the people that a model is fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

Spread = Literal["expected", "observed"]
Missing = Literal["mean", "keep"]


@dataclass(frozen=True, eq=False)
class GenotypeCoding:
    """z_j = (x_j − 2p_j) · scale_j, which training people and new ones share.

    Made by ``of``: with the expected spread and α = −1 it is the standardised count (x − 2p) / √(2p(1−p)).

    Arguments:
        snps: the SNPs that it is for, columns name, chromosome, position, counted and other.
        frequencies: p, ``(S,)`` float64, of the counted alleles.
        scale: ``(S,)``.
        variances: of z_j, ``(S,)``: 1 for standardised counts.
        alpha, spread: what ``scale`` was made of: see ``of``.
        missing: a missing count becomes 0, the standardised mean (``"mean"``), or stays NaN (``"keep"``).
    """

    snps: pd.DataFrame
    frequencies: Tensor
    scale: Tensor
    variances: Tensor
    alpha: float
    spread: Spread
    missing: Missing

    @classmethod
    def of(
        cls,
        snps: pd.DataFrame,
        frequencies: Tensor,
        observed_variances: Tensor | None = None,
        *,
        alpha: float = -1.0,
        missing: Missing = "mean",
    ) -> GenotypeCoding:
        """scale_j = [2p_j(1−p_j)]^{α/2}, so that effects of variance [2p_j(1−p_j)]^α on x are effects of one variance on z.

        Arguments:
            observed_variances: s²_j of the counts, ``(S,)``, to use in place of Hardy and Weinberg's 2p_j(1−p_j).
            alpha: −1 standardises; 0 only centres.

        Raises:
            ValueError: where frequencies do not fit the SNPs, or a SNP does not vary.

        References: Yang et al., American Journal of Human Genetics 2011 (α = −1); Speed et al., same journal, 2012 (other α).
        """
        if frequencies.shape != (len(snps),):
            raise ValueError(f"expected a frequency for each of {len(snps)} SNPs, got {tuple(frequencies.shape)}")
        frequencies = frequencies.double()
        variances = 2 * frequencies * (1 - frequencies) if observed_variances is None else observed_variances.double()
        constant = ~((frequencies > 0) & (frequencies < 1) & (variances > 0))
        if bool(constant.any()):
            names = snps["name"][constant.numpy()]
            raise ValueError(f"expected SNPs that vary, got {len(names)} that do not, such as {names.iloc[0]}: leave them out with filtered()")
        spread: Spread = "expected" if observed_variances is None else "observed"
        return cls(snps, frequencies, variances ** (alpha / 2), variances ** (alpha + 1), alpha, spread, missing)

    def __call__(self, counts: Tensor, start: int = 0) -> Tensor:
        """``(N, s)`` counts, NaN where missing, of the SNPs from ``start`` on."""
        part = slice(start, start + counts.shape[-1])
        coded = (counts - 2 * self.frequencies[part].to(counts)) * self.scale[part].to(counts)
        return coded.nan_to_num(0.0) if self.missing == "mean" else coded

    def of_snps(self, names: Sequence[str]) -> GenotypeCoding:
        """The same for some of the SNPs, in this order, such as those that new people's file has as well.

        Raises:
            ValueError: where it has no such SNP.
        """
        rows = pd.Index(self.snps["name"]).get_indexer(pd.Index(names))
        if (rows < 0).any():
            raise ValueError(f"expected SNPs of this coding, got {int((rows < 0).sum())} others, such as {names[int((rows < 0).argmax())]}")
        chosen = torch.from_numpy(rows)
        parts = {name: getattr(self, name)[chosen] for name in ("frequencies", "scale", "variances")}
        return replace(self, snps=self.snps.iloc[rows].reset_index(drop=True), **parts)

    def record(self) -> dict[str, Any]:
        """As a sidecar holds it, without the frequencies."""
        return {"SNPs": len(self.snps), "Alpha": self.alpha, "Spread": self.spread, "Missing": self.missing}

    def check(self, snps: pd.DataFrame) -> None:
        """Raises ValueError where these are not the SNPs of this coding in its order, or another allele is counted."""
        if snps["name"].tolist() != self.snps["name"].tolist():
            remedy = "use aligned() and the coding's of_snps()"
            raise ValueError(f"expected the {len(self.snps)} SNPs of the coding, in its order, got {len(snps)} or another order: {remedy}")
        other = snps["counted"].to_numpy() != self.snps["counted"].to_numpy()
        if other.any():
            name = snps["name"][int(other.argmax())]
            raise ValueError(f"expected counts of the coding's alleles, got others for {int(other.sum())} SNPs, such as {name}: use aligned()")
