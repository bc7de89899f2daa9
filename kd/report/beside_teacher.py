"""Set the rows of a sweep beside their teacher: quality, what the samples can show, size, time, classes. No torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kd.records import bench_file, record, sizes
from kd.report import stats
from kd.report.claims import label_of
from kd.report.curves import chosen
from kd.report.frame import finished, measure_of, metrics_of, values
from kd.report.measures import Measure
from kd.report.page import Section
from kd.report.run_row import CLASSES, rows_of
from kd.report.tables import NOTHING, Grid
from kd.studies.study import Study

MOST = 6  # rows whose classes are shown


def section(study: Study, frame: pd.DataFrame, runs_dir: Path) -> Section | None:
    """Make the table: teachers first, then each row that is finished; None where no run is."""
    measure = _measure(study, frame)
    names = [name for name in study.rows if len(values(frame, name, measure.column))]
    if not names:
        return None
    rows, teachers = _rows(frame), _teachers(frame, measure, runs_dir)
    lines = [_teacher_line(label, part, measure, rows, runs_dir) for label, part in teachers.items()]
    lines += [_line(study, frame, name, measure, rows, runs_dir) for name in names]
    unit = f", {measure.change_unit}" if measure.change_unit else ""
    sample = f"95 % by {rows[1]:,} test rows" if rows is not None else "95 % by the test rows"
    head = ("", measure.label, sample, f"lost to the teacher{unit}", "parameters", "MB", "MACs", "time ratio")
    kept = [i for i in range(len(head)) if i < 2 or any(line[i] != NOTHING for line in lines)]
    table = Grid(tuple(head[i] for i in kept), tuple(tuple(line[i] for i in kept) for line in lines))
    title = "Beside the teacher" if teachers else "What so many samples show, and size"
    return Section(title, grids=[table], notes=_notes(frame, names, measure, rows, runs_dir))


def _measure(study: Study, frame: pd.DataFrame) -> Measure:
    return measure_of(frame, f"{study.epoch}/test/{metrics_of(frame)[0].name}")


def _rows(frame: pd.DataFrame) -> tuple[int, int] | None:
    """Return the rows of validation and test, where all runs have the same."""
    found = {rows_of(text) for text in finished(frame)["data"].dropna()}
    return found.pop() if len(found) == 1 else None


def _of_teacher(measure: Measure) -> str:
    return f"teacher/test/{measure.name}"


def _teachers(frame: pd.DataFrame, measure: Measure, runs_dir: Path) -> dict[str, pd.DataFrame]:
    """Group the finished runs by the teacher that they had, the best first: by its test, named by its weights."""
    column = _of_teacher(measure)
    done = finished(frame)
    if column not in done or not done[column].notna().any():
        return {}
    parts = [part for _, part in done[done[column].notna()].groupby([column, "teacher/parameters"])]
    parts = parts if measure.lower_is_better else parts[::-1]
    if len(parts) == 1:
        return {"teacher": parts[0]}
    found: dict[str, pd.DataFrame] = {}
    for number, part in enumerate(parts, start=1):
        given = (record.read(runs_dir / str(part["run"].iloc[0])).get("teacher") or {}).get("checkpoint")
        name = "+".join(Path(path).name for path in given) if isinstance(given, list) else Path(str(given)).name
        label = f"teacher {name if given else number}"
        found[label if label not in found else f"{label} ({number})"] = part
    return found


def _teacher_line(
    label: str, part: pd.DataFrame, measure: Measure, rows: tuple[int, int] | None, runs_dir: Path
) -> tuple[str, ...]:
    value = float(part[_of_teacher(measure)].iloc[0])
    size = sizes.of_run(runs_dir / str(part["run"].iloc[0]))
    numbers = [_size(title, size[title][1]) for title in (sizes.PARAMETERS, sizes.BYTES, sizes.MACS)]
    return label, measure.show(value), _sample(value, measure, rows), NOTHING, *numbers, NOTHING


def _line(
    study: Study, frame: pd.DataFrame, name: str, measure: Measure, rows: tuple[int, int] | None, runs_dir: Path
) -> tuple[str, ...]:
    done = finished(frame)
    part = done[done["row"] == name]
    found = values(frame, name, measure.column)
    std = f" ± {measure.show(found.std(ddof=1))}" if len(found) > 1 else ""
    size = sizes.of_run(runs_dir / str(part["run"].iloc[0]))
    numbers = [_size(title, size[title][0]) for title in (sizes.PARAMETERS, sizes.BYTES, sizes.MACS)]
    return (
        label_of(study, name),
        f"{measure.show(found.mean())}{std}",
        _sample(float(found.mean()), measure, rows),
        _lost(part, measure),
        *numbers,
        _time(done, part, runs_dir),
    )


def _sample(value: float, measure: Measure, rows: tuple[int, int] | None) -> str:
    """Write Wilson's interval of a share of the test rows; nothing of what is no such share."""
    from statsmodels.stats.proportion import proportion_confint

    if rows is None or measure.metric is None or not measure.metric.counted:
        return NOTHING
    low, high = proportion_confint(value * rows[1], rows[1], method="wilson")
    return f"{measure.show(float(low))} to {measure.show(float(high))}"


def _lost(part: pd.DataFrame, measure: Measure) -> str:
    """Write what is lost to the teacher of each run, the mean over seeds with its interval."""
    column = _of_teacher(measure)
    if column not in part or not part[column].notna().any():
        return NOTHING
    sign = 1 if measure.lower_is_better else -1
    interval = stats.mean((sign * (part[measure.column] - part[column])).dropna().to_numpy())
    numbers = [measure.change(value).lstrip("+") for value in (interval.estimate, *(interval.headline or ()))]
    return numbers[0] if interval.headline is None else f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def _size(title: str, value: int | None) -> str:
    if value is None:
        return NOTHING
    return f"{value / 1e6:,.3g}" if title == sizes.BYTES else f"{value:,}"


def _time(done: pd.DataFrame, part: pd.DataFrame, runs_dir: Path) -> str:
    """Write the time ratio of the first run that was benched: of the row, or of one with networks of the same size.

    Else that which a search measured, without an interval.
    """
    columns = [c for c in ("student/parameters", "student/macs", "teacher/parameters", "teacher/macs") if c in done]
    alike = (done[columns].fillna(0) == part[columns].fillna(0).iloc[0]).all(axis=1)
    for run in [*part["run"], *done[alike]["run"]]:
        file = runs_dir / str(run) / bench_file.KEPT
        if file.is_file():
            speed = bench_file.read(file).headline
            if speed.ratio is not None and speed.interval is not None:
                return f"{speed.ratio:.3g} [{speed.interval[0]:.3g}, {speed.interval[1]:.3g}]"
    searched = part.get("student/latency_ratio", pd.Series(dtype=float)).dropna()
    return f"{searched.iloc[0]:.3g}" if len(searched) else NOTHING


def _notes(
    frame: pd.DataFrame, names: list[str], measure: Measure, rows: tuple[int, int] | None, runs_dir: Path
) -> list[str]:
    notes = []
    if rows is not None and measure.metric is not None and measure.metric.counted:
        notes.append(
            f"The interval by the test rows (Wilson, of one run) says how another {rows[1]:,} rows may have come out, "
            f"the ± how another seed may have. One of {rows[0]:,} validation rows is {100 / rows[0]:.2g} points: what "
            f"differs by less, validation cannot order. One of {rows[1]:,} test rows is {100 / rows[1]:.2g} points."
        )
    done = finished(frame)
    if _of_teacher(measure) in done and done[_of_teacher(measure)].notna().any():
        notes.append("Lost to the teacher: teacher − student, each run beside its own teacher; in brackets 95 %.")
    timed = any(_time(done, done[done["row"] == name], runs_dir) != NOTHING for name in names)
    best = done[done["row"] == names[0]]["run"].iloc[0]
    run = runs_dir / str(best)
    given = "teacher" if (record.read(run).get("teacher") or {}).get("checkpoint") else "TEACHER"
    command = shlex.join(["kd", "bench", str(run), f"against={given}", f"out={run / bench_file.KEPT}"])
    if timed:
        notes.append("Time ratio: student ÷ teacher, of interleaved rounds (kd bench, kd search); in brackets 95 %.")
    else:
        notes.append(f"Time is not measured: {command}, then this report again.")
    return notes


def classes(study: Study, frame: pd.DataFrame) -> Section | None:
    """Make a table of the accuracy of each class, teacher beside rows; None where no run has it, or of many classes."""
    columns = [c for i in range(CLASSES) if (c := f"{study.epoch}/test/class_{i}") in frame]
    columns = [c for c in columns if finished(frame)[c].notna().any()]
    names = [name for name in chosen(study, frame) if name in study.rows][:MOST]
    if not columns or not names:
        return None
    done = finished(frame)
    measures = [measure_of(frame, column) for column in columns]
    lines = []
    for measure in measures:
        number = int(measure.name.rpartition("_")[2])
        title = measure.classes[number] if number < len(measure.classes) else str(number)
        given = done.get(f"teacher/test/{measure.name}", pd.Series(dtype=float))
        cells = [measure.show(given.mean()) if given.notna().any() else NOTHING]
        means = [values(frame, name, measure.column).mean() for name in names]
        cells += [NOTHING if np.isnan(mean) else measure.show(mean) for mean in means]
        lines.append((title, *cells))
    several = len(_teacher_values(done, measures)) > 1
    head = ("class", "teachers" if several else "teacher", *(label_of(study, name) for name in names))
    kept = [i for i in range(len(head)) if i < 1 or any(line[i] != NOTHING for line in lines)]
    grid = Grid(tuple(head[i] for i in kept), tuple(tuple(line[i] for i in kept) for line in lines))
    what = metrics_of(frame)[0].by_class
    more = f"; the first {len(names)} rows" if len(study.rows) > len(names) else ""
    return Section("Classes", grids=[grid], notes=[f"Test {what} of each class, %, means over seeds{more}."])


def _teacher_values(done: pd.DataFrame, measures: list[Measure]) -> set[Any]:
    """Return the different teachers that the classes were measured of."""
    columns = [c for m in measures if (c := f"teacher/test/{m.name}") in done]
    found: Mapping[Any, Any] = done[columns].dropna().drop_duplicates().to_dict("index") if columns else {}
    return set(found)
