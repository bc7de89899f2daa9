"""The resumable sweep behind ``-m``: every combination of the swept values, named by what differs."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from kd.config import explain
from kd.errors import KdError
from kd.records.manifest import Job
from kd.sweeps.engine import Engine
from kd.sweeps.outcome import Outcome
from kd.sweeps.table import print_results
from kd.sweeps.terms import Terms

LONGEST = 120  # characters of a directory's name


def sweep(engine: Engine, arguments: Sequence[str]) -> list[Outcome]:
    """Plan, run what is missing, print the table. ``KdError`` when a job did not finish."""
    every = plan(engine, arguments)
    jobs = list(dict.fromkeys(every))
    opening = f"sweep of {len(jobs)} job{'s' if len(jobs) > 1 else ''}"
    if len(every) > len(jobs):
        opening += f" ({len(every)} combinations: a term's keys apply where it is chosen, equal jobs run once)"
    outcomes = engine.run("sweep", engine.directory.name, jobs, opening)
    print_results(engine.directory, outcomes)
    return outcomes


def plan(engine: Engine, arguments: Sequence[str]) -> list[Job]:
    """Return one job for each combination; equal ones where they differ in keys of a term that they do not have.

    ``KdError`` for an empty axis, a repeated value, two jobs of one directory.
    """
    try:
        parser = OverridesParser.create(config_loader=engine.context.config_loader)
        axes = [axis(o) for o in parser.parse_overrides(list(arguments)) if not o.is_hydra_override()]
    except explain.KNOWN as error:
        raise KdError(explain.explain(error, arguments)) from error
    several = [key for key, values in axes if len(values) > 1]
    swept = short_names(several)
    combinations = [
        [(key, value, key if value is None else f"{key}={value}") for (key, _), value in zip(axes, values, strict=True)]
        for values in itertools.product(*(values for _, values in axes))
    ]
    terms = Terms(engine, [[o for *_, o in combination] for combination in combinations])
    jobs: dict[str, Job] = {}
    every = []
    for combination in combinations:
        overrides = terms.applying([o for *_, o in combination])
        differs = {key: value or "" for key, value, o in combination if key in several and o in overrides}
        name = directory_name({swept[key]: value for key, value in differs.items()}) or "job"
        label = " ".join(f"{swept[key]}={value}" for key, value in differs.items()) or "single job"
        job = Job(name, label, overrides)
        if jobs.setdefault(name, job).overrides != overrides:
            other = jobs[name].label
            raise KdError(f"the jobs {other} and {label} would share the directory {name}: {list(overrides)}")
        every.append(job)
    return every


def axis(override: Override) -> tuple[str, list[str | None]]:
    """Return key and values of one argument; a single value when it does not sweep, None when it deletes a key."""
    if override.is_sweep_override():
        if not override.is_discrete_sweep():
            raise KdError(
                f"{override.input_line}: an interval has no list of values: write choice(…) or range(…), or search "
                "with hydra/sweeper=optuna"
            )
        key, values = override.get_key_element(), list(override.sweep_string_iterator())
        if not values:
            raise KdError(f"{override.input_line} is a sweep over nothing")
        twice = [v for v in values if values.count(v) > 1]
        if twice:
            raise KdError(f"{override.input_line} lists {twice[0]} twice")
        return key, list(values)
    if override.is_delete():
        return override.input_line or "", [None]
    key, _, value = (override.input_line or "").partition("=")
    return key, [value]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Give each key the fewest last parts that no other key ends with: ``loss.kd.temperature`` is ``temperature``."""
    names = {}
    for key in keys:
        parts = key.lstrip("+").split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[-count:])
            if not any(other != key and f".{other.lstrip('+')}".endswith(f".{name}") for other in keys):
                break
        names[key] = name
    return names


def directory_name(values: dict[str, str]) -> str:
    """Name the directory, as ``loss-ce+kd_seed-0``: no character that a shell or Hydra would want quoted."""
    parts = []
    for key, value in values.items():
        inner = re.sub(r"\s*,\s*", "+", value.strip("[]'\"/ "))  # a minus in front stays: -1 is not 1
        parts.append(f"{re.sub(r'[^A-Za-z0-9.@-]+', '-', key)}-{re.sub(r'[^A-Za-z0-9.+-]+', '-', inner).rstrip('-')}")
    name = "_".join(parts)
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
