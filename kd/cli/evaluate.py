"""``kd eval``: measure a run, a checkpoint or a teacher alone, and print a table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kd.config.compose import checked
from kd.errors import KdError, did_you_mean
from kd.records import record
from kd.records.weight_files import LAST, SELECTED
from kd.run.evaluate import evaluate, run_config

OWN = {"run": None, "split": "test", "who": "student", "weights": "selected", "out": None}
OWN |= {"lm_eval": None, "lm_eval_limit": None, "lm_eval_folder": None}
CHOICES = {"split": ("val", "test"), "who": ("student", "teacher"), "weights": ("selected", "last")}

USAGE = """kd eval [RUN] [split=val|test] [who=student|teacher] [weights=selected|last] [out=FILE] [KEY=VALUE ...]

Measures top-1/5, NLL, expected calibration error, accuracy per class, and beside a teacher agreement and KL to it.

  kd eval RUN                                         the student of a run on its test split (run=RUN is the same)
  kd eval RUN who=teacher split=val                   that run's teacher
  kd eval RUN data.test_shift=1                       any key of the run's config can be changed
  kd eval student.checkpoint=FILE model@student=mlp   a checkpoint, with the groups and keys of kd train
  kd eval who=teacher teacher.checkpoint=RUN          a teacher alone
  kd eval RUN lm_eval=hellaswag,arc_easy              a language model by the lm-evaluation-harness (lm_eval_limit=N:
                                                      samples of a task; lm_eval_folder=DIR: YAML files of other tasks)

A run's config.yaml is a configuration: it names code, as a script does. out=FILE also writes the numbers as JSON;
--config-dir DIR as for kd train."""


def main(argv: Sequence[str]) -> int:
    """Parse, measure, print a table."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    own, overrides, config_dir = _split_arguments(argv)
    if own["out"] is not None and not Path(own["out"]).resolve().parent.is_dir():
        raise KdError(f"out = {own['out']} cannot be written: its folder does not exist")
    if own["lm_eval"] is not None:
        return _harness(own, overrides)
    config = run_config(own["run"], overrides, OWN) if own["run"] else checked(overrides, config_dir)
    file = _weights_file(own) if own["run"] and own["who"] == "student" else None
    result = evaluate(config, own["who"], own["split"], file, run=own["run"])
    _print(result)
    if own["out"]:
        record.write_text(Path(own["out"]), json.dumps(result, indent=2) + "\n")
    return 0


def _harness(own: Mapping[str, Any], overrides: Sequence[str]) -> int:
    """Measure a run's language model by the lm-evaluation-harness, print a table."""
    from kd.run.lm_harness import harness  # start-up: torch

    if own["run"] is None or own["who"] != "student":
        raise KdError("lm_eval measures the student of a run: give RUN (a teacher is the student of its own run)")
    if overrides:
        raise KdError(f"{overrides[0]} changes nothing here: lm_eval reads the run's folder {own['weights']}/ alone")
    limit = own["lm_eval_limit"]
    if limit is not None and (not str(limit).isdecimal() or int(limit) < 1):
        raise KdError(f"lm_eval_limit = {limit} is not allowed: it must be a whole number, 1 or more")
    if own["lm_eval_folder"] is not None and not Path(own["lm_eval_folder"]).is_dir():
        raise KdError(f"lm_eval_folder = {own['lm_eval_folder']} is not allowed: there is no such folder")
    tasks = [name.strip() for name in str(own["lm_eval"]).strip("[]").split(",") if name.strip()]
    if not tasks:
        raise KdError("lm_eval = [] is not allowed: it must name tasks of the harness, lm_eval=hellaswag,arc_easy")
    folder = Path(own["run"]) / str(own["weights"])
    found = {"source": str(folder), **harness(folder, tasks, limit and int(limit), own["lm_eval_folder"])}
    _print_tasks(found)
    if own["out"]:
        record.write_text(Path(own["out"]), json.dumps(found, indent=2) + "\n")
    return 0


def _print_tasks(found: Mapping[str, Any]) -> None:
    table = Table(title=f"lm-evaluation-harness {found['version']}: {found['source']}")
    for name in ("task", "metric"):
        table.add_column(name)
    for name in ("value", "standard error"):
        table.add_column(name, justify="right")
    for task, metrics in found["tasks"].items():
        for metric, numbers in metrics.items():
            shown = [f"{numbers[name]:.4f}" if name in numbers else "" for name in ("value", "stderr")]
            table.add_row(task, metric, *shown)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110).print(table)


def _split_arguments(argv: Sequence[str]) -> tuple[dict[str, Any], list[str], str | None]:
    """Return the verb's own arguments, overrides of the config, and the folder of ``--config-dir``."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    try:
        given, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise KdError(f"kd eval does not understand this: {error}") from None
    own: dict[str, Any] = dict(OWN)
    overrides = []
    for argument in rest:
        key, equals, value = argument.partition("=")
        if argument.startswith("-"):
            raise KdError(f"{argument} is not understood: kd eval takes RUN, --config-dir DIR and KEY=VALUE")
        if not equals or Path(argument).exists():
            key, value = "run", _run_directory(argument)
        if key == "run" and own["run"] is not None:
            raise KdError(f"kd eval measures one run, given: {own['run']} and {value}")
        if key in own:
            own[key] = value
        else:
            overrides.append(argument)
    for key, allowed in CHOICES.items():
        if own[key] not in allowed:
            raise KdError(f"{key} = {own[key]} is not allowed: it must be {' or '.join(allowed)}")
    return own, overrides, given.config_dir


def _run_directory(argument: str) -> str:
    """Read an argument without a ``KEY=`` as a run directory. ``KdError`` for files and typos."""
    if Path(argument).is_file():
        raise KdError(f"{argument} is a file: kd eval takes a run directory, or student.checkpoint={argument}")
    if not Path(argument).is_dir():
        known = did_you_mean(argument, OWN)
        raise KdError(f"{argument} is neither a run directory nor KEY=VALUE{known}")
    return argument


def _weights_file(own: Mapping[str, Any]) -> Path:
    file = Path(own["run"]) / (SELECTED if own["weights"] == "selected" else LAST)
    if not file.is_file():
        raise KdError(f"run = {own['run']} holds no {file.name}: it ended before its first validation, or is running")
    return file


def _print(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['who']} on {result['split']} ({result['rows']} rows): {result['source']}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in result["metrics"].items():
        table.add_row(name, f"{value:.4f}")
    if len(result["per_class"]) <= 20:
        for name, value in result["per_class"].items():
            table.add_row(f"{result['by_class']} of class {name}", f"{value:.4f}")
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 110).print(table)
    if "without" in result:
        print(f"no agreement and KL: {result['without']}")
