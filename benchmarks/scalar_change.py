"""Change of a scalar: predictions of the last visit of older adults, and heritability with real genotypes and simulated traits.

Data, in the folder ``PROBMED_DATA``: `oasis2` (five folds of subjects; a test subject's visits but the last are known) and `hapmap3` (957 people from
11 populations; the trait is simulated, so this part is semi-synthetic).
"""

from __future__ import annotations

import importlib
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.figures import forest
from benchmarks.tables import Log, Row, Table
from benchmarks.tissue import data_folder
from probmed.inference.reml import ChangeData, fit_components
from probmed.metrics import normal_crps, paired_bootstrap
from probmed.report.palette import ACCENT, FAINT, INK
from probmed.report.panels import bare_axes, blank_figure
from probmed.slopes import DenseKernels, FollowUps
from probmed.tables import Genotypes, Visits
from probmed.workflows.longitudinal import RateSettings, fit_rates
from probmed.workflows.registration import correlation

FOLDS = 5
TARGETS = ("nWBV", "MMSE", "CDR")
CLINICAL = ("Age", "EDUC", "SES", "eTIV", "Sex", "MMSE", "CDR", "nWBV")
HERITABILITIES = (0.0, 0.2, 0.5, 0.8)
TRAITS = 20  # of each heritability
CAUSAL = 500
STRUCTURE = 0.2  # share of a trait's variance that populations differ by, beyond their genotypes
COMPONENTS = 10  # principal ones of the genotypes, covariates of both packages
HELD_OUT = 0.2
OURS = "probmed"


@dataclass(frozen=True)
class Task:
    """A fold of one scalar: known visits, and what is to be predicted.

    Arguments:
        visits: all but the last visit of each test subject.
        subjects, years, truth: of the last visits of test subjects.
    """

    target: str
    visits: Visits
    subjects: list[str]
    years: list[float]
    truth: Tensor


Predict = Callable[[Task], tuple[Tensor, Tensor]]


def table(log: Log, limit: int | None, only: Sequence[str], threads: int, seed: int) -> Table:
    """Measure every method on every fold, and both packages on every trait."""
    torch.set_num_threads(threads)
    rows: list[Row] = []
    visits = Visits.read(
        data_folder() / "oasis2" / "oasis_longitudinal_dev.csv",
        time_unit="days",
        subject="Subject ID",
        time="MR Delay",
        scalars=TARGETS,
        covariates=[name for name in CLINICAL if name not in ("Sex", *TARGETS)],
        categorical=["Sex"],
    )
    for target in TARGETS:
        for fold in range(FOLDS)[:limit]:
            task = held_out(visits, target, fold, seed)
            for name, predict in METHODS.items():
                if only and not any(word in f"{target} {name}" for word in only):
                    continue
                row = log.row(f"{target}/{fold}/{name}", partial(predicted, task, predict, name, fold))
                rows.append(row)
                print(f"{target} fold {fold} {name:28s} RMSE {row['rmse']:.4f}", flush=True)
    rows += traits(log, limit, only, seed)
    settings = {"threads": threads, "folds": FOLDS, "traits": TRAITS, "causal": CAUSAL, "structure": STRUCTURE, "principal_components": COMPONENTS}
    return Table("scalar_change", rows, summarise(rows), notes(rows), settings, seed, figure(rows) if rows else None)


def held_out(visits: Visits, target: str, fold: int, seed: int) -> Task:
    """The last visits of a fold's subjects, of those whose scalar is known then and at baseline."""
    order = np.random.default_rng(seed).permutation(len(visits.subjects))
    test = {visits.subjects[int(i)] for i in order[fold::FOLDS]}
    rows = visits.table
    last = ~rows["subject"].duplicated(keep="last") & rows["subject"].duplicated(keep="first") & rows["subject"].isin(test)
    since = visits.years_since_baseline.numpy()
    first = visits.baseline[target]
    asked = last & rows[target].notna() & rows["subject"].map(first).notna()
    known = replace(visits, table=rows[~last].reset_index(drop=True))
    truth = torch.tensor(rows[target][asked].to_numpy(dtype=float))
    return Task(target, known, list(rows["subject"][asked]), since[asked.to_numpy()].tolist(), truth)


def predicted(task: Task, predict: Predict, method: str, fold: int) -> Row:
    """A method on a fold."""
    start = time.perf_counter()
    mean, sd = predict(task)
    seconds = time.perf_counter() - start
    return {
        "target": task.target,
        "fold": fold,
        "method": method,
        "rmse": float((mean - task.truth).square().mean().sqrt()),
        "seconds": round(seconds, 3),
        "subjects": task.subjects,
        "mean": mean.tolist(),
        "sd": sd.tolist(),
        "truth": task.truth.tolist(),
    }


def _last(task: Task) -> tuple[Tensor, Tensor]:
    """The value of the visit before; its error as between consecutive visits."""
    return _trend(task, 0.0)


def _slope(task: Task) -> tuple[Tensor, Tensor]:
    """The value before and the mean rate of everyone."""
    return _trend(task, None)


def _trend(task: Task, rate: float | None) -> tuple[Tensor, Tensor]:
    rows = task.visits.table
    steps = rows.groupby("subject")[[task.target, "years"]].diff().dropna()
    change, gap = steps[task.target].to_numpy(dtype=float), steps["years"].to_numpy(dtype=float)
    slope = float((change * gap).sum() / (gap * gap).sum()) if rate is None else rate
    before = rows.assign(since=task.visits.years_since_baseline.numpy()).dropna(subset=[task.target]).groupby("subject").last()
    value, since = (torch.tensor(before.loc[task.subjects, name].to_numpy(dtype=float)) for name in (task.target, "since"))
    spread = float(np.sqrt(np.mean((change - slope * gap) ** 2)))
    return value + slope * (torch.tensor(task.years, dtype=torch.float64) - since), torch.full((len(value),), spread, dtype=torch.float64)


def _ours(task: Task) -> tuple[Tensor, Tensor]:
    """Clinical, phenotype and own kernels, age and sex in the mean."""
    settings = RateSettings(task.target, mean=("Age", "Sex"), clinical=tuple(c for c in CLINICAL if c != task.target), phenotype=(task.target,))
    found = fit_rates(task.visits, settings).predict(task.subjects, task.years)
    return found.mean, found.sd


def _mixed(task: Task) -> tuple[Tensor, Tensor]:
    """statsmodels: random intercepts and slopes, age and sex with time."""
    formula: Any = importlib.import_module("statsmodels.formula.api")
    rows = task.visits.table.assign(since=task.visits.years_since_baseline.numpy())
    rows = rows.assign(age=rows["subject"].map(task.visits.baseline["Age"]) - 75, male=(rows["Sex"] == "M").astype(float), y=rows[task.target])
    rows = rows.dropna(subset=["y"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of singular covariances, which it may end at
        model = formula.mixedlm("y ~ since * (age + male)", rows, groups=rows["subject"], re_formula="~since").fit(reml=True)
    fixed, cov, scale = model.fe_params, np.asarray(model.cov_re), float(model.scale)
    first = rows.drop_duplicates("subject").set_index("subject")
    means, sds = [], []
    for subject, years in zip(task.subjects, task.years, strict=True):
        own, person = rows[rows["subject"] == subject], first.loc[subject]
        x = {"Intercept": 1.0, "since": years, "age": person["age"], "male": person["male"]}
        x |= {"since:age": years * person["age"], "since:male": years * person["male"]}
        seen = np.stack([np.ones(len(own)), own["since"].to_numpy()], 1)
        at = np.array([1.0, years])
        left = cov - cov @ seen.T @ np.linalg.solve(seen @ cov @ seen.T + scale * np.eye(len(own)), seen @ cov)
        means.append(sum(float(fixed[name]) * value for name, value in x.items()) + float(at @ np.asarray(model.random_effects[subject])))
        sds.append(math.sqrt(max(float(at @ left @ at), 0.0) + scale))
    return torch.tensor(means, dtype=torch.float64), torch.tensor(sds, dtype=torch.float64)


def _one_kernel(task: Task) -> tuple[Tensor, Tensor]:
    """scikit-learn: one Gaussian kernel with a length for each of time, clinic and baseline, on changes."""
    process: Any = importlib.import_module("sklearn.gaussian_process")
    kernels: Any = importlib.import_module("sklearn.gaussian_process.kernels")
    names = [c for c in CLINICAL if c != "Sex"]
    base = task.visits.baseline
    columns = base[names].astype(float).fillna(base[names].astype(float).mean())
    columns = ((columns - columns.mean()) / columns.std()).assign(male=(base["Sex"] == "M").astype(float))
    changes = task.visits.changes([task.target])
    d = changes.differences[:, 0].numpy()
    known = ~np.isnan(d)
    unit = d[known].std()
    x = np.column_stack([changes.years.numpy()[known], columns.to_numpy()[changes.person.numpy()[known]]])
    kernel = kernels.ConstantKernel() * kernels.RBF(np.full(x.shape[1], 3.0)) + kernels.WhiteKernel(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lengths that go to their bounds
        fitted = process.GaussianProcessRegressor(kernel, n_restarts_optimizer=2, random_state=0).fit(x, d[known] / unit)
        at = np.column_stack([task.years, columns.loc[task.subjects].to_numpy()])
        mean, sd = fitted.predict(at, return_std=True)
    start = torch.tensor(base.loc[task.subjects, task.target].to_numpy(dtype=float))
    return start + torch.tensor(unit * mean), torch.tensor(unit * sd)


METHODS: dict[str, Predict] = {
    OURS: _ours,
    "last value": _last,
    "last value + mean slope": _slope,
    "statsmodels mixed model": _mixed,
    "scikit-learn, one kernel": _one_kernel,
}


def traits(log: Log, limit: int | None, only: Sequence[str], seed: int) -> list[Row]:
    """Both packages on traits that are simulated on real genotypes."""
    path = data_folder() / "hapmap3" / "HM3_thinned_autosomal_overlap.bed"
    if only and not any(word in "heritability" for word in only):
        return []
    cohort: dict[str, Any] = {}

    def people() -> dict[str, Any]:
        if not cohort:
            cohort.update(_cohort(path))
        return cohort

    rows = []
    for truth in HERITABILITIES:
        for number in range(TRAITS)[:limit]:
            key = f"heritability/{truth}/{number}"
            rows.append(log.row(key, lambda h=truth, n=number: _trait(people(), h, seed + n)))  # type: ignore[misc]
            print(key, {name: round(rows[-1][name], 3) for name in ("ours", "theirs")}, flush=True)
    return rows


def _cohort(path: Path) -> dict[str, Any]:
    genotypes = Genotypes.open(path, count_A1=True).filtered(min_frequency=0.01)
    start = time.perf_counter()
    kernel = genotypes.grm()
    seconds = time.perf_counter() - start
    _, vectors = torch.linalg.eigh(kernel)
    covariates = torch.cat([torch.ones(len(kernel), 1, dtype=torch.float64), vectors[:, -COMPONENTS:] * math.sqrt(len(kernel))], 1)
    return {"standardised": genotypes.standardised(), "kernel": kernel, "covariates": covariates, "grm_seconds": seconds}


def _trait(cohort: dict[str, Any], heritability: float, seed: int) -> Row:
    """One trait: the share of its variance that genotypes explain beyond their principal components, by both packages."""
    generator = torch.Generator().manual_seed(seed)
    standardised, kernel, covariates = cohort["standardised"], cohort["kernel"], cohort["covariates"]
    people = len(kernel)
    causal = torch.randperm(standardised.shape[1], generator=generator)[:CAUSAL]
    value = standardised[:, causal].double() @ torch.randn(CAUSAL, generator=generator, dtype=torch.float64)
    # What populations differ by goes to the structure; heritability is of the rest.
    value = value - covariates @ torch.linalg.lstsq(covariates, value[:, None]).solution[:, 0]
    structure = covariates[:, 1:] @ torch.randn(COMPONENTS, generator=generator, dtype=torch.float64)
    noise = torch.randn(people, generator=generator, dtype=torch.float64)
    parts = [(heritability * (1 - STRUCTURE), value), (STRUCTURE, structure), ((1 - heritability) * (1 - STRUCTURE), noise)]
    trait = sum((math.sqrt(share) * part / part.std() for share, part in parts), torch.zeros(people, dtype=torch.float64))
    test = torch.randperm(people, generator=generator)[: round(HELD_OUT * people)]
    train = torch.ones(people, dtype=torch.bool)
    train[test] = False
    start = time.perf_counter()
    visits = FollowUps(torch.ones(int(train.sum())), train.nonzero()[:, 0], people)
    fit = fit_components(ChangeData(trait[train], visits, covariates, DenseKernels(kernel[None]), "none"))
    seconds = time.perf_counter() - start
    # As in the simulation: variances of the parts themselves, without what the principal components take.
    inner = kernel - covariates @ torch.linalg.lstsq(covariates, kernel).solution
    weights = torch.stack([inner.diagonal().mean(), torch.ones((), dtype=torch.float64)])
    mean = fit.predict(FollowUps(torch.ones(len(test)), test, people)).mean
    theirs, their_mean, their_seconds = _glimix(trait, covariates, kernel, train, test)
    structured = covariates[test] @ fit.coefficients

    def share(variances: Tensor) -> float:
        return float(variances[0] * weights[0] / (variances * weights).sum())

    slope = _share_slope(fit.variances, weights)
    error = float((slope @ fit.covariance @ slope).clamp_min(0).sqrt())
    return {
        "heritability": heritability,
        "trait": seed,
        "ours": share(fit.variances),
        "error": error,
        "theirs": share(theirs),
        "seconds": round(seconds, 3),
        "their_seconds": round(their_seconds, 3),
        "r": correlation(mean, trait[test]),
        "their_r": correlation(their_mean, trait[test]),
        "r_beyond_structure": correlation(mean - structured, trait[test] - structured) if fit.variances[0] > 0 else 0.0,
    }


def _share_slope(variances: Tensor, weights: Tensor) -> Tensor:
    total = (variances * weights).sum()
    first = torch.tensor([1.0, 0.0], dtype=torch.float64)
    return weights * (first - variances[0] * weights[0] / total) / total


def _glimix(trait: Tensor, covariates: Tensor, kernel: Tensor, train: Tensor, test: Tensor) -> tuple[Tensor, Tensor, float]:
    """glimix-core by restricted maximum likelihood: variances of kernel and noise, held-out means, seconds with its decomposition."""
    package: Any = importlib.import_module("glimix_core.lmm")
    sugar: Any = importlib.import_module("numpy_sugar.linalg")
    start = time.perf_counter()
    inner = kernel[train][:, train]
    found = package.LMM(trait[train].numpy(), covariates[train].numpy(), sugar.economic_qs(inner.numpy()), restricted=True)
    found.fit(verbose=False)
    seconds = time.perf_counter() - start
    variances = torch.tensor([float(found.v0), float(found.v1)], dtype=torch.float64)
    residual = trait[train] - covariates[train] @ torch.tensor(found.beta)
    covariance = variances[0] * inner + variances[1] * torch.eye(len(inner), dtype=torch.float64)
    mean = covariates[test] @ torch.tensor(found.beta) + variances[0] * kernel[test][:, train] @ torch.linalg.solve(covariance, residual)
    return variances, mean, seconds


def summarise(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A line per scalar and method."""
    lines = []
    for target in TARGETS:
        for method in METHODS:
            mean, sd, truth = _pooled(rows, target, method)
            if not len(mean):
                continue
            seconds = [r["seconds"] for r in rows if (r.get("method"), r.get("target")) == (method, target)]
            held = ((truth - mean).abs() <= 1.6448536 * sd).double().mean()
            lines.append(
                {
                    "scalar": f"{target} ({len(mean)})",
                    "method": method,
                    "RMSE": f"{float((mean - truth).square().mean().sqrt()):.4f}",
                    "CRPS": f"{float(normal_crps(mean, sd, truth).mean()):.4f}",
                    "in 90 % intervals": f"{100 * float(held):.0f} %",
                    "seconds a fold": f"{statistics.median(seconds):.2f}",
                }
            )
    return lines


def _pooled(rows: Sequence[Row], target: str, method: str) -> tuple[Tensor, Tensor, Tensor]:
    chosen = [r for r in rows if r.get("target") == target and r.get("method") == method]
    mean, sd, truth = (torch.tensor([v for r in chosen for v in r[name]], dtype=torch.float64) for name in ("mean", "sd", "truth"))
    return mean, sd, truth


def notes(rows: Sequence[Row]) -> str:
    """Differences in CRPS with intervals over subjects, and the heritabilities as a table."""
    parts = []
    for target in TARGETS:
        mean, sd, truth = _pooled(rows, target, OURS)
        if len(mean) < 2:
            continue
        ours = normal_crps(mean, sd, truth)
        for method in METHODS:
            theirs = _pooled(rows, target, method)
            if method != OURS and len(theirs[0]) == len(ours):
                d = paired_bootstrap(ours, normal_crps(*theirs))
                parts.append(f"{target}, {method} {d.mean:+.4f} [{d.lower:+.4f}, {d.upper:+.4f}]")
    lines = []
    if parts:
        lines = [f"CRPS of {OURS} less that of each method, mean over subjects with a 95 % paired bootstrap interval: {'; '.join(parts)}.", ""]
    heads = (
        "heritability",
        "probmed, mean (bias; RMSE)",
        "glimix-core",
        "in ± 1.96 standard errors",
        "held-out r, ours / theirs",
        "r beyond structure",
        "time / theirs",
    )
    table = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for level in HERITABILITIES:
        chosen = [r for r in rows if r.get("heritability") == level]
        if not chosen:
            continue
        cells = [f"{level} ({len(chosen)})"]
        for name in ("ours", "theirs"):
            values = [r[name] for r in chosen]
            error = math.sqrt(statistics.fmean((v - level) ** 2 for v in values))
            cells.append(f"{statistics.fmean(values):.3f} ({statistics.fmean(values) - level:+.3f}; {error:.3f})")
        cells.append(f"{100 * statistics.fmean(abs(r['ours'] - level) <= 1.96 * r['error'] for r in chosen):.0f} %")
        cells.append(f"{statistics.fmean(r['r'] for r in chosen):.3f} / {statistics.fmean(r['their_r'] for r in chosen):.3f}")
        cells.append(f"{statistics.fmean(r['r_beyond_structure'] for r in chosen):.3f}")
        cells.append(f"{statistics.median(r['seconds'] / r['their_seconds'] for r in chosen):.2f}")
        table.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *(table if len(table) > 2 else [])])


def figure(rows: Sequence[Row]) -> Figure:
    """CRPS of each method on each scalar, and both packages' heritabilities of each trait against the truth."""
    drawn = blank_figure(11.0, 2.9)
    for place, target in enumerate(TARGETS):
        of = {method: normal_crps(*found) for method in METHODS if len((found := _pooled(rows, target, method))[0]) > 1}
        if of:
            forest(drawn.add_axes((0.16 + 0.185 * place, 0.2, 0.155, 0.68)), of, OURS, f"CRPS, {target}", named=place == 0)
    axis = drawn.add_axes((0.78, 0.2, 0.2, 0.68))
    axis.plot([0, 1], [0, 1], ":", color=INK, lw=1)
    for shift, name, colour in ((-0.012, "ours", ACCENT), (0.012, "theirs", FAINT)):
        traits = [row for row in rows if "heritability" in row]
        axis.plot([row["heritability"] + shift for row in traits], [row[name] for row in traits], "o", color=colour, ms=3, alpha=0.6)
    axis.set_xlabel("true heritability", fontsize=8)
    axis.set_ylabel("estimate", fontsize=8)
    axis.legend(handles=axis.lines[1:], labels=[OURS, "glimix-core"], frameon=False, fontsize=7.5)
    axis.tick_params(labelsize=7.5)
    bare_axes(axis)
    return drawn
