"""Judge the conditions of a study by the intervals of its comparisons: one word for each. No torch.

- *supported*: the whole 95 % interval fulfils the condition;
- *contradicted*: none of it does, and the paper itself claims the condition (``claim_of: paper``);
- *rejected*: none of it does, and the bound is our own (``claim_of: ours``): a hypothesis of ours that failed, which
  says nothing against the paper;
- *equivalent*: neither, and the 90 % interval lies within ± the smallest effect size of interest (two one-sided tests
  at 5 %);
- *undecided*: all else, with the smallest difference that the design could have shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kd.report import stats, teacher_weights
from kd.report.claims import Compared
from kd.report.frame import FINISHED
from kd.studies.study import PAPER, Comparison, Condition, Study

SUPPORTED, EQUIVALENT, UNDECIDED = "supported", "equivalent", "undecided"
REJECTED, CONTRADICTED, INCOMPLETE = "rejected", "contradicted", "incomplete"
WORDS = (SUPPORTED, EQUIVALENT, UNDECIDED, REJECTED, CONTRADICTED, INCOMPLETE)
GIVEN = "given this teacher"


@dataclass(frozen=True)
class Judged:
    """One condition with its word and the sentence on it; ``one_teacher``: see :func:`teacher_weights.is_one_run`."""

    word: str
    sentence: str
    one_teacher: bool = False

    @property
    def phrase(self) -> str:
        """Return the word, and for which teacher it holds."""
        return f"{self.word}, {GIVEN}" if self.one_teacher else self.word

    @property
    def text(self) -> str:
        """Return the phrase and the sentence."""
        return f"{self.phrase} · {self.sentence}"


@dataclass(frozen=True)
class Verdict:
    """The conditions of a study, judged; ``exploratory``: as the study says."""

    conditions: tuple[Judged, ...] = ()
    exploratory: bool = False

    @property
    def incomplete(self) -> bool:
        """Tell whether a run of the rows that are compared is not finished."""
        return any(judged.word == INCOMPLETE for judged in self.conditions)

    @property
    def headline(self) -> str:
        """Count the words: ``3 supported (2 given this teacher), 1 undecided``. "" where nothing is claimed."""
        if not self.conditions or self.incomplete:
            return INCOMPLETE if self.conditions else ""
        everywhere = all(judged.one_teacher for judged in self.conditions)
        counts = []
        for word in WORDS:
            given = [judged.one_teacher for judged in self.conditions if judged.word == word]
            some = f" ({sum(given)} {GIVEN})" if any(given) and not everywhere else ""
            counts += [f"{len(given)} {word}{some}"] if given else []
        about = {GIVEN: everywhere, "exploratory": self.exploratory}
        return "; ".join([", ".join(counts), *(text for text, holds in about.items() if holds)])

    @property
    def overall(self) -> str:
        """Return one word for the colour of the page: that of all conditions, else ``undecided``."""
        words = {judged.word for judged in self.conditions}
        return words.pop() if len(words) == 1 else UNDECIDED


def verdict(study: Study, compared: Mapping[str, Compared], frame: pd.DataFrame) -> Verdict:
    """Judge every condition of a study.

    A condition is ``incomplete`` while a run of the rows that it compares is not finished: to judge by some seeds and
    stop when they please would be no test. That all conditions are ``supported`` needs no correction for their
    number (an intersection-union test); of ``contradicted`` and ``rejected`` the error grows with it.
    """
    unfinished = set(frame["row"][frame["status"] != FINISHED])
    judged = []
    for condition in study.supported:
        found = compared[condition.comparison]
        word, sentence = judge(condition, found, condition.claim_of or study.claim_of)
        word = INCOMPLETE if unfinished & _rows_of(found.comparison) else word
        judged.append(Judged(word, sentence, teacher_weights.is_one_run(study, found.comparison)))
    return Verdict(tuple(judged), study.exploratory)


def _rows_of(comparison: Comparison) -> set[str]:
    return {row for row in (comparison.row, comparison.than, comparison.share_of) if row}


def judge(condition: Condition, compared: Compared, claim_of: str) -> tuple[str, str]:
    """Return the word for one condition and the sentence that says why. ``claim_of``: "paper" or "ours"."""
    wanted = _wanted(condition, compared)
    bounds, narrow, sesoi = compared.interval.headline, compared.interval.narrow, compared.comparison.sesoi
    if bounds is None:
        return UNDECIDED, f"{compared.sentence}. It had to be {wanted}: without an interval nothing is decided."
    low, high = _bounds(condition)
    negligible = sesoi is not None and narrow is not None and -sesoi < narrow[0] and narrow[1] < sesoi
    size = f"{compared.size(sesoi)}, the smallest effect of interest" if sesoi is not None else ""
    if low < bounds[0] and bounds[1] < high:
        small = f" The 90\u00a0% interval lies within ±{size}." if negligible and _is_zero(condition) else ""
        return SUPPORTED, f"{compared.sentence}. It had to be {wanted}, and all of the interval is.{small}"
    if bounds[1] < low or high < bounds[0]:
        word, claim = (CONTRADICTED, "as the paper claims") if claim_of == PAPER else (REJECTED, "a bound of our own")
        small = f" The 90\u00a0% interval lies within ±{size}." if negligible and _is_zero(condition) else ""
        return word, f"{compared.sentence}. It had to be {wanted}, {claim}, and none of the interval is.{small}"
    part = f"{compared.sentence}. It had to be {wanted}, and only a part of the interval is"
    ninety = f"the 90\u00a0% interval, {compared.show(narrow[0])} to {compared.show(narrow[1])}," if narrow else ""
    if negligible:
        return EQUIVALENT, f"{part}; {ninety} lies within ±{size}."
    beyond = f"; {ninety} reaches beyond ±{size}" if size and _is_zero(condition) else ""
    return UNDECIDED, f"{part}{beyond}. {_power(condition, compared)}."


def _is_zero(condition: Condition) -> bool:
    """Tell whether the bound is no effect at all: only there an effect too small to be of interest needs a word."""
    return 0 in (condition.above, condition.below)


def _bounds(condition: Condition) -> tuple[float, float]:
    if condition.inside is not None:
        return condition.inside
    low = -np.inf if condition.above is None else condition.above
    return low, np.inf if condition.below is None else condition.below


def _wanted(condition: Condition, compared: Compared) -> str:
    if condition.inside is not None:
        low, high = condition.inside
        return f"between {compared.show(low)} and {compared.show(high)}"
    number = condition.above if condition.above is not None else condition.below
    assert number is not None, f"a condition on {condition.comparison} without a number"
    return f"{'above' if condition.above is not None else 'below'} {compared.show(number)}"


def _power(condition: Condition, compared: Compared) -> str:
    """Say which difference from the bound the design could have shown, by the observed spread of the differences."""
    interval = compared.interval
    assert interval.spread is not None, f"{compared.title} has an interval and no spread"
    shown = compared.size(interval.spread * stats.detectable(interval.n))
    number = condition.above if condition.above is not None else condition.below
    of = "" if number == 0 else " from a bound" if number is None else f" from {compared.show(number)}"
    what = f"difference{of}" if of else "effect"
    return f"The smallest {what} that {interval.n} seeds of this spread could have shown is {shown} (power 80\u00a0%)"
