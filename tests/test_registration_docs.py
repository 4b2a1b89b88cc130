"""The code of the pages on registration runs as it stands, on simulated scans."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import blocks, page
from test_train import write_set
from torch import Tensor

import probmed
from probmed.grids import Grid
from probmed.volumes import Volume

pytestmark = pytest.mark.slow


def run(name: str, replaced: dict[str, str] | None = None) -> dict[str, Any]:
    """The names that the page's Python makes."""
    (code,) = blocks(page(f"docs/{name}"), "python")
    for old, new in (replaced or {}).items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    space: dict[str, Any] = {}
    exec(code, space)
    return space


def body(points: Tensor, growth: float) -> tuple[Tensor, Tensor]:
    """A head with a bright core of 6 mm, and the core; ``growth`` is of the core's radius, and dies away around it. Edges are as wide as voxels."""
    distance = points.norm(dim=-1, keepdim=True)
    # r ↦ r (1 + g e^(−(r/9)⁴)) takes the first visit to the second; here its inverse, by its fixed point.
    first = distance
    for _ in range(80):
        first = distance / (1 + growth * torch.exp(-((first / 9) ** 4)))
    there = points * (first / distance.clamp_min(1e-9))
    x, y, z = (0.6 * there).unbind(-1)
    texture = 1 + 0.2 * torch.sin(x + 0.4 * z) * torch.cos(0.9 * y - 0.5 * z)
    radius = there.norm(dim=-1)
    return 10 + texture * (80 * torch.sigmoid(0.8 * (14 - radius)) + 60 * torch.sigmoid(0.8 * (6 - radius))), (radius < 6).long()


def test_two_visits_end_in_a_change_of_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    grid = Grid.from_spacing((36, 36, 36), 1.0)
    middle = grid.voxel_to_world((torch.tensor(grid.shape, dtype=torch.float64) - 1) / 2)
    like, growth = Volume.from_grid(torch.zeros(grid.shape), grid), 0.1
    generator = torch.Generator().manual_seed(0)
    for visit, grown in ((1, 0.0), (2, growth)):
        image, region = body((grid.coordinates(torch.float64) - middle), grown)
        probmed.write_scan(f"visit{visit}_T1w.nii.gz", image.float() + torch.randn(grid.shape, generator=generator), like)
        if visit == 1:
            probmed.write_labels("visit1_dseg.nii.gz", 17 * region, like)
    found = run("registration.md")
    truth = 100 * ((1 + growth * math.exp(-((6 / 9) ** 4))) ** 3 - 1)
    assert found["change"][0] == pytest.approx(truth, abs=0.25 * truth)
    assert 0.5 * truth < found["low"] < found["high"] < 1.5 * truth
    assert len(found["change"]) == 21 and Path("visit2_to_visit1_xfm.nii.gz").exists()
    assert float(found["sd_mm"].min()) > 0 and "% between" in capsys.readouterr().out


def test_a_network_is_trained_and_refined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_set(tmp_path, 3, 2)
    for number in (1, 2):
        (tmp_path / f"{number - 1}.nii.gz").rename(tmp_path / f"s0{number}.nii.gz")
    table.write_text(table.read_text().replace("0.nii.gz", "s01.nii.gz").replace("\n1.nii.gz", "\ns02.nii.gz"))
    monkeypatch.chdir(tmp_path)
    found = run("registration_networks.md", {"TrainingSettings(5000)": "TrainingSettings(3, every=3)", "refine=100": "refine=5"})
    assert found["result"].refinement is not None and "nats, refined by" in capsys.readouterr().out
    assert found["trained"].settings.label_weight == 1.0 and len(found["result"].draws) == 20
