"""Posteriors: moments, intervals, derived quantities, files, ArviZ; draws of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmed.inference import Posterior, automatic, fit, predictive_draws, prior_draws
from probmed.inference.diagnostics import load_arviz
from probmed.volumes import UnusableInput

pytestmark = pytest.mark.usefixtures("empty_store")


class Line(PyroModule):
    """A straight line through points, with what a model of labels would offer."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("datum", len(x)):
            value: Tensor = pyro.sample("y", dist.Normal(level + x @ slope, self.noise), obs=y)
        return value

    def height(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        return state["level"] + x @ state["slope"]

    def label_posterior(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.sigmoid(torch.stack([self.height(state, x), -self.height(state, x)]))


X = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])


def posterior(count: int = 200) -> Posterior:
    samples = {"level": torch.randn(count), "slope": torch.randn(count, 2) + 3}
    mode = {"level": torch.tensor(0.1), "slope": torch.tensor([3.0, 3.1])}
    return Posterior(samples, mode, Line(), (X,), -12.5, {"method": "draws", "seed": 3})


def test_moments_quantiles_and_intervals_are_those_of_the_draws() -> None:
    p = posterior()
    slope = p.samples["slope"]
    torch.testing.assert_close(p.mean("slope"), slope.mean(0))
    torch.testing.assert_close(p.sd("slope"), slope.std(0))
    torch.testing.assert_close(p.quantiles("slope", [0.1, 0.5]), torch.quantile(slope, torch.tensor([0.1, 0.5]), dim=0))
    assert p.quantiles("level", 0.5).shape == ()
    low, high = p.interval("slope", 0.9)
    inside = ((slope >= low) & (slope <= high)).float().mean(0)
    torch.testing.assert_close(inside, torch.full((2,), 0.9), atol=0.011, rtol=0)


def test_quantiles_of_more_elements_than_torch_takes_at_once() -> None:
    samples = torch.arange(17.0)[:, None].expand(17, 1_100_000)
    median = Posterior({"field": samples.reshape(17, 1100, 1000)}).quantiles("field", [0.5])
    assert median.shape == (1, 1100, 1000)
    assert bool((median == 8).all())


@pytest.mark.parametrize("mass", [0.0, 1.0, -0.5, 90])
def test_an_interval_of_an_impossible_mass_is_refused(mass: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        posterior().interval("level", mass)


def test_sites_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\['level', 'slope'\], got 'slop'"):
        posterior().mean("slop")
    with pytest.raises(ValueError, match="as many draws"):
        Posterior({"a": torch.zeros(3), "b": torch.zeros(4)})
    with pytest.raises(ValueError, match="at least one site"):
        Posterior({})


def test_draws_are_rows_of_the_joint() -> None:
    p = posterior()
    few, again, other = p.draws(5, seed=1), p.draws(5, seed=1), p.draws(5, seed=2)
    assert torch.equal(few["slope"], again["slope"])
    assert not torch.equal(few["slope"], other["slope"])
    rows = [int((p.samples["level"] == value).nonzero()) for value in few["level"]]
    assert len(set(rows)) == 5
    assert torch.equal(few["slope"], p.samples["slope"][rows])
    assert len(p.draws(300)["level"]) == 300


def test_derived_quantities_of_each_draw() -> None:
    p = posterior(7)
    heights = p.evaluate("height")
    assert heights.shape == (7, 3)
    torch.testing.assert_close(heights[4], p.samples["level"][4] + X @ p.samples["slope"][4])
    torch.testing.assert_close(p.evaluate(lambda state: state["slope"].sum()), p.samples["slope"].sum(1))
    with pytest.raises(ValueError, match="no 'depth'"):
        p.evaluate("depth")


def test_labels_come_from_the_model_at_the_mode() -> None:
    p = posterior()
    assert p.mode is not None
    torch.testing.assert_close(p.labels, Line().label_posterior(p.mode, X))
    bare = Posterior({"level": torch.zeros(3)})
    with pytest.raises(ValueError, match="label_posterior"):
        _ = bare.labels
    with pytest.raises(ValueError, match="volumes"):
        p.volumes()


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    p, path = posterior(), tmp_path / "posterior.safetensors"
    # Tensors that share memory, and one that is not contiguous, are saved like any other.
    p.mode = {"level": p.samples["level"][0], "slope": p.samples["slope"][0]}
    p.samples["slope"] = p.samples["slope"].T.contiguous().T
    p.save(path)
    q = Posterior.load(path, p.model, p.data)
    assert q.samples.keys() == p.samples.keys()
    assert all(torch.equal(q.samples[name], p.samples[name]) for name in p.samples)
    assert q.mode is not None
    assert all(torch.equal(q.mode[name], p.mode[name]) for name in p.mode)
    assert (q.log_evidence, q.attributes) == (p.log_evidence, p.attributes)
    torch.testing.assert_close(q.evaluate("height"), p.evaluate("height"))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_posterior_without_mode_or_evidence_is_loaded_without(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    Posterior({"a": torch.arange(4)}).save(path)
    q = Posterior.load(path)
    assert (q.mode, q.log_evidence, q.attributes, q.samples["a"].dtype) == (None, None, {}, torch.int64)


def test_files_that_are_no_posterior_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    posterior().save(whole)
    cases = {"missing": None, "text": b"hello", "cut": whole.read_bytes()[:-50]}
    for name, content in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UnusableInput) as error:
            Posterior.load(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UnusableInput, match="folder"):
        posterior().save(tmp_path / "nowhere" / "p.safetensors")


def test_to_xarray_and_arviz() -> None:
    p = posterior()
    data = p.to_xarray()
    assert data["slope"].dims == ("chain", "draw", "slope_dim_0")
    assert data.sizes["chain"] == 1
    assert data.attrs["method"] == "draws"
    container: Any = p.to_arviz()
    assert container.posterior["slope"].shape == (1, 200, 2)
    assert float(load_arviz().summary(container)["mean"]["level"]) == pytest.approx(float(p.mean("level")), abs=1e-3)


@pytest.mark.parametrize("name", ["diagonal", "full", "delta"])
def test_draws_from_a_guide(name: str) -> None:
    model, y = Line(), torch.tensor([0.5, 1.0, 1.5])
    guide = automatic(name, model)
    fit(model, guide, X, y, steps=30, seed=0)
    before = torch.get_rng_state()
    p, q = (Posterior.from_guide(model, guide, X, y, draws=9, seed=4) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert {site: tuple(value.shape) for site, value in p.samples.items()} == {"level": (9,), "slope": (9, 2)}
    assert all(torch.equal(p.samples[site], q.samples[site]) for site in p.samples)
    assert p.mode is not None
    assert p.mode["slope"].shape == (2,)
    assert not any(value.requires_grad for value in (*p.samples.values(), *p.mode.values()))
    assert len(p.data) == 2
    with pytest.raises(ValueError, match="at least one draw"):
        Posterior.from_guide(model, guide, X, y, draws=0)


def test_draws_from_the_prior() -> None:
    model = Line()
    draws = prior_draws(model, 2000, X, seed=1)
    assert {site: tuple(value.shape) for site, value in draws.items()} == {"level": (2000,), "slope": (2000, 2), "y": (2000, 3)}
    variance = 1 + (X**2).sum(1) + 0.25
    torch.testing.assert_close(draws["y"].var(0), variance, atol=0, rtol=0.15)
    assert torch.equal(draws["y"], prior_draws(model, 2000, X, seed=1)["y"])


def test_draws_of_data_from_the_posterior() -> None:
    p = posterior(2000)
    draws = predictive_draws(p.model, p, X, seed=1)
    assert set(draws) == {"y"}
    residual = draws["y"] - p.evaluate("height")
    torch.testing.assert_close(residual.std(0).detach(), torch.full((3,), 0.5), atol=0.05, rtol=0)
    assert float(residual.mean().abs()) < 0.03
