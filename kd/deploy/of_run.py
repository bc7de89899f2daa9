"""Read the examples of a run: the answers of its student and its teacher on validation and test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kd.deploy import samples
from kd.deploy.examples import Examples, check
from kd.errors import KdError
from kd.records import record
from kd.records.weight_files import SELECTED
from kd.run.evaluate import evaluate, run_config

WORSE = 0.005  # of the teacher's accuracy beside that in its own run, which is said


def examples_of_run(run: str) -> tuple[Examples, Examples]:
    """Return the examples of validation and of test, with the probabilities of both networks, and test's texts.

    The student's answers are read where the run kept them (``protocol.keep_predictions``), else it is measured, as the
    teacher is. ``KdError`` for runs of another task than classification, and where the teacher cannot be had.
    """
    config = run_config(run)
    if not any(config["teacher"].get(key) for key in ("model", "checkpoint", "answers")):
        raise KdError(f"run = {run} has no teacher: there is nothing that its student could replace")
    val, test = (_of_split(run, config, split) for split in ("val", "test"))
    test = replace(test, note=_own_run_of_teacher(config, test))
    texts = samples.texts(run, "test")
    if not texts:
        return val, test
    return val, replace(test, text=np.asarray([texts[int(row) - 1] for row in test.rows], dtype=object))


def _own_run_of_teacher(config: dict[str, Any], test: Examples) -> str:
    """Say so where the teacher was better in its own run, on as many samples: with larger images, for one."""
    where = config["teacher"].get("checkpoint")
    if not isinstance(where, str) or not (Path(where) / record.FILE).is_file():
        return ""
    found = record.read(where)
    which = config["teacher"].get("epoch") or "selected"
    own = ((found.get("student") or {}).get(which) or {}).get("test", {}).get("acc1")
    here = float(test.right("teacher").mean())
    if own is None or found["data"]["sizes"]["test"] != len(test) or own < here + WORSE:
        return ""
    return (
        f"the teacher is right on {own:.1%} of the test samples in its own run, {where}, and on {here:.1%} of them as "
        "the student's run shows them to it (teacher.resize, data.image_size): the student is compared with the latter"
    )


def _of_split(run: str, config: dict[str, Any], split: str) -> Examples:
    teacher, names = _measured(config, "teacher", split, None, run)
    student = _kept(run, split)
    if student is None:
        weights = Path(run) / SELECTED
        if not weights.is_file():
            raise KdError(f"run = {run} holds no {SELECTED}: it ended before its first validation, or is running")
        student, _ = _measured(config, "student", split, weights, run)
    if not np.array_equal(student["index"], teacher["index"]) or not np.array_equal(
        student["target"], teacher["target"]
    ):
        raise KdError(f"run = {run}: student and teacher answer other samples of {split}, they cannot be compared")
    widths = student["logits"].shape[1], teacher["logits"].shape[1]
    if widths != (len(names), len(names)):
        raise KdError(
            f"run = {run}: student and teacher answer {widths[0]} and {widths[1]} classes, the data has {len(names)}"
        )
    classes = np.asarray(names, dtype=object)
    probabilities = {"student": _softmax(student["logits"]), "teacher": _softmax(teacher["logits"])}
    answers = {who: classes[found.argmax(1)] for who, found in probabilities.items()}
    confidence = {who: found.max(1) for who, found in probabilities.items()}
    examples = Examples(
        f"run = {run}, {split}",
        **answers,
        label=classes[student["target"]],
        rows=student["index"] + 1,
        classes=names,
        confidence=confidence,
        probabilities=probabilities,
    )
    if split == "test":
        check(examples)
    return examples


def _kept(run: str, split: str) -> dict[str, np.ndarray] | None:
    """Read what the run kept of its val-selected student, sorted by index; None where it kept nothing."""
    file = Path(run) / record.PREDICTIONS[split]
    if not file.is_file():
        return None
    try:
        with np.load(file) as kept:
            return _sorted({name: kept[name] for name in ("index", "target", "logits")})
    except Exception:  # of a damaged archive numpy and zipfile raise many kinds
        raise KdError(f"{file} cannot be read: it is not what kd writes") from None


def _measured(
    config: dict[str, Any], who: str, split: str, weights: Path | None, run: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Measure a network on a split; return index, target and logits, sorted by index, and the names of the classes."""
    import torch

    kept: dict[str, list[torch.Tensor]] = {}
    found = evaluate(config, who, split, weights, kept, run)
    if not found["per_class"]:
        raise KdError(f"run = {run}: kd decide needs a task of classes, as classification and text_classification are")
    arrays = {
        name: torch.cat(parts).float().numpy() if name == "logits" else torch.cat(parts).numpy()
        for name, parts in kept.items()
    }
    return _sorted(arrays), [str(name) for name in found["per_class"]]


def _sorted(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    order = np.argsort(arrays["index"], kind="stable")
    return {name: values[order] for name, values in arrays.items()}


def _softmax(logits: np.ndarray) -> np.ndarray:
    from scipy.special import softmax

    return softmax(logits.astype(float), axis=1)
