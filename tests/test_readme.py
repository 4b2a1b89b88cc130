"""The README's example runs as it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pages import blocks, page

import probmed
from probmed.simulation import simulate_subject


@pytest.mark.slow
def test_the_composition_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks(page("README.md"), "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    subject = simulate_subject(spacing_mm=6.0, seed=3, labels="independent")
    probmed.write_scan(tmp_path / "sub-01_T1w.nii.gz", subject.image.data, subject.image)
    monkeypatch.chdir(tmp_path)
    lines = code.strip().splitlines()
    space: dict[str, Any] = {}
    exec("\n".join(lines[:-1]) + f"\nresult = {lines[-1]}", space)
    labels, volumes, draws = space["result"]
    assert labels.shape[1:] == subject.image.data.shape
    assert isinstance(volumes, pd.DataFrame) and (volumes["low_ml"] <= volumes["high_ml"]).all()
    assert {len(value) for value in draws.values()} == {50}
    found = volumes.set_index("name")["volume_ml"]
    for tissue in ("GM", "WM"):
        assert found[tissue] == pytest.approx(subject.volumes_ml[tissue], rel=0.15)
