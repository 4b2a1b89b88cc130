"""`probmed template`: the template of a cohort, plain or as a function of covariates."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from torch import Tensor

from probmed.cli import progress
from probmed.cli.options import (
    DebugOption,
    Device,
    DeviceOption,
    QuietOption,
    SeedOption,
    check_device,
    command_line,
    make_folder,
)
from probmed.report import template_page
from probmed.tables import read_table
from probmed.volumes import UnusableInput, Volume, read_labels, read_scan
from probmed.workflows.propagation import check_same_grid
from probmed.workflows.provenance import Provenance
from probmed.workflows.template_outputs import check_template_outputs, template_names, write_template
from probmed.workflows.templates import TemplateSettings, estimate_template


class TemplateSimilarity(str, Enum):
    """The likelihood; ``workflows.templates.SIMILARITIES``."""

    correlation = "correlation"
    gaussian = "gaussian"


@dataclass(frozen=True)
class _Cohort:
    """What a table holds: paths of scans and label maps, none or one each, and covariates ``(N, P)``."""

    scans: list[Path]
    labels: list[Path]
    covariates: Tensor
    names: list[str]


def template(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="TABLE",
            help="TSV or CSV with a column scan and perhaps labels (paths, relative ones to the table) and covariates.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the outputs; made if missing.", show_default=False)],
    covariates: Annotated[
        str, typer.Option(metavar="NAMES", help="Columns of numbers on which shape and intensity depend, with commas between.", show_default=False)
    ] = "",
    similarity: Annotated[
        TemplateSimilarity, typer.Option(help="Likelihood of a scan: local correlation, or Gaussian noise.")
    ] = TemplateSimilarity.correlation,
    affine: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Parameters of each scan's affine map: 6, 7, 12, in 2D 3, 4, 6; 0 for middles onto middles. All if not given.",
            show_default=False,
        ),
    ] = None,
    spacing: Annotated[float | None, typer.Option(min=0.01, help="Of the template, mm; the finest scan's by default.")] = None,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Estimate the template of a cohort, with every scan's deformation, jointly.

    Into the folder go template.nii.gz, warps between each scan and the template, template_scans.tsv and
    template_report.html; with a column labels template_label-X_probseg.nii.gz; with covariates the template at the
    ends of each and a map of local growth.

    [bold]Examples[/bold]

        probmed template scans.tsv -o out

        probmed template scans.tsv --covariates age,sex --spacing 2 -o out
    """
    texts = [str(data)]
    with progress.in_one_line(str(data), debug) as made:
        check_device(device)
        cohort = _read_cohort(read_table(data), data, [name.strip() for name in covariates.split(",") if name.strip()])
        inputs = (data, *cohort.scans, *cohort.labels)
        texts = [str(path) for path in inputs]
        made += make_folder(out)
        with progress.collected_warnings(texts) as lines, progress.progress_bar(data.stem, quiet) as tell:
            tell("reading", 0.0)
            scans = [read_scan(path) for path in cohort.scans]
            labels = [_labels_of(scan, path) for scan, path in zip(scans, cohort.labels, strict=False)]
            values = [str(int(k)) for k in torch.cat([m.data.unique() for m in labels]).unique() if k != 0] if labels else []
            names = template_names(cohort.scans, cohort.names, values)
            check_template_outputs(out, names, inputs)
            settings = TemplateSettings(similarity.value, affine, spacing)
            result = estimate_template(
                scans, cohort.covariates, cohort.names, settings=settings, seed=seed, device=device.value, progress=lambda s, x: tell(s, 0.9 * x)
            )
            tell("writing", 0.9)
            provenance = Provenance.of(command_line(), seed, texts, lines)
            page = template_page(result, provenance, data.stem)
            write_template(result, out, names, provenance, page, labels=labels, label_names=values, protect=inputs)
    if not quiet:
        for line in lines:
            progress.say(f"warning: {line}", "yellow")
        typer.echo(f"{data}: template of {len(scans)} scans, {len(result.history)} rounds\n  {out / names['report']}")


def _read_cohort(table: Any, source: Path, covariates: list[str]) -> _Cohort:
    """Paths and covariates of a table.

    Raises:
        UnusableInput: for columns that are missing, and covariates that are no numbers, are missing, or do not vary.
    """
    for name in ("scan", *covariates):
        if name not in table.columns:
            remedy = f"name the column {name}" if name == "scan" else "choose covariates of the table's columns"
            raise UnusableInput(source, f"has no column {name} (it has {', '.join(map(str, table.columns))})", remedy)
    if table["scan"].isna().any():
        raise UnusableInput(source, f"has no scan in row {int(table['scan'].isna().argmax()) + 2}", "give a path, or leave the row out")
    columns = []
    for name in covariates:
        numbers = pd.to_numeric(table[name], errors="coerce")
        if numbers.isna().any():
            row = int(numbers.isna().argmax())
            cell = table[name].iloc[row]
            remedy = "give numbers (of groups 0 and 1), or leave the row out"
            raise UnusableInput(source, f"has no number but {cell!s} as {name} in row {row + 2}", remedy)
        if numbers.nunique() < 2:
            raise UnusableInput(source, f"has the same {name} in every row", "leave this covariate out")
        columns.append(torch.tensor(numbers.to_numpy(dtype=float)))
    labels = table["labels"] if "labels" in table.columns else pd.Series(dtype=str)
    if labels.isna().any():
        raise UnusableInput(source, f"has no labels in row {int(labels.isna().argmax()) + 2}", "give labels for all scans, or none")
    values = torch.stack(columns, 1) if columns else torch.zeros(len(table), 0)
    return _Cohort([source.parent / p for p in table["scan"]], [source.parent / p for p in labels], values, covariates)


def _labels_of(scan: Volume, path: Path) -> Volume:
    labels = read_labels(path)
    check_same_grid(labels, scan)
    return labels
