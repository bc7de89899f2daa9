"""Compute what student and teacher cost a month, what is saved, and when the training has paid for itself. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date, timedelta

from kd.deploy.text_table import Table

MILLION = 1e6
HOURS = 730  # of a month: 8,760 hours a year ÷ 12
DAYS = 365.25 / 12  # of a month
FACTORS = (0.5, 2.0)  # by which an input is multiplied in the sensitivity table


@dataclass(frozen=True)
class Volume:
    """What comes in a month: so many ``requests`` of so many tokens each; ``unit``: what a request is called."""

    requests: float
    tokens_in: float | None = None
    tokens_out: float | None = None
    unit: str = "requests"


@dataclass(frozen=True)
class Prices:
    """What a model costs: by tokens, or by the hour of its machine.

    ``price_in``, ``price_out``: of a million tokens. ``price_per_hour``: of one machine, which answers
    ``requests_per_second``; ``machines``: how many always run (more where the volume needs more), None: only the hours
    that the volume takes are paid. ``fixed``: a month, beside it.
    """

    price_in: float | None = None
    price_out: float | None = None
    price_per_hour: float | None = None
    requests_per_second: float | None = None
    machines: int | None = None
    fixed: float = 0.0


@dataclass(frozen=True)
class Cost:
    """The inputs: volume, prices of student and teacher, what the training costs once, when the student begins.

    ``training``: amounts by what they are for; ``currency``: as the user writes it; ``start``: None is today.
    """

    currency: str
    volume: Volume
    student: Prices
    teacher: Prices
    training: Mapping[str, float] = field(default_factory=dict)
    start: date | None = None


@dataclass(frozen=True)
class Sensitivity:
    """What is saved a year, and the months to break-even (None: never), if ``key`` is ``factor`` times ``value``."""

    key: str
    value: float
    factor: float
    saving_year: float
    break_even_months: float | None


@dataclass(frozen=True)
class Costs:
    """Money a month of student and teacher, what is saved, what the training costs and when it has paid for itself.

    ``break_even``: the day, as YYYY-MM-DD; None where nothing is saved, or no training cost is given. With a cascade
    ``student_month`` is that of both, and ``to_teacher`` the share of requests that the teacher answers.
    """

    currency: str
    unit: str
    requests: float
    student_month: float
    teacher_month: float
    saving_month: float
    saving_year: float
    training: float
    break_even_months: float | None
    break_even: str | None
    to_teacher: float = 0.0
    sensitivity: tuple[Sensitivity, ...] = ()


def month(prices: Prices, volume: Volume, share: float = 1.0) -> float:
    """Return what a model costs a month if it answers ``share`` of the requests."""
    requests = volume.requests * share
    if prices.price_per_hour is not None and prices.requests_per_second is not None:
        hours = requests / (prices.requests_per_second * 3600)
        if prices.machines is not None:
            hours = HOURS * max(prices.machines, math.ceil(hours / HOURS - 1e-9))
        return hours * prices.price_per_hour + prices.fixed
    tokens = (volume.tokens_in or 0) * (prices.price_in or 0) + (volume.tokens_out or 0) * (prices.price_out or 0)
    return requests * tokens / MILLION + prices.fixed


def compare(cost: Cost, to_teacher: float = 0.0, sensitivity: bool = True) -> Costs:
    """Compare student and teacher; ``to_teacher``: share of requests that a cascade sends on to the teacher.

    In a cascade the student is asked every time.
    """
    teacher = month(cost.teacher, cost.volume)
    student = month(cost.student, cost.volume) + (month(cost.teacher, cost.volume, to_teacher) if to_teacher else 0.0)
    saving, training = teacher - student, sum(cost.training.values())
    months = training / saving if saving > 0 and training > 0 else None
    return Costs(
        cost.currency,
        cost.volume.unit,
        cost.volume.requests,
        student,
        teacher,
        saving,
        12 * saving,
        training,
        months,
        None if months is None else _day(cost.start or date.today(), months),
        to_teacher,
        tuple(_sensitivity(cost, to_teacher)) if sensitivity else (),
    )


def _day(start: date, months: float) -> str | None:
    """Return the day after so many months; None beyond the calendar."""
    try:
        return (start + timedelta(days=math.ceil(months * DAYS))).isoformat()
    except OverflowError:
        return None


def _sensitivity(cost: Cost, to_teacher: float) -> list[Sensitivity]:
    """Multiply each number that is given by each of :data:`FACTORS`; numbers that change nothing are left out."""
    now, found = compare(cost, to_teacher, sensitivity=False), []
    for part in ("volume", "student", "teacher"):
        for name, value in vars(getattr(cost, part)).items():
            if isinstance(value, (int, float)) and value and name != "machines":
                rows = []
                for factor in FACTORS:
                    other = replace(cost, **{part: replace(getattr(cost, part), **{name: value * factor})})
                    then = compare(other, to_teacher, sensitivity=False)
                    rows.append(Sensitivity(f"{part}.{name}", value, factor, then.saving_year, then.break_even_months))
                if any(not math.isclose(row.saving_year, now.saving_year) for row in rows):
                    found += rows
    if now.training:
        for factor in FACTORS:
            months = None if now.break_even_months is None else now.break_even_months * factor
            found.append(Sensitivity("training", now.training, factor, now.saving_year, months))
    return found


def money(amount: float, currency: str) -> str:
    """Write an amount with its currency: whole from 100 on, else with two digits, of less than 1 four that count."""
    size = abs(amount)
    digits = f"{amount:,.0f}" if size >= 99.995 else f"{amount:,.2f}" if size >= 1 or not size else f"{amount:.4g}"
    return f"{digits} {currency}"


def sentence(costs: Costs) -> str:
    """Say what is saved a year, and when the training has paid for itself."""
    saved = money(abs(costs.saving_year), costs.currency)
    if costs.saving_month <= 0:
        return f"The student saves nothing: it costs {saved} more a year than the teacher."
    text = f"The student saves {saved} a year"
    if not costs.training:
        return f"{text}; training costs nothing here (training.NAME=AMOUNT)."
    text += f"; the training, {money(costs.training, costs.currency)}, has paid for itself"
    return (
        f"{text} after {costs.break_even_months:,.1f} months{f', on {costs.break_even}' if costs.break_even else ''}."
    )


def of_sensitivity(costs: Costs) -> Table:
    """Write what is saved, and when the training has paid for itself, if one input were half or double."""
    title = "saved a year, months to break-even" if costs.training else "saved a year"
    rows = []
    for half, double in zip(costs.sensitivity[::2], costs.sensitivity[1::2], strict=True):
        shown = [money(row.saving_year, costs.currency) for row in (half, double)]
        if costs.training:
            months = (row.break_even_months for row in (half, double))
            shown += ["never" if each is None else f"{each:,.1f}" for each in months]
        rows.append((half.key, f"{half.value:,.10g}", *shown))
    head = ("input", "now", "half", "double", *(("half", "double") if costs.training else ()))
    return Table(f"If one input were half or double: {title}", head, rows)
