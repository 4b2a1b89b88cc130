"""Codes of changes over people and visits: a cohort of discs whose registrations are known."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from bed_reader import to_bed
from torch import Tensor
from typer.testing import CliRunner

from probmed.cli import app
from probmed.grids import Grid
from probmed.tables import Genotypes, Visits
from probmed.transforms import Affine, Transform, Velocity
from probmed.volumes import UnusableInput, Volume, write_labels, write_scan
from probmed.workflows.follow_up_checks import code_ablation, held_out_codes
from probmed.workflows.growth import GrowthSettings, LabelledScan, Registered
from probmed.workflows.longitudinal import RateSettings
from probmed.workflows.longitudinal_outputs import TableSource
from probmed.workflows.provenance import Provenance
from probmed.workflows.regional import log_volumes, region_weights, regions_of_codes
from probmed.workflows.shape_code_outputs import CodesRun, write_codes_run
from probmed.workflows.shape_code_training import fit_codes
from probmed.workflows.shape_codes import CodeSettings, ShapeCodes, predict_scans

GRID = Grid.from_spacing((24, 22), 1.5)
RADIUS = 8.0


def disc() -> LabelledScan:
    inside = GRID.coordinates().norm(dim=-1) < RADIUS
    return LabelledScan(Volume.from_grid(inside.float(), GRID), Volume.from_grid(inside.long(), GRID), {1: "disc"})


def expansion(log_scale: float) -> Velocity:
    """exp(v) multiplies places by exp(log_scale) about the middle: areas by its square."""
    return Velocity(GRID, log_scale * GRID.coordinates().movedim(-1, 0))


@dataclass
class Discs:
    """People whose discs have a size of their own and grow by a rate that their dose tells, but for a part of their own."""

    dose: Tensor
    level: Tensor
    rate: Tensor
    folder: Path

    @classmethod
    def of(cls, people: int, folder: Path, seed: int = 0) -> Discs:
        generator = torch.Generator().manual_seed(seed)
        dose, own, level = (torch.randn(people, generator=generator) for _ in range(3))
        return cls(dose, 0.08 * level, 0.02 + 0.03 * dose + 0.005 * own, folder)

    def log_scale(self, person: int, years: float) -> float:
        return float(self.level[person] + self.rate[person] * years)

    def table(self, people: range, times: tuple[float, ...], unseen: tuple[float, ...] = ()) -> Path:
        rows = []
        for person in people:
            for years in times:
                name = f"p{person:02d}_{years:g}.nii.gz"
                scan = None
                if years not in unseen:
                    write_scan(self.folder / name, disc().scan.data, disc().scan)
                    scan = name
                rows.append({"subject": f"p{person:02d}", "time": years, "scan": scan, "dose": float(self.dose[person])})
        path = self.folder / f"visits_{people.start}.tsv"
        pd.DataFrame(rows).to_csv(path, sep="\t", index=False, na_rep="n/a")
        return path

    def to_atlas(self, scan: Volume, atlas: LabelledScan, settings: Any) -> Transform:
        return self(scan, atlas.scan, settings).transform

    def __call__(self, moving: Volume, fixed: Volume, settings: Any) -> Registered:
        """What a registration would find, with an error: to the atlas, or to the person's baseline."""
        assert moving.path is not None
        person, years = moving.path.name.removesuffix(".nii.gz").removeprefix("p").split("_")
        generator = torch.Generator().manual_seed(int(person) * 100 + round(float(years) * 10))
        found = self.log_scale(int(person), float(years)) + 0.005 * float(torch.randn((), generator=generator))
        return Registered(Affine.identity(2), expansion(found if fixed.path is None else found - self.log_scale(int(person), 0.0)))


SETTINGS = CodeSettings(GrowthSettings(RateSettings("scan", mean=("dose",)), spacing_mm=3.0), codes=2, hidden=8, steps=400, learning_rate=0.02)


def read(path: Path) -> Visits:
    return Visits.read(path, time_unit="years", covariates=["dose"], scans=["scan"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Discs, ShapeCodes]:
    discs = Discs.of(40, tmp_path_factory.mktemp("discs"))
    visits = read(discs.table(range(30), (0.0, 1.0, 2.5)))
    return discs, fit_codes(visits, SETTINGS, disc(), discs)  # type: ignore[arg-type]


@pytest.mark.slow
def test_volumes_of_people_who_were_not_there_are_predicted_from_their_baseline_and_dose(trained: tuple[Discs, ShapeCodes]) -> None:
    discs, codes = trained
    assert codes.log[-1]["loss"] < codes.log[0]["loss"]
    asked = read(discs.table(range(30, 40), (0.0, 2.0), unseen=(2.0,)))
    errors, held, same = [], [], []
    for subject, found in predict_scans(codes, asked, discs, draws=100):  # type: ignore[arg-type]
        person = int(subject[1:])
        truth = math.exp(2 * 2.0 * float(discs.rate[person]))
        row = found.volumes.iloc[0]
        errors.append(math.log(row["mean"] / row["baseline_ml"]) - math.log(truth))
        same.append(-math.log(truth))
        held.append(row["low"] / row["baseline_ml"] <= truth <= row["high"] / row["baseline_ml"])
        moved = found.inverse(torch.tensor([[4.0, 0.0]]))
        assert (float(moved[0, 0]) / 4) ** 2 == pytest.approx(row["mean"] / row["baseline_ml"], abs=0.03)
    assert len(errors) == 10
    assert torch.tensor(errors).square().mean().sqrt() < 0.4 * torch.tensor(same).square().mean().sqrt()
    assert sum(held) >= 7


@pytest.mark.slow
def test_last_visits_are_predicted_without_them(trained: tuple[Discs, ShapeCodes]) -> None:
    discs, codes = trained
    found = held_out_codes(codes, discs)  # type: ignore[arg-type]
    assert found is not None
    table, shown = found
    assert len(table) == 30 and set(table["years"]) == {2.5}
    errors = (table["observed"] - table["mean"]) / table["sd"]
    assert errors.abs().lt(1.645).mean() > 0.75 and errors.abs().max() < 5
    assert np.corrcoef(table["observed"], table["mean"])[0, 1] > 0.95
    assert shown.forecast.years == 2.5 and shown.observed.shape == GRID.shape
    last = torch.tensor((codes.visits.table["years"] == 2.5).to_numpy())
    others = replace(codes, coefficients=torch.where(last[:, None], codes.coefficients + 1, codes.coefficients))
    again = held_out_codes(others, discs)  # type: ignore[arg-type]
    assert again is not None
    pd.testing.assert_series_equal(again[0]["mean"], table["mean"])


@pytest.mark.slow
def test_without_what_is_a_person_s_own_visits_are_predicted_worse(trained: tuple[Discs, ShapeCodes]) -> None:
    discs, codes = trained
    before = codes.model.prior.logits.detach().clone()
    checks = code_ablation(codes).set_index("kernels")
    assert list(checks.index) == ["all", "without own"] and set(checks["visits"]) == {30}
    assert checks["log_density"]["all"] > checks["log_density"]["without own"]
    assert torch.equal(codes.model.prior.logits, before)
    found = held_out_codes(codes, discs)  # type: ignore[arg-type]
    assert found is not None
    assert checks["rmse"]["all"] == pytest.approx(float((found[0]["observed"] - found[0]["mean"]).pow(2).mean() ** 0.5))


@pytest.mark.slow
def test_what_explains_a_region_s_volume_is_what_the_cohort_has(trained: tuple[Discs, ShapeCodes]) -> None:
    """Dose is a fixed effect: what is left of the rate is a person's own."""
    discs, codes = trained
    table = regions_of_codes(codes)
    assert list(table["component"]) == ["own"] and list(table["name"]) == ["disc"]
    assert float(table["p"].iloc[0]) < 0.05
    rows = (~codes.coefficients.isnan().all(1)).nonzero()[:, 0]
    logs = log_volumes(codes.basis, region_weights(codes.basis, codes.atlas), codes.scale * codes.coefficients[rows])[:, 0]
    person = codes.visits.person[rows]
    expected = 2 * discs.rate[:30][person] * codes.visits.years_since_baseline[rows]
    assert float((logs - expected).square().mean().sqrt()) < 0.25 * float(expected.square().mean().sqrt())


@pytest.mark.slow
def test_shares_of_a_code_s_variance_sum_to_one(trained: tuple[Discs, ShapeCodes]) -> None:
    table = trained[1].shares()
    assert list(table.columns) == ["code", "own", "noise"]
    torch.testing.assert_close(torch.tensor(table.drop(columns="code").to_numpy(copy=True)).sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.slow
def test_requests_that_cannot_be_met_get_one_line(trained: tuple[Discs, ShapeCodes]) -> None:
    discs, codes = trained
    with pytest.raises(UnusableInput, match="asks for no prediction of a scan"):
        next(predict_scans(codes, read(discs.table(range(30, 32), (0.0, 1.0))), discs))  # type: ignore[arg-type]
    with pytest.raises(UnusableInput, match="has no follow-up scan of anyone"):
        fit_codes(read(discs.table(range(2), (0.0,))), SETTINGS, disc(), discs)  # type: ignore[arg-type]


@pytest.mark.slow
def test_who_has_no_baseline_scan_is_predicted_on_the_atlas_and_who_is_in_no_genotypes_is_named(
    trained: tuple[Discs, ShapeCodes], tmp_path: Path
) -> None:
    discs, codes = trained
    asked = read(discs.table(range(30, 32), (0.0, 2.0), unseen=(2.0,)))
    bare = replace(asked, table=asked.table.assign(scan=asked.table["scan"].where(asked.table["subject"] != "p30", None)))
    with pytest.warns(UserWarning, match="no scan at the baseline of p30: predicted on the atlas"):
        (_, first), (_, second) = predict_scans(codes, bare, discs, draws=20)  # type: ignore[arg-type]
    assert torch.equal(first.baseline.data, codes.atlas.scan.data) and second.baseline.path is not None
    # The rate is that of the dose, wherever it is shown.
    row = first.volumes.iloc[0]
    expected = 2 * 2.0 * (0.02 + 0.03 * float(discs.dose[30]))
    assert math.log(row["mean"] / row["baseline_ml"]) == pytest.approx(expected, abs=0.04)
    names = [f"p{n:02d}" for n in range(31)]
    to_bed(tmp_path / "some.bed", np.ones((31, 2)), properties={"iid": names, "fid": names})
    with pytest.raises(UnusableInput, match="asks for p31, who is not in the genotypes"):
        next(predict_scans(codes, asked, discs, Genotypes.open(tmp_path / "some.bed", count_A1=True)))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_in_a_folder_predicts_the_same(trained: tuple[Discs, ShapeCodes], tmp_path: Path) -> None:
    discs, codes = trained
    write_codes_run(codes, regions_of_codes(codes), tmp_path, Provenance.of("probmed train gp-prior-vae", 0, [], []), TableSource(), "<html>")
    run = CodesRun.load(tmp_path)
    path = discs.table(range(30, 32), (0.0, 2.0), unseen=(2.0,))
    volumes = [
        pd.concat([found.volumes for _, found in predict_scans(each, asked, discs, draws=20)])  # type: ignore[arg-type, misc]
        for each, asked in ((codes, read(path)), (run.codes, run.read(path)))
    ]
    pd.testing.assert_frame_equal(*volumes)
    table = pd.read_csv(tmp_path / "codes.tsv", sep="\t")
    assert list(table.columns) == ["subject", "years", "code_1", "sd_1", "code_2", "sd_2"] and len(table) == 60
    (tmp_path / "codes.safetensors").write_bytes(b"cut off")
    with pytest.raises(UnusableInput, match="holds no trained codes that can be read"):
        CodesRun.load(tmp_path)


@pytest.mark.slow
def test_from_scans_to_a_run_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Discs with an edge that a registration finds."""
    monkeypatch.chdir(tmp_path)
    discs = Discs.of(8, tmp_path, seed=3)

    def image(log_scale: float) -> Tensor:
        return (1 / (1 + (GRID.coordinates().norm(dim=-1) / (RADIUS * math.exp(log_scale))) ** 8)).float()

    table = discs.table(range(8), (0.0, 3.0))
    for person in range(8):
        for years in (0.0, 3.0):
            name = f"p{person:02d}_{years:g}.nii.gz"
            write_scan(tmp_path / name, image(discs.log_scale(person, years)), disc().scan)
    write_scan(tmp_path / "atlas.nii.gz", image(0.0), disc().scan)
    write_labels(tmp_path / "labels.nii.gz", disc().labels.data, disc().scan)
    arguments = ["train", "gp-prior-vae", "--data", str(table), "--scans", "scan", "--mean", "dose", "-o", "run", "--codes", "1", "--steps", "60"]
    arguments += ["--atlas-image", "atlas.nii.gz", "--atlas-labels", "labels.nii.gz"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "shares of codes' variance" in result.stdout and "8 people in all tables; nothing left out" in " ".join(result.stdout.split())
    record = json.loads((tmp_path / "run" / "gp-prior-vae.json").read_text())
    assert record["People"]["People"] == 8 and record["Covariates"]["mean"]["missing"] == "impute"
    run = CodesRun.load(tmp_path / "run")
    assert run.codes.coefficients.shape[0] == 16 and run.codes.names == ()
    assert "What codes follow" in (tmp_path / "run" / "report.html").read_text()
    assert {"checkpoint.safetensors", "log.csv", "shares.tsv", "codes.tsv"} <= {path.name for path in (tmp_path / "run").iterdir()}
    asked = pd.read_csv(table, sep="\t").astype({"time": float})
    asked.loc[asked["time"] == 3.0, "time"] = 1.5
    asked.assign(scan=asked["scan"].where(asked["time"] == 0)).head(2).to_csv("asked.tsv", sep="\t", index=False, na_rep="n/a")
    foretold = CliRunner().invoke(app, ["predict", "run", "--data", "asked.tsv", "-o", "out", "--draws", "5"])
    assert foretold.exit_code == 0, foretold.output
    assert "1 predictions of scan" in foretold.stdout
    assert len(pd.read_csv("out/predictions.tsv", sep="\t")) == 1 and Path("out/sub-p00_time-1p50_dseg.nii.gz").exists()
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "holds a run already" in again.stderr
