"""NormKD: Chi et al., NormKD: Normalized Logits for Knowledge Distillation, arXiv preprint 2023, arXiv 2308.00520."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch, Output, Term, at_least_float32, check_same_shape
from kd.losses.logits._divergences import check_positive, kl, mean_over_rows, spread

__all__ = ["normalised_kl_divergence"]


def normalised_kl_divergence(student_logits: Tensor, teacher_logits: Tensor, factor: float = 2.0) -> Tensor:
    """Compute the mean over rows of T_t² KL(softmax(z_t / T_t) ‖ softmax(z_s / T_s)), T = ``factor`` · σ of each row.

    σ is the unbiased standard deviation of a row's logits over its classes; student and teacher have each their own.
    Both logits (rows, classes), any further leading dimensions count as rows; ``factor`` above 0. The gradient goes
    through the student's σ; where a row of it has none yet, the teacher's is taken. 0 for equal logits and without
    rows.

    The shape is that of :func:`~kd.losses.logits.standardised.standardised_logits`, which a softmax sees without their
    mean as well; but here the factor is the teacher's own T².
    """
    check_same_shape("logits", student_logits, teacher_logits)
    check_positive("factor", factor)
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits)
    t_teacher = factor * spread(teacher)
    t_student = factor * spread(student, flat=t_teacher / factor)
    log_p_student, log_p_teacher = F.log_softmax(student / t_student, -1), F.log_softmax(teacher / t_teacher, -1)
    return mean_over_rows(t_teacher.squeeze(-1).square() * kl(log_p_teacher, log_p_student))


class NormalisedLogits(Term):
    """:func:`normalised_kl_divergence` of the logits, over all rows."""

    every_class = True

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = check_positive("factor", factor)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows."""
        return normalised_kl_divergence(student.logits, teacher.logits, self.factor)
