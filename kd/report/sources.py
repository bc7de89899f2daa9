"""What a report is made of: a study, a sweep or any runs, found by what the user names. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kd.errors import KdError
from kd.records import manifest, record, sources
from kd.report import gather, sweep_summary, vocabulary
from kd.report.frame import FINISHED, RESULTS, finished, of_study, read_results
from kd.report.validation import by_validation, order
from kd.studies import load
from kd.studies.study import STUDY, Study


@dataclass(frozen=True)
class Given:
    """What a report is made of.

    ``study``: or what stands for one; ``runs_dir``: None where the runs are not on the disk; ``out``: where to write;
    ``about``: the paragraphs at the head of the page.
    """

    study: Study
    frame: pd.DataFrame
    runs_dir: Path | None
    out: Path
    about: Sequence[str] = ()


def gathered(targets: Sequence[str]) -> Given:
    """Find what was named: a study, a sweep, runs or folders of runs. ``KdError`` when it is none of these."""
    first = Path(targets[0])
    if len(targets) == 1:
        if (first / STUDY).is_file() or not first.exists():
            try:
                return _of_study(targets[0])
            except load.NoStudy as error:
                raise KdError(f"{error}; nor is there a run or a sweep of that name") from None
        if (first / manifest.FILE).is_file():
            given = manifest.read(first)
            if given.kind == "study":
                there = (Path(given.folder) / STUDY).is_file()  # else it was moved
                return _of_study(given.folder if there else given.name, first)
            return _of_runs(*gather.read_sweep(first), first, first, "Swept", given.objectives)
    found = [run for target in targets for run in _runs(Path(target))]
    base = Path(os.path.commonpath([run.run_dir.resolve() for run in found]))
    base = base.parent if len(found) == 1 else base
    name = first.resolve().name if len(targets) == 1 else f"{len(found)} runs"
    return _of_runs(*gather.study_of(name, found, base), base, Path("report"), "Different between the runs")


def _of_runs(
    study: Study, frame: pd.DataFrame, base: Path, out: Path, differ: str, objectives: Sequence[str] = ()
) -> Given:
    """Order a sweep, or other runs, by validation, and say at the head what they are."""
    study = by_validation(study, frame, objectives)
    about = [*sweep_summary.paragraphs(frame, base, differ), *([order(study, frame)] if len(study.rows) > 1 else [])]
    if other := _other_code(frame, base):
        print(other)
        about.append(other)
    return Given(study, frame, base, out, about)


def _other_code(frame: pd.DataFrame, base: Path) -> str:
    """Say how many of the runs were made by own code that is other code now; "" for none, or where it is not known."""
    checked = [sources.changed(record.read(base / str(run))) for run in finished(frame)["run"].dropna()]
    found = [sentence for sentence in checked if sentence]
    return f"Outdated, {len(found)} of {len(checked)} runs: {found[0]}." if found else ""


def _of_study(name: str, runs_dir: Path | None = None) -> Given:
    study = load.load_study(name)
    vocabulary.check(study)
    directory = runs_dir or Path(os.environ.get("KD_RUNS", "runs")) / f"study_{study.name}"
    file = study.folder / RESULTS
    there = manifest.read(directory).folder if (directory / manifest.FILE).is_file() else ""
    is_of_another = bool(there) and load.is_other_study(Path(there), study.folder)
    if is_of_another:
        print(f"{directory} holds the runs of the study in {there}: they are left out")
    elif any(directory.glob(f"*/seed*/{record.FILE}")):
        frame, kept = of_study(study, directory), None
        lacking = int((frame["status"] != FINISHED).sum())
        if runs_dir is None and lacking and file.is_file():
            kept = read_results(file, study)
        if kept is None or (kept["status"] == FINISHED).sum() <= len(frame) - lacking:
            return Given(study, frame, directory, directory)
        print(f"{lacking} of {len(frame)} runs are not finished in {directory} (their report: kd report {directory})")
        return Given(study, kept, None, directory)
    if not file.is_file():
        of_it = " of it" if is_of_another else ""
        raise KdError(f"{study.name} has no results: no runs{of_it} in {directory}, no {RESULTS} in {study.folder}")
    return Given(study, read_results(file, study), None, directory)


def _runs(target: Path) -> list[gather.Found]:
    """List one run, the jobs of a sweep, or every run below a folder."""
    if (target / manifest.FILE).is_file():
        return gather.of_sweep(target)
    if (target / record.FILE).is_file():
        return [gather.of_run_dir(target)]
    found = sorted(file.parent for file in target.rglob(record.FILE)) if target.is_dir() else []
    if not found:
        raise KdError(f"{target} is not a run, a sweep or a folder of runs: there is no {record.FILE} in it")
    return [gather.of_run_dir(run_dir) for run_dir in found]
