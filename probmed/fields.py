"""Random fields on grids: smooth Gaussian fields, and the cosine bases that diagonalise them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl


@lru_cache(maxsize=64)
def cosine_basis(n: int, count: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """The orthonormal DCT-II basis of n points, its first ``count`` functions: ``(n, count)``, columns of unit norm."""
    count = n if count is None else count
    i = torch.arange(n, dtype=torch.float64)[:, None] + 0.5
    k = torch.arange(count, dtype=torch.float64)[None]
    basis = torch.cos(math.pi * i * k / n) * math.sqrt(2 / n)
    basis[:, 0] = math.sqrt(1 / n)
    return basis.to(device=device, dtype=dtype)


def along_axes(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply the last ``len(matrices)`` axes of x by one matrix each, ``(out, in)``."""
    for axis, matrix in enumerate(matrices):
        dim = x.ndim - len(matrices) + axis
        if dim == x.ndim - 1:
            x = x @ matrix.T
        else:
            # (before, n, after) times (m, n): one batched product without moving memory.
            shape = x.shape
            x = (matrix @ x.reshape(*shape[:dim], shape[dim], math.prod(shape[dim + 1 :]))).reshape(*shape[:dim], matrix.shape[0], *shape[dim + 1 :])
    return x


def dct(x: Tensor, ndim: int) -> Tensor:
    """Orthonormal DCT-II over the last ``ndim`` axes, by one dense matrix an axis (faster than an FFT at the sizes of images)."""
    return along_axes(x, [cosine_basis(n, None, x.dtype, str(x.device)).T for n in x.shape[-ndim:]])


def idct(x: Tensor, ndim: int) -> Tensor:
    """Inverse of ``dct``."""
    return along_axes(x, [cosine_basis(n, None, x.dtype, str(x.device)) for n in x.shape[-ndim:]])


def synthesise(coefficients: Tensor, shape: Sequence[int]) -> Tensor:
    """A field ``(*batch, *shape)`` from its first DCT coefficients ``(*batch, *counts)``."""
    pairs = zip(shape, coefficients.shape[-len(shape) :], strict=True)
    dtype, device = coefficients.dtype, str(coefficients.device)
    return along_axes(coefficients, [cosine_basis(n, c, dtype, device) for n, c in pairs])


def analyse(x: Tensor, counts: Sequence[int]) -> Tensor:
    """The transpose of ``synthesise``: the first DCT coefficients of a field."""
    pairs = zip(x.shape[-len(counts) :], counts, strict=True)
    return along_axes(x, [cosine_basis(n, c, x.dtype, str(x.device)).T for n, c in pairs])


def laplacian_eigenvalues(shape: Sequence[int], spacing: Sequence[float], dtype: torch.dtype = torch.float64) -> Tensor:
    """Eigenvalues of D − A, the graph Laplacian of a grid with free boundary, mm⁻²: Σ_d (2 − 2 cos(π k_d / n_d)) / h_d²."""
    total = torch.zeros((), dtype=dtype)
    for axis, (n, h) in enumerate(zip(shape, spacing, strict=True)):
        line = (2 - 2 * torch.cos(math.pi * torch.arange(n, dtype=dtype) / n)) / h**2
        total = total + line.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return total


class GaussianField(TorchDistribution):
    """A smooth random field on a grid, independent and alike in each of its channels.

    .. math:: v \\sim N\\left(0, [\\lambda (D - A + \\kappa^2 I)^{\\alpha}]^{-1}\\right)

    D − A is the Laplacian of the grid with free boundary and its spacing in mm, diagonal in the DCT-II, so that everything here is
    exact in O(n log n). It is proper for κ > 0; in 3D draws are continuous for α ≥ 2. The correlation length is about 1/κ.

    Arguments:
        shape: the grid's shape, d integers.
        spacing: mm, d numbers.
        strength: λ > 0, ``(*batch,)``; may need a gradient.
        kappa: κ > 0, mm⁻¹, a number or ``(*batch,)``.
        alpha: smoothness α > 0.
        channels: leading event dimension C.
        loc: the mean, broadcastable to ``(*batch, C, *shape)``.

    Shapes: batch ``(*batch,)``, event ``(C, *shape)``. Densities in nats, with their normaliser.

    Raises:
        ValueError: for spacing, λ, κ or α that are not positive.

    References: Lindgren, Rue, Lindström, JRSS B 2011 (the field as a stochastic PDE); Dalca et al., MedIA 2019 (the prior on velocities,
    there improper and without its normaliser).

    >>> field = GaussianField((8, 8), (1.0, 1.0), strength=1.0, kappa=0.5, channels=2)
    >>> field.event_shape, field.rsample().shape
    (torch.Size([2, 8, 8]), torch.Size([2, 8, 8]))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"strength": constraints.positive, "kappa": constraints.positive}
    has_rsample = True

    def __init__(
        self,
        shape: Sequence[int],
        spacing: Sequence[float],
        strength: Tensor | float = 1.0,
        kappa: Tensor | float = 0.1,
        alpha: float = 2.0,
        channels: int = 1,
        loc: Tensor | float = 0.0,
        validate_args: bool | None = None,
    ) -> None:
        self.grid_shape, self.spacing = tuple(int(n) for n in shape), tuple(float(h) for h in spacing)
        self.alpha, self.channels = float(alpha), int(channels)
        if len(self.grid_shape) != len(self.spacing) or min(self.spacing) <= 0 or self.alpha <= 0:
            raise ValueError(f"expected a positive spacing for each axis of {self.grid_shape} and alpha > 0, got {spacing}, {alpha}")
        dtype = next((a.dtype for a in (strength, kappa, loc) if isinstance(a, Tensor)), torch.get_default_dtype())
        device = next((a.device for a in (strength, kappa, loc) if isinstance(a, Tensor)), None)
        strength, kappa = (torch.as_tensor(a, dtype=dtype, device=device) for a in (strength, kappa))
        self.strength, self.kappa = torch.broadcast_tensors(strength, kappa)
        event = torch.Size((self.channels, *self.grid_shape))
        self.loc = torch.as_tensor(loc, dtype=dtype, device=device).expand(self.strength.shape + event)
        if bool((self.strength <= 0).any()) or bool((self.kappa <= 0).any()):
            raise ValueError(f"expected strength > 0 and kappa > 0, got {strength.tolist()} and {kappa.tolist()}")
        super().__init__(self.strength.shape, event, validate_args=validate_args)

    @classmethod
    def from_sd(
        cls,
        shape: Sequence[int],
        spacing: Sequence[float],
        sd: Tensor | float,
        length_mm: Tensor | float,
        alpha: float = 2.0,
        channels: int = 1,
    ) -> GaussianField:
        """The field whose marginal standard deviation, averaged over the grid, is ``sd`` and whose correlation length is ``length_mm``.

        These two mean the same on every spacing, which λ does not.
        """
        unit = cls(shape, spacing, 1.0, 1 / torch.as_tensor(length_mm), alpha, channels)
        mean_variance = 1 / unit.eigenvalues
        mean_variance = mean_variance.flatten(-len(unit.grid_shape)).mean(-1)
        return cls(shape, spacing, mean_variance / torch.as_tensor(sd) ** 2, 1 / torch.as_tensor(length_mm), alpha, channels)

    def about(self, loc: Tensor) -> GaussianField:
        """The same field about another mean, ``(*batch, C, *shape)``."""
        strength, kappa = (x.expand(loc.shape[: -1 - len(self.grid_shape)]) for x in (self.strength, self.kappa))
        return GaussianField(self.grid_shape, self.spacing, strength, kappa, self.alpha, self.channels, loc, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, 1 + len(self.grid_shape))

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of the precision, ``(*batch, *shape)``, the same for every channel."""
        d = len(self.grid_shape)
        laplacian = laplacian_eigenvalues(self.grid_shape, self.spacing).to(self.strength)
        kappa, strength = (a.reshape(*a.shape, *[1] * d) for a in (self.kappa, self.strength))
        return strength * (laplacian + kappa**2) ** self.alpha

    def _channelwise(self, x: Tensor, power: float) -> Tensor:
        scale = self.eigenvalues.unsqueeze(-len(self.grid_shape) - 1)
        return idct(dct(x, len(self.grid_shape)) * scale**power, len(self.grid_shape))

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Marginal variance at each voxel, ``(*batch, C, *shape)``: Σ_k B_vk² / λ_k, larger at the free boundary than inside."""
        d = len(self.grid_shape)
        squared = [cosine_basis(n, None, self.strength.dtype, str(self.strength.device)) ** 2 for n in self.grid_shape]
        variance = along_axes(1 / self.eigenvalues, squared)
        return variance.unsqueeze(-d - 1).expand(self.batch_shape + self.event_shape)

    def precision_matvec(self, x: Tensor) -> Tensor:
        """Λ x, for x of shape ``(..., C, *shape)``."""
        return self._channelwise(x, 1.0)

    def covariance_matvec(self, x: Tensor) -> Tensor:
        """Λ⁻¹ x."""
        return self._channelwise(x, -1.0)

    def whiten(self, value: Tensor) -> Tensor:
        """Λ^½ (v − mean), the symmetric root: independent N(0, 1)."""
        return self._channelwise(value - self.loc, 0.5)

    def unwhiten(self, white: Tensor) -> Tensor:
        """Mean + Λ^-½ w."""
        return self._channelwise(white, -0.5) + self.loc

    def log_det_precision(self) -> Tensor:
        """log |Λ| over all channels, ``(*batch,)``."""
        return self.channels * self.eigenvalues.log().flatten(-len(self.grid_shape)).sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        d = len(self.grid_shape)
        coefficients = dct(value - self.loc, d)
        squares = (coefficients**2 * self.eigenvalues.unsqueeze(-d - 1)).flatten(-d - 1).sum(-1)
        count = self.event_shape.numel()
        return 0.5 * (self.log_det_precision() - squares - count * math.log(2 * math.pi))

    def rsample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        white = torch.randn(shape, dtype=self.strength.dtype, device=self.strength.device)
        d = len(self.grid_shape)
        # White noise is white in any orthonormal basis: draw in the DCT's, and transform once.
        return idct(white * self.eigenvalues.unsqueeze(-d - 1) ** -0.5, d) + self.loc

    def entropy(self) -> Tensor:
        return 0.5 * (self.event_shape.numel() * (1 + math.log(2 * math.pi)) - self.log_det_precision())

    def expand(self, batch_shape: Sequence[int], _instance: GaussianField | None = None) -> GaussianField:
        return self.about(self.loc.expand(torch.Size(batch_shape) + self.event_shape))


@register_kl(GaussianField, GaussianField)  # type: ignore[untyped-decorator]
def _kl_fields(q: GaussianField, p: GaussianField) -> Tensor:
    """KL(q ‖ p) in closed form, nats: on one grid both precisions are diagonal in the DCT.

    Raises:
        ValueError: for fields of different shape.
    """
    if q.event_shape != p.event_shape:
        raise ValueError(f"expected fields of one shape, got {tuple(q.event_shape)} and {tuple(p.event_shape)}")
    d = len(p.grid_shape)
    eigenvalues = p.eigenvalues.unsqueeze(-d - 1)
    each = eigenvalues * (1 / q.eigenvalues.unsqueeze(-d - 1) + dct(q.loc - p.loc, d) ** 2)
    return 0.5 * (each.flatten(-d - 1).sum(-1) - q.event_shape.numel() + q.log_det_precision() - p.log_det_precision())


class ModulatedField(TorchDistribution):
    """A Gaussian over fields whose spread varies in space and whose correlations are smooth: v = m + a ∘ C (s ∘ ε), ε white.

    C is the orthonormal inverse DCT, so its covariance is diag(a) C diag(s²) Cᵀ diag(a), and its density exact at the cost of one transform.
    With s constant it is a normal with independent elements.

    Arguments:
        loc: m, ``(*batch, C, *shape)``.
        amplitude: a > 0, alike.
        spectrum: s > 0, standard deviations of the DCT coefficients, broadcastable to ``loc``.
        ndim: number of axes of ``shape``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, loc: Tensor, amplitude: Tensor, spectrum: Tensor, ndim: int, validate_args: bool | None = None) -> None:
        if amplitude.shape != loc.shape or torch.broadcast_shapes(spectrum.shape, loc.shape) != loc.shape:
            raise ValueError(f"expected amplitude and spectrum for loc {tuple(loc.shape)}, got {tuple(amplitude.shape)} and {tuple(spectrum.shape)}")
        self.loc, self.amplitude, self.spectrum, self.ndim = loc, amplitude, spectrum, ndim
        super().__init__(loc.shape[: -ndim - 1], loc.shape[-ndim - 1 :], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, self.ndim + 1)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Marginal variance of every element."""
        squared = [cosine_basis(n, None, self.loc.dtype, str(self.loc.device)) ** 2 for n in self.event_shape[1:]]
        return self.amplitude**2 * along_axes(self.spectrum.expand(self.loc.shape) ** 2, squared)

    def log_prob(self, value: Tensor) -> Tensor:
        white = dct((value - self.loc) / self.amplitude, self.ndim) / self.spectrum
        each = white**2 + 2 * (self.amplitude.log() + self.spectrum.log()) + math.log(2 * math.pi)
        return -0.5 * each.flatten(-self.ndim - 1).sum(-1)

    def rsample(self, sample_shape: torch.Size | Sequence[int] = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        white = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.amplitude * idct(self.spectrum * white, self.ndim)

    def expand(self, batch_shape: Sequence[int], _instance: ModulatedField | None = None) -> ModulatedField:
        loc, amplitude, spectrum = (x.expand(torch.Size(batch_shape) + self.event_shape) for x in (self.loc, self.amplitude, self.spectrum))
        return ModulatedField(loc, amplitude, spectrum, self.ndim, validate_args=False)


@register_kl(ModulatedField, GaussianField)  # type: ignore[untyped-decorator]
def _kl_modulated(q: ModulatedField, p: GaussianField) -> Tensor:
    """KL(q ‖ p), nats: exact where q's spectrum is constant (independent elements); else all of it but tr Λ Σ, which is estimated, without bias, from
    one draw. The mean's part is exact either way, so that its gradient has no noise."""
    squared = [cosine_basis(n, None, p.strength.dtype, str(p.strength.device)) ** 2 for n in p.grid_shape]
    eigenvalues = p.eigenvalues.unsqueeze(-q.ndim - 1)
    spectrum = q.spectrum.expand(q.loc.shape)
    flat = q.spectrum.flatten(-q.ndim)
    if bool((flat == flat[..., :1]).all()):
        traced = along_axes(eigenvalues, squared) * (q.amplitude * spectrum) ** 2
    else:
        traced = dct(q.amplitude * idct(spectrum * torch.randn_like(q.loc), q.ndim), q.ndim) ** 2 * eigenvalues
    squares = dct(q.loc - p.loc, q.ndim) ** 2 * eigenvalues
    each = (traced + squares - 2 * (q.amplitude.log() + spectrum.log())).flatten(-q.ndim - 1).sum(-1)
    return 0.5 * (each - q.event_shape.numel() - p.log_det_precision())
