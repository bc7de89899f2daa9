"""``kd report STUDY|RUNS…``: tables, figures and a page of a study, a sweep, any runs, or a decision. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kd.cli import decide
from kd.errors import KdError
from kd.records import manifest
from kd.report.console import print_report
from kd.report.frame import RESULTS
from kd.report.report import build
from kd.report.sources import gathered

DECISION = "--decision"

USAGE = """kd report STUDY|RUNS... [out=DIR]

Tables, intervals and figures of runs: report.html (one file, opens offline), report.md and figures/.

  kd report hinton_mnist           a study of experiments/, by name or folder: the claim, its verdict, the published
                                   numbers; from its runs (runs/study_NAME), else from its results.csv
  kd report runs/sweep_HASH        a sweep: what differs between its jobs, best validation first; or a study that ran
                                   in that directory
  kd report runs/a runs/b          runs, or folders of runs; the same experiment with several seeds is one row

  kd report --decision RUN|FILE.csv [KEY=VALUE ...]
                                   can the student replace its teacher, as one page: kd decide … page=FILE.html, which
                                   has the other keys (page: decision.html of the run, or beside the file)

  out=DIR    where it goes (default: runs/study_NAME of a study, the sweep's own directory, ./report of other runs)"""


def main(argv: Sequence[str]) -> int:
    """Find out what was given, build the report, print the table and where everything is."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    if DECISION in argv:
        return decide.main(_decision([a for a in argv if a != DECISION]))
    targets, out = _parsed(argv)
    given = gathered(targets)
    study, runs_dir = given.study, given.runs_dir
    print(f"from {runs_dir or study.folder / RESULTS}")
    print_report(study, build(study, given.frame, runs_dir, out or given.out, given.about))
    return 0


def _decision(given: list[str]) -> list[str]:
    """Complete the arguments of ``kd decide`` by the page, where they do not name it."""
    subject = next((a for a in given if "=" not in a), None)
    if subject is None:
        raise KdError("kd report --decision needs the directory of a run, or a file with the answers of both networks")
    if (Path(subject) / manifest.FILE).is_file():
        raise KdError(f"{subject} is a sweep, and --decision takes one run: the directory of a job in it")
    folder = Path(subject) if Path(subject).is_dir() else Path(subject).parent
    named = any(a.startswith("page=") for a in given)
    return given if named else [*given, f"page={folder / 'decision.html'}"]


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
