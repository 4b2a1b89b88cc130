"""Simulated cohorts: people of different ages, scanned several times while their brains shrink at known
rates, which may depend on their genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from probmed.atlases import LabelAtlas, default_atlas
from probmed.simulation.anatomies import Anatomy, AtrophyFlow, atrophy_flow
from probmed.simulation.contrasts import stream
from probmed.simulation.people import SimulatedGenotypes, SimulatedPeople, simulate_people
from probmed.simulation.subjects import SimulatedSubject, scan
from probmed.transforms import Composition, Displacement, Transform, Velocity
from probmed.volumes import write_labels, write_scan

_ANATOMY_OPTIONS = (
    "deformation_mm",
    "length_mm",
    "alpha",
    "log_scale",
    "labels",
    "label_length_mm",
    "sharpness",
    "lesions",
    "lesion_radius_mm",
)


def simulate_cohort(
    n: int,
    visits: int = 1,
    atlas: LabelAtlas | None = None,
    spacing_mm: float = 2.0,
    seed: int = 0,
    *,
    interval_years: float = 1.0,
    ages: tuple[float, float] = (55.0, 85.0),
    reference_age: float = 70.0,
    atrophy_rate: float = 0.005,
    atrophy_rate_sd: float = 0.002,
    rates: Sequence[float] | None = None,
    first_ages: Sequence[float] | None = None,
    years: Sequence[Sequence[float]] | None = None,
    shrinking: AtrophyFlow | None = None,
    stripped: bool = False,
    **options: Any,
) -> tuple[list[list[SimulatedSubject]], pd.DataFrame]:
    """People of uniformly distributed ages, each with an own anatomy and an own, constant, rate of atrophy.

    .. math:: \\tau_i(a) = r_i (a - a_{ref}), \\quad r_i \\sim N(r, sd^2)

    A subject's visits are scans of one anatomy that flows along ``atrophy_flow``: the follow-up is the
    baseline deformed by a known diffeomorphism, in a new position, with new bias and noise.

    Arguments:
        n, visits: number of people, and of scans of each, ``interval_years`` apart.
        ages: range of ages at the first visit, years.
        reference_age: the age at which an anatomy is the deformed atlas, without atrophy.
        atrophy_rate, atrophy_rate_sd: mean and standard deviation of r_i, share of GM and WM lost a year.
        rates: r_i of each person, such as minus those of ``simulate_people``; drawn by default.
        first_ages: of each person, in place of ``ages``.
        years: of each person the times of the visits, the first of which is 0; ``visits`` at equal intervals by default.
        shrinking: of this atlas, where it is known: ``atrophy_flow`` takes a while.
        options: of ``simulate_subject``.

    Returns:
        Scans as ``subjects[i][visit]``, and a long table with a row a scan: subject, visit, years, age, rate,
        atrophy, seed, and the volume of each class as ``<name>_ml``.
    """
    if n < 1 or visits < 1:
        raise ValueError(f"expected at least one subject and one visit, got {n} and {visits}")
    atlas = default_atlas() if atlas is None else atlas
    atlas = atlas.stripped() if stripped else atlas
    shrinking = atrophy_flow(atlas) if shrinking is None else shrinking
    grid = atlas.grid.at_spacing(spacing_mm)
    people = stream(seed, "people")
    drawn_ages = ages[0] + (ages[1] - ages[0]) * torch.rand(n, generator=people)
    drawn = atrophy_rate + atrophy_rate_sd * torch.randn(n, generator=people)
    seeds = torch.randint(2**31, (n,), generator=people)
    body = {name: options.pop(name) for name in _ANATOMY_OPTIONS if name in options}

    subjects, rows = [], []
    own_rates = drawn.tolist() if rates is None else [float(rate) for rate in rates]
    own_ages = drawn_ages.tolist() if first_ages is None else [float(age) for age in first_ages]
    times = [[visit * interval_years for visit in range(visits)]] * n if years is None else years
    if not len(own_rates) == len(own_ages) == len(times) == n:
        raise ValueError(f"expected rates, ages and years of {n} people, got {len(own_rates)}, {len(own_ages)}, {len(times)}")
    for i, (age, rate, own) in enumerate(zip(own_ages, own_rates, seeds.tolist(), strict=True)):
        anatomy, scans = Anatomy(atlas, own, **body), []
        for visit, since in enumerate(times[i]):
            atrophy = rate * (age + since - reference_age)
            scans.append(scan(anatomy, grid, atrophy=atrophy, shrinking=shrinking, session=visit, **options))
            row = {"subject": f"sub-{i + 1:03d}", "visit": visit + 1, "years": since, "age": age + since}
            row |= {"rate": rate, "atrophy": atrophy, "seed": own}
            rows.append(row | {f"{name}_ml": ml for name, ml in scans[-1].volumes_ml.items()})
        subjects.append(scans)
    return subjects, pd.DataFrame(rows)


@dataclass(frozen=True, eq=False)
class GeneticCohort:
    """Scans of people whose genes, covariates and rates of atrophy are known.

    Arguments:
        people: theirs; ``rates`` are yearly changes of the log of GM and WM, negative where they shrink.
        scans: ``scans[i][visit]``.
        table: that of ``simulate_cohort``, with the people's names, sex and education.
        flow: along which all bodies shrink, in the atlas.
    """

    people: SimulatedPeople
    scans: list[list[SimulatedSubject]]
    table: pd.DataFrame
    flow: AtrophyFlow

    def deformation(self, person: int, visit: int) -> Transform:
        """Where a visit's points come from in the baseline scan, mm: what a registration of the baseline to the visit ought to find; the head's
        position is in it."""
        first, later = (self.scans[person][place].transform for place in (0, visit))
        parts = first.transforms if isinstance(first, Composition) else (first,)
        back = [(part.with_exact_inverse() if isinstance(part, Displacement) else part).inverse() for part in reversed(parts)]
        return Composition((*back, later))

    def velocity(self, person: int, visit: int) -> Velocity:
        """The logarithm of that change in the atlas, without position: ``exp`` of it carries points of the visit to the baseline's.

        With A a person's anatomy and F_a the flow to atrophy a, scans are T ∘ F_a ∘ A, so that the change is A⁻¹ ∘ F_{a_0}⁻¹ ∘ F_{a_t} ∘ A.
        """
        first, later = (self.flow.time(self.scans[person][place].atrophy) for place in (0, visit))
        return Velocity(self.flow.velocity.grid, (later - first) * self.flow.velocity.field)

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Scans, label maps, a table of visits with paths, and genotypes, as files.

        Returns:
            The table ``visits.tsv`` (subject, time in years, age, sex, education, scan, labels) and
            ``cohort.bed``.
        """
        rows = []
        for row in self.table.to_dict("records"):
            name, visit = row["subject"], row["visit"]
            subject = self.scans[self._place(name)][visit - 1]
            scan_file, labels_file = (f"{name}_ses-{visit}_{what}.nii.gz" for what in ("T1w", "dseg"))
            write_scan(folder / scan_file, subject.image.data, subject.image)
            write_labels(folder / labels_file, subject.labels.data, subject.labels)
            known = {column: row[column] for column in ("subject", "age", "sex", "education")}
            rows.append({**known, "time": row["years"], "scan": scan_file, "labels": labels_file})
        table, genotypes = folder / "visits.tsv", folder / "cohort.bed"
        pd.DataFrame(rows).to_csv(table, sep="\t", index=False)
        self.people.genotypes.write(genotypes, list(self.people.table["subject"]))
        return table, genotypes

    def _place(self, name: str) -> int:
        return list(self.people.table["subject"]).index(name)


def simulate_genetic_cohort(
    n: int,
    visits: int = 2,
    atlas: LabelAtlas | None = None,
    spacing_mm: float = 2.0,
    seed: int = 0,
    *,
    mean_rate: float = -0.01,
    rate_sd: float = 0.005,
    heritability: float = 0.5,
    clinical: float = 0.2,
    causal: int = 100,
    snps: int = 1000,
    genotypes: SimulatedGenotypes | None = None,
    **options: Any,
) -> GeneticCohort:
    """From genotypes and covariates to rates of atrophy to scans: ``simulate_people``, then
    ``simulate_cohort`` at their ages.

    Arguments:
        n, visits: number of people, and of scans of each.
        mean_rate, rate_sd, heritability, clinical, causal: of ``simulate_people``.
        snps: number of variants. genotypes: of n people, in place of simulated ones, such as ``SimulatedGenotypes.read`` has.
        options: of ``simulate_cohort``.
    """
    atlas = default_atlas() if atlas is None else atlas
    flow = atrophy_flow(atlas.stripped() if options.get("stripped") else atlas)
    people = simulate_people(
        n,
        seed,
        mean_rate=mean_rate,
        rate_sd=rate_sd,
        heritability=heritability,
        clinical=clinical,
        causal=causal,
        genotypes=genotypes,
        snps=snps,
    )
    rates, ages = (-people.rates).tolist(), people.table["age"].tolist()
    scans, table = simulate_cohort(n, visits, atlas, spacing_mm, seed, rates=rates, first_ages=ages, shrinking=flow, **options)
    place = table["subject"].factorize()[0]
    own = people.table.iloc[place].reset_index(drop=True)
    return GeneticCohort(people, scans, table.assign(subject=own["subject"], sex=own["sex"], education=own["education"]), flow)
