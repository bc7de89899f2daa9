"""Read a run directory as a flat row: which run it is, its cost, and its numbers. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.errors import KdError
from kd.records import record
from kd.report.measures import EPOCHS
from kd.tasks.metrics import Metric, described, retention

NOT_FINITE = "not finite"  # its predictions hold NaN or infinity: they would spoil every mean
CLASSES = 20  # accuracies of single classes are kept up to so many


def of_run(run_dir: Path, row: str, base: Path | None = None) -> dict[str, Any]:
    """Read the flat row of one run: which it is, its cost, and its numbers as ``last/test/acc1``, ``student/macs`` …

    ``{last,selected}/test/errors`` counts wrong test images; ``retention`` is student ÷ teacher on test; ``last/gap``
    is training minus test accuracy; ``NAME/metric`` comes from the run's further evaluations. A failed run has
    fewer columns, and a run whose predictions were not finite does not count as finished. ``base``: what the path of
    the run is written relative to.
    """
    found = record.read(run_dir)
    try:
        path = (run_dir.resolve().relative_to(base.resolve()) if base else run_dir).as_posix()
        if (
            found["status"] in ("failed", "interrupted", "infeasible") and "config_hash" not in found
        ):  # a job of a sweep that could not begin
            about = {"seed": seed_of(found["overrides"]), "status": found["status"], "error": found["error"]}
            return {"row": row, **about, "run": path}
        if lacking := _not_finite(found):
            error = f"{lacking} is not finite (null in {record.FILE}): the predictions are no numbers; train it anew"
            return {"row": row, **_about(found), "run": path, "status": NOT_FINITE, "error": error}
        rows = found.get("data", {}).get("sizes", {}).get("test")
        main = described(found.get("metrics"))[0]
        numbers = {**_student(found, main, rows), **_teacher(found), **_evaluations(run_dir, main, rows)}
        return {"row": row, **_about(found), "run": path, **numbers}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise record.broken(run_dir) from None


def _not_finite(found: Mapping[str, Any]) -> str:
    """Name the first metric of student or teacher that is null, as JSON writes NaN and infinity; "" when none is."""
    student, teacher = found.get("student", {}), found.get("teacher", {})
    parts = {**{f"student/{epoch}": student.get(epoch, {}) for epoch in EPOCHS}, "teacher": teacher}
    for name, part in parts.items():
        for split in ("val", "test"):
            bad = [metric for metric, value in part.get(split, {}).items() if value is None]
            if bad:
                return f"{name}/{split}/{bad[0]}"
    return ""


def seed_of(overrides: Sequence[str]) -> int:
    """Find the seed among the overrides of a run that has not begun."""
    given = [o.partition("=")[2] for o in overrides if o.lstrip("+").startswith("seed=")]
    return int(given[-1]) if given and given[-1].lstrip("-").isdigit() else 0


def _about(found: Mapping[str, Any]) -> dict[str, Any]:
    protocol = found["protocol"]
    return {
        "seed": int(found["seed"]),
        "status": found["status"],
        "error": found["error"],
        "name": found["name"],
        "config_hash": found["config_hash"],
        "commit": found["commit"],
        "started": found["started"],
        "wall_clock_s": found.get("wall_clock_s"),
        "peak_memory_mb": max(found.get("peak_memory_mb", {}).values(), default=None),
        "epochs": protocol["epochs"],
        "monitor": f"{protocol['mode']} {protocol['monitor']}",
        "data": _data(found.get("data")),
        "classes": _called((found.get("data") or {}).get("class_names", ())),
        "metrics": json.dumps(found["metrics"]) if found.get("metrics") else None,
        **{f"version/{package}": version for package, version in found["versions"].items()},
    }


def _data(data: Mapping[str, Any] | None) -> str | None:
    if not data:
        return None
    sizes, split = data["sizes"], data.get("split", {})
    few = f" ({sizes['labelled']} labelled)" if sizes.get("labelled", sizes["train"]) != sizes["train"] else ""
    return f"{split.get('set', 'data')}: {sizes['train']}{few}/{sizes['val']}/{sizes['test']} train/val/test"


def rows_of(data: str) -> tuple[int, int] | None:
    """Read the rows of val and test from what :func:`of_run` says of the data."""
    found = re.search(r"/(\d+)/(\d+) train/val/test$", data)
    return (int(found[1]), int(found[2])) if found else None


def _called(names: Sequence[str]) -> str | None:
    """Join the names of up to 20 classes, ``|`` between them; None where they are numbers."""
    if len(names) > CLASSES or all(name in (str(i), f"class {i}") for i, name in enumerate(names)):
        return None
    return "|".join(name.replace("|", "/") for name in names)


def _student(found: Mapping[str, Any], main: Metric, rows: int | None) -> dict[str, Any]:
    student = found.get("student", {})
    plain = {key: value for key, value in student.items() if key not in EPOCHS and not isinstance(value, Mapping)}
    numbers: dict[str, Any] = {f"student/{key}": value for key, value in plain.items()}
    for epoch in EPOCHS:
        if epoch not in student:
            continue
        part = student[epoch]
        numbers[f"{epoch}/epoch"] = part["epoch"]
        for split in ("train", "val", "test"):
            numbers |= {f"{epoch}/{split}/{metric}": value for metric, value in part.get(split, {}).items()}
        numbers |= _classes(f"{epoch}/test", part)
        numbers |= _wrong(f"{epoch}/test", part["test"], main, rows)
        teacher = found.get("teacher", {})
        name = teacher.get("compared_by") or main.name  # of two tokenizers
        kept = retention(part["test"].get(name), teacher.get("test", {}).get(name))
        numbers |= {} if kept is None else {f"{epoch}/retention": kept}
        if main.counted and main.name in part.get("train", {}):  # mixed images have no label to be right about
            numbers[f"{epoch}/gap"] = part["train"][main.name] - part["test"][main.name]
    return numbers


def _teacher(found: Mapping[str, Any]) -> dict[str, Any]:
    teacher = found.get("teacher", {})
    numbers = {f"teacher/{key}": v for key, v in teacher.items() if isinstance(v, (int, float))}
    for split in ("val", "test"):
        numbers |= {f"teacher/{split}/{metric}": value for metric, value in teacher.get(split, {}).items()}
    return numbers | _classes("teacher/test", teacher)


def _classes(prefix: str, part: Mapping[str, Any]) -> dict[str, float]:
    values = part.get("test_per_class", ())
    return {f"{prefix}/class_{i}": value for i, value in enumerate(values)} if len(values) <= CLASSES else {}


def _wrong(prefix: str, metrics: Mapping[str, Any], main: Metric, rows: int | None) -> dict[str, float]:
    if metrics.get(main.name) is None or not main.counted:
        return {}
    error = 1 - metrics[main.name]
    return {f"{prefix}/error": error, **({f"{prefix}/errors": round(error * rows)} if rows else {})}


def _evaluations(run_dir: Path, main: Metric, rows: int | None) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, entry in read_evaluations(run_dir).items():
        metrics = entry["metrics"]
        numbers |= _wrong(name, metrics, main, rows) | {f"{name}/{m}": float(v) for m, v in metrics.items()}
    return numbers


def read_evaluations(run_dir: Path) -> dict[str, Any]:
    """Read ``evaluations.json`` of a run, {} when there is none. ``KdError`` when it cannot be read."""
    file = run_dir / record.EVALUATIONS
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        numbers = [v for entry in content.values() for v in entry["metrics"].values()]
        if all(isinstance(v, (int, float)) and math.isfinite(v) for v in numbers) and all(
            "made" in entry for entry in content.values()
        ):
            return content
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise KdError(f"{file} cannot be read: it is not what kd writes; remove it, `kd study` makes it again")
