"""`probmed train longitudinal`: rates of change, of a scalar or of the whole body, explained by genes, clinic and phenotype."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from probmed.cli import progress
from probmed.cli.cohorts import (
    AtlasImageOption,
    AtlasLabelsOption,
    CategoricalOption,
    ClinicalOption,
    ClinicalTableOption,
    FrequencyOption,
    Genetic,
    GeneticOption,
    GenotypesOption,
    MeanOption,
    MissingOption,
    PhenotypeOption,
    RegionsOption,
    SpacingOption,
    SubjectOption,
    TimeOption,
    TimeUnit,
    TimeUnitOption,
    names_in,
    read_atlas,
    read_sets,
)
from probmed.cli.options import DebugOption, Device, DeviceOption, QuietOption, SeedOption, check_device, command_line, make_folder
from probmed.report import growth_page, rates_page
from probmed.tables import Genotypes
from probmed.volumes import UnusableInput
from probmed.workflows.growth import GrowthSettings, Registrations, fit_growth
from probmed.workflows.growth_outputs import REGISTRATIONS, write_growth_run
from probmed.workflows.longitudinal import RateSettings, fit_rates
from probmed.workflows.longitudinal_outputs import RECORD, REPORT, TableSource, write_run
from probmed.workflows.provenance import Provenance
from probmed.workflows.regional import regions_of_growth


class Basis(str, Enum):
    """Of fields; ``workflows.growth.BASES``."""

    principal = "principal"
    cosine = "cosine"


class Baseline(str, Enum):
    """The baseline's measurement error; ``models.longitudinal.BASELINES``."""

    same = "same"
    none = "none"
    free = "free"


def longitudinal(
    data: Annotated[Path, typer.Option(help="Table (TSV or CSV), a row a visit: subject, time, scalars, covariates.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; made if missing.", show_default=False)],
    scalar: Annotated[str | None, typer.Option(help="Column of numbers whose change is explained.", show_default=False)] = None,
    scans: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of scans (paths) whose deformation is explained, in its place.", show_default=False)
    ] = None,
    atlas_image: AtlasImageOption = None,
    atlas_labels: AtlasLabelsOption = None,
    basis: Annotated[Basis, typer.Option(help="Fields of which rates of deformation consist.")] = Basis.principal,
    spacing: SpacingOption = None,
    separate: Annotated[
        bool, typer.Option("--separate/--common", help="Of scans: variance components for each coefficient of a field, or shares in common.")
    ] = True,
    genotypes: GenotypesOption = None,
    min_frequency: FrequencyOption = 0.01,
    max_missing: MissingOption = 1.0,
    genetic: GeneticOption = Genetic.grm,
    regions: RegionsOption = None,
    clinical_table: ClinicalTableOption = None,
    mean: MeanOption = "",
    clinical: ClinicalOption = "",
    phenotype: PhenotypeOption = "",
    categorical: CategoricalOption = "",
    own: Annotated[bool, typer.Option(help="Rates of people's own, that nothing explains.")] = True,
    baseline: Annotated[Baseline, typer.Option(help="The baseline's error: the same as later visits', none, or estimated.")] = Baseline.same,
    subject: SubjectOption = "subject",
    time: TimeOption = "time",
    time_unit: TimeUnitOption = TimeUnit.years,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Explain how a scalar, or the body, changes since baseline: variance components of genes, clinic and phenotype.

    Into the folder go components.tsv (variances, shares with intervals, tests), coefficients.tsv, rates.tsv,
    visits.tsv, report.html and longitudinal.json. People who lack in one of the tables are left out, and named in the last.
    With --scans there are regions.tsv (shares of regions' volumes) and maps of each covariate's effect on growth instead of
    coefficients.tsv and rates.tsv; registrations are kept, so that a run that was stopped goes on when the command is given again.

    [bold]Examples[/bold]

        probmed train longitudinal --data visits.tsv --scalar hippocampus --mean age --clinical age,sex,education --categorical sex -o run

        probmed train longitudinal --data visits.tsv --scalar hippocampus --genotypes cohort.bed -o run

        probmed train longitudinal --data visits.tsv --scans t1 --mean age --genotypes cohort.bed -o run

        probmed predict run --data new.tsv -o out
    """
    with progress.in_one_line(str(data), debug) as made:
        if (out / RECORD).exists():
            raise UnusableInput(out, "holds a run already", "give another folder with --out")
        explained = _explained(data, scalar, scans)
        check_device(device)
        levels, used = names_in(categorical), [name for text in (mean, clinical, phenotype) for name in names_in(text)]
        numeric = [name for name in dict.fromkeys(used) if name not in levels and name != scalar]
        sets = read_sets(regions, genotypes)
        atlas = None if scans is None else read_atlas(atlas_image, atlas_labels)
        made += make_folder(out)
        paths = (data, genotypes, regions, clinical_table, atlas_image, atlas_labels)
        inputs = [str(path) for path in paths if path is not None]
        with progress.collected_warnings(inputs) as lines, progress.progress_bar(out.name, quiet) as tell:
            tell("reading", 0.0)
            source = TableSource(subject, time, time_unit.value, genotypes)
            columns: dict[str, Any] = {"scalars": [] if scalar is None else [scalar], "scans": [] if scans is None else [scans]}
            visits = source.read(data, clinical=clinical_table, covariates=numeric, categorical=levels, **columns)
            people = None if genotypes is None else Genotypes.open(genotypes, count_A1=True)
            settings = RateSettings(
                explained,
                names_in(mean),
                names_in(clinical),
                names_in(phenotype),
                own,
                baseline.value,
                min_frequency,
                max_missing,
                genetic.value,
                sets,
            )
            if atlas is None:
                tell("components", 0.1)
                result = fit_rates(visits, settings, people)
                components = result.component_table(lambda share: tell("tests", 0.3 + 0.5 * share))
                provenance = Provenance.of(command_line(), seed, inputs, lines)
                page = rates_page(result, components, provenance, data.stem, lambda share: tell("held-out visits", 0.8 + 0.2 * share))
                write_run(result, components, out, provenance, source, page)
            else:
                kept = Registrations(out / REGISTRATIONS, seed=seed, device=device.value)
                fields = GrowthSettings(settings, spacing_mm=spacing, basis=basis.value, separate=separate)
                growth = fit_growth(visits, fields, atlas, kept, people, progress=lambda stage, share: tell(stage, 0.8 * share))
                result, provenance = growth.rates, Provenance.of(command_line(), seed, inputs, lines)
                components = result.component_table(lambda share: tell("tests", 0.8 + 0.1 * share))
                volumes = regions_of_growth(growth, people)
                page = growth_page(growth, components, volumes, kept, provenance, data.stem, lambda share: tell("held-out visits", 0.9 + 0.1 * share))
                write_growth_run(growth, components, volumes, out, provenance, source, page)
    if not quiet:
        for line in lines:
            progress.say(f"warning: {line}", "yellow")
        rows = components.dropna(subset=["p"]).to_dict("records")
        parts = [f"{row['component']} {row['variance']:.3g} (p {row['p']:.2g})" for row in rows]
        typer.echo(f"{data}: {result.joined.summary()}\n  variance of the rate: {', '.join(parts)}\n  {out / REPORT}")


def _explained(data: Path, scalar: str | None, scans: str | None) -> str:
    """The column whose change is explained.

    Raises:
        UnusableInput: where there is none, or two.
    """
    chosen = [name for name in (scalar, scans) if name is not None]
    if len(chosen) != 1:
        raise UnusableInput(data, f"is to be explained in {len(chosen)} columns", "give one of --scalar and --scans")
    return chosen[0]
