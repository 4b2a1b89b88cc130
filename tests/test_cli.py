"""The `probmed` command with a stand-in for the fit: what it writes, says and returns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from results import plain_page, tiny_atlas, tiny_result, write_tiny_scan
from typer.testing import CliRunner, Result

import probmed
from probmed import cli
from probmed.cli import demo
from probmed.models import ZOO, entry
from probmed.report import segmentation_page
from probmed.workflows import segmentation
from probmed.workflows.segmentation import SegmentationResult

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Call the command in an empty folder, with a fit and a report that take no time."""

    def segment(
        scans: Sequence[Path],
        *,
        draws: int,
        seed: int,
        progress: Callable[[str, float], None],
        **options: Any,
    ) -> SegmentationResult:
        progress("fitting", 0.5)
        if "broken" in str(scans[0]):
            raise RuntimeError("a bug\nover two lines")
        return tiny_result(scans, seed, draws)

    monkeypatch.setattr(segmentation, "segment", segment)
    monkeypatch.setattr("probmed.cli.segment.default_atlas", tiny_atlas)
    monkeypatch.setattr("probmed.cli.segment.segmentation_page", plain_page)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["probmed", *arguments])
        return CliRunner().invoke(cli.app, arguments)

    return call


def test_one_scan(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probmed.cli.segment.segmentation_page", segmentation_page)
    write_tiny_scan(tmp_path / "sub-01_T1w.nii.gz")
    result = run("segment", "sub-01_T1w.nii.gz", "-o", "new/out", "--samples", "1")
    assert result.exit_code == 0, result.output
    assert "GM" in result.stdout
    assert "new/out/sub-01_T1w_report.html" in result.stdout
    written = {path.name for path in (tmp_path / "new/out").iterdir()}
    expected = {
        *("dseg.nii.gz", "dseg.tsv", "dseg.json", "volumes.tsv", "volumes.json", "report.html"),
        *(f"label-{name}_probseg.{suffix}" for name in ("GM", "WM", "CSF") for suffix in ("nii.gz", "json")),
        *(
            f"desc-{what}.{suffix}"
            for what in ("entropy", "bias", "corrected")
            for suffix in ("nii.gz", "json")
        ),
        *(f"desc-draw001_dseg.{suffix}" for suffix in ("nii.gz", "json")),
        *(f"from-scan_to-atlas_mode-image_xfm.{suffix}" for suffix in ("nii.gz", "json")),
        *(f"from-atlas_to-scan_mode-image_xfm.{suffix}" for suffix in ("nii.gz", "json")),
    }
    assert written == {f"sub-01_T1w_{name}" for name in expected}
    page = (tmp_path / "new/out/sub-01_T1w_report.html").read_text()
    assert "probmed segment sub-01_T1w.nii.gz -o new/out --samples 1" in page


def test_again_same_bytes_and_another_seed_other_ones(run: Run, tmp_path: Path) -> None:
    write_tiny_scan(tmp_path / "s.nii.gz")
    contents = []
    for seed in ("0", "0", "1"):
        assert run("segment", "s.nii.gz", "-o", "out", "--seed", seed).exit_code == 0
        contents.append({p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()})
    assert contents[0] == contents[1]
    assert contents[0]["s_dseg.nii.gz"] != contents[2]["s_dseg.nii.gz"]


def test_quiet_says_nothing(run: Run, tmp_path: Path) -> None:
    write_tiny_scan(tmp_path / "s.nii.gz")
    result = run("segment", "s.nii.gz", "-o", "out", "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_channels_of_one_subject(run: Run, tmp_path: Path) -> None:
    for name in ("t1", "t2", "one,name"):
        write_tiny_scan(tmp_path / f"{name}.nii.gz")
    assert run("segment", "t1.nii.gz,t2.nii.gz", "-o", "out").exit_code == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"t1_dseg.nii.gz", "t1_desc-bias.nii.gz", "t1_desc-bias2.nii.gz"} <= names
    assert not any(name.startswith("t2") for name in names)
    # A comma in the name of a file that exists is a part of that name.
    assert run("segment", "one,name.nii.gz", "-o", "out").exit_code == 0
    assert (tmp_path / "out" / "one,name_dseg.nii.gz").exists()


def test_a_list_goes_on_and_ends_with_a_table(run: Run, tmp_path: Path) -> None:
    for name in ("a", "broken", "c"):
        write_tiny_scan(tmp_path / f"{name}.nii.gz")
    result = run("segment", "a.nii.gz", "missing.nii.gz", "broken.nii.gz", "c.nii.gz", "-o", "out")
    assert result.exit_code == 1
    assert (tmp_path / "out" / "c_report.html").exists()
    assert "2 of 4 scans failed" in result.stderr
    assert "missing.nii.gz: does not exist; check the path" in result.stderr
    assert "failed unexpectedly (RuntimeError: a bug over two lines)" in result.stderr
    assert "Traceback" not in result.output
    assert not list((tmp_path / "out").glob("broken*"))


def test_nothing_usable_is_2_and_leaves_no_folder(run: Run, tmp_path: Path) -> None:
    result = run("segment", "x.nii.gz", "y.nii.gz", "-o", "new/out")
    assert result.exit_code == 2
    assert "2 of 2 scans failed" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_unforeseen_failure_is_1_with_traceback_on_request(run: Run, tmp_path: Path) -> None:
    write_tiny_scan(tmp_path / "broken.nii.gz")
    result = run("segment", "broken.nii.gz", "-o", "out")
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    assert "Traceback" in run("segment", "broken.nii.gz", "-o", "out", "--debug").stderr


def test_two_scans_of_one_name_do_not_share_outputs(run: Run, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_tiny_scan(tmp_path / folder / "s.nii.gz")
    result = run("segment", "one/s.nii.gz", "two/s.nii.gz", "-o", "out")
    assert result.exit_code == 1
    assert "two/s.nii.gz: would have outputs of the same names as one/s.nii.gz" in result.stderr


def test_outputs_beside_the_scan_never_replace_it(run: Run, tmp_path: Path) -> None:
    scan = write_tiny_scan(tmp_path / "s.nii.gz")
    clash = write_tiny_scan(tmp_path / "s_dseg.nii.gz")
    before = scan.read_bytes(), clash.read_bytes()
    result = run("segment", "s.nii.gz", "s_dseg.nii.gz", "-o", ".")
    assert result.exit_code == 1
    assert "s_dseg.nii.gz: is an input and would be overwritten" in result.stderr
    assert (scan.read_bytes(), clash.read_bytes()) == before
    assert (tmp_path / "s_dseg_dseg.nii.gz").exists()


def test_demo(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atlas = tiny_atlas()
    template = atlas.probabilities[:3].sum(0) / 2
    monkeypatch.setattr(demo, "default_atlas", lambda: type(atlas)(
        atlas.names, atlas.probabilities, atlas.grid, template, atlas.brain
    ))  # fmt: skip
    assert run("demo", "-o", "out", "--quiet").output == ""
    monkeypatch.setattr("probmed.cli.segment.segmentation_page", segmentation_page)
    result = run("demo", "-o", "out")
    assert result.exit_code == 0, result.output
    assert re.search(r"GM .*0\.\d{3}", result.stdout)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"MNI152_desc-truth_dseg.nii.gz", "MNI152_desc-degraded_T1w_report.html"} <= names
    assert "Diamond" in (tmp_path / "out" / "MNI152_desc-degraded_T1w_report.html").read_text()


def test_demo_needs_a_template() -> None:
    with pytest.raises(ValueError, match="template"):
        demo.simulated_scan(tiny_atlas(), 0)


def test_models_lists_the_zoo(run: Run) -> None:
    result = run("models")
    assert result.exit_code == 0
    for name in ZOO:
        assert name in result.stdout


@pytest.mark.parametrize("name", ZOO)
def test_every_model_says_what_it_is(name: str) -> None:
    found = entry(name)
    assert found.equation
    assert found.summary
    assert found.mathematics
    assert found.sites
    assert found.reference


def test_no_entry_for_a_stranger() -> None:
    with pytest.raises(ValueError, match="expected a model of"):
        entry("nothing")


def test_version_and_help(run: Run) -> None:
    assert run("--version").stdout.strip() == f"probmed {probmed.__version__}"
    for command in ("segment", "demo", "models"):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert "Example" in result.stdout
        assert f"probmed {command}" in result.stdout


def test_module_runs_as_the_command(tmp_path: Path) -> None:
    root = str(Path(probmed.__file__).parent.parent)
    out = subprocess.run(
        [sys.executable, "-m", "probmed", "--version"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        check=False,
    )
    assert (out.returncode, out.stdout.strip()) == (0, f"probmed {probmed.__version__}")


@pytest.mark.slow
def test_segment_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo, with the fit."""
    monkeypatch.setattr(sys, "argv", ["probmed", "demo"])
    result = CliRunner().invoke(cli.app, ["demo", "-o", str(tmp_path / "out"), "--draws", "4"])
    assert result.exit_code == 0, result.output
    assert torch.is_grad_enabled()


def test_commands_do_not_wait_for_what_they_do_not_use() -> None:
    """MONAI and Fabric take seconds to import."""
    code = "import sys, probmed.cli; print(sorted({'monai', 'lightning_fabric'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
