"""The Laplace posterior against dense algebra, and conjugate gradients against a direct solve."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from probmed.fields import GaussianField
from probmed.inference.laplace import conjugate_gradients, laplace_draws
from probmed.scores import Scores

SHAPE, SPACING = (4, 3, 5), (1.0, 1.5, 1.0)
TEMPERING = 0.7


def problem() -> tuple[Scores, Tensor]:
    """Scores of 400 data in 4 dense latents and a field of 3 × 60, and the dense posterior covariance."""
    generator = torch.Generator().manual_seed(0)
    n, p, nodes = 400, 4, math.prod(SHAPE)
    field = GaussianField(SHAPE, SPACING, torch.tensor(1.5), 0.8, 2.0, 3)
    dense, slopes = torch.randn(n, p, generator=generator), torch.randn(n, 3, generator=generator)
    index = torch.randint(nodes, (n,), generator=generator)
    jacobian = torch.zeros(n, p + 3 * nodes, dtype=torch.float64)
    jacobian[:, :p] = dense
    for axis in range(3):
        jacobian[torch.arange(n), p + axis * nodes + index] = slopes[:, axis].double()
    prior = torch.zeros(p + 3 * nodes, p + 3 * nodes, dtype=torch.float64)
    prior[:p, :p] = 0.5 * torch.eye(p, dtype=torch.float64)
    unit = torch.eye(3 * nodes).reshape(3 * nodes, 3, *SHAPE)
    prior[p:, p:] = field.precision_matvec(unit).reshape(3 * nodes, -1).double()
    covariance = torch.linalg.inv(TEMPERING * jacobian.T @ jacobian + prior)
    return Scores(dense, torch.full((p,), 0.5), index, slopes, field), covariance


def test_draws_have_the_dense_posterior_covariance() -> None:
    scores, covariance = problem()
    count = 4_000
    dense, field = laplace_draws(scores, count, TEMPERING, torch.Generator().manual_seed(1), tolerance=1e-5)
    assert field is not None and field.shape == (count, 3, *SHAPE)
    draws = torch.cat([dense, field.flatten(1)], 1).double()
    found = draws.T @ draws / count
    # The standard error of a sample covariance is √((c_ii c_jj + c_ij²) / S); five of them bound 33,856 entries at a level below 0.02.
    error = ((covariance.diagonal()[:, None] * covariance.diagonal() + covariance**2) / count).sqrt()
    assert ((found - covariance).abs() / error).max() < 5.2
    assert (draws.mean(0).abs() / (covariance.diagonal() / count).sqrt()).max() < 4.5


def test_the_data_narrow_the_dense_block_less_where_the_field_explains_them_too() -> None:
    scores, _ = problem()
    alone = Scores(scores.dense, scores.precision)
    joint, _ = laplace_draws(scores, 4000, TEMPERING, torch.Generator().manual_seed(1))
    single, field = laplace_draws(alone, 4000, TEMPERING, torch.Generator().manual_seed(1))
    assert field is None
    assert (joint.var(0) > single.var(0)).all()


def test_an_indefinite_block_is_named() -> None:
    scores = Scores(torch.zeros(3, 2), torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="not positive definite"):
        laplace_draws(scores, 2)


def test_conjugate_gradients_solve_each_right_hand_side() -> None:
    torch.manual_seed(0)
    root = torch.randn(12, 12, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(12, dtype=torch.float64)
    right = torch.randn(5, 12, dtype=torch.float64)
    diagonal = matrix.diagonal()
    found = conjugate_gradients(lambda x: x @ matrix, right, lambda x: x / diagonal, tolerance=1e-12)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, right.T).T)
