"""Simulation-based calibration: the rank of the truth among draws of its posterior is uniform, if the posterior is right.

Reference: Talts et al., arXiv:1804.06788, 2018.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import pytest
import scipy.stats
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

from probmed.fields import GaussianField
from probmed.grids import Grid
from probmed.inference import FieldGuide, fit
from probmed.inference.gauss_newton import FieldMode, ascend_field, field_draws
from probmed.models.registration import Linearisation, carried, linearise
from probmed.similarities import GaussianNoise
from probmed.transforms import Velocity

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float64")]

LEVEL = 1e-3


@dataclass(frozen=True)
class Setting:
    """A registration that is drawn from its own model.

    Arguments:
        size: voxels of 1 mm along each axis; step: spacing of the velocity.
        sd, length: of the velocity; texture: correlation length of the moving image, whose sd is one; all mm.
        margin: voxels at the faces where the fixed image is not known, so that whatever is known of it comes from within the moving one.
    """

    ndim: int
    size: int
    step: float
    sd: float
    length: float
    texture: float
    noise: float
    margin: int

    @property
    def grid(self) -> Grid:
        return Grid.from_spacing((self.size,) * self.ndim, 1.0)

    @property
    def lattice(self) -> Grid:
        return self.grid.at_spacing(self.step)

    @property
    def prior(self) -> GaussianField:
        return GaussianField.from_sd(self.lattice.shape, self.lattice.spacing, self.sd, self.length, 2.0, self.ndim)

    @property
    def similarity(self) -> GaussianNoise:
        """With a noise that is as good as known, since the Laplace posterior holds it at its mode."""
        return GaussianNoise(scale=self.noise, certainty=1e3)

    def simulate(self) -> tuple[Tensor, Tensor, Tensor]:
        """Velocity, moving and fixed image."""
        velocity = self.prior.rsample()
        grid = self.grid
        moving = GaussianField.from_sd(grid.shape, grid.spacing, 1.0, self.texture, 4.0).rsample()
        mean = carried(moving, grid, Velocity(self.lattice, velocity), grid)
        variance = self.similarity.prior(moving)["noise"].sample()
        fixed = torch.full_like(mean, math.nan)
        known = (slice(None), *[slice(self.margin, self.size - self.margin)] * self.ndim)
        fixed[known] = (mean + variance.sqrt() * torch.randn_like(mean))[known]
        return velocity, moving, fixed

    def mode(self, moving: Tensor, fixed: Tensor) -> FieldMode:
        latents: dict[str, Tensor] = {}

        def near(velocity: Tensor) -> Linearisation:
            found = linearise(self.similarity, self.lattice, velocity, moving, fixed, self.grid, latents or None)
            latents.update(found.latents)
            return found

        return ascend_field(near, self.prior, torch.zeros(self.prior.event_shape), 100, 1e-7)

    def quantities(self, velocity: Tensor) -> Tensor:
        """Displacement at two points and its mean over a region and over everything that is seen, each along every axis."""
        displacement = Velocity(self.lattice, velocity).exp(both=False).field
        n, m = self.lattice.shape[0], round(self.margin / self.step)
        centre, third = n // 2, n // 3
        along = sum(centre * n**axis for axis in range(self.ndim - 1))
        region = (slice(None), *[slice(third, 2 * third)] * self.ndim)
        seen = (slice(None), *[slice(m, n - m)] * self.ndim)
        points = [displacement[:, i].flatten(1)[:, along] for i in (centre, third)]
        return torch.cat([*points, displacement[region].flatten(1).mean(1), displacement[seen].flatten(1).mean(1)])


def ranks(setting: Setting, simulations: int, draws: int) -> Tensor:
    """How many of the draws are below the truth, ``(simulations, quantities)``."""
    found = []
    for _ in range(simulations):
        velocity, moving, fixed = setting.simulate()
        mode = setting.mode(moving, fixed)
        assert mode.converged
        posterior = mode.field + field_draws(mode.near, setting.prior, draws)
        below = torch.stack([setting.quantities(draw) for draw in posterior]) < setting.quantities(velocity)
        found.append(below.sum(0))
    return torch.stack(found)


def smallest_p(found: Tensor, draws: int, bins: int = 8) -> float:
    """Of χ² tests of each quantity's uniformity, times their number."""
    counts = [torch.bincount(rank * bins // (draws + 1), minlength=bins).numpy() for rank in found.T]
    return min(float(scipy.stats.chisquare(count).pvalue) for count in counts) * len(counts)


def test_the_test_of_uniformity_finds_posteriors_that_are_too_narrow() -> None:
    """By a third, with as many simulations as below: else it would tell nothing."""
    truth, draws = torch.randn(200, 8), torch.randn(63, 200, 8)
    assert smallest_p((draws < truth).sum(0), 63) > LEVEL
    assert smallest_p((draws / 1.5 < truth).sum(0), 63) < LEVEL
    assert smallest_p((draws < truth + 0.5).sum(0), 63) < LEVEL


@pytest.mark.parametrize(
    "setting",
    [
        Setting(2, 18, 1.0, sd=1.0, length=6.0, texture=3.5, noise=0.3, margin=3),
        Setting(2, 20, 2.0, sd=1.0, length=8.0, texture=4.0, noise=0.2, margin=3),
        # Little is known, so that the prior counts, and much, so that it does not.
        Setting(2, 18, 1.0, sd=0.7, length=6.0, texture=3.5, noise=1.0, margin=3),
        Setting(2, 18, 1.0, sd=1.0, length=6.0, texture=4.0, noise=0.1, margin=3),
    ],
    ids=["same lattice", "coarser lattice", "much noise", "little noise"],
)
def test_laplace_posteriors_of_velocities_are_calibrated(setting: Setting) -> None:
    assert smallest_p(ranks(setting, 200, 63), 63) > LEVEL


def test_laplace_posteriors_of_velocities_are_calibrated_in_three_dimensions() -> None:
    setting = Setting(3, 10, 1.0, sd=0.6, length=5.0, texture=3.5, noise=0.4, margin=2)
    assert smallest_p(ranks(setting, 128, 31), 31) > LEVEL


# Variational posteriors, against the Gaussian that the likelihood's quadratic makes of the prior.


@dataclass(frozen=True)
class Exact:
    """The posterior N(mean, (H + Λ)⁻¹) of a velocity, and a program with that posterior; sd: of means over regions."""

    prior: GaussianField
    hessian: Tensor
    mode: Tensor
    regions: Tensor

    @property
    def covariance(self) -> Tensor:
        unit = torch.eye(len(self.hessian)).reshape(-1, *self.prior.event_shape)
        return torch.linalg.inv(self.hessian + self.prior.precision_matvec(unit).flatten(1))

    def __call__(self) -> None:
        velocity = pyro.sample("velocity", self.prior).flatten()
        # The quadratic whose maximum together with the prior is at the mode.
        pull = self.prior.precision_matvec(self.mode).flatten()
        away = velocity - self.mode.flatten()
        pyro.factor("likelihood", pull @ velocity - 0.5 * away @ self.hessian @ away)

    def regional_sd(self, covariance: Tensor) -> Tensor:
        return torch.einsum("rn,nm,rm->r", self.regions, covariance, self.regions).sqrt()


def exact_posterior() -> Exact:
    setting = Setting(2, 12, 1.0, sd=1.0, length=6.0, texture=3.5, noise=0.3, margin=2)
    _, moving, fixed = setting.simulate()
    mode = setting.mode(moving, fixed)
    prior = setting.prior
    unit = torch.eye(prior.event_shape.numel()).reshape(-1, *prior.event_shape)
    regions = []
    for channel in range(2):
        for start, stop in ((4, 8), (2, 10), (0, 12)):
            region = torch.zeros(prior.event_shape)
            region[channel, start:stop, start:stop] = 1
            regions.append(region.flatten() / region.sum())
    return Exact(prior, mode.near.precision(unit).flatten(1), mode.field, torch.stack(regions))


def test_structured_guides_have_the_regional_spread_that_independent_voxels_lack() -> None:
    """SVI on the quadratic, whose posterior is known."""
    exact = exact_posterior()
    truth = exact.regional_sd(exact.covariance)
    share = {}
    for rank in (0, 8):
        guide = FieldGuide("velocity", exact.prior, rank)
        fit(exact, guide, steps=3000, learning_rate=0.02, elbo=TraceMeanField_ELBO())
        with torch.no_grad():
            draws = guide.distribution().rsample(torch.Size((4000,))).flatten(1)
        share[rank] = exact.regional_sd(torch.cov(draws.T)) / truth
    # Diagonal in the DCT: within a half. With a low rank: within a quarter.
    assert share[0].min() > 0.5
    assert share[0].max() < 1.25
    assert share[8].min() > 0.8
    assert share[8].max() < 1.25
    # Independent voxels, at the optimum of their ELBO (each has its variance given all others): a tenth, and less for larger regions.
    independent = torch.diag(1 / torch.linalg.inv(exact.covariance).diagonal())
    lacking = exact.regional_sd(independent) / truth
    assert lacking.max() < 0.1
    assert lacking[2] < lacking[0]
