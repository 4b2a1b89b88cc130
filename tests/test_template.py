"""Templates: the cohort's linearisation against autograd and dense algebra, and estimates against the truth that made the scans."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import cohort, tiny_template
from phantoms import bend, head
from pyro import poutine
from scipy.linalg import logm
from torch import Tensor

from probmed.grids import Grid
from probmed.inference.em import log_joint
from probmed.models.template import Template, TemplateLinearisation, combined, linearise_template
from probmed.priors import SmoothVelocity
from probmed.similarities import GaussianNoise, LocalCorrelation, Similarity
from probmed.transforms import Affine, Displacement, Velocity, warp
from probmed.volumes import UnusableInput, Volume
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
    model_.similarity.update = lambda moved, image, latents: latents  # type: ignore[method-assign]
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
