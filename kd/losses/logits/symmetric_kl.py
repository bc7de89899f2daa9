"""Symmetric KL: Wu et al., Rethinking Kullback-Leibler Divergence in KD for LLMs, COLING 2025, arXiv 2404.02657."""

from __future__ import annotations

from torch import Tensor

from kd.losses.base import Batch, Output, Term, check_temperature
from kd.losses.logits._divergences import check_share, kl, log_probabilities, mean_over_rows

__all__ = ["symmetric_kl_divergence"]


def symmetric_kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, reverse_share: float = 0.5
) -> Tensor:
    """Compute T² · mean over rows of (1 − r) · KL(teacher ‖ student) + r · KL(student ‖ teacher), p = softmax(z / T).

    Both logits (rows, classes); ``temperature`` > 0; ``reverse_share`` r from 0 (forward KL) to 1 (reverse KL). At ½ it
    is half of Jeffreys' divergence, the baseline of the paper that weights both parts alike. 0 without rows.

    Public code differs in the side of the weight: r is ``lam`` of DistiLLM and 1 − ``sym_kd_ratio`` of torchtune; both
    take the cross-entropy for the forward part, larger by (1 − r) times the teacher's entropy, with the same gradient.
    """
    check_share("reverse_share", reverse_share)
    log_p_student, log_p_teacher = log_probabilities(student_logits, teacher_logits, temperature)
    forward, reverse = kl(log_p_teacher, log_p_student), kl(log_p_student, log_p_teacher)
    return mean_over_rows((1 - reverse_share) * forward + reverse_share * reverse, temperature)


class SymmetricKL(Term):
    """:func:`symmetric_kl_divergence` of the logits, over all rows."""

    def __init__(self, temperature: float = 1.0, reverse_share: float = 0.5) -> None:
        super().__init__()
        self.temperature = self.reads_softmax_at = check_temperature(temperature)
        self.reverse_share = check_share("reverse_share", reverse_share)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows, times T²."""
        return symmetric_kl_divergence(student.logits, teacher.logits, self.temperature, self.reverse_share)
