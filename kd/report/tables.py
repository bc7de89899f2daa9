"""Make the tables of a report: numbers as a frame, and the same as text for the pages. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kd.report import ranks, stats
from kd.report.claims import Compared, gap_closed, known, label_of
from kd.report.frame import finished, measure_of, values
from kd.report.measures import EPOCHS, Measure, resolve
from kd.report.stats import Interval
from kd.studies.study import Study
from kd.tasks.metrics import CLASSIFICATION

NOTHING = "–"
OF_MEAN, ONE_RUN = "95 % of the mean", "95 % of one run"


@dataclass(frozen=True)
class Grid:
    """A table of text. ``strong``: positions of rows to set off; the first ``text`` columns are words, not numbers."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: tuple[int, ...] = ()
    text: int = 1


def measures(study: Study, frame: pd.DataFrame) -> list[Measure]:
    """List the measured columns of the main table: the study's own at both epochs, its further ones, agreement.

    A validation measure picks one epoch: it stands there alone. A further one that no run has is left out.
    """
    main = resolve(frame.columns, study.measure, study.epoch)
    columns = [main]
    first, _, rest = main.partition("/")
    if first in EPOCHS and not rest.startswith("val/"):
        other = f"{'selected' if first == 'last' else 'last'}/{rest}"
        columns += [other] if other in frame else []
    columns += [column for c in study.columns if (column := known(study, frame, c)) is not None]
    columns += [agreement] if (agreement := f"{study.epoch}/test/agreement") in frame else []
    measured = finished(frame)
    return [measure_of(frame, c) for c in dict.fromkeys(columns) if c == main or measured[c].notna().any()]


def numbers(study: Study, frame: pd.DataFrame) -> pd.DataFrame:
    """Make the main table: one line a row of the study, with label, n, and ``COLUMN``, ``COLUMN std`` of each measure.

    ``gap recovered`` and ``retention`` (fractions) come with ``… low`` and ``… high``, ``mean rank`` when three rows or
    more train the same student.
    """
    shown = measures(study, frame)
    lines = {name: _line(study, frame, name, shown) for name in study.rows}
    table = pd.DataFrame.from_dict(lines, orient="index")
    table.index.name = "row"
    mean_rank, table.attrs["friedman_p"] = ranks.over_seeds(study, frame, shown[0])
    if mean_rank:
        table["mean rank"] = pd.Series(mean_rank)
    return table


def _line(study: Study, frame: pd.DataFrame, name: str, shown: Sequence[Measure]) -> dict[str, object]:
    row = study.rows[name]
    line: dict[str, object] = {
        "label": label_of(study, name),
        "n": int((finished(frame)["row"] == name).sum()),
    }
    for measure in shown:
        found = values(frame, name, measure.column)
        line[measure.column] = found.mean() if len(found) else np.nan
        line[f"{measure.column} std"] = found.std(ddof=1) if len(found) > 1 else np.nan
    if row.teacher and row.alone and name not in (row.teacher, row.alone):
        wanted = [(r, shown[0].column) for r in (name, row.alone, row.teacher)]
        line |= _bounds("gap recovered", gap_closed(study, frame, wanted, shown[0]))
    retention = f"{study.epoch}/retention"
    if retention in frame and len(kept := values(frame, name, retention)):
        line |= _bounds("retention", stats.mean(kept.to_numpy()))
    if "student/parameters" in frame and len(sizes := values(frame, name, "student/parameters")):
        line["parameters"] = sizes.iloc[0]
    return line


def _bounds(name: str, interval: Interval) -> dict[str, object]:
    low, high = interval.headline or (np.nan, np.nan)
    about = {f"{name} note": interval.note, f"{name} n": interval.n}
    return {name: interval.estimate, f"{name} low": low, f"{name} high": high, **about}


# ---------------------------------------------------------------------- as text


def main_grid(study: Study, table: pd.DataFrame, shown: Sequence[Measure]) -> Grid:
    """Write the main table for people; shares, ranks and sizes stand there where a row can have them."""
    head, columns = ["", "n"], [list(table["label"]), [str(n) for n in table["n"]]]
    for measure in shown:
        head.append(f"{measure.label} ({measure.epoch})" if measure.epoch else measure.label)
        pairs = zip(table[measure.column], table[f"{measure.column} std"], strict=True)
        columns.append([spread(measure, mean, std) for mean, std in pairs])
    for name in ("gap recovered", "retention"):
        if name in table:
            head.append(f"{name}, %")
            bounds = zip(table[name], table[f"{name} low"], table[f"{name} high"], strict=True)
            columns.append([_share(*b, digits=0 if name == "gap recovered" else 1) for b in bounds])
    if "mean rank" in table:
        head.append("mean rank")
        columns.append([NOTHING if np.isnan(r) else f"{r:.1f}" for r in table["mean rank"]])
    if "parameters" in table and all(measure.column != "student/parameters" for measure in shown):
        head.append("parameters")
        columns.append([NOTHING if np.isnan(p) else f"{p:,.0f}" for p in table["parameters"]])
    return Grid(tuple(head), tuple(zip(*columns, strict=True)), _best(study, table, shown[0]))


def rank_grid(found: ranks.OverPairs) -> Grid:
    """Write the mean ranks of methods over pairs, best first."""
    rows = tuple((label, f"{rank:.2f}", str(found.blocks)) for label, rank in found.mean_ranks.items())
    return Grid((f"over all of {' and '.join(found.variables)}", "mean rank", "blocks"), rows)


def _best(study: Study, table: pd.DataFrame, measure: Measure) -> tuple[int, ...]:
    """Find the positions of the best rows that are no teachers: several where they are equal, none where all are."""
    teachers = {row.teacher for row in study.rows.values()}
    found = table[measure.column].where([name not in teachers for name in table.index])
    if found.nunique() < 2:
        return ()
    best = found.min() if measure.lower_is_better else found.max()
    return tuple(int(i) for i in np.flatnonzero(found == best))


def spread(measure: Measure, mean: float, std: float) -> str:
    """Write ``97.47 ± 0.51``."""
    if np.isnan(mean):
        return NOTHING
    return measure.show(mean) if np.isnan(std) else f"{measure.show(mean)} ± {measure.show(std)}"


def _share(value: float, low: float, high: float, digits: int) -> str:
    if np.isnan(value):
        return NOTHING
    shown = [f"{100 * v:.{digits}f}".replace("-", "−") for v in (value, low, high)]
    return shown[0] if np.isnan(low) else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def p_value(p: float | None) -> str:
    """Write ``0.012``, ``< 0.001``."""
    if p is None:
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _range(compared: Compared, bounds: tuple[float, float] | None) -> str:
    return NOTHING if bounds is None else f"{compared.show(bounds[0])} to {compared.show(bounds[1])}"


def comparison_grid(compared: Mapping[str, Compared]) -> Grid:
    """Write every comparison that has a number, with both of its intervals over seeds and its p values."""
    rows = []
    for found in compared.values():
        interval = found.interval
        if interval.n == 0:
            continue
        estimate = NOTHING if np.isnan(interval.estimate) else f"{found.show(interval.estimate)}{found.unit}"
        rows.append(
            (
                f"{found.title} ({interval.note})" if interval.note else found.title,
                found.measure.title if not found.measure.epoch else f"{found.measure.title}, {found.measure.epoch}",
                str(interval.n),
                estimate,
                _range(found, interval.theory),
                _range(found, interval.bootstrap),
                p_value(interval.p),
                p_value(found.corrected),
            )
        )
    head = ("", "measure", "n", "difference", "95 %, t / Fieller", "95 %, bootstrap", "p", "p, Holm")
    return Grid(head, tuple(rows), text=2)


def image_grid(compared: Mapping[str, Compared]) -> Grid | None:
    """Write the comparisons over test images; None where no predictions were kept."""
    rows = []
    accuracy = Measure(f"selected/test/{CLASSIFICATION[0].name}")  # kept predictions are of classes
    for found in compared.values():
        if (i := found.images) is not None:
            bounds = f"{accuracy.change(i.low)} to {accuracy.change(i.high)}"
            images = f"{i.images:,} × {i.seeds}"
            estimate = f"{accuracy.change(i.estimate)} points"
            rows.append((found.title, images, estimate, bounds, f"{i.only_row:,}", f"{i.only_than:,}", p_value(i.p)))
    head = (
        "",
        "images × seeds",
        "top-1",
        "95 %, bootstrap",
        "only the first right",
        "only the second right",
        "McNemar p",
    )
    return Grid(head, tuple(rows)) if rows else None


def published_grid(study: Study, frame: pd.DataFrame) -> Grid | None:
    """Set published numbers beside the measured ones, and say whether they fall inside our interval.

    A published mean of several runs stands beside the interval of our mean; one run (``n`` 1, or not given) beside the
    prediction interval of one run. A column that no number needs is left out, and so are measures that may still come,
    because runs are missing.
    """
    if study.published is None:
        return None
    rows = []
    for name, given in study.published.numbers.items():
        for key, number in given.items():
            if (column := known(study, frame, key)) is not None:
                rows.append(_published_row(study, frame, name, measure_of(frame, column), number))
    head = ("", "measure", "published", "measured", OF_MEAN, ONE_RUN, "inside")
    kept = [i for i, name in enumerate(head) if name not in (OF_MEAN, ONE_RUN) or any(row[i] for row in rows)]
    cells = tuple(tuple(row[i] or NOTHING for i in kept) for row in rows)
    return Grid(tuple(head[i] for i in kept), cells, text=2)


def _published_row(
    study: Study, frame: pd.DataFrame, name: str, measure: Measure, number: Mapping[str, float]
) -> tuple[str, ...]:
    found = values(frame, name, measure.column)
    theirs = spread(measure, number["value"], number.get("std", np.nan))
    theirs += f" (n = {number['n']:.0f})" if number.get("n") else ""
    ours = spread(measure, found.mean(), found.std(ddof=1) if len(found) > 1 else np.nan) if len(found) else NOTHING
    several = number.get("n", 1) > 1
    measured = found.to_numpy()
    bounds = stats.mean(measured).headline if several else stats.one_more(measured)
    inside = "not comparable"
    if study.published is not None and study.published.comparable:
        inside = NOTHING if bounds is None else ("yes" if bounds[0] <= number["value"] <= bounds[1] else "no")
    shown = NOTHING if bounds is None else f"{measure.show(bounds[0])} to {measure.show(bounds[1])}"
    return (
        label_of(study, name),
        measure.label,
        theirs,
        f"{ours} (n = {len(found)})" if len(found) else ours,
        shown if several else "",
        "" if several else shown,
        inside,
    )
