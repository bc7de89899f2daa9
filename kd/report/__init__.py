"""Runs and published numbers → tables, figures, one page. No torch."""

from kd.report.report import Report, build

__all__ = ["Report", "build"]
