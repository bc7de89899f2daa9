"""What a decision is made of and by: columns of a table, the margin, what is compared. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Columns:
    """The columns of a table by what they hold; None: it has no such column.

    ``…_confidence``: of the answer, 0 to 1. ``…_probabilities``: what the columns of the classes begin with; the rest
    of each name is the class. ``slices``: further columns.
    """

    label: str | None = None
    student: str = "student"
    teacher: str = "teacher"
    student_confidence: str | None = None
    teacher_confidence: str | None = None
    student_probabilities: str | None = None
    teacher_probabilities: str | None = None
    text: str | None = None
    slices: Sequence[str] = ()


@dataclass(frozen=True)
class Settings:
    """What is decided by.

    ``margin``: accepted loss of accuracy, a share; ``target``: accuracy of the cascade, None: the teacher's − margin.
    ``slices``: class, length (characters of the text, in quartiles), or columns of the examples; ``show``: how many
    disagreements are kept; ``seed``: of the bootstrap and of a random validation part.
    """

    margin: float = 0.03
    target: float | None = None
    slices: Sequence[str] = ()
    show: int = 10
    seed: int = 0
