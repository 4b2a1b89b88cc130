"""Block ascent against closed forms, and against a gradient method on the same model from the same start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import NAMES, oblique_grid, tiny_atlas, velocity_grid
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, init_to_value
from torch import Tensor

from probmed.appearances import BiasField, GaussianMixture
from probmed.atlases import LabelAtlas
from probmed.fields import GaussianField
from probmed.grids import Grid
from probmed.inference.em import Mode, Round, ascend, em, log_joint
from probmed.models.segmentation import Segmentation
from probmed.priors import DeformableAtlas, FixedAtlas, LabelPrior, MarkovField, SmoothVelocity

pytestmark = pytest.mark.usefixtures("float64", "local_parameters")

GRID = oblique_grid(3, 10)


def sharp_atlas() -> LabelAtlas:
    return tiny_atlas(size=11, spacing_mm=3.6, sharpness=2.0)


def fixed() -> LabelPrior:
    return FixedAtlas(sharp_atlas())


def deformable() -> LabelPrior:
    return DeformableAtlas(sharp_atlas(), None, SmoothVelocity(velocity_grid(), sd_mm=2.0))


def affine() -> LabelPrior:
    return DeformableAtlas(sharp_atlas())


def affine_and_deformable() -> LabelPrior:
    return DeformableAtlas(sharp_atlas(), "default", SmoothVelocity(velocity_grid(), sd_mm=2.0))


def simulated(
    labels: Callable[[], LabelPrior], biased: bool, channels: int = 1, noise: float = 0.08
) -> tuple[Segmentation, dict[str, Tensor], Tensor]:
    """A model, true latents and the image they give."""
    bias = BiasField(cutoff_mm=60.0, sd=0.15, channels=channels) if biased else None
    appearance = GaussianMixture([1] * len(NAMES), channels)
    model = Segmentation(labels(), appearance, bias, tempering=0.5)
    trace: Any = pyro.poutine.trace(model).get_trace(None, GRID)
    truth = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes if name != "image"}
    truth["affine"] = 0.1 * truth["affine"] if "affine" in truth else torch.zeros(0)
    if not truth["affine"].numel():
        del truth["affine"]
    truth["weights"] = torch.ones(3)
    truth["means"] = torch.tensor([[0.7], [1.1], [0.1]]) * torch.tensor([1.0, -0.6])[:channels]
    truth["covariances"] = noise**2 * torch.eye(channels).repeat(3, 1, 1)
    return model, truth, model.mixture(truth, GRID).sample()


def maximised(
    model: Segmentation, start: dict[str, Tensor], image: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """The mode by SVI with a point guide: Pyro's ELBO of `AutoDelta`, which is the log joint, by L-BFGS."""
    guide = AutoDelta(
        model, init_loc_fn=init_to_value(values={name: value.clone() for name, value in start.items()})
    )
    guide(image, GRID)
    elbo = Trace_ELBO()
    optimiser = torch.optim.LBFGS(
        guide.parameters(),
        max_iter=250,
        history_size=50,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss: Tensor = elbo.differentiable_loss(model, guide, image, GRID)
        loss.backward()
        return loss

    optimiser.step(closure)
    state = {name: value.detach() for name, value in guide.median(image, GRID).items()}
    return -float(elbo.loss(model, guide, image, GRID)), state


@pytest.mark.parametrize(
    ("labels", "biased"),
    [(fixed, False), (fixed, True), (deformable, False), (affine, True)],
)
def test_em_and_svi_reach_the_same_optimum_and_parameters(
    labels: Callable[[], LabelPrior], biased: bool
) -> None:
    model, truth, image = simulated(labels, biased)
    # Labels that trade their intensities make another mode: start where they cannot.
    start = model.start(image, GRID) | {"means": truth["means"] + 0.05}
    mode = em(model, image, GRID, state=start, rounds=150, steps=12, tolerance=1e-8)
    value, state = maximised(model, start, image)
    assert mode.log_joint > float(log_joint(model, start, image, GRID)) + 10
    assert mode.log_joint >= float(log_joint(model, truth, image, GRID))
    # Interpolation between the atlas's voxels has kinks, at which either may rest.
    moving = labels is not fixed
    assert mode.log_joint == pytest.approx(value, abs=0.1 if moving else 1e-3)
    bounds = {"means": 1e-3, "covariances": 1e-4, "weights": 0.01, "bias": 2e-3}
    for name, bound in bounds.items():
        if name in state:
            assert (mode.state[name] - state[name]).abs().max() < bound, name
    # Where the atlas has no edges, or turns into itself, its movement is free: compare what it comes to.
    atlases = [model.log_atlas(s, GRID).exp() for s in (mode.state, state, start)]
    apart, travelled = ((atlases[0] - other).abs().mean() for other in atlases[1:])
    assert apart < 0.2 * travelled + 1e-9
    assert not moving or travelled > 0.01
    labelled = [model.mixture(s, GRID).posterior(image) for s in (mode.state, state)]
    assert (labelled[0] - labelled[1]).abs().mean() < 1e-3
    assert (mode.state["means"] - truth["means"]).abs().max() < (0.1 if biased else 0.06)


@pytest.mark.parametrize("labels", [fixed, affine_and_deformable])
def test_no_round_lowers_the_log_joint(labels: Callable[[], LabelPrior]) -> None:
    model, _, image = simulated(labels, True, channels=2)
    image = image.masked_fill(torch.rand(image.shape) < 0.1, torch.nan)
    seen: list[Round] = []
    mode = em(model, image, GRID, rounds=8, tolerance=0.0, callback=seen.append)
    assert seen == mode.rounds
    assert [r.number for r in mode.rounds] == list(range(1, len(mode.rounds) + 1))
    assert all(r.gain >= -1e-7 for r in mode.rounds)
    assert mode.log_joint == pytest.approx(float(log_joint(model, mode.state, image, GRID)))
    first = mode.rounds[0]
    start = float(log_joint(model, model.start(image, GRID), image, GRID))
    assert first.log_joint - first.gain == pytest.approx(start)


def test_velocity_is_found_that_the_atlas_alone_does_not_explain() -> None:
    model, truth, image = simulated(deformable, False, noise=0.05)
    mode = em(model, image, GRID, rounds=40)
    still = torch.zeros_like(truth["velocity"])
    inside = (slice(None), slice(1, -1), slice(1, -1), slice(None))
    error = (mode.state["velocity"] - truth["velocity"])[inside].norm()
    assert error < 0.75 * (still - truth["velocity"])[inside].norm()


def test_convergence_is_a_gain_for_each_observed_number() -> None:
    model, _, image = simulated(fixed, True)
    loose = em(model, image, GRID, tolerance=1e-2)
    tight = em(model, image, GRID, tolerance=1e-6, rounds=100)
    assert loose.converged
    assert tight.converged
    assert loose.rounds[-1].gain < 1e-2 * image.numel()
    assert tight.rounds[-1].gain < 1e-6 * image.numel()
    assert len(loose.rounds) < len(tight.rounds)
    short = em(model, image, GRID, rounds=1, tolerance=0.0)
    assert not short.converged
    again = em(model, image, GRID, state=tight.state, tolerance=1e-6)
    assert len(again.rounds) == 1


def test_markov_labels_converge_to_a_higher_bound() -> None:
    plain, _, image = simulated(fixed, True)
    model = Segmentation(MarkovField(plain.labels, 0.3), plain.appearance, plain.bias, 0.5)
    mode = em(model, image, GRID, rounds=15)
    start = model.start(image, GRID)
    assert mode.log_joint > float(log_joint(model, start, image, GRID)) + 10
    # The mean field is not at its maximum after its few sweeps, hence the room.
    assert all(r.gain > -1e-3 * image.numel() for r in mode.rounds)


class Broken(Segmentation):
    """Closed steps that go wrong."""

    def em_step(
        self, state: dict[str, Tensor], image: Tensor, grid: Any, inner: int = 5
    ) -> dict[str, Tensor]:
        return state | {"means": state["means"] * torch.nan}


def test_a_log_joint_that_is_not_finite_names_the_site() -> None:
    model, _, image = simulated(fixed, False)
    broken = Broken(model.labels, model.appearance)
    with pytest.raises((FloatingPointError, ValueError), match="means"):
        em(broken, image, GRID)


# Gradient steps.


def smoothing(y: Tensor, sd: float) -> Callable[[], None]:
    """y = v + noise with a smooth prior on v, and a mean m with a prior of its own."""

    def model() -> None:
        v = pyro.sample("v", GaussianField(y.shape[1:], (1.0, 2.0), 2.0, 0.4, channels=y.shape[0]))
        m = pyro.sample("m", dist.Normal(torch.zeros(1), 5.0).to_event(1))
        pyro.sample("y", dist.Normal(v + m, sd).to_event(y.ndim), obs=y)

    return model


@pytest.mark.parametrize("sd", [0.1, 1.0])
def test_ascent_reaches_the_mode_of_a_linear_gaussian_model(sd: float) -> None:
    y = torch.randn(2, 6, 5) + 3
    model = smoothing(y, sd)
    state = {"v": torch.randn(2, 6, 5), "m": torch.zeros(1)}
    found = ascend(model, state, ["v", "m"], steps=200)
    # The dense normal equations of both together.
    field = GaussianField((6, 5), (1.0, 2.0), 2.0, 0.4, channels=2)
    n = y.numel()
    prior = torch.stack([field.precision_matvec(e.reshape(2, 6, 5)).flatten() for e in torch.eye(n)])
    design = torch.cat([torch.eye(n), torch.ones(n, 1)], 1)
    precision = design.T @ design / sd**2
    precision[:n, :n] += prior
    precision[n, n] += 1 / 25
    exact = torch.linalg.solve(precision, design.T @ y.flatten() / sd**2)
    torch.testing.assert_close(found["v"].flatten(), exact[:n], rtol=0, atol=1e-4)
    torch.testing.assert_close(found["m"], exact[n:], rtol=0, atol=1e-4)


def test_ascent_moves_its_sites_alone_and_never_down() -> None:
    y = torch.randn(1, 5, 4) + 3
    model = smoothing(y, 0.5)
    state = {"v": torch.randn(1, 5, 4), "m": torch.full((1,), 2.0)}
    curvatures: dict[str, float] = {}
    found = ascend(model, state, ["v"], steps=3, curvatures=curvatures)
    assert set(curvatures) == {"v"}
    assert curvatures["v"] == pytest.approx(1 / 0.25 + _prior_curvature(state["v"], model, state), rel=1.0)
    torch.testing.assert_close(found["m"], state["m"])
    assert float(log_joint(model, found)) > float(log_joint(model, state))
    again = ascend(model, found, ["v"], steps=50, curvatures=curvatures)
    best = ascend(model, again, ["v"], steps=50, curvatures=curvatures)
    assert float(log_joint(model, best)) >= float(log_joint(model, again)) - 1e-12
    assert ascend(model, state, [], steps=3) is state


def _prior_curvature(value: Tensor, model: Callable[[], None], state: dict[str, Tensor]) -> float:
    """The mean of the prior's precision over its eigenvectors."""
    return float(GaussianField(value.shape[1:], (1.0, 2.0), 2.0, 0.4).eigenvalues.mean())


def test_log_joint_is_that_of_the_trace_and_differentiable() -> None:
    y = torch.randn(1, 3, 3)
    state = {"v": torch.randn(1, 3, 3), "m": torch.ones(1)}
    expected = (
        GaussianField((3, 3), (1.0, 2.0), 2.0, 0.4).log_prob(state["v"])
        + dist.Normal(0.0, 5.0).log_prob(state["m"]).sum()
        + dist.Normal(state["v"] + 1, 0.5).log_prob(y).sum()
    )
    torch.testing.assert_close(log_joint(smoothing(y, 0.5), state), expected)
    leaf = state["v"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_joint(smoothing(y, 0.5), state | {"v": leaf}), leaf)
    prior = GaussianField((3, 3), (1.0, 2.0), 2.0, 0.4).precision_matvec(state["v"])
    torch.testing.assert_close(gradient, (y - state["v"] - 1) / 0.25 - prior)


def test_a_mode_reports_its_last_round() -> None:
    mode = Mode({}, [Round(1, -5.0, 2.0), Round(2, -4.0, 1.0)])
    assert mode.log_joint == -4.0
    assert isinstance(GRID, Grid)
