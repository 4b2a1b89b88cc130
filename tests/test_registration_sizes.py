"""The benchmark of registrations by size: its pair, its error, its lines. No peers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from probmed.atlases import LabelAtlas, default_atlas
from probmed.grids import Grid
from probmed.transforms import Affine, Transform, Velocity, warp
from probmed.volumes import read_scan

# The benchmarks are in the repository and not in the wheel: without a checkout there is nothing to test.
pytest.importorskip("benchmarks")

from benchmarks import registration_sizes as sizes
from benchmarks.registrations import Outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def coarse() -> LabelAtlas:
        return default_atlas(spacing_mm=8.0)

    place = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "default_atlas", coarse)
        sizes.write_pair(place, 32, 0)
    return place


def test_the_known_map_brings_the_heads_together_and_has_no_error(folder: Path) -> None:
    fixed, moving = (read_scan(folder / f"{name}.nii") for name in ("fixed", "moving"))
    stored = torch.load(folder / "truth.pt")
    flow = Velocity(Grid(tuple(stored["velocity"].shape[1:]), stored["grid"]), stored["velocity"]).exp()
    truth, still = Affine(stored["affine"]) @ flow, Affine.identity(3)

    def difference(transform: Transform) -> float:
        return float((warp(moving.data[None], moving.grid, transform, fixed.grid, fill="edge")[0] - fixed.data).square().mean())

    assert sizes.error_mm(Outcome(truth, None, 0.0), fixed, folder) == 0
    assert 3 < sizes.error_mm(Outcome(still, None, 0.0), fixed, folder) < 15
    assert difference(truth) < 0.5 * difference(still)


@pytest.mark.parametrize("method", sizes.STEP_METHODS)
def test_steps_are_timed(method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "STEPS", 2)
    row = sizes.measure(method, 32, "cpu", folder, 0)
    assert row["seconds"] > 0 and row["repetitions"] == 2 and row["peak_gib"] > 0.05


def test_what_does_not_fit_is_left_out(folder: Path) -> None:
    assert "GiB" in sizes.measure("network, inference", 100_000, "cpu", folder, 0)["skipped"]


def test_lines_say_pairs_and_steps() -> None:
    common = {"device": "cpu", "size": 64, "seconds": 0.5, "repetitions": 3, "peak_gib": 1.0}
    pair, step = {**common, "method": "probmed, MAP", "error_mm": 0.4}, {**common, "method": "network, inference", "gpu_gib": 2.0}
    none = {"device": "cpu", "size": 256, "method": "network, inference", "skipped": "needs about 9 GiB"}
    lines = sizes.summarise([pair, step, none])
    assert len({tuple(line) for line in lines}) == 1
    assert [line["per second"] for line in lines] == ["2 pairs", "2 steps", "–"]
    assert [line["error, mm"] for line in lines] == ["0.40", "–", "–"] and lines[1]["GPU GiB"] == "2.0"
    assert lines[2]["seconds"] == "needs about 9 GiB"
