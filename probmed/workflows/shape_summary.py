"""What a shape prior has learned, in numbers: codes that tell bodies apart, and how probable label maps are that it has not seen."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from probmed.inference.parameters import seeded
from probmed.models.shape_vae import active_units, log_evidence
from probmed.volumes import atomic_write
from probmed.workflows.shapes import TrainedShapes

_TOGETHER = 4  # label maps


@dataclass(frozen=True)
class ShapeSummary:
    """A trained prior, measured.

    Arguments:
        codes: L. active: those that tell label maps apart (``shape_vae.active_units``), the one that varies most first.
        held_out: number of label maps that training has not seen; without any the rest is None.
        log_evidence: mean over them of log p(S), by importance sampling with ``draws`` draws each, nats a map.
        mean_atlas: mean of log p(S) where each voxel's label is drawn from the mean atlas by itself, nats a map.
        gain_error: standard error over label maps of the mean of their difference, nats; None for one map.
        draws: of the code, for each map.
    """

    codes: int
    active: tuple[int, ...]
    held_out: int = 0
    log_evidence: float | None = None
    mean_atlas: float | None = None
    gain_error: float | None = None
    draws: int = 0

    def save(self, folder: Path) -> None:
        """``summary.json``."""
        with atomic_write(folder / "summary.json") as path:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @property
    def line(self) -> str:
        """What a command says of it."""
        found = f"{len(self.active)} of {self.codes} codes tell label maps apart"
        if self.log_evidence is None or self.mean_atlas is None:
            return found
        error = "" if self.gain_error is None else f" (difference ± {self.gain_error:.1f})"
        maps = f"{self.held_out} label map{'' if self.held_out == 1 else 's'} left out"
        return f"{found}; log p(S) of {maps}: {self.log_evidence:.1f} nats a map, by the mean atlas {self.mean_atlas:.1f}{error}"


@torch.no_grad()
def summarise(trained: TrainedShapes, labels: Tensor, held_out: Tensor | None = None, draws: int = 200, seed: int = 0) -> ShapeSummary:
    """Measure a prior.

    Arguments:
        labels: that it was trained on, ``(N, *grid.shape)`` indices: codes are active over them. held_out: others, alike.
        draws: of the code for each map that is held out.
    """
    codes = trained.settings.codes
    order = trained.guide.of_labels(labels).loc.var(0).argsort(descending=True)
    active = tuple(order[active_units(trained.guide, labels)[order]].tolist())
    if held_out is None or not len(held_out):
        return ShapeSummary(codes, active)
    with seeded(seed):
        found = torch.cat([log_evidence(trained.shapes, trained.guide, some, draws) for some in held_out.split(_TOGETHER)])
    by_atlas = trained.log_atlas.expand(len(held_out), *trained.log_atlas.shape).gather(1, held_out[:, None]).flatten(1).sum(1)
    gain = found - by_atlas
    error = float(gain.std() / len(gain) ** 0.5) if len(gain) > 1 else None
    return ShapeSummary(codes, active, len(held_out), float(found.mean()), float(by_atlas.mean()), error, draws)
