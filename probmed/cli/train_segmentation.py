"""`probmed train segmentation`: a network that labels scans as those of a table are labelled."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from probmed.cli import progress
from probmed.cli.labelled_tables import FoldOption, NamesOption, read_names
from probmed.cli.options import (
    DebugOption,
    Device,
    DeviceOption,
    MixedPrecisionOption,
    QuietOption,
    SeedOption,
    check_device,
    check_runs,
    make_folder,
)
from probmed.tables import check_columns, folds, parts_of, read_table
from probmed.volumes import UnusableInput, atomic_write


class Network(str, Enum):
    """``segmentation_networks.NETWORKS``."""

    unet = "unet"
    fcn = "fcn"
    deepmedic = "deepmedic"
    deepmedic_three = "deepmedic-three"
    voxelwise = "voxelwise"
    probabilistic_unet = "probabilistic-unet"


class Schedule(str, Enum):
    """``inference.svi.SCHEDULES``."""

    constant = "constant"
    cosine = "cosine"
    polynomial = "polynomial"


class Examples(str, Enum):
    """What the network is trained on; ``workflows.segmenter_runs``."""

    scans = "scans"
    contrasts = "contrasts"
    one_shot = "one-shot"
    carried = "carried"


def _lengths(patch: str | None, network: Network) -> tuple[int, ...] | None:
    """Of a patch: "64", or "32,48,32"."""
    if patch is None:
        return None
    if network is Network.probabilistic_unet:
        raise typer.BadParameter("probabilistic-unet has one latent for a whole scan: leave out --patch", param_hint="--patch")
    if not all(part.isdecimal() and int(part) for part in patch.split(",")):
        raise typer.BadParameter(f"expected voxels such as 64 or 32,48,32, got {patch!r}", param_hint="--patch")
    return tuple(int(part) for part in patch.split(","))


def segmentation(
    data: Annotated[
        Path,
        typer.Option(help="Table (TSV or CSV) with columns scan and labels: paths, relative ones to the table; perhaps fold.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; made if missing.", show_default=False)],
    fold: FoldOption = None,
    cross_validate: Annotated[
        bool, typer.Option("--cross-validate", help="Train once for each fold, and score each scan by the network that has not seen it.")
    ] = False,
    names: NamesOption = None,
    network: Annotated[Network, typer.Option(help="The network's body.")] = Network.unet,
    examples: Annotated[
        Examples,
        typer.Option(
            help="The scans; their labels' shapes in random contrasts; draws of one scan, changed as others differ; "
            "or all scans, with the labels of one carried to them."
        ),
    ] = Examples.scans,
    augment: Annotated[bool, typer.Option(help="Change shape and appearance of examples at random.")] = True,
    dropout: Annotated[float, typer.Option(min=0, max=0.9, help="Share of features that training leaves out.")] = 0.0,
    adversary: Annotated[float, typer.Option(min=0, help="Weight of a discriminator of label maps; 0 trains none.")] = 0.0,
    patch: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N,N]", help="Voxels along each axis of the part of a scan that a step sees, where one is too large; whole scans by default."
        ),
    ] = None,
    spacing: Annotated[float | None, typer.Option(min=0.01, help="Of the network's grid, mm; the finest scan's by default.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser.")] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="Scans a step.")] = 2,
    learning_rate: Annotated[float, typer.Option(min=0, help="At first.")] = 2e-3,
    schedule: Annotated[
        Schedule, typer.Option(help="How the learning rate falls to zero: as half a cosine, as (1 − share of steps)^0.9, or not at all.")
    ] = Schedule.cosine,
    every: Annotated[int, typer.Option(min=1, help="Steps between rows of the log and checkpoints.")] = 100,
    mixed_precision: MixedPrecisionOption = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a segmentation network on a table of labelled scans.

    With --examples one-shot and carried one scan has labels and the others none: it is registered to them, and the
    network is trained on draws of the one with transforms distributed like those that were found, or on all scans
    with the labels that registration carries to them.
    Into the folder go checkpoint.safetensors, log.csv, network.safetensors and network.json; with --cross-validate
    into fold-NAME in it, and cross-validation.tsv with a row for each scan and label. A run that was stopped goes on
    with --resume and ends in the same numbers.

    [bold]Examples[/bold]

        probmed train segmentation --data scans.tsv --fold 1 -o run

        probmed train segmentation --data scans.tsv --cross-validate -o runs

        probmed train segmentation --data one_label.tsv --examples one-shot -o run

        probmed segment scan.nii.gz --model run -o out
    """
    lengths = _lengths(patch, network)
    with progress.in_one_line(str(data), debug) as made:
        check_device(device)
        parts, named = _parts(data, out, examples, fold, cross_validate), {} if names is None else read_names(names)
        check_runs(list(parts), resume)
        runs, supervision, sets, training_of = (
            importlib.import_module(f"probmed.{name}")
            for name in ("workflows.segmenter_runs", "workflows.supervision", "workflows.training_sets", "inference.training")
        )
        if cross_validate:
            runs.check_folds({_fold_of(folder): part for folder, part in parts.items()}, data)
        for folder in parts:
            made[:0] = make_folder(folder)  # innermost first, all of them
        run = runs.SegmenterRun(
            supervision.SegmenterSettings(network.value, dropout, adversary=adversary, mixed_precision=mixed_precision, patch=lengths),
            training_of.TrainingSettings(steps, learning_rate, schedule.value, seed=seed, every=every),
            *(examples.value, sets.Augmentation() if augment else None, batch, spacing, named),
        )
        scores = [rows for rows in _trained(run, parts, data, device, cross_validate, quiet) if rows is not None]
        if scores:
            said = _write_scores(scores, out)
            if not quiet:
                typer.echo(said)


def _parts(
    data: Path, out: Path, examples: Examples, fold: str | None, cross_validate: bool
) -> dict[Path, tuple[pd.DataFrame, pd.DataFrame | None]]:
    """The folder of each run, with the rows of the table that it trains on and those that score it.

    Raises:
        UnusableInput: for a table without scans or labels, options that exclude each other, and as ``tables.folds``.
    """
    if cross_validate and examples in (Examples.one_shot, Examples.carried):
        raise UnusableInput(data, f"has labels of one scan for --examples {examples.value}", "leave out --cross-validate")
    if cross_validate and fold is not None:
        raise UnusableInput(data, f"has fold {fold} for --fold, and all of them for --cross-validate", "give one of the two options")
    table = read_table(data)
    check_columns(data, table, ["scan", "labels"])
    if cross_validate:
        return {out / f"fold-{name}": (rows, held) for name, rows, held in folds(table, data)}
    return {out: (table, None) if fold is None else parts_of(table, data, fold)}


def _trained(
    run: Any, parts: Mapping[Path, tuple[pd.DataFrame, pd.DataFrame | None]], data: Path, device: Device, cross_validate: bool, quiet: bool
) -> Iterator[pd.DataFrame | None]:
    """Train in one folder after another; how well each network labels the scans of its fold, for a cross-validation."""
    runs, training_of = (importlib.import_module(f"probmed.{name}") for name in ("workflows.segmenter_runs", "inference.training"))
    fabric = training_of.Fabric(accelerator="cuda" if device is Device.cuda else device.value, devices=1)
    fabric.launch()
    for folder, (rows, held) in parts.items():
        with progress.collected_warnings([str(data)]), progress.progress_bar(folder.name, quiet) as tell:
            trained, log = run.train(rows, data, folder, held, fabric, tell)
            if cross_validate:
                tell("scoring", 1.0)
            scores = runs.scored(trained, held, data).assign(fold=_fold_of(folder)) if cross_validate else None
        if not quiet:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in log[-1].items() if name in ("loss", "dice", "nll"))
            typer.echo(f"{folder}: {int(log[-1]['step'])} steps, {numbers}")
        yield scores


def _fold_of(folder: Path) -> str:
    return folder.name.removeprefix("fold-")


def _write_scores(scores: list[pd.DataFrame], out: Path) -> str:
    """``cross-validation.tsv``, and what it says in short."""
    whole = pd.concat(scores, ignore_index=True)
    with atomic_write(out / "cross-validation.tsv") as path:
        whole.to_csv(path, sep="\t", index=False, na_rep="n/a")
    each = whole.groupby("label", sort=False)["dice"].agg(["mean", "std"])
    told = ", ".join(f"{label} {row['mean']:.3f} ± {row['std']:.3f}" for label, row in each.iterrows())
    return f"{out}: Dice of scans that training did not see: {told}"
