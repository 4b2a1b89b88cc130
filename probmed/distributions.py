"""Densities that Pyro lacks: images given label probabilities with the labels summed out, and the inverse Wishart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import Transform

_CHUNK = 1 << 19  # voxels at a time where a result is made piece by piece: bounds the memory of (G, N) intermediates
_TINY = 1e-30


@dataclass(frozen=True)
class Coupling:
    """A Potts interaction between the labels of neighbouring voxels: −strength · Σ_ij w_ij [S_i ≠ S_j], in nats.

    Arguments:
        strength: β ≥ 0, nats for a pair of neighbours at the smallest spacing.
        spacing: mm; w_ij = (min spacing / spacing along the pair's axis)².
        sweeps: mean-field iterations.
    """

    strength: float
    spacing: tuple[float, ...]
    sweeps: int = 8

    def neighbours(self, q: Tensor) -> Tensor:
        """Σ_j w_ij q_j for every voxel i, over the last axes."""
        d, out = len(self.spacing), torch.zeros_like(q)
        for axis, h in enumerate(self.spacing):
            dim, n, weight = q.ndim - d + axis, q.shape[q.ndim - d + axis], (min(self.spacing) / h) ** 2
            if n > 1:
                out.narrow(dim, 0, n - 1).add_(q.narrow(dim, 1, n - 1), alpha=weight)
                out.narrow(dim, 1, n - 1).add_(q.narrow(dim, 0, n - 1), alpha=weight)
        return out

    def degree(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Σ_j w_ij, ``shape``."""
        return self.neighbours(torch.ones(*shape, dtype=like.dtype, device=like.device))

    def mean_field(self, unary: Tensor, dim: int) -> Tensor:
        """The factorised q(S) nearest to p(S) ∝ exp(Σ unary − energy), by damped parallel updates; labels on axis ``dim``."""
        q = unary.softmax(dim)
        for _ in range(self.sweeps):
            # Parallel updates can oscillate between two colourings; averaging with the last state stops that.
            q = 0.5 * (q + (unary + self.strength * self.neighbours(q)).softmax(dim))
        return q

    def bound(self, unary: Tensor, dim: int) -> Tensor:
        """E_q[unary − energy] + H(q): at most log Σ_S exp(unary − energy). Since the energy is at least zero, the normaliser of the
        Potts prior is at most one, and the same number is a lower bound of the normalised model's log evidence too."""
        d = len(self.spacing)
        with torch.no_grad():
            q = self.mean_field(unary, dim)
        disagreement = self.degree(unary.shape[-d:], unary) - (q * self.neighbours(q)).sum(dim)
        value = (q * unary).sum(dim) - 0.5 * self.strength * disagreement + torch.special.entr(q).sum(dim)
        return value.flatten(-d).sum(-1)

    def gibbs(self, unary: Tensor, labels: Tensor, dim: int, sweeps: int) -> Tensor:
        """Red–black Gibbs sweeps over ``labels`` (one fewer axis than ``unary``), started where the caller likes."""
        d, k = len(self.spacing), unary.shape[dim]
        indices = [torch.arange(n, device=unary.device) for n in unary.shape[-d:]]
        parity = torch.stack(torch.meshgrid(*indices, indexing="ij")).sum(0) % 2
        for _ in range(sweeps):
            for colour in (0, 1):
                one_hot = torch.nn.functional.one_hot(labels, k).movedim(-1, dim).to(unary.dtype)
                field = unary + self.strength * self.neighbours(one_hot)
                labels = torch.where(parity == colour, _draw(field, dim), labels)
        return labels


def _draw(logits: Tensor, dim: int) -> Tensor:
    """Categorical draws by the Gumbel-max trick."""
    noise = -torch.empty_like(logits).exponential_().log()
    return (logits + noise).argmax(dim)


def gaussian_log_density(values: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    """log N(x_v; μ_g, Σ_g) in nats for every Gaussian and voxel; channels that are NaN are marginalised.

    Arguments:
        values: ``(*batch, C, N)``, NaN where missing.
        means: ``(*batch, G, C)``; covariances: ``(*batch, G, C, C)``.

    Returns:
        ``(*batch, G, N)``; zero where every channel is missing.
    """
    channels = values.shape[-2]
    missing = values.isnan()
    if channels == 1:
        variance = covariances[..., 0, 0].unsqueeze(-1)
        squares = (values.nan_to_num(0.0) - means) ** 2
        density = -0.5 * (squares / variance + torch.log(2 * math.pi * variance))
        return torch.where(missing, torch.zeros_like(density), density) if bool(missing.any()) else density
    if not bool(missing.any()):
        return _full_density(values, means, covariances)
    codes = (~missing * 2 ** torch.arange(channels, device=values.device)[:, None]).sum(-2)
    density = torch.zeros(*torch.broadcast_shapes(means.shape[:-1], (*values.shape[:-2], 1))[:-1], means.shape[-2], values.shape[-1]).to(values)
    for code in codes.unique().tolist():  # at most 2^C patterns, however many voxels
        seen = [c for c in range(channels) if code >> c & 1]
        if seen:
            part = _full_density(values[..., seen, :].nan_to_num(0.0), means[..., seen], covariances[..., seen, :][..., seen])
            density = torch.where((codes == code).unsqueeze(-2), part, density)
    return density


def _full_density(values: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    root = torch.linalg.cholesky(covariances)
    eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device).expand_as(root)
    whitener = torch.linalg.solve_triangular(root, eye, upper=False)
    white = whitener @ values.unsqueeze(-3) - (whitener @ means.unsqueeze(-1))
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * (white**2).sum(-2) - (log_det + 0.5 * values.shape[-2] * math.log(2 * math.pi)).unsqueeze(-1)


class LabelMixture(TorchDistribution):
    """An image given label probabilities, the labels summed out.

    .. math:: p(I \\mid \\pi) = \\prod_v \\sum_k \\pi_{vk} \\Big[(1-\\epsilon) \\sum_{g \\in k} m_g N(\\beta_v \\circ I_v; \\mu_g, \\Sigma_g)
              + \\epsilon u\\Big] \\prod_c \\beta_{vc}

    Generative story: a label S_v ~ Cat(π_v), a Gaussian g of that label ~ Cat(m), the true intensity from it (or, with probability ε, from
    anywhere), divided by the bias field β. A NaN in the image is a missing channel and is marginalised; a voxel with no channel counts nothing.

    Arguments:
        log_prior: log π, ``(*batch, K, *shape)``, normalised over K.
        mixing: m, ``(*batch, G)``, summing to one within each label.
        means: ``(*batch, G, C)``; covariances: ``(*batch, G, C, C)``.
        owner: the label of each Gaussian, ``(G,)`` int64.
        log_bias: log β, ``(*batch, C, *shape)``; none by default.
        outlier: ε, and ``outlier_density``: u per channel, in the inverse of the image's unit.
        coupling: a Potts interaction of the labels; then ``log_prob`` is the mean-field lower bound of ``Coupling.bound`` and posteriors are
            the mean field's.

    Shapes: batch ``(*batch,)``, event ``(C, *shape)``. In nats.

    References: Ashburner & Friston, NeuroImage 2005 (the mixture and the bias); Van Leemput et al., IEEE TMI 1999 (mean field, outliers).
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        log_prior: Tensor,
        mixing: Tensor,
        means: Tensor,
        covariances: Tensor,
        owner: Tensor,
        log_bias: Tensor | None = None,
        outlier: float = 0.0,
        outlier_density: float = 1.0,
        coupling: Coupling | None = None,
        validate_args: bool | None = None,
    ) -> None:
        batch_ndim = means.ndim - 2
        gaussians, channels = means.shape[-2:]
        if covariances.shape[-3:] != (gaussians, channels, channels) or mixing.shape[-1] != gaussians or owner.shape != (gaussians,):
            raise ValueError(
                f"expected mixing (G,), means (G, C), covariances (G, C, C) and owner (G,), got {tuple(mixing.shape)}, "
                f"{tuple(means.shape)}, {tuple(covariances.shape)} and {tuple(owner.shape)}"
            )
        if log_prior.ndim <= batch_ndim + 1:
            raise ValueError(f"expected log_prior of shape (*batch, K, *shape) with {batch_ndim} batch axes, got {tuple(log_prior.shape)}")
        if not 0 <= outlier < 1 or outlier_density <= 0:
            raise ValueError(f"expected 0 <= outlier < 1 and outlier_density > 0, got {outlier} and {outlier_density}")
        self.grid_shape = torch.Size(log_prior.shape[batch_ndim + 1 :])
        self.labels = log_prior.shape[batch_ndim]
        if int(owner.min()) < 0 or int(owner.max()) >= self.labels:
            raise ValueError(f"expected owners between 0 and {self.labels - 1}, got {owner.tolist()}")
        self.log_prior, self.mixing, self.means, self.covariances, self.owner = log_prior, mixing, means, covariances, owner
        self.log_bias, self.outlier, self.outlier_density, self.coupling = log_bias, float(outlier), float(outlier_density), coupling
        batch = torch.broadcast_shapes(log_prior.shape[:batch_ndim], means.shape[:-2])
        super().__init__(batch, torch.Size((channels, *self.grid_shape)), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    # Inside, voxels are one axis: (*batch, rows, N).
    def _flat(self, x: Tensor) -> Tensor:
        return x.flatten(-len(self.grid_shape))

    def _unflat(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, self.grid_shape)

    def _corrected(self, image: Tensor) -> Tensor:
        if self.log_bias is None:
            return self._flat(image)
        missing = image.isnan()
        if not bool(missing.any()):
            return self._flat(image * self.log_bias.exp())
        # NaN times the bias would have a gradient of NaN, although a missing voxel says nothing about the bias.
        corrected = image.masked_fill(missing, 0.0) * self.log_bias.exp()
        return self._flat(corrected.masked_fill(missing, torch.nan))

    def _component_log_density(self, values: Tensor) -> Tensor:
        return gaussian_log_density(values, self.means, self.covariances) + self.mixing.log().unsqueeze(-1)

    def _label_log_likelihood(self, values: Tensor) -> Tensor:
        """log p(β I_v | k) of bias-corrected values ``(*batch, C, N)``: ``(*batch, K, N)``."""
        return self._grouped(self._component_log_density(values), values)

    def _grouped(self, components: Tensor, values: Tensor) -> Tensor:
        top = components.detach().amax(-2, keepdim=True)
        membership = torch.nn.functional.one_hot(self.owner, self.labels).to(components).T
        likelihood = ((membership @ (components - top).exp()) + _TINY).log() + top
        if self.outlier:
            anywhere = math.log(self.outlier) + math.log(self.outlier_density) * (~values.isnan()).sum(-2, keepdim=True)
            likelihood = torch.logaddexp(likelihood + math.log1p(-self.outlier), anywhere.to(likelihood))
            # A voxel with no channel says nothing: (1 − ε) + ε is one.
            likelihood = torch.where(values.isnan().all(-2, keepdim=True), torch.zeros_like(likelihood), likelihood)
        return likelihood

    def label_log_likelihood(self, image: Tensor) -> Tensor:
        """log p(I_v | S_v = k) without the bias field's Jacobian (the same for every label), ``(*batch, K, *shape)``."""
        return self._unflat(self._label_log_likelihood(self._corrected(image)))

    def voxel_log_prob(self, image: Tensor) -> Tensor:
        """log p(I_v), labels summed out, ``(*batch, *shape)``; without the coupling."""
        values = self._corrected(image)
        density = torch.logsumexp(self._flat(self.log_prior) + self._label_log_likelihood(values), -2)
        return self._unflat(density + self._log_jacobian(image, values))

    def _log_jacobian(self, image: Tensor, values: Tensor) -> Tensor:
        if self.log_bias is None:
            return torch.zeros((), dtype=values.dtype, device=values.device)
        return torch.where(values.isnan(), torch.zeros_like(values), self._flat(self.log_bias).expand_as(values)).sum(-2)

    def log_prob(self, value: Tensor) -> Tensor:
        if self.coupling is None:
            return self.voxel_log_prob(value).flatten(-len(self.grid_shape)).sum(-1)
        values = self._corrected(value)
        unary = self._unflat(self._flat(self.log_prior) + self._label_log_likelihood(values))
        jacobian = self._log_jacobian(value, values)
        return self.coupling.bound(unary, -len(self.grid_shape) - 1) + (jacobian.sum(-1) if jacobian.ndim else jacobian)

    @torch.no_grad()
    def posterior(self, image: Tensor) -> Tensor:
        """p(S_v = k | I), ``(*batch, K, *shape)``; with a coupling, the mean field's marginals."""
        return self._marginals(self._unary(image))

    def _marginals(self, unary: Tensor) -> Tensor:
        dim = -len(self.grid_shape) - 1
        return unary.softmax(dim) if self.coupling is None else self.coupling.mean_field(unary, dim)

    def _unary(self, image: Tensor) -> Tensor:
        values, prior = self._corrected(image), self._flat(self.log_prior)
        pieces = [p + self._label_log_likelihood(v) for p, v in zip(prior.split(_CHUNK, -1), values.split(_CHUNK, -1), strict=True)]
        return self._unflat(pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1))

    @torch.no_grad()
    def responsibilities(self, image: Tensor, posterior: Tensor | None = None) -> Tensor:
        """p(g | I_v) for every Gaussian, ``(*batch, G, *shape)``; less than one in sum where the outlier component explains the voxel.

        Arguments:
            posterior: ``self.posterior(image)``, where it is known already.
        """
        values = self._corrected(image)
        components = self._component_log_density(values)
        likelihood = self._grouped(components, values)
        labels = self._flat(self._marginals(self._unflat(self._flat(self.log_prior) + likelihood)) if posterior is None else posterior)
        ratio = components - likelihood.index_select(-2, self.owner) + (math.log1p(-self.outlier) if self.outlier else 0.0)
        return self._unflat(labels.index_select(-2, self.owner) * ratio.exp())

    @torch.no_grad()
    def sample_labels(self, image: Tensor, count: int = 1, sweeps: int = 10) -> Tensor:
        """Draws of S from p(S | I): exact where labels are independent given the image; with a coupling, ``sweeps`` red–black Gibbs sweeps from a
        draw of the mean field. ``(count, *batch, *shape)`` int64."""
        unary, dim = self._unary(image), -len(self.grid_shape) - 1
        return torch.stack([self._draw_labels(unary, dim, sweeps) for _ in range(count)])

    def _draw_labels(self, unary: Tensor, dim: int, sweeps: int) -> Tensor:
        if self.coupling is None:
            return _draw(unary, dim)
        start = _draw(self.coupling.mean_field(unary, dim).log(), dim)
        return self.coupling.gibbs(unary, start, dim, sweeps)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        lead = torch.Size(sample_shape) + self.batch_shape
        dim = -len(self.grid_shape) - 1
        labels = self._flat(self._draw_labels(self.log_prior.expand(lead + self.log_prior.shape[-len(self.grid_shape) - 1 :]), dim, 10))
        # A Gaussian of the label: among all G, those of other labels have probability zero.
        foreign = self.owner != labels.unsqueeze(-1)
        logits = self.mixing.log().unsqueeze(-2).expand(*lead, 1, -1).masked_fill(foreign, -torch.inf)
        component = _draw(logits, -1)
        roots = torch.linalg.cholesky(self.covariances).expand(*lead, *self.covariances.shape[-3:])
        means = self.means.expand(*lead, *self.means.shape[-2:])
        noise = torch.randn(*lead, labels.shape[-1], self.means.shape[-1], dtype=means.dtype, device=means.device)
        index = component.unsqueeze(-1)
        picked = torch.gather(means, -2, index.expand(*index.shape[:-1], means.shape[-1]))
        root = torch.gather(roots, -3, index.unsqueeze(-1).expand(*index.shape[:-1], *roots.shape[-2:]))
        values = picked + (root @ noise.unsqueeze(-1)).squeeze(-1)
        if self.outlier:
            odd = torch.rand(values.shape[:-1], device=values.device) < self.outlier
            values = torch.where(odd.unsqueeze(-1), torch.rand_like(values) / self.outlier_density, values)
        image = self._unflat(values.movedim(-1, -2))
        return image if self.log_bias is None else image * (-self.log_bias).exp()

    def expand(self, batch_shape: Sequence[int], _instance: LabelMixture | None = None) -> LabelMixture:
        batch = torch.Size(batch_shape)
        tail = len(self.grid_shape) + 1

        def grow(x: Tensor, event: int) -> Tensor:
            return x.expand(batch + x.shape[x.ndim - event :])

        return LabelMixture(
            grow(self.log_prior, tail),
            grow(self.mixing, 1),
            grow(self.means, 2),
            grow(self.covariances, 3),
            self.owner,
            None if self.log_bias is None else grow(self.log_bias, tail),
            self.outlier,
            self.outlier_density,
            self.coupling,
            validate_args=False,
        )


class _PositiveDefinite(constraints.Constraint):
    """Symmetric positive definite matrices, with a bijection from vectors, which torch's own constraint has not: automatic guides need it."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        return constraints.positive_definite.check(value)


positive_definite = _PositiveDefinite()


class PackedCholesky(Transform):
    """Vectors of C(C+1)/2 numbers to positive definite matrices Σ = L Lᵀ: the rows of L, with the logarithm of its diagonal.

    .. math:: \\log |d\\Sigma / dx| = C \\log 2 + \\sum_{i=0}^{C-1} (C - i + 1) \\log L_{ii}
    """

    domain = constraints.real_vector
    codomain = positive_definite
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedCholesky)

    __hash__ = Transform.__hash__

    @staticmethod
    def _size(length: int) -> int:
        size = (math.isqrt(8 * length + 1) - 1) // 2
        if size * (size + 1) // 2 != length:
            raise ValueError(f"expected C(C + 1)/2 numbers, got {length}")
        return size

    def _call(self, x: Tensor) -> Tensor:
        size = self._size(x.shape[-1])
        rows, columns = torch.tril_indices(size, size, device=x.device)
        root = x.new_zeros(*x.shape[:-1], size, size)
        root[..., rows, columns] = torch.where(rows == columns, x.exp(), x)
        return root @ root.mT

    def _inverse(self, y: Tensor) -> Tensor:
        rows, columns = torch.tril_indices(y.shape[-1], y.shape[-1], device=y.device)
        packed = torch.linalg.cholesky(y)[..., rows, columns]
        return torch.where(rows == columns, packed.abs().log(), packed)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        size = y.shape[-1]
        rows, columns = torch.tril_indices(size, size, device=x.device)
        counts = torch.arange(size + 1, 1, -1, dtype=x.dtype, device=x.device)
        return (counts * x[..., rows == columns]).sum(-1) + size * math.log(2)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-1], self._size(shape[-1]), self._size(shape[-1])))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


@biject_to.register(_PositiveDefinite)
@transform_to.register(_PositiveDefinite)
def _to_positive_definite(constraint: constraints.Constraint) -> PackedCholesky:
    return PackedCholesky()


class InverseWishart(TorchDistribution):
    """Σ ~ IW(ν, Ψ): p(Σ) ∝ |Ψ|^{ν/2} |Σ|^{-(ν+C+1)/2} exp(−½ tr Ψ Σ⁻¹), with its normaliser, in nats.

    Arguments:
        df: ν > C − 1.
        scale: Ψ, ``(*batch, C, C)`` positive definite. The mode is Ψ / (ν + C + 1).

    References: Gelman et al., Bayesian Data Analysis, 3rd edition, appendix A.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"scale": constraints.positive_definite}
    support = positive_definite
    has_rsample = True

    def __init__(self, df: float, scale: Tensor, validate_args: bool | None = None) -> None:
        self.df, self.scale = float(df), scale
        if df <= scale.shape[-1] - 1:
            raise ValueError(f"expected df > C - 1 = {scale.shape[-1] - 1}, got {df}")
        super().__init__(scale.shape[:-2], scale.shape[-2:], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.scale / (self.df - self.scale.shape[-1] - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        c, root = self.scale.shape[-1], torch.linalg.cholesky(value)
        log_det = 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        scale, root = torch.broadcast_tensors(self.scale, root)
        trace = torch.cholesky_solve(scale, root).diagonal(dim1=-2, dim2=-1).sum(-1)
        half = torch.tensor(self.df / 2, dtype=value.dtype, device=value.device)
        constant = self.df / 2 * (torch.logdet(self.scale) - c * math.log(2)) - torch.special.multigammaln(half, c)
        return constant - (self.df + c + 1) / 2 * log_det - trace / 2

    def rsample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        # Bartlett: W = A Aᵀ ~ Wishart(ν, I); Σ = L W⁻¹ Lᵀ with Ψ = L Lᵀ.
        c = self.scale.shape[-1]
        lead = torch.Size(sample_shape) + self.batch_shape
        like: dict[str, Any] = {"dtype": self.scale.dtype, "device": self.scale.device}
        a = torch.randn(*lead, c, c, **like).tril(-1)
        degrees = self.df - torch.arange(c, **like)
        chi = torch.distributions.Gamma(degrees.expand(*lead, c) / 2, torch.tensor(0.5, **like)).rsample().sqrt()
        # L W⁻¹ Lᵀ = (L A⁻ᵀ)(L A⁻ᵀ)ᵀ needs the upper factor of W, hence the transpose.
        factor = torch.linalg.solve_triangular((a + torch.diag_embed(chi)), torch.linalg.cholesky(self.scale).mT.expand(*lead, c, c), upper=False)
        return factor.mT @ factor

    def expand(self, batch_shape: Sequence[int], _instance: InverseWishart | None = None) -> InverseWishart:
        return InverseWishart(self.df, self.scale.expand(torch.Size(batch_shape) + self.event_shape), validate_args=False)
