"""Amortised registration from a table of scans: what `probmed train registration` does, and how a trained network registers a pair.

Scans are brought to one grid in a world of their own, whose origin is the middle of each scan and whose axes are its voxel axes, so that headers do
not matter. Any ordered pair of scans is an example. ``registration_objectives`` has what is minimised, ``registration_networks`` what is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.nn import functional

from probmed.fields import ModulatedField
from probmed.grids import Grid
from probmed.inference.amortised import FieldPosterior, elbo_draws, refine_field
from probmed.inference.parameters import seeded
from probmed.inference.training import Row, TrainingSettings, train
from probmed.metrics import dice
from probmed.transforms import Affine, Velocity, warp
from probmed.volumes import UnusableInput, Volume, read_labels, read_scan
from probmed.workflows.cohorts import common_grid, own_world
from probmed.workflows.propagation import check_same_grid, names_beside
from probmed.workflows.registration import Answer, known
from probmed.workflows.registration_networks import POINT_OBJECTIVES, GivenVelocity, NetworkSettings, TrainedRegistration
from probmed.workflows.registration_objectives import PairBatch, loss

_ELBO_DRAWS = 20  # of a network's answer


@dataclass(frozen=True)
class Cohort:
    """Scans on one grid: images ``(N, 1, *shape)``, NaN where unknown, and labels as indices ``(N, *shape)``, −1 where a scan has none."""

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    codes: tuple[int, ...]

    def to(self, device: torch.device) -> Cohort:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def brought(volume: Volume, grid: Grid, labels: bool = False, mask: Tensor | None = None) -> Tensor:
    """A scan, scaled, or its labels on the common grid, ``(*shape)``.

    Arguments:
        mask: where the scan counts, ``(*volume.shape)`` bool; elsewhere, and beyond its field of view, it is NaN.
    """
    data = volume.data if labels else known(volume, mask)
    fill: float = 0 if labels else math.nan
    return warp(data[None], volume.grid, own_world(volume.grid), grid, "nearest" if labels else "linear", fill)[0]


def read_cohort(
    table: pd.DataFrame,
    source: Path,
    spacing_mm: float | None = None,
    grid: Grid | None = None,
    codes: Sequence[int] | None = None,
    least: int = 2,
) -> tuple[Cohort, Grid]:
    """Scans of a table on a common grid.

    Arguments:
        table: columns ``scan`` and, where there are any, ``labels``: paths, relative ones to the table's folder.
        source: the table's path.
        spacing_mm: of the common grid; grid: of a network that there is already, and codes: those that it knows.
        least: number of scans.

    Raises:
        UnusableInput: for columns that are missing, too few scans, scans of different dimensions, label maps on other voxels than their scan's, and
            codes that are not known.
    """
    if "scan" not in table.columns:
        raise UnusableInput(source, f"has no column scan (it has {', '.join(map(str, table.columns))})", "give a column scan with paths")
    if len(table) < least:
        raise UnusableInput(source, f"has {len(table)} scans", f"give {least} or more")
    paths = [source.parent / str(path) for path in table["scan"]]
    scans = [read_scan(path) for path in paths]
    expected, whose = (scans[0].grid.ndim, "the first scan") if grid is None else (grid.ndim, "the network's grid")
    for path, scan in zip(paths, scans, strict=True):
        if scan.grid.ndim != expected:
            raise UnusableInput(path, f"has {scan.grid.ndim} axes, and {whose} {expected}", "train on scans of one dimension")
    grid = common_grid([scan.grid for scan in scans], spacing_mm) if grid is None else grid
    images = torch.stack([brought(scan, grid) for scan in scans])[:, None]
    maps: list[Tensor | None] = []
    for scan, cell in zip(scans, table.get("labels", [None] * len(table)), strict=True):
        if cell is None or pd.isna(cell):
            maps.append(None)
            continue
        labels = read_labels(source.parent / str(cell))
        check_same_grid(labels, scan)
        unknown = [] if codes is None else [code for code in labels.data.unique().tolist() if code not in codes]
        if unknown:
            remedy = f"use the codes {', '.join(map(str, codes or ()))}"
            raise UnusableInput(source.parent / str(cell), f"has the label {unknown[0]}, which training has not seen", remedy)
        maps.append(brought(labels, grid, labels=True))
    found = torch.cat([torch.zeros(1).long(), *(m.unique() for m in maps if m is not None)]).unique() if codes is None else torch.tensor(list(codes))
    indices = torch.full((len(scans), *grid.shape), -1)
    for n, values in enumerate(maps):
        if values is not None:
            indices[n] = torch.searchsorted(found, values.contiguous())
    return Cohort(images, indices, tuple(path.name for path in paths), tuple(found.tolist())), grid


def names_of(table: pd.DataFrame, source: Path) -> dict[int, str]:
    """Names of the labels, from the table beside the first label map, where there is one."""
    cells = [cell for cell in table.get("labels", []) if not pd.isna(cell)]
    return names_beside(source.parent / str(cells[0])) if cells else {}


def random_pairs(count: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of moving and fixed scans, ``(batch,)`` each, of ``count``; no scan is paired with itself."""
    moving = torch.randint(count, (batch,), generator=generator)
    return moving, (moving + torch.randint(1, count, (batch,), generator=generator)) % count


def training_loss(trained: TrainedRegistration, cohort: Cohort) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    """The objective of a batch of pairs, given as indices of moving and fixed scans."""

    def of_batch(batch: tuple[Tensor, Tensor]) -> Tensor:
        moving, fixed = batch
        labels = None
        if trained.model.labels is not None:
            labels = (_indicators(cohort, moving), _indicators(cohort, fixed))
        return loss(trained, PairBatch(cohort.images[moving], cohort.images[fixed], labels))

    return of_batch


def _indicators(cohort: Cohort, chosen: Tensor) -> Tensor:
    """Labels of some scans as zeros and a one, ``(B, K, *shape)``, NaN where there are none."""
    labels = cohort.labels[chosen]
    ones = functional.one_hot(labels.clamp_min(0), len(cohort.codes)).movedim(-1, 1).to(cohort.images)
    return ones.masked_fill(labels[:, None] < 0, math.nan)


@torch.no_grad()
def validation_scores(trained: TrainedRegistration, cohort: Cohort, pairs: Sequence[tuple[int, int]]) -> Row:
    """Dice over labels but the first, and the share of voxels that fold, over pairs; the label map is carried by the nearest voxel."""
    grid, scores, folds = trained.grid, [], []
    for m, f in pairs:
        displacement = Velocity(trained.lattice, trained.velocities(cohort.images[[m]], cohort.images[[f]])[0]).exp(both=False)
        folds.append(float((displacement.jacobian_determinant(displacement.grid, device=cohort.images.device) <= 0).float().mean()))
        if (cohort.labels[m] >= 0).all() and (cohort.labels[f] >= 0).all() and len(cohort.codes) > 1:
            moved = warp(cohort.labels[m][None], grid, displacement, grid, "nearest")[0]
            values = [dice(moved == k, cohort.labels[f] == k) for k in range(1, len(cohort.codes))]
            scores.append(float(np.nanmean(values)))
    return {"dice": float(np.mean(scores)) if scores else math.nan, "folding": float(np.mean(folds))}


def train_registration(
    cohort: Cohort,
    grid: Grid,
    settings: NetworkSettings,
    training: TrainingSettings,
    *,
    folder: Path | None = None,
    validation: Cohort | None = None,
    fabric: Fabric | None = None,
    described: Mapping[str, Any] | None = None,
    tell: Callable[[Row, float], None] = lambda row, share: None,
) -> tuple[TrainedRegistration, list[Row]]:
    """Train a network on every ordered pair of a cohort.

    Arguments:
        folder: for checkpoints, log and network. validation: scored at every row of the log, on at most 20 pairs.
    """
    trained = TrainedRegistration.build(grid, settings, training.seed, len(cohort.codes) if settings.objective == "elbo" else 0)
    fabric = fabric or Fabric(accelerator="cpu", devices=1)
    trained.model.to(fabric.device)
    trained.guide.to(fabric.device)
    here = cohort.to(fabric.device)
    checked = None if validation is None else validation.to(fabric.device)
    count = len(cohort.images)
    trained.start_from((here.images[n], here.images[(n + 1) % count]) for n in range(min(count, 8)))

    def batches(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        moving, fixed = random_pairs(count, settings.batch, generator)
        return moving.to(fabric.device), fixed.to(fabric.device)

    def validate() -> Row:
        n = len(checked.images)  # type: ignore[union-attr]
        chosen = np.random.default_rng(0).permutation([(m, f) for m in range(n) for f in range(n) if m != f])[:20]
        trained.guide.eval()
        row = validation_scores(trained, checked, [(int(m), int(f)) for m, f in chosen])  # type: ignore[arg-type]
        trained.guide.train()
        return row

    modules = {"guide": trained.guide}
    log = train(
        training_loss(trained, here),
        modules,
        batches,
        training,
        folder=folder,
        described={**asdict(settings), **(described or {})},
        validate=None if checked is None or len(checked.images) < 2 else validate,
        fabric=fabric,
        tell=tell,
    )
    trained.guide.eval()
    if folder is not None and fabric.is_global_zero:
        trained.save(folder)
    return trained, log


def answer(
    trained: TrainedRegistration,
    moving: Volume,
    fixed: Volume,
    *,
    draws: int = 0,
    refine: int = 0,
    seed: int = 0,
    mask: Tensor | None = None,
    moving_mask: Tensor | None = None,
    evaluate: bool = False,
) -> Answer:
    """Register a pair with a trained network.

    Arguments:
        refine: steps by which the pair's own posterior goes on from the network's; the gap is in nats.
        mask, moving_mask: where the fixed and the moving image count, ``(*shape)`` bool of each: neither network nor ELBO sees anything elsewhere.
        evaluate: estimate the ELBO of the network's answer, which takes as long as some draws; ``refine`` does so anyway.

    Raises:
        UnusableInput: for scans of another dimension than the network's, and masks that leave nothing of one.
    """
    m, f = (_on_grid(trained, volume, inside).to(trained.device) for volume, inside in ((moving, moving_mask), (fixed, mask)))
    lattice, pair = trained.lattice, (m[0], trained.grid, trained.grid, f[0])
    with torch.no_grad():
        q = trained.posterior(m, f)
    found, elbo = None, None
    if refine:
        found = refine_field(trained.model, GivenVelocity(trained.guide), "velocity", q, pair, steps=refine, seed=seed)
        q = found.guide.distribution()
    if trained.settings.objective not in POINT_OBJECTIVES:
        elbo = found.amortised if found is not None else _elbo(trained, q, pair, seed) if evaluate else None
    world = own_world(fixed.grid)
    affine = Affine(own_world(moving.grid).matrix @ world.inverse().matrix)
    turn = world.matrix[: lattice.ndim, : lattice.ndim].to(q.loc)

    def placed(field: Tensor) -> Velocity:
        return with_axes_of(fixed.grid, lattice.transformed(world.matrix), torch.einsum("ab,b...->a...", turn, field))

    with torch.no_grad(), seeded(seed):
        samples = q.sample((draws,)).reshape(draws, *q.event_shape) if draws else []
        drawn = [placed(sample) for sample in samples]
        return Answer(affine, placed(q.loc.reshape(q.event_shape)), drawn, trained.settings.similarity, elbo, found)


def _on_grid(trained: TrainedRegistration, volume: Volume, mask: Tensor | None) -> Tensor:
    """A scan on the network's grid, ``(1, 1, *shape)``."""
    if volume.grid.ndim != trained.grid.ndim:
        raise UnusableInput(volume.name, f"has {volume.grid.ndim} axes, and the network takes {trained.grid.ndim}", "give another network or scan")
    image = brought(volume, trained.grid, mask=mask)
    if bool(image.isnan().all()):
        raise UnusableInput(volume.name, "has no voxel that its mask leaves within the network's field of view", "give a larger mask, or none")
    return image[None, None]


def _elbo(trained: TrainedRegistration, q: ModulatedField, pair: tuple[Any, ...], seed: int) -> float:
    """Of a network's posterior of one pair, nats."""
    posterior = FieldPosterior("velocity", q, GivenVelocity(trained.guide))
    with seeded(seed):
        return float(elbo_draws(trained.model, posterior, _ELBO_DRAWS, *pair).mean())


def with_axes_of(grid: Grid, lattice: Grid, field: Tensor) -> Velocity:
    """A velocity ``(d, *lattice.shape)`` stored in the order and direction of the axes of a grid to which its own are parallel."""
    d = grid.ndim
    affine = lattice.affine.clone()
    cosines = (grid.affine[:d, :d] / grid.affine[:d, :d].norm(dim=0)).T @ affine[:d, :d]
    order = cosines.abs().argmax(1).tolist()
    flipped = [axis for axis in range(d) if cosines[axis, order[axis]] < 0]
    affine[:d, :d] = affine[:d, order]
    for axis in flipped:
        affine[:d, d] += (lattice.shape[order[axis]] - 1) * affine[:d, axis]
        affine[:d, axis] *= -1
    moved = field.permute(0, *(1 + axis for axis in order)).flip([1 + axis for axis in flipped])
    return Velocity(Grid(tuple(lattice.shape[axis] for axis in order), affine), moved.contiguous())
