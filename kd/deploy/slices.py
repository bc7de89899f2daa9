"""Which parts of the examples lose most: classes, lengths, sources; corrected for how many are compared. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kd.deploy.quality import LEVEL, interval

FEWEST = 10  # examples of a slice that is compared
BINS = 4  # of numbers with more different values than MOST_VALUES: quartiles
MOST_VALUES = 10


@dataclass(frozen=True)
class Slice:
    """A part of the examples: those of which ``column`` is ``value``.

    ``difference``: student − teacher, share right; ``interval``: Tango's, of 95 % for all slices together (Bonferroni).
    ``p``: exact McNemar; ``corrected``: by Holm (1979), for all slices compared.
    """

    column: str
    value: str
    n: int
    student: float
    teacher: float
    difference: float
    interval: tuple[float, float]
    p: float
    corrected: float


def compare_slices(student: np.ndarray, teacher: np.ndarray, columns: Mapping[str, Sequence[str]]) -> list[Slice]:
    """Compare student and teacher in each slice of :data:`FEWEST` examples or more; what loses most comes first.

    ``student``, ``teacher``: right or wrong, bool, (examples,); ``columns``: a value for each example, of a column with
    numbers its quartile. Slices may overlap: Holm's correction holds all the same.
    """
    from statsmodels.stats.contingency_tables import mcnemar
    from statsmodels.stats.multitest import multipletests

    parts = []
    for column, values in columns.items():
        names = np.asarray(binned(values), dtype=object)
        for value in dict.fromkeys(sorted(names.tolist(), key=_order)):
            inside = names == value
            if inside.sum() >= FEWEST:
                parts.append((column, str(value), student[inside], teacher[inside]))
    level, found = 1 - (1 - LEVEL) / max(1, len(parts)), []
    for column, value, one, other in parts:
        gained, lost, n = int((one & ~other).sum()), int((other & ~one).sum()), len(one)
        p = float(mcnemar([[0, gained], [lost, 0]], exact=True).pvalue) if gained + lost else 1.0
        shares = (float(one.mean()), float(other.mean()), (gained - lost) / n)
        found.append((column, value, n, *shares, interval(gained, lost, n, level), p))
    corrected = multipletests([p for *_, p in found], method="holm")[1] if found else []
    slices = [Slice(*part, float(c)) for part, c in zip(found, corrected, strict=True)]
    return sorted(slices, key=lambda s: (s.difference, s.corrected))


def binned(values: Sequence[str]) -> list[str]:
    """Return the values, of numbers with many different ones the quartile each is in, as ``LOW to HIGH``."""
    try:
        numbers = np.asarray([float(value) for value in values])
    except ValueError:
        return [str(value) for value in values]
    if len(np.unique(numbers)) <= MOST_VALUES or not np.isfinite(numbers).all():
        return [str(value) for value in values]
    edges = np.unique(np.quantile(numbers, np.linspace(0, 1, BINS + 1)))
    where = np.clip(np.searchsorted(edges, numbers, side="left") - 1, 0, len(edges) - 2)
    names = [f"{numbers[where == b].min():g} to {numbers[where == b].max():g}" for b in range(len(edges) - 1)]
    return [names[b] for b in where]


def _order(value: object) -> tuple[bool, float, str]:
    """Sort numbers, and ranges by their beginning, before words."""
    text = str(value)
    try:
        return (False, float(text.partition(" to ")[0]), text)
    except ValueError:
        return (True, 0.0, text)
