"""The end of a run in Weights & Biases: its summary. No torch, so that whoever has the record can write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd.config.composition import flat
from kd.records import record
from kd.tracking import wandb_run

_OPEN: list[Any] = []  # the W&B loggers of this process


def keep_open(loggers: Sequence[Any]) -> None:
    """Remember the W&B loggers among these, for :func:`finish_loggers`."""
    from lightning.pytorch.loggers import WandbLogger  # start-up: torch

    _OPEN.extend(logger for logger in loggers if isinstance(logger, WandbLogger))


def finish_loggers(result: Mapping[str, Any]) -> None:
    """Write the report row of a record as the summary, and close the W&B runs that this process has open.

    Called after the record is on disk, whatever a server does.
    """
    while _OPEN:
        logger = _OPEN.pop()
        run, logger._experiment = logger._experiment, None
        if run is not None:
            failed = result["status"] not in ("finished", "pruned")
            wandb_run.close_run(run, Path(logger.save_dir or "."), report_row(result), exit_code=int(failed))


def report_row(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a run as one flat row, ``student.selected.test.acc1`` …, and its retention; no nulls."""
    row = {
        key: value for key, value in flat(result).items() if value is not None and not isinstance(value, (list, dict))
    }
    row["overrides"] = " ".join(result["overrides"])
    main = (result.get("teacher") or {}).get("compared_by") or record.metrics_of(result)[0]["name"]
    for epoch in ("selected", "last"):
        student, teacher = (row.get(f"{who}.test.{main}") for who in (f"student.{epoch}", "teacher"))
        if student is not None and teacher:
            row[f"retention.{epoch}"] = student / teacher
    return row
