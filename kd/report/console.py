"""What the terminal shows of a report, and of any table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kd.report import tables
from kd.report.report import Report
from kd.studies.study import Study

COLUMNS = 5  # of a report's table that the terminal shows


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> None:
    """Print a table on the terminal; all columns but the first are set right."""
    table = Table()
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
