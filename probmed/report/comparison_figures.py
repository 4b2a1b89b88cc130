"""The figures of several segmentations of one scan."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from probmed.report.palette import distinct, rgb
from probmed.report.panels import colour_bar, coloured, grey, name_sides, panels
from probmed.report.planes import Array, Orientation, bounding_box, centre_of, planes_through, window
from probmed.workflows.comparison import Comparison

_MARGIN_MM = 6.0


def colours_of(comparison: Comparison) -> dict[str, str]:
    """Of the labels, by name."""
    return dict(zip(comparison.labels.values(), distinct(len(comparison.labels)), strict=True))


def side_by_side(comparison: Comparison) -> Figure:
    """The scan, each segmentation over it, and where they disagree, in three planes."""
    scan = comparison.scan.as_3d()
    turn = Orientation.of(scan.affine)
    maps = {name: turn(labels) for name, labels in comparison.maps.items()}
    inside = np.any([labels > 0 for labels in maps.values()], axis=0)
    box = bounding_box(inside, _MARGIN_MM, turn.spacing)
    image = turn(scan.data)
    planes = planes_through(centre_of(inside), box, image.shape, turn.spacing)
    limits = window(image, inside)
    colours = dict(zip(comparison.labels, colours_of(comparison).values(), strict=True))
    figure, axes = panels(planes, len(maps) + 2, ["scan", *maps, "disagreement"], bars=True)
    for line, labels in zip(axes, [None, *maps.values()], strict=False):
        for axis, plane in zip(line, planes, strict=False):
            grey(axis, plane.cut(image), limits)
            name_sides(axis, plane)
            if labels is not None:
                _tint(axis, plane.cut(labels), colours)
        line[-1].set_axis_off()
    doubt = turn(comparison.disagreement())
    for axis, plane in zip(axes[-1], planes, strict=False):
        shown = coloured(axis, plane.cut(doubt), "magma", Normalize(0, math.log(2)))
    colour_bar(figure, axes[-1][-1], shown, "nats")
    return figure


def _tint(axis: Axes, labels: Array, colours: dict[int, str]) -> None:
    overlay = np.zeros((*labels.shape, 4))
    for code, colour in colours.items():
        overlay[labels == code] = (*rgb(colour), 0.5)
    axis.imshow(overlay, origin="lower", aspect="auto", interpolation="nearest")
