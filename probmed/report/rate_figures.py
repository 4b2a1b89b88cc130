"""The figures of rates of change: shares, predictions against what was seen, calibration, courses of single people, codes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import norm

from probmed.report.palette import ACCENT, FAINT, INK, distinct
from probmed.report.panels import WIDTH, bare_axes, blank_figure, colour_bar
from probmed.workflows.rate_checks import Course

_BINS = 10
_ACROSS = 4
_WHISKER = float(norm.ppf(0.95))


def shares(components: pd.DataFrame) -> Figure:
    """Each kernel's share of the rates' variance with its 95 % interval."""
    figure = blank_figure(WIDTH, 0.42 * len(components) + 0.6)
    bottom = 0.45 / figure.get_figheight()
    axis = figure.add_axes((0.14, bottom, 0.82, 0.95 - bottom))
    for place, row in enumerate(components.to_dict("records")):
        if row["share_low"] == row["share_low"]:
            axis.plot([row["share_low"], row["share_high"]], [place, place], color=ACCENT, lw=6, alpha=0.4, solid_capstyle="butt")
        axis.plot([row["share"]], [place], "|", color=INK, ms=16, mew=2)
    axis.set_yticks(range(len(components)), list(components["component"]))
    axis.set_ylim(len(components) - 0.5, -0.5)
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of the variance of rates")
    bare_axes(axis)
    return figure


def predictions(table: pd.DataFrame) -> Figure:
    """Predicted against observed change, and the predictive probability of less, a row a task."""
    tasks = list(table.groupby("task", sort=False))
    height = 2.9
    figure = blank_figure(WIDTH, height * len(tasks))
    for line, (task, rows) in enumerate(tasks):
        low = 1 - (line + 1) / len(tasks) + 0.19 / len(tasks)
        axes = [figure.add_axes((left, low, 0.38, 0.66 / len(tasks))) for left in (0.1, 0.58)]
        _against(axes[0], rows, str(task))
        _probabilities(axes[1], rows)
    return figure


def _against(axis: Axes, rows: pd.DataFrame, task: str) -> None:
    predicted, observed = rows["mean"] - rows["baseline"], rows["observed"] - rows["baseline"]
    ends = [min(predicted.min(), observed.min()), max(predicted.max(), observed.max())]
    axis.plot(ends, ends, color=FAINT, lw=1, zorder=0)
    axis.errorbar(predicted, observed, xerr=_WHISKER * rows["sd"], fmt="none", ecolor=ACCENT, elinewidth=0.6, alpha=0.25, zorder=1)
    axis.plot(predicted, observed, "o", ms=3, color=ACCENT, alpha=0.8)
    axis.set_xlabel("predicted change")
    axis.set_ylabel("observed change")
    axis.set_title(f"{task}, {len(rows)} visits", fontsize=10, color=INK, loc="left")
    axis.xaxis.set_major_locator(MaxNLocator(5))
    bare_axes(axis)


def _probabilities(axis: Axes, rows: pd.DataFrame) -> None:
    """A histogram that is flat where predictions are calibrated, within the band that it has by chance in 95 of 100 cases."""
    count = len(rows)
    sd = np.sqrt(count * (1 / _BINS) * (1 - 1 / _BINS))
    axis.axhspan(count / _BINS - 1.96 * sd, count / _BINS + 1.96 * sd, color=FAINT, alpha=0.25, lw=0)
    axis.hist(rows["quantile"], bins=_BINS, range=(0, 1), color=ACCENT, alpha=0.8, rwidth=0.92)
    axis.set_xlim(0, 1)
    axis.set_xlabel("predictive probability of less than observed")
    axis.set_ylabel("visits")
    bare_axes(axis)


def single_people(courses: Sequence[Course], scalar: str) -> Figure:
    """Courses with 90 % bands, the visits that they rest on, and the last, which they do not."""
    rows = -(-len(courses) // _ACROSS)
    figure = blank_figure(WIDTH, 2.2 * rows)
    for place, course in enumerate(courses):
        line, column = divmod(place, _ACROSS)
        box = (0.075 + column * 0.235, 1 - (line + 1) / rows + 0.2 / rows, 0.18, 0.64 / rows)
        axis = figure.add_axes(box)
        half = _WHISKER * course.sd
        years = np.concatenate([[0.0], course.years.numpy()])
        start = course.seen[0, 1].item()
        low, high, mean = ([start, *values.tolist()] for values in (course.mean - half, course.mean + half, course.mean))
        axis.fill_between(years[1:], low[1:], high[1:], color=ACCENT, alpha=0.2, lw=0)
        axis.plot(years, mean, color=ACCENT, lw=1.5)
        axis.plot(course.seen[:, 0], course.seen[:, 1], "o", color=INK, ms=4)
        axis.plot([course.last[0]], [course.last[1]], "D", color="white", mec=INK, ms=6, zorder=5)
        axis.set_title(course.subject, fontsize=9, color=INK, loc="left")
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.yaxis.set_major_locator(MaxNLocator(4))
        bare_axes(axis)
        if column == 0:
            axis.set_ylabel(scalar, fontsize=9)
        if line == rows - 1:
            axis.set_xlabel("years", fontsize=9)
    return figure


def parts(table: pd.DataFrame, row: str) -> Figure:
    """Shares as stacked bars: a bar for each row, whose name is in the column ``row``, a colour for each other column."""
    names = [name for name in table.columns if name != row]
    figure = blank_figure(WIDTH, 0.3 * len(table) + 0.9)
    height = figure.get_figheight()
    axis = figure.add_axes((0.14, 0.45 / height, 0.66, 1 - 0.6 / height))
    left = np.zeros(len(table))
    for name, colour in zip(names, distinct(len(names)), strict=True):
        axis.barh(range(len(table)), table[name], left=left, color=colour, height=0.75, label=name)
        left += table[name].to_numpy()
    axis.set_yticks(range(len(table)), [str(name) for name in table[row]])
    axis.set_ylim(len(table) - 0.4, -0.6)
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of variance")
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9)
    bare_axes(axis)
    return figure


def latent(codes: pd.DataFrame, colour: pd.Series, name: str) -> Figure:
    """Codes of scans, the first against the second, or against years where there is one, coloured by what is known of their people."""
    several = "code_2" in codes.columns
    figure = blank_figure(WIDTH / 2, 3.4)
    axis = figure.add_axes((0.15, 0.15, 0.68, 0.78))
    x, y = ("code_1", "code_2") if several else ("years", "code_1")
    numeric = pd.api.types.is_numeric_dtype(colour)
    if numeric:
        shown = axis.scatter(codes[x], codes[y], c=colour, cmap="viridis", s=14, lw=0)
        colour_bar(figure, figure.add_axes((0.86, 0.15, 0.025, 0.7)), shown, name)
    else:
        levels = sorted(colour.dropna().unique(), key=str)
        for level, ink in zip(levels, distinct(len(levels)), strict=True):
            axis.plot(codes[x][colour == level], codes[y][colour == level], "o", ms=4, color=ink, label=str(level))
        axis.legend(title=name, frameon=False, fontsize=8, title_fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axis.set_xlabel(x.replace("_", " "))
    axis.set_ylabel(y.replace("_", " "))
    bare_axes(axis)
    return figure
