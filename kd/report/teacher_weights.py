"""Tell which weights of a teacher the students of a study learned from. No torch."""

from __future__ import annotations

import numpy as np
import pandas as pd

from kd.report.frame import finished, measure_of, metrics_of, values
from kd.report.measures import EPOCHS
from kd.studies import references
from kd.studies.study import Comparison, Row, Study


def teacher_of(row: Row) -> str | None:
    """Name the row that is the teacher of ``row``; None where there is none, or are several."""
    lines = [o for o in row.overrides if o.lstrip("+").startswith("teacher.checkpoint=")]
    found = [
        match[1] for line in lines for match in references.PLACEHOLDER.finditer(line) if match[1] != references.SEED
    ]
    return found[0] if len(found) == 1 else None


def is_one_run(study: Study, comparison: Comparison) -> bool:
    """Tell whether all compared rows that have a teacher learn from one and the same run of it (or ensemble of runs).

    A verdict then holds given this teacher: its own spread is in no interval. False where no row has a teacher. A
    student that goes on from a distilled one has the teacher of that one, too.
    """
    teachers = {
        teachers
        for name in (comparison.row, comparison.than)
        for seed in study.rows[name].seeds or study.seeds
        if (teachers := _teachers(study, study.rows[name], seed))
    }
    return len(teachers) == 1


def _teachers(study: Study, row: Row, seed: int) -> frozenset[tuple[str, int | None]]:
    """Return row and seed of the runs that are the teacher of one run; a path that is no run of the study, as it is."""
    found: set[tuple[str, int | None]] = set()
    before: set[tuple[str, int]] = set()
    for override in row.overrides:
        key, _, value = override.lstrip("+").partition("=")
        read = {
            (m[1], references.run_of(study, row, m[1], int(m[2]) if m[2] else seed, m[2] is not None))
            for m in references.PLACEHOLDER.finditer(value)
            if m[1] != references.SEED
        }
        if key != "teacher.checkpoint":
            before |= read
        elif read or value in ("null", "", "[]"):
            found = {*read}
        else:
            found = {(value.replace("{seed}", str(seed)), None)}
    others = (_teachers(study, study.rows[name], number) for name, number in before)
    return frozenset(found).union(*others)


def differ(study: Study, frame: pd.DataFrame, row: str, teacher: str) -> bool:
    """Tell whether runs of ``row`` learned from other weights of the row ``teacher`` than the table shows.

    The table shows one epoch, ``study.epoch``; what a run learned from has the epoch ``teacher/epoch``. Results of
    before do not have that: there the teacher's test numbers tell, as each student measured them. False where
    ``teacher`` is not the teacher of ``row`` itself.
    """
    runs = finished(frame)[finished(frame)["row"] == row]
    if teacher != teacher_of(study.rows[row]) or runs.empty:
        return False
    if "teacher/epoch" in runs and runs["teacher/epoch"].notna().all():
        return not _all_among(study, frame, runs, teacher, "epoch", 0.5)
    tested = [f"test/{metric.name}" for metric in metrics_of(frame)]  # identify the weights
    known = [name for name in tested if f"teacher/{name}" in runs and f"{study.epoch}/{name}" in frame]
    return any(not _all_among(study, frame, runs, teacher, name, 1e-4) for name in known)


def _all_among(
    study: Study, frame: pd.DataFrame, runs: pd.DataFrame, teacher: str, name: str, tolerance: float
) -> bool:
    """Tell whether each run's number of its teacher is one that the teacher's row has at the epoch of the study."""
    own = runs[f"teacher/{name}"].dropna().to_numpy(dtype=float)
    shown = values(frame, teacher, f"{study.epoch}/{name}").to_numpy()
    if not len(shown):  # the teacher's run is not finished: nothing is shown
        return True
    return bool((np.abs(own[:, None] - shown[None, :]).min(axis=1, initial=np.inf) <= tolerance).all())


def notes(study: Study, frame: pd.DataFrame) -> list[str]:
    """Say which rows are given other weights of their teacher than the table shows, in a sentence a teacher."""
    found: dict[str, list[str]] = {}
    for name, row in study.rows.items():
        if (teacher := teacher_of(row)) is not None and differ(study, frame, name, teacher):
            found.setdefault(teacher, []).append(name)
    other = "val-selected" if study.epoch == "last" else "last"
    sentences = []
    for teacher, rows in found.items():
        runs = finished(frame)[finished(frame)["row"].isin(rows)]
        main = f"test/{metrics_of(frame)[0].name}"
        right = runs[f"teacher/{main}"].dropna() if f"teacher/{main}" in runs else pd.Series(dtype=float)
        shown = values(frame, teacher, f"{study.epoch}/{main}") if f"{study.epoch}/{main}" in frame else right
        numbers = ""
        if len(right) and len(shown):
            measure = measure_of(frame, f"{study.epoch}/{main}")
            unit = "%" if measure.is_share else ""
            own, other_own = f"{measure.show(right.mean())}{unit}", f"{measure.show(shown.mean())}{unit}"
            numbers = f" ({measure.title} {own}, shown is {other_own})"
        subject, them = (f"row {rows[0]}", "it") if len(rows) == 1 else (f"rows {', '.join(rows)}", "them")
        sentences.append(
            f"{subject}: given the {other} {teacher}{numbers}, not the {EPOCHS[study.epoch]} that the table shows: no "
            f"share of its gap is computed for {them}; once removed, their runs are made anew with the weights shown"
        )
    return sentences
