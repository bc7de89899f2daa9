"""Read examples with the answers of student and teacher from a table, and refuse what cannot be compared. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kd.data.text import records
from kd.deploy.settings import Columns
from kd.errors import KdError, did_you_mean

FEWEST = 20  # examples
SIDES = ("student", "teacher")
MOST_CLASSES = 1000  # of which another order is sought
MISTAKEN = 0.5  # share of the examples of some classes that another order of these classes would make right
FEWEST_MISTAKEN = 10  # such examples


@dataclass(frozen=True)
class Examples:
    """Answers of student and teacher to the same ``n`` examples, as texts, and what else is known of them.

    ``label``: None: there are none; "" where an example has none. ``confidence``: student or teacher → (n,), 0 to 1;
    ``probabilities``: student or teacher → (n, classes), in the order of ``classes``. ``columns``: others by name;
    ``rows``: the number of each example in its table, or in the data of a run, the first is 1.
    """

    where: str
    student: np.ndarray
    teacher: np.ndarray
    label: np.ndarray | None
    rows: np.ndarray
    classes: Sequence[str] = ()
    confidence: Mapping[str, np.ndarray] = field(default_factory=dict)
    probabilities: Mapping[str, np.ndarray] = field(default_factory=dict)
    text: np.ndarray | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    note: str = ""  # what a decision on them does not say

    def __len__(self) -> int:
        return len(self.student)

    @property
    def labelled(self) -> bool:
        """Tell whether every example has a label."""
        return self.label is not None and bool((self.label != "").all())

    def right(self, who: str) -> np.ndarray:
        """Tell for each example whether student or teacher is right; where both agree without a label, both are."""
        assert self.label is not None
        return (getattr(self, who) == self.label) | (self.label == "")

    def part(self, rows: np.ndarray) -> Examples:
        """Return some of the examples, by place or by a mask."""

        def of(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: value[rows] for name, value in values.items()}

        label, text = (None if a is None else a[rows] for a in (self.label, self.text))
        return Examples(
            self.where, self.student[rows], self.teacher[rows], label, self.rows[rows], self.classes,
            of(self.confidence), of(self.probabilities), text, of(self.columns),
        )  # fmt: skip


def read(path: str, columns: Columns, encoding: str = "utf-8") -> Examples:
    """Read a csv, tsv, jsonl, json or parquet file. ``KdError`` for columns, rows and values that cannot be used."""
    if not Path(path).is_file():
        raise KdError(f"predictions = {path}: there is no such file")
    try:
        table = records.read_file(Path(path), encoding)
    except KdError as error:
        raise KdError(str(error).replace("data.encoding", "encoding")) from None
    if len(table) < FEWEST:
        raise KdError(f"{path} has {len(table)} rows: a decision needs {FEWEST} examples or more")

    def column(name: str, key: str) -> np.ndarray:
        if name not in table.columns:
            there = ", ".join(table.columns)
            raise KdError(f"{key} = {name} is no column of {path}{did_you_mean(name, table.columns)}: it has {there}")
        return np.asarray([_text(value) for value in table.columns[name]], dtype=object)

    label = columns.label if columns.label or "label" not in table.columns else "label"
    answers = {who: column(getattr(columns, who), who) for who in SIDES}
    for who, given in answers.items():
        if (given == "").any():
            raise KdError(f"{who} = {getattr(columns, who)} has no answer in row {_first(given == '')} of {path}")
    labels = None if label is None else column(label, "label")
    own = {who: f"{who}_confidence" for who in SIDES}  # as label, teacher and student: found by its own name
    named: dict[str, str | None] = {w: getattr(columns, own[w]) for w in SIDES}
    found_by_name = [w for w in SIDES if own[w] in table.columns and getattr(columns, f"{w}_probabilities") is None]
    sure = {w: name or own[w] for w, name in named.items() if name is not None or w in found_by_name}
    confidence = {
        w: _shares(column(name, f"{w}_confidence"), f"{w}_confidence = {name}", path, rename=named[w] is None)
        for w, name in sure.items()
    }
    classes, probabilities = _probabilities(table.columns, columns, answers, path)
    for who, found in probabilities.items():
        confidence.setdefault(who, found.max(1))
    wanted = [name for name in columns.slices if name not in ("class", "length")]
    examples = Examples(
        path,
        answers["student"],
        answers["teacher"],
        labels,
        np.arange(1, len(table) + 1),
        classes,
        confidence,
        probabilities,
        None if columns.text is None else column(columns.text, "text"),
        {name: column(name, "slices") for name in wanted},
    )
    check(examples)
    return examples


def check(examples: Examples) -> None:
    """Refuse examples of one class, with some labels missing, or with classes in another order; ``KdError``."""
    where, label = examples.where, examples.label
    if label is not None and not examples.labelled:
        differ = examples.student != examples.teacher
        lacking = label == ""
        if (lacking & differ).any() or (~lacking & ~differ).any():
            row = examples.rows[np.flatnonzero(lacking & differ if (lacking & differ).any() else lacking)[0]]
            raise KdError(
                f"row {row} of {where} has no label: each example must have one, or else exactly those on which "
                "student and teacher disagree"
            )
    if label is not None and examples.labelled and len({*label}) < 2:
        raise KdError(f"{where} has labels of one class only, {label[0]}: two or more are needed")
    if label is None and len({*examples.student, *examples.teacher}) < 2:
        raise KdError(f"{where} has answers of one class only, {examples.student[0]}: two or more are needed")
    if label is None:
        _same_order(examples.teacher, examples.student, ("teacher", "student"), where)
    elif examples.labelled:
        for who in SIDES:
            _same_order(label, getattr(examples, who), ("label", who), where)


def _same_order(reference: np.ndarray, answers: np.ndarray, names: tuple[str, str], where: str) -> None:
    """Refuse answers that have no class of the reference, or agree with it once some classes are exchanged.

    The exchange is the one with most agreement (a linear assignment). It is refused where it makes half or more of the
    examples of the exchanged classes right, ten or more: a student that is merely weak does not confuse two classes
    with each other so often.
    """
    from scipy.optimize import linear_sum_assignment

    if not {*reference} & {*answers}:
        some = [", ".join(sorted({*values})[:3]) for values in (answers, reference)]
        raise KdError(f"{where}: {names[1]} has other classes than {names[0]}: {some[0]} … and {some[1]} …")
    classes, codes = np.unique(np.concatenate([reference, answers]).astype(str), return_inverse=True)
    if len(classes) > MOST_CLASSES:
        return
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(counts, (codes[: len(reference)], codes[len(reference) :]), 1)
    # a class keeps its name unless another one agrees with more examples
    _, assigned = linear_sum_assignment(counts + 0.5 * np.eye(len(classes)), maximize=True)
    moved = np.flatnonzero((assigned != np.arange(len(classes))) & (counts.sum(1) > 0))
    gained = int(counts[moved, assigned[moved]].sum() - counts[moved, moved].sum())
    if gained >= FEWEST_MISTAKEN and gained >= MISTAKEN * counts[moved].sum():
        pairs = ", ".join(f"{classes[assigned[m]]} for {classes[m]}" for m in moved[:3])
        raise KdError(
            f"{where}: {names[1]} has its classes in another order than {names[0]}: it answers {pairs}; give both the "
            "names of the classes"
        )


def _probabilities(
    table: Mapping[str, list[Any]], columns: Columns, answers: Mapping[str, np.ndarray], path: str
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Read the columns of each class, and refuse rows that are no distribution, or have another answer."""
    classes: dict[str, list[str]] = {}
    found = {}
    for who in SIDES:
        prefix = getattr(columns, f"{who}_probabilities")
        if prefix is None:
            continue
        key, names = f"{who}_probabilities = {prefix}", [n for n in table if n.startswith(prefix) and n != prefix]
        if len(names) < 2:
            raise KdError(f"{key}: {len(names)} columns of {path} begin with it, one for each class is needed")
        classes[who] = sorted(name.removeprefix(prefix) for name in names)
        values = [_shares(np.asarray(table[prefix + c], dtype=object), f"{prefix}{c}", path) for c in classes[who]]
        found[who] = np.stack(values, axis=1)
        if (wrong := np.abs(found[who].sum(1) - 1) > 0.02).any():
            row = _first(wrong)
            raise KdError(
                f"{key}: the probabilities in row {row} of {path} add up to {found[who][row - 1].sum():.3g}, not 1"
            )
        if unknown := sorted({*answers[who]} - {*classes[who]}):
            raise KdError(f"{key}: there is no column {prefix}{unknown[0]} in {path}, and {who} answers {unknown[0]}")
        places = np.searchsorted(classes[who], answers[who].astype(str))
        if (wrong := found[who][np.arange(len(places)), places] < found[who].max(1) - 1e-6).any():
            row = _first(wrong)
            best = classes[who][int(found[who][row - 1].argmax())]
            raise KdError(
                f"{key}: in row {row} of {path} {who} answers {answers[who][row - 1]}, and its most likely class is "
                f"{best}: are the classes in another order?"
            )
    if len(classes) == 2 and classes["student"] != classes["teacher"]:
        differ = sorted({*classes["student"]} ^ {*classes["teacher"]})
        raise KdError(f"{path}: student and teacher have probabilities of other classes: {', '.join(differ[:5])}")
    return next(iter(classes.values()), []), found


def _shares(values: np.ndarray, key: str, path: str, rename: bool = False) -> np.ndarray:
    """Read numbers from 0 to 1. ``rename``: nobody named the column, it was found."""
    found = np.full(len(values), np.nan)
    for place, value in enumerate(values):
        try:
            found[place] = float(value)
        except (TypeError, ValueError):
            break
    wrong = ~((found >= 0) & (found <= 1))
    if wrong.any():
        row = _first(wrong)
        other = " (rename the column if it is something else)" if rename else ""
        raise KdError(
            f"{key} is {values[row - 1] or 'empty'} in row {row} of {path}: it must be a number from 0 to 1{other}"
        )
    return found


def _first(wrong: np.ndarray) -> int:
    return int(np.flatnonzero(wrong)[0]) + 1


def _text(value: object) -> str:
    """Write a value of a table as text; a whole number has no point, so that 3.0 of one file is 3 of another."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()
