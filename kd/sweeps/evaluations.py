"""Further evaluations of the finished runs of a study: other test images, or one bias that validation chooses."""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd.config.hardware import settings
from kd.config.instantiate import make
from kd.errors import KdError
from kd.records import record
from kd.records.manifest import Job
from kd.records.state import FINISHED, state_of
from kd.records.weight_files import LAST, SELECTED
from kd.report.run_row import CLASSES, read_evaluations
from kd.run.evaluate import changed, run_config
from kd.run.evaluate import evaluate as measure
from kd.studies.study import STUDY, Evaluation, Study
from kd.sweeps.engine import Engine
from kd.sweeps.local import Resources, resources
from kd.sweeps.outcome import Outcome
from kd.sweeps.pool import forked, preload, run_in_subprocess
from kd.tasks.metrics import CLASSIFICATION


def complete(study: Study, outcomes: Sequence[Outcome], launcher: Any) -> list[str]:
    """Make the evaluations that finished runs lack, into ``evaluations.json``; a sentence for each run that failed.

    They run on this machine, divided as by the local launcher; each takes one GPU, or the cores of one job. Where the
    jobs ran elsewhere (Slurm, Ray) they run one after another: this may be a login node.
    """
    todo = [(o.run_dir, lacking(study, o)) for o in outcomes]
    todo = [(run_dir, names) for run_dir, names in todo if names]
    if not todo:
        return []
    made_now = dict.fromkeys(evaluation.name for _, names in todo for evaluation in names)
    print(f"evaluations of {len(todo)} {'run' if len(todo) == 1 else 'runs'}: {', '.join(made_now)}", flush=True)
    preload()
    hardware = [{**settings(record.read_config(run_dir)), "devices": 1} for run_dir, _ in todo]
    slots = resources(hardware, getattr(launcher, "n_jobs", 1), getattr(launcher, "jobs_per_gpu", 1))
    calls = [functools.partial(_child, study, run_dir, names, slots) for run_dir, names in todo]
    failed = [todo[position][0] for position, code in forked(calls, len(slots)) if code]
    return [
        f"{run_dir.parent.name}/{run_dir.name} could not be evaluated (see {run_dir / 'train.log'})"
        for run_dir in failed
    ]


def check(study: Study, engine: Engine, jobs: Sequence[Job]) -> None:
    """Raise ``KdError`` for an evaluation that will not work: before the first run, not after the last."""
    if all(state_of(engine.directory / job.name).status == FINISHED for job in jobs):
        return
    firsts: dict[str, Job] = {}
    for job in jobs:
        firsts.setdefault(job.name.partition("/")[0], job)
    configs = engine.compose_all(list(firsts.values()), "study")
    wanted = []
    for evaluation in study.evaluations.values():
        where = f"{study.folder / STUDY}: evaluations: {evaluation.name}"
        for row in firsts if evaluation.rows is None else [row for row in evaluation.rows if row in firsts]:
            try:
                wanted.append((where, changed(configs[firsts[row].name], evaluation.eval), evaluation.bias))
            except KdError as error:
                raise KdError(f"{where} (row {row}): {error}") from None
    if wanted:
        preload()
        run_in_subprocess(functools.partial(_check_data, wanted))


def _check_data(wanted: Sequence[tuple[str, Mapping[str, Any], Sequence[int]]]) -> None:
    for where, config, bias in wanted:
        try:
            data = make(config["data"], "data")
        except KdError as error:
            raise KdError(f"{where}: {error}") from None
        classes = getattr(data, "num_classes", None)  # of some sets not known before their files are read
        if classes and (max(bias, default=0) >= classes or len(set(bias)) == classes):
            raise KdError(
                f"{where}: bias = {list(bias)} is not allowed: some of the classes 0 to {classes - 1}, not all"
            )


def lacking(study: Study, outcome: Outcome) -> list[Evaluation]:
    """Return the evaluations that a run should have and has not, or has as the study defined them before."""
    row = outcome.job.name.partition("/")[0]
    there = read_evaluations(outcome.run_dir)
    wanted = [e for e in study.evaluations.values() if e.rows is None or row in e.rows]
    return [e for e in wanted if there.get(e.name, {}).get("made") != made(study, e)]


def made(study: Study, evaluation: Evaluation) -> dict[str, Any]:
    """Tell how an evaluation is made; kept beside its numbers."""
    return {"epoch": study.epoch, "eval": list(evaluation.eval), "bias": list(evaluation.bias)}


def _child(study: Study, run_dir: Path, wanted: Sequence[Evaluation], slots: Sequence[Resources], slot: int) -> None:
    import torch

    slots[slot].apply()
    torch.set_num_threads(slots[slot].threads)
    try:
        there = read_evaluations(run_dir)
        for evaluation in wanted:
            metrics = evaluate(run_dir, evaluation, study.epoch)
            there[evaluation.name] = {"made": made(study, evaluation), "metrics": metrics}
        record.write_text(run_dir / record.EVALUATIONS, json.dumps(there, indent=2) + "\n")
    except Exception as error:
        with (run_dir / "train.log").open("a", encoding="utf-8") as log:
            log.write("".join(traceback.format_exception(error)))
        print(f"kd: {run_dir}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def evaluate(run_dir: Path, evaluation: Evaluation, epoch: str) -> dict[str, float]:
    """Compute metrics of a run's student (``epoch`` "last" or "selected") on test, under the evaluation's changes.

    With ``bias``: the accuracy, ``class_I`` and the ``bias`` itself, an amount of logits.
    """

    config = run_config(run_dir, evaluation.eval)
    weights = run_dir / (LAST if epoch == "last" else SELECTED)
    kept: dict[str, dict[str, Any]] = {"val": {}, "test": {}}
    found: dict[str, Any] = {}
    for split in kept if evaluation.bias else ("test",):
        found = measure(config, split=split, weights_file=weights, keep=kept[split], run=run_dir)
    if not evaluation.bias:
        return {**found["metrics"], **_classes(list(found["per_class"].values()))}
    val, test = ({k: np.concatenate([t.numpy() for t in v]) for k, v in part.items()} for part in kept.values())
    bias = best_bias(val["logits"], val["target"], evaluation.bias)
    logits = test["logits"].copy()
    logits[:, list(evaluation.bias)] += bias
    right = logits.argmax(1) == test["target"]
    per_class = [float(right[test["target"] == c].mean()) for c in range(logits.shape[1])]
    return {CLASSIFICATION[0].name: float(right.mean()), "bias": bias, **_classes(per_class)}


def _classes(accuracies: list[float]) -> dict[str, float]:
    return {f"class_{i}": a for i, a in enumerate(accuracies)} if len(accuracies) <= CLASSES else {}


def best_bias(logits: np.ndarray, target: np.ndarray, classes: Sequence[int]) -> float:
    """Return the number which, added to the logits of ``classes``, gets most rows right; of equals the middle one.

    ``logits``: (rows, all classes); ``target``: (rows,). Exact: the answer of a row changes once, where the best of
    ``classes`` overtakes the best of the others (the bias fix of Hinton 2015, section 3, which used the test set).
    """
    inside = np.zeros(logits.shape[1], dtype=bool)
    inside[list(classes)] = True
    if inside.all() or not inside.any():
        raise KdError(f"bias = {list(classes)} is not allowed: some of the {logits.shape[1]} classes, not all")
    numbers = np.arange(logits.shape[1])
    ours, others = logits[:, inside], logits[:, ~inside]
    overtakes = others.max(1) - ours.max(1)
    order = np.argsort(overtakes, kind="stable")
    gained = (numbers[inside][ours.argmax(1)] == target)[order]
    lost = (numbers[~inside][others.argmax(1)] == target)[order]
    # right[k]: with a bias between the thresholds k - 1 and k, the first k rows answer with one of ``classes``
    right = np.concatenate([[0], np.cumsum(gained)]) + lost.sum() - np.concatenate([[0], np.cumsum(lost)])
    steps = overtakes[order]
    edges = np.concatenate([[steps[0] - 2], steps, [steps[-1] + 2]])
    right = np.where(edges[:-1] < edges[1:], right, -1)  # no bias lies between two equal thresholds
    best = np.flatnonzero(right == right.max())
    k = int(best[len(best) // 2])
    return float((edges[k] + edges[k + 1]) / 2)
