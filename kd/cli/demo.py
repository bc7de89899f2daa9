"""``kd demo``: runs the study of ``experiments/demo`` and prints a table for each of its three claims.

They are of Hinton, Vinyals & Dean (2015), on scikit-learn's digits, offline, in a few minutes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kd.cli.study import run_study
from kd.errors import KdError
from kd.parallel.devices import cores
from kd.records import manifest
from kd.report import figures, style
from kd.report.claims import compare_one
from kd.report.console import print_table
from kd.report.frame import of_study, values
from kd.report.measures import resolve
from kd.studies import load

STUDY = load.SHIPPED / "demo"
USAGE = """kd demo [out=DIR] [seeds=N] [jobs=N]

Trains teachers, students alone and distilled students on handwritten digits (offline, CPU) and prints one table for
each of three claims of Hinton 2015: soft targets with 3 % of the labels, a class never seen, invariance transferred.
It is the study demo, which comes with kd: the same command again goes on where it stopped.

  out=DIR    where the runs, the report and the figures go (default: runs/study_demo)
  seeds=N    repetitions, each with its own split, teacher and students (default: 5; at least 2 for an interval)
  jobs=N     runs at once (default: the number of cores)"""


@dataclass(frozen=True)
class Claim:
    """One table, of rows of the study; each has its measure for every column.

    ``comparison``: that of the study, in the measure of the first column.
    """

    comparison: str
    title: str
    columns: tuple[str, ...]
    lines: Sequence[tuple[str, tuple[str, ...]]]
    published: str


FEW, MOVED = ("test/acc1", "train/acc1"), ("moved/acc1", "test/acc1")
UNSEEN, FIXED = ("test/class_3", "test/acc1"), ("bias3/class_3", "bias3/acc1")
CLAIMS = (
    Claim(
        comparison="few labels",
        title="1  Soft targets with 3 % of the labels",
        columns=("test top-1 %", "train top-1 %"),
        lines=[(row, FEW) for row in ("teacher", "full_hard", "few_hard", "few_soft", "few_transfer")],
        published="speech, 3 % of the data: 44.5 → 57.0 % frame accuracy, 58.9 with all of it (Hinton 2015, Table 5)",
    ),
    Claim(
        comparison="unseen class",
        title="2  A class never seen (no 3 in the transfer set)",
        columns=("3s right %", "all classes %"),
        lines=[(row, measures) for row in ("unseen_hard", "unseen_soft") for measures in (UNSEEN, FIXED)],
        published="MNIST without 3s: 86.8 % of the 3s right, 98.6 % after the bias fix (set on test); errors 206 → 109",
    ),
    Claim(
        comparison="moved images",
        title="3  Invariance transferred (only the teacher saw moved images)",
        columns=("moved by 1 px %", "test top-1 %"),
        lines=[(row, MOVED) for row in ("teacher", "full_hard", "full_soft")],
        published="MNIST errors: teacher (jittered) 67, hard labels 146, soft targets 74 (Hinton 2015, section 3)",
    ),
)


def main(argv: Sequence[str]) -> int:
    """Run what is missing of the study, print the three tables."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    out, seeds, jobs = _parsed(argv)
    start = time.perf_counter()
    place = str(out.resolve()).replace("'", r"\'")
    overrides = [f"hydra.sweep.dir='{place}'", f"hydra.launcher.n_jobs={jobs}"]
    if code := run_study(str(STUDY), overrides, seeds=range(seeds)):
        return code
    runs = _show(out, seeds)
    print(f"{runs} runs, {time.perf_counter() - start:.0f} s; each is a directory in {out.resolve()}")
    return 0


def _parsed(argv: Sequence[str]) -> tuple[Path, int, str]:
    given = {"out": str(Path(os.environ.get("KD_RUNS", "runs"), "study_demo")), "seeds": "5", "jobs": "auto"}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or key not in given:
            raise KdError(f"{argument} is not understood: kd demo takes {', '.join(f'{k}=…' for k in given)}")
        given[key] = value
    if not given["seeds"].isdecimal() or int(given["seeds"]) < 2:
        raise KdError(f"seeds = {given['seeds']} is not allowed: it must be a whole number, 2 or more")
    if given["jobs"] != "auto" and not (given["jobs"].isdecimal() and 1 <= int(given["jobs"]) <= cores()):
        raise KdError(f"jobs = {given['jobs']} is not allowed: it must be a whole number, 1 to {cores()} (the cores)")
    out = Path(given["out"])
    if out.is_dir() and any(out.iterdir()) and not (out / manifest.FILE).exists():
        raise KdError(f"out = {out} is not empty and holds no demo: give a new directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KdError(f"out = {out} cannot be written: {error.strerror}") from None
    return out, int(given["seeds"]), given["jobs"]


def _show(out: Path, seeds: int) -> int:
    """Print each table with the difference, the published number and the place of its figure; returns the runs."""
    study = load.load_study(STUDY, range(seeds))
    frame = of_study(study, out)
    for claim in CLAIMS:
        compared = study.comparisons[claim.comparison]
        rows, bars = [], []
        for row, measures in claim.lines:
            label = study.rows[row].label + (", bias set on val" if measures is FIXED else "")
            found = [100 * values(frame, row, resolve(frame.columns, m, study.epoch)).to_numpy() for m in measures]
            rows.append([label, *(f"{v.mean():.1f} ± {v.std(ddof=1):.1f}" for v in found)])
            is_better = (row, measures[0]) == (compared.row, compared.measure)
            bars.append(figures.Bar(label, found[0], style.STUDENT if is_better else style.ALONE))
        print_table(f"{claim.title} (mean ± std, {seeds} seeds)", ["", *claim.columns], rows, width=100)
        print(compare_one(study, frame, compared, None).sentence)
        print(f"published: {claim.published}")
        drawn = figures.bars(bars, claim.title, f"{claim.columns[0]}   (dots: seeds)")
        assert drawn is not None, "a table has rows"
        file = style.save(drawn, out / f"{claim.comparison.replace(' ', '_')}.png")
        print(f"figure:    {file.resolve()}", flush=True)
    return len(frame)
