"""Order runs that belong to no study by validation, as no measure was named beforehand; test stands beside it.

No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from kd.report.frame import finished
from kd.report.measures import Measure
from kd.studies.study import Study

EPOCH, TEST, USUAL = "selected", "test/acc1", "val/acc1"


def monitored(frame: pd.DataFrame) -> Measure:
    """Find the validation measure that picked the epoch, accuracy where runs differ in it, test if there is none."""
    found = {str(word).split(" ")[-1] for word in finished(frame)["monitor"]}
    for name in (*(found if len(found) == 1 else ()), USUAL):
        if f"{EPOCH}/{name}" in frame:
            return Measure(f"{EPOCH}/{name}")
    return Measure(f"{EPOCH}/{TEST}")


def by_validation(study: Study, frame: pd.DataFrame, chosen_by: Sequence[str] = ()) -> Study:
    """Measure the study by what picked the epochs; the same measure and accuracy of test are further columns.

    ``chosen_by``: objectives of a search; the first is the measure then, and orders the rows.
    """
    wanted = [c for name in chosen_by for c in (f"{EPOCH}/{name}", f"student/{name}", name) if c in frame]
    measure = Measure(wanted[0]) if wanted else monitored(frame)
    same = f"test/{measure.name}"
    beside = [f"{epoch}/{name}" for name in dict.fromkeys((same, TEST)) for epoch in (EPOCH, "last")]
    if measure.column not in frame:  # no run is finished
        return study
    columns = tuple(c for c in [*wanted, *beside] if c in frame and c != measure.column)
    figures = tuple(replace(figure, measure=measure.column) for figure in study.figures)
    means = finished(frame).groupby("row")[measure.column].mean().sort_values(ascending=measure.lower_is_better)
    best = means.dropna().index if wanted else ()
    rows = {name: study.rows[name] for name in (*best, *study.rows)}
    return replace(study, measure=measure.column, columns=columns, figures=figures, rows=rows)


def order(study: Study, frame: pd.DataFrame) -> str:
    """Write how the rows are ordered."""
    measure = Measure(study.measure)
    name = f"{measure.title} ({measure.epoch})" if measure.epoch else measure.title
    several = "mean over seeds of the " if finished(frame).duplicated("row").any() else ""
    if measure.column.endswith(TEST):
        return f"Rows: best first, by the {several}{name}: these runs have no validation measure that could order them."
    own = measure == monitored(frame)
    why = "; validation also picks the epoch, and the" if own else ", the first objective of the search; the"
    return f"Rows: best first, by the {several}{name}{why} test numbers beside it choose nothing."
