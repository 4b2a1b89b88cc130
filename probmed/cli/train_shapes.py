"""`probmed train shapes`: a prior of shapes from label maps, which segments scans of any contrast."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from probmed.cli import progress
from probmed.cli.labelled_tables import FoldOption, NamesOption, read_names
from probmed.cli.options import DebugOption, QuietOption, SeedOption, check_run, make_folder
from probmed.tables import check_columns, parts_of, read_table


def shapes(
    data: Annotated[
        Path, typer.Option(help="Table (TSV or CSV) with a column labels: paths, relative ones to the table; perhaps fold.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; made if missing.", show_default=False)],
    fold: FoldOption = None,
    names: NamesOption = None,
    codes: Annotated[int, typer.Option(min=1, help="Numbers that a shape is described by.")] = 16,
    augment: Annotated[bool, typer.Option(help="Change label maps by small deformations at random.")] = True,
    spacing: Annotated[float | None, typer.Option(min=0.01, help="Of the shapes' grid, mm; the finest map's by default.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Label maps a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(min=0, help="At first; it falls to zero.")] = 2e-3,
    every: Annotated[int, typer.Option(min=1, help="Steps between rows of the log and checkpoints.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a prior of shapes on label maps; no scan is seen.

    `probmed segment --model` then finds shape and appearance of each scan anew, whatever its contrast. Into the
    folder go checkpoint.safetensors, log.csv, shapes.safetensors and shapes.json. A run that was stopped goes on
    with --resume and ends in the same numbers.

    [bold]Examples[/bold]

        probmed train shapes --data maps.tsv --spacing 1.5 -o run

        probmed segment scan.nii.gz --model run -o out
    """
    with progress.in_one_line(str(data), debug) as made:
        check_run(out, resume)
        table = read_table(data)
        check_columns(data, table, ["labels"])
        rows, held = (table, None) if fold is None else parts_of(table, data, fold)
        rows = rows.dropna(subset=["labels"])
        named = {} if names is None else read_names(names)
        made += make_folder(out)
        workflow, sets, training_of, amortisation = (
            importlib.import_module(f"probmed.{name}")
            for name in ("workflows.shapes", "workflows.training_sets", "inference.training", "workflows.amortisation")
        )
        with progress.collected_warnings([str(data)]), progress.progress_bar(out.name, quiet) as tell:
            tell("reading", 0.0)
            maps = workflow.read_label_maps(rows, data, spacing)
            checked = None if held is None else workflow.read_label_maps(held, data, grid=maps.grid, codes=maps.codes).labels
            known = {0: "background", **amortisation.names_of(rows, data), **named}
            _, log = workflow.fit_shapes(
                maps.labels,
                maps.grid,
                maps.codes,
                [known.get(code, str(code)) for code in maps.codes],
                workflow.ShapeSettings(codes),
                training_of.TrainingSettings(steps, learning_rate, seed=seed, every=every),
                batch=batch,
                augmentation=sets.Augmentation(velocity_mm=1.0, translation_mm=1.0, log_scale=0.05, rotation=0.07) if augment else None,
                held_out=checked,
                folder=out,
                tell=lambda row, share: tell(f"step {row['step']:.0f}, {row['loss']:.1f} nats", share),
            )
    if not quiet:
        left = f", {-log[-1]['held_out']:.1f} of those left out" if "held_out" in log[-1] else ""
        typer.echo(f"{out}: {int(log[-1]['step'])} steps, {log[-1]['loss']:.1f} nats a label map{left}")
