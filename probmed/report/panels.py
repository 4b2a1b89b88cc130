"""What the report's figures are made of: rows of planes at one scale, images, colour bars; matplotlib's global state is not touched."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from probmed.report.palette import FAINT, INK
from probmed.report.planes import Array, Plane

WIDTH = 9.6  # inches
_DPI = 100
_CHARACTERS = 11  # of a title an inch


def png(figure: Figure) -> bytes:
    """The figure as an image file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format="png", dpi=_DPI, facecolor=figure.get_facecolor(), metadata={"Software": None}
    )
    return buffer.getvalue()


def data_uri(figure: Figure) -> str:
    """The figure as text that a page holds in place of a file."""
    return "data:image/png;base64," + base64.b64encode(png(figure)).decode("ascii")


def blank_figure(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def panels(
    planes: Sequence[Plane], rows: int, titles: Sequence[str], bars: bool = False, tallest: float = 4.5
) -> tuple[Figure, list[list[Axes]]]:
    """Rows of the same planes at one scale, titles at their left, and room for colour bars at their right; none taller than so many inches."""
    left, right, gap = 0.35, 0.75 if bars else 0.05, 0.06
    scale = [millimetres(plane) for plane in planes]
    # A lone slice would otherwise fill the page.
    room = (WIDTH - left - right - gap * (len(planes) - 1)) * (1.0 if len(planes) > 1 else 0.5)
    unit = room / sum(width for width, _ in scale)
    tall = min(max(height for _, height in scale) * unit, tallest)
    unit = min(unit, tall / max(height for _, height in scale))
    total = rows * (tall + gap)
    figure = blank_figure(WIDTH, total)
    grid: list[list[Axes]] = []
    for row in range(rows):
        x, line = left, []
        y = total - (row + 1) * (tall + gap) + gap
        for width, height in scale:
            box = (
                x / WIDTH,
                (y + (tall - height * unit) / 2) / total,
                width * unit / WIDTH,
                height * unit / total,
            )
            axis = figure.add_axes(box)
            axis.set_axis_off()
            line.append(axis)
            x += width * unit + gap
        if bars:
            line.append(
                figure.add_axes((x / WIDTH, (y + 0.1 * tall) / total, 0.12 / WIDTH, 0.8 * tall / total))
            )
        middle = (y + tall / 2) / total
        lines = textwrap.wrap(titles[row], max(6, int(_CHARACTERS * tall)), max_lines=2, placeholder=" …")
        place, size = (0.1, 10) if len(lines) < 2 else (0.17, 8)
        figure.text(
            place / WIDTH, middle, "\n".join(lines), rotation=90, va="center", ha="center", color=INK, fontsize=size
        )
        grid.append(line)
    return figure, grid


def millimetres(plane: Plane) -> tuple[float, float]:
    """Width and height to scale between planes."""
    width, height = plane.size
    return width * plane.step, height * plane.step


def grey(axis: Axes, cut: Array, limits: tuple[float, float]) -> None:
    """A slice ``(rows, columns)`` in grey."""
    axis.imshow(
        cut,
        cmap="gray",
        vmin=limits[0],
        vmax=limits[1],
        origin="lower",
        aspect="auto",
        interpolation="bilinear",
    )
    axis.set_axis_off()


def coloured(axis: Axes, cut: Array, colours: str, scale: Normalize) -> Any:
    """A slice ``(rows, columns)`` in a colour map; what a colour bar is made from."""
    shown = axis.imshow(
        cut, cmap=colours, norm=scale, origin="lower", aspect="auto", interpolation="nearest"
    )
    axis.set_axis_off()
    return shown


def name_sides(axis: Axes, plane: Plane) -> None:
    """L and R, or P and A, in the upper corners."""
    # White with a dark rim is read on white matter as well as on air.
    rim = [patheffects.withStroke(linewidth=2.0, foreground=INK)]
    for x, side, text in zip((0.02, 0.98), ("left", "right"), plane.edges, strict=True):
        axis.text(x, 0.98, text, transform=axis.transAxes, ha=side, va="top", color="white", fontsize=9, path_effects=rim)


def colour_bar(figure: Figure, axis: Axes, shown: Any, unit: str) -> None:
    """What the colours mean, in an axis of its own."""
    bar = figure.colorbar(shown, cax=axis)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.set_title(unit, fontsize=8)


def bare_axes(axis: Axes) -> None:
    """Two spines only."""
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(FAINT)
    axis.tick_params(colors=INK)
