"""Simulated people: genotypes with linkage and population structure, clinical covariates, and rates of change that depend on both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from bed_reader import to_bed
from scipy.cluster.vq import kmeans2
from torch import Tensor

from probmed.simulation.contrasts import stream
from probmed.tables import Genotypes


@dataclass(frozen=True)
class SimulatedGenotypes:
    """Counts of the alleles A1 of P people at S variants.

    Arguments:
        counts: 0, 1 or 2, ``(P, S)`` float64.
        frequencies: of each population, ``(populations, S)``. population: of each person, ``(P,)``. block: of each variant, ``(S,)``.
        snps: of the file that they were read from, as ``Genotypes`` has them.
    """

    counts: Tensor
    frequencies: Tensor
    population: Tensor
    block: Tensor
    snps: pd.DataFrame | None = None

    @classmethod
    def read(cls, path: Path, seed: int = 0, *, populations: int = 1, block: int = 20, min_frequency: float = 0.01) -> SimulatedGenotypes:
        """The user's own, as genotypes of people who are simulated.

        Missing counts are drawn from Binomial(2, p), p the allele's frequency. Populations are clusters of people (k-means) in the leading
        principal components of the standardised counts, one less than there are populations.

        Arguments:
            path: of the ``.bed`` file, whose A1 are counted.
            block: variants in each block, of one chromosome, in the file's order.
            min_frequency: of the rarer allele; less is left out.

        Raises:
            UnusableInput: as ``Genotypes.open`` and ``filtered``.
            ValueError: for fewer than one population, or more than people.

        Reference: Patterson, Price & Reich, PLoS Genetics 2006 (population structure by principal components).
        """
        genotypes = Genotypes.open(path, count_A1=True).filtered(min_frequency=min_frequency)
        if not 1 <= populations <= len(genotypes) or block < 1:
            raise ValueError(f"expected 1 to {len(genotypes)} populations and a positive block, got {populations} and {block}")
        counts, p = genotypes.counts(torch.float64), genotypes.frequencies
        drawn = (torch.rand(2, *counts.shape, generator=stream(seed, "missing"), dtype=torch.float64) < p).sum(0).double()
        counts = torch.where(counts.isnan(), drawn, counts)
        chromosome = torch.tensor(pd.factorize(genotypes.snps["chromosome"])[0])
        within = torch.tensor(genotypes.snps.groupby("chromosome", sort=False).cumcount().to_numpy(copy=True)) // block
        _, blocks = torch.unique(torch.stack([chromosome, within], 1), dim=0, return_inverse=True)
        made = cls(counts, p[None], torch.zeros(len(counts), dtype=torch.int64), blocks, genotypes.snps)
        if populations == 1:
            return made
        left, values, _ = torch.linalg.svd(made.standardised(), full_matrices=False)
        scores = (left * values)[:, : populations - 1].numpy()
        _, found = kmeans2(scores, populations, minit="++", seed=seed)
        population = torch.tensor(found, dtype=torch.int64)
        means = torch.stack([counts[population == each].mean(0) / 2 for each in range(populations)])
        return replace(made, frequencies=means, population=population)

    def standardised(self) -> Tensor:
        """(x − 2p) / √(2p(1−p)) with p of these people, ``(P, S)``; 0 where all have the same."""
        p = self.counts.mean(0) / 2
        scale = (2 * p * (1 - p)).sqrt()
        return ((self.counts - 2 * p) / scale.clamp_min(1e-12)).masked_fill(scale == 0, 0.0)

    def write(self, path: Path, names: list[str]) -> None:
        """A PLINK ``.bed`` file with ``.bim`` and ``.fam`` beside it; blocks of simulated ones are chromosomes' parts, 10 kb between variants."""
        people, snps = self.counts.shape
        where = {"chromosome": ["1"] * snps, "bp_position": [10_000 * (j + 1) for j in range(snps)], "sid": [f"snp{j:05d}" for j in range(snps)]}
        alleles = {"allele_1": ["A"] * snps, "allele_2": ["G"] * snps}
        if self.snps is not None:
            where = {"chromosome": list(self.snps["chromosome"]), "bp_position": self.snps["position"].tolist(), "sid": list(self.snps["name"])}
            alleles = {"allele_1": list(self.snps["counted"]), "allele_2": list(self.snps["other"])}
        to_bed(path, self.counts.numpy(), properties={"iid": names, "fid": names[:people], **where, **alleles}, count_A1=True)


def simulate_genotypes(
    people: int,
    snps: int = 1000,
    seed: int = 0,
    *,
    block: int = 20,
    linkage: float = 0.8,
    populations: int = 1,
    differentiation: float = 0.05,
    frequencies: tuple[float, float] = (0.05, 0.5),
) -> SimulatedGenotypes:
    """Two haplotypes each, whose alleles are a first-order autoregression of normals within a block of linkage, cut at Φ⁻¹(p).

    .. math:: p_{kj} \\sim \\mathrm{Beta}\\left(p_j \\tfrac{1-F}{F}, (1-p_j) \\tfrac{1-F}{F}\\right), \\quad p_j \\sim U(\\text{frequencies})

    Arguments:
        block: variants in each block; linkage: correlation of the normals of neighbours in it.
        populations: of equal size, in random order. differentiation: F, Wright's F_ST.

    References: Balding & Nichols, Genetica 1995 (frequencies of populations).
    """
    if people < 1 or snps < 1 or populations < 1 or block < 1:
        raise ValueError(f"expected positive numbers of people, variants, populations and blocks, got {people}, {snps}, {populations}, {block}")
    if not 0 <= linkage < 1 or not 0 < differentiation < 1:
        raise ValueError(f"expected linkage in [0, 1) and differentiation in (0, 1), got {linkage} and {differentiation}")
    generator = stream(seed, "genotypes")
    low, high = frequencies
    ancestral = low + (high - low) * torch.rand(snps, generator=generator, dtype=torch.float64)
    if populations > 1:
        spread = (1 - differentiation) / differentiation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            own = torch.distributions.Beta(ancestral * spread, (1 - ancestral) * spread).sample((populations,)).clamp(0.01, 0.99)
    else:
        own = ancestral[None]
    population = (torch.arange(people) % populations)[torch.randperm(people, generator=generator)]
    white = torch.randn(2, people, snps, generator=generator, dtype=torch.float64)
    within = torch.arange(snps) % block
    normals = torch.empty_like(white)
    for place in range(block):
        # The same place of all blocks at once.
        columns = within == place
        before = (within == place - 1).nonzero()[: int(columns.sum()), 0]
        fresh = white[..., columns]
        normals[..., columns] = linkage * normals[..., before] + math.sqrt(1 - linkage**2) * fresh if place else fresh
    counts = (normals < torch.special.ndtri(own)[population]).sum(0).double()
    return SimulatedGenotypes(counts, own, population, torch.arange(snps) // block)


@dataclass(frozen=True)
class SimulatedPeople:
    """People whose rates of change are known.

    Arguments:
        table: a row a person: subject, age at baseline, sex, education.
        genotypes: theirs.
        causal: variants with an effect, and effects: of their standardised counts on the rate.
        rates: per year, ``(P,)``; the mean rate and the sum of ``parts``.
        parts: genetics, clinical and own, ``(P,)`` each, of mean 0, uncorrelated, whose variances have the stated shares exactly.
    """

    table: pd.DataFrame
    genotypes: SimulatedGenotypes
    causal: Tensor
    effects: Tensor
    rates: Tensor
    parts: Mapping[str, Tensor]


def simulate_people(
    people: int,
    seed: int = 0,
    *,
    mean_rate: float = -0.05,
    rate_sd: float = 0.03,
    heritability: float = 0.5,
    clinical: float = 0.2,
    causal: int = 100,
    genotypes: SimulatedGenotypes | None = None,
    **options: object,
) -> SimulatedPeople:
    """People with a rate of change of their own.

    Arguments:
        rate_sd: of the rates. heritability, clinical: shares of their variance; the rest is people's own.
        causal: number of variants with an effect, drawn from all.
        genotypes: theirs; ``simulate_genotypes`` with ``options`` by default.
    """
    if heritability < 0 or clinical < 0 or heritability + clinical > 1:
        raise ValueError(f"expected shares that sum to 1 at most, got {heritability} and {clinical}")
    if people < 5:
        raise ValueError(f"expected 5 people or more, got {people}")
    given = genotypes or simulate_genotypes(people, seed=seed, **options)  # type: ignore[arg-type]
    if len(given.counts) != people:
        raise ValueError(f"expected genotypes of {people} people, got {len(given.counts)}")
    generator = stream(seed, "people")

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    age, education = 70 + 7 * normal(people), 14 + 3 * normal(people)
    sex = torch.rand(people, generator=generator, dtype=torch.float64) < 0.5
    chosen = torch.randperm(given.counts.shape[1], generator=generator)[:causal]
    effects = normal(len(chosen))
    standardised = given.standardised()[:, chosen]
    raw = {
        "genetics": standardised @ effects,
        # Faster beyond seventy, and more in those with little education: not linear, so that a kernel has something to find.
        "clinical": -torch.nn.functional.softplus((age - 70) / 4) - 0.3 * torch.sigmoid((12 - education) / 2),
        "own": normal(people),
    }
    shares = {"genetics": heritability, "clinical": clinical, "own": 1 - heritability - clinical}
    parts: dict[str, Tensor] = {}
    scale = 1.0
    for name, value in raw.items():
        # Each less its mean and what the ones before explain, so that variances add up; those are orthogonal.
        rest = value - value.mean()
        for part in (part for part in parts.values() if bool((part != 0).any())):
            rest = rest - (rest * part).sum() / part.square().sum() * part
        factor = rate_sd * math.sqrt(shares[name]) / float(rest.std(correction=0))
        scale = factor if name == "genetics" else scale
        parts[name] = factor * rest
    names = [f"sub-{n + 1:04d}" for n in range(people)]
    sexes = ["M" if male else "F" for male in sex.tolist()]
    table = pd.DataFrame({"subject": names, "age": age.tolist(), "sex": sexes, "education": education.tolist()})
    return SimulatedPeople(table, given, chosen, scale * effects, mean_rate + torch.stack(list(parts.values())).sum(0), parts)


def simulate_visits(
    people: SimulatedPeople,
    seed: int = 0,
    *,
    baseline: float = 3.0,
    baseline_sd: float = 0.3,
    noise_sd: float = 0.03,
    most: int = 4,
    years: float = 6.0,
) -> pd.DataFrame:
    """Visits of everyone at irregular times: y_t = y_0 + rate · Δx + noise, at every visit alike.

    Arguments:
        most: greatest number of follow-ups; each person has 0 to that many, within ``years`` of the baseline.

    Returns:
        A row a visit: subject, time (years since the study began), value, and the person's columns.
    """
    generator = stream(seed, "visits")
    rows = []
    for n, person in enumerate(people.table.to_dict("records")):
        count = int(torch.randint(most + 1, (), generator=generator))
        since = torch.cat([torch.zeros(1), (0.25 + (years - 0.25) * torch.rand(count, generator=generator)).sort().values]).double()
        start, level = torch.rand(2, generator=generator).tolist()
        level = baseline + baseline_sd * float(torch.special.ndtri(torch.tensor(level).clamp(1e-6, 1 - 1e-6)))
        values = level + people.rates[n] * since + noise_sd * torch.randn(len(since), generator=generator, dtype=torch.float64)
        rows += [{**person, "time": 3 * start + t, "value": v} for t, v in zip(since.tolist(), values.tolist(), strict=True)]
    return pd.DataFrame(rows)
