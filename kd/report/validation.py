"""Runs that belong to no study: nobody named a measure beforehand, so validation orders them and test stands beside it.

No torch.
"""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from kd.report.frame import finished
from kd.report.measures import Measure
from kd.studies.spec import Study

EPOCH, TEST, USUAL = "selected", "test/acc1", "val/acc1"


def monitored(frame: pd.DataFrame) -> Measure:
    """The validation measure that picked the runs' epoch, accuracy where they differ in it, test if there is none."""
    found = {str(word).split(" ")[-1] for word in finished(frame)["monitor"]}
    for name in (*(found if len(found) == 1 else ()), USUAL):
        if f"{EPOCH}/{name}" in frame:
            return Measure(f"{EPOCH}/{name}")
    return Measure(f"{EPOCH}/{TEST}")


def by_validation(study: Study, frame: pd.DataFrame) -> Study:
    """The study measured by what picked the epochs, with the same measure and accuracy of test as further columns."""
    measure = monitored(frame)
    same = f"test/{measure.name}"
    beside = [f"{epoch}/{name}" for name in dict.fromkeys((same, TEST)) for epoch in (EPOCH, "last")]
    columns = tuple(c for c in beside if c in frame and c != measure.column)
    figures = tuple(replace(figure, measure=measure.column) for figure in study.figures)
    return replace(study, measure=measure.column, columns=columns, figures=figures)


def order(frame: pd.DataFrame) -> str:
    """How the rows are ordered, in a sentence."""
    measure = monitored(frame)
    name = f"{measure.title} ({measure.epoch})"
    if measure.column.endswith(TEST):
        return f"Rows: best {name} first; these runs have no validation measure that could order them."
    several = "mean over seeds of the " if finished(frame).duplicated("row").any() else ""
    why = "validation also picks the epoch, and the test numbers beside it choose nothing"
    return f"Rows: best first, by the {several}{name}; {why}."
