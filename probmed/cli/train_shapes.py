"""`probmed train shapes`: a prior of shapes from label maps, which segments scans of any contrast."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from probmed.cli import progress
from probmed.cli.labelled_tables import FoldOption, NamesOption, read_names
from probmed.cli.options import DebugOption, QuietOption, SeedOption, check_run, make_folder
from probmed.report.panels import png
from probmed.tables import check_columns, parts_of, read_table
from probmed.volumes import atomic_write


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
    scans: Annotated[
        Path | None,
        typer.Option(
            help="Table with a column scan: scans of one contrast without labels, which tell where the tissues of the background lie.",
            show_default=False,
        ),
    ] = None,
    reader_steps: Annotated[int, typer.Option(min=1, help="Of the optimiser, on the scans of --scans.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a prior of shapes on label maps; no scan is seen, unless --scans has some, whose labels nobody needs to know.

    From those it learns where the tissues of the background lie, without which labels grow into neighbours of their
    own intensity, and to guess a scan's shape, from which `segment` begins.
    `probmed segment --model` then finds shape and appearance of each scan anew, whatever its contrast. Into the
    folder go checkpoint.safetensors, log.csv, shapes.safetensors, shapes.json, shapes.png (shapes that are drawn,
    label maps rebuilt, and what each code changes) and summary.json (codes in use; with --fold log p(S) of the
    label maps left out, beside that of the mean atlas). A run that was stopped goes on with --resume and ends in
    the same numbers.

    [bold]Examples[/bold]

        probmed train shapes --data maps.tsv --spacing 1.5 -o run

        probmed train shapes --data maps.tsv --scans scans.tsv -o run

        probmed segment scan.nii.gz --model run -o out
    """
    with progress.in_one_line(str(data), debug) as made:
        check_run(out, resume)
        table = read_table(data)
        check_columns(data, table, ["labels"])
        rows, held = (table, None) if fold is None else parts_of(table, data, fold)
        rows = rows.dropna(subset=["labels"])
        named = {} if names is None else read_names(names)
        unlabelled = None if scans is None else read_table(scans)
        if scans is not None and unlabelled is not None:
            check_columns(scans, unlabelled, ["scan"])
        made += make_folder(out)
        workflow, summaries, figures, sets, training_of, amortisation = (
            importlib.import_module(f"probmed.{name}")
            for name in (
                "workflows.shapes",
                "workflows.shape_summary",
                "report.shape_figures",
                "workflows.training_sets",
                "inference.training",
                "workflows.amortisation",
            )
        )
        with progress.collected_warnings([str(data)]), progress.progress_bar(out.name, quiet) as tell:
            tell("reading", 0.0)
            maps = workflow.read_label_maps(rows, data, spacing)
            checked = None if held is None else workflow.read_label_maps(held, data, grid=maps.grid, codes=maps.codes).labels
            read = None if unlabelled is None else workflow.read_unlabelled(unlabelled.dropna(subset=["scan"]), scans, maps.grid.ndim)
            known = {0: "background", **amortisation.names_of(rows, data), **named}
            trained, log = workflow.fit_shapes(
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
                tell=lambda row, share: tell(f"step {row['step']:.0f}, {row['loss']:.1f} nats", 0.9 * share),
            )
            if read is not None:
                workflow.fit_background(trained, *read, tell=lambda share: tell("tissues of the background", 0.9))
                (out / "reader").mkdir(exist_ok=True)
                workflow.fit_reader(
                    trained,
                    *read,
                    training_of.TrainingSettings(reader_steps, learning_rate, seed=seed, every=every),
                    folder=out / "reader",
                    tell=lambda row, share: tell(f"scans, step {row['step']:.0f}, {row['loss']:.1f} nats", 0.9 + 0.05 * share),
                )
                trained.save(out)
            tell("measuring", 0.95)
            summary = summaries.summarise(trained, maps.labels, checked, seed=seed)
            summary.save(out)
            with atomic_write(out / "shapes.png") as path:
                path.write_bytes(png(figures.shape_figure(trained, maps.labels if checked is None else checked, summary.active, seed)))
    if not quiet:
        left = f", {-log[-1]['held_out']:.1f} of those left out" if "held_out" in log[-1] else ""
        typer.echo(f"{out}: {int(log[-1]['step'])} steps, {log[-1]['loss']:.1f} nats a label map{left}")
        typer.echo(f"  {summary.line}\n  {out / 'shapes.png'}")
