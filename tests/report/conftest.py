"""A study whose runs are made up: records, curves and predictions with the structure that ``kd train`` writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd.records import record
from kd.studies.study import Comparison, Condition, Figure, Published, Row, Study

CLASSES, TEST = 10, 1000
SIZES = {"teacher": (85_002, 84_480, 0.045), "student": (3_466, 3_392, 0.028)}


def metrics(accuracy: float, with_teacher: bool) -> dict[str, float]:
    """What one split measures."""
    found = {"acc1": accuracy, "acc5": 1 - (1 - accuracy) / 4, "nll": 3 * (1 - accuracy), "ece": (1 - accuracy) / 3}
    return {**found, "agreement": 0.5 + accuracy / 2, "kl": 1 - accuracy} if with_teacher else found


def write_run(
    run_dir: Path,
    seed: int,
    accuracy: float,
    teacher: float | None = None,
    role: str = "student",
    selected: float | None = None,
    epochs: int = 20,
    predictions: bool = False,
    status: str = "finished",
    **changed: Any,
) -> Path:
    """A run directory. ``accuracy`` of the last epoch on test; ``selected``: of the epoch that val picked."""
    run_dir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    parameters, macs, latency = SIZES[role]
    result: dict[str, Any] = {
        "schema": 1,
        "status": status,
        "error": None if status == "finished" else "the loss is not finite",
        "name": run_dir.parent.name,
        "overrides": [f"seed={seed}", f"name={run_dir.parent.name}"],
        "config_hash": f"{run_dir.parent.name:0<12.12}",
        "commit": "4acf7a75e6d561d876091d3c7ccf5cf3eea29493",
        "project_commit": None,
        "seed": seed,
        "tags": [],
        "protocol": {"monitor": "val/acc1", "mode": "max", "val_every": 1, "keep_predictions": False, "epochs": epochs},
        "started": "2026-11-24T09:02:21+00:00",
        "versions": {"kd": "0.1.0", "torch": "2.14.1", "lightning": "2.6.6", "timm": "1.0.31"},
        "wall_clock_s": 36.0,
        "peak_memory_mb": {"process": 857.9},
    }
    if status == "finished":
        sizes = {"train": 808, "val": 270, "test": TEST, "labelled": 808}
        result["data"] = {"num_classes": CLASSES, "split": {"set": "Digits 4822861089d4"}, "sizes": sizes}
        last, beside = metrics(accuracy, teacher is not None), metrics(selected or accuracy, teacher is not None)
        train = {"loss": 0.1, "ce": 0.1, "acc1": min(1.0, accuracy + 0.02), "acc5": 1.0}
        classes = [accuracy] * CLASSES
        result["student"] = {
            "last": {"epoch": epochs - 1, "train": train, "val": last, "test": last, "test_per_class": classes},
            "selected": {"epoch": epochs - 2, "val": beside, "test": beside, "test_per_class": classes},
            "parameters": parameters,
            "macs": macs,
            "adapter_parameters": 0,
            "latency_ms": latency + 0.001 * rng.random(),
        }
        if teacher is not None:
            t_parameters, t_macs, t_latency = SIZES["teacher"]
            size = {"parameters": t_parameters, "macs": t_macs, "latency_ms": t_latency}
            measured = {"val": metrics(teacher, False), "test": metrics(teacher, False)}
            result["teacher"] = {"checkpoint": "teacher", **measured, "test_per_class": [teacher] * CLASSES, **size}
        write_curves(run_dir, accuracy, epochs, rng)
    if predictions:
        write_predictions(run_dir, selected or accuracy, seed)
    record.write(run_dir, {**result, **changed})
    return run_dir


def write_curves(run_dir: Path, accuracy: float, epochs: int, rng: np.random.Generator) -> None:
    """``metrics.csv``: a training and a validation row an epoch, and the test after the last one."""
    lines = ["epoch,step,test/acc1,train/acc1,val/acc1"]
    for epoch in range(epochs):
        now = accuracy * (1 - 0.8 * np.exp(-5 * (epoch + 1) / epochs)) + 0.004 * rng.normal()
        lines += [f"{epoch},{7 * epoch},,{now + 0.02},", f"{epoch},{7 * epoch},,,{now}"]
    lines.append(f"{epochs},{7 * epochs},{accuracy},,")
    (run_dir / "metrics.csv").write_text("\n".join(lines) + "\n")


def write_predictions(run_dir: Path, accuracy: float, seed: int) -> None:
    """Exactly so many of the test images right; hard images are hard for every run, as in life."""
    target = np.random.default_rng(99).integers(0, CLASSES, TEST)
    hardness = np.random.default_rng(98).random(TEST) + 0.1 * np.random.default_rng(seed).random(TEST)
    wrong = np.argsort(hardness)[round(accuracy * TEST) :]
    answer = target.copy()
    answer[wrong] = (answer[wrong] + 1) % CLASSES
    logits = np.random.default_rng(seed + 7).normal(size=(TEST, CLASSES))
    logits[np.arange(TEST), answer] = 3.5 + 3 * (1 - hardness)
    np.savez_compressed(run_dir / "predictions_test.npz", index=np.arange(TEST), target=target, logits=logits)


@pytest.fixture
def write() -> Callable[..., Path]:
    """``write_run``."""
    return write_run


TEMPERATURES, WIDTHS = (1, 2, 4, 8, 20), (6, 32, 256)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """One teacher, a student alone, one distilled, and a small grid; the claim is that distilling helps."""
    grid = {
        f"w{w}_t{t}": Row(f"w{w}_t{t}", (), f"width {w}, T = {t}", (0, 1), values={"width": w, "temperature": t})
        for w in WIDTHS
        for t in TEMPERATURES
    }
    rows = {
        "teacher": Row("teacher", (), "teacher", (0,)),
        "alone": Row("alone", (), "student alone"),
        "distilled": Row("distilled", (), "soft targets, T = 4", teacher="teacher", alone="alone"),
        "shuffled": Row("shuffled", (), "soft targets of another image", teacher="teacher", alone="alone"),
    }
    comparisons = {
        "helps": Comparison("helps", "distilled", "alone", "test/acc1"),
        "share": Comparison("share", "distilled", "alone", "test/errors", share_of="teacher"),
        "control": Comparison("control", "shuffled", "alone", "test/acc1"),
    }
    numbers = {"teacher": {"test/errors": {"value": 67}}, "alone": {"test/errors": {"value": 146}},
               "distilled": {"test/errors": {"value": 74, "std": 2.5, "n": 3}}}  # fmt: skip
    return Study(
        name="made_up",
        folder=tmp_path / "experiments" / "made_up",
        question="Does a small network learn more from a teacher's soft targets than from the labels?",
        paper="Hinton, Vinyals and Dean (2015), section 3",
        cost="two minutes on 2 cores",
        measure="test/acc1",
        epoch="last",
        rows={**rows, **grid},
        seeds=(0, 1, 2, 3, 4),
        comparisons=comparisons,
        claim="Soft targets close more than half of the gap that the student alone leaves.",
        supported=(Condition("helps", above=0.0), Condition("share", above=0.5)),
        columns=("test/nll",),
        figures=(Figure("map", "test/acc1", "temperature", y="width"),
                 Figure("lines", "test/errors", "temperature", group="width", title="A narrow student wants a low T")),
        published=Published("Hinton 2015, section 3", "MNIST, 10,000 test images", numbers, note="Errors of one run."),
    )  # fmt: skip


@pytest.fixture
def runs(study: Study, tmp_path: Path) -> Path:
    """The runs of ``study``: the claim holds; one run failed, one is missing."""
    folder = tmp_path / "runs" / "study_made_up"
    rng = np.random.default_rng(0)
    write_run(folder / "teacher" / "seed0", 0, 0.975, role="teacher", predictions=True)
    level = {"alone": 0.94, "distilled": 0.967, "shuffled": 0.941}
    for seed in study.seeds:
        luck = 0.004 * rng.normal()
        for name, accuracy in level.items():
            if (name, seed) == ("shuffled", 4):
                continue
            reached = round(accuracy + luck + 0.002 * rng.normal(), 3)
            kept = {"predictions": True, "selected": reached + 0.001, "teacher": None if name == "alone" else 0.975}
            status = "failed" if (name, seed) == ("shuffled", 3) else "finished"
            write_run(folder / name / f"seed{seed}", seed, reached, status=status, **kept)
    for name, row in study.rows.items():
        for seed in row.seeds if row.values else ():
            best = {6: 2, 32: 4, 256: 20}[row.values["width"]]
            distance = abs(np.log2(row.values["temperature"] / best))
            reached = 0.9 + 0.02 * np.log2(row.values["width"]) / 3 - 0.008 * distance + 0.003 * rng.normal()
            write_run(folder / name / f"seed{seed}", seed, round(float(reached), 3), 0.975)
    evaluations = {"moved": {"made": {}, "metrics": {"acc1": 0.5, "nll": 2.0}}}
    (folder / "alone" / "seed0" / "evaluations.json").write_text(json.dumps(evaluations))
    return folder
