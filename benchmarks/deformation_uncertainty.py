"""Does the posterior of a deformation hold the truth as often as it says? Real crops, deformed by draws of the prior.

The moving image is a training scan of `msd_hippocampus`, the fixed one the same after a velocity drawn from the prior of `probmed register`, with
noise. Coverage is of the components of the displacement at points, and of the volumes of the two labels; every posterior is about the same mode but
for the likelihood that is named.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.pairs import beside, scans
from benchmarks.tables import Log, Row, Table, mean_sd
from probmed.fields import along_axes, cosine_basis
from probmed.grids import Grid
from probmed.priors import SmoothVelocity
from probmed.transforms import Affine, Displacement, Transform, Velocity, warp
from probmed.volumes import read_labels, read_scan, scaled
from probmed.workflows.registration import MANY_ITERATIONS, Level, Pair, RegistrationSettings, climb, prior_scales

PAIRS = 24
DRAWS = 40
NOISE = 0.05
LEVELS = (0.50, 0.80, 0.95)
MARGIN = 4  # voxels at each face that are not scored, nor every voxel but the third
LABELS = (1, 2)
LIKELIHOODS = {"Gaussian noise, as simulated": "gaussian", "local correlation, the default": "correlation"}
FAMILIES = ("Laplace", "independent voxels")


def table(log: Log, limit: int | None, only: Sequence[str], threads: int, seed: int) -> Table:
    """Measure both families under both likelihoods on every pair."""
    torch.set_num_threads(threads)
    train, _ = scans()
    rows: list[Row] = []
    chosen = np.random.default_rng(seed).permutation(len(train))[:PAIRS][:limit]
    for number, index in enumerate(chosen):
        for name, similarity in LIKELIHOODS.items():
            if only and not any(word in name for word in only):
                continue
            row = log.row(f"{number}/{name}", partial(measure, train[int(index)], name, similarity, seed + number))
            rows.append(row)
            said = row["Laplace"]
            print(f"{number:3d} {name:34s} error {row['error_mm']:.3f} mm, sd {said['sd_mm']:.3f} mm, {row['seconds']:.1f} s", flush=True)
    settings = {"threads": threads, "draws": DRAWS, "noise": NOISE}
    return Table("deformation_uncertainty", rows, summarise(rows), NOTES, settings, seed)


NOTES = (
    "Coverage in per cent of the 50 / 80 / 95 % intervals. Error and sd: root mean squares of a component's error and of the posterior's standard "
    "deviation. Correlation: of predicted standard deviation and absolute error over the points of a pair, mean over pairs."
)


def measure(path: Path, likelihood: str, similarity: str, seed: int) -> Row:
    """One pair under one likelihood."""
    scan, labels = read_scan(path), read_labels(beside(path))
    grid, image = scan.grid, scaled(scan.data)
    generator = torch.Generator().manual_seed(seed)
    lattice = grid.at_spacing([2 * h for h in grid.spacing])  # that of `register`, at its finest level
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        truth = Velocity(lattice, SmoothVelocity(lattice, *prior_scales(grid), alpha=RegistrationSettings().alpha).prior().sample()).exp()
    fixed = warp(image[None], grid, truth, grid, fill="edge")[0]
    fixed = fixed + NOISE * torch.randn(grid.shape, generator=generator)
    start = time.perf_counter()
    # As many iterations as `register` takes where draws are asked for.
    settings = RegistrationSettings(similarity=similarity, affine=0, iterations=MANY_ITERATIONS)
    *_, level = climb(Pair(fixed, grid, image, grid, Affine.identity(3)), settings)
    families = {"Laplace": level.draws(DRAWS, seed), "independent voxels": independent_draws(level, DRAWS, generator)}
    seconds = time.perf_counter() - start
    points = grid.coordinates()[(slice(MARGIN, -MARGIN, 3),) * 3].reshape(-1, 3)
    mode = Velocity(level.lattice, level.mode.field).exp()
    error = mode(points) - truth(points)
    row: Row = {
        "likelihood": likelihood,
        "scan": path.name[12:15],
        "error_mm": float(error.square().mean().sqrt()),
        "before_mm": float((points - truth(points)).square().mean().sqrt()),
        "seconds": round(seconds, 2),
    }
    for family, draws in families.items():
        row[family] = scored(draws, error, mode, truth, points, labels.data, grid)
    return row


def scored(draws: Sequence[Displacement], error: Tensor, mode: Transform, truth: Transform, points: Tensor, labels: Tensor, grid: Grid) -> Row:
    """Coverage at points and of volumes, and how the standard deviation follows the error."""
    at = torch.stack([draw(points) for draw in draws])
    sd = at.std(0)
    tails = torch.tensor([t for level in LEVELS for t in ((1 - level) / 2, (1 + level) / 2)])
    quantiles, right = torch.quantile(at, tails, dim=0), truth(points)
    inside = [float(((quantiles[2 * i] <= right) & (right <= quantiles[2 * i + 1])).float().mean()) for i in range(len(LEVELS))]
    one_hot = torch.stack([(labels == k).float() for k in LABELS])

    def volumes(transform: Transform) -> Tensor:
        return warp(one_hot, grid, transform, grid, fill=0.0).flatten(1).sum(-1)

    by_draw, exact = torch.stack([volumes(draw) for draw in draws]), volumes(truth)
    bounds = torch.quantile(by_draw, tails, dim=0)
    held = [[bool(bounds[2 * i, k] <= exact[k] <= bounds[2 * i + 1, k]) for i in range(len(LEVELS))] for k in range(len(LABELS))]
    return {
        "points": inside,
        "volumes": held,
        "sd_mm": float(sd.square().mean().sqrt()),
        "volume_sd": by_draw.std(0).tolist(),
        "volume_error": (volumes(mode) - exact).tolist(),
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
    """A line per likelihood and family."""
    lines = []
    for likelihood in dict.fromkeys(row["likelihood"] for row in rows):
        chosen = [row for row in rows if row["likelihood"] == likelihood]
        for family in FAMILIES:
            said = [row[family] for row in chosen]

            def share(values: Sequence[Sequence[float]]) -> str:
                return " / ".join(f"{100 * statistics.fmean(column):.0f}" for column in zip(*values, strict=True))

            lines.append(
                {
                    "likelihood": f"{likelihood} ({len(chosen)})",
                    "posterior": family,
                    "coverage, points": share([s["points"] for s in said]),
                    "coverage, volumes": share([held for s in said for held in s["volumes"]]),
                    "error, mm": mean_sd([row["error_mm"] for row in chosen]),
                    "sd, mm": mean_sd([s["sd_mm"] for s in said]),
                    "volume error / sd, mm³": "{:.0f} / {:.0f}".format(
                        statistics.fmean(abs(e) for s in said for e in s["volume_error"]), statistics.fmean(e for s in said for e in s["volume_sd"])
                    ),
                    "correlation": mean_sd([s["correlation"] for s in said], 2),
                }
            )
    return lines
