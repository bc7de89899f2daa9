"""How a metric is called, written and compared: the descriptions that stand in ``result.json``. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """One number of a split: ``name`` (``acc1``, logged as ``val/acc1``) and how people read it.

    ``title``: in tables. ``better``: which direction is. ``share``: whether it lies in 0 to 1 and is shown in percent;
    ``unit`` and ``digits`` behind the point otherwise. ``beside_teacher``: whether it compares with a teacher's output,
    so that a network alone does not have it. ``counted``: whether 1 minus it is the share of wrong rows, so that errors
    can be counted. ``by_class``: what the main metric of a single class is called. ``hub``: its name in Hugging Face's
    library of metrics, "" where that is ``name``.
    """

    name: str
    title: str
    better: Literal["max", "min"] = "max"
    share: bool = False
    unit: str = ""
    digits: int = 3
    beside_teacher: bool = False
    counted: bool = False
    by_class: str = "accuracy"
    hub: str = ""

    def describe(self) -> dict[str, Any]:
        """Return the description that is written into ``result.json``."""
        return asdict(self)


def described(given: Iterable[Mapping[str, Any]] | None) -> tuple[Metric, ...]:
    """Read the descriptions of a record. Those of classification where there are none: results of before."""
    known = set(Metric.__dataclass_fields__)
    found = tuple(Metric(**{k: v for k, v in one.items() if k in known}) for one in given or ())
    return found or CLASSIFICATION


def retention(student: float | None, teacher: float | None) -> float | None:
    """Return the student's metric ÷ the teacher's; None where a ratio means nothing: of a teacher at 0 or below."""
    return student / teacher if student is not None and teacher is not None and teacher > 0 else None


CLASSIFICATION = (
    Metric("acc1", "top-1", share=True, counted=True, hub="accuracy"),
    Metric("acc5", "top-5", share=True),
    Metric("nll", "NLL", better="min"),
    Metric("ece", "ECE", better="min", share=True),
    Metric("agreement", "agreement", share=True, beside_teacher=True),
    Metric("kl", "KL to the teacher", better="min", beside_teacher=True),
)
