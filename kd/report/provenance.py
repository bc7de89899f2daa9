"""List where the numbers of a report come from: seeds, configurations, cost, and what is not finished. No torch."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from kd.report.claims import label_of
from kd.report.frame import FINISHED, finished
from kd.report.tables import NOTHING, Grid
from kd.studies.study import Study

# unit of a duration, its seconds, decimals, and the seconds that the shortest of a column must have
UNITS = (("hours", 3600.0, 2, 1800.0), ("minutes", 60.0, 1, 12.0), ("seconds", 1.0, 1, 0.0))


def durations(seconds: Iterable[float]) -> tuple[str, list[str]]:
    """Choose one unit for a column, the largest in which the shortest still shows, and write the durations in it."""
    found = list(seconds)
    shortest = min((s for s in found if s > 0), default=0.0)
    word, size, digits, _ = next(unit for unit in UNITS if shortest >= unit[3])
    return word, [f"{s / size:,.{digits}f}" for s in found]


def total(frame: pd.DataFrame) -> str:
    """Write ``40 finished runs, 6.2 minutes in all, start and tests included.``"""
    done = finished(frame)
    word, (time,) = durations([float(done["wall_clock_s"].sum())])
    return f"{len(done)} finished run{'' if len(done) == 1 else 's'}, {time} {word} in all, start and tests included."


def grid(study: Study, frame: pd.DataFrame) -> tuple[Grid, list[str]]:
    """List seeds, config hash and cost of each row; data, epochs, selection where they differ, else as sentences."""
    done = finished(frame)
    parts = {name: part for name in study.rows if len(part := done[done["row"] == name])}
    differing, same = [], []
    for column, word in (("data", "data"), ("epochs", "epochs"), ("monitor", "selected by")):
        found = {name: _once(part[column]) for name, part in parts.items()}
        if len(set(found.values())) > 1:
            differing.append((word, found))
        else:
            same.append(f"{word.capitalize()}: {next(iter(found.values()))}.")
    unit, times = durations(float(part["wall_clock_s"].sum()) for part in parts.values())
    rows = []
    for (name, part), time in zip(parts.items(), times, strict=True):
        seeds = " ".join(map(str, sorted(part["seed"])))
        cells = (found[name] for _, found in differing)
        rows.append((label_of(study, name), seeds, _once(part["config_hash"]), *cells, time))
    head = ("", "seeds", "config", *(word for word, _ in differing), unit)
    return Grid(head, tuple(rows), text=len(head) - 1), same


def _once(column: pd.Series) -> str:
    found = dict.fromkeys(f"{v:g}" if isinstance(v, float) else str(v) for v in column.dropna())
    return ", ".join(found) or NOTHING


def unfinished(study: Study, frame: pd.DataFrame) -> Grid | None:
    """List runs that are not finished, a line for each row, status and reason; None where all are."""
    seeds: dict[tuple[str, str, str], list[str]] = {}
    for r in frame[frame["status"] != FINISHED].itertuples():
        key = (label_of(study, str(r.row)), str(r.status), str(r.error or NOTHING).splitlines()[0])
        seeds.setdefault(key, []).append(str(r.seed))
    rows = tuple((label, status, " ".join(found), reason) for (label, status, reason), found in seeds.items())
    return Grid(("", "status", "seeds", "reason"), rows, text=4) if rows else None
