"""Distributions over fields that are learned from fields, and labelled scans that are drawn from one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyro import poutine
from torch import Tensor

from probmed.field_priors import PrincipalField, SmoothField
from probmed.fields import GaussianField
from probmed.grids import Grid
from probmed.transforms import Affine, Velocity, warp
from probmed.volumes import Volume
from probmed.workflows.one_shot import SPATIAL, Estimates, carried, coupled, draw, estimate, learned
from probmed.workflows.registration import register

pytestmark = pytest.mark.usefixtures("float64")


def test_all_principal_components_are_the_sample_covariance() -> None:
    fields = torch.randn(6, 2, 4, 3)
    prior = PrincipalField.fit(fields)
    assert prior.components.shape == (5, 2, 4, 3)
    rows = prior.components.flatten(1)
    torch.testing.assert_close(rows.mT @ rows, fields.flatten(1).mT.cov())
    gram = rows @ rows.mT
    torch.testing.assert_close(gram, gram.diagonal().diag())
    assert (gram.diagonal().diff() <= 0).all()
    torch.testing.assert_close(PrincipalField.fit(fields, 2).components, prior.components[:2])


def test_fields_of_two_factors_need_two_components() -> None:
    directions, scores = torch.randn(2, 1, 30), torch.randn(400, 2)
    fields = 3 + torch.einsum("nj,jcx->ncx", scores * torch.tensor([4.0, 1.0]), directions)
    prior = PrincipalField.fit(fields, 3)
    length = prior.components.flatten(1).norm(dim=1)
    assert length[2] < 1e-6 * length[0]
    drawn = torch.stack([prior() for _ in range(2000)]).flatten(1)
    truth = torch.einsum("jx,j,jy->xy", directions[:, 0], torch.tensor([16.0, 1.0]), directions[:, 0])
    assert (drawn.mT.cov() - truth).norm() < 0.15 * truth.norm()


@pytest.mark.parametrize("length_mm", [4.0, 9.0])
def test_a_smooth_field_s_strength_and_length_are_recovered(length_mm: float) -> None:
    shape, spacing = (24, 20), (1.5, 2.0)
    torch.manual_seed(0)
    fields = GaussianField.from_sd(shape, spacing, 0.7, length_mm, 2.0, 2).sample((12,)) + 5.0
    prior = SmoothField.fit(fields, spacing)
    assert prior.sd == pytest.approx(0.7, rel=0.15) and prior.length_mm == pytest.approx(length_mm, rel=0.2)
    torch.testing.assert_close(prior.mean, fields.mean(0))
    assert prior().shape == (2, *shape)


@pytest.mark.parametrize("fit", [PrincipalField.fit, lambda fields: SmoothField.fit(fields, (1.0, 1.0))])
def test_one_field_is_no_distribution(fit: Any) -> None:
    with pytest.raises(ValueError, match="two fields or more, got 1"):
        fit(torch.zeros(1, 1, 4, 4))


def test_fields_that_are_all_the_same_have_no_length() -> None:
    with pytest.raises(ValueError, match="fields that differ"):
        SmoothField.fit(torch.ones(3, 1, 4, 4), (1.0, 1.0))


GRID = Grid.from_spacing((30, 28), 1.0)


def blob(centre: float = 0.0, brightness: float = 1.0) -> Tensor:
    """A smooth disc, ``(*shape)``."""
    x = GRID.coordinates(torch.float64) - torch.tensor([centre, 0.0])
    return brightness / (1 + ((x / 7.0) ** 2).sum(-1) ** 3)


def estimates(count: int = 6) -> tuple[Estimates, Tensor]:
    """Velocities and residuals of two factors each; labels of a disc."""
    torch.manual_seed(1)
    lattice = GRID.at_spacing(3.0)
    waves = GaussianField.from_sd(lattice.shape, lattice.spacing, 1.0, 9.0, 3.0, 2).sample((2,))
    looks = GaussianField.from_sd(GRID.shape, GRID.spacing, 0.1, 6.0, 2.0).sample((2,))
    scores = torch.randn(count, 2)
    velocities, residuals = (torch.einsum("nj,j...->n...", scores, parts) for parts in (waves, looks))
    scan = blob()[None]
    labels = torch.stack([(scan[0] < 0.5).double(), (scan[0] >= 0.5).double()])
    return Estimates(GRID, lattice, scan, velocities, (Affine.identity(2),) * count, residuals), labels


def test_a_draw_is_the_changed_scan_carried_by_the_flow_with_its_labels() -> None:
    known, labels = estimates()
    model = learned(known, labels, noise=1e-6)
    trace = poutine.trace(model).get_trace()
    scores, look = (trace.nodes[site]["value"] for site in ("velocity", "appearance"))
    velocity = Velocity(known.lattice, -model.spatial.velocity.evaluate(scores))  # type: ignore[operator]
    image = known.scan + model.appearance.evaluate(look)  # type: ignore[operator, union-attr]
    expected = warp(image, GRID, velocity, GRID, fill="edge")
    torch.testing.assert_close(trace.nodes["image"]["value"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(trace.nodes["labels"]["value"], warp(labels, GRID, velocity, GRID, fill="edge"))


def test_coupled_draws_are_one_scan_s_own_transforms() -> None:
    known, labels = estimates()
    image, _ = draw(coupled(known, labels, 2, noise=1e-6), 1)
    expected = warp(known.scan + known.residuals[2], GRID, Velocity(known.lattice, -known.velocities[2]), GRID, fill="edge")
    torch.testing.assert_close(image[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spatial", SPATIAL)
def test_every_kind_of_transform_draws_labelled_scans(spatial: str) -> None:
    known, labels = estimates()
    model = learned(known, labels, spatial, "none")
    images, codes = draw(model, 4, seed=3)
    assert images.shape == (4, 1, *GRID.shape) and codes.shape == (4, *GRID.shape)
    torch.testing.assert_close(images, draw(model, 4, seed=3)[0])
    changed = (codes != labels.argmax(0)).double().mean()
    assert (changed == 0) == (spatial == "none")
    # The labels stay where the disc is bright.
    assert images[:, 0][codes == 1].mean() > images[:, 0][codes == 0].mean() + 0.4


def test_unknown_kinds_and_shapes_are_refused() -> None:
    known, labels = estimates()
    with pytest.raises(ValueError, match="expected spatial of"):
        learned(known, labels, "rigid")
    with pytest.raises(ValueError, match="expected a scan"):
        learned(known, labels[:, :5])
    with pytest.raises(ValueError, match="two scans or more beside the labelled one, got 0"):
        estimate(Volume.from_grid(blob(), GRID), [], lambda m, f: SimpleNamespace())  # type: ignore[arg-type, return-value]


@pytest.mark.slow
def test_transforms_of_other_scans_are_estimated() -> None:
    """Discs that are shifted and brighter: the velocity shifts the labelled disc onto each, and what is left is the brightness."""
    torch.set_default_dtype(torch.float32)  # as scans come; the fixture sets it back
    shifts, lights = (-2.0, 1.0, 3.0), (0.1, -0.05, 0.0)
    x = GRID.coordinates(torch.float64)
    pattern = 0.2 * torch.sin(x[..., 0] / 3) * torch.cos(x[..., 1] / 4)

    def scan(shift: float, light: float) -> Volume:
        return Volume.from_grid((blob(shift) * (1 + light * 2 * pattern)).float(), GRID)

    found = estimate(scan(0.0, 0.0), [scan(*each) for each in zip(shifts, lights, strict=True)], lambda m, f: register(m, f, device="cpu"))
    assert found.velocities.shape == (3, 2, *found.lattice.shape) and found.residuals.shape == (3, 1, *GRID.shape)
    middle = torch.zeros(1, 2)
    for velocity, affine, shift in zip(found.velocities, found.affines, shifts, strict=True):
        there = affine(Velocity(found.lattice, velocity)(middle).double())
        assert float(there[0, 0]) == pytest.approx(shift, abs=0.5)
    assert found.residuals.abs().mean() < 0.05


def test_labels_are_carried_by_each_scan_s_own_registration() -> None:
    """Shifts by whole voxels: every scan gets the map, moved; one that reaches beyond gets the labels at the edge."""
    grid = Grid.from_spacing((12, 10), 2.0)
    labels = torch.zeros(grid.shape, dtype=torch.int64)
    labels[4:9, 3:7], labels[5:7, 4:6] = 7, 3
    shifts = [(0.0, 0.0), (4.0, -2.0), (-2.0, 2.0)]

    def registered(moving: Volume, fixed: Volume) -> Any:
        shift = torch.tensor(shifts[int(fixed.data[0, 0])])
        return SimpleNamespace(transform=Affine.exp(torch.cat([shift, torch.zeros(1)]), 2))

    others = [Volume.from_grid(torch.full(grid.shape, float(n)), grid) for n in range(3)]
    told: list[float] = []
    found = carried(others[0], Volume.from_grid(labels, grid), others, registered, told.append)
    assert told[-1] == 1.0 and len(told) == 3
    for volume, (x, y) in zip(found, shifts, strict=True):
        assert torch.equal(volume.data, labels.roll((-round(x / 2), -round(y / 2)), (0, 1)))
