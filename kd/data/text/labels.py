"""Labels as they are written: names of classes, numbers that count them, or numbers to regress on. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kd.errors import KdError, did_you_mean

NUMBER = re.compile(r"-?\d+")
DECIMAL = re.compile(r"[-+]?(\d*\.\d*[1-9]\d*(e[-+]?\d+)?|\d+(\.0*)?e-\d+)", re.IGNORECASE)
QUANTITY = re.compile(r"[-+]?\d[\d.,]*")  # "12,5" and "1,200" as well
MANY = 20  # different numbers: more of them are no classes where most occur once
LARGEST = 3.4e38  # of float32
REGRESS = "to regress on numbers set data.numbers=true and task=text_regression"


def label_text(value: Any) -> str:
    """Return a label as text, a whole float without its point; "" where there is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None or value != value else str(value).strip()


def class_label(value: Any, names: Sequence[str] | None) -> str | None:
    """Return a label of a class, None where there is none. ``names``: of the classes that numbers count."""
    label = label_text(value)
    if label in ("", "-1"):  # -1: the labels of a test set that are withheld
        return None
    if names is not None and NUMBER.fullmatch(label):
        return names[int(label)] if int(label) < len(names) else label
    return label


def class_names(labels: Sequence[str | None], column: str | None, where: str) -> list[str]:
    """Return the classes of training labels in order: sorted, numbers by their size.

    Raises ``KdError`` for one class, and for labels that are no classes: decimals, or many numbers of which most occur
    once.
    """
    there = [label for label in labels if label is not None]
    _refuse_quantities(there, column, where)
    found = set(there)
    if len(found) == 1:
        raise KdError(f"{where} has 1 class ({found.pop()}): it needs 2 or more")
    numbers = all(NUMBER.fullmatch(label) for label in found)
    return sorted(found, key=lambda label: (int(label) if numbers else 0, label))


def _refuse_quantities(there: Sequence[str], column: str | None, where: str) -> None:
    decimal = next(filter(DECIMAL.fullmatch, there), None)
    if decimal is not None:
        raise KdError(
            f"data.label = {column} of {where} holds numbers such as {decimal}: it must hold classes (decimals as "
            f"classes need data.label_names); {REGRESS}"
        )
    different = set(there)
    if MANY < len(different) > len(there) / 2 and all(map(QUANTITY.fullmatch, different)):
        raise KdError(
            f"data.label = {column} of {where} holds {len(different):,} different numbers in {len(there):,} texts: it "
            f"must hold classes; {REGRESS}"
        )


def positions(labels: Sequence[str | None], places: Mapping[str, int], where: str, source: str) -> list[int | None]:
    """Return the place of each label's class, None where there is none.

    Raises ``KdError`` for labels that ``source``, train or an option, does not have.
    """
    found = dict.fromkeys(labels)
    if unknown := [label for label in found if label is not None and label not in places]:
        raise KdError(
            f"{where} has {'labels' if len(unknown) > 1 else 'a label'} that {source} does not have: "
            f"{', '.join(map(repr, unknown[:5]))}{did_you_mean(unknown[0], places)}"
        )
    return [None if label is None else places[label] for label in labels]


def numbers_of(labels: Sequence[str | None], column: str | None, row: Callable[[int], str]) -> list[float]:
    """Return labels as numbers to regress on. ``row``: what errors call the row of a label, by its place.

    Raises ``KdError`` where one is no finite number, or missing.
    """
    found = [_number(label) for label in labels]
    wrong = next((place for place, number in enumerate(found) if not abs(number) <= LARGEST), None)
    if wrong is not None:
        raise KdError(
            f"{row(wrong)} has a label that is no number, or none: {labels[wrong]!r} in data.label = {column}; "
            "data.numbers = true needs a finite number a text"
        )
    return found


def _number(label: str | None) -> float:
    try:
        return float(label if label is not None else "nan")
    except ValueError:
        return float("nan")
