"""Check the measures of a study against those that its runs will have, before the first is trained. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from kd.errors import KdError, did_you_mean
from kd.report.measures import EPOCHS, Measure
from kd.report.run_row import CLASSES
from kd.studies.study import PUBLISHED, STUDY, Comparison, Study
from kd.tasks.metrics import CLASSIFICATION

PLAIN = tuple(metric.name for metric in CLASSIFICATION if not metric.beside_teacher)
BESIDE = tuple(metric.name for metric in CLASSIFICATION if metric.beside_teacher)  # of a student with a teacher
MAIN = CLASSIFICATION[0].name
TESTED = ("error", "errors", *(f"class_{i}" for i in range(CLASSES)))
COSTS = ("parameters", "macs", "latency_ms")


def check(study: Study) -> None:
    """Raise ``KdError`` for a measure that no run of the study can have, such as ``test/acc_1``.

    Also for percents where fractions are meant, and for an evaluation that is not made for a row that is compared by
    it. A study that sets a task has that task's own metrics: its measures are not checked. Whether a class is one of
    the data's is not known before there is data.
    """
    own_task = any(re.match(r"\+*task[.=]", o) for row in study.rows.values() for o in row.overrides)
    known = set(_columns(study))
    for where, measure in () if own_task else _wanted(study):
        if not _known(measure, study.epoch, known):
            short = {column.removeprefix(f"{study.epoch}/") for column in known}
            raise KdError(f"{where} = {measure} is not allowed: no run measures that{did_you_mean(measure, short)}")
    for where, row, measure in _of_rows(study):
        evaluation = study.evaluations.get(measure.partition("/")[0])
        if evaluation is not None and evaluation.rows is not None and row not in evaluation.rows:
            only = f"the evaluation {evaluation.name} is made for {', '.join(evaluation.rows)} only"
            raise KdError(f"{where} = {measure} is not allowed for the row {row}: {only}")
    _refuse_percents(study)
    _refuse_percent_bounds(study)


def _refuse_percents(study: Study) -> None:
    """Raise ``KdError`` for a published accuracy of 93.6 where the results have 0.936."""
    for row, given in study.published.numbers.items() if study.published is not None else ():
        for measure, number in given.items():
            if Measure(measure).is_share and abs(number["value"]) > 1:
                where = f"{study.folder / PUBLISHED}: numbers: {row}: {measure}"
                raise KdError(f"{where} = {number['value']} must be a fraction, as in the results")


def _refuse_percent_bounds(study: Study) -> None:
    """Raise ``KdError`` for ``below: 20`` where a difference of shares is 0.2: everything would count as supported.

    The share of a gap that a student closes may be somewhat more than all of it.
    """
    for comparison in study.comparisons.values():
        limit, allowed = _limit(comparison)
        for key in ("sesoi", "pilot"):
            if (getattr(comparison, key) or 0) > limit:
                where = f"{study.folder / STUDY}: comparisons: {comparison.name}"
                raise KdError(f"{where}: {key} = {getattr(comparison, key)} is not allowed: it must be {allowed}")
    for i, condition in enumerate(study.supported, start=1):
        comparison = study.comparisons[condition.comparison]
        limit, allowed = _limit(comparison)
        for key in ("above", "below", "inside"):
            given = getattr(condition, key)
            bounds = given if isinstance(given, tuple) else [] if given is None else [given]
            if any(abs(bound) > limit for bound in bounds):
                where = f"{study.folder / STUDY}: supported: number {i} ({comparison.name})"
                value = list(given) if isinstance(given, tuple) else given
                raise KdError(f"{where}: {key} = {value} is not allowed: it must be {allowed}")


def _limit(comparison: Comparison) -> tuple[float, str]:
    """Return the largest difference that a comparison can have, and the words for what is allowed."""
    if comparison.share_of:
        return 2, "the share of a gap, -2 to 2: 0.5 is half of it"
    if Measure(comparison.measure).is_share:
        return 1, f"a difference of {comparison.measure} as a fraction, -1 to 1: 0.01 is one point"
    return math.inf, ""


def _known(measure: str, epoch: str, known: set[str]) -> bool:
    """Tell whether it is a column, or one of the study's epoch; the names of terms in ``train/`` are anyone's."""
    full = (measure, f"{epoch}/{measure}")
    return any(name in known or re.fullmatch(r"last/train/\w+", name) for name in full)


def _columns(study: Study) -> Iterator[str]:
    """Yield the columns of ``run_row.of_run``, but for the terms in training."""
    for epoch in EPOCHS:
        yield from (f"{epoch}/{split}/{m}" for split in ("val", "test") for m in (*PLAIN, *BESIDE))
        yield from (f"{epoch}/test/{m}" for m in TESTED)
        yield from (f"{epoch}/retention", f"{epoch}/epoch")
    yield from (f"last/{name}" for name in ("gap", "train/loss", *(f"train/{m}" for m in PLAIN[:2])))
    yield from (f"teacher/{split}/{m}" for split in ("val", "test") for m in PLAIN)
    yield from (f"teacher/test/{m}" for m in TESTED if m.startswith("class_"))
    yield from (f"{role}/{cost}" for role in ("student", "teacher") for cost in COSTS)
    yield from ("student/adapter_parameters", "wall_clock_s", "peak_memory_mb")
    for evaluation in study.evaluations.values():
        metrics = (MAIN, "bias") if evaluation.bias else (*PLAIN, *BESIDE)
        yield from (f"{evaluation.name}/{m}" for m in (*metrics, *TESTED))


def _of_rows(study: Study) -> Iterator[tuple[str, str, str]]:
    """Yield where a measure of one row is named, the row, and the measure."""
    for c in study.comparisons.values():
        where = f"{study.folder / STUDY}: comparisons: {c.name}: measure"
        yield where, c.row, c.measure
        yield where, c.than, c.than_measure or c.measure
        if c.share_of is not None:
            yield where, c.share_of, c.measure
    for row, given in study.published.numbers.items() if study.published is not None else ():
        yield from ((f"{study.folder / PUBLISHED}: numbers: {row}: measure", row, key) for key in given)


def _wanted(study: Study) -> Iterator[tuple[str, str]]:
    """Yield every measure that the study names, and where."""
    file = study.folder / STUDY
    yield f"{file}: measure", study.measure
    yield from ((f"{file}: columns", column) for column in study.columns)
    for c in study.comparisons.values():
        yield f"{file}: comparisons: {c.name}: measure", c.measure
        if c.than_measure is not None:
            yield f"{file}: comparisons: {c.name}: than_measure", c.than_measure
    yield from ((f"{file}: figures: number {i}: measure", f.measure) for i, f in enumerate(study.figures, start=1))
    if study.published is not None:
        for row, given in study.published.numbers.items():
            yield from ((f"{study.folder / PUBLISHED}: numbers: {row}: measure", key) for key in given)
