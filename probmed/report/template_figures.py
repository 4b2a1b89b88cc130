"""The figures of a template and its cohort."""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from probmed.report.panels import colour_bar, coloured, grey, name_sides, panels
from probmed.report.planes import Array, Orientation, Plane, bounding_box, centre_of, planes_through, window
from probmed.transforms import warp
from probmed.volumes import Volume, scaled
from probmed.workflows.template_outputs import log_jacobian_of_effect
from probmed.workflows.templates import TemplateResult

_FOREGROUND = 0.1
_MARGIN_MM = 5.0


class TemplateView:
    """The planes on which a template is shown, and the limits of its grey values."""

    def __init__(self, result: TemplateResult) -> None:
        self.result = result
        image = result.at()
        self.turn = Orientation.of(Volume.from_grid(image, result.grid).as_3d().affine)
        turned = self.turn(image)
        bright = turned > _FOREGROUND
        box = bounding_box(bright, _MARGIN_MM, self.turn.spacing)
        self.planes: list[Plane] = planes_through(centre_of(bright), box, turned.shape, self.turn.spacing)
        self.limits = window(turned, bright)

    def mean(self) -> Array:
        """Of the scans after their affine maps, oriented, NaN where there is none."""
        result = self.result
        total = torch.zeros(result.grid.shape)
        count = torch.zeros(result.grid.shape)
        for scan, affine in zip(result.scans, result.affines, strict=True):
            moved = warp(scaled(scan.data)[None], scan.grid, affine, result.grid, fill=math.nan)[0]
            total += moved.nan_to_num(0.0)
            count += ~moved.isnan()
        return self.turn(total / count)


def template(view: TemplateView) -> Figure:
    """The template below the mean of the scans after their affine maps."""
    return _greys(view, [("affine mean", view.mean()), ("template", view.turn(view.result.at()))])


def changes(view: TemplateView, index: int) -> Figure:
    """The template at the least, mean and greatest value of a covariate."""
    result, rows = view.result, []
    low, high = result.ends(index)
    for value in (low, float(result.means[index]), high):
        chosen = result.means.tolist()
        chosen[index] = value
        rows.append((f"{result.names[index]} {value:.3g}", view.turn(result.at(chosen))))
    return _greys(view, rows)


def growth(view: TemplateView, index: int) -> Figure:
    """What one standard deviation of a covariate does to volumes."""
    image = view.turn(log_jacobian_of_effect(view.result, index))
    end = max(float(np.nanquantile(np.abs(image), 0.995)), 1e-3)
    figure, axes = panels(view.planes, 1, ["log det"], bars=True)
    for axis, plane in zip(axes[0], view.planes, strict=False):
        shown = coloured(axis, plane.cut(image), "RdBu_r", Normalize(-end, end))
    colour_bar(figure, axes[0][-1], shown, "log det")
    return figure


def _greys(view: TemplateView, rows: list[tuple[str, Array]]) -> Figure:
    figure, axes = panels(view.planes, len(rows), [title for title, _ in rows])
    for line, (_, image) in zip(axes, rows, strict=True):
        for axis, plane in zip(line, view.planes, strict=True):
            grey(axis, plane.cut(image), view.limits)
            name_sides(axis, plane)
    return figure
