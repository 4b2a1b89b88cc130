"""Appearances: how labels look in an image. Gaussian mixtures for the intensities of each label, and the scanner's bias field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pyro
import torch
from pyro.distributions import Gamma, MultivariateNormal, Normal
from pyro.nn import PyroModule
from torch import Tensor

from probmed.distributions import Coupling, InverseWishart, LabelMixture
from probmed.fields import along_axes
from probmed.grids import Grid, MaskedGrid

GAUSSIANS = {"GM": 1, "WM": 1, "CSF": 1, "bone": 3, "soft": 4, "air": 2, "background": 3}
"""Gaussians for each label by name, one for names that are not here. Outside the brain as in SPM's unified segmentation."""

TIED = ("GM", "WM", "CSF")
"""Labels that share one covariance by default. Voxels half in one tissue and half in another give a tissue with a covariance of its own either a
narrow Gaussian that loses them all or a broad one that takes them all; one noise for the three puts the boundary half-way between the means. On
whole heads and stripped brains alike that agrees better with people's and software's labels than several Gaussians a tissue do."""


BORDERS = (("GM", "WM"), ("GM", "CSF"))
"""Pairs of tied labels whose border runs through voxels. Without voxels that are half one and half the other, a posterior switches from one label
to the other within the noise, as if no voxel were mixed; with them, what lies half-way is left to the atlas and to the neighbours."""


class BiasField(PyroModule):
    """A smooth multiplicative field, β = exp(Σ_k c_k φ_k), the image times β being free of bias.

    .. math:: c_k \\sim N(0, s_k^2), \\quad s_k^2 \\propto (|\\omega_k|^2 + \\ell^{-2})^{-2}, \\quad \\sum_k s_k^2 = sd^2

    φ are the products of cosines over the domain with wavelength down to ``cutoff_mm``, of unit mean square, the constant one left out: a constant
    factor belongs to the means of the intensities. Site: ``bias``, ``(C, M)``.

    Arguments:
        cutoff_mm: half the shortest wavelength on each axis, as SPM's 60 mm.
        sd: prior standard deviation of log β.
        length_mm: ℓ, the prior's correlation length.
        channels: C.
        domain: the grid over whose field of view the cosines run; by default the grid that ``forward`` is given. Any grid whose axes are parallel
            to the domain's sees the same field.

    References: Ashburner & Friston, NeuroImage 2005.
    """

    def __init__(self, cutoff_mm: float = 60.0, sd: float = 0.3, length_mm: float = 60.0, channels: int = 1, domain: Grid | None = None) -> None:
        super().__init__()
        if cutoff_mm <= 0 or sd <= 0 or length_mm <= 0:
            raise ValueError(f"expected positive cutoff_mm, sd and length_mm, got {cutoff_mm}, {sd}, {length_mm}")
        self.cutoff_mm, self.sd, self.length_mm, self.channels, self.domain = cutoff_mm, sd, length_mm, channels, domain

    def counts(self, grid: Grid | MaskedGrid) -> tuple[int, ...]:
        """Number of cosines on each axis."""
        domain = self.domain or grid.lattice
        return tuple(min(n, max(1, math.ceil(2 * n * h / self.cutoff_mm))) for n, h in zip(domain.shape, domain.spacing, strict=True))

    def prior_sd(self, grid: Grid | MaskedGrid) -> Tensor:
        """s_k, ``(M,)``."""
        domain, counts = self.domain or grid.lattice, self.counts(grid)
        squares = torch.zeros(counts, dtype=torch.float64)
        for axis, (n, h, count) in enumerate(zip(domain.shape, domain.spacing, counts, strict=True)):
            line = (math.pi * torch.arange(count, dtype=torch.float64) / (n * h)) ** 2
            squares = squares + line.reshape([-1 if a == axis else 1 for a in range(len(counts))])
        variance = (squares.flatten()[1:] + self.length_mm**-2) ** -2
        return (variance * self.sd**2 / variance.sum()).sqrt() if variance.numel() else variance

    def bases(self, grid: Grid | MaskedGrid, like: Tensor) -> list[Tensor]:
        """φ on each axis of a grid, ``(n, count)``.

        Raises:
            ValueError: where the grid's axes are not parallel to the domain's.
        """
        grid = grid.lattice
        domain = self.domain or grid
        bases = []
        for axis, (count, position) in enumerate(zip(self.counts(grid), domain.positions_of(grid), strict=True)):
            frequency = torch.arange(count, dtype=torch.float64)
            basis = torch.cos(math.pi * (position[:, None] + 0.5) * frequency / domain.shape[axis])
            basis[:, 1:] *= math.sqrt(2)
            bases.append(basis.to(like))
        return bases

    def evaluate(self, coefficients: Tensor, grid: Grid | MaskedGrid) -> Tensor:
        """log β, ``(*batch, C, *shape)``, of coefficients ``(*batch, C, M)``."""
        full = torch.cat([coefficients.new_zeros(*coefficients.shape[:-1], 1), coefficients], -1)
        return grid.gather(along_axes(full.unflatten(-1, self.counts(grid)), self.bases(grid, coefficients)))

    def functions(self, grid: Grid | MaskedGrid, like: Tensor) -> Tensor:
        """φ_k at every voxel, ``(N, M)``."""
        voxels = grid.gather(grid.lattice.voxel_coordinates(torch.int64, like.device).movedim(-1, 0)).flatten(1)
        total = like.new_ones(voxels.shape[-1], 1)
        for basis, index in zip(self.bases(grid, like), voxels, strict=True):
            total = (total[:, :, None] * basis[index][:, None, :]).flatten(1)
        return total[:, 1:]

    def forward(self, grid: Grid | MaskedGrid) -> Tensor:
        sd = self.prior_sd(grid).to(torch.get_default_dtype()).expand(self.channels, -1)
        return self.evaluate(pyro.sample("bias", Normal(torch.zeros_like(sd), sd).to_event(2)), grid)

    def newton_step(self, coefficients: Tensor, grid: Grid | MaskedGrid, gradient: Tensor, curvature: Tensor, step: float = 1.0) -> Tensor:
        """One Gauss–Newton step on the coefficients, given d log p / d log β and minus the second derivative at each voxel, ``(C, *shape)``.

        The Hessian of all M coefficients is built from one-dimensional products, N · max_a(count_a²) operations.
        """
        bases, counts = self.bases(grid, coefficients), self.counts(grid)
        transposed = [b.T for b in bases]
        products = [(b[:, :, None] * b[:, None, :]).flatten(1).T for b in bases]
        precision = self.prior_sd(grid).to(coefficients) ** -2
        gradient, curvature = grid.scatter(gradient), grid.scatter(curvature)
        updated = []
        for channel, old in enumerate(coefficients):  # channels are few
            slope = along_axes(gradient[channel], transposed).flatten()[1:] - precision * old
            squares = along_axes(curvature[channel], products)
            d = len(counts)
            squares = squares.reshape([c for count in counts for c in (count, count)])
            hessian = squares.permute(*range(0, 2 * d, 2), *range(1, 2 * d, 2)).reshape(math.prod(counts), -1)[1:, 1:]
            root = torch.linalg.cholesky((hessian + torch.diag(precision)).double())
            updated.append(old + step * torch.cholesky_solve(slope[:, None].double(), root)[:, 0].to(old))
        return torch.stack(updated)


class GaussianMixture(PyroModule):
    """Gaussians for the intensities of each label.

    .. math:: w_g \\sim Gamma(a s_g + 1, a), \\quad \\Sigma_g \\sim IW(\\nu, \\Psi), \\quad \\mu_g \\mid \\Sigma_g \\sim N(\\mu_0, \\Sigma_g / n_0)

    The weights reweight the label prior, π_vk ∝ w_k T_vk with w_k = Σ_{g∈k} w_g, and mix the Gaussians within a label, m_g = w_g / w_k: one vector
    does both, so that every update in ``em_update`` is closed. Two labels with a border have one Gaussian more each, for voxels that hold both: its
    mean is half-way, (μ_a + μ_b) / 2, and its covariance theirs. Of the G Gaussians, the first M have means of their own. Sites: ``weights``
    ``(G,)``, ``covariances`` ``(V, C, C)``, ``means`` ``(M, C)``.

    Arguments:
        gaussians: number of Gaussians of each label, in the label prior's order.
        channels: C.
        location, certainty: μ_0 (the unit of the image; scans are scaled so that their foreground's mean is one) and n_0.
        df, scale: ν − C − 1 and the prior standard deviation whose square is Ψ's diagonal divided by ν.
        weight_certainty: a, in voxels; s_g is the expected share of each Gaussian in its label.
        tied: labels (by number) whose Gaussians share one covariance; the site ``covariances`` then has V < G entries.
        borders: pairs of tied labels (by number), of one Gaussian each, that meet inside voxels.
        border_share: expected share of these voxels in a label that has borders.
        outlier, outlier_density: of ``LabelMixture``.

    References: Ashburner & Friston, NeuroImage 2005; Puonti et al., NeuroImage 2016; for mixed voxels Tohka et al., NeuroImage 2004.
    """

    owner: Tensor
    noise: Tensor
    blend: Tensor
    shares: Tensor

    def __init__(
        self,
        gaussians: Sequence[int] | Mapping[str, int],
        channels: int = 1,
        location: float = 0.7,
        certainty: float = 0.01,
        df: float = 10.0,
        scale: float = 0.05,
        weight_certainty: float = 100.0,
        outlier: float = 1e-3,
        outlier_density: float = 0.25,
        tied: Sequence[int] = (),
        borders: Sequence[tuple[int, int]] = (),
        border_share: float = 0.2,
    ) -> None:
        super().__init__()
        counts = list(gaussians.values()) if isinstance(gaussians, Mapping) else list(gaussians)
        if not counts or min(counts) < 1:
            raise ValueError(f"expected at least one Gaussian for each label, got {counts}")
        self.counts, self.channels, self.outlier, self.outlier_density = tuple(counts), channels, outlier, outlier_density
        self.location, self.certainty, self.df = location, certainty, df + channels + 1
        self.scale, self.weight_certainty = scale, weight_certainty
        if not 0 <= border_share < 1:
            raise ValueError(f"expected 0 <= border_share < 1, got {border_share}")
        pure = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        # The covariance of each Gaussian, by number: the tied labels' Gaussians point at the first of them.
        first = next((g for g, k in enumerate(pure.tolist()) if k in tied), 0)
        shared = [first if k in tied else g for g, k in enumerate(pure.tolist())]
        noise = torch.unique(torch.tensor(shared), return_inverse=True)[1]
        owners, rows = [pure], [torch.eye(len(pure))]
        for a, b in borders:
            sources = (pure == a) | (pure == b)
            if int(sources.sum()) != 2 or a not in tied or b not in tied:
                raise ValueError(f"a border is one of two tied labels of one Gaussian each, got {(a, b)}")
            owners.append(torch.tensor([a, b]))
            rows.append(0.5 * sources.expand(2, -1))
        self.register_buffer("owner", torch.cat(owners))
        self.register_buffer("blend", torch.cat(rows))
        self.register_buffer("noise", torch.cat([noise, noise[first].expand(2 * len(borders))]))
        kinds = self.owner.bincount() - torch.tensor(counts)
        inside = torch.where(kinds > 0, 1 - border_share, 1.0)[pure].double() / torch.tensor(counts)[pure]
        self.register_buffer("shares", torch.cat([inside, border_share / kinds[self.owner[len(pure) :]]]))

    @classmethod
    def for_labels(
        cls, names: Sequence[str], channels: int = 1, tie: bool = True, gaussians: Mapping[str, int] | None = None, **options: float
    ) -> GaussianMixture:
        """The usual number of Gaussians for the labels of an atlas, by name, or another where ``gaussians`` has one; if ``tie``, those of the brain
        with one covariance and with borders."""
        tied = [k for k, name in enumerate(names) if tie and name in TIED]
        borders = [(names.index(a), names.index(b)) for a, b in BORDERS if tie and a in names and b in names]
        counts = {**GAUSSIANS, **(gaussians or {})}
        return cls([counts.get(name, 1) for name in names], channels, tied=tied, borders=borders, **options)

    @property
    def covariance_count(self) -> int:
        return int(self.noise.max()) + 1

    @property
    def pure(self) -> int:
        """M, the Gaussians with a mean of their own."""
        return self.blend.shape[1]

    @property
    def dimension(self) -> int:
        """Number of coordinates in ``scores``."""
        c = self.channels
        return len(self.owner) + self.pure * c + self.covariance_count * c * (c + 1) // 2

    def component_means(self, means: Tensor) -> Tensor:
        """The mean of every Gaussian, ``(*batch, G, C)``, from those of the pure ones, ``(*batch, M, C)``."""
        return self.blend.to(means) @ means

    def _psi(self, like: Tensor) -> Tensor:
        return self.df * self.scale**2 * torch.eye(self.channels, dtype=like.dtype, device=like.device)

    def forward(self, log_prior: Tensor, log_bias: Tensor | None = None, coupling: Coupling | None = None) -> LabelMixture:
        like, shares = log_prior.new_ones(()), self.shares.to(log_prior)
        weights = pyro.sample("weights", Gamma(self.weight_certainty * shares + 1, self.weight_certainty * torch.ones_like(shares)).to_event(1))
        covariances = pyro.sample("covariances", InverseWishart(self.df, self._psi(like)).expand([self.covariance_count]).to_event(1))
        centre = like * self.location * torch.ones(self.pure, self.channels, device=like.device)
        means = pyro.sample("means", MultivariateNormal(centre, covariances[..., self.noise[: self.pure], :, :] / self.certainty).to_event(1))
        return self.mixture(log_prior, weights, means, covariances, log_bias, coupling)

    def mixture(
        self,
        log_prior: Tensor,
        weights: Tensor,
        means: Tensor,
        covariances: Tensor,
        log_bias: Tensor | None = None,
        coupling: Coupling | None = None,
    ) -> LabelMixture:
        """The distribution of the image for given latents; ``log_prior`` is the atlas, ``(*batch, K, *shape)``."""
        labels = self.label_weights(weights)
        mixing = weights / labels[..., self.owner]
        spatial = log_prior.ndim - weights.ndim
        log_prior = (log_prior + labels.log().reshape(*labels.shape, *[1] * spatial)).log_softmax(weights.ndim - 1)
        covariances = covariances[..., self.noise, :, :]
        means = self.component_means(means)
        return LabelMixture(log_prior, mixing, means, covariances, self.owner, log_bias, self.outlier, self.outlier_density, coupling)

    def label_weights(self, weights: Tensor) -> Tensor:
        """w_k = Σ_{g∈k} w_g, ``(*batch, K)``."""
        out = weights.new_zeros(*weights.shape[:-1], len(self.counts))
        return out.index_add(-1, self.owner, weights)

    def start(self, log_prior: Tensor, image: Tensor, spread: float = 0.5) -> dict[str, Tensor]:
        """Starting values from the atlas alone: each label's mean and variance where it is likely, its Gaussians spread over ±``spread`` sd.

        Arguments:
            log_prior: ``(K, *shape)``; image: ``(C, *shape)``.
        """
        values = image.flatten(1)
        seen = ~values.isnan()
        # Fourth powers: at borders, where the atlas is not yet aligned, a label's voxels show its neighbour. A Gaussian that starts on these keeps
        # them: one of soft tissue's would hold the air around the head, at a mode some 80 nats below the best one.
        probability = (4 * log_prior.flatten(1)).softmax(0)
        filled = values.nan_to_num(0.0)
        mass = (probability @ seen.to(probability).T).clamp_min(1e-6)  # (K, C)
        mean = (probability @ filled.T) / mass
        variance = ((probability @ (filled**2).T) / mass - mean**2).clamp_min(self.scale**2)
        pure = self.owner[: self.pure]
        means, variances = mean[pure], variance[pure]
        position = torch.cat([torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in self.counts]).to(values)
        means = means + spread * position[:, None] * variances.sqrt()
        counts = torch.tensor(self.counts).to(values)[pure]
        pooled = self._pooled(variances / counts[:, None]) / self._pooled(torch.ones_like(counts))[:, None]
        return {"weights": self.shares.to(values), "means": means, "covariances": torch.diag_embed(pooled)}

    def _pooled(self, x: Tensor) -> Tensor:
        """Sums over the Gaussians (or the pure ones) of each covariance: ``(G, ...)`` to ``(V, ...)``."""
        return x.new_zeros(self.covariance_count, *x.shape[1:]).index_add(0, self.noise[: len(x)], x)

    def em_update(
        self, log_atlas: Tensor, mixture: LabelMixture, image: Tensor, weights: Tensor, tempering: float = 1.0
    ) -> dict[str, Tensor]:
        """The maximising weights, means and covariances given the responsibilities under ``mixture``; none of them lowers the log joint.

        Arguments:
            log_atlas: log T before the weights, ``(K, *shape)``; image: ``(C, *shape)``; weights: the present ones, ``(G,)``.
            tempering: the factor on the image's log density.
        """
        values = mixture._corrected(image)
        seen = ~values.isnan().all(-2)
        posterior = mixture.posterior(image)
        responsibilities = mixture._flat(mixture.responsibilities(image, posterior)) * seen
        labels = mixture._flat(posterior) * seen
        mass, first, second = sufficient_statistics(values, responsibilities, mixture.means, mixture.covariances)
        mass, first, second = tempering * mass, tempering * first, tempering * second

        # Means and covariances: the mode of their normal–inverse-Wishart posterior.
        n0, centre, c = self.certainty, self.location, self.channels
        # Gaussians that share means share their covariance, which therefore cancels from the normal equations.
        blend = self.blend.to(mass)
        normal = blend.T @ (mass[:, None] * blend) + n0 * torch.eye(self.pure).to(mass)
        pure = torch.linalg.solve(normal, blend.T @ (first + mass[:, None] * mixture.means) + n0 * centre)
        moved = blend @ pure - mixture.means
        scatter = second - moved[:, :, None] * first[:, None, :] - first[:, :, None] * moved[:, None, :]
        scatter = self._pooled(scatter + mass[:, None, None] * moved[:, :, None] * moved[:, None, :])
        shift = pure - centre
        scatter = scatter + self._pooled(n0 * shift[:, :, None] * shift[:, None, :])
        # Each mean's own prior has a covariance too, hence the one a mean.
        counts = self._pooled(mass) + self._pooled(torch.ones_like(pure[:, 0]))
        covariances = (scatter + self._psi(scatter)) / (counts + self.df + c + 1)[:, None, None]
        # Rounding leaves the two triangles apart by more than what counts as symmetric.
        covariances = (covariances + covariances.mT) / 2

        # Weights: log Σ_j w_j T_j is concave, its tangent bounds it, and the bound's maximum is closed (SPM's update).
        atlas = mixture._flat(log_atlas).exp()
        total = (self.label_weights(weights)[:, None] * atlas).sum(0)
        expected = tempering * ((atlas / total) * seen).sum(-1)
        odd = labels.sum(-1) - torch.zeros_like(expected).index_add(0, self.owner, responsibilities.sum(-1))
        share = responsibilities.sum(-1) + odd[self.owner] * mixture.mixing
        prior = self.weight_certainty * self.shares.to(share)
        weights = (tempering * share + prior) / (expected[self.owner] + self.weight_certainty)
        return {"weights": weights, "means": pure, "covariances": covariances}

    def scores(self, mixture: LabelMixture, image: Tensor) -> tuple[Tensor, Tensor]:
        """Each voxel's gradient in (log weights, whitened means, log covariances), ``(N, P)``, and the prior's precision of these, ``(P,)``.

        With Σ_v = L Lᵀ at the mode, the coordinates are μ = μ̂ + L a and Σ = L expm(B) Lᵀ, B symmetric, in which every departure is admissible.
        The prior on log w_g has precision a w_g, here with w_k = 1. Voxels that miss a channel count only for the weights.
        """
        values = mixture._corrected(image)
        c = mixture.means.shape[-1]
        posterior = mixture.posterior(image)
        r = mixture._flat(mixture.responsibilities(image, posterior))
        labels, prior = mixture._flat(posterior), mixture._flat(mixture.log_prior).exp()
        odd = labels - torch.zeros_like(labels).index_add(0, self.owner, r)
        shares = r + odd[self.owner] * mixture.mixing[:, None]
        by_weight = shares - prior[self.owner] * mixture.mixing[:, None]

        complete = ~values.isnan().any(0)
        roots = torch.linalg.cholesky(mixture.covariances)
        z = torch.linalg.solve_triangular(roots, values.nan_to_num(0.0)[None] - mixture.means[:, :, None], upper=False) * complete
        rows, columns = torch.tril_indices(c, c, device=values.device)
        pairs = z[:, rows] * z[:, columns] - ((rows == columns)[None, :, None] & complete).to(z)
        by_covariance = r[:, None] * pairs * torch.where(rows == columns, 0.5, 1.0)[None, :, None].to(z)
        by_mean = torch.einsum("gm,gcn->mcn", self.blend.to(r), r[:, None] * z)
        columns_of = [by_weight, by_mean.flatten(0, 1), self._pooled(by_covariance).flatten(0, 1)]
        precision = [
            self.weight_certainty * mixture.mixing,
            torch.full((self.pure * c,), self.certainty).to(z),
            torch.where(rows == columns, 0.5, 1.0).to(z).mul(self.df).repeat(self.covariance_count),
        ]
        seen = ~values.isnan().all(0)
        return (torch.cat(columns_of) * seen).T, torch.cat(precision)

    def moved(self, state: Mapping[str, Tensor], departures: Tensor) -> dict[str, Tensor]:
        """Latents at departures ``(draws, P)`` from ``state`` in the coordinates of ``scores``: each site with a leading axis of draws."""
        g, c = state["means"].shape
        pairs, count = c * (c + 1) // 2, self.covariance_count
        log_weights, whitened, packed = departures.split([len(self.owner), g * c, count * pairs], -1)
        roots = torch.linalg.cholesky(state["covariances"])
        rows, columns = torch.tril_indices(c, c, device=packed.device)
        symmetric = packed.new_zeros(len(departures), count, c, c)
        symmetric[..., rows, columns] = packed.unflatten(-1, (count, pairs))
        symmetric = symmetric + symmetric.tril(-1).mT
        return {
            "weights": state["weights"] * log_weights.exp(),
            "means": state["means"] + (roots[self.noise[:g]] @ whitened.unflatten(-1, (g, c, 1)))[..., 0],
            "covariances": roots @ torch.linalg.matrix_exp(symmetric) @ roots.mT,
        }

    def bias_derivatives(self, mixture: LabelMixture, image: Tensor) -> tuple[Tensor, Tensor]:
        """d log p / d log β and minus its expected second derivative at each voxel and channel, ``(C, *shape)``, zero where missing."""
        log_bias = (torch.zeros_like(image) if mixture.log_bias is None else mixture.log_bias).detach().requires_grad_()
        with torch.enable_grad():
            moved = LabelMixture(
                mixture.log_prior, mixture.mixing, mixture.means, mixture.covariances, mixture.owner, log_bias,
                mixture.outlier, mixture.outlier_density, mixture.coupling,
            )  # fmt: skip
            (gradient,) = torch.autograd.grad(moved.log_prob(image), log_bias)
        values = mixture._corrected(image)
        responsibilities = mixture._flat(mixture.responsibilities(image))
        precision = torch.linalg.inv(mixture.covariances).diagonal(dim1=-2, dim2=-1)
        curvature = (1 + (precision.T @ responsibilities) * values.nan_to_num(0.0) ** 2) * ~values.isnan()
        return gradient.nan_to_num(0.0), mixture._unflat(curvature)


def sufficient_statistics(values: Tensor, responsibilities: Tensor, means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Expected count of each Gaussian's voxels, and sum and sum of squares of how far they are from its mean; missing channels are replaced by their
    conditional moments.

    About zero, the spread of many voxels of nearly one value would be lost in the rounding of their squares.

    Arguments:
        values: ``(C, N)``, NaN where missing; responsibilities: ``(G, N)``, zero at voxels with no channel.

    Returns:
        ``(G,)``, ``(G, C)``, ``(G, C, C)``.
    """
    missing = values.isnan()
    partly = missing.any(0) & ~missing.all(0)
    whole = torch.where(missing.any(0), torch.zeros_like(responsibilities), responsibilities)
    mass = whole.sum(-1)
    centred = values.nan_to_num(0.0)[None] - means[:, :, None]
    weighted = whole[:, None] * centred
    first, second = weighted.sum(-1), weighted @ centred.mT
    if not bool(partly.any()):
        return mass, first, second
    codes = (~missing * 2 ** torch.arange(values.shape[0], device=values.device)[:, None]).sum(0)
    for code in codes[partly].unique().tolist():
        where = codes == code
        seen = [c for c in range(values.shape[0]) if code >> c & 1]
        hidden = [c for c in range(values.shape[0]) if not code >> c & 1]
        r, x = responsibilities[:, where], values[seen][:, where]
        block = covariances[:, seen][:, :, seen]
        gain = torch.linalg.solve(block, covariances[:, seen][:, :, hidden]).mT
        apart = x[None] - means[:, seen, None]
        completed = x.new_zeros(means.shape[0], values.shape[0], x.shape[-1])
        completed[:, seen], completed[:, hidden] = apart, gain @ apart
        left = covariances[:, hidden][:, :, hidden] - gain @ covariances[:, seen][:, :, hidden]
        mass = mass + r.sum(-1)
        first = first + torch.einsum("gn,gcn->gc", r, completed)
        moment = torch.einsum("gn,gan,gbn->gab", r, completed, completed)
        spread = torch.zeros_like(moment)
        index = torch.tensor(hidden, device=values.device)
        spread[:, index[:, None], index[None, :]] = left * r.sum(-1)[:, None, None]
        second = second + moment + spread
    return mass, first, second
