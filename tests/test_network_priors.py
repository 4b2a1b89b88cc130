"""Networks and priors joined: against sums over all label maps of a tiny grid."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from pyro import poutine
from torch import Tensor

from probmed.appearances import GaussianMixture
from probmed.atlases import LabelAtlas
from probmed.grids import Grid, MaskedGrid
from probmed.inference.em import ascend, em, log_joint
from probmed.models.segmentation import Segmentation
from probmed.models.shape_vae import ShapeVAE
from probmed.network_priors import LikelihoodRatio, NetworkPrior
from probmed.priors import AffinePrior, DeformableAtlas, FixedAtlas, MarkovField

pytestmark = pytest.mark.usefixtures("float64", "local_parameters")

NAMES = ("background", "organ", "lesion")
GRID = Grid.from_spacing((2, 2), 3.0)


def probabilities(seed: int = 0, grid: Grid = GRID) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, *grid.shape, generator=generator, dtype=torch.float64).softmax(0)


def classifier(means: Tensor, sd: float, shares: Tensor) -> Callable[[Tensor], Tensor]:
    """The Bayes classifier of Gaussian intensities, as a network trained where labels have these shares."""

    def logits(images: Tensor) -> Tensor:
        spatial = [1] * (images.ndim - 2)
        density = -0.5 * ((images - means.reshape(1, -1, *spatial)) / sd) ** 2
        return density + shares.log().reshape(1, -1, *spatial)

    return logits


def label_maps() -> Tensor:
    """All label maps of the grid, ``(3⁴, 2, 2)``."""
    return torch.tensor(list(itertools.product(range(3), repeat=4))).reshape(-1, 2, 2)


def by_enumeration(log_joint: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """log Σ_S exp log_joint(S), and the marginals of S, ``(K, 2, 2)``."""
    maps = label_maps()
    logs = torch.stack([log_joint(labels) for labels in maps])
    weights = logs.softmax(0)
    marginals = torch.stack([(weights[:, None, None] * (maps == k)).sum(0) for k in range(3)])
    return logs.logsumexp(0), marginals


def picked(table: Tensor, labels: Tensor) -> Tensor:
    """Σ_v table[S_v, v]."""
    return table.gather(0, labels[None]).sum()


def test_a_network_s_prediction_is_the_prior_of_another_contrast() -> None:
    prior = NetworkPrior(NAMES, probabilities(), GRID, floor=0.0)
    model = Segmentation(prior, GaussianMixture([1, 1, 1], outlier=0.0))
    image = torch.tensor([[[0.1, 0.9], [0.4, 1.3]]])
    state = model.start(image, GRID)
    mixture = model.mixture(state, GRID)
    shares = (probabilities() * state["weights"].reshape(3, 1, 1)).log().log_softmax(0)
    sd = state["covariances"][:, 0, 0].sqrt()
    density = torch.stack([torch.distributions.Normal(state["means"][k, 0], sd[k]).log_prob(image[0]) for k in range(3)])
    evidence, marginals = by_enumeration(lambda labels: picked(shares + density, labels))
    torch.testing.assert_close(mixture.log_prob(image), evidence)
    torch.testing.assert_close(mixture.posterior(image), marginals)


class Codes(torch.nn.Module):
    """One code, whose logits are linear."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(2 * torch.randn(3, *GRID.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64))

    def forward(self, codes: Tensor) -> Tensor:
        return codes.reshape(-1, 1, 1, 1) * self.slope


def test_a_network_s_ratio_is_joined_with_a_shape_prior_and_finds_its_code() -> None:
    shares = torch.tensor([0.5, 0.3, 0.2])
    ratio = LikelihoodRatio(classifier(torch.tensor([0.0, 1.0, 2.0]), 0.5, shares), shares, floor=0.0)
    shapes = ShapeVAE(NAMES, GRID, Codes(), 1, probabilities().log(), floor=0.0)
    model, code = Segmentation(shapes, cast(Any, ratio)), torch.tensor([1.3])
    image = torch.tensor([[[0.1, 1.9], [0.8, 1.1]]])
    log_prior = shapes.decode(code)
    likelihood = torch.distributions.Normal(torch.tensor([0.0, 1.0, 2.0]).reshape(3, 1, 1), 0.5).log_prob(image)
    _, marginals = by_enumeration(lambda labels: picked(log_prior + likelihood, labels))
    torch.testing.assert_close(ratio(log_prior).posterior(image), marginals)
    # The code at its mode, against a search over all.
    found = ascend(model, {"shape_code": torch.zeros(1)}, ["shape_code"], image, GRID)["shape_code"]
    line = torch.linspace(-4, 4, 1601)

    def log_density(z: Tensor) -> Tensor:
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(z)
        return prior + (shapes.decode(z.reshape(1)) + likelihood).logsumexp(0).sum()

    best = line[torch.stack([log_density(z) for z in line]).argmax()]
    assert float(found) == pytest.approx(float(best), abs=0.02)


def test_network_prior_never_rules_a_label_out_and_runs_under_em() -> None:
    sure = torch.zeros(3, *GRID.shape)
    sure[0] = 1
    prior = NetworkPrior(NAMES, sure, GRID, floor=1e-3)
    torch.testing.assert_close(prior(GRID)[1], torch.full(GRID.shape, 1e-3 / 1.003).log())
    mode = em(Segmentation(prior, GaussianMixture([1, 1, 1])), torch.rand(1, 2, 2), GRID, rounds=3)
    assert mode.rounds[-1].log_joint >= mode.rounds[0].log_joint


def test_ratio_with_the_training_prior_is_the_network_and_with_another_is_bayes_rule() -> None:
    means, shares = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.6, 0.3, 0.1])
    image = torch.tensor([[[0.2, 0.8], [1.4, 2.1]]])
    network = classifier(means, 0.5, shares)
    ratio = LikelihoodRatio(network, shares, floor=0.0)
    same = shares.log().reshape(3, 1, 1).expand(3, 2, 2)
    torch.testing.assert_close(ratio(same).posterior(image), network(image[None])[0].softmax(0))

    prior = FixedAtlas(LabelAtlas(NAMES, probabilities(1), GRID, brain=()), floor=0.0)
    density = torch.distributions.Normal(means.reshape(3, 1, 1), 0.5).log_prob(image)
    evidence, marginals = by_enumeration(lambda labels: picked(prior(GRID) + density, labels))
    torch.testing.assert_close(ratio(prior(GRID)).posterior(image), marginals)
    # The evidence, but for log p_train(I), which no prior changes.
    trained_on = torch.logsumexp(same + density, 0).sum()
    torch.testing.assert_close(ratio(prior(GRID)).log_prob(image), evidence - trained_on)


def test_ratio_takes_training_probabilities_of_each_voxel_and_a_temperature() -> None:
    logits, shares = torch.randn(1, 3, 2, 2), probabilities(2)
    ratio = LikelihoodRatio(lambda images: logits, shares, temperature=2.0, floor=0.0)
    expected = ((logits[0] / 2).softmax(0) / shares * probabilities(3)).log().softmax(0)
    torch.testing.assert_close(ratio(probabilities(3).log()).posterior(torch.rand(1, 2, 2)), expected)


def test_markov_field_on_a_network_bounds_the_evidence_by_enumeration() -> None:
    shares = torch.tensor([0.6, 0.3, 0.1])
    network = classifier(torch.tensor([0.0, 1.0, 2.0]), 0.5, shares)
    ratio, image = LikelihoodRatio(network, shares, floor=0.0), torch.tensor([[[0.2, 0.8], [1.4, 2.1]]])
    labels = MarkovField(FixedAtlas(LabelAtlas(NAMES, probabilities(1), GRID, brain=()), floor=0.0), 0.05, sweeps=50)
    model = Segmentation(labels, cast(Any, ratio))
    bound = log_joint(model, {}, image, GRID)
    unary = labels(GRID) + ratio.log_ratio(image)

    def joint(each: Tensor) -> Tensor:
        disagreements = (each[1:] != each[:-1]).sum() + (each[:, 1:] != each[:, :-1]).sum()
        return picked(unary, each) - 0.05 * disagreements

    evidence, marginals = by_enumeration(joint)
    assert bound <= evidence + 1e-9
    torch.testing.assert_close(bound, evidence, rtol=0, atol=2e-2)
    torch.testing.assert_close(ratio(labels(GRID), None, labels.coupling).posterior(image), marginals, rtol=0, atol=1e-2)


def test_gradients_move_a_deformed_atlas_to_what_a_network_sees() -> None:
    grid = Grid.from_spacing((16, 16), 2.0)
    x = grid.coordinates(torch.float64)

    def disc(shift_mm: float) -> Tensor:
        inside = torch.sigmoid((8 - (x - torch.tensor([shift_mm, 0.0])).norm(dim=-1)) / 2)
        return torch.stack([1 - inside, inside])

    shares = torch.tensor([0.5, 0.5])
    ratio = LikelihoodRatio(lambda images: torch.cat([-images, images], 1), shares)
    prior = DeformableAtlas(LabelAtlas(NAMES[:2], disc(0.0), grid, brain=()), AffinePrior(2, 3, translation_mm=5.0))
    model = Segmentation(prior, cast(Any, ratio))
    image = (disc(4.0)[1:] - 0.5) * 2
    state = ascend(model, {"affine": torch.zeros(3)}, ["affine"], image, grid, steps=20)
    assert float(state["affine"][0]) == pytest.approx(-4.0, abs=1.0)


def test_ratio_has_no_images_to_draw_and_keeps_its_network_to_itself() -> None:
    network = torch.nn.Conv2d(1, 3, 1)
    model = Segmentation(FixedAtlas(LabelAtlas(NAMES, probabilities(), GRID, brain=())), cast(Any, LikelihoodRatio(network, torch.ones(3) / 3)))
    assert not list(model.parameters())
    trace = poutine.trace(model).get_trace(torch.rand(1, 2, 2), GRID)
    assert torch.isfinite(trace.log_prob_sum())
    with pytest.raises(NotImplementedError, match="no images"):
        model(None, GRID)


def test_bad_input_is_told_in_one_line() -> None:
    def network(images: Tensor) -> Tensor:
        return torch.zeros(1, 3, *images.shape[2:])

    with pytest.raises(ValueError, match="sum to 1"):
        LikelihoodRatio(network, torch.tensor([0.5, 0.4, 0.4]))
    with pytest.raises(ValueError, match="temperature > 0"):
        LikelihoodRatio(network, torch.ones(3) / 3, temperature=0.0)
    ratio = LikelihoodRatio(network, torch.ones(3) / 3)
    with pytest.raises(ValueError, match="no bias field"):
        ratio(probabilities().log(), torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="prior of 3 labels, got 2"):
        ratio(probabilities()[:2].log())
    with pytest.raises(ValueError, match="expected logits of shape"):
        LikelihoodRatio(lambda images: torch.zeros(1, 2, 2, 2), torch.ones(3) / 3).log_ratio(torch.rand(1, 2, 2))
    with pytest.raises(ValueError, match="expected training probabilities"):
        LikelihoodRatio(network, probabilities(0, Grid.from_spacing((3, 3), 1.0))).log_ratio(torch.rand(1, 2, 2))
    with pytest.raises(ValueError, match="sum to 1"):
        NetworkPrior(NAMES, torch.ones(3, 2, 2), GRID)
    with pytest.raises(ValueError, match="expected probabilities of shape"):
        NetworkPrior(NAMES, probabilities()[:2], GRID)


def test_network_prior_is_seen_on_a_part_of_the_voxels() -> None:
    prior, mask = NetworkPrior(NAMES, probabilities(), GRID), torch.tensor([[True, False], [False, True]])
    torch.testing.assert_close(prior(MaskedGrid(GRID, mask)), prior(GRID)[:, mask])
