"""The registration model's linearisation against autograd and dense algebra, and `register` against known deformations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from phantoms import bend, flowed, head
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor

from probmed.fields import GaussianField, dct
from probmed.grids import Grid, sample
from probmed.inference.em import log_joint
from probmed.inference.gauss_newton import ascend_field
from probmed.models.registration import (
    HalfFlow,
    ImageTerm,
    LandmarkTerm,
    Linearisation,
    Linearised,
    PointLinearisation,
    Registration,
    Term,
    carried,
    linearise,
    linearise_both_ways,
    linearise_terms,
)
from probmed.priors import SmoothVelocity
from probmed.similarities import ConditionalMixture, GaussianNoise, LabelAgreement, Landmarks, LocalCorrelation, Similarity, StudentNoise
from probmed.transforms import Affine, Velocity
from probmed.volumes import UnusableInput, Volume
from probmed.workflows.registration import PointPairs, RegistrationResult, RegistrationSettings, register
from probmed.workflows.registration_fit import SIMILARITIES, independent_share, prior_scales

DIMENSIONS = pytest.mark.parametrize("d", [2, 3])
NAMES = pytest.mark.parametrize("name", SIMILARITIES)


def likeness(name: str, d: int) -> Similarity:
    kinds = {
        "correlation": LocalCorrelation(2, ndim=d),
        "gaussian": GaussianNoise(tempering=0.6),
        "student": StudentNoise(),
        "mixture": ConditionalMixture(8, (-0.2, 1.8)),
    }
    return kinds[name]


def waves(points: Tensor, phase: float = 0.0) -> Tensor:
    """A smooth image ``(1, *size)`` without edges."""
    x, y = 0.15 * points[..., 0], 0.15 * points[..., 1]
    image = 0.7 + 0.3 * torch.sin(x + 0.4 * torch.sin(y) + phase) * torch.cos(0.8 * y + 0.3 + phase) + 0.1 * torch.cos(0.15 * points.sum(-1))
    return image[None]


def smooth_pair(d: int, size: int) -> tuple[Tensor, Tensor, Grid, Tensor]:
    """Moving and fixed image, grid of 48 mm, and a smooth velocity of unit size that leaves the faces alone."""
    grid = Grid.from_spacing((size,) * d, 48 / size)
    x = grid.coordinates(torch.float64)
    return waves(x), waves(x, 0.2), grid, bend(x, grid, 1.0).movedim(-1, 0)


def rough(d: int, coarse: bool) -> tuple[Linearisation, Grid, Grid]:
    """A small linearisation with missing voxels in both images; the velocity on a lattice of its own, or on the image's."""
    generator = torch.Generator().manual_seed(1)
    grid = Grid.from_spacing((8, 7, 6)[:d], (1.0, 1.5, 2.0)[:d])
    lattice = grid.at_spacing([2.0, 3.0, 4.0][:d]) if coarse else grid
    moving, fixed = torch.rand(2, 1, *grid.shape, generator=generator).unbind(0)
    moving[0, 0], fixed[0, -1] = math.nan, math.nan
    velocity = 0.3 * torch.randn(d, *lattice.shape, generator=generator)
    return linearise(GaussianNoise(), lattice, velocity, moving, fixed, grid), lattice, grid


# The linearised likelihood.


@pytest.mark.usefixtures("float64")
@DIMENSIONS
@NAMES
def test_the_value_is_the_model_s_own_log_density_less_the_velocity_s(d: int, name: str) -> None:
    moving, fixed, grid, unit = smooth_pair(d, 14)
    similarity, velocity = likeness(name, d), 6.0 * unit
    prior = SmoothVelocity(grid, 2.0, 16.0)
    near = linearise(similarity, grid, velocity, moving, fixed, grid)
    state = {"velocity": velocity, **near.latents}
    expected = log_joint(Registration(prior, similarity), state, moving, grid, grid, fixed) - prior.prior().log_prob(velocity)
    assert near.log_joint == pytest.approx(float(expected), rel=1e-9)
    again = linearise(similarity, grid, velocity, moving, fixed, grid, near.latents)
    assert again.log_joint >= near.log_joint - 1e-9


def discrepancy(size: int, size_mm: float, similarity: Similarity, d: int = 2) -> float:
    """Norm of the difference to autograd's gradient, relative to that, in the broad directions that a prior leaves, away from the faces (where
    autograd sees no slope beyond the outermost centres)."""
    moving, fixed, grid, unit = smooth_pair(d, size)
    velocity = size_mm * unit
    near = linearise(similarity, grid, velocity, moving, fixed, grid)
    free = velocity.clone().requires_grad_()
    moved = carried(moving, grid, Velocity(grid, free), grid)
    value = similarity.tempering * similarity.distribution(moved, near.latents).log_prob(fixed).sum()
    (exact,) = torch.autograd.grad(value, free)
    window = torch.cos(math.pi * grid.coordinates(torch.float64) / 48).square().prod(-1)
    broad = (slice(None), *[slice(5)] * d)
    difference, whole = (dct(g * window, d)[broad].norm() for g in (near.gradient - exact, exact))
    return float(difference / whole)


@pytest.mark.usefixtures("float64")
@NAMES
def test_the_gradient_is_autograd_s_to_second_order_in_the_velocity(name: str) -> None:
    large, medium, small = (discrepancy(96, size, likeness(name, 2)) for size in (12.0, 6.0, 3.0))
    assert medium < 0.08
    assert small < 0.03
    # A quarter of the velocity has a sixteenth of the midpoint rule's error, beside what the grid leaves; were it of first order, a quarter.
    assert large > 7 * small


@pytest.mark.usefixtures("float64")
def test_the_gradient_s_error_falls_with_the_grid_s_spacing() -> None:
    coarse, medium, fine = (discrepancy(size, 2.0, GaussianNoise()) for size in (24, 48, 96))
    assert coarse < 0.06
    assert coarse > 2 * medium > 3 * fine


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_the_gradient_in_three_dimensions() -> None:
    coarse, fine = (discrepancy(size, 3.0, GaussianNoise(), 3) for size in (18, 36))
    assert fine < 0.05
    assert coarse > 1.8 * fine


@pytest.mark.usefixtures("float64")
@DIMENSIONS
@pytest.mark.parametrize("coarse", [False, True])
def test_precision_root_and_bound_are_one_positive_matrix(d: int, coarse: bool) -> None:
    near, lattice, grid = rough(d, coarse)
    count, voxels = d * lattice.numel, math.prod(near.elements)
    units = torch.eye(count).reshape(count, d, *lattice.shape)
    precision = near.precision(units).flatten(1)
    torch.testing.assert_close(precision, precision.T)
    assert torch.linalg.eigvalsh(precision).min() > -1e-9 * precision.diagonal().max()
    # Written out: Pᵀ ∇m h ∇mᵀ P with P the interpolation of a velocity at the image's voxels.
    interpolation = torch.stack([sample(u, lattice, grid.coordinates(torch.float64), fill="edge") for u in units])
    along = (near.slopes[0] * interpolation).sum(1).flatten(1)
    torch.testing.assert_close(precision, along @ torch.diag(near.curvature.flatten()) @ along.T)
    root = near.precision_root(torch.eye(voxels).reshape(voxels, *near.elements)).flatten(1)
    torch.testing.assert_close(root.T @ root, precision)
    blocks = near.blocks()
    bound = torch.einsum("de...,be...->bd...", blocks, units).flatten(1)
    spectrum = torch.linalg.eigvalsh(bound - precision)
    assert spectrum.min() > -1e-9 * precision.diagonal().max()
    if not coarse:
        torch.testing.assert_close(bound, precision)
    else:
        assert spectrum.max() > 1e-3


@pytest.mark.usefixtures("float64")
@DIMENSIONS
def test_the_gradient_on_a_lattice_is_that_of_the_interpolated_velocity(d: int) -> None:
    """Pᵀ of the gradient on the image's grid, where nothing moves and both are exact."""
    moving, fixed, grid, _ = smooth_pair(d, 12)
    lattice = grid.at_spacing(8.0)
    near = linearise(GaussianNoise(), lattice, torch.zeros(d, *lattice.shape), moving, fixed, grid)
    fine = linearise(GaussianNoise(), grid, torch.zeros(d, *grid.shape), moving, fixed, grid)
    units = torch.eye(d * lattice.numel).reshape(-1, d, *lattice.shape)
    interpolation = torch.stack([sample(u, lattice, grid.coordinates(torch.float64), fill="edge") for u in units])
    expected = (interpolation * fine.gradient).flatten(1).sum(1)
    torch.testing.assert_close(near.gradient.flatten(), expected)
    assert near.log_joint == pytest.approx(fine.log_joint)


@pytest.mark.usefixtures("float64")
@DIMENSIONS
@NAMES
def test_missing_voxels_say_nothing(d: int, name: str) -> None:
    moving, fixed, grid, unit = smooth_pair(d, 12)
    similarity, velocity = likeness(name, d), 2.0 * unit
    half = (slice(None), slice(0, 6))
    fixed[half] = math.nan
    near = linearise(similarity, grid, velocity, moving, fixed, grid)
    assert math.isfinite(near.log_joint)
    for part in (near.gradient, near.curvature, near.slopes, near.blocks()):
        assert not part.isnan().any()
    # What is more than a step of the flow away from the known half has no force on it, and no weight.
    away = (slice(None), slice(0, 3))
    assert (near.gradient[away] == 0).all()
    assert (near.curvature[away] == 0).all()
    assert (near.gradient[:, 7:-1] != 0).any()
    # And what the moving image is there makes no difference (the correlation's windows included).
    other = moving.clone()
    other[away] += 5.0
    same = linearise(similarity, grid, velocity, other, fixed, grid)
    assert same.log_joint == pytest.approx(near.log_joint)
    everywhere = linearise(similarity, grid, velocity, moving, torch.full_like(fixed, math.nan), grid, near.latents)
    assert (everywhere.gradient == 0).all()
    assert (everywhere.curvature == 0).all()


@pytest.mark.usefixtures("float64")
def test_a_missing_voxel_of_the_moving_image_reaches_no_further_than_its_neighbours() -> None:
    moving, fixed, grid, unit = smooth_pair(2, 16)
    still = torch.zeros_like(unit)
    whole = linearise(GaussianNoise(), grid, still, moving, fixed, grid)
    moving[0, 8, 8] = math.nan
    near = linearise(GaussianNoise(), grid, still, moving, fixed, grid, whole.latents)
    changed = ((near.curvature != 0) != (whole.curvature != 0))[0]
    assert changed[8, 8]
    changed[7:10, 7:10] = False
    assert not changed.any()


# Landmarks and labels.


def turned(d: int) -> Affine:
    return Affine.exp(torch.tensor([3.0, -2.0, 1.0, 0.2, -0.1, 0.3] if d == 3 else [3.0, -2.0, 0.3], dtype=torch.float64), d)


def scattered(d: int, count: int = 7, seed: int = 0) -> Tensor:
    """Points well inside ``smooth_pair``'s field of view, mm."""
    return 28 * torch.rand(count, d, generator=torch.Generator().manual_seed(seed)) - 14


def segmentation(points: Tensor, shift: float = 0.0) -> Tensor:
    """Three smooth label probabilities, ``(3, *size)``."""
    x, y = 0.2 * points[..., 0] + shift, 0.2 * points[..., 1]
    return torch.stack([torch.sin(x), torch.cos(y + 0.5 * x), 0.5 * torch.sin(x - y)]).mul(2).softmax(0)


def everything(d: int, size: int = 12) -> tuple[list[Term], Grid, Tensor]:
    """An image, labels and landmarks of which one was not found; the grid, and a velocity."""
    moving, fixed, grid, unit = smooth_pair(d, size)
    x = grid.coordinates(torch.float64)
    labels = torch.nn.functional.one_hot(segmentation(x, 0.3).argmax(0), 3).movedim(-1, 0).double()
    labels[:, 0] = math.nan
    landmarks = turned(d)(scattered(d)) + 0.5
    landmarks[2] = math.nan
    terms: list[Term] = [
        ImageTerm(GaussianNoise(tempering=0.6), moving, fixed, grid),
        ImageTerm(LabelAgreement(3, tempering=0.2), segmentation(x), labels, grid),
        LandmarkTerm(Landmarks(0.7, certainty=4.0), scattered(d), landmarks, turned(d)),
    ]
    return terms, grid, 4.0 * unit


@pytest.mark.usefixtures("float64")
@DIMENSIONS
def test_the_terms_sum_to_the_model_s_own_log_density(d: int) -> None:
    """Landmarks, labels and image observed together; the affine map is a part of the model's deformation here."""
    (image, labels, points), grid, velocity = everything(d)
    assert isinstance(image, ImageTerm) and isinstance(labels, ImageTerm) and isinstance(points, LandmarkTerm)
    assert isinstance(labels.similarity, LabelAgreement)
    still = replace(points, affine=Affine.identity(d))
    near = linearise_terms([image, labels, still], grid, velocity)
    prior = SmoothVelocity(grid, 2.0, 16.0)
    model = Registration(prior, image.similarity, points.similarity, labels.similarity)
    state = {"velocity": velocity, **near.latents}
    assert set(near.latents) == {"noise", "error", "landmark_scale"}
    observed: dict[str, Any] = {"points": points.points, "landmarks": points.landmarks, "moving_labels": labels.moving, "labels": labels.fixed}
    expected = log_joint(partial(model.forward, **observed), state, image.moving, grid, grid, image.fixed) - prior.prior().log_prob(velocity)
    assert near.log_joint == pytest.approx(float(expected), rel=1e-9)
    parts = [linearise_terms([term], grid, velocity, near.latents) for term in (image, labels, still)]
    again = linearise_terms([image, labels, still], grid, velocity, near.latents)
    torch.testing.assert_close(again.gradient, sum(part.gradient for part in parts))


@pytest.mark.usefixtures("float64")
def test_a_model_draws_its_landmarks_and_labels() -> None:
    grid = Grid.from_spacing((9, 8), 3.0)
    model = Registration(SmoothVelocity(grid, 0.5, 9.0), GaussianNoise(), Landmarks(1e-3), LabelAgreement(3, error=1e-6, certainty=1e9))
    x, probabilities = grid.coordinates(torch.float64), segmentation(grid.coordinates(torch.float64))
    sharp = torch.nn.functional.one_hot(probabilities.argmax(0), 3).movedim(-1, 0).double()
    trace = poutine.trace(model).get_trace(waves(x), grid, grid, points=scattered(2), moving_labels=sharp)
    assert set(trace.stochastic_nodes) == {"velocity", "noise", "fixed", "landmarks", "error", "labels"}
    transform = model.transform({"velocity": trace.nodes["velocity"]["value"]})
    assert (trace.nodes["landmarks"]["value"] - transform(scattered(2))).abs().max() < 0.01
    moved = carried(sharp, grid, transform, grid)
    drawn = trace.nodes["labels"]["value"]
    assert (drawn.isnan() == moved.isnan()).all()
    assert ((drawn == 1) <= (moved > 0)).all()
    plain = Registration(SmoothVelocity(grid), GaussianNoise())
    with pytest.raises(ValueError, match="expected a model with a likelihood of its landmarks"):
        plain.forward(waves(x), grid, grid, points=scattered(2))


@pytest.mark.usefixtures("float64")
@DIMENSIONS
@pytest.mark.parametrize("tilted", [False, True])
def test_where_nothing_moves_landmarks_have_autograd_s_gradient(d: int, tilted: bool) -> None:
    lattice = Grid.from_spacing((9, 8, 7)[:d], 5.0)
    kinds = Landmarks(torch.rand(7, 1) + 0.5), Landmarks(covariance=0.3 * torch.ones(d, d) + torch.eye(d))
    term = LandmarkTerm(kinds[tilted], scattered(d), turned(d)(scattered(d)) + torch.randn(7, d), turned(d))
    velocity = torch.zeros(d, *lattice.shape).requires_grad_()
    moved = term.affine(Velocity(lattice, velocity)(term.points))
    (exact,) = torch.autograd.grad(term.similarity.distribution(moved, {}).log_prob(term.landmarks), velocity)
    near = term.linearise(HalfFlow(lattice, velocity.detach()), {})
    torch.testing.assert_close(near.gradient, exact)
    assert exact.abs().max() > 0.1


@pytest.mark.usefixtures("float64")
@DIMENSIONS
def test_the_gradient_at_landmarks_is_autograd_s_to_second_order_in_the_velocity(d: int) -> None:
    size = {2: 96, 3: 40}[d]
    grid = Grid.from_spacing((size,) * d, 48 / size)
    unit = bend(grid.coordinates(torch.float64), grid, 1.0).movedim(-1, 0)

    def discrepancy(size_mm: float) -> float:
        free = (size_mm * unit).requires_grad_()
        moved = turned(d)(Velocity(grid, free)(scattered(d)))
        term = LandmarkTerm(Landmarks(), scattered(d), moved.detach() + 1.0, turned(d))
        (exact,) = torch.autograd.grad(term.similarity.distribution(moved, {}).log_prob(term.landmarks), free)
        near = term.linearise(HalfFlow(grid, free.detach()), {})
        broad = (slice(None), *[slice(5)] * d)
        difference, whole = (dct(g, d)[broad].norm() for g in (near.gradient - exact, exact))
        return float(difference / whole)

    large, small = discrepancy(10.0), discrepancy(2.5)
    assert small < 0.035
    assert large < 0.15
    # Of first order the ratio were four. In 3D the lattice leaves as much as the midpoint rule.
    assert large > 5 * small or d == 3


@pytest.mark.usefixtures("float64")
@DIMENSIONS
def test_a_sum_of_terms_is_one_positive_matrix(d: int) -> None:
    """Precision, root and bound of the image, the labels (their channels condensed), the landmarks, and of all together, written out."""
    terms, _, _ = everything(d, 6)
    lattice = Grid.from_spacing((4, 3, 3)[:d], 14.0)
    velocity = 0.5 * torch.randn(d, *lattice.shape, generator=torch.Generator().manual_seed(0))
    count = d * lattice.numel
    units = torch.eye(count).reshape(count, d, *lattice.shape)
    parts = [linearise_terms([term], lattice, velocity) for term in terms]
    together = linearise_terms(terms, lattice, velocity)
    reverse = linearise_terms(terms, lattice, -velocity)
    both = linearise_both_ways(terms, terms, lattice, velocity)

    def matrix(near: Linearised) -> Tensor:
        return near.precision(units).flatten(1)

    torch.testing.assert_close(matrix(together), matrix(parts[0]) + matrix(parts[1]) + matrix(parts[2]))
    torch.testing.assert_close(matrix(both), (matrix(together) + matrix(reverse)) / 2)
    for near in (*parts, together, both):
        precision = matrix(near)
        torch.testing.assert_close(precision, precision.T)
        elements = math.prod(near.elements)
        root = near.precision_root(torch.eye(elements).reshape(elements, *near.elements)).flatten(1)
        torch.testing.assert_close(root.T @ root, precision)
        bound = torch.einsum("de...,be...->bd...", near.blocks(), units).flatten(1)
        assert torch.linalg.eigvalsh(bound - precision).min() > -1e-9 * precision.diagonal().max()
    labels, points = terms[1], parts[2]
    assert isinstance(labels, ImageTerm) and isinstance(points, PointLinearisation)
    # Every label of its own: no condensing.
    alone = [
        linearise(_Channel(labels.similarity, k), lattice, velocity, labels.moving, labels.fixed, labels.grid, parts[1].latents)
        for k in range(3)
    ]
    torch.testing.assert_close(matrix(parts[1]), sum(matrix(near) for near in alone))
    assert parts[1].elements[0] == d
    # The points' design: Dᵢ times the interpolation of a velocity where each is halfway.
    half = HalfFlow(lattice, velocity).there(scattered(d))
    interpolation = torch.stack([sample(u, lattice, half, fill="edge") for u in units])
    design = torch.einsum("nad,bdn->bna", points.slopes, interpolation).flatten(1)
    torch.testing.assert_close(matrix(points), design @ torch.diag(points.curvature.flatten()) @ design.T)
    assert (points.curvature[2] == 0).all() and not points.gradient.isnan().any()


class _Channel(Similarity):
    """The derivatives of another likelihood in one channel alone, at latents as they are."""

    def __init__(self, whole: Similarity, channel: int) -> None:
        super().__init__(whole.tempering)
        self.whole, self.channel = whole, channel

    def prior(self, moved: Tensor) -> dict[str, TorchDistribution]:
        return self.whole.prior(moved)

    def update(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(latents)

    def distribution(self, moved: Tensor, latents: Mapping[str, Tensor]) -> TorchDistribution:
        return self.whole.distribution(moved, latents)

    def newton(self, moved: Tensor, fixed: Tensor, latents: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        kept = torch.arange(len(moved)).reshape(-1, *[1] * (moved.ndim - 1)) == self.channel
        gradient, curvature = self.whole.newton(moved, fixed, latents)
        return gradient * kept, curvature * kept


@pytest.mark.usefixtures("float64")
@DIMENSIONS
@pytest.mark.parametrize("tilted", [False, True])
def test_the_posterior_at_landmarks_is_that_of_dense_algebra(d: int, tilted: bool) -> None:
    """Of small displacements and an image that says nothing: regression on a Gaussian field, K (K + Σ)⁻¹ y, K its covariance there."""
    grid = Grid.from_spacing((8, 7, 6)[:d], 4.0)
    prior = SmoothVelocity(grid, 1.0, 10.0).prior()
    x, sd = 0.5 * scattered(d), 0.4
    target = 1e-3 * torch.randn(7, d, generator=torch.Generator().manual_seed(1))
    constant = torch.ones(1, *grid.shape)
    errors = (sd**2 * torch.eye(d)).expand(7, d, d)
    if tilted:
        root = 0.3 * torch.randn(7, d, d, generator=torch.Generator().manual_seed(2))
        errors = root @ root.mT + 0.02 * torch.eye(d)
    similarity = Landmarks(covariance=errors) if tilted else Landmarks(sd)
    terms: list[Term] = [
        ImageTerm(GaussianNoise(), constant, constant, grid),
        LandmarkTerm(similarity, x, x + target, Affine.identity(d)),
    ]
    mode = ascend_field(lambda v: linearise_terms(terms, grid, v), prior, torch.zeros(prior.event_shape), 100, 1e-12)
    units = torch.eye(d * grid.numel).reshape(-1, d, *grid.shape)
    weights = torch.stack([sample(u, grid, x, fill="edge").T for u in units]).flatten(1).T
    whole = prior.precision_matvec(units).flatten(1)
    field = weights @ torch.linalg.solve(whole, weights.T)
    gain = field @ torch.linalg.inv(field + torch.block_diag(*errors))
    found = (Velocity(grid, mode.field)(x) - x).flatten()
    torch.testing.assert_close(found, gain @ target.flatten(), rtol=2e-3, atol=1e-6)
    precision = whole + mode.near.precision(units).flatten(1)
    spread = weights @ torch.linalg.solve(precision, weights.T)
    torch.testing.assert_close(spread, field - gain @ field, rtol=2e-3, atol=1e-5)


# The workflow.


def head_pair(d: int, size_mm: float = 5.0, seed: int = 0) -> tuple[Tensor, Tensor, Grid, Tensor]:
    """A moving head, the same bent, their grid, and where the bend takes the fixed head's voxels. The images are
    known at every point: nothing here is interpolated, nor is the flow made by scaling and squaring.
    """
    grid = Grid.from_spacing((48, 44) if d == 2 else (28, 24, 26), 1.7 if d == 2 else 2.6)
    x = grid.coordinates(torch.float64)
    there = flowed(x, lambda points: bend(points, grid, size_mm))
    generator = torch.Generator().manual_seed(seed)
    images = [head(points, 8.0, 0.25) + 0.02 * torch.randn(grid.shape, generator=generator) for points in (x, there)]
    moving, fixed = (image.clamp_min(0).float() for image in images)
    return moving, fixed, grid, there


def other_contrast(image: Tensor) -> Tensor:
    return (2.5 - image).clamp_min(0) ** 1.5 * (image > 0.3)


def run(moving: Tensor, fixed: Tensor, grid: Grid, moving_grid: Grid | None = None, draws: int = 0, **settings: object) -> RegistrationResult:
    options = replace(RegistrationSettings(), **settings)  # type: ignore[arg-type]
    pair = (Volume.from_grid(moving, moving_grid or grid), Volume.from_grid(fixed, grid))
    return register(*pair, draws=draws, device="cpu", settings=options)


def errors(result: RegistrationResult, grid: Grid, there: Tensor) -> Tensor:
    """Distance to the truth in the head, voxels."""
    x = grid.coordinates(torch.float32)
    within = head(there) > 0.3
    return (result.transform(x) - there).norm(dim=-1)[within] / min(grid.spacing)


@DIMENSIONS
@NAMES
def test_a_known_deformation_is_recovered(d: int, name: str) -> None:
    moving, fixed, grid, there = head_pair(d)
    result = run(moving, other_contrast(fixed) if name == "mixture" else fixed, grid, similarity=name, affine=0)
    before = (there - grid.coordinates(torch.float64)).norm(dim=-1)[head(there) > 0.3] / min(grid.spacing)
    error = errors(result, grid, there)
    assert before.mean() > 0.7
    assert error.mean() < {2: 0.2, 3: 0.4}[d] + 0.2 * (name == "mixture")
    assert error.mean() < 0.6 * before.mean()
    assert result.determinant.min() > 0.2
    assert result.folding == 0
    assert result.correlation[2] > result.correlation[0] or name == "mixture"
    # The inverse undoes it, but for the linear interpolation of steep flows on a lattice of twice the spacing.
    x = grid.coordinates(torch.float32)
    for first, second in ((result.transform, result.inverse), (result.inverse, result.transform)):
        back = (second(first(x)) - x).norm(dim=-1)[head(there) > 0.3] / min(grid.spacing)
        assert back.mean() < 0.1
        assert back.quantile(0.95) < 0.25


@DIMENSIONS
def test_moving_both_headers_changes_nothing_but_the_world(d: int) -> None:
    moving, fixed, grid, _ = head_pair(d)
    values = [30.0, -20.0, 10.0, 0.4, -0.3, 0.5] if d == 3 else [30.0, -20.0, 0.6]
    world = Affine.exp(torch.tensor(values, dtype=torch.float64), d)
    here = run(moving, fixed, grid, affine=0, iterations=(6, 4, 3, 2))
    there = run(moving, fixed, grid.transformed(world.matrix), affine=0, iterations=(6, 4, 3, 2))
    known = ~(here.moved.isnan() | there.moved.isnan())
    assert known.float().mean() > 0.8
    assert (here.moved - there.moved)[known].abs().max() < 0.02 * float(moving.max())
    x = grid.coordinates(torch.float64)
    back = world.inverse()(there.transform(world(x)))
    difference = (back - here.transform(x)).norm(dim=-1) / min(grid.spacing)
    assert difference.max() < 0.05
    torch.testing.assert_close(there.determinant, here.determinant, rtol=0, atol=0.03)


def test_the_seed_fixes_every_bit() -> None:
    moving, fixed, grid, _ = head_pair(2)
    first, again = (run(moving, fixed, grid, draws=3, iterations=(4, 3, 2, 2)) for _ in range(2))
    assert torch.equal(first.moved, again.moved)
    assert first.sd is not None and again.sd is not None
    assert torch.equal(first.sd, again.sd)
    x = grid.coordinates()
    assert torch.equal(first.transform(x), again.transform(x))
    assert (first.sd > 0).all()


@NAMES
def test_a_mask_leaves_the_rest_as_it_is(name: str) -> None:
    """A corner that was not measured, in both images: the rest is found as well as before."""
    moving, fixed, grid, there = head_pair(2)
    if name == "mixture":
        fixed = other_contrast(fixed)
    moving[:, :10], fixed[:12] = math.nan, math.nan
    result = run(moving, fixed, grid, similarity=name, affine=0)
    x = grid.coordinates(torch.float32)
    distance = (result.transform(x) - there).norm(dim=-1) / min(grid.spacing)
    seen = (head(there) > 0.3) & ~fixed.isnan() & ~result.moved.isnan()
    assert seen.sum() > 300
    assert distance[seen].mean() < 0.25 + 0.2 * (name == "mixture")
    assert not result.transform(x).isnan().any()
    assert result.moved[:, :5].isnan().any()
    assert result.folding == 0


def test_what_was_not_measured_is_less_certain() -> None:
    moving, fixed, grid, _ = head_pair(2)
    fixed[:20] = math.nan
    result = run(moving, fixed, grid, draws=12, affine=0, similarity="gaussian")
    assert result.sd is not None
    assert result.sd[:, 3:12].mean() > 3 * result.sd[:, 24:40, 10:34].mean()


def test_an_affine_map_and_a_velocity_together() -> None:
    moving, fixed, grid, there = head_pair(2)
    shift = Affine.exp(torch.tensor([6.0, -5.0, 0.1], dtype=torch.float64), 2)
    moved_grid = grid.transformed(shift.matrix)
    # Six parameters would shear this head, which is nearly round, as well as turn it.
    result = run(moving, fixed, grid, moving_grid=moved_grid, affine=3)
    assert errors(result, grid, shift(there)).mean() < 0.4
    assert result.correlation[0] < result.correlation[1] < result.correlation[2]
    rigid = run(moving, fixed, grid, moving_grid=moved_grid, affine=3, deformable=False)
    assert rigid.velocity is None
    torch.testing.assert_close(rigid.determinant, torch.ones(grid.shape), rtol=0, atol=1e-5)


# Both ways.


@pytest.mark.usefixtures("float64")
@NAMES
def test_both_ways_are_the_mean_of_each_and_opposite_when_the_images_are_exchanged(name: str) -> None:
    moving, fixed, grid, unit = smooth_pair(2, 14)
    similarity, velocity = likeness(name, 2), 3.0 * unit
    there, back = linearise(similarity, grid, velocity, moving, fixed, grid), linearise(similarity, grid, -velocity, fixed, moving, grid)
    ways = [ImageTerm(similarity, moving, fixed, grid)], [ImageTerm(similarity, fixed, moving, grid)]
    both = linearise_both_ways(*ways, grid, velocity)
    assert both.log_joint == pytest.approx((there.log_joint + back.log_joint) / 2)
    torch.testing.assert_close(both.gradient, (there.gradient - back.gradient) / 2)
    v = torch.randn(2, 2, *grid.shape)
    torch.testing.assert_close(both.precision(v), (there.precision(v) + back.precision(v)) / 2)
    torch.testing.assert_close(both.blocks(), (there.blocks() + back.blocks()) / 2)
    exchanged = linearise_both_ways(*ways[::-1], grid, -velocity)
    torch.testing.assert_close(exchanged.gradient, -both.gradient)
    torch.testing.assert_close(exchanged.blocks(), both.blocks())
    again = linearise_both_ways(*ways, grid, velocity, both.latents)
    assert again.log_joint >= both.log_joint - 1e-9


@pytest.mark.slow
def test_exchanged_images_have_the_opposite_velocity_where_neither_is_the_reference() -> None:
    grid = Grid.from_spacing((40, 36), 1.6)
    points = grid.coordinates()
    fixed = Volume.from_grid(head(points), grid)
    moving = Volume.from_grid(head(points + bend(points, grid, 4.0)), grid)
    differences = []
    for symmetric in (True, False):
        settings = RegistrationSettings(affine=0, symmetric=symmetric)
        one, other = (register(*pair, settings=settings, device="cpu") for pair in ((moving, fixed), (fixed, moving)))
        assert one.velocity is not None and other.velocity is not None
        assert one.velocity.field.abs().max() > 1.0
        differences.append(float((one.velocity.field + other.velocity.field).norm() / one.velocity.field.norm()))
    assert differences[0] < 1e-3
    assert differences[1] > 10 * differences[0]


# What else is observed, in the workflow.


def blank(grid: Grid, seed: int) -> Volume:
    """An image that shows nothing."""
    return Volume.from_grid(1 + 0.01 * torch.randn(grid.shape, generator=torch.Generator().manual_seed(seed)), grid)


def corresponding(grid: Grid, there: Tensor, affine: Affine, count: int = 10) -> PointPairs:
    """Points in the head and where they truly are after an affine map."""
    within = (head(there) > 0.3).flatten().nonzero()[:, 0]
    chosen = within[torch.randperm(len(within), generator=torch.Generator().manual_seed(0))[:count]]
    d = grid.ndim
    return PointPairs(grid.coordinates(torch.float64).reshape(-1, d)[chosen], affine(there.reshape(-1, d)[chosen]))


@DIMENSIONS
@pytest.mark.parametrize("symmetric", [False, True])
def test_landmarks_pull_where_images_say_nothing(d: int, symmetric: bool) -> None:
    _, _, grid, there = head_pair(d)
    points = corresponding(grid, there, Affine.identity(d))
    before = points.error(Affine.identity(d))
    pair = blank(grid, 0), blank(grid, 1)
    found = {}
    for sd in (0.1, 1.0, 100.0):
        settings = RegistrationSettings(affine=0, landmark_sd_mm=sd, symmetric=symmetric)
        result = register(*pair, landmarks=points, settings=settings, device="cpu")
        assert result.landmark_error is not None
        assert result.landmark_error[0] == pytest.approx(before)
        assert result.landmark_error[2] == pytest.approx(points.error(result.transform))
        assert result.folding == 0
        found[sd] = result.landmark_error[2]
    assert before > 1.5
    assert found[0.1] < 0.15 < found[1.0] < 0.6 * before
    assert found[100.0] == pytest.approx(before, rel=0.05)
    assert register(*pair, settings=RegistrationSettings(affine=0), device="cpu").landmark_error is None


def test_landmarks_lie_beyond_the_affine_map() -> None:
    moving, fixed, grid, there = head_pair(2)
    shift = Affine.exp(torch.tensor([6.0, -5.0, 0.1], dtype=torch.float64), 2)
    points = corresponding(grid, there, shift)
    pair = Volume.from_grid(moving, grid.transformed(shift.matrix)), Volume.from_grid(fixed, grid)
    result = register(*pair, landmarks=points, settings=RegistrationSettings(affine=3, landmark_sd_mm=0.2), device="cpu")
    assert result.landmark_error is not None
    headers, affine, whole = result.landmark_error
    assert headers > affine > whole
    assert whole < 0.2
    assert errors(result, grid, shift(there)).mean() < 0.4


@pytest.mark.parametrize("d", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_labels_match_where_images_say_nothing(d: int, symmetric: bool) -> None:
    _, _, grid, there = head_pair(d)

    def regions(points: Tensor) -> Tensor:
        inside, x, y = head(points) > 0.3, points[..., 0], points[..., 1]
        return 3 * inside.long() + 4 * (inside & (x > 2)).long() + 10 * (x**2 + (y - 3) ** 2 < 49).long()

    labels = regions(grid.coordinates(torch.float64)), regions(there)
    settings = RegistrationSettings(affine=0, symmetric=symmetric)
    result = register(blank(grid, 0), blank(grid, 1), labels=labels, settings=settings, device="cpu")
    alone = register(blank(grid, 0), blank(grid, 1), settings=settings, device="cpu")
    assert errors(result, grid, there).mean() < 0.7 * errors(alone, grid, there).mean()
    assert result.determinant.min() > 0.2
    masked = register(
        blank(grid, 0), blank(grid, 1), labels=labels, settings=settings, device="cpu", mask=grid.coordinates()[..., 0] < -8
    )
    x = grid.coordinates(torch.float32)
    far = x[..., 0] > 12
    assert (masked.transform(x) - x)[far].norm(dim=-1).mean() < 0.5 * (result.transform(x) - x)[far].norm(dim=-1).mean()


# Tempering.


def smoothed(noise: Tensor, sd: float) -> Tensor:
    """Convolved along each axis with a Gaussian, of the same variance; sd in voxels."""
    for axis, n in enumerate(noise.shape):
        steps = torch.arange(n).to(noise)
        kernel = torch.exp(-((steps[:, None] - steps) ** 2) / (2 * sd**2))
        kernel = kernel / kernel.square().sum(1, keepdim=True).sqrt()
        noise = torch.tensordot(kernel, noise, dims=([1], [axis])).movedim(0, axis)
    return noise


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["gaussian", "student", "mixture"])
def test_smooth_noise_is_worth_fewer_voxels(name: str) -> None:
    grid = Grid.from_spacing((24, 22, 20), 2.0)
    moving = 0.8 + 0.3 * torch.rand(1, *grid.shape, generator=torch.Generator().manual_seed(2))
    still = HalfFlow(grid, torch.zeros(3, *grid.shape))
    white = 0.1 * torch.randn(grid.shape, generator=torch.Generator().manual_seed(3))
    shares = []
    for noise in (white, smoothed(white, 0.6), smoothed(white, 1.0)):
        fixed = moving + noise
        fixed[0, :4] = math.nan
        shares.append(independent_share(ImageTerm(likeness(name, 3), moving, fixed, grid), still))
    assert shares[0] > 0.8
    # exp(−1 / 4 sd²) between neighbours, which is all that noise this smooth has.
    rho = math.exp(-1 / (4 * 0.6**2))
    expected = ((1 - rho) / (1 + rho)) ** 3
    assert expected < shares[1] < 3 * expected or name != "gaussian"
    assert shares[0] > 2 * shares[1] > 4 * shares[2]


@pytest.mark.parametrize("name", ["gaussian", "student", "mixture"])
def test_smooth_noise_bends_the_deformation_less(name: str) -> None:
    _, _, grid, there = head_pair(2)
    noise = smoothed(torch.randn(grid.shape, generator=torch.Generator().manual_seed(5)), 1.2)
    moving, fixed = (head(points, 8.0, 0.25).float() for points in (grid.coordinates(torch.float64), there))
    fixed = (other_contrast(fixed) if name == "mixture" else fixed) + 0.1 * noise.float()
    untempered, tempered = (run(moving, fixed, grid, similarity=name, affine=0, tempering=given) for given in (1.0, None))
    assert untempered.tempering == 1.0
    assert tempered.tempering is not None and tempered.tempering < 0.3
    assert tempered.determinant.log().std() < 0.8 * untempered.determinant.log().std()


@pytest.mark.slow
@pytest.mark.parametrize("sd", [0.0, 0.7, 1.2])
def test_intervals_hold_the_truth_whether_noise_is_smooth_or_not(sd: float) -> None:
    """Deformations drawn from the prior. Untempered, the 80 % intervals of an image with smooth noise hold it half as often as they say."""
    grid = Grid.from_spacing((44, 40), 1.5)
    points = grid.coordinates()
    held: dict[float | None, list[float]] = {None: [], 1.0: []}
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            truth = SmoothVelocity(grid, *prior_scales(grid), alpha=3.0)()
        moving, noise = waves(3 * points)[0], torch.randn(grid.shape, generator=generator)
        fixed = waves(3 * truth(points))[0] + 0.1 * (smoothed(noise, sd) if sd else noise)
        inside = (slice(5, -5),) * 2
        for given, shares in held.items():
            result = run(moving, fixed, grid, draws=40, affine=0, similarity="gaussian", tempering=given)
            at = torch.stack([draw(points)[inside] for draw in result.draws])
            low, high = at.quantile(torch.tensor([0.1, 0.9]), dim=0)
            right = truth(points)[inside]
            shares.append(float(((low <= right) & (right <= high)).float().mean()))
    tempered, untempered = (sum(shares) / len(shares) for shares in held.values())
    assert 0.7 < tempered < 0.92
    assert untempered < tempered - 0.2 or not sd


def test_a_tempering_that_is_given_stays() -> None:
    moving, fixed, grid, _ = head_pair(2)
    assert run(moving, fixed, grid, affine=0, similarity="gaussian", tempering=0.37, iterations=(2, 2, 2, 2)).tempering == 0.37
    assert run(moving, fixed, grid, affine=0, iterations=(2, 2, 2, 2)).tempering == pytest.approx(1 / 25)
    assert run(moving, fixed, grid, affine=0, deformable=False).tempering is None


# The prior, learned from the pair itself.


def textured_pair(sd: float, length: float, seed: int = 0) -> tuple[Tensor, Tensor, Grid]:
    """A textured plane, and the same moved by a draw of the velocity's prior, which is known wherever the fixed image is; white noise."""
    grid = Grid.from_spacing((40, 44), 1.0)
    torch.manual_seed(seed)
    texture = GaussianField.from_sd(grid.shape, grid.spacing, 0.15, 3.0, 4.0).rsample() + 1.0
    prior = SmoothVelocity(grid, sd, length, 3.0)
    moved = carried(texture, grid, Velocity(grid, prior.prior().rsample()), grid)[0]
    return texture[0], moved + 0.015 * torch.randn(grid.shape), grid


def test_how_much_images_deform_is_learned_from_them() -> None:
    found = {}
    for sd in (0.6, 1.8):
        pair = textured_pair(sd, 5.0)
        learned, usual = (
            run(*pair, learn_prior=on, affine=0, similarity="gaussian", tempering=1.0, draws=2, iterations=(10, 10, 15, 15)) for on in (True, False)
        )
        assert usual.prior_scales == pytest.approx(prior_scales(pair[2]), rel=1e-5)
        assert learned.prior_scales is not None and learned.log_evidence is not None and usual.log_evidence is not None
        found[sd] = learned.prior_scales
        # One image holds some tens of independent displacements: their spread is known to a third.
        assert abs(math.log(found[sd][0] / sd)) < 0.5
        assert abs(math.log(found[sd][1] / 5.0)) < 0.5
        assert learned.log_evidence.value > usual.log_evidence.value - 3 * math.hypot(learned.log_evidence.error, usual.log_evidence.error)
    assert found[1.8][0] > 2 * found[0.6][0]


def test_a_prior_is_not_learned_from_images_that_tell_nothing() -> None:
    with pytest.raises(UnusableInput, match="--learn-prior: cannot tell how these images deform"):
        run(*textured_pair(1.0, 5.0), learn_prior=True, affine=0, similarity="gaussian", tempering=1e-9)
