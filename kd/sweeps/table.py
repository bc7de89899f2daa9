"""The end of a sweep: every job, best first, and why the others have no result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.config import better
from kd.errors import KdError
from kd.sweeps.engine import Outcome
from kd.sweeps.state import FINISHED


def conclude(directory: Path, outcomes: Sequence[Outcome]) -> None:
    """Print the table; ``KdError`` that lists the jobs without a result, if there are any."""
    show(outcomes)
    print(f"{directory}: kd report {_near(directory)} makes tables and figures of it", flush=True)
    failed = [o for o in outcomes if o.state.status != FINISHED]
    if failed:
        reasons = [f"{o.job.label}: {o.state.status}: {o.state.reason}" for o in failed]
        again = "the same command again runs what is missing"
        raise KdError("\n".join([f"{len(failed)} of {len(outcomes)} jobs have no result ({again}):", *reasons]))


def _near(directory: Path) -> Path:
    try:
        return directory.relative_to(Path.cwd())
    except ValueError:
        return directory


def show(outcomes: Sequence[Outcome]) -> None:
    """Best validation first (by ``protocol.monitor``), then what did not finish."""
    from rich.console import Console
    from rich.table import Table

    ended = sorted((o for o in outcomes if o.state.status == FINISHED), key=_rank)
    monitors = {monitor(o) for o in ended}
    table = Table()
    for heading in ("", *sorted(monitors), "test top-1 %", "agreement", "seconds"):
        table.add_column(heading, justify="left" if heading == "" else "right", overflow="fold")
    for outcome in ended:
        student = _record(outcome)["student"]["selected"]
        values = [f"{value_of(outcome):.4f}" if monitor(outcome) == m else "" for m in sorted(monitors)]
        test = student["test"]
        agreement = f"{test['agreement']:.4f}" if "agreement" in test else ""
        seconds = f"{_record(outcome)['wall_clock_s']:.1f}"
        table.add_row(outcome.job.label, *values, f"{100 * test['acc1']:.2f}", agreement, seconds)
    blank = [""] * (len(monitors) + 2)
    for outcome in outcomes:
        if outcome.state.status != FINISHED:
            table.add_row(outcome.job.label, *blank, outcome.state.status)
    console = Console(highlight=False)
    console.print(f"{len(outcomes)} jobs, best first (the epoch that val selects)", style="bold")
    console.print(table)


def _record(outcome: Outcome) -> Any:
    return outcome.state.record


def monitor(outcome: Outcome) -> str:
    """The metric that picked the job's epoch."""
    return str(_record(outcome)["protocol"]["monitor"])


def value_of(outcome: Outcome) -> float:
    """That metric, at the selected epoch. ``val/acc1`` is ``student.selected.val.acc1`` of the record."""
    name = monitor(outcome).partition("/")[2]
    return float(_record(outcome)["student"]["selected"]["val"][name])


def _rank(outcome: Outcome) -> tuple[str, float, str]:
    sign = 1 if better(monitor(outcome)) == "min" else -1
    return monitor(outcome), sign * value_of(outcome), outcome.job.label
