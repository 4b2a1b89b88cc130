"""Networks trained from a table of scans: what is written, what they answer, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from probmed.cli import app
from probmed.grids import Grid
from probmed.inference.training import TrainingSettings
from probmed.priors import SmoothVelocity
from probmed.transforms import Affine, Displacement
from probmed.volumes import UnusableInput, Volume, read_scan, write_labels, write_scan
from probmed.workflows.amortisation import (
    OBJECTIVES,
    NetworkSettings,
    TrainedRegistration,
    answer,
    read_cohort,
    train_registration,
    with_axes_of,
)
from probmed.workflows.cohorts import own_world
from probmed.workflows.registration import register

SMALL = NetworkSettings(features=(4, 4, 4, 4, 4, 4), batch=2, radius=2)


def disc(seed: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """An image with an ellipse in it, and its label."""
    generator = torch.Generator().manual_seed(seed)
    centre, radius = 3 * torch.randn(2, generator=generator), 7 + 2 * torch.rand(2, generator=generator)
    middle = grid.voxel_to_world((torch.tensor(grid.shape) - 1) / 2).float()
    inside = (((grid.coordinates() - middle - centre) / radius) ** 2).sum(-1)
    return 1 / (1 + inside**3) + 0.02 * torch.rand(grid.shape, generator=generator), (inside < 1).long()


def write_set(folder: Path, count: int = 4, labelled: int = 4) -> Path:
    """Scans, labels of the first ones, and their table."""
    folder.mkdir(exist_ok=True)
    grid = Grid.from_spacing((26, 30), (1.5, 1.0))
    like = Volume.from_grid(torch.zeros(grid.shape), grid)
    rows = []
    for number in range(count):
        image, label = disc(number, grid)
        write_scan(folder / f"{number}.nii.gz", image, like)
        write_labels(folder / f"{number}_seg.nii.gz", label, like)
        rows.append({"scan": f"{number}.nii.gz", "labels": f"{number}_seg.nii.gz" if number < labelled else ""})
    table = folder / "scans.tsv"
    pd.DataFrame(rows).to_csv(table, sep="\t", index=False)
    return table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield write_set(tmp_path_factory.mktemp("scans"))


def untrained(grid: Grid, seed: int = 0) -> TrainedRegistration:
    """A network whose answers are no identity."""
    trained = TrainedRegistration.build(grid, SMALL, seed)
    torch.manual_seed(seed)
    nn.init.normal_(trained.guide.network.head.weight, std=0.3)  # type: ignore[union-attr, arg-type]
    return trained


def test_cohort_is_brought_to_one_grid_with_its_labels(tmp_path: Path) -> None:
    path = write_set(tmp_path, labelled=3)
    cohort, grid = read_cohort(pd.read_csv(path, sep="\t"), path)
    assert cohort.images.shape == (4, 1, *grid.shape) and grid.shape == (28, 32)
    assert grid.spacing == pytest.approx((1.5, 1.0))
    assert cohort.codes == (0, 1)
    assert set(cohort.labels[0].unique().tolist()) == {0, 1}
    assert (cohort.labels[3] == -1).all()
    # The scan is where it was, in the middle, and nothing is known beyond it.
    assert cohort.images[0, 0, 1:27, 1:31].isfinite().all()
    assert cohort.images[0, 0, 0].isnan().all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_and_its_network_comes_back_from_disk(objective: str, table: Path, tmp_path: Path) -> None:
    settings = NetworkSettings(objective, features=SMALL.features, batch=2, radius=2, label_weight=1.0)
    cohort, grid = read_cohort(pd.read_csv(table, sep="\t"), table)
    training = TrainingSettings(steps=6, learning_rate=0.01, every=3)
    trained, log = train_registration(cohort, grid, settings, training, folder=tmp_path, validation=cohort)
    assert [row["step"] for row in log] == [3, 6]
    assert 0 < log[-1]["dice"] <= 1 and 0 <= log[-1]["folding"] <= 1
    again = TrainedRegistration.load(tmp_path)
    assert again.settings == settings and again.grid == grid
    images = cohort.images[:1], cohort.images[1:2]
    assert torch.equal(again.velocities(*images), trained.velocities(*images))
    assert trained.velocities(*images).abs().max() > 0


def test_labels_enter_the_loss_where_they_are_asked_for(table: Path) -> None:
    cohort, grid = read_cohort(pd.read_csv(table, sep="\t"), table)
    batch = torch.tensor([0, 1]), torch.tensor([2, 3])
    values = []
    for weight in (0.0, 2.0, 4.0):
        settings = NetworkSettings(features=SMALL.features, batch=2, radius=2, label_weight=weight)
        trained = TrainedRegistration.build(grid, settings)
        torch.manual_seed(0)
        values.append(float(trained.loss(cohort)(batch).detach()))
    assert values[1] > values[0]
    assert values[2] - values[1] == pytest.approx(values[1] - values[0], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["elbo", "voxelmorph-ncc"])
def test_a_trained_network_aligns_scans_that_it_never_saw(objective: str, tmp_path: Path) -> None:
    path = write_set(tmp_path / "train", 12, 12)
    cohort, grid = read_cohort(pd.read_csv(path, sep="\t"), path)
    other = write_set(tmp_path / "all", 18, 18)
    unseen = read_cohort(pd.read_csv(other, sep="\t").iloc[12:], other, grid=grid)[0]
    settings = NetworkSettings(objective, features=(8, 8, 8, 8, 8, 8), batch=4, radius=3)
    before = TrainedRegistration.build(grid, settings).validation(unseen, [(m, f) for m in range(6) for f in range(6) if m != f])
    _, log = train_registration(cohort, grid, settings, TrainingSettings(steps=400, learning_rate=3e-3, every=400), validation=unseen)
    assert log[-1]["dice"] > before["dice"] + 0.5 * (1 - before["dice"])


# A network's answer for a pair.


def volumes(grid: Grid) -> tuple[Volume, Volume]:
    return Volume.from_grid(disc(0, grid)[0], grid), Volume.from_grid(disc(1, grid)[0], grid)


def test_answer_moves_with_the_scans_headers() -> None:
    grid = Grid.from_spacing((26, 30), (1.5, 1.0))
    trained = untrained(grid)
    moving, fixed = volumes(grid)
    plain = answer(trained, moving, fixed)
    worlds = [Affine.exp(torch.tensor(p, dtype=torch.float64), 2) for p in ([30.0, -8.0, 0.6], [-4.0, 5.0, -0.3])]
    turned = answer(trained, *(Volume.from_grid(v.data, v.grid.transformed(w.matrix)) for v, w in zip((moving, fixed), worlds, strict=True)))
    points = grid.coordinates(torch.float64)
    expected = worlds[0]((plain.affine @ plain.velocity)(points))
    found = (turned.affine @ turned.velocity)(worlds[1](points))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert ((plain.affine @ plain.velocity)(points) - points).norm(dim=-1).max() > 0.5


def test_answer_does_not_depend_on_how_the_array_is_stored() -> None:
    grid = Grid.from_spacing((26, 30), (1.5, 1.0))
    trained = untrained(grid)
    moving, fixed = volumes(grid)
    plain = answer(trained, moving, fixed, draws=2)
    affine = grid.affine[:, [1, 0, 2]].clone()
    affine[:2, 2] += 29 * affine[:2, 0]
    affine[:2, 0] *= -1
    stored = Volume.from_grid(fixed.data.T.flip(0).contiguous(), Grid((30, 26), affine))
    other = answer(trained, moving, stored, draws=2)
    points = grid.coordinates(torch.float64)
    torch.testing.assert_close(other.velocity(points), plain.velocity(points), atol=1e-4, rtol=0)
    torch.testing.assert_close(other.draws[1](points), plain.draws[1](points), atol=1e-4, rtol=0)
    # Its axes are those of the image, which is what makes it quick to carry.
    assert other.velocity.grid.positions_of(stored.grid)


def test_axes_of_another_grid_leave_a_field_where_it_is() -> None:
    lattice = Grid.from_spacing((5, 4, 3), (1.0, 2.0, 3.0))
    field = torch.randn(3, 5, 4, 3)
    grid = Grid((8, 9, 7), torch.tensor([[0.0, -1, 0, 3], [2, 0, 0, -8], [0, 0, -1.5, 4], [0, 0, 0, 1]]))
    moved = with_axes_of(grid, lattice, field)
    points = lattice.coordinates()
    torch.testing.assert_close(Displacement(moved.grid, moved.field)(points), Displacement(lattice, field)(points))
    assert moved.grid.axes_codes == grid.axes_codes


def test_own_world_is_rigid_and_takes_the_middle_to_the_origin() -> None:
    grid = Grid((8, 9, 7), torch.tensor([[0.0, -1, 0.1, 3], [2, 0, 0, -8], [0, 0.1, -1.5, 4], [0, 0, 0, 1]]))
    world = own_world(grid)
    turn = world.matrix[:3, :3]
    assert (turn.diagonal() > 0.9).all()
    middle = grid.voxel_to_world((torch.tensor(grid.shape, dtype=torch.float64) - 1) / 2)
    torch.testing.assert_close(world(torch.zeros(3, dtype=torch.float64)), middle)


def test_register_takes_a_network_s_answer_and_refines_it() -> None:
    grid = Grid.from_spacing((26, 30), (1.5, 1.0))
    trained = untrained(grid)
    moving, fixed = volumes(grid)
    result = register(moving, fixed, draws=3, amortised=lambda m, f, n: answer(trained, m, f, draws=n, refine=40))
    assert result.refinement is not None and result.refinement.gap > 3 * result.refinement.error
    assert result.sd is not None and result.sd.shape == (2, 26, 30) and (result.sd > 0).all()
    assert len(result.draws) == 3 and "network" in result.seconds


def test_scans_of_another_dimension_are_refused() -> None:
    trained = untrained(Grid.from_spacing((26, 30), (1.5, 1.0)))
    cube = Volume.from_grid(torch.rand(8, 8, 8), Grid.from_spacing((8, 8, 8), 1.0))
    with pytest.raises(UnusableInput, match="has 3 axes, and the network takes 2"):
        answer(trained, cube, cube)


# The command.


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    return result.exit_code, result.output


def test_command_trains_goes_on_and_never_replaces_a_run(table: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--data", table, "-o", run, "--steps", 4, "--every", 2, "--batch", 2, "--device", "cpu", "--validation", table]
    code, output = command("registration", *options)
    assert code == 0, output
    assert {p.name for p in run.iterdir()} == {"checkpoint.safetensors", "log.csv", "network.json", "network.safetensors"}
    assert json.loads((run / "network.json").read_text())["objective"] == "elbo"
    assert "4 steps" in output and "dice" in output
    before = (run / "network.safetensors").read_bytes()
    code, output = command("registration", *options)
    assert code == 2 and "holds a run already" in output
    code, output = command("registration", *options, "--resume")
    assert code == 0, output
    assert (run / "network.safetensors").read_bytes() == before
    assert read_scan(table.parent / "0.nii.gz").grid.ndim == 2


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("image\n0.nii.gz\n1.nii.gz\n", "has no column scan"),
        ("scan\n0.nii.gz\n", "has 1 scans"),
        ("scan\nnone.nii.gz\nnone.nii.gz\n", "none.nii.gz"),
        ("", "has no rows"),
    ],
)
def test_unusable_tables_get_one_line_and_leave_nothing(content: str, fault: str, tmp_path: Path) -> None:
    table, run = tmp_path / "scans.tsv", tmp_path / "run"
    table.write_text(content)
    code, output = command("registration", "--data", table, "-o", run, "--quiet", "--device", "cpu")
    assert code == 2 and fault in " ".join(output.split())
    assert not run.exists()


def test_other_unusable_requests_get_one_line(table: Path, tmp_path: Path) -> None:
    for arguments, fault in (
        (["nothing", "--data", table, "-o", tmp_path / "a"], "No such command"),
        (["registration", "--data", tmp_path / "none.tsv", "-o", tmp_path / "a"], "does not exist"),
        (["registration", "--data", table, "-o", tmp_path / "a", "--resume"], "holds no run to go on with"),
    ):
        code, output = command(*arguments)
        assert code == 2 and fault in " ".join(output.split())
        assert not (tmp_path / "a").exists()
    with pytest.raises(UnusableInput, match="holds no registration network"):
        TrainedRegistration.load(tmp_path)


def test_the_prior_is_learned_with_the_network(table: Path) -> None:
    cohort, grid = read_cohort(pd.read_csv(table, sep="\t"), table)
    settings = NetworkSettings(features=SMALL.features, batch=2, radius=2, learn_prior=True)
    trained, _ = train_registration(cohort, grid, settings, TrainingSettings(steps=4, learning_rate=0.05, every=4))
    fresh = TrainedRegistration.build(grid, settings).model.deformation
    assert isinstance(fresh, SmoothVelocity) and isinstance(trained.model.deformation, SmoothVelocity)
    assert trained.model.deformation.sd_mm != fresh.sd_mm and trained.model.deformation.length_mm != fresh.length_mm
