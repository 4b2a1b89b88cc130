"""A fitted run of rates of change as a folder, and predictions from it.

``components.tsv`` variances, shares and tests of the kernels; ``coefficients.tsv`` β; ``rates.tsv`` what each person's rate consists of;
``visits.tsv`` the visits that were used, from which predictions for others are made; ``report.html``; ``longitudinal.json`` settings, components and
provenance.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from probmed.tables import Genotypes, Visits, read_with_clinical
from probmed.tables.visits import Unit
from probmed.volumes import UnusableInput
from probmed.workflows.longitudinal import RateResult, RateSettings, fit_rates
from probmed.workflows.outputs import staged
from probmed.workflows.provenance import Provenance

RECORD = "longitudinal.json"
REPORT = "report.html"
_LEVEL = 0.9
_SAME = 1e-8  # of times, relative: a run keeps ten digits


@dataclass(frozen=True)
class TableSource:
    """How a run's tables are read.

    Arguments:
        subject, time, unit: names of columns, and unit of time.
        genotypes: the file that it was fitted with, or None.
    """

    subject: str = "subject"
    time: str = "time"
    unit: Unit = "years"
    genotypes: Path | None = None

    @classmethod
    def of(cls, record: dict[str, Any]) -> TableSource:
        """As ``record`` has it."""
        genotypes = None if record["Genotypes"] is None else Path(record["Genotypes"])
        return cls(record["Subject"], record["Time"], record["Unit"], genotypes)

    def record(self) -> dict[str, str | None]:
        """Of a run."""
        genotypes = None if self.genotypes is None else str(self.genotypes.resolve())
        return {"Subject": self.subject, "Time": self.time, "Unit": self.unit, "Genotypes": genotypes}

    def read(self, path: Path, *, empty: bool = False, clinical: Path | None = None, **roles: Sequence[str]) -> Visits:
        """Visits, with the columns of ``Visits.read``; those covariates that a clinical table has, from there."""
        if clinical is None:
            return Visits.read(path, time_unit=self.unit, subject=self.subject, time=self.time, empty=empty, **roles)
        return read_with_clinical(path, clinical, time_unit=self.unit, subject=self.subject, time=self.time, empty=empty, **roles)

    def read_scans(self, path: Path, own: Visits, scans: str, labels: str | None = None, clinical: Path | None = None) -> Visits:
        """A table with the columns of a run's own visits, one of scans, and one of label maps of the baseline scans where there is one; each may be
        empty."""
        columns = [scans, *([] if labels is None else [labels])]
        return self.read(path, covariates=own.covariates, categorical=own.categorical, scans=columns, empty=True, clinical=clinical)


@dataclass(frozen=True)
class RateRun:
    """A run from its folder.

    Arguments:
        source: of its table, and of those that it takes.
        variances: components.
    """

    settings: RateSettings
    visits: Visits
    source: TableSource
    variances: Tensor

    @classmethod
    def load(cls, folder: Path) -> RateRun:
        """
        Raises:
            UnusableInput: where there is no such run.
        """
        record = read_record(folder)
        try:
            roles: dict[str, Any] = {role: tuple(record["Roles"][role]) for role in ("scalars", "covariates", "categorical")}
            variances = torch.tensor(record["Variances"], dtype=torch.float64)
            visits = Visits.read(folder / "visits.tsv", time_unit="years", time="years", **roles)
            return cls(RateSettings.of(record["Settings"]), visits, TableSource.of(record), variances)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise no_run(folder, error) from error

    def read(self, path: Path, clinical: Path | None = None) -> Visits:
        """A table with the columns of the run's own; the scalar is missing where it is to be predicted.

        Arguments:
            clinical: a table with some of the covariates, a row a person.
        """
        own = self.visits
        roles = {"scalars": own.scalars, "covariates": own.covariates, "categorical": own.categorical}
        return self.source.read(path, empty=True, clinical=clinical, **roles)

    def predict(self, asked: Visits, genotypes: Genotypes | None = None) -> pd.DataFrame:
        """A row for each visit without the scalar that is not a person's first: mean, standard deviation and 90 % interval of what will be measured.

        Arguments:
            asked: of people of the run or of others; what else is known of them is used.

        Raises:
            UnusableInput: where nothing is asked for, a visit is before the run's baseline, or a person is not in the genotypes or has no scalar at
                baseline.
        """
        scalar = self.settings.scalar
        asked = with_times_of(self.visits, asked)
        check_beginnings(self.visits, asked)
        merged = together(self.visits, asked)
        since = asked.table["years"] - asked.table["subject"].map(merged.baseline["years"])
        known = seen_in(known_in(self.visits, [scalar]), asked)
        wanted = asked.table.assign(since=since)[asked.table[scalar].isna() & (since > 0) & ~known]
        if not len(wanted):
            remedy = f"leave {scalar} empty in the rows that are to be predicted, after a baseline row where it is known"
            raise UnusableInput(asked.path, f"asks for no prediction of {scalar}", remedy)
        check_in_genotypes(asked.path, wanted["subject"], self.visits, genotypes)
        unknown = wanted["subject"].map(merged.baseline[scalar]).isna()
        if unknown.any():
            fault = f"has no {scalar} at the baseline of {wanted['subject'][unknown].iloc[0]}, from which change could be counted"
            raise UnusableInput(asked.path, fault, "give it, or leave the subject out")
        result = fit_rates(merged, self.settings, genotypes, known=self.visits.subjects, variances=self.variances)
        found = result.predict(list(wanted["subject"]), list(wanted["since"]))
        interval = found.interval(_LEVEL)
        return pd.DataFrame(
            {
                "subject": wanted["subject"].to_list(),
                "years": wanted["since"].to_list(),
                "mean": found.mean.tolist(),
                "sd": found.sd.tolist(),
                "low": interval[:, 0].tolist(),
                "high": interval[:, 1].tolist(),
            }
        )


def read_record(folder: Path) -> dict[str, Any]:
    """What a run says of itself.

    Raises:
        UnusableInput: where there is no such run.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record
    except (OSError, ValueError) as error:
        raise no_run(folder, error) from error


def no_run(folder: Path, error: Exception) -> UnusableInput:
    """For a folder in which something is missing."""
    fault = f"holds no run of rates that can be read ({error})"
    return UnusableInput(folder, fault, "give a folder that `probmed train longitudinal` has written")


def with_tuples(record: dict[str, Any]) -> dict[str, Any]:
    """Lists of JSON as the tuples that settings have."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}


def together(own: Visits, asked: Visits) -> Visits:
    """The visits of a run and those of another table; of a visit that both have, the run's, with the scalars that it lacks from the other."""
    places = places_in(own, asked)
    both, scalars = places >= 0, [name for name in own.scalars if name in asked.table]
    known = own.table.assign(**own.table[scalars].fillna(asked.table.loc[both, scalars].set_axis(places[both])))
    rows = pd.concat([known, asked.table[~both]], ignore_index=True)
    # Each person's visits by time, as ``Visits`` has them.
    rows = rows.assign(person=pd.factorize(rows["subject"])[0]).sort_values(["person", "years"], kind="stable", ignore_index=True)
    return replace(own, path=asked.path, table=rows.drop(columns="person"))


def seen_in(own: Visits, asked: Visits) -> NDArray[np.bool_]:
    """Which of a table's visits the run has."""
    return places_in(own, asked) >= 0


def known_in(own: Visits, columns: Sequence[str]) -> Visits:
    """The visits of a run at which all columns are known."""
    return replace(own, table=own.table[own.table[list(columns)].notna().all(axis=1)].reset_index(drop=True))


def places_in(own: Visits, asked: Visits) -> NDArray[np.int64]:
    """Of each visit of a table its row in the run's, −1 where the run has none at that time."""
    ours = pd.DataFrame({"subject": own.table["subject"], "years": own.table["years"], "there": own.table["years"], "row": np.arange(len(own))})
    theirs = pd.DataFrame({"subject": asked.table["subject"], "years": asked.table["years"], "order": np.arange(len(asked))})
    pairs = pd.merge_asof(theirs.sort_values("years"), ours.sort_values("years"), on="years", by="subject", direction="nearest").sort_values("order")
    same = (pairs["there"] - pairs["years"]).abs() <= _SAME * pairs["years"].abs()
    return np.where(same, pairs["row"].fillna(-1), -1).astype(np.int64)


def with_times_of(own: Visits, asked: Visits) -> Visits:
    """A table with the run's times of the visits that the run has: the digits that a run keeps are fewer than those of a table in days."""
    places = places_in(own, asked)
    years = np.where(places >= 0, own.table["years"].to_numpy()[places], asked.table["years"])
    return replace(asked, table=asked.table.assign(years=years))


def check_beginnings(own: Visits, asked: Visits) -> None:
    """Raises UnusableInput where a person of the run has a visit before the run's first, from which change is counted."""
    first = own.baseline["years"].reindex(asked.baseline.index)
    early = asked.baseline["years"] < first
    if early.any():
        subject = early.index[early][0]
        fault = f"has a visit of {subject} at {asked.baseline['years'][subject]:g} years, before the run's baseline at {first[subject]:g}"
        raise UnusableInput(asked.path, fault, "leave the visit out, or train a run with it")


def check_in_genotypes(path: Path, wanted: Iterable[str], own: Visits, genotypes: Genotypes | None) -> None:
    """Refuse people of whom nothing can be said, before any work.

    Arguments:
        path: of the table. wanted: people who are to be predicted. own: visits of the run, by whose people alleles are counted.

    Raises:
        UnusableInput: naming the first who is not in the genotypes.
    """
    if genotypes is None:
        return
    there = set(genotypes.identifiers())
    if absent := [name for name in wanted if name not in there]:
        raise UnusableInput(path, f"asks for {absent[0]}, who is not in the genotypes", "give genotypes of all, or leave the subject out")
    if absent := [name for name in own.subjects if name not in there]:
        fault = f"has no genotypes of {absent[0]}, with whom the run was fitted ({len(absent)} such)"
        raise UnusableInput(genotypes.path, fault, "give a file with the run's people and the others")


def write_run(result: RateResult, components: pd.DataFrame, folder: Path, provenance: Provenance, source: TableSource, page: str) -> None:
    """Write a run into a folder, all files or none.

    Arguments:
        components: ``result.component_table()``. page: the report, HTML.

    Raises:
        UnusableInput: where a file cannot be written.
    """
    tables = {"components": components, "coefficients": result.coefficient_table(), "rates": result.rate_table()}
    record = run_record(result, provenance, source)
    with staged(folder, "longitudinal") as stage:
        for name, table in tables.items():
            (stage / f"{name}.tsv").write_text(exact_text(table), encoding="utf-8")
        (stage / REPORT).write_text(page, encoding="utf-8")
        write_record(stage, result, record)


def run_record(result: RateResult, provenance: Provenance, source: TableSource) -> dict[str, Any]:
    """What ``RateRun.load`` reads, and where it comes from."""
    visits = result.joined.visits
    return {
        "Settings": asdict(result.settings),
        "Components": result.components,
        "Variances": result.fit.variances.tolist(),
        "LogLikelihood": result.fit.log_likelihood,
        "Converged": result.fit.converged,
        **source.record(),
        "Roles": {role: getattr(visits, role) for role in ("scalars", "covariates", "categorical")},
        "Covariates": {role: coding.record() for role, coding in result.codings.items()},
        "GenotypesUsed": None if result.joined.genotypes is None else result.joined.genotypes.record(),
        "People": result.joined.record(),
        **provenance.record(),
    }


def write_record(stage: Path, result: RateResult, record: dict[str, Any]) -> None:
    """The visits, without paths of scans, and the record."""
    visits = result.joined.visits
    (stage / "visits.tsv").write_text(exact_text(visits.table.drop(columns=list(visits.scans))), encoding="utf-8")
    (stage / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False, default=_plain) + "\n", encoding="utf-8")


def exact_text(table: pd.DataFrame) -> str:
    """A table as TSV with all digits, n/a where there is no value: rates are small numbers."""
    return str(table.to_csv(sep="\t", index=False, na_rep="n/a", float_format="%.10g"))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value)
