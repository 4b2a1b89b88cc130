"""The figures of a registered pair, each a function of a view of it. Images are computed on the shown planes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from probmed.grids import sample
from probmed.report.palette import FAINT, INK, label_colours, rgb
from probmed.report.panels import WIDTH, bare_axes, blank_figure, colour_bar, coloured, grey, name_sides, panels
from probmed.report.planes import Array, Mask, Orientation, Plane, bounding_box, centre_of, planes_through, window
from probmed.transforms import Affine, Transform
from probmed.volumes import scaled
from probmed.workflows.propagation import Propagation
from probmed.workflows.registration import RegistrationResult
from probmed.workflows.registration_outputs import total_sd

_FOREGROUND = 0.1  # of the fixed image's bright mean
_MARGIN_MM = 5.0
_TILES = 8  # of a checkerboard, along the longer side
_LINES = 22  # of a warped grid, along the longer side
_LINE = "#f2b134"
_DARKER = 0.55  # of the fixed image where there is no moving one
_LEVELS = ("#1f6f8b", "#e4593b", "#2a9d6f", "#7a5cc7", "#f2b134")
STAGES = ("by headers", "affine", "affine + warp")


@dataclass(frozen=True)
class Cut:
    """A plane of the fixed image, ``(rows, columns)`` each.

    Arguments:
        voxels: of the fixed image's own grid, ``(rows, columns, d)`` float64.
        axes: the voxel axes that run along its rows and along its columns.
        fixed, moved: intensities of both in [0, 1], the latter by stage, NaN where there are none.
        determinant: det Dφ. sd: of the displacement, mm.
        carried: where the deformation takes the voxels before the affine map, in voxels along the two ``axes``, ``(rows, columns, 2)``; None without.
    """

    plane: Plane
    voxels: Tensor
    axes: tuple[int, int]
    fixed: Array
    moved: tuple[Array, ...]
    determinant: Array
    sd: Array | None
    carried: Array | None


@dataclass(frozen=True)
class PairView:
    """What the figures show of a pair."""

    cuts: list[Cut]
    spacing: tuple[float, ...]
    turn: Orientation

    @property
    def planes(self) -> list[Plane]:
        return [cut.plane for cut in self.cuts]

    @property
    def deformed(self) -> bool:
        """Whether there is more than an affine map."""
        return all(cut.carried is not None for cut in self.cuts)

    @property
    def stages(self) -> tuple[str, ...]:
        """Of ``STAGES``, those that differ."""
        return STAGES if self.deformed else STAGES[:-1]

    @classmethod
    def of(cls, result: RegistrationResult) -> PairView:
        solid = result.fixed.as_3d()
        turn = Orientation.of(solid.affine)
        image = turn(result.fixed.data)
        bright = turn(scaled(result.fixed.data)) > _FOREGROUND
        box = bounding_box(bright, _MARGIN_MM, turn.spacing)
        planes = planes_through(centre_of(bright), box, image.shape, turn.spacing)
        limits = [window(image, bright), window(result.moving.data.numpy().astype(np.float64))]
        return cls([_cut(result, plane, turn, image, limits) for plane in planes], result.fixed.spacing, turn)


def _cut(result: RegistrationResult, plane: Plane, turn: Orientation, image: Array, limits: Sequence[tuple[float, float]]) -> Cut:
    grid, shape = result.fixed.grid, result.fixed.as_3d().shape
    # The voxel indices, turned and cut as the image is, tell where the plane's pixels lie, whatever the orientation.
    index = []
    for axis, n in enumerate(shape):
        steps = np.arange(n, dtype=np.float64).reshape([-1 if a == axis else 1 for a in range(3)])
        index.append(plane.cut(turn(np.broadcast_to(steps, shape))))
    rows, columns = (int(np.argmax([np.ptp(i, axis=side).max() for i in index])) for side in (0, 1))
    voxels = torch.from_numpy(np.stack(index[: grid.ndim], -1))
    points = grid.voxel_to_world(voxels)

    def moved(transform: Transform) -> Array:
        values = sample(result.moving.data[None].double(), result.moving.grid, transform(points), fill=math.nan)[0]
        low, high = limits[1]
        return np.asarray(((values - low) / (high - low)).clamp(0, 1).numpy())

    carried = None
    if result.velocity is not None:
        flow = grid.world_to_voxel(result.affine.inverse()(result.transform(points)))
        carried = flow[..., [rows, columns]].numpy()
    low, high = limits[0]
    return Cut(
        plane=plane,
        voxels=voxels,
        axes=(rows, columns),
        fixed=np.clip((plane.cut(image) - low) / (high - low), 0, 1),
        moved=tuple(moved(t) for t in (Affine.identity(grid.ndim), result.affine, result.transform)),
        determinant=plane.cut(turn(result.determinant)),
        sd=None if result.sd is None else plane.cut(turn(total_sd(result.sd))),
        carried=carried,
    )


def checkerboard(view: PairView) -> Figure:
    """Tiles of the fixed and of the moving image by turns, at each stage; where there is no moving image, the fixed one, darker."""
    figure, axes = _stages(view)
    for row in range(len(view.stages)):
        for column, cut in enumerate(view.cuts):
            side = max(max(cut.fixed.shape[0] * cut.plane.aspect, cut.fixed.shape[1]) / _TILES, 1)
            up, along = np.indices(cut.fixed.shape)
            fixed = ((up * cut.plane.aspect // side) + (along // side)) % 2 == 0
            moved, unknown = cut.moved[row], np.isnan(cut.moved[row])
            grey(axes[row][column], np.where(unknown, _DARKER * cut.fixed, np.where(fixed, cut.fixed, moved)), (0.0, 1.0))
            _end_of_view(axes[row][column], unknown)
            name_sides(axes[row][column], cut.plane)
    return figure


def blend(view: PairView) -> Figure:
    """The fixed image in orange and the moving one in blue, at each stage: grey where they agree. Where there is no moving image, the fixed one in
    grey, darker."""
    figure, axes = _stages(view)
    for row in range(len(view.stages)):
        for column, cut in enumerate(view.cuts):
            unknown = np.isnan(cut.moved[row])
            fixed = np.where(unknown, _DARKER * cut.fixed, cut.fixed)
            moved = np.where(unknown, fixed, cut.moved[row])
            colours = np.stack([fixed, (fixed + moved) / 2, moved], -1)
            axes[row][column].imshow(colours, origin="lower", aspect="auto", interpolation="bilinear")
            _end_of_view(axes[row][column], unknown)
            name_sides(axes[row][column], cut.plane)
    return figure


def carried_labels(view: PairView, propagation: Propagation) -> tuple[Figure, dict[str, str]]:
    """The carried labels over the fixed image, and their colours."""
    names = propagation.names
    colours = label_colours(names, ["#808080"] * len(names), names)
    figure, axes = panels(view.planes, 1, ["labels"])
    labels = view.turn(propagation.labels)
    for column, cut in enumerate(view.cuts):
        grey(axes[0][column], cut.fixed, (0.0, 1.0))
        here = cut.plane.cut(labels)
        overlay = np.zeros((*here.shape, 4))
        for index, name in zip(propagation.indices, names, strict=True):
            overlay[here == index] = (*rgb(colours[name]), 0.5)
        axes[0][column].imshow(overlay, origin="lower", aspect="auto", interpolation="nearest")
        name_sides(axes[0][column], cut.plane)
    return figure, colours


def warped_grid(view: PairView) -> Figure | None:
    """Lines that were straight and evenly spaced on the moving image after its affine map; None without a deformation."""
    if not view.deformed:
        return None
    figure, axes = panels(view.planes, 1, ["warped grid"])
    for column, cut in enumerate(view.cuts):
        axis = axes[0][column]
        grey(axis, cut.fixed, (0.0, 1.6))
        reach = max(n * view.spacing[a] for n, a in zip(cut.fixed.shape, cut.axes, strict=True))
        for side, a in enumerate(cut.axes):
            values = cut.carried[..., side]  # type: ignore[index]
            step = reach / _LINES / view.spacing[a]
            levels = np.arange(math.floor(values.min() / step), math.ceil(values.max() / step) + 1) * step
            axis.contour(values, levels=levels, colors=_LINE, linewidths=0.7, linestyles="solid")
        axis.set_axis_off()
        name_sides(axis, cut.plane)
    return figure


def jacobian(view: PairView) -> Figure | None:
    """log det Dφ, black where the map folds; None without a deformation, where it is the same everywhere."""
    if not view.deformed:
        return None
    figure, axes = panels(view.planes, 1, ["log det Dφ"], bars=True)
    logs = [np.log(np.where(cut.determinant > 0, cut.determinant, np.nan)) for cut in view.cuts]
    known = np.concatenate([np.abs(values[np.isfinite(values)]) for values in logs])
    reach = max(float(np.quantile(known, 0.995)) if known.size else 0.0, 0.1)
    shown: Any = None
    for column, (cut, values) in enumerate(zip(view.cuts, logs, strict=True)):
        axes[0][column].set_facecolor(INK)
        shown = coloured(axes[0][column], np.ma.masked_invalid(values), "RdBu_r", Normalize(-reach, reach))
        _outline(axes[0][column], cut)
        name_sides(axes[0][column], cut.plane)
        if np.isnan(values).any():
            axes[0][column].imshow(
                np.where(np.isnan(values)[..., None], (0.1, 0.1, 0.1, 1.0), 0.0), origin="lower", aspect="auto", interpolation="nearest"
            )
    colour_bar(figure, axes[0][-1], shown, "log")
    return figure


def spread(view: PairView) -> Figure | None:
    """The posterior standard deviation of the displacement, mm; None without draws."""
    if any(cut.sd is None for cut in view.cuts):
        return None
    figure, axes = panels(view.planes, 1, ["sd"], bars=True)
    top = max(float(np.max(cut.sd)) for cut in view.cuts if cut.sd is not None) or 1.0
    shown: Any = None
    for column, cut in enumerate(view.cuts):
        shown = coloured(axes[0][column], np.asarray(cut.sd), "magma", Normalize(0.0, top))
        _outline(axes[0][column], cut)
        name_sides(axes[0][column], cut.plane)
    colour_bar(figure, axes[0][-1], shown, "mm")
    return figure


def ascent(result: RegistrationResult) -> Figure | None:
    """What each iteration gained, level by level; None where none was made."""
    if not any(iterations for _, iterations in result.levels):
        return None
    figure = blank_figure(WIDTH, 2.6)
    axis = figure.add_axes((0.09, 0.2, 0.89, 0.74))
    start = 0
    for number, (spacing, iterations) in enumerate(result.levels):
        gains = [i.gain if i.gain > 0 else math.nan for i in iterations]
        steps = [start + i.number for i in iterations]
        axis.plot(steps, gains, "o-", color=_LEVELS[number % len(_LEVELS)], lw=1.5, ms=4, label=f"{spacing:.3g} mm")
        start += len(iterations)
    if any(i.gain > 0 for _, iterations in result.levels for i in iterations):
        axis.set_yscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("iteration")
    axis.set_ylabel("gain in log joint, nats")
    axis.legend(loc="upper right", frameon=False, fontsize=8.5)
    bare_axes(axis)
    return figure


def _stages(view: PairView) -> tuple[Figure, list[list[Axes]]]:
    """Axes of each stage and plane, a row a stage; of a single plane the stages are side by side."""
    stages = view.stages
    if len(view.planes) > 1:
        return panels(view.planes, len(stages), stages)
    figure, ((*axes,),) = panels(view.planes * len(stages), 1, [""])
    for axis, stage in zip(axes, stages, strict=True):
        box = {"facecolor": "black", "alpha": 0.6, "linewidth": 0, "pad": 3}
        axis.text(0.5, 0.03, stage, transform=axis.transAxes, ha="center", va="bottom", color="white", fontsize=10, bbox=box)
    return figure, [[axis] for axis in axes]


def _end_of_view(axis: Axes, unknown: Mask) -> None:
    """A line about the moving image's field of view, where it ends within the picture."""
    if unknown.any() and not unknown.all() and min(unknown.shape) > 1:
        axis.contour(unknown, levels=[0.5], colors=_LINE, linewidths=1.2)


def _outline(axis: Any, cut: Cut) -> None:
    """The fixed image's brightest contours, to find one's way."""
    if np.ptp(cut.fixed) > 0 and min(cut.fixed.shape) > 1:
        axis.contour(cut.fixed, levels=[0.25], colors=FAINT, linewidths=0.5)
