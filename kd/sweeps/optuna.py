"""A search by Optuna's ask-and-tell interface: ``hydra/sweeper=optuna``. Killed and started again, it goes on.

Each trial is a run in its own directory. What Optuna knows is in its storage, so that the trials of a killed search
are the same as those of an undisturbed one: the sampler of trial N is seeded by the search's seed and N.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from kd.errors import KdError
from kd.records import inputs, manifest, record, sources, trials
from kd.records.manifest import Job
from kd.records.measures import measured
from kd.records.state import DONE, FAILED, FINISHED, INFEASIBLE, MISSING, PRUNED, State, state_of
from kd.records.trials import job_of
from kd.sweeps import best, search_checks
from kd.sweeps.engine import Engine
from kd.sweeps.job import ensure_record
from kd.sweeps.limits import Candidates
from kd.sweeps.options import Direction, Settings, objectives, reseeded, sampler
from kd.sweeps.outcome import Outcome
from kd.sweeps.refusals import refuse_unbuildable
from kd.sweeps.space import Space, space
from kd.sweeps.table import print_results
from kd.sweeps.terms import Terms

MOST_INFEASIBLE = 50  # trials above a limit after which a search gives up; of many trials, twice as many


def search(engine: Engine, arguments: Sequence[str], settings: Settings) -> list[Outcome]:
    """Run trials until there are ``n_trials``, print the table. ``KdError`` when one has no result."""
    trials.require_optuna()
    parser = OverridesParser.create(config_loader=engine.context.config_loader)
    where = space(parser, [*(f"{k}={v}" for k, v in (settings.params or {}).items()), *arguments])
    where = replace(where, applying=Terms(engine, [where.overrides(params) for params in where.corners()]).applying)
    base = search_checks.try_out(engine, where)
    measures = objectives(settings, base)
    at_once = search_checks.batch(settings.batch, engine, base)
    limited = search_checks.limited(engine, where, settings, base)
    chooses = sampler(settings.sampler, settings.seed, 0)
    url = trials.absolute(settings.storage)
    if url is not None:
        trials.open_storage(engine.directory, url)  # refused before anything is written
    with engine.locked("optuna", engine.directory.name):
        found = Search(engine, where, measures, replace(settings, storage=url), chooses, limited)
        there = manifest.read(engine.directory)
        manifest.write(engine.directory, replace(there, objectives=tuple(measures)))  # what orders the report
        found.run(at_once)
        outcomes = found.outcomes()
        found.print_results(outcomes)
    return outcomes


class Search:
    """A search in its directory, which the caller has locked."""

    def __init__(
        self,
        engine: Engine,
        where: Space,
        objectives: Mapping[str, Direction],
        settings: Settings,
        chooses: Any,
        candidates: Candidates | None = None,
    ) -> None:
        import optuna

        self.candidates = candidates
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
        self.infeasible = {name for t in self.trials() if self._state(name := str(job_of(t))).status == INFEASIBLE}
        if self.trials() and not reseeded(settings.sampler):
            chooses.reseed_rng()  # else it would draw the numbers of the first trials again
        needed = None
        if settings.pruner is not None:
            needed = {"storage": settings.storage, "pruner": settings.pruner, "measure": next(iter(objectives))}
        trials.write_settings(engine.directory, needed)

    def _refuse_another(self) -> None:
        """Raise ``KdError`` when the storage holds another search of this name; else remember what this one is."""
        directory, where = self.engine.directory, self.space
        plan = {"fixed": list(where.fixed), "space": [*where.spelling.values()], "objectives": [*self.objectives]}
        if self.settings.limits:
            plan["limits"] = [f"{name} ≤ {most}" for name, most in self.settings.limits.items()]
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
            if (
                state.status in (FINISHED, PRUNED) and config is None
            ):  # the plan is the same: whether its teacher is, one trial tells
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
            count = len(self._counted())
            if not batch and count < self.settings.n_trials and self._gives_up():
                return
            room = -count % at_once or (0 if batch else at_once)
            batch += [self._ask() for _ in range(min(room, self.settings.n_trials - count))]
            if not batch:
                return
            self._run(batch)

    def _state(self, name: str) -> State:
        return state_of(self.engine.directory / name)

    def _counted(self) -> list[Any]:
        """List the trials that are, or will be, trained."""
        return [t for t in self.trials() if job_of(t) not in self.infeasible]

    def _gives_up(self) -> bool:
        """Tell whether so many trials were above a limit that more are of no use. ``KdError`` where all were."""
        above = len(self.trials()) - len(self._counted())
        if self.candidates is None or above < max(MOST_INFEASIBLE, 2 * self.settings.n_trials):
            return False
        if not self._counted():
            raise self.candidates.none()
        print(f"{above} trials were above a limit: no further ones are drawn", flush=True)
        return True

    def _ask(self) -> Any:
        """Ask for a trial and give it a directory: its own, or that of an earlier trial of the same values."""
        earlier = self.trials()
        if reseeded(self.settings.sampler):
            self.study.sampler = sampler(self.settings.sampler, self.settings.seed, len(earlier))
        trial = self.study.ask(fixed_distributions=dict(self.space.axes))
        if job_of(trial) is None:
            own = self.space.overrides(trial.params)  # without the keys of a term that is not chosen
            same = [job_of(t) for t in earlier if self.space.overrides(t.params) == own]
            trial.set_user_attr("job", same[0] if same else self._above(own) or f"trial-{len(earlier):04d}")
        return trial

    def _above(self, overrides: tuple[str, ...]) -> str | None:
        """Return the trial that stands for the network of these overrides, where it is above a limit."""
        if self.candidates is None:
            return None
        try:
            return self.candidates.job(self.engine.compose(Job("trial", "trial", overrides)))
        except KdError:  # said when it is to run
            return None

    def _run(self, batch: Iterable[Any]) -> None:
        """Run the trials, each directory once, and tell Optuna."""
        settled = {job_of(t) for t in self.trials() if t.state.is_finished()}
        jobs: dict[str, Job] = {}
        configs: dict[str, dict[str, Any]] = {}
        for trial in batch:
            name = str(job_of(trial))
            if name in settled or name in jobs:
                continue
            job = Job(name, self.space.label(trial.params), self.space.overrides(trial.params))
            try:  # each axis alone was tried out; together they may still not fit
                configs[name] = self.engine.compose(job)
                refuse_unbuildable({name: configs[name]}, self.engine.directory)
                jobs[name] = job
            except KdError as error:
                self._refused(job, str(error))
        for name, reason in (self.candidates.above({n: configs[n] for n in jobs}) if self.candidates else {}).items():
            self._refused(jobs.pop(name), reason, INFEASIBLE)
            self.infeasible.add(name)
        part = (sum(t.state.is_finished() for t in self._counted()), self.settings.n_trials)
        if jobs:
            self.engine.run("optuna", self.engine.directory.name, list(jobs.values()), part=part)
        local = hasattr(self.engine.launcher, "total")  # it has a line for each job when that ends
        for trial in batch:
            if self.candidates is not None and job_of(trial) in jobs:
                self._keep(str(job_of(trial)), self.candidates.of(configs[str(job_of(trial))]))
            again = job_of(trial) in settled and job_of(trial) in self.infeasible
            self._tell(trial, silent=again or (local and job_of(trial) in jobs))

    def _keep(self, name: str, measured: Mapping[str, Any]) -> None:
        """Write what was measured of the network of a finished run into its record: objectives read it there."""
        there = self._state(name)
        if there.status == FINISHED and there.record is not None:
            student = {**measured, **there.record["student"]}
            record.write(self.engine.directory / name, {**there.record, "student": student})

    def _refused(self, job: Job, error: str, status: str = FAILED) -> None:
        directory = self.engine.directory
        there = manifest.read(directory)
        manifest.write(directory, replace(there, jobs={**there.jobs, job.name: job}))
        ensure_record(directory / job.name, job.overrides, status, error)

    def _tell(self, trial: Any, silent: bool) -> None:
        there = state_of(self.engine.directory / str(job_of(trial)))
        state = self._judged(there)
        values: dict[str, Any] = {}
        if state.status == FINISHED:
            values = {name: measured(state.record, name) for name in self.objectives}
            self.study.tell(trial.number, list(values.values()))
        else:
            worse = state.status in (PRUNED, INFEASIBLE)  # that it was drawn tells the sampler something
            self.study.tell(trial.number, state=self.states.PRUNED if worse else self.states.FAIL)
        count = sum(t.state.is_finished() for t in self._counted())
        if not silent or state is not there:  # it trained to its end, but has no number
            label, total = self.space.label(trial.params), self.settings.n_trials
            print(f"  {count:>{len(str(total))}}/{total}  {label}: {best.shown(values) or _why(state)}", flush=True)

    def outcomes(self) -> list[Outcome]:
        """Return each run of the search once."""
        found: dict[str, Outcome] = {}
        for trial in self.trials():
            name = str(job_of(trial))
            job = Job(name, self.space.label(trial.params), self.space.overrides(trial.params))
            state = state_of(self.engine.directory / name)
            found.setdefault(name, Outcome(job, self.engine.directory / name, self._judged(state)))
        return list(found.values())

    def _judged(self, state: State) -> State:
        """Turn a run that trained to its end without a number for each objective into a failed one."""
        lacking = [n for n in self.objectives if state.status == FINISHED and measured(state.record, n) is None]
        return State(FAILED, f"it has no finite {lacking[0]}", state.record) if lacking else state

    def print_results(self, outcomes: Sequence[Outcome]) -> None:
        """Print the table, what is best, and how to train it again. ``KdError`` when a trial has no result."""
        again = len(self._counted()) - sum(o.state.status != INFEASIBLE for o in outcomes)
        if again:
            print(f"{again} trials drew the values of an earlier one, whose run counts for both")
        try:
            print_results(self.engine.directory, outcomes, self.objectives)
        finally:
            complete = [t for t in self.trials() if t.state == self.states.COMPLETE]
            best.show(self.study, complete, [*self.objectives], {o.job.name: o for o in outcomes})
            if self.candidates is not None:
                best.recommend(self.engine.directory, complete, [*self.objectives])


def _why(state: State) -> str:
    return f"{state.status}: {state.reason}" if state.status == INFEASIBLE else state.status
