"""Rates of deformation: transport, bases, forecasts in closed form, cohorts whose truth is known, files and command line."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import probmed.workflows.growth as growth_module
from probmed.atlases import LabelAtlas
from probmed.cli import app
from probmed.fields import GaussianField
from probmed.grids import Grid
from probmed.inference.reml import Prediction
from probmed.models.longitudinal_field import CosineFields, PrincipalFields, Transport
from probmed.simulation import simulate_genetic_cohort, simulate_genotypes
from probmed.slopes import FollowUps
from probmed.tables import Visits
from probmed.transforms import Affine, Velocity, warp
from probmed.volumes import UnusableInput, Volume, read_labels, read_scan, write_labels, write_scan
from probmed.warps import read_warp
from probmed.workflows.follow_up_checks import foretold_growth, leading
from probmed.workflows.growth import (
    Body,
    Growth,
    GrowthSettings,
    LabelledScan,
    RegionWeights,
    Registered,
    Registrations,
    fit_growth,
    forecast,
    forecast_from,
    principal_fields,
)
from probmed.workflows.growth_outputs import GrowthRun
from probmed.workflows.longitudinal import RateSettings, fit_rates
from probmed.workflows.rate_checks import held_back
from probmed.workflows.registration import RegistrationSettings

GRID = Grid.from_spacing((24, 22), 2.0)
SETTINGS = GrowthSettings(RateSettings("scan", mean=("age",)), spacing_mm=2.0, separate=False)


def smooth_fields(count: int, grid: Grid, sd: float, seed: int, length_mm: float = 15.0) -> Tensor:
    """Random vector fields ``(count, d, *shape)`` that vanish at the faces."""
    field = GaussianField.from_sd(grid.shape, grid.spacing, sd, length_mm, 3.0, grid.ndim)
    torch.manual_seed(seed)
    extent = torch.tensor([n * h for n, h in zip(grid.shape, grid.spacing, strict=True)])
    window = torch.cos(math.pi * grid.coordinates() / extent).clamp_min(0).prod(-1)
    return window * field.rsample((count,))


def turned(seed: int, scale: float = 0.05) -> Affine:
    """A random affine map near the identity."""
    torch.manual_seed(seed)
    return Affine.exp(scale * torch.randn(6, dtype=torch.float64), 2)


def test_a_linear_velocity_is_transported_in_closed_form() -> None:
    matrix = torch.tensor([[1.2, 0.1, 3.0], [-0.2, 0.9, -1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    linear = torch.tensor([[0.02, -0.01], [0.03, 0.01]])
    wide = Grid.from_spacing((60, 60), 2.0)
    w = Velocity(wide, (wide.coordinates() @ linear.T).movedim(-1, 0))
    found = Transport(Affine(matrix), GRID)(w).field.movedim(0, -1)
    inner = torch.linalg.inv(matrix[:2, :2]).float()
    expected = (Affine(matrix)(GRID.coordinates()) @ linear.T) @ inner.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    beyond = Transport(Affine(matrix), wide.padded(30))(Velocity(GRID, torch.ones(2, *GRID.shape))).field
    assert float(beyond[:, 0, 0].abs().max()) == 0


def test_transport_is_the_flow_seen_from_the_other_side_and_goes_back() -> None:
    fine = Grid.from_spacing((72, 66), 2 / 3)
    w, u = (Velocity(fine, smooth_fields(1, fine, sd, seed)[0]) for sd, seed in ((1.5, 1), (2.0, 2)))
    phi = turned(3) @ u.exp().with_exact_inverse()
    g = Transport(phi, fine)(w)
    points = 30 * torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) - 15
    there = phi.inverse()(w(phi(points)))
    moved = (there - points).norm(dim=-1)
    assert float(moved.max()) > 0.5
    assert float((g(points) - there).norm(dim=-1).max()) < 0.02
    back = Transport(phi.inverse(), fine)(g)
    inside = (fine.coordinates().norm(dim=-1) < 15)[None]
    assert float(((back.field - w.field) * inside).abs().max()) < 0.02 * float(w.field.abs().max())


def test_a_fold_gets_no_velocity() -> None:
    class Fold(Affine):
        def __call__(self, points: Tensor) -> Tensor:
            return points.abs()

    found = Transport(Fold(torch.eye(3)), Grid.from_spacing((25, 25), 2.0))(Velocity(GRID, torch.ones(2, *GRID.shape)))
    kept = found.field.abs().sum(0) > 0
    # Of the quarters those whose orientation is turned over are left out, and the lines where φ folds.
    assert bool(kept[1:12, 1:12].all()) == bool(kept[13:24, 13:24].all()) is True
    assert not bool(kept[12].any()) and not bool(kept[:, 12].any()) and not bool(kept[:12, 13:].any())


def test_principal_fields_span_what_is_observed_and_weigh_people_by_their_visits() -> None:
    truth = smooth_fields(3, GRID, 1.0, 5)
    torch.manual_seed(1)
    subject = torch.arange(8).repeat_interleave(2)
    delta = torch.rand(16, dtype=torch.float64) + 0.5
    visits = FollowUps(delta, subject, 8)
    rates = torch.randn(8, 3) * torch.tensor([3.0, 1.0, 0.3])
    changes = torch.tensordot(delta.float()[:, None] * rates[subject], truth, 1)
    basis = principal_fields(changes, visits, GRID, share=1.0)
    assert basis.columns == 3
    gram = basis.vectors.flatten(1) @ basis.vectors.flatten(1).T / GRID.numel
    torch.testing.assert_close(gram, torch.eye(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(basis.fields(basis.coefficients(changes)), changes, rtol=1e-3, atol=1e-4)
    assert principal_fields(changes, visits, GRID, share=0.5).columns == 1
    assert principal_fields(changes, visits, GRID, share=1.0, most=2).columns == 2
    # Someone who was seen once more, long after, decides the first component.
    longer = FollowUps(torch.where(subject == 2, 50 * delta, delta), subject, 8)
    first = principal_fields(torch.tensordot(longer.delta.float()[:, None] * rates[subject], truth, 1), longer, GRID).vectors[0]
    theirs = torch.tensordot(rates[2], truth, 1)
    assert abs(float((first * theirs).sum() / first.norm() / theirs.norm())) > 0.99


def test_cosine_fields_are_white_under_their_prior_and_project() -> None:
    basis = CosineFields.of(GRID, 6.0)
    assert basis.counts == (8, 7) and basis.columns == 112
    torch.manual_seed(0)
    drawn = torch.stack([basis.prior.rsample((400,))[:, 0] for _ in range(2)], 1)
    white = basis.coefficients(drawn)
    assert float((white.var(0) - 1).abs().max()) < 5 * math.sqrt(2 / 400)
    kept = basis.fields(white)
    torch.testing.assert_close(basis.coefficients(kept), white, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(basis.fields(basis.coefficients(kept)), kept, rtol=1e-4, atol=1e-5)


def disc_labels(grid: Grid) -> Volume:
    """1 in a disc of 10 mm, 2 around it up to 15 mm."""
    radius = grid.coordinates().norm(dim=-1)
    return Volume.from_grid((radius < 15).long() + ((radius >= 10) & (radius < 15)).long(), grid)


def linear_basis(grid: Grid) -> PrincipalFields:
    """One field, −x, whose coefficient is minus half the yearly log det."""
    return PrincipalFields(grid, -grid.coordinates().movedim(-1, 0)[None])


def test_a_uniform_shrinkage_is_forecast_in_closed_form() -> None:
    atlas_grid, scan_grid = Grid.from_spacing((40, 42), 1.5), Grid.from_spacing((50, 46), 1.2)
    phi = turned(1, 0.1)
    scan = Volume.from_grid(scan_grid.coordinates()[..., 0] + 40, scan_grid)
    body = Body(scan, phi, disc_labels(scan_grid), Affine.identity(2), {1: "disc"})
    rate = Prediction(torch.tensor([0.01], dtype=torch.float64), torch.tensor([0.004], dtype=torch.float64))
    found = forecast(body, linear_basis(atlas_grid), rate, 12.0, draws=400)
    (disc,) = found.volumes[found.volumes["name"] == "disc"].to_dict("records")
    truth = float((body.labels.data == 1).sum()) * 1.2**2 / 1000
    assert disc["baseline_ml"] == pytest.approx(truth, rel=1e-4)
    # Volume is that at baseline times exp(−2 · 12 c), log normal.
    centre, spread = -0.24, 24 * 0.004
    assert disc["mean"] / truth == pytest.approx(math.exp(centre + spread**2 / 2), rel=0.01)
    assert disc["sd"] / disc["mean"] == pytest.approx(spread, rel=0.15)
    for end, z in (("low", -1.645), ("high", 1.645)):
        assert math.log(disc[end] / truth) == pytest.approx(centre + z * spread, abs=0.15 * spread)
    middle = tuple(n // 2 for n in scan_grid.shape)
    assert float(found.growth[middle]) == pytest.approx(-0.02, abs=0.002)
    assert float(found.growth_sd[middle]) == pytest.approx(0.008, rel=0.15)
    # Φ(2.5)
    assert float(found.shrinking[middle]) == pytest.approx(0.994, abs=0.012)
    # The flow of −0.01 · 12 in the atlas is centred where φ takes the atlas's origin.
    centre_mm = phi(torch.zeros(1, 2))
    points = centre_mm + torch.tensor([[3.0, -2.0], [-5.0, 4.0]])
    torch.testing.assert_close(found.inverse(points) - centre_mm, math.exp(-0.12) * (points - centre_mm), rtol=0, atol=0.02)
    torch.testing.assert_close(found.transform(found.inverse(points)), points, rtol=0, atol=1e-3)
    expected = found.transform(scan_grid.coordinates())[..., 0] + 40
    inside = (scan_grid.coordinates().norm(dim=-1) < 20).float()
    torch.testing.assert_close(found.predicted * inside, expected * inside, rtol=0, atol=0.01)
    left = float((found.labels == 1).sum()) / float((body.labels.data == 1).sum())
    assert left == pytest.approx(math.exp(-0.24), rel=0.05)


def test_drawn_scans_are_those_of_the_draws() -> None:
    torch.manual_seed(5)
    scan = Volume.from_grid(torch.rand(GRID.shape), GRID)
    atlas = LabelledScan(scan, disc_labels(GRID), {1: "disc", 2: "ring"})
    basis = PrincipalFields(GRID, smooth_fields(2, GRID, 1.0, 3))
    drawn = torch.randn(4, 2, dtype=torch.float64)
    found = forecast_from(Body.of_atlas(atlas), basis, drawn.mean(0), drawn, 1.5, samples=2)
    alone = [forecast_from(Body.of_atlas(atlas), basis, each, drawn, 1.5) for each in drawn[:2]]
    torch.testing.assert_close(found.samples, torch.stack([each.predicted for each in alone]))
    assert not torch.equal(found.samples[0], found.samples[1]) and len(alone[0].samples) == 0
    with pytest.raises(ValueError, match="0 to 4 samples"):
        forecast_from(Body.of_atlas(atlas), basis, drawn.mean(0), drawn, 1.5, samples=5)


def test_labels_of_the_atlas_are_carried_where_a_scan_has_none() -> None:
    labels = disc_labels(GRID)
    image = Volume.from_grid(labels.data.float(), GRID)
    atlas = LabelledScan(image, labels, {1: "disc"})
    phi = Affine(torch.tensor([[1.3, 0.0, 2.0], [0.0, 0.8, -1.0], [0.0, 0.0, 1.0]], dtype=torch.float64))
    scan_grid = Grid.from_spacing((60, 60), 1.0)
    body = Body.of(Volume.from_grid(torch.rand(scan_grid.shape), scan_grid), phi, atlas)
    counts = torch.bincount(labels.data.flatten())[1:] * 4 / 1000
    torch.testing.assert_close(RegionWeights.of(body, scan_grid).weights.sum(1), 1.3 * 0.8 * counts.double(), rtol=0.01, atol=0)
    own = Body.of(body.scan, phi, atlas, disc_labels(scan_grid))
    counts = torch.bincount(own.labels.data.flatten())[1:] / 1000
    weights = RegionWeights.of(own, scan_grid)
    assert weights.names == ("disc", "2")
    torch.testing.assert_close(weights.weights.sum(1), counts.double(), rtol=1e-4, atol=0)


def test_an_atlas_of_the_brain_holds_rates_there_alone() -> None:
    atlas = LabelledScan.of(rings(2, 40, 2.0))
    assert atlas.names == {1: "GM", 2: "WM", 3: "CSF"}
    assert atlas.mask is not None
    assert set(atlas.labels.data[~atlas.mask].tolist()) == {0}
    lattice = atlas.lattice(4.0)
    window = atlas.window(lattice)
    inside = atlas.mask[::2, ::2] & atlas.mask[1::2, 1::2]
    assert lattice.spacing == (4.0, 4.0)
    assert float(window[inside].min()) == 1 and float(window[0].max()) < 0.7 and float(window[0, 0]) < 0.1
    assert bool((replace(atlas, mask=None).window(lattice) == 1).all())
    with pytest.raises(ValueError, match="template"):
        LabelledScan.of(replace(rings(2, 20, 4.0), template=None))


class KnownCohort:
    """People whose registrations are known: their rates are drawn from the model, in a basis of three fields.

    Images are constants but for the first voxel, which tells whose they are; the fields that ``register`` would find have noise in the same basis.
    """

    def __init__(self, people: int, visits: int = 3, seed: int = 0, noise: float = 0.1) -> None:
        torch.manual_seed(seed)
        self.truth = smooth_fields(3, GRID, 0.4, 11, 10.0)
        self.age = (70 + 6 * torch.randn(people)).double()
        scale = torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64)
        slope = torch.stack([torch.tensor([1.0, -0.5, 0.2]), torch.tensor([0.08, 0.05, 0.0])]).double()
        design = torch.stack([torch.ones(people), (self.age - 70).float()], 1).double()
        self.rates = design @ slope + 0.4 * scale * torch.randn(people, 3, dtype=torch.float64)
        self.from_atlas = [turned(100 + n, 0.03) for n in range(people)]
        self.years = [[0.0, *(1.0 + v + torch.rand(()).item() for v in range(visits - 1))] for _ in range(people)]
        self.registered: dict[tuple[float, float], tuple[Affine, Velocity | None]] = {}
        for n, times in enumerate(self.years):
            self.registered[self.code(n, 0), 0.5] = self.from_atlas[n], None
            first = noise * scale * torch.randn(3, dtype=torch.float64)
            out = Transport(self.from_atlas[n].inverse(), GRID)
            for v, t in enumerate(times[1:], 1):
                c = t * self.rates[n] + noise * scale * torch.randn(3, dtype=torch.float64) - first
                field = torch.tensordot(c.float(), self.truth, 1)
                self.registered[self.code(n, v), self.code(n, 0)] = Affine.identity(2), out(Velocity(GRID, field))

    @staticmethod
    def code(person: int, visit: int) -> float:
        return float(1 + person * 10 + visit)

    def register(self, moving: Volume, fixed: Volume, **options: Any) -> Registered:
        affine, velocity = self.registered[float(moving.data[0, 0]), float(fixed.data[0, 0])]
        return Registered(affine, velocity or Velocity(fixed.grid, torch.zeros(2, *fixed.shape)))

    def scan(self, person: int, visit: int) -> Volume:
        data = torch.zeros(GRID.shape)
        data[0, 0] = self.code(person, visit)
        return Volume.from_grid(data, GRID)

    def atlas(self) -> LabelledScan:
        data = torch.zeros(GRID.shape)
        data[0, 0] = 0.5
        return LabelledScan(Volume.from_grid(data, GRID), disc_labels(GRID), {1: "disc", 2: "ring"})

    def write(self, folder: Path) -> Path:
        """Scans, a table of all visits, and the atlas."""
        rows = []
        for n, times in enumerate(self.years):
            for v, t in enumerate(times):
                scan = self.scan(n, v)
                write_scan(folder / f"s{n}_{v}.nii.gz", scan.data, scan)
                rows.append({"subject": f"s{n}", "time": round(t, 6), "scan": f"s{n}_{v}.nii.gz", "age": round(float(self.age[n]), 4)})
        atlas = self.atlas()
        write_scan(folder / "atlas.nii.gz", atlas.scan.data, atlas.scan)
        write_labels(folder / "atlas_dseg.nii.gz", atlas.labels.data, atlas.scan)
        pd.DataFrame({"index": [1, 2], "name": ["disc", "ring"]}).to_csv(folder / "atlas_dseg.tsv", sep="\t", index=False)
        pd.DataFrame(rows).to_csv(folder / "visits.tsv", sep="\t", index=False)
        return folder / "visits.tsv"


def read(table: Path) -> Visits:
    return Visits.read(table, time_unit="years", covariates=["age"], scans=["scan"])


def fitted(cohort: KnownCohort, folder: Path, monkeypatch: pytest.MonkeyPatch, settings: GrowthSettings = SETTINGS) -> Growth:
    monkeypatch.setattr(growth_module, "register", cohort.register)
    return fit_growth(read(cohort.write(folder)), settings, cohort.atlas(), Registrations(folder / "kept"))


@pytest.mark.parametrize("basis", ["principal", "cosine"])
def test_rates_and_what_explains_them_are_those_of_the_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, basis: str) -> None:
    cohort = KnownCohort(30, noise=0.02)
    growth = fitted(cohort, tmp_path, monkeypatch, replace(SETTINGS, basis=basis, finest_mm=4.0, share=0.998))
    assert growth.rates.fit.converged
    assert basis == "cosine" or 3 <= growth.basis.columns <= 6
    estimates = torch.stack([growth.rate(f"s{n}").mean for n in range(30)])
    found, truth = growth.basis.fields(estimates), torch.tensordot(cohort.rates.float(), cohort.truth, 1)
    assert float((found - truth).square().mean().sqrt()) < 0.1 * float(truth.square().mean().sqrt())
    mean, sd = growth.effect_maps()["age"]
    expected = torch.tensordot(torch.tensor([0.08, 0.05, 0.0]), cohort.truth, 1)
    divergence = torch.stack([torch.gradient(expected[a], spacing=2.0, dim=a)[0] for a in range(2)]).sum(0)
    z = (mean - divergence) / sd
    assert float(torch.corrcoef(torch.stack([mean.flatten(), divergence.flatten()]))[0, 1]) > 0.9
    # Three numbers decide the whole map, so that it is off as a whole or not at all.
    assert float(z.square().mean()) < 4
    with pytest.raises(ValueError, match="people of the tables"):
        growth.rate("nobody")


def test_checks_of_the_last_visits_do_not_know_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = KnownCohort(12, noise=0.02)
    growth = fitted(cohort, tmp_path, monkeypatch, replace(SETTINGS, separate=True))
    first = leading(growth)
    torch.testing.assert_close(first.fit.log_likelihood, growth.fits[0].log_likelihood)
    torch.testing.assert_close(first.fit.effects(), growth.fits[0].effects()[..., 0])
    found = foretold_growth(growth, Registrations(tmp_path / "kept"))
    assert found is not None
    assert found.forecast.years == pytest.approx(max(times[-1] for times in cohort.years), abs=1e-6)
    torch.testing.assert_close(found.observed, cohort.scan(int(found.subject[1:]), 2).data, rtol=1e-4, atol=1e-3)
    # With other last visits, the same prediction.
    for fit in growth.fits:
        fit.data.change[held_back(growth.rates)] += 1.0
    again = foretold_growth(growth, Registrations(tmp_path / "kept"))
    assert again is not None
    torch.testing.assert_close(again.forecast.volumes["mean"].tolist(), found.forecast.volumes["mean"].tolist())


def test_one_coefficient_is_a_scalar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    growth = fitted(KnownCohort(20), tmp_path, monkeypatch, replace(SETTINGS, most=1))
    (name,) = growth.columns
    visits = growth.rates.joined.visits
    scalar = fit_rates(visits, replace(SETTINGS.rates, scalar=name))
    field = growth.rates
    assert field.fit.log_likelihood == pytest.approx(scalar.fit.log_likelihood, abs=1e-5)
    torch.testing.assert_close(field.fit.variances, scalar.fit.variances, rtol=1e-3, atol=1e-8)
    a, b = growth.rate("s4"), scalar.fit.rates(torch.tensor([4]))
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(a.sd, b.sd, rtol=1e-3, atol=1e-5)
    shares = [result.component_table()["share"].iloc[0] for result in (field, scalar)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)


def test_coefficients_may_have_components_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = KnownCohort(24)
    cohort.write(tmp_path)
    monkeypatch.setattr(growth_module, "register", cohort.register)
    invoke("train", "longitudinal", *options(tmp_path), "--clinical", "age")
    table = pd.read_csv(tmp_path / "visits.tsv", sep="\t")
    asked = table[table["subject"] == "s5"].iloc[[0, 0]].assign(time=[0.0, 8.0])
    asked["scan"] = [asked["scan"].iloc[0], "n/a"]
    asked.to_csv(tmp_path / "new.tsv", sep="\t", index=False)
    run = GrowthRun.load(tmp_path / "run")
    shares = pd.read_csv(tmp_path / "run" / "shares.tsv", sep="\t")
    assert len(run.components) == run.basis.columns == len(shares) > 1
    np.testing.assert_allclose(shares["clinical"] + shares["own"], 1.0, atol=1e-6)
    ((subject, found),) = run.predict(run.read(tmp_path / "new.tsv"), Registrations(tmp_path / "kept"), draws=10)
    assert subject == "s5" and found.years == 8.0
    # Each coefficient as a scalar of its own, from the run's table.
    for number, (variances, scales) in enumerate(run.components):
        column = run.rates.visits.scalars[number]
        alone = fit_rates(run.rates.visits, replace(run.settings.rates, scalar=column), variances=scales[0] * variances)
        free = fit_rates(run.rates.visits, replace(run.settings.rates, scalar=column))
        assert free.fit.log_likelihood == pytest.approx(alone.fit.log_likelihood, abs=1e-4)


@pytest.mark.slow
def test_intervals_of_volumes_cover_those_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of people of the run and, by their age alone, of others."""
    inside: dict[bool, list[float]] = {True: [], False: []}
    closer = []
    for seed in range(6):
        cohort = KnownCohort(40, seed=seed, noise=0.3)
        table = pd.read_csv(cohort.write(tmp_path), sep="\t")
        monkeypatch.setattr(growth_module, "register", cohort.register)
        new = [f"s{n}" for n in range(30, 40)]
        held = table["subject"].isin(new) & table["subject"].duplicated()
        table[~held].to_csv(tmp_path / "seen.tsv", sep="\t", index=False)
        growth = fit_growth(read(tmp_path / "seen.tsv"), SETTINGS, cohort.atlas(), Registrations(tmp_path / f"kept{seed}"))
        for n in range(20, 40):
            body = Body.of(cohort.scan(n, 0), cohort.from_atlas[n], cohort.atlas())
            found = forecast(body, growth.basis, growth.rate(f"s{n}"), 3.0, draws=100).volumes
            truth = RegionWeights.of(body, GRID).volumes(_determinant(cohort, n, 3.0))
            rows = zip(truth.tolist(), found["low"], found["high"], strict=True)
            inside[n < 30] += [float(low <= volume <= high) for volume, low, high in rows]
            closer += [abs(m - v) / abs(b - v) for m, b, v in zip(found["mean"], found["baseline_ml"], truth.tolist(), strict=True)]
    for known in (True, False):
        covered = np.mean(inside[known])
        # Two labels of sixty people, not independent of each other; quantiles of a hundred draws and plug-in components fall a little short.
        assert covered == pytest.approx(0.9, abs=0.04 + 3 * math.sqrt(0.09 / 60)), known
    assert np.median(closer) < 0.5


def _determinant(cohort: KnownCohort, person: int, years: float) -> Tensor:
    """Of a person's true flow, on the scan's grid."""
    field = torch.tensordot(cohort.rates[person].float(), cohort.truth, 1)
    velocity = Transport(cohort.from_atlas[person].inverse(), GRID)(Velocity(GRID, field))
    return Velocity(GRID, years * velocity.field).exp().jacobian_determinant(GRID)


def options(folder: Path, table: str = "visits.tsv", out: str = "run") -> list[str]:
    atlas = ["--atlas-image", str(folder / "atlas.nii.gz"), "--atlas-labels", str(folder / "atlas_dseg.nii.gz")]
    return ["--data", str(folder / table), "--scans", "scan", "--mean", "age", "--spacing", "2", *atlas, "-o", str(folder / out)]


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_a_run_from_files_gives_forecasts_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = KnownCohort(16)
    monkeypatch.setattr(growth_module, "register", cohort.register)
    table = pd.read_csv(cohort.write(tmp_path), sep="\t")
    new = table["subject"].isin(["s14", "s15"])
    table[~new].to_csv(tmp_path / "train.tsv", sep="\t", index=False)
    assert "14 people in all tables" in invoke("train", "longitudinal", *options(tmp_path, "train.tsv"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Growth of the average person" in page and "A follow-up scan and its prediction" in page and page.count("data:image/png") == 6
    record = json.loads((tmp_path / "run" / "longitudinal.json").read_text())
    assert record["Growth"]["basis"] == "principal" and record["Labels"] == {"1": "disc", "2": "ring"}
    assert {p.name for p in (tmp_path / "run").glob("atlas*")} == {
        f"atlas_desc-{what}Growth{sd}.nii.gz" for what in ("rate", "age") for sd in ("", "Sd")
    }
    asked = table[new].copy()
    asked.loc[asked["subject"].duplicated(keep="first") & ~asked["subject"].duplicated(keep="last"), "scan"] = "n/a"
    asked.loc[~asked["subject"].duplicated(keep="last"), "scan"] = "n/a"
    asked = asked.drop(asked[(asked["subject"] == "s14") & (asked["scan"] == "n/a")].index[:0])
    known = table[table["subject"] == "s3"].iloc[[0]]
    asked = pd.concat([asked, known, known.assign(time=9.5, scan="n/a")])
    write_labels(tmp_path / "own.nii.gz", disc_labels(GRID).data, cohort.scan(3, 0))
    asked["own"] = np.where((asked["subject"] == "s3") & (asked["time"] == 0), "own.nii.gz", "n/a")
    asked.to_csv(tmp_path / "new.tsv", sep="\t", index=False)
    arguments = ["--data", str(tmp_path / "new.tsv"), "--draws", "20", "--labels", "own"]
    said = invoke("predict", str(tmp_path / "run"), *arguments, "--samples", "3", "-o", str(tmp_path / "out"))
    found = pd.read_csv(tmp_path / "out" / "predictions.tsv", sep="\t")
    assert f"{len(found) // 2} predictions of scan" in said
    assert set(found["name"]) == {"disc", "ring"}
    assert ((found["low"] < found["mean"]) & (found["mean"] < found["high"])).all()
    mine = found[found["subject"] == "s3"].set_index("name")
    assert mine["baseline_ml"]["disc"] == pytest.approx(float((disc_labels(GRID).data == 1).sum()) * 4 / 1000, rel=1e-6)
    stem = tmp_path / "out" / "sub-s3_time-9p50"
    growth = {name: read_scan(f"{stem}_desc-{name}.nii.gz") for name in ("growth", "growthSd", "shrinking")}
    assert growth["growth"].grid == GRID
    assert float(growth["shrinking"].data.min()) >= 0 and float(growth["shrinking"].data.max()) <= 1
    drawn = torch.stack([read_scan(f"{stem}_desc-sample{number:03d}.nii.gz").data for number in (1, 2, 3)])
    assert drawn.shape == (3, *GRID.shape) and Path(f"{stem}_desc-sample003.json").exists()
    refused = CliRunner().invoke(app, ["predict", str(tmp_path / "run"), *arguments, "--samples", "21", "-o", str(tmp_path / "out")])
    assert refused.exit_code == 2 and "21 scans of 20 draws" in " ".join(refused.output.split())
    there = read_warp(f"{stem}_from-baseline_to-followup_mode-image_xfm.nii.gz")
    carried = warp(disc_labels(GRID).data[None], GRID, there, GRID, "nearest")[0]
    assert float((carried != read_labels(f"{stem}_dseg.nii.gz").data).float().mean()) < 0.01
    back = read_warp(f"{stem}_from-followup_to-baseline_mode-image_xfm.nii.gz")
    points = 8 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    largest = float((back(points) - points).norm(dim=-1).max())
    assert float((there(back(points)) - points).norm(dim=-1).max()) < 0.1 * largest
    # The same again: nothing is registered anew, and every number is the same.
    monkeypatch.setattr(growth_module, "register", _never)
    again = ["predict", str(tmp_path / "run"), *arguments, "-o"]
    invoke(*again, str(tmp_path / "out"))
    assert pd.read_csv(tmp_path / "out" / "predictions.tsv", sep="\t").equals(found)


def test_people_without_a_baseline_scan_are_predicted_on_the_atlas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = KnownCohort(12)
    monkeypatch.setattr(growth_module, "register", cohort.register)
    table = pd.read_csv(cohort.write(tmp_path), sep="\t")
    # A visit to come, of which the run knows that there was no scan.
    gap = table[table["subject"] == "s1"].iloc[[-1]].assign(time=7.25, scan="n/a")
    pd.concat([table, gap]).to_csv(tmp_path / "visits.tsv", sep="\t", index=False)
    invoke("train", "longitudinal", *options(tmp_path))
    asked = table[table["subject"].isin(["s10", "s11"])].groupby("subject").head(2)
    asked = asked.assign(subject="new" + asked["subject"], scan=["n/a", "n/a", "n/a", "s11_1.nii.gz"])
    later = asked.iloc[[3]].assign(time=8.0, scan="n/a")
    own = pd.concat([table[table["subject"] == "s1"], gap])
    pd.concat([asked, later, own]).to_csv(tmp_path / "new.tsv", sep="\t", index=False)
    arguments = ["predict", str(tmp_path / "run"), "--data", str(tmp_path / "new.tsv"), "--draws", "20", "-o", str(tmp_path / "out")]
    said = invoke(*arguments)
    assert "no scan at the baseline of news10 and 1 others: predicted on the atlas; later scans of theirs are not used" in said
    found = pd.read_csv(tmp_path / "out" / "predictions.tsv", sep="\t").set_index(["subject", "name"])
    assert sorted({subject for subject, _ in found.index}) == ["news10", "news11", "s1"]
    area = float((disc_labels(GRID).data == 1).sum()) * 4 / 1000
    assert found["baseline_ml"]["news10", "disc"] == pytest.approx(area)
    assert found["sd"]["news10", "disc"] > 0
    # Someone of whom nothing but the age is known has the rate that it tells.
    run = GrowthRun.load(tmp_path / "run")
    with pytest.warns(UserWarning, match="predicted on the atlas"):
        (_, alone), *_ = run.predict(run.read(tmp_path / "new.tsv"), Registrations(tmp_path / "out" / "registrations"), draws=20)
    assert torch.equal(alone.baseline.data, cohort.atlas().scan.data)
    assert alone.volumes.set_index("name")["mean"]["disc"] == pytest.approx(found["mean"]["news10", "disc"])


def _never(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("registered again")


def test_a_run_that_was_stopped_goes_on_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = KnownCohort(8)
    whole = fitted(cohort, tmp_path, monkeypatch)
    made: list[str] = []

    def interrupted(moving: Volume, fixed: Volume, **options: Any) -> Any:
        if len(made) == 9:
            raise KeyboardInterrupt
        made.append("one")
        return cohort.register(moving, fixed)

    monkeypatch.setattr(growth_module, "register", interrupted)
    kept = Registrations(tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        fit_growth(read(tmp_path / "visits.tsv"), SETTINGS, cohort.atlas(), kept)
    assert len(list((tmp_path / "again").iterdir())) == 9
    rest = []

    def counted(moving: Volume, fixed: Volume, **options: Any) -> Any:
        rest.append("one")
        return cohort.register(moving, fixed)

    monkeypatch.setattr(growth_module, "register", counted)
    resumed = fit_growth(read(tmp_path / "visits.tsv"), SETTINGS, cohort.atlas(), kept)
    assert len(rest) == 8 * 3 - 9
    assert torch.equal(resumed.rates.fit.coefficients, whole.rates.fit.coefficients)
    assert isinstance(resumed.basis, PrincipalFields) and isinstance(whole.basis, PrincipalFields)
    assert torch.equal(resumed.basis.vectors, whole.basis.vectors)
    other = replace(kept, seed=1)
    other(cohort.scan(0, 0), cohort.atlas().scan, RegistrationSettings())
    assert len(rest) == 8 * 3 - 9 + 1
    damaged = next(iter((tmp_path / "again").iterdir()))
    for path in (tmp_path / "again").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(UnusableInput, match="no registration that can be read"):
        fit_growth(read(tmp_path / "visits.tsv"), SETTINGS, cohort.atlas(), kept)
    assert damaged.exists()


def test_what_cannot_be_done_is_said_in_one_line_before_any_registration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = KnownCohort(6)
    table = pd.read_csv(cohort.write(tmp_path), sep="\t")
    monkeypatch.setattr(growth_module, "register", _never)

    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 2, result.output
        return " ".join(result.output.split())

    def trained(change: Callable[[pd.DataFrame], pd.DataFrame], *more: str) -> str:
        change(table.copy()).to_csv(tmp_path / "bad.tsv", sep="\t", index=False)
        return refused("train", "longitudinal", *options(tmp_path, "bad.tsv"), *more)

    assert "does not exist" in trained(lambda t: t.assign(scan=["gone.nii.gz", *t["scan"][1:]]))
    assert "no scan at the baseline of s0" in trained(lambda t: t.assign(scan=["n/a", *t["scan"][1:]]))
    assert "no follow-up scan of anyone" in trained(lambda t: t.drop_duplicates("subject"))
    assert "cannot tell rates of scan apart" in trained(lambda t: t[t["subject"] < "s2"])
    thick = Volume.from_grid(torch.rand(4, 4, 4), Grid.from_spacing((4, 4, 4), 2.0))
    write_scan(tmp_path / "thick.nii.gz", thick.data, thick)
    assert "has 3 axes" in trained(lambda t: t.assign(scan=[*t["scan"][:-1], "thick.nii.gz"]))
    assert "nothing that could explain rates" in trained(lambda t: t, "--no-own")
    assert "one of --scalar and --scans" in trained(lambda t: t, "--scalar", "age")
    base = ["train", "longitudinal", "--data", str(tmp_path / "visits.tsv"), "-o", str(tmp_path / "run")]
    assert "one of --scalar and --scans" in refused(*base)
    alone = ["--scans", "scan", "--atlas-image", str(tmp_path / "atlas.nii.gz")]
    assert "give both --atlas-image and --atlas-labels" in refused(*base, *alone)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="basis"):
        GrowthSettings(RateSettings("scan"), basis="other")
    with pytest.raises(ValueError, match="share"):
        GrowthSettings(RateSettings("scan"), share=0.0)

    monkeypatch.setattr(growth_module, "register", cohort.register)
    invoke("train", "longitudinal", *options(tmp_path))
    assert "holds a run already" in refused("train", "longitudinal", *options(tmp_path))

    def predicted(change: Callable[[pd.DataFrame], pd.DataFrame]) -> str:
        change(table.copy()).to_csv(tmp_path / "bad.tsv", sep="\t", index=False)
        return refused("predict", str(tmp_path / "run"), "--data", str(tmp_path / "bad.tsv"), "-o", str(tmp_path / "out"))

    assert "asks for no prediction of a scan" in predicted(lambda t: t)
    twice = table[table["subject"] == "s0"].iloc[[0, 0, 0]].assign(time=[0.0, 8.001, 8.002], scan=["s0_0.nii.gz", "n/a", "n/a"])
    assert "names of another forecast" in predicted(lambda t: twice)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub-s0_time-8p00_dseg.tsv").write_text("mine")
    assert "did not write it" in predicted(lambda t: twice[:2])
    shutil.rmtree(tmp_path / "out")
    assert "has no column 'age'" in predicted(lambda t: twice[:2].drop(columns="age"))
    assert "does not exist" in predicted(lambda t: twice[:2].assign(scan=["gone.nii.gz", "n/a"]))
    assert "has 3 axes" in predicted(lambda t: twice[:2].assign(scan=["thick.nii.gz", "n/a"]))
    assert "begins with a visit of s0" in predicted(lambda t: t[1:])
    assert not (tmp_path / "out").exists()
    (tmp_path / "run" / "growth.safetensors").write_bytes(b"nothing")
    assert "holds no run of rates" in predicted(lambda t: t)


def test_scans_without_change_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = KnownCohort(6)
    cohort.registered = {pair: (affine, None) for pair, (affine, _) in cohort.registered.items()}
    with pytest.raises(UnusableInput, match="no different from their baselines"):
        fitted(cohort, tmp_path, monkeypatch)


def rings(ndim: int, side: int, spacing_mm: float) -> LabelAtlas:
    """White matter in wavy grey matter in fluid."""
    grid = Grid.from_spacing((side,) * ndim, spacing_mm)
    points = grid.coordinates()
    radius = points.norm(dim=-1) / (side * spacing_mm / 80)
    wave = 2 * torch.sin(4 * torch.atan2(points[..., 1], points[..., 0]))
    edges = [torch.sigmoid(radius + shift - r) for r, shift in ((15.0, wave), (23.0, wave / 2), (30.0, 0.0))]
    parts = torch.stack([edges[0] - edges[1], 1 - edges[0], edges[1] - edges[2], edges[2]]).clamp_min(1e-4)
    probabilities = parts / parts.sum(0)
    template = torch.tensordot(torch.tensor([0.7, 1.0, 0.3, 0.05]), probabilities, 1)
    return LabelAtlas(("GM", "WM", "CSF", "air"), probabilities, grid, template)


SIMULATED: dict[str, Any] = {
    "deformation_mm": 1.5,
    "length_mm": 15.0,
    "log_scale": 0.03,
    "translation_mm": 0.0,
    "rotation": 0.0,
    "bias_sd": 0.02,
    "reference_age": 70.0,
}


@pytest.mark.slow
def test_from_genotypes_and_scans_to_a_follow_up_scan(tmp_path: Path) -> None:
    """A simulated cohort by the command line; the truth is that of its scans."""
    atlas = rings(2, 40, 2.0)
    years = [[0.0, 2.0 + n % 4] for n in range(20)]
    cohort = simulate_genetic_cohort(
        20, 2, atlas, 2.0, 1, mean_rate=-0.03, rate_sd=0.01, snps=60, causal=10, years=years, **SIMULATED
    )
    table, genotypes = cohort.write(tmp_path)
    rows = pd.read_csv(table, sep="\t")
    held = rows["subject"].isin(rows["subject"].unique()[14:])
    rows[~held].to_csv(tmp_path / "train.tsv", sep="\t", index=False)
    asked = rows[held].copy()
    asked.loc[asked["subject"].duplicated(), ["scan", "labels"]] = "n/a"
    asked.to_csv(tmp_path / "new.tsv", sep="\t", index=False)
    given = LabelledScan.of(atlas)
    write_scan(tmp_path / "atlas.nii.gz", given.scan.data, given.scan)
    write_labels(tmp_path / "atlas_dseg.nii.gz", given.labels.data, given.scan)
    pd.DataFrame(sorted(given.names.items()), columns=["index", "name"]).to_csv(tmp_path / "atlas_dseg.tsv", sep="\t", index=False)
    invoke("train", "longitudinal", *options(tmp_path, "train.tsv"), "--genotypes", str(genotypes), "--device", "cpu")
    components = pd.read_csv(tmp_path / "run" / "components.tsv", sep="\t")
    assert list(components["component"]) == ["genetics", "own", "noise"]
    predict = ["--data", str(tmp_path / "new.tsv"), "--labels", "labels", "--draws", "50", "--device", "cpu", "-o", str(tmp_path / "out")]
    invoke("predict", str(tmp_path / "run"), *predict)
    found = pd.read_csv(tmp_path / "out" / "predictions.tsv", sep="\t")
    errors, copied, images, baselines = [], [], [], []
    people = list(cohort.people.table["subject"])
    for subject, volumes in found.groupby("subject"):
        before, after = cohort.scans[people.index(str(subject))]
        for row in volumes.to_dict("records"):
            true = after.volumes_ml[row["name"]] / before.volumes_ml[row["name"]]
            errors.append(abs(row["mean"] / row["baseline_ml"] - true))
            copied.append(abs(1 - true))
        time = f"{volumes['years'].iloc[0]:.2f}".replace(".", "p")
        predicted = read_scan(tmp_path / "out" / f"{subject}_time-{time}_desc-predicted.nii.gz")
        images.append(float((predicted.data - after.image.data).square().mean().sqrt()))
        baselines.append(float((before.image.data - after.image.data).square().mean().sqrt()))
    # Registration to half a voxel's accuracy shrinks changes by a part; copying the baseline leaves them out.
    assert np.mean(errors) < 0.6 * np.mean(copied)
    assert np.mean(images) < 0.9 * np.mean(baselines)
    assert sum(a < b for a, b in zip(images, baselines, strict=True)) >= 5
    run = GrowthRun.load(tmp_path / "run")
    assert sum(len(scales) for _, scales in run.components) == run.basis.columns


@pytest.mark.slow
def test_volumes_in_three_dimensions(tmp_path: Path) -> None:
    atlas = rings(3, 20, 3.5)
    cohort = simulate_genetic_cohort(5, 2, atlas, 3.5, 2, mean_rate=-0.04, rate_sd=0.005, snps=20, causal=5, interval_years=3.0, **SIMULATED)
    table, _ = cohort.write(tmp_path)
    settings = GrowthSettings(RateSettings("scan"), spacing_mm=3.5)
    visits = Visits.read(table, time_unit="years", scans=["scan"])
    with pytest.warns(UserWarning, match="cannot be told from noise"):
        growth = fit_growth(visits, settings, LabelledScan.of(atlas), Registrations(tmp_path / "kept", device="cpu"))
    scan = read_scan(str(visits.baseline["scan"].iloc[0]))
    phi = Registrations(tmp_path / "kept", device="cpu").to_atlas(scan, growth.atlas, settings.to_atlas)
    found = forecast(Body.of(scan, phi, growth.atlas), growth.basis, growth.rate("sub-0001"), 3.0, draws=10)
    assert found.predicted.shape == scan.shape
    volumes = found.volumes.set_index("name")
    before, after = cohort.scans[0]
    for name, grows in (("GM", False), ("WM", False), ("CSF", True)):
        ratio = volumes["mean"][name] / volumes["baseline_ml"][name]
        assert (ratio > 1) == grows == (after.volumes_ml[name] > before.volumes_ml[name])


SMOOTH: dict[str, Any] = {"deformation_mm": 1.0, "length_mm": 20.0}


def test_a_simulated_cohort_holds_its_truth(tmp_path: Path) -> None:
    cohort = simulate_genetic_cohort(5, 2, rings(2, 24, 3.0), 3.0, 0, mean_rate=-0.05, rate_sd=0.01, snps=30, causal=5, interval_years=2.0, **SMOOTH)
    np.testing.assert_allclose(cohort.table["rate"][::2], -cohort.people.rates)
    np.testing.assert_allclose(cohort.table["age"][::2], cohort.people.table["age"])
    points = 24 * torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) - 12
    for person in (0, 3):
        first, later = cohort.scans[person]
        # The same point of the atlas, by the change and then the baseline.
        there = first.transform(cohort.deformation(person, 1)(points))
        # But for interpolation between nodes 3 mm apart.
        assert float((there - later.transform(points)).norm(dim=-1).max()) < 0.25
        shrunk = [cohort.flow.at(each.atrophy)(points) for each in (first, later)]
        carried = cohort.flow.at(first.atrophy)(cohort.velocity(person, 1).exp()(points))
        moved = float((shrunk[1] - shrunk[0]).norm(dim=-1).max())
        assert moved > 0.02 and float((carried - shrunk[1]).norm(dim=-1).max()) < 0.2 * moved
    given = simulate_genotypes(5, 30, seed=9)
    again = simulate_genetic_cohort(5, 1, rings(2, 24, 3.0), 3.0, 0, causal=5, genotypes=given)
    assert torch.equal(again.people.genotypes.counts, given.counts)
    table, genotypes = cohort.write(tmp_path)
    visits = Visits.read(table, time_unit="years", covariates=["education"], categorical=["sex"], scans=["scan", "labels"])
    assert visits.subjects == tuple(cohort.people.table["subject"]) and len(visits) == 10
    assert torch.equal(read_scan(visits.table["scan"][3]).data, cohort.scans[1][1].image.data)
    assert torch.equal(read_labels(visits.table["labels"][2]).data, cohort.scans[1][0].labels.data)
    assert genotypes.is_file()
