"""Templates: the cohort's linearisation against autograd and dense algebra, and estimates against the truth that made the scans."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from cases import cohort, tiny_template
from phantoms import bend, head
from pyro import poutine
from scipy.linalg import logm
from torch import Tensor
from typer.testing import CliRunner

from probmed.cli import app
from probmed.grids import Grid
from probmed.inference.em import log_joint
from probmed.models.template import Template, TemplateLinearisation, combined, linearise_template
from probmed.priors import SmoothVelocity
from probmed.similarities import GaussianNoise, LocalCorrelation, Similarity
from probmed.transforms import Affine, Displacement, Velocity, warp
from probmed.volumes import UnusableInput, Volume, read_scan, write_labels, write_scan
from probmed.warps import read_warp
from probmed.workflows.templates import TemplateSettings, estimate_template, mean_space

double = pytest.mark.usefixtures("float64")


def simulated(
    similarity: Similarity,
) -> tuple[Template, dict[str, Tensor], Tensor, list[Displacement], Tensor]:
    """A tiny cohort with two covariates: model, its latents, the scans, their flows, the covariates."""
    model = tiny_template(lambda: similarity, 2)
    (covariates,) = cohort(2)
    trace = poutine.trace(model).get_trace(covariates)
    state = {name: trace.nodes[name]["value"] for name in ("template", "effects", "velocity")}
    # As the model has them: the number of squarings is that of the largest velocity of the batch.
    fields = Velocity(model.deformation.grid, state["velocity"]).exp().field
    flows = [Displacement(model.deformation.grid, field) for field in fields]
    return model, state, trace.nodes["images"]["value"], flows, covariates


def linearised(similarity: Similarity) -> tuple[TemplateLinearisation, Template, dict[str, Tensor], Tensor]:
    model, state, images, flows, covariates = simulated(similarity)
    near = linearise_template(model, state["template"], flows, images, covariates)
    return near, model, state, images


@double
@pytest.mark.parametrize("similarity", [GaussianNoise(tempering=0.4), LocalCorrelation(1)], ids=["gaussian", "correlation"])
def test_value_and_gradient_are_those_of_the_model(similarity: Similarity) -> None:
    near, model, state, images = linearised(similarity)
    leaf = state["template"].clone().requires_grad_()
    latents = {name: torch.stack([each[name] for each in near.latents]) for name in near.latents[0]}
    total = log_joint(model, {**state, **latents, "template": leaf}, cohort(2)[0], images)
    field = model.deformation.prior()
    others = field.about(model.mean_velocity(cohort(2)[0], state["effects"])).log_prob(state["velocity"]).sum()
    others = others + field.log_prob(state["effects"]).sum()
    likelihood = total - others - model.prior().log_prob(leaf)
    torch.testing.assert_close(torch.tensor(near.log_joint), likelihood.detach())
    (gradient,) = torch.autograd.grad(likelihood, leaf)
    torch.testing.assert_close(near.gradient, gradient)


@double
def test_precision_is_the_hessian_its_root_squares_to_it_and_blocks_bound_it() -> None:
    near, model, _, _ = linearised(GaussianNoise(tempering=0.4))
    shape = (3, *model.grid.shape)
    size = math.prod(shape)
    dense = near.precision(torch.eye(size).reshape(size, *shape)).reshape(size, size)
    torch.testing.assert_close(dense, dense.T)
    elements = math.prod(near.elements)
    root = near.precision_root(torch.eye(elements).reshape(elements, *near.elements)).reshape(elements, size)
    torch.testing.assert_close(root.T @ root, dense)
    # Gaussian noise of a given variance makes the log likelihood quadratic, so that gradients differ by the Hessian.
    (covariates,) = cohort(2)
    model_, state, images, flows, _ = simulated(GaussianNoise(tempering=0.4))
    fixed = [{"noise": torch.full((1,), 0.02)}] * 3
    model_.similarity.update = lambda moved, fixed, latents: dict(latents)  # type: ignore[method-assign]
    here = linearise_template(model_, state["template"], flows, images, covariates, fixed)
    step = 0.1 * torch.randn(shape)
    there = linearise_template(model_, state["template"] + step, flows, images, covariates, fixed)
    torch.testing.assert_close(here.gradient - there.gradient, here.precision(step[None])[0])
    blocks = near.blocks().flatten(2)
    bound = torch.diag_embed(blocks).movedim(1, 2).reshape(size, size)
    assert float(torch.linalg.eigvalsh(bound - dense).min()) > -1e-9 * float(bound.diagonal().max())


@double
def test_effects_given_velocities_are_the_mode() -> None:
    model, state, _, _, covariates = simulated(GaussianNoise())
    field = model.deformation.prior()
    leaf = model.fitted_effects(covariates, state["velocity"]).requires_grad_()
    total = field.log_prob(leaf).sum()
    total = total + field.about(model.mean_velocity(covariates, leaf)).log_prob(state["velocity"]).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    scale = field.precision_matvec(state["velocity"]).abs().max()
    assert float(gradient.abs().max()) < 1e-10 * float(scale)


def grid_2d() -> Grid:
    return Grid.from_spacing((44, 40), 1.9)


def made_cohort(count: int, seed: int = 0) -> tuple[list[Volume], Tensor, Tensor, Tensor]:
    """Scans of a cohort in which age bends the head: scans, ages, the velocity of one standard deviation of age, the template."""
    generator = torch.Generator().manual_seed(seed)
    grid = grid_2d()
    points = grid.coordinates(torch.float32)
    template = head(points)
    age = 70 + 8 * torch.linspace(-1.5, 1.5, count, dtype=torch.float64)
    age = age[torch.randperm(count, generator=generator)]
    change = bend(points, grid, 2.0).movedim(-1, 0)
    prior = SmoothVelocity(grid, 1.0, 8.0, 3.0).prior()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        own = prior.expand([count]).sample()
    scans = []
    for z, w in zip((age - age.mean()) / age.std(correction=0), own - own.mean(0), strict=True):
        image = warp(template[None], grid, Velocity(grid, float(z) * change + w), grid, fill="edge")[0]
        scans.append(Volume(image + 0.03 * torch.randn(grid.shape, generator=generator), grid, grid.affine.numpy()))
    return scans, age, change, template


def unexplained(image: Tensor, truth: Tensor) -> float:
    """Share of the variance inside the field of view; a template's scale is that of scaled scans."""
    inner = (slice(6, -6),) * 2
    return 1 - float(torch.corrcoef(torch.stack([image[inner].flatten(), truth[inner].flatten()]))[0, 1]) ** 2


@pytest.mark.slow
@pytest.mark.parametrize("similarity", ["gaussian", "correlation"])
def test_the_effect_of_a_covariate_and_the_template_are_recovered(similarity: str) -> None:
    scans, age, change, template = made_cohort(10)
    settings = TemplateSettings(similarity=similarity, affine=0, sd_mm=2.0, length_mm=8.0)
    result = estimate_template(scans, age[:, None], ["age"], settings=settings)
    for spacing in {spacing for spacing, _ in result.history}:
        values = [value for where, value in result.history if where == spacing]
        assert all(b >= a for a, b in itertools.pairwise(values))
    model, grid = result.state.model, grid_2d()
    found = model.mean_velocity(torch.ones(1, 1), result.state.effects)[0]
    carried = Velocity(result.state.lattice, found)(grid.coordinates(torch.float32)) - grid.coordinates(torch.float32)
    truth = Velocity(grid, change)(grid.coordinates(torch.float32)) - grid.coordinates(torch.float32)
    edge = (head(grid.coordinates(torch.float32)) - 0.5).abs() < 0.45  # where an image can show a displacement
    a, b = carried[edge].flatten(), truth[edge].flatten()
    assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.6
    assert 0.3 < float(a @ b / b.square().sum()) < 1.1  # a joint mode shrinks effects
    mean = torch.stack([scan.data for scan in scans]).mean(0)
    for years in (-12.0, 0.0, 12.0):
        z = years / float(age.std(correction=0))
        there = warp(template[None], grid, Velocity(grid, z * change), grid, fill="edge")[0]
        assert unexplained(result.at([70 + years]), there) < 0.35 * unexplained(mean, there)


@pytest.mark.slow
def test_scans_come_onto_the_template_and_the_template_onto_scans() -> None:
    scans, _, _, _ = made_cohort(6)
    result = estimate_template(scans, settings=TemplateSettings(affine=0))
    image, grid = result.at(), result.grid
    before = torch.stack([scan.data for scan in scans]).std(0).mean()
    on_template = [warp(s.data[None], s.grid, result.from_scan(n), grid, fill="edge")[0] for n, s in enumerate(scans)]
    assert float(torch.stack(on_template).std(0).mean()) < 0.6 * float(before)
    back = warp(image[None], grid, result.to_scan(0), scans[0].grid, fill="edge")[0]
    assert float(torch.corrcoef(torch.stack([back.flatten(), scans[0].data.flatten()]))[0, 1]) > 0.97
    points = grid.coordinates(torch.float64)[10:-10, 10:-10]
    assert float((result.to_scan(0)(result.from_scan(0)(points)) - points).norm(dim=-1).max()) < 0.1


def test_maps_of_the_mean_space_have_logarithms_of_mean_zero_and_bring_scans_together() -> None:
    grid = Grid.from_spacing((60, 56), 1.5)
    points = grid.coordinates(torch.float32)
    moves = [torch.tensor(m) for m in ([0.0, 0.0, 0.0], [3.0, -2.0, 0.1], [-2.0, 4.0, -0.15])]
    images = [head(Affine.exp(move, 2)(points)) for move in moves]
    maps = mean_space(images, [grid] * 3, grid, 3, seed=0)
    logs = torch.stack([torch.from_numpy(logm(m.matrix.numpy()).real) for m in maps])
    assert float(logs.mean(0).abs().max()) < 1e-6
    moved = torch.stack([warp(i[None], grid, m, grid, fill="edge")[0] for i, m in zip(images, maps, strict=True)])
    assert float(moved.std(0).mean()) < 0.15 * float(torch.stack(images).std(0).mean())


def test_cohorts_that_make_no_template_are_refused() -> None:
    grid = Grid.from_spacing((16, 16), 1.0)
    scan = Volume(head(grid.coordinates(torch.float32)), grid, grid.affine.numpy())
    with pytest.raises(UnusableInput, match="two scans or more"):
        estimate_template([scan])
    deep = Grid.from_spacing((16, 16, 16), 1.0)
    other = Volume(head(deep.coordinates(torch.float32)), deep, deep.affine.numpy())
    with pytest.raises(UnusableInput, match="3 axes"):
        estimate_template([scan, other])
    with pytest.raises(ValueError, match="vary"):
        estimate_template([scan, scan], torch.ones(2, 1), ["age"])
    with pytest.raises(ValueError, match="2 scans"):
        estimate_template([scan, scan], torch.tensor([[1.0], [2.0], [3.0]]), ["age"])
    with pytest.raises(ValueError, match="similarity"):
        TemplateSettings(similarity="mixture")


def test_combined_is_a_weighted_sum() -> None:
    weights, fields = torch.tensor([[1.0, 2.0]]), torch.stack([torch.ones(2, 3), torch.full((2, 3), 3.0)])
    assert torch.equal(combined(weights, fields), torch.full((1, 2, 3), 7.0))


def write_cohort(folder: Path, count: int = 4) -> Path:
    """Scans with labels and ages, and their table."""
    scans, age, _, _ = made_cohort(count)
    rows = []
    for n, scan in enumerate(scans):
        write_scan(folder / f"sub-{n}_T1w.nii.gz", scan.data, scan)
        write_labels(folder / f"sub-{n}_dseg.nii.gz", (scan.data > 0.5).long(), scan)
        rows.append({"scan": f"sub-{n}_T1w.nii.gz", "labels": f"sub-{n}_dseg.nii.gz", "age": float(age[n])})
    table = folder / "cohort.tsv"
    pd.DataFrame(rows).to_csv(table, sep="\t", index=False)
    return table


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["template", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.slow
def test_the_command_writes_template_warps_table_and_report(tmp_path: Path) -> None:
    table, out = write_cohort(tmp_path), tmp_path / "out"
    call = (table, "-o", out, "--covariates", "age", "--affine", "0", "--quiet")
    assert run(*call) == (0, "")
    template = read_scan(out / "template.nii.gz")
    scan = read_scan(tmp_path / "sub-1_T1w.nii.gz")
    there = read_warp(out / "sub-1_T1w_from-scan_to-template_mode-image_xfm.nii.gz")
    moved = warp(scan.data[None], scan.grid, there, template.grid, fill="edge")[0]
    assert float(torch.corrcoef(torch.stack([moved.flatten(), template.data.flatten()]))[0, 1]) > 0.9
    share = read_scan(out / "template_label-1_probseg.nii.gz").data
    assert float(share.min()) >= 0
    assert 0.99 < float(share.max()) <= 1.001
    rows = pd.read_csv(out / "template_scans.tsv", sep="\t")
    assert list(rows["scan"]) == [f"sub-{n}_T1w" for n in range(4)]
    assert (rows["correlation"] > rows["correlation_affine"]).all()
    assert (rows["folding"] == 0).all()
    page = (out / "template_report.html").read_text()
    assert "<h2>age</h2>" in page
    assert json.loads((out / "template_desc-ageHigh.json").read_text())["Covariates"]["age"] == pytest.approx(rows["age"].max())
    before = (out / "template.nii.gz").read_bytes()
    assert run(*call)[0] == 0
    assert (out / "template.nii.gz").read_bytes() == before
    assert run(table, "-o", out, "--affine", "0", "--quiet")[0] == 0
    assert not list(out.glob("template_desc-age*"))  # of the run before


def test_tables_that_make_no_template_are_refused_in_one_line(tmp_path: Path) -> None:
    table, out = write_cohort(tmp_path, 2), tmp_path / "out"
    good = pd.read_csv(table, sep="\t")

    def refused(change: dict[str, Any], *more: object) -> str:
        bad = tmp_path / "bad.tsv"
        good.assign(**change).to_csv(bad, sep="\t", index=False)
        code, said = run(bad, "-o", out, *more)
        assert code == 2
        assert not out.exists()
        return said

    assert "has no column sex" in refused({}, "--covariates", "sex")
    assert "has no number but x as age in row 3" in refused({"age": [70, "x"]}, "--covariates", "age")
    assert "the same age in every row" in refused({"age": [70, 70]}, "--covariates", "age")
    assert "has no labels in row 3" in refused({"labels": [good["labels"][0], None]})
    assert "has no scan in row 2" in refused({"scan": [None, good["scan"][1]]})
    assert "does not exist" in refused({"scan": ["missing.nii.gz", good["scan"][1]]})
    assert "has the name of another scan" in refused({"scan": good["scan"][0], "labels": good["labels"][0]})
    write_labels(tmp_path / "other.nii.gz", torch.ones(5, 5).long(), Volume.from_grid(torch.ones(5, 5), Grid.from_spacing((5, 5), 1.0)))
    assert "is on another grid" in refused({"labels": [good["labels"][0], "other.nii.gz"]})
    good[:1].to_csv(tmp_path / "one.tsv", sep="\t", index=False)
    code, said = run(tmp_path / "one.tsv", "-o", out)
    assert code == 2
    assert "two scans or more" in said
    (out).mkdir()
    (out / "template.nii.gz").write_bytes(b"mine")
    code, said = run(table, "-o", out)
    assert code == 2
    assert "did not write it" in said
