"""The benchmarks' harness: rows are kept, tables are written, a child's answer comes back. No data and no peers."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probmed.atlases import default_atlas
from probmed.grids import Grid
from probmed.inference.training import TrainingSettings
from probmed.models.gp_prior_vae import GPPriorGuide
from probmed.report.panels import blank_figure
from probmed.simulation import simulate_subject
from probmed.transforms import Affine, Displacement
from probmed.volumes import Volume, write_scan
from probmed.workflows.cohorts import own_world
from probmed.workflows.registration_networks import NetworkSettings, TrainedRegistration

# The benchmarks are in the repository and not in the wheel: without a checkout there is nothing to test.
pytest.importorskip("benchmarks")

from benchmarks import __main__ as command
from benchmarks import deformation_uncertainty as uncertainty
from benchmarks import fields, networks, pairs, scaling, tissue, trainings, volumes
from benchmarks.figures import band, forest
from benchmarks.runs import Run, measure
from benchmarks.tables import Log, Table, machine, mean_sd, versions, with_table

PAGE = "# Page\n\n<!-- table fields -->\nold\n<!-- end of fields -->\n\nAfter.\n"


def fake_table(log: Log, limit: int | None, only: tuple[str, ...], threads: int, seed: int) -> Table:
    rows = [log.row(f"case/{i}", lambda i=i: {"value": i + seed}) for i in range(3)[:limit]]  # type: ignore[misc]
    drawn = blank_figure(2.0, 1.0)
    forest(drawn.add_axes((0.2, 0.2, 0.7, 0.7)), {"one": torch.tensor([1.0, 2.0]), "other": torch.tensor([3.0])}, "one", "mm")
    return Table("fields", rows, [{"case": row["key"], "value": str(row["value"])} for row in rows], "Notes.", {"threads": threads}, seed, drawn)


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
    assert (folder / "results" / "fields.png").read_bytes().startswith(b"\x89PNG")


def test_bands_hold_the_mean_as_often_as_they_say() -> None:
    torch.manual_seed(0)
    bands = [band(values) for values in torch.randn(400, 60)]
    held = sum(low < 0 < high for low, _, high in bands) / len(bands)
    assert abs(held - 0.95) < 0.04  # bootstrap of 60 values, 400 times: ± 0.011
    assert band(torch.full((5,), 2.0)) == (2.0, 2.0, 2.0)


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


# Networks that tables train.


def shifting(grid: Grid, voxels: tuple[float, float, float]) -> networks.VoxelMorph:
    """In place of the package's network: one velocity everywhere, which integrates to itself."""

    def network(moving: Tensor, fixed: Tensor, return_field_type: str) -> Tensor:
        assert moving.isfinite().all() and moving.shape == fixed.shape == (1, 1, *grid.shape)
        return torch.tensor(voxels)[:, None, None, None].expand(1, 3, *grid.shape)

    integrating = type("Network", (), {"__call__": staticmethod(network), "velocity_field_integrator": staticmethod(lambda v: v)})()
    return networks.VoxelMorph(integrating, grid)


def test_the_package_s_flow_is_in_millimetres_between_the_scans_worlds() -> None:
    fixed = Grid((10, 9, 7), torch.tensor([[0.0, -1, 0, 30], [2, 0, 0, -8], [0, 0, -1.5, 4], [0, 0, 0, 1]]))
    moving = Grid.from_spacing((12, 18, 8), (1.0, 2.0, 1.5)).transformed(Affine.exp(torch.tensor([9.0, 0, -4, 0.1, 0.2, 0])).matrix)
    scans = [Volume.from_grid(torch.rand(grid.shape), grid) for grid in (moving, fixed)]
    transform = shifting(Grid.from_spacing((16, 32, 16), (1.0, 2.0, 1.5)), (1.0, -0.5, 2.0)).transform(*scans)
    points = 3 * torch.randn(20, 3, dtype=torch.float64)
    there = transform(own_world(fixed)(points))
    torch.testing.assert_close(there, own_world(moving)(points + torch.tensor([1.0, -1.0, 3.0])), atol=1e-5, rtol=0)
    torch.testing.assert_close(transform.inverse()(there), own_world(fixed)(points), atol=1e-5, rtol=0)


def test_a_grid_is_made_halvable_about_its_middle() -> None:
    grid = networks.halvable(Grid.from_spacing((44, 60, 48), (1.0, 1.0, 2.0)))
    assert grid.shape == (48, 64, 48) and grid.spacing == pytest.approx((1.0, 1.0, 2.0))
    torch.testing.assert_close(grid.voxel_to_world(torch.tensor([23.5, 31.5, 23.5])), torch.zeros(3))


def test_a_network_is_trained_once_beside_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[dict[str, Any]] = []

    def run(call: list[str], env: dict[str, str], **options: Any) -> None:
        order = json.loads(Path(call[-1]).read_text())
        orders.append({**order, "threads": env["OMP_NUM_THREADS"]})
        Path(order["place"]).mkdir()
        (Path(order["place"]) / "network.json").write_text("{}")

    monkeypatch.setattr(subprocess, "run", run)
    (tmp_path / "scratch").mkdir()
    for _ in range(2):
        log = Log(tmp_path / "rows.jsonl")
        place = trainings.trained(log, tmp_path / "scratch", "net", "voxelmorph", {"weight": 0.3}, [tmp_path / "a", tmp_path / "b"], 7, 3)
        assert place == tmp_path / "rows.net"
    (order,) = orders
    assert order["threads"] == "3" and order["steps"] == 7 and order["settings"] == {"weight": 0.3}
    assert order["scans"] == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_the_weight_is_chosen_on_training_scans_that_were_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = [tmp_path / f"hippocampus_{n:03d}.nii.gz" for n in range(20)]
    trainings_of: dict[str, tuple[float, list[Path], int]] = {}

    def fake_trained(log: Log, folder: Path, name: str, system: str, settings: Any, scans: list[Path], steps: int, threads: int) -> Path:
        trainings_of[name] = (settings["weight"], scans, steps)
        return folder / name

    def fake_measure(log: Log, chosen: Any, collection: str, method: str, kind: str, options: Any, threads: int) -> list[dict[str, Any]]:
        _, seen, _ = trainings_of[Path(options["run"]).name]
        assert len(chosen) == pairs.TUNING_PAIRS and not {scan for pair in chosen for scan in (pair.moving, pair.fixed)} & set(seen)
        return [{"collection": collection, "method": method, "dice": {"0.3": 0.7, "1.0": 0.8, "3.0": 0.75}[method]} for _ in chosen]

    monkeypatch.setattr(pairs, "scans", lambda: (train, []))
    monkeypatch.setattr(pairs, "trained", fake_trained)
    monkeypatch.setattr(pairs, "measure", fake_measure)
    assert pairs.network(Log(), tmp_path, "voxelmorph", 1, 0) == tmp_path / "voxelmorph"
    assert trainings_of["voxelmorph"] == (1.0, train, pairs.STEPS)
    assert "0.800 with 1.0" in pairs.tuning_note({"1.0": 0.8})
    assert pairs.tuning_dice([{"collection": "ibsr18", "method": "x", "dice": 1.0}]) == {}


def test_our_network_is_trained_from_an_order(tmp_path: Path) -> None:
    grid = Grid.from_spacing((20, 16), 1.0)
    scans = [tmp_path / f"{n}.nii.gz" for n in range(3)]
    for n, path in enumerate(scans):
        write_scan(path, torch.rand(grid.shape, generator=torch.Generator().manual_seed(n)), Volume.from_grid(torch.zeros(grid.shape), grid))
    (tmp_path / "run").mkdir()
    networks.train_ours(scans, TrainingSettings(2, every=2), tmp_path / "run", objective="voxelmorph-ncc", dropout=0.5)
    network = TrainedRegistration.load(tmp_path / "run")
    assert network.settings.dropout == 0.5 and network.grid.shape == grid.shape


# Uncertainty of deformations.


def simulated(seed: int = 0) -> uncertainty.Example:
    grid = Grid.from_spacing((16, 14, 18), (1.0, 1.5, 1.0))
    generator = torch.Generator().manual_seed(seed)
    moving, fixed = (Volume.from_grid(torch.rand(grid.shape, generator=generator), grid) for _ in range(2))
    labels = torch.zeros(2, *grid.shape)
    labels[0, 4:9, 4:9, 4:9], labels[1, 9:12, 4:9, 4:9] = 1, 1
    truth = Displacement(grid, 0.3 * torch.randn(3, *grid.shape, generator=generator))
    example = uncertainty.Example("1", moving, fixed, labels, torch.zeros(2), truth)
    return replace(example, volumes=example.carried(truth))


def network(settings: NetworkSettings) -> TrainedRegistration:
    built = TrainedRegistration.build(simulated().moving.grid, settings)
    torch.manual_seed(0)
    nn.init.normal_(built.guide.network.head.weight, std=0.001)  # type: ignore[union-attr, arg-type]
    return built


def test_intervals_hold_one_more_draw_as_often_as_they_say() -> None:
    draws = torch.randn(41, 20_000, generator=torch.Generator().manual_seed(0))
    lower, upper = uncertainty.intervals(draws[1:])
    held = ((lower <= draws[0]) & (draws[0] <= upper)).float().mean(1)
    levels = torch.tensor(uncertainty.LEVELS)
    assert ((held - levels).abs() < 4 * (levels * (1 - levels) / 20_000).sqrt()).all()


def test_a_posterior_at_the_truth_has_no_error() -> None:
    example = simulated()
    assert example.truth is not None
    row = uncertainty.scored(uncertainty.Posterior(example.truth, [example.truth] * 3), example)
    assert row["error_mm"] == 0 and row["sd_mm"] == 0 and row["volume_error"] == row["volume_width"] == [0, 0]
    assert row["points"] == [1, 1, 1] and row["volumes"] == [[True] * 3] * 2 and row["before_mm"] > 0.1
    away = uncertainty.Posterior(Affine.identity(3), [Affine.exp(torch.tensor([5.0 + x, 0, 0, 0, 0, 0])) for x in (0.0, 0.1)])
    row = uncertainty.scored(away, example)
    assert row["points"] == [0, 0, 0] and row["error_mm"] == row["before_mm"]
    real = uncertainty.scored(away, replace(example, truth=None))
    assert set(real) == {"volumes", "volume_sd", "volume_width", "volume_error"}
    rows = [{"pairs": kind, "likelihood": "L", "families": {"F": scores}} for kind, scores in (("simulated", row), ("real", real))]
    first, second = uncertainty.summarise(rows)
    assert first["coverage, points"] == "0 / 0 / 0" and second["coverage, points"] == second["error, mm"] == "–"


def test_dropout_draws_answers_and_their_mean_is_the_centre() -> None:
    built = network(NetworkSettings("voxelmorph-ncc", features=(4, 4, 4, 4, 4, 4), dropout=0.5))
    example = simulated()
    found = uncertainty.networked(example, 3, "dropout", built)["dropout"]
    again = uncertainty.networked(example, 3, "dropout", built)["dropout"]
    points = example.fixed.grid.coordinates()
    at = torch.stack([draw(points) for draw in found.draws])
    assert len(at) == uncertainty.DRAWS and at.std(0).max() > 1e-3
    torch.testing.assert_close(again.draws[1](points), at[1])
    # Flows that are small add up.
    torch.testing.assert_close(found.centre(points), at.mean(0), atol=0.02 * float((at - points).abs().max()), rtol=0)
    with pytest.raises(ValueError, match="expected a dropout"):
        replace(built.settings, dropout=1.0)


def test_a_published_network_draws_with_its_own_variance() -> None:
    built = network(NetworkSettings("voxelmorph-probabilistic", "diagonal", features=(4, 4, 4, 4, 4, 4)))
    with torch.no_grad():
        built.guide.network.head.weight.zero_()  # type: ignore[union-attr, operator]
    images = torch.rand(2, 1, 1, *built.grid.shape)
    q = built.posterior(*images)
    # At its start log σ² is −10, in voxels of the lattice.
    sd = torch.exp(torch.tensor(-5.0)) * torch.tensor(built.lattice.spacing)
    torch.testing.assert_close(q.variance.sqrt(), sd[None, :, None, None, None].float().expand(q.loc.shape))
    torch.manual_seed(0)
    draws = q.sample((200,))
    torch.testing.assert_close(draws.std((0, 1, 3, 4, 5)), sd.float(), rtol=0.02, atol=0)


DENSE, FEATURES = partial(scaling.rates, dense=True), partial(scaling.rates, dense=False)


@pytest.mark.parametrize("prepare", [DENSE, FEATURES, scaling.all_visits, scaling.sums_of_visits])
def test_a_likelihood_of_a_size_has_a_gradient(prepare: Callable[[int, torch.Generator], scaling.Measured], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "FEATURES", 6)
    work, _ = prepare(9, torch.Generator().manual_seed(0))
    gradients = work()
    assert isinstance(gradients, tuple)
    assert all(gradient.isfinite().all() and (gradient != 0).all() for gradient in gradients)


@pytest.mark.parametrize("loss", [scaling.WHOLE, scaling.IN_PARTS, scaling.IN_BATCHES])
def test_an_epoch_of_an_autoencoder_goes_through_everyone(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every person's images enter a gradient, each once but where images pass the networks twice."""
    seen: list[int] = []
    encode = GPPriorGuide.encode

    def counted(self: Any, cohort: Any, images: Tensor) -> Any:
        seen.append(len(images))
        return encode(self, cohort, images)

    monkeypatch.setattr(GPPriorGuide, "encode", counted)
    epoch, _ = scaling.autoencoder(20, torch.Generator().manual_seed(0), loss)
    epoch()
    assert sum(seen) == (40 if loss == scaling.IN_PARTS else 20)


def test_growth_is_for_ten_times_the_size() -> None:
    common = {"method": scaling.OURS, "fastest": 1.0, "slowest": 2.0, "peak_gib": 1.0}
    rows = [{"what": "x", "size": size, "seconds": seconds, **common} for size, seconds in ((100, 1.0), (1000, 10.0), (5000, 50.0))]
    assert [line["growth"] for line in scaling.summarise(rows)] == ["–", "×10", "×10"]


def test_seconds_are_held_against_the_peer() -> None:
    rows = [
        {"what": scaling.REAL, "size": 957, "method": method, "seconds": seconds, "once_seconds": once}
        for method, seconds, once in ((scaling.OURS, 1.0, 1.0), (scaling.PEER, 4.0, 0.0))
    ]
    assert "0.25 of glimix-core's time after the decomposition, 0.50 with it" in scaling.ratio(rows)
    assert scaling.ratio(rows[:1]) == ""
