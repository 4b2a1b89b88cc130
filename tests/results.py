"""A tiny segmented scan, made without a fit, a report without figures, and what a refusal looks like."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from typer.testing import Result

from probmed.atlases import LabelAtlas
from probmed.grids import Grid
from probmed.inference.em import Round
from probmed.transforms import Affine
from probmed.volumes import UnusableInput, Volume, read_scan
from probmed.workflows.provenance import Provenance
from probmed.workflows.segmentation import SegmentationResult, volume_table

nib: Any = nibabel  # its classes are partly untyped
NAMES = ("GM", "WM", "CSF", "background")
TRANSLATION = torch.tensor([3.0, -2.0, 1.0])


def tiny_atlas() -> LabelAtlas:
    """Four classes on 8³ voxels of 4 mm."""
    probabilities = torch.softmax(torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(1)), 0)
    return LabelAtlas(NAMES, probabilities, Grid.from_spacing((8, 8, 8), 4.0), brain=("GM", "WM", "CSF"))


def write_tiny_scan(path: Path, shape: tuple[int, ...] = (12, 10, 8)) -> Path:
    """A scan with axes P, S, R and anisotropic voxels."""
    values = np.random.default_rng(0).uniform(1, 100, shape).astype(np.float32)
    affine = np.array([[0, 0, 2.0, -8], [-1.0, 0, 0, 6], [0, 1.5, 0, -7], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def tiny_result(scans: Sequence[Path | str | Volume], seed: int = 0, draws: int = 20) -> SegmentationResult:
    """What ``segment`` would give, with random contents."""
    generator = torch.Generator().manual_seed(seed)
    channels = [scan if isinstance(scan, Volume) else read_scan(scan) for scan in scans]
    for other in channels[1:]:
        if other.as_3d().grid != channels[0].as_3d().grid:
            raise UnusableInput(str(other.path), "does not overlap", "check it")
    shape = channels[0].as_3d().shape
    atlas = tiny_atlas()
    logits = 3 * torch.randn(4, *shape, generator=generator)
    logits[3] += 6 * (torch.arange(shape[0]) < 3).float().reshape(-1, 1, 1)
    probabilities = torch.softmax(logits, 0)
    labels = torch.tensor(atlas.indices)[probabilities.argmax(0)]
    bias = torch.full((len(channels), *shape), 1.1)
    image = torch.stack([channel.as_3d().data for channel in channels])
    volumes = probabilities.flatten(1).sum(1) * channels[0].as_3d().grid.voxel_volume / 1000
    drawn = volumes + 0.05 * torch.randn(draws, 4, generator=generator)
    transform = Affine.exp(torch.tensor([*TRANSLATION.tolist(), 0, 0, 0]))

    def draw(count: int, draw_seed: int) -> torch.Tensor:
        chosen = torch.multinomial(
            probabilities.flatten(1).T, count, True, generator=torch.Generator().manual_seed(draw_seed)
        )
        return torch.tensor(atlas.indices)[chosen].T.reshape(count, *shape)

    return SegmentationResult(
        names=NAMES,
        indices=atlas.indices,
        colours=atlas.colours,
        brain=atlas.brain,
        channels=channels,
        probabilities=probabilities,
        labels=labels,
        entropy=-(probabilities * probabilities.log()).sum(0),
        bias=bias,
        corrected=image * bias,
        transform=transform,
        inverse=transform.inverse(),
        velocity_grid=atlas.grid,
        volumes=volume_table(atlas, volumes, drawn),
        volume_draws=drawn,
        stripped=True,
        rounds=[Round(1, -10.0, 5.0), Round(2, -9.0, 1.0), Round(3, -9.0, 0.0)],
        converged=True,
        mixture={
            "shares": torch.full((4,), 0.25),
            "means": torch.tensor([[20.0], [50.0], [80.0], [5.0]]).expand(4, len(channels)).clone(),
            "covariances": 100 * torch.eye(len(channels)).expand(4, -1, -1).clone(),
            "owner": torch.arange(4),
        },
        quality={
            "log_evidence_per_voxel": -1.5,
            "residual": {name: {"mean": 0.1, "sd": float("nan")} for name in NAMES},
            "score": 0.7,
            "remarks": ["a remark with <angle> brackets"],
        },
        tempering=0.2,
        seconds={"fit": 1.0},
        mode={},
        unit=torch.ones(len(channels)),
        seed=seed,
        _draw=draw,
    )


def plain_page(result: SegmentationResult, provenance: Provenance, title: str, truth: Sequence[dict[str, Any]] | None = None) -> str:
    """In place of ``segmentation_page``, whose figures take a second, where a test does not look at them: all else that goes in, and 10 kB."""
    return json.dumps([title, asdict(provenance), result.volumes.to_dict("list"), truth]).ljust(10_000)


def refused(result: Result, *words: str) -> None:
    """Status 2, and one line that has the words."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0], lines[0]
    assert "; " in lines[0]
