"""A fitted run of rates of change as a folder, and predictions from it.

``components.tsv`` variances, shares and tests of the kernels; ``coefficients.tsv`` β; ``rates.tsv`` what each person's rate consists of;
``visits.tsv`` the visits that were used, from which predictions for others are made; ``report.html``; ``longitudinal.json`` settings, components and
provenance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from probmed.tables import Genotypes, Visits
from probmed.tables.visits import Unit
from probmed.volumes import UnusableInput
from probmed.workflows.longitudinal import RateResult, RateSettings, fit_rates
from probmed.workflows.outputs import staged
from probmed.workflows.provenance import Provenance

RECORD = "longitudinal.json"
REPORT = "report.html"
_LEVEL = 0.9


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

    def read(self, path: Path, **roles: Sequence[str]) -> Visits:
        """Visits, with the columns of ``Visits.read``."""
        return Visits.read(path, time_unit=self.unit, subject=self.subject, time=self.time, **roles)

    def read_scans(self, path: Path, own: Visits, scans: str, labels: str | None = None) -> Visits:
        """A table with the columns of a run's own visits, one of scans, and one of label maps of the baseline scans where there is one."""
        columns = [scans, *([] if labels is None else [labels])]
        return self.read(path, covariates=own.covariates, categorical=own.categorical, scans=columns)


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
            known = {f.name for f in fields(RateSettings)}
            chosen = with_tuples({name: value for name, value in record["Settings"].items() if name in known})
            roles: dict[str, Any] = {role: tuple(record["Roles"][role]) for role in ("scalars", "covariates", "categorical")}
            variances = torch.tensor(record["Variances"], dtype=torch.float64)
            visits = Visits.read(folder / "visits.tsv", time_unit="years", time="years", **roles)
            return cls(RateSettings(**chosen), visits, TableSource.of(record), variances)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise no_run(folder, error) from error

    def read(self, path: Path) -> Visits:
        """A table with the columns of the run's own; the scalar is missing where it is to be predicted."""
        return self.source.read(path, **{role: getattr(self.visits, role) for role in ("scalars", "covariates", "categorical")})

    def predict(self, asked: Visits, genotypes: Genotypes | None = None) -> pd.DataFrame:
        """A row for each visit without the scalar that is not a person's first: mean, standard deviation and 90 % interval of what will be measured.

        Arguments:
            asked: of people of the run or of others; what else is known of them is used.

        Raises:
            UnusableInput: where nothing is asked for, or a person's scalar is not known at baseline.
        """
        scalar = self.settings.scalar
        result = fit_rates(together(self.visits, asked), self.settings, genotypes, known=self.visits.subjects, variances=self.variances)
        table = result.joined.visits.table.assign(since=result.joined.visits.years_since_baseline.numpy())
        wanted = table[table[scalar].isna() & (table["since"] > 0) & table["subject"].isin(asked.subjects)]
        if not len(wanted):
            remedy = f"leave {scalar} empty in the rows that are to be predicted, after a baseline row where it is known"
            raise UnusableInput(asked.path, f"asks for no prediction of {scalar}", remedy)
        unknown = wanted["subject"].map(table.drop_duplicates("subject").set_index("subject")[scalar]).isna()
        if unknown.any():
            fault = f"has no {scalar} at the baseline of {wanted['subject'][unknown].iloc[0]}, from which change could be counted"
            raise UnusableInput(asked.path, fault, "give it, or leave the subject out")
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
    """The visits of a run and those of another table; a visit that both have is the run's."""
    new = asked.table[~seen_in(own, asked)]
    rows = pd.concat([own.table, new], ignore_index=True)
    # Each person's visits by time, as ``Visits`` has them.
    rows = rows.assign(person=pd.factorize(rows["subject"])[0]).sort_values(["person", "years"], kind="stable", ignore_index=True)
    return replace(own, path=asked.path, table=rows.drop(columns="person"))


def seen_in(own: Visits, asked: Visits) -> NDArray[np.bool_]:
    """Which of a table's visits the run has."""
    return np.asarray(asked.table.set_index(["subject", "years"]).index.isin(own.table.set_index(["subject", "years"]).index))


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
