"""Distributions over fields that are learned from fields, and labelled scans that are drawn from one."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyro import poutine
from torch import Tensor

from probmed.field_priors import AutoencodedField, PrincipalAffine, PrincipalField, SmoothField
from probmed.fields import GaussianField
from probmed.grids import Grid
from probmed.models.one_shot import TransformedScan
from probmed.priors import AffinePrior, AffineVelocity
from probmed.transforms import Affine, Velocity, warp
from probmed.volumes import Volume
from probmed.workflows.cohorts import own_world
from probmed.workflows.one_shot import SPATIAL, Estimates, carried, coupled, draw, estimate, learned, without_headers
from probmed.workflows.registration import register
from probmed.workflows.supervision import SegmenterSettings, TrainedSegmenter
from probmed.workflows.training_sets import Augmentation, one_shot

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


def test_of_more_fields_than_dimensions_every_dimension_is_a_component() -> None:
    fields = torch.randn(9, 2, 3)
    prior = PrincipalField.fit(fields)
    rows = prior.components.flatten(1)
    assert len(rows) == 6
    torch.testing.assert_close(rows.mT @ rows, fields.flatten(1).mT.cov())
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


def test_an_autoencoder_of_fields_repeats_with_its_seed_and_has_two_sites() -> None:
    fields = torch.randn(6, 1, 4, 3)
    prior, same = (AutoencodedField.fit(fields, steps=20, seed=3, site="velocity") for _ in range(2))
    trace = poutine.trace(prior).get_trace()
    assert set(trace.stochastic_nodes) == {"velocity", "velocity_scores"}
    assert trace.nodes["velocity"]["value"].shape == (4,) and trace.nodes["velocity_scores"]["value"].shape == (5,)
    given = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
    torch.testing.assert_close(poutine.condition(same, data=given)(), trace.nodes["_RETURN"]["value"])
    torch.testing.assert_close(same.decoder(torch.ones(1, 4)), prior.decoder(torch.ones(1, 4)))
    with pytest.raises(ValueError, match="fields that differ"):
        AutoencodedField.fit(torch.ones(4, 1, 3, 3))


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
    affines = tuple(Affine.exp(each, 2) for each in 0.5 * torch.randn(count, 6) * torch.tensor([2.0, 2.0, 0.1, 0.1, 0.1, 0.05]))
    return Estimates(GRID, lattice, scan, velocities, affines, residuals), labels


def test_a_draw_is_the_changed_scan_carried_by_the_flow_with_its_labels() -> None:
    known, labels = estimates()
    model = learned(known, labels, noise=1e-6)
    trace = poutine.trace(model).get_trace()
    scores, look = (trace.nodes[site]["value"] for site in ("velocity", "appearance"))
    velocity = Velocity(known.lattice, -model.spatial.deformation.velocity.evaluate(scores))  # type: ignore[union-attr, operator]
    affine = model.spatial.affine.evaluate(trace.nodes["affine"]["value"])  # type: ignore[union-attr, operator]
    image = known.scan + model.appearance.evaluate(look)  # type: ignore[operator, union-attr]
    for found, whole, tolerance in (("image", image, 1e-5), ("labels", labels, 1e-12)):
        expected = warp(whole, GRID, velocity @ affine.inverse(), GRID, fill=math.nan)
        torch.testing.assert_close(trace.nodes[found]["value"], expected, rtol=0, atol=tolerance, equal_nan=True)


def test_coupled_draws_are_one_scan_s_own_transforms() -> None:
    known, labels = estimates()
    image, found = draw(coupled(known, labels, 2, noise=1e-6), 1)
    back = Velocity(known.lattice, -known.velocities[2]) @ known.affines[2].inverse()
    expected = warp(known.scan + known.residuals[2], GRID, back, GRID, fill=math.nan)
    assert 0 < float(expected.isnan().double().mean()) < 0.5
    torch.testing.assert_close(image[0], expected, rtol=0, atol=1e-5, equal_nan=True)
    assert not found[0][expected[0].isnan()].any()


@pytest.mark.parametrize("spatial", SPATIAL)
def test_every_kind_of_transform_draws_labelled_scans(spatial: str) -> None:
    known, labels = estimates()
    model = learned(known, labels, spatial, "none")
    images, codes = draw(model, 4, seed=3)
    assert images.shape == (4, 1, *GRID.shape) and codes.shape == (4, *GRID.shape)
    torch.testing.assert_close(images, draw(model, 4, seed=3)[0], equal_nan=True)
    changed = (codes != labels.argmax(0)).double().mean()
    assert (changed == 0) == (spatial == "none")
    # The labels stay where the disc is bright.
    assert images[:, 0][codes == 1].mean() > images[:, 0][codes == 0].nanmean() + 0.4


def test_what_the_labelled_scan_does_not_show_is_unknown_in_draws() -> None:
    """A shift by two voxels, and an unknown square: both are NaN where they have come to, and nothing else is."""
    _, labels = estimates()
    scan = blob()[None].clone()
    scan[:, 4:7, 5:9] = math.nan
    shift = PrincipalField(torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0, 0.0]), torch.zeros(1, 6), "affine")
    spatial = PrincipalAffine(shift, 2, torch.zeros(2))
    image, found = draw(TransformedScan(scan, labels, GRID, spatial, noise=1e-6), 1)
    expected = torch.zeros(GRID.shape, dtype=torch.bool)
    expected[:2], expected[6:9, 5:9] = True, True
    assert torch.equal(image[0, 0].isnan(), expected)
    torch.testing.assert_close(image[0, :, 9:], scan[:, 7:-2], rtol=0, atol=1e-5)
    # Labels are known where intensities are not; beyond the field of view they are the background.
    assert torch.equal(found[0, 2:], labels.argmax(0)[:-2]) and not found[0, :2].any()


def test_draws_with_unknown_voxels_are_examples_as_scans_with_them_are() -> None:
    torch.set_default_dtype(torch.float32)  # as scans come; the fixture sets it back
    known, labels = estimates()
    known, labels = replace(known, **{name: getattr(known, name).float() for name in ("scan", "velocities", "residuals")}), labels.float()
    scan = known.scan.clone()
    scan[:, 20:, :6] = math.nan
    model = TransformedScan(scan, labels, GRID, learned(known, labels).spatial)
    for augmentation in (None, Augmentation()):
        images, codes = one_shot([model], 2, augmentation)()
        unknown = images.isnan()
        assert unknown.flatten(1).any(1).all() and set(codes.unique().tolist()) == {0, 1}
        trained = TrainedSegmenter.build(GRID, SegmenterSettings(), (0, 1))
        loss = trained.loss((images, codes))
        loss.backward()
        assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in trained.network.parameters() if p.grad is not None)
        # What stands where nothing is known is not seen: the mean of what is.
        filled = images.masked_fill(unknown, 0.0)
        logits = trained.logits(images)
        assert torch.isfinite(logits).all() and not torch.allclose(trained.logits(filled), logits)


PARAMETERS = torch.tensor([1.0, -2.0, 0.05, 0.1, -0.05, 0.02], dtype=torch.float64)


def simulated_affines(count: int, centre: Tensor) -> tuple[tuple[Affine, ...], Tensor]:
    """Maps whose parameters have a mean and a covariance of rank three, and the covariance."""
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(6, 3, generator=generator) * torch.tensor([1.5, 1.5, 0.05, 0.08, 0.08, 0.03])[:, None]
    drawn = PARAMETERS + torch.randn(count, 3, generator=generator) @ root.mT
    return tuple(map(Affine, Affine.exp(drawn, 2, centre).matrix)), root @ root.mT


def test_mean_and_covariance_of_affine_maps_are_recovered_and_draws_follow_them() -> None:
    centre = torch.tensor([20.0, -5.0])
    affines, covariance = simulated_affines(3000, centre)
    prior = PrincipalAffine.fit(affines, centre)
    sd = covariance.diagonal().sqrt()
    found = prior.coordinates.components.mT @ prior.coordinates.components
    assert ((prior.coordinates.mean - PARAMETERS).abs() < 4 * sd / 3000**0.5).all()
    assert ((found - covariance).abs() < 0.1 * sd[:, None] * sd).all()
    lengths = (prior.coordinates.components / sd).norm(dim=1)
    assert len(lengths) == 6 and (lengths[3:] < 1e-5 * lengths[0]).all()
    torch.manual_seed(0)
    drawn = Affine(torch.stack([prior().matrix for _ in range(2000)])).log(centre)
    assert ((drawn.mean(0) - PARAMETERS).abs() < 5 * sd / 2000**0.5).all()
    assert ((drawn.mT.cov() - covariance).abs() < 0.12 * sd[:, None] * sd).all()


@pytest.mark.parametrize("ndim", [2, 3])
def test_logarithms_of_affine_maps_are_their_parameters(ndim: int) -> None:
    torch.manual_seed(2)
    centre = 30 * torch.randn(ndim)
    parameters = 0.3 * torch.randn(2, 5, ndim * (ndim + 1))
    torch.testing.assert_close(Affine.exp(parameters, ndim, centre).log(centre), parameters, rtol=0, atol=1e-9)
    far = torch.cat([torch.tensor([300.0] * ndim), torch.full((ndim * ndim,), 0.5)])
    torch.testing.assert_close(Affine.exp(far, ndim).log(), far, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(Affine.identity(ndim).log(), torch.zeros(ndim * (ndim + 1)))
    mirror = torch.diag(torch.tensor([-1.0] + [1.0] * ndim))
    half_turn = torch.diag(torch.tensor([-1.0, -1.0] + [1.0] * (ndim - 1)))
    for matrix in (mirror, half_turn):
        with pytest.raises(ValueError, match="no real logarithm"):
            Affine(matrix).log()


def test_affine_maps_of_draws_know_nothing_of_headers() -> None:
    """Scans whose headers put them anywhere, in voxels of other order and direction: what remains is how bodies differ."""
    own = Affine.exp(PARAMETERS, 2)
    headers = torch.tensor([[[0.0, -1.0, 80.0], [1.0, 0.0, 300.0], [0.0, 0.0, 1.0]], [[-1.0, 0.0, -50.0], [0.0, 1.0, 7.0], [0.0, 0.0, 1.0]]])
    fixed, moving = (Grid(shape, matrix) for shape, matrix in zip(((28, 30), (31, 25)), headers, strict=True))
    here, back = own_world(fixed).matrix, own_world(fixed).inverse().matrix
    shape_alone = without_headers(Affine(own_world(moving).matrix @ own.matrix @ back), fixed, moving)
    torch.testing.assert_close(shape_alone.matrix, here @ own.matrix @ back)
    # The axes of own worlds are the world's here, so that the parameters are those about the middle.
    torch.testing.assert_close(shape_alone.log(here[:2, 2]), PARAMETERS)


def test_any_two_deformation_priors_are_composed() -> None:
    known, labels = estimates()
    model = learned(known, labels)
    assert isinstance(model.spatial, AffineVelocity) and isinstance(model.spatial.affine, PrincipalAffine)
    both = AffineVelocity(AffinePrior(2), model.spatial.deformation)
    trace = poutine.trace(both).get_trace()
    assert set(trace.stochastic_nodes) == {"affine", "velocity"}
    points = GRID.coordinates(torch.float64)[::5, ::7]
    flow = model.spatial.deformation.velocity.evaluate(trace.nodes["velocity"]["value"])  # type: ignore[union-attr, operator]
    expected = AffinePrior(2).evaluate(trace.nodes["affine"]["value"])(Velocity(known.lattice, flow)(points))
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"](points), expected)
    assert not isinstance(learned(known, labels, affine=False).spatial, AffineVelocity)
    with pytest.raises(ValueError, match="two affine maps or more, got 1"):
        PrincipalAffine.fit(known.affines[:1], torch.zeros(2))
    with pytest.raises(ValueError, match=r"expected parameters \(12,\)"):
        PrincipalAffine(PrincipalField(torch.zeros(6), torch.zeros(1, 6)), 3, torch.zeros(3))


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
