"""What every component and model must do, run on the cases of `cases.py`."""

from __future__ import annotations

import importlib
import inspect
import io
import pkgutil
from typing import Any

import pyro
import pytest
import torch
from cases import CASES, COMPONENTS, MODELS, Case, oblique_grid
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.distributions import TorchDistribution
from pyro.infer import Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.poutine.util import site_is_subsample
from torch import Tensor

import probmed.appearances
import probmed.models
import probmed.network_priors
import probmed.priors
import probmed.similarities
from probmed.distributions import LabelMixture
from probmed.grids import Grid, MaskedGrid
from probmed.inference.em import log_joint
from probmed.models.segmentation import Segmentation
from probmed.models.shape_vae import ShapeGuide
from probmed.priors import DeformationPrior, LabelPrior
from probmed.similarities import Similarity
from probmed.transforms import Transform, Velocity

ABSTRACT = {LabelPrior, DeformationPrior, Similarity}
GUIDES_OF_FUNCTIONS = {ShapeGuide}  # whose programs are no modules; they have tests of their own
ANATOMY = frozenset({"affine", "velocity", "shape_code"})  # latents of a label prior
OBSERVED = {case.observed for case in MODELS.values()}

pytestmark = pytest.mark.usefixtures("float64", "local_parameters")

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_model = pytest.mark.parametrize("case", MODELS.values(), ids=MODELS.keys())


def trace_of(component: Any, case: Case, size: int = 0) -> Any:
    return poutine.trace(component).get_trace(*case.arguments(size))


def latents(trace: Any) -> dict[str, Tensor]:
    """Of the trace's stochastic sites all that are neither data nor plates."""
    return {
        name: trace.nodes[name]["value"]
        for name in trace.stochastic_nodes
        if name.split("/")[-1] not in OBSERVED and not site_is_subsample(trace.nodes[name])
    }


def observed(trace: Any, case: Case) -> dict[str, Tensor]:
    return {case.observed: trace.nodes[case.observed]["value"].detach()} if case.observed else {}


def tensors(result: Any) -> list[Tensor]:
    """The numbers in whatever a component returns."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, LabelMixture):
        return [result.log_prior, result.mixing, result.means, result.covariances]
    if isinstance(result, Transform):
        return [result.field if isinstance(result, Velocity) else result(torch.zeros(2, result.ndim))]
    if isinstance(result, TorchDistribution):
        value = torch.linspace(0.1, 0.9, result.event_shape.numel()).reshape(result.event_shape)
        return [result.log_prob(value.expand(result.shape()))]
    raise TypeError(f"a component returned a {type(result)}, which this suite does not know")


def assert_given_latents_repeat(trace: Any, component: PyroModule, case: Case) -> None:
    """With the latents (and data) of a trace, a component gives the trace's result and density."""
    again = trace_of(poutine.condition(component, data=latents(trace) | observed(trace, case)), case)
    for a, b in zip(tensors(trace.nodes["_RETURN"]["value"]), tensors(again.nodes["_RETURN"]["value"]), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    torch.testing.assert_close(torch.as_tensor(again.log_prob_sum()), torch.as_tensor(trace.log_prob_sum()))


def test_every_component_and_model_has_a_case() -> None:
    modules = [probmed.priors, probmed.appearances, probmed.network_priors]
    for package in (probmed.models, probmed.similarities):
        modules += [importlib.import_module(f"{package.__name__}.{info.name}") for info in pkgutil.iter_modules(package.__path__)]
    defined = set()
    for module in modules:
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, PyroModule) and kind.__module__ == module.__name__:
                defined.add(kind)
    built = {type(case.build()) for case in CASES.values()}
    guides = {type(case.guide(case.build())) for case in CASES.values() if case.guide is not None}
    missing = {kind.__name__ for kind in defined - built - guides - ABSTRACT - GUIDES_OF_FUNCTIONS}
    assert not missing, f"give {sorted(missing)} a case in tests/cases.py"
    unknown = set(getattr(probmed.models, "__all__", ())) - {kind.__name__ for kind in built | guides}
    assert not unknown, f"the zoo's index lists {sorted(unknown)}, which have no case"


@every_case
def test_prior_draw_has_the_stated_sites_and_a_finite_density(case: Case) -> None:
    trace = trace_of(case.build(), case)
    assert set(latents(trace)) == case.sites
    assert torch.isfinite(torch.as_tensor(trace.log_prob_sum()))
    for value in tensors(trace.nodes["_RETURN"]["value"]):
        # Data are unknown where the model's images are.
        assert torch.isfinite(value).any() if case.observed else torch.isfinite(value).all()
        assert value.dtype == torch.float64
    for name, value in latents(trace).items():
        assert value.dtype == torch.float64, name
    if case.observed:
        assert not trace.nodes[case.observed]["is_observed"]


@every_case
def test_two_draws_differ_and_the_same_latents_give_the_same_result(case: Case) -> None:
    component = case.build()
    first, second = (trace_of(component, case) for _ in range(2))
    for name in case.sites:
        assert not torch.equal(first.nodes[name]["value"], second.nodes[name]["value"]), name
    assert_given_latents_repeat(first, component, case)


@every_case
def test_components_follow_the_default_dtype(case: Case) -> None:
    torch.set_default_dtype(torch.float32)
    trace = trace_of(case.build(), case)
    for value in [*latents(trace).values(), *tensors(trace.nodes["_RETURN"]["value"])]:
        assert value.dtype == torch.float32


@every_case
def test_state_survives_saving_and_loading(case: Case) -> None:
    component, other = case.build(), case.build()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.add_(1)
    file = io.BytesIO()
    torch.save(component.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_given_latents_repeat(trace_of(component, case), other, case)


@every_case
def test_two_in_one_program_do_not_clash(case: Case) -> None:
    first, second = case.build(), case.build()

    def program() -> list[Any]:
        results = []
        for name, component in (("left", first), ("right", second)):
            with scope(prefix=name):
                results.append(component(*case.arguments(0)))
        return results

    trace = poutine.trace(program).get_trace()
    assert set(latents(trace)) == {f"{side}/{site}" for side in ("left", "right") for site in case.sites}
    assert torch.isfinite(torch.as_tensor(trace.log_prob_sum()))


@every_case
def test_every_parameter_and_latent_has_a_gradient(case: Case) -> None:
    component = case.build()
    trace = trace_of(component, case)
    leaves = {name: value.detach().requires_grad_() for name, value in latents(trace).items()}
    replayed = trace_of(poutine.condition(component, data=leaves | observed(trace, case)), case)
    total = torch.as_tensor(replayed.log_prob_sum())
    if not case.observed:
        # Through the result, not the prior alone.
        total = sum((value.square().nansum() for value in tensors(replayed.nodes["_RETURN"]["value"])), total)
    wanted = leaves | dict(component.named_parameters())
    if not wanted:
        return
    gradients = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    for name, gradient in zip(wanted, gradients, strict=True):
        assert gradient is not None, f"{name} has no gradient"
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().sum() > 0, name


PLATED = {name: case for name, case in CASES.items() if case.plates}


@pytest.mark.parametrize("case", PLATED.values(), ids=PLATED.keys())
@pytest.mark.parametrize("size", [1, 3])
def test_members_of_a_plate_are_independent_instances(case: Case, size: int) -> None:
    component = case.build()

    def program() -> Any:
        with pyro.plate("subject", size):
            return component(*case.arguments(size))

    trace = poutine.trace(program).get_trace()
    values = latents(trace)
    trace.compute_log_prob()
    results = tensors(trace.nodes["_RETURN"]["value"])
    whole = torch.zeros(()) + sum(trace.nodes[name]["log_prob_sum"] for name in case.sites)
    parts = torch.zeros(())
    for index in range(size):
        state = {name: value[index] for name, value in values.items()}
        arguments = [x[index] if isinstance(x, Tensor) else x for x in case.arguments(size)]
        single = poutine.trace(poutine.condition(component, data=state)).get_trace(*arguments)
        single.compute_log_prob()
        parts = parts + sum(single.nodes[name]["log_prob_sum"] for name in case.sites)
        for a, b in zip(results, tensors(single.nodes["_RETURN"]["value"]), strict=True):
            torch.testing.assert_close(a[index], b)
    torch.testing.assert_close(whole, parts)


# Models.


def given(case: Case, model: Any, data: Tensor | None) -> tuple[Any, ...]:
    """The arguments of a model that observes ``data``."""
    assert case.observed is not None
    call = inspect.signature(model.forward).bind_partial(*case.arguments(0))
    call.arguments[case.observed] = data
    return call.args


def drawn_data(case: Case) -> tuple[Any, dict[str, Tensor], Tensor]:
    """A model, and latents and data from its prior."""
    model = case.build()
    trace = trace_of(model, case)
    return model, latents(trace), trace.nodes[case.observed]["value"]


@every_model
def test_log_joint_is_finite_given_data_with_missing_voxels(case: Case) -> None:
    model, state, data = drawn_data(case)
    data = data.masked_fill(torch.rand(data.shape) < 0.2, torch.nan)
    leaves = {name: value.detach().requires_grad_() for name, value in state.items()}
    total = log_joint(model, leaves, *given(case, model, data))
    assert torch.isfinite(total)
    for name, gradient in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
        assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("Registration")])
def test_log_joint_has_a_gradient_where_the_moving_image_is_incomplete(name: str) -> None:
    case = MODELS[name]
    model, state, data = drawn_data(case)
    moving, *grids = case.arguments(0)
    moving = moving.masked_fill(torch.rand(moving.shape) < 0.05, torch.nan)
    leaves = {name: value.detach().requires_grad_() for name, value in state.items()}
    total = log_joint(model, leaves, moving, *grids, data)
    assert torch.isfinite(total)
    for site, gradient in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
        assert torch.isfinite(gradient).all(), site


@every_model
def test_guides_have_the_model_s_latent_sites(case: Case) -> None:
    model, _, data = drawn_data(case)
    guide = AutoNormal(model) if case.guide is None else case.guide(model)
    arguments = given(case, model, data)
    sites = latents(poutine.trace(guide).get_trace(*arguments))
    assert {name for name in sites if not name.endswith("_unconstrained")} == case.sites
    loss = Trace_ELBO().differentiable_loss(model, guide, *arguments)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in guide.parameters())


@every_model
def test_predictive_draws_data_from_samples_of_the_latents(case: Case) -> None:
    model, state, data = drawn_data(case)
    samples = {name: torch.stack([value, value]) for name, value in state.items()}
    draws = Predictive(model, posterior_samples=samples)(*given(case, model, None))[case.observed]
    assert torch.equal(draws.reshape(2, *data.shape).isnan(), torch.stack([data, data]).isnan())
    assert not torch.equal(draws[0], draws[1])


def drawn(case: Case) -> tuple[Any, dict[str, Tensor], Tensor, Grid]:
    """A segmentation, latents and an image from its prior, and their grid."""
    model, state, image = drawn_data(case)
    return model, state, image, case.arguments(0)[1]


SEGMENTATIONS = {n: c for n, c in MODELS.items() if n.startswith("Segmentation")}
every_segmentation = pytest.mark.parametrize("case", SEGMENTATIONS.values(), ids=SEGMENTATIONS.keys())


@every_segmentation
def test_image_is_scored_on_the_grid_s_voxels_and_on_a_part_of_them(case: Case) -> None:
    model, state, image, grid = drawn(case)
    assert isinstance(model, Segmentation)
    mask = torch.rand(grid.shape) < 0.5
    part = MaskedGrid(grid, mask)
    torch.manual_seed(1)
    on_part = model.mixture(state, part)
    assert on_part.event_shape == (image.shape[0], int(mask.sum()))
    on_grid = model.mixture(state, grid)
    torch.testing.assert_close(on_part.log_prob(image[:, mask]), on_grid.voxel_log_prob(image)[mask].sum())


@every_segmentation
def test_start_is_a_full_state_and_closed_steps_do_not_lower_the_log_joint(case: Case) -> None:
    model, _, image, grid = drawn(case)
    state = model.start(image, grid)
    assert set(state) == case.sites
    assert set(model.closed_form_sites) & case.sites == case.sites - ANATOMY
    before = log_joint(model, state, image, grid)
    for _ in range(3):
        state = model.em_step(state, image, grid, inner=2)
        after = log_joint(model, state, image, grid)
        # A mean field is converged to its own tolerance only.
        assert after >= before - (1e-3 if model.labels.coupling else 1e-9)
        before = after


@every_segmentation
def test_program_of_the_remaining_sites_has_the_log_joint_up_to_a_constant(case: Case) -> None:
    model, state, image, grid = drawn(case)
    free = sorted(case.sites & ANATOMY)
    other = latents(trace_of(model, case))
    moved = state | {name: 0.5 * other[name] for name in free}
    program = model.remaining(state, image, grid)
    totals = []
    for values in (state, moved):
        short = log_joint(
            program, {name: values[name] for name in (values if model.labels.coupling else free)}
        )
        totals.append((log_joint(model, values, image, grid), short))
    torch.testing.assert_close(totals[1][0] - totals[0][0], torch.as_tensor(totals[1][1] - totals[0][1]))


@every_segmentation
def test_scores_sum_to_the_gradient_of_the_image_s_log_density(case: Case) -> None:
    model, state, image, grid = drawn(case)
    if model.labels.coupling is not None:
        return  # the scores are those of independent labels
    if "shape_code" in case.sites:
        with pytest.raises(ValueError, match="no Laplace posterior"):
            model.scores(state, image, grid)
        return
    state = state | {"weights": state["weights"].clamp_min(0.05)}
    state = state | {name: 0.3 * state[name] for name in case.sites & {"affine", "velocity"}}
    scores = model.scores(state, image, grid)
    assert scores.dense.shape == (grid.numel, len(scores.precision))
    departure = torch.zeros(1, scores.dense.shape[1], requires_grad=True)
    moved = {name: value[0] for name, value in model.moved(state, departure, None).items()}
    (gradient,) = torch.autograd.grad(model.mixture(state | moved, grid).log_prob(image), departure)
    found, expected = scores.dense.sum(0), gradient[0]
    if {"affine", "velocity"} <= case.sites:
        # The flow is composed of two halves here, which differs from the whole by its discretisation.
        count = state["affine"].numel()
        assert (found - expected)[-count:].norm() < 0.1 * expected[-count:].norm()
        found, expected = found[:-count], expected[:-count]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    if "velocity" in case.sites:
        assert scores.nodes is not None
        assert scores.slopes is not None
        leaf = state["velocity"].clone().requires_grad_()
        (by_node,) = torch.autograd.grad(
            model.mixture(state | {"velocity": leaf}, grid).log_prob(image), leaf
        )
        found = torch.zeros(by_node[0].numel(), by_node.shape[0]).index_add(0, scores.nodes, scores.slopes).T
        # One node for each voxel is an approximation, but of the same forces.
        total, expected = found.sum(1), by_node.flatten(1).sum(1)
        assert torch.nn.functional.cosine_similarity(total, expected, dim=0) > 0.8


def test_segmentation_refuses_what_it_cannot_use() -> None:
    model = next(iter(SEGMENTATIONS.values())).build()
    with pytest.raises(ValueError, match="needs the grid"):
        model()
    with pytest.raises(ValueError, match="tempering"):
        Segmentation(model.labels, model.appearance, tempering=0.0)


def test_tempering_scales_the_image_s_density_alone() -> None:
    model, state, image, grid = drawn(MODELS["Segmentation_fixed_one_gaussian_bias"])
    half = log_joint(model, state, image, grid)
    density = model.mixture(state, grid).log_prob(image)
    model.tempering = 1.0
    torch.testing.assert_close(log_joint(model, state, image, grid) - half, 0.5 * density)


def test_cases_stand_on_an_oblique_anisotropic_grid() -> None:
    affine, spacing = oblique_grid().affine[:3, :3], oblique_grid().spacing
    assert len(set(spacing)) == 3
    assert (affine.abs() > 0.1).all()
    assert torch.det(affine) < 0
    assert len(COMPONENTS) > 10
