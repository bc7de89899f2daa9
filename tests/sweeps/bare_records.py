"""Records with nothing in them but how a run ended."""

from __future__ import annotations

from pathlib import Path

from kd.records import record


def write(run_dir: Path, status: str, **changed: object) -> None:
    """A record with nothing but its status."""
    run_dir.mkdir(parents=True, exist_ok=True)
    error = None if status == "finished" else "too bad"
    record.write(run_dir, {"schema": record.SCHEMA, "status": status, "error": error, **changed})
