"""What is refused before a sweep starts anything, and how its jobs are called in a complaint."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.errors import KdError
from kd.parallel.devices import GPU, gpus, refuse_missing
from kd.records import weight_files
from kd.records.manifest import Job
from kd.sweeps import pool


def refuse_missing_hardware(hardware: Mapping[str, Any]) -> None:
    """Raise ``KdError`` when this machine has fewer GPUs, or cores, than a job of this hardware section takes."""
    if found := len(gpus()):
        refuse_missing(hardware, found)
    elif hardware["accelerator"] in GPU:  # others than NVIDIA's, which torch knows: asked in a process of its own
        pool.run_in_subprocess(functools.partial(refuse_missing, hardware))
    else:
        refuse_missing(hardware, 0)


def refuse_unbuildable(configs: Mapping[str, Mapping[str, Any]], directory: Path) -> None:
    """Raise ``KdError`` if a job cannot start: its weights are nowhere, or a term needs a teacher that is not given.

    Runs of ``directory`` count as there: they may be jobs of before.
    """
    for name, config in configs.items():
        for role in ("student", "teacher"):
            for checkpoint in weight_files.paths(config[role]["checkpoint"]):
                if not Path(checkpoint).exists() and directory not in Path(checkpoint).parents:
                    raise KdError(f"{name}: {role}.checkpoint = {checkpoint} does not exist")
    if configs:
        pool.preload()
        pool.run_in_subprocess(functools.partial(_check_objectives, configs))


def _check_objectives(configs: Mapping[str, Mapping[str, Any]]) -> None:
    from kd.run.build import check_objectives  # start-up: torch

    check_objectives(configs)


def refuse_duplicates(configs: Mapping[str, Mapping[str, Any]], kind: str = "sweep") -> None:
    """Raise ``KdError`` if two jobs are one run: a value listed twice, two spellings of one number, two equal rows."""
    seen: dict[str, str] = {}
    for name, config in configs.items():
        rest = {k: v for k, v in config.items() if k not in ("name", "tags", "notes", "logger")}
        first = seen.setdefault(re.sub(r"(?<=\d)\.0(?=[,}\]])", "", repr(rest)), name)  # 1.0 is 1
        if first != name and kind == "study":
            raise KdError(_duplicate_rows(first, name, config["seed"]))
        if first != name:
            raise KdError(f"the jobs {first} and {name} are the same run: list each value once")


def _duplicate_rows(one: str, other: str, seed: int) -> str:
    (row, _, first), (other_row, _, second) = one.partition("/seed"), other.partition("/seed")
    if row == other_row:
        return f"row {row}: its seeds {first} and {second} are the same run (seed = {seed}): an override sets the seed"
    same = f"rows {row} and {other_row} are the same experiment (seed {seed})"
    return f"{same}: change the overrides of one, or leave it out"


def refuse_unwritable(directory: Path) -> None:
    """Raise ``KdError`` when the sweep's directory cannot be made or written, found out without writing."""
    there = next(folder for folder in (directory, *directory.parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "no permission, or a read-only disk" if there.is_dir() else "it is a file"
        raise KdError(f"the sweep's directory cannot be written: {there}: {reason} (set paths.runs)")


def advice(sentence: str) -> str:
    """Add to a complaint of a study that advises another ``hydra.sweep.dir`` how to choose one."""
    advised = sentence.endswith("hydra.sweep.dir")
    return f"{sentence} (an argument of kd study: hydra.sweep.dir=DIR)" if advised else sentence


def name_jobs(jobs: Sequence[Job], kind: str) -> str:
    """Name jobs: ``lr=0.1 seed=0 and 3 more``, or the rows of a study."""
    study = kind == "study"
    names = list(dict.fromkeys(job.name.partition("/")[0] if study else job.label for job in jobs))
    some = ", ".join(names[: 3 if study else 1])
    more = len(names) - (3 if study else 1)
    row = ("rows " if len(names) > 1 else "row ") if study else ""
    return f"{row}{some}{f' and {more} more' if more > 0 else ''}"
