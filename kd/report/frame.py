"""Make the frame of a study: a flat row a run; ``results.csv`` is the same frame in a file. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from kd.errors import KdError
from kd.records import inputs, record, weight_files
from kd.report import override_drift
from kd.report.measures import Measure
from kd.report.run_row import of_run
from kd.studies.study import Study
from kd.tasks.metrics import Metric, described

SCHEMA = 1  # of results.csv
RESULTS = "results.csv"  # in the folder of a study, and beside its runs
FINISHED = "finished"
OUTDATED = "outdated"  # its teacher, or the user's own code that it ran, is another one now
STAMP = ("schema", "study", "reported")  # first columns of results.csv: of which study and epoch
TEXT = (
    *("row", "status", "error", "run", "name", "config_hash", "overrides_hash", "commit", "started", "monitor", "data"),
    *("classes", "added_overrides", "metrics"),
)


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
