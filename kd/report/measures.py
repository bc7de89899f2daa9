"""Give columns of the frame their words, units and signs. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from kd.errors import KdError, did_you_mean

EPOCHS = {"last": "last epoch", "selected": "val-selected"}
SHARES = {"acc1", "acc5", "agreement", "ece", "error", "gap", "retention"}  # kept as fractions, shown in percent
WHOLE = {"errors", "parameters", "macs", "adapter_parameters"}
LOWER = {"errors", "error", "nll", "ece", "kl", "gap", "loss", "latency_ms", "parameters", "macs", "wall_clock_s"}
WORDS = {
    "acc1": "top-1",
    "acc5": "top-5",
    "nll": "NLL",
    "ece": "ECE",
    "kl": "KL to the teacher",
    "agreement": "agreement",
    "error": "error rate",
    "gap": "train − test top-1",
    "latency_ms": "latency",
    "macs": "multiply-accumulates",
    "wall_clock_s": "training time",
}
UNITS = {"latency_ms": "ms an image", "wall_clock_s": "s", "macs": "MACs"}


@dataclass(frozen=True)
class Measure:
    """A column of the frame: what it is called, how its numbers are written, and which direction is better.

    ``classes``: the names of the classes, () where they have numbers only.
    """

    column: str
    classes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return its last part, ``acc1``."""
        return self.column.rsplit("/", 1)[-1]

    @property
    def is_share(self) -> bool:
        """Tell whether it is a fraction that is shown in percent."""
        return self.name in SHARES or self.name.startswith("class_")

    @property
    def lower_is_better(self) -> bool:
        """Tell whether it is better low, as ``errors`` and ``nll`` are."""
        return self.name in LOWER

    @property
    def scale(self) -> float:
        """Return the factor from a number of the column to the number shown."""
        return 100.0 if self.is_share else 1.0

    @property
    def unit(self) -> str:
        """Return the unit of a value: ``%``, ``ms an image``, or nothing."""
        return "%" if self.is_share else UNITS.get(self.name, "")

    @property
    def digits(self) -> int:
        """Return the decimals that are shown."""
        if self.name in WHOLE:
            return 1 if self.name == "errors" else 0
        return 2 if self.is_share else 3

    @property
    def title(self) -> str:
        """Return ``test top-1`` in words, without the epoch."""
        first, *middle = self.column.split("/")
        word = WORDS.get(self.name) or self._of_class() or self.name.replace("_", " ")
        middle = ["validation" if part == "val" else part for part in middle]
        if first == "teacher":
            return " ".join(["teacher's", *middle[:-1], word])
        if first == "student":
            return word
        if first in EPOCHS:
            return " ".join([*middle[:-1], word])
        return f"{first}: {word}" if middle else word

    def _of_class(self) -> str:
        if not (found := re.fullmatch(r"class_(\d+)", self.name)):
            return ""
        number = int(found[1])
        name = f" ({self.classes[number]})" if number < len(self.classes) else ""
        return f"accuracy of class {number}{name}"

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
        return "points" if self.is_share else {"errors": "errors"}.get(self.name, UNITS.get(self.name, ""))


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
