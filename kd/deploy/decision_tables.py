"""Write a decision as tables of text, for the terminal and for its page. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from kd.deploy.cascade import Cascade
from kd.deploy.cost import Costs, money
from kd.deploy.decision import Decision, Disagreement
from kd.deploy.plan import Plan, plan
from kd.deploy.quality import F1, Quality, wilson
from kd.deploy.text_table import Table

SLICES = 10  # that are shown
POINTS = 10  # of the cascade's curve, about
LONGEST = 48  # characters of a text that are shown


def tables(decision: Decision) -> dict[str, Table]:
    """Return what the decision rests on: those that it has of quality, slices, disagreements, …, in that order."""
    quality, n = decision.quality, decision.agreement.n
    found = {
        "quality": None if quality is None else _quality(quality, decision.f1),
        "slices": _slices(decision) if decision.slices else None,
        "disagreements": _disagreements(decision) if decision.disagreements else None,
        "calibration": _calibration(decision) if decision.calibration else None,
        "cascade": None if decision.cascade is None else _cascade(decision.cascade, decision),
        "cost": None if decision.cost is None else _cost(decision.cost, decision.cascade_cost),
        "plan": of_plan(plan(n, 0.0 if quality is None else quality.difference, decision.settings.margin), quality),
    }
    return {name: table for name, table in found.items() if table is not None}


def percent(share: float | None) -> str:
    """Write a share in percent, with one digit; "" for none."""
    return "" if share is None else f"{100 * share:.1f}"


def bounds(interval: tuple[float, float]) -> str:
    """Write an interval of a difference of shares, in points."""
    return f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"


def _quality(quality: Quality, f1: F1 | None) -> Table:
    shares = []
    for share in (quality.student, quality.teacher):
        low, high = (0.0, 0.0) if share is None else wilson(round(share * quality.n), quality.n)
        shares.append("" if share is None else f"{percent(share)} [{percent(low)}, {percent(high)}]")
    difference = f"{100 * quality.difference:+.1f}"
    rows = [("accuracy", *shares, difference, bounds(quality.interval), bounds(quality.bootstrap))]
    if f1 is not None:
        shares = [percent(f1.student), percent(f1.teacher)]
        rows.append(("macro-F1", *shares, f"{100 * f1.difference:+.1f}", "", bounds(f1.interval)))
    caption = (
        f"only the student is right: {quality.gained}, only the teacher: {quality.lost}; McNemar p = "
        f"{quality.mcnemar:.3g}; non-inferior by {100 * quality.margin:g} points: p = {quality.non_inferior:.3g}"
    )
    head = ("", "student", "teacher", "difference", "95 % interval", "paired bootstrap")
    return Table(f"Quality on {quality.n:,} examples, % and points", head, rows, caption=caption)


def _slices(decision: Decision) -> Table:
    found = decision.slices
    title = f"Slices, what loses most first ({min(SLICES, len(found))} of {len(found)})"
    head = ("slice", "value", "examples", "student", "teacher", "difference", "interval, all slices", "p, Holm")
    rows = []
    for s in found[:SLICES]:
        shares = [percent(s.student), percent(s.teacher), f"{100 * s.difference:+.1f}"]
        rows.append((s.column, s.value, str(s.n), *shares, bounds(s.interval), f"{s.corrected:.2g}"))
    return Table(title, head, rows, text=2)


def _disagreements(decision: Decision) -> Table:
    found = decision.disagreements
    known = [name for name in ("label", "right", "confidence", "text") if _known(found, name)]
    head = ["row", *(["label"] if "label" in known else []), "student", "teacher"]
    head += [name for name in known if name != "label"]
    rows = [tuple(_short(getattr(d, name)) for name in head) for d in found]
    title = f"Disagreements ({len(found)} of {decision.agreement.differ:,})"
    return Table(title, head, rows, text=len(head))


def _known(found: Sequence[Disagreement], name: str) -> bool:
    return any(getattr(d, name) not in (None, "unknown") for d in found)


def _short(value: object) -> str:
    text = f"{value:.2f}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _calibration(decision: Decision) -> Table:
    some = next(iter(decision.calibration.values()))
    title = f"Calibration on {some.n:,} examples, the temperature fitted on {some.fitted:,} others"
    rows = []
    for who, c in decision.calibration.items():
        errors = (percent(c.before.ece), percent(c.after.ece), f"{c.before.nll:.3f}", f"{c.after.nll:.3f}")
        rows.append((who, f"{c.temperature:.2f}", *errors))
    return Table(title, ("", "temperature", "ECE, %", "scaled", "NLL", "scaled"), rows)


def _cascade(cascade: Cascade, decision: Decision) -> Table:
    target = f"accuracy {100 * cascade.target:g} %" if cascade.target is not None else "the margin"
    costs, rows = decision.cost, []
    every = max(1, len(cascade.curve) // POINTS)
    for place, point in enumerate(cascade.curve):
        chosen = point.threshold == cascade.threshold
        if chosen or place % every == 0:
            spent = [] if costs is None else [money(decision.curve_month[place], costs.currency)]
            row = (f"{point.threshold:.3f}", percent(point.to_teacher), percent(point.accuracy), *spent)
            rows.append((*row, "chosen" if chosen else ""))
    if cascade.quality is None:
        caption = f"no threshold was shown to meet {target} on {cascade.fitted:,} examples of validation"
    else:
        met = "met" if cascade.meets else "not shown to be met"
        caption = (
            f"{target}: chosen on {cascade.fitted:,} examples of validation, {met} on test; against the teacher "
            f"{100 * cascade.quality.difference:+.1f} points, 95 % interval {bounds(cascade.quality.interval)}"
        )
    title = f"Cascade on {cascade.n:,} examples: the student answers where it is as sure as the threshold"
    head = ["threshold", "to the teacher, %", "accuracy, %", *(["a month"] if costs else []), ""]
    return Table(title, head, rows, text=0, caption=caption)


def _cost(alone: Costs, both: Costs | None) -> Table:
    rows = [("teacher", money(alone.teacher_month, alone.currency), "", "")]
    for name, costs in (("student", alone), ("cascade", both)):
        if costs is not None:
            saved = [money(amount, costs.currency) for amount in (costs.student_month, costs.saving_year)]
            rows.append((name, saved[0], saved[1], costs.break_even or ""))
    return Table(f"{alone.requests:,.0f} {alone.unit} a month", ("", "a month", "saved a year", "break-even"), rows)


def of_plan(plans: Sequence[Plan], quality: Quality | None = None) -> Table:
    """Write what a number of examples can show, and how many are needed."""
    first = plans[0]
    title = f"What {first.n:,} examples can show of {100 * first.difference:+.1f} points"
    rows = []
    for p in plans:
        needed = (f"{p.needed:,}", f"{p.textbook:,.1f}")
        rows.append((f"{100 * p.discordant:g} %", bounds(p.interval), f"{100 * p.shown_margin:.1f}", *needed))
    caption = "settled margin, examples needed: power 80 %, one-sided 5 %, if there is no difference"
    if quality is not None:
        caption = f"here {100 * quality.discordant:.1f} % are discordant: {quality.needed:,} needed; {caption}"
    head = ("discordant", "95 % interval", "settled margin", "needed, score test", "needed, textbook")
    return Table(f"{title}; examples needed for a margin of {100 * first.margin:g} points", head, rows, caption=caption)
