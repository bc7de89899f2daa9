"""``kd study NAME --dry-run``: what would run, and for how long by a few timed steps of each row."""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kd.errors import KdError
from kd.manifest import Job
from kd.report.console import print_table
from kd.studies import graph
from kd.studies.spec import Study
from kd.sweeps.engine import Engine, refuse_twins, refuse_unbuildable
from kd.sweeps.local import cores, shares
from kd.sweeps.pool import ask, warm_up
from kd.sweeps.state import FINISHED, State, look

WARM, ENOUGH = 3, 1.5  # steps that are not counted, seconds of counted ones


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
    """Print the jobs row by row with their hours; trains a few steps of each row, and writes nothing.

    ``KdError`` that names the rows which cannot be built.
    """
    configs = {job.name: engine.compose(job) for job in jobs}
    refuse_twins(configs, "study")
    refuse_unbuildable(configs, engine.directory)
    together = _together(engine, list(configs.values()))
    lines, problems = [], []
    for line in _lines(engine.directory, jobs, configs):
        try:
            lines.append(_timed(line, engine.directory, configs, max(1, cores() // together)))
        except KdError as error:
            problems.append(f"{line.row}: {error}")
    rows = [[x.row, *_seeds(x), _after(study, x.row), *_hours(x)] for x in lines]
    head = ["", "to run: seeds", "finished", "after", "minutes a run", "minutes in all", "from"]
    print_table(f"{study.name}: {sum(len(x.missing) for x in lines)} of {len(jobs)} runs are missing", head, rows)
    hours = sum(x.seconds * len(x.missing) for x in lines) / 3600
    several = f"about {hours / together:.2f} with {together} at once"
    print(f"{hours:.2f} hours one after another, {several}; validation and test come on top")
    if problems:
        raise KdError("\n".join([f"{len(problems)} rows cannot be trained:", *problems]))


def _together(engine: Engine, configs: Sequence[Mapping[str, Any]]) -> int:
    launcher: Any = engine.launcher
    if not hasattr(launcher, "n_jobs"):  # of a cluster: it decides
        return 1
    hardware = [config["hardware"] for config in configs]
    return len(shares(hardware, launcher.n_jobs, launcher.jobs_per_gpu))


def _lines(directory: Path, jobs: Sequence[Job], configs: Mapping[str, Mapping[str, Any]]) -> list[Line]:
    rows: dict[str, list[Job]] = {}
    states = {}
    for job in jobs:
        rows.setdefault(job.name.partition("/")[0], []).append(job)
        states[job.name] = look(directory / job.name, None if job.after else configs[job.name])
    return [Line(row, part, [states[job.name] for job in part]) for row, part in rows.items()]


def _timed(line: Line, directory: Path, configs: Mapping[str, Mapping[str, Any]], threads: int) -> Line:
    """With the seconds of a run: what its other seeds took, else by a few steps."""
    if not line.missing:
        return line
    took = [s.record["wall_clock_s"] for s in line.states if s.status == FINISHED and s.record is not None]
    if took:
        return replace(line, seconds=sum(took) / len(took), how="its other seeds")
    config = _without_missing(dict(configs[line.missing[0].name]), directory, configs)
    warm_up()
    steps, seconds, start = ask(functools.partial(time_steps, config, threads))
    how = f"{steps} steps an epoch, {1000 * seconds:.1f} ms each"
    return replace(line, seconds=start + config["recipe"]["epochs"] * steps * seconds, how=how)


def _without_missing(
    config: dict[str, Any], directory: Path, configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Runs that are still to come are stood for by their networks, with random weights."""
    student, teacher = dict(config["student"]), dict(config["teacher"])
    if student["checkpoint"] is not None and not Path(student["checkpoint"]).exists():
        student["checkpoint"] = None
    given = teacher["checkpoint"] if isinstance(teacher["checkpoint"], list) else [teacher["checkpoint"]]
    if any(c is not None and not Path(c).exists() for c in given):
        models = [configs[str(Path(c).relative_to(directory))]["student"]["model"] for c in given]
        teacher.update(checkpoint=None, model=models, allow_random=True)
    return {**config, "student": student, "teacher": teacher}


def time_steps(config: dict[str, Any], threads: int) -> tuple[int, float, float]:
    """Steps of an epoch, seconds of one, and seconds until the first; nothing is kept."""
    import lightning as L
    import torch

    from kd import build, callbacks, fit

    class Clock(callbacks.Callback):
        times: list[float]

        def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            self.times = [time.perf_counter()]

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.times.append(time.perf_counter())
            counted = self.times[WARM:]
            trainer.should_stop = len(counted) > 2 and counted[-1] - counted[0] > ENOUGH

    start = time.perf_counter()
    fit.quieten()
    torch.set_num_threads(config["hardware"]["threads"] or threads)
    trainer = {**(config["hardware"]["trainer"] or {}), "limit_val_batches": 0}
    config = {**config, "hardware": {**config["hardware"], "trainer": trainer}}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        data = build.datamodule(config)
        module = build.distiller(config, data)
        clock = Clock()
        fit.make_trainer(config, Path(folder), [], [clock], module).fit(module, datamodule=data)
    times = clock.times[WARM:] if len(clock.times) > WARM + 1 else clock.times
    return len(data.train_dataloader()), (times[-1] - times[0]) / (len(times) - 1), clock.times[0] - start


# ---------------------------------------------------------------------- the table


def _seeds(line: Line) -> tuple[str, str]:
    missing = [job.name for job in line.missing]
    names = [job.name for job in line.jobs]
    number = {name: name.partition("/seed")[2] for name in names}
    done = [number[n] for n in names if n not in missing]
    return " ".join(number[n] for n in missing) or "–", " ".join(done) or "–"


def _after(study: Study, row: str) -> str:
    return ", ".join(dict.fromkeys(name for name, _ in graph.references(study.rows[row]))) or "–"


def _hours(line: Line) -> tuple[str, str, str]:
    if not line.missing:
        return "–", "–", "–"
    return f"{line.seconds / 60:.1f}", f"{line.seconds * len(line.missing) / 60:.1f}", line.how
