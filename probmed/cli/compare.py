"""`probmed compare`: several segmentations of a scan side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from probmed.cli import progress
from probmed.cli.options import DebugOption, QuietOption, command_line, make_folder
from probmed.report import comparison_page
from probmed.volumes import UnusableInput, bids_stem, read_scan
from probmed.workflows.comparison import Comparison
from probmed.workflows.outputs import check_outputs, described_table, staged, table_text, with_sidecars, write_sidecars
from probmed.workflows.provenance import Provenance

_COLUMNS = {
    "segmentation": "as named on the command line",
    "index": "label in the map",
    "label": "its name",
    "volume_ml": "voxels of it, ml",
    "expected_ml": "expected volume, ml, as the segmentation's table has it",
    "q025": "2.5 % quantile of the volume, ml; to q975 the 95 % interval",
    "q975": "97.5 % quantile of the volume, ml",
    "dice": "overlap with the truth",
    "hd95_mm": "95 % Hausdorff distance to the truth, mm",
    "volume_error": "volume over the truth's less one, per cent",
}


def compare(
    scan: Annotated[Path, typer.Argument(metavar="SCAN", help="The scan: NIfTI or MGH.")],
    labels: Annotated[
        list[str], typer.Option(metavar="NAME=FILE", help="A label map on the scan's voxels, of any tool; two or more.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the outputs; made if missing.", show_default=False)],
    truth: Annotated[Path | None, typer.Option(help="Label map that is right.", show_default=False)] = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare segmentations of a scan: pictures, volumes, overlap with each other and with a truth.

    Of sub-01_T1w.nii.gz it writes sub-01_T1w_desc-comparison.html and .tsv, with a JSON file. Where X_volumes.tsv stands
    beside X_dseg.nii.gz, as `probmed segment` and `register` write them, volumes have intervals.

    [bold]Example[/bold]

        probmed compare sub-01_T1w.nii.gz --labels unet=a/sub-01_T1w_dseg.nii.gz --labels atlas=b/sub-01_T1w_dseg.nii.gz -o out
    """
    with progress.in_one_line(str(scan), debug) as made:
        paths = _named(labels)
        given = [scan, *paths.values(), *([] if truth is None else [truth])]
        image = read_scan(scan)
        found = Comparison.read(image, paths, truth)
        made += make_folder(out)
        stem = bids_stem(scan)
        names = {"report": f"{stem}_desc-comparison.html", "table": f"{stem}_desc-comparison.tsv"}
        check_outputs(out, with_sidecars(names), stem, given, "_desc-comparison.json", "probmed compare")
        provenance = Provenance.of(command_line(), 0, [str(path) for path in given], [])
        table = found.volumes()
        with staged(out, stem) as stage:
            (stage / names["report"]).write_text(comparison_page(found, table, provenance, stem), encoding="utf-8")
            (stage / names["table"]).write_text(table_text(table), encoding="utf-8")
            columns = {name: _COLUMNS[name] for name in table.columns}
            write_sidecars(stage, names, {"table": described_table(f"Segmentations of {scan.name}.", columns)}, provenance)
    if not quiet:
        agreement = found.agreement()
        beside = found.truth or agreement.columns[0]
        dice = ", ".join(f"{name} {value:.3f}" for name, value in agreement[beside].items() if name != beside)
        typer.echo(f"{scan}: Dice with {beside}: {dice}\n  {out / names['report']}")


def _named(labels: list[str]) -> dict[str, Path]:
    """
    Raises:
        UnusableInput: for what is not NAME=FILE, a name that is there twice, and fewer than two.
    """
    found: dict[str, Path] = {}
    for text in labels:
        name, mark, path = text.partition("=")
        if not mark or not name or not path or name == "truth" or name in found:
            fault = "is no NAME=FILE of a name of its own"
            raise UnusableInput(f"--labels {text}", fault, "give for instance --labels unet=unet_dseg.nii.gz, and --truth for the truth")
        found[name] = Path(path)
    if len(found) < 2:
        raise UnusableInput("--labels", f"names {len(found)} segmentation", "give two or more")
    return found
