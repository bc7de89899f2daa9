"""Decide whether a student can replace its teacher, from the answers of both to the same examples. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kd.deploy import cost as costs
from kd.deploy.calibration import Calibration, Scores, calibrate, of_confidence
from kd.deploy.cascade import Answers, Cascade, cascade
from kd.deploy.examples import SIDES, Examples
from kd.deploy.quality import F1, Agreement, Quality, agreement, compare, macro_f1
from kd.deploy.settings import Settings
from kd.deploy.slices import Slice, compare_slices

REPLACE, CASCADE, KEEP, MORE = VERDICTS = (
    "replace",
    "replace with a cascade",
    "do not replace",
    "more examples needed",
)
CERTAIN = 0.05  # corrected p below which a slice is named


@dataclass(frozen=True)
class Disagreement:
    """An example that student and teacher answer differently; ``right``: student, teacher, neither, or unknown."""

    row: int
    label: str | None
    student: str
    teacher: str
    right: str
    confidence: float | None
    text: str | None


@dataclass(frozen=True)
class Decision:
    """The verdict, one of :data:`VERDICTS`, its sentence, and all that it was made of; None or empty: cannot be had.

    ``calibration``: of student and teacher; ``cost``: of the student alone, ``cascade_cost``: of student and teacher at
    the chosen threshold, ``curve_month``: money a month at each point of the cascade's curve. ``notes``: what was left
    out, and why.
    """

    verdict: str
    sentence: str
    settings: Settings
    agreement: Agreement
    quality: Quality | None
    f1: F1 | None
    slices: list[Slice]
    disagreements: list[Disagreement]
    calibration: dict[str, Calibration] = field(default_factory=dict)
    cascade: Cascade | None = None
    cost: costs.Costs | None = None
    cascade_cost: costs.Costs | None = None
    curve_month: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def decide(
    examples: Examples,
    settings: Settings,
    validation: Examples | float | None = None,
    cost: costs.Cost | None = None,
) -> Decision:
    """Compare student and teacher on the examples, and decide by :func:`verdict`.

    ``validation``: other examples on which temperature and threshold are chosen, or the share of ``examples``, drawn at
    random, that is used for it; those are then measured on the rest alone. ``cost``: inputs of what both cost.
    """
    found, notes = agreement(examples.student, examples.teacher), [examples.note] if examples.note else []
    quality = f1 = routed = None
    slices: list[Slice] = []
    calibration: dict[str, Calibration] = {}
    if examples.label is not None:
        student, teacher = (examples.right(who) for who in SIDES)
        quality = compare(student, teacher, settings.margin, examples.labelled, settings.seed)
    if examples.labelled:
        assert examples.label is not None
        f1 = macro_f1(examples.label, examples.student, examples.teacher, settings.seed)
        slices = compare_slices(student, teacher, _slice_columns(examples, settings.slices))
        if examples.confidence:
            chosen_on, test = _parts(examples, validation, settings.seed)
            calibration = _calibrations(chosen_on, test)
            if "student" in test.confidence and "student" not in chosen_on.confidence:
                notes.append("no cascade: the validation examples have no confidence of the student")
            elif "student" in test.confidence:
                routed = cascade(_answers(chosen_on), _answers(test), settings.margin, settings.target, settings.seed)
        else:
            notes.append(
                "no calibration and no cascade: they need student_confidence=COLUMN or student_probabilities=…"
            )
    else:
        notes.append("no accuracy, slices, calibration or cascade: they need a label for every example (label=COLUMN)")
    alone = both = None
    curve_month: list[float] = []
    if cost is not None:
        alone = costs.compare(cost)
        if routed is not None:
            curve_month = [costs.compare(cost, p.to_teacher, sensitivity=False).student_month for p in routed.curve]
            both = None if routed.chosen is None else costs.compare(cost, routed.chosen.to_teacher)
            if both is not None and both.saving_month <= 0:
                spent, before = (costs.money(m, cost.currency) for m in (both.student_month, both.teacher_month))
                notes.append(f"no cascade: it costs {spent} a month, the teacher alone {before}")
    name = verdict(settings.margin, found, quality, routed, alone, both)
    return Decision(
        name, sentence(name, settings, found, quality, routed, alone), settings, found, quality, f1, slices,
        _disagreements(examples, settings.show), calibration, routed, alone, both, curve_month, notes,
    )  # fmt: skip


def verdict(
    margin: float,
    answers: Agreement,
    quality: Quality | None,
    routed: Cascade | None,
    alone: costs.Costs | None,
    both: costs.Costs | None,
) -> str:
    """Return one of :data:`VERDICTS`. All limits are one-sided, of 95 %.

    1. Where costs are known and the student costs no less than the teacher: do not replace.
    2. The student loses less than the margin at its lower limit: replace. Without labels: if the upper limit of the
       share of answers that differ is below the margin, since accuracy cannot differ by more.
    3. The cascade, its threshold chosen on validation, meets its target on test, lets both answer some examples, and
       costs less than the teacher where costs are known: replace with a cascade.
    4. The student loses more than the margin at its upper limit: do not replace.
    5. Otherwise the examples do not settle it: more examples needed.
    """
    if alone is not None and alone.saving_month <= 0:
        return KEEP
    if quality.lower > -margin if quality is not None else answers.limit < margin:
        return REPLACE
    to_teacher = routed.chosen.to_teacher if routed is not None and routed.meets and routed.chosen is not None else 0.0
    if 0 < to_teacher < 1 and (both is None or both.saving_month > 0):
        return CASCADE
    if quality is not None and quality.upper < -margin:
        return KEEP
    return MORE


def sentence(
    name: str,
    settings: Settings,
    answers: Agreement,
    quality: Quality | None,
    routed: Cascade | None,
    alone: costs.Costs | None,
) -> str:
    """Say the verdict and the number that it rests on, in one sentence; differences are in points of accuracy."""
    margin, start = f"the margin of {100 * settings.margin:g} points", name.capitalize()
    if alone is not None and alone.saving_month <= 0:
        more = costs.money(-alone.saving_month, alone.currency)
        return f"{start}: the student saves nothing, it costs {more} more a month than the teacher."
    if quality is None:
        seen = f"{answers.differ:,} of {answers.n:,} answers differ, at most {100 * answers.limit:.1f} % (95 %)"
        if name == REPLACE:
            return f"{start}: {seen}: whatever the labels are, accuracy falls by less than {margin}."
        return f"{start}: {seen}, more than {margin}: label these {answers.differ:,}, the others do not matter."
    seen = f"on {quality.n:,} examples the student is {_points(quality.difference)} the teacher"
    worst = f"at worst {_points(quality.lower)} it (95 %)"
    alone_at_worst = f"at worst {_points(quality.lower)} the teacher (95 %)"
    if name == REPLACE:
        return f"{start}: {seen}, {worst}, within {margin}."
    if name == KEEP:
        return f"{start}: {seen}, at best {_points(quality.upper)} it (95 %), beyond {margin}."
    if name == CASCADE:
        assert routed is not None
        assert routed.chosen is not None
        assert routed.quality is not None
        share = f"{100 * routed.chosen.to_teacher:.0f} % of the examples"
        return (
            f"{start}: the student alone is {alone_at_worst}, beyond {margin}; if the teacher answers where the "
            f"student is less sure than {routed.threshold:.3g} ({share}), both "
            f"together are {_points(routed.quality.difference)} the teacher, at worst "
            f"{_points(routed.quality.lower)} it (95 %)."
        )
    needed = f"about {quality.needed:,} are needed if there is no difference"
    if quality.needed_as_measured is not None and quality.difference < 0:
        needed += f", {quality.needed_as_measured:,} if it is as measured"
    best = f"at best {_points(quality.upper)} it"
    return f"{start}: {seen}, {worst}, {best}, on both sides of {margin}: {needed} (power 80 %)."


def losing(decision: Decision) -> list[str]:
    """Say which slices lose for certain, corrected for their number: a sentence each, three at most."""
    worse = [s for s in decision.slices if s.corrected < CERTAIN and s.difference < 0]
    return [
        f"But {part.column} = {part.value} loses {-100 * part.difference:.1f} points on {part.n} examples "
        f"(p = {part.corrected:.2g}, corrected for {len(decision.slices)} slices)."
        for part in worse[:3]
    ]


def _points(difference: float) -> str:
    """Write a difference of shares as ``1.2 points below``."""
    shown = f"{abs(100 * difference):.1f}"
    return "as good as" if shown == "0.0" else f"{shown} points {'above' if difference > 0 else 'below'}"


def _parts(examples: Examples, validation: Examples | float | None, seed: int) -> tuple[Examples, Examples]:
    """Return the examples on which is chosen, and those on which is measured; by default half of them each."""
    if isinstance(validation, Examples):
        return validation, examples
    order = np.random.default_rng(seed).permutation(len(examples))
    first = round(len(examples) * (0.5 if validation is None else validation))
    return examples.part(np.sort(order[:first])), examples.part(np.sort(order[first:]))


def _answers(examples: Examples) -> Answers:
    return Answers(examples.confidence["student"], examples.right("student"), examples.right("teacher"))


def _calibrations(validation: Examples, test: Examples) -> dict[str, Calibration]:
    """Calibrate who has confidences on both parts."""
    both = [who for who in SIDES if who in validation.confidence and who in test.confidence]
    return {who: calibrate(_scores(validation, who), _scores(test, who)) for who in both}


def _scores(examples: Examples, who: str) -> Scores:
    """Return the probabilities of all classes, or of the answer alone where a label is none of these classes."""
    answers, label = getattr(examples, who), examples.label
    assert label is not None
    if who not in examples.probabilities or not {*label} <= {*examples.classes}:
        return of_confidence(examples.confidence[who], examples.right(who))
    place = {name: number for number, name in enumerate(examples.classes)}
    codes = (np.asarray([place[value] for value in values], dtype=int) for values in (answers, label))
    return Scores(examples.probabilities[who], *codes)


def _slice_columns(examples: Examples, names: Sequence[str]) -> dict[str, Sequence[str]]:
    known: dict[str, Sequence[str]] = {name: list(values) for name, values in examples.columns.items()}
    if examples.label is not None:
        known["class"] = list(examples.label)
    if examples.text is not None:
        known["length"] = [str(len(text)) for text in examples.text]
    return {name: known[name] for name in names}


def _disagreements(examples: Examples, most: int) -> list[Disagreement]:
    """Return ``most``: first those that the student loses, then both wrong, then gained; the most confident first."""
    places = np.flatnonzero(examples.student != examples.teacher)
    sure = examples.confidence.get("student")
    label = examples.label
    order = {"teacher": 0, "neither": 1, "student": 2, "unknown": 3}

    def right(place: Any) -> str:
        if label is None:
            return "unknown"
        return next((who for who in SIDES if getattr(examples, who)[place] == label[place]), "neither")

    found = [
        Disagreement(
            int(examples.rows[place]),
            None if label is None else str(label[place]),
            str(examples.student[place]),
            str(examples.teacher[place]),
            right(place),
            None if sure is None else float(sure[place]),
            None if examples.text is None else str(examples.text[place]),
        )
        for place in places
    ]
    return sorted(found, key=lambda d: (order[d.right], -(d.confidence or 0.0), d.row))[:most]
