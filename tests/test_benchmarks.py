"""The benchmarks' harness: rows are kept, tables are written, a child's answer comes back. No data and no peers."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from probmed.atlases import default_atlas
from probmed.simulation import simulate_subject

# The benchmarks are in the repository and not in the wheel: without a checkout there is nothing to test.
pytest.importorskip("benchmarks")

from benchmarks import __main__ as command
from benchmarks import fields, tissue, volumes
from benchmarks.runs import Run, measure
from benchmarks.tables import Log, Table, machine, mean_sd, versions, with_table

PAGE = "# Page\n\n<!-- table fields -->\nold\n<!-- end of fields -->\n\nAfter.\n"


def fake_table(log: Log, limit: int | None, only: tuple[str, ...], threads: int, seed: int) -> Table:
    rows = [log.row(f"case/{i}", lambda i=i: {"value": i + seed}) for i in range(3)[:limit]]  # type: ignore[misc]
    return Table("fields", rows, [{"case": row["key"], "value": str(row["value"])} for row in rows], "Notes.", {"threads": threads}, seed)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "README.md").write_text(PAGE)
    monkeypatch.setattr(fields, "table", fake_table)
    return tmp_path


def test_a_table_is_printed_and_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["fields", "--seed", "5", "--threads", "2"], folder) == 0
    assert "| case/1 | 6 |" in capsys.readouterr().out
    page = (folder / "README.md").read_text()
    assert "| case/2 | 7 |" in page and "old" not in page and page.endswith("After.\n")
    stored = json.loads((folder / "results" / "fields.json").read_text())
    assert [row["value"] for row in stored["rows"]] == [5, 6, 7]
    assert stored["seed"] == 5 and stored["settings"] == {"threads": 2}
    assert stored["machine"]["cores"] >= 1 and "torch" in stored["versions"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", stored["date"])


@pytest.mark.parametrize("option", [["--limit", "1"], ["--only", "case"]])
def test_a_quick_look_writes_nothing(folder: Path, option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["fields", *option], folder) == 0
    assert "case/0" in capsys.readouterr().out
    assert (folder / "README.md").read_text() == PAGE and not (folder / "results").exists()


def test_unusable_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nothing"], ["fields", "--limit", "0"]):
        with pytest.raises(SystemExit) as stopped:
            command.main(arguments)
        assert stopped.value.code == 2
    assert "--limit expects a positive number, got 0" in capsys.readouterr().err


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    path, calls = tmp_path / "rows.jsonl", []

    def row(value: int) -> dict[str, int]:
        calls.append(value)
        return {"value": value}

    Log(path).row("a", lambda: row(1))
    again = Log(path)
    assert again.row("a", lambda: row(2))["value"] == 1
    assert again.row("b", lambda: row(3))["value"] == 3
    assert calls == [1, 3] and set(Log(path).rows) == {"a", "b"}


def test_markers_are_required() -> None:
    page = with_table("<!-- table x -->\n1\n<!-- end of x -->", "x", "2")
    assert page == "<!-- table x -->\n\n2\n\n<!-- end of x -->"
    with pytest.raises(ValueError, match="markers"):
        with_table("nothing", "x", "2")


def test_every_table_has_its_place_in_the_page() -> None:
    page = (Path(command.__file__).parent / "README.md").read_text(encoding="utf-8")
    for name in command.TABLES:
        assert "table" in with_table(page, name, "")
        assert callable(importlib.import_module(f"benchmarks.{name}").table)


def test_the_machine_is_described_without_names() -> None:
    text = json.dumps({**machine(), **versions()})
    assert "/" not in text.replace("N/A", "")
    assert mean_sd([]) == "–" and mean_sd([0.5]) == "0.500" and mean_sd([1.0, 3.0], 1) == "2.0 ± 1.4"


def test_a_method_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    run = measure("tests.answers:answer", tmp_path / "scan.nii.gz", {"classes": 3}, threads=1)
    assert run.names == ("A", "B", "C") and run.seconds["total"] == 3.5 and run.remarks == {"threads": 1}
    assert run.labels.tolist() == [[1, 1], [3, 3]] and run.peak_gib > 0.01
    with pytest.raises(RuntimeError, match=r"failed on scan\.nii\.gz"):
        measure("tests.answers:missing", tmp_path / "scan.nii.gz", {})


def test_a_perfect_answer_has_perfect_scores(tmp_path: Path) -> None:
    labels = torch.zeros(6, 6, 6, dtype=torch.int64)
    labels[1:5, 1:5, 1:5] = 1
    labels[2:4, 2:4, 2:4] = 2
    labels[5, 5, 5] = 3
    maps = {name: labels == k for name, k in (("GM", 1), ("WM", 2), ("CSF", 3))}
    case = tissue.Case("set", "scan", tmp_path, maps, labels > 0, torch.ones_like(labels).bool(), (1.0, 1.0, 2.0), True, dict.fromkeys(maps, 0.1))
    probabilities = torch.stack([maps[n] for n in ("WM", "GM", "CSF")]).float().numpy()
    scores = tissue.score(case, Run(("WM", "GM", "CSF"), probabilities, {"total": 1.0}, 1.0, {}))
    for name in ("GM", "WM", "CSF", "brain"):
        assert scores[f"dice_{name}"] == 1
    assert scores["hd95_GM"] == scores["nll"] == scores["ece_GM"] == scores["ece_band_WM"] == 0
    assert scores["volume_error_GM"] == pytest.approx(100 * (56 * 2 / 1000 / 0.1 - 1))
    hard = tissue.score(case, Run(("WM", "GM", "CSF"), probabilities, {"total": 1.0}, 1.0, {}), hard=True)
    assert "nll" not in hard and "ece_GM" not in hard
    rows = [
        {"collection": "set", "scan": str(i), "method": method, **scores, "dice_GM": 0.9 - lower, "seconds": {"total": 1.0}, "peak_gib": 1.0}
        for i in range(3)
        for method, lower in ((tissue.OURS, 0.0), ("N4+dipy HMRF", 0.1))
    ]
    summary = tissue.summarise(rows, list(tissue.METHODS))
    assert [line["method"] for line in summary] == [tissue.OURS, "N4+dipy HMRF"] and summary[0]["GM Dice"] == "0.900 ± 0.000"
    assert "N4+dipy HMRF: GM +0.100 [+0.100, +0.100]" in tissue.notes(rows)


def test_regions_belong_to_one_tissue() -> None:
    codes = [code for group in tissue.MUSE.values() for code in group]
    assert len(codes) == len(set(codes))


def test_the_peers_atlas_holds_all_that_they_read(tmp_path: Path) -> None:
    tissue.write_atlas(default_atlas(spacing_mm=8.0), tmp_path / "atlas")
    assert {p.name[:-7] for p in (tmp_path / "atlas").iterdir()} == {"GM", "WM", "CSF", "brain", "head", "template"}
    shutil.rmtree(tmp_path / "atlas")


@pytest.mark.parametrize("operation", fields.OPERATIONS)
def test_fields_are_timed(operation: str) -> None:
    row = fields.measure(operation, 6, "cpu", 0)
    assert row["milliseconds"]["forward"] > 0 and all(low <= middle <= high for low, middle, high in row["ratios"].values())
    assert fields.summarise([row, {"device": "cpu", "size": 6, "operation": operation, "skipped": "needs 9 GiB"}])[1]["forward, ms"] == "needs 9 GiB"


def test_coverage_is_counted_for_both_kinds_of_interval() -> None:
    def row(truth: float) -> dict[str, object]:
        one = {"truth_ml": truth, "volume_ml": 10.0, "quantiles_ml": [9.0, 11.0, 8.0, 12.0, 7.0, 13.0], "sd_ml": 1.5, "independent_sd_ml": 0.1}
        return {"condition": "as modelled", **dict.fromkeys(volumes.TISSUES, one)}

    line = volumes.summarise([row(10.05), row(11.5), row(12.5), row(20.0)])[0]
    assert line["coverage"] == "25 / 50 / 75" and line["independent voxels"] == "25 / 25 / 25"


def test_conditions_are_simulated_as_named() -> None:
    atlas = default_atlas(spacing_mm=12.0)
    for condition in volumes.CONDITIONS.values():
        head = simulate_subject(atlas, 12.0, 0, **condition.options)
        assert set(volumes.TISSUES) <= set(head.volumes_ml)
    soft = volumes.blurred(atlas, 6.0)
    assert soft.probabilities[0].amax() < atlas.probabilities[0].amax()
    assert torch.allclose(soft.probabilities.sum(0), torch.ones(soft.grid.shape))
