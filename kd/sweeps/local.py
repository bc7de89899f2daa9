"""The local launcher: N jobs at once, each with its part of the cores and, where there are GPUs, its own of them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from kd.errors import KdError
from kd.parallel.devices import cores, devices_of, gpus
from kd.records import manifest, record
from kd.records.measures import measured, number, shown_metric
from kd.records.state import FAILED, FINISHED, INTERRUPTED, PRUNED
from kd.sweeps.job import ensure_record
from kd.sweeps.pool import forked, preload
from kd.sweeps.progress import LOG, Progress


@dataclass(frozen=True)
class Resources:
    """What one job of several at once may use: torch threads for each of its processes, and GPUs by number.

    ``gpus`` empty: the choice is left alone.
    """

    threads: int
    gpus: Sequence[str] = ()

    def apply(self) -> None:
        """Restrict this process, which has not yet touched a GPU, and its children to these GPUs."""
        if self.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)


def at_once(n_jobs: int | str, jobs_per_gpu: int, there: int, each: int = 1) -> int:
    """Count the jobs that run together, on so many GPUs as are ``there``, or on the cores where that is 0.

    ``auto``: as many as there is room for when ``each`` takes so many.

    ``KdError`` for more than there is room for.
    """
    units, what, share = (there, "GPUs", jobs_per_gpu) if there else (cores(), "cores", 1)
    room = max(1, units // each * share)
    if n_jobs == "auto":
        return room
    if not isinstance(n_jobs, int) or isinstance(n_jobs, bool) or n_jobs < 1:
        raise KdError(f"hydra.launcher.n_jobs = {n_jobs} is not allowed: it must be a whole number, 1 or more, or auto")
    if n_jobs > room:
        takes = f", and a job takes {each} (hardware.devices)" if each > 1 else ""
        hint = " (several may share one: hydra.launcher.jobs_per_gpu)" if there else ""
        raise KdError(f"hydra.launcher.n_jobs = {n_jobs} is not allowed: there are {units} {what}{takes}{hint}")
    return n_jobs


def division(jobs: Sequence[Mapping[str, Any]], n_jobs: int | str, jobs_per_gpu: int) -> tuple[int, int, Sequence[str]]:
    """Count the jobs of these hardware sections that there is room for, what each may take, and of which GPUs.

    Where one job takes more than the others, all get its room.
    """
    on_gpu = [hardware for hardware in jobs if hardware["accelerator"] != "cpu"]
    visible = gpus() if on_gpu else []
    each = max(devices_of(hardware, len(visible)) for hardware in (on_gpu if visible else jobs))
    return at_once(n_jobs, jobs_per_gpu, len(visible), each), each, visible


def resources(jobs: Sequence[Mapping[str, Any]], n_jobs: int | str, jobs_per_gpu: int) -> list[Resources]:
    """Divide the machine over the slots in which jobs of these hardware sections run; as many slots as jobs at once."""
    room, each, visible = division(jobs, n_jobs, jobs_per_gpu)
    together = min(room, len(jobs))
    visible = visible if together > 1 else []
    blocks = [visible[i : i + each] for i in range(0, len(visible) - each + 1, each)]
    threads = max(1, cores() // (together * each))
    return [Resources(threads, blocks[slot % len(blocks)] if blocks else []) for slot in range(together)]


def launch(
    context: HydraContext,
    task: TaskFunction,
    master: DictConfig,
    jobs: Sequence[Sequence[str]],
    first: int,
    n_jobs: int | str,
    jobs_per_gpu: int,
    total: int | None = None,
) -> list[JobReturn]:
    """Run the jobs (lists of overrides, numbered from ``first``); what each one wrote is in its directory.

    ``total``: of which these are a part; null: they are all.
    """
    setup_globals()
    configs = []
    for place, overrides in enumerate(jobs, start=first):
        config = context.config_loader.load_sweep_config(master, list(overrides))
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = place
        configs.append(config)
    slots = resources([OmegaConf.to_container(c.hardware) for c in configs], n_jobs, jobs_per_gpu)  # type: ignore[misc]
    preload()
    state = Singleton.get_state()  # a deep copy: one for all jobs, each child changes its own
    calls = [_call(context, task, state, config, slots) for config in configs]
    total = total or first + len(jobs)
    progress = Progress(total, len(slots))
    places = [(_label(directory(config)), directory(config)) for config in configs]
    ended: list[int] = []

    def tick(running: Sequence[int]) -> None:
        progress.update({position: places[position] for position in running}, first + len(ended))

    for done, (position, code) in enumerate(forked(calls, len(slots), tick), start=first + 1):
        ended.append(position)
        progress.end(position)
        progress.clear()
        run_dir = directory(configs[position])
        overrides = [str(o) for o in configs[position].hydra.overrides.task]
        try:
            if code or not (run_dir / record.FILE).exists():
                ensure_record(run_dir, overrides, *death(code))
            line = job_line(run_dir)
        except KdError as error:  # there is no room for one: a job does not stop the others
            line = f"{_label(run_dir)}: {FAILED}: {error}"
        print(f"  {done:>{len(str(total))}}/{total}  {line}", flush=True)
    return [JobReturn(overrides=list(overrides)) for overrides in jobs]


def _label(run_dir: Path) -> str:
    """Return what a job is called."""
    belongs = manifest.find(run_dir)
    return belongs[1].label if belongs else run_dir.name


def directory(config: DictConfig) -> Path:
    """Find the run directory of a job's config."""
    return Path(os.path.abspath(os.path.join(config.hydra.sweep.dir, str(config.hydra.sweep.subdir))))


def death(code: int) -> tuple[str, str]:
    """Give status and reason for a child that ended without a record of its own."""
    if code >= 0:
        return (INTERRUPTED, "interrupted") if code == 130 else (FAILED, f"the process ended with exit code {code}")
    name = signal.Signals(-code).name
    return INTERRUPTED, f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def job_line(run_dir: Path) -> str:
    """Write one line about a job that ended: its numbers, or why it has none."""
    found, belongs = record.read(run_dir), manifest.find(run_dir)
    label = belongs[1].label if belongs else run_dir.name
    if found["status"] == PRUNED:
        return f"{label}: pruned {found['error']}"
    if found["status"] != FINISHED:
        return f"{label}: {found['status']}: {found['error']} (see {run_dir / 'train.log'})"
    selected, last = found["student"]["selected"], found["student"]["last"]
    names = (belongs[0].objectives if belongs else ()) or [n for n in [found["protocol"]["monitor"]] if n]
    chosen = "".join(f"{name} {number(measured(found, name))}  " for name in names)
    main = record.metrics_of(found)[0]
    unit = " %" if main["share"] else ""
    at_last = f"; last epoch {shown_metric(main, last['test'][main['name']])}{unit}"
    other = "" if selected["epoch"] == last["epoch"] else at_last
    at_selected = f"test {main['title']} {shown_metric(main, selected['test'][main['name']])}{unit}"
    epoch = f"epoch {selected['epoch'] + 1}, which val selected{other}"
    return f"{label}: {chosen}{at_selected} ({epoch}; {found['wall_clock_s']:.1f} s)"


def _call(
    context: HydraContext, task: TaskFunction, state: Any, config: DictConfig, slots: Sequence[Resources]
) -> Callable[[int], None]:
    def call(slot: int) -> None:
        run_dir, own = directory(config), slots[slot]
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            with (run_dir / LOG).open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
        except OSError as error:
            print(f"kd: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
            sys.exit(1)
        sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
        own.apply()
        if config.hardware.threads is None:
            OmegaConf.update(config, "hardware.threads", own.threads)
        Singleton.set_state(state)
        run_job(
            hydra_context=context,
            task_function=task,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    return call
