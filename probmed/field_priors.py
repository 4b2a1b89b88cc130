"""Distributions over fields and affine maps that were learned from some: principal components, an
autoencoder of their scores, or a smooth field of fitted strength and length.

A field prior is a component whose ``forward()`` draws its latents and returns a field, ``(C, *shape)``; velocities make a deformation prior of it
(``FlowPrior``), intensities an appearance. Of affine maps there is ``PrincipalAffine``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import torch
from pyro.distributions import Normal
from pyro.nn import PyroModule
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from probmed.fields import GaussianField
from probmed.grids import Grid
from probmed.priors import DeformationPrior
from probmed.transforms import Affine, Velocity


class FieldPrior(PyroModule):
    """What every prior over fields has: ``forward()`` returns one, ``(C, *shape)``."""

    def forward(self) -> Tensor:
        raise NotImplementedError


class PrincipalField(FieldPrior):
    """Mean and principal components: x = μ + Σ_j a_j c_j, a_j ~ N(0, 1). Site: ``site``, ``(J,)``.

    Arguments:
        mean: μ, ``(C, *shape)``.
        components: c_j, each as long as its standard deviation, ``(J, C, *shape)``.
        site: name of the scores a.
    """

    mean: Tensor
    components: Tensor

    def __init__(self, mean: Tensor, components: Tensor, site: str = "scores") -> None:
        super().__init__()
        if components.shape[1:] != mean.shape or not len(components):
            raise ValueError(f"expected components (J, {', '.join(map(str, mean.shape))}) with J > 0, got {tuple(components.shape)}")
        self.site = site
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)

    @classmethod
    def fit(cls, fields: Tensor, count: int | None = None, site: str = "scores") -> PrincipalField:
        """Of fields ``(N, C, *shape)``: the sample covariance, or the ``count`` components that hold most of it.

        Raises:
            ValueError: for fewer than two fields.
        """
        if len(fields) < 2:
            raise ValueError(f"expected two fields or more, got {len(fields)}")
        mean = fields.mean(0)
        departures = (fields - mean).flatten(1).double()
        # N fields span N − 1 dimensions, however many voxels they have, and no more than these: the smaller matrix has the same eigenvalues.
        dimensions = departures.shape[1]
        kept = min(count or len(fields) - 1, len(fields) - 1, dimensions)
        few = len(fields) <= dimensions
        values, vectors = torch.linalg.eigh((departures @ departures.mT if few else departures.mT @ departures) / (len(fields) - 1))
        values, vectors = values[-kept:].flip(0).clamp_min(0)[:, None], vectors[:, -kept:].flip(1).mT
        components = vectors @ departures / (len(fields) - 1) ** 0.5 if few else vectors * values.sqrt()
        return cls(mean, components.to(fields).unflatten(1, fields.shape[1:]), site)

    def evaluate(self, scores: Tensor) -> Tensor:
        return self.mean + torch.tensordot(scores, self.components, 1)

    def forward(self) -> Tensor:
        return self.evaluate(pyro.sample(self.site, Normal(self.mean.new_zeros(len(self.components)), 1.0).to_event(1)))


class AutoencodedField(FieldPrior):
    """Principal scores by a small variational autoencoder, to compare with components alone, whose scores are normal.

    .. math:: z \\sim N(0, I), \\quad a \\sim N(f(z), \\sigma^2 I), \\quad x = \\mu + \\sum_j a_j c_j

    The components c_j are orthogonal and all of one length, so that σ is the same in every direction of the fields. Sites: ``site``, ``(L,)``, z; and
    ``{site}_scores``, ``(J,)``, a.

    Arguments:
        fields: μ and c. decoder: f, codes ``(B, L)`` to scores ``(B, J)``.
        codes: L. noise: σ.
        site: name of the codes.

    References: Kingma & Welling, ICLR 2014.
    """

    noise: Tensor

    def __init__(self, fields: PrincipalField, decoder: nn.Module, codes: int, noise: Tensor, site: str = "codes") -> None:
        super().__init__()
        if codes < 1 or not bool((noise > 0).all()):
            raise ValueError(f"expected one code or more and noise > 0, got {codes} and {noise.tolist()}")
        self.fields, self.decoder, self.codes, self.site = fields, decoder, codes, site
        self.register_buffer("noise", noise)

    @classmethod
    def fit(
        cls, fields: Tensor, count: int | None = None, codes: int = 4, hidden: int = 32, steps: int = 500, seed: int = 0, site: str = "codes"
    ) -> AutoencodedField:
        """Of fields ``(N, C, *shape)``, by the ELBO of all of them at every step (Adam); it starts from the first L principal components.

        Arguments:
            count: at most so many principal components; all by default. codes: L, at most as many as there are components.
            hidden: width of both networks.

        Raises:
            ValueError: for fewer than two fields, or fields that are all the same.
        """
        principal = PrincipalField.fit(fields, count)
        rows = principal.components.flatten(1)
        lengths = rows.norm(dim=1)
        kept = lengths > 1e-6 * lengths.max()
        if not bool(kept.any()):
            raise ValueError("expected fields that differ, got the same several times")
        directions, lengths = rows[kept] / lengths[kept, None], lengths[kept]
        unit = lengths.max()
        scores = (fields - principal.mean).flatten(1) @ directions.mT / unit
        codes = min(codes, len(lengths))
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            decoder, noise = _autoencoder(scores, codes, hidden, steps)
        axes = (unit * directions).unflatten(1, fields.shape[1:])
        return cls(PrincipalField(principal.mean, axes), decoder, codes, noise, site)

    def forward(self) -> Tensor:
        code = pyro.sample(self.site, Normal(self.noise.new_zeros(self.codes), 1.0).to_event(1))
        scores = pyro.sample(f"{self.site}_scores", Normal(self.decoder(code[None])[0], self.noise).to_event(1))
        return self.fields.evaluate(scores)


class _Bent(nn.Module):
    """A linear map and a small network added to it."""

    def __init__(self, inputs: int, outputs: int, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.bend = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, outputs))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + self.bend(x)
        return out


def _autoencoder(scores: Tensor, codes: int, hidden: int, steps: int) -> tuple[_Bent, Tensor]:
    """The decoder of scores ``(N, J)`` and its σ, by the ELBO."""
    dimensions = scores.shape[1]
    encoder, decoder = (net.to(scores) for net in (_Bent(dimensions, 2 * codes, hidden), _Bent(codes, dimensions, hidden)))
    sd = scores.std(0)
    with torch.no_grad():
        for net in (encoder, decoder):
            for p in (net.linear.weight, net.linear.bias, net.bend[-1].bias):  # type: ignore[union-attr]
                p.zero_()  # type: ignore[operator]
            net.bend[-1].weight.mul_(0.1)  # type: ignore[union-attr, operator]
        encoder.linear.weight[:codes, :codes] = torch.diag(1 / sd[:codes])
        decoder.linear.weight[:codes] = torch.diag(sd[:codes])
        encoder.linear.bias[codes:] = -1.0
    log_noise = (0.3 * sd.mean()).log().clone().requires_grad_()
    learned = [*encoder.parameters(), *decoder.parameters(), log_noise]
    optimiser = torch.optim.Adam(learned, lr=5e-3)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 5e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        loc, log_sd = encoder(scores).chunk(2, 1)
        # Slopes that never vanish, within e^±6.
        log_sd = 6 * torch.tanh(log_sd / 6)
        code = loc + log_sd.exp() * torch.randn_like(loc)
        fit = Normal(decoder(code), log_noise.exp()).log_prob(scores).sum(1)
        divergence = 0.5 * (loc.square() + (2 * log_sd).exp() - 1 - 2 * log_sd).sum(1)
        optimiser.zero_grad(set_to_none=True)
        (divergence - fit).mean().backward()
        optimiser.step()
    return decoder.requires_grad_(False).eval(), log_noise.detach().exp()


class SmoothField(FieldPrior):
    """μ plus a ``GaussianField``. Site: ``site``, ``(C, *shape)``, the field itself.

    Arguments:
        mean: μ, ``(C, *shape)``.
        spacing: mm. sd: marginal standard deviation, averaged over the grid. length_mm: correlation length. alpha: smoothness.
    """

    mean: Tensor

    def __init__(self, mean: Tensor, spacing: tuple[float, ...], sd: float, length_mm: float, alpha: float = 2.0, site: str = "field") -> None:
        super().__init__()
        self.spacing, self.sd, self.length_mm, self.alpha, self.site = tuple(spacing), float(sd), float(length_mm), alpha, site
        self.register_buffer("mean", mean)

    @classmethod
    def fit(cls, fields: Tensor, spacing: tuple[float, ...], alpha: float = 2.0, site: str = "field") -> SmoothField:
        """Of fields ``(N, C, *shape)``: their mean, their standard deviation about it, and the length of most likelihood given these.

        The standard deviation is not left to the likelihood, where the few broadest waves have it and thousands of fine ones have the say.

        Raises:
            ValueError: for fewer than two fields, or fields that are all the same.
        """
        if len(fields) < 2:
            raise ValueError(f"expected two fields or more, got {len(fields)}")
        mean = fields.mean(0)
        # The mean takes one of N degrees of freedom.
        departures = (fields - mean).double() * (len(fields) / (len(fields) - 1)) ** 0.5
        sd = float(departures.square().mean().sqrt())
        if not sd > 0:
            raise ValueError("expected fields that differ, got the same several times")
        shape, channels = fields.shape[2:], fields.shape[1]

        def loss(log_length: float) -> float:
            prior = GaussianField.from_sd(shape, spacing, torch.tensor(sd).double(), torch.tensor(math.exp(log_length)).double(), alpha, channels)
            return -float(prior.log_prob(departures).mean())

        longest = max(n * h for n, h in zip(shape, spacing, strict=True)) / 2
        found = minimize_scalar(loss, bounds=(math.log(min(spacing) / 4), math.log(longest)), method="bounded")
        return cls(mean, spacing, sd, math.exp(found.x), alpha, site)

    def prior(self) -> GaussianField:
        sd, length = (torch.as_tensor(value).to(self.mean) for value in (self.sd, self.length_mm))
        return GaussianField.from_sd(self.mean.shape[1:], self.spacing, sd, length, self.alpha, self.mean.shape[0]).about(self.mean)

    def forward(self) -> Tensor:
        field: Tensor = pyro.sample(self.site, self.prior())
        return field


class PrincipalAffine(DeformationPrior):
    """exp(Σ_n a_n G_n) of parameters a that are normal with a mean and a covariance: a = μ + Σ_j b_j c_j, b_j ~ N(0, 1). Site: ``site``, ``(J,)``.

    Unlike ``AffinePrior`` it is about no known map, and its parameters depend on one another, as sizes along different axes of a body do.

    Arguments:
        coordinates: of all parameters of an affine map, as ``Affine.log``: ``(6,)`` in 2D, ``(12,)`` in 3D.
        ndim: 2 or 3.
        centre: the point about which the group acts, mm, ``(d,)``.
    """

    centre: Tensor

    def __init__(self, coordinates: PrincipalField, ndim: int, centre: Tensor) -> None:
        super().__init__()
        if coordinates.mean.shape != (ndim * (ndim + 1),) or centre.shape != (ndim,):
            found = f"{tuple(coordinates.mean.shape)} and {tuple(centre.shape)}"
            raise ValueError(f"expected parameters ({ndim * (ndim + 1)},) and a centre ({ndim},) in {ndim}D, got {found}")
        self.coordinates, self.ndim = coordinates, ndim
        self.register_buffer("centre", centre.to(coordinates.mean))

    @classmethod
    def fit(cls, affines: Sequence[Affine], centre: Tensor, site: str = "affine") -> PrincipalAffine:
        """Of affine maps: the sample mean and covariance of their parameters about ``centre``.

        Raises:
            ValueError: for fewer than two maps, or one without a real logarithm.
        """
        if len(affines) < 2:
            raise ValueError(f"expected two affine maps or more, got {len(affines)}")
        found = Affine(torch.stack([affine.matrix for affine in affines])).log(centre).to(torch.get_default_dtype())
        return cls(PrincipalField.fit(found, site=site), affines[0].ndim, centre)

    def evaluate(self, scores: Tensor) -> Affine:
        return Affine.exp(self.coordinates.evaluate(scores), self.ndim, self.centre)

    def forward(self) -> Affine:
        return Affine.exp(self.coordinates(), self.ndim, self.centre)


class FlowPrior(DeformationPrior):
    """exp(v) of a velocity that a field prior draws, mm, ``(d, *grid.shape)``."""

    def __init__(self, grid: Grid, velocity: FieldPrior) -> None:
        super().__init__()
        self.grid, self.velocity = grid, velocity

    def forward(self) -> Velocity:
        return Velocity(self.grid, self.velocity())
