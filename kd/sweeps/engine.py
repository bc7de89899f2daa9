"""What every kind of sweep does: compose and check all jobs, run what is missing in order, report how each ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from kd.config import explain
from kd.config.compose import check_composed
from kd.errors import KdError, MachineFailure
from kd.records import inputs, lock, manifest
from kd.records.manifest import Job, Manifest
from kd.records.state import DONE, FAILED, FINISHED, INTERRUPTED, MISSING, RUNNING, State, state_of
from kd.studies import load
from kd.sweeps.job import ensure_record
from kd.sweeps.outcome import Outcome
from kd.sweeps.plugins import register
from kd.sweeps.refusals import (
    advice,
    name_jobs,
    refuse_duplicates,
    refuse_missing_hardware,
    refuse_unbuildable,
    refuse_unwritable,
)

LOCK = "sweep.lock"


class Engine:
    """Runs jobs through the launcher that the config names. ``master``: the config of the sweep, before any job."""

    def __init__(self, context: HydraContext, task: TaskFunction, master: DictConfig) -> None:
        self.context, self.master, self.holds = context, master, False
        self.begun, self.total = 0, 0  # jobs, of those that run now
        self.directory = Path(str(master.hydra.sweep.dir)).resolve()
        register()
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=task, config=master
        )

    def compose(self, job: Job) -> dict[str, Any]:
        """Compose and check the config of a job. ``KdError`` when it does not compose or cannot work."""
        before = HydraConfig.instance().cfg
        try:
            cfg = self._composed([*job.overrides, *self._place(job)])
            HydraConfig.instance().set_config(cfg)
            return check_composed(cfg)
        finally:
            HydraConfig.instance().cfg = before

    def terms(self, overrides: Sequence[str]) -> frozenset[str]:
        """Find the loss terms that these overrides choose. ``KdError`` when they do not compose."""
        loss = OmegaConf.to_container(self._composed(overrides).loss, resolve=False)
        return frozenset(n for n, node in loss.items() if isinstance(node, Mapping) and "_target_" in node)  # type: ignore[union-attr, misc]

    def _composed(self, overrides: Sequence[str]) -> DictConfig:
        try:
            return self.context.config_loader.load_sweep_config(self.master, list(overrides))
        except explain.COMPOSING as error:
            found = self.master.hydra.runtime.config_sources
            search = [f"{s.schema}://{s.path}" for s in found if s.provider not in ("hydra", "main", "schema")]
            raise KdError(explain.explain(error, overrides, search)) from error

    def compose_all(self, jobs: Sequence[Job], kind: str = "sweep") -> dict[str, dict[str, Any]]:
        """Compose and check the config of every job. ``KdError`` with each complaint once, and its jobs."""
        configs: dict[str, dict[str, Any]] = {}
        wrong: dict[str, list[Job]] = {}
        for job in jobs:
            try:
                configs[job.name] = self.compose(job)
            except KdError as error:
                for complaint in str(error).splitlines():
                    wrong.setdefault(complaint, []).append(job)
        if wrong:
            everyone = len(jobs) if kind != "study" else 0  # what all jobs of a sweep share needs no name
            lines = []
            for complaint, some in wrong.items():
                known = kind != "study" and complaint.startswith(some[0].overrides)  # it names what was swept
                named = known or len(some) == everyone
                lines.append(complaint if named else f"{name_jobs(some, kind)}: {complaint}")
            raise KdError("\n".join(lines))
        return configs

    def _place(self, job: Job) -> list[str]:
        quoted = str(self.directory).replace("'", r"\'")
        return [f"hydra.sweep.dir='{quoted}'", f"hydra.sweep.subdir='{job.name}'"]

    def run(
        self,
        kind: str,
        name: str,
        jobs: Sequence[Job],
        opening: str | None = None,
        held: ExitStack | None = None,
        folder: str = "",
        part: tuple[int, int] | None = None,
    ) -> list[Outcome]:
        """Run what is not finished, the jobs that others read first. ``KdError`` before the first when one is wrong.

        ``opening``: what to call the jobs in a line that says how many are finished and how many will run; ``held``
        keeps the directory locked for what its owner still has to write; ``folder``: that of a study; ``part``: how
        many ran before, of how many.
        """
        configs = self.compose_all(jobs, kind)
        refuse_duplicates(configs, kind)
        ordered = list(waves(jobs))
        refuse_unwritable(self.directory)
        plan = Manifest(kind, name, {job.name: job for job in jobs}, folder)
        _joined(self.directory, plan)
        missing = self._missing(jobs, configs, plan)
        self.begun, self.total = part or (0, len(missing))
        self._check_room(ordered, missing)
        refuse_unbuildable(missing, self.directory)
        if opening is not None:
            count = f"{len(jobs) - len(missing)} finished, {len(missing)} to run"
            print(f"{opening} in {self.directory}: {count}", flush=True)
        with ExitStack() as own:
            (held or own).enter_context(self.locked(kind, name, folder))
            manifest.write(self.directory, _joined(self.directory, plan))
            outcomes: dict[str, Outcome] = {}
            for wave in ordered:
                outcomes |= self._wave(wave, outcomes, configs)
        return [outcomes[job.name] for job in jobs]

    def _missing(
        self, jobs: Sequence[Job], configs: Mapping[str, dict[str, Any]], plan: Manifest
    ) -> dict[str, dict[str, Any]]:
        """Find the configs of what must run. ``KdError``, before anything starts, when one of the runs cannot go on.

        A job that reads a missing run is checked in its turn.
        """
        missing, wrong = {}, []
        for job in jobs:
            ready = all(state_of(self.directory / other).status == FINISHED for other in job.after)
            try:
                state = state_of(self.directory / job.name, configs[job.name] if ready else None)
            except KdError as error:
                wrong.append(str(error))
                continue
            if state.status not in DONE:
                missing[job.name] = configs[job.name]
        if wrong:
            count = f"{len(wrong)} of {len(jobs)} runs cannot go on: " if len(jobs) > 1 else ""
            raise KdError(f"{count}{advice(wrong[0]) if plan.kind == 'study' else wrong[0]}")
        return missing

    def _check_room(self, ordered: Sequence[Sequence[Job]], missing: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise ``KdError`` when the local launcher has no room for a later wave: not found out after the first."""
        launcher: Any = self.launcher
        for wave in ordered if hasattr(launcher, "at_once") else ():
            if needs := [missing[job.name]["hardware"] for job in wave if job.name in missing]:
                launcher.at_once(*needs)
                for hardware in {repr(h): h for h in needs}.values():
                    refuse_missing_hardware(hardware)

    @contextmanager
    def locked(self, kind: str, name: str, folder: str = "") -> Iterator[None]:
        """Hold the directory, against other processes, until the end; :meth:`run` may be called inside."""
        if self.holds:
            yield
            return
        nothing = Manifest(kind, name, {}, folder)
        _joined(self.directory, nothing)  # before anything is written
        with _locked(self.directory):
            manifest.write(self.directory, _joined(self.directory, nothing))
            self.holds = True
            try:
                yield
            finally:
                self.holds = False

    def _wave(
        self, wave: Sequence[Job], earlier: Mapping[str, Outcome], configs: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Outcome]:
        todo: list[Job] = []
        outcomes: dict[str, Outcome] = {}
        for job in wave:
            run_dir = self.directory / job.name
            lacking = [a for a in job.after if a in earlier and earlier[a].state.status != FINISHED]
            if lacking:
                state = State(MISSING, f"not started: {earlier[lacking[0]].job.label} did not finish")
            else:
                try:
                    state = state_of(run_dir, configs[job.name])  # what it reads is there now and counts by its hash
                except KdError as error:  # one job does not stop the others
                    state = State(FAILED, str(error))
                else:
                    todo += [job] if state.status not in (*DONE, RUNNING) else []
                    inputs.read_by(configs[job.name])  # once for all jobs: they are forked with what is known
            outcomes[job.name] = Outcome(job, run_dir, state)
        if todo:
            self._launch(todo)
        return outcomes | {job.name: self._ended(job) for job in todo}

    def _launch(self, jobs: Sequence[Job]) -> None:
        launcher: Any = self.launcher
        if hasattr(launcher, "total"):
            launcher.total = self.total
        first, self.begun = self.begun, self.begun + len(jobs)
        try:
            ends = launcher.launch([[*job.overrides, *self._place(job)] for job in jobs], initial_job_idx=first)
        except KdError:
            raise
        except Exception as error:  # other launchers raise when one of many jobs is lost; the records tell which
            ends = [error] * len(jobs)
        for job, end in zip(jobs, ends or (), strict=False):
            if isinstance(end, Exception):
                reason = str(end).strip().splitlines()[-1] if str(end) else type(end).__name__
                self._ensure_record(job, f"the launcher says: {reason}")

    def _ended(self, job: Job) -> Outcome:
        run_dir = self.directory / job.name
        missing = state_of(run_dir).status == MISSING
        try:
            self._ensure_record(job, "the launcher did not run it" if missing else "it stopped without a record")
        except MachineFailure as error:  # there is no room for a record
            return Outcome(job, run_dir, State(FAILED, str(error)))
        return Outcome(job, run_dir, state_of(run_dir))

    def _ensure_record(self, job: Job, reason: str) -> None:
        """Write a record for a job without an end. What was begun is interrupted, to go on; what still runs stays."""
        run_dir = self.directory / job.name
        there = state_of(run_dir).status
        if there != RUNNING:
            ensure_record(run_dir, job.overrides, FAILED if there == MISSING else INTERRUPTED, reason)


def waves(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Order the jobs by their needs; those of one list do not need each other. ``KdError`` for a circle."""
    here = {job.name: job for job in jobs}
    order = TopologicalSorter({job.name: [name for name in job.after if name in here] for job in jobs})
    try:
        order.prepare()
    except CycleError as error:
        raise KdError(f"the jobs wait for one another: {', '.join(error.args[1][:-1])}") from None
    position = {name: number for number, name in enumerate(here)}
    while order.is_active():
        ready = sorted(order.get_ready(), key=position.__getitem__)
        order.done(*ready)
        yield [here[name] for name in ready]


def _joined(directory: Path, plan: Manifest) -> Manifest:
    """Add what the directory's manifest lists already to the plan. ``KdError`` when they do not fit."""
    if not (directory / manifest.FILE).exists():
        # the lock and a temporary file are all that a sweep leaves that was killed at once
        if directory.is_dir() and any(not f.name.startswith((LOCK, ".")) for f in directory.iterdir()):
            raise KdError(f"{directory} is not empty and not the directory of a sweep: choose another hydra.sweep.dir")
        return plan
    there = manifest.read(directory)
    if (there.kind, there.name) != (plan.kind, plan.name):
        raise KdError(
            f"{directory} belongs to the {there.kind} {there.name}, not to the {plan.kind} {plan.name}: choose another "
            "hydra.sweep.dir"
        )
    if there.folder and there.folder != plan.folder and load.is_other_study(Path(there.folder), Path(plan.folder)):
        raise KdError(
            f"{directory} belongs to the study in {there.folder}, not to the one in {plan.folder}: choose another "
            "hydra.sweep.dir, or another name for the folder"
        )
    return replace(there, jobs={**there.jobs, **plan.jobs}, folder=plan.folder)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a sweep, which falls with the process."""
    with ExitStack() as stack:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.held(directory / LOCK))
        except BlockingIOError:
            raise KdError(f"{directory} is in use: another process runs this sweep") from None
        except OSError as error:
            raise KdError(f"the sweep's directory cannot be written: {error.filename}: {error.strerror}") from None
        yield
