"""`probmed train segmentation`: a network that labels scans as those of a table are labelled."""

from __future__ import annotations

import importlib
import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from probmed.cli import progress
from probmed.cli.options import DebugOption, Device, DeviceOption, QuietOption, SeedOption, check_device, check_run, make_folder
from probmed.tables import read_table
from probmed.volumes import UnusableInput


class Network(str, Enum):
    """``segmentation_networks.NETWORKS``."""

    unet = "unet"
    fcn = "fcn"
    deepmedic = "deepmedic"
    voxelwise = "voxelwise"


class Examples(str, Enum):
    """What the network is trained on; ``workflows.training_sets``."""

    scans = "scans"
    contrasts = "contrasts"


def segmentation(
    data: Annotated[
        Path,
        typer.Option(help="Table (TSV or CSV) with columns scan and labels: paths, relative ones to the table; perhaps fold.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; made if missing.", show_default=False)],
    fold: Annotated[
        str | None, typer.Option(help="Rows of this fold are left out of the training, score it, and calibrate the network.", show_default=False)
    ] = None,
    names: Annotated[Path | None, typer.Option(help='JSON file with the labels\' names, {"1": "GM", …}.', show_default=False)] = None,
    network: Annotated[Network, typer.Option(help="The network's body.")] = Network.unet,
    examples: Annotated[Examples, typer.Option(help="The scans, or scans of random contrasts with their labels' shapes.")] = Examples.scans,
    augment: Annotated[bool, typer.Option(help="Change shape and appearance of examples at random.")] = True,
    dropout: Annotated[float, typer.Option(min=0, max=0.9, help="Share of features that training leaves out.")] = 0.0,
    spacing: Annotated[float | None, typer.Option(min=0.01, help="Of the network's grid, mm; the finest scan's by default.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser.")] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="Scans a step.")] = 2,
    learning_rate: Annotated[float, typer.Option(min=0, help="At first; it falls to zero.")] = 2e-3,
    every: Annotated[int, typer.Option(min=1, help="Steps between rows of the log and checkpoints.")] = 100,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a segmentation network on a table of labelled scans.

    Into the folder go checkpoint.safetensors, log.csv, network.safetensors and network.json. A run that was
    stopped goes on with --resume and ends in the same numbers.

    [bold]Examples[/bold]

        probmed train segmentation --data scans.tsv --fold 1 -o run

        probmed segment scan.nii.gz --model run -o out
    """
    with progress.in_one_line(str(data), debug) as made:
        check_device(device)
        check_run(out, resume)
        table, named = read_table(data), {} if names is None else _names(names)
        training_rows, held = _parts(table, data, fold)
        made += make_folder(out)
        supervision, sets, training_of, amortisation = (
            importlib.import_module(f"probmed.{name}")
            for name in ("workflows.supervision", "workflows.training_sets", "inference.training", "workflows.amortisation")
        )
        fabric = training_of.Fabric(accelerator="cuda" if device is Device.cuda else device.value, devices=1)
        fabric.launch()
        with progress.collected_warnings([str(data)]), progress.progress_bar(out.name, quiet) as tell:
            tell("reading", 0.0)
            cohort, grid = amortisation.read_cohort(training_rows, data, spacing, least=1)
            if bool((cohort.labels < 0).any()):
                raise UnusableInput(data, "has scans without labels", "give labels to each, or leave the scan out")
            codes = cohort.codes
            checked = None if held is None else amortisation.read_cohort(held, data, grid=grid, codes=codes, least=1)[0].to(fabric.device)
            cohort = cohort.to(fabric.device)
            change = sets.Augmentation() if augment else None
            if examples is Examples.contrasts:
                regions = [sets.intensity_regions(image, labels) for image, labels in zip(cohort.images[:, 0], cohort.labels, strict=True)]
                drawn = sets.random_contrast(supervision.torch.stack(regions), cohort.labels, grid, batch, change)
            else:
                drawn = sets.labelled(cohort.images, cohort.labels, grid, batch, change)
            trained = supervision.TrainedSegmenter.build(
                grid, supervision.SegmenterSettings(network.value, dropout), codes, {**amortisation.names_of(training_rows, data), **named}, seed
            )
            trained.network.to(fabric.device)

            def report(row: dict[str, float], share: float) -> None:
                score = f", Dice {row['dice']:.3f}" if "dice" in row else ""
                tell(f"step {row['step']:.0f}, loss {row['loss']:.4g}{score}", share)

            log = supervision.train_segmenter(
                trained,
                drawn,
                training_of.TrainingSettings(steps, learning_rate, seed=seed, every=every),
                folder=out,
                validation=checked,
                fabric=fabric,
                described={"scans": list(cohort.names), "examples": examples.value, "augment": augment, "batch": batch},
                tell=report,
            )
    if not quiet:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in log[-1].items() if name in ("loss", "dice", "nll"))
        typer.echo(f"{out}: {int(log[-1]['step'])} steps, {numbers}")


def _parts(table: pd.DataFrame, source: Path, fold: str | None) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Rows for training, and those of the fold.

    Raises:
        UnusableInput: for columns that are missing, and a fold without scans or with all.
    """
    missing = [name for name in ("scan", "labels", *([] if fold is None else ["fold"])) if name not in table.columns]
    if missing:
        raise UnusableInput(source, f"has no column {missing[0]} (it has {', '.join(map(str, table.columns))})", "give a column with that name")
    if fold is None:
        return table, None
    own = table["fold"].astype(str) == fold
    if not own.any() or own.all():
        found = ", ".join(sorted(table["fold"].astype(str).unique()))
        raise UnusableInput(source, f"has {'no' if not own.any() else 'only'} scans of fold {fold} (it has {found})", "give one of several folds")
    return table[~own].reset_index(drop=True), table[own].reset_index(drop=True)


def _names(path: Path) -> dict[int, str]:
    """
    Raises:
        UnusableInput: where the file has no names of labels.
    """
    try:
        return {int(code): str(name) for code, name in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UnusableInput(path, f"is no JSON of labels' names ({error})", 'give {"1": "name", …}') from error
