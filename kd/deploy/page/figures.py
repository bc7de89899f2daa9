"""Draw quality against what it costs, and the curve of the cascade. No torch."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure as Canvas

from kd.deploy.cost import money
from kd.deploy.decision import Decision
from kd.deploy.page.facts import Facts
from kd.deploy.quality import wilson
from kd.records.sizes import PARAMETERS
from kd.report import style
from kd.report.style import SOFT, STUDENT, TEACHER, styled

RING = "#D55E00"


@styled
def pareto(decision: Decision, facts: Facts) -> Canvas | None:
    """Draw accuracy against the time of a pass, else parameters, else money a month; None where none is known.

    With the time, the cascade is a third point: the student answers every sample, the teacher its share of them.
    """
    quality, places = decision.quality, costs_of(decision, facts)
    if quality is None or quality.student is None or quality.teacher is None or places is None:
        return None
    label, student, teacher, both = places
    figure = Canvas(figsize=(8, 3.9))
    axes = figure.subplots()
    points = [(student, quality.student, quality.n, "student", STUDENT)]
    points.append((teacher, quality.teacher, quality.n, "teacher", TEACHER))
    routed = decision.cascade
    if both is not None and routed is not None and routed.chosen is not None:
        points.append((both, routed.chosen.accuracy, routed.n, "cascade", RING))
    for x, share, n, _, ink in points:
        low, high = (100 * end for end in wilson(round(share * n), n))
        axes.plot([x, x], [low, high], color=ink, linewidth=1.2, zorder=2)
        axes.scatter(x, 100 * share, s=60, color=ink, zorder=3)
    costs = [x for x, *_ in points]
    speed = None if facts.bench is None else facts.bench.headline
    if speed is not None and speed.interval is not None:
        axes.plot(speed.interval, [100 * quality.student] * 2, color=STUDENT, linewidth=1.2, zorder=2)
        costs += speed.interval
    style.log_axis(axes, "x", min(costs), max(costs))
    axes.set_ymargin(0.15)
    axes.set(xlabel=label, ylabel="accuracy, %")
    axes.set_title("Accuracy against what an answer costs", pad=18)
    style.point_labels(axes, [(x, 100 * share, name) for x, share, _, name, _ in points], 7)
    return figure


def costs_of(decision: Decision, facts: Facts) -> tuple[str, float, float, float | None] | None:
    """Return what an answer costs by the best measure there is: its name, of student, teacher, and of the cascade."""
    routed = decision.cascade
    share = None if routed is None or routed.chosen is None else routed.chosen.to_teacher
    speed = None if facts.bench is None else facts.bench.headline
    if speed is not None and speed.ratio is not None:
        label = f"time of a pass, the teacher's is 1 ({speed.backend}, batch of {speed.batch_size})"
        return label, speed.ratio, 1.0, None if share is None else speed.ratio + share
    student, teacher = facts.sizes.get(PARAMETERS, (None, None))
    if student and teacher:
        return "parameters", float(student), float(teacher), None
    costs, both = decision.cost, decision.cascade_cost
    if costs is not None and costs.student_month > 0 and costs.teacher_month > 0:
        label = f"{costs.currency} a month"
        return label, costs.student_month, costs.teacher_month, None if both is None else both.student_month
    return None


@styled
def cascade(decision: Decision) -> Canvas | None:
    """Draw the accuracy of the cascade against its cost: money a month, else the share that goes to the teacher."""
    routed = decision.cascade
    if routed is None or len(routed.curve) < 2:
        return None
    costs = decision.cost
    shares = [100 * point.to_teacher for point in routed.curve]
    xs = shares if costs is None else decision.curve_month
    ys = [100 * point.accuracy for point in routed.curve]
    figure = Canvas(figsize=(8, 3.9))
    axes = figure.subplots()
    axes.plot(xs, ys, color=STUDENT, marker="o", markersize=4.5, zorder=3)
    for name, share, ink in (("teacher", routed.teacher, TEACHER), ("student", routed.student, SOFT)):
        axes.axhline(100 * share, color=ink, linestyle=(0, (4, 3)), linewidth=1.2, zorder=1)
        axes.annotate(name, (1.0, 100 * share), (6, 0), xycoords=("axes fraction", "data"),
                      textcoords="offset points", va="center", color=ink, annotation_clip=False)  # fmt: skip
    if routed.chosen is not None:
        place = next(i for i, point in enumerate(routed.curve) if point.threshold == routed.threshold)
        spent = "" if costs is None else f", {money(xs[place], costs.currency)}"
        text = f"chosen: threshold {routed.threshold:.3g}, {shares[place]:.0f} % to the teacher{spent}"
        _ring(axes, xs[place], ys[place], text)
    axes.set_ymargin(0.15)
    axes.set(xlabel="answered by the teacher, %" if costs is None else f"{costs.currency} a month",
             ylabel="accuracy, %")  # fmt: skip
    axes.set_title("The cascade's accuracy against its cost")
    return figure


def _ring(axes: Any, x: float, y: float, text: str) -> None:
    axes.scatter(x, y, s=150, facecolor="none", edgecolor=RING, linewidth=2, zorder=4)
    axes.annotate(text, (x, y), (10, -16), textcoords="offset points", va="top", color=RING, annotation_clip=False)
