"""Simulated people: linkage, structure, shares and rates are what was asked for."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from bed_reader import to_bed

from probmed.simulation import SimulatedGenotypes, simulate_cohort, simulate_genotypes, simulate_people, simulate_visits
from probmed.tables import Genotypes, Visits
from probmed.workflows.longitudinal import RateSettings, fit_rates


def test_variants_have_their_frequencies_and_are_linked_within_blocks_alone() -> None:
    found = simulate_genotypes(4000, 60, seed=1, block=20, linkage=0.9)
    p = found.counts.mean(0) / 2
    # Binomial of 8000 haplotypes.
    assert float((p - found.frequencies[0]).abs().max()) < 5 * 0.5 / math.sqrt(8000)
    correlation = torch.corrcoef(found.counts.T)
    same = found.block[:-1] == found.block[1:]
    neighbours = correlation.diagonal(1)
    assert float(neighbours[same].min()) > 0.25
    assert float(neighbours[~same].abs().max()) < 5 / math.sqrt(4000)
    # Hardy and Weinberg: the variance of a count is 2p(1−p).
    assert float((found.counts.var(0) / (2 * p * (1 - p)) - 1).abs().max()) < 0.12


def test_populations_differ_by_what_was_asked_for() -> None:
    found = simulate_genotypes(10, 20_000, seed=2, populations=2, differentiation=0.1, linkage=0.0, frequencies=(0.2, 0.5))
    p = found.frequencies
    difference, mean = p[0] - p[1], p.mean(0)
    # E (p1 − p2)² = 2 F p(1−p) of the ancestral p; that of the two populations' mean is less by F/2.
    fst = float(difference.square().mean() / (2 * (mean * (1 - mean)).mean() / (1 - 0.1 / 2)))
    assert fst == pytest.approx(0.1, rel=0.05)
    assert torch.bincount(found.population).tolist() == [5, 5]


def test_rates_are_sums_of_parts_with_the_stated_shares() -> None:
    people = simulate_people(80, seed=3, heritability=0.4, clinical=0.3, rate_sd=0.02, mean_rate=-0.1, snps=200, causal=30)
    total = people.rates.var(correction=0)
    assert float(total) == pytest.approx(0.02**2)
    assert float(people.rates.mean()) == pytest.approx(-0.1)
    for name, share in (("genetics", 0.4), ("clinical", 0.3), ("own", 0.3)):
        assert float(people.parts[name].var(correction=0) / total) == pytest.approx(share)
    standardised = people.genotypes.standardised()[:, people.causal] @ people.effects
    torch.testing.assert_close(standardised - standardised.mean(), people.parts["genetics"])
    again = simulate_people(80, seed=3, heritability=0.4, clinical=0.3, rate_sd=0.02, mean_rate=-0.1, snps=200, causal=30)
    assert torch.equal(again.rates, people.rates)
    without = simulate_people(80, seed=3, heritability=0.0, clinical=0.0, snps=200, causal=30)
    assert float(without.parts["genetics"].abs().max()) == 0


@pytest.mark.slow
def test_shares_are_found_again_from_files(tmp_path: Path) -> None:
    people = simulate_people(400, seed=4, heritability=0.6, clinical=0.2, snps=400, causal=50)
    simulate_visits(people, seed=4, noise_sd=0.01).to_csv(tmp_path / "visits.tsv", sep="\t", index=False)
    people.genotypes.write(tmp_path / "cohort.bed", list(people.table["subject"]))
    genotypes = Genotypes.open(tmp_path / "cohort.bed", count_A1=True)
    assert torch.equal(genotypes.counts().double(), people.genotypes.counts)
    visits = Visits.read(tmp_path / "visits.tsv", time_unit="years", scalars=["value"], covariates=["age", "education"], categorical=["sex"])
    result = fit_rates(visits, RateSettings("value", clinical=("age", "education")), genotypes)
    table = result.component_table().set_index("component")
    for name, truth in (("genetics", 0.6), ("clinical", 0.2), ("own", 0.2)):
        # The clinical kernel's variance is that of the process, not of this sample.
        assert table["share_low"][name] - 0.1 <= truth <= table["share_high"][name] + 0.1
    effects = torch.tensor(result.rate_table()["genetics"].to_numpy())
    assert float(torch.corrcoef(torch.stack([effects, people.parts["genetics"]]))[0, 1]) > 0.6


@pytest.mark.slow
def test_scans_shrink_at_the_given_rates_and_times() -> None:
    years = [[0.0, 1.7], [0.0, 0.4, 3.0]]
    scans, table = simulate_cohort(2, spacing_mm=6.0, rates=[0.0, 0.03], years=years, ages=(70.0, 70.0), deformation_mm=1.0)
    assert [len(each) for each in scans] == [2, 3]
    assert table["years"].tolist() == [0.0, 1.7, 0.0, 0.4, 3.0]
    assert table["atrophy"].tolist() == pytest.approx([0.0, 0.0, 0.0, 0.012, 0.09])
    brain = table["GM_ml"] + table["WM_ml"]
    assert brain[4] / brain[2] == pytest.approx(math.exp(-0.09), rel=0.02)
    with pytest.raises(ValueError, match="2 people"):
        simulate_cohort(2, rates=[0.1])


def test_requests_that_make_no_people_are_refused() -> None:
    with pytest.raises(ValueError, match="linkage"):
        simulate_genotypes(5, linkage=1.0)
    with pytest.raises(ValueError, match="positive"):
        simulate_genotypes(0)
    with pytest.raises(ValueError, match="shares"):
        simulate_people(10, heritability=0.8, clinical=0.5)
    with pytest.raises(ValueError, match="5 people"):
        simulate_people(3)
    with pytest.raises(ValueError, match="genotypes of 10"):
        simulate_people(10, genotypes=simulate_genotypes(6, 20))


def test_a_user_s_own_genotypes_have_their_populations_found(tmp_path: Path) -> None:
    truth = simulate_genotypes(90, 600, seed=5, populations=3, differentiation=0.1, linkage=0.0, frequencies=(0.2, 0.5))
    counts = truth.counts.numpy().copy()
    rng = np.random.default_rng(0)
    missing = rng.random(counts.shape) < 0.02
    counts[missing] = np.nan
    counts[:, 7] = 2.0
    names = [f"p{n:02d}" for n in range(90)]
    chromosomes = ["1"] * 350 + ["2"] * 250
    properties = {"iid": names, "fid": names, "sid": [f"rs{j}" for j in range(600)], "chromosome": chromosomes, "bp_position": list(range(1, 601))}
    to_bed(tmp_path / "own.bed", counts, properties=properties)
    found = SimulatedGenotypes.read(tmp_path / "own.bed", seed=1, populations=3, block=100)
    # One SNP does not vary; what is known is as it was, and what is missing is a count.
    assert found.counts.shape == (90, 599) and found.snps is not None
    kept = np.delete(np.arange(600), 7)
    known = torch.tensor(~missing[:, kept])
    assert torch.equal(found.counts[known], truth.counts[:, kept][known])
    assert set(found.counts.unique().tolist()) == {0.0, 1.0, 2.0}
    filled, p = found.counts[~known], (found.counts.mean(0) / 2).expand(90, -1)[~known]
    assert float(filled.mean() - 2 * p.mean()) == pytest.approx(0.0, abs=4 * math.sqrt(0.5 / len(filled)))
    # Clusters are the populations, under other numbers.
    pairs = {(int(a), int(b)) for a, b in zip(found.population, truth.population, strict=True)}
    assert len(pairs) == 3
    for each, theirs in pairs:
        torch.testing.assert_close(found.frequencies[each], found.counts[truth.population == theirs].mean(0) / 2)
    assert torch.bincount(found.block).tolist() == [100, 100, 100, 49, 100, 100, 50]
    people = simulate_people(90, genotypes=found, causal=20)
    people.genotypes.write(tmp_path / "again.bed", list(people.table["subject"]))
    again = Genotypes.open(tmp_path / "again.bed", count_A1=True)
    assert list(again.snps["name"]) == list(found.snps["name"]) and set(again.snps["chromosome"]) == {"1", "2"}
    assert torch.equal(again.counts().double(), found.counts)
    assert SimulatedGenotypes.read(tmp_path / "own.bed").frequencies.shape == (1, 599)
    with pytest.raises(ValueError, match="populations"):
        SimulatedGenotypes.read(tmp_path / "own.bed", populations=91)
