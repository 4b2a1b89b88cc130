"""Simulated scans, subjects and cohorts whose truth is known.

`simulate_subject` draws one anatomy from an atlas and images it; `simulate_cohort` draws people who age;
`simulate_people` gives people genes, covariates and rates of change, `simulate_visits` measures them,
`simulate_genetic_cohort` scans them; `degraded` makes a given scan harder. Everything is seeded, and every
quantity that a model has to find is kept beside it.
"""

from __future__ import annotations

from probmed.simulation.anatomies import Anatomy, AtrophyFlow, Lesions, atrophy_flow
from probmed.simulation.cohorts import GeneticCohort, simulate_cohort, simulate_genetic_cohort
from probmed.simulation.contrasts import CONTRASTS, Appearance, degraded
from probmed.simulation.people import SimulatedGenotypes, SimulatedPeople, simulate_genotypes, simulate_people, simulate_visits
from probmed.simulation.subjects import SimulatedSubject, scan, simulate_subject

__all__ = [
    "CONTRASTS",
    "Anatomy",
    "Appearance",
    "AtrophyFlow",
    "GeneticCohort",
    "Lesions",
    "SimulatedGenotypes",
    "SimulatedPeople",
    "SimulatedSubject",
    "atrophy_flow",
    "degraded",
    "scan",
    "simulate_cohort",
    "simulate_genetic_cohort",
    "simulate_genotypes",
    "simulate_people",
    "simulate_subject",
    "simulate_visits",
]
