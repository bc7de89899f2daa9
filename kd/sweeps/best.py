"""What a search found: the best trial, or the Pareto front, and which run to take."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.records import record
from kd.records.state import state_of
from kd.records.trials import job_of
from kd.sweeps.limits import recommended
from kd.sweeps.outcome import Outcome
from kd.sweeps.table import relative


def show(study: Any, complete: list[Any], names: list[str], outcomes: Mapping[str, Outcome]) -> None:
    """Print each trial that is best, with the command that trains it again; ``names``: of the objectives."""
    if not complete:
        return
    several = len(names) > 1
    best = {str(job_of(t)): t for t in (study.best_trials if several else [study.best_trial])}
    if several:
        print(f"Pareto front: no trial is better in one of {', '.join(names)} and as good in the others")
    for name, trial in best.items():
        values = shown(dict(zip(names, trial.values, strict=True)))
        command = shlex.join(["kd", "train", *outcomes[name].job.overrides])
        print(f"{'' if several else 'best: '}{name}  {values}\n  {command}", flush=True)


def recommend(directory: Path, complete: list[Any], names: list[str]) -> None:
    """Print which run to take: of those whose validation is within one row of the best, the cheapest.

    Nothing where the first of the objectives ``names`` is better low, or they are not two.
    """
    found = {str(job_of(t)): dict(zip(names, t.values, strict=True)) for t in complete}
    if not found or len(names) != 2:
        return
    there: Any = state_of(directory / next(iter(found))).record
    metric = next((m for m in record.metrics_of(there) if f"val/{m['name']}" == names[0]), {})
    if metric.get("better") != "max":
        return
    name = recommended([*found.items()], there["data"]["sizes"], bool(metric.get("counted")))
    print(f"recommended: {name}  {shown(found[name])}: the cheapest within one validation row of the best")
    taught = bool((state_of(directory / name).record or {}).get("teacher"))
    verb = ["kd", "decide"] if taught else ["kd", "report"]
    more = ["page=decision.html"] if taught else []
    print(f"  {shlex.join([*verb, str(relative(directory / name)), *more])}", flush=True)


def shown(values: Mapping[str, float]) -> str:
    """Write the objectives of a trial."""
    return "  ".join(f"{n} {value:.4g}" if value < 1000 else f"{n} {value:,.0f}" for n, value in values.items())
