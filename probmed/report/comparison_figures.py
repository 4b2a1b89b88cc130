"""The figures of several segmentations of one scan."""

from __future__ import annotations

import math
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from probmed.report.palette import INK, distinct, rgb
from probmed.report.panels import WIDTH, bare_axes, blank_figure, colour_bar, coloured, grey, name_sides, panels
from probmed.report.planes import Array, Orientation, bounding_box, centre_of, planes_through, window
from probmed.workflows.comparison import Comparison

_MARGIN_MM = 6.0
_HEIGHT = 16.0  # inches of all rows; more only where each would be too small
_MOST = 8  # labels whose volumes are drawn


def colours_of(comparison: Comparison) -> dict[str, str]:
    """Of the labels, by name."""
    return dict(zip(comparison.labels.values(), distinct(len(comparison.labels)), strict=True))


def side_by_side(comparison: Comparison) -> Figure:
    """The scan, each segmentation over it with the truth's outline, and where they disagree, in three planes; all in the same contrast."""
    scan = comparison.scan.as_3d()
    turn = Orientation.of(scan.affine)
    maps = {name: turn(labels) for name, labels in comparison.maps.items()}
    inside = np.any([labels > 0 for labels in maps.values()], axis=0)
    box = bounding_box(inside, _MARGIN_MM, turn.spacing)
    image = turn(scan.data)
    planes = planes_through(centre_of(inside), box, image.shape, turn.spacing)
    limits = window(image, inside)
    colours = dict(zip(comparison.labels, colours_of(comparison).values(), strict=True))
    titles = ["scan", *maps, "disagreement"]
    figure, axes = panels(planes, len(titles), titles, bars=True, tallest=max(1.6, _HEIGHT / len(titles)))
    truth = None if comparison.truth is None else maps[comparison.truth]
    for line, labels in zip(axes, [None, *maps.values(), None], strict=True):
        for axis, plane in zip(line, planes, strict=False):
            grey(axis, plane.cut(image), limits)
            name_sides(axis, plane)
            if labels is not None:
                _tint(axis, plane.cut(labels), colours)
            if labels is not None and truth is not None and labels is not truth:
                _outline(axis, plane.cut(truth))
        if line is not axes[-1]:
            line[-1].set_axis_off()
    doubt = turn(comparison.disagreement())
    # Voters that all differ, or one for each label.
    most = math.log(max(2, min(len(maps) - (truth is not None), len(comparison.labels) + 1)))
    for axis, plane in zip(axes[-1], planes, strict=False):
        cut = plane.cut(doubt)
        shown = coloured(axis, np.ma.masked_where(cut <= 0, cut), "plasma", Normalize(0, most))
    colour_bar(figure, axes[-1][-1], shown, "nats")
    return figure


def volumes(comparison: Comparison) -> Figure:
    """Of the largest labels, the volume of each segmentation's voxels, and what it says of the volume with a 95 % interval; the truth's as a line."""
    table = comparison.volumes()
    largest = table.groupby("index")["volume_ml"].max().nlargest(_MOST).index
    shown = [code for code in comparison.labels if code in largest]
    names, colours = [name for name in comparison.maps if name != comparison.truth], colours_of(comparison)
    each = 0.2 * len(names) + 0.75  # inches
    figure = blank_figure(WIDTH, each * len(shown))
    for i, code in enumerate(shown):
        axis = figure.add_axes((0.24, (each * (len(shown) - i - 1) + 0.3) / (each * len(shown)), 0.72, (each - 0.6) / (each * len(shown))))
        rows = table[table["index"] == code]
        counted = {str(name): float(ml) for name, ml in zip(rows["segmentation"], rows["volume_ml"], strict=True)}
        label = comparison.labels[code]
        for y, name in enumerate(names):
            expected, low, high = comparison.expected.get((name, code), (math.nan,) * 3)
            axis.plot([low, high], [y, y], color=colours[label], lw=6, alpha=0.45, solid_capstyle="butt")
            axis.plot([expected], [y], "|", color=INK, ms=10, mew=2)
            axis.plot([counted[name]], [y], "o", color=colours[label], mec=INK, mew=0.7, ms=5)
        if comparison.truth is not None:
            axis.axvline(counted[comparison.truth], color=INK, lw=1, ls="--")
        axis.set_yticks(range(len(names)), [textwrap.shorten(name, 34, placeholder=" …") for name in names], fontsize=8)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.tick_params(axis="x", labelsize=8)
        axis.tick_params(axis="y", length=0)
        axis.set_title(f"{label}, ml", loc="left", fontsize=9, color=INK)
        bare_axes(axis)
        axis.margins(x=0.06)
    return figure


def _tint(axis: Axes, labels: Array, colours: dict[int, str]) -> None:
    overlay = np.zeros((*labels.shape, 4))
    for code, colour in colours.items():
        overlay[labels == code] = (*rgb(colour), 0.5)
    axis.imshow(overlay, origin="lower", aspect="auto", interpolation="nearest")


def _outline(axis: Axes, labels: Array) -> None:
    """Of each label, along the voxels' edges."""
    rows, columns = labels.shape
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    segments = [((x + 0.5, y - 0.5), (x + 0.5, y + 0.5)) for y, x in np.argwhere(across)]
    segments += [((x - 0.5, y + 0.5), (x + 0.5, y + 0.5)) for y, x in np.argwhere(down)]
    axis.add_collection(LineCollection(segments, colors="white", linewidths=0.9))
    axis.set_xlim(-0.5, columns - 0.5)
    axis.set_ylim(-0.5, rows - 0.5)
