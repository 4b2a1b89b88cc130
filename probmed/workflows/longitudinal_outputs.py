"""A fitted run of rates of change as a folder, and predictions from it.

``components.tsv`` variances, shares and tests of the kernels; ``coefficients.tsv`` β; ``rates.tsv`` what each person's rate consists of;
``visits.tsv`` the visits that were used, from which predictions for others are made; ``longitudinal.json`` settings, components and provenance.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from probmed.tables import Genotypes, Visits
from probmed.volumes import UnusableInput
from probmed.workflows.longitudinal import RateResult, RateSettings, fit_rates
from probmed.workflows.outputs import staged
from probmed.workflows.provenance import Provenance

RECORD = "longitudinal.json"
_LEVEL = 0.9


@dataclass(frozen=True)
class RateRun:
    """A run from its folder.

    Arguments:
        subject, time, unit: names of the columns and unit of time of the tables that it takes.
        genotypes: the file that it was fitted with, or None.
        variances: components.
    """

    settings: RateSettings
    visits: Visits
    subject: str
    time: str
    unit: str
    genotypes: Path | None
    variances: Tensor

    @classmethod
    def load(cls, folder: Path) -> RateRun:
        """
        Raises:
            UnusableInput: where there is no such run.
        """
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            known = {f.name for f in fields(RateSettings)}
            chosen: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in record["Settings"].items() if name in known}
            roles: dict[str, Any] = {role: tuple(record["Roles"][role]) for role in ("scalars", "covariates", "categorical")}
            variances = torch.tensor(record["Variances"], dtype=torch.float64)
            genotypes = None if record["Genotypes"] is None else Path(record["Genotypes"])
            visits = Visits.read(folder / "visits.tsv", time_unit="years", time="years", **roles)
            return cls(RateSettings(**chosen), visits, record["Subject"], record["Time"], record["Unit"], genotypes, variances)
        except (OSError, ValueError, KeyError, TypeError) as error:
            fault = f"holds no run of rates that can be read ({error})"
            raise UnusableInput(folder, fault, "give a folder that `probmed train longitudinal` has written") from error

    def read(self, path: Path) -> Visits:
        """A table with the columns of the run's own; the scalar is missing where it is to be predicted."""
        columns = {role: getattr(self.visits, role) for role in ("scalars", "covariates", "categorical")}
        return Visits.read(path, time_unit=self.unit, subject=self.subject, time=self.time, **columns)  # type: ignore[arg-type]

    def predict(self, asked: Visits, genotypes: Genotypes | None = None) -> pd.DataFrame:
        """A row for each visit without the scalar that is not a person's first: mean, standard deviation and 90 % interval of what will be measured.

        Arguments:
            asked: of people of the run or of others; what else is known of them is used.

        Raises:
            UnusableInput: where nothing is asked for, or a person's scalar is not known at baseline.
        """
        scalar, own = self.settings.scalar, self.visits.table
        again = asked.table.set_index(["subject", "years"]).index.isin(own.set_index(["subject", "years"]).index)
        rows = pd.concat([own, asked.table[~again]], ignore_index=True)
        # Each person's visits by time, as ``Visits`` has them.
        rows = rows.assign(person=pd.factorize(rows["subject"])[0]).sort_values(["person", "years"], kind="stable", ignore_index=True)
        visits = replace(self.visits, path=asked.path, table=rows.drop(columns="person"))
        result = fit_rates(visits, self.settings, genotypes, known=self.visits.subjects, variances=self.variances)
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


def write_run(
    result: RateResult,
    folder: Path,
    provenance: Provenance,
    *,
    subject: str,
    time: str,
    unit: str,
    genotypes: Path | None = None,
    tell: Callable[[float], None] = lambda share: None,
) -> dict[str, pd.DataFrame]:
    """Write a run into a folder, all files or none.

    Returns:
        The tables of components and coefficients.

    Raises:
        UnusableInput: where a file cannot be written.
    """
    visits = result.joined.visits
    tables = {"components": result.component_table(tell), "coefficients": result.coefficient_table()}
    record = {
        "Settings": asdict(result.settings),
        "Components": result.components,
        "Variances": result.fit.variances.tolist(),
        "LogLikelihood": result.fit.log_likelihood,
        "Converged": result.fit.converged,
        "Subject": subject,
        "Time": time,
        "Unit": unit,
        "Roles": {role: getattr(visits, role) for role in ("scalars", "covariates", "categorical")},
        "Genotypes": None if genotypes is None else str(genotypes.resolve()),
        "GenotypesUsed": None if result.joined.genotypes is None else result.joined.genotypes.record(),
        "People": result.joined.record(),
        **provenance.record(),
    }
    with staged(folder, "longitudinal") as stage:
        for name, table in (*tables.items(), ("rates", result.rate_table())):
            (stage / f"{name}.tsv").write_text(exact_text(table), encoding="utf-8")
        (stage / "visits.tsv").write_text(exact_text(visits.table), encoding="utf-8")
        (stage / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False, default=_plain) + "\n", encoding="utf-8")
    return tables


def exact_text(table: pd.DataFrame) -> str:
    """A table as TSV with all digits, n/a where there is no value: rates are small numbers."""
    return str(table.to_csv(sep="\t", index=False, na_rep="n/a", float_format="%.10g"))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value)
