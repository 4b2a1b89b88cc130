"""Amortised registration from a table of scans: what `probmed train registration` does, and how a trained network registers a pair.

Scans are brought to one grid in a world of their own, whose origin is the middle of each scan and whose axes are its voxel axes, so that headers do
not matter. Any ordered pair of scans is an example. Objectives, by name:

- ``elbo``: the evidence lower bound of the model in nats (unsupervised; with labels where the table has them);
- ``simulation``: −log q of a deformation drawn from the prior, which made the fixed image (supervised by true deformations);
- ``voxelmorph-mse``, ``voxelmorph-ncc``: dissimilarity + λ ‖∇v‖², as published;
- ``voxelmorph-probabilistic``: as its code has it (``losses``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from torch import Tensor

from probmed import losses
from probmed.fields import ModulatedField
from probmed.grids import Grid
from probmed.inference.amortised import elbo_loss, posterior_loss, refine_field
from probmed.inference.parameters import seeded
from probmed.inference.training import Row, TrainingSettings, train
from probmed.metrics import dice
from probmed.models.registration import Registration, RegistrationGuide, linearise
from probmed.networks import VelocityNetwork
from probmed.priors import SmoothVelocity
from probmed.similarities import GaussianNoise, LabelAgreement, LocalCorrelation, Similarity
from probmed.transforms import Affine, Velocity, warp
from probmed.volumes import UnusableInput, Volume, read_labels, read_scan, scaled
from probmed.workflows.cohorts import common_grid, own_world
from probmed.workflows.network_folders import read_network, read_weights, write_network
from probmed.workflows.propagation import check_same_grid, names_beside
from probmed.workflows.registration import Answer, prior_scales

OBJECTIVES = ("elbo", "simulation", "voxelmorph-mse", "voxelmorph-ncc", "voxelmorph-probabilistic")
POINT_OBJECTIVES = ("voxelmorph-mse", "voxelmorph-ncc")
"""Those by which the spread of the network's answer stays as it began: no posterior."""


@dataclass(frozen=True)
class NetworkSettings:
    """A registration network and its model.

    Arguments:
        objective: one of ``OBJECTIVES``. posterior: "smooth" or "diagonal".
        similarity: "correlation" or "gaussian", of the model. radius, noise: of the correlation's windows.
        sd_mm, length_mm, alpha: of the velocity's prior; None: as `register` has them.
        learn_prior: whether sd and length are learned with the network.
        label_weight: factor on the labels' log density, where labels are used; 0 leaves them out.
        weight: λ of the published objectives; None: as published (0.01, 1, 10). image_sd: of the probabilistic one.
        features: of the U-Net. batch: pairs. mixed_precision: the network in bfloat16.
        dropout: share of the U-Net's features that training leaves out; a trained network uses all.
    """

    objective: str = "elbo"
    posterior: str = "smooth"
    similarity: str = "correlation"
    radius: int = 4
    noise: float = 0.06
    sd_mm: float | None = None
    length_mm: float | None = None
    alpha: float = 3.0
    learn_prior: bool = False
    label_weight: float = 0.0
    weight: float | None = None
    image_sd: float = 0.1
    features: tuple[int, ...] = (16, 32, 32, 32, 32, 16)
    batch: int = 4
    mixed_precision: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"expected an objective of {OBJECTIVES}, got {self.objective!r}")
        if self.similarity not in ("correlation", "gaussian"):
            raise ValueError(f'expected a similarity "correlation" or "gaussian", got {self.similarity!r}')
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected a dropout of at least 0 and less than 1, got {self.dropout}")


@dataclass(frozen=True)
class Cohort:
    """Scans on one grid: images ``(N, 1, *shape)``, NaN where unknown, and labels as indices ``(N, *shape)``, −1 where a scan has none."""

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    codes: tuple[int, ...]

    def to(self, device: torch.device) -> Cohort:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


def brought(volume: Volume, grid: Grid, labels: bool = False) -> Tensor:
    """A scan, scaled, or its labels on the common grid, ``(*shape)``."""
    data = volume.data if labels else scaled(volume.data)
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


@dataclass(frozen=True)
class TrainedRegistration:
    """A network with the model that it was trained for."""

    grid: Grid
    settings: NetworkSettings
    model: Registration
    guide: RegistrationGuide

    @property
    def lattice(self) -> Grid:
        """Of the velocity."""
        grid: Grid = self.model.deformation.grid  # type: ignore[union-attr, assignment]
        return grid

    @property
    def device(self) -> torch.device:
        return next(self.guide.parameters()).device

    @classmethod
    def build(cls, grid: Grid, settings: NetworkSettings, seed: int = 0) -> TrainedRegistration:
        """Untrained; same seed, same weights."""
        lattice = grid.at_spacing([2 * h for h in grid.spacing])
        usual = prior_scales(grid)
        sd, length = settings.sd_mm or usual[0], settings.length_mm or usual[1]
        prior = SmoothVelocity(lattice, sd, length, settings.alpha, learn=settings.learn_prior)
        similarity: Similarity = GaussianNoise()
        if settings.similarity == "correlation":
            similarity = LocalCorrelation(settings.radius, settings.noise, ndim=grid.ndim)
        model = Registration(prior, similarity)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = VelocityNetwork(grid.ndim, features=settings.features, mixed_precision=settings.mixed_precision, dropout=settings.dropout)
            guide = RegistrationGuide(model, network, settings.posterior)
        return cls(grid, settings, model, guide)

    def save(self, folder: Path) -> None:
        """``network.safetensors`` and ``network.json``."""
        write_network(folder, self.guide, "registration", {**asdict(self.settings), "shape": self.grid.shape, "spacing_mm": self.grid.spacing})

    @classmethod
    def load(cls, folder: Path) -> TrainedRegistration:
        """
        Raises:
            UnusableInput: where there is no trained registration network.
        """
        with read_network(folder, "registration") as described:
            known = {f.name for f in fields(NetworkSettings)}
            chosen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items() if k in known}
            trained = cls.build(Grid.from_spacing(described["shape"], described["spacing_mm"]), NetworkSettings(**chosen))
        read_weights(folder, trained.guide)
        trained.guide.eval()
        return trained

    def start_from(self, cohort: Cohort, pairs: Sequence[tuple[int, int]]) -> None:
        """Let the posterior's spread start from what some pairs tell."""
        if self.guide.log_curvature is None:
            return
        lattice = self.lattice
        zero = cohort.images.new_zeros(self.grid.ndim, *lattice.shape)
        near = [linearise(self.model.similarity, lattice, zero, cohort.images[m], cohort.images[f], self.grid) for m, f in pairs]
        mean = sum(float(n.blocks().diagonal().mean()) for n in near) / len(near)
        with torch.no_grad():
            self.guide.log_curvature.fill_(math.log(mean))

    def loss(self, cohort: Cohort) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
        """The objective of a batch of pairs, given as indices of moving and fixed scans."""
        objective = self.settings.objective

        def of_batch(batch: tuple[Tensor, Tensor]) -> Tensor:
            moving, fixed = cohort.images[batch[0]], cohort.images[batch[1]]
            if objective == "simulation":
                return self._simulation_loss(moving)
            if objective.startswith("voxelmorph"):
                return self._published_loss(moving, fixed)
            size = len(moving)
            total = elbo_loss(self.model, self.guide, size, moving, self.grid, self.grid, fixed) / self.grid.numel
            if self.settings.label_weight and len(cohort.codes) > 1:
                total = total + self._label_loss(cohort, batch)
            return total

        return of_batch

    def _simulation_loss(self, moving: Tensor) -> Tensor:
        """Draw v and f from the model, and ask the network for v."""
        with torch.no_grad():
            velocity = self.model.deformation.prior().expand([len(moving)]).sample()  # type: ignore[operator]
            fixed = warp(moving, self.grid, Velocity(self.lattice, velocity), self.grid, fill=math.nan)
            fixed = fixed + self.settings.noise * torch.randn_like(fixed)
        return posterior_loss(self.guide, {"velocity": velocity}, len(moving), moving, self.grid, self.grid, fixed) / self.grid.numel

    def _label_loss(self, cohort: Cohort, batch: tuple[Tensor, Tensor]) -> Tensor:
        """−log p(S_f | S_m ∘ exp(μ)) of the pairs that have both, nats a voxel, times its weight."""
        moving, fixed = (cohort.labels[index] for index in batch)
        known = (moving.flatten(1) >= 0).all(1) & (fixed.flatten(1) >= 0).all(1)
        if not bool(known.any()):
            return moving.new_zeros((), dtype=torch.float32)
        count = len(cohort.codes)
        one_hot = [torch.nn.functional.one_hot(m[known], count).movedim(-1, 1).to(torch.float32) for m in (moving, fixed)]
        loc = self.guide.distribution(cohort.images[batch[0]][known], cohort.images[batch[1]][known]).loc
        moved = warp(one_hot[0], self.grid, Velocity(self.lattice, loc), self.grid, fill="edge")
        similarity = LabelAgreement(count)
        each = similarity.distribution(moved, {"error": moved.new_full((len(moved),), 0.05)}).log_prob(one_hot[1])
        return -self.settings.label_weight * each.mean() / self.grid.numel

    def _published_loss(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """VoxelMorph's objectives, in voxels of the lattice; what is unknown is zero."""
        moving, fixed = moving.nan_to_num(0.0), fixed.nan_to_num(0.0)
        lattice, weight = self.lattice, self.settings.weight
        mean, log_variance = self._published(moving, fixed)
        scale, probabilistic = self._voxel(mean), self.settings.objective == "voxelmorph-probabilistic"
        voxels = mean
        if probabilistic:
            voxels = voxels + (log_variance / 2).exp() * torch.randn_like(voxels)
        moved = warp(moving, self.grid, Velocity(lattice, voxels * scale), self.grid, fill="edge")
        if self.settings.objective == "voxelmorph-mse":
            return losses.mean_squares(moved, fixed) + (0.01 if weight is None else weight) * losses.squared_differences(voxels)
        if not probabilistic:
            return losses.negative_correlation(moved, fixed) + (1.0 if weight is None else weight) * losses.squared_differences(voxels)
        divergence = losses.voxelmorph_divergence(mean, log_variance, 10.0 if weight is None else weight)
        return losses.mean_squares(moved, fixed) / self.settings.image_sd**2 + 0.01 * divergence

    def _published(self, moving: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the velocity in voxels of the lattice; the published network starts with log σ² at −10."""
        loc, spread = self.guide.network(moving, fixed, self.lattice.shape)
        return loc / self._voxel(loc), 2 * spread - 10

    def _voxel(self, like: Tensor) -> Tensor:
        """Sides of a voxel of the lattice, mm, to be multiplied with velocities."""
        return like.new_tensor(self.lattice.spacing).reshape(-1, *[1] * self.grid.ndim)

    def posterior(self, moving: Tensor, fixed: Tensor) -> ModulatedField:
        """q(v | m, f) for images ``(B, 1, *shape)`` on the common grid, mm; a network that was trained for the published probabilistic objective has
        the independent variances of that objective."""
        if self.settings.objective != "voxelmorph-probabilistic":
            return self.guide.distribution(moving, fixed)
        mean, log_variance = self._published(moving, fixed)
        voxel = self._voxel(mean)
        return ModulatedField(mean * voxel, (log_variance / 2).exp() * voxel, torch.ones_like(mean[:1]), self.grid.ndim)

    def brought(self, volume: Volume) -> Tensor:
        """A scan on the network's grid, ``(1, 1, *shape)``.

        Raises:
            UnusableInput: for a scan of another dimension.
        """
        if volume.grid.ndim != self.grid.ndim:
            raise UnusableInput(volume.name, f"has {volume.grid.ndim} axes, and the network takes {self.grid.ndim}", "give another network or scan")
        return brought(volume, self.grid)[None, None]

    @torch.no_grad()
    def velocities(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """The posterior mean for images ``(B, 1, *shape)`` on the common grid: ``(B, d, *lattice)``, mm."""
        return self.posterior(moving, fixed).loc

    def validation(self, cohort: Cohort, pairs: Sequence[tuple[int, int]]) -> Row:
        """Dice over labels but the first, and the share of voxels that fold, over pairs; the label map is carried by the nearest voxel."""
        scores, folds = [], []
        for m, f in pairs:
            velocity = Velocity(self.lattice, self.velocities(cohort.images[[m]], cohort.images[[f]])[0])
            displacement = velocity.exp(both=False)
            folds.append(float((displacement.jacobian_determinant(displacement.grid, device=velocity.field.device) <= 0).float().mean()))
            if (cohort.labels[m] >= 0).all() and (cohort.labels[f] >= 0).all() and len(cohort.codes) > 1:
                moved = warp(cohort.labels[m][None], self.grid, displacement, self.grid, "nearest")[0]
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
    trained = TrainedRegistration.build(grid, settings, training.seed)
    fabric = fabric or Fabric(accelerator="cpu", devices=1)
    trained.model.to(fabric.device)
    trained.guide.to(fabric.device)
    here = cohort.to(fabric.device)
    checked = None if validation is None else validation.to(fabric.device)
    count = len(cohort.images)
    trained.start_from(here, [(n, (n + 1) % count) for n in range(min(count, 8))])

    def batches(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        moving, fixed = random_pairs(count, settings.batch, generator)
        return moving.to(fabric.device), fixed.to(fabric.device)

    def validate() -> Row:
        n = len(checked.images)  # type: ignore[union-attr]
        chosen = np.random.default_rng(0).permutation([(m, f) for m in range(n) for f in range(n) if m != f])[:20]
        trained.guide.eval()
        row = trained.validation(checked, [(int(m), int(f)) for m, f in chosen])  # type: ignore[arg-type]
        trained.guide.train()
        return row

    modules = {"guide": trained.guide}
    log = train(
        trained.loss(here),
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


def answer(trained: TrainedRegistration, moving: Volume, fixed: Volume, *, draws: int = 0, refine: int = 0, seed: int = 0) -> Answer:
    """Register a pair with a trained network.

    Arguments:
        refine: steps by which the pair's own posterior goes on from the network's; the gap is in nats.

    Raises:
        UnusableInput: for scans of another dimension than the network's.
    """
    m, f = (trained.brought(volume).to(trained.device) for volume in (moving, fixed))
    lattice = trained.lattice
    with torch.no_grad():
        q = trained.posterior(m, f)
    found = None
    if refine:
        found = refine_field(trained.model, trained.guide, "velocity", q, (m[0], trained.grid, trained.grid, f[0]), steps=refine, seed=seed)
        q = found.guide.distribution()  # type: ignore[attr-defined]
    world = own_world(fixed.grid)
    affine = Affine(own_world(moving.grid).matrix @ world.inverse().matrix)
    turn = world.matrix[: lattice.ndim, : lattice.ndim].to(q.loc)

    def placed(field: Tensor) -> Velocity:
        return with_axes_of(fixed.grid, lattice.transformed(world.matrix), torch.einsum("ab,b...->a...", turn, field))

    with torch.no_grad(), seeded(seed):
        samples = q.sample((draws,)).reshape(draws, *q.event_shape) if draws else []
        return Answer(affine, placed(q.loc.reshape(q.event_shape)), [placed(sample) for sample in samples], found)


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
