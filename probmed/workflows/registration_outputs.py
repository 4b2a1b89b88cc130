"""A registered pair as files: BIDS derivatives named after the moving image, all of them or none.

Of ``a.nii.gz`` registered to ``b.nii.gz``; what is an image, but for the warps, lies on the voxels of ``b``:

- ``a_desc-moved.nii.gz`` the moving image on the fixed one's voxels, 0 outside its field of view;
- ``a_from-moving_to-fixed_mode-image_xfm.nii.gz`` carries images from moving to fixed, affine map and deformation together: a displacement for every
  point of the fixed image's field of view. ``a_from-fixed_to-moving_mode-image_xfm.nii.gz`` is its inverse, over the moving image's;
- ``a_from-moving_to-fixed_mode-image_desc-affine_xfm.mat`` the affine map alone, as ITK and ANTs have it;
- ``a_desc-jacobian.nii.gz`` det Dφ, below or at 0 where the warp folds;
- ``a_desc-sd.nii.gz`` posterior standard deviation of the displacement, mm, where there are draws;
- ``a_from-moving_to-fixed_mode-image_desc-draw001_xfm.nii.gz`` and so on: warps drawn from the posterior, where asked for;
- with labels of the moving image: ``a_dseg.nii.gz`` and ``a_dseg.tsv``, ``a_label-X_probseg.nii.gz`` of each, ``a_volumes.tsv``;
- ``a_registration.tsv`` similarity, landmarks' errors, folding, time, and ``a_report.html``;
- a ``.json`` beside each image, transform and table.

``antsApplyTransforms -i a.nii.gz -r b.nii.gz -t a_from-moving_to-fixed_mode-image_xfm.nii.gz`` gives ``a_desc-moved.nii.gz``, and so does
`probmed warp`. Of all this only the seconds in ``_registration.tsv`` depend on the time.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from probmed.grids import Grid
from probmed.transforms import Transform
from probmed.volumes import Volume, write_labels, write_scan
from probmed.warps import write_affine, write_warp
from probmed.workflows.outputs import (
    VOLUME_COLUMNS,
    WARP_CONVENTION,
    WARP_SPACING_MM,
    check_outputs,
    described_table,
    entity,
    plain,
    remove_stale,
    staged,
    table_text,
    warp_grid,
    with_sidecars,
    write_sidecars,
)
from probmed.workflows.propagation import Propagation
from probmed.workflows.provenance import Provenance
from probmed.workflows.registration import RegistrationResult

_STAGES = ("headers", "affine", "all")
_COLUMNS = {
    "moving": "file",
    "fixed": "file",
    "similarity": "likelihood of the fixed image",
    **{f"correlation_{stage}": f"correlation of the two images where they overlap: {stage}" for stage in _STAGES},
    **{f"information_{stage}": f"mutual information there, nats: {stage}" for stage in _STAGES},
    **{f"landmark_error_{stage}": f"mean distance of the given landmarks, mm: {stage}; elsewhere errors are larger" for stage in _STAGES},
    "log_joint": "of all that was observed and the velocity at the finest level, tempered, nats",
    "log_evidence": "of all that was observed at the finest level, the velocity integrated out by Laplace's method, nats; of the tempered "
    "likelihood, so that it compares priors and affine maps at one tempering and level",
    "log_evidence_error": "standard error of the former, nats",
    "prior_sd_mm": "standard deviation of the velocity's prior, mm",
    "prior_length_mm": "correlation length of the velocity's prior, mm",
    "tempering": "factor on the finest level's log likelihood of the image, for voxels that are not independent",
    "elbo_network": "evidence lower bound of a network's answer under its model, nats",
    "elbo": "the same after the answer was refined on this pair, nats",
    "gap": "by how much that is better, the amortisation gap that was closed, nats",
    "gap_error": "standard error of the gap, which is estimated from draws, nats",
    "converged": "whether the finest level did, 1 or 0",
    "folding": "share of voxels where det Dφ is not above 0",
    "jacobian_min": "smallest det Dφ",
    "jacobian_max": "largest det Dφ",
    "sd_mm": "posterior sd of the displacement, root mean square over the field of view, mm",
    "seconds": "all stages",
}


def registration_names(stem: str, labels: Sequence[str] = (), draws: int = 0, samples: int = 0, propagated: bool = False) -> dict[str, str]:
    """Names of all files of a pair: what it is → name.

    Arguments:
        stem: of the moving image. labels: names of its labels, where there are some. draws: of the posterior. samples: warps that are written.
        propagated: whether a label map is carried.
    """
    xfm = f"{stem}_from-moving_to-fixed_mode-image"
    names = {
        "moved": f"{stem}_desc-moved.nii.gz",
        "warp": f"{xfm}_xfm.nii.gz",
        "inverse": f"{stem}_from-fixed_to-moving_mode-image_xfm.nii.gz",
        "affine": f"{xfm}_desc-affine_xfm.mat",
        "jacobian": f"{stem}_desc-jacobian.nii.gz",
    }
    if draws > 1:
        names["sd"] = f"{stem}_desc-sd.nii.gz"
    for number in range(1, samples + 1):
        names[f"draw {number}"] = f"{xfm}_desc-draw{number:03d}_xfm.nii.gz"
    if propagated:
        names |= {"dseg": f"{stem}_dseg.nii.gz", "labels": f"{stem}_dseg.tsv", "volumes": f"{stem}_volumes.tsv"}
        for name in labels if draws else ():
            names[f"probability {name}"] = f"{stem}_label-{entity(name, labels)}_probseg.nii.gz"
    return names | {"registration": f"{stem}_registration.tsv", "report": f"{stem}_report.html"}


def check_registration_outputs(folder: Path, names: dict[str, str], stem: str, protect: Iterable[Path]) -> None:
    """Refuse, before any work, to replace an input or what `probmed register` did not write.

    Raises:
        UnusableInput: naming the file.
    """
    check_outputs(folder, with_sidecars(names), stem, protect, "_desc-moved.json", "probmed register")


def write_registration(
    result: RegistrationResult,
    folder: Path,
    stem: str,
    provenance: Provenance,
    page: str,
    *,
    propagation: Propagation | None = None,
    samples: int = 0,
    protect: Iterable[Path] = (),
) -> list[Path]:
    """Write every file of a pair into a folder, which has to exist.

    Arguments:
        stem: how all names begin.
        page: the report, HTML.
        propagation: labels that were carried.
        samples: how many of the draws to write as warps.
        protect: inputs.

    Returns:
        The paths, in the order of ``registration_names``, sidecars included.

    Raises:
        UnusableInput: where a file would replace an input or one that the command did not write, or cannot be written; then none is.
    """
    labels = () if propagation is None else propagation.names
    names = registration_names(stem, labels, len(result.draws), samples, propagation is not None)
    protect = list(protect)
    check_registration_outputs(folder, names, stem, protect)
    every = with_sidecars(names)
    with staged(folder, stem) as stage:
        described = _write_images(result, stage, names) | _write_transforms(result, stage, names, samples)
        if propagation is not None:
            described |= _write_labels(propagation, result.fixed, stage, names)
        (stage / names["registration"]).write_text(table_text(summary_table(result)), encoding="utf-8")
        described["registration"] = described_table("How well the images match, and what the warp is like.", _columns(result))
        (stage / names["report"]).write_text(page, encoding="utf-8")
        write_sidecars(stage, names, described, provenance)
    mark = glob.escape(stem)
    for pattern in ("_dseg.*", "_label-*_probseg.*", "_volumes.*", "_desc-sd.*", "_from-moving_to-fixed_mode-image_desc-draw*_xfm.*"):
        remove_stale(folder, mark + pattern, every)
    return [folder / name for name in every]


def summary_table(result: RegistrationResult) -> pd.DataFrame:
    """One row: similarity by stage, log joint and evidence, folding, Jacobian, spread, seconds by stage."""
    refined = result.refinement
    values: dict[str, Any] = {
        "moving": result.moving.name,
        "fixed": result.fixed.name,
        "similarity": result.settings.similarity,
        **{f"correlation_{stage}": value for stage, value in zip(_STAGES, result.correlation, strict=True)},
        **{f"information_{stage}": value for stage, value in zip(_STAGES, result.information, strict=True)},
        **{f"landmark_error_{stage}": value for stage, value in zip(_STAGES, result.landmark_error or (None,) * 3, strict=True)},
        "log_joint": result.log_joint,
        "log_evidence": None if result.log_evidence is None else result.log_evidence.value,
        "log_evidence_error": None if result.log_evidence is None else result.log_evidence.error,
        "prior_sd_mm": None if result.prior_scales is None else result.prior_scales[0],
        "prior_length_mm": None if result.prior_scales is None else result.prior_scales[1],
        "tempering": None if result.tempering is None else f"{result.tempering:.6g}",
        "elbo_network": result.elbo_network,
        "elbo": None if refined is None else refined.refined,
        "gap": None if refined is None else refined.gap,
        "gap_error": None if refined is None else refined.error,
        "converged": int(result.converged),
        "folding": f"{result.folding:.6g}",
        "jacobian_min": float(result.determinant.min()),
        "jacobian_max": float(result.determinant.max()),
        "sd_mm": None if result.sd is None else float(total_sd(result.sd).square().mean().sqrt()),
        "seconds": sum(result.seconds.values()),
        **{f"seconds_{stage}": value for stage, value in result.seconds.items()},
    }
    return pd.DataFrame([values])


def total_sd(sd: Tensor) -> Tensor:
    """The standard deviation of a displacement, ``(*shape)``, from its components', ``(d, *shape)``: the root of the sum of their variances."""
    return sd.square().sum(0).sqrt()


def _columns(result: RegistrationResult) -> dict[str, str]:
    return _COLUMNS | {f"seconds_{stage}": "of this stage" for stage in result.seconds}


def _write_images(result: RegistrationResult, stage: Path, names: dict[str, str]) -> dict[str, dict[str, Any]]:
    like = result.fixed
    described: dict[str, dict[str, Any]] = {}

    def image(what: str, data: Tensor, description: str, **more: Any) -> None:
        write_scan(stage / names[what], data, like)
        described[what] = {"Description": description, **more}

    moved = "The moving image on the fixed image's voxels; 0 outside its field of view."
    image("moved", result.moved.nan_to_num(0.0), moved, Converged=result.converged, Settings=plain(vars(result.settings)))
    image("jacobian", result.determinant, "Determinant of the map's Jacobian, fixed to moving; at or below 0 it folds.")
    if "sd" in names and result.sd is not None:
        image("sd", total_sd(result.sd), f"Posterior standard deviation of the displacement, of {len(result.draws)} draws.", Units="mm")
    return described


def _write_transforms(result: RegistrationResult, stage: Path, names: dict[str, str], samples: int) -> dict[str, dict[str, Any]]:
    described: dict[str, dict[str, Any]] = {}

    def field(what: str, transform: Transform, over: Volume, description: str) -> None:
        grid = field_grid(over, result)
        write_warp(stage / names[what], transform, grid)
        spacing = [round(h, 4) for h in grid.spacing]
        described[what] = {"Description": description, "Convention": WARP_CONVENTION, "SpacingMillimetres": spacing}

    whole = "affine map and deformation together"
    field("warp", result.transform, result.fixed, f"Carries images from moving to fixed, {whole}; sampled over the fixed image.")
    field("inverse", result.inverse, result.moving, f"Carries images from fixed to moving, {whole}; sampled over the moving image.")
    write_affine(stage / names["affine"], result.affine)
    described["affine"] = {
        "Description": "The affine map alone, which the warp contains already: the fixed image's world to the moving one's.",
        "Convention": "ITK AffineTransform, mm, LPS",
    }
    for number in range(1, samples + 1):
        field(f"draw {number}", result.draws[number - 1], result.fixed, "A warp from moving to fixed drawn from the posterior.")
    return described


def field_grid(over: Volume, result: RegistrationResult) -> Grid:
    """The grid of a warp over an image, with one voxel more on each side, for an affine map goes on there.

    Over the fixed image it is the velocity's own, on which linear interpolation is exact; else ``warp_grid``, or finer if the velocity is.
    """
    if result.velocity is None:
        return warp_grid(over.grid).padded(1)
    spacing = result.velocity.grid.spacing
    if over is not result.fixed:
        spacing = tuple(min(WARP_SPACING_MM, *spacing) for _ in spacing)
    return over.grid.at_spacing([max(s, h) for s, h in zip(spacing, over.spacing, strict=True)]).padded(1)


def _write_labels(propagation: Propagation, like: Volume, stage: Path, names: dict[str, str]) -> dict[str, dict[str, Any]]:
    write_labels(stage / names["dseg"], propagation.labels, like)
    called = dict(zip(propagation.names, propagation.indices, strict=True))
    described: dict[str, dict[str, Any]] = {
        "dseg": {"Description": "Labels of the moving image on the fixed one, of the nearest voxel.", "Labels": called},
        "volumes": described_table("Volumes of the carried labels, with quantiles over draws of the deformation.", VOLUME_COLUMNS),
    }
    if propagation.probabilities is not None:
        for name, data in zip(propagation.names, propagation.probabilities, strict=True):
            write_scan(stage / names[f"probability {name}"], data, like)
            described[f"probability {name}"] = {"Description": f"Posterior probability of {name}, the mean over draws of the deformation."}
    table = pd.DataFrame({"index": propagation.indices, "name": propagation.names})
    (stage / names["labels"]).write_text(table.to_csv(sep="\t", index=False, lineterminator="\n"), encoding="utf-8")
    (stage / names["volumes"]).write_text(table_text(propagation.volumes[list(VOLUME_COLUMNS)]), encoding="utf-8")
    return described
