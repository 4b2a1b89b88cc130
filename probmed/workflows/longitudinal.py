"""Rates of change of a scalar from tables: what `probmed train longitudinal` does, as one function.

Visits, clinical columns at baseline and genotypes of the same people → kernels between them → variance components by restricted maximum likelihood →
tests, shares, effects, and predictions for visits of anyone in the tables.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pandas as pd
import torch
from scipy.stats import norm
from torch import Tensor

from probmed.inference.reml import ChangeData, ChangeFit, ComponentTest, Prediction, at_components, compare_component, fit_components
from probmed.kernels import ColumnGaussian
from probmed.models.longitudinal import BASELINES
from probmed.slopes import DenseKernels, FollowUps
from probmed.tables import CovariateCoding, Genotypes, Joined, SnpSet, Visits, join
from probmed.tables.covariates import Missing
from probmed.tables.snp_sets import all_members
from probmed.volumes import UnusableInput
from probmed.workflows.genetic_kernels import KINDS, genetic_kernels

EQUATION = "y_t = y_B + Δx (xᵀβ + h_G + h_C + h_y + h_own) + ε_t − ε_B"


@dataclass(frozen=True)
class RateSettings:
    """Which columns explain a scalar's rate of change, and how.

    Arguments:
        scalar: the phenotype y, or the column of scans where it is a field.
        mean: columns, scalars or covariates, whose value at baseline has a linear effect on the rate (β).
        clinical, phenotype: those of the clinical and of the phenotype kernel. Where the scalar itself is among them, its measurement error at
            baseline, which is in every change too, passes for an effect: right for prediction, not for explanation.
        own: whether people have a rate of their own that nothing explains.
        baseline: of ``Longitudinal``.
        min_frequency: of the rarer allele, in the people that a run was fitted to, of SNPs that are used. max_missing: share of them without the SNP.
        genetic: of ``genetic_kernels``: "grm", "ibs" or "gaussian".
        sets: of SNPs, each of which has a kernel of its own in place of one of all SNPs.
    """

    scalar: str
    mean: tuple[str, ...] = ()
    clinical: tuple[str, ...] = ()
    phenotype: tuple[str, ...] = ()
    own: bool = True
    baseline: str = "same"
    min_frequency: float = 0.01
    max_missing: float = 1.0
    genetic: str = "grm"
    sets: tuple[SnpSet, ...] = ()

    def __post_init__(self) -> None:
        if self.baseline not in BASELINES:
            raise ValueError(f"expected a baseline of {BASELINES}, got {self.baseline!r}")
        if self.genetic not in KINDS:
            raise ValueError(f"expected a genetic kernel of {KINDS}, got {self.genetic!r}")

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> RateSettings:
        """As ``asdict`` gives it, through JSON; what is not known is passed over."""
        known = {each.name for each in fields(cls)}
        made: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in record.items() if name in known}
        return cls(**{**made, "sets": tuple(SnpSet.of(each) for each in made.get("sets", ()))})

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """Columns by what they are for; only those that are used."""
        roles = {"mean": self.mean, "clinical": self.clinical, "phenotype": self.phenotype}
        return {role: names for role, names in roles.items() if names}


@dataclass(frozen=True)
class RateResult:
    """Rates of change and what explains them.

    Arguments:
        joined: the people, P, and who was left out.
        components: names of the kernels, K of them, in order. coefficients: names of β.
        fit: of the components; its data are in the scalar's unit and years, and have columns where several scalars were fitted together.
        baseline: y_B, ``(P,)`` or ``(P, J)``; NaN where it was not measured.
        codings: of the columns of each role, ``RateSettings.roles``.
    """

    joined: Joined
    settings: RateSettings
    components: tuple[str, ...]
    coefficients: tuple[str, ...]
    fit: ChangeFit
    baseline: Tensor
    codings: Mapping[str, CovariateCoding]

    @property
    def kernels(self) -> dict[str, Tensor]:
        """Matrices ``(P, P)`` by the components' names, to be used again."""
        relationship = self.fit.data.relationship
        if not isinstance(relationship, DenseKernels):
            raise TypeError(f"expected DenseKernels, got {type(relationship).__name__}")
        return dict(zip(self.components, relationship.matrices, strict=True))

    def test(self, component: str) -> ComponentTest:
        """One kernel against none."""
        return compare_component(self.fit, self.components.index(component))

    def component_table(self, tell: Callable[[float], None] = lambda share: None) -> pd.DataFrame:
        """A row a kernel and one for the noise: variance, its standard error, share of the rates' variance with an interval, test."""
        rows = []
        errors = self.fit.standard_errors
        for k, name in enumerate(self.components):
            share, error = self.fit.share([k])
            low, high = self.fit.share_interval(k) if len(self.components) > 1 else (math.nan, math.nan)
            test = self.test(name)
            rows.append(
                {
                    "component": name,
                    "variance": float(self.fit.variances[k]),
                    "standard_error": float(errors[k]),
                    "share": share,
                    "share_error": error,
                    "share_low": low,
                    "share_high": high,
                    "statistic": test.statistic,
                    "p": test.p_value,
                }
            )
            tell((k + 1) / len(self.components))
        names = ["noise", "baseline noise"]
        for name, value, error in zip(names, self.fit.variances[len(rows) :], errors[len(rows) :], strict=False):
            rows.append({"component": name, "variance": float(value), "standard_error": float(error)})
        return pd.DataFrame(rows)

    def coefficient_table(self, level: float = 0.95) -> pd.DataFrame:
        """A row a coefficient of β: estimate, standard error, normal interval, two-sided p."""
        errors = self.fit.coefficient_covariance.diagonal().sqrt()
        interval = self.fit.coefficient_intervals(level)
        return pd.DataFrame(
            {
                "coefficient": self.coefficients,
                "estimate": self.fit.coefficients.tolist(),
                "standard_error": errors.tolist(),
                "low": interval[:, 0].tolist(),
                "high": interval[:, 1].tolist(),
                "p": (2 * norm.sf((self.fit.coefficients / errors).abs().numpy())).tolist(),
            }
        )

    def rate_table(self) -> pd.DataFrame:
        """A row a person: the part of the rate that β explains and that of each kernel, per year."""
        columns = {"subject": list(self.joined.subjects), "mean": (self.fit.data.design @ self.fit.coefficients).tolist()}
        columns |= {name: effect.tolist() for name, effect in zip(self.components, self.fit.effects().T, strict=True)}
        return pd.DataFrame(columns)

    def predict(self, subjects: Sequence[str], years: Sequence[float]) -> Prediction:
        """y at times since each person's baseline, as it would be measured.

        Raises:
            ValueError: for people who are not in the tables, or whose baseline was not measured.
        """
        place = {name: i for i, name in enumerate(self.joined.subjects)}
        unknown = [name for name in subjects if name not in place]
        if unknown:
            raise ValueError(f"expected people of the tables, got {unknown[0]!r}")
        person = torch.tensor([place[name] for name in subjects])
        if bool(self.baseline[person].isnan().any()):
            raise ValueError(f"expected people with {self.settings.scalar} at baseline, got some without")
        change = self.fit.predict(FollowUps(torch.tensor(years, dtype=torch.float64), person, len(place)))
        return Prediction(self.baseline[person] + change.mean, change.sd)


def fit_rates(
    visits: Visits,
    settings: RateSettings,
    genotypes: Genotypes | None = None,
    *,
    columns: Sequence[str] | None = None,
    known: Sequence[str] | None = None,
    variances: Tensor | None = None,
    kernels: Mapping[str, Tensor] | None = None,
) -> RateResult:
    """Variance components of a scalar's rate of change.

    Arguments:
        visits: with ``settings.scalar`` or ``columns`` among its scalars, and whatever else the settings name.
        genotypes: of the same people; those without are left out.
        columns: scalars that are fitted together, with kernels in common and a scale each, in place of the settings' one.
        known: people by whom columns are standardised and alleles counted, all by default.
        variances: components that are taken as they are, not estimated.
        kernels: those of the same settings between the same people, where they are known, as ``RateResult.kernels``; they take long.

    Warns of columns that are left out, entries that are missing, and components that had not converged.

    Raises:
        UnusableInput: where too few people are seen again, covariates are collinear, or no kernel is asked for or has something left in it.
    """
    joined = cohort_of(visits, settings, genotypes, known) if kernels is None else join(visits, genotypes=genotypes)
    codings = codings_of(joined.visits, settings, reference_people(joined, known))
    if known is None:
        tell_of_codings(joined.visits, codings)
    changes = joined.visits.changes([settings.scalar] if columns is None else columns)
    seen = ~changes.differences.isnan().any(1)
    differences, baseline = changes.differences[seen], changes.baseline
    if columns is None:
        differences, baseline = differences[:, 0], baseline[:, 0]
    follow_ups = FollowUps(changes.years[seen], changes.person[seen], len(joined.subjects))
    data, components, names = explained(joined, settings, follow_ups, differences, known, kernels)
    if variances is not None and len(variances) != data.count:
        raise ValueError(f"expected a variance for each of {data.count} components ({', '.join(components)}, noise), got {len(variances)}")
    fit = fit_components(data) if variances is None else at_components(data, variances)
    if not fit.converged:
        fault = f"variance components had not converged after {fit.iterations} steps"
        warnings.warn(f"{visits.path}: {fault}; ask for fewer kernels, or give more follow-ups", stacklevel=2)
    return RateResult(joined, settings, components, names, fit, baseline, codings)


def cohort_of(visits: Visits, settings: RateSettings, genotypes: Genotypes | None = None, known: Sequence[str] | None = None) -> Joined:
    """People of all tables, with the SNPs that tell the known ones apart: those are the same whoever else is asked about.

    Raises:
        UnusableInput: as ``join``; where no SNPs are left, or there are sets of them and no genotypes.
    """
    joined = join(visits, genotypes=genotypes)
    if joined.genotypes is None:
        if settings.sets:
            raise UnusableInput(visits.path, "is to be explained by sets of SNPs, without genotypes", "give --genotypes")
        return joined
    told = joined.genotypes.of_people(reference_people(joined, known))
    if settings.sets:
        told = told.of_snps(all_members(settings.sets, told))
    told = told.filtered(min_frequency=settings.min_frequency, max_missing=settings.max_missing)
    return replace(joined, genotypes=replace(told, people=joined.genotypes.people, rows=joined.genotypes.rows))


def reference_people(joined: Joined, known: Sequence[str] | None) -> list[str]:
    """People by whom columns are standardised and alleles counted."""
    chosen = set(joined.subjects if known is None else known)
    return [name for name in joined.subjects if name in chosen]


def explained(
    joined: Joined,
    settings: RateSettings,
    follow_ups: FollowUps,
    change: Tensor,
    known: Sequence[str] | None = None,
    kernels: Mapping[str, Tensor] | None = None,
) -> tuple[ChangeData, tuple[str, ...], tuple[str, ...]]:
    """Changes with what explains them, and the names of the kernels and of β.

    Arguments:
        change: d, ``(N,)`` or ``(N, J)``.

    Raises:
        UnusableInput: as ``fit_rates``.
    """
    path, reference = joined.visits.path, reference_people(joined, known)
    design, names = design_of(joined.visits, settings, reference)
    kernels = dict(kernels_of(joined, settings, reference)) if kernels is None else kernels
    if not kernels:
        remedy = "ask for a clinical, phenotype or genetic kernel, or people's own rates"
        raise UnusableInput(path, "has nothing that could explain rates", remedy)
    try:
        data = ChangeData(change, follow_ups, design, DenseKernels(torch.stack(list(kernels.values()))), settings.baseline)
    except ValueError as error:
        remedy = "give more follow-ups, or fewer covariates"
        raise UnusableInput(path, f"cannot tell rates of {settings.scalar} apart: {error}", remedy) from error
    if settings.own and data.noise_hides_rates:
        fault = "people's own rates cannot be told from noise, for all were seen again once and after equal times"
        warnings.warn(f"{path}: {fault}; leave them out (own=False, --no-own), or give further visits", stacklevel=3)
    return data, tuple(kernels), names


def design_of(visits: Visits, settings: RateSettings, reference: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """A column of ones and the covariates less their means, imputed where missing; so the first coefficient is the rate of the average person."""
    ones = torch.ones(len(visits.subjects), 1, dtype=torch.float64)
    if not settings.mean:
        return ones, ("rate",)
    columns = _coded(visits, settings.mean, reference, "impute")
    centred = columns - columns.loc[list(reference)].mean()
    return torch.cat([ones, torch.tensor(centred.to_numpy())], 1), ("rate", *map(str, columns.columns))


def codings_of(visits: Visits, settings: RateSettings, reference: Sequence[str]) -> dict[str, CovariateCoding]:
    """How the columns of each role become numbers, as the reference people have them at baseline: missing entries of linear effects are imputed, with
    an indicator; those of kernels are kept, and integrated out."""
    codings = {}
    for role, names in settings.roles.items():
        table = visits.baseline.loc[list(reference), list(names)]
        missing: Missing = "impute" if role == "mean" else "keep"
        codings[role] = CovariateCoding.fit(table, _levelled(visits, names), missing=missing, source=visits.path)
    return codings


def _levelled(visits: Visits, names: Sequence[str]) -> list[str]:
    return [name for name in visits.categorical if name in names]


def tell_of_codings(visits: Visits, codings: Mapping[str, CovariateCoding]) -> None:
    """Warn of columns that are left out, and of entries that are missing."""
    for name in dict.fromkeys(name for coding in codings.values() for name in coding.constant):
        warnings.warn(f"{visits.path}: has one value of {name} for all its people; it is left out", stacklevel=3)
    for role, coding in codings.items():
        for name in coding.with_gaps:
            what = "its mean or commonest level stands in, beside an indicator" if coding.missing == "impute" else "integrated out"
            count = int(visits.baseline[name].isna().sum())
            part = "linear effects" if role == "mean" else f"{role} kernel"
            warnings.warn(f"{visits.path}: has no {name} of {count} people at baseline; in the {part}: {what}", stacklevel=3)


def _coded(visits: Visits, names: Sequence[str], reference: Sequence[str], missing: Missing) -> pd.DataFrame:
    """Columns at baseline as numbers, categorical ones as indicators, as the reference people have them."""
    table = visits.baseline[list(names)]
    coding = CovariateCoding.fit(table.loc[list(reference)], _levelled(visits, names), missing=missing, source=visits.path)
    return coding.design(table, visits.path)


def kernels_of(joined: Joined, settings: RateSettings, reference: Sequence[str]) -> list[tuple[str, Tensor]]:
    """Names and matrices ``(P, P)``, of mean diagonal about 1.

    Raises:
        UnusableInput: where nothing that varies is left in a kernel.
    """
    found = []
    if joined.genotypes is not None:
        found += genetic_kernels(joined.genotypes, reference, settings.genetic, settings.sets)
    for name, columns in settings.roles.items():
        if name != "mean":
            coded = _coded(joined.visits, columns, reference, "keep")
            if coded.empty:
                fault = f"has one value of {', '.join(columns)} for all its people, and nothing else for the {name} kernel"
                raise UnusableInput(joined.visits.path, fault, f"leave out --{name}, or name columns in which people differ")
            found.append((name, _gaussian(coded, reference)))
    if settings.own:
        found.append(("own", torch.eye(len(joined.subjects), dtype=torch.float64)))
    return found


def _gaussian(columns: pd.DataFrame, reference: Sequence[str]) -> Tensor:
    """The Gaussian kernel of standardised columns; its length grows with their number, as distances between people do.

    A person whose entries are missing is as variable as others: what the kernel leaves of their variance, the expectation over the missing entry,
    is their own. It is not centred: a part of its variance is a level that all people have in common, which the mean rate has as well.
    """
    known = columns.loc[list(reference)]
    standardised = ((columns - known.mean()) / known.std(ddof=0)).loc[:, known.std(ddof=0) > 0]
    kernel = ColumnGaussian(0.0, 1.0).double()
    kernel.lengthscale = math.sqrt(max(1, standardised.shape[1]))
    with torch.no_grad():
        matrix: Tensor = kernel(torch.tensor(standardised.to_numpy())).to_dense()
    return matrix.fill_diagonal_(1.0)
