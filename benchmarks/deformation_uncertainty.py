"""Does the posterior of a deformation hold the truth as often as it says? Real crops, deformed by draws of the prior, and pairs of real crops.

The moving image of a simulated pair is a training scan of `msd_hippocampus`, the fixed one the same after a velocity drawn from the prior of `probmed
register`, with noise. Coverage is of the components of the displacement at points, and of the volumes of the two labels; *Laplace* and *independent
voxels* are about the same mode but for the likelihood that is named.

A real pair is of two of those scans. The moving one's labels are carried by every draw, and the interval of each label's volume is held against the
volume that was drawn by hand on the fixed one. Networks are trained on the other training scans.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import pairs
from benchmarks.tables import Log, Row, Table, mean_sd
from benchmarks.trainings import trained
from probmed.fields import along_axes, cosine_basis
from probmed.inference.parameters import seeded
from probmed.priors import SmoothVelocity
from probmed.transforms import Affine, Displacement, Transform, Velocity, warp
from probmed.volumes import Volume, read_labels, read_scan, scaled
from probmed.workflows.amortisation import answer
from probmed.workflows.registration import RegistrationSettings, register
from probmed.workflows.registration_fit import MANY_ITERATIONS, Level, Pair, climb, prior_scales
from probmed.workflows.registration_networks import TrainedRegistration

PAIRS = 24
REAL_PAIRS = 40
DRAWS = 40
NOISE = 0.05
LEVELS = (0.50, 0.80, 0.95)
MARGIN = 4  # voxels at each face that are not scored, nor every voxel but the third
LABELS = (1, 2)
STEPS = 2000  # of each network
DEFAULT = "local correlation, the default"
LIKELIHOODS = {"Gaussian noise, as simulated": "gaussian", DEFAULT: "correlation"}


@dataclass(frozen=True)
class Network:
    """A family that comes from a network.

    Arguments:
        folder: its name. settings: those that are not the defaults of `probmed train registration`.
    """

    folder: str
    likelihood: str
    settings: dict[str, Any]


NETWORKS = {
    "smooth network": Network("smooth", DEFAULT, {}),
    "VoxelMorph's diagonal network": Network(
        "diagonal", "mean squares, as published", {"objective": "voxelmorph-probabilistic", "posterior": "diagonal"}
    ),
    "Monte Carlo dropout": Network("dropout", "local correlation, as published", {"objective": "voxelmorph-ncc", "dropout": 0.2}),
}


@dataclass(frozen=True)
class Example:
    """A pair to be registered.

    Arguments:
        moving, fixed: scaled. labels: of the moving image, zeros and ones, ``(2, *shape)``.
        volumes: the right ones on the fixed image, ``(2,)``, mm³.
        truth: fixed world to moving world, where it is known.
    """

    name: str
    moving: Volume
    fixed: Volume
    labels: Tensor
    volumes: Tensor
    truth: Transform | None = None

    def carried(self, transform: Transform) -> Tensor:
        """Volumes of the labels after a transform, ``(2,)``, mm³."""
        return warp(self.labels, self.moving.grid, transform, self.fixed.grid, fill=0.0).flatten(1).sum(-1) * self.fixed.grid.voxel_volume


@dataclass(frozen=True)
class Posterior:
    """A transform with draws about it, all from the fixed world to the moving one."""

    centre: Transform
    draws: Sequence[Transform]


Families = Callable[[Example, int], Mapping[str, Posterior]]
"""Posteriors by family of an example with a seed."""


def table(log: Log, limit: int | None, only: Sequence[str], threads: int, seed: int) -> Table:
    """Measure every family on every pair."""
    torch.set_num_threads(threads)
    train, _ = pairs.scans()
    held = [train[int(index)] for index in np.random.default_rng(seed).permutation(len(train))[:PAIRS]]
    rest = [path for path in train if path not in held]
    simulated = [partial(simulate, path, seed + number) for number, path in enumerate(held[:limit])]
    real = [partial(read, case) for case in pairs.drawn_pairs("real", held, REAL_PAIRS, seed)[:limit]]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:

        @cache
        def families_of(name: str) -> Families:
            if name in LIKELIHOODS:
                return partial(fitted, similarity=LIKELIHOODS[name])
            place = trained(log, Path(folder), NETWORKS[name].folder, "registration", NETWORKS[name].settings, rest, STEPS, threads)
            return partial(networked, family=name, network=TrainedRegistration.load(place))

        for kind, examples, methods in (("simulated", simulated, [*LIKELIHOODS, *NETWORKS]), ("real", real, [DEFAULT, *NETWORKS])):
            for name in methods:
                if only and not any(word in f"{kind} {name}" for word in only):
                    continue
                families, likelihood = families_of(name), NETWORKS[name].likelihood if name in NETWORKS else name
                for number, make in enumerate(examples):
                    rows.append(log.row(f"{kind}/{number}/{name}", partial(measure, kind, make, likelihood, families, seed + number)))
                    print(f"{kind:9s} {number:3d} {name:34s} {rows[-1]['seconds']:.1f} s", flush=True)
    settings = {"threads": threads, "draws": DRAWS, "noise": NOISE, "steps": STEPS, "training_scans": len(rest)}
    trainings = f" Networks were trained for {STEPS} steps on {len(rest)} scans that are in no pair."
    return Table("deformation_uncertainty", rows, summarise(rows), NOTES + trainings, settings, seed)


NOTES = (
    f"Coverage in per cent of the 50 / 80 / 95 % intervals of {DRAWS} draws. Error and sd: root mean squares of a component's error and of the "
    "posterior's standard deviation. Volumes: mean distance from the right volume, mean standard deviation of the draws and mean width of the 95 % "
    "interval. Correlation: of predicted standard deviation and absolute error over the points of a pair, mean over pairs."
)


def simulate(path: Path, seed: int) -> Example:
    """A scan and the same after a draw of the prior, with noise."""
    scan, labels = read_scan(path), one_hot(read_labels(pairs.beside(path)))
    grid, image = scan.grid, scaled(scan.data)
    lattice = grid.at_spacing([2 * h for h in grid.spacing])  # that of `register`, at its finest level
    with seeded(seed):
        truth = Velocity(lattice, SmoothVelocity(lattice, *prior_scales(grid), alpha=RegistrationSettings().alpha).prior().sample()).exp()
        noise = NOISE * torch.randn(grid.shape)
    fixed = warp(image[None], grid, truth, grid, fill="edge")[0] + noise
    example = Example(path.name[12:15], Volume.from_grid(image, grid), Volume.from_grid(fixed, grid), labels, torch.zeros(len(LABELS)), truth)
    return replace(example, volumes=example.carried(truth))


def read(case: pairs.Pair) -> Example:
    """A pair of scans, and the volumes of the fixed one's labels."""
    moving, fixed = (Volume.from_grid(scaled(scan.data), scan.grid) for scan in map(read_scan, (case.moving, case.fixed)))
    volumes = one_hot(read_labels(case.fixed_labels)).flatten(1).sum(-1) * fixed.grid.voxel_volume
    return Example(case.name, moving, fixed, one_hot(read_labels(case.moving_labels)), volumes)


def one_hot(labels: Volume) -> Tensor:
    return torch.stack([(labels.data == k).float() for k in LABELS])


def fitted(example: Example, seed: int, similarity: str) -> dict[str, Posterior]:
    """Both families about the mode of a likelihood; a simulated pair needs no affine map."""
    moving, fixed = example.moving, example.fixed
    affine = Affine.identity(3)
    if example.truth is None:
        affine = register(moving, fixed, device="cpu", settings=RegistrationSettings(deformable=False)).affine
    # As many iterations as `register` takes where draws are asked for.
    settings = RegistrationSettings(similarity=similarity, iterations=MANY_ITERATIONS)
    *_, level = climb(Pair(fixed.data, fixed.grid, moving.data, moving.grid, affine), settings)
    mode = affine @ Velocity(level.lattice, level.mode.field).exp()
    generator = torch.Generator().manual_seed(seed + PAIRS)
    by_family = {"Laplace": level.draws(DRAWS, seed), "independent voxels": independent_draws(level, DRAWS, generator)}
    return {family: Posterior(mode, [affine @ draw for draw in draws]) for family, draws in by_family.items()}


def networked(example: Example, seed: int, family: str, network: TrainedRegistration) -> dict[str, Posterior]:
    """A network's mean and draws; where it was trained with dropout, those of answers with dropout, and the mean of their velocities."""
    found = answer(network, example.moving, example.fixed, draws=DRAWS, seed=seed)
    centre, draws = found.velocity, found.draws
    if network.settings.dropout:
        network.guide.train()  # for dropout
        with seeded(seed):
            draws = [answer(network, example.moving, example.fixed).velocity for _ in range(DRAWS)]
        centre = Velocity(centre.grid, torch.stack([draw.field for draw in draws]).mean(0))
    return {family: Posterior(found.affine @ centre.exp(both=False), [found.affine @ draw.exp(both=False) for draw in draws])}


def measure(kind: str, make: Callable[[], Example], likelihood: str, families: Families, seed: int) -> Row:
    """One pair under one likelihood; scores by family."""
    example = make()
    start = time.perf_counter()
    posteriors = families(example, seed)
    seconds = time.perf_counter() - start
    scores = {family: scored(posterior, example) for family, posterior in posteriors.items()}
    return {"pairs": kind, "likelihood": likelihood, "scan": example.name, "seconds": round(seconds, 2), "families": scores}


def intervals(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper ends by level, ``(levels, ...)`` each, of draws ``(n, ...)``: between the draws of rank p (n + 1), so that one more draw
    would be inside as often as the level says."""
    n, levels = len(draws), torch.tensor(LEVELS)
    lower, upper = (((tails * (n + 1) - 1) / (n - 1)).clamp(0, 1) for tails in ((1 - levels) / 2, (1 + levels) / 2))
    return torch.quantile(draws, lower, dim=0), torch.quantile(draws, upper, dim=0)


def scored(posterior: Posterior, example: Example) -> Row:
    """Coverage of volumes and, where the truth is known, at points, and how the standard deviation follows the error."""
    volumes = torch.stack([example.carried(draw) for draw in posterior.draws])
    lower, upper = intervals(volumes)
    row: Row = {
        "volumes": ((lower <= example.volumes) & (example.volumes <= upper)).T.tolist(),
        "volume_sd": volumes.std(0).tolist(),
        "volume_width": (upper - lower)[-1].tolist(),
        "volume_error": (example.carried(posterior.centre) - example.volumes).tolist(),
    }
    if example.truth is None:
        return row
    points = example.fixed.grid.coordinates()[(slice(MARGIN, -MARGIN, 3),) * 3].reshape(-1, 3)
    right = example.truth(points)
    at, error = torch.stack([draw(points) for draw in posterior.draws]), posterior.centre(points) - right
    sd, (lower, upper) = at.std(0), intervals(at)
    return row | {
        "points": ((lower <= right) & (right <= upper)).float().mean((1, 2)).tolist(),
        "error_mm": float(error.square().mean().sqrt()),
        "before_mm": float((points - right).square().mean().sqrt()),
        "sd_mm": float(sd.square().mean().sqrt()),
        "correlation": float(torch.corrcoef(torch.stack([sd.flatten(), error.abs().flatten()]))[0, 1]),
    }


def independent_draws(level: Level, count: int, generator: torch.Generator) -> list[Displacement]:
    """exp(v) for draws whose elements are independent: the normal nearest to the Laplace posterior in KL(q ‖ p), of variances 1 / (H + Λ)_ii."""
    prior, field = level.prior.prior(), level.mode.field
    squared = [cosine_basis(n, None, field.dtype) ** 2 for n in prior.grid_shape]
    precision = level.mode.near.blocks().diagonal().movedim(-1, 0) + along_axes(prior.eigenvalues, squared)
    noise = torch.randn(count, *field.shape, generator=generator)
    return [Velocity(level.lattice, field + each * precision.rsqrt()).exp() for each in noise]


def summarise(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A line for each kind of pair, likelihood and family."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        for family, scores in row["families"].items():
            found.setdefault((row["pairs"], row["likelihood"], family), []).append(scores)
    return [
        {
            "pairs": f"{kind} ({len(scores)})",
            "likelihood": likelihood,
            "posterior": family,
            "coverage, points": share([s["points"] for s in scores if "points" in s]),
            "coverage, volumes": share([held for s in scores for held in s["volumes"]]),
            "error, mm": mean_sd([s["error_mm"] for s in scores if "error_mm" in s]),
            "sd, mm": mean_sd([s["sd_mm"] for s in scores if "sd_mm" in s]),
            "volume error / sd / width, mm³": " / ".join(
                f"{statistics.fmean(abs(value) for s in scores for value in s[name]):.0f}" for name in ("volume_error", "volume_sd", "volume_width")
            ),
            "correlation": mean_sd([s["correlation"] for s in scores if "correlation" in s], 2),
        }
        for (kind, likelihood, family), scores in found.items()
    ]


def share(held: Sequence[Sequence[float]]) -> str:
    """Per cent by level; an en dash where there is nothing."""
    return " / ".join(f"{100 * statistics.fmean(column):.0f}" for column in zip(*held, strict=True)) or "–"
