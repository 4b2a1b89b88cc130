"""Segmentation networks: what they see, what they are trained on, what they say."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from typer.testing import CliRunner

from probmed.appearances import GaussianMixture
from probmed.atlases import LabelAtlas
from probmed.cli import app, train_segmentation
from probmed.field_priors import FlowPrior, SmoothField
from probmed.grids import Grid
from probmed.inference.svi import SCHEDULES
from probmed.inference.training import TrainingSettings
from probmed.metrics import dice, mean_dice, negative_log_likelihood
from probmed.models.one_shot import TransformedScan
from probmed.models.segmentation import Segmentation
from probmed.networks import Convolution3d, VelocityNetwork, sound
from probmed.priors import AffinePrior, DeformableAtlas
from probmed.report import network_page
from probmed.segmentation_networks import NETWORKS, Encoder, ProbabilisticUNet, UNet, VoxelWise, normal
from probmed.volumes import UnusableInput, Volume, read_labels, read_scan, write_labels, write_scan
from probmed.workflows.amortisation import Cohort, read_cohort
from probmed.workflows.cohorts import own_world
from probmed.workflows.patches import in_windows, random_patches
from probmed.workflows.provenance import Provenance
from probmed.workflows.segmenter_runs import ExamplesOf
from probmed.workflows.supervision import (
    SegmenterSettings,
    TrainedSegmenter,
    adversarial,
    amortise,
    best_temperature,
    one_hot,
    soft_dice,
    standardised,
    train_segmenter,
)
from probmed.workflows.supervision_outputs import Labelled
from probmed.workflows.training_sets import Augmentation, completed, drawn_from, intensity_regions, labelled, one_shot, random_contrast
from probmed.workflows.volume_errors import VolumeErrors

GRID = Grid.from_spacing((24, 20), 2.0)


def disc(seed: int, grid: Grid = GRID) -> tuple[Tensor, Tensor]:
    """A disc with a core, somewhere near the middle: image and labels."""
    generator = torch.Generator().manual_seed(seed)
    centre = 3 * torch.randn(grid.ndim, generator=generator)
    radius = (grid.coordinates() - centre).norm(dim=-1)
    size = 9 + 2 * torch.rand((), generator=generator)
    labels = (radius < size).long() + (radius < size / 2).long()
    image = torch.tensor([0.2, 1.0, 0.6])[labels] + 0.05 * torch.randn(grid.shape, generator=generator)
    return image, labels


def cohort(count: int, first: int = 0, grid: Grid = GRID) -> Cohort:
    pairs = [disc(first + n, grid) for n in range(count)]
    images, labels = (torch.stack(each) for each in zip(*pairs, strict=True))
    return Cohort(images[:, None], labels, tuple(map(str, range(count))), (0, 1, 2))


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_give_logits_of_any_shape(name: str, ndim: int) -> None:
    shape = (19, 23, 17)[:ndim]
    network = NETWORKS[name](ndim, 1, 3)
    assert network(torch.randn(2, 1, *shape)).shape == (2, 3, *shape)


@pytest.mark.parametrize(("name", "side"), [("fcn", 17), ("voxelwise", 24), ("deepmedic", 51), ("deepmedic-three", 85)])
def test_a_voxel_sees_as_many_voxels_as_it_should(name: str, side: int) -> None:
    """Along one axis; normalisation over the image is left out, for by it every voxel sees all."""
    torch.manual_seed(0)
    network = NETWORKS[name](2, 1, 2)
    for module in list(network.modules()):
        for child, layer in module.named_children():
            if isinstance(layer, torch.nn.InstanceNorm2d):
                setattr(module, child, torch.nn.Identity())
            if isinstance(layer, torch.nn.ReLU | torch.nn.LeakyReLU):
                setattr(module, child, torch.nn.Identity())
    # 35 and 21 voxels of the coarser pathways, the middle one of each about the middle of the image.
    image = torch.randn(1, 1, 105, 105, requires_grad=True)
    out = network(image)[0, 0, 52, 52]
    (gradient,) = torch.autograd.grad(out, image)
    seen = (gradient[0, 0].abs().sum(0) > 0).nonzero()[:, 0]
    assert int(seen.max() - seen.min()) + 1 == side


def parameters_of(inputs: int, outputs: int, side: int = 3, normalised: bool = True) -> int:
    """Of a convolution in 3D: weights, biases, and where it is normalised a factor and an offset each."""
    return inputs * outputs * side**3 + outputs + (2 * outputs if normalised else 0)


# Of three labels in 3D; pathways of DeepMedic and the FCN begin alike.
PATHWAY = parameters_of(1, 24) + 7 * parameters_of(24, 24)


def deepmedic_head(pathways: int) -> int:
    return parameters_of(24 * pathways, 72, 1) + parameters_of(72, 72, 1) + parameters_of(72, 3, 1, normalised=False)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("fcn", PATHWAY + parameters_of(24, 48, 1) + parameters_of(48, 3, 1, normalised=False)),
        ("deepmedic", 2 * PATHWAY + deepmedic_head(2)),
        ("deepmedic-three", 3 * PATHWAY + deepmedic_head(3)),
        (
            "voxelwise",
            sum(parameters_of(a, b, normalised=False) for a, b in ((1, 16), (16, 16), (16, 32), (32, 32), (32, 64)))
            + parameters_of(64, 3, 1, normalised=False),
        ),
        ("unet", 1438819),
        ("probabilistic-unet", 2315374),
    ],
)
def test_numbers_of_parameters(name: str, count: int) -> None:
    """By the layers' sizes; of the U-Nets, whose body is MONAI's, as it was."""
    assert sum(p.numel() for p in NETWORKS[name](3, 1, 3).parameters()) == count


def test_the_command_s_choices_are_those_that_there_are() -> None:
    assert {choice.value for choice in train_segmentation.Network} == set(NETWORKS)
    assert {choice.value for choice in train_segmentation.Schedule} == set(SCHEDULES)
    assert {choice.value for choice in train_segmentation.Examples} == set(get_args(ExamplesOf))


def test_an_image_at_once_and_patch_after_patch_are_the_same() -> None:
    torch.manual_seed(0)
    network = VoxelWise(2, 1, 3)
    image = torch.randn(1, 1, 30, 28)
    whole = network.patches(image)
    for row, column in ((0, 0), (3, 2), (6, 4)):
        patch = image[:, :, row : row + network.side, column : column + network.side]
        torch.testing.assert_close(network.patches(patch)[0, :, 0, 0], whole[0, :, row, column])


@pytest.mark.parametrize("name", NETWORKS)
def test_two_scans_can_be_learned_by_heart(name: str) -> None:
    data = cohort(2)
    trained = TrainedSegmenter.build(GRID, SegmenterSettings(name), data.codes)
    log = train_segmenter(trained, labelled(data.images, data.labels, GRID, 2), TrainingSettings(60, 1e-2, every=60), validation=data)
    assert log[-1]["dice"] > 0.97


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"voxelwise"}))
def test_two_scans_in_3d_can_be_learned_by_heart(name: str) -> None:
    """But for the voxel-wise network, which has no normalisation and takes hundreds of steps (2D is above)."""
    grid = Grid.from_spacing((16, 14, 12), 2.5)
    data = cohort(2, 3, grid)
    trained = TrainedSegmenter.build(grid, SegmenterSettings(name), data.codes)
    steps = 50 if name in ("fcn", "deepmedic", "deepmedic-three") else 150
    log = train_segmenter(trained, labelled(data.images, data.labels, grid, 2), TrainingSettings(steps, 1e-2, every=steps), validation=data)
    assert log[-1]["dice"] > 0.9


def test_gradients_of_bfloat16_are_right_where_the_first_axis_has_two_voxels() -> None:
    """Of PyTorch's own convolution they are made of memory that nobody wrote, on processors with bfloat16; that memory is made NaN here."""
    torch.manual_seed(0)
    layer, image = Convolution3d(16, 16, 3, padding=1), torch.randn(2, 16, 2, 4, 4)

    def gradient(mixed: bool) -> Tensor:
        freed = [torch.full((size,), math.nan) for size in (64, 512, 2048, 8192, 32768, 131072) for _ in range(4)]
        del freed
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            out = layer(image)
        (found,) = torch.autograd.grad(out.square().sum(), layer.weight)
        return found

    torch.testing.assert_close(gradient(True), gradient(False), rtol=0.02, atol=0.5)


@pytest.mark.parametrize("build", [lambda: UNet(3, 1, 2), lambda: VelocityNetwork(), lambda: Encoder(3, 1, 2)])
def test_every_convolution_of_a_network_in_3d_is_ours(build: Callable[[], torch.nn.Module]) -> None:
    layers = [layer for layer in build().modules() if isinstance(layer, torch.nn.Conv3d)]
    assert layers and all(isinstance(layer, Convolution3d) for layer in layers)


def test_the_weights_are_those_of_the_network_that_is_made_sound() -> None:
    torch.manual_seed(0)
    body = torch.nn.Sequential(torch.nn.Conv3d(2, 4, 3, stride=2, padding=1, bias=False), torch.nn.ReLU(), torch.nn.Conv3d(4, 1, 1))
    image = torch.randn(1, 2, 7, 6, 5)
    before, names = body(image), list(body.state_dict())
    assert torch.equal(sound(body)(image), before) and list(body.state_dict()) == names


def test_parts_of_scans_hold_a_label_each_and_small_ones_as_often() -> None:
    torch.manual_seed(0)
    labels = torch.zeros(1, 30, 20, dtype=torch.long)
    labels[:, 2:4, 2:4] = 1
    labels[:, 20:, :] = 2
    codes = torch.arange(600).reshape(1, 1, 30, 20)
    parts, theirs = random_patches(codes.expand(300, -1, -1, -1), labels.expand(300, -1, -1), (6, 40))
    assert parts.shape == (300, 1, 6, 20) and theirs.shape == (300, 6, 20)
    assert torch.equal(labels.flatten()[parts[:, 0]], theirs)
    assert 0.23 < float((theirs == 1).flatten(1).any(1).float().mean()) < 0.45  # a third, and what background has by chance
    unknown = random_patches(codes.expand(200, -1, -1, -1), -torch.ones_like(labels).expand(200, -1, -1), (6, 5))[0]
    assert len(unknown[:, 0, 0, 0].unique()) > 60  # anywhere


def test_windows_give_what_a_network_of_voxels_gives_at_once() -> None:
    image, seen = torch.randn(1, 1, 21, 17), []

    def network(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return torch.cat([x, x.square()], 1)

    torch.testing.assert_close(in_windows(network, image, (8, 30)), torch.cat([image, image.square()], 1))
    assert sum(shape[0] for shape in seen) == 5 and {tuple(shape[2:]) for shape in seen} == {(8, 17)}  # every fourth row, and the last


def test_a_network_that_has_seen_parts_of_scans_answers_for_whole_ones(tmp_path: Path) -> None:
    """Wherever on a larger grid they are; and whole scans are what is standardised."""
    grid = Grid.from_spacing((40, 36), 2.0)
    data = cohort(6, 0, grid)
    settings = SegmenterSettings("unet", patch=(32,))
    trained = TrainedSegmenter.build(grid, settings, data.codes)
    log = train_segmenter(
        trained, labelled(data.images, data.labels, grid, 3), TrainingSettings(60, 1e-2, every=60), folder=tmp_path, validation=data
    )
    assert log[-1]["dice"] > 0.95
    image, labels = disc(31, grid)
    volume = Volume.from_grid(image, grid)
    found = trained.probabilities(volume)
    assert mean_dice(found.argmax(0), labels, (1, 2)) > 0.93
    read = TrainedSegmenter.load(tmp_path)
    assert read.settings.patch == (32, 32) and torch.equal(read.probabilities(volume), found)
    with pytest.raises(ValueError, match="expected a patch of voxels"):
        SegmenterSettings("probabilistic-unet", patch=(32, 32))
    with pytest.raises(ValueError, match="expected a patch of one length or 2"):
        TrainedSegmenter.build(grid, SegmenterSettings(patch=(32, 32, 32)), data.codes)


@pytest.mark.parametrize(
    "settings",
    [SegmenterSettings("fcn", dropout=0.2, patch=(16, 12)), SegmenterSettings("fcn", adversary=0.1), SegmenterSettings("probabilistic-unet")],
)
def test_a_training_that_was_stopped_goes_on_to_the_same_numbers(settings: SegmenterSettings, tmp_path: Path) -> None:
    data = cohort(3)

    def run(folder: Path, stop: int | None = None) -> TrainedSegmenter:
        folder.mkdir(exist_ok=True)
        trained = TrainedSegmenter.build(GRID, settings, data.codes)
        training = TrainingSettings(6, 1e-2, every=2)

        def tell(row: Any, share: float) -> None:
            if row["step"] == stop:
                raise KeyboardInterrupt

        train_segmenter(trained, labelled(data.images, data.labels, GRID, 2, Augmentation()), training, folder=folder, tell=tell)
        return trained

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 4)
    again = run(tmp_path / "cut")
    for name, module in whole.modules.items():
        there = again.modules[name].state_dict()
        assert all(torch.equal(a, there[key]) for key, a in module.state_dict().items())


def test_soft_dice_of_labels_themselves_is_dice() -> None:
    labels = torch.tensor([[0, 1, 1, 2, 2, 2]])
    found = torch.tensor([[0, 1, 2, 2, 2, 1]])
    p = functional.one_hot(found, 3).mT.float()
    known = torch.ones_like(labels, dtype=torch.bool)
    expected = ((2 * 1 + 1) / (2 + 2 + 1) + (2 * 2 + 1) / (3 + 3 + 1)) / 2
    assert float(soft_dice(p, labels, known)) == pytest.approx(expected)
    known[0, 5] = False
    assert float(soft_dice(p, labels, known)) == pytest.approx(((2 + 1) / (2 + 1 + 1) + (4 + 1) / (3 + 2 + 1)) / 2)


def test_the_temperature_of_overconfident_logits_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20000, 3, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    for factor in (0.5, 1.0, 3.0):
        assert best_temperature(factor * logits, labels) == pytest.approx(factor, rel=0.05)


def test_augmentation_moves_images_and_labels_alike() -> None:
    torch.manual_seed(0)
    labels = disc(0)[1].expand(5, -1, -1)
    images = labels[:, None].float()
    plain = Augmentation(gamma=0.0, bias=0.0, noise=0.0)
    moved, carried = plain(images, labels, GRID)
    assert float((carried.float() - labels).abs().mean()) > 0.01
    seen = ~moved[:, 0].isnan()
    assert bool((carried[~seen] == 0).all())
    apart = (moved[:, 0] - carried)[seen].abs()
    assert float((apart <= 0.51).float().mean()) > 0.97
    assert float(apart.mean()) < 0.12
    same = Augmentation(0.0, 10.0, 0.0, 0.0, 0.0, gamma=0.0, bias=0.0, noise=0.0)(images, labels, GRID)
    torch.testing.assert_close(same[0], images, atol=1e-3, rtol=0)
    assert torch.equal(same[1], labels)


def test_linear_velocities_are_affine_maps() -> None:
    torch.manual_seed(0)
    grown = Augmentation(velocity_mm=0.0, rotation=0.0, translation_mm=0.0, log_scale=0.1).transform(4, GRID)
    points = torch.tensor([[4.0, 0.0], [8.0, 0.0]])
    there = grown(points)
    ratio = (there[:, 1, 0] / there[:, 0, 0]).log()
    torch.testing.assert_close(ratio, torch.full((4,), math.log(2.0)), atol=0.02, rtol=0)
    assert float((there[:, 0, 0] / 4).log().abs().max()) > 0.03


def test_contrasts_are_new_each_time_and_shapes_are_those_of_the_labels() -> None:
    torch.manual_seed(0)
    image, labels = disc(0)
    regions = intensity_regions(image, labels, 3)
    assert set(regions.unique().tolist()) == {0, 1, 2, 4, 5}
    draw = random_contrast(regions[None], labels[None], GRID, 6, Augmentation(0.0, 10.0, 0.0, 0.0, 0.0, gamma=0.0, bias=0.0, noise=0.0))
    images, carried = draw()
    assert torch.equal(carried, labels.expand(6, -1, -1))
    core, ring = (images[:, 0][:, labels == k].mean(1) for k in (2, 1))
    assert bool((core > ring).any()) and bool((core < ring).any())


def test_a_network_that_was_trained_on_random_contrasts_works_on_inverted_scans() -> None:
    image, labels = disc(0)
    regions = intensity_regions(image, labels, 2)
    torch.manual_seed(0)
    trained = TrainedSegmenter.build(GRID, SegmenterSettings("unet"), (0, 1, 2))
    draw = random_contrast(regions[None], labels[None], GRID, 4, Augmentation(velocity_mm=1.0, translation_mm=4.0))
    train_segmenter(trained, draw, TrainingSettings(120, 5e-3, every=120))
    data = cohort(5, 10)
    inverted = Cohort(1.5 - data.images, data.labels, data.names, data.codes)
    assert trained.validation(data)["dice"] > 0.75 and trained.validation(inverted)["dice"] > 0.75


def test_a_generative_model_s_answer_is_amortised() -> None:
    """An atlas of discs whose place and contrast are uncertain; the network has seen no scan, and takes any contrast."""
    d, codes = GRID.ndim, 3
    soft = torch.stack([(disc(seed)[1][None] == torch.arange(codes)[:, None, None]).float() for seed in range(30)]).mean(0)
    atlas = LabelAtlas(("outside", "ring", "core"), soft, GRID, brain=("ring", "core"))
    labels = DeformableAtlas(atlas, AffinePrior(d, translation_mm=2.0, rotation=0.05, log_scale=0.05))
    model = Segmentation(labels, GaussianMixture([1] * codes, location=0.8, certainty=0.05, df=60.0, scale=0.08))
    images, drawn = drawn_from(model, GRID, 4)()
    assert images.shape == (4, 1, *GRID.shape) and drawn.shape == (4, *GRID.shape) and set(drawn.unique().tolist()) <= {0, 1, 2}
    trained = amortise(model, GRID, training=TrainingSettings(150, 5e-3, every=150))
    data = cohort(4, 50)
    for image in (data.images, 1.5 - data.images):
        assert trained.validation(Cohort(image, data.labels, data.names, data.codes))["dice"] > 0.7


def test_draws_of_a_one_shot_model_are_examples() -> None:
    image, labels = disc(0)
    shares = torch.stack([(labels == k).float() for k in range(3)])
    velocity = SmoothField(torch.zeros(2, *GRID.shape), GRID.spacing, 1.0, 8.0, 3.0, "velocity")
    model = TransformedScan(image[None], shares, GRID, FlowPrior(GRID, velocity))
    images, drawn = one_shot([model], 3)()
    assert images.shape == (3, 1, *GRID.shape) and drawn.shape == (3, *GRID.shape)
    assert 0.0 < float((drawn != labels).float().mean()) < 0.2


def test_divergences_are_those_of_normal_distributions() -> None:
    """KL(q ‖ p) of independent normals in nats, written out; log variances stay within ±4."""
    torch.manual_seed(0)
    q, p = torch.randn(2, 4, 6, dtype=torch.float64)
    q[0, 3], p[1, 4] = 9.0, -40.0
    (m, v), (n, w) = ((each[:, :3], 4 * torch.tanh(each[:, 3:] / 4)) for each in (q, p))
    expected = 0.5 * (w - v + ((v - w).exp() + (m - n).square() / w.exp()) - 1).sum(1)
    torch.testing.assert_close(torch.distributions.kl_divergence(normal(q), normal(p)), expected)


def test_a_latent_s_spread_is_held_within_bounds_and_finds_back() -> None:
    """However far its logarithm has run away: beyond a hard bound the divergence would have no slope, and the latent would stay collapsed."""
    log_variance = torch.tensor([[-40.0, -20.0, -9.0, 0.0, 9.0, 20.0, 40.0]], dtype=torch.float64, requires_grad=True)
    q = normal(torch.cat([torch.zeros_like(log_variance), log_variance], 1))
    assert bool((q.stddev >= math.exp(-2)).all() and (q.stddev <= math.exp(2)).all())
    standard = normal(torch.zeros(1, 14, dtype=torch.float64))
    (slope,) = torch.autograd.grad(torch.distributions.kl_divergence(q, standard).sum(), log_variance)
    assert bool((slope[0, :3] < 0).all() and (slope[0, 4:] > 0).all()) and abs(float(slope[0, 3])) < 1e-12


def test_the_divergence_enters_by_and_by() -> None:
    network = ProbabilisticUNet(2, 1, 3, warm_up=4)
    assert [network.divergence_weight() for _ in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    images, truth = torch.randn(2, 1, 20, 18), one_hot(torch.randint(3, (2, 20, 18)), 3)
    logits, divergence = network.fitted(images, truth)
    assert divergence.tolist() == [0.0, 0.0] and torch.equal(logits, network(images)) and torch.equal(network.draw(images), logits)
    for part in (network.prior, network.posterior):
        torch.nn.init.normal_(part.head.weight)
    for numbers in network.head[-1].parameters():
        torch.nn.init.normal_(numbers)
    logits, divergence = network.fitted(images, truth)
    assert float((logits - network.draw(images)).detach().abs().max()) > 0.01
    assert logits.shape == (2, 3, 20, 18) and divergence.shape == (2,) and bool((divergence > 0).all())
    for part in (network.prior, network.posterior):
        assert any(float(g.abs().max()) > 0 for g in torch.autograd.grad(divergence.sum(), list(part.parameters()), retain_graph=True))


def test_a_probabilistic_unet_s_loss_is_a_bound_of_the_evidence() -> None:
    """A voxel's share of −log p(S | z, I) + KL: what the loss adds to the cross-entropy is KL over the voxels that are known."""
    data = cohort(2)
    labels = data.labels.clone()
    labels[:, :5] = -1
    trained = TrainedSegmenter.build(GRID, SegmenterSettings("probabilistic-unet"), data.codes)
    assert isinstance(trained.network, ProbabilisticUNet)
    trained.network.warm_up = 1
    torch.manual_seed(0)
    value = trained.loss((data.images, labels))
    torch.manual_seed(0)
    image = (data.images - data.images.mean((1, 2, 3), keepdim=True)) / data.images.std((1, 2, 3), correction=0, keepdim=True)
    logits, divergence = trained.network.fitted(image, one_hot(labels, 3))
    nats = functional.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") + divergence.sum()
    torch.testing.assert_close(value, nats / (labels >= 0).sum())


@pytest.mark.slow
def test_a_probabilistic_unet_draws_both_answers_where_raters_differ() -> None:
    """Half the raters see a disc and half see none of it: draws are one or the other, all of a piece, about as often."""
    image, labels = disc(0)
    both = torch.stack([labels, torch.zeros_like(labels)])
    trained = TrainedSegmenter.build(GRID, SegmenterSettings("probabilistic-unet"), (0, 1, 2))
    assert isinstance(trained.network, ProbabilisticUNet)
    trained.network.warm_up = 100
    images = image.expand(2, 1, *GRID.shape)
    train_segmenter(trained, lambda: (images, both), TrainingSettings(600, 3e-3, every=600))
    with torch.no_grad():
        _, divergence = trained.network.fitted(standardised(images), one_hot(both, 3))
    assert 0.4 < float(divergence.mean()) < 4  # which of two answers it is: log 2; next to nothing would be a collapse
    draws = trained.probabilities(Volume.from_grid(image, GRID), passes=60)
    share = draws.argmax(1)[:, labels > 0].gt(0).float().mean(1)
    assert float(((share < 0.1) | (share > 0.9)).float().mean()) > 0.8
    assert 0.25 < float((share > 0.5).float().mean()) < 0.75


def test_what_an_encoder_says_does_not_grow_with_its_features() -> None:
    """Else a discriminator's slopes, and the latents of a probabilistic U-Net, run away while it trains."""
    torch.manual_seed(0)
    encoder, images = Encoder(2, 1, 4), torch.randn(3, 1, 40, 40)
    layer = encoder.head
    with torch.no_grad():
        for p in encoder.body.parameters():
            p.mul_(10)
        # 64 features of mean 0 and variance 1 are 8 long.
        assert bool((encoder(images).abs() <= 8 * layer.weight.norm(dim=1) + layer.bias.abs() + 1e-5).all())


@pytest.mark.parametrize("name", NETWORKS)
def test_mixed_precision_gives_what_full_precision_does_but_for_rounding(name: str, tmp_path: Path) -> None:
    data = cohort(2)
    exact, rounded = (TrainedSegmenter.build(GRID, SegmenterSettings(name, mixed_precision=mixed), data.codes) for mixed in (False, True))
    volume = Volume.from_grid(data.images[0, 0], GRID)
    for trained in (exact, rounded):
        # No latent is drawn twice alike unless the seed is.
        torch.manual_seed(0)
        trained.loss((data.images, data.labels)).backward()  # type: ignore[no-untyped-call]
    whole, near = (torch.cat([p.grad.flatten() for p in trained.network.parameters() if p.grad is not None]) for trained in (exact, rounded))
    assert near.dtype == torch.float32 and not torch.equal(whole, near)
    assert (near - whole).norm() < 0.2 * whole.norm()  # ten layers of eight bits each
    p, q = exact.probabilities(volume), rounded.probabilities(volume)
    assert q.dtype == torch.float32 and 0 < float((p - q).abs().max()) < 0.05
    rounded.save(tmp_path)
    assert torch.equal(TrainedSegmenter.load(tmp_path).probabilities(volume), q)


def test_neither_adversary_moves_the_other() -> None:
    torch.manual_seed(0)
    discriminator = Encoder(2, 3, 1).double()
    found, truth = torch.randn(2, 4, 3, 20, 18, dtype=torch.float64).softmax(2)
    found.requires_grad_()
    parameters = list(discriminator.parameters())
    value = adversarial(discriminator, found, truth, 0.3)
    ours, *theirs = torch.autograd.grad(value, [found, *parameters])
    (alone,) = torch.autograd.grad(-0.3 * functional.logsigmoid(discriminator(found)).mean(), found)
    torch.testing.assert_close(ours, alone)
    told = functional.binary_cross_entropy_with_logits
    scores = torch.cat([discriminator(truth), discriminator(found)])
    apart = 2 * told(scores, torch.tensor([1.0] * 4 + [0.0] * 4, dtype=torch.float64)[:, None])
    for a, b in zip(theirs, torch.autograd.grad(apart, parameters), strict=True):
        torch.testing.assert_close(a, b)


def test_an_adversary_is_of_the_training_alone(tmp_path: Path) -> None:
    data = cohort(2)
    trained = TrainedSegmenter.build(GRID, SegmenterSettings("unet", adversary=0.05), data.codes)
    plain = TrainedSegmenter.build(GRID, SegmenterSettings("unet"), data.codes)
    assert all(torch.equal(a, b) for a, b in zip(trained.network.parameters(), plain.network.parameters(), strict=True))
    examples = labelled(data.images, data.labels, GRID, 2)
    log = train_segmenter(trained, examples, TrainingSettings(60, 1e-2, every=60), folder=tmp_path, validation=data)
    assert log[-1]["dice"] > 0.97
    volume = Volume.from_grid(data.images[0, 0], GRID)
    assert torch.equal(TrainedSegmenter.load(tmp_path).probabilities(volume), trained.probabilities(volume))
    with pytest.raises(ValueError, match="adversary >= 0"):
        SegmenterSettings(adversary=-1.0)


def test_networks_of_before_there_were_adversaries_another_precision_and_patches_are_read(tmp_path: Path) -> None:
    trained = TrainedSegmenter.build(GRID, SegmenterSettings("fcn"), (0, 1))
    trained.save(tmp_path)
    described = json.loads((tmp_path / "network.json").read_text())
    del described["adversary"], described["mixed_precision"], described["patch"]
    (tmp_path / "network.json").write_text(json.dumps(described))
    assert TrainedSegmenter.load(tmp_path).settings == trained.settings


def test_scans_without_labels_get_those_that_are_given() -> None:
    """On voxels of their own, in a cohort's codes; the labels that there are stay."""
    data = replace(cohort(4), codes=(0, 7, 14))
    whole, codes = data.labels.clone(), torch.tensor(data.codes)
    data.labels[[1, 3]] = -1
    given = [Volume.from_grid(codes[whole[n]], GRID) for n in (1, 3)]
    middle = own_world(GRID).inverse().matrix
    grid = Grid(GRID.shape, middle @ GRID.affine)
    assert torch.equal(completed(data, given, grid).labels, whole)
    assert bool((data.labels[1] == -1).all())


def trained_on_discs(dropout: float = 0.0) -> TrainedSegmenter:
    data = cohort(6)
    trained = TrainedSegmenter.build(GRID, SegmenterSettings("unet", dropout), data.codes, {1: "ring", 2: "core"})
    train_segmenter(trained, labelled(data.images, data.labels, GRID, 3), TrainingSettings(60, 1e-2, every=60), validation=cohort(3, 20))
    return trained


def test_results_are_on_the_scan_s_own_voxels_whatever_its_header() -> None:
    trained = trained_on_discs()
    image, labels = disc(30)
    plain = trained.probabilities(Volume.from_grid(image, GRID))
    assert float((plain.argmax(0) == labels).float().mean()) > 0.95
    torch.testing.assert_close(plain.sum(0), torch.ones(GRID.shape))
    flipped = Grid(GRID.shape, GRID.affine @ torch.diag(torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64)))
    other = trained.probabilities(Volume.from_grid(image.flip(0), flipped)).flip(1)
    torch.testing.assert_close(other, plain, atol=1e-4, rtol=0)
    with pytest.raises(UnusableInput, match="has 3 axes, and the network takes 2"):
        trained.probabilities(Volume.from_grid(torch.zeros(4, 4, 4), Grid.from_spacing((4, 4, 4), 1.0)))


def test_dropout_at_prediction_spreads_and_leaves_the_mean_alone() -> None:
    trained = trained_on_discs(0.3)
    volume = Volume.from_grid(disc(31)[0], GRID)
    passes = trained.probabilities(volume, passes=8)
    assert passes.shape == (8, 3, *GRID.shape)
    assert float(passes.std(0).max()) > 0.01
    assert torch.equal(passes, trained.probabilities(volume, passes=8))
    assert torch.equal(trained.probabilities(volume), trained.probabilities(volume))
    with pytest.raises(ValueError, match="trained with dropout"):
        trained_on_discs().probabilities(volume, passes=2)


def test_a_network_in_a_folder_says_the_same(tmp_path: Path) -> None:
    trained = trained_on_discs()
    volume = Volume.from_grid(disc(32)[0], GRID)
    data, generator = cohort(4), torch.Generator().manual_seed(0)
    odd = torch.randint(3, data.labels.shape, generator=generator)
    data = replace(data, labels=torch.where(torch.rand(data.labels.shape, generator=generator) < 0.1, odd, data.labels))
    trained.calibrate(data)
    p = (trained.logits(data.images).detach() / trained.temperature).softmax(1).flatten(2).sum(2)
    true = torch.stack([labels.flatten().bincount(minlength=3) for labels in data.labels])
    known = VolumeErrors.of(p[:, 1:], true[:, 1:])
    assert known is not None and trained.volume_errors is not None
    torch.testing.assert_close(torch.tensor(known.rows), torch.tensor(trained.volume_errors.rows), rtol=1e-3, atol=1e-5)
    trained.save(tmp_path)
    again = TrainedSegmenter.load(tmp_path)
    assert again.names == {1: "ring", 2: "core"} and again.temperature == trained.temperature
    assert again.volume_errors == trained.volume_errors
    assert torch.equal(again.probabilities(volume), trained.probabilities(volume))


def faults_of(folder: Path) -> str:
    """The line about a folder that holds no network that can be used."""
    with pytest.raises(UnusableInput) as refused:
        TrainedSegmenter.load(folder)
    line = str(refused.value)
    assert len(line.removeprefix(str(folder))) < 300 and "\n" not in line
    return line


def test_networks_that_cannot_be_used_get_one_line_about_the_file(tmp_path: Path) -> None:
    """Of another system, another version, another network, without what describes it, or cut off."""
    path, weights = tmp_path / "network.json", tmp_path / "network.safetensors"
    assert f"{tmp_path}: holds no segmentation network" in faults_of(tmp_path)
    for fold in ("fold-a", "fold-b"):
        (tmp_path / fold).mkdir()
        TrainedSegmenter.build(GRID, SegmenterSettings("fcn"), (0, 1)).save(tmp_path / fold)
    assert "give those inside it, one or several: fold-a, fold-b" in faults_of(tmp_path)
    TrainedSegmenter.build(GRID, SegmenterSettings("fcn"), (0, 1, 2)).save(tmp_path)
    described = json.loads(path.read_text())
    whole = weights.read_bytes()
    assert described["format"] == 1
    path.write_text(json.dumps({**described, "format": 2, "probmed": "9.1"}))
    assert f"{path}: has format 2 of probmed 9.1, and probmed" in faults_of(tmp_path)
    changes: dict[str, Any] = {
        "is of a network for registration, not segmentation": {**described, "system": "registration"},
        "expected a network of": {**described, "network": "transformer"},
        "lacks 'codes' of a segmentation network": {key: value for key, value in described.items() if key != "codes"},
        "describes no network": [1, 2],
        "describes no segmentation network": {**described, "shape": "large"},
        "describes no segmentation network (expected the background": {**described, "codes": [1, 2]},
    }
    for fault, other in changes.items():
        path.write_text(json.dumps(other))
        line = faults_of(tmp_path)
        assert line.startswith(f"{path}: ") and fault in line
    path.write_text("{")
    assert f"{path}: is no JSON" in faults_of(tmp_path)
    path.write_text(json.dumps({**described, "network": "deepmedic"}))
    assert f"{weights}: has weights of another network" in faults_of(tmp_path)
    path.write_text(json.dumps({**described, "codes": [0, 1]}))
    assert "expected (2, 48, 1, 1), got (3, 48, 1, 1)" in faults_of(tmp_path) or "expected (2,), got (3,)" in faults_of(tmp_path)
    del described["format"]  # of before there was one
    path.write_text(json.dumps(described))
    assert TrainedSegmenter.load(tmp_path).codes == (0, 1, 2)
    for size in (len(whole) - 7, 1000, 3, 0):
        weights.write_bytes(whole[:size])
        assert f"{weights}: is no file of weights that can be read" in faults_of(tmp_path)
    weights.unlink()
    assert f"{weights}: is no file of weights that can be read" in faults_of(tmp_path)


def test_a_label_that_validation_scans_lack_is_no_failure() -> None:
    """Dice is of the labels that a scan has or is given; a scan without any says nothing of it."""
    trained, data = trained_on_discs(), cohort(3, 70)
    whole = trained.validation(data)
    some = replace(data, labels=torch.stack([data.labels[0].clamp(max=1), data.labels[1], -torch.ones_like(data.labels[2])]))
    some.labels[2, :2] = 0  # known at the edge alone, where nothing is
    found = trained.validation(some)
    assert 0.4 < found["dice"] < whole["dice"] and math.isfinite(found["nll"])
    trained.calibrate(replace(data, labels=data.labels.clamp(max=1)))
    assert math.isfinite(trained.temperature) and trained.volume_errors is None
    nothing = replace(some, images=some.images[2:], labels=some.labels[2:])
    assert math.isnan(trained.validation(nothing)["dice"])


def write_table(folder: Path, count: int, name: str = "scans.tsv") -> Path:
    rows = []
    for number in range(count):
        image, labels = disc(number)
        volume = Volume.from_grid(image, GRID)
        write_scan(folder / f"s{number}.nii.gz", image, volume)
        write_labels(folder / f"s{number}_dseg.nii.gz", 7 * labels, volume)
        rows.append({"scan": f"s{number}.nii.gz", "labels": f"s{number}_dseg.nii.gz"})
    pd.DataFrame(rows).to_csv(folder / name, sep="\t", index=False)
    return folder / name


def test_codes_of_a_table_are_those_of_its_label_maps(tmp_path: Path) -> None:
    path = write_table(tmp_path, 3)
    data, grid = read_cohort(pd.read_csv(path, sep="\t"), path)
    assert data.codes == (0, 7, 14) and grid.shape == GRID.shape
    with pytest.raises(ValueError, match="expected the background and one label or more"):
        TrainedSegmenter.build(grid, SegmenterSettings(), (0,))
    with pytest.raises(ValueError, match="expected a network of"):
        SegmenterSettings("transformer")


def said(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return " ".join((result.stdout if code == 0 else result.stderr).split())


def test_from_a_table_to_labels_on_the_command_line(tmp_path: Path) -> None:
    path = write_table(tmp_path, 5)
    table = pd.read_csv(path, sep="\t").assign(fold=[1, 1, 2, 2, 2])
    table.to_csv(path, sep="\t", index=False)
    pd.DataFrame({"index": [7, 14], "name": ["ring", "core"]}).to_csv(tmp_path / "s2_dseg.tsv", sep="\t", index=False)
    (tmp_path / "names.json").write_text('{"14": "the core"}')
    options = ["train", "segmentation", "--data", str(path), "--steps", "40", "--learning-rate", "0.01", "--every", "40", "--device", "cpu"]
    run = tmp_path / "run"
    assert "40 steps, loss" in said(*options, "-o", str(run), "--fold", "1", "--names", str(tmp_path / "names.json"), "--no-augment")
    again = said(*options, "-o", str(run), code=2)
    assert "holds a run already" in again
    out = said("segment", str(tmp_path / "s0.nii.gz"), "--model", str(run), "-o", str(tmp_path / "out"))
    assert "ring" in out and "the core" in out
    labels = read_labels(tmp_path / "out" / "s0_dseg.nii.gz").data
    assert float((labels == 7 * disc(0)[1]).float().mean()) > 0.9
    p = [read_scan(tmp_path / "out" / f"s0_label-{name}_probseg.nii.gz").data for name in ("ring", "thecore")]
    volumes = pd.read_csv(tmp_path / "out" / "s0_volumes.tsv", sep="\t")
    assert volumes["volume_ml"].tolist() == pytest.approx([float(x.sum()) * 4e-3 for x in p], rel=1e-3)
    assert volumes["q025"].isna().all()  # two validation scans are too few to learn errors from
    page = (tmp_path / "out" / "s0_report.html").read_text(encoding="utf-8")
    assert page.count("data:image") >= 2 and "One answer alone has no intervals" in page and "the core" in page
    described = json.loads((run / "network.json").read_text())
    assert described["volume_errors"] is None
    described["volume_errors"] = [[0.1, 0.05, 9], [-0.1, 0.05, 9]]
    (run / "network.json").write_text(json.dumps(described))
    said("segment", str(tmp_path / "s0.nii.gz"), "--model", str(run), "-o", str(tmp_path / "errors"))
    corrected = pd.read_csv(tmp_path / "errors" / "s0_volumes.tsv", sep="\t")
    assert (corrected["volume_ml"] / volumes["volume_ml"]).tolist() == pytest.approx([math.exp(0.1), math.exp(-0.1)], rel=1e-3)
    assert (corrected["q025"] < corrected["volume_ml"]).all() and (corrected["volume_ml"] < corrected["q975"]).all()
    assert "from the errors of volumes on validation scans" in (tmp_path / "errors" / "s0_report.html").read_text(encoding="utf-8")
    dropped = tmp_path / "dropped"
    parts = ("--dropout", "0.3", "--patch", "16,12")
    said(*options, "-o", str(dropped), *parts, "--examples", "contrasts", "--names", str(tmp_path / "names.json"))
    drawn = tmp_path / "drawn"
    latent = ("--network", "probabilistic-unet", "--adversary", "0.05", "--mixed-precision")
    said(*options, "-o", str(drawn), *latent, "--names", str(tmp_path / "names.json"))
    for run in (dropped, drawn):
        asked = ("segment", str(tmp_path / "s0.nii.gz"), "--model", str(run), "--draws", "4", "-o", str(tmp_path / run.name / "out"))
        for _ in range(2):  # what a run has written the next one may replace
            said(*asked)
        volumes = pd.read_csv(tmp_path / run.name / "out" / "s0_volumes.tsv", sep="\t")
        assert (volumes["q025"] < volumes["q975"]).all()


def test_patches_that_cannot_be_are_refused_in_one_line(tmp_path: Path) -> None:
    options = ("train", "segmentation", "--data", str(write_table(tmp_path, 2)), "-o", str(tmp_path / "run"), "--device", "cpu", "--patch")
    for text in ("16,", "a", "0", "-3", ""):
        assert "expected voxels such as 64 or 32,48,32" in said(*options, text, code=2)
    assert "leave out --patch" in said(*options, "16", "--network", "probabilistic-unet", code=2)
    assert "has scans of 2 axes, and the patch 3 lengths" in said(*options, "8,8,8", code=2)
    assert not (tmp_path / "run").exists()


def test_entropy_is_that_of_the_mean_of_several_answers_on_the_scan_s_own_voxels(tmp_path: Path) -> None:
    """Nats; of an ensemble, on a grid that is neither the networks' nor upright."""
    runs = []
    for seed in (0, 1):
        trained = TrainedSegmenter.build(GRID, SegmenterSettings("fcn"), (0, 7, 14), seed=seed)
        runs.append(tmp_path / f"run{seed}")
        runs[-1].mkdir()
        trained.save(runs[-1])
    turn = torch.tensor([[0.0, -1.5, 0.0, 3.0], [2.0, 0.0, 0.0, -8.0], [0.0, 0.0, 1.0, 5.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    grid = Grid((21, 26), turn[[0, 1, 3]][:, [0, 1, 3]])
    scan = Volume.from_grid(torch.rand(grid.shape, generator=torch.Generator().manual_seed(0)), grid)
    write_scan(tmp_path / "scan.nii.gz", scan.data, scan)
    (tmp_path / "out").mkdir()
    for old in ("scan_label-old_probseg.nii.gz", "scan_label-other_probseg.nii.gz"):
        write_scan(tmp_path / "out" / old, scan.data, scan)
    (tmp_path / "out" / "scan_label-old_probseg.json").write_text('{"GeneratedBy": [{"Name": "probmed"}]}')
    said("segment", str(tmp_path / "scan.nii.gz"), *(word for run in runs for word in ("--model", str(run))), "-o", str(tmp_path / "out"))
    written = read_scan(tmp_path / "scan.nii.gz")
    p = torch.stack([TrainedSegmenter.load(run).probabilities(written) for run in runs]).mean(0)
    found = read_scan(tmp_path / "out" / "scan_desc-entropy.nii.gz")
    assert found.shape == grid.shape and torch.equal(found.grid.affine, written.grid.affine)
    torch.testing.assert_close(found.data, -(p * p.log()).sum(0), atol=1e-5, rtol=1e-4)
    described = json.loads((tmp_path / "out" / "scan_desc-entropy.json").read_text())
    assert described["Units"] == "nats" and described["Answers"] == 2
    for code, name in ((1, "7"), (2, "14")):
        shares = read_scan(tmp_path / "out" / f"scan_label-{name}_probseg.nii.gz").data
        torch.testing.assert_close(shares, p[code], atol=1e-5, rtol=1e-4)
    # An earlier probmed run's probabilities of labels that are no more go, and nobody else's do.
    assert not list((tmp_path / "out").glob("scan_label-old_*")) and (tmp_path / "out" / "scan_label-other_probseg.nii.gz").exists()


def test_an_ensemble_is_surer_of_the_truth_than_its_members_are_on_the_mean() -> None:
    """By Jensen's inequality, −log of the mean probability is at most the mean of −log p; equal only where members agree."""
    data = cohort(4)
    members = []
    for seed in (0, 1, 2):
        trained = TrainedSegmenter.build(GRID, SegmenterSettings("fcn"), data.codes, seed=seed)
        train_segmenter(trained, labelled(data.images, data.labels, GRID, 2), TrainingSettings(15, 1e-2, seed=seed, every=15))
        members.append(trained)
    image, labels = disc(40)
    volume = Volume.from_grid(image, GRID)
    answers = torch.stack([member.probabilities(volume) for member in members])
    together = Labelled(volume, {1: "ring", 2: "core"}, answers)
    each = [negative_log_likelihood(p, labels) for p in answers]
    assert negative_log_likelihood(together.probabilities, labels) < sum(each) / 3 - 1e-3
    assert torch.equal(together.labels, answers.mean(0).argmax(0))
    assert bool((together.entropy + 1e-6 >= torch.stack([torch.special.entr(p).sum(0) for p in answers]).mean(0)).all())
    ring = together.volumes.iloc[0]
    spread = answers[:, 1].double().sum((1, 2)) * 4e-3
    assert ring["volume_ml"] == pytest.approx(float(spread.mean()), rel=1e-5) and ring["sd_ml"] >= 0.9 * float(spread.std(correction=0))


def test_a_temperature_makes_labels_more_probable_and_changes_none() -> None:
    """Of scans some of whose labels are wrong, as no training scan's were."""
    trained, held, generator = trained_on_discs(), cohort(6, 60), torch.Generator().manual_seed(0)
    wrong = torch.rand(held.labels.shape, generator=generator) < 0.05
    noisy = replace(held, labels=torch.where(wrong, torch.randint(3, held.labels.shape, generator=generator), held.labels))
    volume = Volume.from_grid(noisy.images[0, 0], GRID)
    trained.temperature = 1.0
    before = trained.probabilities(volume)

    def nats() -> float:
        with torch.no_grad():
            return float(functional.cross_entropy(trained.logits(noisy.images) / trained.temperature, noisy.labels))

    plain = nats()
    assert trained.calibrate(noisy) > 1.05
    assert nats() < plain - 1e-3
    after = trained.probabilities(volume)
    assert torch.equal(before.argmax(0), after.argmax(0)) and float(after.max(0).values.mean()) < float(before.max(0).values.mean())
    best, lowest = trained.temperature, nats()
    for factor in (0.97, 1.03):
        trained.temperature = factor * best
        assert nats() > lowest


def test_volumes_vary_with_draws_and_with_the_labels_that_a_draw_leaves_open() -> None:
    """Var V = Var E(V | draw) + E Σ p (1 − p), in ml; one answer alone has no interval."""
    generator = torch.Generator().manual_seed(0)
    size = 0.5 + 0.1 * torch.randn(4000, 1, 1, 1, generator=generator)
    p = torch.cat([1 - size, size], 1).expand(-1, 2, *GRID.shape).clamp(0, 1)
    scan = Volume.from_grid(torch.zeros(GRID.shape), GRID)
    table, voxels = Labelled(scan, {7: "ring"}, p).volumes, GRID.numel
    row = table.iloc[0]
    sd = math.sqrt((0.1 * voxels) ** 2 + voxels * (0.25 - 0.01)) * 4e-3
    assert row["volume_ml"] == pytest.approx(0.5 * voxels * 4e-3, rel=0.01)
    assert row["q975"] - row["q025"] == pytest.approx(2 * 1.96 * sd, rel=0.05)
    same = Labelled(scan, {7: "ring"}, torch.full((4000, 2, *GRID.shape), 0.5)).volumes.iloc[0]
    assert same["q975"] - same["q025"] == pytest.approx(2 * 1.96 * math.sqrt(0.25 * voxels) * 4e-3, rel=0.05)
    assert math.isnan(Labelled(scan, {7: "ring"}, p[:1]).volumes.iloc[0]["q025"])


def test_volumes_have_the_errors_that_they_had_on_validation_scans() -> None:
    """Of one answer alone; of two with errors of their own, the mixture."""
    scan = Volume.from_grid(torch.zeros(GRID.shape), GRID)
    p = torch.full((2, 2, *GRID.shape), 0.5)
    small, large = VolumeErrors((0.0,), (1e-6,), (9,)), VolumeErrors((math.log(1.2),), (0.1,), (9,))
    half = 0.5 * GRID.numel * 4e-3
    row = Labelled(scan, {7: "ring"}, p[:1], [large]).volumes.iloc[0]
    assert row["volume_ml"] == pytest.approx(1.2 * half)
    assert math.log(row["q975"] / row["q025"]) == pytest.approx(2 * 2.306 * 0.1 * math.sqrt(10 / 9), rel=0.1)
    both = Labelled(scan, {7: "ring"}, p, [small, large]).volumes.iloc[0]
    assert both["volume_ml"] == pytest.approx(1.1 * half) and both["q250"] == pytest.approx(half, rel=1e-3) and both["q900"] > 1.2 * half


def test_a_scan_without_any_label_has_a_report() -> None:
    scan = Volume.from_grid(torch.rand(GRID.shape), GRID)
    nothing = torch.zeros(1, 3, *GRID.shape)
    nothing[:, 0] = 1
    page = network_page(Labelled(scan, {7: "ring", 14: "core"}, nothing), Provenance.of("probmed", 0, [], []), "s")
    assert "ring" in page and page.count("data:image") >= 2


@pytest.mark.slow
@pytest.mark.parametrize(("sign", "read"), [(1.0, False), (-1.0, False), (1.0, True)])
def test_shapes_are_learned_from_label_maps_and_segment_scans_on_the_command_line(sign: float, read: bool, tmp_path: Path) -> None:
    """Of either contrast, where no scan is seen in training; and with a reader of shapes that was trained on scans without labels."""
    path = write_table(tmp_path, 12)
    whole = pd.read_csv(path, sep="\t")
    table = whole.drop(columns="scan").assign(fold=[1, 1, *[2] * 10])
    table.to_csv(path, sep="\t", index=False)
    whole[["scan"]].iloc[:8].to_csv(tmp_path / "unlabelled.tsv", sep="\t", index=False)
    (tmp_path / "names.json").write_text('{"7": "ring", "14": "the core"}')
    run = tmp_path / "run"
    options = ["train", "shapes", "--data", str(path), "--names", str(tmp_path / "names.json"), "-o", str(run), "--steps", "200", "--codes", "4"]
    options += ["--scans", str(tmp_path / "unlabelled.tsv"), "--reader-steps", "30"] if read else []
    assert "of those left out" in said(*options, "--fold", "1")
    assert "holds a run already" in said(*options, code=2)
    image, labels = disc(30)
    write_scan(tmp_path / "new.nii.gz", 2 + sign * image, Volume.from_grid(image, GRID))
    out = said("segment", str(tmp_path / "new.nii.gz"), "--model", str(run), "--draws", "8", "-o", str(tmp_path / "out"))
    assert "ring" in out and "the core" in out
    found = read_labels(tmp_path / "out" / "new_dseg.nii.gz").data
    assert float((found == 7 * labels).float().mean()) > 0.95
    volumes = pd.read_csv(tmp_path / "out" / "new_volumes.tsv", sep="\t")
    assert (volumes["q025"] < volumes["q975"]).all()
    refused = said("segment", str(tmp_path / "new.nii.gz"), "--model", str(tmp_path), "-o", str(tmp_path / "no"), code=2)
    assert "holds no segmentation network" in refused


@pytest.mark.slow
@pytest.mark.parametrize("examples", ["one-shot", "carried"])
def test_one_labelled_scan_and_others_without_labels(examples: str, tmp_path: Path) -> None:
    """By transforms that are learned from the others, or labels that are carried; more is labelled right than by the labels as they are."""
    path = write_table(tmp_path, 6)
    table = pd.read_csv(path, sep="\t")
    table["labels"] = table["labels"].where(table.index == 0)
    table.to_csv(path, sep="\t", index=False, na_rep="n/a")
    options = ["train", "segmentation", "--data", str(path), "--examples", examples, "-o", str(tmp_path / "run"), "--device", "cpu"]
    said(*options, "--steps", "150", "--learning-rate", "0.005", "--every", "150")
    assert len(list((tmp_path / "run" / "registrations").iterdir())) == 5
    trained = TrainedSegmenter.load(tmp_path / "run")
    assert trained.codes == (0, 7, 14)
    right, copied = [], []
    for number in range(40, 45):
        image, labels = disc(number)
        found = trained.probabilities(Volume.from_grid(image, GRID)).argmax(0)
        right.append(float((found == labels).float().mean()))
        copied.append(float((disc(0)[1] == labels).float().mean()))
    assert min(right) > 0.9 and sum(right) > sum(copied) + 0.4
    two = pd.read_csv(write_table(tmp_path, 3, "all.tsv"), sep="\t")
    two.to_csv(tmp_path / "all.tsv", sep="\t", index=False)
    line = said("train", "segmentation", "--data", str(tmp_path / "all.tsv"), "--examples", examples, "-o", str(tmp_path / "no"), code=2)
    assert "has 3 scans with labels and 0 without" in line


@pytest.mark.slow
def test_every_scan_is_scored_by_a_network_that_has_not_seen_it(tmp_path: Path) -> None:
    path = write_table(tmp_path, 6)
    table = pd.read_csv(path, sep="\t").assign(fold=["a", "a", "b", "b", "c", "c"])
    table.to_csv(path, sep="\t", index=False)
    options = ["train", "segmentation", "--data", str(path), "--cross-validate", "--steps", "60", "--learning-rate", "0.01", "--device", "cpu"]
    out = said(*options, "-o", str(tmp_path / "runs"))
    scores = pd.read_csv(tmp_path / "runs" / "cross-validation.tsv", sep="\t")
    assert dict(zip(scores["scan"], scores["fold"], strict=True)) == dict(zip(table["scan"], table["fold"], strict=True))
    assert len(scores) == 12 and scores["dice"].min() > 0.8 and "Dice of scans that training did not see" in out
    # What stands there is of the network of the scan's own fold.
    row = scores[(scores["scan"] == "s3.nii.gz") & (scores["index"] == 7)].iloc[0]
    trained = TrainedSegmenter.load(tmp_path / "runs" / "fold-b")
    found = torch.tensor(trained.codes)[trained.probabilities(read_scan(tmp_path / "s3.nii.gz")).argmax(0)]
    assert row["dice"] == pytest.approx(dice(found == 7, read_labels(tmp_path / table["labels"][3]).data == 7))
    # A run whose later folds are missing goes on; one that is there is not replaced.
    assert "holds a run already" in said(*options, "-o", str(tmp_path / "runs"), code=2)
    shutil.rmtree(tmp_path / "runs" / "fold-c")
    said(*options, "-o", str(tmp_path / "runs"), "--resume")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "runs" / "cross-validation.tsv", sep="\t"), scores)


def test_shapes_that_cannot_be_trained_or_used_get_one_line(tmp_path: Path) -> None:
    path = write_table(tmp_path, 3)
    table = pd.read_csv(path, sep="\t")
    options = ["train", "shapes", "--data", str(path), "-o", str(tmp_path / "run"), "--steps", "2"]
    refused = {
        "has no column 'labels'": table[["scan"]],
        "gone.nii.gz: does not exist": table.assign(labels=[*table["labels"][:2], "gone.nii.gz"]),
        "has no rows": table.assign(labels="n/a"),
    }
    for fault, rows in refused.items():
        rows.to_csv(path, sep="\t", index=False)
        assert fault in said(*options, code=2)
    table.assign(fold=["a", "a", "b"]).to_csv(path, sep="\t", index=False)
    assert "no scans of fold c" in said(*options, "--fold", "c", code=2)
    write_labels(tmp_path / table["labels"][2], torch.full(GRID.shape, 3), Volume.from_grid(torch.zeros(GRID.shape), GRID))
    assert "has the label 3, which training has not seen" in said(*options, "--fold", "b", code=2)
    assert not (tmp_path / "run").exists()
    said(*options, "--quiet")
    weights = tmp_path / "run" / "shapes.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    line = said("segment", str(tmp_path / "s0.nii.gz"), "--model", str(tmp_path / "run"), "-o", str(tmp_path / "out"), code=2)
    assert "is no file of weights that can be read" in line and not (tmp_path / "out").exists()


def test_what_cannot_be_cross_validated_gets_one_line(tmp_path: Path) -> None:
    path = write_table(tmp_path, 3)
    table = pd.read_csv(path, sep="\t")
    options = ["train", "segmentation", "--data", str(path), "--cross-validate", "-o", str(tmp_path / "runs")]
    assert "has no column 'fold'" in said(*options, code=2)
    refused = {"a b n/a": "without a fold", "a a a": "only scans of fold a", "a ../b a": "cannot name a folder"}
    for folds, fault in refused.items():
        table.assign(fold=folds.split()).to_csv(path, sep="\t", index=False, na_rep="n/a")
        assert fault in said(*options, code=2)
    table.assign(fold=["a", "b", "b"], labels=["n/a", *table["labels"][1:]]).to_csv(path, sep="\t", index=False, na_rep="n/a")
    assert "scans of fold a without labels" in said(*options, code=2)
    assert "leave out --cross-validate" in said(*options, "--examples", "carried", code=2)
    assert "one of the two options" in said(*options, "--fold", "a", code=2)
    assert not (tmp_path / "runs").exists()


def test_folds_that_cannot_be_trained_without_are_refused_before_the_first_is(tmp_path: Path) -> None:
    path = write_table(tmp_path, 4)
    table = pd.read_csv(path, sep="\t").assign(fold=["a", "a", "b", "b"])
    table.to_csv(path, sep="\t", index=False)
    options = ["train", "segmentation", "--data", str(path), "--cross-validate", "-o", str(tmp_path / "new" / "runs"), "--steps", "1"]
    like = Volume.from_grid(torch.zeros(GRID.shape), GRID)
    # Only the later fold has it, and all before it could be trained.
    write_labels(tmp_path / "s3_dseg.nii.gz", 7 * disc(3)[1] + 14 * (disc(3)[1] == 2), like)
    line = said(*options, code=2)
    assert f"{tmp_path / 's3_dseg.nii.gz'}: has the label 28, which no scan outside fold b has" in line
    for number in (0, 1, 2, 3):
        write_labels(tmp_path / f"s{number}_dseg.nii.gz", torch.zeros(GRID.shape).long(), like)
    assert "has no label other than 0 outside fold a" in said(*options, code=2)
    (tmp_path / "s3_dseg.nii.gz").unlink()
    assert "s3_dseg.nii.gz" in said(*options, code=2)
    assert not (tmp_path / "new").exists()


def test_a_run_that_is_not_this_one_is_refused_and_stays(tmp_path: Path) -> None:
    """Of another network, other settings or scans, or cut off: one line that says what can be done, and no file is another."""
    path, run = write_table(tmp_path, 3), tmp_path / "run"
    options = ["train", "segmentation", "--data", str(path), "-o", str(run), "--steps", "2", "--every", "2", "--device", "cpu"]
    said(*options, "--network", "fcn", "--schedule", "polynomial")
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    again = [*options, "--network", "fcn", "--schedule", "polynomial", "--resume"]
    said(*again)
    checkpoint = run / "checkpoint.safetensors"
    refused = {
        "another network: expected 'unet', got 'fcn'": [*options, "--schedule", "polynomial", "--resume"],
        "another schedule: expected 'cosine', got 'polynomial'": [*options, "--network", "fcn", "--resume"],
        "another steps: expected 3, got 2": [*again, "--steps", "3"],
        "another spacing_mm": [*again, "--spacing", "3"],
        "another batch: expected 1, got 2": [*again, "--batch", "1"],
    }
    for fault, command in refused.items():
        line = said(*command, code=2)
        assert f"{checkpoint}: was written with {fault}" in line and "start another in another folder" in line
    write_table(tmp_path, 60)
    line = said(*again, code=2)
    assert "was written with another scans" in line and len(line.removeprefix(str(checkpoint))) < 350
    write_table(tmp_path, 3)
    labels = (tmp_path / "s1_dseg.nii.gz").read_bytes()
    write_labels(tmp_path / "s1_dseg.nii.gz", 7 * disc(1)[1].flip(0), Volume.from_grid(disc(1)[0], GRID))
    assert "another checksum of scans and labels" in said(*again, code=2)
    (tmp_path / "s1_dseg.nii.gz").write_bytes(labels)
    whole = checkpoint.read_bytes()
    assert before == {file.name: file.read_bytes() for file in run.iterdir()}
    for size in (len(whole) - 5, 100, 0):
        checkpoint.write_bytes(whole[:size])
        line = said(*again, code=2)
        assert f"{checkpoint}: is not a readable checkpoint" in line and "start another in another folder" in line
    checkpoint.write_bytes((run / "network.safetensors").read_bytes())
    assert "is not a checkpoint of a fit" in said(*again, code=2)
    checkpoint.unlink()
    del before["checkpoint.safetensors"]
    for command in (again, again[:-1]):
        assert "holds a network without the checkpoint of its training" in said(*command, code=2)
    assert before == {file.name: file.read_bytes() for file in run.iterdir()}


def test_what_cannot_be_trained_on_or_used_gets_one_line(tmp_path: Path) -> None:
    path = write_table(tmp_path, 3)
    table = pd.read_csv(path, sep="\t").assign(fold=["a", "a", "b"])
    options = ["train", "segmentation", "--steps", "2", "--device", "cpu", "-o", str(tmp_path / "run"), "--data"]

    def refused(rows: pd.DataFrame, *more: str) -> str:
        rows.to_csv(tmp_path / "bad.tsv", sep="\t", index=False, na_rep="n/a")
        line = said(*options, str(tmp_path / "bad.tsv"), *more, code=2)
        assert not (tmp_path / "run").exists()
        return line

    assert "has no column 'labels'" in refused(table[["scan"]])
    assert "has no column 'fold'" in refused(table[["scan", "labels"]], "--fold", "a")
    assert "has no scans of fold c (it has a, b)" in refused(table, "--fold", "c")
    assert "nowhere.nii.gz" in refused(table.assign(scan=["nowhere.nii.gz", *table["scan"][1:]]))
    assert "has scans without labels" in refused(table.assign(labels=table["labels"].where(table.index > 0)))
    other = Volume.from_grid(torch.zeros(5, 4), Grid.from_spacing((5, 4), 2.0))
    write_labels(tmp_path / "other.nii.gz", torch.ones(5, 4).long(), other)
    assert "other.nii.gz" in refused(table.assign(labels=["other.nii.gz", *table["labels"][1:]]))
    write_labels(tmp_path / "new.nii.gz", 3 * disc(2)[1], Volume.from_grid(disc(2)[0], GRID))
    assert "has the label 3, which training has not seen" in refused(table.assign(labels=[*table["labels"][:2], "new.nii.gz"]), "--fold", "b")
    write_labels(tmp_path / "empty.nii.gz", torch.zeros(GRID.shape).long(), Volume.from_grid(disc(2)[0], GRID))
    assert "that are all empty: every voxel is 0" in refused(table.assign(labels="empty.nii.gz"))
    assert "has the label 7, which training has not seen" not in refused(table.assign(labels="empty.nii.gz"), "--fold", "b")
    deep = Volume.from_grid(torch.zeros(4, 4, 4), Grid.from_spacing((4, 4, 4), 2.0))
    write_scan(tmp_path / "deep.nii.gz", torch.rand(4, 4, 4), deep)
    write_labels(tmp_path / "deep_dseg.nii.gz", 7 * torch.ones(4, 4, 4).long(), deep)
    solid = table.assign(scan=[*table["scan"][:2], "deep.nii.gz"], labels=[*table["labels"][:2], "deep_dseg.nii.gz"])
    assert "deep.nii.gz: has 3 axes, and the first scan 2" in refused(solid)
    assert "deep.nii.gz: has 3 axes, and the network's grid 2" in refused(solid, "--fold", "b")
    (tmp_path / "names.json").write_text("[1, 2]")
    assert "is no JSON of labels' names" in refused(table, "--names", str(tmp_path / "names.json"))
    nothing = said("segment", str(tmp_path / "s0.nii.gz"), "--model", str(tmp_path), "-o", str(tmp_path / "out"), code=2)
    assert f"{tmp_path}: holds no segmentation network" in nothing
    assert "there is no such model" in said("segment", str(tmp_path / "s0.nii.gz"), "--model", "run9", "-o", str(tmp_path / "out"), code=2)
    both = ["--model", "segmentation", "--model", str(tmp_path)]
    assert "is a generative model" in said("segment", str(tmp_path / "s0.nii.gz"), *both, "-o", str(tmp_path / "out"), code=2)
