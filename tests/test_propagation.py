"""Labels carried by way of scans that have none, with registrations whose answer is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from probmed.grids import Grid
from probmed.transforms import Affine
from probmed.volumes import Volume
from probmed.workflows.propagation import fuse, label_templates
from probmed.workflows.registration import RegistrationSettings, register

GRID = Grid.from_spacing((12, 10), 1.0)


def shifted(by: float) -> Any:
    """A registration whose map moves along the first axis, mm."""
    matrix = torch.eye(3)
    matrix[0, 2] = by
    return SimpleNamespace(transform=Affine(matrix))


def test_labels_go_through_each_template_by_both_maps() -> None:
    labels = torch.zeros(GRID.shape, dtype=torch.int64)
    labels[4:7, 3:6] = 5
    labels[8, 8] = 7
    scans = [Volume.from_grid(torch.full(GRID.shape, float(n)), GRID) for n in range(4)]
    first, *templates, target = scans
    shift = {(0, 1): 1.0, (0, 2): 0.0, (1, 3): 1.0, (2, 3): 0.5}

    def known(moving: Volume, fixed: Volume) -> Any:
        return shifted(shift[int(moving.data[0, 0]), int(fixed.data[0, 0])])

    found = label_templates(Volume.from_grid(labels, GRID), first, templates, known)
    assert [t.probabilities.shape for t in found] == [(3, *GRID.shape)] * 2
    every = fuse(found, target, known)
    assert every.shape == (2, 3, *GRID.shape)
    torch.testing.assert_close(every.sum(1), torch.ones(2, *GRID.shape))
    five = (labels == 5).float()
    torch.testing.assert_close(every[0, 1], torch.roll(five, -2, 0))
    torch.testing.assert_close(every[1, 1], (five + torch.roll(five, -1, 0)) / 2)
    torch.testing.assert_close(every[1, 2].sum(), torch.tensor(1.0))


@pytest.mark.slow
def test_labels_carried_directly_and_through_templates_are_right() -> None:
    """Blobs of random centres and widths; one is labelled."""
    grid = Grid.from_spacing((32, 30), 1.0)

    def blob(seed: int) -> tuple[Volume, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        centre, width = 3 * torch.randn(2, generator=generator), 6 + 2 * torch.rand(2, generator=generator)
        inside = (((grid.coordinates() - centre) / width) ** 2).sum(-1)
        noise = 0.1 * torch.randn(grid.shape, generator=generator)
        return Volume.from_grid(1 / (1 + inside**4) + noise, grid), inside < 1

    scans = [blob(seed) for seed in range(8)]

    def run(moving: Volume, fixed: Volume) -> Any:
        return register(moving, fixed, device="cpu", settings=RegistrationSettings())

    labels = Volume.from_grid(scans[0][1].long(), grid)
    templates = label_templates(labels, scans[0][0], [scan for scan, _ in scans[1:5]], run)
    direct = label_templates(labels, scans[0][0], [scan for scan, _ in scans[5:]], run)
    errors = []
    for (scan, truth), one in zip(scans[5:], direct, strict=True):
        several = fuse(templates, scan, run).mean(0)
        errors.append([float(((p.argmax(0) == 1) != truth).float().mean()) for p in (one.probabilities, several)])
    mean = torch.tensor(errors).mean(0)
    assert (mean < 0.015).all()  # of 960 voxels; a border of half a voxel would be 4 %
