"""What was swept, what was the same in all runs, which teacher: the head of a page without a study. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kd.records import record
from kd.report.frame import FINISHED, finished

MOST = 6  # values that are listed; of more, numbers have their range
ASIDE = ("seed=", "name=", "hydra.", "paths.", "logger")  # say nothing of the experiment


def paragraphs(frame: pd.DataFrame, runs_dir: Path, differ: str) -> list[str]:
    """Sentences from the records and configs of the runs that are there: what differs between them, what does not.

    ``differ``: the words before what differs. Runs that were only listed have nothing to say.
    """
    dirs = [runs_dir / str(run) for run in frame["run"].dropna()]
    records = [record.read(run_dir) for run_dir in dirs]
    configs = [record.read_config(run_dir) if (run_dir / record.CONFIG).is_file() else {} for run_dir in dirs]
    differs = _differing([_told(found.get("overrides", ())) for found in records])
    seeds = sorted(set(frame["seed"]))
    swept = [f"{key} ({_listed(values)})" for key, values in differs.items()]
    swept += [f"seed ({_listed(seeds)})"] if len(seeds) > 1 else []
    ended = [pair for pair in zip(records, configs, strict=True) if pair[0]["status"] == FINISHED]
    facts = [_facts(found, config) for found, config in ended]  # a run that could not begin has none of them
    names = dict.fromkeys(name for fact in facts for name in fact)
    same = {name: values[0] for name in names if len(values := _values(facts, name)) == 1}
    data = list(dict.fromkeys(finished(frame)["data"].dropna()))
    fixed = [f"data {data[0]}"] if len(data) == 1 else []
    fixed += [f"{name} {value}" for name, value in same.items()]
    fixed += [f"seed {seeds[0]}"] if len(seeds) == 1 else []
    said = [f"{differ}: {'; '.join(swept)}."] if swept else []
    which = "all runs" if len(ended) == len(records) else "all finished runs"
    return said + ([f"The same in {which}: {'; '.join(fixed)}."] if fixed else [])


def _told(overrides: Sequence[str]) -> dict[str, str]:
    pairs = (o.lstrip("+").partition("=") for o in overrides if not o.lstrip("+").startswith(ASIDE))
    return {key: value for key, _, value in pairs}


def _differing(told: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Key → its values, of the keys that runs were told differently; ``not set`` for a run that was not told."""
    keys = dict.fromkeys(key for run in told for key in run)
    found = {key: list(dict.fromkeys(run.get(key, "not set") for run in told)) for key in keys}
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
    """A number that a search drew has seventeen digits: four are enough for people. A path from where we are."""
    number = _number(value)
    if number is not None and len(str(value)) > 8:
        return f"{number:.4g}"
    return _near(str(value))


def _near(path: str) -> str:
    return os.path.relpath(path) if os.path.isabs(path) and Path(path).is_relative_to(Path.cwd()) else path


def _values(facts: Sequence[Mapping[str, str]], name: str) -> list[str]:
    return list(dict.fromkeys(fact.get(name, "none") for fact in facts))


def _facts(found: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """What an experiment is made of, by a word for each part: from its record, and its config where there is one."""
    facts: dict[str, str] = {}
    if config:
        recipe = config["recipe"]
        optimizer = recipe.get("optimizer") or {}
        facts |= {
            "student": _network(config["student"], found.get("student", {})),
            "loss": " + ".join(config["loss"]),
            "epochs": str(recipe["epochs"]),
            "batch size": str(recipe["batch_size"]),
            "optimiser": str(optimizer.get("_target_", "")).rpartition(".")[2],
            "learning rate": _short(optimizer.get("lr", "")),
        }
    if teacher := found.get("teacher"):
        facts["teacher"] = _teacher(config.get("teacher", {}), teacher)
    else:
        facts["teacher"] = "none"
    return {name: text for name, text in facts.items() if text}


def _network(node: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """``mlp (hidden [32, 32]; 3,466 parameters)``."""
    model = node.get("model") or {}
    name = str(model.get("_target_", "")).rpartition(".")[2]
    given = [f"{k} {v}" for k, v in model.items() if k != "_target_" and v not in (None, False, 0)]
    given += [f"{measured['parameters']:,} parameters"] if "parameters" in measured else []
    return f"{name} ({'; '.join(given)})".removesuffix(" ()").strip()


def _teacher(node: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """Where it lies, how large it is and how right it is on validation."""
    lies = measured.get("checkpoint")
    several = lies if isinstance(lies, (list, tuple)) else [lies]
    where = " and ".join(_near(str(path)) for path in several if path)
    known = [f"{measured['parameters']:,} parameters"] if "parameters" in measured else []
    right = measured.get("val", {}).get("acc1")
    known += [f"validation top-1 {100 * right:.2f} %"] if right is not None else []
    return f"{where} ({', '.join(known)})" if known else where
