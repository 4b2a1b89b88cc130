"""The tutorial from one labelled scan to a segmenter runs as it stands, on the command line and in Python."""

from __future__ import annotations

import shlex
from pathlib import Path

import pandas as pd
import pytest
import torch
from pages import blocks, page
from test_supervision import GRID, disc, said, write_table

from probmed.volumes import Volume, read_labels, read_scan, write_scan

TUTORIAL = page("docs/one_label.md")

pytestmark = pytest.mark.slow


def test_one_labelled_scan_ends_in_labels_with_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = pd.read_csv(write_table(tmp_path, 6, "one_label.tsv"), sep="\t")
    table["labels"] = table["labels"].where(table.index == 0)
    table.to_csv("one_label.tsv", sep="\t", index=False, na_rep="n/a")
    image, truth = disc(40)
    write_scan("new.nii.gz", image, Volume.from_grid(image, GRID))

    (shell,) = blocks(TUTORIAL, "sh")
    assert shell.count("--steps 2000") == 1
    for line in shell.replace("--steps 2000", "--steps 150 --learning-rate 0.005").strip().splitlines():
        said(*shlex.split(line)[1:], "--device", "cpu")
    volumes = pd.read_csv("out/new_volumes.tsv", sep="\t")
    assert (volumes["q025"] < volumes["q975"]).all() and read_scan("out/new_desc-entropy.nii.gz").data.max() > 0.3
    assert float((read_labels("out/new_dseg.nii.gz").data == 7 * truth).float().mean()) > 0.9

    (code,) = blocks(TUTORIAL, "python")
    assert code.count("TrainingSettings(2000, 2e-3)") == 1
    space: dict[str, object] = {}
    exec(code.replace("TrainingSettings(2000, 2e-3)", "TrainingSettings(150, 5e-3)"), space)
    # Same seed, same steps, same scans.
    assert torch.equal(read_labels("new_dseg.nii.gz").data, read_labels("out/new_dseg.nii.gz").data)
    assert Path("new_desc-entropy.nii.gz").exists()
