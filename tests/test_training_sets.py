"""Scans of thick slices, and draws of models with them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from probmed.appearances import GaussianMixture
from probmed.atlases import LabelAtlas
from probmed.grids import Grid
from probmed.inference.training import TrainingSettings
from probmed.models.segmentation import Segmentation
from probmed.priors import FixedAtlas
from probmed.workflows.supervision import SegmenterSettings, amortise
from probmed.workflows.training_sets import Augmentation, Resolution, drawn_from, random_contrast, thick_slices

GRID = Grid.from_spacing((12, 10), 2.0)


def test_thick_slices_are_means_and_lines_between_them() -> None:
    found = thick_slices(6, torch.tensor([1.0, 2.0]), torch.zeros(2))
    torch.testing.assert_close(found[0], torch.eye(6))
    means = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]) / 2
    lines = torch.tensor([[1, 0, 0], [0.75, 0.25, 0], [0.25, 0.75, 0], [0, 0.75, 0.25], [0, 0.25, 0.75], [0, 0, 1]])
    torch.testing.assert_close(found[1], lines @ means)


def test_thick_slices_keep_what_is_linear_within_and_weigh_to_one() -> None:
    generator = torch.Generator().manual_seed(0)
    thickness, offset = 1 + 5 * torch.rand(50, generator=generator), torch.rand(50, generator=generator)
    found = thick_slices(24, thickness, offset)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(2), torch.ones(50, 24))
    ramp = torch.arange(24.0)
    # Farther from the ends than two slices; a slice that ends within a voxel takes its share of it as if it were of one value.
    torch.testing.assert_close((found @ ramp)[:, 12], ramp[12].expand(50), rtol=0, atol=0.15)
    assert torch.isfinite(thick_slices(3, torch.tensor([9.0]), torch.tensor([0.4]))).all()


def smoothness(images: Tensor, axis: int) -> Tensor:
    """Mean square of differences along an axis of each image."""
    return images.diff(dim=2 + axis).square().flatten(1).mean(1)


def test_scans_of_thick_slices_are_blurred_along_one_axis_of_each() -> None:
    torch.manual_seed(0)
    images = torch.randn(60, 1, 20, 20, 20)
    assert torch.equal(Resolution(0.0)(images), images)
    found = Resolution(1.0, 4.0)(images)
    rougher = torch.stack([smoothness(found, axis) / smoothness(images, axis) for axis in range(3)], 1)
    sorted_along = rougher.sort(1).values
    # Noise loses most along the slices' axis; across it, only what the mean of slices takes from all.
    assert (sorted_along[:, 0] < sorted_along[:, 1]).all()
    assert rougher.argmin(1).bincount(minlength=3).min() > 8
    half = Resolution(0.5)(images)
    unchanged = torch.isclose(half, images, atol=1e-5).flatten(1).all(1)
    assert 15 < int(unchanged.sum()) < 45


def test_what_is_unknown_stays_so_in_thick_slices_and_does_not_spread_over_more_than_one() -> None:
    torch.manual_seed(1)
    images = torch.ones(20, 1, 16, 16)
    images[:, :, :4] = math.nan
    found = Resolution(1.0, 3.0)(images)
    assert found[:, :, :1].isnan().all() and not found[:, :, 8:].isnan().any()
    torch.testing.assert_close(found.nan_to_num(1.0), torch.ones_like(found))


def model() -> Segmentation:
    """A square organ that is always there."""
    inside = torch.zeros(GRID.shape)
    inside[3:9, 2:7] = 1
    atlas = LabelAtlas(("background", "organ"), torch.stack([1 - inside, inside]), GRID, brain=())
    return Segmentation(FixedAtlas(atlas), GaussianMixture([1, 1]))


def test_draws_of_a_model_may_have_thick_slices_and_their_labels_are_those_of_the_fine_ones() -> None:
    sets = []
    for resolution in (None, Resolution(1.0)):
        torch.manual_seed(0)
        sets.append(drawn_from(model(), GRID, 1, resolution)())
    (fine, labels), (thick, same) = sets
    assert torch.equal(labels, same) and not torch.allclose(fine, thick)
    assert thick.flatten(1).std() < fine.flatten(1).std()


def test_random_contrasts_have_thick_slices_unless_told_otherwise() -> None:
    regions = torch.randint(4, (2, *GRID.shape))
    sets = []
    for resolution in (Resolution(0.0), None, Resolution(1.0)):
        torch.manual_seed(3)
        sets.append(random_contrast(regions, regions, GRID, 16, Augmentation(), resolution)())
    assert all(torch.equal(sets[0][1], labels) for _, labels in sets)
    changed = [int((~torch.isclose(sets[0][0], images, atol=1e-5, equal_nan=True)).flatten(1).any(1).sum()) for images, _ in sets]
    assert changed[0] == 0 and 3 <= changed[1] <= 13 and changed[2] == 16


def test_an_amortised_network_begins_as_the_seed_says() -> None:
    def weights(seed: int) -> Tensor:
        trained = amortise(model(), GRID, SegmenterSettings(), TrainingSettings(1, seed=seed, every=1), batch=1)
        return torch.cat([p.detach().flatten() for p in trained.network.parameters()])

    first = weights(1)
    assert torch.equal(first, weights(1)) and float((first - weights(2)).abs().max()) > 0.05


@pytest.mark.parametrize("options", [{"chance": 1.5}, {"thickest": 0.5}])
def test_resolutions_that_no_scan_has_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= chance <= 1 and thickest >= 1"):
        Resolution(**options)
