"""Summarise a sweep for the head of its page: what differs, what is the same in all runs, which teacher. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kd.records import record
from kd.report.frame import FINISHED, finished
from kd.report.measures import Measure
from kd.tasks.metrics import Metric, described

MOST = 6  # values that are listed; of more, numbers have their range
IRRELEVANT = ("seed=", "name=", "hydra.", "paths.", "logger")  # tell nothing of the experiment


def paragraphs(frame: pd.DataFrame, runs_dir: Path, differ: str) -> list[str]:
    """Write sentences from the records and configs of the runs that are there: what differs, what does not.

    ``differ``: the words before what differs. Runs that were only listed have nothing to add.
    """
    dirs = [runs_dir / str(run) for run in frame["run"].dropna()]
    records = [record.read(run_dir) for run_dir in dirs]
    configs = [record.read_config(run_dir) if (run_dir / record.CONFIG).is_file() else {} for run_dir in dirs]
    differs = _differing([_overrides(found.get("overrides", ())) for found in records])
    seeds = sorted(set(frame["seed"]))
    varied = [f"{key} ({_listed(values)})" for key, values in differs.items()]
    varied += [f"seed ({_listed(seeds)})"] if len(seeds) > 1 else []
    ended = [pair for pair in zip(records, configs, strict=True) if pair[0]["status"] == FINISHED]
    facts = [_facts(found, config) for found, config in ended]  # a run that could not begin has none of them
    names = dict.fromkeys(name for fact in facts for name in fact)
    same = {name: values[0] for name in names if len(values := _values(facts, name)) == 1}
    data = list(dict.fromkeys(finished(frame)["data"].dropna()))
    fixed = [f"data {data[0]}"] if len(data) == 1 else []
    fixed += [f"{name} {value}" for name, value in same.items()]
    fixed += [f"seed {seeds[0]}"] if len(seeds) == 1 else []
    sentences = [f"{differ}: {'; '.join(varied)}."] if varied else []
    which = "all runs" if len(ended) == len(records) else "all finished runs"
    return sentences + ([f"The same in {which}: {'; '.join(fixed)}."] if fixed else [])


def _overrides(overrides: Sequence[str]) -> dict[str, str]:
    pairs = (o.lstrip("+").partition("=") for o in overrides if not o.lstrip("+").startswith(IRRELEVANT))
    return {key: value for key, _, value in pairs}


def _differing(overrides: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Map each key that differs between runs to its values; ``not set`` for a run that does not set it."""
    keys = dict.fromkeys(key for run in overrides for key in run)
    found = {key: list(dict.fromkeys(run.get(key, "not set") for run in overrides)) for key in keys}
    return {key: values for key, values in found.items() if len(values) > 1}


def _listed(values: Sequence[Any]) -> str:
    if len(values) <= MOST:
        return ", ".join(_short(v) for v in values)
    numbers = [n for v in values if (n := _number(v)) is not None]
    if len(numbers) < len(values):
        return f"{len(values)} values"
    return f"{len(values)} values from {min(numbers):.4g} to {max(numbers):.4g}"


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _short(value: Any) -> str:
    """Shorten a number that a search drew to four digits, and a path to one relative to the working directory."""
    number = _number(value)
    if number is not None and len(str(value)) > 8:
        return f"{number:.4g}"
    return _relative(str(value))


def _relative(path: str) -> str:
    return os.path.relpath(path) if os.path.isabs(path) and Path(path).is_relative_to(Path.cwd()) else path


def _values(facts: Sequence[Mapping[str, str]], name: str) -> list[str]:
    return list(dict.fromkeys(fact.get(name, "none") for fact in facts))


def _facts(found: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """Describe an experiment by a word for each part: from its record, and its config where there is one."""
    facts: dict[str, str] = {}
    if config:
        recipe = config["recipe"]
        optimizer = recipe.get("optimizer") or {}
        facts |= {
            "student": _network(config["student"], found.get("student", {})),
            "loss": " + ".join(config["loss"]),
            "epochs": str(recipe["epochs"]) if recipe["epochs"] is not None else f"{recipe['steps']} steps",
            "batch size": str(recipe["batch_size"]),
            "optimiser": str(optimizer.get("_target_", "")).rpartition(".")[2],
            "learning rate": _short(optimizer.get("lr", "")),
        }
    if teacher := found.get("teacher"):
        facts["teacher"] = _teacher(config.get("teacher", {}), teacher, described(found.get("metrics")))
    else:
        facts["teacher"] = "none"
    return {name: text for name, text in facts.items() if text}


def _network(node: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """Describe a network: ``mlp (hidden [32, 32]; 3,466 parameters)``."""
    model = node.get("model") or {}
    name = str(model.get("_target_", "")).rpartition(".")[2]
    given = [f"{k} {v}" for k, v in model.items() if k != "_target_" and v not in (None, False, 0)]
    given += [f"{measured['parameters']:,} parameters"] if "parameters" in measured else []
    return f"{name} ({'; '.join(given)})".removesuffix(" ()").strip()


def _teacher(node: Mapping[str, Any], measured: Mapping[str, Any], metrics: tuple[Metric, ...]) -> str:
    """Describe a teacher: where its weights are, its size and its main metric on validation."""
    given = measured.get("checkpoint")
    several = given if isinstance(given, (list, tuple)) else [given]
    where = " and ".join(_relative(str(path)) for path in several if path)
    known = [f"{measured['parameters']:,} parameters"] if "parameters" in measured else []
    found = {m.name: m for m in metrics if m.name in measured.get("val", {})}
    if found:
        main = next(iter(found.values()))
        measure = Measure(f"val/{main.name}", metrics=metrics)
        unit = f" {measure.unit}" if measure.unit else ""
        known += [f"validation {main.title} {measure.show(measured['val'][main.name])}{unit}"]
    return f"{where} ({', '.join(known)})" if known else where
