"""What figures of several tables share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from probmed.report.palette import ACCENT, FAINT
from probmed.report.panels import bare_axes


def band(values: Tensor, resamples: int = 2000) -> tuple[float, float, float]:
    """2.5 % quantile, mean, and 97.5 % quantile of the mean over resampled cases."""
    generator = torch.Generator().manual_seed(0)
    means = values[torch.randint(len(values), (resamples, len(values)), generator=generator)].mean(1)
    return float(means.quantile(0.025)), float(values.mean()), float(means.quantile(0.975))


def forest(axis: Any, of: Mapping[str, Tensor], ours: str, unit: str, named: bool = True) -> None:
    """A mean with its 95 % bootstrap interval a method, the first at the top.

    Arguments:
        of: each method's values over cases. ours: the method that stands out. unit: of the values.
        named: whether methods' names stand at the left.
    """
    for place, (name, values) in enumerate(of.items()):
        low, middle, high = band(values)
        colour = ACCENT if name == ours else FAINT
        axis.plot([low, high], [place, place], color=colour, lw=2, solid_capstyle="round")
        axis.plot([middle], [place], "o", color=colour, ms=5)
    axis.set_yticks(range(len(of)), list(of) if named else [""] * len(of), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(unit, fontsize=8)
    axis.tick_params(axis="x", labelsize=7.5)
    bare_axes(axis)
