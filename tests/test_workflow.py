"""From a scan to tissues and volumes: simulated heads, where the truth is known."""

from __future__ import annotations

import pytest
import torch
from scipy.ndimage import distance_transform_edt

from probmed.atlases import LabelAtlas, default_atlas
from probmed.grids import Grid
from probmed.inference.affine import align
from probmed.metrics import dice
from probmed.simulation import SimulatedSubject, simulate_subject
from probmed.transforms import Affine
from probmed.volumes import UnusableInput, Volume
from probmed.workflows.preparation import prepare
from probmed.workflows.segmentation import SegmentationResult, Settings, segment, tempering_of

pytestmark = pytest.mark.slow

FAST = Settings(spacing_mm=6.0, rounds=4, steps=4)


@pytest.fixture(scope="module")
def atlas() -> LabelAtlas:
    return default_atlas()


@pytest.fixture(scope="module")
def head(atlas: LabelAtlas) -> SimulatedSubject:
    return simulate_subject(atlas, 4.0, 7, labels="independent", noise_sd=0.03)


@pytest.fixture(scope="module")
def result(head: SimulatedSubject) -> SegmentationResult:
    return segment([head.image], settings=FAST, draws=8, seed=1, device="cpu")


def tissue_dice(result: SegmentationResult, subject: SimulatedSubject) -> list[float]:
    return [float(dice(result.labels == k, subject.labels.data == k)) for k in (1, 2, 3)]


def test_tissues_of_a_simulated_head(result: SegmentationResult, head: SimulatedSubject) -> None:
    assert not result.stripped
    assert min(tissue_dice(result, head)[:2]) > 0.9
    torch.testing.assert_close(result.probabilities.sum(0), torch.ones(head.grid.shape))


def test_volumes_come_with_ordered_intervals_near_the_truth(result: SegmentationResult, head: SimulatedSubject) -> None:
    table = result.volumes.set_index("name")
    columns = ["q025", "q100", "q250", "q750", "q900", "q975"]
    assert (table[columns].diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)
    for tissue in ("GM", "WM"):
        assert table.loc[tissue, "volume_ml"] == pytest.approx(head.volumes_ml[tissue], rel=0.05)
    assert result.volume_draws.shape == (8, 6)


def test_far_from_the_brain_the_prior_says_that_there_is_none(result: SegmentationResult, head: SimulatedSubject) -> None:
    """Where nothing was fitted the bias field is extrapolated; intensities must not make fluid of bone and air there."""
    brain = (head.labels.data >= 1) & (head.labels.data <= 3)
    outside = torch.as_tensor(distance_transform_edt(~brain, sampling=head.grid.spacing)) > 30
    assert outside.float().mean() > 0.2
    assert result.probabilities[:3, outside].max() < 0.02


def test_the_transform_and_its_inverse_meet(result: SegmentationResult) -> None:
    points = torch.randn(50, 3) * 30
    back = result.inverse(result.transform(points))
    assert (back - points).norm(dim=-1).max() < 1.0  # mm, of a velocity on an 8 mm grid


def test_label_draws_vary_and_keep_their_seed(result: SegmentationResult) -> None:
    one, other = result.draw_labels(2, seed=3), result.draw_labels(2, seed=3)
    assert torch.equal(one, other)
    assert not torch.equal(one[0], one[1])
    assert set(one.unique().tolist()) <= set(result.indices) | {0}


def test_the_same_seed_gives_the_same_numbers(result: SegmentationResult, head: SimulatedSubject) -> None:
    again = segment([head.image], settings=FAST, draws=8, seed=1, device="cpu")
    assert torch.equal(again.probabilities, result.probabilities)
    assert torch.equal(again.volume_draws, result.volume_draws)


def test_a_stripped_brain_is_told_from_a_head(atlas: LabelAtlas) -> None:
    subject = simulate_subject(atlas, 4.0, 7, labels="independent", noise_sd=0.03, stripped=True)
    result = segment([subject.image], settings=FAST, draws=0, device="cpu")
    assert result.stripped
    assert result.names == ("GM", "WM", "CSF")
    assert min(tissue_dice(result, subject)[:2]) > 0.85
    assert bool((result.labels[subject.image.data == 0] == 0).all())


@pytest.mark.parametrize("floor", [0.0, -0.5])
def test_a_head_without_its_air_is_no_brain(atlas: LabelAtlas, floor: float) -> None:
    """Scanners' software sets the air to zero, and with as many voxels gone a head is no larger than a brain with its fluid may be."""
    head = simulate_subject(atlas, 4.0, 7, noise="rician", noise_sd=0.03)
    data = head.image.data.masked_fill(head.fractions.argmax(0) == head.names.index("air"), floor)
    data[0, 0, 0] = min(floor, -0.1)
    upper = head.grid.cropped((0, 0, 26), head.grid.shape)
    volume = Volume.from_grid(data[:, :, 26:], upper)
    assert float((volume.data != floor).sum()) * upper.voxel_volume / 1e6 < 3.2  # litres
    assert not prepare([volume], atlas, 4.0, 15.0, 0, torch.device("cpu")).stripped


def test_channels_on_different_grids(atlas: LabelAtlas, head: SimulatedSubject) -> None:
    """A second contrast on a coarser grid that covers only a part: what it does not see is missing, not zero."""
    both = simulate_subject(atlas, 4.0, 7, labels="independent", noise_sd=0.03, contrast=("T1", "T2"))
    first, second = both.images
    grid = second.grid.at_spacing((4.0, 4.0, 8.0)).cropped((0, 0, 4), (*second.grid.at_spacing((4.0, 4.0, 8.0)).shape[:2], 24))
    other = Volume.from_grid(second.resampled(grid).data, grid)
    result = segment([first, other], settings=FAST, draws=2, device="cpu")
    assert min(tissue_dice(result, both)[:2]) > 0.85
    assert result.mixture["means"].shape[1] == 2


def test_channels_that_do_not_meet_are_refused(head: SimulatedSubject) -> None:
    shift = torch.eye(4, dtype=torch.float64)
    shift[0, 3] = 5000.0
    apart = Volume.from_grid(head.image.data, head.grid.transformed(shift))
    with pytest.raises(UnusableInput, match="does not overlap"):
        segment([head.image, apart], settings=FAST, device="cpu")


def test_alignment_finds_a_known_affine(atlas: LabelAtlas) -> None:
    """A scan that is the atlas's own labels in known intensities, moved by a known affine."""
    means = torch.tensor([0.7, 1.0, 0.3, 0.15, 0.5, 0.02])
    truth = Affine.exp(torch.tensor([8.0, -5.0, 10.0, 0.15, -0.1, 0.05, 0.1, 0.05, 0.12, 0.0, 0.0, 0.0]))
    grid = Grid.from_spacing((60, 70, 60), 4.0)
    labels = atlas.resampled(2.0)
    image = (labels.on(Grid(grid.shape, truth.matrix.double() @ grid.affine)).probabilities * means[:, None, None, None]).sum(0)
    image = image + 0.01 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    found = align(image, grid, atlas).matrix
    corners = torch.tensor([[60.0, 0, 0], [-60, 0, 0], [0, 80, 0], [0, -80, 0], [0, 0, 60], [0, 0, -40]])
    error = (Affine(found)(corners) - truth(corners)).norm(dim=-1)
    assert error.max() < 5.0  # mm at the surface of the brain: a few voxels' worth before the deformation takes over


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_tempering_is_the_share_of_independent_voxels(rho: float) -> None:
    """A separable first-order autoregression in three axes, of which the share is known: ((1 − ρ) / (1 + ρ))³."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 60, 60, generator=generator)
    for axis in range(3):
        lines = list(noise.unbind(axis))
        for i in range(1, len(lines)):
            lines[i] = rho * lines[i - 1] + (1 - rho**2) ** 0.5 * lines[i]
        noise = torch.stack(lines, axis)
    assert tempering_of(noise) == pytest.approx(((1 - rho) / (1 + rho)) ** 3, rel=0.1)
