"""Simulation-based calibration: the rank of the truth among draws of its posterior is uniform, if the posterior is right.

Reference: Talts et al., arXiv:1804.06788, 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pyro
import pytest
import scipy.stats
import torch
from pyro.distributions import TorchDistribution
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor

from probmed.fields import GaussianField, ModulatedField, idct
from probmed.grids import Grid
from probmed.inference import FieldGuide, fit
from probmed.inference.amortised import FieldPosterior
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
        alpha: smoothness of the velocity.
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
    alpha: float = 2.0

    @property
    def grid(self) -> Grid:
        return Grid.from_spacing((self.size,) * self.ndim, 1.0)

    @property
    def lattice(self) -> Grid:
        return self.grid.at_spacing(self.step)

    @property
    def prior(self) -> GaussianField:
        return GaussianField.from_sd(self.lattice.shape, self.lattice.spacing, self.sd, self.length, self.alpha, self.ndim)

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
        # As `probmed register` has it: a lattice of twice the voxels' spacing, α = 3, and sd and length by ``prior_scales``.
        Setting(2, 20, 2.0, sd=20 / 15, length=20 / 6, texture=4.0, noise=0.2, margin=3, alpha=3.0),
        # Little is known, so that the prior counts, and much, so that it does not.
        Setting(2, 18, 1.0, sd=0.7, length=6.0, texture=3.5, noise=1.0, margin=3),
        Setting(2, 18, 1.0, sd=1.0, length=6.0, texture=4.0, noise=0.1, margin=3),
    ],
    ids=["same lattice", "coarser lattice and default prior", "much noise", "little noise"],
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

    @property
    def even(self) -> Exact:
        """As much known of the field, but the same everywhere: the mean over voxels of what is known here."""
        return replace(self, hessian=self.hessian.diagonal().mean() * torch.eye(len(self.hessian)))

    @property
    def precision(self) -> Tensor:
        return torch.linalg.inv(self.covariance)

    @property
    def points(self) -> Tensor:
        """Of two elements in the middle and two near the edge, ``(4, n)``."""
        n = self.prior.grid_shape[0]
        return torch.eye(len(self.hessian))[[n * n // 2 + n // 2, n * n // 2 + n // 3, n + 1, n * n + n + 1]]

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


# The best posterior of a family has the exact mean, and a covariance that does not depend on the data: it is fitted once, by the exact gradient of
# KL(q ‖ p), and then calibrated against draws of velocity and data.


def fitted(loss: Callable[[], Tensor], parameters: list[Tensor]) -> None:
    optimiser = torch.optim.LBFGS(parameters, max_iter=500, line_search_fn="strong_wolfe", history_size=20, tolerance_change=1e-10)

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)  # type: ignore[no-untyped-call]


def spectral(exact: Exact, rank: int) -> FieldGuide:
    """The best ``FieldGuide`` about zero."""
    guide = FieldGuide("velocity", exact.prior, rank)
    unit = torch.eye(len(exact.hessian)).reshape(-1, *exact.prior.event_shape)
    basis = idct(unit, 2).flatten(1)
    precision = basis @ exact.precision @ basis.T

    def loss() -> Tensor:
        q = guide.distribution()
        rows = q.factor.flatten(1)
        return 0.5 * ((q.scale.flatten() ** 2 * precision.diagonal()).sum() + ((rows @ precision) * rows).sum()) - q.entropy()

    fitted(loss, [guide.log_scale, *([guide.factor] if rank else [])])
    return guide


def modulated(exact: Exact) -> FieldPosterior:
    """The best ``ModulatedField`` about zero with the spectrum (Λ + h)^-½, as ``RegistrationGuide`` learns and ``refine_field`` goes on from."""
    shape, eigenvalues = exact.prior.event_shape, exact.prior.eigenvalues[None].expand(exact.prior.event_shape)
    precision = exact.precision
    basis = idct(torch.eye(len(precision)).reshape(-1, *shape), 2).flatten(1)
    log_amplitude, log_curvature = torch.zeros(shape, requires_grad=True), torch.zeros((), requires_grad=True)

    def loss() -> Tensor:
        spectrum = (eigenvalues + log_curvature.exp()).rsqrt().flatten()
        smooth = (basis.T * spectrum**2) @ basis
        a = log_amplitude.flatten().exp()
        return 0.5 * (a @ (precision * smooth) @ a) - log_amplitude.sum() - spectrum.log().sum()

    fitted(loss, [log_amplitude, log_curvature])
    with torch.no_grad():
        return FieldPosterior("velocity", ModulatedField(torch.zeros(shape), log_amplitude.exp(), (eigenvalues + log_curvature.exp()).rsqrt(), 2))


def independent(exact: Exact) -> ModulatedField:
    """The best posterior with independent elements: each has its variance given all others."""
    variance = 1 / exact.precision.diagonal().reshape(exact.prior.event_shape)
    return ModulatedField(torch.zeros_like(variance), variance.sqrt(), torch.ones_like(variance), 2)


def exact_ranks(exact: Exact, q: TorchDistribution, quantities: Tensor, simulations: int = 500, draws: int = 63) -> Tensor:
    """How many draws of q about the exact mean are below the truth, ``(simulations, quantities)``, velocity and data drawn from the model."""
    with torch.no_grad():
        truth = exact.prior.rsample((simulations,)).flatten(1)
        values, vectors = torch.linalg.eigh(exact.hessian)
        pulled = truth @ exact.hessian + (torch.randn_like(truth) * values.clamp_min(0).sqrt()) @ vectors.T
        found = torch.zeros(simulations, len(quantities), dtype=torch.int64)
        errors = (truth - pulled @ exact.covariance) @ quantities.T
        for _ in range(draws):
            found += q.rsample((simulations,)).flatten(1) @ quantities.T < errors
    return found


@pytest.fixture(scope="module")
def uneven() -> Exact:
    """Of a registration, in which edges are known and what lies between them is not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        try:
            return exact_posterior()
        finally:
            torch.set_default_dtype(torch.float32)


def test_guides_are_calibrated_where_the_posterior_is_of_their_family(uneven: Exact) -> None:
    """At points and in regions: where the field is known equally well everywhere, the cosine transform diagonalises it; low rank has the rest."""
    even = uneven.even
    cases = [(even, spectral(even, 0).distribution()), (even, modulated(even).distribution()), (uneven, spectral(uneven, 8).distribution())]
    for exact, q in cases:
        for quantities in (exact.points, exact.regions):
            assert smallest_p(exact_ranks(exact, q, quantities), 63) > LEVEL


def test_guides_without_low_rank_are_too_sure_of_what_is_known_unevenly(uneven: Exact) -> None:
    """By a known amount, that calibration finds: the sd of points and of regional means is at least two thirds of what it should be."""
    for q in (spectral(uneven, 0).distribution(), modulated(uneven).distribution()):
        draws = q.rsample((20_000,)).flatten(1).detach()
        for quantities in (uneven.points, uneven.regions):
            exact_sd = torch.einsum("rn,nm,rm->r", quantities, uneven.covariance, quantities).sqrt()
            share = (draws @ quantities.T).std(0) / exact_sd
            assert share.min() > 0.65 and share.max() < 1.03
        assert smallest_p(exact_ranks(uneven, q, uneven.regions), 63) < LEVEL


def test_independent_voxels_are_not_calibrated(uneven: Exact) -> None:
    """VoxelMorph's posterior, at its best: too sure of points, and so sure of regions that hardly an interval holds the truth, even or uneven."""
    for exact in (uneven, uneven.even):
        q = independent(exact)
        for quantities, most in ((exact.points, 0.3), (exact.regions, 0.1)):
            found = exact_ranks(exact, q, quantities)
            assert smallest_p(found, 63) < 1e-12
            # Ranks 2 to 61 of 64 are a 94 % interval.
            assert float(((found >= 2) & (found <= 61)).double().mean()) < most
