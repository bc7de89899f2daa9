"""What every loss term sees: the answers of both networks, the batch, and the small contract of a term."""

from __future__ import annotations

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
    index: Tensor  # (batch,) int64: position of the sample in the data set, stable over epochs


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
        """The tapped tensors, student's and teacher's, side by side."""
        names = zip(self.student_taps or (), self.teacher_taps or (), strict=True)
        return [(student.features[str(s)], teacher.features[str(t)]) for s, t in names]


def check_temperature(temperature: float) -> float:
    """The temperature, or ``ValueError`` when it is not a finite number above zero."""
    if not (temperature > 0 and torch.isfinite(torch.tensor(float(temperature)))):
        raise ValueError(f"temperature = {temperature} is not allowed: it must be a finite number above 0")
    return float(temperature)
