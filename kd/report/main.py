"""Run ``kd report STUDY|RUNS…``: tables, figures and a page of a study, a sweep, or any runs. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kd import manifest, record, sources
from kd.errors import KdError
from kd.report import gather, sweep_summary, tables, vocabulary
from kd.report.frame import FINISHED, RESULTS, finished, of_study, read_results
from kd.report.report import Report, build
from kd.report.validation import by_validation, order
from kd.studies import load
from kd.studies.study import STUDY, Study

COLUMNS = 5  # of the table that the terminal shows
USAGE = """kd report STUDY|RUNS... [out=DIR]

Tables, intervals and figures of runs: report.html (one file, opens offline), report.md and figures/.

  kd report hinton_mnist           a study of experiments/, by name or folder: the claim, its verdict, the published
                                   numbers; from its runs (runs/study_NAME), else from its results.csv
  kd report runs/sweep_HASH        a sweep: what differs between its jobs, best validation first; or a study that ran
                                   in that directory
  kd report runs/a runs/b          runs, or folders of runs; the same experiment with several seeds is one row

  out=DIR    where it goes (default: runs/study_NAME of a study, the sweep's own directory, ./report of other runs)"""


def main(argv: Sequence[str]) -> int:
    """Find the runs that were given, build the report, print the table and where everything is."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    targets, out = _parsed(argv)
    given = _gathered(targets)
    study, frame, runs_dir = given.study, given.frame, given.runs_dir
    print(f"from {runs_dir or study.folder / RESULTS}")
    print_report(study, build(study, frame, runs_dir, out or given.out, given.about))
    return 0


def _parsed(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    targets = [a for a in argv if not a.startswith("out=")]
    for argument in targets:
        if argument.startswith("-") or ("=" in argument and not Path(argument).exists()):
            raise KdError(f"{argument} is not understood: kd report takes STUDY or RUNS..., and out=DIR")
    if not targets:
        raise KdError("kd report needs the name of a study, or directories of runs")
    outs = [a.partition("=")[2] for a in argv if a.startswith("out=")]
    if outs and (not outs[-1] or (Path(outs[-1]).exists() and not Path(outs[-1]).is_dir())):
        raise KdError(f"out = {outs[-1]} is not a directory")
    return targets, Path(outs[-1]) if outs else None


@dataclass(frozen=True)
class Given:
    """Bundle the study (or what stands for one), its frame, the runs' directory, where to write, and the head."""

    study: Study
    frame: pd.DataFrame
    runs_dir: Path | None
    out: Path
    about: Sequence[str] = ()


def _gathered(targets: Sequence[str]) -> Given:
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
    """Gather a sweep, or other runs: ordered by validation, with a head that says what they are."""
    study = by_validation(study, frame, objectives)
    about = [*sweep_summary.paragraphs(frame, base, differ), *([order(study, frame)] if len(study.rows) > 1 else [])]
    if other := _other_code(frame, base):
        print(other)
        about.append(other)
    return Given(study, frame, base, out, about)


def _other_code(frame: pd.DataFrame, base: Path) -> str:
    """Say how many of the runs were made by own code that is other code now; "" for none, or where it is not known."""
    sentences = [sources.changed(record.read(base / str(run))) for run in finished(frame)["run"].dropna()]
    found = [sentence for sentence in sentences if sentence]
    return f"Outdated, {len(found)} of {len(sentences)} runs: {found[0]}." if found else ""


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


def print_report(study: Study, report: Report) -> None:
    """Print the first columns of the table, the verdict with its conditions, and where the pages are."""
    from kd.report.console import print_table

    grid = tables.main_grid(study, report.table, report.shown)
    some = slice(0, COLUMNS)  # the page has all
    print_table(study.question or study.name, grid.head[some], [row[some] for row in grid.rows])
    if report.verdict.conditions:
        print(f"The claim: {study.claim}\n{report.verdict.headline}:")
        for judged in report.verdict.conditions:
            print(f"  {judged.text}")
    for note in report.notes:
        print(note)
    for path in report.paths.values():
        print(path)
