"""The figure of a shape prior: shapes that it draws, label maps and what it makes of them, and what single codes change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from probmed.inference.parameters import seeded
from probmed.models.shape_vae import traversal
from probmed.report.palette import INK, distinct, rgb
from probmed.report.panels import panels
from probmed.report.planes import Array, Orientation, Plane, bounding_box, centre_of, planes_through
from probmed.workflows.shapes import TrainedShapes

_MARGIN_MM = 6.0
_COLUMNS, _TRAVERSED, _FARTHEST = 7, 3, 3.0  # of the figure; codes; standard deviations of the prior
_LEGEND = 0.4  # inches


@torch.no_grad()
def shape_figure(trained: TrainedShapes, labels: Tensor, units: Sequence[int], seed: int = 0) -> Figure:
    """Samples, label maps with their reconstructions, and traversals of codes; a plane of each, the colours of labels mixed by their probabilities.

    Arguments:
        labels: label maps ``(N, *grid.shape)``, the first few of which are shown.
        units: codes in the order of their importance, the first few of which are traversed.
    """
    with seeded(seed):
        samples = trained.shapes.decode(torch.randn(_COLUMNS, trained.settings.codes).to(trained.log_atlas)).exp()
    shown = labels[:_COLUMNS]
    rebuilt = trained.shapes.decode(trained.guide.of_labels(shown).loc).exp()
    truth = torch.nn.functional.one_hot(shown, len(trained.codes)).movedim(-1, 1)
    values = torch.linspace(-_FARTHEST, _FARTHEST, _COLUMNS).to(trained.log_atlas)
    rows = [("drawn", samples), ("label maps", truth), ("rebuilt", rebuilt)]
    rows += [(f"code {unit + 1}", traversal(trained.shapes, unit, values)) for unit in units[:_TRAVERSED]]
    turn = Orientation.of(_affine(trained))
    plane = _widest(turn, trained)
    figure, axes = panels([plane] * _COLUMNS, len(rows), [title for title, _ in rows])
    colours = np.array([(1.0, 1.0, 1.0), *map(rgb, distinct(len(trained.codes) - 1))])
    for line, (_, probabilities) in zip(axes, rows, strict=True):
        for axis in line[len(probabilities) :]:
            axis.set_visible(False)
        for axis, one in zip(line, probabilities, strict=False):
            cut = np.stack([plane.cut(turn(p)) for p in one], -1)
            _mixed(axis, cut @ colours)
    for line in axes[3:]:
        for axis, value in zip(line, values.tolist(), strict=True):
            axis.text(0.03, 0.97, f"{value:+.0f}", transform=axis.transAxes, va="top", color=INK, fontsize=8)
    _with_legend(figure, trained.shapes.names[1:], colours[1:])
    return figure


def _affine(trained: TrainedShapes) -> Array:
    """Of the prior's grid, ``(4, 4)``, also where it has two axes."""
    d, affine = trained.grid.ndim, np.eye(4)
    affine[:d, :d], affine[:d, 3] = trained.grid.affine[:d, :d].numpy(), trained.grid.affine[:d, d].numpy()
    return affine


def _widest(turn: Orientation, trained: TrainedShapes) -> Plane:
    """The anatomical plane through the middle of the mean shape in which most of it is seen."""
    mask = turn(trained.log_atlas[0].exp() < 0.5) > 0
    box = bounding_box(mask, _MARGIN_MM, turn.spacing)
    planes = planes_through(centre_of(mask), box, mask.shape, turn.spacing)
    return max(planes, key=lambda plane: float(plane.cut(mask.astype(np.float64)).sum()) * plane.step**2 * plane.aspect)


def _mixed(axis: Axes, colours: Array) -> None:
    """A slice of colours ``(rows, columns, 3)``, framed, for its ground is white."""
    axis.imshow(colours.clip(0, 1), origin="lower", aspect="auto", interpolation="nearest")
    axis.set_axis_on()
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color("#d5dbe0")


def _with_legend(figure: Figure, names: Sequence[str], colours: Array) -> None:
    """Names of the labels below everything, in room that is added for them."""
    width, height = figure.get_size_inches()
    total = height + _LEGEND
    figure.set_size_inches(width, total)
    for axis in figure.axes:
        box = axis.get_position()
        axis.set_position((box.x0, (box.y0 * height + _LEGEND) / total, box.width, box.height * height / total))
    for text in figure.texts:
        x, y = text.get_position()
        text.set_position((x, (y * height + _LEGEND) / total))
    handles = [Patch(color=tuple(colour), label=name) for name, colour in zip(names, colours, strict=True)]
    figure.legend(handles=handles, loc="lower center", ncol=min(len(handles), 8), frameon=False, fontsize=8)
