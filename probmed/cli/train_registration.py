"""`probmed train registration`: a network that answers at once what a fit would have to find."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from probmed.cli import progress
from probmed.cli.options import (
    DebugOption,
    Device,
    DeviceOption,
    MixedPrecisionOption,
    QuietOption,
    SeedOption,
    check_device,
    check_run,
    given_options,
    load_amortisation,
    load_networks,
    make_folder,
)
from probmed.cli.register import SimilarityName
from probmed.tables import read_table
from probmed.volumes import UnusableInput


class Posterior(str, Enum):
    """The family of q."""

    smooth = "smooth"
    diagonal = "diagonal"


class Objective(str, Enum):
    """What the network is trained for; ``workflows.registration_networks.OBJECTIVES``."""

    elbo = "elbo"
    simulation = "simulation"
    mse = "voxelmorph-mse"
    ncc = "voxelmorph-ncc"
    mse_displacement = "voxelmorph-mse-displacement"
    ncc_displacement = "voxelmorph-ncc-displacement"
    probabilistic = "voxelmorph-probabilistic"


DataOption = Annotated[
    Path, typer.Option(help="Table (TSV or CSV) with a column scan and perhaps labels: paths, relative ones to the table.", show_default=False)
]
SimilarityOption = Annotated[
    SimilarityName, typer.Option(help="Likelihood of the model: of the ELBO, and of what refines an answer later, whatever the objective.")
]
WeightOption = Annotated[
    float | None, typer.Option(min=0, help="λ of the voxelmorph objectives; as published if not given.", show_default=False)
]
ImageSdOption = Annotated[float, typer.Option(metavar="SD", help="The images' noise in voxelmorph-probabilistic.")]
DropoutOption = Annotated[
    float, typer.Option(min=0, max=0.99, help="Share of the network's features that training leaves out; a trained network uses all.")
]

_PUBLISHED = tuple(kind for kind in Objective if kind.value.startswith("voxelmorph"))
_MEANT_FOR: dict[str, tuple[Objective, ...]] = {
    "label_weight": (Objective.elbo,),
    "learn_prior": (Objective.elbo,),
    "posterior": (Objective.elbo, Objective.simulation),
    "weight": _PUBLISHED,
    "image_sd": (Objective.probabilistic,),
}
"""Objectives on which an option has an effect, where it has none on others."""


def registration(
    context: typer.Context,
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; made if missing.", show_default=False)],
    validation: Annotated[Path | None, typer.Option(help="Such a table, to be scored while training.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    objective: Annotated[Objective, typer.Option(help="The model's ELBO, draws of the model, or a published objective.")] = Objective.elbo,
    similarity: SimilarityOption = SimilarityName.correlation,
    posterior: Annotated[Posterior, typer.Option(help="Smooth draws, or voxels that are independent of each other.")] = Posterior.smooth,
    label_weight: Annotated[float, typer.Option(min=0, help="Factor on the labels' log density in the ELBO; 0 trains without labels.")] = 0.0,
    weight: WeightOption = None,
    image_sd: ImageSdOption = 0.02,
    dropout: DropoutOption = 0.0,
    learn_prior: Annotated[bool, typer.Option("--learn-prior", help="Learn the deformation's strength and length as well.")] = False,
    spacing: Annotated[float | None, typer.Option(min=0.01, help="Of the network's grid, mm; the finest scan's by default.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser.")] = 5000,
    batch: Annotated[int, typer.Option(min=1, help="Pairs a step, on each device.")] = 4,
    learning_rate: Annotated[float, typer.Option(min=0, help="At first; it falls to zero.")] = 1e-3,
    clip: Annotated[float | None, typer.Option(min=0, help="Greatest norm of the gradient.")] = 10.0,
    every: Annotated[int, typer.Option(min=1, help="Steps between rows of the log and checkpoints.")] = 100,
    mixed_precision: MixedPrecisionOption = False,
    devices: Annotated[int, typer.Option(min=1, help="GPUs, or processes on the CPU.")] = 1,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a registration network on a table of scans, any ordered pair of which is an example.

    Into the folder go checkpoint.safetensors, log.csv, network.safetensors and network.json. A run that was
    stopped goes on with --resume and ends in the same numbers.

    [bold]Examples[/bold]

        probmed train registration --data scans.tsv -o run

        probmed train registration --data scans.tsv --validation other.tsv -o run --resume

        probmed register moving.nii.gz fixed.nii.gz --model run -o out
    """
    with progress.in_one_line(str(data), debug) as made:
        check_device(device)
        _check_options(given_options(context), objective, learning_rate, image_sd)
        check_run(out, resume)
        table, checked = read_table(data), None if validation is None else read_table(validation)
        made += make_folder(out)
        amortisation, training_of = load_amortisation(), importlib.import_module("probmed.inference.training")
        settings = load_networks().NetworkSettings(
            objective.value,
            posterior.value,
            similarity.value,
            label_weight=label_weight,
            weight=weight,
            image_sd=image_sd,
            dropout=dropout,
            batch=batch,
            mixed_precision=mixed_precision,
            learn_prior=learn_prior,
        )
        training = training_of.TrainingSettings(steps, learning_rate, "cosine", clip, seed, every)
        accelerator = "cuda" if device is Device.cuda else device.value
        fabric = training_of.Fabric(accelerator=accelerator, devices=devices, strategy="auto" if devices == 1 else "ddp")
        fabric.launch()
        with progress.collected_warnings([str(data)]), progress.progress_bar(out.name, quiet) as tell:
            tell("reading", 0.0)
            cohort, grid = amortisation.read_cohort(table, data, spacing)
            if label_weight and len(cohort.codes) < 2:
                raise UnusableInput(data, "has no labels to train with", "give a column labels with paths of label maps, or leave out --label-weight")
            other = None if checked is None else amortisation.read_cohort(checked, validation or data, grid=grid)[0]
            described = {"scans": list(cohort.names), "grid": [list(grid.shape), list(grid.spacing)]}

            def report(row: dict[str, float], share: float) -> None:
                score = f", Dice {row['dice']:.3f}" if "dice" in row else ""
                tell(f"step {row['step']:.0f}, loss {row['loss']:.4g}{score}", share)

            _, log = amortisation.train_registration(
                cohort, grid, settings, training, folder=out, validation=other, fabric=fabric, described=described, tell=report
            )
    if not quiet and fabric.is_global_zero:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in log[-1].items() if name in ("loss", "dice", "folding"))
        typer.echo(f"{out}: {int(log[-1]['step'])} steps, {numbers}")


def _check_options(given: Iterable[str], objective: Objective, learning_rate: float, image_sd: float) -> None:
    """Refuse options that mean nothing, before anything is read.

    Arguments:
        given: names of the parameters that the command line has.
    """
    for option, value in (("--learning-rate", learning_rate), ("--image-sd", image_sd)):
        if not value > 0:
            raise UnusableInput(f"{option} {value:g}", "is no positive number", "give one")
    for name in given:
        kinds = [kind.value for kind in _MEANT_FOR.get(name, Objective)]
        if objective.value not in kinds:
            option = f"--{name.replace('_', '-')}"
            raise UnusableInput(option, f"has no effect on the objective {objective.value}", f"leave it out, or take {' or '.join(kinds)}")
