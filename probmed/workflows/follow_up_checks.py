"""How well runs of whole scans predict: the last visit of each person who was seen again more than once, from all visits but these.

Components, networks and basis are those of all visits; what is conditioned on is not.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import pandas as pd
import torch
from scipy.stats import norm
from torch import Tensor

from probmed.grids import sample
from probmed.inference.reml import Prediction, at_components
from probmed.models.gp_prior_vae import Cohort, pad_visits
from probmed.tables import Genotypes, Joined, Visits
from probmed.volumes import Volume, read_scan
from probmed.workflows.growth import Forecast, Growth, GrowthSettings, Registrations, forecast, forecast_from, within_person
from probmed.workflows.growth_outputs import body_of
from probmed.workflows.longitudinal import RateResult, cohort_of, reference_people
from probmed.workflows.rate_checks import LATER, calibration, held_back, rest
from probmed.workflows.registration import places
from probmed.workflows.shape_codes import ShapeCodes, described, draw_codes

DRAWS = 200


@dataclass(frozen=True)
class Foretold:
    """A follow-up scan beside its prediction; images on the baseline's voxels.

    Arguments:
        observed: the follow-up after the rigid part of its registration, ``(*shape)``.
    """

    subject: str
    forecast: Forecast
    observed: Tensor


def leading(growth: Growth) -> RateResult:
    """The first coefficient, which is most of what changes, as a scalar that is 0 at baseline."""
    data, fit = growth.fits[0].data, growth.fits[0]
    alone = replace(data, change=data.columns[:, 0])
    return replace(
        growth.rates,
        fit=at_components(alone, fit.variances * fit.scales[0]),
        baseline=torch.zeros(len(growth.rates.joined.subjects), dtype=torch.float64),
    )


def foretold_growth(growth: Growth, registrations: Registrations) -> Foretold | None:
    """Of the person whose last visit is latest; None where nobody was seen again more than once."""
    joined, visits = growth.rates.joined, growth.fits[0].data.visits
    last = held_back(growth.rates)
    if not bool(last.any()):
        return None
    row = int(visits.delta.where(last, torch.zeros_like(visits.delta)).argmax())
    person, years = int(visits.subject[row]), float(visits.delta[row])
    found = [rest(fit, last).rates(torch.tensor([person])) for fit in growth.fits]
    rate = Prediction(torch.cat([each.mean[0] for each in found]), torch.cat([each.sd[0] for each in found]))
    subject = joined.subjects[person]
    body = body_of(joined.visits, subject, growth.settings, growth.atlas, registrations)
    told = forecast(body, growth.basis, rate, years, draws=DRAWS)
    return Foretold(subject, told, _observed(joined.visits, subject, years, growth.settings, body.scan, registrations))


@torch.no_grad()
def held_out_codes(
    codes: ShapeCodes, registrations: Registrations, genotypes: Genotypes | None = None, seed: int = 0
) -> tuple[pd.DataFrame, Foretold] | None:
    """Predictions of the first coefficient at last visits, mm, as ``rate_checks.held_out`` has them, and the latest of them as a scan.

    None where nobody was seen again more than once.
    """
    growth = codes.settings.growth
    joined = cohort_of(codes.visits, growth.rates, genotypes)
    cohort, _ = described(joined, codes.settings, reference_people(joined, None), codes.time_scale)
    found = _last_visits(codes, joined, cohort, seed)
    if found is None:
        return None
    table, decoded = found
    latest = int(table["years"].argmax())
    subject, time = str(table["subject"][latest]), float(table["years"][latest])
    body = body_of(joined.visits, subject, growth, codes.atlas, registrations)
    told = forecast_from(body, codes.basis, decoded[:, latest].mean(0) / time, decoded[:, latest] / time, time)
    return table, Foretold(subject, told, _observed(joined.visits, subject, time, growth, body.scan, registrations))


@torch.no_grad()
def code_ablation(codes: ShapeCodes, genotypes: Genotypes | None = None, seed: int = 0) -> pd.DataFrame:
    """A row for all components of the codes' prior and one without each: ``rate_checks.calibration`` of last visits.

    The networks stay as they were trained with all, and a component's share goes to the others and to noise, in their proportions. There is no row
    where nobody was seen again more than once.
    """
    joined = cohort_of(codes.visits, codes.settings.growth.rates, genotypes)
    cohort, _ = described(joined, codes.settings, reference_people(joined, None), codes.time_scale)
    tables = []
    for k, name in enumerate([None, *codes.names, "own"]):
        model = deepcopy(codes.model)
        if name is not None:
            model.prior.logits[:, k - 1] = -torch.inf
        found = _last_visits(replace(codes, model=model), joined, cohort, seed)
        if found is None:
            return calibration(pd.DataFrame(columns=["task"])).assign(kernels=[])
        tables.append(calibration(found[0]).assign(kernels="all" if name is None else f"without {name}"))
    return pd.concat(tables, ignore_index=True)


def _last_visits(codes: ShapeCodes, joined: Joined, cohort: Cohort, seed: int) -> tuple[pd.DataFrame, Tensor] | None:
    """The table of ``held_out_codes`` and the coefficients that are drawn for its rows, ``(draws, rows, J)`` mm."""
    images = pad_visits(joined.visits.person, codes.coefficients)
    years = pad_visits(joined.visits.person, joined.visits.years_since_baseline).nan_to_num(0.0)
    seen = cohort.present & ~images.isnan().all(-1)
    last = _last_of_several(seen, years)
    people, places = last.nonzero(as_tuple=True)
    if not len(people):
        return None
    drawn = draw_codes(codes, cohort, images.masked_fill(last[..., None], torch.nan), DRAWS, seed)
    decoded = codes.scale * codes.model.decoder(drawn[:, people, places])
    noise = codes.scale * codes.noise[0]
    mean, sd = decoded[..., 0].mean(0), (decoded[..., 0].var(0) + noise**2).sqrt()
    observed = codes.scale * images[people, places, 0]
    table = pd.DataFrame(
        {
            "task": LATER,
            "subject": [joined.subjects[int(person)] for person in people],
            "years": years[people, places].tolist(),
            "baseline": 0.0,
            "observed": observed.tolist(),
            "mean": mean.tolist(),
            "sd": sd.tolist(),
            "quantile": norm.cdf(((observed - mean) / sd).numpy()).tolist(),
        }
    )
    return table, decoded


def _last_of_several(seen: Tensor, years: Tensor) -> Tensor:
    """Of ``(P, T)``, of people with two or more."""
    latest = years.masked_fill(~seen, -torch.inf).argmax(1)
    last = torch.zeros_like(seen)
    last[torch.arange(len(seen)), latest] = seen.sum(1) > 1
    return last


def _observed(visits: Visits, subject: str, years: float, settings: GrowthSettings, baseline: Volume, registrations: Registrations) -> Tensor:
    """The scan that was made then, on the baseline's voxels."""
    apart = (visits.years_since_baseline - years).abs().where(torch.tensor((visits.table["subject"] == subject).to_numpy()), torch.inf)
    scan = read_scan(visits.table[settings.rates.scalar].iloc[int(apart.argmin())])
    rigid = registrations(scan, baseline, within_person(settings, baseline.grid.ndim)).affine
    return sample(scan.data[None], scan.grid, places(rigid, baseline.grid), fill="edge")[0]
