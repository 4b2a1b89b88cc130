"""Stochastic variational inference against closed forms; what happens when it breaks, stops, or is run twice."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

from probmed.inference import MAP, Fit, NotFinite, Posterior, Step, automatic, fit
from probmed.inference.diagnostics import (
    gain_per_window,
    has_converged,
    importance,
    non_finite_sites,
    rank_deviation,
    simulated_ranks,
    uniformity,
)
from probmed.inference.mcmc import nuts
from probmed.inference.parameters import modules_within
from probmed.volumes import UnusableInput

pytestmark = pytest.mark.usefixtures("float64", "empty_store")

PRIOR_SD, NOISE_SD = 2.0, 0.5
DATA = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.5], dtype=torch.float64)


def normal_mean(y: Tensor | None = None) -> Tensor:
    mean = pyro.sample("mean", dist.Normal(0.0, PRIOR_SD))
    with pyro.plate("datum", len(DATA)):
        value: Tensor = pyro.sample("y", dist.Normal(mean, NOISE_SD), obs=y)
    return value


def exact(y: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the posterior of ``normal_mean``."""
    variance = 1 / (PRIOR_SD**-2 + len(y) * NOISE_SD**-2)
    return variance * float(y.sum()) * NOISE_SD**-2, math.sqrt(variance)


def exact_evidence(y: Tensor) -> float:
    covariance = NOISE_SD**2 * torch.eye(len(y)) + PRIOR_SD**2
    return float(dist.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y))


class Noisy(PyroModule):
    """A model with a parameter of its own: the noise of a normal sample whose mean is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.log_noise = nn.Parameter(torch.zeros(()))

    def forward(self, y: Tensor | None = None) -> Tensor:
        mean = pyro.sample("mean", dist.Normal(0.0, 100.0))
        with pyro.plate("datum", 400):
            value: Tensor = pyro.sample("y", dist.Normal(mean, self.log_noise.exp()), obs=y)
        return value


def fitted(y: Tensor = DATA, **options: Any) -> tuple[Any, Fit]:
    guide = automatic("diagonal", normal_mean)
    return guide, fit(normal_mean, guide, y, **({"steps": 1000, "learning_rate": 0.05, "tolerance_nats": None, "seed": 1} | options))


def moments(guide: Any, y: Tensor = DATA) -> tuple[float, float]:
    q = guide.get_posterior()
    return float(q.mean.detach()), float(q.stddev.detach())


def test_the_posterior_of_a_normal_mean_is_exact() -> None:
    guide, result = fitted(particles=2, steps=800, learning_rate=0.03)
    assert moments(guide) == pytest.approx(exact(DATA), rel=0.02)
    assert result.steps == len(result.losses) == 800
    # Where q is the posterior, every estimate of the ELBO is the evidence.
    assert result.elbo == pytest.approx(exact_evidence(DATA), abs=0.01)


def test_map_of_a_normal_mean_is_exact() -> None:
    guide = MAP(normal_mean)
    fit(normal_mean, guide, DATA, steps=300, learning_rate=0.1, tolerance_nats=None)
    assert float(guide.median()["mean"]) == pytest.approx(exact(DATA)[0], abs=1e-5)


def test_map_starts_at_the_prior_mean_or_where_it_is_told() -> None:
    starts = [MAP(normal_mean), MAP(normal_mean, init={"mean": torch.tensor(7.0)})]
    assert [float(guide(DATA)["mean"].detach()) for guide in starts] == [0.0, 7.0]


@pytest.mark.parametrize("init", [{"mean": torch.zeros(3)}, {"maen": torch.zeros(())}])
def test_starting_values_that_fit_no_site_are_refused(init: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="expected .*mean"):
        fit(normal_mean, MAP(normal_mean, init=init), DATA, steps=1)


def test_a_model_learns_its_own_parameters() -> None:
    model, y = Noisy(), 3 + 0.2 * torch.randn(400)
    fit(model, automatic("diagonal", model), y, steps=400, learning_rate=0.1, tolerance_nats=None)
    assert float(model.log_noise.detach().exp()) == pytest.approx(float(y.std()), rel=0.02)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: poutine.scale(m, 1.0), lambda m: partial(m), lambda m: m.forward])
def test_modules_built_anywhere_can_be_fitted(wrap: Any) -> None:
    # Built while module-local parameters are off, as a user's are.
    model = wrap(Noisy())
    assert any(isinstance(module, Noisy) for module in modules_within(model))
    assert fit(model, automatic("diagonal", model), 3 + torch.randn(400), steps=3).steps == 3


def test_fits_do_not_leak_into_each_other() -> None:
    other = DATA - 10
    first, _ = fitted(steps=50)
    before = moments(first)
    second, _ = fitted(other, steps=200, learning_rate=0.2)
    assert moments(second)[0] == pytest.approx(exact(other)[0], rel=0.01)
    assert moments(first) == before
    assert not list(pyro.get_param_store().keys())


def test_the_same_seed_gives_the_same_bits_and_leaves_torchs_generator_alone() -> None:
    before = torch.get_rng_state()
    runs = [fitted(steps=20, seed=seed)[1].losses for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(before, torch.get_rng_state())


class Killed(Exception):
    pass


def kill_at(number: int, step: Step) -> None:
    if step.number == number:
        raise Killed


@pytest.mark.parametrize("seed", [5, None])
def test_a_killed_fit_resumes_to_the_same_bits(tmp_path: Path, seed: int | None) -> None:
    options: dict[str, Any] = {"steps": 70, "checkpoint_every": 10, "seed": seed}
    torch.manual_seed(11)
    whole_guide, whole = fitted(**options)
    torch.manual_seed(11)
    path = tmp_path / "fit.safetensors"
    with pytest.raises(Killed):
        fitted(**options, checkpoint=path, callbacks=[partial(kill_at, 37)])
    torch.manual_seed(99)
    guide, result = fitted(**options, checkpoint=path)
    assert result.losses == whole.losses
    for name, parameter in whole_guide.named_parameters():
        assert torch.equal(parameter, dict(guide.named_parameters())[name])
    # A finished one is read, not repeated.
    assert fitted(**options, checkpoint=path, callbacks=[partial(kill_at, 70)])[1].losses == whole.losses
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_checkpoint_of_another_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.safetensors"
    fitted(steps=5, checkpoint=path)
    with pytest.raises(UnusableInput, match="another data"):
        fitted(DATA + 1, steps=5, checkpoint=path)
    with pytest.raises(UnusableInput, match="another steps: expected 6, got 5"):
        fitted(steps=6, checkpoint=path)
    with pytest.raises(UnusableInput, match="another model or guide"):
        guide = automatic("low-rank", normal_mean)
        fit(normal_mean, guide, DATA, steps=5, learning_rate=0.05, tolerance_nats=None, seed=1, checkpoint=path)
    assert fitted(DATA + 1, steps=5, checkpoint=path, resume=False)[1].steps == 5
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UnusableInput, match="not a readable checkpoint"):
        fitted(steps=5, checkpoint=path)


def broken_at(what: str, y: Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    if what == "latent":
        a = pyro.sample("b", dist.Normal(a / 0 * 0, 1.0))
    scale = (a * 0 - 1).log() if what == "parameter" else torch.ones(())
    pyro.sample("y", dist.Normal(a, scale) if what != "support" else dist.Delta(a + 2), obs=y)


@pytest.mark.parametrize(("what", "site"), [("latent", "b"), ("parameter", "y"), ("support", "y")])
def test_the_site_that_is_not_finite_is_named(what: str, site: str) -> None:
    model = partial(broken_at, what)
    with pytest.raises(NotFinite, match=rf"{site} \(model\)") as error:
        fit(model, MAP(model), torch.tensor(1.0), steps=3)
    assert error.value.faults[0].startswith(f"{site} (model)")


def test_a_parameter_that_runs_away_is_named_with_its_step() -> None:
    guide = automatic("diagonal", normal_mean)

    def poison(step: Step) -> None:
        if step.number == 4:
            with torch.no_grad():
                guide.loc.fill_(math.nan)

    with pytest.raises(NotFinite, match=r"step 5 .*\(guide\)"):
        fit(normal_mean, guide, DATA, steps=10, callbacks=[poison])
    assert non_finite_sites(normal_mean, guide, DATA)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal((a * 0).sqrt(), 1.0), obs=y)

    with pytest.raises(NotFinite, match=r"gradient of guide\.a"):
        fit(model, MAP(model), torch.tensor(1.0), steps=3)


def test_bare_parameters_and_none_at_all_are_refused() -> None:
    def bare(y: Tensor) -> None:
        pyro.sample("mean", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    def prior(y: Tensor) -> None:
        pyro.sample("mean", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"pyro\.param\('m'\) in the guide"):
        fit(normal_mean, bare, DATA, steps=1)
    with pytest.raises(ValueError, match="got none"):
        fit(normal_mean, prior, DATA, steps=1)


@pytest.mark.parametrize("options", [{"steps": 0}, {"learning_rate": 0.0}, {"schedule": "sawtooth"}, {"window": 1}, {"particles": 0}])
def test_settings_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        fitted(**options)


def test_schedules_callbacks_and_clipping() -> None:
    rates: dict[str, list[float]] = {}
    for name, schedule in (("constant", "constant"), ("cosine", "cosine"), ("line", lambda done: 1 - done)):
        steps: list[Step] = []
        fitted(steps=4, schedule=schedule, callbacks=[steps.append], clip_norm=1e-3, progress=True)
        assert [step.number for step in steps] == [1, 2, 3, 4]
        assert all(math.isfinite(step.loss) and step.gradient_norm > 1e-3 for step in steps)
        rates[name] = [step.learning_rate for step in steps]
    assert rates["constant"] == [0.05] * 4
    assert rates["line"] == pytest.approx([0.05, 0.0375, 0.025, 0.0125])
    assert rates["cosine"] == pytest.approx([0.025 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])


def test_a_fit_stops_when_the_elbo_has_stopped_rising() -> None:
    guide, result = fitted(steps=20000, tolerance_nats=0.01, window=50)
    assert result.converged
    assert result.steps < 5000
    # Converged to 0.01 nats and one standard error of a window's mean.
    assert importance(normal_mean, guide, DATA, draws=400, seed=0).elbo == pytest.approx(exact_evidence(DATA), abs=0.05)
    assert not fitted(steps=60, tolerance_nats=1e-6, window=50)[1].converged


def test_convergence_is_the_gain_less_its_error() -> None:
    flat, falling = [5.0, 4.0] * 100, [float(-k) for k in range(200)]
    assert gain_per_window(falling, 50) == pytest.approx((50.0, math.sqrt(2 * 212.5 / 50)))
    assert has_converged(flat, 50, 1e-6)
    assert not has_converged(falling, 50, 10.0)
    assert has_converged(falling, 50, 51.0)
    assert not has_converged(flat[:100], 50, 1e-6)
    with pytest.raises(ValueError, match="two windows"):
        gain_per_window(flat, 150)


def test_another_estimator_and_several_particles() -> None:
    def guide_program() -> PyroModule:
        class MeanField(PyroModule):
            def __init__(self) -> None:
                super().__init__()
                self.loc, self.log_scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

            def forward(self, y: Tensor | None = None) -> None:
                pyro.sample("mean", dist.Normal(self.loc, self.log_scale.exp()))

        return MeanField()

    guide = guide_program()
    result = fit(normal_mean, guide, DATA, elbo=TraceMeanField_ELBO(num_particles=3), steps=800, learning_rate=0.05, tolerance_nats=None)
    assert float(guide.loc.detach()) == pytest.approx(exact(DATA)[0], rel=0.02)  # type: ignore[operator, union-attr]
    assert result.elbo == pytest.approx(exact_evidence(DATA), abs=0.05)


def test_importance_weights_tell_a_good_guide_from_a_narrow_one() -> None:
    guide, _ = fitted(steps=400)
    good = importance(normal_mean, guide, DATA, draws=1000, seed=0)
    assert good.log_evidence == pytest.approx(exact_evidence(DATA), abs=1e-2)
    assert good.k_hat < 0.7
    with torch.no_grad():
        guide.scale_unconstrained.copy_(guide.scale_unconstrained - 2.5)
    narrow = importance(normal_mean, guide, DATA, draws=1000, seed=0)
    assert narrow.k_hat > 0.7
    assert narrow.elbo < good.elbo - 3 * narrow.elbo_error
    with pytest.raises(ValueError, match="at least 25 draws"):
        importance(normal_mean, guide, DATA, draws=5)


def exact_draws(spread: float, data: dict[str, Tensor]) -> dict[str, Tensor]:
    mean, sd = exact(data["y"])
    return {"mean": mean + spread * sd * torch.randn(99)}


def test_calibration_passes_an_exact_posterior_and_fails_one_half_as_wide() -> None:
    for spread, calibrated in ((1.0, True), (0.5, False)):
        ranks = simulated_ranks(normal_mean, partial(exact_draws, spread), observed=["y"], simulations=300)["mean"]
        assert ranks.shape == (300, 1)
        deviation, band = rank_deviation(ranks, 99)
        assert (deviation <= band) is calibrated
        assert (uniformity(ranks.flatten(), 99) > 1e-3) is calibrated
    with pytest.raises(ValueError, match="observed sites"):
        simulated_ranks(normal_mean, partial(exact_draws, 1.0), observed=["z"], simulations=1)


@pytest.mark.slow
def test_svi_is_calibrated_on_a_conjugate_model() -> None:
    def by_svi(data: dict[str, Tensor]) -> dict[str, Tensor]:
        guide, _ = fitted(data["y"], steps=400, learning_rate=0.1, seed=None)
        return Posterior.from_guide(normal_mean, guide, data["y"], draws=99).samples

    ranks = simulated_ranks(normal_mean, by_svi, observed=["y"], simulations=150)["mean"]
    deviation, band = rank_deviation(ranks, 99)
    assert deviation <= band


def test_nuts_agrees_with_the_closed_form() -> None:
    posterior = nuts(normal_mean, DATA, draws=400, warmup=100, seed=0)
    mean, sd = exact(DATA)
    error = sd / math.sqrt(posterior.attributes["effective_draws"])
    assert float(posterior.mean("mean")) == pytest.approx(mean, abs=4 * error)
    assert float(posterior.sd("mean")) == pytest.approx(sd, rel=0.25)
    assert posterior.attributes["divergences"] == 0
    with pytest.raises(ValueError, match="maen"):
        nuts(normal_mean, DATA, init={"maen": torch.zeros(())})
