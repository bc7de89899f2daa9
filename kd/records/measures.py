"""Measures of a finished run, by name. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def measured(record: Any, name: str) -> float | None:
    """Read a measure of a finished run's record at its selected epoch; None where it is not a finite number.

    ``val/acc1`` is ``student.selected.val.acc1``; all others are of the student (``latency_ms``) or of the run
    (``wall_clock_s``).
    """
    if name == "wall_clock_s":
        return record["wall_clock_s"]
    split, _, metric = name.rpartition("/")
    return record["student"]["selected"][split].get(metric) if split else record["student"].get(name)


def number(value: float | None) -> str:
    """Write a measure for people."""
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def shown_metric(metric: Mapping[str, Any], value: float) -> str:
    """Write a metric for people: shares in percent, others in their own unit."""
    return f"{100 * value:.2f}" if metric["share"] else f"{value:.4f}"
