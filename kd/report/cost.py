"""Draw accuracy against what a student costs: latency, multiply-accumulates, parameters. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from kd.report import style
from kd.report.claims import label_of
from kd.report.figures import capital, role
from kd.report.frame import finished, values
from kd.report.measures import EPOCHS, Measure
from kd.report.style import styled
from kd.studies.study import Study

TEACHER = "teacher"  # what its point is called
MOST_NAMES = 14  # points with their names; of more, only the best have one
COSTS = {
    "student/latency_ratio": "time of a pass, the teacher's is 1",  # of a search with limits
    "student/latency_ms": "latency, ms a sample",
    "student/macs": "multiply-accumulates a sample",
    "student/parameters": "parameters",
}


@styled
def pareto(study: Study, frame: pd.DataFrame, measure: Measure) -> Canvas | None:
    """Draw the measure against latency, MACs, parameters; the line joins the rows that no other row beats in both.

    A cost that orders the rows as one before it does has no panel.
    """
    panels, orders = [], set()
    for column, label in COSTS.items():
        points = _points(study, frame, measure, column)
        costs = [round(cost, 9) for _, cost, _, _ in points]
        order = tuple(np.unique(costs, return_inverse=True)[1].tolist())
        if len(set(order)) > 1 and order not in orders:
            panels.append((label, points))
            orders.add(order)
    sizes = {p[1] for p in _points(study, frame, measure, "student/parameters")}
    if len(sizes) < 2:  # one network: a difference of its latency is noise
        return None
    figure = Canvas(figsize=(8, 0.6 + (3.8 if len(panels) == 1 else 3.0) * len(panels)))
    grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (label, points) in zip(grid, panels, strict=True):
        _panel(axes, points, measure, label)
    grid[0].set_title(f"{capital(measure.title)} against what a student costs", pad=18)  # names reach above the axes
    return figure


def caption(figure: Canvas, measure: Measure) -> str:
    """Explain the figure: what a point is, which way is better, and what the line joins."""
    better, worse = ("lower", "above") if measure.lower_is_better else ("higher", "below")
    text = (
        "A point is a row of the table: the mean of its seeds, against its cost. Further left is cheaper, "
        f"{better} is better. The orange line is the Pareto front: it joins the rows that no other row beats in both; "
        f"a row {worse} it is beaten by one that is at least as good for no more cost."
    )
    if any(label.get_text() == TEACHER for axes in figure.axes for label in axes.texts):
        text += " Dark: the teacher of all rows."
    if any("latency" in axes.get_xlabel() for axes in figure.axes):
        text += (
            " Latency: one sample on the machine that trained, the median over all runs of the same network; small "
            "differences are noise."
        )
    return (
        text + " Latency, multiply-accumulates, parameters: those that put the rows in the same order are drawn once."
    )


def _points(study: Study, frame: pd.DataFrame, measure: Measure, cost: str) -> list[tuple[str, float, float, str]]:
    """Return label, cost, mean value and colour of every row that has both.

    The cost is the median over all runs of the same network: rows that train the same one cannot differ in it.
    """
    if cost not in frame:
        return []
    networks = [frame[c] for c in ("student/parameters", "student/macs") if c in frame]
    pooled = frame.assign(**{cost: frame.groupby(networks)[cost].transform("median")}) if networks else frame
    points = []
    for name in study.rows:
        found, paid = values(frame, name, measure.column), values(pooled, name, cost)
        if len(found) and len(paid):
            value = float(measure.scale * found.mean())
            points.append((label_of(study, name), float(paid.median()), value, role(study, name)))
    return [*_teacher_point(study, frame, measure, cost), *points]


def _teacher_point(
    study: Study, frame: pd.DataFrame, measure: Measure, cost: str
) -> list[tuple[str, float, float, str]]:
    """Return the teacher of all runs as a point, where there is one and no row of the page is it."""
    first, _, rest = measure.column.partition("/")
    column, paid = f"teacher/{rest}", cost.replace("student/", "teacher/")
    done = finished(frame)
    if first not in EPOCHS or any(row.teacher for row in study.rows.values()) or not {column, paid} <= {*done}:
        return []
    there = done[[column, paid]].dropna()
    if there.empty or there[column].nunique() > 1:
        return []
    return [(TEACHER, float(there[paid].median()), float(measure.scale * there[column].iloc[0]), style.TEACHER)]


def _panel(axes: Any, points: Sequence[tuple[str, float, float, str]], measure: Measure, label: str) -> None:
    costs, found = np.array([p[1] for p in points]), np.array([p[2] for p in points])
    sign = -1 if measure.lower_is_better else 1
    axes.scatter(costs, found, s=46, c=[p[3] for p in points], zorder=3)
    front: list[int] = []
    for i in np.lexsort((-sign * found, costs)):
        if not front or sign * found[i] > sign * found[front[-1]]:
            front.append(int(i))
    axes.plot(costs[front], found[front], color="#D55E00", linewidth=1.2, drawstyle="steps-post", zorder=2)
    style.log_axis(axes, "x", costs.min(), costs.max())
    if not (measure.lower_is_better and style.log_if_wide(axes, "y", found.tolist())):
        axes.set_ymargin(0.15)
    axes.set(xlabel=label, ylabel=measure.label)
    named = range(len(points)) if len(points) <= MOST_NAMES else front
    style.point_labels(axes, [(points[i][1], points[i][2], points[i][0]) for i in named], 7 * sign)  # off the line
