"""Simulated scans, subjects and cohorts whose truth is known.

`simulate_subject` draws one anatomy from an atlas and images it; `simulate_cohort` draws people who age;
`degraded` makes a given scan harder. Everything is seeded, and every quantity that a model has to find is
kept beside the scan.
"""

from __future__ import annotations

from probmed.simulation.anatomies import Anatomy, AtrophyFlow, Lesions, atrophy_flow
from probmed.simulation.cohorts import simulate_cohort
from probmed.simulation.contrasts import CONTRASTS, Appearance, degraded
from probmed.simulation.subjects import SimulatedSubject, scan, simulate_subject

__all__ = [
    "CONTRASTS",
    "Anatomy",
    "Appearance",
    "AtrophyFlow",
    "Lesions",
    "SimulatedSubject",
    "atrophy_flow",
    "degraded",
    "scan",
    "simulate_cohort",
    "simulate_subject",
]
