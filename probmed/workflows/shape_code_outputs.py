"""A trained autoencoder of changes as a folder.

``shares.tsv`` how each code's variance divides among kernels, people's own and noise; ``codes.tsv`` the codes of every visit; ``regions.tsv``
shares and tests of each region's decoded volume; ``visits.tsv`` the visits that it was trained on; ``codes.safetensors`` networks, prior, atlas and
basis; ``registrations`` what was registered; ``checkpoint.safetensors`` and ``log.csv`` the training's; ``report.html``; ``gp-prior-vae.json``
settings and provenance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from probmed.tables import Genotypes, Visits
from probmed.volumes import UnusableInput
from probmed.workflows.growth import Forecast, Registrations
from probmed.workflows.growth_outputs import REGISTRATIONS, field_tensors, read_fields, read_settings, read_tensors, wanted_forecasts
from probmed.workflows.longitudinal import RateSettings, codings_of
from probmed.workflows.longitudinal_outputs import REPORT, TableSource, exact_text
from probmed.workflows.outputs import staged
from probmed.workflows.provenance import Provenance
from probmed.workflows.shape_codes import CodeSettings, ShapeCodes, build, predict_scans

RECORD = "gp-prior-vae.json"
TENSORS = "codes.safetensors"


@dataclass(frozen=True)
class CodesRun:
    """A run from its folder.

    Arguments:
        source: of the tables that it takes. seed: of the registrations.
    """

    folder: Path
    codes: ShapeCodes
    source: TableSource
    seed: int

    @classmethod
    def load(cls, folder: Path) -> CodesRun:
        """
        Raises:
            UnusableInput: where there is no such run.
        """
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            source = TableSource.of(record)
            return cls(folder, _read_codes(folder, record, read_tensors(folder / TENSORS)), source, int(record["GeneratedBy"][0]["Seed"]))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            fault = f"holds no trained codes that can be read ({error})"
            raise UnusableInput(folder, fault, "give a folder that `probmed train gp-prior-vae` has written") from error

    @property
    def scans(self) -> str:
        """Their column."""
        return self.codes.settings.growth.rates.scalar

    def read(self, path: Path, labels: str | None = None, clinical: Path | None = None) -> Visits:
        """A table with the columns of the run's own; there is no scan where one is to be predicted.

        Arguments:
            labels: column with label maps of the baseline scans.
            clinical: a table with some of the covariates, a row a person.
        """
        return self.source.read_scans(path, self.codes.visits, self.scans, labels, clinical)

    def wanted(self, asked: Visits) -> list[tuple[str, float]]:
        """Subject and years since baseline of what is to be predicted, as ``wanted_forecasts``."""
        return wanted_forecasts(asked, self.codes.visits, self.codes.scanned, self.scans, self.codes.atlas)

    def predict(
        self, asked: Visits, registrations: Registrations, genotypes: Genotypes | None = None, **options: Any
    ) -> Iterator[tuple[str, Forecast]]:
        """As ``predict_scans``, with the run's own registrations."""
        return predict_scans(self.codes, asked, registrations.also(self.folder / REGISTRATIONS), genotypes, **options)


def _read_codes(folder: Path, record: dict[str, Any], stored: dict[str, Tensor]) -> ShapeCodes:
    made = dict(record["Settings"])
    rates = RateSettings.of(made["growth"]["rates"])
    settings = CodeSettings(**{**made, "growth": read_settings(made["growth"], rates)})
    atlas, basis = read_fields(stored, record["Labels"], settings.growth)
    model, guide = build(settings, int(record["FixedEffects"]), record["Components"], basis.columns)
    for prefix, module in (("model.", model), ("guide.", guide)):
        module.load_state_dict({name.removeprefix(prefix): x for name, x in stored.items() if name.startswith(prefix)})
    roles: dict[str, Any] = {role: tuple(record["Roles"][role]) for role in ("covariates", "categorical")}
    visits = Visits.read(folder / "visits.tsv", time_unit="years", time="years", **roles)
    scales = float(record["Scale"]), tuple(record["Components"]), float(record["TimeScale"])
    return ShapeCodes(settings, atlas, basis, model, guide, visits, stored["coefficients"], *scales)


def write_codes_run(codes: ShapeCodes, regions: pd.DataFrame, folder: Path, provenance: Provenance, source: TableSource, page: str) -> None:
    """Write a run into a folder, all files or none.

    Arguments:
        regions: of ``regions_of_codes``. page: the report, HTML.

    Raises:
        UnusableInput: where a file cannot be written.
    """
    visits, joined, rates = codes.visits, codes.joined, codes.settings.growth.rates
    record = {
        "Settings": asdict(codes.settings),
        "Components": codes.names,
        "FixedEffects": codes.model.prior.mean["fixed"].in_features,  # type: ignore[union-attr]
        "Scale": codes.scale,
        "TimeScale": codes.time_scale,
        "Labels": codes.atlas.names,
        "Loss": codes.log[-1]["loss"] if codes.log else None,
        **source.record(),
        "Roles": {role: getattr(visits, role) for role in ("covariates", "categorical")},
        "Covariates": {role: coding.record() for role, coding in codings_of(visits, rates, visits.subjects).items()},
        "GenotypesUsed": None if joined is None or joined.genotypes is None else joined.genotypes.record(),
        "People": None if joined is None else joined.record(),
        **provenance.record(),
    }
    tensors = field_tensors(codes.atlas, codes.basis) | {"coefficients": codes.coefficients}
    for prefix, module in (("model.", codes.model), ("guide.", codes.guide)):
        tensors |= {f"{prefix}{name}": x for name, x in module.state_dict().items()}
    with staged(folder, "gp-prior-vae") as stage:
        # Model and guide share the prior, and a file holds each tensor once.
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, stage / TENSORS)
        (stage / "shares.tsv").write_text(exact_text(codes.shares()), encoding="utf-8")
        (stage / "regions.tsv").write_text(exact_text(regions), encoding="utf-8")
        (stage / "codes.tsv").write_text(exact_text(code_table(codes)), encoding="utf-8")
        (stage / "visits.tsv").write_text(exact_text(visits.table.drop(columns=list(visits.scans))), encoding="utf-8")
        (stage / REPORT).write_text(page, encoding="utf-8")
        (stage / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False, default=_plain) + "\n", encoding="utf-8")


@torch.no_grad()
def code_table(codes: ShapeCodes) -> pd.DataFrame:
    """A row a follow-up scan: subject, years, and mean and standard deviation of each code as the scan alone has it."""
    seen = ~codes.coefficients.isnan().all(1)
    mean, log_sd = codes.guide.encoder(codes.coefficients[seen]).chunk(2, -1)
    values = torch.stack([mean, codes.guide.sd * log_sd.exp()], -1).flatten(1)
    names = [f"{what}_{k + 1}" for k in range(mean.shape[1]) for what in ("code", "sd")]
    visits = codes.visits.table[seen.numpy()][["subject", "years"]].reset_index(drop=True)
    return pd.concat([visits, pd.DataFrame(values.numpy(), columns=names)], axis=1)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value)
