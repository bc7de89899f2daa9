"""The end of a sweep over several seeds: means of each group of jobs, beside what they learned from."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from kd.records import record
from kd.records.measures import measured, number, shown_metric
from kd.sweeps.outcome import Outcome


def several(ended: Sequence[Outcome]) -> bool:
    """Tell whether a group has several seeds."""
    return len({o.job.group for o in ended}) < len(ended)


def of_teachers(ended: Sequence[Outcome], columns: Sequence[str]) -> list[str]:
    """Write a line for each teacher: its validation by ``columns``, and its test by the main metric."""
    lines = []
    first: Any = ended[0].state.record if ended else {}
    metrics = record.metrics_of(first)
    for label, teacher in _teachers(ended).items():
        values = [f"{c} {number(value)}" for c in columns if (value := _of_split(teacher, c)) is not None]
        main = metrics[0]
        unit = " %" if main["share"] else ""
        values.append(f"test {main['title']} {shown_metric(main, teacher['test'][main['name']])}{unit}")
        lines.append(f"{label}: {', '.join(values)}")
    return lines


def table(ended: Sequence[Outcome], columns: Sequence[str], mains: Sequence[Mapping[str, Any]]) -> Table:
    """Make the table; groups in the order of their best job. ``columns``: measures; ``mains``: metrics of test."""
    made = Table()
    tests = [f"test {m['title']} %" if m["share"] else f"test {m['title']}" for m in mains]
    for heading in ("", "n", *columns, *tests, *(f"{title}, lost" for title in tests[:1] if _teachers(ended))):
        made.add_column(heading, justify="left" if heading == "" else "right", overflow="fold")
    lost = bool(_teachers(ended))
    for label, teacher in _teachers(ended).items():
        values = ["" if (value := _of_split(teacher, c)) is None else number(value) for c in columns]
        shown = [shown_metric(m, teacher["test"][m["name"]]) if m["name"] in teacher["test"] else "" for m in mains]
        made.add_row(escape(label), "", *values, *shown, *([""] if lost else []))
    groups: dict[str, list[Outcome]] = {}
    for outcome in ended:
        groups.setdefault(outcome.job.group, []).append(outcome)
    for group, jobs in groups.items():
        values = [_spread([measured(o.state.record, column) for o in jobs]) for column in columns]
        shown = [_tests([o.state.record for o in jobs], metric) for metric in mains]
        gone = [_lost([o.state.record for o in jobs], mains[0])] if lost else []
        made.add_row(escape(group or "all seeds"), str(len(jobs)), *values, *shown, *gone)
    return made


def _teachers(ended: Sequence[Outcome]) -> dict[str, Mapping[str, Any]]:
    """Return each teacher once, by what it is called; one whose test was not measured is left out."""
    found: dict[str, Mapping[str, Any]] = {}
    for outcome in ended:
        content: Any = outcome.state.record
        teacher = content.get("teacher") or {}
        if teacher.get("test") and record.metrics_of(content)[0]["name"] in teacher["test"]:
            found.setdefault(f"teacher {teacher.get('checkpoint') or ''}".strip(), teacher)
    return {"teacher": next(iter(found.values()))} if len(found) == 1 else found


def _of_split(part: Mapping[str, Any], column: str) -> float | None:
    split, _, name = column.rpartition("/")
    return (part.get(split) or {}).get(name) if split else None


def _spread(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    if not found:
        return number(None)
    mean = statistics.mean(found)
    whole = int(mean) if all(isinstance(v, int) for v in found) and mean == int(mean) else float(mean)
    return number(whole) + (f" ± {statistics.stdev(found):.4f}" if len(found) > 1 and len(set(found)) > 1 else "")


def _tests(records: Sequence[Any], metric: Mapping[str, Any]) -> str:
    tests = (content["student"]["selected"]["test"] for content in records)
    found = [test[metric["name"]] for test in tests if metric["name"] in test]
    if not found:
        return ""
    std = f" ± {shown_metric(metric, statistics.stdev(found))}" if len(found) > 1 else ""
    return shown_metric(metric, statistics.mean(found)) + std


def _lost(records: Sequence[Any], metric: Mapping[str, Any]) -> str:
    """Write the mean of teacher − student, in the metric's own unit; of metrics that are better low, the other way."""
    name, found = metric["name"], []
    for content in records:
        student, teacher = content["student"]["selected"]["test"], (content.get("teacher") or {}).get("test") or {}
        if name in student and name in teacher:
            gone = teacher[name] - student[name]
            found.append(gone if metric["better"] == "max" else -gone)
    return shown_metric(metric, statistics.mean(found)) if found else ""
