"""BKD: Hao et al., Revisit the Power of Vanilla Knowledge Distillation, NeurIPS 2023, arXiv 2305.15781."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch, Output, Term, at_least_float32, check_same_shape

__all__ = ["binary_distillation"]


def binary_distillation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Compute the mean over rows and classes of the binary cross-entropy of sigmoid(z_s) with softmax(z_t).

    Each class is a question of its own, for recipes that train on binary cross-entropy.

    Both logits (rows, classes), any further leading dimensions count as rows. Not 0 for equal logits. 0 without rows.
    No T.
    """
    check_same_shape("logits", student_logits, teacher_logits)
    student, goal = at_least_float32(student_logits), at_least_float32(teacher_logits).softmax(-1)
    return F.binary_cross_entropy_with_logits(student, goal, reduction="sum") / max(1, student.numel())


class BinaryDistillation(Term):
    """:func:`binary_distillation` of the logits, over all rows."""

    reads_softmax_at = 1.0

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows."""
        return binary_distillation(student.logits, teacher.logits)
