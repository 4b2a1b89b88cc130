"""Transforms: maps from the world to the world, in millimetres.

A transform is called on points ``(..., d)`` and returns points. Images are warped by pulling: ``warped(x) = image(phi(x))``, so the
transform that brings a moving image onto a fixed grid maps fixed world to moving world. ``a @ b`` is a after b.

Diffeomorphisms are ``exp(v)``, the time-one flow of a stationary velocity field, by scaling and squaring (Arsigny et al., MICCAI
2006); the inverse is ``exp(-v)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from probmed.grids import Grid, sample


class Transform:
    """A differentiable map of world points, mm to mm."""

    @property
    def ndim(self) -> int:
        raise NotImplementedError

    def __call__(self, points: Tensor) -> Tensor:
        """Points ``(..., d)`` in mm to points ``(..., d)`` in mm."""
        raise NotImplementedError

    def inverse(self) -> Transform:
        raise NotImplementedError

    def __matmul__(self, other: Transform) -> Transform:
        """``(a @ b)(x) = a(b(x))``."""
        if not isinstance(other, Transform):
            return NotImplemented
        if isinstance(self, Affine) and isinstance(other, Affine):
            return Affine(self.matrix @ other.matrix)
        return Composition((self, other))

    def displacement_on(self, grid: Grid, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Displacement:
        """The same map as one displacement field on a grid."""
        points = grid.coordinates(dtype, device)
        return Displacement(grid, (self(points) - points).movedim(-1, -grid.ndim - 1))

    def jacobian(self, grid: Grid, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
        """Matrix of derivatives d phi_a / d x_b in physical space by finite differences on a grid, ``(*batch, *shape, d, d)``."""
        return physical_gradient(self(grid.coordinates(dtype, device)), grid)

    def jacobian_determinant(
        self, grid: Grid, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Tensor:
        """det of the physical Jacobian at the voxels of a grid, ``(*batch, *shape)``; below or at zero the map folds."""
        return determinant(self.jacobian(grid, dtype, device))


@dataclass(frozen=True, eq=False)
class Affine(Transform):
    """x ↦ M x in homogeneous coordinates.

    Arguments:
        matrix: ``(*batch, d+1, d+1)``, mm to mm.
    """

    matrix: Tensor

    def __post_init__(self) -> None:
        if self.matrix.shape[-1] != self.matrix.shape[-2] or self.matrix.shape[-1] not in (3, 4):
            raise ValueError(f"expected a matrix of shape (..., d+1, d+1) with d 2 or 3, got {tuple(self.matrix.shape)}")

    @property
    def ndim(self) -> int:
        return self.matrix.shape[-1] - 1

    @classmethod
    def identity(cls, ndim: int, dtype: torch.dtype = torch.float64) -> Affine:
        return cls(torch.eye(ndim + 1, dtype=dtype))

    @classmethod
    def exp(cls, parameters: Tensor, ndim: int = 3, centre: Tensor | None = None) -> Affine:
        """The matrix exponential of Lie-algebra coordinates.

        Arguments:
            parameters: ``(*batch, n)``: translations (mm), rotations (radians), then optionally one log scale (similarity), or
                d log scales and the d(d-1)/2 shears (affine): n = 6, 7 or 12 in 3D and 3, 4 or 6 in 2D.
            centre: the point ``(d,)`` about which rotation, scaling and shear act, mm; the origin by default.
        """
        generators = _generators(ndim, parameters.shape[-1]).to(parameters)
        matrix = torch.linalg.matrix_exp(torch.einsum("...n,nij->...ij", parameters, generators))
        if centre is not None:
            d = matrix.shape[-1] - 1
            shift = torch.eye(d + 1, dtype=matrix.dtype, device=matrix.device)
            shift[:d, d] = centre.to(matrix)
            matrix = shift @ matrix @ torch.linalg.inv(shift)
        return cls(matrix)

    def log(self, centre: Tensor | None = None) -> Tensor:
        """The Lie-algebra coordinates of which this map is the exponential, ``Affine.exp(map.log(centre), map.ndim, centre)``.

        Arguments:
            centre: the point ``(d,)`` about which rotation, scaling and shear act, mm; the origin by default.

        Returns:
            ``(*batch, 6)`` in 2D or ``(*batch, 12)`` in 3D, float64: translations (mm), rotations (radians), log scales and shears.

        Raises:
            ValueError: for a map that is no exponential: it mirrors, or turns by half a turn.
        """
        d = self.ndim
        matrix = self.matrix.detach().cpu().double()
        values = torch.linalg.eigvals(matrix[..., :d, :d])
        if bool(((values.real <= 0) & (values.imag.abs() < 1e-8 * values.abs().clamp_min(1e-300))).any()):
            raise ValueError("expected an affine map near the identity, got one that mirrors or turns by half a turn and has no real logarithm")
        shift = torch.eye(d + 1, dtype=torch.float64)
        if centre is not None:
            shift[:d, d] = centre.detach().cpu().double()
        found = _matrix_log(torch.linalg.inv(shift) @ matrix @ shift)[..., :d, :].flatten(-2)
        generators = _generators(d, d * (d + 1))[:, :d].flatten(1)
        return torch.linalg.solve(generators.mT, found[..., None])[..., 0]

    def __call__(self, points: Tensor) -> Tensor:
        d = self.ndim
        matrix = self.matrix.to(points)
        if matrix.ndim == 2:
            return points @ matrix[:d, :d].T + matrix[:d, d]
        lead = matrix.ndim - 2
        between = points.ndim - 1 if points.ndim - 1 < lead or points.shape[:lead] != matrix.shape[:lead] else points.ndim - 1 - lead
        matrix = matrix.reshape(*matrix.shape[:lead], *([1] * between), d + 1, d + 1)
        return (matrix[..., :d, :d] @ points[..., None])[..., 0] + matrix[..., :d, d]

    def inverse(self) -> Affine:
        return Affine(torch.linalg.inv(self.matrix))


@dataclass(frozen=True, eq=False)
class Displacement(Transform):
    """x ↦ x + u(x), u sampled on a grid, in millimetres of the world; beyond the grid it keeps its value at the edge.

    Arguments:
        grid: where the field is sampled.
        field: ``(*batch, d, *shape)``, mm.
        opposite: the inverse's field on the same grid, where it is known (``Velocity.exp`` gives it).
    """

    grid: Grid
    field: Tensor
    opposite: Tensor | None = None

    def __post_init__(self) -> None:
        _check_field(self.grid, self.field)

    @property
    def ndim(self) -> int:
        return self.grid.ndim

    def __call__(self, points: Tensor) -> Tensor:
        return points + _sample_vectors(self.field, self.grid, points)

    def inverse(self) -> Displacement:
        """The known inverse, or else the fixed point u⁻(x) = -u(x + u⁻(x)), iterated until it moves by less than 1e-4 mm.

        Raises:
            ValueError: where the field has no inverse to that accuracy (it folds).
        """
        if self.opposite is not None:
            return Displacement(self.grid, self.opposite, self.field)
        points = self.grid.coordinates(self.field.dtype, self.field.device)
        back = -self.field.movedim(-self.ndim - 1, -1)
        # A damped iteration converges for every Lipschitz constant below one and for moderately compressive fields beyond it.
        for _ in range(200):
            update = -_sample_vectors(self.field, self.grid, points + back) - back
            back = back + 0.75 * update
            if update.abs().max() < 1e-4:
                return Displacement(self.grid, back.movedim(-1, -self.ndim - 1), self.field)
        raise ValueError(f"the displacement has no inverse: the fixed point still moves by {update.abs().max():.3g} mm")

    def with_exact_inverse(self, sweeps: int = 20, tolerance: float = 0.02) -> Displacement:
        """With an inverse that undoes this field at every node, and not only in the limit of small steps as exp(−v) does for exp(v).

        Each sweep is one of the fixed point u⁻(x) = −u(x + u⁻(x)), from the inverse that is known, damped so that it converges also where the field
        stretches space to more than twice its size. Of each node the best is kept: where paths leave the grid there may be no exact one.

        Arguments:
            sweeps: at most. tolerance: it ends where hardly a node (one in 10,000) is off by more, in voxels of the smallest side.

        Raises:
            ValueError: where none is known.
        """
        if self.opposite is None:
            raise ValueError("expected a displacement with a known inverse to start from; inverse() finds one from nothing")
        points = self.grid.coordinates(self.field.dtype, self.field.device)
        channel = -self.ndim - 1

        def residual(back: Tensor) -> tuple[Tensor, Tensor]:
            off = -sample(self.field, self.grid, points + back.movedim(channel, -1), fill="edge") - back
            return off, off.norm(dim=channel, keepdim=True)

        trial = back = self.opposite
        off, least = residual(trial)
        for _ in range(sweeps):
            if float((least > tolerance * min(self.grid.spacing)).float().mean()) < 1e-4:
                break
            trial = trial + 0.75 * off
            off, size = residual(trial)
            back, least = torch.where(size < least, trial, back), torch.minimum(size, least)
        return Displacement(self.grid, self.field, back)

    def after(self, other: Displacement) -> Displacement:
        """This map after another one on the same grid, as one field: u_other + u ∘ (id + u_other)."""
        if other.grid != self.grid:
            raise ValueError("expected displacements on one grid")
        there = self.grid.coordinates(self.field.dtype, self.field.device) + other.field.movedim(-self.ndim - 1, -1)
        return Displacement(self.grid, other.field + sample(self.field, self.grid, there, fill="edge"))

    def displacement_on(self, grid: Grid, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Displacement:
        return self if grid == self.grid else super().displacement_on(grid, dtype, device or self.field.device)


@dataclass(frozen=True, eq=False)
class Velocity(Transform):
    """The flow exp(v) of a stationary velocity field.

    Arguments:
        grid: where the field is sampled.
        field: ``(*batch, d, *shape)``, mm per unit of time.
    """

    grid: Grid
    field: Tensor

    def __post_init__(self) -> None:
        _check_field(self.grid, self.field)

    @property
    def ndim(self) -> int:
        return self.grid.ndim

    def squarings(self) -> int:
        """Number of squarings, so that the first step moves no point by more than a quarter of the smallest voxel."""
        largest = self.field.detach().abs().amax().item()
        if not math.isfinite(largest):
            raise ValueError("the velocity field holds a NaN or an infinity")
        step = 0.25 * min(self.grid.spacing)
        return max(1, math.ceil(math.log2(max(largest / step, 1.0)) + 1e-9)) if largest > 0 else 0

    def exp(self, both: bool = True) -> Displacement:
        """exp(v) as a displacement on the velocity's own grid, with its inverse exp(-v) unless ``both`` is false."""
        n = self.squarings()
        forward = _square(self.field / 2**n, self.grid, n)
        return Displacement(self.grid, forward, _square(-self.field / 2**n, self.grid, n) if both else None)

    def __call__(self, points: Tensor) -> Tensor:
        return self.exp(both=False)(points)

    def inverse(self) -> Velocity:
        return Velocity(self.grid, -self.field)


@dataclass(frozen=True, eq=False)
class Composition(Transform):
    """``transforms[0]`` after ``transforms[1]`` after …"""

    transforms: tuple[Transform, ...]

    def __post_init__(self) -> None:
        flat: list[Transform] = []
        for transform in self.transforms:
            flat.extend(transform.transforms if isinstance(transform, Composition) else [transform])
        if len({transform.ndim for transform in flat}) != 1:
            raise ValueError("expected transforms of one dimension, got " + str([transform.ndim for transform in flat]))
        object.__setattr__(self, "transforms", tuple(flat))

    @property
    def ndim(self) -> int:
        return self.transforms[0].ndim

    def __call__(self, points: Tensor) -> Tensor:
        for transform in reversed(self.transforms):
            points = transform(points)
        return points

    def inverse(self) -> Composition:
        return Composition(tuple(transform.inverse() for transform in reversed(self.transforms)))


def warp(
    image: Tensor, source: Grid, transform: Transform, target: Grid, mode: str = "linear", fill: float | str = 0.0
) -> Tensor:
    """``image(transform(x))`` at the voxels x of ``target``.

    Arguments:
        image: ``(C, *source.shape)`` or ``(B, C, *source.shape)``; labels are warped with ``mode="nearest"``.
        transform: target world to source world.

    Returns:
        ``(C, *target.shape)`` or ``(B, C, *target.shape)``.
    """
    dtype = image.dtype if image.is_floating_point() else torch.float32
    return sample(image.to(dtype), source, transform(target.coordinates(dtype, image.device)), mode, fill).to(image.dtype)


def _check_field(grid: Grid, field: Tensor) -> None:
    d = grid.ndim
    if field.ndim not in (d + 1, d + 2) or tuple(field.shape[-d:]) != grid.shape or field.shape[-d - 1] != d:
        raise ValueError(f"expected a field of shape ({d}, *{grid.shape}) or (B, {d}, *{grid.shape}), got {tuple(field.shape)}")


def _sample_vectors(field: Tensor, grid: Grid, points: Tensor) -> Tensor:
    """A vector field at points: ``(*batch, *size, d)``."""
    out = sample(field, grid, points, fill="edge")
    return out.movedim(-(points.ndim - 1) - 1 if field.ndim == grid.ndim + 1 else 1, -1)


def _square(field: Tensor, grid: Grid, times: int) -> Tensor:
    """u ← u + u∘(id + u), ``times`` times."""
    for _ in range(times):
        step = Displacement(grid, field)
        field = step.after(step).field
    return field


def physical_gradient(values: Tensor, grid: Grid) -> Tensor:
    """Central differences of ``(*batch, *shape, C)`` along the world's axes, mm⁻¹: ``(*batch, *shape, C, d)``."""
    d = grid.ndim
    if min(grid.shape) < 2:
        raise ValueError(f"a Jacobian needs at least two voxels along each axis, got shape {grid.shape}")
    axes = tuple(range(values.ndim - 1 - d, values.ndim - 1))
    index_gradient = torch.stack(torch.gradient(values, dim=axes), -1)
    return index_gradient @ grid.inverse_affine[:d, :d].to(values)


def determinant(jacobian: Tensor) -> Tensor:
    """Determinant of 2×2 or 3×3 matrices written out: twenty times faster than a batched LU at these sizes."""
    a = jacobian
    if a.shape[-1] == 2:
        return a[..., 0, 0] * a[..., 1, 1] - a[..., 0, 1] * a[..., 1, 0]
    return (a[..., 0, :] * torch.linalg.cross(a[..., 1, :], a[..., 2, :], dim=-1)).sum(-1)


def _matrix_log(matrix: Tensor, roots: int = 8) -> Tensor:
    """The principal logarithm of matrices ``(*batch, n, n)`` without eigenvalues that are zero or negative.

    Square roots until the matrix is near the identity (Denman and Beavers' iteration, in its product form), then Gregory's series
    log M = 2 Σ_k X^(2k+1) / (2k+1), X = (M − I)(M + I)⁻¹.

    References: Higham, Functions of Matrices, 2008, chapters 6 and 11.
    """
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype)
    root = matrix
    for _ in range(roots):
        product = root
        for _ in range(50):
            inverse = torch.linalg.inv(product)
            root = root @ (identity + inverse) / 2
            product = (identity + (product + inverse) / 2) / 2
            if float((product - identity).abs().max()) < 1e-14:
                break
    x = torch.linalg.solve(root + identity, root - identity)
    total, power = x, x
    for k in range(1, 8):
        power = power @ x @ x
        total = total + power / (2 * k + 1)
    return 2.0 ** (roots + 1) * total


@lru_cache
def _generators(d: int, count: int) -> Tensor:
    """Basis of the Lie algebra: translations, rotations, then one scale or all scales and shears; ``(count, d+1, d+1)``."""
    pairs = [(1, 2), (0, 2), (0, 1)] if d == 3 else [(0, 1)]
    rigid = d + len(pairs)
    full = rigid + d + len(pairs)
    if count not in (rigid, rigid + 1, full):
        raise ValueError(f"expected {rigid} (rigid), {rigid + 1} (similarity) or {full} (affine) parameters in {d}D, got {count}")
    cells: list[list[tuple[int, int, float]]] = [[(axis, d, 1.0)] for axis in range(d)]
    cells += [[(row, column, -1.0), (column, row, 1.0)] for row, column in pairs]
    if count == rigid + 1:
        cells.append([(axis, axis, 1.0) for axis in range(d)])
    elif count == full:
        cells += [[(axis, axis, 1.0)] for axis in range(d)]
        cells += [[(row, column, 1.0), (column, row, 1.0)] for row, column in pairs]
    basis = torch.zeros(count, d + 1, d + 1, dtype=torch.float64)
    for index, entries in enumerate(cells):
        for row, column, value in entries:
            basis[index, row, column] = value
    return basis
