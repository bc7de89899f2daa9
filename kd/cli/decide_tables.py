"""Print a decision: the sentence first, then what it rests on."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kd.deploy.calibration import Calibration
from kd.deploy.cascade import Cascade
from kd.deploy.cost import Costs, money
from kd.deploy.decision import CERTAIN, Decision, Disagreement
from kd.deploy.plan import Plan, plan, sentence
from kd.deploy.quality import F1, Quality

SLICES = 10  # that are printed
LONGEST = 48  # characters of a text that are printed


def show(decision: Decision, console: Console) -> None:
    """Print the sentence, one for what it hides, and the tables."""
    print(decision.sentence)
    worse = [s for s in decision.slices if s.corrected < CERTAIN and s.difference < 0]
    for part in worse[:3]:
        lost = f"{part.column} = {part.value} loses {-100 * part.difference:.1f} points on {part.n} examples"
        print(f"But {lost} (p = {part.corrected:.2g}, corrected for {len(decision.slices)} slices).")
    if decision.quality is not None:
        console.print(_quality(decision.quality, decision.f1))
    if decision.slices:
        console.print(_slices(decision))
    if decision.disagreements:
        console.print(_disagreements(decision))
    if decision.calibration:
        console.print(_calibration(decision.calibration))
    if decision.cascade is not None:
        console.print(_cascade(decision.cascade, decision))
    if decision.cost is not None:
        console.print(_cost(decision.cost, decision.cascade_cost))
    quality = decision.quality
    n, difference = decision.agreement.n, 0.0 if quality is None else quality.difference
    console.print(_plan(plan(n, difference, decision.settings.margin), quality))
    for note in decision.notes:
        print(note)


def show_plan(plans: Sequence[Plan], console: Console) -> None:
    """Print what a number of examples can show."""
    print(sentence(list(plans)))
    console.print(_plan(plans, None))


def _table(title: str, names: Sequence[str], left: int = 1) -> Table:
    """Make a table: the first ``left`` columns are texts, the others numbers."""
    table = Table(title=title)
    for place, name in enumerate(names):
        table.add_column(name, justify="left" if place < left else "right")
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _points(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"


def _quality(quality: Quality, f1: F1 | None) -> Table:
    title = f"Quality on {quality.n:,} examples, % and points"
    table = _table(title, ("", "student", "teacher", "difference", "95 % interval", "paired bootstrap"))
    shares = [_percent(quality.student), _percent(quality.teacher), f"{100 * quality.difference:+.1f}"]
    table.add_row("accuracy", *shares, _points(quality.interval), _points(quality.bootstrap))
    if f1 is not None:
        shares = [_percent(f1.student), _percent(f1.teacher), f"{100 * f1.difference:+.1f}"]
        table.add_row("macro-F1", *shares, "", _points(f1.interval))
    table.caption = (
        f"only the student is right: {quality.gained}, only the teacher: {quality.lost}; McNemar p = "
        f"{quality.mcnemar:.3g}; non-inferior by {100 * quality.margin:g} points: p = {quality.non_inferior:.3g}"
    )
    return table


def _slices(decision: Decision) -> Table:
    found = decision.slices
    title = f"Slices, what loses most first ({min(SLICES, len(found))} of {len(found)})"
    names = ("slice", "value", "examples", "student", "teacher", "difference", "interval, all slices", "p, Holm")
    table = _table(title, names, left=2)
    for s in found[:SLICES]:
        shares = [_percent(s.student), _percent(s.teacher), f"{100 * s.difference:+.1f}"]
        table.add_row(s.column, Text(s.value), str(s.n), *shares, _points(s.interval), f"{s.corrected:.2g}")
    return table


def _disagreements(decision: Decision) -> Table:
    found = decision.disagreements
    known = [name for name in ("label", "right", "confidence", "text") if _known(found, name)]
    names = ["row", *(["label"] if "label" in known else []), "student", "teacher"]
    names += [name for name in known if name != "label"]
    table = _table(f"Disagreements ({len(found)} of {decision.agreement.differ:,})", names, left=len(names))
    for d in found:
        table.add_row(*(Text(_short(getattr(d, name))) for name in names))
    return table


def _known(found: Sequence[Disagreement], name: str) -> bool:
    return any(getattr(d, name) not in (None, "unknown") for d in found)


def _short(value: object) -> str:
    text = f"{value:.2f}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _calibration(calibrations: dict[str, Calibration]) -> Table:
    some = next(iter(calibrations.values()))
    title = f"Calibration on {some.n:,} examples, the temperature fitted on {some.fitted:,} others"
    table = _table(title, ("", "temperature", "ECE, %", "scaled", "NLL", "scaled"))
    for who, c in calibrations.items():
        errors = (_percent(c.before.ece), _percent(c.after.ece), f"{c.before.nll:.3f}", f"{c.after.nll:.3f}")
        table.add_row(who, f"{c.temperature:.2f}", *errors)
    return table


def _cascade(cascade: Cascade, decision: Decision) -> Table:
    target = f"accuracy {100 * cascade.target:g} %" if cascade.target is not None else "the margin"
    title = f"Cascade on {cascade.n:,} examples: the student answers where it is as sure as the threshold"
    names = ["threshold", "to the teacher, %", "accuracy, %"]
    costs = decision.cost
    table = _table(title, [*names, *(["a month"] if costs else []), ""], left=0)
    every = max(1, len(cascade.curve) // 10)
    for place, point in enumerate(cascade.curve):
        chosen = point.threshold == cascade.threshold
        if chosen or place % every == 0:
            spent = [] if costs is None else [money(decision.curve_month[place], costs.currency)]
            row = (f"{point.threshold:.3f}", _percent(point.to_teacher), _percent(point.accuracy), *spent)
            table.add_row(*row, "chosen" if chosen else "")
    if cascade.quality is None:
        table.caption = f"no threshold was shown to meet {target} on {cascade.fitted:,} examples of validation"
    else:
        met = "met" if cascade.meets else "not shown to be met"
        table.caption = (
            f"{target}: chosen on {cascade.fitted:,} examples of validation, {met} on test; against the teacher "
            f"{100 * cascade.quality.difference:+.1f} points, 95 % interval {_points(cascade.quality.interval)}"
        )
    return table


def _cost(alone: Costs, both: Costs | None) -> Table:
    table = _table(f"{alone.requests:,.0f} {alone.unit} a month", ("", "a month", "saved a year", "break-even"))
    table.add_row("teacher", money(alone.teacher_month, alone.currency), "", "")
    for name, costs in (("student", alone), ("cascade", both)):
        if costs is not None:
            saved = [money(amount, costs.currency) for amount in (costs.student_month, costs.saving_year)]
            table.add_row(name, *saved, costs.break_even or "")
    return table


def _plan(plans: Sequence[Plan], quality: Quality | None) -> Table:
    first = plans[0]
    title = f"What {first.n:,} examples can show of {100 * first.difference:+.1f} points"
    names = ("discordant", "95 % interval", "settled margin", "needed, score test", "needed, textbook")
    table = _table(f"{title}; examples needed for a margin of {100 * first.margin:g} points", names)
    for p in plans:
        needed = (f"{p.needed:,}", f"{p.textbook:,.1f}")
        table.add_row(f"{100 * p.discordant:g} %", _points(p.interval), f"{100 * p.shown_margin:.1f}", *needed)
    table.caption = "settled margin, examples needed: power 80 %, one-sided 5 %, if there is no difference"
    if quality is not None:
        table.caption = (
            f"here {100 * quality.discordant:.1f} % are discordant: {quality.needed:,} needed; {table.caption}"
        )
    return table
