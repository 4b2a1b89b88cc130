"""`probmed train longitudinal`: rates of change explained by genes, clinic and phenotype."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from probmed.cli import progress
from probmed.cli.options import DebugOption, QuietOption, command_line, make_folder
from probmed.tables import Genotypes, Visits
from probmed.volumes import UnusableInput
from probmed.workflows.longitudinal import RateSettings, fit_rates
from probmed.workflows.longitudinal_outputs import RECORD, write_run
from probmed.workflows.provenance import Provenance


class TimeUnit(str, Enum):
    """Of the column of time."""

    years = "years"
    days = "days"


class Baseline(str, Enum):
    """The baseline's measurement error; ``models.longitudinal.BASELINES``."""

    same = "same"
    none = "none"
    free = "free"


def longitudinal(
    data: Annotated[Path, typer.Option(help="Table (TSV or CSV), a row a visit: subject, time, scalars, covariates.", show_default=False)],
    scalar: Annotated[str, typer.Option(help="Column whose change is explained.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; made if missing.", show_default=False)],
    genotypes: Annotated[
        Path | None, typer.Option(help="PLINK .bed file of the same people, with .bim and .fam beside it.", show_default=False)
    ] = None,
    min_frequency: Annotated[float, typer.Option(min=0, max=0.5, help="Of the rarer allele of SNPs that are used.")] = 0.01,
    mean: Annotated[str, typer.Option(metavar="NAMES", help="Columns, with commas, whose effect on the rate is linear.", show_default=False)] = "",
    clinical: Annotated[str, typer.Option(metavar="NAMES", help="Columns of the clinical kernel.", show_default=False)] = "",
    phenotype: Annotated[str, typer.Option(metavar="NAMES", help="Columns of the phenotype kernel.", show_default=False)] = "",
    categorical: Annotated[str, typer.Option(metavar="NAMES", help="Which of these columns hold levels, not numbers.", show_default=False)] = "",
    own: Annotated[bool, typer.Option(help="Rates of people's own, that nothing explains.")] = True,
    baseline: Annotated[Baseline, typer.Option(help="The baseline's error: the same as later visits', none, or estimated.")] = Baseline.same,
    subject: Annotated[str, typer.Option(help="Column with the person.")] = "subject",
    time: Annotated[str, typer.Option(help="Column with the time of the visit.")] = "time",
    time_unit: Annotated[TimeUnit, typer.Option(help="Its unit.")] = TimeUnit.years,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Explain how a scalar changes since baseline: variance components of genes, clinic and phenotype.

    Into the folder go components.tsv (variances, shares with intervals, tests), coefficients.tsv, rates.tsv,
    visits.tsv and longitudinal.json. People who lack in one of the tables are left out, and named in the last.

    [bold]Examples[/bold]

        probmed train longitudinal --data visits.tsv --scalar hippocampus --mean age --clinical age,sex,education --categorical sex -o run

        probmed train longitudinal --data visits.tsv --scalar hippocampus --genotypes cohort.bed -o run

        probmed predict run --data new.tsv -o out
    """
    with progress.in_one_line(str(data), debug) as made:
        if (out / RECORD).exists():
            raise UnusableInput(out, "holds a run already", "give another folder with --out")
        levels, used = _names(categorical), [name for text in (mean, clinical, phenotype) for name in _names(text)]
        numeric = [name for name in dict.fromkeys(used) if name not in levels and name != scalar]
        made += make_folder(out)
        inputs = [str(data), *([] if genotypes is None else [str(genotypes)])]
        with progress.collected_warnings(inputs) as lines, progress.progress_bar(out.name, quiet) as tell:
            tell("reading", 0.0)
            visits = Visits.read(
                data, time_unit=time_unit.value, subject=subject, time=time, scalars=[scalar], covariates=numeric, categorical=levels
            )
            people = None if genotypes is None else Genotypes.open(genotypes, count_A1=True).filtered(min_frequency=min_frequency)
            tell("components", 0.1)
            settings = RateSettings(scalar, _names(mean), _names(clinical), _names(phenotype), own, baseline.value)
            result = fit_rates(visits, settings, people)
            provenance = Provenance.of(command_line(), 0, inputs, lines)
            where = {"subject": subject, "time": time, "unit": time_unit.value, "genotypes": genotypes}
            tables = write_run(result, out, provenance, tell=lambda share: tell("tests", 0.3 + 0.7 * share), **where)  # type: ignore[arg-type]
    if not quiet:
        for line in lines:
            progress.say(f"warning: {line}", "yellow")
        rows = tables["components"].dropna(subset=["p"]).to_dict("records")
        parts = [f"{row['component']} {row['variance']:.3g} (p {row['p']:.2g})" for row in rows]
        typer.echo(f"{data}: {result.joined.summary()}\n  variance of the rate: {', '.join(parts)}\n  {out / 'components.tsv'}")


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
