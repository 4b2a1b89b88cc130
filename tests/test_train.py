"""Networks trained from a table of scans: what is written, what they answer, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Beta, MultivariateNormal, kl_divergence
from torch.nn import functional
from typer.testing import CliRunner

from probmed.cli import app
from probmed.grids import Grid
from probmed.inference.training import TrainingSettings
from probmed.priors import SmoothVelocity
from probmed.transforms import Affine, Displacement, Velocity
from probmed.volumes import UnusableInput, Volume, read_scan, write_labels, write_scan
from probmed.workflows.amortisation import answer, read_cohort, train_registration, training_loss, validation_scores, with_axes_of
from probmed.workflows.cohorts import own_world
from probmed.workflows.registration import register
from probmed.workflows.registration_networks import OBJECTIVES, NetworkSettings, TrainedRegistration
from probmed.workflows.registration_objectives import PUBLISHED_WEIGHTS, PairBatch, loss

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


class Told(nn.Module):
    """In place of a network: what it says is known, and how often it was asked."""

    def __init__(self, velocity: Tensor, spread: float) -> None:
        super().__init__()
        self.velocity, self.spread, self.asked = velocity, spread, 0

    def forward(self, moving: Tensor, fixed: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        self.asked += 1
        velocity = self.velocity.expand(len(moving), *self.velocity.shape)
        assert velocity.shape[2:] == tuple(shape)
        return velocity, torch.full_like(velocity, self.spread)


def told(grid: Grid, settings: NetworkSettings, slope: float = 0.0, spread: float = -20.0, labels: int = 0) -> tuple[TrainedRegistration, Told]:
    """Of which the answer is a velocity that grows with the distance from the middle along the first axis."""
    trained = TrainedRegistration.build(grid, settings, labels=labels)
    points = trained.lattice.coordinates(torch.float64)
    velocity = torch.zeros(grid.ndim, *trained.lattice.shape, dtype=torch.float64)
    velocity[0] = slope * (points - middle_of(grid))[..., 0]
    network = Told(velocity, spread)
    trained.guide.network = network
    trained.guide.double(), trained.model.double()
    return trained, network


def middle_of(grid: Grid) -> Tensor:
    return grid.voxel_to_world((torch.tensor(grid.shape, dtype=torch.float64) - 1) / 2)


PLANE = Grid.from_spacing((32, 24), (1.0, 1.5))


@pytest.mark.parametrize("objective", PUBLISHED_WEIGHTS)
@pytest.mark.parametrize("weight", [None, 3.0])
def test_published_objectives_are_what_was_published(objective: str, weight: float | None) -> None:
    """v = a (x − c) along an axis, so that exp(v) stretches by e^a, and images that are linear there."""
    slope, offset, sd = -0.3, 0.2, 0.05
    trained, _ = told(PLANE, NetworkSettings(objective, weight=weight, image_sd=sd), slope)
    squarings = Velocity(trained.lattice, trained.guide.network.velocity).squarings()  # type: ignore[union-attr, arg-type]
    stretch = (1 + slope / 2**squarings) ** (2**squarings)
    assert stretch == pytest.approx(math.exp(slope), rel=1e-2)
    along = (PLANE.coordinates(torch.float64) - middle_of(PLANE))[None, None, ..., 0]
    # Beyond the outermost nodes of the velocity's lattice the displacement is theirs.
    reach = (trained.lattice.shape[0] - 1) * trained.lattice.spacing[0] / 2
    moving, carried = 5 + 0.7 * along, 5 + 0.7 * (along + (stretch - 1) * along.clamp(-reach, reach))
    strength = PUBLISHED_WEIGHTS[objective] if weight is None else weight
    # A mean over two components, of which one changes, and over two axes, along one of which it does.
    velocity, displacement = slope**2 / 4, (stretch - 1) ** 2 / 4
    ncc = "ncc" in objective
    fixed = 3 * carried if ncc else carried + offset
    found = float(loss(trained, PairBatch(moving, fixed)))
    if objective == "voxelmorph-probabilistic":
        log_variance = 2 * -20.0 - 10
        divergence = 0.5 * 2 * (-log_variance + strength * 0.5 * velocity)
        assert found == pytest.approx(offset**2 / sd**2 + 0.01 * divergence, rel=1e-6)
        return
    rough = displacement if objective.endswith("displacement") else velocity
    assert found == pytest.approx((-1 if ncc else offset**2) + strength * rough, rel=1e-5)
    assert abs(velocity - displacement) > 0.1 * velocity


@pytest.mark.parametrize("similarity", ["gaussian", "student", "mixture", "correlation"])
def test_the_evidence_bound_is_a_likelihood_less_a_divergence(similarity: str) -> None:
    """Where q is narrow the expected log likelihood is that at its mean, and the divergence of independent elements from the prior is algebra."""
    grid = Grid.from_spacing((12, 10), (1.0, 1.5))
    settings = NetworkSettings(similarity=similarity, posterior="diagonal", radius=1, tempering=0.3)
    trained, network = told(grid, settings, spread=-9.0)
    torch.manual_seed(1)
    moving, fixed = torch.rand(2, 1, 1, *grid.shape, dtype=torch.float64) + 0.5
    q = trained.guide.distribution(moving, fixed)
    prior = trained.model.deformation.prior()  # type: ignore[operator]
    size = prior.event_shape.numel()
    precision = torch.stack([prior.precision_matvec(e.reshape(prior.event_shape)).flatten() for e in torch.eye(size, dtype=torch.float64)])
    dense = kl_divergence(
        MultivariateNormal(torch.zeros(size, dtype=torch.float64), torch.diag(q.variance.flatten())),
        MultivariateNormal(torch.zeros(size, dtype=torch.float64), precision_matrix=precision),
    )
    like = trained.model.similarity
    latents = like.update(moving[0], fixed[0], like.start(moving[0], fixed[0]))
    density = 0.3 * like.distribution(moving[0], latents).log_prob(fixed[0]).sum() + like.log_prior(moving[0], latents).sum()
    network.asked = 0
    torch.testing.assert_close(grid.numel * loss(trained, PairBatch(moving, fixed)), dense - density, rtol=2e-3, atol=0)
    assert network.asked == 1


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_labels_are_one_more_observation_in_the_evidence_bound(weight: float) -> None:
    """At the identity a voxel's labels agree, with probability 1 − ε, or are one of the K − 1 others; ε is at its mode."""
    grid = Grid.from_spacing((12, 10), (1.0, 1.5))
    settings = NetworkSettings(similarity="gaussian", posterior="diagonal", label_weight=weight)
    (plain, _), (trained, network) = told(grid, settings), told(grid, settings, labels=3)
    generator = torch.Generator().manual_seed(0)
    moving, fixed = torch.rand(2, 2, 1, *grid.shape, generator=generator, dtype=torch.float64)
    # Mistakes of one label for another hardly depend on where a boundary is, to a thousandth of a voxel, if most of the map is even.
    codes = torch.zeros(2, *grid.shape, dtype=torch.int64)
    codes[:, 6:] = 1
    other = codes.clone()
    other[:, :3, :3] = 2
    ones, others = (functional.one_hot(each, 3).movedim(-1, 1).double() for each in (codes, other))
    others[1] = math.nan  # the second pair has no labels
    pairs = PairBatch(moving, fixed, (ones, others))
    torch.manual_seed(0)
    bare = loss(plain, PairBatch(moving, fixed))
    torch.manual_seed(0)
    network.asked = 0
    found = float(grid.numel * (loss(trained, pairs) - bare).detach())
    assert network.asked == 1
    total, wrong, certainty = grid.numel, 9, 100.0
    terms = []
    for count, mistakes in ((total, wrong), (0, 0)):
        error = (weight * mistakes + certainty * 0.05) / (weight * count + certainty)
        seen = (count - mistakes) * math.log(1 - error) + (mistakes and mistakes * math.log(error / 2))
        terms.append(weight * seen + float(Beta(torch.tensor(6.0), torch.tensor(96.0)).log_prob(torch.tensor(error))))
    assert found == pytest.approx(-sum(terms) / 2, rel=0.02)


def test_labels_of_a_table_enter_the_bound_where_they_are_asked_for(table: Path) -> None:
    cohort, grid = read_cohort(pd.read_csv(table, sep="\t"), table)
    settings = NetworkSettings(features=SMALL.features, batch=2, radius=2, label_weight=1.0)
    for count in (0, len(cohort.codes)):
        trained = TrainedRegistration.build(grid, settings, labels=count)
        assert (trained.model.labels is None) == (count == 0)
        assert bool(torch.isfinite(training_loss(trained, cohort)((torch.tensor([0, 1]), torch.tensor([2, 3])))))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["elbo", "voxelmorph-ncc"])
def test_a_trained_network_aligns_scans_that_it_never_saw(objective: str, tmp_path: Path) -> None:
    path = write_set(tmp_path / "train", 12, 12)
    cohort, grid = read_cohort(pd.read_csv(path, sep="\t"), path)
    other = write_set(tmp_path / "all", 18, 18)
    unseen = read_cohort(pd.read_csv(other, sep="\t").iloc[12:], other, grid=grid)[0]
    settings = NetworkSettings(objective, features=(8, 8, 8, 8, 8, 8), batch=4, radius=3)
    before = validation_scores(TrainedRegistration.build(grid, settings), unseen, [(m, f) for m in range(6) for f in range(6) if m != f])
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
    result = register(moving, fixed, draws=3, amortised=partial(answer, trained, refine=40))
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


@pytest.mark.slow
def test_command_trains_in_two_processes(table: Path, tmp_path: Path) -> None:
    """As on two GPUs: the command starts the second one itself, and one of them writes."""
    options = ["--data", str(table), "-o", "run", "--steps", "2", "--every", "1", "--batch", "2", "--device", "cpu", "--devices", "2", "--quiet"]
    whole = subprocess.run(
        [sys.executable, "-m", "probmed", "train", "registration", *options], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert whole.returncode == 0, whole.stderr
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"checkpoint.safetensors", "log.csv", "network.json", "network.safetensors"}
    assert list(pd.read_csv(tmp_path / "run/log.csv")["step"]) == [1, 2]
    assert TrainedRegistration.load(tmp_path / "run").settings.batch == 2


def test_options_reach_the_settings(table: Path, tmp_path: Path) -> None:
    base = ["registration", "--data", table, "--steps", 1, "--batch", 2, "--device", "cpu", "--quiet"]
    published = ["--objective", "voxelmorph-ncc-displacement", "--weight", 0.5, "--dropout", 0.25]
    for out, options, wanted in (
        ("a", ["--similarity", "student", "--label-weight", 2], {"similarity": "student", "label_weight": 2.0, "image_sd": 0.02}),
        ("b", published, {"objective": "voxelmorph-ncc-displacement", "weight": 0.5, "dropout": 0.25}),
        ("c", ["--objective", "voxelmorph-probabilistic", "--image-sd", 0.05], {"image_sd": 0.05, "weight": None}),
        ("d", ["--similarity", "mixture"], {"similarity": "mixture"}),
    ):
        code, output = command(*base, "-o", tmp_path / out, *options)
        assert (code, output) == (0, "")
        found = json.loads((tmp_path / out / "network.json").read_text())
        assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--weight", 1], "--weight: has no effect on the objective elbo"),
        (["--image-sd", 0.1, "--objective", "voxelmorph-mse"], "--image-sd: has no effect on the objective voxelmorph-mse"),
        (["--label-weight", 1, "--objective", "simulation"], "--label-weight: has no effect"),
        (["--learn-prior", "--objective", "voxelmorph-ncc"], "--learn-prior: has no effect"),
        (["--posterior", "diagonal", "--objective", "voxelmorph-ncc"], "--posterior: has no effect"),
        (["--image-sd", 0, "--objective", "voxelmorph-probabilistic"], "--image-sd 0: is no positive number"),
        (["--learning-rate", 0], "--learning-rate 0: is no positive number"),
    ],
)
def test_options_without_an_effect_are_refused(options: list[object], fault: str, table: Path, tmp_path: Path) -> None:
    code, output = command("registration", "--data", table, "-o", tmp_path / "run", "--quiet", *options)
    assert code == 2 and fault in " ".join(output.split())
    assert not (tmp_path / "run").exists()


def test_a_weight_on_labels_that_are_not_there_is_refused(tmp_path: Path) -> None:
    table, run = write_set(tmp_path / "set", 3, 0), tmp_path / "run"
    code, output = command("registration", "--data", table, "-o", run, "--quiet", "--device", "cpu", "--label-weight", 1)
    assert code == 2 and "scans.tsv: has no labels to train with" in " ".join(output.split())
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
