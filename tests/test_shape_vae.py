"""Shape priors: densities against integrals over a code and sums over label maps; shapes, scans and files."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro import poutine
from pyro.distributions import Normal
from pyro.infer import Predictive, Trace_ELBO
from torch import Tensor, nn
from typer.testing import CliRunner

from probmed.appearances import BiasField, GaussianMixture
from probmed.cli import app
from probmed.grids import Grid, MaskedGrid
from probmed.inference.amortised import elbo_loss
from probmed.inference.em import ascend, em, log_joint
from probmed.inference.training import Row, TrainingSettings
from probmed.metrics import dice
from probmed.models.segmentation import Segmentation
from probmed.models.shape_vae import (
    ImageShapeGuide,
    ShapeGuide,
    ShapeVAE,
    active_units,
    evidence_bound,
    label_maps,
    log_evidence,
    log_likelihood,
    standard_divergence,
    traversal,
    within,
)
from probmed.priors import AffinePrior, AffineVelocity, SmoothVelocity
from probmed.report.palette import distinct, rgb
from probmed.report.panels import png
from probmed.report.shape_figures import shape_figure
from probmed.volumes import UnusableInput, Volume, write_labels, write_scan
from probmed.workflows.shape_summary import summarise
from probmed.workflows.shapes import (
    ShapeSettings,
    TrainedShapes,
    at_codes,
    code_bound,
    fit_background,
    fit_reader,
    fit_scan,
    fit_shapes,
    label_draws,
    mean_atlas,
    read_label_maps,
    read_unlabelled,
    refine,
    segment_with_shapes,
    usual_bias,
)
from probmed.workflows.training_sets import Augmentation

pytestmark = pytest.mark.usefixtures("float64", "local_parameters")

NAMES = ("background", "organ")
TINY = Grid.from_spacing((2, 3), 2.0)


class Ramp(nn.Module):
    """One code, whose logits are linear: an anatomy that can be integrated."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.slope = nn.Parameter(1.5 * torch.randn(2, *TINY.shape, generator=generator, dtype=torch.float64))

    def forward(self, codes: Tensor) -> Tensor:
        return codes.reshape(-1, 1, 1, 1) * self.slope


class Reading(nn.Module):
    """Mean and log standard deviation of the code, linear in the label map."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 2, dtype=torch.float64)

    def forward(self, probabilities: Tensor) -> Tensor:
        out: Tensor = self.linear(probabilities.flatten(1))
        return out + torch.tensor([0.0, 0.3])  # broad, as importance sampling needs it


def tiny_shapes(floor: float = 1e-4) -> ShapeVAE:
    location = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, *TINY.shape).log_softmax(0)
    return ShapeVAE(NAMES, TINY, Ramp(), 1, location, floor=floor)


def every_label_map() -> Tensor:
    return torch.tensor(list(itertools.product(range(2), repeat=6))).reshape(-1, *TINY.shape)


def integral(log_density: Callable[[Tensor], Tensor]) -> Tensor:
    """∫ exp log_density(z) N(z; 0, 1) dz over one code, ``(B,)``; ``log_density`` takes ``(P, 1, 1)`` to ``(P, B)``."""
    z = torch.linspace(-9, 9, 901)
    return torch.trapezoid((log_density(z.reshape(-1, 1, 1)) + Normal(0.0, 1.0).log_prob(z)[:, None]).exp(), z, dim=0)


def exact_evidence(shapes: ShapeVAE, labels: Tensor) -> Tensor:
    return integral(lambda z: log_likelihood(shapes, labels, z.expand(-1, len(labels), -1))).log().detach()


def test_probabilities_of_all_label_maps_sum_to_one() -> None:
    shapes, maps = tiny_shapes(), every_label_map()
    torch.testing.assert_close(exact_evidence(shapes, maps).exp().sum(), torch.ones(()))
    drawn = {"shape_code": torch.tensor([0.7])}
    traces = (poutine.trace(poutine.condition(label_maps, data=drawn)).get_trace(shapes, labels) for labels in maps)
    densities = [trace.log_prob_sum(lambda name, site: name == "labels") for trace in traces]
    torch.testing.assert_close(torch.stack(densities).logsumexp(0), torch.zeros(()))


def test_importance_sampling_finds_the_integral_and_the_elbo_is_below_it() -> None:
    shapes, labels = tiny_shapes(), every_label_map()[::7]
    guide = ShapeGuide(shapes, Reading())
    exact = exact_evidence(shapes, labels)
    errors = [(log_evidence(shapes, guide, labels, draws) - exact).abs().max() for draws in (20, 20_000)]
    assert errors[1] < 0.02
    assert errors[1] < errors[0]
    many = torch.stack([evidence_bound(shapes, guide, labels) for _ in range(2000)]).detach()
    assert (many.mean(0) < exact).all()


def test_elbo_is_the_integral_less_the_divergence_and_pyro_s_own() -> None:
    shapes, labels = tiny_shapes(), every_label_map()[5:9]
    guide = ShapeGuide(shapes, Reading())
    q = guide.of_labels(labels)
    z = torch.linspace(-12, 12, 4001)[:, None, None]
    weights = q.log_prob(z)[..., 0].exp()
    expected = torch.trapezoid(weights * log_likelihood(shapes, labels, z.expand(-1, 4, -1)), z[:, 0, 0], dim=0)
    exact = (expected - standard_divergence(q)).detach()
    draws = torch.stack([evidence_bound(shapes, guide, labels) for _ in range(4000)]).detach()
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() < 4 * error).all()
    torch.manual_seed(1)
    ours = evidence_bound(shapes, guide, labels).mean()
    torch.manual_seed(1)
    torch.testing.assert_close(-elbo_loss(partial(label_maps, shapes), guide, 4, labels), ours)
    torch.manual_seed(1)
    weighted = evidence_bound(shapes, guide, labels, weight=0.25).mean()
    torch.testing.assert_close(weighted - ours, 0.75 * standard_divergence(q).mean())


def test_divergence_is_that_of_normals() -> None:
    q = Normal(torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(standard_divergence(q), torch.distributions.kl_divergence(q, Normal(torch.zeros(2), torch.ones(2))).sum())


def test_summed_out_labels_of_an_image_are_a_sum_over_label_maps() -> None:
    model = Segmentation(tiny_shapes(), GaussianMixture([1, 1], outlier=0.0))
    image = torch.rand(1, *TINY.shape)
    state = model.start(image, TINY) | {"shape_code": torch.tensor([-0.8])}
    mixture = model.mixture(state, TINY)
    sd = state["covariances"][:, 0, 0].sqrt()
    density = torch.stack([Normal(state["means"][k, 0], sd[k]).log_prob(image[0]) for k in range(2)])
    maps = every_label_map()
    table = mixture.log_prior + density
    logs = torch.stack([table.gather(0, labels[None]).sum() for labels in maps])
    torch.testing.assert_close(mixture.log_prob(image), logs.logsumexp(0))
    torch.testing.assert_close(mixture.posterior(image)[1], (logs.softmax(0)[:, None, None] * maps).sum(0))


def test_prior_is_seen_on_any_grid_and_through_a_deformation() -> None:
    shapes = tiny_shapes()
    code = poutine.condition(shapes, data={"shape_code": torch.tensor([1.2])})
    finer = TINY.at_spacing(1.0)
    torch.testing.assert_close(code(finer).logsumexp(0), torch.zeros(finer.shape))
    mask = torch.rand(TINY.shape) < 0.5
    torch.testing.assert_close(code(MaskedGrid(TINY, mask)), code(TINY)[:, mask])
    deformation = AffineVelocity(AffinePrior(2, 3), SmoothVelocity(TINY))
    moved = ShapeVAE(NAMES, TINY, shapes.decoder, 1, shapes.location, deformation)
    still = {"shape_code": torch.tensor([1.2]), "affine": torch.zeros(3), "velocity": torch.zeros(2, *TINY.shape)}
    torch.testing.assert_close(poutine.condition(moved, data=still)(TINY), code(TINY))
    shifted = still | {"affine": torch.tensor([2.0, 0.0, 0.0])}  # a voxel
    torch.testing.assert_close(poutine.condition(moved, data=shifted)(TINY)[:, 0], code(TINY)[:, 1])


def test_em_and_gradients_find_the_code_with_the_appearance() -> None:
    model = Segmentation(tiny_shapes(), GaussianMixture([1, 1]))
    image = torch.rand(1, *TINY.shape)
    state = model.start(image, TINY)
    assert set(state) == {"shape_code", "weights", "covariances", "means"}
    assert not state["shape_code"].any()
    before = log_joint(model, state, image, TINY)
    mode = em(model, image, TINY, rounds=10)
    assert mode.log_joint > before
    raised = ascend(model, mode.state, ["shape_code"], image, TINY)
    assert log_joint(model, raised, image, TINY) - mode.log_joint < 0.01
    moved = mode.state | {"shape_code": torch.tensor([1.0])}
    program = model.remaining(mode.state, image, TINY)
    gains = [log_joint(program, {"shape_code": each["shape_code"]}) for each in (mode.state, moved)]
    whole = [log_joint(model, each, image, TINY) for each in (mode.state, moved)]
    torch.testing.assert_close(gains[1] - gains[0], whole[1] - whole[0])


class Discs(nn.Module):
    """One code, the radius of a disc: 9 mm, and 2 mm more for each standard deviation."""

    def forward(self, codes: Tensor) -> Tensor:
        logits = (9.0 + 2.0 * codes.reshape(-1, 1, 1) - GRID.coordinates(torch.float64).norm(dim=-1)) / 0.8
        return torch.stack([torch.zeros_like(logits), logits], 1)


def test_shape_place_and_deformation_of_a_simulated_scan_are_found_together() -> None:
    """Shape × affine × velocity: the scan is the model's own draw, with a shape and a place that are known."""
    deformation = AffineVelocity(AffinePrior(2, 3, translation_mm=5.0, rotation=0.05), SmoothVelocity(GRID.at_spacing(8.0), 1.0, 15.0))
    shapes = ShapeVAE(NAMES, GRID, Discs(), 1, deformation=deformation)
    model = Segmentation(shapes, GaussianMixture([1, 1], outlier=0.0))
    truth = {"shape_code": torch.tensor([1.0]), "affine": torch.tensor([3.0, -4.0, 0.0])}
    torch.manual_seed(2)
    truth["velocity"] = deformation.deformation.prior().sample()  # type: ignore[operator]
    labels = poutine.condition(shapes, data=truth)(GRID).argmax(0)
    image = scan(labels, 0.8, 0)
    start = model.start(image, GRID)
    assert set(start) == {"shape_code", "affine", "velocity", "weights", "covariances", "means"}
    found = em(model, image, GRID, state=start, rounds=15).state
    before, after = (model.label_posterior(state, image, GRID).argmax(0) for state in (start, found))
    assert dice(after == 1, labels == 1) > 0.93 > dice(before == 1, labels == 1)
    assert float(found["shape_code"]) == pytest.approx(1.0, abs=0.5)
    # The place of the disc: the point that the transform takes to the shapes' origin.
    middles = [poutine.condition(deformation, data=state)().inverse()(torch.zeros(1, 2)) for state in (truth, found)]
    assert float((middles[0] - middles[1]).norm()) < 1.2


def test_model_and_guide_obey_the_handlers() -> None:
    model = Segmentation(tiny_shapes(), GaussianMixture([1, 1]))
    guide = ImageShapeGuide(model, ShapeGuide(tiny_shapes(), Reading()))
    image = model(None, TINY)
    assert image.shape == (1, *TINY.shape)
    sites = poutine.trace(guide).get_trace(image, TINY).stochastic_nodes
    assert set(sites) == {"shape_code", "weights", "covariances", "means"}

    def program(image: Tensor | None = None) -> Tensor:
        drawn: Tensor = model(image, TINY)
        return drawn

    Trace_ELBO().differentiable_loss(program, lambda image: guide(image, TINY), image).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in guide.parameters())
    state = guide(image, TINY)
    samples = {name: torch.stack([value.detach()] * 3) for name, value in state.items()}
    assert Predictive(program, samples)()["image"].reshape(3, *image.shape).std(0).min() > 0
    assert torch.equal(poutine.condition(model.labels, data=state)(TINY), model.labels.decode(state["shape_code"]))


def test_several_codes_at_once_are_as_one_after_another() -> None:
    """On a grid whose first axis is as long as there are codes, moved, and with a bias field."""
    grid, plain = Grid.from_spacing((3, 4), 0.8), tiny_shapes()
    shapes = ShapeVAE(NAMES, TINY, plain.decoder, 1, plain.location, deformation=AffinePrior(2))
    model = Segmentation(shapes, GaussianMixture([1, 2]), BiasField(cutoff_mm=2.0))
    image = torch.rand(1, *grid.shape)
    state = model.start(image, grid)
    moved = {name: value + 0.1 * torch.randn_like(value) for name, value in state.items() if name not in model.closed_form_sites}
    state = state | moved | {"bias": 0.1 * torch.randn_like(state["bias"])}
    codes = torch.randn(3, 1)
    together = at_codes(model, state, codes, grid)
    each = [model.mixture(state | {"shape_code": code}, grid) for code in codes]
    torch.testing.assert_close(together.log_prob(image), torch.stack([one.log_prob(image) for one in each]))
    torch.testing.assert_close(together.posterior(image), torch.stack([one.posterior(image) for one in each]))


@pytest.mark.slow
def test_bound_of_a_scan_is_below_its_evidence_and_refinement_raises_it() -> None:
    model = Segmentation(tiny_shapes(), GaussianMixture([1, 1]))
    image = poutine.condition(model, data={"shape_code": torch.tensor([1.5])})(None, TINY)
    start = Normal(torch.tensor([-1.0]), torch.tensor([0.8]))
    fit = refine(model, start, model.start(image, TINY), image, TINY, steps=60, learning_rate=0.1, draws=16)
    assert fit.refined > fit.amortised
    noise = torch.randn(2000, 1)
    with torch.no_grad():
        before, after = (float(code_bound(model, code, fit.state, image, TINY, noise)) for code in (start, fit.code))
    assert after > before
    zero = fit.state | {"shape_code": torch.zeros(1)}

    def likelihood(z: Tensor) -> Tensor:
        each = [log_joint(model, fit.state | {"shape_code": code}, image, TINY) - Normal(0.0, 1.0).log_prob(code).sum() for code in z.reshape(-1, 1)]
        return torch.stack(each)[:, None].detach()

    offset = likelihood(zero["shape_code"])[0, 0]
    evidence = float(integral(lambda z: likelihood(z) - offset).log()) + float(offset)
    assert after < evidence
    assert evidence - after < 0.5


def test_ends_of_the_log_standard_deviation_are_soft() -> None:
    x = torch.linspace(-30, 30, 601).requires_grad_()
    y = within(x, -8.0, 3.0)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert (y.diff() >= 0).all() and y.min() > -8 - 1e-6 and y.max() <= 3
    middle = (x >= -5) & (x <= 0)
    assert ((y - x)[middle].abs() < 2e-3).all()
    near = (x > -12) & (x < 7)
    assert (slope[near] > 1e-4).all() and (slope[middle] > 0.99).all()
    # What a network says beyond the ends is heard of: its gradient points back.
    network = nn.Linear(12, 2)
    nn.init.constant_(network.weight, 0.0)
    network.bias.data = torch.tensor([0.0, 4.0])
    reading = nn.Sequential(nn.Flatten(), network)
    standard_divergence(ShapeGuide(tiny_shapes(), reading).of_labels(every_label_map()[:3])).sum().backward()
    assert network.bias.grad is not None and float(network.bias.grad[1]) > 1


def test_a_summary_is_the_mean_evidence_and_that_of_the_mean_atlas() -> None:
    shapes, maps = tiny_shapes(), every_label_map()
    guide = ShapeGuide(shapes, Reading())
    trained = TrainedShapes(ShapeSettings(1), (0, 7), shapes, guide, guide)
    found = summarise(trained, maps, maps[::7], draws=5000)
    exact = exact_evidence(shapes, maps[::7])
    assert found.log_evidence == pytest.approx(float(exact.mean()), abs=0.02)
    each = torch.distributions.Categorical(logits=trained.log_atlas.movedim(0, -1)).log_prob(maps[::7]).flatten(1).sum(1)
    assert found.mean_atlas == pytest.approx(float(each.mean()))
    assert found.gain_error == pytest.approx(float((exact - each).std()) / 10**0.5, rel=0.05)
    assert (found.codes, found.held_out, found.draws) == (1, 10, 5000) and found.active == (0,)
    assert f"1 of 1 codes tell label maps apart; log p(S) of 10 label maps left out: {found.log_evidence:.1f} nats a map" in found.line
    without = summarise(trained, maps)
    assert without.log_evidence is None and without.line == "1 of 1 codes tell label maps apart"


# Ellipses of two factors.

GRID = Grid.from_spacing((16, 14), 3.0)


def ellipses(count: int, seed: int) -> Tensor:
    """Of two independent axes, their borders rough."""
    generator = torch.Generator().manual_seed(seed)
    axes = 11 * (0.3 * torch.randn(count, 2, generator=generator)).exp()
    radius = (GRID.coordinates(axes.dtype) / axes[:, None, None]).norm(dim=-1)
    return (torch.rand(radius.shape, generator=generator) < torch.sigmoid((1 - radius) / 0.03)).long()


def scan(labels: Tensor, contrast: float, seed: int) -> Tensor:
    noise = torch.randn(1, *labels.shape, generator=torch.Generator().manual_seed(seed))
    return 0.9 + contrast * (labels[None] - 0.5) + 0.3 * noise


@pytest.fixture(scope="module")
def trained() -> Iterator[TrainedShapes]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    settings = TrainingSettings(800, 3e-3, every=400)
    with pyro.settings.context(module_local_params=True):
        shapes, _ = fit_shapes(ellipses(1000, 0), GRID, (0, 7), NAMES, ShapeSettings(4), settings, batch=32)
    torch.set_default_dtype(before)
    yield shapes


@pytest.mark.slow
@torch.no_grad()
def test_ellipses_have_two_codes_that_tell_more_of_new_ones_than_the_mean(trained: TrainedShapes) -> None:
    held_out = ellipses(50, 1)
    assert int(active_units(trained.guide, ellipses(1000, 0)).sum()) == 2
    evidence = log_evidence(trained.shapes, trained.guide, held_out, 200)
    by_atlas = torch.stack([trained.log_atlas.gather(0, labels[None]).sum() for labels in held_out])
    # About 30 nats a label map; the bound is less than the evidence.
    assert (evidence - by_atlas).mean() > 20
    assert evidence_bound(trained.shapes, trained.guide, held_out).mean() < evidence.mean()
    found = trained.shapes.decode(trained.guide.of_labels(held_out).loc).argmax(1)
    scores = [dice(a == 1, b == 1) for a, b in zip(found, held_out, strict=True)]
    assert sum(scores) / len(scores) > 0.93
    unit = int(active_units(trained.guide, held_out).nonzero()[0])
    sizes = traversal(trained.shapes, unit, torch.tensor([-2.0, 0.0, 2.0]))[:, 1].flatten(1).sum(1)
    assert (sizes.diff() > 5).all() or (sizes.diff() < -5).all()
    drawn = trained.shapes.decode(torch.randn(500, 4)).exp()[:, 1].flatten(1).sum(1)
    real = ellipses(500, 2).flatten(1).sum(1).double()
    assert float(drawn.mean()) == pytest.approx(float(real.mean()), rel=0.1)
    assert float(drawn.std()) == pytest.approx(float(real.std()), rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("contrast", [0.3, -0.3])
def test_shapes_segment_a_noisy_scan_of_either_contrast_better_than_the_mean_atlas(trained: TrainedShapes, contrast: float) -> None:
    model = trained.model(appearance=GaussianMixture([1, 1]))
    alone = Segmentation(trained.atlas(), GaussianMixture([1, 1]))
    gains = []
    for seed, labels in enumerate(ellipses(6, 3)):
        image = scan(labels, contrast, seed)
        fit = fit_scan(trained, image, GRID, model=model, steps=40)
        assert fit.refined > fit.amortised
        found = label_draws(model, fit, image, GRID).mean(0).argmax(0)
        state = em(alone, image, GRID, rounds=30).state
        by_atlas = alone.label_posterior(state, image, GRID).argmax(0)
        gains.append(dice(found == 1, labels == 1) - dice(by_atlas == 1, labels == 1))
    assert sum(gains) / len(gains) > 0.02


@pytest.mark.slow
def test_reader_learns_from_scans_without_labels_and_leaves_the_prior(trained: TrainedShapes, tmp_path: Path) -> None:
    trained.save(tmp_path)
    other = TrainedShapes.load(tmp_path)
    model = other.model(appearance=GaussianMixture([1, 1]))
    images = [scan(labels, 0.3, seed) for seed, labels in enumerate(ellipses(12, 4))]
    guide, noise = ImageShapeGuide(model, other.reader), torch.randn(20, 4)

    def bound() -> float:
        total = 0.0
        for image in images:
            state = guide.start(image, GRID)
            total += float(code_bound(model, guide.distribution(state, image, GRID), state, image, GRID, noise).detach())
        return total / len(images)

    before, prior = bound(), {name: value.clone() for name, value in other.shapes.state_dict().items()}
    fit_reader(other, images, [GRID] * len(images), TrainingSettings(40, 1e-3, every=40), model=model)
    assert bound() > before + 0.3
    assert all(torch.equal(value, prior[name]) for name, value in other.shapes.state_dict().items())
    assert all(p.requires_grad for p in other.shapes.parameters())


def test_parts_of_a_label_share_what_it_had() -> None:
    plain, code = tiny_shapes(), torch.tensor([[0.7], [-1.2]])
    parts = torch.randn(3, *TINY.shape).log_softmax(0)
    parted = ShapeVAE(NAMES, TINY, plain.decoder, 1, plain.location, floor=1e-4, parts=parts)
    assert parted.names == ("background 1", "background 2", "background 3", "organ")
    p, whole = parted.decode(code).exp(), plain.decode(code).exp()
    torch.testing.assert_close(parted.whole(p), whole)
    torch.testing.assert_close(p[:, :3], whole[:, :1] * parts.exp())
    assert torch.equal(plain.whole(whole), whole)
    with pytest.raises(ValueError, match="expected parts of shape"):
        ShapeVAE(NAMES, TINY, plain.decoder, 1, parts=parts[:, :1])


def in_tissues(labels: Tensor, contrast: float, seed: int) -> Tensor:
    """A scan of an organ that looks like what it lies on: a band of tissue across the field of view, bright, between darker ones."""
    x = GRID.coordinates()[..., 1]
    tissue = (x > -16).long() + (x > 7).long()
    values = torch.where(labels == 1, 1.0, torch.tensor([0.0, 0.5, 1.0])[tissue])
    noise = torch.randn(labels.shape, generator=torch.Generator().manual_seed(seed))
    return (1 + contrast * (values - 0.5) + 0.08 * noise)[None]


def test_tissues_of_the_background_are_found_in_scans_without_labels(tmp_path: Path) -> None:
    """Clusters are those of the tissues here; an organ's own voxels, which are one of them, are none of the background's."""
    trained, maps = brief(), ellipses(20, 3)
    steps: list[float] = []
    images = [in_tissues(labels, 0.8, seed) for seed, labels in enumerate(maps)]
    found = fit_background(trained, images, [GRID] * len(images), tell=steps.append).exp()
    assert steps[-1] == 1 and len(steps) == 40
    torch.testing.assert_close(found.sum(0), torch.ones(GRID.shape))
    x, seen = GRID.coordinates()[..., 1], (maps == 0).float().mean(0) > 0.5
    for part, there in enumerate((x < -16, (x > -16) & (x < 7), x > 7)):
        assert float(found[part][there & seen].mean()) > 0.9
    with pytest.raises(ValueError, match="expected scans with a grid each"):
        fit_background(trained, [], [])
    trained.save(tmp_path)
    again = TrainedShapes.load(tmp_path)
    assert again.parts is not None and torch.equal(again.parts, found.log())
    assert again.seen().names == ("background 1", "background 2", "background 3", "organ")
    described = json.loads((tmp_path / "shapes.json").read_text())
    del described["parts"]
    (tmp_path / "shapes.json").write_text(json.dumps(described))
    with pytest.raises(UnusableInput, match="weights of another network"):
        TrainedShapes.load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("contrast", [0.8, -0.8])
def test_an_organ_beside_a_tissue_of_its_own_intensity_does_not_grow_into_it(trained: TrainedShapes, contrast: float) -> None:
    """Where scans without labels, of another contrast or not, have told where that tissue lies."""
    images = [in_tissues(labels, 0.8, seed) for seed, labels in enumerate(ellipses(20, 3))]
    told = replace(trained)
    fit_background(told, images, [GRID] * len(images))
    scores = []
    for seed, labels in enumerate(ellipses(5, 7)):
        volume = Volume.from_grid(in_tissues(labels, contrast, 50 + seed)[0], GRID)
        found = [segment_with_shapes(shapes, volume, steps=30).probabilities for shapes in (trained, told)]
        scores.append([dice(p.argmax(0) == 1, labels == 1) for p in found])
    without, with_tissues = torch.tensor(scores).mean(0).tolist()
    assert with_tissues > 0.95 and 1 - with_tissues < 0.7 * (1 - without)


def brief() -> TrainedShapes:
    """Two steps of training."""
    return fit_shapes(ellipses(20, 0), GRID, (0, 7), NAMES, ShapeSettings(2, 4, warm_up=2), TrainingSettings(2, every=1))[0]


def test_a_bias_field_of_each_scan_is_found_unless_there_is_none() -> None:
    """Shapes that are known but for their borders, in a scan whose one side is brighter by half."""
    trained, labels = brief(), ellipses(1, 5)[0]
    ramp = torch.linspace(-0.25, 0.25, GRID.shape[0])[:, None].expand(GRID.shape)
    image = scan(labels, 0.8, 0) * ramp.exp()
    alone = GaussianMixture([1, 1])
    model, flat = trained.model(appearance=alone, grid=GRID), trained.model(appearance=alone, bias=None)
    assert flat.bias is None and model.bias is not None and model.bias.domain == GRID
    found, without = (fit_scan(trained, image, GRID, model=each, steps=10) for each in (model, flat))
    assert "bias" not in without.state
    log_bias = model.bias.evaluate(found.state["bias"], GRID)[0]
    # β times the image is free of bias, but for a constant.
    assert float(torch.stack([log_bias.flatten(), -ramp.flatten()]).corrcoef()[0, 1]) > 0.9
    assert float(log_bias.std()) == pytest.approx(float(ramp.std()), rel=0.35)
    assert found.refined > without.refined + 5
    own = BiasField(cutoff_mm=20.0)
    assert trained.model(bias=own).bias is own
    # Without a grid the field runs over that of each scan, whatever its size.
    assert [trained.model().bias.counts(grid) for grid in (GRID, GRID.at_spacing(1.0))] == [(2, 2), (2, 2)]  # type: ignore[union-attr]
    assert usual_bias(2, GRID).channels == 2


def test_a_scan_is_segmented_with_a_bias_field_by_default() -> None:
    trained, labels = brief(), ellipses(1, 5)[0]
    volume = Volume.from_grid(scan(labels, 0.8, 0)[0].float(), GRID)
    assert segment_with_shapes(trained, volume, steps=2).fit.state["bias"].shape == (1, 3)
    assert "bias" in fit_scan(trained, volume.data[None].double(), GRID, steps=2).state


def test_warm_up_changes_the_training_and_not_the_bounds() -> None:
    settings = TrainingSettings(3, every=1)
    logs = []
    for steps in (0, 3):
        _, log = fit_shapes(ellipses(20, 0), GRID, (0, 7), NAMES, ShapeSettings(2, 4, warm_up=steps), settings, held_out=ellipses(5, 1))
        logs.append(log)
    assert logs[1][0]["loss"] < logs[0][0]["loss"]
    assert all(row["held_out"] < 0 for log in logs for row in log)


def test_a_run_that_was_stopped_ends_in_the_same_shapes(tmp_path: Path) -> None:
    def run(folder: Path, stop: int | None = None) -> tuple[TrainedShapes, list[Row]]:
        folder.mkdir(exist_ok=True)

        def tell(row: Row, share: float) -> None:
            if row["step"] == stop:
                raise KeyboardInterrupt

        settings, change = ShapeSettings(2, 4, warm_up=3), Augmentation()
        torch.set_default_dtype(torch.float32)  # as command lines have it; the fixture sets it back
        return fit_shapes(
            ellipses(20, 0), GRID, (0, 7), NAMES, settings, TrainingSettings(4, every=1), batch=4, augmentation=change, folder=folder, tell=tell
        )

    whole, log = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop=2)
    assert not (tmp_path / "parts" / "shapes.safetensors").exists()
    parts, again = run(tmp_path / "parts")
    for name in ("shapes", "guide", "reader"):
        first, second = (getattr(each, name).state_dict() for each in (whole, parts))
        assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert [row["loss"] for row in again] == [row["loss"] for row in log]


def test_a_reader_s_run_that_was_stopped_ends_in_the_same_numbers(tmp_path: Path) -> None:
    images = [scan(labels, 0.5, n) for n, labels in enumerate(ellipses(3, 4))]

    def run(folder: Path, steps: int) -> dict[str, Tensor]:
        folder.mkdir(exist_ok=True)
        trained = brief()

        def tell(row: Row, share: float) -> None:
            if row["step"] == steps:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit_reader(trained, images, [GRID] * 3, TrainingSettings(3, every=1), batch=2, folder=folder, tell=tell)
        return trained.reader.state_dict()

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "parts", 1)
    parts = run(tmp_path / "parts", 3)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert not torch.equal(*(each["network.head.2.bias"] for each in (whole, brief().reader.state_dict())))


def test_a_picture_shows_samples_label_maps_and_codes() -> None:
    trained = brief()
    figure = shape_figure(trained, ellipses(5, 0), (1,))
    images = [axis for axis in figure.axes if axis.get_images()]
    # Seven drawn, five maps and what is made of them, seven values of a code.
    assert len(images) == 7 + 5 + 5 + 7
    assert [text.get_text() for text in figure.texts] == ["drawn", "label maps", "rebuilt", "code 2"]
    shown = np.asarray(images[7].get_images()[0].get_array())
    assert {tuple(colour) for colour in shown.reshape(-1, 3)} == {(1.0, 1.0, 1.0), rgb(distinct(1)[0])}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["organ"]
    assert png(figure)[:4] == b"\x89PNG" and png(figure) == png(shape_figure(trained, ellipses(5, 0), (1,)))
    solid = Grid.from_spacing((8, 9, 6), 2.0)
    labels = (solid.coordinates().norm(dim=-1) < 6).long().expand(3, -1, -1, -1)
    flat = fit_shapes(labels, solid, (0, 7), NAMES, ShapeSettings(2, 2), TrainingSettings(1))[0]
    assert len([axis for axis in shape_figure(flat, labels, ()).axes if axis.get_images()]) == 7 + 3 + 3


def test_shapes_and_a_reader_on_the_command_line(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)  # as it is on the command line; the fixture sets it back
    rows = []
    for n, labels in enumerate(ellipses(6, 0)):
        like = Volume.from_grid(torch.zeros(GRID.shape), GRID)
        write_labels(tmp_path / f"{n}_dseg.nii.gz", 7 * labels, like=like)
        write_scan(tmp_path / f"{n}.nii.gz", scan(labels, 0.5, n)[0].float(), like)
        rows.append({"scan": f"{n}.nii.gz", "labels": f"{n}_dseg.nii.gz", "fold": 1 + n % 3})
    table = pd.DataFrame(rows)
    table.to_csv(tmp_path / "maps.tsv", sep="\t", index=False)
    table[["scan"]].to_csv(tmp_path / "scans.tsv", sep="\t", index=False)
    options = ["train", "shapes", "--data", str(tmp_path / "maps.tsv"), "--fold", "1", "--codes", "2", "--steps", "2", "--reader-steps", "2"]
    run = tmp_path / "run"
    result = CliRunner().invoke(app, [*options, "--scans", str(tmp_path / "scans.tsv"), "-o", str(run)])
    assert result.exit_code == 0, result.output
    assert "log p(S) of 2 label maps left out" in result.stdout
    summary = json.loads((run / "summary.json").read_text())
    assert summary["held_out"] == 2 and summary["log_evidence"] < 0 and len(summary["active"]) <= 2
    assert (run / "shapes.png").read_bytes()[:4] == b"\x89PNG" and (run / "reader" / "log.csv").exists()
    trained = TrainedShapes.load(run)
    read, written = (each.state_dict() for each in (trained.reader, trained.guide))
    assert not all(torch.equal(value, written[name]) for name, value in read.items())
    bad = CliRunner().invoke(app, [*options, "--scans", str(tmp_path / "no.tsv"), "-o", str(tmp_path / "new")])
    assert bad.exit_code == 2 and not (tmp_path / "new").exists()
    table[["labels"]].to_csv(tmp_path / "scans.tsv", sep="\t", index=False)
    bad = CliRunner().invoke(app, [*options, "--scans", str(tmp_path / "scans.tsv"), "-o", str(tmp_path / "new")])
    assert bad.exit_code == 2 and "has no column 'scan'" in " ".join(bad.stderr.split())


def test_saved_shapes_are_the_same(tmp_path: Path) -> None:
    first = brief()
    first.save(tmp_path)
    again, code = TrainedShapes.load(tmp_path), torch.tensor([0.4, -1.0])
    assert torch.equal(again.shapes.decode(code), first.shapes.decode(code))
    assert again.codes == (0, 7)
    assert again.grid == first.grid
    described = json.loads((tmp_path / "shapes.json").read_text())
    before = {name: value for name, value in described.items() if name not in ("parts", "format")}
    (tmp_path / "shapes.json").write_text(json.dumps(before))
    assert TrainedShapes.load(tmp_path).parts is None
    (tmp_path / "shapes.json").write_text(json.dumps(described | {"system": "segmentation"}))
    with pytest.raises(UnusableInput, match="is of a network for segmentation, not shapes"):
        TrainedShapes.load(tmp_path)
    (tmp_path / "shapes.json").write_text(json.dumps(described | {"format": 9}))
    with pytest.raises(UnusableInput, match="has format 9"):
        TrainedShapes.load(tmp_path)
    with pytest.raises(UnusableInput, match="holds no shapes network"):
        TrainedShapes.load(tmp_path / "nowhere")


def test_label_maps_of_a_table_and_a_scan_on_its_own_voxels(tmp_path: Path) -> None:
    maps = 7 * ellipses(4, 0)
    flipped = torch.eye(3, dtype=torch.float64)
    flipped[0, 0] = flipped[1, 1] = -3.0
    for n, labels in enumerate(maps):
        write_labels(tmp_path / f"{n}.nii.gz", labels, like=Volume.from_grid(labels.float(), GRID))
    table = pd.DataFrame({"labels": [f"{n}.nii.gz" for n in range(4)]})
    found = read_label_maps(table, tmp_path / "table.csv")
    assert found.codes == (0, 7)
    assert found.names == tuple(f"{n}.nii.gz" for n in range(4))
    torch.testing.assert_close(mean_atlas(found.labels, 2).exp().sum(0), torch.ones(found.grid.shape))
    trained, _ = fit_shapes(found.labels, found.grid, found.codes, NAMES, ShapeSettings(2, 4), TrainingSettings(2, every=2))
    volume = Volume.from_grid(scan(maps[0] // 7, 0.5, 0)[0].float(), GRID)
    result = segment_with_shapes(trained, volume, steps=3)
    assert result.labels.shape == GRID.shape
    assert set(result.labels.unique().tolist()) <= {0, 7}
    torch.testing.assert_close(result.probabilities.sum(0), torch.ones(GRID.shape))
    # The same scan in voxels that run the other way: the same labels, the other way.
    turned = segment_with_shapes(trained, Volume.from_grid(volume.data.flip(0, 1), Grid(GRID.shape, flipped)), steps=3)
    torch.testing.assert_close(turned.probabilities.flip(1, 2), result.probabilities)


def test_bad_input_is_told_in_one_line(tmp_path: Path) -> None:
    shapes = tiny_shapes()
    guide = ShapeGuide(shapes, Reading())
    with pytest.raises(ValueError, match=r"expected integer label maps of shape \(2, 3\)"):
        evidence_bound(shapes, guide, torch.zeros(1, 3, 3).long())
    with pytest.raises(ValueError, match="expected labels from 0 to 1, got 0 to 4"):
        log_evidence(shapes, guide, torch.tensor([[[0, 1, 0], [4, 0, 0]]]))
    with pytest.raises(ValueError, match="expected a location prior of shape"):
        ShapeVAE(NAMES, TINY, Ramp(), 1, torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match="one code or more"):
        ShapeVAE(NAMES, TINY, Ramp(), 0)
    with pytest.raises(ValueError, match="without deformation"):
        label_maps(ShapeVAE(NAMES, TINY, Ramp(), 1, deformation=AffinePrior(2, 3)))
    with pytest.raises(ValueError, match="labels are a ShapeVAE, got a FixedAtlas"):
        ImageShapeGuide(Segmentation(brief().atlas(), GaussianMixture([1, 1])), guide)
    model = Segmentation(shapes, GaussianMixture([1, 1]))
    image = torch.rand(1, *TINY.shape)
    with pytest.raises(ValueError, match="no Laplace posterior"):
        model.scores(model.start(image, TINY), image, TINY)
    with pytest.raises(ValueError, match="codes and features >= 1"):
        ShapeSettings(codes=0)
    with pytest.raises(ValueError, match="two labels or more"):
        fit_shapes(torch.zeros(3, *GRID.shape).long(), GRID, (0,), ("background",))
    with pytest.raises(ValueError, match="a grid each, got 0 and 0"):
        fit_reader(brief(), [], [])
    with pytest.raises(UnusableInput, match="no column labels"):
        read_label_maps(pd.DataFrame({"scan": ["a"]}), tmp_path / "table.csv")
    with pytest.raises(UnusableInput, match="no column scan"):
        read_unlabelled(pd.DataFrame({"labels": ["a"]}), tmp_path / "table.csv", 2)
    with pytest.raises(UnusableInput, match="has no rows"):
        read_unlabelled(pd.DataFrame({"scan": []}), tmp_path / "table.csv", 2)
    write_scan(tmp_path / "flat.nii.gz", torch.rand(GRID.shape), Volume.from_grid(torch.zeros(GRID.shape), GRID))
    with pytest.raises(UnusableInput, match="has 2 axes, and the shapes have 3"):
        read_unlabelled(pd.DataFrame({"scan": ["flat.nii.gz"]}), tmp_path / "table.csv", 3)
    with pytest.raises(UnusableInput, match="has no rows"):
        read_label_maps(pd.DataFrame({"labels": []}), tmp_path / "table.csv")
    write_labels(tmp_path / "a.nii.gz", 3 * ellipses(1, 0)[0], like=Volume.from_grid(torch.zeros(GRID.shape), GRID))
    with pytest.raises(UnusableInput, match="has the label 3, which training has not seen"):
        read_label_maps(pd.DataFrame({"labels": ["a.nii.gz"]}), tmp_path / "table.csv", grid=GRID, codes=(0, 7))
    with pytest.raises(UnusableInput, match="has 3 axes, and the shapes have 2"):
        segment_with_shapes(brief(), Volume.from_grid(torch.rand(4, 4, 4), Grid.from_spacing((4, 4, 4), 1.0)))
