"""`probmed train segmentation`: a network that labels scans as those of a table are labelled."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from torch import Tensor

from probmed.cli import progress
from probmed.cli.labelled_tables import FoldOption, NamesOption, parts_of, read_names
from probmed.cli.options import DebugOption, Device, DeviceOption, QuietOption, SeedOption, check_device, check_runs, make_folder
from probmed.tables import read_table
from probmed.volumes import UnusableInput, Volume, atomic_write, read_labels, read_scan
from probmed.workflows.growth import Registered, Registrations
from probmed.workflows.one_shot import carried, model_of
from probmed.workflows.registration import RegistrationSettings


class Network(str, Enum):
    """``segmentation_networks.NETWORKS``."""

    unet = "unet"
    fcn = "fcn"
    deepmedic = "deepmedic"
    voxelwise = "voxelwise"
    probabilistic_unet = "probabilistic-unet"


class Examples(str, Enum):
    """What the network is trained on; ``workflows.training_sets``."""

    scans = "scans"
    contrasts = "contrasts"
    one_shot = "one-shot"
    carried = "carried"

    @property
    def of_one(self) -> bool:
        """Whether one scan has labels and the others none."""
        return self in (Examples.one_shot, Examples.carried)


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
    with progress.in_one_line(str(data), debug) as made:
        check_device(device)
        if cross_validate and fold is not None:
            raise UnusableInput(data, f"has fold {fold} for --fold, and all of them for --cross-validate", "give one of the two options")
        if cross_validate and examples.of_one:
            raise UnusableInput(data, f"has labels of one scan for --examples {examples.value}", "leave out --cross-validate")
        table, named = read_table(data), {} if names is None else read_names(names)
        parts = {name: parts_of(table, data, name) for name in (_folds(table, data) if cross_validate else (fold,))}
        folders = {name: out / f"fold-{name}" if cross_validate else out for name in parts}
        check_runs(list(folders.values()), resume)
        for folder in folders.values():
            made += make_folder(folder)
        supervision, sets, training_of, amortisation = (
            importlib.import_module(f"probmed.{name}")
            for name in ("workflows.supervision", "workflows.training_sets", "inference.training", "workflows.amortisation")
        )
        fabric = training_of.Fabric(accelerator="cuda" if device is Device.cuda else device.value, devices=1)
        fabric.launch()
        change = sets.Augmentation() if augment else None

        def trained_on(rows: pd.DataFrame, held: pd.DataFrame | None, folder: Path, tell: Callable[[str, float], None]) -> tuple[Any, Any]:
            """The network, and the last row of its log."""
            tell("reading", 0.0)
            cohort, grid = amortisation.read_cohort(rows, data, spacing, least=1)
            _check_labels(cohort.labels, data, examples)
            checked = None if held is None else amortisation.read_cohort(held, data, grid=grid, codes=cohort.codes, least=1)[0].to(fabric.device)
            found = (_kept(Registrations(folder / "registrations", seed=seed, device=device.value)), lambda share: tell("registering", share))
            if examples is Examples.one_shot:
                scan, one, others = _one_and_others(rows, data)
                model = model_of(scan, one, others, cohort.codes, *found)
                drawn = sets.on_grid(sets.one_shot([model], batch, change), model.grid, grid)
            else:
                if examples is Examples.carried:
                    cohort = sets.completed(cohort, carried(*_one_and_others(rows, data), *found), grid)
                cohort = cohort.to(fabric.device)
                images, labels = cohort.images, cohort.labels
                if examples is Examples.contrasts:
                    drawn = sets.random_contrast(sets.regions_of(images, labels), labels, grid, batch, change)
                else:
                    drawn = sets.labelled(images, labels, grid, batch, change)
            wanted = supervision.SegmenterSettings(network.value, dropout, adversary=adversary)
            trained = supervision.TrainedSegmenter.build(grid, wanted, cohort.codes, {**amortisation.names_of(rows, data), **named}, seed)
            trained.network.to(fabric.device)

            def report(row: dict[str, float], share: float) -> None:
                score = f", Dice {row['dice']:.3f}" if "dice" in row else ""
                tell(f"step {row['step']:.0f}, loss {row['loss']:.4g}{score}", share)

            log = supervision.train_segmenter(
                trained,
                drawn,
                training_of.TrainingSettings(steps, learning_rate, seed=seed, every=every),
                folder=folder,
                validation=checked,
                fabric=fabric,
                described={"scans": list(cohort.names), "examples": examples.value, "augment": augment, "batch": batch},
                tell=report,
            )
            return trained, log[-1]

        scores = []
        for name, (rows, held) in parts.items():
            with progress.collected_warnings([str(data)]), progress.progress_bar(folders[name].name, quiet) as tell:
                trained, last = trained_on(rows, held, folders[name], tell)
                if cross_validate:
                    tell("scoring", 1.0)
                    scores.append(supervision.score(trained, held, data).assign(fold=name))
            if not quiet:
                numbers = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if name in ("loss", "dice", "nll"))
                typer.echo(f"{folders[name]}: {int(last['step'])} steps, {numbers}")
        if scores:
            whole = pd.concat(scores, ignore_index=True)
            with atomic_write(out / "cross-validation.tsv") as path:
                whole.to_csv(path, sep="\t", index=False, na_rep="n/a")
            if not quiet:
                each = whole.groupby("label", sort=False)["dice"].agg(["mean", "std"])
                told = ", ".join(f"{label} {row['mean']:.3f} ± {row['std']:.3f}" for label, row in each.iterrows())
                typer.echo(f"{out}: Dice of scans that training did not see: {told}")


def _folds(table: pd.DataFrame, source: Path) -> list[str]:
    """Names of all folds.

    Raises:
        UnusableInput: for no such column, rows without a fold, and names that cannot be a folder's.
    """
    if "fold" not in table.columns:
        raise UnusableInput(source, f"has no column fold (it has {', '.join(map(str, table.columns))})", "give a column with that name")
    if table["fold"].isna().any():
        raise UnusableInput(source, "has scans without a fold", "give each a fold, or leave the scan out")
    names = sorted(table["fold"].astype(str).unique())
    for name in names:
        if "/" in name or name in (".", ".."):
            raise UnusableInput(source, f"has the fold {name!r}, which cannot name a folder", "give folds other names")
    return names


def _check_labels(labels: Tensor, source: Path, examples: Examples) -> None:
    """
    Raises:
        UnusableInput: where scans lack labels, or, for one-shot learning, not all but one do.
    """
    known = (labels >= 0).flatten(1).all(1)
    if not examples.of_one and not bool(known.all()):
        raise UnusableInput(source, "has scans without labels", "give labels to each, leave the scan out, or use --examples one-shot or carried")
    if examples.of_one and (int(known.sum()) != 1 or len(known) < 3):
        fault = f"has {int(known.sum())} scans with labels and {int((~known).sum())} without"
        raise UnusableInput(source, fault, "give one with labels, and two or more without")


def _one_and_others(table: pd.DataFrame, source: Path) -> tuple[Volume, Volume, list[Volume]]:
    """The labelled scan, its labels, and the scans without."""
    one = table["labels"].notna()
    scan, labels = read_scan(source.parent / str(table["scan"][one].iloc[0])), read_labels(source.parent / str(table["labels"][one].iloc[0]))
    return scan, labels, [read_scan(source.parent / str(name)) for name in table["scan"][~one]]


def _kept(registrations: Registrations) -> Callable[[Volume, Volume], Registered]:
    return lambda moving, fixed: registrations(moving, fixed, RegistrationSettings())
