"""The figures of a segmented scan, each a function of a result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from probmed.report.palette import ACCENT, FAINT, INK, distinct, label_colours, rgb
from probmed.report.panels import WIDTH, bare_axes, blank_figure, colour_bar, coloured, grey, name_sides, panels
from probmed.report.planes import (
    Array,
    Orientation,
    Plane,
    bounding_box,
    centre_of,
    plane_at,
    planes_through,
    spread_over,
    window,
)
from probmed.workflows.segmentation import SegmentationResult
from probmed.workflows.supervision_outputs import Labelled

_MARGIN_MM = 12.0
_MANY = 6  # labels of a network whose probabilities are shown


@dataclass(frozen=True)
class View:
    """A result's images, reoriented once for all figures, ``(nx, ny, nz)``, and planes through the brain."""

    scan: Array
    labels: Array
    probabilities: dict[str, Array]
    entropy: Array
    bias: list[Array]
    corrected: list[Array]
    scans: list[Array]
    box: tuple[slice, ...]
    planes: list[Plane]
    spacing: tuple[float, float, float]
    index: dict[str, int]
    colours: dict[str, str]

    @classmethod
    def of(cls, result: SegmentationResult) -> View:
        first = result.channels[0].as_3d()
        turn = Orientation.of(first.affine)
        index = dict(zip(result.names, result.indices, strict=True))
        labels = turn(result.labels.cpu().numpy())
        brain = np.isin(labels, [index[name] for name in result.brain])
        box = bounding_box(brain, _MARGIN_MM, turn.spacing)
        scans = [turn(first.data.cpu().numpy())]
        for volume, corrected, bias in zip(
            result.channels[1:], result.corrected[1:], result.bias[1:], strict=True
        ):
            # Other channels have grids of their own; what the model saw of them is corrected over field.
            del volume
            scans.append(turn((corrected / bias.clamp_min(1e-6)).cpu().numpy()))
        probabilities = {
            name: turn(result.probabilities[result.names.index(name)].cpu().numpy()) for name in result.brain
        }
        return cls(
            scan=scans[0],
            labels=labels,
            probabilities=probabilities,
            entropy=turn(result.entropy.cpu().numpy()),
            bias=[turn(b.cpu().numpy()) for b in result.bias],
            corrected=[turn(c.cpu().numpy()) for c in result.corrected],
            scans=scans,
            box=box,
            planes=planes_through(centre_of(brain), box, labels.shape, turn.spacing),
            spacing=turn.spacing,
            index=index,
            colours=label_colours(result.names, result.colours, result.brain),
        )

    @classmethod
    def of_labels(cls, result: Labelled) -> View:
        """Of what networks say: the scan without field; of many labels the probabilities of the largest."""
        scan = result.scan.as_3d()
        turn = Orientation.of(scan.affine)
        labels, image = turn(result.labels.cpu().numpy()), turn(scan.data.cpu().numpy())
        inside = labels > 0
        box = bounding_box(inside, _MARGIN_MM, turn.spacing)
        largest = sorted(result.volumes["volume_ml"].nlargest(_MANY).index)
        names = list(result.names.values())
        return cls(
            scan=image,
            labels=labels,
            probabilities={names[k]: turn(result.probabilities[1 + k].cpu().numpy()) for k in largest},
            entropy=turn(result.entropy.cpu().numpy()),
            bias=[],
            corrected=[],
            scans=[image],
            box=box,
            planes=planes_through(centre_of(inside), box, labels.shape, turn.spacing),
            spacing=turn.spacing,
            index={name: code for code, name in result.names.items()},
            colours=dict(zip(names, distinct(len(names)), strict=True)),
        )

    @property
    def brain(self) -> Array:
        """Probability of brain, or of the labels that are shown."""
        return np.asarray(sum(self.probabilities.values()))


def segmentation(view: View) -> Figure:
    """The scan and the labels over it, in three planes."""
    figure, axes = panels(view.planes, 2, ["scan", "labels"])
    limits = window(view.scan, view.brain > 0.5)
    for column, plane in enumerate(view.planes):
        grey(axes[0][column], plane.cut(view.scan), limits)
        grey(axes[1][column], plane.cut(view.scan), limits)
        _tint(axes[1][column], plane, view)
        name_sides(axes[0][column], plane)
        name_sides(axes[1][column], plane)
    return figure


def slices(view: View, count: int = 12) -> Figure | None:
    """Labels over axial slices from below to above; None of a single slice."""
    name = "axial"
    if len(view.planes) < 2:
        return None
    planes = [plane_at(name, i, view.box, view.spacing) for i in spread_over(view.box, name, count)]
    columns = 6
    width, height = planes[0].size
    rows = math.ceil(len(planes) / columns)
    figure = blank_figure(WIDTH, WIDTH / columns * height / width * rows)
    limits = window(view.scan, view.brain > 0.5)
    for i, plane in enumerate(planes):
        axis = figure.add_axes(
            ((i % columns) / columns, 1 - (i // columns + 1) / rows, 0.99 / columns, 0.99 / rows)
        )
        grey(axis, plane.cut(view.scan), limits)
        _tint(axis, plane, view)
        name_sides(axis, plane)
    return figure


def posterior(view: View) -> Figure:
    """p(S = k | I) of each brain label, and the entropy."""
    names = list(view.probabilities)
    figure, axes = panels(
        view.planes, len(names) + 1, [f"p({name})" for name in names] + ["entropy"], bars=True
    )
    for row, name in enumerate(names):
        shown = None
        for column, plane in enumerate(view.planes):
            shown = coloured(axes[row][column], plane.cut(view.probabilities[name]), "magma", Normalize(0.0, 1.0))
        colour_bar(figure, axes[row][-1], shown, "")
    top = max(math.log(2), float(np.quantile(view.entropy, 0.9999)))
    for column, plane in enumerate(view.planes):
        shown = coloured(axes[-1][column], plane.cut(view.entropy), "viridis", Normalize(0.0, top))
    colour_bar(figure, axes[-1][-1], shown, "nats")
    return figure


def bias(view: View, channel: int) -> Figure:
    """A channel as it was, its bias field, and corrected."""
    figure, axes = panels(view.planes, 3, ["scan", "field", "corrected"], bars=True)
    inside = view.brain > 0.5
    field = view.bias[channel]
    reach = float(np.abs(np.log(np.clip(field[inside], 1e-6, None))).max()) if inside.any() else 0.0
    span = math.exp(max(reach, 0.05))
    scale = TwoSlopeNorm(1.0, 1 / span, span)
    shown = None
    for column, plane in enumerate(view.planes):
        grey(axes[0][column], plane.cut(view.scans[channel]), window(view.scans[channel], inside))
        shown = coloured(axes[1][column], plane.cut(field), "RdBu_r", scale)
        grey(axes[2][column], plane.cut(view.corrected[channel]), window(view.corrected[channel], inside))
    colour_bar(figure, axes[1][-1], shown, "×")
    for row in (0, 2):
        axes[row][-1].set_axis_off()
    return figure


def histogram(view: View, result: SegmentationResult, channel: int) -> Figure:
    """Corrected intensities where the brain is, and the fitted Gaussians."""
    figure = blank_figure(WIDTH, 3.2)
    axis = figure.add_axes((0.07, 0.17, 0.91, 0.78))
    inside = view.brain > 0.5
    values = view.corrected[channel][inside]
    if not values.size:
        axis.text(0.5, 0.5, "no brain was found", ha="center", color=FAINT, transform=axis.transAxes)
        return figure
    low, high = np.percentile(values, [0.1, 99.9])
    pad = 0.05 * (high - low) or 1.0
    low, high = low - pad, high + pad
    axis.hist(values, bins=160, range=(low, high), density=True, color="#d5dbe0", label="voxels of the brain")
    x = np.linspace(low, high, 600)
    total = np.zeros_like(x)
    owner, shares = result.mixture["owner"].numpy(), result.mixture["shares"].numpy().astype(np.float64)
    means = result.mixture["means"].numpy().astype(np.float64)[:, channel]
    variances = result.mixture["covariances"].numpy().astype(np.float64)[:, channel, channel]
    for name in result.brain:
        mass = float(view.probabilities[name][inside].mean())
        own = np.flatnonzero(owner == result.names.index(name))
        curve = np.zeros_like(x)
        for g in own:
            weight = mass * shares[g] / max(float(shares[own].sum()), 1e-12)
            curve += (
                weight * np.exp(-0.5 * (x - means[g]) ** 2 / variances[g]) / np.sqrt(2 * np.pi * variances[g])
            )
        axis.plot(x, curve, color=view.colours[name], lw=2, label=name)
        total += curve
    axis.plot(x, total, color=INK, lw=1, ls="--", label="sum")
    axis.set_xlim(low, high)
    axis.set_xlabel("corrected intensity")
    axis.set_ylabel("density")
    axis.set_yticks([])
    axis.legend(loc="upper right", frameon=False, fontsize=8.5)
    bare_axes(axis)
    return figure


def volumes(volumes: pd.DataFrame, colours: Mapping[str, str], truth: Mapping[str, float] | None = None) -> Figure:
    """Volumes with their 50, 80 and 95 % intervals, a row a label that has a colour, each on an axis of its own.

    Arguments:
        volumes: ``interval_table``.
    """
    table = volumes.set_index("name")
    names = [name for name in table.index if name in colours]
    figure = blank_figure(WIDTH, 0.72 * len(names) + 0.35)
    height = 1 / len(names)
    for i, name in enumerate(names):
        row = table.loc[name]
        axis = figure.add_axes((0.09, 1 - (i + 1) * height + 0.42 * height, 0.87, 0.5 * height))
        for a, b, thick in (("q025", "q975", 4), ("q100", "q900", 8), ("q250", "q750", 13)):
            axis.plot(
                [row[a], row[b]], [0, 0], color=colours[name], lw=thick, alpha=0.45, solid_capstyle="butt"
            )
        axis.plot([row["volume_ml"]], [0], "|", color=INK, ms=18, mew=2)
        ends = [row["q025"], row["q975"], row["volume_ml"]]
        if truth is not None and name in truth:
            axis.plot([truth[name]], [0], "D", color="white", mec=INK, ms=7, zorder=5)
            ends.append(truth[name])
        pad = 0.15 * (max(ends) - min(ends)) or 1.0
        axis.set_xlim(min(ends) - pad, max(ends) + pad)
        axis.set_yticks([0], [name])
        axis.tick_params(axis="y", length=0, labelsize=10)
        axis.tick_params(axis="x", labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(6))
        bare_axes(axis)
        axis.spines["left"].set_visible(False)
    return figure


def convergence(result: SegmentationResult) -> Figure:
    """The gain of each round, nats."""
    figure = blank_figure(WIDTH, 2.4)
    axis = figure.add_axes((0.09, 0.22, 0.89, 0.72))
    numbers = [r.number for r in result.rounds]
    gains = [r.gain if r.gain > 0 else math.nan for r in result.rounds]
    axis.plot(numbers, gains, "o-", color=ACCENT, lw=1.5, ms=5)
    if any(g > 0 for g in gains):
        axis.set_yscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("round")
    axis.set_ylabel("gain in log joint, nats")
    bare_axes(axis)
    return figure


def _tint(axis: Axes, plane: Plane, view: View) -> None:
    labels = plane.cut(view.labels)
    overlay = np.zeros((*labels.shape, 4))
    for name, colour in view.colours.items():
        overlay[labels == view.index[name]] = (*rgb(colour), 0.5)
    axis.imshow(overlay, origin="lower", aspect="auto", interpolation="nearest")


