"""Tell which weights of a teacher the students of a study learned from. No torch."""

from __future__ import annotations

import numpy as np
import pandas as pd

from kd.report.frame import finished, values
from kd.report.measures import EPOCHS
from kd.studies import references
from kd.studies.study import Comparison, Row, Study

TESTED = ("test/acc1", "test/nll")  # identify the weights in results that lack the teacher's epoch


def teacher_of(row: Row) -> str | None:
    """Name the row that is the teacher of ``row``; None where there is none, or are several."""
    lines = [o for o in row.overrides if o.lstrip("+").startswith("teacher.checkpoint=")]
    found = [
        match[1] for line in lines for match in references.PLACEHOLDER.finditer(line) if match[1] != references.SEED
    ]
    return found[0] if len(found) == 1 else None


def is_one_run(study: Study, comparison: Comparison) -> bool:
    """Tell whether all compared rows that have a teacher learn from one and the same run of it (or ensemble of runs).

    A verdict then holds given this teacher: its own spread is in no interval. False where no row has a teacher.
    """
    teachers = {
        teachers
        for name in (comparison.row, comparison.than)
        for seed in study.rows[name].seeds or study.seeds
        if (teachers := _teachers(study, study.rows[name], seed))
    }
    return len(teachers) == 1


def _teachers(study: Study, row: Row, seed: int) -> tuple[tuple[str, int | None], ...]:
    """List row and seed of the runs that are the teacher of one run; a path that is no run of the study, as it is."""
    found: list[tuple[str, int | None]] = []
    for override in row.overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key != "teacher.checkpoint":
            continue
        found = [
            (m[1], references.run_of(study, row, m[1], int(m[2]) if m[2] else seed, m[2] is not None))
            for m in references.PLACEHOLDER.finditer(value)
            if m[1] != references.SEED
        ]
        if not found and value not in ("null", "", "[]"):
            found = [(value.replace("{seed}", str(seed)), None)]
    return tuple(found)


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
    known = [name for name in TESTED if f"teacher/{name}" in runs and f"{study.epoch}/{name}" in frame]
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
        right = runs["teacher/test/acc1"].dropna() if "teacher/test/acc1" in runs else pd.Series(dtype=float)
        shown = values(frame, teacher, f"{study.epoch}/test/acc1") if f"{study.epoch}/test/acc1" in frame else right
        numbers = f" (test top-1 {right.mean():.2%}, shown is {shown.mean():.2%})" if len(right) and len(shown) else ""
        subject, them = (f"row {rows[0]}", "it") if len(rows) == 1 else (f"rows {', '.join(rows)}", "them")
        sentences.append(
            f"{subject}: given the {other} {teacher}{numbers}, not the {EPOCHS[study.epoch]} that the table shows: no "
            f"share of its gap is computed for {them}; once removed, their runs are made anew with the weights shown"
        )
    return sentences
