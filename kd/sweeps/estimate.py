"""``kd study NAME --dry-run``: what would run, and for how long: by runs that are there, else by a few timed steps."""

from __future__ import annotations

import contextlib
import functools
import heapq
import io
import itertools
import json
import math
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from statistics import fmean, median
from typing import Any

from kd.config.hardware import settings
from kd.errors import KdError
from kd.parallel import launch
from kd.parallel.devices import cores, gpus
from kd.records import record
from kd.records.manifest import Job
from kd.records.state import FINISHED, State, state_of
from kd.report.console import print_table
from kd.studies import references
from kd.studies.study import Study
from kd.sweeps.engine import Engine, waves
from kd.sweeps.local import Resources, resources
from kd.sweeps.pool import preload, run_in_subprocess
from kd.sweeps.refusals import refuse_duplicates, refuse_unbuildable

WARM, ENOUGH = 3, 1.5  # steps that are not counted, seconds of counted ones
EPOCH = re.compile(r"^(\S+ \S+) INFO epoch \d+/\d+ ", re.MULTILINE)  # in train.log, when one has ended
OTHER_SEEDS, NO_GPU = "its other seeds", "– (there is no GPU here to time it on)"
TO_COME = "– (it reads a folder of a run that is to come)"
UNTIMED = (NO_GPU, TO_COME)


@dataclass(frozen=True)
class Line:
    """One row of the study: its jobs, how each stands, and the seconds that one of them takes."""

    row: str
    jobs: Sequence[Job]
    states: Sequence[State]
    seconds: float = 0.0
    how: str = ""

    @property
    def missing(self) -> list[Job]:
        """The jobs that would run."""
        return [job for job, state in zip(self.jobs, self.states, strict=True) if state.status != FINISHED]


def show(engine: Engine, study: Study, jobs: Sequence[Job]) -> None:
    """Print the jobs row by row with their times; trains a few steps of each row, and writes nothing.

    ``KdError`` that names the rows which cannot be built.
    """
    configs = engine.compose_all(jobs, "study")
    refuse_duplicates(configs, "study")
    refuse_unbuildable(configs, engine.directory)
    slots = _slots(engine, list(configs.values()))
    lines, problems, clock = [], [], Clock(slots[0].threads)
    for line in _lines(engine.directory, jobs, configs):
        try:
            lines.append(_timed(line, engine.directory, configs, clock))
        except KdError as error:
            problems.append(f"{line.row}: {error}")
    rows = [[x.row, *_seeds(x), _after(study, x.row), *_times(x)] for x in lines]
    head = ["", "to run: seeds", "finished", "after", "a run", "in all", "from"]
    print_table(f"{study.name}: {sum(len(x.missing) for x in lines)} of {len(jobs)} runs are missing", head, rows)
    seconds = {job.name: x.seconds for x in lines for job in x.missing if not math.isnan(x.seconds)}
    alone, together = sum(seconds.values()), makespan(jobs, seconds, len(slots))
    stepped = any(x.missing and x.how not in (OTHER_SEEDS, *UNTIMED) for x in lines)
    more = "; where steps were timed, validation and test come on top" if stepped else ""
    untimed = sum(len(x.missing) for x in lines if x.how in UNTIMED)
    more += f"; {untimed} runs are not counted" if untimed else ""
    print(f"{duration(alone)} one after another, about {duration(together)} with {len(slots)} at once{more}")
    if problems:
        raise KdError("\n".join([f"{len(problems)} rows cannot be trained:", *problems]))


def makespan(jobs: Sequence[Job], seconds: Mapping[str, float], together: int) -> float:
    """Return seconds until the last job has ended, so many at once: wave after wave, as :meth:`Engine.run` does it.

    Each job is begun when a slot is free, in the order of the list. A job that is not in ``seconds`` does not run.
    """
    total = 0.0
    for wave in waves([job for job in jobs if job.name in seconds]):
        free = [0.0] * together
        for job in wave:
            heapq.heapreplace(free, free[0] + seconds[job.name])
        total += max(free)
    return total


def _slots(engine: Engine, configs: Sequence[Mapping[str, Any]]) -> list[Resources]:
    launcher: Any = engine.launcher
    if not hasattr(launcher, "n_jobs"):  # of a cluster: it decides
        return [Resources(cores())]
    return resources([config["hardware"] for config in configs], launcher.n_jobs, launcher.jobs_per_gpu)


def _lines(directory: Path, jobs: Sequence[Job], configs: Mapping[str, Mapping[str, Any]]) -> list[Line]:
    rows: dict[str, list[Job]] = {}
    states = {}
    for job in jobs:
        rows.setdefault(job.name.partition("/")[0], []).append(job)
        states[job.name] = state_of(directory / job.name, None if job.after else configs[job.name])
    return [Line(row, part, [states[job.name] for job in part]) for row, part in rows.items()]


def _timed(line: Line, directory: Path, configs: Mapping[str, Mapping[str, Any]], clock: Clock) -> Line:
    """Add the seconds of a run: the median of what its other seeds took, else by a few steps."""
    if not line.missing:
        return line
    ended = zip(line.jobs, line.states, strict=True)
    took = [trained(directory / job.name, s.record) for job, s in ended if s.status == FINISHED and s.record]
    if took:
        return replace(line, seconds=median(took), how=OTHER_SEEDS)
    if configs[line.missing[0].name]["hardware"]["accelerator"] in ("gpu", "cuda") and not gpus():  # a login node
        return replace(line, seconds=math.nan, how=NO_GPU)
    config = _without_missing(dict(configs[line.missing[0].name]), directory, configs)
    if any(Path(text).is_relative_to(directory) and not Path(text).exists() for text in _texts(config)):
        return replace(line, seconds=math.nan, how=TO_COME)
    steps, seconds, start = clock(config)
    length = config["recipe"].get("steps") or config["recipe"]["epochs"] * steps
    how = f"{steps} steps an epoch, {1000 * seconds:.1f} ms each"
    return replace(line, seconds=start + length * seconds, how=how)


def trained(run_dir: Path, found: Mapping[str, Any]) -> float:
    """Count the seconds of a finished run, without those in which its process was stopped, or waited to be resumed.

    Its log has the moment at which each epoch ended: a pause of ten epochs was no training. Without such moments it is
    the wall clock.
    """
    log = run_dir / "train.log"
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    ends = [datetime.strptime(moment, "%Y-%m-%d %H:%M:%S,%f") for moment in EPOCH.findall(text)]
    pauses = [(after - before).total_seconds() for before, after in itertools.pairwise(ends)]
    if len(pauses) < 2:
        return float(found["wall_clock_s"])
    longest = max(10 * median(pauses), 5.0)  # so long may a validation be
    epochs = fmean(min(pause, longest) for pause in pauses) * found["protocol"]["epochs"]
    stopped = sum(max(0.0, pause - longest) for pause in pauses)
    # a killed run's record lacks the time after its last checkpoint; of one that was resumed, not all pauses are in it
    return max(epochs, found["wall_clock_s"] - stopped)


class Clock:
    """Times a few steps, in a process with so many torch ``threads``; once for configs whose steps cost the same."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.known: dict[str, tuple[int, float, float]] = {}

    def __call__(self, config: dict[str, Any]) -> tuple[int, float, float]:
        """Time the steps of a config, see :func:`time_steps`."""
        key = speed(config)
        if key not in self.known:
            preload()
            self.known[key] = run_in_subprocess(functools.partial(time_steps, config, self.threads))
        return self.known[key]


def speed(config: Mapping[str, Any]) -> str:
    """Write what is the same for configs whose steps cost the same: not names, seeds, length, scales of a loss."""
    ignored = ({*record.NOT_THE_EXPERIMENT} - {"hardware"}) | {"protocol"}
    kept = {key: value for key, value in config.items() if key not in ignored}
    kept["data"] = _without(config["data"], "seed", "split_seed")
    kept["recipe"] = _without(config["recipe"], "epochs", "steps", "warmup", "scheduler")
    kept["loss"] = {n: _without(term, "weight", "schedule", "temperature") for n, term in config["loss"].items()}
    return json.dumps(kept, sort_keys=True, default=str)


def _without(section: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key not in keys}


def _without_missing(
    config: dict[str, Any], directory: Path, configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Replace runs that are still to come by their networks, with random weights."""
    student, teacher = dict(config["student"]), dict(config["teacher"])
    if student["checkpoint"] is not None and not Path(student["checkpoint"]).exists():
        student["checkpoint"] = None
    given = teacher["checkpoint"] if isinstance(teacher["checkpoint"], list) else [teacher["checkpoint"]]
    if any(c is not None and not Path(c).exists() for c in given):
        models = [configs[str(Path(c).relative_to(directory))]["student"]["model"] for c in given]
        teacher.update(checkpoint=None, model=models, allow_random=True)
    return {**config, "student": student, "teacher": teacher}


def _texts(node: Any) -> Iterator[str]:
    """Yield every text in a config, at any depth."""
    if isinstance(node, str):
        yield node
    for part in node.values() if isinstance(node, Mapping) else node if isinstance(node, (list, tuple)) else ():
        yield from _texts(part)


def time_steps(config: dict[str, Any], threads: int) -> tuple[int, float, float]:
    """Measure steps of an epoch, seconds of one, and seconds until the first; nothing is kept.

    Of a run of several processes it is the part of one, without what they have to say to each other.
    """
    import lightning as L
    import torch

    from kd.run import build, callbacks, trainer  # start-up: torch
    from kd.run import hardware as machine  # start-up: torch

    class Stopwatch(callbacks.Callback):
        times: list[float]

        def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            self.times = [time.perf_counter()]

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.times.append(time.perf_counter())
            counted = self.times[WARM:]
            trainer.should_stop = len(counted) > 2 and counted[-1] - counted[0] > ENOUGH

    start = time.perf_counter()
    trainer.quieten()
    torch.set_num_threads(config["hardware"]["threads"] or threads)
    machine.keep_memory(config)
    hardware = settings(config)
    processes = launch.count(hardware)
    arguments = {**(hardware["trainer"] or {}), "limit_val_batches": 0}
    one = {"trainer": arguments, "devices": 1, "strategy": "auto", "cluster": None}
    config = {**config, "hardware": {**hardware, **one}}
    for section in ("recipe", "data"):
        batch = config[section]["batch_size"] // processes
        config[section] = {**config[section], "batch_size": max(1, batch)}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        data = build.datamodule(config)
        module = build.distiller(config, data)
        watch = Stopwatch()
        trainer.make_trainer(config, Path(folder), [], [watch], module).fit(module, datamodule=data)
    times = watch.times[WARM:] if len(watch.times) > WARM + 1 else watch.times
    steps = -(-len(data.train_dataloader()) // processes)
    return steps, (times[-1] - times[0]) / (len(times) - 1), watch.times[0] - start


# ---------------------------------------------------------------------- the table


def _seeds(line: Line) -> tuple[str, str]:
    missing = [job.name for job in line.missing]
    names = [job.name for job in line.jobs]
    number = {name: name.partition("/seed")[2] for name in names}
    done = [number[n] for n in names if n not in missing]
    return " ".join(number[n] for n in missing) or "–", " ".join(done) or "–"


def _after(study: Study, row: str) -> str:
    return ", ".join(dict.fromkeys(name for name, _ in references.rows_read(study.rows[row]))) or "–"


def _times(line: Line) -> tuple[str, str, str]:
    if not line.missing or line.how in UNTIMED:
        return "–", "–", line.how if line.missing else "–"
    return duration(line.seconds), duration(line.seconds * len(line.missing)), line.how


def duration(seconds: float) -> str:
    """Write a time for people: ``0.4 s``, ``42 s``, ``3.5 min``, ``2.1 h``."""
    if seconds < 90:
        return f"{seconds:.{0 if seconds >= 10 else 1}f} s"
    return f"{seconds / 60:.1f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
