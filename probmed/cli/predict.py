"""`probmed predict`: what a run says of visits to come."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from probmed.cli import progress
from probmed.cli.options import DebugOption, QuietOption, command_line, make_folder
from probmed.tables import Genotypes
from probmed.workflows.longitudinal_outputs import RateRun, exact_text
from probmed.workflows.outputs import check_outputs, described_table, staged, write_sidecars
from probmed.workflows.provenance import Provenance

_COLUMNS = {
    "subject": "as in the table",
    "years": "since the subject's baseline",
    "mean": "of the predictive distribution, in the scalar's unit",
    "sd": "its standard deviation; of the value as it will be measured",
    "low": "lower end of its central 90 % interval",
    "high": "upper end",
}


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of `probmed train longitudinal`.")],
    data: Annotated[Path, typer.Option(help="Table with the run's columns; the scalar is empty where it is to be predicted.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the outputs; made if missing.", show_default=False)],
    genotypes: Annotated[
        Path | None, typer.Option(help="PLINK .bed file with the run's people and these; the run's own by default.", show_default=False)
    ] = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Predict a scalar at later visits, of people of the run or of others, with intervals.

    A row of the table without the scalar is predicted from the person's baseline row, whatever later visits are known,
    and everyone else's. Into the folder goes predictions.tsv.

    [bold]Example[/bold]

        probmed predict run --data new.tsv -o out
    """
    with progress.in_one_line(str(data), debug) as made:
        fitted = RateRun.load(run)
        plink = genotypes or fitted.genotypes
        inputs = [str(path) for path in (run / "longitudinal.json", data, plink) if path is not None]
        names = {"predictions": "predictions.tsv"}
        check_outputs(out, ["predictions.tsv", "predictions.json"], "predictions", [data], ".json", "probmed predict")
        made += make_folder(out)
        with progress.collected_warnings(inputs) as lines, progress.progress_bar(out.name, quiet) as tell:
            tell("predicting", 0.1)
            people = None if plink is None else Genotypes.open(plink, count_A1=True).filtered(min_frequency=0.01)
            table = fitted.predict(fitted.read(data), people)
            with staged(out, "predictions") as stage:
                (stage / "predictions.tsv").write_text(exact_text(table), encoding="utf-8")
                described = described_table(f"Predictions of {fitted.settings.scalar}.", _COLUMNS)
                write_sidecars(stage, names, {"predictions": described}, Provenance.of(command_line(), 0, inputs, lines))
    if not quiet:
        for line in lines:
            progress.say(f"warning: {line}", "yellow")
        typer.echo(f"{data}: {len(table)} predictions of {fitted.settings.scalar}\n  {out / 'predictions.tsv'}")
