"""Give columns of the frame their words, units and signs. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from kd.errors import KdError, did_you_mean
from kd.tasks.metrics import CLASSIFICATION, Metric

EPOCHS = {"last": "last epoch", "selected": "val-selected"}
# numbers that are made of the metrics, and costs: the metrics themselves are described by their task
SHARES = {"error", "gap", "retention"}  # kept as fractions, shown in percent
WHOLE = {"errors", "parameters", "macs", "adapter_parameters"}
LOWER = {"errors", "error", "gap", "loss", "latency_ms", "parameters", "macs", "wall_clock_s"}
LOWER |= {"latency_ratio", "ms", "mb", "peak_mb", "cost_month"}  # of a search with limits
WORDS = {
    "error": "error rate",
    "latency_ms": "latency",
    "macs": "multiply-accumulates",
    "wall_clock_s": "training time",
    "latency_ratio": "time ÷ the teacher's",
    "ms": "time of a pass",
    "mb": "weights",
    "peak_mb": "memory of a pass",
    "cost_month": "cost a month",
}
UNITS = {"latency_ms": "ms a sample", "wall_clock_s": "s", "macs": "MACs", "ms": "ms", "mb": "MB", "peak_mb": "MB"}


@dataclass(frozen=True)
class Measure:
    """A column of the frame: what it is called, how its numbers are written, and which direction is better.

    ``classes``: the names of the classes, () where they have numbers only. ``metrics``: those of the task.
    """

    column: str
    classes: tuple[str, ...] = ()
    metrics: tuple[Metric, ...] = CLASSIFICATION

    @property
    def name(self) -> str:
        """Return its last part, ``acc1``."""
        return self.column.rsplit("/", 1)[-1]

    @property
    def metric(self) -> Metric | None:
        """Return the task's metric of this name, None for what is made of metrics and for costs."""
        return next((metric for metric in self.metrics if metric.name == self.name), None)

    @property
    def is_share(self) -> bool:
        """Tell whether it is a fraction that is shown in percent."""
        if self.metric is not None:
            return self.metric.share
        ratio = self.name == "gap" and not self.metrics[0].share
        return not ratio and (self.name in SHARES or self.name.startswith("class_"))

    @property
    def lower_is_better(self) -> bool:
        """Tell whether it is better low, as ``errors`` are."""
        if self.metric is not None:
            return self.metric.better == "min"
        if self.name == "retention":
            return self.metrics[0].better == "min"
        return self.name in LOWER

    @property
    def scale(self) -> float:
        """Return the factor from a number of the column to the number shown."""
        return 100.0 if self.is_share else 1.0

    @property
    def unit(self) -> str:
        """Return the unit of a value: ``%``, ``ms a sample``, or nothing."""
        if self.metric is not None and not self.metric.share:
            return self.metric.unit
        return "%" if self.is_share else UNITS.get(self.name, "")

    @property
    def digits(self) -> int:
        """Return the decimals that are shown."""
        if self.name in WHOLE:
            return 1 if self.name == "errors" else 0
        if self.metric is not None and not self.metric.share:
            return self.metric.digits
        return 2 if self.is_share else 3

    @property
    def title(self) -> str:
        """Return ``test top-1`` in words, without the epoch."""
        first, *middle = self.column.split("/")
        word = self._word()
        middle = ["validation" if part == "val" else part for part in middle]
        if first == "teacher":
            return " ".join(["teacher's", *middle[:-1], word])
        if first == "student":
            return word
        if first in EPOCHS:
            return " ".join([*middle[:-1], word])
        return f"{first}: {word}" if middle else word

    def _word(self) -> str:
        if self.metric is not None:
            return self.metric.title
        if self.name == "gap":
            return f"train − test {self.metrics[0].title}"
        return WORDS.get(self.name) or self._of_class() or self.name.replace("_", " ")

    def _of_class(self) -> str:
        if not (found := re.fullmatch(r"class_(\d+)", self.name)):
            return ""
        number = int(found[1])
        name = f" ({self.classes[number]})" if number < len(self.classes) else ""
        return f"{self.metrics[0].by_class} of class {number}{name}"

    @property
    def epoch(self) -> str:
        """Return ``last epoch``, ``val-selected``, or nothing."""
        return EPOCHS.get(self.column.split("/")[0], "")

    @property
    def label(self) -> str:
        """Return title and unit, for an axis or the head of a column: ``test top-1, %``."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def show(self, value: float) -> str:
        """Write a value without its unit: ``97.51``."""
        return f"{self.scale * value:,.{self.digits}f}".replace("-", "−")

    def change(self, value: float) -> str:
        """Write a difference of two values, signed: ``+1.20``."""
        text = f"{self.scale * value:+,.{self.digits}f}".replace("-", "−")
        return text if float(text.replace(",", "").replace("−", "-")) else text.lstrip("+−")

    @property
    def change_unit(self) -> str:
        """Return the unit of a difference: points of percent, errors, milliseconds."""
        return "points" if self.is_share else {"errors": "errors"}.get(self.name, self.unit)


def resolve(columns: Iterable[str], measure: str, epoch: str) -> str:
    """Find the column that a study means: itself (``last/test/acc1``), or ``test/acc1`` at the study's epoch.

    ``KdError`` for a measure that no run has.
    """
    known = list(columns)
    for column in (measure, f"{epoch}/{measure}"):
        if column in known:
            return column
    without = {re.sub("^(last|selected)/", "", c) for c in known if "/" in c}
    raise KdError(f"measure = {measure} is not in any run{did_you_mean(measure, without)}")
