"""Simulated scans: every truth that they carry is checked against the scans themselves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from probmed.atlases import LabelAtlas
from probmed.grids import Grid, sample
from probmed.simulation import (
    CONTRASTS,
    SimulatedSubject,
    atrophy_flow,
    degraded,
    simulate_cohort,
    simulate_subject,
)
from probmed.simulation.contrasts import add_noise, stream

STILL: dict[str, Any] = {"deformation_mm": 0.0, "translation_mm": 0.0, "rotation": 0.0, "log_scale": 0.0}
CLEAN: dict[str, Any] = {"bias_sd": 0.0, "noise_sd": 0.0}


@pytest.fixture(scope="module")
def ball() -> LabelAtlas:
    """A ball of white matter in a shell of grey matter in a shell of fluid, and air: 64 mm wide, 4 mm
    voxels.
    """
    grid = Grid.from_spacing((16, 16, 16), 4.0)
    radius = grid.coordinates().norm(dim=-1)
    edges = [torch.sigmoid((radius - r) / 1.5) for r in (12.0, 19.0, 25.0)]
    parts = [edges[0] - edges[1], 1 - edges[0], edges[1] - edges[2], edges[2]]
    probabilities = torch.stack(parts).clamp_min(1e-4)
    return LabelAtlas(("GM", "WM", "CSF", "air"), probabilities / probabilities.sum(0), grid)


def test_the_same_seed_gives_the_same_bytes(ball: LabelAtlas) -> None:
    options: dict[str, Any] = {"lesions": 2, "noise": "correlated", "contrast": ("T1", "random"), "atrophy": 0.05}
    one, two, other = (simulate_subject(ball, 6.0, seed, **options) for seed in (3, 3, 4))
    assert all(torch.equal(a.data, b.data) for a, b in zip(one.images, two.images, strict=True))
    assert torch.equal(one.labels.data, two.labels.data) and one.volumes_ml == two.volumes_ml
    assert not torch.equal(one.image.data, other.image.data)


def test_the_global_random_state_is_left_alone(ball: LabelAtlas) -> None:
    before = torch.get_rng_state()
    simulate_subject(ball, 8.0, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_effects_have_streams_of_their_own(ball: LabelAtlas) -> None:
    one, two = simulate_subject(ball, 6.0, 1), simulate_subject(ball, 6.0, 1, bias_sd=0.0, noise="rician")
    assert torch.equal(one.labels.data, two.labels.data)
    assert (two.bias == 1).all()


@pytest.mark.parametrize("contrast", ["T1", "T2", "FLAIR", "random"])
def test_class_means_and_standard_deviations(ball: LabelAtlas, contrast: str) -> None:
    subject = simulate_subject(ball, 3.0, 0, contrast=contrast, labels="independent", noise_sd=0.03, bias_sd=0.3)
    ideal = subject.image.data / subject.bias[0]
    for k, (name, index) in enumerate(zip(subject.names, ball.indices, strict=True)):
        values = ideal[subject.labels.data == index]
        sd = subject.covariances[k, 0, 0].sqrt()
        assert abs(values.mean() - subject.means[k, 0]) < 5 * sd / math.sqrt(len(values)), name
        assert abs(values.std() / sd - 1) < 5 / math.sqrt(len(values)), name
    if contrast != "random":
        assert subject.means[0, 0].item() == pytest.approx(CONTRASTS[contrast]["GM"][0][1])


def test_bias_is_the_ratio_to_the_ideal_and_smooth(ball: LabelAtlas) -> None:
    subject = simulate_subject(ball, 4.0, 0, bias_sd=0.4, noise_sd=0.0)
    flat = simulate_subject(ball, 4.0, 0, bias_sd=0.0, noise_sd=0.0)
    assert torch.allclose(subject.image.data / flat.image.data, subject.bias[0], rtol=1e-3, atol=1e-4)
    log = subject.bias.log()
    assert 0.05 < log.std() < 1.5 and abs(log.mean()) < 1e-5
    assert max(torch.diff(log, dim=axis).abs().max().item() for axis in (1, 2, 3)) < 0.5


@pytest.mark.parametrize("labels", ["independent", "smooth"])
def test_labels_are_drawn_from_their_probabilities(ball: LabelAtlas, labels: str) -> None:
    """Over seeds, each class's share is its mean probability, for labels that are alone and for those that
    agree.
    """
    draws = [simulate_subject(ball, 4.0, seed, labels=labels, label_length_mm=4.0, **STILL, **CLEAN) for seed in range(30)]
    frequency = torch.stack([d.fractions for d in draws]).mean(0)
    region = [frequency[:, ball.probabilities[k] > 0.3].mean(1) for k in range(4)]
    truth = [draws[0].probabilities[:, ball.probabilities[k] > 0.3].mean(1) for k in range(4)]
    assert torch.allclose(torch.stack(region), torch.stack(truth), atol=0.03)


def test_smooth_labels_agree_with_their_neighbours(ball: LabelAtlas) -> None:
    def changes(labels: str) -> float:
        data = simulate_subject(ball, 2.0, 0, labels=labels, label_length_mm=8.0, **STILL).labels.data
        return float((data[1:] != data[:-1]).float().mean())

    assert changes("smooth") < 0.6 * changes("independent")


def test_volumes_are_counts(ball: LabelAtlas) -> None:
    subject = simulate_subject(ball, (4.0, 4.0, 8.0), 0)
    for name, index in zip(subject.names, ball.indices, strict=True):
        count = int((subject.labels.data == index).sum())
        assert subject.volumes_ml[name] == pytest.approx(count * subject.grid.voxel_volume / 1000)
    assert sum(subject.volumes_ml.values()) == pytest.approx(64**3 / 1000)
    assert subject.spacing == pytest.approx((4.0, 4.0, 8.0))


def test_the_transform_inverts(ball: LabelAtlas) -> None:
    subject = simulate_subject(ball, 4.0, 2, atrophy=0.1)
    points = subject.grid.coordinates()[4:-4, 4:-4, 4:-4]
    error = (subject.inverse(subject.transform(points)) - points).norm(dim=-1)
    assert error.mean() < 0.2 and error.max() < 1.0
    assert (subject.transform(points) - points).norm(dim=-1).mean() > 1.0
    assert (subject.transform.jacobian_determinant(subject.grid) > 0).all()


def test_probabilities_are_the_atlas_at_the_transform(ball: LabelAtlas) -> None:
    still = simulate_subject(ball, ball.grid.spacing, 0, **STILL)
    assert torch.allclose(still.probabilities, ball.probabilities, atol=1e-3)


def test_partial_volume_mixes_classes(ball: LabelAtlas) -> None:
    table = {name: ((1.0, mean, 0.0),) for name, mean in zip(ball.names, (1.0, 2.0, 3.0, 0.0), strict=True)}
    subject = simulate_subject(ball, 8.0, 0, subsamples=3, contrast=table, **CLEAN)
    assert torch.allclose(subject.fractions.sum(0), torch.ones(subject.grid.shape))
    assert ((subject.fractions > 0.01) & (subject.fractions < 0.99)).any()
    mean = torch.einsum("k...,k->...", subject.fractions, torch.tensor([1.0, 2.0, 3.0, 0.0]))
    assert torch.allclose(subject.image.data, mean, atol=1e-4)
    thick = simulate_subject(ball, (4.0, 4.0, 16.0), 0, subsamples=(1, 1, 4))
    assert ((thick.fractions * 4) % 1 == 0).all()


def test_lesions_darken_white_matter_and_keep_the_tissue(ball: LabelAtlas) -> None:
    plain = simulate_subject(ball, 2.0, 1, **CLEAN)
    subject = simulate_subject(ball, 2.0, 1, lesions=3, lesion_radius_mm=(3.0, 5.0), **CLEAN)
    assert subject.lesion_fraction is not None and plain.lesion_fraction is None
    assert torch.equal(plain.labels.data, subject.labels.data)
    inside = subject.lesion_fraction > 0.5
    litres = 4 / 3 * math.pi * np.array([3.0, 5.0]) ** 3
    assert litres[0] * 0.8 < float(inside.sum()) * subject.grid.voxel_volume < 3.2 * litres[1]
    assert abs(subject.image.data[inside].mean() - CONTRASTS["T1"]["lesion"][0][1]) < 0.02
    assert torch.equal(plain.image.data[~inside], subject.image.data[~inside])


def test_stripped_scans_are_zero_outside(ball: LabelAtlas) -> None:
    subject = simulate_subject(ball, 4.0, 0, stripped=True, noise="rician")
    outside = subject.labels.data == 0
    assert subject.names[-1] == "background" and outside.any()
    assert (subject.image.data[outside] == 0).all() and (subject.image.data[~outside] != 0).all()


def test_channels_share_an_anatomy(ball: LabelAtlas) -> None:
    subject = simulate_subject(ball, 4.0, 0, contrast=("T1", "T2", "FLAIR"))
    assert len(subject.images) == 3 and subject.means.shape == (4, 3) and subject.covariances.shape == (4, 3, 3)
    assert subject.bias.shape[0] == 3 and not torch.equal(subject.bias[0], subject.bias[1])


def test_sessions_differ_in_position_not_in_anatomy(ball: LabelAtlas) -> None:
    first, again = (simulate_subject(ball, 2.0, 0, session=s, bias_sd=0.0) for s in (0, 1))
    assert not torch.equal(first.labels.data, again.labels.data)
    for name in ("GM", "WM", "CSF"):
        assert again.volumes_ml[name] == pytest.approx(first.volumes_ml[name], rel=0.05)
    to_first = first.inverse(again.transform(again.grid.coordinates()))
    index = first.grid.world_to_voxel(to_first).round().long().clamp(0, 31).unbind(-1)
    assert (first.labels.data[index] == again.labels.data).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["gaussian", "correlated"])
def test_noise_has_its_standard_deviation(kind: str) -> None:
    grid = Grid.from_spacing((24, 24, 24))
    noise = add_noise(torch.zeros(1, 24, 24, 24), grid, 0.1, kind, stream(0, "noise"))
    assert abs(noise.std() - 0.1) < 0.01
    correlation = (noise[0, 1:] * noise[0, :-1]).mean() / noise.var()
    assert (correlation > 0.3) == (kind == "correlated")


def test_rician_noise_has_its_mean() -> None:
    grid = Grid.from_spacing((24, 24, 24))
    noise = add_noise(torch.zeros(1, 24, 24, 24), grid, 0.1, "rician", stream(0, "noise"))
    assert abs(noise.mean() - 0.1 * math.sqrt(math.pi / 2)) < 0.002


def test_degraded_image() -> None:
    grid = Grid.from_spacing((12, 12, 12), 5.0)
    image = torch.rand(1, 12, 12, 12) + 1
    worse, bias = degraded(image, grid, noise_sd=0.0)
    assert torch.allclose(worse, bias * image) and bias.std() > 0.01
    with pytest.raises(ValueError, match="expected an image"):
        degraded(image[0], grid)


def test_atrophy_flow_shrinks_each_tissue_by_what_was_asked(ball: LabelAtlas) -> None:
    flow = atrophy_flow(ball, spacing_mm=2.0)
    fine = ball.grid.at_spacing(1.0)
    before = ball.on(fine).probabilities.flatten(1).sum(-1)
    for loss in (-0.05, -0.02, 0.02, 0.1, 0.3):
        moved = sample(ball.probabilities, ball.grid, flow.at(loss)(fine.coordinates()), fill="edge")
        lost = -(moved.flatten(1).sum(-1) / before).log()
        both = -(moved[:2].sum() / before[:2].sum()).log()
        assert both.item() == pytest.approx(loss, rel=0.1)
        assert lost[:2].tolist() == pytest.approx([loss, loss], rel=0.3)
        assert abs(lost[3]) < 0.05 * abs(loss) and (lost[2] < 0) == (loss > 0)


def test_cohort_shows_its_rates(ball: LabelAtlas) -> None:
    def cohort() -> tuple[list[list[SimulatedSubject]], pd.DataFrame]:
        rates: dict[str, Any] = {"atrophy_rate": 0.02, "atrophy_rate_sd": 0.005}
        return simulate_cohort(3, 4, ball, 4.0, seed=1, subsamples=2, deformation_mm=1.0, ages=(65.0, 75.0), **rates)

    subjects, table = cohort()
    assert [len(scans) for scans in subjects] == [4, 4, 4] and len(table) == 12
    for _, rows in table.groupby("subject"):
        tissue = np.log(rows["GM_ml"].to_numpy() + rows["WM_ml"].to_numpy())
        slope = np.polyfit(rows["years"].to_numpy(), tissue, 1)[0]
        assert -slope == pytest.approx(rows["rate"].iloc[0], rel=0.25)
        assert np.allclose(rows["atrophy"], rows["rate"] * (rows["age"] - 70))
    assert table["rate"].nunique() == 3 and list(table["visit"][:4]) == [1, 2, 3, 4]
    _, again = cohort()
    assert table.equals(again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "rough"}, "labels must be"),
        ({"noise": "pink"}, "expected noise in"),
        ({"noise_sd": -1.0}, "noise_sd >= 0"),
        ({"subsamples": 0}, "positive subsamples"),
        ({"subsamples": (1, 2)}, "positive subsamples"),
        ({"contrast": "T3"}, "contrast must be"),
        ({"contrast": {"GM": ((1.0, 0.5, 0.1),)}}, "no Gaussians for"),
        ({"lesions": 1, "lesion_radius_mm": (3.0, 1.0)}, "radii"),
    ],
)
def test_bad_options_say_what_was_expected(ball: LabelAtlas, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate_subject(ball, 8.0, **options)


def test_two_dimensions() -> None:
    grid = Grid.from_spacing((20, 20), 3.0)
    radius = grid.coordinates().norm(dim=-1)
    wm = torch.sigmoid((15 - radius) / 2)
    atlas = LabelAtlas(("WM", "background"), torch.stack([wm, 1 - wm]), grid, brain=("WM",))
    subject = simulate_subject(atlas, 2.0, 0, subsamples=2)
    assert subject.image.data.shape == (30, 30) and subject.volumes_ml["WM"] > 0
