"""AB: Heo et al., Knowledge Transfer via Distillation of Activation Boundaries, AAAI 2019, arXiv 1811.03233."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd.losses.adapters import pointwise
from kd.losses.base import Batch, Output, at_least_float32, check_same_shape
from kd.losses.feature_term import FeatureTerm, full_precision
from kd.losses.layouts import Tapped

__all__ = ["activation_boundary"]


def activation_boundary(
    student_features: Sequence[Tensor], teacher_features: Sequence[Tensor], margin: float = 1.0
) -> Tensor:
    """Compute the squared distance of the student's responses to the margin on the side of 0 of the teacher's (Eq. 7).

    Responses (B, C, H, W) before the activation, of equal shapes. Of a layer the sum over its elements, mean over the
    samples; the last layer counts 1, each one before it half as much. The code's factor 3/1000 is the weight.
    """
    total = []
    for depth, (student, teacher) in enumerate(zip(student_features, teacher_features, strict=True)):
        check_same_shape("features", student, teacher)
        student = at_least_float32(student)
        missed = torch.where(teacher > 0, margin - student, margin + student).relu()
        total.append(2.0 ** (depth - len(student_features) + 1) * missed.square().flatten(1).sum(1).mean())
    return torch.stack(total).sum()


class ActivationBoundary(FeatureTerm):
    """:func:`activation_boundary` of what enters the activation at the end of each stage, the student's adapted.

    The adapter is a 1×1 convolution with batch norm. Published is an initialisation of 30 epochs with this term alone,
    then training with labels: a schedule, ``{_target_: kd.distill.schedules.Step, milestones: [30], gamma: 0}``.
    """

    over = "batch"

    def __init__(
        self,
        student_taps: Sequence[str | int] | None = ("all:preactivation",),
        teacher_taps: Sequence[str | int] | None = ("all:preactivation",),
        margin: float = 1.0,
    ) -> None:
        super().__init__(student_taps, teacher_taps)
        if not 0 <= margin < math.inf:
            raise ValueError(f"margin = {margin} is not allowed: it must be a finite number, 0 or more")
        self.margin = margin

    def sides(self, student: Tapped, teacher: Tapped) -> tuple[nn.Module, nn.Module]:
        """Return modules that make maps on the teacher's grid, the student's through the adapter."""
        return pointwise(self.method, "auto", student, teacher, norm=True)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the sum over the layers."""
        pairs = self.compared(student, teacher)
        with full_precision(pairs[0][0]):
            return activation_boundary([s for s, _ in pairs], [t for _, t in pairs], self.margin)
