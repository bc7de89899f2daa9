"""The study behind ``kd study``: which runs it needs, in which order, and what is written once they have ended."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from kd.errors import KdError, did_you_mean
from kd.records import record
from kd.records.manifest import Job
from kd.records.state import FINISHED, same_run, state_of
from kd.report import power, vocabulary
from kd.report.console import print_report
from kd.report.frame import RESULTS, check_protocol, finished, of_study, read_results, write_results
from kd.report.report import Report, build
from kd.studies import load, references
from kd.studies.study import Row, Study
from kd.sweeps import estimate, evaluations
from kd.sweeps.engine import Engine
from kd.sweeps.outcome import Outcome
from kd.sweeps.refusals import advice, refuse_unwritable
from kd.tracking.wandb_report import log_report


def sweep(
    engine: Engine, name: str, only: Sequence[str], seeds: Sequence[int] | None, dry_run: bool, arguments: Sequence[str]
) -> list[Outcome]:
    """Run what is missing of a study, evaluate, write ``results.csv`` and the report. ``KdError`` if a job failed.

    ``only``: rows (or patterns, ``w300_*``), together with the runs that they read; ``seeds``: instead of the
    study's; ``arguments``: overrides for every job, they win over the study's.
    """
    _refuse_swept(arguments)
    study = load.load_study(name, seeds)
    vocabulary.check(study)
    jobs = plan(study, engine.directory, only, seeds, arguments)
    kept = study.folder / RESULTS
    own_study = load.load_study(name)  # with its own seeds: what the design can show does not hang on a part of them
    # results of another protocol: not found out after hours
    designs = power.designs(own_study, read_results(kept, own_study) if kept.is_file() else None)
    refuse_unwritable(engine.directory)
    evaluations.check(study, engine, jobs)
    if dry_run:
        power.show(own_study, designs)
        estimate.show(engine, study, jobs)
    power.refuse_blind(own_study, designs)
    if dry_run:
        return []
    refuse_mixed(study, engine, jobs, arguments)
    is_own = seeds is None and not load.is_only_shipped(study.folder)
    is_own = is_own and _same_experiments(study, engine, jobs, arguments)
    with ExitStack() as held:
        count = f"{len(jobs)} run{'' if len(jobs) == 1 else 's'}"
        opening, folder = f"study {study.name}: {count}", str(study.folder.resolve())
        outcomes = engine.run("study", study.name, jobs, opening, held, folder)
        problems = evaluations.complete(study, [o for o in outcomes if o.state.status == FINISHED], engine.launcher)
        try:
            complete = not problems and all(o.state.status == FINISHED for o in outcomes)
            _write_results(study, engine, outcomes, kept if is_own and complete else None)
        except KdError as error:
            if not problems:
                raise
            problems.append(str(error))
    failed = [f"{o.job.label}: {o.state.status}: {o.state.reason}" for o in outcomes if o.state.status != FINISHED]
    if failed:
        kept_back = any(line.endswith("hydra.sweep.dir") for line in failed)  # a run must be removed first
        again = "" if kept_back else " (the same command again runs what is missing)"
        problems = [f"{len(failed)} of {len(outcomes)} jobs have no result{again}:", *failed, *problems]
    if problems:
        raise KdError("\n".join(problems))
    return outcomes


def refuse_mixed(study: Study, engine: Engine, jobs: Sequence[Job], arguments: Sequence[str]) -> None:
    """Raise ``KdError`` if the report would mix in runs that were made otherwise: of rows that are not planned now."""
    planned = {job.name for job in jobs}
    hashes: dict[str, str] = {}  # of a row, the same for all its seeds
    for job in plan(study, engine.directory, (), None, arguments):
        row, run_dir = job.name.partition("/")[0], engine.directory / job.name
        if job.name in planned or (state := state_of(run_dir)).status != FINISHED or state.record is None:
            continue
        if hashes.get(row) != state.record.get("config_hash"):
            config = engine.compose_all([job], "study")[job.name]
            try:
                state_of(run_dir, config)
            except KdError as error:
                raise KdError(advice(str(error))) from None
            hashes[row] = record.config_hash(config)


def _same_experiments(study: Study, engine: Engine, jobs: Sequence[Job], arguments: Sequence[str]) -> bool:
    """Tell whether the arguments leave every row what it is: another launcher or logger, no other recipe or split."""
    if not arguments:
        return True
    plain = {job.name: job for job in plan(study, engine.directory, (), None, ())}
    firsts: dict[str, Job] = {}
    for job in jobs:
        firsts.setdefault(job.name.partition("/")[0], job)
    here = engine.compose_all(list(firsts.values()), "study")
    return all(same_run(config, engine.compose(plain[name])) for name, config in here.items())


def plan(
    study: Study, directory: Path, only: Sequence[str], seeds: Sequence[int] | None, arguments: Sequence[str]
) -> list[Job]:
    """Return a job for each run that is wanted or read by one that is. ``KdError`` for a row that does not exist."""
    wanted = [(row, seed) for row in _chosen(study, only) for seed in row.seeds if seeds is None or seed in seeds]
    jobs: dict[str, Job] = {}

    def add(row: Row, seed: int) -> str:
        name = f"{row.name}/seed{seed}"
        if name not in jobs:
            after = dict.fromkeys(
                add(study.rows[other], number) for other, number in references.runs_read(study, row, seed)
            )
            own = references.resolve_overrides(
                study, row, seed, directory
            )  # after seed=: a row's own seed=10{seed} wins
            overrides = [f"seed={seed}", *own, *arguments, f"name={row.name}"]
            jobs[name] = Job(name, f"{row.name} seed={seed}", tuple(overrides), tuple(after))
        return name

    for row, seed in wanted:
        add(row, seed)
    if not jobs:
        raise KdError(f"{study.folder}: no row has the seeds {', '.join(map(str, seeds or ()))}")
    return list(jobs.values())


def _chosen(study: Study, only: Sequence[str]) -> list[Row]:
    if not only:
        return list(study.rows.values())
    names = []
    for pattern in only:
        found = fnmatch.filter(study.rows, pattern)
        if not found:
            rows = ", ".join(study.rows)
            raise KdError(
                f"--only {pattern}: {study.folder} has no such row{did_you_mean(pattern, study.rows)}; rows: {rows}"
            )
        names += found
    return [study.rows[name] for name in dict.fromkeys(names)]


def _refuse_swept(arguments: Sequence[str]) -> None:
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        key = override.get_key_element()
        if override.is_sweep_override():
            raise KdError(f"{override.input_line}: a study lists its rows itself, nothing is swept beside them")
        if key in ("seed", "name"):
            raise KdError(f"{override.input_line}: the study sets {key} (other seeds: --seeds)")


# ---------------------------------------------------------------------- what comes out


def _write_results(study: Study, engine: Engine, outcomes: Sequence[Outcome], kept: Path | None) -> None:
    """Write ``results.csv`` and the report, of all runs that are there.

    ``kept``: the results in the study's own folder, written once nothing is missing; None when these runs are of other
    seeds or another recipe, or the folder is the installed package's.
    """
    frame = of_study(study, engine.directory)
    if not finished(frame).empty:
        check_protocol(frame)
        write_results(engine.directory / RESULTS, study, frame)
        report = build(study, frame, engine.directory, engine.directory, _left_out(study, engine.directory))
        print_report(study, report)
        print(engine.directory / RESULTS)
        missing = int((frame["status"] != FINISHED).sum())
        if kept is not None and missing:
            print(f"{missing} of {len(frame)} runs of the study are missing: {kept} stays as it is")
        elif kept is not None:
            write_results(kept, study, frame)
            print(kept)
        _to_wandb(study, engine, report, outcomes)


def _left_out(study: Study, directory: Path) -> list[str]:
    """Write a sentence on finished runs of the study's own seeds that ``--seeds`` keeps out of the report."""
    own, here = load.load_study(study.folder), {(row.name, seed) for row in study.rows.values() for seed in row.seeds}
    every = [(name, seed) for name, row in own.rows.items() for seed in row.seeds if (name, seed) not in here]
    others = [pair for pair in every if _finished(directory / pair[0] / f"seed{pair[1]}")]
    if not others:
        return []
    sentence = f"Seeds {', '.join(map(str, study.seeds))} only, as asked (--seeds)"
    print(sentence := f"{sentence}: {len(others)} finished runs of other seeds are left out.")
    return [sentence]


def _finished(run_dir: Path) -> bool:
    try:
        return state_of(run_dir).status == FINISHED
    except KdError:  # a record that cannot be read
        return False


def _to_wandb(study: Study, engine: Engine, report: Report, outcomes: Sequence[Outcome]) -> None:
    """Send the report as a W&B run, when the runs log there."""
    settings = _wandb(outcomes)
    if settings is None:
        return
    log_report(engine.directory, study.name, report.table, report.figures, settings)


def _wandb(outcomes: Sequence[Outcome]) -> Mapping[str, Any] | None:
    for outcome in outcomes:
        if outcome.state.status == FINISHED:
            found = record.read_config(outcome.run_dir)["logger"].get("wandb")
            if found is not None:
                return dict(found)
    return None
