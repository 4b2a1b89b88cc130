"""`probmed demo`: the main job on data that come with the package, compared with the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from probmed.atlases import LabelAtlas, default_atlas
from probmed.cli import progress
from probmed.cli.options import (
    DebugOption,
    Device,
    DeviceOption,
    DrawsOption,
    QuietOption,
    SeedOption,
    check_device,
    make_folder,
    remove_if_empty,
)
from probmed.cli.segment import Request, Subject, segment_subject
from probmed.simulation import degraded
from probmed.volumes import UnusableInput, Volume, write_labels, write_scan
from probmed.workflows.outputs import check_outputs, output_names, staged
from probmed.workflows.segmentation import SegmentationResult

BIAS_SD = 0.3
NOISE_SD = 0.03
_SCAN = "MNI152_desc-degraded_T1w"
_TRUTH = "MNI152_desc-truth_dseg"


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the outputs; made if missing.")] = Path(
        "probmed-demo"
    ),
    draws: DrawsOption = 50,
    device: DeviceOption = Device.auto,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Segment the MNI152 template, made harder by a bias field and noise, and compare with the truth.

    Needs no data and no network. The truth is the likeliest tissue of each voxel in the template's atlas, so
    this shows that all works, not how well it does on other heads.

    [bold]Example[/bold]

        probmed demo -o demo
    """
    made: list[Path] = []
    try:
        check_device(device)
        atlas = default_atlas()
        made = make_folder(out)
        scan, truth = simulated_scan(atlas, seed)
        path = write_demo_scan(out, scan, truth)
        request = Request(atlas, out, draws, 0, device.value, seed, quiet, (path,))
        result = segment_subject(Subject((path,)), request, "MNI152", lambda r: compared(r, truth))
    except Exception as error:
        progress.say(progress.failure_line(error, "probmed demo", debug))
        raise typer.Exit(2 if isinstance(error, UnusableInput) else 1) from error
    finally:
        remove_if_empty(made)
    if not quiet:
        _show(result, truth)
        typer.echo(
            f"{sum(result.seconds.values()):.0f} s, outputs and report: {out / (_SCAN + '_report.html')}"
        )


def simulated_scan(atlas: LabelAtlas, seed: int) -> tuple[Volume, Volume]:
    """The atlas's template with a bias field and noise, its background left at 0, and the labels.

    Raises:
        ValueError: for an atlas without a template.
    """
    if atlas.template is None:
        raise ValueError("expected an atlas with a template")
    inside = atlas.template > 0.02
    noisy, _ = degraded(atlas.template[None], atlas.grid, bias_sd=BIAS_SD, noise_sd=NOISE_SD, seed=seed)
    image = torch.where(inside, 1000 * noisy[0].clamp_min(1e-3), 0.0)
    stripped = atlas.stripped()
    tissues = torch.tensor([stripped.names.index(name) for name in stripped.brain])
    labels = torch.tensor(stripped.indices)[tissues][stripped.probabilities[tissues].argmax(0)]
    # What the template shows is brain; the atlas decides which tissue.
    return Volume.from_grid(image, atlas.grid), Volume.from_grid(torch.where(inside, labels, 0), atlas.grid)


def write_demo_scan(out: Path, scan: Volume, truth: Volume) -> Path:
    """Write the scan and the truth as files, both or none, and give the scan's path."""
    names = output_names(_SCAN, (), 1, 0)
    check_outputs(out, names.values(), _SCAN, ())
    with staged(out, _SCAN) as stage:
        write_scan(stage / f"{_SCAN}.nii.gz", scan.data, scan)
        write_labels(stage / f"{_TRUTH}.nii.gz", truth.data, truth)
    return out / f"{_SCAN}.nii.gz"


def compared(result: SegmentationResult, truth: Volume) -> list[dict[str, Any]]:
    """Of each brain label: Dice, true volume, and whether the 95 % interval holds it."""
    rows = []
    found = {row["name"]: row for row in result.volumes.to_dict("records")}
    for name in result.brain:
        index = result.indices[result.names.index(name)]
        row = found[name]
        volume = float((truth.data == index).sum()) * truth.grid.voxel_volume / 1000
        rows.append(
            {
                "name": name,
                "dice": _dice(result.labels == index, truth.data == index),
                "volume_ml": volume,
                "estimate_ml": float(row["volume_ml"]),
                "q025": float(row["q025"]),
                "q975": float(row["q975"]),
            }
        )
    return rows


def _dice(a: Tensor, b: Tensor) -> float:
    return 2 * float((a & b).sum()) / max(float(a.sum() + b.sum()), 1.0)


def _show(result: SegmentationResult, truth: Volume) -> None:
    table = Table()
    table.add_column("label")
    for column in ("Dice", "true ml", "found ml", "95 % interval"):
        table.add_column(column, justify="right")
    for row in compared(result, truth):
        interval = f"{row['q025']:.0f} – {row['q975']:.0f}"
        table.add_row(
            row["name"],
            f"{row['dice']:.3f}",
            f"{row['volume_ml']:.0f}",
            f"{row['estimate_ml']:.0f}",
            interval,
        )
    Console(highlight=False).print(table)
