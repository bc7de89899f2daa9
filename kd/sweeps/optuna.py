"""A search by Optuna, asked and told: ``hydra/sweeper=optuna``. Killed and started again, it goes on where it was.

Each trial is a run in its own directory. What Optuna knows is in its storage, so that the trials of a killed search
are the same as those of an undisturbed one: the sampler of trial N is seeded by the search's seed and N.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from kd.config import better
from kd.errors import KdError, near
from kd.sweeps import storage
from kd.sweeps.engine import Engine, Outcome, refuse_twins
from kd.sweeps.job import leave_a_record
from kd.sweeps.manifest import Job
from kd.sweeps.space import Space, space
from kd.sweeps.state import FAILED, FINISHED, PRUNED, State, look
from kd.sweeps.storage import job_of
from kd.sweeps.table import conclude, measured

SAMPLERS = {
    "tpe": {"_target_": "optuna.samplers.TPESampler"},
    "random": {"_target_": "optuna.samplers.RandomSampler"},
    "nsga2": {"_target_": "optuna.samplers.NSGAIISampler"},
}
COSTS = ("latency_ms", "parameters", "macs", "wall_clock_s")  # objectives beside val/…: the smaller the better
DIRECTIONS = ("maximize", "minimize")


@dataclass(frozen=True)
class Settings:
    """``hydra.sweeper``: see ``conf/hydra/sweeper/optuna.yaml``."""

    n_trials: Any
    objectives: Any = None
    sampler: Any = "tpe"
    pruner: Any = None
    seed: Any = 0
    batch: Any = None
    storage: Any = None
    params: Mapping[str, str] = field(default_factory=dict)


def search(engine: Engine, arguments: Sequence[str], settings: Settings) -> list[Outcome]:
    """Run trials until there are ``n_trials``, print the table. ``KdError`` when one has no result."""
    storage.installed()
    _check(settings)
    parser = OverridesParser.create(config_loader=engine.context.config_loader)
    where = space(parser, [*(f"{k}={v}" for k, v in settings.params.items()), *arguments])
    base = _try_out(engine, where)
    objectives = _objectives(settings.objectives, base)
    if settings.pruner is not None:
        _check_pruner(settings.pruner, objectives)
    at_once = _batch(settings.batch, engine, base)
    with engine.locked("optuna", engine.directory.name):
        found = Search(engine, where, objectives, settings)
        try:
            found.run(at_once)
        finally:
            outcomes = found.outcomes()
        found.conclude(outcomes)
    return outcomes


class Search:
    """A search in its directory, which the caller has locked."""

    def __init__(self, engine: Engine, where: Space, objectives: Mapping[str, str], settings: Settings) -> None:
        import optuna

        self.engine, self.space, self.objectives, self.settings = engine, where, objectives, settings
        self.states = optuna.trial.TrialState
        url = storage.absolute(settings.storage)
        storage.mend(engine.directory / storage.JOURNAL)
        self.sampler = None if settings.sampler in SAMPLERS else _made(settings.sampler)
        self.study = optuna.create_study(
            study_name=engine.directory.name,
            storage=storage.opened(engine.directory, url),
            sampler=self.sampler,
            directions=list(objectives.values()),
            load_if_exists=True,
        )
        _refuse_another(self.study, engine.directory, {"space": dict(where.spelling), "fixed": list(where.fixed)})
        if self.sampler is not None and self.study.get_trials(deepcopy=False):
            self.sampler.reseed_rng()  # else it would draw the numbers of the first trials again
        told = None
        if settings.pruner is not None:
            told = {"storage": url, "pruner": settings.pruner, "measure": next(iter(objectives))}
        storage.write_settings(engine.directory, told)

    def trials(self) -> list[Any]:
        """The trials that count, a failed one that was tried again only once; not those waiting for their turn."""
        found = [t for t in self.study.get_trials(deepcopy=False) if job_of(t) is not None]
        again = {t.user_attrs.get("retries") for t in found}
        return [t for t in found if t.number not in again and t.state != self.states.WAITING]

    def run(self, at_once: int) -> None:
        """Finish what was interrupted, then what failed in an earlier attempt, then new trials."""
        for trial in self.study.get_trials(deepcopy=False, states=(self.states.RUNNING,)):
            if job_of(trial) is None:  # killed while its values were drawn
                self.study.tell(trial.number, state=self.states.FAIL)
        for trial in self.trials():
            if trial.state == self.states.FAIL:
                self.study.enqueue_trial(trial.params, {"job": job_of(trial), "retries": trial.number})
        while True:
            batch = [t for t in self.trials() if t.state == self.states.RUNNING][:at_once]
            new = min(at_once - len(batch), self.settings.n_trials - len(self.trials()))
            batch += [self._ask() for _ in range(new)]
            if not batch:
                return
            self._run(batch)

    def _ask(self) -> Any:
        """A new trial, which has its directory: one of its own, or that of an earlier trial of the same values."""
        earlier = self.trials()
        if self.sampler is None:
            self.study.sampler = _made(self.settings.sampler, _seed(self.settings.seed, len(earlier)))
        trial = self.study.ask(fixed_distributions=dict(self.space.axes))
        if job_of(trial) is None:
            twins = [job_of(t) for t in earlier if t.params == trial.params]
            trial.set_user_attr("job", twins[0] if twins else f"trial-{len(earlier):04d}")
        return trial

    def _run(self, batch: Iterable[Any]) -> None:
        """Run the trials, each directory once, and tell Optuna."""
        settled = {job_of(t) for t in self.trials() if t.state.is_finished()}
        jobs: dict[str, Job] = {}
        for trial in batch:
            name = str(job_of(trial))
            if name in settled or name in jobs:
                continue
            job = Job(name, self.space.label(trial.params), self.space.overrides(trial.params))
            try:  # each axis alone was tried out; together they may still not fit
                self.engine.compose(job)
                jobs[name] = job
            except KdError as error:
                leave_a_record(self.engine.directory / name, job.overrides, FAILED, str(error))
        if jobs:
            self.engine.run("optuna", self.engine.directory.name, list(jobs.values()))
        for trial in batch:
            self._tell(trial)

    def _tell(self, trial: Any) -> None:
        state = look(self.engine.directory / str(job_of(trial)))
        values = [measured(state.record, name) for name in self.objectives] if state.status == FINISHED else []
        if state.status == PRUNED:
            self.study.tell(trial.number, state=self.states.PRUNED)
        elif values and None not in values:
            self.study.tell(trial.number, values)
        else:
            self.study.tell(trial.number, state=self.states.FAIL)
        count = sum(t.state.is_finished() for t in self.trials())
        shown = "  ".join(f"{n} {v:.4g}" for n, v in zip(self.objectives, values, strict=False) if v is not None)
        label = self.space.label(trial.params)
        print(f"trial {count} of {self.settings.n_trials}  {label}  {shown or state.status}", flush=True)

    def outcomes(self) -> list[Outcome]:
        """Each run of the search once."""
        found: dict[str, Outcome] = {}
        for trial in self.trials():
            name = str(job_of(trial))
            run_dir = self.engine.directory / name
            state = look(run_dir)
            if state.status == FINISHED and trial.state == self.states.FAIL:
                state = State(FAILED, f"{' or '.join(self.objectives)} is not a finite number", state.record)
            job = Job(name, self.space.label(trial.params), self.space.overrides(trial.params))
            found[name] = Outcome(job, run_dir, state)
        return list(found.values())

    def conclude(self, outcomes: Sequence[Outcome]) -> None:
        """The table, what is best, and how to train it again. ``KdError`` when a trial has no result."""
        again = len(self.trials()) - len(outcomes)
        if again:
            print(f"{again} trials had the values of an earlier one: not run again, its result counts for both")
        try:
            conclude(self.engine.directory, outcomes, self.objectives)
        finally:
            self._best({o.job.name: o for o in outcomes})

    def _best(self, outcomes: Mapping[str, Outcome]) -> None:
        import shlex

        complete = [t for t in self.trials() if t.state == self.states.COMPLETE]
        if not complete:
            return
        several = len(self.objectives) > 1
        best = {str(job_of(t)): t for t in (self.study.best_trials if several else [self.study.best_trial])}
        if several:
            print(f"Pareto front: no trial is better in one of {', '.join(self.objectives)} and as good in the others")
        for name, trial in best.items():
            values = "  ".join(f"{n} {v:.4g}" for n, v in zip(self.objectives, trial.values, strict=True))
            command = shlex.join(["kd", "train", *outcomes[name].job.overrides])
            print(f"{'' if several else 'best: '}{name}  {values}\n  {command}", flush=True)


def _check(settings: Settings) -> None:
    """``KdError`` for the first option that is not allowed."""
    for name, least in (("n_trials", 1), ("batch", 1), ("seed", 0)):
        value = getattr(settings, name)
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not whole and not (value is None and name != "n_trials"):
            allowed = f"a whole number, {least} or more" + ("" if name == "n_trials" else ", or null")
            raise KdError(f"hydra.sweeper.{name} = {value} is not allowed: it must be {allowed}")
    for name, known in (("sampler", SAMPLERS), ("pruner", storage.PRUNERS)):
        value = getattr(settings, name)
        named = value in known if isinstance(value, str) else value is None and name == "pruner"
        if not named and not (isinstance(value, Mapping) and "_target_" in value):
            raise KdError(
                f"hydra.sweeper.{name} = {value} is not allowed{near(str(value), known)}: it must be "
                f"{', '.join(known)}{', null' if name == 'pruner' else ''} or a node with _target_: optuna.{name}s.…"
            )


def _check_pruner(node: Any, objectives: Mapping[str, str]) -> None:
    name = next(iter(objectives))
    if len(objectives) > 1 or not name.startswith("val/"):
        raise KdError(
            f"hydra.sweeper.pruner = {node} is not allowed with the objectives {', '.join(objectives)}: a pruner "
            "compares one metric of the validation split"
        )
    storage.pruner(node)


def _objectives(given: Any, base: Mapping[str, Any]) -> dict[str, str]:
    """Measure → direction. ``KdError`` for a measure that the record does not have, or that is of the test split."""
    from kd import build

    names = {base["protocol"]["monitor"]: None} if given is None else given
    if not isinstance(names, Mapping):
        names = dict.fromkeys([names] if isinstance(names, str) else names)
    if not names:
        raise KdError("hydra.sweeper.objectives is empty: name a measure, for example {val/acc1: maximize}")
    task = build.make(base["task"], "task")
    teacher = base["teacher"]["model"] is not None or base["teacher"]["checkpoint"] is not None
    known = [*(f"val/{name}" for name in task.metric_names(teacher)), *COSTS]
    for name, direction in names.items():
        if str(name).startswith("test/"):
            raise KdError(
                f"hydra.sweeper.objectives: {name} is not allowed: what is chosen by the test split cannot be tested "
                f"on it; choose by val/{name.partition('/')[2]}"
            )
        if name not in known:
            raise KdError(
                f"hydra.sweeper.objectives: there is no measure {name}{near(str(name), known)}; measures: "
                f"{', '.join(known)}"
            )
        natural = f"{better(name)}imize" if name.startswith("val/") else "minimize"
        if direction not in (None, natural):
            raise KdError(f"hydra.sweeper.objectives: {name} = {direction} is not allowed: it must be {natural}")
    return {n: f"{better(n)}imize" if n.startswith("val/") else "minimize" for n in names}


def _batch(batch: int | None, engine: Engine, base: Mapping[str, Any]) -> int:
    """How many trials are asked for together: what was given, or as many as the local launcher runs at once."""
    if batch is not None:
        return batch
    launcher = engine.launcher
    if not hasattr(launcher, "at_once"):
        raise KdError("hydra.sweeper.batch has no value: say how many trials this launcher shall run at once")
    return launcher.at_once(base["hardware"]["accelerator"])


def _try_out(engine: Engine, where: Space) -> dict[str, Any]:
    """Compose the ends of every axis, one axis after the other; the first config. ``KdError`` when one cannot work."""
    configs = {}
    for params in where.corners():
        configs[where.label(params)] = engine.compose(Job("trial", where.label(params), where.overrides(params)))
    refuse_twins(configs)
    return next(iter(configs.values()))


def _made(node: Any, seed: int | None = None) -> Any:
    """A sampler by its short name, with this seed, or as the node says."""
    from kd import build

    named = isinstance(node, str)
    return build.make(SAMPLERS[node] if named else node, "hydra.sweeper.sampler", **({"seed": seed} if named else {}))


def _seed(seed: int | None, number: int) -> int | None:
    import numpy as np

    return None if seed is None else int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _refuse_another(study: Any, directory: Path, plan: Mapping[str, Any]) -> None:
    """``KdError`` when the storage holds a search of the same name over something else; else remember the plan."""
    there = study.user_attrs.get("plan")
    if there is None:
        study.set_user_attr("plan", dict(plan))
    elif there != plan:
        old, new = ([*p["fixed"], *p["space"].values()] for p in (there, plan))
        differ = [f"{' '.join(x for x in a if x not in b) or 'less'}" for a, b in ((old, new), (new, old))]
        raise KdError(
            f"{directory} holds a search of another kind ({differ[0]} there, {differ[1]} here): choose another "
            "hydra.sweep.dir"
        )
