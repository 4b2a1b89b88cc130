"""`probmed predict`: what a run says of visits to come."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from probmed.cli import progress
from probmed.cli.cohorts import ClinicalTableOption
from probmed.cli.options import DebugOption, Device, DeviceOption, DrawsOption, QuietOption, SeedOption, check_device, command_line, make_folder
from probmed.tables import Genotypes
from probmed.volumes import UnusableInput
from probmed.workflows.growth import Registrations
from probmed.workflows.growth_outputs import REGISTRATIONS, VOLUME_COLUMNS, GrowthRun, check_forecast_outputs, write_forecast
from probmed.workflows.longitudinal_outputs import RECORD, RateRun, exact_text, read_record
from probmed.workflows.outputs import check_outputs, described_table, staged, write_sidecars
from probmed.workflows.provenance import Provenance
from probmed.workflows.shape_code_outputs import RECORD as CODES_RECORD
from probmed.workflows.shape_code_outputs import CodesRun

_PLACE = {"subject": "as in the table", "years": "since the subject's baseline"}
_COLUMNS = {
    **_PLACE,
    "mean": "of the predictive distribution, in the scalar's unit",
    "sd": "its standard deviation; of the value as it will be measured",
    "low": "lower end of its central 90 % interval",
    "high": "upper end",
}


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of `probmed train longitudinal` or `gp-prior-vae`.")],
    data: Annotated[
        Path, typer.Option(help="Table with the run's columns; the scalar or scan is empty where it is to be predicted.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the outputs; made if missing.", show_default=False)],
    genotypes: Annotated[
        Path | None, typer.Option(help="PLINK .bed file with the run's people and these; the run's own by default.", show_default=False)
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of scans: column with label maps at baseline; else the atlas's labels are carried.", show_default=False),
    ] = None,
    clinical_table: ClinicalTableOption = None,
    draws: DrawsOption = 200,
    samples: Annotated[int, typer.Option(min=0, help="Of scans: how many of the drawn follow-up scans are written, each as it might look.")] = 0,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Predict a scalar or a scan at later visits, of people of the run or of others, with intervals.

    A row of the table without the scalar or scan is predicted from the person's baseline row, whatever later visits
    are known, and everyone else's. Who has no baseline scan is predicted on the atlas. Into the folder goes
    predictions.tsv; of scans also, for each row, the follow-up scan, its labels and their volumes, the warp, maps of
    yearly growth with the probability of shrinkage, and as many drawn follow-up scans as --samples says.

    [bold]Example[/bold]

        probmed predict run --data new.tsv -o out
    """
    with progress.in_one_line(str(data), debug) as made:
        check_device(device)
        fitted = _load(run)
        plink = genotypes or fitted.source.genotypes
        if genotypes is not None and fitted.source.genotypes is None:
            raise UnusableInput(genotypes, "is of no use to a run without genotypes", "leave --genotypes out")
        if samples and isinstance(fitted, RateRun):
            raise UnusableInput(run, "is a run of a scalar, of which there are no scans to draw", "leave --samples out")
        if samples > draws:
            raise UnusableInput(run, f"is to give {samples} scans of {draws} draws", "ask for as many --draws at least")
        record = run / (CODES_RECORD if isinstance(fitted, CodesRun) else RECORD)
        inputs = [str(path) for path in (record, data, plink, clinical_table) if path is not None]
        check_outputs(out, ["predictions.tsv", "predictions.json"], "predictions", [data], ".json", "probmed predict")
        made += make_folder(out)
        with progress.collected_warnings(inputs) as lines, progress.progress_bar(out.name, quiet) as tell:
            tell("predicting", 0.1)
            people = None if plink is None else Genotypes.open(plink, count_A1=True)
            provenance = Provenance.of(command_line(), seed, inputs, lines)
            if isinstance(fitted, RateRun):
                what, columns = fitted.settings.scalar, _COLUMNS
                table = fitted.predict(fitted.read(data, clinical_table), people)
            else:
                what, columns = fitted.scans, _PLACE | VOLUME_COLUMNS
                asked = fitted.read(data, labels, clinical_table)
                check_forecast_outputs(out, fitted.wanted(asked), [data], samples)
                kept = Registrations(out / REGISTRATIONS, seed=fitted.seed, device=device.value)
                options: dict[str, Any] = {"labels": labels, "draws": draws, "samples": samples, "seed": seed}
                found = fitted.predict(asked, kept, people, tell=partial(tell, "predicting"), **options)
                table = pd.concat([write_forecast(each, out, subject, provenance, [data]) for subject, each in found], ignore_index=True)
            with staged(out, "predictions") as stage:
                (stage / "predictions.tsv").write_text(exact_text(table), encoding="utf-8")
                described = described_table(f"Predictions of {what}.", columns)
                write_sidecars(stage, {"predictions": "predictions.tsv"}, {"predictions": described}, provenance)
    if not quiet:
        for line in lines:
            progress.say(f"warning: {line}", "yellow")
        count = len(table.drop_duplicates(["subject", "years"]))
        typer.echo(f"{data}: {count} predictions of {what}\n  {out / 'predictions.tsv'}")


def _load(run: Path) -> RateRun | GrowthRun | CodesRun:
    """By the record that is in the folder."""
    if (run / CODES_RECORD).exists():
        return CodesRun.load(run)
    return GrowthRun.load(run) if "Growth" in read_record(run) else RateRun.load(run)
