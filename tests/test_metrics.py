"""Metrics against hand-computed values, enumeration, and other libraries where they are installed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from probmed.metrics import (
    boundary_band,
    brier_score,
    calibration_error,
    dice,
    folding,
    interval_coverage,
    interval_score,
    negative_log_likelihood,
    normal_crps,
    paired_bootstrap,
    surface_distances,
)

SPACINGS = {2: (0.9, 2.0), 3: (0.9, 1.5, 2.0)}


def blobs(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) < 0.4, torch.rand(shape, generator=generator) < 0.4


def boundary_by_hand(mask: torch.Tensor) -> list[tuple[int, ...]]:
    found = []
    for voxel in itertools.product(*map(range, mask.shape)):
        neighbours = [(*voxel[:i], voxel[i] + s, *voxel[i + 1 :]) for i in range(mask.ndim) for s in (-1, 1)]
        inside = [all(0 <= v < n for v, n in zip(x, mask.shape, strict=True)) and bool(mask[x]) for x in neighbours]
        if mask[voxel] and not all(inside):
            found.append(voxel)
    return found


def test_dice_of_known_sets() -> None:
    a = torch.tensor([[1, 1, 0], [0, 1, 0]], dtype=torch.bool)
    b = torch.tensor([[1, 0, 0], [0, 1, 1]], dtype=torch.bool)
    assert dice(a, b) == pytest.approx(2 * 2 / 6)
    assert dice(a, a) == 1 and dice(a, ~a) == 0
    assert dice(a, torch.zeros_like(a)) == 0
    assert math.isnan(dice(torch.zeros_like(a), torch.zeros_like(a)))
    with pytest.raises(ValueError, match="one shape"):
        dice(a, b[0])


@pytest.mark.parametrize("shape", [(7, 5), (5, 6, 4)])
@pytest.mark.parametrize("seed", [0, 1])
def test_surface_distances_are_those_of_enumeration(shape: tuple[int, ...], seed: int) -> None:
    a, b = blobs(shape, seed)
    spacing = SPACINGS[len(shape)]
    edges = [np.array(boundary_by_hand(x)) * spacing for x in (a, b)]
    pairs = np.linalg.norm(edges[0][:, None] - edges[1][None], axis=-1)
    forward, backward = pairs.min(1), pairs.min(0)
    found = surface_distances(a, b, spacing)
    assert np.allclose(np.sort(found.forward), np.sort(forward))
    assert np.allclose(np.sort(found.backward), np.sort(backward))
    assert found.hausdorff(1.0) == pytest.approx(max(forward.max(), backward.max()))
    assert found.hausdorff() == pytest.approx(max(np.quantile(forward, 0.95), np.quantile(backward, 0.95)))
    assert found.average() == pytest.approx(np.concatenate([forward, backward]).mean())


def test_surface_distance_of_shifted_boxes_is_in_millimetres() -> None:
    a = torch.zeros(20, 8, 8, dtype=torch.bool)
    b = a.clone()
    a[3, 2:6, 2:6] = True
    b[8, 2:6, 2:6] = True
    assert surface_distances(a, b, (1.5, 1.0, 1.0)).hausdorff() == pytest.approx(7.5)
    assert surface_distances(a, b, (1.5, 1.0, 1.0)).average() == pytest.approx(7.5)
    assert surface_distances(a, a, (1.5, 1.0, 1.0)).hausdorff(1.0) == 0


def test_a_missed_structure_is_infinitely_far() -> None:
    a, empty = torch.ones(3, 3, dtype=torch.bool), torch.zeros(3, 3, dtype=torch.bool)
    for found in (surface_distances(a, empty, (1, 1)), surface_distances(empty, a, (1, 1))):
        assert found.hausdorff() == math.inf and found.average() == math.inf
    nothing = surface_distances(empty, empty, (1, 1))
    assert math.isnan(nothing.hausdorff()) and math.isnan(nothing.average())
    with pytest.raises(ValueError, match="positive spacings"):
        surface_distances(a, a, (1.0,))
    with pytest.raises(ValueError, match="quantile"):
        surface_distances(a, a, (1.0, 1.0)).hausdorff(95)


def test_folding_counts_what_is_not_positive() -> None:
    determinant = torch.tensor([[1.0, 0.5, -0.1], [0.0, 2.0, 1.0]])
    assert folding(determinant) == pytest.approx(2 / 6)
    assert folding(determinant, determinant > 0) == 0
    assert folding(determinant, torch.tensor([[True, False, True], [False, False, False]])) == 0.5


def test_scores_of_probabilities_by_hand() -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.0], [0.2, 0.5, 0.1], [0.1, 0.3, 0.9]])
    labels = torch.tensor([0, 1, 0])
    floor = 1e-3
    expected = -(math.log(0.7) + math.log(0.5) + math.log(floor)) / 3
    assert negative_log_likelihood(probabilities, labels, floor=floor) == pytest.approx(expected)
    brier = [0.3**2 + 0.2**2 + 0.1**2, 0.2**2 + 0.5**2 + 0.3**2, 1 + 0.1**2 + 0.9**2]
    assert brier_score(probabilities, labels) == pytest.approx(sum(brier) / 3)
    mask = torch.tensor([True, True, False])
    assert negative_log_likelihood(probabilities, labels, mask) == pytest.approx(-(math.log(0.7) + math.log(0.5)) / 2)
    assert brier_score(probabilities, labels, mask) == pytest.approx(sum(brier[:2]) / 2)
    with pytest.raises(ValueError, match="labels in"):
        brier_score(probabilities, torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="shape"):
        brier_score(probabilities, labels[:2])


def test_scores_agree_with_torch_in_three_dimensions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 5, 2, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (3, 5, 2), generator=generator)
    expected = torch.nn.functional.cross_entropy(logits[None], labels[None])
    assert negative_log_likelihood(logits.softmax(0), labels) == pytest.approx(float(expected))
    onehot = torch.nn.functional.one_hot(labels, 4).movedim(-1, 0)
    assert brier_score(logits.softmax(0), labels) == pytest.approx(float((logits.softmax(0) - onehot).square().sum(0).mean()))


def test_calibration_error_by_hand_and_of_a_calibrated_forecast() -> None:
    p = torch.tensor([0.05, 0.15, 0.15, 0.95, 1.0])
    y = torch.tensor([False, False, True, True, True])
    expected = (0.05 + abs(0.3 - 1) + abs(1.95 - 2)) / 5
    assert calibration_error(p, y, bins=10) == pytest.approx(expected)
    assert calibration_error(p, y, torch.tensor([False, True, True, False, False]), bins=10) == pytest.approx(0.35)
    assert math.isnan(calibration_error(p, y, torch.zeros(5, dtype=torch.bool)))
    generator = torch.Generator().manual_seed(1)
    p = torch.rand(200_000, generator=generator)
    calibrated = torch.rand(200_000, generator=generator) < p
    assert calibration_error(p, calibrated) < 0.01
    # Overconfident: p pushed to the ends. Its error is the mean of |p' - p|.
    pushed = torch.where(p > 0.5, p.sqrt(), p.square())
    assert calibration_error(pushed, calibrated, bins=100) == pytest.approx(float((pushed - p).abs().mean()), abs=0.01)
    with pytest.raises(ValueError, match="bin"):
        calibration_error(p, calibrated, bins=0)


def test_boundary_band_is_that_of_enumeration() -> None:
    mask, _ = blobs((6, 5, 4), 3)
    spacing = SPACINGS[3]
    voxels = np.array(list(itertools.product(*map(range, mask.shape))))
    inside = mask.numpy()[tuple(voxels.T)]
    far = np.linalg.norm((voxels[:, None] - voxels[None]) * spacing, axis=-1)
    far[inside[:, None] == inside[None]] = np.inf
    expected = (far.min(1) <= 1.5 + 1e-6).reshape(mask.shape)
    assert (boundary_band(mask, 1.5, spacing).numpy() == expected).all()
    assert not boundary_band(torch.ones(3, 3, dtype=torch.bool), 2.0, (1, 1)).any()
    with pytest.raises(ValueError, match="spacings"):
        boundary_band(mask, 1.0, (1.0, 1.0))


def test_interval_coverage_counts_both_ends() -> None:
    lower, upper = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert interval_coverage(lower, upper, torch.tensor([0.0, 2.0, 3.5, 2.9])) == 0.5


def test_interval_score_by_hand_and_proper() -> None:
    lower, upper = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])
    truth = torch.tensor([0.5, 1.2, -0.1])
    assert interval_score(lower, upper, truth, 0.8) == pytest.approx((1 + (1 + 10 * 0.2) + (1 + 10 * 0.1)) / 3)
    draws = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = []
    for scale in (0.6, 1.0, 1.6):
        bound = torch.full_like(draws, scale * float(stats.norm.ppf(0.9)))
        scores.append(interval_score(-bound, bound, draws, 0.8))
    assert scores[1] < scores[0] and scores[1] < scores[2]
    with pytest.raises(ValueError, match="level"):
        interval_score(lower, upper, truth, 80)


def test_paired_bootstrap_has_the_width_that_theory_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    common = 10 * torch.randn(200, generator=generator)
    a, b = common + 0.5 + 0.3 * torch.randn(200, generator=generator), common
    found = paired_bootstrap(a, b)
    error = float((a - b).double().std(correction=0)) / math.sqrt(200)
    assert found.mean == pytest.approx(float((a - b).double().mean()))
    assert found.upper - found.lower == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert found == paired_bootstrap(a, b)
    same = paired_bootstrap(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 2.0]))
    assert same == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="finite"):
        paired_bootstrap(torch.tensor([1.0, math.inf]), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="two subjects"):
        paired_bootstrap(torch.tensor([1.0]), torch.tensor([0.0]))


@pytest.mark.filterwarnings("ignore")
def test_surface_distances_agree_with_monai() -> None:
    monai = pytest.importorskip("monai.metrics")
    a, b = blobs((9, 8, 7), 5)
    ours = surface_distances(a, b, SPACINGS[3])
    theirs = monai.compute_average_surface_distance(
        a[None, None].float(),
        b[None, None].float(),
        include_background=True,
        symmetric=True,
        spacing=SPACINGS[3],
    )
    assert ours.average() == pytest.approx(float(theirs), rel=1e-5)
    worst = monai.compute_hausdorff_distance(
        a[None, None].float(),
        b[None, None].float(),
        include_background=True,
        percentile=95,
        spacing=SPACINGS[3],
    )
    assert ours.hausdorff() == pytest.approx(float(worst), rel=1e-5)


@pytest.mark.usefixtures("float64")
def test_crps_of_a_normal_is_the_integral_of_squared_differences_of_distributions() -> None:
    mean, sd, truth = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0]), torch.tensor([1.1, -1.0])
    x = torch.linspace(-30, 30, 600_001)
    for m, s, t, found in zip(mean, sd, truth, normal_crps(mean, sd, truth), strict=True):
        below = 0.5 * (1 + torch.erf((x - m) / s / 2**0.5))
        integral = torch.trapezoid((below - (x >= t).double()) ** 2, x)
        assert float(found) == pytest.approx(float(integral), abs=1e-4)
    with pytest.raises(ValueError, match="> 0"):
        normal_crps(mean, torch.zeros(2), truth)
