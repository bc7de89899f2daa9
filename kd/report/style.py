"""Set the style of all figures: colour-blind-safe colours (Okabe and Ito), direct labels, few lines. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5D3A9B", "#7F7F7F")
INK, SOFT, GRID = "#1B1B1B", "#5F6B73", "#D9DFE3"
TEACHER, ALONE, STUDENT = "#3B3B3B", "#A3B1BA", COLOURS[0]
WIDE = 12  # times the smallest value: from there on an axis is logarithmic
GREY = "#7B8790"  # a line in the colour of ALONE would be too pale
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "lines.linewidth": 1.8,
}

P = ParamSpec("P")


def styled(draw: Callable[P, Canvas | None]) -> Callable[P, Canvas | None]:
    """Draw with the style; the drawing functions return a figure, or None when there is nothing to show."""

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Canvas | None:
        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return inside


def save(figure: Canvas, path: Path) -> Path:
    """Write a PNG."""
    with rc_context(STYLE):
        figure.savefig(path)
    return path


def colour(position: int) -> str:
    """Return the colour of a line by its place; they repeat after eight."""
    return COLOURS[position % len(COLOURS)]


def end_labels(axes: Axes, ys: Sequence[float], texts: Sequence[str], colours: Sequence[str]) -> None:
    """Write labels right of the axes, at the heights ys (in data) or as near as they do not overlap."""
    _labels(axes, [(1.0, y) for y in ys], texts, colours, ("axes fraction", "data"), (8, 0))


def point_labels(axes: Axes, points: Sequence[tuple[float, float, str]], left: float) -> None:
    """Label points (x, y, text) of a logarithmic x axis, right above or left of them; near ones are moved apart.

    ``left``: how many points high a label on the left is above its point.
    """
    low, high = np.log(axes.get_xlim())
    places = [(np.log(x) - low) / (high - low) for x, _, _ in points]
    for cluster in _clusters(places, 0.3):
        right = np.mean([places[i] for i in cluster]) < 0.6
        chosen = [points[i] for i in cluster]
        where = [(x, y) for x, y, _ in chosen]
        offset = (7.0, 7.0) if right else (-7.0, left)
        _labels(axes, where, [p[2] for p in chosen], [INK] * len(chosen), ("data", "data"), offset)


def _clusters(places: Sequence[float], width: float) -> list[list[int]]:
    """Group positions whose neighbours are nearer than ``width``, together."""
    found: list[list[int]] = []
    for i in np.argsort(places):
        if found and places[i] - places[found[-1][-1]] < width:
            found[-1].append(int(i))
        else:
            found.append([int(i)])
    return found


def _labels(
    axes: Axes,
    where: Sequence[tuple[float, float]],
    texts: Sequence[str],
    colours: Sequence[str],
    coordinates: tuple[str, str],
    offset: tuple[float, float],
) -> None:
    to_axes = axes.transData + axes.transAxes.inverted()
    ys = [float(to_axes.transform((1.0, y))[1]) for _, y in where]  # 0 to 1, also of a logarithmic axis
    figure = axes.get_figure()
    assert isinstance(figure, Canvas)
    rows = axes.get_subplotspec().get_gridspec().nrows  # type: ignore[union-attr]
    height = figure.get_size_inches()[1] / rows * 0.75 * 72  # about so many points high are the axes
    moved = spread_out(ys, 12.5 / height, 0.0, 1.0)
    for place, y, new, text, ink in zip(where, ys, moved, texts, colours, strict=True):
        side = "left" if offset[0] > 0 else "right"
        how = {"color": ink, "va": "center", "ha": side, "fontsize": 9, "annotation_clip": False}
        shift = (offset[0], offset[1] + (new - y) * height)
        axes.annotate(text, place, shift, xycoords=coordinates, textcoords="offset points", **how)  # type: ignore[arg-type]


def spread_out(ys: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Move heights as little as needed to be ``step`` apart and between low and high."""
    order = np.argsort(ys)
    moved = np.asarray(ys, dtype=float)[order]
    step = min(step, (high - low) / max(1, len(moved) - 1))
    for _ in range(100):
        for i in range(1, len(moved)):
            if (lack := step - (moved[i] - moved[i - 1])) > 1e-12:
                moved[i - 1] -= lack / 2
                moved[i] += lack / 2
        moved += max(0.0, low - moved[0]) if len(moved) else 0.0
        moved -= max(0.0, moved[-1] - high) if len(moved) else 0.0
    placed = np.empty_like(moved)
    placed[order] = moved
    return placed.tolist()


def log_axis(axes: Axes, which: str, low: float, high: float, ticks: Sequence[float] = ()) -> None:
    """Make an axis logarithmic, from a little below low to a little above high, with ticks in plain numbers."""
    axis, edge = (axes.xaxis if which == "x" else axes.yaxis), (high / low) ** 0.06
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(low / edge, high * edge)
    round_ = LogLocator(subs=(1, 2, 5)) if high > 6 * low else MaxNLocator(7, steps=(1, 2, 5, 10))
    axis.set_major_locator(FixedLocator(list(ticks)) if len(ticks) else round_)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def log_if_wide(axes: Axes, which: str, found: Sequence[float]) -> bool:
    """Make an axis logarithmic where one row would press all others together; whether it did."""
    low, high = min(found), max(found)
    if low <= 0 or high < WIDE * low:
        return False
    log_axis(axes, which, low, high)
    return True


def short(value: float) -> str:
    """Write 1200 as ``1.2k``, 3400000 as ``3.4M``."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
