"""A trained autoencoder of changes as a folder.

``shares.tsv`` how each code's variance divides among kernels, people's own and noise; ``codes.tsv`` the codes of every visit; ``visits.tsv`` the
visits that it was trained on; ``codes.safetensors`` networks, prior, atlas and basis; ``registrations`` what was registered;
``checkpoint.safetensors`` and ``log.csv`` the training's; ``gp-prior-vae.json`` settings and provenance.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from probmed.grids import Grid
from probmed.models.longitudinal_field import CosineFields, FieldBasis, PrincipalFields
from probmed.tables import Visits
from probmed.volumes import UnusableInput, Volume
from probmed.workflows.growth import GrowthSettings, LabelledScan
from probmed.workflows.longitudinal import RateSettings
from probmed.workflows.longitudinal_outputs import exact_text
from probmed.workflows.outputs import staged
from probmed.workflows.provenance import Provenance
from probmed.workflows.registration import RegistrationSettings
from probmed.workflows.shape_codes import CodeSettings, ShapeCodes, build

RECORD = "gp-prior-vae.json"
TENSORS = "codes.safetensors"


@dataclass(frozen=True)
class CodesRun:
    """A run from its folder.

    Arguments:
        subject, time, unit: names of the columns and unit of time of the tables that it takes.
        genotypes: the file that it was trained with, or None. seed: of the registrations.
    """

    folder: Path
    codes: ShapeCodes
    subject: str
    time: str
    unit: str
    genotypes: Path | None
    seed: int

    @classmethod
    def load(cls, folder: Path) -> CodesRun:
        """
        Raises:
            UnusableInput: where there is no such run.
        """
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            with safe_open(folder / TENSORS, framework="pt") as file:
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            genotypes = None if record["Genotypes"] is None else Path(record["Genotypes"])
            where = record["Subject"], record["Time"], record["Unit"]
            return cls(folder, _read_codes(folder, record, stored), *where, genotypes, int(record["GeneratedBy"][0]["Seed"]))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            fault = f"holds no trained codes that can be read ({error})"
            raise UnusableInput(folder, fault, "give a folder that `probmed train gp-prior-vae` has written") from error

    def read(self, path: Path, labels: str | None = None) -> Visits:
        """A table with the columns of the run's own; there is no scan where one is to be predicted.

        Arguments:
            labels: column with label maps of the baseline scans.
        """
        own, scans = self.codes.visits, [self.codes.settings.growth.rates.scalar, *([] if labels is None else [labels])]
        columns: dict[str, Any] = {"covariates": own.covariates, "categorical": own.categorical, "scans": scans}
        return Visits.read(path, time_unit=self.unit, subject=self.subject, time=self.time, **columns)  # type: ignore[arg-type]


def _read_codes(folder: Path, record: dict[str, Any], stored: dict[str, Tensor]) -> ShapeCodes:
    settings = _settings(record["Settings"])
    grid = Grid(tuple(stored["atlas"].shape), stored["grid"])
    scan = Volume(stored["atlas"], grid, stored["affine"].numpy())
    atlas = LabelledScan(scan, scan.with_data(stored["labels"]), {int(k): name for k, name in record["Labels"].items()})
    lattice = atlas.lattice(settings.growth.spacing_mm)
    basis: FieldBasis = PrincipalFields(lattice, stored["basis"]) if "basis" in stored else CosineFields.of(lattice, settings.growth.finest_mm)
    model, guide = build(settings, int(record["FixedEffects"]), record["Components"], basis.columns)
    for prefix, module in (("model.", model), ("guide.", guide)):
        module.load_state_dict({name.removeprefix(prefix): x for name, x in stored.items() if name.startswith(prefix)})
    roles: dict[str, Any] = {role: tuple(record["Roles"][role]) for role in ("covariates", "categorical")}
    visits = Visits.read(folder / "visits.tsv", time_unit="years", time="years", **roles)
    scales = float(record["Scale"]), tuple(record["Components"]), float(record["TimeScale"])
    return ShapeCodes(settings, atlas, basis, model, guide, visits, stored["coefficients"], *scales)


def _settings(record: dict[str, Any]) -> CodeSettings:
    growth = dict(record["growth"])
    registration = {name: RegistrationSettings(**_tuples(growth[name])) for name in ("to_atlas", "within")}
    return CodeSettings(**{**record, "growth": GrowthSettings(**{**growth, **registration, "rates": RateSettings(**_tuples(growth["rates"]))})})


def _tuples(record: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}


def write_codes_run(
    codes: ShapeCodes, folder: Path, provenance: Provenance, *, subject: str, time: str, unit: str, genotypes: Path | None = None
) -> pd.DataFrame:
    """Write a run into a folder, all files or none.

    Returns:
        The shares of the codes' variances.

    Raises:
        UnusableInput: where a file cannot be written.
    """
    scan, visits = codes.atlas.scan, codes.visits
    record = {
        "Settings": asdict(codes.settings),
        "Components": codes.names,
        "FixedEffects": codes.model.prior.mean["fixed"].in_features,  # type: ignore[union-attr]
        "Scale": codes.scale,
        "TimeScale": codes.time_scale,
        "Labels": codes.atlas.names,
        "Loss": codes.log[-1]["loss"] if codes.log else None,
        "Subject": subject,
        "Time": time,
        "Unit": unit,
        "Roles": {role: getattr(visits, role) for role in ("covariates", "categorical")},
        "Genotypes": None if genotypes is None else str(genotypes.resolve()),
        **provenance.record(),
    }
    tensors = {"atlas": scan.data, "labels": codes.atlas.labels.data, "grid": scan.grid.affine, "affine": torch.from_numpy(scan.affine)}
    tensors["coefficients"] = codes.coefficients
    if isinstance(codes.basis, PrincipalFields):
        tensors["basis"] = codes.basis.vectors
    for prefix, module in (("model.", codes.model), ("guide.", codes.guide)):
        tensors |= {f"{prefix}{name}": x for name, x in module.state_dict().items()}
    shares = codes.shares()
    with staged(folder, "gp-prior-vae") as stage:
        # Model and guide share the prior, and a file holds each tensor once.
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, stage / TENSORS)
        (stage / "shares.tsv").write_text(exact_text(shares), encoding="utf-8")
        (stage / "codes.tsv").write_text(exact_text(code_table(codes)), encoding="utf-8")
        (stage / "visits.tsv").write_text(exact_text(visits.table.drop(columns=list(visits.scans))), encoding="utf-8")
        (stage / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False, default=_plain) + "\n", encoding="utf-8")
    return shares


@torch.no_grad()
def code_table(codes: ShapeCodes) -> pd.DataFrame:
    """A row a follow-up scan: subject, years, and mean and standard deviation of each code."""
    seen = ~codes.coefficients.isnan().all(1)
    mean, log_sd = codes.guide.encoder(codes.coefficients[seen]).chunk(2, -1)
    values = torch.stack([mean, log_sd.exp()], -1).flatten(1)
    names = [f"{what}_{k + 1}" for k in range(mean.shape[1]) for what in ("code", "sd")]
    visits = codes.visits.table[seen.numpy()][["subject", "years"]].reset_index(drop=True)
    return pd.concat([visits, pd.DataFrame(values.numpy(), columns=names)], axis=1)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value)
