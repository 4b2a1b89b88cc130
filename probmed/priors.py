"""Priors of anatomy: where labels are expected, and how far bodies depart from a template.

A label prior is a component whose ``forward(grid)`` returns log p(S_v = k), ``(K, *shape)``, after drawing whatever latents it has. A deformation
prior is a component whose ``forward()`` returns a transform. Any of the first goes into any model that needs labels, any of the second into any
model that deforms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyro
import torch
from pyro.distributions import Normal
from pyro.nn import PyroModule
from torch import Tensor

from probmed.atlases import LabelAtlas
from probmed.distributions import Coupling
from probmed.fields import GaussianField, along_axes
from probmed.grids import Grid, MaskedGrid, channels_last, interpolation_matrices, sample, spline_matrices
from probmed.transforms import Affine, Transform, Velocity

FLOOR = 1e-4
"""Added to every label's probability, so that an atlas never rules a label out (SPM's constant)."""


class DeformationPrior(PyroModule):
    """What every deformation prior has: ``forward()`` draws its latents and returns a transform, mm to mm."""

    def forward(self) -> Transform:
        raise NotImplementedError


class AffinePrior(DeformationPrior):
    """An affine map near a known one: A = start · exp(Σ_n a_n G_n), a_n ~ N(0, s_n²). Site: ``affine``, ``(count,)``.

    Arguments:
        ndim: 2 or 3.
        count: 6 or 7 or 12 parameters in 3D (rigid, similarity, affine); 3, 4 or 6 in 2D.
        start: the matrix ``(d+1, d+1)``, mm to mm.
        centre: the point about which the group acts, mm.
        translation_mm, rotation, log_scale: standard deviations; shears have that of the scales.
    """

    start: Tensor
    centre: Tensor
    sd: Tensor

    def __init__(
        self,
        ndim: int = 3,
        count: int | None = None,
        start: Tensor | None = None,
        centre: Tensor | None = None,
        translation_mm: float = 20.0,
        rotation: float = 0.2,
        log_scale: float = 0.15,
    ) -> None:
        super().__init__()
        rotations = 3 if ndim == 3 else 1
        full = 2 * (ndim + rotations)
        count = full if count is None else count
        sd = torch.tensor([translation_mm] * ndim + [rotation] * rotations + [log_scale] * (ndim + rotations))
        if count not in (ndim + rotations, ndim + rotations + 1, full):
            raise ValueError(f"expected {ndim + rotations}, {ndim + rotations + 1} or {full} parameters in {ndim}D, got {count}")
        self.ndim = ndim
        self.register_buffer("sd", sd[:count])
        self.register_buffer("start", torch.eye(ndim + 1) if start is None else torch.as_tensor(start, dtype=torch.get_default_dtype()))
        self.register_buffer("centre", torch.zeros(ndim) if centre is None else torch.as_tensor(centre, dtype=torch.get_default_dtype()))

    def evaluate(self, parameters: Tensor) -> Affine:
        # The group acts in the atlas, after the start, so that its prior means the same for every scanner's frame.
        moved = Affine.exp(parameters, self.ndim, self.centre).matrix
        return Affine(moved @ self.start.to(parameters))

    def forward(self) -> Transform:
        return self.evaluate(pyro.sample("affine", Normal(torch.zeros_like(self.sd), self.sd).to_event(1)))


class SmoothVelocity(DeformationPrior):
    """exp(v) of a smooth stationary velocity, v ~ GaussianField on a grid. Site: ``velocity``, ``(d, *shape)``, mm.

    Arguments:
        grid: of the velocity; in the space in which the transform starts and ends.
        sd_mm: marginal standard deviation of v.
        length_mm: correlation length 1/κ.
        alpha: smoothness; at least 2 in 3D for continuous paths.
        on: a finer grid with the same axes, on which the flow is made; ``grid`` by default.
        splines: whether v goes from ``grid`` to ``on`` by cubic B-splines, of which it is the coefficients, and not linearly.
        learn: whether the standard deviation and the length are parameters, ``log_sd_mm`` and ``log_length_mm``; λ and κ follow from them.

    References: Rueckert et al., IEEE TMI 1999 (free-form deformations of cubic B-splines).
    """

    def __init__(
        self,
        grid: Grid,
        sd_mm: float = 4.0,
        length_mm: float = 30.0,
        alpha: float = 2.0,
        on: Grid | None = None,
        splines: bool = False,
        learn: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.alpha, self.on, self.splines = grid, alpha, on or grid, splines
        for name, value in (("log_sd_mm", sd_mm), ("log_length_mm", length_mm)):
            tensor = torch.tensor(math.log(value))
            if learn:
                setattr(self, name, torch.nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    @property
    def sd_mm(self) -> float:
        return float(self.log_sd_mm.detach().exp())

    @property
    def length_mm(self) -> float:
        return float(self.log_length_mm.detach().exp())

    def prior(self) -> GaussianField:
        sd, length = self.log_sd_mm.exp(), self.log_length_mm.exp()
        return GaussianField.from_sd(self.grid.shape, self.grid.spacing, sd, length, self.alpha, self.grid.ndim)

    def evaluate(self, velocity: Tensor) -> Velocity:
        if self.on == self.grid and not self.splines:
            return Velocity(self.grid, velocity)
        matrices = spline_matrices if self.splines else interpolation_matrices
        return Velocity(self.on, along_axes(velocity, matrices(self.grid, self.on, velocity)))

    def forward(self) -> Velocity:
        return self.evaluate(pyro.sample("velocity", self.prior()))


class AffineVelocity(DeformationPrior):
    """A ∘ exp(v): the flow first, in the world in which the transform starts, then the affine map.

    Sites: those of both, ``affine`` and ``velocity`` of the usual ones.

    Arguments:
        affine, deformation: any two deformation priors whose sites have different names.
    """

    def __init__(self, affine: DeformationPrior, deformation: DeformationPrior) -> None:
        super().__init__()
        self.affine, self.deformation = affine, deformation

    def forward(self) -> Transform:
        return self.affine() @ self.deformation()


@dataclass(frozen=True)
class Motion:
    """How a deformable label prior moves voxels, linearised at given latents.

    Arguments:
        positions: where each voxel is looked up in the atlas's world, ``(N, d)`` mm.
        affine: derivative of the position in each affine parameter, ``(N, d, count)``, and ``affine_sd`` their prior's, ``(count,)``; or None.
        nodes: the velocity's node nearest to each voxel's path, ``(N,)`` flat, and ``field`` the velocity's prior; or None. A voxel's position moves
            with that node one to one: the velocity is smooth on the scale of its own spacing.
        log_labels: log T_k at positions, ``(K, N)``.
    """

    positions: Tensor
    affine: Tensor | None
    affine_sd: Tensor | None
    nodes: Tensor | None
    field: GaussianField | None
    log_labels: Callable[[Tensor], Tensor]


class LabelPrior(PyroModule):
    """What every label prior has: the names of its labels, in order, and the coupling of neighbouring labels, if any."""

    names: tuple[str, ...]
    coupling: Coupling | None = None

    def forward(self, grid: Grid | MaskedGrid) -> Tensor:
        """log p(S_v = k) on a grid, ``(K, *shape)``."""
        raise NotImplementedError

    def motion(self, state: Mapping[str, Tensor], grid: Grid | MaskedGrid) -> Motion | None:
        """The prior's movement at given latents; None where it does not move."""
        return None


class FixedAtlas(LabelPrior):
    """An atlas where it lies, or moved by a known transform (world of the scan to world of the atlas). No sites."""

    log_probabilities: Tensor

    def __init__(self, atlas: LabelAtlas, transform: Transform | None = None, floor: float = FLOOR) -> None:
        super().__init__()
        self.names, self.grid, self.transform = atlas.names, atlas.grid, transform
        probabilities = atlas.probabilities.to(torch.get_default_dtype()) + floor
        self.register_buffer("probabilities", channels_last(probabilities / probabilities.sum(0)))

    def at(self, points: Tensor) -> Tensor:
        """log T_k at points of the atlas's world, ``(K, *size)``; beyond its edge the nearest voxel's."""
        probabilities: Tensor = self.probabilities  # type: ignore[assignment]
        return sample(probabilities.to(points), self.grid, points, fill="edge").log()

    def forward(self, grid: Grid | MaskedGrid) -> Tensor:
        probabilities: Tensor = self.probabilities  # type: ignore[assignment]
        points = grid.coordinates(probabilities.dtype, probabilities.device)
        return self.at(points if self.transform is None else self.transform(points))


class DeformableAtlas(LabelPrior):
    """An atlas moved to fit: p(S | φ) p(φ), φ = exp(v) ∘ A from the scan's world to the atlas's.

    .. math:: A \\sim p(A), \\quad v \\sim p(v), \\quad p(S_x = k) = T_k(\\exp(v)(A x))

    Sites: those of ``affine`` and ``deformation``.

    Arguments:
        atlas: T.
        affine: a component that returns an ``Affine``; the default is ``AffinePrior`` about the atlas's centre, None for the identity.
        deformation: a component that returns a transform of the atlas's world; None for none.
    """

    def __init__(
        self, atlas: LabelAtlas, affine: AffinePrior | str | None = "default", deformation: SmoothVelocity | None = None, floor: float = FLOOR
    ) -> None:
        super().__init__()
        self.names = atlas.names
        self.atlas = FixedAtlas(atlas, floor=floor)
        if isinstance(affine, str):
            middle = atlas.grid.voxel_to_world((torch.tensor(atlas.grid.shape, dtype=torch.float64) - 1) / 2)
            affine = AffinePrior(atlas.grid.ndim, centre=middle)
        self.affine, self.deformation = affine, deformation

    def transform(self) -> Transform:
        """Draw φ: world of the scan to world of the atlas."""
        affine: Transform = Affine.identity(self.atlas.grid.ndim) if self.affine is None else self.affine()
        return affine if self.deformation is None else self.deformation() @ affine

    def motion(self, state: Mapping[str, Tensor], grid: Grid | MaskedGrid) -> Motion | None:
        probabilities: Tensor = self.atlas.probabilities  # type: ignore[assignment]
        points = grid.coordinates(probabilities.dtype, probabilities.device).flatten(0, -2)
        derivative = sd = nodes = field = None
        if self.affine is not None:
            parameters, moved, d = state["affine"], self.affine.evaluate, points.shape[-1]
            by_matrix = torch.autograd.functional.jacobian(lambda a: moved(a).matrix, parameters)
            derivative = torch.einsum("abp,nb->nap", by_matrix[:d, :d], points) + by_matrix[:d, d]
            points, sd = moved(parameters)(points), self.affine.sd
        if self.deformation is not None:
            half = self.deformation.evaluate(state["velocity"] / 2).exp(both=False)
            middle = half(points)
            lattice = self.deformation.grid
            last = torch.tensor(lattice.shape, device=points.device) - 1
            index = torch.minimum(lattice.world_to_voxel(middle).round().long().clamp_min(0), last)
            strides = torch.tensor([math.prod(lattice.shape[a + 1 :]) for a in range(lattice.ndim)], device=points.device)
            nodes, field = index @ strides, self.deformation.prior()
            if derivative is not None:
                # What the affine map moves, the flow carries on: its Jacobian at each point, a row for each coordinate.
                leaf = points.detach().requires_grad_()
                with torch.enable_grad():
                    ends = half(half(leaf))
                rows = [torch.autograd.grad(end.sum(), leaf, retain_graph=True)[0] for end in ends.unbind(-1)]
                derivative = torch.stack(rows, 1) @ derivative
            points = half(middle)
        return Motion(points, derivative, sd, nodes, field, self.atlas.at)

    def forward(self, grid: Grid | MaskedGrid) -> Tensor:
        probabilities: Tensor = self.atlas.probabilities  # type: ignore[assignment]
        return self.atlas.at(self.transform()(grid.coordinates(probabilities.dtype, probabilities.device)))


class MarkovField(LabelPrior):
    """Another label prior with neighbours that tend to agree (Potts): p(S) ∝ Π_v π_v(S_v) exp(−β Σ_ij w_ij [S_i ≠ S_j]).

    The labels can no longer be summed out exactly; the mixture then gives the mean-field lower bound of the log evidence in nats
    (``Coupling.bound``), whose normaliser is bounded by one. On a ``MaskedGrid`` voxels have no neighbours and labels are independent: that is
    how the other latents are fitted on a subsample.

    Arguments:
        labels: the prior of single voxels.
        strength: β, nats for each pair of neighbours.
    """

    def __init__(self, labels: LabelPrior, strength: float = 0.3, sweeps: int = 8) -> None:
        super().__init__()
        self.labels, self.names, self.strength, self.sweeps = labels, labels.names, strength, sweeps

    def motion(self, state: Mapping[str, Tensor], grid: Grid | MaskedGrid) -> Motion | None:
        return self.labels.motion(state, grid)

    def forward(self, grid: Grid | MaskedGrid) -> Tensor:
        self.coupling = None if isinstance(grid, MaskedGrid) else Coupling(self.strength, grid.spacing, self.sweeps)
        return self.labels(grid)
