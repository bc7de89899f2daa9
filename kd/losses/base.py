"""What every loss term sees: the answers of both networks, the batch, and the small contract of a term."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

UNLABELLED = -1  # the target of a row whose label is withheld; it still belongs to the transfer set


class Batch(NamedTuple):
    """One batch as the data modules make it and the terms see it."""

    inputs: Tensor  # (batch, channels, height, width), normalised
    targets: Tensor  # (rows,) int64; UNLABELLED where the label is withheld
    index: Tensor  # type: ignore[assignment]  # (batch,) int64: place in the data set, stable over epochs
    teacher_inputs: Tensor | None = None  # what the teacher sees of the same images; None: the inputs


@dataclass
class Output:
    """What a network answered: ``logits`` (rows, classes), if any term asked, and the tapped tensors by name."""

    logits: Tensor | None = None
    features: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> Tensor:
        """The logits, for terms that declared that they need them."""
        if self.logits is None:
            raise ValueError("this term reads logits, but does not declare it: set needs_logits = True on its class")
        return self.logits


class Term(nn.Module):
    """One named summand of the objective: ``forward(student, teacher, batch) -> scalar``, not yet weighted.

    A subclass declares what it needs; the distiller supplies it, or refuses before the first batch.

    ``student_taps`` / ``teacher_taps``
        Names of the tensors to record on each side: module names (``"layer2"``, ``"layer2.0.act:input"``) or
        integers (stage numbers of the network, negative ones from the end). ``None`` stands for all stages.
        After :meth:`prepare` both are lists of plain names, the keys of ``Output.features``.
    ``needs_teacher``, ``needs_logits``, ``needs_labels``
        Whether the term reads the teacher, the logits (of both networks) and ``batch.targets``.
    """

    needs_teacher: bool = True
    needs_logits: bool = True
    needs_labels: bool = False

    student_taps: Sequence[str | int] | None = ()
    teacher_taps: Sequence[str | int] | None = ()

    def prepare(self, student: Output, teacher: Output) -> None:
        """Look at one dry batch (no gradient) and build adapters. Called once, before the optimiser is built.

        Raises ``ValueError`` with one sentence when the shapes cannot be matched.
        """

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """The mean loss over the rows, a scalar."""
        raise TypeError(f"{type(self).__name__} does not define forward(student, teacher, batch)")

    def pairs(self, student: Output, teacher: Output) -> list[tuple[Tensor, Tensor]]:
        """The tapped tensors, student's and teacher's, side by side. ``ValueError`` when they are not equally many.

        Taps that are still ``None`` (no distiller has resolved them) stand for everything that was recorded.
        """
        students = list(student.features if self.student_taps is None else self.student_taps)
        teachers = list(teacher.features if self.teacher_taps is None else self.teacher_taps)
        if len(students) != len(teachers) or not students:
            raise ValueError(
                f"student_taps = {students} and teacher_taps = {teachers} are not allowed: "
                f"they are compared pair by pair, so both must name equally many taps, one or more"
            )
        return [
            (_recorded(student, s, "student"), _recorded(teacher, t, "teacher"))
            for s, t in zip(students, teachers, strict=True)
        ]


def _recorded(output: Output, tap: str | int, side: str) -> Tensor:
    if str(tap) not in output.features:
        raise ValueError(f"{side} tap {tap} was not recorded: there are {', '.join(output.features) or 'none'}")
    return output.features[str(tap)]


# ---------------------------------------------------------------------- shared by the pure functions


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay: sums of squares and exponents overflow in halves."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def check_same_shape(what: str, student: Tensor, teacher: Tensor) -> None:
    """``ValueError`` when the shapes differ: broadcasting would give a number, and a wrong one."""
    if student.shape != teacher.shape:
        shapes = f"the student's is {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}"
        raise ValueError(f"{what} must have one shape: {shapes}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """The value, or ``ValueError`` when it is not one of the choices."""
    if value not in choices:
        allowed = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise ValueError(f"{name} = {value} is not allowed: it must be {allowed}")
    return value


def check_temperature(temperature: float) -> float:
    """The temperature, or ``ValueError`` when it is not a finite number above zero."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature = {temperature} is not allowed: it must be a finite number above 0")
    return float(temperature)
