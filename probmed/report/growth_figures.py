"""The figures of how bodies change: maps of effects on growth, and a follow-up scan beside its prediction."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from probmed.report.panels import colour_bar, coloured, grey, name_sides, panels
from probmed.report.planes import Array, Orientation, Plane, bounding_box, centre_of, planes_through, window
from probmed.volumes import Volume, scaled
from probmed.workflows.follow_up_checks import Foretold
from probmed.workflows.growth import LabelledScan

_MARGIN_MM = 5.0
_SURE = 4.0  # standard errors, the end of the colours


class _View:
    """Planes through the middle of some voxels of a scan."""

    def __init__(self, scan: Volume, inside: Tensor) -> None:
        whole = scan.as_3d()
        self.turn = Orientation.of(whole.affine)
        mask = self.turn(inside) > 0
        box = bounding_box(mask, _MARGIN_MM, self.turn.spacing)
        self.planes: list[Plane] = planes_through(centre_of(mask), box, mask.shape, self.turn.spacing)
        self.limits = window(self.turn(scaled(scan.data)), mask if mask.any() else None)


def effect(atlas: LabelledScan, mean: Tensor, sd: Tensor) -> Figure:
    """An effect on yearly growth in per cent of volume, and in its standard errors, on the atlas."""
    view = _View(atlas.scan, atlas.labels.data > 0)
    percent = 100 * view.turn(mean)
    figure, axes = panels(view.planes, 2, ["% per year", "standard errors"], bars=True)
    end = max(float(np.nanquantile(np.abs(percent), 0.995)), 1e-6)
    surely = view.turn(mean / sd.clamp_min(torch.finfo(sd.dtype).tiny))
    for line, image, limit, unit in ((axes[0], percent, end, "%"), (axes[1], surely, _SURE, "SE")):
        for axis, plane in zip(line, view.planes, strict=False):
            shown = coloured(axis, plane.cut(image), "RdBu_r", Normalize(-limit, limit))
            name_sides(axis, plane)
        colour_bar(figure, line[-1], shown, unit)
    return figure


def follow_up(found: Foretold) -> Figure:
    """Baseline, follow-up and its prediction; below, what changed and what should have changed, at one scale."""
    told = found.forecast
    view = _View(told.baseline, told.labels > 0)
    baseline, observed, predicted = (view.turn(scaled(image)) for image in (told.baseline.data, found.observed, told.predicted))
    greys: list[tuple[str, Array]] = [("baseline", baseline), ("follow-up", observed), ("predicted", predicted)]
    changes: list[tuple[str, Array]] = [("change", observed - baseline), ("predicted change", predicted - baseline)]
    figure, axes = panels(view.planes, 5, [title for title, _ in greys + changes], bars=True)
    end = max(float(np.nanquantile(np.abs(changes[0][1]), 0.99)), 1e-6)
    for line, (_, image) in zip(axes, greys, strict=False):
        for axis, plane in zip(line, view.planes, strict=False):
            grey(axis, plane.cut(image), view.limits)
            name_sides(axis, plane)
        line[-1].set_axis_off()
    for line, (_, image) in zip(axes[len(greys) :], changes, strict=True):
        for axis, plane in zip(line, view.planes, strict=False):
            shown = coloured(axis, plane.cut(image), "RdBu_r", Normalize(-end, end))
        colour_bar(figure, line[-1], shown, "intensity")
    return figure
