"""WTTM: Zheng and Yang, KD Based on Transformed Teacher Matching, ICLR 2024, arXiv 2402.11148."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses.base import Batch, Output, Term, at_least_float32, check_same_shape
from kd.losses.logits._divergences import check_positive, kl, mean_over_rows

__all__ = ["weighted_transformed_teacher_kl"]


def weighted_transformed_teacher_kl(student_logits: Tensor, teacher_logits: Tensor, gamma: float = 0.2) -> Tensor:
    """Compute the mean over rows of u · KL(p_t^γ / u ‖ p_s) with u = Σ_c p_t^γ, p = softmax(z).

    :func:`~kd.losses.logits.ttm.transformed_teacher_kl` in which a row of which the teacher is unsure counts more: u is
    1 for one sure class and C^(1 − γ) for an even distribution over C classes. It is not normalised over the batch, so
    the weight of the term must be smaller than TTM's.

    Both logits (rows, classes), any further leading dimensions count as rows; ``gamma`` above 0. 0 without rows. No T².
    """
    check_same_shape("logits", student_logits, teacher_logits)
    log_p_student, log_p_teacher = (
        F.log_softmax(at_least_float32(z), dim=-1) for z in (student_logits, teacher_logits)
    )
    powers = log_p_teacher * check_positive("gamma", gamma)
    log_u = powers.logsumexp(-1, keepdim=True)
    return mean_over_rows(log_u.exp().squeeze(-1) * kl(powers - log_u, log_p_student))


class WeightedTransformedTeacher(Term):
    """:func:`weighted_transformed_teacher_kl` of the logits, over all rows."""

    def __init__(self, gamma: float = 0.2) -> None:
        super().__init__()
        self.gamma = check_positive("gamma", gamma)
        self.reads_softmax_at = 1 / self.gamma

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows."""
        return weighted_transformed_teacher_kl(student.logits, teacher.logits, self.gamma)
