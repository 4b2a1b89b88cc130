"""The networks that tables train for themselves, probmed's and that of the voxelmorph package: ``python -m benchmarks.networks ORDER``.

`benchmarks.trainings.trained` is the parent. All get the same scans on one grid (`amortisation.read_cohort`), optimiser, schedule and checkpoints.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from probmed.grids import Grid
from probmed.inference.training import TrainingSettings, train
from probmed.transforms import Composition, Displacement
from probmed.volumes import Volume, atomic_write, read_scan
from probmed.workflows.amortisation import brought, random_pairs, read_cohort, train_registration
from probmed.workflows.cohorts import common_grid, own_world
from probmed.workflows.registration_networks import NetworkSettings

FEATURES = ((16, 32, 32, 32), (32, 32, 32, 16))  # of the U-Net's way down and up, as published
MULTIPLE = 2 ** len(FEATURES[0])  # of the sides that it can halve and double
SQUARINGS = 7
BATCH = 4


@dataclass(frozen=True)
class VoxelMorph:
    """The network of the voxelmorph package for pairs, which integrates a velocity in voxels, and the grid of the images that it reads."""

    network: Any
    grid: Grid

    @classmethod
    def build(cls, grid: Grid, seed: int = 0) -> VoxelMorph:
        """Untrained; same seed, same weights."""
        models: Any = importlib.import_module("voxelmorph.nn.models")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(models.VxmPairwise(grid.ndim, 1, 1, nb_features=FEATURES, integration_steps=SQUARINGS), grid)

    @classmethod
    def load(cls, folder: Path) -> VoxelMorph:
        described = json.loads((folder / "network.json").read_text())
        found = cls.build(Grid.from_spacing(described["shape"], described["spacing_mm"]))
        found.network.load_state_dict(load_file(folder / "network.safetensors"))
        return found

    def save(self, folder: Path, weight: float) -> None:
        save_file(self.network.state_dict(), folder / "network.safetensors")
        described = {"system": "voxelmorph", "weight": weight, "shape": self.grid.shape, "spacing_mm": self.grid.spacing}
        with atomic_write(folder / "network.json") as path:
            path.write_text(json.dumps(described) + "\n")

    def loss(self, images: Tensor, weight: float) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
        """−NCC + λ ‖∇v‖² of pairs of ``(N, 1, *shape)``, by the losses that the package names."""
        modules: Any = importlib.import_module("neurite.nn.modules")
        correlation, roughness = modules.NCC(), modules.SpatialGradient("l2")

        def of_batch(batch: tuple[Tensor, Tensor]) -> Tensor:
            moving, fixed = (images[index] for index in batch)
            velocity, moved = self.network(moving, fixed, return_warped_source=True, return_field_type="velocity")
            total: Tensor = weight * roughness(velocity) - correlation(moved, fixed).mean()
            return total

        return of_batch

    @torch.no_grad()
    def transform(self, moving: Volume, fixed: Volume) -> Composition:
        """From the fixed world to the moving one; its inverse integrates the velocity's negative."""
        images = (brought(volume, self.grid)[None, None].nan_to_num(0.0) for volume in (moving, fixed))
        velocity = self.network(*images, return_field_type="velocity")
        flow = self.displacement(velocity[0])
        return Composition((own_world(moving.grid), flow, own_world(fixed.grid).inverse()))

    def displacement(self, velocity: Tensor) -> Displacement:
        """exp(v) of a velocity ``(d, *shape)`` in voxels, by the package's squarings, in mm of the grid's world."""
        integrate, spacing = self.network.velocity_field_integrator, velocity.new_tensor(self.grid.spacing).reshape(-1, *[1] * self.grid.ndim)
        there, back = (spacing * integrate(v[None])[0] for v in (velocity, -velocity))
        return Displacement(self.grid, there, back)


def halvable(grid: Grid) -> Grid:
    """A grid about the same middle whose sides are multiples of ``MULTIPLE``."""
    return Grid.from_spacing([MULTIPLE * math.ceil(n / MULTIPLE) for n in grid.shape], grid.spacing)


def train_voxelmorph(scans: Sequence[Path], training: TrainingSettings, place: Path, weight: float) -> VoxelMorph:
    """The package's network, trained on every ordered pair of scans."""
    table = pd.DataFrame({"scan": [str(path) for path in scans]})
    cohort, grid = read_cohort(table, place, grid=halvable(common_grid([read_scan(path).grid for path in scans])))
    built = VoxelMorph.build(grid, training.seed)

    def batches(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return random_pairs(len(scans), BATCH, generator)

    described = {"scans": list(cohort.names), "weight": weight}
    train(built.loss(cohort.images.nan_to_num(0.0), weight), {"network": built.network}, batches, training, folder=place, described=described)
    built.save(place, weight)
    return built


def train_ours(scans: Sequence[Path], training: TrainingSettings, place: Path, **settings: Any) -> None:
    """A network of `probmed train registration`."""
    cohort, grid = read_cohort(pd.DataFrame({"scan": [str(path) for path in scans]}), place)
    train_registration(cohort, grid, NetworkSettings(**settings), training, folder=place, described={"scans": list(cohort.names)})


def _child(order: Path) -> None:
    said = json.loads(order.read_text())
    scans, place = [Path(path) for path in said["scans"]], Path(said["place"])
    place.mkdir(parents=True, exist_ok=True)
    training = TrainingSettings(said["steps"], clip_norm=10.0)  # otherwise the defaults of `probmed train`
    if said["system"] == "voxelmorph":
        train_voxelmorph(scans, training, place, **said["settings"])
    else:
        train_ours(scans, training, place, **said["settings"])


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
