"""The end of a sweep: every job, best first, and why some have no result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kd.errors import KdError
from kd.records import record, sources
from kd.records.measures import measured, number, shown_metric
from kd.records.state import DONE, FINISHED, PRUNED
from kd.sweeps import means
from kd.sweeps.outcome import Outcome


def print_results(directory: Path, outcomes: Sequence[Outcome], objectives: Mapping[str, str] | None = None) -> None:
    """Print the table; ``KdError`` that lists the jobs without a result, if there are any."""
    show(outcomes, objectives)
    if targets := sources.mixed(_record(o) for o in outcomes if o.state.status in DONE):
        print(f"_target_ = {', '.join(targets)} was changed while the jobs ran: not all of them are of the same code")
    print(f"{directory}: kd report {relative(directory)} makes tables and figures of it", flush=True)
    failed = [o for o in outcomes if o.state.status not in DONE]
    if failed:
        reasons = [f"{o.job.label}: {o.state.status}: {o.state.reason}" for o in failed]
        again = "the same command again runs what is missing"
        raise KdError("\n".join([f"{len(failed)} of {len(outcomes)} jobs have no result ({again}):", *reasons]))


def relative(directory: Path) -> Path:
    """Write a path from the working directory on, where it lies below."""
    try:
        return directory.relative_to(Path.cwd())
    except ValueError:
        return directory


def show(outcomes: Sequence[Outcome], objectives: Mapping[str, str] | None = None) -> None:
    """Print best validation first, by ``protocol.monitor`` or the first of the objectives; then what did not finish.

    ``objectives``: measure → "maximize" or "minimize".
    """
    ended = sorted((o for o in outcomes if o.state.status == FINISHED), key=lambda o: _rank(o, objectives))
    columns = list(objectives or sorted({monitor(o) for o in ended}))
    table = Table()
    mains = list({m["name"]: m for m in (record.metrics_of(_record(o))[0] for o in ended)}.values())
    tests = [f"test {m['title']} %" if m["share"] else f"test {m['title']}" for m in mains]
    every = [(m, _test(o)) for o in ended for m in record.metrics_of(_record(o))]
    beside = next((m for m, test in every if m["beside_teacher"] and m["name"] in test), None)
    for heading in ("", *columns, *tests, *([beside["title"]] if beside else []), "seconds"):
        table.add_column(heading, justify="left" if heading == "" else "right", overflow="fold")
    for outcome in ended:
        own = objectives or {monitor(outcome): ""}
        values = [number(measured(_record(outcome), c)) if c in own else "" for c in columns]
        test = _test(outcome)
        agreement = [f"{test[beside['name']]:.4f}" if beside["name"] in test else ""] if beside else []
        seconds = f"{_record(outcome)['wall_clock_s']:.1f}"
        shown = [shown_metric(m, test[m["name"]]) if m["name"] in test else "" for m in mains]
        table.add_row(escape(outcome.job.label), *values, *shown, *agreement, seconds)
    blank = [""] * (len(columns) + len(tests) + bool(beside))
    others = [o for o in outcomes if o.state.status != FINISHED]
    for outcome in sorted(others, key=lambda o: o.state.status != PRUNED):
        table.add_row(escape(outcome.job.label), *blank, _ending(outcome))
    console = Console(highlight=False)
    console.print(f"{len(outcomes)} jobs, best first, at the epoch that val selected", style="bold")
    console.print(table)
    if not means.several(ended):
        for line in means.of_teachers(ended, columns):
            console.print(escape(line))
    else:
        console.print("means ± standard deviations over seeds, beside the teacher", style="bold")
        console.print(means.table(ended, columns, mains))


def _test(outcome: Outcome) -> Any:
    return _record(outcome)["student"]["selected"]["test"]


def _ending(outcome: Outcome) -> str:
    status = outcome.state.status
    return f"{status} at epoch {_record(outcome)['pruned']['epoch'] + 1}" if status == PRUNED else status


def _record(outcome: Outcome) -> Any:
    return outcome.state.record


def monitor(outcome: Outcome) -> str:
    """Return the metric that picked the job's epoch."""
    return str(_record(outcome)["protocol"]["monitor"])


def _rank(outcome: Outcome, objectives: Mapping[str, str] | None) -> tuple[str, float, str]:
    first = next(iter(objectives)) if objectives else monitor(outcome)
    value = measured(_record(outcome), first)
    small = objectives[first] == "minimize" if objectives else record.better(_record(outcome), first) == "min"
    worst = float("inf")
    return first, worst if value is None else value if small else -value, outcome.job.label
