"""`probmed demo`: the main job on data that come with the package, compared with the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

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
)
from probmed.cli.segment import Request, Subject, segment_subject
from probmed.metrics import dice
from probmed.simulation import CONTRASTS, degraded
from probmed.simulation.contrasts import stream
from probmed.volumes import Volume, write_labels, write_scan
from probmed.workflows.outputs import check_outputs, output_names, staged
from probmed.workflows.segmentation import SegmentationResult

BIAS_SD = 0.3
NOISE_SD = 0.08
_EDGE = 0.1  # of the template's intensities, in [0, 1]
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

    Needs no data and no network. The template's tissue map is imaged as a T1 scan, with a bias field and
    noise, so that the truth is known. It shows that all works, not how well it does on other heads.

    [bold]Example[/bold]

        probmed demo -o demo
    """
    with progress.in_one_line("probmed demo", debug) as made:
        check_device(device)
        atlas = default_atlas()
        made += make_folder(out)
        scan, truth = simulated_scan(atlas, seed)
        path = write_demo_scan(out, scan, truth)
        request = Request(atlas, out, draws, 0, device.value, seed, quiet, (path,))
        result = segment_subject(Subject((path,)), request, "MNI152", lambda r: compared(r, truth))
    if not quiet:
        _show(result, truth)
        typer.echo(
            f"{sum(result.seconds.values()):.0f} s, outputs and report: {out / (_SCAN + '_report.html')}"
        )


def simulated_scan(atlas: LabelAtlas, seed: int) -> tuple[Volume, Volume]:
    """A T1 scan of the template's tissues, and these.

    The template is an average of 152 heads, in which no voxel's tissue is known. So its tissue map, the
    likeliest of the atlas, is imaged anew: intensities of each tissue, bias field, noise.

    Raises:
        ValueError: for an atlas without a template.
    """
    if atlas.template is None:
        raise ValueError("expected an atlas with a template")
    tissues = [name for name in atlas.brain if name in CONTRASTS["T1"]]
    chosen = [atlas.names.index(name) for name in tissues]
    inside = atlas.template > _EDGE
    tissue = atlas.probabilities[chosen].argmax(0)
    labels = torch.where(inside, torch.tensor(atlas.indices)[chosen][tissue], 0)
    _, means, deviations = torch.tensor([CONTRASTS["T1"][name][0] for name in tissues]).T
    texture = torch.randn(tissue.shape, generator=stream(seed, "texture"))
    sharp = torch.where(inside, means[tissue] + deviations[tissue] * texture, 0.0)
    noisy, _ = degraded(sharp[None], atlas.grid, bias_sd=BIAS_SD, noise_sd=NOISE_SD, seed=seed)
    # A stripped brain: nothing but zeros around it.
    image = torch.where(inside, 1000 * noisy[0].clamp_min(1e-3), 0.0)
    return Volume.from_grid(image, atlas.grid), Volume.from_grid(labels, atlas.grid)


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
                "dice": dice(result.labels == index, truth.data == index),
                "volume_ml": volume,
                "estimate_ml": float(row["volume_ml"]),
                "q025": float(row["q025"]),
                "q975": float(row["q975"]),
            }
        )
    return rows


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
    typer.echo(
        "Intervals say what follows from the model. This scan is no draw of it, so that they may miss its truth."
    )
