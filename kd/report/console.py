"""What the terminal shows of a report, and of a table of arms over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from kd.report import figures, style, tables
from kd.report.report import Report
from kd.report.stats import paired_interval
from kd.studies.study import Study

COLUMNS = 5  # of a report's table that the terminal shows


@dataclass(frozen=True)
class Row:
    """One arm: column name → one number a seed, in the same order of seeds in every row."""

    label: str
    values: dict[str, np.ndarray]


@dataclass(frozen=True)
class Table:
    """Rows, and one comparison: row ``compare[0]`` minus row ``compare[1]`` in the column ``measure``."""

    key: str
    title: str
    rows: list[Row]
    compare: tuple[int, int]
    measure: str
    published: str

    def difference(self) -> tuple[float, float, float]:
        """Return the mean paired difference over seeds and its 95 % interval (Student's t)."""
        better, worse = (self.rows[i].values[self.measure] for i in self.compare)
        return paired_interval(better, worse)

    def show(self, out: Path) -> None:
        """Print the table, the difference, the published number, and where the figure was saved."""
        columns = list(self.rows[0].values)
        seeds = len(self.rows[0].values[columns[0]])
        cells = [
            [row.label, *(f"{v.mean():.1f} ± {v.std(ddof=1):.1f}" for v in row.values.values())] for row in self.rows
        ]
        print_table(f"{self.title} (mean ± std, {seeds} seeds)", ["", *columns], cells, width=100)
        mean, low, high = self.difference()
        better, worse = (self.rows[i].label for i in self.compare)
        print(f"{better} − {worse}: {mean:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}")
        print(f"published: {self.published}")
        print(f"figure:    {self.figure(out / f'{self.key}.png').resolve()}", flush=True)

    def figure(self, path: Path) -> Path:
        """Draw bars of the measured column with a dot for every seed."""
        rows = []
        for position, row in enumerate(self.rows):
            ink = style.STUDENT if position == self.compare[0] else style.ALONE
            rows.append(figures.Bar(row.label, row.values[self.measure], ink))
        drawn = figures.bars(rows, self.title.strip(), f"{self.measure}   (dots: seeds)")
        assert drawn is not None, "a table has rows"
        return style.save(drawn, path)


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> None:
    """Print a table on the terminal; all columns but the first are set right."""
    table = RichTable()
    for position, name in enumerate(head):
        table.add_column(name, justify="right" if position else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # a cell such as [ce,kd] is no markup
    console = Console(width=width, highlight=False)
    if width is None and not console.is_terminal:
        console.width = 120
    console.print(f"\n{title}", style="bold", markup=False)
    console.print(table)


def print_report(study: Study, report: Report) -> None:
    """Print the first columns of the table, the verdict with its conditions, and where the pages are."""
    grid = tables.main_grid(study, report.table, report.shown)
    some = slice(0, COLUMNS)  # the page has all
    print_table(study.question or study.name, grid.head[some], [row[some] for row in grid.rows])
    if report.verdict.conditions:
        print(f"The claim: {study.claim}\n{report.verdict.headline}:")
        for judged in report.verdict.conditions:
            print(f"  {judged.text}")
    for note in report.notes:
        print(note)
    for path in report.paths.values():
        print(path)
