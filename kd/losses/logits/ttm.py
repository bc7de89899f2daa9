"""TTM: Zheng and Yang, KD Based on Transformed Teacher Matching, ICLR 2024, arXiv 2402.11148."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch, Output, Term, at_least_float32, check_same_shape
from kd.losses.logits._divergences import check_positive, kl, mean_over_rows

__all__ = ["transformed_teacher_kl"]


def transformed_teacher_kl(student_logits: Tensor, teacher_logits: Tensor, gamma: float = 0.1) -> Tensor:
    """Compute the mean over rows of KL(p_t^γ / Σ_c p_t^γ ‖ p_s), p = softmax(z).

    The teacher's distribution to the power γ is its softmax at T = 1 / γ; the student's stays at T = 1, which is KD
    with a Rényi entropy that regularises the student. Not 0 for equal logits.

    Both logits (rows, classes), any further leading dimensions count as rows; ``gamma`` above 0. 0 without rows. No T².
    """
    check_same_shape("logits", student_logits, teacher_logits)
    log_p_student = F.log_softmax(at_least_float32(student_logits), dim=-1)
    log_p_teacher = F.log_softmax(at_least_float32(teacher_logits) * check_positive("gamma", gamma), dim=-1)
    return mean_over_rows(kl(log_p_teacher, log_p_student))


class TransformedTeacher(Term):
    """:func:`transformed_teacher_kl` of the logits, over all rows."""

    def __init__(self, gamma: float = 0.1) -> None:
        super().__init__()
        self.gamma = check_positive("gamma", gamma)
        self.reads_softmax_at = 1 / self.gamma

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows."""
        return transformed_teacher_kl(student.logits, teacher.logits, self.gamma)
