"""Several segmentations of one scan."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from probmed.cli import app
from probmed.grids import Grid
from probmed.report.comparison_figures import side_by_side, volumes
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


def test_labels_that_a_map_lacks_are_left_out_of_agreement() -> None:
    scan = Volume.from_grid(torch.rand(GRID.shape), GRID)
    both = block(4) + 0
    both[8:, 2:8, 2:6] = 2
    found = Comparison(scan, {"a": block(4), "b": block(4), "truth": both}, {1: "block", 2: "other"}, "truth").agreement()
    assert found.loc["a", "b"] == 1.0 and found.loc["a", "truth"] == 0.5  # label 2: neither has it, and one has it alone


def test_pictures_have_one_contrast_the_truth_s_outline_and_votes_up_to_all_different() -> None:
    scan = Volume.from_grid(torch.rand(GRID.shape), GRID)
    votes = {"a": block(4, 1), "b": block(4, 2), "c": block(4, 3)}
    found = Comparison(scan, {**votes, "truth": block(6)}, {1: "x", 2: "y", 3: "z"}, "truth")
    drawn = side_by_side(found)
    rows = [drawn.axes[4 * k : 4 * k + 4] for k in range(6)]  # three planes and a bar: scan, a, b, c, truth, disagreement
    assert len({axis.images[0].get_clim() for row in rows for axis in row[:3]}) == 1
    outlines = [[len(c.get_paths()) for c in row[0].collections] for row in rows]
    # Axially the truth is 6 × 6 voxels: 24 edges.
    assert outlines == [[], [24], [24], [24], [], []]
    votes_shown = rows[5][0].images[1]
    entropy: np.ma.MaskedArray[Any, Any] = np.ma.asarray(votes_shown.get_array())
    assert votes_shown.get_clim() == pytest.approx((0, math.log(3))) and float(entropy.max()) == pytest.approx(math.log(3))
    assert int((~np.ma.getmaskarray(entropy)).sum()) == 24  # where none votes for anything, nothing is drawn over the scan
    two = side_by_side(Comparison(scan, {"a": block(4), "b": block(6)}, {1: "x"}))
    assert two.axes[-4].images[1].get_clim() == pytest.approx((0, math.log(2)))


def test_volumes_are_drawn_with_the_intervals_that_are_told() -> None:
    scan = Volume.from_grid(torch.rand(GRID.shape), GRID)
    maps = {"a": block(4), "b": block(6), "truth": block(5)}
    (axis,) = volumes(Comparison(scan, maps, {1: "block"}, "truth", {("a", 1): (0.8, 0.7, 1.0)})).axes
    bar, expected, counted, truth = (np.asarray(axis.lines[k].get_xdata()).tolist() for k in (0, 1, 2, -1))
    assert bar == [0.7, 1.0] and expected == [0.8] and counted == pytest.approx([0.768]) and truth == pytest.approx([0.96, 0.96])
    assert [text.get_text() for text in axis.get_yticklabels()] == ["a", "b"]
    many = {code: str(code) for code in range(1, 13)}
    mixed = torch.arange(GRID.numel).reshape(GRID.shape) % 40
    shown = volumes(Comparison(scan, {"a": mixed * (mixed < 13), "b": mixed * (mixed < 13)}, many))
    assert len(shown.axes) == 8


def test_maps_of_files_side_by_side_on_the_command_line(tmp_path: Path) -> None:
    scan = Volume.from_grid(torch.rand(GRID.shape), GRID)
    write_scan(tmp_path / "scan.nii.gz", scan.data, scan)
    for name, labels in (("a", block(4)), ("b", block(6)), ("c", block(5))):
        write_labels(tmp_path / f"{name}_dseg.nii.gz", labels, scan)
    pd.DataFrame({"index": [1], "name": ["block"]}).to_csv(tmp_path / "a_dseg.tsv", sep="\t", index=False)
    pd.DataFrame({"index": [1], "name": ["1"]}).to_csv(tmp_path / "b_dseg.tsv", sep="\t", index=False)
    told = {"index": [1, 9], "volume_ml": [1.1, 3.0], "q025": [0.9, "n/a"], "q975": [1.3, "n/a"]}
    pd.DataFrame(told).to_csv(tmp_path / "b_volumes.tsv", sep="\t", index=False)
    (tmp_path / "c_volumes.tsv").write_text("something\telse\n1\t2\n")
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
    assert "Side by side" in page and "block" in page and page.count("data:image/png") == 2
    assert table.loc[table["segmentation"] == "second", ["expected_ml", "q025", "q975"]].to_numpy().tolist() == [[1.1, 0.9, 1.3]]
    assert table.loc[table["segmentation"] != "second", "q025"].isna().all() and "0.9 – 1.3" in page and "95 % interval" in page
    described = json.loads((tmp_path / "out" / "scan_desc-comparison.json").read_text())
    assert set(described) >= set(table.columns)
    assert "Dice with first: second 0.800" in said(*pair)
    assert "names 1 segmentation" in said(*pair[:2], code=2)
    assert "is no NAME=FILE of a name of its own" in said(*pair[:2], *pair[:2], code=2)
    assert "other.nii.gz" in said(*pair, "--truth", f"{tmp_path}/other.nii.gz", code=2)
    write_labels(tmp_path / "a_dseg.nii.gz", torch.zeros(GRID.shape).long(), scan)
    empty = f"{tmp_path}/a_dseg.nii.gz"
    assert "every voxel is 0" in said("--labels", f"x={empty}", "--labels", f"y={empty}", code=2)
