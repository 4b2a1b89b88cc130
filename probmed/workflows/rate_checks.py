"""How well rates of change predict: visits that are held out, for all kernels and without each.

The components are those of all visits; what is conditioned on is not. With tens of people that flatters little, with a handful much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pandas as pd
import torch
from scipy.stats import norm
from torch import Tensor

from probmed.inference.reml import ChangeFit, Prediction, at_components, fit_components
from probmed.metrics import normal_crps
from probmed.slopes import FollowUps
from probmed.workflows.longitudinal import RateResult

FOLDS = 10
LEVELS = (0.5, 0.8, 0.9, 0.95)
LATER, _NEW = "a later visit", "a new person"
_COLUMNS = ("task", "subject", "years", "baseline", "observed", "mean", "sd", "quantile")
_UNTOLD = 1e-6  # of a row of covariates, that no sum of others' rows makes


def held_out(result: RateResult, fit: ChangeFit | None = None) -> pd.DataFrame:
    """A row for each visit that is predicted: subject, years, ``task``, observed, mean, sd, and ``quantile``, the predictive probability of less.

    ``task`` "a later visit": the last of each person who was seen again more than once, from all visits but these; "a new person": all follow-ups of
    a tenth of the people, from those of the others; but for those whose covariates have an effect that no one else tells, as of a level that nobody
    else has. There may be no row.

    Arguments:
        fit: whose components are taken; the result's own by default.
    """
    fit = result.fit if fit is None else fit
    visits = fit.data.visits
    rows = [_rows(result, LATER, last := held_back(result), _predicted(fit, last))] if bool(held_back(result).any()) else []
    fold = torch.arange(visits.people)[torch.randperm(visits.people, generator=torch.Generator().manual_seed(0))] % FOLDS
    for number in range(FOLDS):
        chosen = _told_by_others(fit, fold[visits.subject] == number)
        if bool(chosen.any()):
            rows.append(_rows(result, _NEW, chosen, _predicted(fit, chosen)))
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=list(_COLUMNS))


def _told_by_others(fit: ChangeFit, chosen: Tensor) -> Tensor:
    """Those of whole people's visits, ``(N,)`` bool, of whose people the others tell all linear effects; none where the others are too few."""
    visits, design = fit.data.visits, fit.data.design
    others, people = visits.subject[~chosen].unique(), visits.subject[chosen].unique()
    if not len(others):
        return torch.zeros_like(chosen)
    rest = design[people] - design[people] @ torch.linalg.pinv(design[others]) @ design[others]
    alone = people[rest.norm(dim=1) > _UNTOLD * design[people].norm(dim=1)]
    kept = chosen & ~torch.isin(visits.subject, alone)
    return kept if len(visits.subject[~kept].unique()) > design.shape[1] else torch.zeros_like(chosen)


def calibration(predictions: pd.DataFrame) -> pd.DataFrame:
    """A row a task: visits, root mean squared error, mean log density (nats) and CRPS, and the coverage of intervals of ``LEVELS``."""
    rows = []
    for task, table in predictions.groupby("task", sort=False):
        observed, mean, sd = (torch.tensor(table[name].to_numpy(copy=True)) for name in ("observed", "mean", "sd"))
        row = {"task": task, "visits": len(table), "rmse": float((observed - mean).square().mean().sqrt())}
        row["log_density"] = float(torch.distributions.Normal(mean, sd).log_prob(observed).mean())
        row["crps"] = float(normal_crps(mean, sd, observed).mean())
        inside = {f"coverage_{round(100 * level)}": float((2 * table["quantile"] - 1).abs().lt(level).mean()) for level in LEVELS}
        rows.append(row | inside)
    columns = ["task", "visits", "rmse", "log_density", "crps", *(f"coverage_{round(100 * level)}" for level in LEVELS)]
    return pd.DataFrame(rows, columns=columns)


def ablation(result: RateResult, tell: Callable[[float], None] = lambda share: None) -> pd.DataFrame:
    """A row for all kernels and one without each, the others' components estimated anew: log likelihood, and ``calibration`` of each task."""
    tables = []
    for k, name in enumerate([None, *result.components]):
        fit = result.fit if name is None else _without(result.fit, k - 1)
        table = calibration(held_out(result, fit))
        tables.append(table.assign(kernels="all" if name is None else f"without {name}", log_likelihood=fit.log_likelihood))
        tell((k + 1) / (len(result.components) + 1))
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class Course:
    """A person's scalar over time, predicted from all visits but the last of each person who was seen again more than once.

    Arguments:
        years, mean, sd: of the prediction, ``(T,)``. seen: years and values that it rests on, ``(V, 2)``. last: those of the visit that it does not.
    """

    subject: str
    years: Tensor
    mean: Tensor
    sd: Tensor
    seen: Tensor
    last: tuple[float, float]


def courses(result: RateResult, count: int, points: int = 30) -> list[Course]:
    """Of those who were seen most often."""
    data = result.fit.data
    last = held_back(result)
    people = data.visits.subject[last]
    visits = data.visits.sums(torch.ones_like(data.visits.delta))[people]
    told = rest(result.fit, last)
    found = []
    for row in visits.argsort(descending=True, stable=True)[:count].tolist():
        person, mine = int(people[row]), data.visits.subject == people[row]
        end = float(data.visits.delta[mine & last][0])
        years = torch.linspace(0, end, points + 1, dtype=torch.float64)[1:]
        asked = FollowUps(years, torch.full((points,), person), data.visits.people)
        prediction = told.predict(asked)
        start = float(result.baseline[person])
        before = torch.stack([data.visits.delta[mine & ~last], start + data.change[mine & ~last]], -1)
        seen = torch.cat([torch.tensor([[0.0, start]], dtype=torch.float64), before])
        subject = result.joined.subjects[person]
        found.append(Course(subject, years, start + prediction.mean, prediction.sd, seen, (end, start + float(data.change[mine & last][0]))))
    return found


def _without(fit: ChangeFit, component: int) -> ChangeFit:
    """The kernel's component 0, the others' at their maximum."""
    kept = [k for k in range(fit.data.count) if k != component]
    return fit_components(fit.data, fit.restricted, fit.variances[kept], torch.eye(fit.data.count).to(fit.variances)[:, kept])


def held_back(result: RateResult) -> Tensor:
    """The last visit of each person who was seen again more than once, ``(N,)`` bool."""
    visits = result.fit.data.visits
    years = visits.delta.new_full((visits.people,), -torch.inf).scatter_reduce(0, visits.subject, visits.delta, "amax")
    several = visits.sums(torch.ones_like(visits.delta)) > 1
    return several[visits.subject] & (visits.delta == years[visits.subject])


def _predicted(fit: ChangeFit, chosen: Tensor) -> Prediction:
    """Of some visits, ``(N,)`` bool, from the others."""
    return rest(fit, chosen).predict(fit.data.visits.only(chosen))


def rest(fit: ChangeFit, chosen: Tensor) -> ChangeFit:
    """Conditioned on all visits but some, at the same components."""
    others = replace(fit.data, change=fit.data.change[~chosen], visits=fit.data.visits.only(~chosen))
    return at_components(others, fit.variances, fit.restricted)


def _rows(result: RateResult, task: str, chosen: Tensor, found: Prediction) -> pd.DataFrame:
    data = result.fit.data
    person = data.visits.subject[chosen]
    baseline = result.baseline[person]
    observed, mean = baseline + data.change[chosen], baseline + found.mean
    return pd.DataFrame(
        {
            "task": task,
            "subject": [result.joined.subjects[i] for i in person.tolist()],
            "years": data.visits.delta[chosen].tolist(),
            "baseline": baseline.tolist(),
            "observed": observed.tolist(),
            "mean": mean.tolist(),
            "sd": found.sd.tolist(),
            "quantile": norm.cdf(((observed - mean) / found.sd).numpy()).tolist(),
        }
    )
