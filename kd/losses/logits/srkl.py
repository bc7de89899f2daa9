"""Skewed reverse KL: Ko et al., DistiLLM: Towards Streamlined Distillation for LLMs, ICML 2024, arXiv 2402.03898."""

from __future__ import annotations

from torch import Tensor

from kd.losses.base import Batch, Fused, Output, Term, check_temperature
from kd.losses.logits._divergences import check_share, kl, log_mixture, log_probabilities, mean_over_rows

__all__ = ["skewed_reverse_kl_divergence"]


def skewed_reverse_kl_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """Compute T² · mean over rows of KL(p_s ‖ (1 − α) p_t + α p_s), p = softmax(z / T): skewed reverse KL, section 3.1.

    Both logits (rows, classes); ``temperature`` > 0; ``alpha`` from 0 (reverse KL) to below 1. The gradient goes
    through both places of the student's distribution. At most −ln α. 0 for equal logits and without rows.

    Paper and code agree here; only the forward one differs by an entropy
    (:func:`~kd.losses.logits.skl.skewed_kl_divergence`), so the two values are on one scale here and not in the code.
    """
    check_share("alpha", alpha, one=False)
    log_p_student, log_p_teacher = log_probabilities(student_logits, teacher_logits, temperature)
    mixture = log_mixture(log_p_student, log_p_teacher, alpha)
    return mean_over_rows(kl(log_p_student, mixture), temperature)


class SkewedReverseKL(Term):
    """:func:`skewed_reverse_kl_divergence` of the logits, over all rows; the paper uses α = 0.1, T = 1."""

    def __init__(self, temperature: float = 1.0, alpha: float = 0.1) -> None:
        super().__init__()
        self.temperature = self.reads_softmax_at = check_temperature(temperature)
        self.alpha = check_share("alpha", alpha, one=False)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows, times T²."""
        return skewed_reverse_kl_divergence(student.logits, teacher.logits, self.temperature, self.alpha)

    def fused(self) -> Fused:
        """Return what computes the same from hidden states."""
        return Fused("skewed_reverse_kl", self.temperature, self.alpha)
