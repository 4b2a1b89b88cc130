"""A template and its cohort as files, all of them or none, in the template's own space unless said otherwise:

- ``template.nii.gz`` the template, at the means of the covariates; intensities of scans whose foreground's mean is one;
- with covariates ``template_desc-ageLow.nii.gz`` and ``_desc-ageHigh``: at the cohort's least and greatest age, the other covariates at their means,
  and ``template_desc-ageJacobian.nii.gz`` log det of what one standard deviation of age does: above 0 where the body is larger;
- with labels ``template_label-X_probseg.nii.gz`` the share of the scans that have the label there;
- of each scan ``S_from-scan_to-template_mode-image_xfm.nii.gz``, which carries images from the scan to the template, affine map included, and
  ``S_from-template_to-scan_mode-image_xfm.nii.gz``;
- ``template_scans.tsv`` a row a scan: its covariates and how well template and scan match, and ``template_report.html``;
- a ``.json`` beside each image, transform and table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from probmed.grids import sample
from probmed.transforms import Velocity, warp
from probmed.volumes import UnusableInput, Volume, bids_stem, scaled, write_scan
from probmed.warps import write_warp
from probmed.workflows.outputs import (
    WARP_CONVENTION,
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
from probmed.workflows.provenance import Provenance
from probmed.workflows.registration import correlation
from probmed.workflows.templates import TemplateResult

STEM = "template"
_COLUMNS = {
    "scan": "name of the file, without what follows its first dot",
    "correlation_affine": "of template and scan where they overlap, after the affine map",
    "correlation": "after the deformation",
    "folding": "share of voxels of the template's space where the deformation's determinant is not above 0",
    "jacobian_min": "least determinant of the deformation",
    "jacobian_max": "greatest",
}


def template_names(scans: Sequence[Path], covariates: Sequence[str] = (), labels: Sequence[str] = ()) -> dict[str, str]:
    """Names of all files: what it is → name.

    Raises:
        UnusableInput: for two scans whose files would have one name.
    """
    names = {"template": f"{STEM}.nii.gz"}
    for covariate in covariates:
        word = _word(covariate)
        names |= {f"{what} {covariate}": f"{STEM}_desc-{word}{what}.nii.gz" for what in ("Low", "High", "Jacobian")}
    for label in labels:
        names[f"probability {label}"] = f"{STEM}_label-{entity(label, labels)}_probseg.nii.gz"
    stems = [bids_stem(path) for path in scans]
    for path, stem in zip(scans, stems, strict=True):
        if stems.count(stem) > 1:
            remedy = "give the files names of their own, for the warps are named for them"
            raise UnusableInput(path, "has the name of another scan of the cohort", remedy)
        names[f"to template {stem}"] = f"{stem}_from-scan_to-template_mode-image_xfm.nii.gz"
        names[f"from template {stem}"] = f"{stem}_from-template_to-scan_mode-image_xfm.nii.gz"
    if len(set(names.values())) < len(names):
        raise UnusableInput(", ".join(covariates), "are covariates whose names differ by signs alone", "rename one of them")
    return names | {"scans": f"{STEM}_scans.tsv", "report": f"{STEM}_report.html"}


def _word(name: str) -> str:
    return re.sub(r"[^0-9A-Za-z]", "", name) or "x"


def check_template_outputs(folder: Path, names: dict[str, str], protect: Iterable[Path]) -> None:
    """Refuse, before any work, to replace an input or what `probmed template` did not write.

    Raises:
        UnusableInput: naming the file.
    """
    check_outputs(folder, with_sidecars(names), STEM, protect, "_scans.json", "probmed template")


def write_template(
    result: TemplateResult,
    folder: Path,
    names: dict[str, str],
    provenance: Provenance,
    page: str,
    *,
    labels: Sequence[Volume] = (),
    label_names: Sequence[str] = (),
    protect: Iterable[Path] = (),
) -> list[Path]:
    """Write every file into a folder, which has to exist.

    Arguments:
        names: of ``template_names``.
        page: the report, HTML.
        labels: a label map of each scan, or none; label_names: their values but 0, as text.
        protect: inputs.

    Returns:
        The paths, sidecars included.

    Raises:
        UnusableInput: where a file would replace an input or one that the command did not write, or cannot be written; then none is.
    """
    protect = list(protect)
    check_template_outputs(folder, names, protect)
    every = with_sidecars(names)
    with staged(folder, STEM) as stage:
        described = _write_images(result, stage, names) | _write_warps(result, stage, names)
        for label, share in zip(label_names, label_shares_on_template(result, labels, [int(k) for k in label_names]), strict=True):
            what = f"probability {label}"
            write_scan(stage / names[what], share, Volume.from_grid(share, result.grid))
            described[what] = {"Description": f"Share of the {len(labels)} scans that have label {label} there."}
        (stage / names["scans"]).write_text(table_text(scan_table(result)), encoding="utf-8")
        columns = _COLUMNS | dict.fromkeys(result.names, "covariate, as given")
        described["scans"] = described_table("The scans of the template, and how well they match it.", columns)
        (stage / names["report"]).write_text(page, encoding="utf-8")
        write_sidecars(stage, names, described, provenance)
    for pattern in (f"{STEM}_desc-*.*", f"{STEM}_label-*_probseg.*", "*_from-scan_to-template_*_xfm.*", "*_from-template_to-scan_*_xfm.*"):
        remove_stale(folder, pattern, every)
    return [folder / name for name in every]


def _write_images(result: TemplateResult, stage: Path, names: dict[str, str]) -> dict[str, dict[str, Any]]:
    described: dict[str, dict[str, Any]] = {}

    def image(what: str, data: Tensor, description: str, **more: Any) -> None:
        write_scan(stage / names[what], data.cpu(), Volume.from_grid(data.cpu(), result.grid))
        described[what] = {"Description": description, **more}

    means = {name: float(value) for name, value in zip(result.names, result.means, strict=True)}
    image("template", result.at(), "The template, at the means of the covariates.", Covariates=means, Settings=plain(vars(result.settings)))
    for index, name in enumerate(result.names):
        for what, value in zip(("Low", "High"), result.ends(index), strict=True):
            chosen = means | {name: value}
            image(f"{what} {name}", result.at([*chosen.values()]), f"The template at {name} = {value:g}.", Covariates=chosen)
        described_as = f"log det of what one standard deviation of {name} ({float(result.sds[index]):.4g}) does: above 0 where the body is larger."
        image(f"Jacobian {name}", log_jacobian_of_effect(result, index), described_as)
    return described


def _write_warps(result: TemplateResult, stage: Path, names: dict[str, str]) -> dict[str, dict[str, Any]]:
    described: dict[str, dict[str, Any]] = {}
    for n, scan in enumerate(result.scans):
        stem = bids_stem(scan.name)
        for what, transform, grid, way in (
            (f"to template {stem}", result.from_scan(n), result.grid, "from the scan to the template"),
            (f"from template {stem}", result.to_scan(n), warp_grid(scan.grid), "from the template to the scan"),
        ):
            write_warp(stage / names[what], transform, grid.padded(1))
            described[what] = {"Description": f"Carries images {way}, affine map and deformation together.", "Convention": WARP_CONVENTION}
    return described


def log_jacobian_of_effect(result: TemplateResult, index: int) -> Tensor:
    """log det of how the body at one standard deviation above a covariate's mean differs from that at the mean, ``(*shape)``.

    The template at c is t ∘ exp(Σ c_j u_j), which takes the body at c to the mean body: its determinant is the inverse of the growth.
    """
    state = result.state
    unit = torch.nn.functional.one_hot(torch.tensor([index]), len(result.names)).to(state.template)
    velocity = Velocity(state.lattice, state.model.mean_velocity(unit, state.effects)[0])
    return -velocity.exp(both=False).jacobian_determinant(result.grid).clamp_min(1e-6).log()


def label_shares_on_template(result: TemplateResult, labels: Sequence[Volume], values: Sequence[int]) -> Tensor:
    """Share of the scans that have each label at a voxel of the template, ``(K, *shape)``."""
    total = torch.zeros(len(values), *result.grid.shape)
    points = result.grid.coordinates(torch.float32)
    for n, volume in enumerate(labels):
        there = result.from_scan(n)(points)
        one_hot = torch.stack([(volume.data == k).float() for k in values])
        total += sample(one_hot, volume.grid, there, fill=0.0) / len(labels)
    return total


def scan_table(result: TemplateResult) -> pd.DataFrame:
    """A row a scan: covariates, how well it matches the template before and after its deformation, and folding."""
    rows = []
    for n, scan in enumerate(result.scans):
        values = result.values[n].tolist()
        seen = warp(scaled(scan.data)[None], scan.grid, result.affines[n], result.grid, fill=math.nan)[0]
        flow = result.flow(n)
        jacobian = flow.jacobian_determinant(result.grid)
        rows.append(
            {
                "scan": bids_stem(scan.name),
                **dict(zip(result.names, values, strict=True)),
                "correlation_affine": correlation(result.at(values), seen),
                "correlation": correlation(warp(result.intensities(values)[None], result.grid, flow, result.grid, fill="edge")[0], seen),
                "folding": f"{float((jacobian <= 0).float().mean()):.6g}",
                "jacobian_min": float(jacobian.min()),
                "jacobian_max": float(jacobian.max()),
            }
        )
    return pd.DataFrame(rows)
