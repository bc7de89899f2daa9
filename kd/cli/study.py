"""``kd study NAME``: a question, the runs that answer it, and the page with the answer. No torch at import."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from kd.cli.hydra_app import run
from kd.errors import KdError
from kd.run.train import train
from kd.studies import load

USAGE = """kd study NAME [--only ROW,...] [--seeds N,...] [--dry-run] [--config-dir DIR] [KEY=VALUE ...]

Runs what a study still lacks, teachers first, and writes results.csv and the report. The same command again goes on
where it stopped.

  kd study hinton_mnist                           all rows, as many jobs at once as there are cores (or GPUs)
  kd study hinton_mnist --dry-run                 what would run, and for how long (a few steps of each are timed)
  kd study hinton_mnist --only distilled          one row with the runs that it reads; patterns: 'w300_*'
  kd study hinton_mnist --seeds 0,1,2             other seeds than the study's; also 0-9
  kd study hinton_mnist hydra/launcher=slurm      the jobs on a cluster; any key of kd train, for every job

NAME is a folder of experiments/ in the working directory, else of the studies that come with kd (kd study lists them
all), or the path of one. Runs go to runs/study_NAME/ROW/seedN (paths.runs=DIR, or hydra.sweep.dir=DIR in place of
runs/study_NAME: for runs of another recipe beside those that are there). With logger=[wandb] the report is sent as
well."""


def main(argv: Sequence[str]) -> int:
    """Run a study through the sweeper of that name. Returns the exit code."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    name, options, overrides = _parsed(argv)
    return run_study(name, overrides, **options)


def run_study(
    name: str,
    overrides: Sequence[str],
    only: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    dry_run: bool = False,
    config_dir: str | None = None,
) -> int:
    """Run what is missing of a study, by its name or folder; ``overrides``: of every job. Returns the exit code."""
    study = load.load_study(name, seeds)  # bad input is found out before Hydra starts
    own = ["--config-dir", config_dir] if config_dir else []
    sweeper = _sweeper(name, study.name, only, seeds, dry_run)
    return run(["-m", *own, *sweeper, *_launcher(overrides), *overrides], train)


def _parsed(argv: Sequence[str]) -> tuple[str, dict[str, Any], list[str]]:
    parser = argparse.ArgumentParser(prog="kd study", add_help=False, exit_on_error=False)
    parser.add_argument("name", nargs="?")
    parser.add_argument("--only")
    parser.add_argument("--seeds", default=None)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--config-dir")
    try:
        given, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise KdError(f"kd study does not understand this: {error}") from None
    unknown = [a for a in rest if a.startswith("-")]
    if unknown:
        raise KdError(
            f"{unknown[0]} is not understood: kd study takes --only, --seeds, --dry-run, --config-dir and KEY=VALUE"
        )
    overrides = [a for a in [given.name, *rest] if a and "=" in a]
    names = [a for a in [given.name, *rest] if a and "=" not in a]
    if len(names) != 1:
        raise KdError(f"kd study takes the name of one study, given: {', '.join(names) or 'none'}"
                      f" (studies: {', '.join(load.study_names()) or 'none here'})")  # fmt: skip
    options = {
        "only": [n for n in (given.only or "").split(",") if n],
        "seeds": _numbers(given.seeds),
        "dry_run": given.dry_run,
        "config_dir": given.config_dir,
    }
    return names[0], options, overrides


def _numbers(text: str | None) -> list[int] | None:
    """Read ``0,1,5-7`` as 0, 1, 5, 6, 7."""
    if text is None:
        return None
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) < int(first):
            raise KdError(f"--seeds {text} is not understood: whole numbers and ranges, as in 0,1,5-9")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def _sweeper(name: str, directory: str, only: Sequence[str], seeds: Sequence[int] | None, dry_run: bool) -> list[str]:
    quoted = name.replace("'", r"\'")
    sweeper = {
        "name": f"'{quoted}'",
        "only": "[" + ",".join(f"'{n}'" for n in only) + "]",
        "seeds": "null" if seeds is None else str(list(seeds)).replace(" ", ""),
        "dry_run": str(dry_run).lower(),
    }
    place = f"hydra.sweep.dir='${{paths.runs}}/study_{directory}'"
    return ["hydra/sweeper=study", place, *(f"hydra.sweeper.{k}={v}" for k, v in sweeper.items())]


def _launcher(overrides: Sequence[str]) -> list[str]:
    """Run on this machine as many jobs at once as it has room for, unless the user says how many."""
    chosen = any(o.startswith(("hydra/launcher=", "hydra.launcher.n_jobs=")) for o in overrides)
    return [] if chosen else ["hydra.launcher.n_jobs=auto"]
