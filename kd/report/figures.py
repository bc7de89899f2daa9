"""Draw figures from the frame: a bar or dots a row, lines and maps over a grid. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle

from kd.report import style
from kd.report.claims import known, label_of
from kd.report.frame import measure_of, values
from kd.report.measures import Measure
from kd.report.style import ALONE, INK, SOFT, STUDENT, TEACHER, styled
from kd.studies.study import Figure, Study

MOST_BARS = 40


@dataclass(frozen=True)
class Bar:
    """One line of a bar figure: its label, one value a seed (as shown), its colour, the published number."""

    label: str
    values: np.ndarray
    colour: str = STUDENT
    published: float | None = None


@styled
def bars(rows: Sequence[Bar], title: str, axis: str, log: bool = False) -> Canvas | None:
    """Draw a dot a seed and a stroke at the mean; bars where the axis can start at 0 without hiding the spread.

    ``log``: the axis may be logarithmic, where one row would press the others together.
    """
    if not rows:
        return None
    figure = Canvas(figsize=(8, 1.25 + 0.42 * len(rows)))
    axes = figure.subplots()
    every = np.concatenate([np.append(r.values, [] if r.published is None else [r.published]) for r in rows])
    wide = log and style.log_if_wide(axes, "x", every.tolist())
    from_zero = not wide and 0 <= every.min() <= 0.5 * every.max() != 0  # correlations may be negative
    positions = range(len(rows) - 1, -1, -1)
    for position, row in zip(positions, rows, strict=True):
        mean = row.values.mean()
        if from_zero:
            axes.barh(position, mean, color=row.colour, height=0.62, alpha=0.35)
        axes.plot([mean, mean], [position - 0.31, position + 0.31], color=row.colour, linewidth=3)
        offsets = np.linspace(-0.18, 0.18, len(row.values)) if len(row.values) > 1 else [0]
        axes.scatter(row.values, position + np.asarray(offsets), s=16, color=INK, zorder=3, linewidths=0)
        if row.published is not None:
            axes.scatter(row.published, position, marker="D", s=42, facecolor="white", edgecolor="#D55E00", zorder=4)
        written = f"{mean:,.1f}"
        axes.annotate(written, (1.01, position), xycoords=("axes fraction", "data"), va="center", annotation_clip=False)
    if from_zero:
        axes.set_xlim(0, every.max() * 1.04)
    elif not wide:
        axes.set_xmargin(0.06)
    axes.annotate("mean", (1.01, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", color=SOFT)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_yticks(list(positions), [row.label for row in rows])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(from_zero)
    axes.set_xlabel(f"{axis}, logarithmic" if wide else axis)
    axes.set_title(title)
    return figure


def study_bars(study: Study, frame: pd.DataFrame, measure: Measure) -> Canvas | None:
    """Draw every row of a study in its measure, teachers dark, students alone grey, distilled ones in colour."""
    rows = [Bar(label_of(study, n), measure.scale * v, role(study, n), _theirs(study, frame, n, measure))
            for n in study.rows if len(v := values(frame, n, measure.column).to_numpy())]  # fmt: skip
    if not 1 < len(rows) <= MOST_BARS:
        return None
    better = "lower is better" if measure.lower_is_better else "higher is better"
    epoch = f", {measure.epoch}" if measure.epoch else ""
    title = f"{capital(measure.title)} of every seed"
    return bars(rows, title, f"{measure.label}{epoch} ({better})", log=measure.lower_is_better)


def role(study: Study, name: str) -> str:
    """Return the colour of a row by its role for the others."""
    if name in {row.teacher for row in study.rows.values()}:
        return TEACHER
    return ALONE if name in {row.alone for row in study.rows.values()} else STUDENT


def _theirs(study: Study, frame: pd.DataFrame, name: str, measure: Measure) -> float | None:
    if study.published is None or not study.published.comparable:
        return None
    for key, number in study.published.numbers.get(name, {}).items():
        if known(study, frame, key) == measure.column:
            return measure.scale * number["value"]
    return None


def capital(text: str) -> str:
    """Write the first letter large, the others as they are."""
    return text[:1].upper() + text[1:]


# ---------------------------------------------------------------------- over the values of a grid


def of_grid(study: Study, frame: pd.DataFrame, wanted: Figure) -> Canvas | None:
    """Draw a figure of the study: ``map`` or ``lines``."""
    column = known(study, frame, wanted.measure)
    if column is None:
        return None
    measure = measure_of(frame, column)
    return (grid_map if wanted.kind == "map" else grid_lines)(study, frame, wanted, measure)


def _cells(study: Study, frame: pd.DataFrame, measure: Measure, *names: str) -> dict[tuple[Any, ...], np.ndarray]:
    """Return the values of each combination of grid variables, all runs of all its rows, as shown."""
    cells: dict[tuple[Any, ...], list[float]] = {}
    for name, row in study.rows.items():
        found = values(frame, name, measure.column)
        if all(n in row.values for n in names) and len(found):
            cells.setdefault(tuple(row.values[n] for n in names), []).extend(measure.scale * found)
    return {key: np.array(found) for key, found in cells.items()}


def _ordered(found: Sequence[Any]) -> list[Any]:
    """Order distinct values, numbers by size, words as they came."""
    distinct = list(dict.fromkeys(found))
    return sorted(distinct) if all(isinstance(v, (int, float)) for v in distinct) else distinct


@styled
def grid_map(study: Study, frame: pd.DataFrame, wanted: Figure, measure: Measure) -> Canvas | None:
    """Draw a coloured cell for each combination with its mean; the best of every line has a frame."""
    assert wanted.y is not None, "a map has a y"
    cells = _cells(study, frame, measure, wanted.x, wanted.y)
    if not cells:
        return None
    xs, ys = _ordered([x for x, _ in cells]), _ordered([y for _, y in cells])
    means = np.array([[cells[x, y].mean() if (x, y) in cells else np.nan for x in xs] for y in ys])
    figure = Canvas(figsize=(max(5.5, 2.4 + 0.95 * len(xs)), 1.7 + 0.62 * len(ys)))
    axes = figure.subplots()
    palette = "cividis_r" if measure.lower_is_better else "cividis"  # light is good in both
    image = axes.imshow(means, cmap=palette, aspect="auto", origin="lower")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    middle = np.nanmin(means) + 0.55 * np.ptp(means[np.isfinite(means)])
    for (row, column), value in np.ndenumerate(means):
        if np.isfinite(value):
            light = (value > middle) != measure.lower_is_better
            axes.text(column, row, f"{value:,.1f}", ha="center", va="center", color=INK if light else "white")
    for row, line in enumerate(means):
        if np.isfinite(line).sum() > 1:
            best = np.nanargmin(line) if measure.lower_is_better else np.nanargmax(line)
            corner = (best - 0.46, row - 0.44)
            axes.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, edgecolor="#D55E00", linewidth=2.5))
    axes.set_xticks(range(len(xs)), [f"{x}" for x in xs])
    axes.set_yticks(range(len(ys)), [f"{y}" for y in ys])
    axes.tick_params(length=0)
    axes.set(xlabel=words(wanted.x), ylabel=words(wanted.y))
    axes.set_title(wanted.title or f"{capital(measure.title)} by {words(wanted.x)} and {words(wanted.y)}")
    bar = figure.colorbar(image, ax=axes, label=measure.label, pad=0.02)
    bar.outline.set_visible(False)
    return figure


def words(name: str) -> str:
    """Shorten ``loss.kd.temperature`` to ``temperature``, ``hidden_units`` to ``hidden units``."""
    return name.rsplit(".", 1)[-1].replace("_", " ")


@styled
def grid_lines(study: Study, frame: pd.DataFrame, wanted: Figure, measure: Measure) -> Canvas | None:
    """Draw a line through the means with the band of all seeds, one for each group; its best point has a ring.

    Where all rows of a line have the same student alone, that one is a dashed line of the same colour, grey if it is
    that of all lines.
    """
    group = [wanted.group] if wanted.group else []
    cells = _cells(study, frame, measure, wanted.x, *group)
    if len({key[0] for key in cells}) < 2:
        return None
    xs = _ordered([key[0] for key in cells])
    numeric = all(isinstance(x, (int, float)) for x in xs)
    place = {x: float(x) if numeric else i for i, x in enumerate(xs)}
    figure = Canvas(figsize=(8, 4.4))
    axes = figure.subplots()
    ends: list[tuple[float, str, str]] = []
    groups = _ordered([key[1:] for key in cells]) if not group else [(g,) for g in _ordered([k[1] for k in cells])]
    alone = [_alone(study, frame, measure, dict(zip(group, line, strict=True))) for line in groups]
    shared = len(groups) > 1 and len(set(alone)) == 1 and alone[0] is not None
    for number, line in enumerate(groups):
        ink = style.colour(number)
        at = [x for x in xs if (x, *line) in cells]
        means = _line(axes, [place[x] for x in at], [cells[(x, *line)] for x in at], ink, measure.lower_is_better)
        label = f"{words(wanted.group)} {line[0]}" if wanted.group else capital(measure.title)
        ends.append((means[-1], label, ink))
        if (level := alone[number]) is not None and (not shared or number == 0):
            ink = SOFT if shared else ink
            axes.axhline(level, color=ink, linestyle=(0, (4, 3)), linewidth=1.2)
            ends.append((level, f"{label}, alone" if wanted.group and not shared else "alone", ink))
    _x_axis(axes, xs, numeric)
    axes.set(xlabel=words(wanted.x), ylabel=measure.label)
    axes.set_title(wanted.title or f"{capital(measure.title)} against {words(wanted.x)}")
    style.end_labels(axes, *zip(*ends, strict=True))
    return figure


def dashed(figure: Canvas | None) -> bool:
    """Tell whether a figure has a dashed line."""
    axes = figure.axes if figure is not None else ()
    return any(line.get_linestyle() == "--" for part in axes for line in part.lines)


def _line(axes: Any, at: Sequence[float], found: Sequence[np.ndarray], ink: str, lower_is_better: bool) -> list[float]:
    means = [float(v.mean()) for v in found]
    axes.fill_between(at, [v.min() for v in found], [v.max() for v in found], color=ink, alpha=0.15, linewidth=0)
    axes.plot(at, means, color=ink, marker="o", markersize=4.5)
    best = int(np.argmin(means) if lower_is_better else np.argmax(means))
    axes.scatter(at[best], means[best], s=130, facecolor="none", edgecolor=ink, linewidth=1.8, zorder=4)
    return means


def _alone(study: Study, frame: pd.DataFrame, measure: Measure, line: dict[str, Any]) -> float | None:
    """Return the mean of the one row that all rows of a line name as their student alone."""
    among = [row for row in study.rows.values() if row.values and line.items() <= dict(row.values).items()]
    themselves = {row.alone for row in among}  # w6_alone, of the same grid, names none
    names = {row.alone for row in among if row.name not in themselves}
    (name,) = names if len(names) == 1 else (None,)
    found = values(frame, name, measure.column) if name else ()
    return float(measure.scale * np.mean(found)) if len(found) else None


def _x_axis(axes: Any, xs: Sequence[Any], numeric: bool) -> None:
    if not numeric:
        axes.set_xticks(range(len(xs)), [str(x) for x in xs])
    elif min(xs) > 0 and max(xs) / min(xs) >= 8:
        style.log_axis(axes, "x", min(xs), max(xs), xs)
    elif len(xs) <= 10:
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
