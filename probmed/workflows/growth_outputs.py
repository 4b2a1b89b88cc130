"""A fitted run of rates of deformation as a folder, and forecasts from it as files.

A run: ``components.tsv`` shares and tests of the kernels, whose variances are relative to the coefficients' scales; where coefficients have
components of their own, ``shares.tsv`` those of each; ``regions.tsv`` shares and tests of each region's volume; for each covariate X
``atlas_desc-XGrowth.nii.gz``, yearly relative growth of volume per unit of it, and ``_desc-XGrowthSd``, both on the atlas's voxels; ``visits.tsv``
the visits with their coefficients, ``report.html``, ``growth.safetensors`` atlas and basis, ``registrations`` what was registered, and
``longitudinal.json`` settings, components and provenance.

A forecast of subject S at 2.5 years, on the voxels of the baseline scan:

- ``sub-S_time-2p50_desc-predicted.nii.gz`` the follow-up scan, and ``_dseg.nii.gz`` with ``_dseg.tsv`` its labels;
- ``sub-S_time-2p50_from-baseline_to-followup_mode-image_xfm.nii.gz`` carries images from the baseline to the follow-up;
  ``_from-followup_to-baseline_mode-image_xfm.nii.gz`` is its inverse;
- ``_desc-growth.nii.gz`` yearly log det, the posterior mean, ``_desc-growthSd`` its standard deviation, and ``_desc-shrinking`` the posterior
  probability that det < 1;
- ``_desc-sample001.nii.gz`` and so on, where they are asked for, follow-up scans drawn from the posterior;
- ``_volumes.tsv`` volumes of the labels with 90 % intervals;
- a ``.json`` beside each; and for all of them ``predictions.tsv``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from probmed.grids import Grid
from probmed.inference.reml import at_components
from probmed.models.longitudinal_field import CosineFields, FieldBasis, PrincipalFields
from probmed.tables import Genotypes, Visits
from probmed.transforms import Displacement
from probmed.volumes import UnusableInput, Volume, atomic_write, bids_stem, read_labels, read_scan, write_labels, write_scan
from probmed.warps import write_warp
from probmed.workflows.growth import (
    Body,
    Forecast,
    Growth,
    GrowthSettings,
    LabelledScan,
    Registrations,
    check_scans,
    column_names,
    forecast,
    transported_changes,
    with_coefficients,
)
from probmed.workflows.longitudinal import RateSettings, fit_rates
from probmed.workflows.longitudinal_outputs import (
    REPORT,
    RateRun,
    TableSource,
    check_in_genotypes,
    exact_text,
    known_in,
    no_run,
    read_record,
    run_record,
    seen_in,
    together,
    with_times_of,
    with_tuples,
    write_record,
)
from probmed.workflows.outputs import WARP_CONVENTION, check_outputs, described_table, staged, with_sidecars, write_sidecars
from probmed.workflows.propagation import check_same_grid
from probmed.workflows.provenance import Provenance
from probmed.workflows.registration import RegistrationSettings

FIELDS = "growth.safetensors"
REGISTRATIONS = "registrations"
VOLUME_COLUMNS = {
    "index": "label in the dseg image",
    "name": "label",
    "baseline_ml": "volume at baseline, ml",
    "mean": "expected volume at follow-up, ml",
    "sd": "its posterior standard deviation, ml",
    "low": "lower end of its central 90 % interval, ml",
    "high": "upper end, ml",
}


@dataclass(frozen=True)
class GrowthRun:
    """A run from its folder.

    Arguments:
        rates: of the coefficients. seed: of the registrations.
        components: variances and scales of each group of coefficients, as ``Growth`` has them.
    """

    folder: Path
    rates: RateRun
    components: list[tuple[Tensor, Tensor]]
    seed: int
    settings: GrowthSettings
    atlas: LabelledScan
    basis: FieldBasis

    @classmethod
    def load(cls, folder: Path) -> GrowthRun:
        """
        Raises:
            UnusableInput: where there is no such run.
        """
        record, rates = read_record(folder), RateRun.load(folder)
        try:
            settings = read_settings(record["Growth"], rates.settings)
            atlas, basis = read_fields(read_tensors(folder / FIELDS), record["Labels"], settings)
            pairs = zip(record["FieldVariances"], record["FieldScales"], strict=True)
            components = [(torch.tensor(v, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)) for v, s in pairs]
            return cls(folder, rates, components, int(record["GeneratedBy"][0]["Seed"]), settings, atlas, basis)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise no_run(folder, error) from error

    @property
    def source(self) -> TableSource:
        """Of the tables that it takes."""
        return self.rates.source

    @property
    def scans(self) -> str:
        """Their column."""
        return self.settings.rates.scalar

    def read(self, path: Path, labels: str | None = None, clinical: Path | None = None) -> Visits:
        """A table with the columns of the run's own; there is no scan where one is to be predicted.

        Arguments:
            labels: column with label maps of the baseline scans.
            clinical: a table with some of the covariates, a row a person.
        """
        return self.source.read_scans(path, self.rates.visits, self.scans, labels, clinical)

    def predict(
        self,
        asked: Visits,
        registrations: Registrations,
        genotypes: Genotypes | None = None,
        *,
        labels: str | None = None,
        draws: int = 200,
        samples: int = 0,
        seed: int = 0,
        tell: Callable[[float], None] = lambda share: None,
    ) -> Iterator[tuple[str, Forecast]]:
        """Subject and forecast for each visit without a scan that is not a person's first.

        Arguments:
            asked: of people of the run or of others; later scans are used too. Who has no scan at the first visit is predicted on the atlas.
            labels: column with label maps of the baseline scans; the atlas's are carried where there is none.

        Raises:
            UnusableInput: as ``wanted``, and for someone without genotypes where the run has them.
        """
        asked = with_times_of(self.rates.visits, asked)
        wanted = self.wanted(asked)
        check_in_genotypes(asked.path, [subject for subject, _ in wanted], self.rates.visits, genotypes)
        tell_of_atlas(asked, self.scans)
        registrations = registrations.also(self.folder / REGISTRATIONS)
        growth = self._with(asked, registrations, genotypes)
        bodies: dict[str, Body] = {}
        for number, (subject, years) in enumerate(wanted):
            if subject not in bodies:
                bodies = {subject: body_of(asked, subject, self.settings, self.atlas, registrations, labels)}
            rate = growth.rate(subject)
            yield subject, forecast(bodies[subject], self.basis, rate, years, draws=draws, samples=samples, seed=seed)
            tell((number + 1) / len(wanted))

    def wanted(self, asked: Visits) -> list[tuple[str, float]]:
        """Subject and years since baseline of what is to be predicted, as ``wanted_forecasts``."""
        scanned = known_in(self.rates.visits, column_names(self.basis.columns))
        return wanted_forecasts(asked, self.rates.visits, scanned, self.scans, self.atlas)

    def _with(self, asked: Visits, registrations: Registrations, genotypes: Genotypes | None) -> Growth:
        """Conditioned on what the table knows, at the run's components."""
        own = self.rates.visits
        scanned = known_in(own, column_names(self.basis.columns))
        rows = torch.tensor(measurable(asked, self.scans) & ~seen_in(scanned, asked)).nonzero()[:, 0]
        coefficients = torch.zeros(0, self.basis.columns, dtype=torch.float64)
        if len(rows):
            coefficients = self.basis.coefficients(transported_changes(asked, rows, self.settings, self.atlas, registrations))
        merged = together(own, with_coefficients(asked, rows, coefficients))
        columns, variances = column_names(self.basis.columns), self.rates.variances
        result = fit_rates(merged, self.settings.rates, genotypes, columns=columns, known=own.subjects, variances=variances)
        groups = result.fit.data.split() if self.settings.separate else [result.fit.data]
        fits = [at_components(data, variances, scales=scales) for data, (variances, scales) in zip(groups, self.components, strict=True)]
        return Growth(result, tuple(fits), self.basis, self.atlas, self.settings)


def wanted_forecasts(asked: Visits, own: Visits, scanned: Visits, scans: str, atlas: LabelledScan) -> list[tuple[str, float]]:
    """Subject and years since baseline of what is to be predicted.

    Arguments:
        own: visits of the run. scanned: those of them with a scan. scans: their column.

    Raises:
        UnusableInput: where that is nothing, or twice the same by its files' names; where a person's first visit is not the first one in the run, or
            scans cannot be registered.
    """
    asked = with_times_of(own, asked)
    check_scans(asked, scans, atlas, from_baseline=False)
    first = own.baseline["years"]
    for subject, years in zip(asked.subjects, asked.baseline["years"], strict=True):
        if subject in first.index and years != first[subject]:
            fault = f"begins with a visit of {subject} at {years:g} years, and the run with one at {first[subject]:g}"
            raise UnusableInput(asked.path, fault, "begin with the same visit, with its scan")
    table = asked.table.assign(since=asked.years_since_baseline.numpy())
    rows = table[table[scans].isna() & (table["since"] > 0) & ~seen_in(scanned, asked)]
    if not len(rows):
        remedy = f"leave {scans} empty in the rows that are to be predicted, after a baseline row with a scan"
        raise UnusableInput(asked.path, "asks for no prediction of a scan", remedy)
    found = list(zip(rows["subject"], rows["since"], strict=True))
    stems = [forecast_names(*each)["scan"] for each in found]
    for (subject, years), stem in zip(found, stems, strict=True):
        if stems.count(stem) > 1:
            fault = f"asks for {subject} at {years:g} years, whose files would have the names of another forecast"
            raise UnusableInput(asked.path, fault, "ask for one of them, or rename the subject")
    return found


def measurable(asked: Visits, scans: str) -> NDArray[np.bool_]:
    """Which later visits have a scan and one at baseline to compare it with."""
    known = asked.table[scans].notna()
    return np.asarray(asked.table["subject"].duplicated() & known & known.groupby(asked.table["subject"]).transform("first"))


def tell_of_atlas(asked: Visits, scans: str) -> None:
    """Warn of people who are predicted on the atlas, for they have no scan at baseline."""
    without = asked.baseline.index[asked.baseline[scans].isna()]
    if not len(without):
        return
    names = f"{without[0]} and {len(without) - 1} others" if len(without) > 1 else without[0]
    later = asked.table[scans].notna() & asked.table["subject"].isin(without)
    rest = "; later scans of theirs are not used" if later.any() else ""
    warnings.warn(f"{asked.path}: has no scan at the baseline of {names}: predicted on the atlas{rest}", stacklevel=3)


def body_of(
    asked: Visits, subject: str, settings: GrowthSettings, atlas: LabelledScan, registrations: Registrations, labels: str | None = None
) -> Body:
    """A person's baseline scan, or the atlas where there is none.

    Arguments:
        labels: column with label maps; the atlas's are carried where there is none.

    Raises:
        UnusableInput: for labels on other voxels than the scan's, and as ``register``.
    """
    first = asked.baseline.loc[subject]
    if pd.isna(first[settings.rates.scalar]):
        return Body.of_atlas(atlas)
    scan = read_scan(first[settings.rates.scalar])
    own = None
    if labels is not None and pd.notna(first[labels]):
        own = read_labels(first[labels])
        check_same_grid(own, scan)
    return Body.of(scan, registrations.to_atlas(scan, atlas, settings.to_atlas), atlas, own)


def read_settings(record: dict[str, Any], rates: RateSettings) -> GrowthSettings:
    """Of JSON, but for the columns."""
    registration = {name: RegistrationSettings(**with_tuples(record[name])) for name in ("to_atlas", "within")}
    return GrowthSettings(**{**record, **registration, "rates": rates})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Everything in a file of tensors."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def field_tensors(atlas: LabelledScan, basis: FieldBasis) -> dict[str, Tensor]:
    """What ``read_fields`` reads."""
    scan = atlas.scan
    tensors = {"atlas": scan.data, "labels": atlas.labels.data, "grid": scan.grid.affine, "affine": torch.from_numpy(scan.affine)}
    if atlas.mask is not None:
        tensors["mask"] = atlas.mask
    if isinstance(basis, PrincipalFields):
        tensors["basis"] = basis.vectors
    return tensors


def read_fields(stored: dict[str, Tensor], names: dict[str, str], settings: GrowthSettings) -> tuple[LabelledScan, FieldBasis]:
    """Atlas and basis from tensors and the names of labels."""
    grid = Grid(tuple(stored["atlas"].shape), stored["grid"])
    scan = Volume(stored["atlas"], grid, stored["affine"].numpy())
    atlas = LabelledScan(scan, scan.with_data(stored["labels"]), {int(k): name for k, name in names.items()}, stored.get("mask"))
    lattice = atlas.lattice(settings.spacing_mm)
    return atlas, PrincipalFields(lattice, stored["basis"]) if "basis" in stored else CosineFields.of(lattice, settings.finest_mm)


def write_growth_run(
    growth: Growth, components: pd.DataFrame, regions: pd.DataFrame, folder: Path, provenance: Provenance, source: TableSource, page: str
) -> None:
    """Write a run into a folder, all files or none.

    Arguments:
        components: ``growth.rates.component_table()``. regions: of ``regions_of_growth``. page: the report, HTML.

    Raises:
        UnusableInput: where a file cannot be written.
    """
    result, settings = growth.rates, growth.settings
    record = run_record(result, provenance, source)
    record["FieldVariances"] = [fit.variances.tolist() for fit in growth.fits]
    record["FieldConverged"] = [fit.converged for fit in growth.fits]
    record["FieldScales"] = [fit.scales.tolist() for fit in growth.fits]
    record["Growth"] = {name: value for name, value in asdict(settings).items() if name != "rates"}
    record["Labels"] = growth.atlas.names
    tensors = field_tensors(growth.atlas, growth.basis)
    with staged(folder, "longitudinal") as stage:
        (stage / "components.tsv").write_text(exact_text(components), encoding="utf-8")
        (stage / "regions.tsv").write_text(exact_text(regions), encoding="utf-8")
        if settings.separate:
            (stage / "shares.tsv").write_text(exact_text(growth.share_table()), encoding="utf-8")
        for name, maps in growth.effect_maps().items():
            for what, values in zip(("Growth", "GrowthSd"), maps, strict=True):
                write_scan(stage / f"atlas_desc-{_word(name)}{what}.nii.gz", values, growth.atlas.scan)
        with atomic_write(stage / FIELDS) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        (stage / REPORT).write_text(page, encoding="utf-8")
        write_record(stage, result, record)


def forecast_names(subject: str, years: float, samples: int = 0) -> dict[str, str]:
    """Names of all files of a forecast: what it is → name.

    Arguments:
        samples: number of drawn scans.
    """
    stem = f"sub-{_word(subject.removeprefix('sub-'))}_time-{years:.2f}".replace(".", "p")
    return {
        "scan": f"{stem}_desc-predicted.nii.gz",
        "dseg": f"{stem}_dseg.nii.gz",
        "labels": f"{stem}_dseg.tsv",
        "warp": f"{stem}_from-baseline_to-followup_mode-image_xfm.nii.gz",
        "inverse": f"{stem}_from-followup_to-baseline_mode-image_xfm.nii.gz",
        "growth": f"{stem}_desc-growth.nii.gz",
        "growth sd": f"{stem}_desc-growthSd.nii.gz",
        "shrinking": f"{stem}_desc-shrinking.nii.gz",
        "volumes": f"{stem}_volumes.tsv",
        **{f"sample {number}": f"{stem}_desc-sample{number:03d}.nii.gz" for number in range(1, samples + 1)},
    }


def _word(name: str) -> str:
    """As BIDS allows it, letters and digits."""
    return re.sub(r"[^0-9A-Za-z]", "", name) or "x"


def check_forecast_outputs(folder: Path, wanted: Iterable[tuple[str, float]], protect: Iterable[Path], samples: int = 0) -> None:
    """Refuse, before any work, to replace an input or what `probmed predict` did not write.

    Raises:
        UnusableInput: naming the file.
    """
    for subject, years in wanted:
        names = forecast_names(subject, years, samples)
        stem = names["scan"].removesuffix("_desc-predicted.nii.gz")
        check_outputs(folder, with_sidecars(names), stem, protect, "_desc-predicted.json", "probmed predict")


def write_forecast(found: Forecast, folder: Path, subject: str, provenance: Provenance, protect: Iterable[Path] = ()) -> pd.DataFrame:
    """Write every file of a forecast into a folder, which has to exist, all or none.

    Returns:
        Its rows of ``predictions.tsv``.

    Raises:
        UnusableInput: where a file would replace an input or one that the command did not write, or cannot be written; then none is.
    """
    samples = len(found.samples)
    check_forecast_outputs(folder, [(subject, found.years)], protect, samples)
    names = forecast_names(subject, found.years, samples)
    table = found.volumes[list(VOLUME_COLUMNS)]
    with staged(folder, bids_stem(names["scan"])) as stage:
        described = _write_images(found, stage, names) | _write_warps(found, stage, names)
        (stage / names["labels"]).write_text(table[["index", "name"]].to_csv(sep="\t", index=False, lineterminator="\n"), encoding="utf-8")
        (stage / names["volumes"]).write_text(exact_text(table), encoding="utf-8")
        described["volumes"] = described_table(f"Volumes at {found.years:g} years after the baseline.", VOLUME_COLUMNS)
        write_sidecars(stage, names, described, provenance)
    return pd.concat([pd.DataFrame({"subject": subject, "years": found.years}, index=table.index), table], axis=1)


def _write_images(found: Forecast, stage: Path, names: dict[str, str]) -> dict[str, dict[str, Any]]:
    like = found.baseline
    images = {
        "scan": (found.predicted, f"The scan as it will look {found.years:g} years after the baseline, on the baseline's voxels."),
        "growth": (found.growth, "Log of the Jacobian's determinant, per year, posterior mean; below 0 the body shrinks."),
        "growth sd": (found.growth_sd, "Its posterior standard deviation."),
        "shrinking": (found.shrinking, "Posterior probability that the determinant is below 1."),
    }
    for number, drawn in enumerate(found.samples, 1):
        images[f"sample {number}"] = drawn, f"The scan as it might look {found.years:g} years after the baseline: a draw from the posterior."
    for what, (data, _) in images.items():
        write_scan(stage / names[what], data, like)
    write_labels(stage / names["dseg"], found.labels, like)
    labels = {name: index for index, name in zip(found.volumes["index"].tolist(), found.volumes["name"], strict=True)}
    described: dict[str, dict[str, Any]] = {what: {"Description": text} for what, (_, text) in images.items()}
    return described | {"dseg": {"Description": "Labels at that time, of the nearest voxel.", "Labels": labels}}


def _write_warps(found: Forecast, stage: Path, names: dict[str, str]) -> dict[str, dict[str, Any]]:
    def field(what: str, transform: Displacement, way: str) -> dict[str, Any]:
        # A node more on each side, for points near the edge.
        write_warp(stage / names[what], transform, transform.grid.padded(1))
        spacing = [round(h, 4) for h in transform.grid.spacing]
        return {"Description": f"Carries images {way}.", "Convention": WARP_CONVENTION, "SpacingMillimetres": spacing}

    return {
        "warp": field("warp", found.transform, "from the baseline to the follow-up"),
        "inverse": field("inverse", found.inverse, "from the follow-up to the baseline"),
    }
