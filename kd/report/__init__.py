"""Make tables, figures and one page from runs and published numbers. No torch."""

from kd.report.report import Report, build

__all__ = ["Report", "build"]
