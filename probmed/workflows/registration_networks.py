"""A registration network with the model that it was trained for, in memory and on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from probmed.fields import ModulatedField
from probmed.grids import Grid
from probmed.models.registration import Registration, RegistrationGuide, linearise
from probmed.networks import VelocityNetwork
from probmed.priors import SmoothVelocity
from probmed.similarities import ConditionalMixture, GaussianNoise, LabelAgreement, LocalCorrelation, Similarity, StudentNoise
from probmed.workflows.network_folders import read_network, read_weights, write_network
from probmed.workflows.registration_fit import SIMILARITIES, prior_scales

OBJECTIVES = (
    "elbo",
    "simulation",
    "voxelmorph-mse",
    "voxelmorph-ncc",
    "voxelmorph-mse-displacement",
    "voxelmorph-ncc-displacement",
    "voxelmorph-probabilistic",
)
"""``registration_objectives`` says what they are."""
POINT_OBJECTIVES = OBJECTIVES[2:6]
"""Those by which the spread of the network's answer stays as it began: no posterior."""


@dataclass(frozen=True)
class NetworkSettings:
    """A registration network and its model.

    Arguments:
        objective: one of ``OBJECTIVES``. posterior: "smooth" or "diagonal".
        similarity: of the model, one of ``registration_fit.SIMILARITIES``. radius, noise: of the correlation's windows.
        tempering: factor on the image's log density; None is the correlation's own, and one of the others.
        sd_mm, length_mm, alpha: of the velocity's prior; None: as `register` has them.
        learn_prior: whether sd and length are learned with the network.
        label_weight: factor on the labels' log density in the ELBO; 0 leaves them out.
        weight: λ of the published objectives; None: as published. image_sd: of the probabilistic one, as its authors advise.
        features: of the U-Net. batch: pairs. mixed_precision: the network in bfloat16.
        dropout: share of the U-Net's features that training leaves out; a trained network uses all.
    """

    objective: str = "elbo"
    posterior: str = "smooth"
    similarity: str = "correlation"
    radius: int = 4
    noise: float = 0.06
    tempering: float | None = None
    sd_mm: float | None = None
    length_mm: float | None = None
    alpha: float = 3.0
    learn_prior: bool = False
    label_weight: float = 0.0
    weight: float | None = None
    image_sd: float = 0.02
    features: tuple[int, ...] = (16, 32, 32, 32, 32, 16)
    batch: int = 4
    mixed_precision: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"expected an objective of {OBJECTIVES}, got {self.objective!r}")
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"expected a similarity of {SIMILARITIES}, got {self.similarity!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected a dropout of at least 0 and less than 1, got {self.dropout}")


def _similarity(settings: NetworkSettings, ndim: int) -> Similarity:
    tempered = {} if settings.tempering is None else {"tempering": settings.tempering}
    if settings.similarity == "correlation":
        return LocalCorrelation(settings.radius, settings.noise, ndim=ndim, **tempered)
    return {"gaussian": GaussianNoise, "student": StudentNoise, "mixture": ConditionalMixture}[settings.similarity](**tempered)


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
    def build(cls, grid: Grid, settings: NetworkSettings, seed: int = 0, labels: int = 0) -> TrainedRegistration:
        """Untrained; same seed, same weights.

        Arguments:
            labels: how many there are in the scans' segmentations, the background among them, where these are observed.
        """
        lattice = grid.at_spacing([2 * h for h in grid.spacing])
        usual = prior_scales(grid)
        sd, length = settings.sd_mm or usual[0], settings.length_mm or usual[1]
        prior = SmoothVelocity(lattice, sd, length, settings.alpha, learn=settings.learn_prior)
        agreement = LabelAgreement(labels, tempering=settings.label_weight) if labels > 1 and settings.label_weight else None
        model = Registration(prior, _similarity(settings, grid.ndim), labels=agreement)
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

    def start_from(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Let the posterior's spread start from what some pairs tell.

        Arguments:
            pairs: moving and fixed images, ``(1, *shape)`` each, on the common grid.
        """
        if self.guide.log_curvature is None:
            return
        lattice = self.lattice
        found = []
        for moving, fixed in pairs:
            zero = moving.new_zeros(self.grid.ndim, *lattice.shape)
            found.append(float(linearise(self.model.similarity, lattice, zero, moving, fixed, self.grid).blocks().diagonal().mean()))
        with torch.no_grad():
            self.guide.log_curvature.fill_(math.log(sum(found) / len(found)))

    def published(self, moving: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the velocity in voxels of the lattice; the published network starts with log σ² at −10."""
        loc, spread = self.guide.network(moving, fixed, self.lattice.shape)
        return loc / self.voxel(loc), 2 * spread - 10

    def voxel(self, like: Tensor) -> Tensor:
        """Sides of a voxel of the lattice, mm, to be multiplied with velocities."""
        return like.new_tensor(self.lattice.spacing).reshape(-1, *[1] * self.grid.ndim)

    def posterior(self, moving: Tensor, fixed: Tensor) -> ModulatedField:
        """q(v | m, f) for images ``(B, 1, *shape)`` on the common grid, mm; a network that was trained for the published probabilistic objective has
        the independent variances of that objective."""
        if self.settings.objective != "voxelmorph-probabilistic":
            return self.guide.distribution(moving, fixed)
        mean, log_variance = self.published(moving, fixed)
        voxel = self.voxel(mean)
        return ModulatedField(mean * voxel, (log_variance / 2).exp() * voxel, torch.ones_like(mean[:1]), self.grid.ndim)

    @torch.no_grad()
    def velocities(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """The posterior mean for images ``(B, 1, *shape)`` on the common grid: ``(B, d, *lattice)``, mm."""
        return self.posterior(moving, fixed).loc


class GivenVelocity(nn.Module):
    """The sites of a ``RegistrationGuide`` beside the velocity, which is to be conditioned: what a posterior of one pair needs of it. The network is
    not asked."""

    def __init__(self, guide: RegistrationGuide) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, *pair: Any, **labels: Any) -> dict[str, Tensor]:
        velocity: Tensor = pyro.sample("velocity", self.guide.deformation.prior())
        return {"velocity": velocity} | self.guide.beside(velocity, *pair, **labels)
