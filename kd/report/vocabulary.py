"""The measures that runs of a study will have, checked before the first of them is trained. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kd.errors import KdError, near
from kd.report.frame import CLASSES
from kd.report.measures import EPOCHS, Measure
from kd.studies.spec import PUBLISHED, STUDY, Study

PLAIN = ("acc1", "acc5", "nll", "ece")
BESIDE = ("agreement", "kl")  # of a student with a teacher
TESTED = ("error", "errors", *(f"class_{i}" for i in range(CLASSES)))
COSTS = ("parameters", "macs", "latency_ms")


def check(study: Study) -> None:
    """``KdError`` for a measure that no run of the study can have, such as ``test/acc_1``, and for published percents.

    Also for an evaluation that is not made for a row that is compared by it. A study that sets a task has that task's
    own metrics: only the published numbers are looked at. That a class is one of the data's cannot be told before there
    is data.
    """
    own_task = any(re.match(r"\+*task[.=]", o) for row in study.rows.values() for o in row.overrides)
    known = set(_columns(study))
    for where, measure in () if own_task else _wanted(study):
        if not _known(measure, study.epoch, known):
            short = {column.removeprefix(f"{study.epoch}/") for column in known}
            raise KdError(f"{where} = {measure} is not allowed: no run measures that{near(measure, short)}")
    for where, row, measure in _of_rows(study):
        evaluation = study.evaluations.get(measure.partition("/")[0])
        if evaluation is not None and evaluation.rows is not None and row not in evaluation.rows:
            only = f"the evaluation {evaluation.name} is made for {', '.join(evaluation.rows)} only"
            raise KdError(f"{where} = {measure} is not allowed for the row {row}: {only}")
    for name, given in study.published.numbers.items() if study.published is not None else ():
        for key, number in given.items():
            refuse_percent(name, key, number["value"])


def refuse_percent(row: str, measure: str, value: float) -> None:
    """``KdError`` for a published accuracy of 93.6 where the results have 0.936."""
    if Measure(measure).is_share and abs(value) > 1:
        raise KdError(f"{PUBLISHED}: {row}: {measure} = {value} must be a fraction, as in the results")


def _known(measure: str, epoch: str, known: set[str]) -> bool:
    """Whether it is a column, or one of the study's epoch; the names of terms in ``train/`` are anyone's."""
    full = (measure, f"{epoch}/{measure}")
    return any(name in known or re.fullmatch(r"last/train/\w+", name) for name in full)


def _columns(study: Study) -> Iterator[str]:
    """The columns of ``frame.of_run``, but for the terms in training."""
    for epoch in EPOCHS:
        yield from (f"{epoch}/{split}/{m}" for split in ("val", "test") for m in (*PLAIN, *BESIDE))
        yield from (f"{epoch}/test/{m}" for m in TESTED)
        yield from (f"{epoch}/retention", f"{epoch}/epoch")
    yield from (f"last/{name}" for name in ("gap", "train/loss", "train/acc1", "train/acc5"))
    yield from (f"teacher/{split}/{m}" for split in ("val", "test") for m in PLAIN)
    yield from (f"teacher/test/{m}" for m in TESTED if m.startswith("class_"))
    yield from (f"{role}/{cost}" for role in ("student", "teacher") for cost in COSTS)
    yield from ("student/adapter_parameters", "wall_clock_s", "peak_memory_mb")
    for evaluation in study.evaluations.values():
        metrics = ("acc1", "bias") if evaluation.bias else (*PLAIN, *BESIDE)
        yield from (f"{evaluation.name}/{m}" for m in (*metrics, *TESTED))


def _of_rows(study: Study) -> Iterator[tuple[str, str, str]]:
    """Where a measure of one row is asked for, the row, and the measure."""
    for c in study.comparisons.values():
        where = f"{study.folder / STUDY}: comparisons: {c.name}: measure"
        yield where, c.row, c.measure
        yield where, c.than, c.than_measure or c.measure
        if c.share_of is not None:
            yield where, c.share_of, c.measure
    for row, given in study.published.numbers.items() if study.published is not None else ():
        yield from ((f"{study.folder / PUBLISHED}: numbers: {row}: measure", row, key) for key in given)


def _wanted(study: Study) -> Iterator[tuple[str, str]]:
    """Every measure that the study names, and where."""
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
