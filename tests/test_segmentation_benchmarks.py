"""The benchmarks of segmentation: scores of volumes, changes of scans, and what their tables say. No data and no training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from probmed.grids import Grid
from probmed.simulation.contrasts import CONTRASTS
from probmed.volumes import Volume, read_scan, write_labels, write_scan
from probmed.workflows.supervision import standardised
from probmed.workflows.volume_errors import VolumeErrors

# The benchmarks are in the repository and not in the wheel: without a checkout there is nothing to test.
pytest.importorskip("benchmarks")

from benchmarks import architectures, contrast, few_labels, uncertainty
from benchmarks.few_labels import coverage, score, volume_scores, volumes_of

SHAPE = (30, 32, 28)
SPACING = (1.0, 1.0, 1.0)


def answers_of(shares: Tensor, shape: tuple[int, ...] = (10, 10, 10)) -> Tensor:
    """Draws ``(D, 2, *shape)`` of one label whose probability is the same everywhere, ``(D,)``."""
    p = shares.reshape(-1, 1, 1, 1, 1).expand(-1, 1, *shape)
    return torch.cat([1 - p, p], 1)


def test_scores_of_volumes_are_in_standard_deviations_of_what_is_left_open() -> None:
    one = answers_of(torch.tensor([0.2]))
    assert volumes_of(one).tolist() == pytest.approx([200.0])
    assert volume_scores(one, torch.tensor([232.0])) == pytest.approx([32 / math.sqrt(1000 * 0.2 * 0.8)])
    several = answers_of(torch.tensor([0.2, 0.3, 0.4]))
    left = 1000 * (0.2 * 0.8 + 0.3 * 0.7 + 0.4 * 0.6) / 3
    assert volumes_of(several).tolist() == pytest.approx([300.0])
    assert volume_scores(several, torch.tensor([150.0])) == pytest.approx([-150 / math.sqrt(left + 100.0**2)])
    known = [VolumeErrors((0.1,), (0.2,), (9,))] * 3
    assert volumes_of(several, known).tolist() == pytest.approx([300 * math.exp(0.1)])
    (middle,) = volume_scores(one, torch.tensor([200 * math.exp(0.1)]), known[:1])
    (upper,) = volume_scores(one, known[0].quantiles(torch.tensor([200.0]), torch.tensor([0.975])), known[:1])
    assert middle == pytest.approx(0, abs=1e-5) and upper == pytest.approx(1.95996, abs=1e-3)


@pytest.mark.parametrize("how", ["voxels", "draws", "errors"])
def test_true_volumes_are_in_their_intervals_as_often_as_these_say(how: str) -> None:
    """Truths that are drawn from what is said of them."""
    generator, rows = torch.Generator().manual_seed(0), []
    errors = VolumeErrors((0.05, 0.0), (0.2, 0.3), (9, 9))
    draws = answers_of(0.3 + (0.05 * torch.randn(200, generator=generator) if how == "draws" else torch.zeros(1)))
    draws = torch.cat([draws[:, :1], draws[:, 1:] / 2, draws[:, 1:] / 2], 1)
    for _ in range(1500):
        chosen = draws[int(torch.randint(len(draws), (), generator=generator)), 1:].flatten(1)
        true = torch.bernoulli(chosen, generator=generator).sum(1)
        if how == "errors":
            true = errors.quantiles(chosen.double().sum(1), torch.rand(2, dtype=torch.float64, generator=generator))
        rows.append({"z": volume_scores(draws, true, [errors] * len(draws) if how == "errors" else [])})
    held = [float(share) for share in coverage(rows).split(" / ")]
    # 3000 volumes, in draws pairs of one: standard errors below 1.3, 1.1 and 0.6 points.
    assert held == pytest.approx([50, 80, 95], abs=4)


def test_coverage_counts_what_is_within_normal_quantiles() -> None:
    assert coverage([{"z": [0.67, -0.68]}, {"z": [1.28, -1.97]}]) == "25 / 75 / 75"
    assert coverage([]) == "–"


def test_a_perfect_answer_has_perfect_scores_and_a_wrong_one_the_worst(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    path = tmp_path / "images" / "hippocampus_014.nii.gz"
    like = Volume.from_grid(torch.rand(12, 12, 12), Grid.from_spacing((12, 12, 12), 1.0))
    labels = torch.zeros(12, 12, 12, dtype=torch.int64)
    labels[3:9, 3:9, 3:6], labels[3:9, 3:9, 6:9] = 1, 2
    write_scan(path, like.data, like)
    write_labels(tmp_path / "labels" / path.name, labels, like)
    sure = torch.nn.functional.one_hot(labels, 3).movedim(-1, 0).float()
    row = score("perfect", path, lambda volume: sure)
    assert row["method"] == "perfect" and row["scan"] == "014"
    assert row["dice"] == 1 and row["hd95"] == row["brier"] == row["ece"] == row["volume_error"] == 0 and row["nll"] == 0
    assert row["z"] == [0.0, 0.0]
    swapped = score("swapped", path, lambda volume: sure[[0, 2, 1]])
    assert swapped["dice"] == 0 and swapped["brier"] == pytest.approx(2 * 216 / 1728)
    assert swapped["nll"] == pytest.approx(216 / 1728 * 6 * math.log(10))  # of a floor of 1e-6
    half = score("half", path, lambda volume: torch.stack([sure, sure[[0, 2, 1]]]))
    assert half["brier"] == pytest.approx(0.5 * 216 / 1728) and half["nll"] == pytest.approx(216 / 1728 * math.log(2))


def bumps() -> Tensor:
    """A scan with structure at all scales, of mean about one, and dark beyond."""
    generator = torch.Generator().manual_seed(3)
    place = Grid.from_spacing(SHAPE, 1.0).coordinates()
    rough = 0.25 * torch.randn(SHAPE, generator=generator)
    return (torch.exp(-place.square().sum(-1) / 200) * (2.0 + rough)).float()


def changed(name: str, seed: int = 0) -> Tensor:
    change = {**uncertainty.SHIFTS, **uncertainty.CONTRASTS}[name]
    assert change is not None
    found = change(bumps(), SPACING, torch.Generator().manual_seed(seed))
    assert found.shape == SHAPE and found.dtype == torch.float32 and bool(found.isfinite().all())
    return found


def test_contrast_is_inverted_squared_or_in_another_unit() -> None:
    image = bumps()
    inverted = changed("inverted contrast")
    torch.testing.assert_close(inverted + image, image.max().expand(SHAPE))
    assert float(inverted.min()) == 0
    torch.testing.assert_close(changed("squared"), image**2)
    other = changed("another unit")
    torch.testing.assert_close((other - 200) / 500, image, atol=1e-4, rtol=0)
    # What a network is given is the same.
    torch.testing.assert_close(standardised(other[None, None]), standardised(image[None, None]), atol=1e-3, rtol=0)


def test_fluid_is_the_brightest_and_white_matter_darker_than_grey_as_in_t2() -> None:
    change = uncertainty.CONTRASTS["T2-like"]
    assert change is not None
    t1, t2 = ({tissue: of[tissue][0][1] for tissue in ("CSF", "GM", "WM")} for of in (CONTRASTS["T1"], CONTRASTS["T2"]))
    values = torch.tensor([*t1.values()] + [t1["WM"]] * 40)[None, None]  # the bright end is white matter
    found = change(2.5 * values, SPACING, torch.Generator())
    assert found.flatten()[:3].tolist() == pytest.approx([*t2.values()], abs=1e-5)
    between = change(torch.tensor([(t1["CSF"] + t1["GM"]) / 2] + [t1["WM"]] * 40)[None, None], SPACING, torch.Generator())
    assert float(between.flatten()[0]) == pytest.approx((t2["CSF"] + t2["GM"]) / 2)


def test_noise_bias_and_blur_are_as_strong_as_they_say() -> None:
    image = bumps()
    noise = changed("noise") - image
    assert abs(float(noise.mean())) < 0.005 and float(noise.std()) == pytest.approx(0.15, rel=0.02)
    apart = (noise[1:] * noise[:-1]).mean() / noise.var()
    assert abs(float(apart)) < 0.03
    fields = torch.stack([(changed("bias", seed) / image).log() for seed in range(12)])
    assert float(fields.square().mean().sqrt()) == pytest.approx(0.4, rel=0.25)
    assert float((fields[:, 1:] - fields[:, :-1]).abs().mean()) < 0.15 * float(fields.abs().mean())  # smooth
    blurred = changed("blur")
    assert float(blurred.mean()) == pytest.approx(float(image.mean()), rel=1e-4)

    def roughness(x: Tensor) -> float:
        inside = x[8:-8, 8:-8, 8:-8]
        return float(sum(inside.diff(dim=axis).square().mean() for axis in range(3)))

    assert roughness(blurred) < 0.2 * roughness(image)


def test_every_fourth_slice_is_lost_and_no_other() -> None:
    image, lost = bumps(), changed("every fourth slice lost")
    gone = torch.arange(SHAPE[1]) % 4 == 0
    assert bool((lost[:, gone] == 0).all()) and torch.equal(lost[:, ~gone], image[:, ~gone])


def test_a_scan_is_changed_alike_for_every_method_and_each_in_its_own_way(tmp_path: Path) -> None:
    grid = Grid.from_spacing(SHAPE, 1.5)
    paths = [tmp_path / f"hippocampus_{number:03d}.nii.gz" for number in (4, 9)]
    for path in paths:
        write_scan(path, 300 * bumps(), Volume.from_grid(bumps(), grid))
    once, again, other = (uncertainty.shifted(path, "noise") for path in (*paths[:1] * 2, paths[1]))
    assert torch.equal(once.data, again.data) and not torch.allclose(once.data, other.data)
    assert not torch.allclose(once.data, uncertainty.shifted(paths[0], "noise", seed=1).data)
    assert torch.equal(once.grid.affine, read_scan(paths[0]).grid.affine)
    assert torch.equal(uncertainty.shifted(paths[0], "none").data, read_scan(paths[0]).data)
    # Whatever its unit, a scan has a foreground of mean one before it is changed: noise has the same share of it.
    assert float((once.data - other.data).std()) == pytest.approx(0.15 * math.sqrt(2), rel=0.03)


def test_methods_of_a_table_are_those_that_can_be_asked() -> None:
    known = {*few_labels.ANSWERS, *few_labels.METHODS, *uncertainty.DRAWN, uncertainty.ENSEMBLE}
    assert set(uncertainty.MEASURED) <= known and set(contrast.METHODS) <= known
    assert set(uncertainty.FEW) <= {*uncertainty.MEASURED, *contrast.METHODS}


def uncertain(shift: str, method: str, value: float) -> dict[str, object]:
    return {"shift": shift, "method": method, "dice": value, "nll": 2 * value, "brier": value / 8, "ece": value / 4, "z": [0.1, 1.0, 3.0]}


def test_uncertainty_has_five_lines_a_method_and_a_column_a_shift() -> None:
    rows = [uncertain("none", "A", 0.8), uncertain("none", "A", 0.88), uncertain("noise", "A", 0.5), uncertain("none", "B", 0.4)]
    lines = uncertainty.summarise(rows, ("none", "noise"))
    assert [(line["method"], line["score"]) for line in lines[:5]] == [
        *(("A", "Dice"), ("A", "nats a voxel"), ("A", "Brier score"), ("A", "ECE near the border")),
        ("A", "volumes in 50 / 80 / 95 % intervals"),
    ]
    assert [line["none"] for line in lines[:5]] == ["0.840", "1.680", "0.1050", "0.210", "33 / 67 / 67"]
    assert [line["noise"] for line in lines[:5]] == ["0.500", "1.000", "0.0625", "0.125", "33 / 67 / 67"]
    assert [line["noise"] for line in lines[5:]] == ["–"] * 5 and lines[5]["none"] == "0.400"


def test_architectures_are_told_by_what_was_measured_of_them() -> None:
    crops, slices = architectures.CROPS, architectures.SLICES
    rows = [
        {"collection": crops, "kind": "scan", "method": "U-Net", "dice": dice, "hd95": 1.0, "nll": 0.05, "seconds": 0.2} for dice in (0.8, 0.9)
    ]
    rows += [{"collection": crops, "kind": "scan", "method": "FCN", "dice": dice, "hd95": 2.0, "nll": 0.06, "seconds": 0.4} for dice in (0.7, 0.8)]
    rows += [{"collection": slices, "kind": "scan", "method": "U-Net", "dice": 0.5, "missed": 0.25, "seconds": 0.1}]
    cost = {"collection": crops, "kind": "cost", "scans": 50}
    rows += [{**cost, "method": "U-Net", "parameters": 1234567, "seconds": 0.4, "peak_gib": 1.5}]
    rows += [{**cost, "method": architectures.PLAIN, "parameters": 1234567, "seconds": 0.5, "peak_gib": 1.2}]
    rows += [{**cost, "method": architectures.PATCHWISE, "scan_seconds": 321.4}]
    lines = {(line["set"], line["network"]): line for line in architectures.summarise(rows)}
    unet = lines[crops, "U-Net"]
    assert unet["Dice"] == "0.850 ± 0.071" and unet["HD95, mm"] == "1.00 ± 0.00" and unet["nats a voxel"] == "0.0500 ± 0.0000"
    assert unet["parameters"] == "1,234,567" and unet["seconds a step"] == "0.40" and unet["peak GiB"] == "1.50"
    assert unet["seconds an epoch"] == f"{0.4 * 50 / few_labels.BATCH:.0f}" and unet["structures missed, %"] == "–"
    assert lines[crops, architectures.PATCHWISE]["seconds a scan"] == "321" and lines[crops, architectures.PATCHWISE]["Dice"] == "–"
    assert lines[slices, "U-Net"]["structures missed, %"] == "25" and lines[slices, "U-Net"]["parameters"] == "–"
    told = architectures.notes(rows)
    assert "FCN -0.100 [-0.100, -0.100]" in told and "takes 0.80 of the plain loop's time, and the process 1.25 of its memory" in told
