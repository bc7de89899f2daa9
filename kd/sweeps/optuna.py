"""A search by Optuna's ask-and-tell interface: ``hydra/sweeper=optuna``. Killed and started again, it goes on.

Each trial is a run in its own directory. What Optuna knows is in its storage, so that the trials of a killed search
are the same as those of an undisturbed one: the sampler of trial N is seeded by the search's seed and N.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from kd.errors import KdError
from kd.records import inputs, manifest, sources, trials
from kd.records.manifest import Job
from kd.records.measures import measured
from kd.records.state import DONE, FAILED, FINISHED, MISSING, PRUNED, State, state_of
from kd.records.trials import job_of
from kd.sweeps.engine import Engine
from kd.sweeps.job import ensure_record
from kd.sweeps.options import Direction, Settings, objectives, reseeded, sampler
from kd.sweeps.outcome import Outcome
from kd.sweeps.refusals import refuse_duplicates, refuse_unbuildable
from kd.sweeps.space import Space, space
from kd.sweeps.table import print_results
from kd.sweeps.terms import Terms


def search(engine: Engine, arguments: Sequence[str], settings: Settings) -> list[Outcome]:
    """Run trials until there are ``n_trials``, print the table. ``KdError`` when one has no result."""
    trials.require_optuna()
    parser = OverridesParser.create(config_loader=engine.context.config_loader)
    where = space(parser, [*(f"{k}={v}" for k, v in (settings.params or {}).items()), *arguments])
    where = replace(where, applying=Terms(engine, [where.overrides(params) for params in where.corners()]).applying)
    base = _try_out(engine, where)
    measures = objectives(settings, base)
    at_once = _batch(settings.batch, engine, base)
    chooses = sampler(settings.sampler, settings.seed, 0)
    url = trials.absolute(settings.storage)
    if url is not None:
        trials.open_storage(engine.directory, url)  # refused before anything is written
    with engine.locked("optuna", engine.directory.name):
        found = Search(engine, where, measures, replace(settings, storage=url), chooses)
        there = manifest.read(engine.directory)
        manifest.write(engine.directory, replace(there, objectives=tuple(measures)))  # what orders the report
        found.run(at_once)
        outcomes = found.outcomes()
        found.print_results(outcomes)
    return outcomes


class Search:
    """A search in its directory, which the caller has locked."""

    def __init__(
        self, engine: Engine, where: Space, objectives: Mapping[str, Direction], settings: Settings, chooses: Any
    ) -> None:
        import optuna

        self.engine, self.space, self.objectives, self.settings = engine, where, objectives, settings
        self.states = optuna.trial.TrialState
        trials.truncate_torn_line(engine.directory / trials.JOURNAL)
        self.study = optuna.create_study(
            study_name=engine.directory.name,
            storage=trials.open_storage(engine.directory, settings.storage),
            sampler=chooses,
            directions=[*objectives.values()],
            load_if_exists=True,
        )
        self._refuse_another()
        if self.trials() and not reseeded(settings.sampler):
            chooses.reseed_rng()  # else it would draw the numbers of the first trials again
        needed = None
        if settings.pruner is not None:
            needed = {"storage": settings.storage, "pruner": settings.pruner, "measure": next(iter(objectives))}
        trials.write_settings(engine.directory, needed)

    def _refuse_another(self) -> None:
        """``KdError`` when the storage holds another search of this name; else remember what this one is."""
        directory, where = self.engine.directory, self.space
        plan = {"fixed": list(where.fixed), "space": [*where.spelling.values()], "objectives": [*self.objectives]}
        there = self.study.user_attrs.get("plan")
        if there is None:
            self.study.set_user_attr("plan", plan)
        elif there != plan:
            old, new = ([word for words in p.values() for word in words] for p in (there, plan))
            differ = [f"{w} only there" for w in old if w not in new] + [f"{w} only here" for w in new if w not in old]
            raise KdError(
                f"{directory} holds another search ({', '.join(differ) or 'in another order'}): choose another "
                "hydra.sweep.dir"
            )
        config = None
        for trial in (t for t in self.trials() if t.state.is_finished()):
            name = str(job_of(trial))
            state = state_of(directory / name)
            other = sources.changed(state.record or {}) if state.status in DONE else ""  # not every trial runs it
            if state.status in DONE and config is None:  # the plan is the same: whether its teacher is, one trial tells
                config = self.engine.compose(Job(name, name, self.space.overrides(trial.params)))
                other = inputs.changed(state.record or {}, config)
            if other:
                raise KdError(f"{directory}: {other}: choose another hydra.sweep.dir")
            if state.status == MISSING:
                raise KdError(
                    f"{self.settings.storage or directory / trials.JOURNAL} knows {name}, but {directory} has no "
                    "such run: choose another hydra.sweep.dir"
                )

    def trials(self) -> list[Any]:
        """List the trials that count, a failed one that was tried again only once; not those waiting for their turn."""
        found = [t for t in self.study.get_trials(deepcopy=False) if job_of(t) is not None]
        again = {t.user_attrs.get("retries") for t in found}
        return [t for t in found if t.number not in again and t.state != self.states.WAITING]

    def run(self, at_once: int) -> None:
        """Finish what was interrupted, then what failed in an earlier attempt, then new trials.

        Trials are chosen ``at_once`` together, always the same ones: an interrupted batch is made full and run before
        the next, so that the sampler knows of no more and no less than it would have known.
        """
        for trial in self.study.get_trials(deepcopy=False, states=(self.states.RUNNING,)):
            if job_of(trial) is None:  # killed while its values were drawn
                self.study.tell(trial.number, state=self.states.FAIL)
        for trial in self.trials():
            state = state_of(self.engine.directory / str(job_of(trial)))
            if trial.state == self.states.FAIL and state.status not in DONE:
                self.study.enqueue_trial(trial.params, {"job": job_of(trial), "retries": trial.number})
        while True:
            batch = [t for t in self.trials() if t.state == self.states.RUNNING]
            count = len(self.trials())
            room = -count % at_once or (0 if batch else at_once)
            batch += [self._ask() for _ in range(min(room, self.settings.n_trials - count))]
            if not batch:
                return
            self._run(batch)

    def _ask(self) -> Any:
        """Ask for a trial and give it a directory: its own, or that of an earlier trial of the same values."""
        earlier = self.trials()
        if reseeded(self.settings.sampler):
            self.study.sampler = sampler(self.settings.sampler, self.settings.seed, len(earlier))
        trial = self.study.ask(fixed_distributions=dict(self.space.axes))
        if job_of(trial) is None:
            own = self.space.overrides(trial.params)  # without the keys of a term that is not chosen
            same = [job_of(t) for t in earlier if self.space.overrides(t.params) == own]
            trial.set_user_attr("job", same[0] if same else f"trial-{len(earlier):04d}")
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
                refuse_unbuildable({name: self.engine.compose(job)}, self.engine.directory)
                jobs[name] = job
            except KdError as error:
                self._refused(job, str(error))
        part = (sum(t.state.is_finished() for t in self.trials()), self.settings.n_trials)
        if jobs:
            self.engine.run("optuna", self.engine.directory.name, list(jobs.values()), part=part)
        local = hasattr(self.engine.launcher, "total")  # it has a line for each job when that ends
        for trial in batch:
            self._tell(trial, silent=local and job_of(trial) in jobs)

    def _refused(self, job: Job, error: str) -> None:
        directory = self.engine.directory
        there = manifest.read(directory)
        manifest.write(directory, replace(there, jobs={**there.jobs, job.name: job}))
        ensure_record(directory / job.name, job.overrides, FAILED, error)

    def _tell(self, trial: Any, silent: bool) -> None:
        there = state_of(self.engine.directory / str(job_of(trial)))
        state = self._judged(there)
        values: dict[str, Any] = {}
        if state.status == FINISHED:
            values = {name: measured(state.record, name) for name in self.objectives}
            self.study.tell(trial.number, list(values.values()))
        else:
            self.study.tell(trial.number, state=self.states.PRUNED if state.status == PRUNED else self.states.FAIL)
        count = sum(t.state.is_finished() for t in self.trials())
        if not silent or state is not there:  # it trained to its end, but has no number
            label, total = self.space.label(trial.params), self.settings.n_trials
            print(f"  {count:>{len(str(total))}}/{total}  {label}: {_shown(values) or state.status}", flush=True)

    def outcomes(self) -> list[Outcome]:
        """Return each run of the search once."""
        found: dict[str, Outcome] = {}
        for trial in self.trials():
            name = str(job_of(trial))
            job = Job(name, self.space.label(trial.params), self.space.overrides(trial.params))
            state = state_of(self.engine.directory / name)
            found[name] = Outcome(job, self.engine.directory / name, self._judged(state))
        return list(found.values())

    def _judged(self, state: State) -> State:
        """Turn a run that trained to its end without a number for each objective into a failed one."""
        lacking = [n for n in self.objectives if state.status == FINISHED and measured(state.record, n) is None]
        return State(FAILED, f"it has no finite {lacking[0]}", state.record) if lacking else state

    def print_results(self, outcomes: Sequence[Outcome]) -> None:
        """Print the table, what is best, and how to train it again. ``KdError`` when a trial has no result."""
        again = len(self.trials()) - len(outcomes)
        if again:
            print(f"{again} trials drew the values of an earlier one, whose run counts for both")
        try:
            print_results(self.engine.directory, outcomes, self.objectives)
        finally:
            self._best({o.job.name: o for o in outcomes})

    def _best(self, outcomes: Mapping[str, Outcome]) -> None:
        complete = [t for t in self.trials() if t.state == self.states.COMPLETE]
        if not complete:
            return
        several = len(self.objectives) > 1
        best = {str(job_of(t)): t for t in (self.study.best_trials if several else [self.study.best_trial])}
        if several:
            print(f"Pareto front: no trial is better in one of {', '.join(self.objectives)} and as good in the others")
        for name, trial in best.items():
            values = _shown(dict(zip(self.objectives, trial.values, strict=True)))
            command = shlex.join(["kd", "train", *outcomes[name].job.overrides])
            print(f"{'' if several else 'best: '}{name}  {values}\n  {command}", flush=True)


def _batch(batch: int | None, engine: Engine, base: Mapping[str, Any]) -> int:
    """Count the trials that are asked for together: what was given, or as many as the local launcher runs at once."""
    if batch is not None:
        return batch
    launcher = engine.launcher
    if not hasattr(launcher, "at_once"):
        raise KdError("hydra.sweeper.batch has no value: say how many trials this launcher shall run at once")
    return launcher.at_once(base["hardware"])


def _try_out(engine: Engine, where: Space) -> dict[str, Any]:
    """Compose the ends of every axis, one axis after the other; the first config. ``KdError`` when one cannot work."""
    configs = {}
    for params in where.corners():
        try:
            configs[where.label(params)] = engine.compose(Job("trial", where.label(params), where.overrides(params)))
        except KdError as error:
            hint = ": write int(interval(…)) for whole numbers" if "converted to Integer" in str(error) else ""
            raise KdError(f"{error}{hint}") from None
    refuse_duplicates(configs)
    refuse_unbuildable(configs, engine.directory)
    return next(iter(configs.values()))


def _shown(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
