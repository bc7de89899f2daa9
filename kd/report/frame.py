"""Read run directories as flat rows of a frame; ``results.csv`` is the same frame in a file. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kd.errors import KdError
from kd.records import inputs, record, weight_files
from kd.report import override_drift
from kd.report.measures import EPOCHS, Measure
from kd.studies.study import Study
from kd.tasks.metrics import Metric, described, retention

SCHEMA = 1  # of results.csv
RESULTS = "results.csv"  # in the folder of a study, and beside its runs
FINISHED = "finished"
OUTDATED = "outdated"  # its teacher, or the user's own code that it ran, is another one now
NOT_FINITE = "not finite"  # its predictions hold NaN or infinity: they would spoil every mean
CLASSES = 20  # accuracies of single classes are kept up to so many
STAMP = ("schema", "study", "reported")  # first columns of results.csv: of which study and epoch
TEXT = (
    *("row", "status", "error", "run", "name", "config_hash", "overrides_hash", "commit", "started", "monitor", "data"),
    *("classes", "added_overrides", "metrics"),
)


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
            found["status"] in ("failed", "interrupted") and "config_hash" not in found
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


def _called(names: Sequence[str]) -> str | None:
    """Join the names of up to 20 classes, ``|`` between them; None where they are numbers."""
    if len(names) > CLASSES or all(name in (str(i), f"class {i}") for i, name in enumerate(names)):
        return None
    return "|".join(name.replace("|", "/") for name in names)


def _student(found: Mapping[str, Any], main: Metric, rows: int | None) -> dict[str, Any]:
    student = found.get("student", {})
    numbers: dict[str, Any] = {f"student/{key}": value for key, value in student.items() if key not in EPOCHS}
    for epoch in EPOCHS:
        if epoch not in student:
            continue
        part = student[epoch]
        numbers[f"{epoch}/epoch"] = part["epoch"]
        for split in ("train", "val", "test"):
            numbers |= {f"{epoch}/{split}/{metric}": value for metric, value in part.get(split, {}).items()}
        numbers |= _classes(f"{epoch}/test", part)
        numbers |= _wrong(f"{epoch}/test", part["test"], main, rows)
        kept = retention(part["test"].get(main.name), found.get("teacher", {}).get("test", {}).get(main.name))
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


# ---------------------------------------------------------------------- a study's runs


def of_study(study: Study, runs_dir: Path) -> pd.DataFrame:
    """Read the runs of a study's rows and seeds below its directory ``ROW/seedN``; missing ones have a line as well."""
    rows = []
    for name, row in study.rows.items():
        for seed in row.seeds or study.seeds:
            run_dir = runs_dir / name / f"seed{seed}"
            if (run_dir / record.FILE).is_file():
                line = {
                    **of_run(run_dir, name, runs_dir),
                    "seed": seed,
                    **override_drift.columns_of(study, row, seed, run_dir),
                }
                rows.append(line | (_outdated(run_dir, runs_dir) if line["status"] == FINISHED else {}))
            else:
                rows.append({"row": name, "seed": seed, "status": "missing"})
    return table(rows)


def _outdated(run_dir: Path, runs_dir: Path) -> dict[str, str]:
    """Return the status of a run whose weights read, or own code, have changed since: it does not count.

    A study may have been moved: what a run has read of it is searched beside the run.
    """
    found = record.read(run_dir)
    if not any(map(found.get, inputs.KEYS)) or not (run_dir / record.CONFIG).is_file():
        return {}
    config = record.read_config(run_dir)
    beside: dict[str, Any] = {}
    for role in ("student", "teacher"):
        given = [Path(path) for path in weight_files.paths(config[role]["checkpoint"])]
        moved = [runs_dir / path.parent.name / path.name for path in given]
        there = [str(m if (m / record.FILE).is_file() else path) for m, path in zip(moved, given, strict=True)]
        beside[role] = {"checkpoint": there, "epoch": config[role].get("epoch")}
    other = inputs.changed(found, beside)
    return {"status": OUTDATED, "error": f"{other}: remove this run, `kd study` trains it anew"} if other else {}


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Make a frame of rows: text columns as text or None, all others as numbers or NaN, ``row, seed, status …`` first.

    Six decimals are kept, those of ``results.csv``: a report from there is the report of the runs to the last digit.
    """
    frame = pd.DataFrame(rows)
    for column in TEXT:
        frame[column] = frame[column].astype(object) if column in frame else None
    for column in frame.columns:
        if is_text(column):
            frame[column] = frame[column].astype(object).where(frame[column].notna(), None)
        else:
            frame[column] = pd.to_numeric(frame[column]).round(6)
    frame["seed"] = frame["seed"].astype(int)
    first = ["row", "seed", "status", "error", "run"]
    return frame[first + [c for c in frame.columns if c not in first]]


def is_text(column: str) -> bool:
    """Tell whether a column holds text: the others hold numbers."""
    return column in TEXT or column in ("study", "reported") or column.startswith("version/")


def finished(frame: pd.DataFrame) -> pd.DataFrame:
    """Select the rows whose runs are finished."""
    return frame[frame["status"] == FINISHED]


def values(frame: pd.DataFrame, row: str, column: str) -> pd.Series:
    """Return one number a finished seed of a row, indexed by seed; runs without that number are left out."""
    found = finished(frame)
    return found[found["row"] == row].set_index("seed")[column].dropna().astype(float).sort_index()


def measure_of(frame: pd.DataFrame, column: str) -> Measure:
    """Return a column as a measure that calls the classes by their names, where all runs have the same."""
    (called,) = names if len(names := set(finished(frame)["classes"])) == 1 else (None,)
    return Measure(column, tuple(called.split("|")) if called else (), metrics_of(frame))


def metrics_of(frame: pd.DataFrame) -> tuple[Metric, ...]:
    """Return the metrics that the task of the runs describes, the main one first."""
    given = [text for text in finished(frame)["metrics"] if isinstance(text, str)] if "metrics" in frame else []
    return described(json.loads(given[0]) if given else None)


def check_protocol(frame: pd.DataFrame) -> None:
    """Refuse a row whose seeds were trained by different protocols: their mean would be of nothing."""
    for name, part in finished(frame).groupby("row", sort=False):
        for column, key in (("monitor", "protocol.monitor"), ("epochs", "recipe.epochs")):
            found = sorted(set(part[column]))
            if len(found) > 1:
                given = " and ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in found)
                raise KdError(f"row {name}: its runs are of different protocols ({key} = {given})")


# ---------------------------------------------------------------------- results.csv


def write_results(file: Path, study: Study, frame: pd.DataFrame) -> None:
    """Write ``results.csv`` in one step: the stamp of the study, then the frame."""
    stamped = frame.drop(columns=[c for c in STAMP if c in frame]).copy()
    for position, value in enumerate((SCHEMA, study.name, study.epoch)):
        stamped.insert(position, STAMP[position], value)
    numbers = [c for c in stamped if not is_text(str(c))]
    stamped[numbers] = stamped[numbers].astype(float).convert_dtypes()  # 67, not 67.0
    record.write_text(file, stamped.to_csv(index=False, lineterminator="\n"))


def read_results(file: Path, study: Study) -> pd.DataFrame:
    """Read the frame of a ``results.csv``. ``KdError`` when it is of another study, protocol or a newer version."""
    try:
        text = pd.read_csv(file, dtype=str, keep_default_na=False, na_values=[""])
        schema, name, epoch = (text[c].iloc[0] for c in STAMP)
        newer = int(schema) > SCHEMA
    except (OSError, ValueError, KeyError, IndexError):  # pandas' own errors are ValueErrors
        raise KdError(f"{file} cannot be read: it is not a results file of kd") from None
    if newer:
        raise KdError(f"{file} was written by a newer version of kd (schema {schema}, known: {SCHEMA})")
    if name != study.name:
        raise KdError(f"{file} holds the results of the study {name}, not of {study.name}")
    if epoch != study.epoch:
        raise KdError(f"{file} is of another protocol: it reports the {epoch} epoch, the study the {study.epoch} one")
    unknown = sorted(set(text["row"]) - set(study.rows))
    if unknown:
        raise KdError(f"{file} is of another protocol: the study has no row {', '.join(unknown)}")
    try:
        return table(text.drop(columns=list(STAMP)).to_dict("records"))
    except (KeyError, ValueError):
        raise KdError(f"{file} cannot be read: it is not a results file of kd") from None
