"""``kd demo``: three claims of Hinton, Vinyals & Dean (2015) on scikit-learn's digits, offline, in about two minutes.

Every run goes through the same presets, build and trainer as ``kd train``; the arms below are override lists.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kd.config.compose import checked
from kd.errors import KdError
from kd.records import record
from kd.records.state import FAILED, FINISHED
from kd.records.weight_files import LAST
from kd.report.console import Row, Table
from kd.run.evaluate import evaluate, run_config
from kd.run.train import train
from kd.sweeps.evaluations import best_bias
from kd.sweeps.job import ensure_record
from kd.sweeps.local import death
from kd.sweeps.pool import forked, preload

SEEDS = 5
UNSEEN = 3  # the class that the transfer set lacks
USAGE = """kd demo [out=DIR] [seeds=N] [jobs=N]

Trains teachers, students alone and distilled students on handwritten digits (offline, CPU) and prints one table for
each of three claims of Hinton 2015: soft targets with 3 % of the labels, a class never seen, invariance transferred.

  out=DIR    where the runs and figures go (default: runs/demo_DATE)
  seeds=N    repetitions, each with its own split, teacher and students (default: 5; at least 2 for an interval)
  jobs=N     runs at once (default: the number of cores, at most 4)"""


@dataclass(frozen=True)
class Arm:
    """One row of a table: a preset and what is changed in it. ``{teacher}`` stands for the teacher's run directory."""

    name: str
    label: str
    overrides: tuple[str, ...]


FEW = ("data.label_fraction=0.03", "data.keep_unlabelled=false", "recipe.epochs=400")
SOFT = ("experiment=digits_kd", "teacher.checkpoint={teacher}", "protocol.keep_predictions=true")
HARD = ("experiment=digits_alone", "protocol.keep_predictions=true")
TEACHER = Arm("teacher", "teacher", ("experiment=digits_teacher",))
ARMS = (
    Arm("few_hard", "hard labels, 3 % of the images", (*HARD, *FEW)),
    Arm("few_soft", "soft targets, the same images", (*SOFT, *FEW)),
    Arm("few_transfer", "soft targets, unlabelled rest as well", (*SOFT, "data.label_fraction=0.03")),
    Arm("unseen_hard", f"hard labels, no {UNSEEN}s", (*HARD, f"data.drop_classes=[{UNSEEN}]")),
    Arm("unseen_soft", f"soft targets, no {UNSEEN}s", (*SOFT, f"data.drop_classes=[{UNSEEN}]", "loss.ce.weight=0")),
    Arm("full_hard", "hard labels", HARD),
    Arm("full_soft", "soft targets", SOFT),
)


def main(argv: Sequence[str]) -> int:
    """Run everything, print the three tables."""
    if any(a in ("-h", "--help") for a in argv):
        print(USAGE)
        return 0
    out, seeds, jobs = _parsed(argv)
    start = time.perf_counter()
    print(f"{seeds} seeds × (1 teacher + {len(ARMS)} students) on {jobs} cores → {out}", flush=True)
    run_all(out, seeds, jobs)
    tables = [few_labels(out, seeds), unseen_class(out, seeds), invariance(out, seeds)]
    for table in tables:
        table.show(out)
    print(
        f"{seeds * (1 + len(ARMS))} runs in {time.perf_counter() - start:.0f} s; each is a directory in {out.resolve()}"
    )
    return 0


def _parsed(argv: Sequence[str]) -> tuple[Path, int, int]:
    given = {"out": f"runs/demo_{datetime.now():%Y-%m-%d_%H-%M-%S}", "seeds": str(SEEDS), "jobs": ""}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or key not in given:
            raise KdError(f"{argument} is not understood: kd demo takes {', '.join(f'{k}=…' for k in given)}")
        given[key] = value
    jobs = given["jobs"] or str(min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))
    for key, value, least in (("seeds", given["seeds"], 2), ("jobs", jobs, 1)):
        if not value.isdigit() or int(value) < least:
            raise KdError(f"{key} = {value} is not allowed: it must be a whole number, {least} or more")
    out = Path(given["out"])
    if out.exists() and any(out.iterdir()):
        raise KdError(f"out = {out} is not empty: give a new directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KdError(f"out = {out} cannot be written: {error.strerror}") from None
    return out, int(given["seeds"]), int(jobs)


# ---------------------------------------------------------------------- the runs


def directory(out: Path, arm: str, seed: int) -> Path:
    """Return the run directory of one arm and seed."""
    return out / arm / f"seed{seed}"


def run_all(out: Path, seeds: int, jobs: int) -> None:
    """Teachers first, then every student; each run in a process forked from this one, which has imported everything."""
    preload()
    waves = [[(TEACHER, seed) for seed in range(seeds)], [(arm, seed) for arm in ARMS for seed in range(seeds)]]
    total = sum(len(wave) for wave in waves)
    done = 0
    for wave in waves:
        for position, code in forked([partial(_run_one, arm, seed, out) for arm, seed in wave], jobs):
            arm, seed = wave[position]
            run_dir = directory(out, arm.name, seed)
            if code:
                ensure_record(run_dir, (), *death(code))
            result, done = record.read(run_dir), done + 1
            if result["status"] != FINISHED:
                raise KdError(f"{arm.name} seed {seed}: {result['error']} (see {run_dir / 'train.log'})")
            line = f"test top-1 {result['student']['last']['test']['acc1']:.1%} ({result['wall_clock_s']:.1f} s)"
            print(f"  {done:>2}/{total}  {arm.name} seed {seed}: {line}", flush=True)


def _run_one(arm: Arm, seed: int, out: Path, slot: int) -> None:
    run_dir = directory(out, arm.name, seed)
    teacher = str(directory(out, "teacher", seed))
    overrides = [o.format(teacher=teacher) for o in arm.overrides]
    # each repetition has its own split; the teacher and the students of a seed share it. One validation, at the end:
    # the selected epoch is the last, so that every figure of a table is of the same weights
    overrides.append("protocol.val_every=${recipe.epochs}")
    overrides += [
        f"seed={seed}",
        f"data.split_seed={seed}",
        "hardware=cpu",
        "hardware.threads=1",
        f"name=demo_{arm.name}",
    ]
    try:
        run_dir.mkdir(parents=True)
        with contextlib.redirect_stdout(io.StringIO()):  # the run's own log has it
            train(checked(overrides), run_dir, overrides)
    except Exception as error:
        ensure_record(run_dir, overrides, FAILED, str(error) or type(error).__name__)


# ---------------------------------------------------------------------- the three claims


def column(out: Path, arm: str, seeds: int, *keys: str) -> np.ndarray:
    """Return one number of each seed's record, in percent: ``keys`` lead to it."""
    values = []
    for seed in range(seeds):
        part: Any = record.read(directory(out, arm, seed))
        for key in keys:
            part = part[int(key)] if isinstance(part, list) else part[key]
        values.append(100 * part)
    return np.array(values)


def few_labels(out: Path, seeds: int) -> Table:
    """Claim 1: soft targets carry the teacher's generalisation even when few images have labels."""
    arms = [TEACHER, Arm("full_hard", "hard labels, all images", ()), *(a for a in ARMS if a.name.startswith("few"))]
    rows = [
        Row(
            arm.label,
            {
                "test top-1 %": column(out, arm.name, seeds, "student", "last", "test", "acc1"),
                "train top-1 %": column(out, arm.name, seeds, "student", "last", "train", "acc1"),
            },
        )
        for arm in arms
    ]
    return Table(
        key="few_labels",
        title="1  Soft targets with 3 % of the labels",
        rows=rows,
        compare=(3, 2),
        measure="test top-1 %",
        published="speech, 3 % of the data: 44.5 → 57.0 % frame accuracy, 58.9 with all of it (Hinton 2015, Table 5)",
    )


def unseen_class(out: Path, seeds: int) -> Table:
    """Claim 2: soft targets teach a class that no training image shows; one bias, set on val, shows more of it."""
    rows = []
    for name, label in (("unseen_hard", f"hard labels, no {UNSEEN}s"), ("unseen_soft", f"soft targets, no {UNSEEN}s")):
        fixed = [bias_fixed(directory(out, name, seed)) for seed in range(seeds)]
        seen = column(out, name, seeds, "student", "last", "test_per_class", str(UNSEEN))
        total = column(out, name, seeds, "student", "last", "test", "acc1")
        rows.append(Row(label, {f"{UNSEEN}s right %": seen, "all classes %": total}))
        values = {f"{UNSEEN}s right %": [f[0] for f in fixed], "all classes %": [f[1] for f in fixed]}
        rows.append(Row(f"{label}, bias set on val", {k: 100 * np.array(v) for k, v in values.items()}))
    return Table(
        key="unseen_class",
        title=f"2  A class never seen (no {UNSEEN} in the transfer set)",
        rows=rows,
        compare=(2, 0),
        measure=f"{UNSEEN}s right %",
        published="MNIST without 3s: 86.8 % of the 3s right, 98.6 % after the bias fix (set on test); errors 206 → 109",
    )


def bias_fixed(run_dir: Path) -> tuple[float, float]:
    """Accuracy on the unseen class and on all, after adding the bias to its logit that is best on validation."""
    val, test = (np.load(run_dir / f"predictions_{split}.npz") for split in ("val", "test"))
    logits = test["logits"].copy()
    logits[:, UNSEEN] += best_bias(val["logits"], val["target"], [UNSEEN])
    right = logits.argmax(1) == test["target"]
    return float(right[test["target"] == UNSEEN].mean()), float(right.mean())


def invariance(out: Path, seeds: int) -> Table:
    """Claim 3: what the teacher learnt from moved images reaches a student that never saw one."""
    rows = []
    for name, label in (("teacher", "teacher"), ("full_hard", "hard labels"), ("full_soft", "soft targets")):
        moved = []
        for seed in range(seeds):
            run_dir = directory(out, name, seed)
            found = evaluate(run_config(run_dir, ["data.test_shift=1"]), weights_file=run_dir / LAST)
            moved.append(100 * found["metrics"]["acc1"])
        clean = column(out, name, seeds, "student", "last", "test", "acc1")
        rows.append(Row(label, {"moved by 1 px %": np.array(moved), "test top-1 %": clean}))
    return Table(
        key="invariance",
        title="3  Invariance transferred (only the teacher saw moved images)",
        rows=rows,
        compare=(2, 1),
        measure="moved by 1 px %",
        published="MNIST errors: teacher (jittered) 67, hard labels 146, soft targets 74 (Hinton 2015, section 3)",
    )
