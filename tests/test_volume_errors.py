"""Errors of volumes on scans that training has not seen."""

import math

import pytest
import torch
from torch.distributions import Normal

from probmed.workflows.volume_errors import VolumeErrors


def test_errors_are_those_of_logarithms_of_scans_that_have_the_label() -> None:
    found = torch.tensor([[10.0, 5.0], [20.0, 5.0], [40.0, 5.0], [30.0, 5.0]])
    true = torch.tensor([[11, 6], [18, 4], [44, 7], [0, 5]])
    errors = VolumeErrors.of(found, true)
    assert errors is not None and errors.counts == (3, 4)
    logs = torch.tensor([1.1, 0.9, 1.1], dtype=torch.float64).log()
    assert errors.means[0] == pytest.approx(float(logs.mean())) and errors.sds[0] == pytest.approx(float(logs.std()))
    assert VolumeErrors.read(errors.rows) == errors and VolumeErrors.read(None) is None
    assert VolumeErrors.of(found[:2], true[:2]) is None
    assert VolumeErrors.of(found, torch.tensor([[11, 0], [18, 0], [44, 7], [0, 5]])) is None
    assert VolumeErrors.of(found, found) is None


@pytest.mark.parametrize("rows", [[(0.0, 1.0, 2)], [(0.0, -1.0, 5)], [(0.0, 1.0)], []])
def test_errors_that_none_has_are_refused(rows: list[tuple[float, ...]]) -> None:
    with pytest.raises(ValueError, match=r"expected|unpack"):
        VolumeErrors.read(rows)


def test_levels_and_quantiles_are_inverse_and_the_distribution_is_student_s() -> None:
    """With three scans there are two degrees of freedom: F(x) = 1/2 + x / (2 √(2 + x²))."""
    errors = VolumeErrors((0.1, -0.2), (0.3, 0.5), (3, 3))
    found, levels = torch.tensor([100.0, 50.0], dtype=torch.float64), torch.tensor([[0.05, 0.5], [0.6, 0.99]], dtype=torch.float64)
    volumes = errors.quantiles(found, levels)
    torch.testing.assert_close(errors.levels(found, volumes), levels)
    torch.testing.assert_close(errors.medians(found), found * torch.tensor([0.1, -0.2], dtype=torch.float64).exp())
    x = (torch.tensor(120 / 100).log() - 0.1) / (0.3 * math.sqrt(4 / 3))
    expected = 0.5 + x / (2 * (2 + x**2).sqrt())
    assert float(errors.levels(found[:1].expand(2), torch.tensor([120.0, 50.0]))[0]) == pytest.approx(float(expected), rel=1e-5)


def test_intervals_of_a_further_scan_hold_its_volume_as_often_as_they_say() -> None:
    """5 scans to learn from, 4000 times; within four standard errors of the share."""
    generator = torch.Generator().manual_seed(0)
    found = 1000 * torch.rand(4000, 6, 1, dtype=torch.float64, generator=generator) + 500
    true = found * (0.1 + 0.2 * torch.randn(found.shape, dtype=torch.float64, generator=generator)).exp()
    levels = []
    for f, y in zip(found, true, strict=True):
        errors = VolumeErrors.of(f[:5], y[:5])
        assert errors is not None
        levels.append(errors.levels(f[5], y[5]))
    scores = torch.special.ndtri(torch.cat(levels)).abs()
    for share in (0.5, 0.8, 0.95):
        width = Normal(0.0, 1.0).icdf(torch.tensor(0.5 + share / 2))
        held = float((scores < width).double().mean())
        assert abs(held - share) < 4 * math.sqrt(share * (1 - share) / 4000)
