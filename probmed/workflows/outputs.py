"""A segmented scan as files: BIDS derivatives, all of them or none.

Everything is first written to a hidden folder beside its place and renamed at the end, so that a run that
fails, is interrupted or is killed leaves nothing half done. Nothing written depends on the time.

Of ``sub-01_T1w.nii.gz``, with the labels of the default atlas:

- ``sub-01_T1w_dseg.nii.gz`` labels, ``_dseg.tsv`` their names and colours;
- ``_label-GM_probseg.nii.gz`` and so on: p(S = k | I) of each label of the brain;
- ``_desc-entropy.nii.gz`` entropy of the labels, nats;
- ``_desc-bias.nii.gz`` and ``_desc-corrected.nii.gz``: corrected = scan × bias; ``_desc-bias2`` and so on for
  further channels;
- ``_desc-draw001_dseg.nii.gz`` and so on: labels drawn from the posterior, where asked for;
- ``_from-scan_to-atlas_mode-image_xfm.nii.gz`` carries images from the scan to the atlas: a displacement for
  every point of the atlas's field of view. ``_from-atlas_to-scan_mode-image_xfm.nii.gz`` is its inverse.
- ``_volumes.tsv``, and ``_report.html``;
- a ``.json`` beside each image and table: what it holds, command, seed, versions, checksums of the inputs.

The warps are displacement fields of ITK and ANTs: at each voxel the vector to the matching point, mm, in LPS
axes, in an image of shape ``(nx, ny, nz, 1, 3)`` with intent vector, on a grid of 3 mm. For instance
``antsApplyTransforms -i scan.nii.gz -r atlas.nii.gz -t sub-01_T1w_from-scan_to-atlas_mode-image_xfm.nii.gz``.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from probmed.atlases import LabelAtlas
from probmed.grids import Grid
from probmed.volumes import UnusableInput, Volume, write_labels, write_scan
from probmed.warps import write_warp
from probmed.workflows.provenance import Provenance
from probmed.workflows.segmentation import SegmentationResult

WARP_SPACING_MM = 3.0
WARP_CONVENTION = "ITK displacement field: vector to the matching point, mm, LPS"
_ABANDONED_SECONDS = 3600.0
VOLUME_COLUMNS = {
    "index": "label in the dseg image",
    "name": "label",
    "volume_ml": "expected volume, ml",
    "sd_ml": "posterior standard deviation, ml",
    "q025": "2.5 % quantile, ml; to q975 the 95 % interval",
    "q100": "10 % quantile, ml; to q900 the 80 % interval",
    "q250": "25 % quantile, ml; to q750 the 50 % interval",
    "q750": "75 % quantile, ml",
    "q900": "90 % quantile, ml",
    "q975": "97.5 % quantile, ml",
}


def output_names(stem: str, brain: Sequence[str], channels: int, samples: int) -> dict[str, str]:
    """Names of all files of a scan: what it is → name. JSON sidecars have the same with another suffix."""
    names = {"dseg": f"{stem}_dseg.nii.gz", "labels": f"{stem}_dseg.tsv"}
    for name in brain:
        names[f"probability {name}"] = f"{stem}_label-{entity(name, brain)}_probseg.nii.gz"
    names["entropy"] = f"{stem}_desc-entropy.nii.gz"
    for number in range(1, channels + 1):
        suffix = "" if number == 1 else str(number)
        names[f"bias {number}"] = f"{stem}_desc-bias{suffix}.nii.gz"
        names[f"corrected {number}"] = f"{stem}_desc-corrected{suffix}.nii.gz"
    for number in range(1, samples + 1):
        names[f"draw {number}"] = f"{stem}_desc-draw{number:03d}_dseg.nii.gz"
    names["to atlas"] = f"{stem}_from-scan_to-atlas_mode-image_xfm.nii.gz"
    names["from atlas"] = f"{stem}_from-atlas_to-scan_mode-image_xfm.nii.gz"
    names["volumes"] = f"{stem}_volumes.tsv"
    names["report"] = f"{stem}_report.html"
    return names


def check_outputs(
    folder: Path, names: Iterable[str], stem: str, protect: Iterable[Path], marker: str = "_desc-entropy.json", writer: str = "probmed segment"
) -> None:
    """Refuse, before any work, to replace an input or a file that the command did not write.

    Arguments:
        marker: the end of the name of a sidecar that this command alone writes, and always.
        writer: what messages call the command.

    Raises:
        UnusableInput: naming the file.
    """
    inputs = [path for path in protect if path.exists()]
    ours = _is_ours(folder / f"{stem}{marker}")
    for path in (folder / name for name in names):
        if not path.exists():
            continue
        if any(path.samefile(other) for other in inputs):
            raise UnusableInput(
                path, "is an input and would be overwritten", "choose another folder with --out"
            )
        if path.is_dir():
            raise UnusableInput(
                path, "is a folder where a file is to be written", "choose another folder with --out"
            )
        if not ours:
            raise UnusableInput(
                path,
                f"exists already, and {writer} did not write it",
                "move it, or choose another folder with --out",
            )


def write_segmentation(
    result: SegmentationResult,
    atlas: LabelAtlas,
    folder: Path,
    stem: str,
    provenance: Provenance,
    page: str,
    *,
    samples: int = 0,
    protect: Iterable[Path] = (),
) -> list[Path]:
    """Write every file of a scan into a folder, which has to exist.

    Arguments:
        atlas: the one that the scan was segmented with.
        stem: how all names begin.
        page: the report, HTML.
        samples: how many label maps to draw and write.
        protect: inputs.

    Returns:
        The paths, in the order of ``output_names``, sidecars included.

    Raises:
        UnusableInput: where a file would replace an input or one that probmed did not write, or cannot be
            written; then none is.
    """
    names = output_names(stem, result.brain, len(result.channels), samples)
    every = with_sidecars(names)
    protect = list(protect)
    check_outputs(folder, every, stem, protect)
    with staged(folder, stem) as stage:
        descriptions = _write_images(result, atlas, stage, names, samples)
        (stage / names["labels"]).write_text(_label_table(result), encoding="utf-8")
        (stage / names["volumes"]).write_text(table_text(result.volumes[list(VOLUME_COLUMNS)]), encoding="utf-8")
        descriptions["volumes"] = described_table("Volumes and their posterior quantiles.", VOLUME_COLUMNS)
        (stage / names["report"]).write_text(page, encoding="utf-8")
        write_sidecars(stage, names, descriptions, provenance)
    remove_stale(folder, f"{glob.escape(stem)}_desc-draw*_dseg.*", every)
    return [folder / name for name in every]


def with_sidecars(names: dict[str, str]) -> list[str]:
    """All names with those of their sidecars, each once."""
    return list(dict.fromkeys([*names.values(), *(sidecar(name) for name in names.values() if not name.endswith(".html"))]))


def write_sidecars(stage: Path, names: dict[str, str], descriptions: dict[str, dict[str, Any]], provenance: Provenance) -> None:
    """A JSON file beside each output: what it holds, and where it comes from."""
    record = provenance.record()
    for what, description in descriptions.items():
        content = json.dumps({**description, **record}, indent=2, ensure_ascii=False) + "\n"
        (stage / sidecar(names[what])).write_text(content, encoding="utf-8")


def remove_stale(folder: Path, pattern: str, written: Iterable[str]) -> None:
    """Remove what an earlier run wrote by a pattern and this one did not: its draws would pass for this one's."""
    kept = set(written)
    stale = [path for path in folder.glob(pattern) if path.name not in kept]
    # Sidecars last, for they tell whose the images are.
    for path in sorted(stale, key=lambda path: path.suffix == ".json"):
        if _is_ours(path.with_name(sidecar(path.name))):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def staged(folder: Path, stem: str) -> Iterator[Path]:
    """A hidden folder to write files into, that move to ``folder`` at the end; after an error there are none.

    Raises:
        UnusableInput: for every ``OSError`` inside, such as a full disk, naming the file's place.
    """
    _remove_abandoned(folder, stem)
    moved: list[Path] = []
    stage = None
    try:
        stage = Path(tempfile.mkdtemp(dir=folder, prefix=f".{stem}.partial-"))
        yield stage
        for path in sorted(stage.iterdir()):
            _synchronise(path)
        for path in sorted(stage.iterdir()):
            os.replace(path, folder / path.name)
            moved.append(folder / path.name)
    except BaseException as error:
        for path in moved:
            with contextlib.suppress(OSError):
                path.unlink()
        if isinstance(error, UnusableInput) and stage is not None and Path(error.path).parent == stage:
            raise UnusableInput(folder / Path(error.path).name, error.fault, error.remedy) from error
        if isinstance(error, OSError):
            name = Path(error.filename).name if isinstance(error.filename, str) else ""
            place = folder if stage is None or name == stage.name else folder / name
            fault = f"cannot be written: {error.strerror or error}"
            raise UnusableInput(
                place, fault, "free space there, or choose a folder that you may write to"
            ) from error
        raise
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def warp_grid(grid: Grid) -> Grid:
    """The grid of a warp over a field of view: 3 mm, or coarser where the image is."""
    return grid.at_spacing([max(WARP_SPACING_MM, s) for s in grid.spacing])


def _write_images(
    result: SegmentationResult, atlas: LabelAtlas, stage: Path, names: dict[str, str], samples: int
) -> dict[str, dict[str, Any]]:
    """Write the images; give what each holds."""
    like = result.channels[0]
    described: dict[str, dict[str, Any]] = {}

    def labels(what: str, data: Tensor, description: str) -> None:
        write_labels(stage / names[what], _shaped(data, like), like)
        described[what] = {
            "Description": description,
            "Labels": dict(zip(result.names, result.indices, strict=True)),
        }

    def image(what: str, data: Tensor, description: str, **more: Any) -> None:
        write_scan(stage / names[what], _shaped(data, like), like)
        described[what] = {"Description": description, **more}

    labels("dseg", result.labels, "The likeliest label of each voxel.")
    described["dseg"]["SkullStripped"] = result.stripped
    described["dseg"]["Quality"] = plain(result.quality)
    described["dseg"]["Converged"] = result.converged
    for name in result.brain:
        data = result.probabilities[result.names.index(name)]
        image(f"probability {name}", data, f"Posterior probability of {name}.")
    image("entropy", result.entropy, "Entropy of the labels' posterior.", Units="nats")
    for number, channel in enumerate(result.channels, start=1):
        source = {} if channel.path is None else {"Channel": str(channel.path)}
        image(f"bias {number}", result.bias[number - 1], "Bias field: corrected = scan × field.", **source)
        image(f"corrected {number}", result.corrected[number - 1], "The scan times the bias field.", **source)
    if samples:
        for number, drawn in enumerate(result.draw_labels(samples, result.seed), start=1):
            labels(
                f"draw {number}",
                drawn,
                "Labels drawn from the posterior, with appearance, bias and deformation.",
            )
    convention = {"Convention": WARP_CONVENTION, "SpacingMillimetres": WARP_SPACING_MM}
    write_warp(stage / names["to atlas"], result.inverse, warp_grid(atlas.grid))
    described["to atlas"] = {
        "Description": "Carries images from the scan to the atlas; sampled over the atlas.",
        **convention,
    }
    write_warp(stage / names["from atlas"], result.transform, warp_grid(like.as_3d().grid))
    described["from atlas"] = {
        "Description": "Carries images from the atlas to the scan; sampled over the scan.",
        **convention,
    }
    return described


def _shaped(data: Tensor, like: Volume) -> Tensor:
    """A slice is segmented as a volume of one slice."""
    return data.reshape(like.shape)


def _label_table(result: SegmentationResult) -> str:
    rows = sorted(zip(result.indices, result.names, result.colours, strict=True))
    return pd.DataFrame(rows, columns=["index", "name", "color"]).to_csv(sep="\t", index=False)


def table_text(table: pd.DataFrame) -> str:
    """As BIDS has tables."""
    return table.to_csv(sep="\t", index=False, float_format="%.4f", na_rep="n/a", lineterminator="\n")


def described_table(description: str, columns: dict[str, str]) -> dict[str, Any]:
    """What a table's sidecar says of it."""
    return {"Description": description, **{column: {"Description": text} for column, text in columns.items()}}


def plain(value: Any) -> Any:
    """Numbers that JSON can hold: rounded to six digits, None where not finite."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value


def entity(name: str, brain: Sequence[str]) -> str:
    """A label's name as BIDS allows it, letters and digits; its number too where that makes two the same."""
    plain = re.sub(r"[^A-Za-z0-9]", "", name)
    twins = [other for other in brain if re.sub(r"[^A-Za-z0-9]", "", other).lower() == plain.lower()]
    return plain if plain and len(twins) == 1 else f"{plain}{list(brain).index(name) + 1}"


def sidecar(name: str) -> str:
    """The name of the JSON file beside an output."""
    return re.sub(r"(\.nii\.gz|\.tsv|\.mat)$", ".json", name)


def _is_ours(sidecar: Path) -> bool:
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))
        return any(entry.get("Name") == "probmed" for entry in record.get("GeneratedBy", []))
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _remove_abandoned(folder: Path, stem: str) -> None:
    """What a killed run left, once it is old enough not to be another run's."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f".{glob.escape(stem)}.partial-*"):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
