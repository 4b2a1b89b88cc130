"""The tutorial from genotypes, a clinical table and scans to a follow-up scan runs as it stands, on the command line and in Python."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from bed_reader import to_bed
from pages import blocks, page
from test_growth import GRID, KnownCohort
from typer.testing import CliRunner

import probmed.workflows.growth as growth_module
from probmed.cli import app
from probmed.volumes import read_scan, write_labels, write_scan

TUTORIAL = page("docs/growth.md")


def write_study(folder: Path) -> KnownCohort:
    """Files by the tutorial's names: 12 people of the study, and p101, who has a baseline scan."""
    cohort = KnownCohort(13)
    names = [*(f"p{n:03d}" for n in range(1, 13)), "p101"]
    rows = []
    for n, name in enumerate(names):
        for v, (time, what) in enumerate(zip(cohort.years[n], ("bl", "fu", "fu2"), strict=True)):
            if name != "p101" or v == 0:
                file = f"{name}_{what}_T1w.nii.gz"
                scan = cohort.scan(n, v)
                write_scan(folder / file, scan.data, scan)
                rows.append({"subject": name, "time": time, "scan": file})
    visits = pd.DataFrame(rows)
    visits[visits["subject"] != "p101"].to_csv(folder / "visits.tsv", sep="\t", index=False)
    clinic = pd.DataFrame({"subject": names, "age": cohort.age.numpy(), "sex": ["F" if n % 3 else "M" for n in range(13)]})
    clinic[:-1].to_csv(folder / "clinic.tsv", sep="\t", index=False)
    clinic[-1:].to_csv(folder / "new_clinic.tsv", sep="\t", index=False)
    (new,) = (block for block in blocks(TUTORIAL, "") if "p101" in block)
    (folder / "new.tsv").write_text(new, encoding="utf-8")
    atlas = cohort.atlas()
    write_scan(folder / "template.nii.gz", atlas.scan.data, atlas.scan)
    write_labels(folder / "template_dseg.nii.gz", atlas.labels.data, atlas.scan)
    pd.DataFrame({"index": [1, 2], "name": ["disc", "ring"]}).to_csv(folder / "template_dseg.tsv", sep="\t", index=False)
    counts = np.random.default_rng(0).binomial(2, 0.4, (13, 40)).astype(float)
    to_bed(folder / "cohort.bed", counts, properties={"iid": names, "fid": names, "chromosome": ["1"] * 40})
    return cohort


@pytest.mark.filterwarnings("ignore:.*had not converged")  # of twelve people, three components of a coefficient
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = write_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(growth_module, "register", cohort.register)
    train, predict = (shlex.split(block.replace("\\\n", " ")) for block in blocks(TUTORIAL, "sh"))
    for command in (train, predict):
        assert command[0] == "probmed"
        result = CliRunner().invoke(app, command[1:])
        assert result.exit_code == 0, result.output
    found = pd.read_csv("out/predictions.tsv", sep="\t").set_index("name")
    assert set(found["subject"]) == {"p101"} and set(found["years"]) == {3.0}
    assert (found["low"] < found["mean"]).all() and (found["mean"] < found["high"]).all()
    # Every file that the table of outputs names is there.
    stem = re.search(r"`(sub-p101_time-3p00)_desc-predicted.nii.gz`", TUTORIAL)
    assert stem is not None
    named = re.findall(r"`…(_[^`]*)`", TUTORIAL)
    assert len(named) >= 7
    for suffix in ["_desc-predicted.nii.gz", *named]:
        assert Path(f"out/{stem[1]}{suffix}").exists(), suffix
    assert Path(f"out/{stem[1]}_desc-sample003.nii.gz").exists()
    assert read_scan(f"out/{stem[1]}_desc-predicted.nii.gz").grid == GRID
    code = blocks(TUTORIAL, "python")[0].strip().splitlines()
    space: dict[str, Any] = {}
    exec("\n".join(code[:-1]) + f"\nresult = {code[-1]}", space)
    volumes, predicted, growth, shrinking, samples = space["result"]
    assert list(volumes["name"]) == ["disc", "ring"] and predicted.shape == growth.shape == shrinking.shape == GRID.shape
    assert samples.shape == (3, *GRID.shape) and bool(torch.isfinite(samples).all())
    assert space["growth"].rates.components == ("genetics", "clinical", "own")
