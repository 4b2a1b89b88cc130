"""`probmed train gp-prior-vae`: codes of how bodies change, which follow genes, clinic and time."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

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
from probmed.report import codes_page
from probmed.tables import Genotypes
from probmed.volumes import UnusableInput
from probmed.workflows.growth import GrowthSettings, Registrations
from probmed.workflows.growth_outputs import REGISTRATIONS
from probmed.workflows.longitudinal import RateSettings
from probmed.workflows.longitudinal_outputs import REPORT, TableSource
from probmed.workflows.provenance import Provenance
from probmed.workflows.regional import regions_of_codes
from probmed.workflows.shape_code_outputs import RECORD, write_codes_run
from probmed.workflows.shape_codes import CodeSettings


def gp_prior_vae(
    data: Annotated[Path, typer.Option(help="Table (TSV or CSV), a row a visit: subject, time, scan, covariates.", show_default=False)],
    scans: Annotated[str, typer.Option(metavar="NAME", help="Column of scans (paths).", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; made if missing.", show_default=False)],
    atlas_image: AtlasImageOption = None,
    atlas_labels: AtlasLabelsOption = None,
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
    codes: Annotated[int, typer.Option(min=1, help="Numbers by which a change of shape is coded.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Of the training, each on all visits.")] = 1500,
    learning_rate: Annotated[float, typer.Option(min=1e-6, help="At first; it falls to zero.")] = 5e-3,
    spacing: SpacingOption = None,
    subject: SubjectOption = "subject",
    time: TimeOption = "time",
    time_unit: TimeUnitOption = TimeUnit.years,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Learn codes of how bodies change, whose prior follows genes, clinic, phenotype and time.

    Baseline scans are registered to the atlas, later ones to the baseline. Into the folder go shares.tsv (how each code's variance divides),
    codes.tsv, regions.tsv, visits.tsv, codes.safetensors, report.html and gp-prior-vae.json. A run that was stopped goes on when
    the command is given again.

    [bold]Examples[/bold]

        probmed train gp-prior-vae --data visits.tsv --scans t1 --mean age,sex --categorical sex --genotypes cohort.bed -o run

        probmed predict run --data new.tsv -o out
    """
    with progress.in_one_line(str(data), debug) as made:
        if (out / RECORD).exists():
            raise UnusableInput(out, "holds a run already", "give another folder with --out")
        check_device(device)
        levels, used = names_in(categorical), [name for text in (mean, clinical, phenotype) for name in names_in(text)]
        numeric = [name for name in dict.fromkeys(used) if name not in levels]
        sets = read_sets(regions, genotypes)
        atlas = read_atlas(atlas_image, atlas_labels)
        made += make_folder(out)
        paths = (data, genotypes, regions, clinical_table, atlas_image, atlas_labels)
        inputs = [str(path) for path in paths if path is not None]
        with progress.collected_warnings(inputs) as lines, progress.progress_bar(out.name, quiet) as tell:
            tell("reading", 0.0)
            source = TableSource(subject, time, time_unit.value, genotypes)
            visits = source.read(data, clinical=clinical_table, covariates=numeric, categorical=levels, scans=[scans])
            people = None if genotypes is None else Genotypes.open(genotypes, count_A1=True)
            rates = RateSettings(
                scans,
                names_in(mean),
                names_in(clinical),
                names_in(phenotype),
                min_frequency=min_frequency,
                max_missing=max_missing,
                genetic=genetic.value,
                sets=sets,
            )
            settings = CodeSettings(GrowthSettings(rates, spacing_mm=spacing), codes, steps=steps, learning_rate=learning_rate)
            kept = Registrations(out / REGISTRATIONS, seed=seed, device=device.value)
            training = importlib.import_module("probmed.workflows.shape_code_training")  # Fabric takes seconds to import
            trained = training.fit_codes(visits, settings, atlas, kept, people, seed=seed, folder=out, progress=tell)
            provenance = Provenance.of(command_line(), seed, inputs, lines)
            volumes = regions_of_codes(trained, people)
            page = codes_page(trained, volumes, kept, provenance, data.stem, people, seed)
            write_codes_run(trained, volumes, out, provenance, source, page)
    if not quiet:
        for line in lines:
            progress.say(f"warning: {line}", "yellow")
        found = trained.shares().drop(columns="code").mean().sort_values(ascending=False)
        parts = ", ".join(f"{name} {share:.2f}" for name, share in found.items())
        who = f"{len(trained.visits.subjects)} people" if trained.joined is None else trained.joined.summary()
        typer.echo(f"{data}: {who}\n  shares of codes' variance: {parts}\n  {out / REPORT}")
