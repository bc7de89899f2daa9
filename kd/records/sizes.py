"""The size of a run's student and teacher, from its record and the files of their weights. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd.errors import KdError
from kd.records import record, weight_files
from kd.records.weight_files import SELECTED

Pair = tuple[int | None, int | None]  # of student and teacher
PARAMETERS, MACS, BYTES = "parameters", "MACs", "weights file, bytes"


def of_run(run_dir: str | Path) -> dict[str, Pair]:
    """Return parameters, MACs and bytes of the weights file of both; None for what is not known.

    Of several teachers the sums.
    """
    found = record.read(run_dir)
    student, teacher = found.get("student") or {}, found.get("teacher") or {}
    counted = {
        title: (student.get(key), teacher.get(key)) for title, key in ((PARAMETERS, "parameters"), (MACS, "macs"))
    }
    return {**counted, BYTES: (_bytes(Path(run_dir) / SELECTED, None), _of_teachers(run_dir))}


def _bytes(given: Any, epoch: str | None) -> int | None:
    """Return the bytes of a file of weights, None where there is none."""
    try:
        return weight_files.locate(given, epoch).stat().st_size
    except (KdError, OSError):
        return None


def _of_teachers(run_dir: str | Path) -> int | None:
    """Add up the files of all teachers; None where one is no longer there."""
    if not (Path(run_dir) / record.CONFIG).is_file():
        return None
    section = record.read_config(run_dir)["teacher"]
    found = [_bytes(path, section.get("epoch")) for path in weight_files.paths(section["checkpoint"])]
    return sum(filter(None, found)) if found and all(found) else None
