"""`probmed register`: what it writes, where it lies, what it refuses."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from results import refused
from typer.testing import CliRunner, Result

from probmed import cli
from probmed.grids import Grid
from probmed.metrics import dice
from probmed.transforms import Affine, Displacement, warp
from probmed.volumes import Volume, read_labels, read_scan
from probmed.warps import read_affine, read_warp
from probmed.workflows import registration
from probmed.workflows.propagation import called, label_shares
from probmed.workflows.registration import information, overlap, places
from probmed.workflows.registration_networks import NetworkSettings, TrainedRegistration

nib: Any = nibabel  # its classes are partly untyped
Array = NDArray[Any]

XFM = "from-moving_to-fixed_mode-image"
PLAIN = {
    *(f"desc-{what}.{suffix}" for what in ("moved", "jacobian", "sd") for suffix in ("nii.gz", "json")),
    *(f"{XFM}_xfm.{suffix}" for suffix in ("nii.gz", "json")),
    *(f"{XFM}_desc-affine_xfm.{suffix}" for suffix in ("mat", "json")),
    *(f"from-fixed_to-moving_mode-image_xfm.{suffix}" for suffix in ("nii.gz", "json")),
    *("registration.tsv", "registration.json", "report.html"),
}
LABELLED = {
    *("dseg.nii.gz", "dseg.tsv", "dseg.json", "volumes.tsv", "volumes.json"),
    *(f"label-{name}_probseg.{suffix}" for name in ("core", "2") for suffix in ("nii.gz", "json")),
}


def oblique(spacing: tuple[float, float, float], angle: float, middle: tuple[float, float, float], shape: Any) -> Array:
    """Axes turned about z by an angle, the middle of the field of view at a point."""
    c, s = math.cos(angle), math.sin(angle)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag(spacing)
    affine[:3, 3] = np.array(middle) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


FIXED_SHAPE, MOVING_SHAPE = (22, 20, 12), (24, 24, 24)
FIXED_AFFINE = oblique((1.0, 1.1, 2.0), 0.2, (0.5, -0.3, 0.2), FIXED_SHAPE)
MOVING_AFFINE = oblique((-1.0, 1.0, 1.0), 0.0, (1.5, -1.0, 0.5), MOVING_SHAPE)


def anatomy(points: Array) -> Array:
    """Blobs and a smooth texture, a function of the world, mm ``(..., d)``."""
    x, y = points[..., 0], points[..., 1]
    z = points[..., 2] if points.shape[-1] == 3 else np.zeros_like(x)
    body = 100 / (1 + np.exp(1.5 * (np.sqrt(x**2 + 1.3 * y**2 + z**2) - 8)))
    texture = 1 + 0.25 * np.sin(0.9 * x + 0.3 * z) * np.cos(0.8 * y - 0.4 * z)
    return np.asarray(body * texture + 60 * np.exp(-((x - 2) ** 2 + y**2 + (z + 1) ** 2) / 8))


def regions(points: Array) -> Array:
    """1 in the core, 2 in the shell around it."""
    radius = np.linalg.norm(points, axis=-1)
    return np.asarray(np.where(radius < 4, 1, np.where(radius < 7, 2, 0)).astype(np.uint8))


def bent(points: Array) -> Array:
    """A smooth map of the world that moves points by up to 2 mm."""
    return np.asarray(points + 1.4 * np.sin(0.25 * points[..., ::-1] + 0.5))


def world(shape: Any, affine: Array) -> Array:
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    d = len(shape)
    return np.asarray(voxels @ affine[:d, :d].T + affine[:d, 3])


def save(values: Array, affine: Array, name: str | Path) -> None:
    nib.save(nib.Nifti1Image(values, affine), name)


def noisy(values: Array, seed: int) -> Array:
    return np.asarray((values + np.random.default_rng(seed).normal(0, 1, values.shape) + 5).astype(np.float32))


def write_pair(folder: Path) -> None:
    moving, fixed = world(MOVING_SHAPE, MOVING_AFFINE), world(FIXED_SHAPE, FIXED_AFFINE)
    save(noisy(anatomy(bent(moving)), 0), MOVING_AFFINE, folder / "m.nii.gz")
    save(noisy(anatomy(fixed), 1), FIXED_AFFINE, folder / "f.nii.gz")
    save(regions(bent(moving)), MOVING_AFFINE, folder / "regions.nii.gz")
    (folder / "regions.tsv").write_text("index\tname\n1\tcore\n")


def write_slices(folder: Path) -> None:
    affine = np.diag([1.0, 0.8, 3.0, 1.0])
    affine[:2, 3] = -15
    points = world((40, 40), affine)
    save(noisy(anatomy(bent(points)), 0), affine, folder / "m2.nii.gz")
    save(noisy(anatomy(points), 1), affine, folder / "f2.nii.gz")
    save(regions(bent(points)), affine, folder / "regions2.nii.gz")


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a pair, and a report that takes no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["probmed", "register"])
    monkeypatch.setattr("probmed.cli.register.registration_page", lambda *_: "<p>")
    write_pair(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair that was registered with everything: labels, draws of the warp, report."""
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["probmed", "register", "m.nii.gz"])
        options = ("--labels", "regions.nii.gz", "--draws", "6", "--save-draws", "2", "--seed", "3")
        result = call("register", "m.nii.gz", "f.nii.gz", "-o", "out", *options)
    assert result.exit_code == 0, result.output
    assert "core" in result.stdout and "m_report.html" in result.stdout
    return folder


def test_all_files_and_no_others(done: Path) -> None:
    draws = {f"{XFM}_desc-draw00{n}_xfm.{suffix}" for n in (1, 2) for suffix in ("nii.gz", "json")}
    assert {path.name for path in (done / "out").iterdir()} == {f"m_{name}" for name in PLAIN | LABELLED | draws}
    for path in (done / "out").iterdir():
        if not path.name.endswith((".json", ".html", "dseg.tsv")):
            name = path.name.removesuffix(".gz")
            record = json.loads(path.with_name(f"{name[: name.rfind('.')]}.json").read_text())
            assert record["Description"]
            assert record["GeneratedBy"][0]["Command"].startswith("probmed register m.nii.gz")
            assert [source["File"] for source in record["Sources"]] == ["m.nii.gz", "f.nii.gz", "regions.nii.gz", "regions.tsv"]


def test_images_lie_on_the_fixed_image_s_voxels(done: Path) -> None:
    fixed = nib.load(done / "f.nii.gz")
    images = [path for path in (done / "out").glob("*.nii.gz") if "xfm" not in path.name]
    assert len(images) == 6
    for path in images:
        image = nib.load(path)
        assert image.shape == fixed.shape
        np.testing.assert_array_equal(image.affine, fixed.affine)
        assert image.header.get_xyzt_units() == fixed.header.get_xyzt_units()


def rms(a: Array, b: Array) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


def test_the_written_warp_gives_the_moved_image_and_its_inverse_brings_it_back(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(done)
    assert call("warp", "m.nii.gz", "-t", f"out/m_{XFM}_xfm.nii.gz", "-r", "f.nii.gz", "-o", "again.nii.gz").exit_code == 0
    moved, again = nib.load("out/m_desc-moved.nii.gz").get_fdata(), nib.load("again.nii.gz").get_fdata()
    assert rms(moved, again) < 1e-4 * moved.std()  # both are linear on one lattice
    fixed = nib.load("f.nii.gz").get_fdata()
    inside = fixed > 30
    assert np.corrcoef(again[inside], fixed[inside])[0, 1] > 0.9
    back = "out/m_from-fixed_to-moving_mode-image_xfm.nii.gz"
    assert call("warp", "out/m_desc-moved.nii.gz", "-t", back, "-r", "m.nii.gz", "-o", "back.nii.gz").exit_code == 0
    moving = nib.load("m.nii.gz").get_fdata()
    inside = moving > 30
    assert np.corrcoef(nib.load("back.nii.gz").get_fdata()[inside], moving[inside])[0, 1] > 0.97


def test_the_warp_is_the_truth_and_there_and_back_is_nowhere(done: Path) -> None:
    """Both fields in the world, mm; the truth is known where there is something to see."""
    points = torch.from_numpy(world(FIXED_SHAPE, FIXED_AFFINE))
    points = points[points.norm(dim=-1) < 8]
    there = read_warp(done / f"out/m_{XFM}_xfm.nii.gz")
    back = read_warp(done / "out/m_from-fixed_to-moving_mode-image_xfm.nii.gz")
    assert (back(there(points)) - points).norm(dim=-1).mean() < 0.2  # voxels of 1 mm and more, a lattice of 2
    error = torch.from_numpy(bent(there(points).numpy())) - points
    start = torch.from_numpy(bent(points.numpy())) - points
    assert error.square().mean().sqrt() < 0.4 * start.square().mean().sqrt()


def test_the_affine_map_is_a_part_of_the_warp(done: Path) -> None:
    """What the warp does beyond the affine map is the deformation, which the prior keeps small."""
    affine = read_affine(done / f"out/m_{XFM}_desc-affine_xfm.mat")
    points = torch.from_numpy(world(FIXED_SHAPE, FIXED_AFFINE))
    beyond = read_warp(done / f"out/m_{XFM}_xfm.nii.gz")(points) - affine(points)
    assert beyond.norm(dim=-1).mean() < (affine(points) - points).norm(dim=-1).mean() + 1.5
    assert not torch.allclose(affine.matrix, torch.eye(4, dtype=torch.float64), atol=1e-2)


def test_spread_jacobian_and_draws(done: Path) -> None:
    spread = nib.load(done / "out/m_desc-sd.nii.gz").get_fdata()
    assert (spread > 0).all() and spread.max() < 10
    assert (nib.load(done / "out/m_desc-jacobian.nii.gz").get_fdata() > 0).all()
    one, other = (read_warp(done / f"out/m_{XFM}_desc-draw00{n}_xfm.nii.gz").field for n in (1, 2))
    mode = read_warp(done / f"out/m_{XFM}_xfm.nii.gz").field
    assert one.shape == other.shape == mode.shape
    apart = (one - mode).square().sum(0).mean().sqrt()
    assert 0.3 * spread.mean() < apart < 3 * spread.mean()
    assert not torch.equal(one, other)


def test_labels_and_their_volumes(done: Path) -> None:
    carried, truth = read_labels(done / "out/m_dseg.nii.gz").data, torch.from_numpy(regions(world(FIXED_SHAPE, FIXED_AFFINE)))
    assert set(carried.unique().tolist()) == {0, 1, 2}
    # Voxels of 2 mm, a core of 4: half a voxel's error is as much as is left.
    assert min(dice(carried == k, truth == k) for k in (1, 2)) > 0.8
    chances = [read_scan(done / f"out/m_label-{name}_probseg.nii.gz").data for name in ("core", "2")]
    assert all(p.min() >= 0 and p.max() <= 1 for p in chances)
    assert sum(chances).max() <= 1 + 1e-5  # type: ignore[union-attr]
    table = pd.read_csv(done / "out/m_volumes.tsv", sep="\t", dtype={"name": str}).set_index("name")
    assert list(table.index) == ["core", "2"]
    voxel_ml = abs(np.linalg.det(FIXED_AFFINE[:3, :3])) / 1000
    for name, chance in zip(table.index, chances, strict=True):
        assert table.loc[name, "volume_ml"] == pytest.approx(float(chance.sum()) * voxel_ml, abs=2e-4)
        assert table.loc[name, "sd_ml"] > 0
    columns = ["q025", "q100", "q250", "q750", "q900", "q975"]
    assert (table[columns].diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)
    assert list(pd.read_csv(done / "out/m_dseg.tsv", sep="\t", dtype=str)["name"]) == ["core", "2"]


def test_the_table_of_the_pair(done: Path) -> None:
    table = pd.read_csv(done / "out/m_registration.tsv", sep="\t")
    row = table.iloc[0]
    assert row["correlation_headers"] < row["correlation_all"] and row["information_headers"] < row["information_all"]
    assert math.isfinite(row["log_joint"]) and row["folding"] == 0 and 0 < row["jacobian_min"] < row["jacobian_max"]
    # With the velocity integrated out, its own log density no longer counts.
    assert math.isfinite(row["log_evidence"]) and 0 < row["log_evidence_error"] < 0.01 * abs(row["log_evidence"])
    stages = [row[f"seconds_{stage}"] for stage in ("read", "affine", "velocity", "posterior", "results")]
    assert row["seconds"] == pytest.approx(sum(stages), abs=1e-3)
    described = json.loads((done / "out/m_registration.json").read_text())
    assert set(table.columns) <= set(described)


def test_same_seed_same_bytes_and_another_seed_another_spread(done: Path, workplace: Path) -> None:
    for seed in ("3", "4"):
        assert call("register", "m.nii.gz", "f.nii.gz", "-o", seed, "--draws", "6", "--seed", seed).exit_code == 0
    for name in (f"m_{XFM}_xfm.nii.gz", "m_from-fixed_to-moving_mode-image_xfm.nii.gz", "m_desc-sd.nii.gz", "m_desc-moved.nii.gz"):
        assert (workplace / "3" / name).read_bytes() == (done / "out" / name).read_bytes()
    assert (workplace / "3/m_desc-sd.nii.gz").read_bytes() != (workplace / "4/m_desc-sd.nii.gz").read_bytes()


def test_slices(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    write_slices(workplace)
    result = call("register", "m2.nii.gz", "f2.nii.gz", "-o", "out", "--labels", "regions2.nii.gz", "--draws", "4", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    image = nib.load("out/m2_desc-moved.nii.gz")
    assert image.shape == (40, 40)
    np.testing.assert_array_equal(image.affine, nib.load("f2.nii.gz").affine)
    assert nib.load(f"out/m2_{XFM}_xfm.nii.gz").shape[3:] == (1, 2)
    assert call("warp", "m2.nii.gz", "-t", f"out/m2_{XFM}_xfm.nii.gz", "-r", "f2.nii.gz", "-o", "again.nii.gz").exit_code == 0
    moved = image.get_fdata()
    assert rms(moved, nib.load("again.nii.gz").get_fdata()) < 1e-4 * moved.std()
    assert np.corrcoef(moved.ravel(), nib.load("f2.nii.gz").get_fdata().ravel())[0, 1] > 0.97
    table = pd.read_csv("out/m2_volumes.tsv", sep="\t")
    # A slice is as thick as its file says, 3 mm.
    assert table["volume_ml"][0] == pytest.approx(math.pi * 16 * 3 / 1000, rel=0.2)


def test_the_affine_map_alone(workplace: Path) -> None:
    result = call("register", "m.nii.gz", "f.nii.gz", "-o", "out", "--no-deformation", "--affine", "6", "--labels", "regions.nii.gz")
    assert result.exit_code == 0, result.output
    names = {path.name for path in (workplace / "out").iterdir()}
    absent = {name for name in PLAIN | LABELLED if "sd." in name or "probseg" in name}
    assert names == {f"m_{name}" for name in (PLAIN | LABELLED) - absent}
    matrix = read_affine(workplace / f"out/m_{XFM}_desc-affine_xfm.mat").matrix[:3, :3]
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(3, dtype=torch.float64), atol=1e-5, rtol=0)
    points = torch.from_numpy(world(FIXED_SHAPE, FIXED_AFFINE))
    moved = read_warp(workplace / f"out/m_{XFM}_xfm.nii.gz")(points)
    torch.testing.assert_close(moved, read_affine(workplace / f"out/m_{XFM}_desc-affine_xfm.mat")(points), atol=1e-3, rtol=0)
    table = pd.read_csv(workplace / "out/m_volumes.tsv", sep="\t")
    assert table["sd_ml"].isna().all() and (table["volume_ml"] > 0).all()


def test_headers_alone_and_one_image_with_itself(workplace: Path) -> None:
    for out, options in (("nothing", ("--affine", "none", "--no-deformation")), ("itself", ("--draws", "0"))):
        result = call("register", "f.nii.gz", "f.nii.gz", "-o", out, *options)
        assert result.exit_code == 0, result.output
        assert not list((workplace / out).glob("*_desc-sd*"))
    same = nib.load("f.nii.gz").get_fdata()
    np.testing.assert_allclose(nib.load("nothing/f_desc-moved.nii.gz").get_fdata(), same, rtol=1e-3, atol=1e-2)
    assert read_warp(workplace / f"nothing/f_{XFM}_xfm.nii.gz").field.abs().max() < 1e-4
    assert rms(nib.load("itself/f_desc-moved.nii.gz").get_fdata(), same) < 0.1 * same.std()


def test_a_mask_says_what_is_matched(workplace: Path) -> None:
    """One side of the fixed image is false, 4 mm off: it pulls the other along, unless the mask leaves it out."""
    points = world(FIXED_SHAPE, FIXED_AFFINE)
    false = points[..., 0] > 1
    values = np.where(false, anatomy(points + np.array([0, 4.0, 0])), anatomy(points))
    save(noisy(values, 1), FIXED_AFFINE, "f.nii.gz")
    save((~false).astype(np.uint8), FIXED_AFFINE, "mask.nii.gz")
    error = []
    inside = torch.from_numpy((np.linalg.norm(points, axis=-1) < 8) & ~false)
    for options in ((), ("--mask", "mask.nii.gz")):
        assert call("register", "m.nii.gz", "f.nii.gz", "-o", "out", "--draws", "0", *options).exit_code == 0
        there = read_warp(workplace / f"out/m_{XFM}_xfm.nii.gz")(torch.from_numpy(points)[inside])
        error.append(float(np.abs(bent(there.numpy()) - points[inside.numpy()]).mean()))
    assert error[1] < 0.8 * error[0]


def test_a_mask_of_the_moving_image_says_what_may_explain(workplace: Path) -> None:
    """What lies where the mask is 0 may change places: the warp is the same, and it is carried all the same."""
    values, inside = nib.load("m.nii.gz").get_fdata().astype(np.float32), np.ones(MOVING_SHAPE, bool)
    inside[:9, :, 6:] = False
    save(inside.astype(np.uint8), MOVING_AFFINE, "mask.nii.gz")
    warps, moved = [], []
    for seed in (None, 0):
        if seed is not None:
            values[~inside] = np.random.default_rng(seed).permutation(values[~inside])
            save(values, MOVING_AFFINE, "m.nii.gz")
        for options in ((), ("--moving-mask", "mask.nii.gz")):
            assert call("register", "m.nii.gz", "f.nii.gz", "-o", "out", "--draws", "0", "--affine", "none", *options).exit_code == 0
            warps.append(read_warp(workplace / f"out/m_{XFM}_xfm.nii.gz").field)
            moved.append(nib.load("out/m_desc-moved.nii.gz").get_fdata())
    torch.testing.assert_close(warps[1], warps[3], atol=1e-3, rtol=0)  # but for how the image's unit is rounded
    assert all((warps[0] - warps[n]).abs().max() > 0.3 for n in (1, 2))
    assert not np.allclose(moved[1], moved[3]) and (moved[1] > 0).mean() > 0.9
    record = json.loads((workplace / "out/m_registration.json").read_text())
    assert [source["File"] for source in record["Sources"]] == ["m.nii.gz", "f.nii.gz", "mask.nii.gz"]


def test_images_that_headers_place_apart_come_together_on_request(workplace: Path) -> None:
    far = MOVING_AFFINE.copy()
    far[:3, 3] += 400
    save(nib.load("m.nii.gz").get_fdata().astype(np.float32), far, "far.nii.gz")
    result = call("register", "far.nii.gz", "f.nii.gz", "-o", "out", "--draws", "0", "--apart")
    assert result.exit_code == 0, result.output
    row = pd.read_csv("out/far_registration.tsv", sep="\t").iloc[0]
    assert math.isnan(row["correlation_headers"]) and row["correlation_all"] > 0.9


def test_a_network_s_answer(workplace: Path) -> None:
    write_slices(workplace)
    (workplace / "run").mkdir()
    grid = Grid.from_spacing((40, 40), (1.0, 0.8))
    TrainedRegistration.build(grid, NetworkSettings(features=(4, 4, 4, 4, 4, 4))).save(workplace / "run")
    options = ("--model", "run", "--refine", "3", "--draws", "3", "--save-draws", "1")
    result = call("register", "m2.nii.gz", "f2.nii.gz", "-o", "out", *options)
    assert result.exit_code == 0, result.output
    row = pd.read_csv("out/m2_registration.tsv", sep="\t").iloc[0]
    assert math.isfinite(row["elbo"]) and math.isnan(row["log_joint"]) and row["seconds_network"] > 0
    assert row["gap"] == pytest.approx(row["elbo"] - row["elbo_network"], abs=1e-3) and row["gap_error"] > 0
    assert "refined by" in result.stdout
    assert {"elbo_network", "gap", "gap_error"} <= set(json.loads((workplace / "out/m2_registration.json").read_text()))
    # Without refinement, the bound of the network's answer is there alone; it is estimated by the same draws.
    assert call("register", "m2.nii.gz", "f2.nii.gz", "-o", "plain", "--model", "run").exit_code == 0
    plain = pd.read_csv("plain/m2_registration.tsv", sep="\t").iloc[0]
    assert plain["elbo_network"] == pytest.approx(row["elbo_network"], rel=1e-4) and math.isnan(plain["gap"])
    assert (nib.load("out/m2_desc-sd.nii.gz").get_fdata() > 0).all()
    assert (workplace / f"out/m2_{XFM}_desc-draw001_xfm.nii.gz").exists()


def test_a_network_without_a_posterior_gives_no_draws(workplace: Path) -> None:
    write_slices(workplace)
    (workplace / "run").mkdir()
    settings = NetworkSettings("voxelmorph-mse", features=(4, 4, 4, 4, 4, 4))
    TrainedRegistration.build(Grid.from_spacing((40, 40), (1.0, 0.8)), settings).save(workplace / "run")
    images = "register", "m2.nii.gz", "f2.nii.gz", "--model", "run"
    refused(call(*images, "-o", "other", "--save-draws", "1"), "run: was trained by voxelmorph-mse and has no posterior", "--refine")
    result = call(*images, "-o", "out")
    assert result.exit_code == 0 and "no standard deviation" in result.stderr
    assert not list((workplace / "out").glob("*_desc-sd*"))
    assert math.isnan(pd.read_csv("out/m2_registration.tsv", sep="\t")["elbo_network"][0])
    assert call(*images, "-o", "out", "--refine", "2", "--draws", "2").exit_code == 0
    assert (workplace / "out/m2_desc-sd.nii.gz").exists()


@pytest.mark.parametrize("image", ["fixed", "moving"])
def test_a_network_sees_nothing_of_what_is_masked(image: str, workplace: Path) -> None:
    """Values that change places where the mask is 0 change neither answer nor ELBO."""
    write_slices(workplace)
    (workplace / "run").mkdir()
    trained = TrainedRegistration.build(Grid.from_spacing((40, 40), (1.0, 0.8)), NetworkSettings(features=(4, 4, 4, 4, 4, 4)))
    torch.manual_seed(0)
    torch.nn.init.normal_(trained.guide.network.head.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    trained.save(workplace / "run")
    name, option = {"fixed": ("f2.nii.gz", "--mask"), "moving": ("m2.nii.gz", "--moving-mask")}[image]
    before = nib.load(name)
    values, inside = before.get_fdata().astype(np.float32), np.ones((40, 40), bool)
    inside[24:, 10:30] = False
    save(inside.astype(np.uint8), before.affine, "mask.nii.gz")
    found = []
    shuffled = values.copy()
    shuffled[~inside] = np.random.default_rng(0).permutation(values[~inside])
    for out, changed in (("a", values), ("b", shuffled)):
        save(changed, before.affine, name)
        for options in ((), (option, "mask.nii.gz")):
            result = call("register", "m2.nii.gz", "f2.nii.gz", "-o", f"{out}{len(options)}", "--model", "run", "--draws", "0", *options)
            assert result.exit_code == 0, result.output
        found.append([pd.read_csv(f"{out}{n}/m2_registration.tsv", sep="\t")["elbo_network"][0] for n in (0, 2)])
        found[-1].append(read_warp(workplace / f"{out}2/m2_{XFM}_xfm.nii.gz").field)
    (whole, masked, field), (other, again, second) = found
    assert whole != other and masked == again and masked != whole
    assert torch.equal(field, second) and field.abs().max() > 0.01


def unbent(points: Array) -> Array:
    """The inverse of ``bent``, by its fixed point."""
    found = points
    for _ in range(50):
        found = found + 0.5 * (points - bent(found))
    return np.asarray(found)


def landmark_table(scale: float = 1.0, rows: int = 6) -> pd.DataFrame:
    """Points that truly correspond: the moving image shows at y what the fixed one shows at x = ``bent(y)``."""
    fixed = np.random.default_rng(0).uniform(-5, 5, (rows, 3))
    places = scale * np.concatenate([fixed, unbent(fixed)], 1)
    return pd.DataFrame(places, columns=[f"{image}_{axis}" for image in ("fixed", "moving") for axis in "xyz"])


def write_landmarks(name: str = "points.tsv", **options: Any) -> None:
    landmark_table(**options).to_csv(name, sep="," if name.endswith(".csv") else "\t", index=False)


@pytest.mark.parametrize("name", ["points.tsv", "points.csv"])
def test_landmarks_bring_their_points_together(workplace: Path, name: str) -> None:
    write_landmarks(name)
    options = ("--landmarks", name, "--landmark-sd", "0.1", "--affine", "none", "--draws", "2")
    result = call("register", "m.nii.gz", "f.nii.gz", "-o", "out", *options)
    assert result.exit_code == 0, result.output
    row = pd.read_csv("out/m_registration.tsv", sep="\t").iloc[0]
    table = landmark_table()
    x, y = (torch.from_numpy(table.to_numpy(copy=True)[:, side]) for side in (slice(3), slice(3, 6)))
    assert row["landmark_error_headers"] == row["landmark_error_affine"] == pytest.approx(float((x - y).norm(dim=-1).mean()), abs=1e-3)
    there = read_warp(workplace / f"out/m_{XFM}_xfm.nii.gz")(x)
    assert row["landmark_error_all"] == pytest.approx(float((there - y).norm(dim=-1).mean()), abs=0.02)
    assert row["landmark_error_all"] < 0.1 * row["landmark_error_headers"]
    assert f"→ {row['landmark_error_all']:.2f} mm apart" in result.stdout
    assert row["tempering"] == pytest.approx(1 / 125, rel=1e-3)
    record = json.loads((workplace / "out/m_registration.json").read_text())
    assert [source["File"] for source in record["Sources"]] == ["m.nii.gz", "f.nii.gz", name]
    assert "landmark_error_all" in record


def test_landmarks_in_the_plane(workplace: Path) -> None:
    write_slices(workplace)
    pd.DataFrame({"fixed_x": [1.0], "fixed_y": [2.0], "moving_x": [2.5], "moving_y": [1.0]}).to_csv("p.tsv", sep="\t", index=False)
    options = ("--landmarks", "p.tsv", "--landmark-sd", "0.1", "--affine", "none", "--draws", "0")
    assert call("register", "m2.nii.gz", "f2.nii.gz", "-o", "out", *options).exit_code == 0
    row = pd.read_csv("out/m2_registration.tsv", sep="\t").iloc[0]
    assert row["landmark_error_headers"] == pytest.approx(math.hypot(1.5, 1.0), abs=1e-3)
    assert row["landmark_error_all"] < 0.5


def test_label_maps_of_both_images_are_matched(workplace: Path) -> None:
    """Images that show nothing; their labels alone bring the core over."""
    generator = np.random.default_rng(2)
    for name, shape, affine in (("m", MOVING_SHAPE, MOVING_AFFINE), ("f", FIXED_SHAPE, FIXED_AFFINE)):
        save((100 + generator.normal(0, 1, shape)).astype(np.float32), affine, f"{name}.nii.gz")
    save(regions(world(FIXED_SHAPE, FIXED_AFFINE)), FIXED_AFFINE, "wanted.nii.gz")
    wanted, overlaps = torch.from_numpy(regions(world(FIXED_SHAPE, FIXED_AFFINE))), []
    for options in ((), ("--match-labels", "regions.nii.gz", "wanted.nii.gz")):
        common = ("-o", "out", "--labels", "regions.nii.gz", "--affine", "none", "--draws", "0")
        result = call("register", "m.nii.gz", "f.nii.gz", *common, *options)
        assert result.exit_code == 0, result.output
        overlaps.append([dice(read_labels(workplace / "out/m_dseg.nii.gz").data == k, wanted == k) for k in (1, 2)])
    assert min(overlaps[1]) > 0.78  # a voxel is half the core
    assert all(matched > alone + 0.03 for matched, alone in zip(overlaps[1], overlaps[0], strict=True))


# Files of others, and of earlier runs.


def test_what_an_earlier_run_wrote_is_replaced_and_nothing_else(workplace: Path) -> None:
    options = ("--affine", "none", "-o", "out")
    assert call("register", "m.nii.gz", "f.nii.gz", "--labels", "regions.nii.gz", "--draws", "2", "--save-draws", "2", *options).exit_code == 0
    (workplace / "out/m_notes.txt").write_text("mine")
    (workplace / "out/m_label-mine_probseg.nii.gz").write_text("mine")
    assert call("register", "m.nii.gz", "f.nii.gz", "--draws", "0", *options).exit_code == 0
    kept = {f"m_{name}" for name in PLAIN if "sd." not in name}
    assert {path.name for path in (workplace / "out").iterdir()} == kept | {"m_notes.txt", "m_label-mine_probseg.nii.gz"}


def test_files_of_others_stay(workplace: Path) -> None:
    (workplace / "m_report.html").write_text("mine")
    before = sorted(workplace.iterdir())
    refused(call("register", "m.nii.gz", "f.nii.gz", "-o", "."), "m_report.html: exists already, and probmed register did not write it")
    assert sorted(workplace.iterdir()) == before


def test_an_input_is_never_replaced(workplace: Path) -> None:
    (workplace / "regions.nii.gz").rename(workplace / "m_dseg.nii.gz")
    content = (workplace / "m_dseg.nii.gz").read_bytes()
    arguments = ("register", "m.nii.gz", "f.nii.gz", "--labels", "m_dseg.nii.gz", "-o", ".")
    refused(call(*arguments), "m_dseg.nii.gz: is an input and would be overwritten")
    assert (workplace / "m_dseg.nii.gz").read_bytes() == content


def test_an_interrupt_leaves_nothing(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = sorted(workplace.iterdir())
    monkeypatch.setattr("probmed.workflows.registration_outputs.write_affine", stop)
    assert call("register", "m.nii.gz", "f.nii.gz", "-o", "out", "--affine", "none", "--no-deformation").exit_code == 130
    assert sorted(workplace.iterdir()) == before


def test_an_unforeseen_failure_is_1_with_traceback_on_request(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(registration, "register", fail)
    result = call("register", "m.nii.gz", "f.nii.gz", "-o", "out")
    assert result.exit_code == 1 and "Traceback" not in result.stderr and "m.nii.gz: failed unexpectedly" in result.stderr
    assert "Traceback" in call("register", "m.nii.gz", "f.nii.gz", "-o", "out", "--debug").stderr
    assert not (workplace / "out").exists()


# Unusable input.


def like_moving(value: Any) -> Array:
    return np.full(MOVING_SHAPE, value)


def far_away() -> None:
    affine = MOVING_AFFINE.copy()
    affine[0, 3] += 300
    save(nib.load("m.nii.gz").get_fdata().astype(np.float32), affine, "m.nii.gz")


def colours() -> None:
    save(np.ones((4, 4, 4), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])), np.eye(4), "m.nii.gz")


def shifted_labels() -> None:
    affine = MOVING_AFFINE.copy()
    affine[2, 3] += 0.5
    save(nib.load("regions.nii.gz").get_fdata().astype(np.uint8), affine, "regions.nii.gz")


def constant_inside() -> None:
    inside = np.indices(MOVING_SHAPE)[0] < 9
    save(inside.astype(np.float32), MOVING_AFFINE, "m.nii.gz")
    save(inside.astype(np.uint8), MOVING_AFFINE, "mask.nii.gz")


FAULTS: dict[str, tuple[Callable[[], object], tuple[str, ...], tuple[str, ...]]] = {
    "missing": (lambda: Path("m.nii.gz").unlink(), (), ("m.nii.gz: does not exist", "check the path")),
    "missing fixed": (lambda: Path("f.nii.gz").unlink(), (), ("f.nii.gz: does not exist",)),
    "disjoint": (far_away, (), ("m.nii.gz: does not overlap f.nii.gz", "0 %", "301 mm apart", "--apart")),
    "disjoint without affine": (far_away, ("--apart", "--affine", "none"), ("does not overlap",)),
    "2D with 3D": (lambda: write_slices(Path()), ("2D",), ("m2.nii.gz: has 2 axes and f.nii.gz 3",)),
    "constant": (
        lambda: save(like_moving(np.float32(3)), MOVING_AFFINE, "m.nii.gz"), (), ("m.nii.gz: is constant",)
    ),
    "zero": (lambda: save(like_moving(np.float32(0)), MOVING_AFFINE, "m.nii.gz"), (), ("every voxel is 0",)),
    "NaN": (
        lambda: save(like_moving(np.float32(np.nan)), MOVING_AFFINE, "m.nii.gz"), (), ("13824 voxels", "NaN")
    ),
    "4D": (lambda: save(np.ones((8, 8, 8, 3), np.float32), np.eye(4), "m.nii.gz"), (), ("3 images",)),
    "RGB": (colours, (), ("colours",)),
    "text": (lambda: Path("m.nii.gz").write_text("a,b"), (), ("neither NIfTI nor MGH",)),
    "empty mask": (
        lambda: save(np.zeros(FIXED_SHAPE, np.uint8), FIXED_AFFINE, "mask.nii.gz"),
        ("--mask", "mask.nii.gz"),
        ("mask.nii.gz: is empty",),
    ),
    "mask on another grid": (
        lambda: save(np.ones(MOVING_SHAPE, np.uint8), MOVING_AFFINE, "mask.nii.gz"),
        ("--mask", "mask.nii.gz"),
        ("mask.nii.gz: is on another grid than f.nii.gz: 24×24×24 voxels, not 22×20×12", "resample"),
    ),
    "missing mask": (lambda: None, ("--mask", "mask.nii.gz"), ("mask.nii.gz: does not exist",)),
    "labels on another grid": (
        lambda: save(np.ones(FIXED_SHAPE, np.uint8), FIXED_AFFINE, "regions.nii.gz"),
        ("--labels", "regions.nii.gz"),
        ("regions.nii.gz: is on another grid than m.nii.gz",),
    ),
    "labels moved": (shifted_labels, ("--labels", "regions.nii.gz"), ("another grid than m.nii.gz", "0.5 mm away")),
    "labels in fractions": (
        lambda: save(like_moving(np.float32(0.5)), MOVING_AFFINE, "regions.nii.gz"),
        ("--labels", "regions.nii.gz"),
        ("regions.nii.gz: holds 13824 voxels that are no whole numbers",),
    ),
    "no labels": (
        lambda: save(like_moving(np.uint8(0)), MOVING_AFFINE, "regions.nii.gz"),
        ("--labels", "regions.nii.gz"),
        ("regions.nii.gz: is empty",),
    ),
    "affine of 2D": (lambda: None, ("--affine", "4"), ("affine map of 4 parameters", "6 (rigid)")),
    "affine in words": (lambda: None, ("--affine", "rigid"), ("--affine rigid", "12")),
    "more saved than drawn": (lambda: None, ("--save-draws", "3", "--draws", "2"), ("--save-draws 3", "raise --draws")),
    "draws of no deformation": (lambda: None, ("--save-draws", "1", "--no-deformation"), ("--save-draws 1",)),
    "no network": (lambda: Path("run").mkdir(), ("--model", "run"), ("run: holds no registration network",)),
    "landmarks that are missing": (lambda: None, ("--landmarks", "points.tsv"), ("points.tsv: does not exist",)),
    "landmarks without a column": (
        lambda: landmark_table().drop(columns="moving_y").to_csv("points.tsv", sep="\t", index=False),
        ("--landmarks", "points.tsv"),
        ("points.tsv: has no column moving_y", "fixed_x, fixed_y, fixed_z, moving_x"),
    ),
    "landmarks without a number": (
        lambda: landmark_table().assign(fixed_z="left").to_csv("points.tsv", sep="\t", index=False),
        ("--landmarks", "points.tsv"),
        ("points.tsv: has no number in column fixed_z, row 1: 'left'",),
    ),
    "no landmarks": (lambda: write_landmarks(rows=0), ("--landmarks", "points.tsv"), ("points.tsv: has no rows",)),
    "landmarks outside": (
        lambda: write_landmarks(scale=-9.0),
        ("--landmarks", "points.tsv"),
        ("points.tsv: has a point outside f.nii.gz in row 1: (", "LPS"),
    ),
    "landmarks of no accuracy": (
        write_landmarks, ("--landmarks", "points.tsv", "--landmark-sd", "0"), ("--landmark-sd 0: is no positive number",)
    ),
    "landmarks of an affine map": (
        write_landmarks,
        ("--landmarks", "points.tsv", "--no-deformation"),
        ("--landmarks: is for the deformation's fit, which --no-deformation leaves out",),
    ),
    "matched labels without a label in common": (
        lambda: save(np.full(FIXED_SHAPE, 7, np.uint8), FIXED_AFFINE, "wanted.nii.gz"),
        ("--match-labels", "regions.nii.gz", "wanted.nii.gz"),
        ("regions.nii.gz: has no label but 0 in common with wanted.nii.gz",),
    ),
    "matched labels of another grid": (
        lambda: None, ("--match-labels", "regions.nii.gz", "regions.nii.gz"), ("regions.nii.gz: is on another grid than f.nii.gz",)
    ),
    "empty moving mask": (
        lambda: save(np.zeros(MOVING_SHAPE, np.uint8), MOVING_AFFINE, "mask.nii.gz"),
        ("--moving-mask", "mask.nii.gz"),
        ("mask.nii.gz: is empty",),
    ),
    "moving mask on another grid": (
        lambda: save(np.ones(FIXED_SHAPE, np.uint8), FIXED_AFFINE, "mask.nii.gz"),
        ("--moving-mask", "mask.nii.gz"),
        ("mask.nii.gz: is on another grid than m.nii.gz",),
    ),
    "constant inside the mask": (
        constant_inside,
        ("--moving-mask", "mask.nii.gz"),
        ("m.nii.gz: is constant inside mask.nii.gz",),
    ),
    **{
        f"{option} with a network": (
            lambda: None, (option, *values, "--model", "run"), (f"{option}: is for a fit, in whose place --model has a network", "leave out")
        )
        for option, *values in (
            ("--similarity", "correlation"), ("--affine", "6"), ("--no-deformation",), ("--symmetric",), ("--apart",), ("--learn-prior",),
            ("--landmarks", "p.tsv"), ("--landmark-sd", "1"), ("--match-labels", "a.nii", "b.nii"),
        )
    },
    "refined nothing": (lambda: None, ("--refine", "5"), ("--refine 5", "--model")),
    "out is a file": (lambda: Path("out").write_text("x"), (), ("out: is a file, not a folder",)),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_unusable_input_gets_one_line_and_leaves_nothing(fault: str, workplace: Path) -> None:
    make, options, words = FAULTS[fault]
    make()
    before = sorted(workplace.iterdir())
    moving = "m2.nii.gz" if options == ("2D",) else "m.nii.gz"
    refused(call("register", moving, "f.nii.gz", "-o", "out", *(option for option in options if option != "2D")), *words)
    assert sorted(workplace.iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_not_there(workplace: Path) -> None:
    refused(call("register", "m.nii.gz", "f.nii.gz", "-o", "out", "--device", "cuda"), "--device cuda", "cpu")


@pytest.mark.parametrize("option", [("--draws", "-1"), ("--seed", "-1"), ("--similarity", "sum"), ("--save-draws", "x")])
def test_options_out_of_range(option: tuple[str, str], workplace: Path) -> None:
    result = call("register", "m.nii.gz", "f.nii.gz", "-o", "out", *option)
    assert result.exit_code == 2
    assert option[0] in result.stderr
    assert "Traceback" not in result.output


def test_help_has_an_example() -> None:
    result = call("register", "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout and "probmed register" in result.stdout


# The parts.


@pytest.mark.parametrize("shape", [(7, 6), (7, 6, 5)])
def test_label_shares_are_the_indicators_interpolated(shape: tuple[int, ...], float64: None) -> None:
    """The list, summed, is what linear interpolation of each label's indicator gives, outside and at the edges too."""
    d = len(shape)
    generator = torch.Generator().manual_seed(0)
    code = torch.randint(0, 3, shape, generator=generator)
    code[: shape[0] // 2] = 0
    source, target = Grid.from_spacing(shape, 1.5), Grid.from_spacing([n + 3 for n in shape], 1.2)
    field = 1.5 * torch.randn(d, *target.shape, generator=generator)
    transform = Affine.exp(torch.tensor([0.5] * d + [0.1] * (d * (d - 1) // 2)), d) @ Displacement(target, field)
    voxels, label, share = label_shares(code, source, transform, target)
    for k in (1, 2):
        found = torch.zeros(target.numel).index_add(0, voxels[label == k], share[label == k].double()).reshape(target.shape)
        expected = warp((code == k).double()[None], source, transform, target)[0]
        # Places are in single precision.
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_labels_of_one_name_are_told_apart() -> None:
    labels = Volume.from_grid(torch.arange(8).reshape(4, 2), Grid.from_spacing((4, 2), 1.0))
    assert called(labels, {1: "a", 2: "b", 3: "a"}) == ("a 1", "b", "a 3", "4", "5", "6", "7")


@pytest.mark.parametrize("d", [2, 3])
def test_places_are_where_the_transform_takes_the_voxels(d: int, float64: None) -> None:
    grid = Grid((9, 7, 8)[:d], torch.from_numpy(FIXED_AFFINE)[[*range(d), 3]][:, [*range(d), 3]])
    field = torch.randn(d, *(5, 4, 6)[:d], generator=torch.Generator().manual_seed(0))
    flow = Displacement(grid.at_spacing([n * h / m for n, h, m in zip(grid.shape, grid.spacing, (5, 4, 6), strict=False)]), field)
    affine = Affine.exp(torch.full((d * (d + 1),), 0.1), d)
    for transform in (affine, flow, affine @ flow, affine @ flow @ affine):
        torch.testing.assert_close(places(transform, grid, torch.float64), transform(grid.coordinates(torch.float64)))


def test_information_is_that_of_a_table() -> None:
    """Of independent values none, of equal ones the entropy of the bins, however they are scaled; unknown ones do not count."""
    values = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    other = torch.rand(40_000, generator=torch.Generator().manual_seed(1))
    assert information(values, values.exp(), 8) == pytest.approx(math.log(8), abs=1e-3)
    assert information(values, other, 8) == pytest.approx(0, abs=5e-3)
    half = torch.where(torch.arange(40_000) % 2 == 0, other, math.nan)
    assert information(half, half, 8) == pytest.approx(math.log(8), abs=1e-3)
    assert math.isnan(information(values * math.nan, other))


def test_overlap_is_a_share_of_the_field_of_view() -> None:
    grid = Grid.from_spacing((20, 20, 20), 1.0)
    for shift, share in ((0.0, 1.0), (10.0, 0.5), (20.0, 0.0)):
        matrix = torch.eye(4, dtype=torch.float64)
        matrix[1, 3] = shift
        assert overlap(grid.transformed(matrix), grid) == pytest.approx(share)


def test_volumes_of_a_label_map_that_is_not_moved() -> None:
    """Each voxel's volume, exactly; a check of the sum against the file's own geometry."""
    grid = Grid.from_spacing((6, 5, 4), (1.0, 2.0, 3.0))
    code = torch.from_numpy(np.random.default_rng(0).integers(0, 3, grid.shape))
    voxels, label, share = label_shares(code, grid, Affine.identity(3), grid)
    for k in (1, 2):
        assert float(share[label == k].sum()) == pytest.approx(int((code == k).sum()), rel=1e-5)
    assert len(voxels) == len(label) == len(share)
