"""Reverse KL: Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, ICLR 2024, arXiv 2306.08543."""

from __future__ import annotations

from torch import Tensor

from kd.losses.base import Batch, Fused, Output, Term, check_temperature
from kd.losses.logits._divergences import kl, log_probabilities, mean_over_rows

__all__ = ["reverse_kl_divergence"]


def reverse_kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute T² · mean over rows of Σ_c p_s (log p_s − log p_t), with p = softmax(z / T): KL(student ‖ teacher).

    Both logits (rows, classes), any further leading dimensions count as rows; ``temperature`` > 0. It leaves out modes
    of the teacher that the student has no room for, where the forward KL covers them all. Finite for half-precision
    logits 10⁴ apart; 0 without rows.

    The paper minimises it over whole sequences by a policy gradient; this is its single-step part (section 2.2), which
    is what public code calls reverse KL, at T = 1. Code that leaves T² out (TRL) is smaller by it.
    """
    log_p_student, log_p_teacher = log_probabilities(student_logits, teacher_logits, temperature)
    return mean_over_rows(kl(log_p_student, log_p_teacher), temperature)


class ReverseKL(Term):
    """:func:`reverse_kl_divergence` of the logits, over all rows."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = self.reads_softmax_at = check_temperature(temperature)

    def forward(self, student: Output, teacher: Output, batch: Batch) -> Tensor:
        """Compute the mean over the rows, times T²."""
        return reverse_kl_divergence(student.logits, teacher.logits, self.temperature)

    def fused(self) -> Fused:
        """Return what computes the same from hidden states."""
        return Fused("reverse_kl", self.temperature)
