"""Several segmentations of one scan."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from probmed.cli import app
from probmed.grids import Grid
from probmed.volumes import Volume, write_labels, write_scan
from probmed.workflows.comparison import Comparison

GRID = Grid.from_spacing((12, 10, 8), 2.0)


def block(size: int, code: int = 1) -> torch.Tensor:
    labels = torch.zeros(GRID.shape, dtype=torch.int64)
    labels[2 : 2 + size, 2:8, 2:6] = code
    return labels


def test_overlap_volumes_and_votes_are_those_of_counting() -> None:
    scan = Volume.from_grid(torch.rand(GRID.shape), GRID)
    found = Comparison(scan, {"a": block(4), "b": block(6), "truth": block(4)}, {1: "block"}, "truth")
    table = found.volumes().set_index("segmentation")
    assert table["volume_ml"].to_dict() == pytest.approx({"a": 96 * 8e-3, "b": 144 * 8e-3, "truth": 96 * 8e-3})
    assert table["dice"].to_dict() == pytest.approx({"a": 1.0, "b": 2 * 96 / 240, "truth": 1.0})
    assert table["volume_error"].to_dict() == pytest.approx({"a": 0.0, "b": 50.0, "truth": 0.0})
    assert table["hd95_mm"].to_dict() == pytest.approx({"a": 0.0, "b": 4.0, "truth": 0.0})
    square = found.agreement()
    assert square["b"].to_dict() == pytest.approx({"a": 0.8, "b": 1.0, "truth": 0.8})
    doubt = found.disagreement()
    assert int((doubt > 0).sum()) == 48 and float(doubt.max()) == pytest.approx(math.log(2))


def test_maps_of_files_side_by_side_on_the_command_line(tmp_path: Path) -> None:
    scan = Volume.from_grid(torch.rand(GRID.shape), GRID)
    write_scan(tmp_path / "scan.nii.gz", scan.data, scan)
    for name, labels in (("a", block(4)), ("b", block(6)), ("c", block(5))):
        write_labels(tmp_path / f"{name}_dseg.nii.gz", labels, scan)
    pd.DataFrame({"index": [1], "name": ["block"]}).to_csv(tmp_path / "a_dseg.tsv", sep="\t", index=False)
    other = Volume.from_grid(torch.zeros(4, 4, 4), Grid.from_spacing((4, 4, 4), 2.0))
    write_labels(tmp_path / "other.nii.gz", torch.ones(4, 4, 4).long(), other)

    def said(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["compare", str(tmp_path / "scan.nii.gz"), "-o", str(tmp_path / "out"), *arguments])
        assert result.exit_code == code, result.output
        return " ".join((result.stdout if code == 0 else result.stderr).split())

    pair = ["--labels", f"first={tmp_path}/a_dseg.nii.gz", "--labels", f"second={tmp_path}/b_dseg.nii.gz"]
    assert "Dice with truth: first 0.889, second 0.909" in said(*pair, "--truth", f"{tmp_path}/c_dseg.nii.gz")
    table = pd.read_csv(tmp_path / "out" / "scan_desc-comparison.tsv", sep="\t")
    assert list(table["segmentation"]) == ["first", "second", "truth"] and set(table["label"]) == {"block"}
    page = (tmp_path / "out" / "scan_desc-comparison.html").read_text()
    assert "Side by side" in page and "block" in page and page.count("data:image/png") == 1
    assert "Dice with first: second 0.800" in said(*pair)
    assert "names 1 segmentation" in said(*pair[:2], code=2)
    assert "is no NAME=FILE of a name of its own" in said(*pair[:2], *pair[:2], code=2)
    assert "other.nii.gz" in said(*pair, "--truth", f"{tmp_path}/other.nii.gz", code=2)
    write_labels(tmp_path / "a_dseg.nii.gz", torch.zeros(GRID.shape).long(), scan)
    empty = f"{tmp_path}/a_dseg.nii.gz"
    assert "every voxel is 0" in said("--labels", f"x={empty}", "--labels", f"y={empty}", code=2)
