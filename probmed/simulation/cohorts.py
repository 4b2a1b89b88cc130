"""Simulated cohorts: people of different ages, scanned several times while their brains shrink at known
rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from probmed.atlases import LabelAtlas, default_atlas
from probmed.simulation.anatomies import Anatomy, atrophy_flow
from probmed.simulation.contrasts import stream
from probmed.simulation.subjects import SimulatedSubject, scan

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
    years: Sequence[Sequence[float]] | None = None,
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
        years: of each person the times of the visits, the first of which is 0; ``visits`` at equal intervals by default.
        options: of ``simulate_subject``.

    Returns:
        Scans as ``subjects[i][visit]``, and a long table with a row a scan: subject, visit, years, age, rate,
        atrophy, seed, and the volume of each class as ``<name>_ml``.
    """
    if n < 1 or visits < 1:
        raise ValueError(f"expected at least one subject and one visit, got {n} and {visits}")
    atlas = default_atlas() if atlas is None else atlas
    atlas = atlas.stripped() if stripped else atlas
    shrinking, grid = atrophy_flow(atlas), atlas.grid.at_spacing(spacing_mm)
    people = stream(seed, "people")
    first_ages = ages[0] + (ages[1] - ages[0]) * torch.rand(n, generator=people)
    drawn = atrophy_rate + atrophy_rate_sd * torch.randn(n, generator=people)
    seeds = torch.randint(2**31, (n,), generator=people)
    body = {name: options.pop(name) for name in _ANATOMY_OPTIONS if name in options}

    subjects, rows = [], []
    own_rates = drawn.tolist() if rates is None else [float(rate) for rate in rates]
    times = [[visit * interval_years for visit in range(visits)]] * n if years is None else years
    if len(own_rates) != n or len(times) != n:
        raise ValueError(f"expected rates and years of {n} people, got {len(own_rates)} and {len(times)}")
    for i, (age, rate, own) in enumerate(zip(first_ages.tolist(), own_rates, seeds.tolist(), strict=True)):
        anatomy, scans = Anatomy(atlas, own, **body), []
        for visit, since in enumerate(times[i]):
            atrophy = rate * (age + since - reference_age)
            scans.append(scan(anatomy, grid, atrophy=atrophy, shrinking=shrinking, session=visit, **options))
            row = {"subject": f"sub-{i + 1:03d}", "visit": visit + 1, "years": since, "age": age + since}
            row |= {"rate": rate, "atrophy": atrophy, "seed": own}
            rows.append(row | {f"{name}_ml": ml for name, ml in scans[-1].volumes_ml.items()})
        subjects.append(scans)
    return subjects, pd.DataFrame(rows)
